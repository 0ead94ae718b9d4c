package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/cri"
	"github.com/crisp-cri/crisp/image"
	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/network/auto"
	"github.com/crisp-cri/crisp/network/bridge"
	"github.com/crisp-cri/crisp/network/cni"
	"github.com/crisp-cri/crisp/network/netns"
	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/cdi"
	"github.com/crisp-cri/crisp/runtime/cgroup"
	"github.com/crisp-cri/crisp/runtime/spawn"
)

// parts are the packages of a running daemon, opened.
type parts struct {
	images  *image.Store
	cgroups *cgroup.Driver
	driver  string // of cgroups: "cgroupfs" or "systemd"
	network network.Network
	spawner *spawn.Spawner
	pods    *podsandbox.Manager
	cdi     *cdi.Registry // nil: none
	// appArmor is nil for a kernel without.
	appArmor cri.Profiles

	closers []func() error // last opened, first closed
}

// assemble opens every package in the order in which they need each other. On
// error all that was opened is closed again.
func assemble(ctx context.Context, cfg *Config) (_ *parts, err error) {
	p := &parts{}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	if p.images, err = image.Open(imageConfig(cfg)); err != nil {
		return nil, fmt.Errorf("cannot open images: %w", err)
	}
	p.closers = append(p.closers, p.images.Close)

	if p.driver, err = cgroupDriver(cfg); err != nil {
		return nil, fmt.Errorf("cannot use cgroups: %w", err)
	}
	if p.cgroups, err = cgroup.New(ctx, cgroup.Config{Systemd: p.driver == "systemd", Root: cfg.Cgroup.Root}); err != nil {
		return nil, fmt.Errorf("cannot use cgroups (cgroup.driver is %s): %w", p.driver, err)
	}
	p.closers = append(p.closers, p.cgroups.Close)

	pins, err := netns.OpenDir(cfg.Network.NetNSDir)
	if err != nil {
		return nil, fmt.Errorf("network.netns_dir: %w", err)
	}
	p.closers = append(p.closers, pins.Close)

	embedded, err := bridge.New(bridgeConfig(cfg))
	if err != nil {
		return nil, fmt.Errorf("cannot open the network: %w", err)
	}
	p.closers = append(p.closers, embedded.Close)
	plugins, err := cni.New(cniConfig(cfg))
	if err != nil {
		return nil, fmt.Errorf("cannot open the network: %w", err)
	}
	p.closers = append(p.closers, plugins.Close)
	switch cfg.Network.Mode {
	case "bridge":
		p.network = embedded
	case "cni":
		p.network = plugins
	default:
		p.network = auto.New(plugins, embedded)
	}
	var others []network.Network // of pods that were born with another mode
	for _, n := range []network.Network{embedded, plugins} {
		if n != p.network {
			others = append(others, n)
		}
	}

	if len(cfg.CDI.SpecDirs) > 0 {
		if p.cdi, err = cdi.New(cfg.CDI.SpecDirs); err != nil {
			return nil, fmt.Errorf("cannot read CDI devices (cdi.spec_dirs): %w", err)
		}
	}

	if p.spawner, err = spawn.New(cfg.Runtime.InitPath, filepath.Join(cfg.RunRoot, "scratch")); err != nil {
		return nil, fmt.Errorf("cannot prepare pods (runtime.init_path): %w", err)
	}
	p.closers = append(p.closers, p.spawner.Close)

	p.pods, err = podsandbox.NewManager(podsandbox.Config{
		StateDir: cfg.StateRoot,
		RunDir:   cfg.RunRoot,
		Spawner:  podsandbox.FromSpawn(p.spawner),
		Cgroups:  podsandbox.FromCgroup(p.cgroups),
		Images:   p.images,
		Network:  p.network,
		Networks: others,
		NetNS:    pins,
	})
	if err != nil {
		return nil, err
	}
	p.closers = append(p.closers, p.pods.Close)
	return p, nil
}

// close ends the daemon's side of everything. Pods live on.
// cgroupDriver is cgroup.driver, with "auto" decided.
func cgroupDriver(cfg *Config) (string, error) {
	if cfg.Cgroup.Driver != "auto" {
		return cfg.Cgroup.Driver, nil
	}
	systemd, err := cgroup.UseSystemd()
	if systemd {
		return "systemd", err
	}
	return "cgroupfs", err
}

func (p *parts) close() error {
	var errs []error
	for len(p.closers) > 0 {
		last := len(p.closers) - 1
		errs = append(errs, p.closers[last]())
		p.closers = p.closers[:last]
	}
	return errors.Join(errs...)
}

func imageConfig(cfg *Config) image.Config {
	return image.Config{
		Root:              filepath.Join(cfg.StateRoot, "images"),
		RegistryConfigDir: cfg.Image.CertsDir,
		KeepCompressed:    cfg.Image.KeepCompressed,
		StallTimeout:      time.Duration(cfg.Image.StallTimeout),
		ParallelLayers:    cfg.Image.ParallelLayers,
		Pinned:            cfg.Image.Pinned,
		UserAgent:         "crisp/" + version,
		Limits: image.Limits{
			DocumentBytes: int64(cfg.Image.MaxDocumentSize),
			Layers:        cfg.Image.MaxLayers,
			ImageBytes:    int64(cfg.Image.MaxImageSize),
			ImageEntries:  cfg.Image.MaxImageEntries,
		},
	}
}

func bridgeConfig(cfg *Config) bridge.Config {
	return bridge.Config{
		Bridge:           cfg.Network.Bridge,
		Table:            cfg.Network.Table,
		Subnets:          cfg.Network.Subnets,
		MTU:              cfg.Network.MTU,
		NoMasquerade:     !cfg.Network.Masquerade,
		MasqueradeExcept: cfg.Network.MasqueradeExcept,
		NoAntiSpoof:      !cfg.Network.AntiSpoof,
	}
}

func cniConfig(cfg *Config) cni.Config {
	return cni.Config{
		ConfDir:    cfg.Network.CNIConfDir,
		BinDirs:    cfg.Network.CNIBinDirs,
		ScratchDir: filepath.Join(cfg.RunRoot, "cni"),
		Standby:    cfg.Network.Mode == "bridge",
	}
}

// openStreaming listens for sessions; an empty address is none.
func openStreaming(cfg StreamingConfig) (s cri.StreamingConfig, err error) {
	s.Idle = time.Duration(cfg.IdleTimeout)
	if cfg.Address == "" {
		return s, nil
	}
	if cfg.TLSCert != "" {
		pair, err := tls.LoadX509KeyPair(cfg.TLSCert, cfg.TLSKey)
		if err != nil {
			return s, fmt.Errorf("streaming.tls_cert, streaming.tls_key: %w", err)
		}
		s.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
	}
	if s.Listener, err = net.Listen("tcp", cfg.Address); err != nil {
		return s, fmt.Errorf("streaming.address: %w", err)
	}
	if a, ok := s.Listener.Addr().(*net.TCPAddr); ok && !a.IP.IsLoopback() && s.TLS == nil {
		klog.InfoS("Streaming without TLS on an address that others can reach: who sees a URL before it is used has the session", "address", a)
	}
	return s, nil
}

func criConfig(cfg *Config, p *parts, host cri.Host, streaming cri.StreamingConfig) cri.Config {
	return cri.Config{
		Pods:                p.pods,
		Images:              p.images,
		Network:             p.network,
		Host:                host,
		Version:             version,
		CgroupDriver:        p.driver,
		CheckCgroupParent:   p.cgroups.ValidateParent,
		Handlers:            cfg.Runtime.Handlers,
		DefaultCapabilities: cfg.Runtime.DefaultCapabilities,
		UnsetSeccompProfile: cfg.Runtime.UnsetSeccompProfile,
		DefaultSysctls:      cfg.Runtime.DefaultSysctls,
		CDI:                 p.cdi,
		CDIAnnotations:      cfg.CDI.Annotations,
		SELinux:             cfg.Runtime.SELinux,
		AppArmor:            p.appArmor,
		Streaming:           streaming,
		Settings:            cfg,
	}
}

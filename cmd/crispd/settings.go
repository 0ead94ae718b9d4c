package main

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/crisp-cri/crisp/network/bridge"
	"github.com/crisp-cri/crisp/network/cni"
	"github.com/crisp-cri/crisp/network/netns"
	"github.com/crisp-cri/crisp/runtime/cdi"
)

// Config is the daemon's configuration: what Defaults says, with the file's and
// the flags' keys laid over it (source.load). The comments are what `crispd
// config` prints. Maps and lists in the file replace the default whole, except
// default_sysctls, whose keys are added.
type Config struct {
	StateRoot    string   `toml:"state_root" comment:"What survives a reboot: pods' records, images, writable layers. One crispd per directory."`
	RunRoot      string   `toml:"run_root" comment:"What does not: sockets and journals of live pods. Must be emptied by a reboot (a tmpfs)."`
	Socket       string   `toml:"socket" comment:"CRI socket, mode 0660, owned by root. \"\": crisp.sock in run_root."`
	LogLevel     int      `toml:"log_level" comment:"0 what an operator must know, 2 state changes, 4 steps and timings, 5 traces"`
	DrainTimeout Duration `toml:"drain_timeout" comment:"How long SIGTERM waits for running calls. Pods keep running in any case."`

	Cgroup    CgroupConfig    `toml:"cgroup"`
	Network   NetworkConfig   `toml:"network"`
	Image     ImageConfig     `toml:"image"`
	Runtime   RuntimeConfig   `toml:"runtime"`
	Streaming StreamingConfig `toml:"streaming"`
	CDI       CDIConfig       `toml:"cdi"`
}

// CDIConfig says where devices of the Container Device Interface are described.
type CDIConfig struct {
	SpecDirs    []string `toml:"spec_dirs" comment:"CDI files, by which drivers describe devices; a later directory has precedence. Looked at anew for each container that asks. []: no CDI"`
	Annotations bool     `toml:"annotations" comment:"Containers' annotations cdi.k8s.io/... name devices, too: for device plugins from before the CRI field CDI_devices. Pods' annotations never do"`
}

// StreamingConfig says where exec, attach and port-forward are served.
type StreamingConfig struct {
	Address     string   `toml:"address" comment:"Where exec, attach and port-forward are served; port 0: any free one. The kubelet must be able to dial it; anything but loopback wants TLS. \"\": nowhere"`
	IdleTimeout Duration `toml:"idle_timeout" comment:"A session over which nothing moves for so long is ended"`
	TLSCert     string   `toml:"tls_cert" comment:"PEM files of the certificate and its key; both or none"`
	TLSKey      string   `toml:"tls_key"`
}

// CgroupConfig says where pods' cgroups are.
type CgroupConfig struct {
	Driver string `toml:"driver" comment:"\"systemd\": pods are scopes of systemd; needs cgroup v2. \"cgroupfs\": directories. \"auto\": systemd where it runs and cgroups are v2, else cgroupfs. Told to the kubelet, which follows; so change it while the node has no pods"`
	Root   string `toml:"root" comment:"Parent of pods whose config names no cgroup_parent (crictl's); the kubelet names one. With the systemd driver a slice: /crisp is crisp.slice"`
}

// NetworkConfig says how pods get their network.
type NetworkConfig struct {
	Mode             string         `toml:"mode" comment:"Of new pods; existing ones keep theirs. \"bridge\": the embedded one. \"cni\": plugins of others. \"auto\": CNI when cni_conf_dir has a configuration, else the bridge; say \"cni\" where a pod must not come up before the configuration does"`
	CNIConfDir       string         `toml:"cni_conf_dir" comment:"CNI configurations: the first valid one counts, in the order of names. Watched"`
	CNIBinDirs       []string       `toml:"cni_bin_dirs" comment:"CNI plugins' programs; the first directory that has one counts"`
	Bridge           string         `toml:"bridge" comment:"Name of the bridge that is made"`
	Table            string         `toml:"table" comment:"Name of the nftables tables (families inet and bridge) that are made; no others are touched"`
	Subnets          []netip.Prefix `toml:"subnets" comment:"Pods' addresses until the kubelet names a pod CIDR: one range of IPv4, IPv6 or both, the primary family first"`
	MTU              int            `toml:"mtu" comment:"0: that of the link with the default route"`
	Masquerade       bool           `toml:"masquerade" comment:"Hide pods behind the host's address when they talk to the outside"`
	MasqueradeExcept []netip.Prefix `toml:"masquerade_except" comment:"Destinations that see pods' own addresses: other nodes' ranges, when there are routes to them"`
	AntiSpoof        bool           `toml:"anti_spoof" comment:"Pods send from their own addresses only"`
	NetNSDir         string         `toml:"netns_dir" comment:"Where pods' network namespaces are visible to ip netns and others"`
}

// ImageConfig says how images are pulled and kept.
type ImageConfig struct {
	CertsDir       string   `toml:"certs_dir" comment:"Registry hosts in containerd's layout: HOST/hosts.toml, _default/hosts.toml. Read anew at every pull."`
	KeepCompressed bool     `toml:"keep_compressed" comment:"Keep layers' compressed blobs after unpacking (costs disk; nothing of crisp needs them again)"`
	ParallelLayers int      `toml:"parallel_layers" comment:"Layers that are downloaded and unpacked at a time, over all pulls"`
	StallTimeout   Duration `toml:"stall_timeout" comment:"A download that receives nothing for so long is given up; a slow one is not"`
	Pinned         []string `toml:"pinned" comment:"References of images that the kubelet must not collect"`

	MaxLayers       int   `toml:"max_layers" comment:"Limits of one image. What exceeds one is refused, with the limit's name, and nothing of it stays."`
	MaxImageSize    Size  `toml:"max_image_size" comment:"All its files, unpacked"`
	MaxImageEntries int64 `toml:"max_image_entries" comment:"Entries of all its layers' archives"`
	MaxDocumentSize Size  `toml:"max_document_size" comment:"Its manifest, index or config"`
}

// RuntimeConfig says how containers are run.
type RuntimeConfig struct {
	InitPath            string            `toml:"init_path" comment:"The pod init. \"\": crisp-init beside crispd. Copied into sealed memory at start; replacing the file touches no running pod."`
	DefaultCapabilities []string          `toml:"default_capabilities" comment:"Of containers that do not say otherwise; the same 14 as containerd and Docker"`
	UnsetSeccompProfile string            `toml:"unset_seccomp_profile" comment:"For containers whose config names no seccomp profile: \"Unconfined\" or \"RuntimeDefault\""`
	Handlers            []string          `toml:"handlers" comment:"Names of runtime handlers (RuntimeClass) that mean this runtime, besides \"\""`
	SELinux             bool              `toml:"selinux" comment:"Pods get SELinux labels, by the policy for containers (package container-selinux), with categories of their own. The kernel must have SELinux on"`
	DefaultSysctls      map[string]string `toml:"default_sysctls" comment:"Of pods with their own network, unless the pod sets them"`
}

// Defaults is the configuration of an absent file.
func Defaults() *Config {
	return &Config{
		StateRoot:    "/var/lib/crisp",
		RunRoot:      "/run/crisp",
		LogLevel:     2,
		DrainTimeout: Duration(30 * time.Second),
		Cgroup:       CgroupConfig{Driver: "auto", Root: "/crisp"},
		Network: NetworkConfig{
			Mode:             "auto",
			CNIConfDir:       cni.DefaultConfDir,
			CNIBinDirs:       cni.DefaultBinDirs(),
			Bridge:           bridge.DefaultBridge,
			Table:            bridge.DefaultTable,
			Subnets:          bridge.DefaultSubnets(),
			Masquerade:       true,
			MasqueradeExcept: []netip.Prefix{},
			AntiSpoof:        true,
			NetNSDir:         netns.DefaultDir,
		},
		Image: ImageConfig{
			CertsDir:        "/etc/crisp/certs.d",
			ParallelLayers:  4,
			StallTimeout:    Duration(5 * time.Minute),
			Pinned:          []string{},
			MaxLayers:       250, // overlayfs takes 500 lowers
			MaxImageSize:    256 << 30,
			MaxImageEntries: 4_000_000,
			MaxDocumentSize: 4 << 20,
		},
		Runtime: RuntimeConfig{
			// Docker's and containerd's defaults (containerd pkg/oci/spec.go defaultUnixCaps).
			DefaultCapabilities: []string{
				"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
				"CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
			},
			UnsetSeccompProfile: "Unconfined",
			Handlers:            []string{},
			// containerd's since 2.0 (config version 3).
			DefaultSysctls: map[string]string{
				"net.ipv4.ip_unprivileged_port_start": "0",
				"net.ipv4.ping_group_range":           "0 2147483647",
			},
		},
		CDI:       CDIConfig{SpecDirs: cdi.DefaultDirs()},
		Streaming: StreamingConfig{Address: "127.0.0.1:0", IdleTimeout: Duration(4 * time.Hour)},
	}
}

var (
	// linkName is what the kernel takes (dev_valid_name, IFNAMSIZ 16) and a user can type.
	linkName = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_.-]{0,14}$`)
	// tableName is what nft(8) takes without quotes.
	tableName = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_-]{0,30}$`)
	capName   = regexp.MustCompile(`^CAP_[A-Z_]+$`)
	dnsLabel  = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	sysctlKey = regexp.MustCompile(`^[a-z0-9_]+(\.[a-zA-Z0-9_-]+)+$`) // as package cri has it
)

// Validate names every wrong key, not only the first.
func (c *Config) Validate() error {
	var errs []error
	wrong := func(key string, value any, want string) {
		errs = append(errs, fmt.Errorf("%s = %v: want %s", key, quote(value), want))
	}
	for key, path := range map[string]string{
		"state_root": c.StateRoot, "run_root": c.RunRoot, "socket": c.Socket,
		"network.netns_dir": c.Network.NetNSDir, "network.cni_conf_dir": c.Network.CNIConfDir, "image.certs_dir": c.Image.CertsDir, "runtime.init_path": c.Runtime.InitPath,
		"cgroup.root": c.Cgroup.Root,
	} {
		if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
			wrong(key, path, "an absolute path without . and .., not /")
		}
	}
	if within(c.StateRoot, c.RunRoot) || within(c.RunRoot, c.StateRoot) {
		wrong("run_root", c.RunRoot, "neither state_root nor a directory above or below it")
	}
	// sockaddr_un.sun_path, unix(7): 108 bytes with the final NUL.
	if len(c.Socket) > 107 {
		wrong("socket", c.Socket, "at most 107 bytes")
	}
	if c.LogLevel < 0 || c.LogLevel > 10 {
		wrong("log_level", c.LogLevel, "0 to 10")
	}
	if c.DrainTimeout < 0 {
		wrong("drain_timeout", time.Duration(c.DrainTimeout), "no negative duration")
	}
	if !slices.Contains([]string{"auto", "cgroupfs", "systemd"}, c.Cgroup.Driver) {
		wrong("cgroup.driver", c.Cgroup.Driver, `"auto", "cgroupfs" or "systemd"`)
	}
	errs = append(errs, c.Network.validate()...)
	errs = append(errs, c.Image.validate()...)
	errs = append(errs, c.Runtime.validate()...)
	errs = append(errs, c.Streaming.validate()...)
	for _, dir := range c.CDI.SpecDirs {
		if !filepath.IsAbs(dir) || filepath.Clean(dir) != dir {
			wrong("cdi.spec_dirs", dir, "an absolute path without . and ..")
		}
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(errs...)
}

func (n *NetworkConfig) validate() (errs []error) {
	wrong := func(key string, value any, want string) {
		errs = append(errs, fmt.Errorf("network.%s = %v: want %s", key, quote(value), want))
	}
	if !slices.Contains([]string{"auto", "bridge", "cni"}, n.Mode) {
		wrong("mode", n.Mode, `"auto", "bridge" or "cni"`)
	}
	for _, dir := range n.CNIBinDirs {
		if !filepath.IsAbs(dir) || filepath.Clean(dir) != dir || strings.Contains(dir, ":") { // CNI_PATH is a list of them
			wrong("cni_bin_dirs", dir, "an absolute path without ., .. and :")
		}
	}
	if len(n.CNIBinDirs) == 0 {
		wrong("cni_bin_dirs", n.CNIBinDirs, "at least one directory")
	}
	if !linkName.MatchString(n.Bridge) {
		wrong("bridge", n.Bridge, "a link name: at most 15 letters, digits, _ . -")
	}
	if !tableName.MatchString(n.Table) {
		wrong("table", n.Table, "a table name: at most 31 letters, digits, _ -")
	}
	families := map[bool]int{}
	for _, s := range n.Subnets {
		families[s.Addr().Is4()]++
		switch {
		case s.Masked() != s:
			wrong("subnets", s, fmt.Sprintf("no host bits: %s", s.Masked()))
		case s.Addr().Is4() && (s.Bits() < 8 || s.Bits() > 30):
			wrong("subnets", s, "an IPv4 range from /8 to /30")
		case s.Addr().Is6() && (s.Bits() < 8 || s.Bits() > 126):
			wrong("subnets", s, "an IPv6 range from /8 to /126")
		}
	}
	if len(n.Subnets) == 0 || families[true] > 1 || families[false] > 1 {
		wrong("subnets", n.Subnets, "one range, or one of IPv4 and one of IPv6")
	}
	for _, p := range n.MasqueradeExcept {
		if p.Bits() == 0 || p.Masked() != p {
			wrong("masquerade_except", p, "a range without host bits, and not all of them")
		}
	}
	// 1280: RFC 8200 section 5, the least that IPv6 works with.
	if n.MTU != 0 && (n.MTU < 1280 || n.MTU > 65535) {
		wrong("mtu", n.MTU, "0 or 1280 to 65535")
	}
	return errs
}

func (i *ImageConfig) validate() (errs []error) {
	wrong := func(key string, value any, want string) {
		errs = append(errs, fmt.Errorf("image.%s = %v: want %s", key, quote(value), want))
	}
	if i.ParallelLayers < 1 || i.ParallelLayers > 64 {
		wrong("parallel_layers", i.ParallelLayers, "1 to 64")
	}
	if i.StallTimeout < Duration(time.Second) {
		wrong("stall_timeout", time.Duration(i.StallTimeout), "at least 1s")
	}
	if i.MaxLayers > 500 {
		wrong("max_layers", i.MaxLayers, "at most 500, which is what overlayfs takes")
	}
	for key, n := range map[string]int64{
		"max_layers": int64(i.MaxLayers), "max_image_size": int64(i.MaxImageSize),
		"max_image_entries": i.MaxImageEntries, "max_document_size": int64(i.MaxDocumentSize),
	} {
		if n < 1 {
			wrong(key, n, "more than 0")
		}
	}
	return errs
}

func (r *RuntimeConfig) validate() (errs []error) {
	wrong := func(key string, value any, want string) {
		errs = append(errs, fmt.Errorf("runtime.%s = %v: want %s", key, quote(value), want))
	}
	if len(r.DefaultCapabilities) == 0 {
		wrong("default_capabilities", r.DefaultCapabilities, "at least one; a pod that needs none drops ALL")
	}
	for _, h := range r.Handlers {
		// RuntimeClass.handler is a DNS label (Kubernetes node.k8s.io/v1).
		if !dnsLabel.MatchString(h) {
			wrong("handlers", h, "a DNS label")
		}
	}
	for _, c := range r.DefaultCapabilities {
		if !capName.MatchString(c) {
			wrong("default_capabilities", c, "a name like CAP_CHOWN")
		}
	}
	if r.UnsetSeccompProfile != "Unconfined" && r.UnsetSeccompProfile != "RuntimeDefault" {
		wrong("unset_seccomp_profile", r.UnsetSeccompProfile, `"Unconfined" or "RuntimeDefault"`)
	}
	for key := range r.DefaultSysctls {
		if !sysctlKey.MatchString(key) {
			wrong("default_sysctls", key, "a name like net.ipv4.ip_forward")
		}
	}
	return errs
}

func (s *StreamingConfig) validate() (errs []error) {
	wrong := func(key string, value any, want string) {
		errs = append(errs, fmt.Errorf("streaming.%s = %v: want %s", key, quote(value), want))
	}
	if s.Address != "" {
		if _, err := netip.ParseAddrPort(s.Address); err != nil {
			wrong("address", s.Address, "an address and a port like 127.0.0.1:0 or [::1]:10010")
		}
	}
	if s.IdleTimeout <= 0 {
		wrong("idle_timeout", time.Duration(s.IdleTimeout), "a positive duration")
	}
	if (s.TLSCert == "") != (s.TLSKey == "") {
		wrong("tls_key", s.TLSKey, "both tls_cert and tls_key, or none")
	}
	for key, path := range map[string]string{"tls_cert": s.TLSCert, "tls_key": s.TLSKey} {
		if path != "" && !filepath.IsAbs(path) {
			wrong(key, path, "an absolute path")
		}
	}
	return errs
}

// within says whether path is dir or below it; both are clean.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, dir+"/")
}

func quote(v any) any {
	if s, ok := v.(string); ok {
		return fmt.Sprintf("%q", s)
	}
	return v
}

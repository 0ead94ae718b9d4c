package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/cri"
	"github.com/crisp-cri/crisp/runtime/apparmor"
	"github.com/crisp-cri/crisp/runtime/selinux"
)

// serve runs the daemon until SIGTERM or SIGINT; a second one ends it at once.
func serve(ctx context.Context, cfg *Config) (err error) {
	setLogging(cfg.LogLevel)
	ctx, stop := signal.NotifyContext(ctx, unix.SIGTERM, unix.SIGINT)
	defer stop()
	// Ignored, see the help text of serve; not by SIG_IGN, which every container would inherit through execve.
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP)

	for key, dir := range map[string]string{"state_root": cfg.StateRoot, "run_root": cfg.RunRoot} {
		if err := makeRoot(dir); err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
	}
	lock, err := lockStateRoot(cfg.StateRoot)
	if err != nil {
		return err
	}
	defer lock.release()
	// Before any goroutine of ours makes files: listen changes the umask for a moment.
	listener, err := passed(cfg.Socket)
	waits := listener != nil
	if err == nil && !waits {
		listener, err = listen(cfg.Socket)
	}
	if err != nil {
		return err
	}
	defer listener.Close() // for errors before Serve owns it; after that it is closed already

	p, err := assemble(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()

	host, err := cri.ProbeHost()
	if err != nil {
		return err
	}
	// Layers and writable layers are below the one, the pods' own files below the other.
	if err := p.spawner.CheckUserNamespaces(ctx, cfg.StateRoot, filepath.Join(cfg.StateRoot, "images"), cfg.RunRoot); err != nil {
		host.NoUserNamespaces = err.Error()
		klog.InfoS("Pods cannot have a user namespace on this node, going on without", "err", err)
	}
	if cfg.Runtime.SELinux && !selinux.Enabled() {
		return errors.New("runtime.selinux is set, but SELinux is off in this kernel")
	}
	if apparmor.Enabled() {
		policy := apparmor.New()
		if err := policy.Load(ctx); err != nil {
			klog.InfoS("Containers that name no AppArmor profile run without one", "err", err)
		}
		p.appArmor = policy
	}
	streaming, err := openStreaming(cfg.Streaming)
	if err != nil {
		return err
	}
	if streaming.Listener != nil {
		defer streaming.Listener.Close() // for errors before Serve owns it; after that it is closed already
	}
	server, err := cri.NewServer(criConfig(cfg, p, host, streaming))
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	start := func() { go func() { served <- server.Serve(listener) }() } // stopServing waits
	// Until pods are known, calls are answered that we are starting. Those who called through systemd's socket have waited
	// since before we were, and had never been refused anything; so they wait until then.
	if !waits {
		start()
	}

	began := time.Now()
	if err = p.pods.Recover(ctx); err == nil {
		server.SetReady()
	}
	if waits {
		start()
	}
	if err != nil {
		return errors.Join(fmt.Errorf("cannot take over the pods of the last crispd: %w", err), stopServing(cfg, server, p, served))
	}
	klog.InfoS("Started serving", "version", version, "socket", cfg.Socket, "pods", len(p.pods.Pods()), "recovery", time.Since(began))
	notify(daemon.SdNotifyReady)
	stopWatch, err := startWatch(ctx, cfg.Socket)
	if err != nil {
		return errors.Join(err, stopServing(cfg, server, p, served))
	}
	defer stopWatch()

	select {
	case <-ctx.Done():
		stop() // a second signal has its default effect
		klog.InfoS("Stopping, pods keep running", "drainTimeout", time.Duration(cfg.DrainTimeout))
		notify(daemon.SdNotifyStopping)
		return stopServing(cfg, server, p, served)
	case err := <-served:
		return fmt.Errorf("cannot serve %s any longer: %w", cfg.Socket, err)
	}
}

// startWatch begins to answer systemd's watchdog, if there is one. It ends with ctx; stop waits for that.
func startWatch(ctx context.Context, socket string) (stop func(), err error) {
	interval := watchdogInterval()
	if interval == 0 {
		return func() {}, nil
	}
	p, err := newProbe(socket)
	if err != nil {
		return nil, fmt.Errorf("cannot watch itself: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		watch(ctx, interval, p.ask, func() { notify(daemon.SdNotifyWatchdog) })
	}()
	return func() {
		cancel()
		<-done
		_ = p.close() // nothing was written
	}, nil
}

// stopServing lets running calls end, within drain_timeout, and waits for the server.
func stopServing(cfg *Config, server *cri.Server, p *parts, served <-chan error) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(cfg.DrainTimeout))
	defer cancel()
	server.Drain()
	p.pods.Drain(ctx)
	server.GracefulStop(ctx)
	return <-served
}

// notify tells systemd, where it asked to be told (Type=notify).
func notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		klog.InfoS("Could not notify systemd, ignoring", "state", state, "err", err)
	}
}

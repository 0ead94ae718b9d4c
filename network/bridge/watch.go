package bridge

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/network/nft"
)

const (
	// checkInterval is how often what sends no notification is looked at: the
	// bridge, forwarding, and repairs that failed.
	checkInterval = 5 * time.Second
	// rebuildPause is the shortest time between two rebuilds of the rules: two
	// programs that insist on one table must not keep a CPU busy.
	rebuildPause = time.Second
)

// watcher repairs what others break. It owns two goroutines, for which stop waits.
type watcher struct {
	bridge  *Bridge
	monitor *nft.Monitor
	touched chan struct{} // 1: one rebuild repairs any number of changes
	done    chan struct{} // closed by stop
	once    sync.Once
	wg      sync.WaitGroup
}

func (b *Bridge) watch() (*watcher, error) {
	m, err := b.rules.NewMonitor(b.cfg.Table)
	if err != nil {
		return nil, err
	}
	w := &watcher{bridge: b, monitor: m, touched: make(chan struct{}, 1), done: make(chan struct{})}
	w.wg.Go(w.listen)
	w.wg.Go(w.repair)
	return w, nil
}

func (w *watcher) stop() (err error) {
	w.once.Do(func() {
		close(w.done)
		err = w.monitor.Close()
		w.wg.Wait()
	})
	return err
}

// listen turns notifications into rebuilds.
func (w *watcher) listen() {
	for {
		err := w.monitor.Next()
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil {
			klog.Background().Error(err, "Stopped watching nftables: rules that others delete are not repaired at once any more")
			return
		}
		select {
		case w.touched <- struct{}{}:
		default: // There is one to come already.
		}
	}
}

// repair rebuilds the rules when told, and looks at everything else now and then.
func (w *watcher) repair() {
	tick := time.NewTicker(checkInterval)
	defer tick.Stop()
	for {
		select {
		case <-w.done:
			return
		case <-tick.C:
			w.bridge.check()
			continue
		case <-w.touched:
		}
		w.bridge.rebuildRules()
		select {
		case <-w.done:
			return
		case <-time.After(rebuildPause):
		}
	}
}

// rebuildRules puts the rules back as they were. Before the first pod there are none.
func (b *Bridge) rebuildRules() {
	b.hostMu.Lock()
	defer b.hostMu.Unlock()
	h := b.good()
	if h == nil {
		return // The next to need the network makes everything.
	}
	log := klog.Background()
	if err := b.rules.Rebuild(); err != nil {
		log.Error(err, "Could not rebuild nftables rules that were changed by others", "table", b.cfg.Table)
		b.condition.Store(&network.Condition{Reason: "RulesFailed", Message: err.Error()})
		b.broken(h) // check tries again
		return
	}
	b.countRebuilt()
	log.Info("Rebuilt nftables rules that were changed by others", "table", b.cfg.Table)
}

func (b *Bridge) countRebuilt() {
	b.mu.Lock()
	b.rebuilt++
	b.mu.Unlock()
}

// check repairs the bridge and the host's settings, and what could not be repaired
// before.
func (b *Bridge) check() {
	ctx, log := context.Background(), klog.Background()
	if h := b.good(); h != nil {
		if b.intact(h) {
			return
		}
		b.broken(h)
	} else if b.Status().Ready {
		return // Nothing was made yet, nothing failed.
	}
	if _, err := b.ensureHost(ctx); err != nil {
		log.Error(err, "Could not repair the network", "bridge", b.cfg.Bridge)
		return
	}
	b.countRebuilt()
	log.Info("Repaired the network, which was changed by others", "bridge", b.cfg.Bridge)
}

// intact reports whether the bridge is there and up, and forwarding is on.
func (b *Bridge) intact(h *host) bool {
	link, err := b.kernel.links.LinkByIndex(h.index)
	if err != nil || link.Attrs().Name != b.cfg.Bridge || link.Attrs().RawFlags&unix.IFF_UP == 0 {
		return false
	}
	b.mu.Lock()
	ranges := rangesOf(b.pools)
	b.mu.Unlock()
	for _, r := range ranges {
		dir, name := b.kernel.sys4, "ip_forward"
		if r.Addr().Is6() {
			dir, name = b.kernel.sys6, "conf/all/forwarding"
		}
		// Read-only and off is reported once, when it is tried to turn it on.
		if v, err := sysctl(dir, name); err == nil && v == "0" && unix.Faccessat(int(dir.Fd()), name, unix.W_OK, 0) == nil {
			return false
		}
	}
	return true
}

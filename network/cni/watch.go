package cni

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/crisp-cri/crisp/network"
)

// answer is what the plugins of a list last said to STATUS.
type answer struct {
	list *libcni.NetworkConfigList
	err  error // nil: ready
}

// refresh reads the directory. Reading all of it is cheaper than being sure of what
// changed: it is a few small files, and a directory that was replaced, or mounted over,
// needs no thought.
func (n *CNI) refresh() *found {
	fresh := loadDir(n.cfg.ConfDir)
	for {
		old := n.now.Load()
		if old.same(fresh) {
			return old
		}
		if old.list != nil && fresh.list != nil && old.file == fresh.file && bytes.Equal(old.list.Bytes, fresh.list.Bytes) {
			fresh.list = old.list // only what is ignored is different: what STATUS said still counts
		}
		if n.now.CompareAndSwap(old, fresh) {
			break
		}
	}
	select {
	case n.change <- struct{}{}:
	default: // it is known already
	}
	return fresh
}

// watchDir runs until Close.
func (n *CNI) watchDir() {
	tick := time.NewTicker(n.limits.confPeriod)
	defer tick.Stop()
	for {
		select {
		case <-n.life.Done():
			return
		case <-tick.C:
			n.refresh()
		}
	}
}

// watchStatus asks the plugins, until Close. It is apart from watchDir as plugins may hang.
func (n *CNI) watchStatus() {
	tick := time.NewTicker(n.limits.statusPeriod)
	defer tick.Stop()
	for {
		if list := n.now.Load().list; list != nil {
			err := n.ask(list)
			n.status.Store(&answer{list, err})
		}
		select {
		case <-n.life.Done():
			return
		case <-n.change:
		case <-tick.C:
		}
	}
}

// ask sends STATUS, which exists since CNI 1.1. Of older lists it is known at least
// whether the plugins are there.
func (n *CNI) ask(list *libcni.NetworkConfigList) error {
	var errs []error
	for _, p := range list.Plugins {
		if _, err := findPlugin(p.Network.Type, n.cfg.BinDirs); err != nil {
			errs = append(errs, fmt.Errorf("CNI plugin %q: %w", p.Network.Type, err))
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	ctx, cancel := n.bounded(context.Background(), n.limits.status)
	defer cancel()
	r := &runner{netns: n.cfg.NetNS}
	if err := n.library(r).GetStatusNetworkList(ctx, list); err != nil {
		return r.fail("STATUS", err)
	}
	return nil
}

// Status implements network.Network. It tells what the watchers found last, so it may
// be behind by confPeriod, and by statusPeriod in what plugins say.
func (n *CNI) Status() network.Condition {
	const notReady = "NetworkPluginNotReady" // containerd's word
	f := n.now.Load()
	if f.list == nil {
		return network.Condition{Reason: notReady, Message: n.missing(f)}
	}
	ignored := problems(f)
	a := n.status.Load()
	switch {
	case a != nil && a.list == f.list && a.err != nil:
		return network.Condition{Reason: notReady, Message: joined(fmt.Sprintf("network %q of %s: %v", f.list.Name, f.file, a.err), ignored)}
	case a != nil && a.list == f.list:
		return network.Condition{Ready: true, Message: ignored}
	case asksStatus(f.list):
		return network.Condition{Reason: notReady, Message: joined(fmt.Sprintf("network %q of %s: waiting for CNI STATUS", f.list.Name, f.file), ignored)}
	}
	return network.Condition{Ready: true, Message: ignored}
}

func asksStatus(list *libcni.NetworkConfigList) bool {
	later, err := version.GreaterThanOrEqualTo(list.CNIVersion, "1.1.0")
	return err == nil && later
}

// missing says that there is no network, and why as far as is known.
func (n *CNI) missing(f *found) string {
	if n.cfg.Standby {
		return "CNI is not the network of new pods"
	}
	return joined("no CNI configuration in "+n.cfg.ConfDir, problems(f))
}

// problems names the files that are ignored, "" when there are none.
func problems(f *found) string {
	if len(f.problems) == 0 {
		return ""
	}
	var b strings.Builder
	b.WriteString("ignored ")
	for i, err := range f.problems {
		if i == maxProblems {
			fmt.Fprintf(&b, "; and %d more", len(f.problems)-i)
			break
		}
		if i > 0 {
			b.WriteString("; ")
		}
		b.WriteString(shorten(err.Error()))
	}
	return b.String()
}

func joined(message, more string) string {
	if more == "" {
		return message
	}
	return message + "; " + more
}

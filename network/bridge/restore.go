package bridge

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/network/nft"
)

// Restore implements network.Network. Two records that claim one address or port
// are reported in the log, and both pods keep what they have: their kernels'
// objects exist. It returns an error only when the host's side cannot be repaired
// or leftovers not collected; reservations are taken in any case, and repairing is
// tried again (watch.go).
func (b *Bridge) Restore(ctx context.Context, pods map[string]network.Restored) error {
	err := b.restore(ctx, pods)
	if err != nil {
		err = fmt.Errorf("cannot restore network of bridge %q: %w", b.cfg.Bridge, err)
		if b.Status().Ready {
			b.condition.Store(&network.Condition{Reason: "RestoreFailed", Message: err.Error()})
		}
	}
	return err
}

func (b *Bridge) restore(ctx context.Context, pods map[string]network.Restored) error {
	log := klog.FromContext(ctx)
	var rules []nft.Pod
	b.mu.Lock()
	for _, id := range slices.Sorted(maps.Keys(pods)) {
		r := pods[id].Result
		if r.Provider != Name || b.pods[id] != nil {
			continue
		}
		if err := checkResult(r); err != nil {
			log.Error(err, "A pod's recorded network makes no sense, ignoring", "sandboxID", id)
			continue
		}
		b.adoptLocked(log, id, b.completeLocked(r))
		rules = append(rules, rulesOf(b.pods[id].result))
	}
	b.restored = true
	needed := len(b.pods) > 0
	b.mu.Unlock()
	b.rules.Put(rules...)

	link, err := b.kernel.bridgeLink(b.cfg.Bridge)
	if err != nil {
		return err
	}
	index := 0
	if link != nil {
		index = link.Attrs().Index
	}
	collected := b.collectLinks(index, func(name string) bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.links[name] != ""
	})
	// Without pods and without a bridge there is nothing to repair; both are made when
	// a pod comes.
	var repaired error
	if needed || link != nil {
		b.generation.Add(1)
		_, repaired = b.ensureHost(ctx)
	} else {
		repaired = b.rules.Delete(b.cfg.Table)
	}
	return errors.Join(collected, repaired)
}

// checkResult reports what no Plan of ours can have returned.
func checkResult(r network.Result) error {
	if len(r.IPs) == 0 || slices.ContainsFunc(r.IPs, func(ip netip.Addr) bool { return !ip.IsValid() || ip.Is4In6() }) {
		return fmt.Errorf("%w: addresses %v", network.ErrInvalid, r.IPs)
	}
	if !linkPattern.MatchString(r.HostLink) {
		return fmt.Errorf("%w: link %q", network.ErrInvalid, r.HostLink)
	}
	return nil
}

// completeLocked fills in the ranges where a record has none, or other ones.
func (b *Bridge) completeLocked(r network.Result) network.Result {
	good := len(r.Subnets) == len(r.IPs)
	for i := 0; good && i < len(r.IPs); i++ {
		good = checkRange(r.Subnets[i]) == nil && r.Subnets[i].Contains(r.IPs[i])
	}
	if good {
		return r
	}
	r.Subnets = nil
	for _, ip := range r.IPs {
		for _, s := range append(rangesOf(b.pools), b.cfg.Subnets...) {
			if s.Contains(ip) {
				r.Subnets = append(r.Subnets, s)
				break
			}
		}
	}
	if len(r.Subnets) != len(r.IPs) {
		r.Subnets = nil // Unknown; its gateway is left as it is.
	}
	return r
}

// adoptLocked takes a recorded pod in. Its links exist or not: the rules do no harm
// without, and whoever recorded it tears it down or sets it up.
func (b *Bridge) adoptLocked(log klog.Logger, id string, r network.Result) {
	for _, pool := range b.pools {
		for _, ip := range r.IPs {
			if !pool.prefix.Contains(ip) {
				continue
			}
			if holder, ok := pool.reserve(ip, id); !ok {
				log.Info("Two pods have one address, ignoring", "address", ip, "pod", holder, "otherPod", id)
			}
		}
	}
	if _, err := b.ports.claim(id, r.IPs, r.Ports); err != nil {
		log.Error(err, "A recorded pod's host ports cannot be reserved, ignoring", "sandboxID", id)
		r.Ports = nil
	}
	b.links[r.HostLink] = id
	b.pods[id] = &pod{id: id, result: r}
}

// collectLinks deletes the pods' links of this bridge that keep does not want, and the
// intermediate links of such.
func (b *Bridge) collectLinks(bridge int, keep func(name string) bool) error {
	links, err := whole(b.kernel.links.LinkList)
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	prefix := linkPrefix(b.cfg.Bridge)
	var errs []error
	for _, l := range links {
		name := l.Attrs().Name
		if hostLink := shapedLink(l); strings.HasPrefix(hostLink, prefix) && !keep(hostLink) {
			errs = append(errs, b.kernel.deleteLink(name))
			continue
		}
		if !strings.HasPrefix(name, prefix) || !podLinkOf(l, bridge) || keep(name) {
			continue
		}
		errs = append(errs, b.kernel.deleteLink(name))
	}
	return errors.Join(errs...)
}

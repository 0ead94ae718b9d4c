package bridge

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	stdnet "net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/network/nft"
)

// aliasWord starts the alias (ip-link(8)) of every link of ours.
const aliasWord = "crisp "

const (
	defaultMTU = 1500 // Ethernet's, in bytes
	minMTU     = 1280 // the least that IPv6 works with (RFC 8200 5), in bytes
)

// maxAlias is the longest alias in bytes (IFALIASZ minus one).
const maxAlias = 255

// host is the host's side as it was found or made. Immutable.
type host struct {
	generation uint64
	index      int // of the bridge
	mtu        int // in bytes
}

// alias is what the bridge's own alias says: state that lives as long as the bridge
// and not longer, so that neither a restart of the daemon nor a reboot leaves it wrong.
//
//	crisp pod_cidr=10.1.2.0/24,fd00:1::/64 ranges=10.1.2.0/24,10.219.0.0/16,fd00:1::/64
type alias struct {
	podCIDR string         // from the kubelet, "" if never set
	ranges  []netip.Prefix // all whose gateway addresses we put on the bridge
}

func (a alias) String() string {
	var words []string
	if a.podCIDR != "" {
		words = append(words, "pod_cidr="+a.podCIDR)
	}
	var ranges []string
	for _, r := range a.ranges {
		ranges = append(ranges, r.String())
	}
	words = append(words, "ranges="+strings.Join(ranges, ","))
	s := aliasWord + strings.Join(words, " ")
	if len(s) > maxAlias {
		// Only a daemon that dies before the old pods do would have needed the rest.
		s = aliasWord + words[0]
	}
	return s[:min(len(s), maxAlias)]
}

// parseAlias never fails: what cannot be read is not there.
func parseAlias(s string) alias {
	var a alias
	rest, ours := strings.CutPrefix(s, aliasWord)
	if !ours {
		return a
	}
	for word := range strings.FieldsSeq(rest) {
		key, value, _ := strings.Cut(word, "=")
		switch key {
		case "pod_cidr":
			a.podCIDR = value
		case "ranges":
			for r := range strings.SplitSeq(value, ",") {
				if p, err := netip.ParsePrefix(r); err == nil && checkRange(p) == nil {
					a.ranges = append(a.ranges, p)
				}
			}
		}
	}
	return a
}

// bridgeLink finds the bridge, nil if there is none. It returns network.ErrInvalid
// for a link of that name which we did not make.
func (k *kernel) bridgeLink(name string) (netlink.Link, error) {
	link, err := k.links.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for bridge %q: %w", name, err)
	}
	// The mark cannot be set in the request that creates a link; the MAC can.
	a := link.Attrs()
	ours := strings.HasPrefix(a.Alias, aliasWord) || (a.Alias == "" && a.HardwareAddr.String() == bridgeMAC(name).String())
	if link.Type() != "bridge" || !ours {
		return nil, fmt.Errorf("link %q (%s) exists and is not ours: %w; configure another bridge name, or delete it", name, link.Type(), network.ErrInvalid)
	}
	return link, nil
}

// linkExists reports whether there is a link called name.
func (k *kernel) linkExists(name string) (bool, error) {
	_, err := k.links.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return false, nil
	}
	return err == nil, err
}

// isOurs reports whether there is a link called name that is a pod's link of ours.
func (k *kernel) isOurs(name string, bridge int) (bool, error) {
	link, err := k.links.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at link %q: %w", name, err)
	}
	return podLinkOf(link, bridge), nil
}

// podLinkOf: a veth with a name of ours that has our mark, or is a port of our
// bridge (one that the daemon died over before it was marked).
func podLinkOf(link netlink.Link, bridge int) bool {
	a := link.Attrs()
	return link.Type() == "veth" && linkPattern.MatchString(a.Name) &&
		(strings.HasPrefix(a.Alias, aliasWord) || (bridge != 0 && a.MasterIndex == bridge))
}

// ensureHost returns the host's side, made first if need be: the bridge with the
// gateway addresses of all ranges in use, forwarding, and the rules. The result is
// kept until somebody finds it broken.
func (b *Bridge) ensureHost(ctx context.Context) (*host, error) {
	if h := b.good(); h != nil {
		return h, nil
	}
	b.hostMu.Lock()
	defer b.hostMu.Unlock()
	if h := b.good(); h != nil {
		return h, nil // Somebody was faster.
	}
	h, err := b.makeHost(ctx)
	if err != nil {
		b.condition.Store(&network.Condition{Reason: "BridgeFailed", Message: err.Error()})
		return nil, err
	}
	b.condition.Store(&network.Condition{Ready: true})
	b.host.Store(h)
	return h, nil
}

// good is the host's side if it is known to be complete.
func (b *Bridge) good() *host {
	if h := b.host.Load(); h != nil && h.generation == b.generation.Load() {
		return h
	}
	return nil
}

// broken begins another generation, if h is of the current one.
func (b *Bridge) broken(h *host) { b.generation.CompareAndSwap(h.generation, h.generation+1) }

func (b *Bridge) makeHost(ctx context.Context) (*host, error) {
	// Read before anything that a generation depends on.
	h := &host{generation: b.generation.Load(), mtu: b.cfg.MTU}
	b.mu.Lock()
	current := rangesOf(b.pools)
	ranges := b.rangesInUseLocked()
	want := alias{podCIDR: b.podCIDR, ranges: ranges}
	restored := b.restored
	b.mu.Unlock()

	if h.mtu == 0 {
		h.mtu = max(b.kernel.uplinkMTU(b.cfg.Bridge), minMTU)
	}
	link, err := b.kernel.bridgeLink(b.cfg.Bridge)
	if err != nil {
		return nil, err
	}
	if link == nil {
		if err := b.kernel.checkOverlap(b.cfg.Bridge, current); err != nil {
			return nil, err
		}
		if link, err = b.kernel.makeBridge(b.cfg.Bridge, h.mtu, want.String()); err != nil {
			return nil, err
		}
		klog.FromContext(ctx).Info("Made the bridge", "bridge", b.cfg.Bridge, "ranges", ranges, "mtu", h.mtu)
	}
	h.index = link.Attrs().Index
	stale := parseAlias(link.Attrs().Alias).ranges
	if !restored {
		// Pods that we have not heard of yet may need them.
		want.ranges = union(ranges, stale)
		stale = nil
	}
	if err := b.kernel.configureBridge(link, ranges, minus(stale, ranges), want.String(), h.mtu); err != nil {
		return nil, err
	}
	b.kernel.enableForwarding(ctx, ranges)
	if err := b.adoptPorts(h); err != nil {
		return nil, err
	}
	if err := b.writeRules(); err != nil {
		return nil, err
	}
	return h, nil
}

// rangesInUseLocked are the ranges of new pods, and then those of old ones, without
// duplicates; IPv4 and IPv6 each in a stable order.
func (b *Bridge) rangesInUseLocked() []netip.Prefix {
	ranges := rangesOf(b.pools)
	var old []netip.Prefix
	for _, p := range b.pods {
		old = append(old, minus(p.result.Subnets, union(ranges, old))...)
	}
	slices.SortFunc(old, comparePrefixes)
	return append(ranges, old...)
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

func union(a, b []netip.Prefix) []netip.Prefix {
	return append(slices.Clone(a), minus(b, a)...)
}

func minus(a, b []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range a {
		if !slices.Contains(b, p) && !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	return out
}

// writeRules writes all rules; which pods they cover, b.rules knows.
func (b *Bridge) writeRules() error {
	b.mu.Lock()
	cfg := nft.Config{
		Table: b.cfg.Table, Bridge: b.cfg.Bridge, PortPrefix: linkPrefix(b.cfg.Bridge),
		Subnets:    b.rangesInUseLocked(),
		Masquerade: !b.cfg.NoMasquerade, MasqueradeExcept: b.cfg.MasqueradeExcept,
		AntiSpoof: !b.cfg.NoAntiSpoof,
	}
	for _, s := range slices.Backward(cfg.Subnets) { // The first of a family wins.
		if s.Addr().Is4() {
			cfg.Gateway4 = gatewayOf(s)
		} else {
			cfg.Gateway6 = gatewayOf(s)
		}
	}
	b.mu.Unlock()
	return b.rules.Configure(cfg)
}

// adoptPorts makes the pods' links ports of the bridge again, after it was deleted
// by somebody and made anew.
func (b *Bridge) adoptPorts(h *host) error {
	b.mu.Lock()
	var names []string
	for _, p := range b.pods {
		names = append(names, p.result.HostLink)
	}
	b.mu.Unlock()
	var errs []error
	for _, name := range names {
		link, err := b.kernel.links.LinkByName(name)
		if err != nil || link.Attrs().MasterIndex == h.index {
			continue // No link: not set up yet, or gone with its pod, for which Teardown will be called.
		}
		if err := b.kernel.links.LinkSetMasterByIndex(link, h.index); err != nil {
			errs = append(errs, fmt.Errorf("make %s a port of the bridge: %w", name, err))
			continue
		}
		if err := b.kernel.links.LinkSetHairpin(link, true); err != nil {
			errs = append(errs, fmt.Errorf("set hairpin mode of %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// makeBridge makes the bridge, down and without addresses, with our mark. Without
// multicast snooping: neighbour discovery is the multicast there is, and a bridge
// that snoops without a querier may stop to deliver it.
func (k *kernel) makeBridge(name string, mtu int, mark string) (netlink.Link, error) {
	snooping := false
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = name, mtu, bridgeMAC(name)
	link := &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}
	if err := k.links.LinkAdd(link); err != nil {
		return nil, fmt.Errorf("create bridge %q: %w", name, err)
	}
	made, err := k.links.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("look for bridge %q: %w", name, err)
	}
	if err := k.links.LinkSetAlias(made, mark); err != nil {
		// Without the mark it would be a foreign one from now on.
		return nil, errors.Join(fmt.Errorf("mark bridge %q: %w", name, err), k.links.LinkDel(made))
	}
	return made, nil
}

// configureBridge brings an existing bridge into shape; it is idempotent.
func (k *kernel) configureBridge(link netlink.Link, ranges, stale []netip.Prefix, mark string, mtu int) error {
	a := link.Attrs()
	if k.sys6 != nil {
		for _, s := range [][2]string{{"accept_ra", "0"}, {"accept_dad", "0"}} {
			if err := setSysctl(k.sys6, "conf/"+a.Name+"/"+s[0], s[1]); err != nil {
				return err
			}
		}
	}
	if a.Alias != mark {
		if err := k.links.LinkSetAlias(link, mark); err != nil {
			return fmt.Errorf("mark bridge %q: %w", a.Name, err)
		}
	}
	if a.MTU != mtu {
		if err := k.links.LinkSetMTU(link, mtu); err != nil {
			return fmt.Errorf("set MTU of bridge %q to %d: %w", a.Name, mtu, err)
		}
	}
	for _, r := range ranges {
		addr := gatewayAddr(r)
		if err := k.links.AddrAdd(link, addr); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add address %s to bridge %q: %w", addr.IPNet, a.Name, err)
		}
	}
	for _, r := range stale {
		addr := gatewayAddr(r)
		if err := k.links.AddrDel(link, addr); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %s from bridge %q: %w", addr.IPNet, a.Name, err)
		}
	}
	if err := k.links.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up bridge %q: %w", a.Name, err)
	}
	return nil
}

// gatewayAddr is the bridge's address in a range. Without duplicate address
// detection, as in pods: nobody else is on the bridge yet.
func gatewayAddr(r netip.Prefix) *netlink.Addr {
	gw := gatewayOf(r)
	addr := &netlink.Addr{IPNet: &stdnet.IPNet{IP: gw.AsSlice(), Mask: stdnet.CIDRMask(r.Bits(), gw.BitLen())}}
	if gw.Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	return addr
}

// uplinkMTU is the MTU of the link that the host's default route uses, IPv4 first.
func (k *kernel) uplinkMTU(bridge string) int {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := whole(func() ([]netlink.Route, error) {
			return k.links.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			continue // No MTU is better than no network.
		}
		slices.SortStableFunc(routes, func(a, b netlink.Route) int { return cmp.Compare(a.Priority, b.Priority) })
		for _, r := range routes {
			if !isDefault(r) {
				continue
			}
			index := r.LinkIndex
			if index == 0 && len(r.MultiPath) > 0 {
				index = r.MultiPath[0].LinkIndex
			}
			if link, err := k.links.LinkByIndex(index); err == nil && link.Attrs().Name != bridge {
				return link.Attrs().MTU
			}
		}
	}
	return defaultMTU
}

func isDefault(r netlink.Route) bool {
	if r.Dst == nil {
		return true
	}
	ones, _ := r.Dst.Mask.Size()
	return ones == 0
}

// checkOverlap refuses a range that another link is in: packets to pods, or to the
// neighbours on that link, would go the wrong way. A host that is in a larger
// network (10.0.0.0/8, say) may give a part of it, without itself, to its pods, and
// single addresses (VXLAN devices have them) do no harm.
func (k *kernel) checkOverlap(bridge string, ranges []netip.Prefix) error {
	links, err := whole(k.links.LinkList)
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	addrs, err := whole(func() ([]netlink.Addr, error) { return k.links.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		ip, ok := netip.AddrFromSlice(a.IP)
		if !ok || names[a.LinkIndex] == bridge {
			continue
		}
		ip = ip.Unmap()
		bits, _ := a.Mask.Size()
		foreign := netip.PrefixFrom(ip, bits).Masked()
		for _, r := range ranges {
			if bits < ip.BitLen() && r.Overlaps(foreign) && (bits >= r.Bits() || r.Contains(ip)) {
				return fmt.Errorf("pod range %s: %w: link %q is in %s", r, network.ErrInvalid, names[a.LinkIndex], foreign)
			}
		}
	}
	return nil
}

// localAddrs are the host's own addresses.
func (k *kernel) localAddrs() (map[netip.Addr]bool, error) {
	addrs, err := whole(func() ([]netlink.Addr, error) { return k.links.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	local := map[netip.Addr]bool{}
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			local[ip.Unmap()] = true
		}
	}
	return local, nil
}

// enableForwarding turns on what the kernel needs to forward packets of the ranges'
// families. It never fails: a host whose /proc/sys is read-only may be set up
// already, and if not, pods still reach each other and the host.
func (k *kernel) enableForwarding(ctx context.Context, ranges []netip.Prefix) {
	log := klog.FromContext(ctx)
	if slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Addr().Is4() }) {
		if v, err := sysctl(k.sys4, "ip_forward"); err != nil || v == "0" {
			if err := setSysctl(k.sys4, "ip_forward", "1"); err != nil {
				log.Error(err, "Could not turn on IPv4 forwarding: pods reach only this host, ignoring")
			}
		}
	}
	if k.sys6 != nil && slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		if v, err := sysctl(k.sys6, "conf/all/forwarding"); err != nil || v == "0" {
			k.keepRouterAdvertisements(ctx)
			if err := setSysctl(k.sys6, "conf/all/forwarding", "1"); err != nil {
				log.Error(err, "Could not turn on IPv6 forwarding: pods reach only this host, ignoring")
			}
		}
	}
}

// keepRouterAdvertisements lets links that have learned routes from a router go on
// listening to it once the host forwards: accept_ra 2 instead of 1
// (ip-sysctl.rst).
func (k *kernel) keepRouterAdvertisements(ctx context.Context) {
	log := klog.FromContext(ctx)
	routes, err := whole(func() ([]netlink.Route, error) {
		return k.links.RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{Protocol: unix.RTPROT_RA}, netlink.RT_FILTER_PROTOCOL)
	})
	if err != nil {
		log.Error(err, "Could not look for routes from router advertisements, ignoring")
		return
	}
	for _, r := range routes {
		link, err := k.links.LinkByIndex(r.LinkIndex)
		if err != nil {
			continue // Gone since.
		}
		name := "conf/" + link.Attrs().Name + "/accept_ra"
		if v, err := sysctl(k.sys6, name); err != nil || v != "1" {
			continue
		}
		if err := setSysctl(k.sys6, name, "2"); err != nil {
			log.Error(err, "Could not keep accepting router advertisements, ignoring", "link", link.Attrs().Name)
			continue
		}
		log.Info("Keeps accepting router advertisements though the host forwards now", "link", link.Attrs().Name)
	}
}

// dropUnusedRanges takes the gateways of the ranges of a gone pod from the bridge, if
// it was the last one and new pods come from other ranges. (The range may have
// been given to another node.)
func (b *Bridge) dropUnusedRanges(r network.Result) error {
	b.mu.Lock()
	unused := minus(r.Subnets, b.rangesInUseLocked())
	restored := b.restored
	b.mu.Unlock()
	if len(unused) == 0 || !restored || b.host.Load() == nil {
		return nil
	}
	b.generation.Add(1)
	_, err := b.ensureHost(context.Background())
	return err
}

// Destroy takes everything of ours out of the kernel: rules, pods' links, the
// bridge. Forwarding stays on, as others may have come to rely on it. The Bridge can
// be used again afterwards. It leaves a bridge that is not ours.
func (b *Bridge) Destroy() error {
	b.hostMu.Lock()
	defer b.hostMu.Unlock()
	b.generation.Add(1)
	b.host.Store(nil)
	errs := []error{b.rules.Delete(b.cfg.Table)}
	link, err := b.kernel.bridgeLink(b.cfg.Bridge)
	if err != nil {
		return fmt.Errorf("cannot remove network of bridge %q: %w", b.cfg.Bridge, errors.Join(append(errs, err)...))
	}
	index := 0
	if link != nil {
		index = link.Attrs().Index
	}
	errs = append(errs, b.collectLinks(index, func(string) bool { return false }))
	if link != nil {
		if err := b.kernel.links.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("delete bridge: %w", err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("cannot remove network of bridge %q: %w", b.cfg.Bridge, err)
	}
	return nil
}

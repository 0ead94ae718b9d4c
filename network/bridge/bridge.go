// Package bridge is crisp's embedded pod network: a bridge on the host, a veth pair
// for each pod, addresses from a range of the node, and nftables rules for host
// ports, for masquerading, and against pods that pretend to be others. It talks to
// the kernel in-process; nothing is executed.
//
//	                 host                          │           pod
//	                                               │
//	uplink ◀─ masquerade ─ crisp0 10.219.0.1/16 ───┤
//	                         │ fd53:…::1/64        │
//	                         └─ cr1a2b01234abcd ───┼─── eth0 10.219.0.2/16, fd53:…::2/64
//	                                               │    default routes by the bridge's addresses
//
// [Bridge] implements network.Network. What is where: Bridge (bridge.go) holds the
// pods that hold a network.Result, and from them the address pools (pool.go) and
// the host ports in use (ports.go), in memory only: the records of package
// podsandbox are the truth, [Bridge.Restore] brings them in. kernel.go plans and
// applies a pod's links, host.go the bridge and the host's settings; the rules are
// package nft's. watch.go repairs what others break.
//
// # What it changes on the host
//
// Its own bridge, links whose names start as its own do, its own nftables tables,
// and, for there is no network without: net.ipv4.ip_forward=1 and
// net.ipv6.conf.all.forwarding=1 (with a warning, no error, where /proc/sys is
// read-only). As the latter makes the kernel deaf to router advertisements, links
// that have routes from such get accept_ra=2 first, "even with forwarding", so that
// the host keeps its own default route. route_localnet is never set: see package
// nft on how a host port is reached by 127.0.0.1 and ::1 all the same.
//
// It does not add rules to other programs' tables: where a host firewall drops
// forwarded packets by default, pods have no way out until it is told otherwise.
//
// # What it does not do
//
// There is no NetworkPolicy.
//
// Version ledger: veth with a peer in another namespace in one request 2.6.35,
// nftables NAT in family inet 5.2, concatenations in maps for NAT 5.7.
package bridge

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/network/nft"
)

// Name of this provider in network.Result.
const Name = "bridge"

// Defaults of Config.
const (
	DefaultBridge = "crisp0"
	DefaultTable  = "crisp"
)

// DefaultSubnets are used until the kubelet says what the node's pod range is. The
// first is private (RFC 1918) and none of those that Docker, podman, CNI's
// examples, libvirt, kubeadm or the cloud providers use; the second is a unique
// local one (RFC 4193) whose 40 bits were drawn by lot.
func DefaultSubnets() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("10.219.0.0/16"), netip.MustParsePrefix("fd53:a2c7:190e::/64")}
}

// Config of a Bridge. The zero value is usable.
type Config struct {
	// Bridge is the name of the bridge link; "": DefaultBridge. Two daemons on one
	// host need different ones.
	Bridge string
	// Table is the name of the nftables tables; "": DefaultTable. Two daemons on one
	// host need different ones.
	Table string
	// Subnets are the pod ranges, at most one of each family, the primary first;
	// nil: DefaultSubnets. Without an IPv6 range, pods have no IPv6 address at all.
	Subnets []netip.Prefix
	// MTU of the bridge and the pods' links, in bytes; 0: that of the link with the
	// host's default route, 1500 without one.
	MTU int
	// NoMasquerade leaves the source addresses of packets from pods to the outside
	// alone: the network has routes back to the pods.
	NoMasquerade bool
	// MasqueradeExcept are destinations that see the pods' own addresses: other
	// nodes' pod ranges, when there are routes to them.
	MasqueradeExcept []netip.Prefix
	// NoAntiSpoof lets pods send from any address.
	NoAntiSpoof bool
	// NetNS is the network namespace that is "the host" to this bridge; nil: the
	// process's. It is borrowed until Close.
	NetNS *os.File
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// nameBytes are the bytes in names that need no quoting anywhere.
const nameBytes = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"

// withDefaults fills in and checks.
func (c Config) withDefaults() (Config, error) {
	c.Bridge = cmp.Or(c.Bridge, DefaultBridge)
	c.Table = cmp.Or(c.Table, DefaultTable)
	if c.Subnets == nil {
		c.Subnets = DefaultSubnets()
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if len(c.Bridge) > maxLinkName || strings.Trim(c.Bridge, nameBytes+".") != "" || c.Bridge[0] == '.' {
		return c, fmt.Errorf("bridge: %w: %q is no name for a bridge (letters, digits, _, - and ., at most %d bytes)", network.ErrInvalid, c.Bridge, maxLinkName)
	}
	if strings.HasPrefix(c.Bridge, linkPrefix(c.Bridge)) || podLinkName(c.Bridge) {
		return c, fmt.Errorf("bridge: %w: %q looks like the link of a pod", network.ErrInvalid, c.Bridge)
	}
	if strings.Trim(c.Table, nameBytes) != "" || len(c.Table) > 64 {
		return c, fmt.Errorf("table: %w: %q is no name for an nftables table (letters, digits, _ and -, at most 64)", network.ErrInvalid, c.Table)
	}
	if err := checkRanges(c.Subnets); err != nil {
		return c, fmt.Errorf("subnets: %w", err)
	}
	if c.MTU != 0 && (c.MTU < 1280 || c.MTU > 65535) {
		return c, fmt.Errorf("mtu: %w: %d, want 1280 (the least for IPv6) to 65535, or 0", network.ErrInvalid, c.MTU)
	}
	for i, p := range c.MasqueradeExcept {
		if !p.IsValid() || p.Bits() == 0 || p != p.Masked() || p.Addr().Is4In6() {
			return c, fmt.Errorf("masquerade_except: %w: entry %d: %s is no range", network.ErrInvalid, i+1, p)
		}
	}
	return c, nil
}

// Bridge is the pod network of one bridge. It lives from New to Close; the bridge,
// the rules and the pods' links in the kernel outlive it. All methods are safe for
// concurrent use.
type Bridge struct {
	cfg    Config
	kernel *kernel
	rules  *nft.Table

	// Locks, in the order they are taken: a pod's, hostMu, mu.

	hostMu sync.Mutex // held while the host's side is checked or made
	// host is the host's side as it was found or made last, nil before. It is good
	// while its generation is the current one: who changes what it depends on, or
	// finds it broken, begins another.
	host       atomic.Pointer[host]
	generation atomic.Uint64
	condition  atomic.Pointer[network.Condition]

	mu       sync.Mutex // never held across a system call
	podCIDR  string     // as the kubelet sent it; "": cfg.Subnets are in use
	pools    []*pool    // of the ranges in use for new pods, the primary first
	pods     map[string]*pod
	links    map[string]string // name to pod's id
	ports    portTable
	restored bool
	rebuilt  uint64 // how often something broken by others was repaired

	watcher *watcher
}

// pod is one pod that holds a Result.
type pod struct {
	mu sync.Mutex // held during Setup and Teardown

	id string // immutable
	// result is immutable but for HostLink, which is changed under both mu and
	// Bridge.mu, and read under either.
	result network.Result
}

// New opens the kernel's interfaces and starts to watch the rules. The bridge and
// the rules are made when they are first needed. If the bridge is already there, it
// remembers the pod range that the kubelet set before the daemon was restarted.
// Restore must be called before any other method when there are pods already.
//
// Needs: CAP_NET_ADMIN and CAP_SYS_ADMIN. Undo: Close, and Destroy for what is in
// the kernel.
func New(cfg Config) (*Bridge, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("cannot use network configuration: %w", err)
	}
	b := &Bridge{cfg: cfg, pods: map[string]*pod{}, links: map[string]string{}, ports: portTable{}}
	b.condition.Store(&network.Condition{Ready: true})
	if b.kernel, err = openKernel(cfg.NetNS); err != nil {
		return nil, fmt.Errorf("cannot open network of bridge %q: %w", cfg.Bridge, err)
	}
	if b.rules, err = nft.Open(cfg.NetNS); err != nil {
		b.kernel.close()
		return nil, fmt.Errorf("cannot open network of bridge %q: %w", cfg.Bridge, err)
	}
	if err := b.loadRanges(); err != nil {
		b.closeKernel()
		return nil, fmt.Errorf("cannot open network of bridge %q: %w", cfg.Bridge, err)
	}
	if b.watcher, err = b.watch(); err != nil {
		b.closeKernel()
		return nil, fmt.Errorf("cannot open network of bridge %q: %w", cfg.Bridge, err)
	}
	return b, nil
}

// loadRanges makes the first pools: from what the bridge remembers, else from the
// configuration.
func (b *Bridge) loadRanges() error {
	ranges := b.cfg.Subnets
	link, err := b.kernel.bridgeLink(b.cfg.Bridge)
	if err != nil {
		return err
	}
	if link != nil {
		if cidr := parseAlias(link.Attrs().Alias).podCIDR; cidr != "" {
			// Written by us, but anybody with CAP_NET_ADMIN may have changed it.
			if got, err := ParsePodCIDR(cidr); err == nil {
				b.podCIDR, ranges = cidr, got
			}
		}
	}
	usable, err := b.usable(ranges)
	if err != nil {
		return err
	}
	b.pools = b.newPoolsLocked(usable)
	return nil
}

// usable leaves IPv6 ranges out, with a warning, where there is no IPv6.
func (b *Bridge) usable(ranges []netip.Prefix) ([]netip.Prefix, error) {
	off := b.kernel.ipv6Off()
	if off == "" {
		return ranges, nil
	}
	var usable []netip.Prefix
	for _, p := range ranges {
		if p.Addr().Is4() {
			usable = append(usable, p)
			continue
		}
		klog.Background().Info("Pods get no IPv6 addresses", "range", p, "reason", off)
	}
	if len(usable) == 0 {
		return nil, fmt.Errorf("%w: only IPv6 pod ranges, but %s", network.ErrInvalid, off)
	}
	return usable, nil
}

// newPoolsLocked makes pools for ranges in which existing pods keep their addresses.
func (b *Bridge) newPoolsLocked(ranges []netip.Prefix) []*pool {
	var pools []*pool
	for _, r := range ranges {
		p := newPool(r, b.cfg.Now)
		for id, pod := range b.pods {
			for _, ip := range pod.result.IPs {
				if r.Contains(ip) {
					p.reserve(ip, id)
				}
			}
		}
		pools = append(pools, p)
	}
	return pools
}

// Name implements network.Network.
func (b *Bridge) Name() string { return Name }

// Status implements network.Network.
func (b *Bridge) Status() network.Condition { return *b.condition.Load() }

// Rebuilt is how often the bridge, its rules or the host's settings had been broken
// by others and were repaired.
func (b *Bridge) Rebuilt() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rebuilt
}

// Plan implements network.Network. A second Plan for the same pod returns the same.
// It returns network.ErrExhausted, ErrPortInUse or ErrInvalid.
func (b *Bridge) Plan(ctx context.Context, p network.Pod) (network.Result, error) {
	if err := ctx.Err(); err != nil {
		return network.Result{}, fmt.Errorf("cannot plan network of pod %q: %w", p.ID, err)
	}
	if p.ID == "" {
		return network.Result{}, fmt.Errorf("cannot plan network of pod %q: %w: no id", p.ID, network.ErrInvalid)
	}
	if _, err := network.BandwidthOf(p.Annotations); err != nil {
		return network.Result{}, fmt.Errorf("cannot plan network of pod %q: %w", p.ID, err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if have := b.pods[p.ID]; have != nil {
		return have.result, nil
	}
	r := network.Result{Provider: Name}
	for _, pool := range b.pools {
		ip, err := pool.take(p.ID)
		if err != nil {
			b.releaseLocked(p.ID, r)
			return network.Result{}, fmt.Errorf("cannot plan network of pod %q: %w", p.ID, err)
		}
		r.IPs, r.Subnets = append(r.IPs, ip), append(r.Subnets, pool.prefix)
	}
	var err error
	if r.Ports, err = b.ports.claim(p.ID, r.IPs, p.Ports); err != nil {
		b.releaseLocked(p.ID, r)
		return network.Result{}, fmt.Errorf("cannot plan network of pod %q: %w", p.ID, err)
	}
	for try := 0; r.HostLink == ""; try++ {
		if name := linkName(b.cfg.Bridge, p.ID, try); b.links[name] == "" {
			r.HostLink = name
		}
	}
	b.links[r.HostLink] = p.ID
	b.pods[p.ID] = &pod{id: p.ID, result: r}
	return r, nil
}

// releaseLocked gives everything in r back.
func (b *Bridge) releaseLocked(id string, r network.Result) {
	for _, pool := range b.pools {
		for _, ip := range r.IPs {
			pool.release(ip, id)
		}
	}
	b.ports.release(id)
	if b.links[r.HostLink] == id {
		delete(b.links, r.HostLink)
	}
	delete(b.pods, id)
}

// Setup implements network.Network. The returned Result is planned, unless the name
// of the host's link turned out to be taken by a foreign one.
func (b *Bridge) Setup(ctx context.Context, p network.Pod, planned network.Result) (network.Result, error) {
	r, err := b.setup(ctx, p, planned)
	if err != nil {
		return network.Result{}, fmt.Errorf("cannot set up network of pod %q: %w", p.ID, err)
	}
	return r, nil
}

func (b *Bridge) setup(ctx context.Context, p network.Pod, planned network.Result) (network.Result, error) {
	if p.NetNS == nil {
		return network.Result{}, fmt.Errorf("%w: no network namespace", network.ErrInvalid)
	}
	if err := ctx.Err(); err != nil {
		return network.Result{}, err
	}
	b.mu.Lock()
	entry := b.pods[p.ID]
	b.mu.Unlock()
	if entry == nil {
		return network.Result{}, fmt.Errorf("%w: nothing is planned for it", network.ErrInvalid)
	}
	entry.mu.Lock()
	defer entry.mu.Unlock()
	if !b.holds(entry) {
		return network.Result{}, fmt.Errorf("%w: it was torn down meanwhile", network.ErrInvalid)
	}
	bandwidth, err := network.BandwidthOf(p.Annotations)
	if err != nil {
		return network.Result{}, err
	}
	if len(entry.result.Subnets) != len(entry.result.IPs) {
		return network.Result{}, fmt.Errorf("%w: its record does not say which ranges %v are from", network.ErrInvalid, entry.result.IPs)
	}
	if !slices.Equal(entry.result.IPs, planned.IPs) {
		return network.Result{}, fmt.Errorf("%w: planned were the addresses %v, not %v", network.ErrInvalid, entry.result.IPs, planned.IPs)
	}

	h, err := b.ensureHost(ctx)
	if err != nil {
		return network.Result{}, err
	}
	if err := b.addLink(ctx, h, p, entry, bandwidth); err != nil {
		return network.Result{}, errors.Join(err, b.rules.Remove(entry.result.HostLink))
	}
	return entry.result, nil
}

// holds reports whether entry still has its reservation.
func (b *Bridge) holds(entry *pod) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.pods[entry.id] == entry
}

// addLink makes the pod's links and its rules. What stands in the way is looked at only when
// something does.
func (b *Bridge) addLink(ctx context.Context, h *host, p network.Pod, entry *pod, bandwidth network.Bandwidth) error {
	rules := func() error { return b.addRules(entry.result) }
	e := b.endpoint(h, p, entry.result, bandwidth)
	err := b.kernel.makeEndpoint(e, rules)
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENODEV):
		// Somebody deleted the bridge: there is no such master.
		b.broken(h)
		if h, err = b.ensureHost(ctx); err != nil {
			return err
		}
		e = b.endpoint(h, p, entry.result, bandwidth)
		return b.kernel.makeEndpoint(e, rules)
	case errors.Is(err, unix.EEXIST):
		ours, lookErr := b.kernel.isOurs(e.hostLink, h.index)
		if lookErr != nil {
			return errors.Join(err, lookErr)
		}
		if ours {
			// A leftover of this very pod: no other one has the name.
			if err := b.kernel.deleteLink(e.hostLink); err != nil {
				return err
			}
		} else if err := b.renameLink(entry); err != nil {
			return err
		}
		e = b.endpoint(h, p, entry.result, bandwidth)
		return b.kernel.makeEndpoint(e, rules)
	}
	return err
}

// renameLink gives the pod's link another name, as there is a foreign one of its
// own. The caller holds the pod's lock.
func (b *Bridge) renameLink(entry *pod) error {
	exists, err := b.kernel.linkExists(entry.result.HostLink)
	if err != nil || !exists {
		return err // It is the pod that has an eth0 already; the next try says so.
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for try := 1; ; try++ {
		name := linkName(b.cfg.Bridge, entry.id, try)
		if b.links[name] == "" {
			delete(b.links, entry.result.HostLink)
			b.links[name] = entry.id
			entry.result.HostLink = name
			return nil
		}
	}
}

func (b *Bridge) endpoint(h *host, p network.Pod, r network.Result, bandwidth network.Bandwidth) endpoint {
	return endpoint{
		podID: p.ID, hostLink: r.HostLink, master: h.index, mtu: h.mtu,
		podMAC: podMAC(r.IPs[0]), hostMAC: portMAC(r.IPs[0]),
		ips: r.IPs, subnets: r.Subnets, netns: p.NetNS, bandwidth: bandwidth,
	}
}

// addRules makes the rules cover a pod. On an error they may still do.
func (b *Bridge) addRules(r network.Result) error {
	if err := b.rules.Add(rulesOf(r)); err != nil {
		return err
	}
	ports := udpPorts(r)
	if len(ports) == 0 {
		return nil
	}
	// Flows to the port that began before this pod was behind it.
	local, err := b.kernel.localAddrs()
	if err != nil {
		return err
	}
	return b.kernel.forgetUDP(func(f *netlink.ConntrackFlow) bool {
		to, _ := netip.AddrFromSlice(f.Forward.DstIP)
		to = to.Unmap()
		return ports[f.Forward.DstPort] && (to.IsLoopback() || local[to])
	})
}

// rulesOf is what the rules must know of a pod.
func rulesOf(r network.Result) nft.Pod {
	mac := podMAC(r.IPs[0])
	p := nft.Pod{Link: r.HostLink, MAC: mac, IPs: r.IPs, Ports: r.Ports}
	if slices.ContainsFunc(r.IPs, netip.Addr.Is6) {
		p.LinkLocal = linkLocal(mac)
	}
	return p
}

func udpPorts(r network.Result) map[uint16]bool {
	ports := map[uint16]bool{}
	for _, m := range r.Ports {
		if m.Protocol == network.UDP {
			ports[m.HostPort] = true
		}
	}
	return ports
}

// Teardown implements network.Network. The reservation is freed only when
// everything else is gone, so that no address has two pods; until then Teardown
// can be called again.
func (b *Bridge) Teardown(_ context.Context, p network.Pod, r network.Result) error {
	if r.Provider != "" && r.Provider != Name {
		return fmt.Errorf("cannot tear down network of pod %q: %w: made by %q", p.ID, network.ErrInvalid, r.Provider)
	}
	b.mu.Lock()
	entry := b.pods[p.ID]
	b.mu.Unlock()
	if entry == nil {
		// Not in memory: freed already, or a record from before Restore. Its rules
		// are not in memory either; the first rebuild leaves them out.
		entry = &pod{id: p.ID, result: r}
	}
	entry.mu.Lock()
	defer entry.mu.Unlock()
	r = entry.result

	var errs []error
	errs = append(errs, b.rules.Remove(r.HostLink))
	if len(udpPorts(r)) > 0 {
		errs = append(errs, b.kernel.forgetUDP(func(f *netlink.ConntrackFlow) bool {
			from, ok := netip.AddrFromSlice(f.Reverse.SrcIP)
			return ok && slices.Contains(r.IPs, from.Unmap())
		}))
	}
	switch {
	case r.HostLink == "":
	case !linkPattern.MatchString(r.HostLink):
		errs = append(errs, fmt.Errorf("%w: %q is not a link of ours", network.ErrInvalid, r.HostLink))
	default:
		errs = append(errs, b.kernel.deleteLink(r.HostLink))
		if limit, err := network.BandwidthOf(p.Annotations); err != nil || limit.Egress > 0 { // an error: a Setup of another version took it
			errs = append(errs, b.kernel.deleteShaper(r.HostLink))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("cannot tear down network of pod %q: %w", p.ID, err)
	}
	b.mu.Lock()
	b.releaseLocked(p.ID, r)
	b.mu.Unlock()
	if err := b.dropUnusedRanges(r); err != nil {
		return fmt.Errorf("cannot tear down network of pod %q: %w", p.ID, err)
	}
	return nil
}

// UpdatePodCIDR implements network.Network. Errors wrap network.ErrInvalid and name
// the field when the text is at fault. The ranges replace all former ones: with
// one IPv4 range, new pods have no IPv6. Old pods, and the bridge's addresses that
// they need, stay. The bridge remembers the ranges across restarts of the daemon;
// after a reboot the kubelet sends them again.
func (b *Bridge) UpdatePodCIDR(cidr string) error {
	if cidr == "" {
		return nil
	}
	ranges, err := ParsePodCIDR(cidr)
	if err != nil {
		return fmt.Errorf("cannot set pod range: %w", err)
	}
	if ranges, err = b.usable(ranges); err != nil {
		return fmt.Errorf("cannot set pod range: pod_cidr %q: %w", cidr, err)
	}
	if err := b.kernel.checkOverlap(b.cfg.Bridge, ranges); err != nil {
		return fmt.Errorf("cannot set pod range: pod_cidr %q: %w", cidr, err)
	}
	b.mu.Lock()
	same := slices.Equal(ranges, rangesOf(b.pools))
	b.podCIDR = cidr
	if !same {
		// Only now: pools that go on keep their memory of what was freed lately.
		b.pools = b.newPoolsLocked(ranges)
	}
	b.mu.Unlock()
	b.generation.Add(1)
	if _, err := b.ensureHost(context.Background()); err != nil {
		return fmt.Errorf("cannot set pod range: %w", err)
	}
	return nil
}

func rangesOf(pools []*pool) []netip.Prefix {
	var ranges []netip.Prefix
	for _, p := range pools {
		ranges = append(ranges, p.prefix)
	}
	return ranges
}

// Close implements network.Network.
func (b *Bridge) Close() error {
	err := b.watcher.stop()
	b.closeKernel()
	return err
}

func (b *Bridge) closeKernel() {
	_ = b.rules.Close() // All answers were read.
	b.kernel.close()
}

package bridge

import (
	"errors"
	"fmt"
	stdnet "net"
	"net/netip"
	"os"
	"path"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/network/netns"
	"github.com/crisp-cri/crisp/network/nlbatch"
)

// kernel is the host side of the network: sockets and directories opened once, in
// the host's network namespace, and used from any thread afterwards. It holds no
// state of its own and is safe for concurrent use.
type kernel struct {
	ns *os.File
	// route are idle sockets for the hot path: several, because a request that
	// deletes a link waits (10 to 30 ms) for all processors to pass a quiescent state,
	// and others need not wait with it.
	route chan *nlbatch.Conn
	links *netlink.Handle // everything else about links, addresses and routes
	flows *netlink.Handle // connection tracking
	// /proc/sys/net/ipv4 and ipv6. A directory stays in the network namespace in
	// which it was opened. sys6 is nil when the kernel has no IPv6.
	sys4, sys6 *os.File
	podSysctls netns.Sysctls
}

// openKernel opens everything in ns (nil: the process's network namespace).
func openKernel(ns *os.File) (*kernel, error) {
	k := &kernel{ns: ns, route: make(chan *nlbatch.Conn, maxIdleConns)}
	err := netns.Do(ns, func() (err error) {
		if k.links, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
			return fmt.Errorf("open rtnetlink socket: %w", err)
		}
		if k.flows, err = netlink.NewHandle(unix.NETLINK_NETFILTER); err != nil {
			return fmt.Errorf("open conntrack socket: %w", err)
		}
		if k.sys4, err = os.Open("/proc/sys/net/ipv4"); err != nil {
			return err
		}
		if k.sys6, err = os.Open("/proc/sys/net/ipv6"); errors.Is(err, os.ErrNotExist) {
			k.sys6, err = nil, nil
		}
		return err
	})
	if err != nil {
		k.close()
		return nil, err
	}
	return k, nil
}

func (k *kernel) close() {
	// Nothing is written through any of these without waiting for the answer.
	for range cap(k.route) {
		select {
		case c := <-k.route:
			_ = c.Close()
		default:
		}
	}
	for _, h := range []*netlink.Handle{k.links, k.flows} {
		if h != nil {
			h.Close()
		}
	}
	for _, f := range []*os.File{k.sys4, k.sys6} {
		if f != nil {
			_ = f.Close()
		}
	}
	_ = k.podSysctls.Close()
}

// maxIdleConns is how many sockets are kept for the hot path.
const maxIdleConns = 8

// do sends rtnetlink requests as one batch.
func (k *kernel) do(msgs ...nlbatch.Message) error {
	var c *nlbatch.Conn
	select {
	case c = <-k.route:
	default:
		err := netns.Do(k.ns, func() (err error) {
			c, err = nlbatch.Dial(unix.NETLINK_ROUTE)
			return err
		})
		if err != nil {
			return err
		}
	}
	err := c.Do(msgs...)
	select {
	case k.route <- c:
	default:
		_ = c.Close() // All answers were read.
	}
	return err
}

// sysctl reads a setting below one of the directories.
func sysctl(dir *os.File, name string) (string, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &os.PathError{Op: "open", Path: path.Join(dir.Name(), name), Err: err}
	}
	defer func() { _ = unix.Close(fd) }() // Only read.
	var buf [64]byte
	n, err := unix.Read(fd, buf[:])
	if err != nil {
		return "", &os.PathError{Op: "read", Path: path.Join(dir.Name(), name), Err: err}
	}
	return strings.TrimSpace(string(buf[:n])), nil
}

// setSysctl writes a setting.
func setSysctl(dir *os.File, name, value string) error {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path.Join(dir.Name(), name), Err: err}
	}
	_, err = unix.Write(fd, []byte(value))
	_ = unix.Close(fd) // A setting is taken by write(2), or not at all.
	if err != nil {
		return &os.PathError{Op: "write " + value + " to", Path: path.Join(dir.Name(), name), Err: err}
	}
	return nil
}

// ipv6Off says why there can be no IPv6, "" if there can.
func (k *kernel) ipv6Off() string {
	if k.sys6 == nil {
		return "the kernel has no IPv6"
	}
	for _, scope := range []string{"all", "default"} {
		if v, err := sysctl(k.sys6, "conf/"+scope+"/disable_ipv6"); err == nil && v == "1" {
			return "net.ipv6.conf." + scope + ".disable_ipv6 is 1"
		}
	}
	return ""
}

// endpoint is one pod's pair of links, as a plan.
type endpoint struct {
	podID    string
	hostLink string
	master   int // index of the bridge
	mtu      int
	podMAC   stdnet.HardwareAddr
	hostMAC  stdnet.HardwareAddr
	ips      []netip.Addr
	subnets  []netip.Prefix // of ips, in the same order
	netns    *os.File

	bandwidth network.Bandwidth
}

func (e endpoint) has6() bool {
	for _, ip := range e.ips {
		if ip.Is6() {
			return true
		}
	}
	return false
}

// alias marks a pod's link on the host as ours: "crisp 0123…".
func (e endpoint) alias() string { return aliasWord + e.podID }

// hostMessages make the pair, its far end born in the pod's namespace and still
// down, and bring the near end up as a port of the bridge. With hairpin, a port may
// send back what came from it: with br_netfilter, a pod that talks to its own
// service needs that.
func (e endpoint) hostMessages(ipv6 bool) []nlbatch.Message {
	msgs := []nlbatch.Message{{
		Step:  "create link " + e.hostLink + " and its peer in the pod",
		Type:  unix.RTM_NEWLINK,
		Flags: unix.NLM_F_CREATE | unix.NLM_F_EXCL,
		Body: e.linkAttrs(nlbatch.Link(unix.AF_UNSPEC, 0, 0, 0), e.hostLink, e.hostMAC).
			Uint32(unix.IFLA_MASTER, uint32(e.master)).
			Nest(unix.IFLA_LINKINFO, func(b nlbatch.Body) nlbatch.Body {
				return b.String(unix.IFLA_INFO_KIND, "veth").Nest(unix.IFLA_INFO_DATA, func(b nlbatch.Body) nlbatch.Body {
					return b.Nest(nl.VETH_INFO_PEER, func(b nlbatch.Body) nlbatch.Body {
						b = append(b, nlbatch.Link(unix.AF_UNSPEC, 0, 0, 0)...)
						return e.linkAttrs(b, podLink, e.podMAC).Uint32(unix.IFLA_NET_NS_FD, uint32(e.netns.Fd()))
					})
				})
			}),
	}}
	if ipv6 {
		// The host does not talk IPv6 on a bridge's port, only on the bridge.
		msgs = append(msgs, addrGenMode(e.hostLink, genNone))
	}
	return append(msgs, nlbatch.Message{
		Step: "bring up " + e.hostLink,
		Type: unix.RTM_NEWLINK,
		Body: nlbatch.Link(unix.AF_UNSPEC, 0, unix.IFF_UP, unix.IFF_UP).
			String(unix.IFLA_IFNAME, e.hostLink).
			Attr(unix.IFLA_IFALIAS, []byte(e.alias())).
			Nest(unix.IFLA_LINKINFO, func(b nlbatch.Body) nlbatch.Body {
				return b.String(nl.IFLA_INFO_SLAVE_KIND, "bridge").Nest(nl.IFLA_INFO_SLAVE_DATA, func(b nlbatch.Body) nlbatch.Body {
					return b.Uint8(nl.IFLA_BRPORT_MODE, 1)
				})
			}),
	})
}

// linkAttrs are those that both ends have. One queue: the default is one for each
// CPU, which costs time and memory on big machines and serves only XDP.
func (e endpoint) linkAttrs(b nlbatch.Body, name string, mac stdnet.HardwareAddr) nlbatch.Body {
	return b.String(unix.IFLA_IFNAME, name).
		Uint32(unix.IFLA_MTU, uint32(e.mtu)).
		Attr(unix.IFLA_ADDRESS, mac).
		Uint32(unix.IFLA_NUM_TX_QUEUES, 1).Uint32(unix.IFLA_NUM_RX_QUEUES, 1)
}

// genNone is the IPv6 address generation mode of links that get no link-local
// address by themselves (linux/if_link.h, IN6_ADDR_GEN_MODE_NONE).
const genNone = 1

// addrGenMode says how a link gets its IPv6 link-local address.
func addrGenMode(link string, mode uint8) nlbatch.Message {
	return nlbatch.Message{
		Step: "set address generation mode of " + link,
		Type: unix.RTM_SETLINK,
		Body: nlbatch.Link(unix.AF_UNSPEC, 0, 0, 0).String(unix.IFLA_IFNAME, link).
			Nest(unix.IFLA_AF_SPEC, func(b nlbatch.Body) nlbatch.Body {
				return b.Nest(unix.AF_INET6, func(b nlbatch.Body) nlbatch.Body {
					return b.Uint8(unix.IFLA_INET6_ADDR_GEN_MODE, mode)
				})
			}),
	}
}

// podMessages configure the pod's end, seen from the pod; index is eth0's.
func (e endpoint) podMessages(index int32) []nlbatch.Message {
	const loopback = 1 // LOOPBACK_IFINDEX: always, in every namespace
	up := func(name string, index int32) nlbatch.Message {
		return nlbatch.Message{Step: "bring up " + name + " in the pod", Type: unix.RTM_NEWLINK,
			Body: nlbatch.Link(unix.AF_UNSPEC, index, unix.IFF_UP, unix.IFF_UP)}
	}
	msgs := []nlbatch.Message{up("lo", loopback)}
	if e.has6() {
		// We give it its link-local address ourselves: it is usable at once then, and
		// it is the one that the check of source addresses knows.
		msgs = append(msgs, addrGenMode(podLink, genNone), up(podLink, index),
			newAddr(linkLocal(e.podMAC), netip.PrefixFrom(linkLocal(e.podMAC), 64), index))
	} else {
		msgs = append(msgs, up(podLink, index))
	}
	for i, ip := range e.ips {
		msgs = append(msgs, newAddr(ip, e.subnets[i], index))
	}
	for i, ip := range e.ips {
		family, gw := uint8(unix.AF_INET), gatewayOf(e.subnets[i])
		if ip.Is6() {
			family = unix.AF_INET6
		}
		msgs = append(msgs, nlbatch.Message{
			Step:  fmt.Sprintf("add default route by %s in the pod", gw),
			Type:  unix.RTM_NEWROUTE,
			Flags: unix.NLM_F_CREATE | unix.NLM_F_EXCL,
			Body:  nlbatch.DefaultRoute(family).Attr(unix.RTA_GATEWAY, gw.AsSlice()).Uint32(unix.RTA_OIF, uint32(index)),
		})
	}
	return msgs
}

// newAddr gives an address to a pod's link. IPv6: without duplicate address
// detection, which would take a second; our pool knows that there is no duplicate.
func newAddr(ip netip.Addr, subnet netip.Prefix, index int32) nlbatch.Message {
	m := nlbatch.Message{
		Step:  fmt.Sprintf("add address %s in the pod", netip.PrefixFrom(ip, subnet.Bits())),
		Type:  unix.RTM_NEWADDR,
		Flags: unix.NLM_F_CREATE | unix.NLM_F_EXCL,
	}
	if ip.Is4() {
		m.Body = nlbatch.Addr(unix.AF_INET, subnet.Bits(), index).
			Attr(unix.IFA_LOCAL, ip.AsSlice()).Attr(unix.IFA_ADDRESS, ip.AsSlice()).
			Attr(unix.IFA_BROADCAST, lastAddr(subnet).AsSlice())
		return m
	}
	m.Body = nlbatch.Addr(unix.AF_INET6, subnet.Bits(), index).
		Attr(unix.IFA_ADDRESS, ip.AsSlice()).Uint32(unix.IFA_FLAGS, unix.IFA_F_NODAD)
	return m
}

// makeEndpoint does what e plans, and meanwhile what the host has to do besides
// (meanwhile, on another goroutine, once the host's link is there). On an error the
// pair is gone again; what meanwhile did is the caller's to undo.
//
// Needs: CAP_NET_ADMIN on the host and in the user namespace that owns the pod's
// network namespace, CAP_SYS_ADMIN to enter it. Runs on: any goroutine; the pod's
// part on a thread of its own (package netns). Undo: deleteLink. Trust: nothing
// that a container controls, but what its network namespace may contain already.
func (k *kernel) makeEndpoint(e endpoint, meanwhile func() error) error {
	// The first one alone: rtnetlink would apply the others to a foreign link of that name.
	msgs := e.hostMessages(k.sys6 != nil)
	if err := k.do(msgs[0]); err != nil {
		return err
	}
	err := k.do(msgs[1:]...)
	if err == nil {
		done := make(chan error, 1) // One result; received below.
		go func() { done <- errors.Join(k.silenceLink(e.hostLink), meanwhile()) }()
		err = netns.Do(e.netns, func() error { return k.configurePod(e) })
		err = errors.Join(err, <-done)
	}
	if err == nil {
		err = k.shape(e)
	}
	if err != nil {
		err = errors.Join(err, k.deleteLink(e.hostLink))
		if e.bandwidth.Egress > 0 {
			err = errors.Join(err, k.deleteShaper(e.hostLink))
		}
		return err
	}
	return nil
}

// silenceLink: the host takes no router's word on a link of ours (CVE-2020-10749).
func (k *kernel) silenceLink(name string) error {
	if k.sys6 == nil {
		return nil
	}
	return setSysctl(k.sys6, "conf/"+name+"/accept_ra", "0")
}

// configurePod runs inside the pod's network namespace.
func (k *kernel) configurePod(e endpoint) error {
	if k.sys6 != nil {
		const conf = "ipv6/conf/" + podLink
		if err := k.podSysctls.Write(conf+"/accept_ra", "0"); err != nil {
			return err
		}
		if !e.has6() {
			// Not even a link-local address (CVE-2024-32473).
			if err := k.podSysctls.Write(conf+"/disable_ipv6", "1"); err != nil {
				return err
			}
		}
	}
	conn, err := nlbatch.Dial(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // All answers were read.
	index, err := conn.Index(podLink)
	if err != nil {
		return err
	}
	return conn.Do(e.podMessages(index)...)
}

// deleteLink deletes a link, and its peer with it. A link that is not there is no error.
func (k *kernel) deleteLink(name string) error {
	err := k.do(nlbatch.Message{
		Step: "delete link " + name,
		Type: unix.RTM_DELLINK,
		Body: nlbatch.Link(unix.AF_UNSPEC, 0, 0, 0).String(unix.IFLA_IFNAME, name),
	})
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// forgetUDP deletes the tracked UDP flows that match says. A UDP "connection" has no
// end: a client that keeps sending would reach a dead pod, or none, for as long
// as it does. The kernel walks its whole table for that (10 ms with 262144 buckets,
// however full), so it is done only for pods with UDP host ports.
func (k *kernel) forgetUDP(match udpFilter) error {
	flows, err := k.flows.ConntrackTableList(netlink.ConntrackTable, unix.AF_UNSPEC)
	// The table changed meanwhile, as it always does: what was found will do.
	if err != nil && !errors.Is(err, unix.EINTR) && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("list tracked flows: %w", err)
	}
	families := map[uint8]bool{}
	for _, f := range flows {
		if match.MatchConntrackFlow(f) {
			families[f.FamilyType] = true
		}
	}
	var errs []error
	for family := range families {
		if _, err := k.flows.ConntrackDeleteFilters(netlink.ConntrackTable, netlink.InetFamily(family), match); err != nil && !errors.Is(err, unix.EINTR) && !errors.Is(err, netlink.ErrDumpInterrupted) {
			errs = append(errs, fmt.Errorf("delete tracked UDP flows: %w", err))
		}
	}
	return errors.Join(errs...)
}

type udpFilter func(*netlink.ConntrackFlow) bool

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (f udpFilter) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	return flow.Forward.Protocol == unix.IPPROTO_UDP && f(flow)
}

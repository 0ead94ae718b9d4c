package bridge

import (
	"errors"
	"fmt"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/network"
)

// Bandwidth annotations, as CNI's bandwidth plugin honours them, so that a pod
// behaves the same on either network. What the host sends to a pod waits in a token
// bucket (tc-tbf(8)) of the host's link. What a pod sends arrives there, and only what
// leaves a link can be made to wait: it is led through an intermediate link (ifb),
// which has a bucket too. Both are on the host: a pod with CAP_NET_ADMIN does not
// reach them.
//
//	host ── tbf ─▶ cr1a2b… ─────▶ pod        kubernetes.io/ingress-bandwidth
//	host ◀── cs1a2b… ◀─ tbf ◀──── pod        kubernetes.io/egress-bandwidth

// shaperWord starts the names of intermediate links; the rest is the pod's link's.
const shaperWord = "cs"

// shaperName is the name of the intermediate link of a pod whose link is hostLink.
func shaperName(hostLink string) string { return shaperWord + strings.TrimPrefix(hostLink, linkWord) }

// podLinkName says whether a pod may have a link of that name on the host.
func podLinkName(name string) bool {
	rest, ok := strings.CutPrefix(name, shaperWord)
	return linkPattern.MatchString(name) || ok && linkPattern.MatchString(linkWord+rest)
}

// shapedLink is the pod's link of an intermediate link, "" for what is none of ours.
func shapedLink(l netlink.Link) string {
	a := l.Attrs()
	rest, ok := strings.CutPrefix(a.Name, shaperWord)
	if hostLink := linkWord + rest; ok && l.Type() == "ifb" && strings.HasPrefix(a.Alias, aliasWord) && linkPattern.MatchString(hostLink) {
		return hostLink
	}
	return ""
}

const (
	// Of the time that a bucket lets pass at once, and of the longest that a packet waits (the CNI plugin's).
	burstsPerSecond, waitsPerSecond = 20, 40
	minBurst, maxBurst              = 64 << 10, 256 << 20 // bytes; a packet of the stack's segmentation offload has up to 64 KiB
	maxQueue                        = 1 << 30             // bytes
)

// bucket is a token bucket on a link; rate in bits per second.
func bucket(link int, rate uint64) *netlink.Tbf {
	rate /= 8
	burst := uint32(min(max(rate/burstsPerSecond, minBurst), maxBurst))
	return &netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       rate,
		Buffer:     netlink.Xmittime(rate, burst),
		Limit:      uint32(min(rate/waitsPerSecond, maxQueue)) + burst,
	}
}

// shape limits a pod whose links are up. On an error what it made is still there.
//
// Needs: CAP_NET_ADMIN. Undo: deleteLink of both.
func (k *kernel) shape(e endpoint) error {
	if e.bandwidth == (network.Bandwidth{}) {
		return nil
	}
	link, err := k.links.LinkByName(e.hostLink)
	if err != nil {
		return fmt.Errorf("look up link %s: %w", e.hostLink, err)
	}
	if rate := e.bandwidth.Ingress; rate > 0 {
		if err := k.links.QdiscAdd(bucket(link.Attrs().Index, rate)); err != nil {
			return fmt.Errorf("limit %s to %d bit/s: %w", e.hostLink, rate, err)
		}
	}
	if rate := e.bandwidth.Egress; rate > 0 {
		if err := k.shapeEgress(e, link, rate); err != nil {
			return fmt.Errorf("limit what comes from %s to %d bit/s: %w", e.hostLink, rate, err)
		}
	}
	return nil
}

func (k *kernel) shapeEgress(e endpoint, link netlink.Link, rate uint64) error {
	name := shaperName(e.hostLink)
	// A leftover of a daemon that died here: no other pod has the name.
	if err := k.deleteShaper(e.hostLink); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = name, e.mtu
	if err := k.links.LinkAdd(&netlink.Ifb{LinkAttrs: attrs}); err != nil {
		return fmt.Errorf("add link %s of type ifb: %w", name, err)
	}
	shaper, err := k.links.LinkByName(name)
	if err != nil {
		return fmt.Errorf("look up link %s: %w", name, err)
	}
	if err := k.links.LinkSetAlias(shaper, e.alias()); err != nil { // the kernel takes no alias with a new link
		return fmt.Errorf("mark link %s: %w", name, err)
	}
	if k.sys6 != nil {
		if err := setSysctl(k.sys6, "conf/"+name+"/disable_ipv6", "1"); err != nil { // no address, no packet of its own
			return err
		}
	}
	if err := k.links.QdiscAdd(bucket(shaper.Attrs().Index, rate)); err != nil {
		return fmt.Errorf("add token bucket to %s: %w", name, err)
	}
	if err := k.links.LinkSetUp(shaper); err != nil {
		return fmt.Errorf("bring up %s: %w", name, err)
	}
	index, ingress := link.Attrs().Index, netlink.MakeHandle(0xffff, 0)
	if err := k.links.QdiscAdd(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: ingress, Parent: netlink.HANDLE_INGRESS}}); err != nil {
		return fmt.Errorf("add ingress qdisc: %w", err)
	}
	// u32 without a key matches everything (tc-u32(8)); unlike matchall, every kernel has it.
	err = k.links.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: ingress, Priority: 1, Protocol: unix.ETH_P_ALL},
		ClassId:     netlink.MakeHandle(1, 1),
		Actions:     []netlink.Action{netlink.NewMirredAction(shaper.Attrs().Index)},
	})
	if err != nil {
		return fmt.Errorf("redirect to %s: %w", name, err)
	}
	return nil
}

// deleteShaper deletes the intermediate link of a pod, if there is one.
func (k *kernel) deleteShaper(hostLink string) error {
	name := shaperName(hostLink)
	link, err := k.links.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look up link %s: %w", name, err)
	}
	if shapedLink(link) != hostLink && link.Attrs().Alias != "" { // without an alias: the daemon died over it
		return fmt.Errorf("link %s is not ours: it has alias %q", name, link.Attrs().Alias)
	}
	return k.deleteLink(name)
}

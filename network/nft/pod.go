package nft

import (
	"encoding/binary"
	stdnet "net"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/network"
)

// Pod is what the rules know of a pod.
type Pod struct {
	Link string // its port on the bridge
	MAC  stdnet.HardwareAddr
	// IPs are its addresses. LinkLocal is its IPv6 link-local address, zero
	// without IPv6.
	IPs       []netip.Addr
	LinkLocal netip.Addr
	Ports     []network.PortMapping // host ports; validated
}

// protocols by number.
var protocols = map[network.Protocol]byte{
	network.TCP:  unix.IPPROTO_TCP,
	network.UDP:  unix.IPPROTO_UDP,
	network.SCTP: unix.IPPROTO_SCTP,
}

// elements that the pod adds to the sets.
func (p Pod) elements(c Config) []element {
	var elems []element
	if c.AntiSpoof {
		for _, ip := range p.IPs {
			elems = append(elems, ownElement(p.Link, p.MAC, ip))
		}
		if p.LinkLocal.IsValid() {
			elems = append(elems, ownElement(p.Link, p.MAC, p.LinkLocal))
		}
	}
	for _, m := range p.Ports {
		if m.HostPort == 0 {
			continue
		}
		for _, ip := range p.IPs {
			elems = append(elems, portElements(m, ip)...)
		}
	}
	return elems
}

func ownElement(link string, mac stdnet.HardwareAddr, ip netip.Addr) element {
	set := own4
	if ip.Is6() {
		set = own6
	}
	return element{set: set, key: key(ifname(link), mac, ip.AsSlice())}
}

// portElements is what a mapping to the pod's address ip needs.
func portElements(m network.PortMapping, ip netip.Addr) []element {
	proto := []byte{protocols[m.Protocol]}
	hostPort, target := port(m.HostPort), key(ip.AsSlice(), port(m.ContainerPort))
	host := m.HostIP.Unmap()
	if host.IsValid() && host.Is4() != ip.Is4() {
		return nil
	}
	pub := element{set: published, key: key(proto, hostPort)}
	one := !(!host.IsValid() || host.IsUnspecified())
	switch {
	case one && ip.Is4():
		elems := []element{{addrPorts4, key(host.AsSlice(), proto, hostPort), target}}
		if host.IsLoopback() {
			elems = append(elems, element{set: localAddr4, key: key(host.AsSlice(), proto, hostPort)}, pub)
		}
		return elems
	case one:
		elems := []element{{addrPorts6, key(host.AsSlice(), proto, hostPort), target}}
		if host.IsLoopback() {
			elems = append(elems, element{set: local6, key: key(proto, hostPort)}, pub)
		}
		return elems
	case ip.Is4():
		return []element{{ports4, key(proto, hostPort), target}, {set: local4, key: key(proto, hostPort)}, pub}
	default:
		return []element{{ports6, key(proto, hostPort), target}, {set: local6, key: key(proto, hostPort)}, pub}
	}
}

// key concatenates fields, each padded to a register's 4 bytes (nft_set).
func key(fields ...[]byte) string {
	var b []byte
	for _, f := range fields {
		b = append(b, f...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	return string(b)
}

// port in network byte order.
func port(p uint16) []byte { return binary.BigEndian.AppendUint16(nil, p) }

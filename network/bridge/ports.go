package bridge

import (
	"fmt"
	"net/netip"

	"github.com/crisp-cri/crisp/network"
)

// hostPort is a port number of a protocol on the host.
type hostPort struct {
	proto network.Protocol
	port  uint16
}

// binding is a pod's claim to a host port on one address, or on all of a family.
type binding struct {
	pod string
	any bool
	ip  netip.Addr // with any: only its family counts
}

func (b binding) overlaps(o binding) bool {
	return b.ip.Is4() == o.ip.Is4() && (b.any || o.any || b.ip == o.ip)
}

// portTable is who has which host port. It is not safe for concurrent use.
type portTable map[hostPort][]binding

// claim reserves the host ports of mappings for a pod and returns those that are
// published (a host port of 0 is none, CRI PortMapping since 0.33). It reserves
// all of them or none. It returns network.ErrInvalid for what can never work with
// the pod's addresses, and network.ErrPortInUse.
func (t portTable) claim(pod string, ips []netip.Addr, mappings []network.PortMapping) ([]network.PortMapping, error) {
	type claimed struct {
		port    hostPort
		binding binding
	}
	var published []network.PortMapping
	var claims []claimed
	for _, m := range mappings {
		if m.HostPort == 0 {
			continue
		}
		m.HostIP = m.HostIP.Unmap()
		if err := checkMapping(m, ips); err != nil {
			return nil, fmt.Errorf("host port %s: %w", mappingText(m), err)
		}
		if contains(published, m) {
			continue
		}
		port := hostPort{m.Protocol, m.HostPort}
		for _, b := range bindings(pod, ips, m) {
			for _, other := range t[port] {
				if other.pod != pod && b.overlaps(other) {
					return nil, fmt.Errorf("host port %s: %w: by pod %s", mappingText(m), network.ErrPortInUse, other.pod)
				}
			}
			for _, c := range claims {
				if c.port == port && b.overlaps(c.binding) {
					return nil, fmt.Errorf("host port %s: %w: the pod asks for it twice", mappingText(m), network.ErrInvalid)
				}
			}
			claims = append(claims, claimed{port, b})
		}
		published = append(published, m)
	}
	t.release(pod)
	for _, c := range claims {
		t[c.port] = append(t[c.port], c.binding)
	}
	return published, nil
}

// release gives back all that a pod has.
func (t portTable) release(pod string) {
	for port, bs := range t {
		var kept []binding
		for _, b := range bs {
			if b.pod != pod {
				kept = append(kept, b)
			}
		}
		switch {
		case len(kept) == 0:
			delete(t, port)
		case len(kept) != len(bs):
			t[port] = kept
		}
	}
}

func contains(ms []network.PortMapping, m network.PortMapping) bool {
	for _, o := range ms {
		if o == m {
			return true
		}
	}
	return false
}

// bindings are the addresses that a mapping occupies: hostIP, or everything in the
// families that the pod has addresses of.
func bindings(pod string, ips []netip.Addr, m network.PortMapping) []binding {
	var bs []binding
	for _, ip := range ips {
		switch {
		case !m.HostIP.IsValid():
			bs = append(bs, binding{pod: pod, any: true, ip: ip})
		case m.HostIP.Is4() == ip.Is4():
			bs = append(bs, binding{pod: pod, any: m.HostIP.IsUnspecified(), ip: m.HostIP})
		}
	}
	return bs
}

func checkMapping(m network.PortMapping, ips []netip.Addr) error {
	switch m.Protocol {
	case network.TCP, network.UDP, network.SCTP:
	default:
		return fmt.Errorf("%w: protocol %q, want tcp, udp or sctp", network.ErrInvalid, m.Protocol)
	}
	if m.ContainerPort == 0 {
		return fmt.Errorf("%w: container port 0", network.ErrInvalid)
	}
	if m.HostIP.Zone() != "" || m.HostIP.IsMulticast() {
		return fmt.Errorf("%w: host IP %s is no address of a host", network.ErrInvalid, m.HostIP)
	}
	if m.HostIP.IsValid() && len(bindings("", ips, m)) == 0 {
		return fmt.Errorf("%w: host IP %s, but the pod has no address of that family", network.ErrInvalid, m.HostIP)
	}
	return nil
}

// mappingText is a mapping in an error message: "tcp 192.0.2.1:8080".
func mappingText(m network.PortMapping) string {
	if m.HostIP.IsValid() {
		return fmt.Sprintf("%s %s", m.Protocol, netip.AddrPortFrom(m.HostIP, m.HostPort))
	}
	return fmt.Sprintf("%s %d", m.Protocol, m.HostPort)
}

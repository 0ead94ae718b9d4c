package bridge

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/crisp-cri/crisp/network"
)

func TestClaimPorts(t *testing.T) {
	dual := []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}
	v4 := dual[:1]
	m := func(proto network.Protocol, host uint16, ip string) network.PortMapping {
		pm := network.PortMapping{Protocol: proto, HostPort: host, ContainerPort: 80}
		if ip != "" {
			pm.HostIP = netip.MustParseAddr(ip)
		}
		return pm
	}
	for _, tt := range []struct {
		name string
		have []network.PortMapping // pod "old", dual stack
		ips  []netip.Addr
		want []network.PortMapping
		n    int // published
		err  error
	}{
		{"none", nil, dual, nil, 0, nil},
		{"host port 0 is none", nil, dual, []network.PortMapping{m("tcp", 0, "")}, 0, nil},
		{"even a bad one", nil, dual, []network.PortMapping{{HostPort: 0, Protocol: "x"}}, 0, nil},
		{"free", []network.PortMapping{m("tcp", 80, "")}, dual, []network.PortMapping{m("tcp", 81, "")}, 1, nil},
		{"other protocol", []network.PortMapping{m("tcp", 80, "")}, dual, []network.PortMapping{m("udp", 80, ""), m("sctp", 80, "")}, 2, nil},
		{"taken", []network.PortMapping{m("tcp", 80, "")}, dual, []network.PortMapping{m("tcp", 80, "")}, 0, network.ErrPortInUse},
		{"one address of all", []network.PortMapping{m("tcp", 80, "")}, dual, []network.PortMapping{m("tcp", 80, "192.0.2.1")}, 0, network.ErrPortInUse},
		{"all of which one is taken", []network.PortMapping{m("tcp", 80, "192.0.2.1")}, dual, []network.PortMapping{m("tcp", 80, "0.0.0.0")}, 0, network.ErrPortInUse},
		{"two addresses", []network.PortMapping{m("tcp", 80, "192.0.2.1")}, dual, []network.PortMapping{m("tcp", 80, "192.0.2.2")}, 1, nil},
		{"two families", []network.PortMapping{m("tcp", 80, "0.0.0.0")}, dual, []network.PortMapping{m("tcp", 80, "::")}, 1, nil},
		{"mapped address", []network.PortMapping{m("tcp", 80, "192.0.2.1")}, dual, []network.PortMapping{m("tcp", 80, "::ffff:192.0.2.1")}, 0, network.ErrPortInUse},
		{"twice the same", nil, dual, []network.PortMapping{m("tcp", 80, ""), m("tcp", 80, "")}, 1, nil},
		{"twice", nil, dual, []network.PortMapping{m("tcp", 80, ""), m("tcp", 80, "127.0.0.1")}, 0, network.ErrInvalid},
		{"no such family", nil, v4, []network.PortMapping{m("tcp", 80, "2001:db8::1")}, 0, network.ErrInvalid},
		{"protocol", nil, dual, []network.PortMapping{m("icmp", 80, "")}, 0, network.ErrInvalid},
		{"container port", nil, dual, []network.PortMapping{{Protocol: "tcp", HostPort: 80}}, 0, network.ErrInvalid},
		{"multicast", nil, dual, []network.PortMapping{m("udp", 80, "224.0.0.1")}, 0, network.ErrInvalid},
		{"zone", nil, dual, []network.PortMapping{m("udp", 80, "fe80::1%eth0")}, 0, network.ErrInvalid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			table := portTable{}
			if _, err := table.claim("old", dual, tt.have); err != nil {
				t.Fatal(err)
			}
			before := len(table)
			got, err := table.claim("new", tt.ips, tt.want)
			if !errors.Is(err, tt.err) || len(got) != tt.n {
				t.Fatalf("got %v, %v, want %d and %v", got, err, tt.n, tt.err)
			}
			if err != nil && len(table) != before {
				t.Errorf("a claim that failed left something: %v", table)
			}
			// Again, after a restart: its own ports are not in the way.
			if err == nil {
				if again, err := table.claim("new", tt.ips, tt.want); err != nil || len(again) != tt.n {
					t.Errorf("second claim: got %v, %v", again, err)
				}
			}
			table.release("new")
			table.release("new")
			if len(table) != before {
				t.Errorf("after release: got %v", table)
			}
			table.release("old")
			if len(table) != 0 {
				t.Errorf("after releasing all: got %v", table)
			}
		})
	}
}

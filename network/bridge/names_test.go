package bridge

import (
	"net/netip"
	"strings"
	"testing"
)

func netipPrefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func TestLinkNames(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	seen := map[string]bool{}
	for _, bridge := range []string{"crisp0", "crisp1"} {
		for _, pod := range []string{id, "f" + id, "no hex at all", "", "short"} {
			for try := range 3 {
				name := linkName(bridge, pod, try)
				if !linkPattern.MatchString(name) || len(name) > maxLinkName || !strings.HasPrefix(name, linkPrefix(bridge)) || seen[name] {
					t.Errorf("link %q of pod %q on %s, try %d: not a name of ours, or not unique", name, pod, bridge, try)
				}
				seen[name] = true
			}
		}
	}
	if got, want := linkName("crisp0", id, 0), linkPrefix("crisp0")+id[:9]; got != want {
		t.Errorf("got %q, want %q, in which one sees the pod's id", got, want)
	}
}

func TestAddressesFromIPs(t *testing.T) {
	for _, tt := range []struct{ ip, mac, linkLocal string }{
		{"10.219.0.2", "0a:58:0a:db:00:02", "fe80::858:aff:fedb:2"},
		{"10.219.1.2", "0a:58:0a:db:01:02", "fe80::858:aff:fedb:102"},
		{"fd00::2", podMAC(netip.MustParseAddr("fd00::2")).String(), linkLocal(podMAC(netip.MustParseAddr("fd00::2"))).String()},
	} {
		mac := podMAC(netip.MustParseAddr(tt.ip))
		if mac.String() != tt.mac || linkLocal(mac).String() != tt.linkLocal {
			t.Errorf("%s: got %s and %s, want %s and %s", tt.ip, mac, linkLocal(mac), tt.mac, tt.linkLocal)
		}
		if mac[0]&3 != 2 {
			t.Errorf("%s is not a locally administered unicast address", mac)
		}
	}
	if podMAC(netip.MustParseAddr("fd00:1::2")).String() == podMAC(netip.MustParseAddr("fd00:2::2")).String() {
		t.Error("pods of two IPv6 ranges have one MAC")
	}
}

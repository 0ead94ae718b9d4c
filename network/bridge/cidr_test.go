package bridge

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/crisp-cri/crisp/network"
)

func TestParsePodCIDR(t *testing.T) {
	for _, tt := range []struct{ name, in, want, err string }{
		{"one", "10.1.2.0/24", "[10.1.2.0/24]", ""},
		{"both", "10.1.2.0/24,fd00:1::/64", "[10.1.2.0/24 fd00:1::/64]", ""},
		{"v6 first, blank", "fd00:1::/64, 10.1.2.0/24", "[fd00:1::/64 10.1.2.0/24]", ""},
		{"public", "203.0.113.0/28", "[203.0.113.0/28]", ""},
		{"garbage", "pods", "", `entry 1: "pods" is not a range like`},
		{"address", "10.1.2.3", "", "is not a range"},
		{"empty entry", "10.1.2.0/24,", "", "entry 2"},
		{"host bits", "10.1.2.3/24", "", "did you mean 10.1.2.0/24?"},
		{"two of a family", "10.1.2.0/24,10.1.3.0/24", "", "entry 2: 10.1.3.0/24: a second range of the same family"},
		{"three", "10.1.2.0/24,fd00::/64,fd01::/64", "", "entry 3"},
		{"too small", "10.1.2.0/31", "", "too small"},
		{"too small v6", "fd00::/127", "", "too small"},
		{"too large", "0.0.0.0/0", "", "too large"},
		{"reserved", "240.0.0.0/8", "", "reserved"},
		{"loopback", "127.0.0.0/16", "", "loopback"},
		{"around loopback", "::/8", "", "loopback"},
		{"multicast", "224.1.0.0/16", "", "multicast"},
		{"link-local", "fe80::/64", "", "link-local"},
		{"mapped", "::ffff:10.1.2.0/120", "", "IPv4 range in IPv6 form"},
		{"zone", "fe80::%eth0/64", "", "not a range"},
		{"long", strings.Repeat("1", 1000), "", "1000 bytes long"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParsePodCIDR(tt.in)
			if tt.err == "" {
				if err != nil || fmt.Sprint(got) != tt.want {
					t.Fatalf("got %v, %v, want %s", got, err, tt.want)
				}
				return
			}
			if !errors.Is(err, network.ErrInvalid) || !strings.Contains(err.Error(), "pod_cidr") || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("got %v, want ErrInvalid that names pod_cidr and says %q", err, tt.err)
			}
		})
	}
}

func FuzzParsePodCIDR(f *testing.F) {
	for _, s := range []string{"10.1.2.0/24", "10.1.2.0/24,fd00:1::/64", "", ",", "::/0", "fe80::%x/64", "::ffff:1.2.3.4/128", "10.1.2.0/024"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		ranges, err := ParsePodCIDR(s)
		if err != nil {
			if !errors.Is(err, network.ErrInvalid) || ranges != nil {
				t.Fatalf("got %v, %v", ranges, err)
			}
			return
		}
		if len(ranges) < 1 || len(ranges) > 2 {
			t.Fatalf("%q: %d ranges", s, len(ranges))
		}
		for _, r := range ranges {
			// Whatever is accepted can be used.
			p := newPool(r, (&clock{}).now)
			a, err := p.take("x")
			if err != nil || !r.Contains(a) || a == p.gateway {
				t.Fatalf("%q: address %v, %v of range %s", s, a, err, r)
			}
		}
		if got := parseAlias(alias{podCIDR: s, ranges: ranges}.String()); len(got.ranges) != len(ranges) {
			t.Fatalf("%q: ranges %v do not survive in the bridge's alias: %v", s, ranges, got.ranges)
		}
	})
}

func FuzzParseAlias(f *testing.F) {
	for _, s := range []string{"crisp pod_cidr=10.1.2.0/24 ranges=10.1.2.0/24,fd00::/64", "crisp ", "", "crisp ranges=,", "my bridge"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		for _, r := range parseAlias(s).ranges {
			if err := checkRange(r); err != nil {
				t.Fatalf("%q: range %s: %v", s, r, err)
			}
		}
	})
}

func TestAlias(t *testing.T) {
	long := alias{podCIDR: "10.1.2.0/24", ranges: DefaultSubnets()}
	for range 20 {
		long.ranges = append(long.ranges, DefaultSubnets()...)
	}
	for _, tt := range []struct {
		name string
		in   alias
		want alias
	}{
		{"configured", alias{ranges: DefaultSubnets()}, alias{ranges: DefaultSubnets()}},
		{"from the kubelet", alias{podCIDR: "10.1.2.0/24,fd00::/64", ranges: DefaultSubnets()}, alias{podCIDR: "10.1.2.0/24,fd00::/64", ranges: DefaultSubnets()}},
		{"too long", long, alias{podCIDR: "10.1.2.0/24"}},
	} {
		s := tt.in.String()
		if got := parseAlias(s); fmt.Sprint(got) != fmt.Sprint(tt.want) || len(s) > maxAlias {
			t.Errorf("%s: %q (%d bytes): got %v, want %v", tt.name, s, len(s), got, tt.want)
		}
	}
}

func TestConfig(t *testing.T) {
	for _, tt := range []struct {
		name string
		in   Config
		want string // in the error; "": none
	}{
		{"zero", Config{}, ""},
		{"bridge name", Config{Bridge: "a/b"}, "bridge"},
		{"bridge pattern", Config{Bridge: "crisp*"}, "bridge"},
		{"long bridge name", Config{Bridge: "0123456789abcdef"}, "bridge"},
		{"bridge like a pod's link", Config{Bridge: "cr0123456789abc"}, "bridge"},
		{"table name", Config{Table: "a b"}, "table"},
		{"subnets", Config{Subnets: DefaultSubnets()[:0]}, "subnets"},
		{"MTU", Config{MTU: 576}, "mtu"},
		{"exceptions", Config{MasqueradeExcept: append(DefaultSubnets(), DefaultSubnets()[0].Masked(), netipPrefix("0.0.0.0/0"))}, "masquerade_except"},
	} {
		_, err := tt.in.withDefaults()
		if (tt.want == "") != (err == nil) || (err != nil && (!errors.Is(err, network.ErrInvalid) || !strings.HasPrefix(err.Error(), tt.want))) {
			t.Errorf("%s: got %v, want an ErrInvalid that starts with %q", tt.name, err, tt.want)
		}
	}
}

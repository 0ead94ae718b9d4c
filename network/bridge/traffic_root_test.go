package bridge

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/network/netns"
)

func TestPodsReachEachOtherAndTheHost(t *testing.T) {
	host := newNS(t)
	b := newBridge(t, host, Config{})
	p, q := addPod(t, b, "a"), addPod(t, b, "b")
	far := lan(t, host)
	for _, ns := range []struct {
		name string
		ns   *os.File
	}{{"a", p.NetNS}, {"b", q.NetNS}, {"host", host}, {"lan", far}} {
		serve(t, ns.ns, "tcp", ":80", ns.name)
		serve(t, ns.ns, "udp", ":53", ns.name)
	}
	gw4, gw6 := netip.MustParseAddr("10.219.0.1"), netip.MustParseAddr("fd53:a2c7:190e::1")
	far4, far6 := netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::2")
	up4, up6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	lo4, lo6 := netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()
	for _, tt := range []struct {
		name     string
		from     *os.File
		to, seen netip.Addr
		want     string
	}{
		{"pod to itself", p.NetNS, p.ip4(), p.ip4(), "a"},
		{"pod to its loopback", p.NetNS, lo4, lo4, "a"},
		{"pod to its loopback, v6", p.NetNS, lo6, lo6, "a"},
		{"pod to pod", p.NetNS, q.ip4(), p.ip4(), "b"},
		{"pod to pod, v6", p.NetNS, q.ip6(), p.ip6(), "b"},
		{"pod to gateway", p.NetNS, gw4, p.ip4(), "host"},
		{"pod to gateway, v6", p.NetNS, gw6, p.ip6(), "host"},
		{"pod to host", p.NetNS, up4, p.ip4(), "host"},
		{"pod to host, v6", p.NetNS, up6, p.ip6(), "host"},
		{"host to pod", host, p.ip4(), gw4, "a"},
		{"host to pod, v6", host, p.ip6(), gw6, "a"},
		{"pod to LAN: masqueraded", p.NetNS, far4, up4, "lan"},
		{"pod to LAN, v6: masqueraded", p.NetNS, far6, up6, "lan"},
		{"LAN to pod: routed", far, p.ip4(), far4, "a"},
		{"LAN to pod, v6: routed", far, p.ip6(), far6, "a"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for proto, port := range map[string]uint16{"tcp": 80, "udp": 53} {
				if proto == "udp" && (tt.to == up4 || tt.to == up6) {
					continue // A server on all addresses answers from the nearest one.
				}
				if seen := wantAnswer(t, tt.from, proto, at(tt.to, port), tt.want); seen != tt.seen {
					t.Errorf("%s: seen as %s, want %s", proto, seen, tt.seen)
				}
			}
		})
	}
}

func TestNoMasquerade(t *testing.T) {
	for _, tt := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"off", Config{NoMasquerade: true}, "pod"},
		{"excepted", Config{MasqueradeExcept: []netip.Prefix{netipPrefix("192.0.2.0/30")}}, "pod"},
		{"other excepted", Config{MasqueradeExcept: []netip.Prefix{netipPrefix("198.51.100.0/24")}}, "host"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			host := newNS(t)
			b := newBridge(t, host, tt.cfg)
			p := addPod(t, b, "a")
			far := lan(t, host)
			serve(t, far, "tcp", ":80", "lan")
			want := map[string]netip.Addr{"pod": p.ip4(), "host": netip.MustParseAddr("192.0.2.1")}[tt.want]
			if seen := wantAnswer(t, p.NetNS, "tcp", "192.0.2.2:80", "lan"); seen != want {
				t.Errorf("seen as %s, want %s", seen, want)
			}
		})
	}
}

func TestHostPorts(t *testing.T) {
	for _, nf := range []string{"0", "1"} {
		t.Run("bridge-nf-call-iptables="+nf, func(t *testing.T) {
			host := newNS(t)
			for _, f := range []string{"iptables", "ip6tables"} {
				if out, err := tryRun(host, "sh", "-c", "echo "+nf+" > /proc/sys/net/bridge/bridge-nf-call-"+f); err != nil {
					if nf == "0" {
						break // no br_netfilter, which is the same as off
					}
					t.Skipf("needs br_netfilter in the kernel: %s", out)
				}
			}
			testHostPorts(t, host)
		})
	}
}

func testHostPorts(t *testing.T, host *os.File) {
	b := newBridge(t, host, Config{})
	far := lan(t, host)
	one := netip.MustParseAddr("192.0.2.1")
	run(t, host, "ip", "addr", "add", "192.0.2.9/24", "dev", "lan0")
	p := addPod(t, b, "a",
		network.PortMapping{Protocol: network.TCP, HostPort: 8080, ContainerPort: 80},
		network.PortMapping{Protocol: network.UDP, HostPort: 5300, ContainerPort: 53},
		network.PortMapping{Protocol: network.TCP, HostPort: 8081, ContainerPort: 80, HostIP: one},
		network.PortMapping{Protocol: network.TCP, HostPort: 8082, ContainerPort: 80, HostIP: netip.MustParseAddr("127.0.0.1")},
		network.PortMapping{Protocol: network.TCP, HostPort: 8083, ContainerPort: 80, HostIP: netip.IPv6Loopback()},
		network.PortMapping{Protocol: network.TCP, HostPort: 0, ContainerPort: 81},
		network.PortMapping{Protocol: network.TCP, HostPort: 8084, ContainerPort: 80, HostIP: netip.IPv4Unspecified()},
	)
	q := addPod(t, b, "b", network.PortMapping{Protocol: network.TCP, HostPort: 8081, ContainerPort: 80, HostIP: netip.MustParseAddr("192.0.2.9")})
	for _, s := range []struct {
		ns   *os.File
		name string
	}{{p.NetNS, "a"}, {q.NetNS, "b"}} {
		serve(t, s.ns, "tcp", ":80", s.name)
		serve(t, s.ns, "tcp", ":81", s.name)
		serve(t, s.ns, "udp", ":53", s.name)
	}
	for _, tt := range []struct {
		name      string
		from      *os.File
		proto, to string
		want      string // "": no answer
		seen      string // "": not checked
	}{
		{"LAN", far, "tcp", "192.0.2.1:8080", "a", "192.0.2.2"},
		{"LAN, v6", far, "tcp", "[2001:db8::1]:8080", "a", "2001:db8::2"},
		{"LAN, udp", far, "udp", "192.0.2.1:5300", "a", "192.0.2.2"},
		{"LAN, udp v6", far, "udp", "[2001:db8::1]:5300", "a", "2001:db8::2"},
		{"host by its address", host, "tcp", "192.0.2.1:8080", "a", "192.0.2.1"},
		{"host by its address, v6", host, "tcp", "[2001:db8::1]:8080", "a", "2001:db8::1"},
		{"host by the gateway", host, "tcp", "10.219.0.1:8080", "a", ""},
		{"host by 127.0.0.1", host, "tcp", "127.0.0.1:8080", "a", "10.219.0.1"},
		{"host by 127.0.0.2", host, "tcp", "127.0.0.2:8080", "a", ""},
		{"host by ::1", host, "tcp", "[::1]:8080", "a", "fd53:a2c7:190e::1"},
		{"host by 127.0.0.1, udp", host, "udp", "127.0.0.1:5300", "a", ""},
		{"host by ::1, udp", host, "udp", "[::1]:5300", "a", ""},
		{"itself: hairpin", p.NetNS, "tcp", "192.0.2.1:8080", "a", ""},
		{"itself by the gateway", p.NetNS, "tcp", "10.219.0.1:8080", "a", ""},
		{"itself, v6", p.NetNS, "tcp", "[2001:db8::1]:8080", "a", ""},
		{"itself, udp", p.NetNS, "udp", "192.0.2.1:5300", "a", ""},
		{"other pod", q.NetNS, "tcp", "192.0.2.1:8080", "a", ""},
		{"other pod, v6", q.NetNS, "tcp", "[2001:db8::1]:8080", "a", ""},
		{"other pod, udp", q.NetNS, "udp", "192.0.2.1:5300", "a", ""},
		{"host IP", far, "tcp", "192.0.2.1:8081", "a", ""},
		{"other host IP, same port", far, "tcp", "192.0.2.9:8081", "b", ""},
		{"host IP, not this one", host, "tcp", "127.0.0.1:8081", "", ""},
		{"host IP, not this family", far, "tcp", "[2001:db8::1]:8081", "", ""},
		{"loopback host IP", host, "tcp", "127.0.0.1:8082", "a", ""},
		{"loopback host IP from the LAN", far, "tcp", "192.0.2.1:8082", "", ""},
		{"loopback host IP from a pod", q.NetNS, "tcp", "10.219.0.1:8082", "", ""},
		{"v6 loopback host IP", host, "tcp", "[::1]:8083", "a", ""},
		{"v6 loopback host IP from the LAN", far, "tcp", "[2001:db8::1]:8083", "", ""},
		{"all of IPv4", far, "tcp", "192.0.2.1:8084", "a", ""},
		{"all of IPv4, v6", far, "tcp", "[2001:db8::1]:8084", "", ""},
		{"not published", far, "tcp", "192.0.2.1:81", "", ""},
		{"wrong protocol", far, "udp", "192.0.2.1:8080", "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.want == "" {
				wantNoAnswer(t, tt.from, tt.proto, tt.to)
				return
			}
			seen := wantAnswer(t, tt.from, tt.proto, tt.to, tt.want)
			if tt.seen != "" && seen.String() != tt.seen {
				t.Errorf("seen as %s, want %s", seen, tt.seen)
			}
		})
	}
	removePod(t, b, p)
	for _, to := range []string{"192.0.2.1:8080", "127.0.0.1:8080", "[::1]:8080", "127.0.0.1:8082"} {
		wantNoAnswer(t, host, "tcp", to)
	}
	wantAnswer(t, far, "tcp", "192.0.2.9:8081", "b")
}

// A local client may use a published port's number as its own: answers to it are not
// requests to the port (nft chain output_raw).
func TestLocalClientWithAPublishedPortNumber(t *testing.T) {
	host := newNS(t)
	b := newBridge(t, host, Config{})
	const number = 40000
	p := addPod(t, b, "a", network.PortMapping{Protocol: network.TCP, HostPort: number, ContainerPort: 80})
	serve(t, p.NetNS, "tcp", ":80", "a")
	serve(t, host, "tcp", ":5432", "server")
	for _, addrs := range [][2]string{{"127.0.0.1", "127.0.0.1:5432"}, {"127.0.0.1", "127.0.0.7:5432"}, {"::1", "[::1]:5432"}} {
		var c net.Conn
		err := netns.Do(host, func() (err error) {
			// The port of the connection before may still be closing: SO_REUSEADDR, socket(7).
			d := net.Dialer{Timeout: patience, LocalAddr: &net.TCPAddr{IP: net.ParseIP(addrs[0]), Port: number}, Control: reuseAddr}
			c, err = d.Dial("tcp", addrs[1])
			return err
		})
		if err != nil {
			t.Errorf("%s from port %d: %v", addrs[1], number, err)
			continue
		}
		if name, _, err := askOn(c, patience); err != nil || name != "server" {
			t.Errorf("%s: got %q, %v, want the server's answer", addrs[1], name, err)
		}
		_ = c.Close()
	}
	wantAnswer(t, host, "tcp", fmt.Sprintf("127.0.0.1:%d", number), "a")
	wantAnswer(t, host, "tcp", fmt.Sprintf("[::1]:%d", number), "a")
}

func reuseAddr(_, _ string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	return errors.Join(err, cerr)
}

// A client that keeps sending from one socket reaches whoever has the port now.
func TestUDPFollowsThePort(t *testing.T) {
	for _, to := range []string{"192.0.2.1:5300", "[2001:db8::1]:5300"} {
		t.Run(to, func(t *testing.T) {
			host := newNS(t)
			b := newBridge(t, host, Config{})
			far := lan(t, host)
			serve(t, host, "udp", ":5300", "host")
			var c net.Conn
			check(t, netns.Do(far, func() (err error) {
				c, err = net.Dial("udp", to)
				return err
			}))
			defer func() { _ = c.Close() }()
			want := func(name string) {
				t.Helper()
				if got, _, err := askOn(c, patience); err != nil || got != name {
					t.Errorf("got %q, %v, want an answer of %q", got, err, name)
				}
			}
			want("host")
			mapping := network.PortMapping{Protocol: network.UDP, HostPort: 5300, ContainerPort: 53}
			p := planned(t, b, "a", mapping)
			serve(t, p.NetNS, "udp", ":53", "a")
			p.result = must(b.Setup(t.Context(), p.Pod, p.result))(t)
			want("a")
			removePod(t, b, p)
			want("host")
			q := planned(t, b, "b", mapping)
			serve(t, q.NetNS, "udp", ":53", "b")
			must(b.Setup(t.Context(), q.Pod, q.result))(t)
			want("b")
		})
	}
}

// attack takes 127.0.0.1 off an attacker's loopback and sends it to the host instead.
func attack(t *testing.T, ns *os.File, dev, gw4 string) {
	t.Helper()
	for _, line := range []string{
		"echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet",
		"ip addr del 127.0.0.1/8 dev lo",
		"ip route add 127.0.0.0/8 via " + gw4 + " dev " + dev,
	} {
		run(t, ns, "sh", "-c", line)
	}
}

// SEC-111 (CVE-2020-8558): what listens on the host's loopback is nobody else's.
func TestLoopbackIsTheHostsOwn(t *testing.T) {
	host := newNS(t)
	b := newBridge(t, host, Config{})
	far := lan(t, host)
	p := addPod(t, b, "a", network.PortMapping{Protocol: network.TCP, HostPort: 8082, ContainerPort: 80, HostIP: netip.MustParseAddr("127.0.0.1")})
	serve(t, p.NetNS, "tcp", ":80", "a")
	q := addPod(t, b, "b")
	serve(t, host, "tcp", "127.0.0.1:6000", "host")
	serve(t, host, "udp", "127.0.0.1:6000", "host")
	attack(t, q.NetNS, "eth0", "10.219.0.1")
	attack(t, far, "eth0", "192.0.2.1")
	try := func(when string) {
		t.Helper()
		wantAnswer(t, host, "tcp", "127.0.0.1:6000", "host")
		for _, from := range []*os.File{q.NetNS, far} {
			wantNoAnswer(t, from, "tcp", "127.0.0.1:6000")
			wantNoAnswer(t, from, "udp", "127.0.0.1:6000")
			wantNoAnswer(t, from, "tcp", "127.0.0.1:8082") // SEC-115: also while the rules are gone
		}
		if t.Failed() {
			t.Fatal(when)
		}
	}
	try("with our rules")
	for _, line := range strings.Fields(run(t, host, "sh", "-c", "echo /proc/sys/net/ipv4/conf/*/route_localnet")) {
		if v := readSysctl(t, host, strings.TrimPrefix(line, "/proc/sys/net/")); v != "0" {
			t.Errorf("%s is %s, want 0", line, v)
		}
	}
	check(t, b.rules.Delete("crisp")) // Our own doing: not rebuilt.
	try("without our rules")
	b.rules.Put(rulesOf(p.result), rulesOf(q.result))
	b.generation.Add(1)
	must(b.ensureHost(t.Context()))(t)
	// kube-proxy may set it for all links; then our rule stands in.
	run(t, host, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet")
	wantNoAnswer(t, q.NetNS, "tcp", "127.0.0.1:6000")
	wantNoAnswer(t, q.NetNS, "udp", "127.0.0.1:6000")
	wantNoAnswer(t, far, "tcp", "127.0.0.1:8082")
	wantAnswer(t, host, "tcp", "127.0.0.1:8082", "a")
}

// SEC-112 (CVE-2025-67499): a host port is the host's, not everybody's.
func TestHostPortOnlyForTheHost(t *testing.T) {
	host := newNS(t)
	b := newBridge(t, host, Config{})
	far := lan(t, host)
	addPod(t, b, "a", network.PortMapping{Protocol: network.TCP, HostPort: 5353, ContainerPort: 5353})
	p, q := addPod(t, b, "b"), addPod(t, b, "c")
	serve(t, q.NetNS, "tcp", ":5353", "c")
	serve(t, far, "tcp", ":5353", "lan")
	for from, ns := range map[string]*os.File{"pod": p.NetNS, "host": host} {
		t.Run(from, func(t *testing.T) {
			wantAnswer(t, ns, "tcp", at(q.ip4(), 5353), "c")
			wantAnswer(t, ns, "tcp", at(q.ip6(), 5353), "c")
			wantAnswer(t, ns, "tcp", "192.0.2.2:5353", "lan")
		})
	}
}

// SEC-113 (CVE-2019-9946): who translates at the standard priority, wins.
func TestForeignDNATWins(t *testing.T) {
	host := newNS(t)
	b := newBridge(t, host, Config{})
	far := lan(t, host)
	p := addPod(t, b, "a", network.PortMapping{Protocol: network.TCP, HostPort: 8080, ContainerPort: 80})
	q := addPod(t, b, "b")
	serve(t, p.NetNS, "tcp", ":80", "a")
	serve(t, q.NetNS, "tcp", ":80", "b")
	wantAnswer(t, far, "tcp", "192.0.2.1:8080", "a")
	run(t, host, "nft", fmt.Sprintf(`add table ip services;
		add chain ip services in { type nat hook prerouting priority dstnat; };
		add chain ip services out { type nat hook output priority -100; };
		add rule ip services in ip daddr 192.0.2.1 tcp dport 8080 dnat to %[1]s:80;
		add rule ip services out ip daddr 192.0.2.1 tcp dport 8080 dnat to %[1]s:80`, q.ip4()))
	wantAnswer(t, far, "tcp", "192.0.2.1:8080", "b")
	wantAnswer(t, host, "tcp", "192.0.2.1:8080", "b")
	wantAnswer(t, host, "tcp", "127.0.0.1:8080", "a")
}

// SEC-116 (CVE-2024-32473): no IPv6 unless asked for.
func TestV4OnlyPodHasNoIPv6(t *testing.T) {
	host := newNS(t)
	b := newBridge(t, host, Config{Subnets: DefaultSubnets()[:1]})
	p, q := addPod(t, b, "a"), addPod(t, b, "b")
	serve(t, q.NetNS, "tcp", ":80", "b")
	wantAnswer(t, p.NetNS, "tcp", at(q.ip4(), 80), "b")
	if len(p.result.IPs) != 1 || !p.ip4().IsValid() {
		t.Errorf("addresses: got %v, want one of IPv4", p.result.IPs)
	}
	if got := run(t, p.NetNS, "ip", "-6", "addr", "show", "dev", "eth0"); got != "" {
		t.Errorf("IPv6 addresses of eth0: got\n%s", got)
	}
	if got := run(t, p.NetNS, "ip", "-6", "route", "show", "default"); got != "" {
		t.Errorf("IPv6 default route: got %s", got)
	}
	if v := readSysctl(t, p.NetNS, "ipv6/conf/eth0/disable_ipv6"); v != "1" {
		t.Errorf("disable_ipv6 of eth0: got %s", v)
	}
}

// SEC-110 (CVE-2020-10749, CVE-2020-13401): a pod cannot become anybody's router.
func TestRouterAdvertisementsFromPods(t *testing.T) {
	for _, tt := range []struct {
		name string
		cfg  Config
	}{{"checked", Config{}}, {"unchecked", Config{NoAntiSpoof: true}}} {
		t.Run(tt.name, func(t *testing.T) {
			host := newNS(t)
			b := newBridge(t, host, tt.cfg)
			p, q := addPod(t, b, "a"), addPod(t, b, "b")
			for name, ns := range map[string]*os.File{"crisp0": host, p.result.HostLink: host, q.result.HostLink: host, "eth0": q.NetNS} {
				if v := readSysctl(t, ns, "ipv6/conf/"+name+"/accept_ra"); v != "0" {
					t.Errorf("accept_ra of %s: got %s, want 0", name, v)
				}
			}
			// Even if the host does not forward.
			run(t, host, "sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/all/forwarding")
			state := func() string {
				s := ""
				for _, ns := range []*os.File{host, q.NetNS} {
					s += run(t, ns, "ip", "-6", "route") + run(t, ns, "sh", "-c", "ip -6 addr | grep -v valid_lft") + run(t, ns, "ip", "-6", "route", "show", "table", "local")
				}
				return s
			}
			eventually(t, "the bridge has seen its ports come up", func() bool { // linkwatch takes up to a second
				s := state()
				return !strings.Contains(s, "linkdown") && strings.Contains(s, "fe80::/64 dev crisp0")
			})
			before := state()
			counted := received(t, q.NetNS, "Icmp6InRouterAdvertisements")
			sendRA(t, p)
			if tt.cfg.NoAntiSpoof {
				// It arrives; it has no effect.
				eventually(t, "the advertisement is received", func() bool {
					return received(t, q.NetNS, "Icmp6InRouterAdvertisements") > counted
				})
			} else {
				// What is sent behind it arrives; it did not.
				serve(t, q.NetNS, "udp", ":53", "b")
				wantAnswer(t, p.NetNS, "udp", at(q.ip6(), 53), "b")
				if n := received(t, q.NetNS, "Icmp6InRouterAdvertisements"); n != counted {
					t.Errorf("the sibling received %d advertisements", n-counted)
				}
			}
			if after := state(); after != before {
				t.Errorf("routes and addresses: got\n%s\nwant\n%s", after, before)
			}
		})
	}
}

// sendRA sends a router advertisement with a prefix and a lifetime to all nodes.
func sendRA(t *testing.T, p testPod) {
	t.Helper()
	check(t, netns.Do(p.NetNS, func() error {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, 255); err != nil {
			return err
		}
		link, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		ra := []byte{134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0}
		prefix := []byte{3, 4, 64, 0xc0, 0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10, 0, 0, 0, 0, 0x20, 1, 0x0d, 0xb8, 0xba, 0xd0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
		to := &unix.SockaddrInet6{ZoneId: uint32(link.Index), Addr: netip.MustParseAddr("ff02::1").As16()}
		from := &unix.SockaddrInet6{ZoneId: uint32(link.Index), Addr: linkLocal(podMAC(p.result.IPs[0])).As16()}
		if err := unix.Bind(fd, from); err != nil {
			return err
		}
		return unix.Sendto(fd, append(ra, prefix...), 0, to)
	}))
}

// received reads a counter of the namespace from /proc/net/snmp6.
func received(t testing.TB, ns *os.File, counter string) int {
	t.Helper()
	n := 0
	check(t, netns.Do(ns, func() error {
		text, err := os.ReadFile("/proc/thread-self/net/snmp6")
		for line := range strings.Lines(string(text)) {
			if f := strings.Fields(line); len(f) == 2 && f[0] == counter {
				_, err = fmt.Sscan(f[1], &n)
			}
		}
		return err
	}))
	return n
}

// A pod sends only from its own addresses.
func TestAntiSpoof(t *testing.T) {
	for _, tt := range []struct {
		name    string
		cfg     Config
		spoofed bool // whether a packet from another address arrives
	}{{"on", Config{}, false}, {"off", Config{NoAntiSpoof: true}, true}} {
		t.Run(tt.name, func(t *testing.T) {
			host := newNS(t)
			b := newBridge(t, host, tt.cfg)
			p, q := addPod(t, b, "a"), addPod(t, b, "b")
			serve(t, q.NetNS, "udp", ":53", "b")
			serve(t, host, "udp", ":53", "host")
			wantAnswer(t, p.NetNS, "udp", at(q.ip4(), 53), "b")
			wantAnswer(t, p.NetNS, "udp", at(q.ip6(), 53), "b")
			for _, a := range []string{"10.219.9.9/16", "fd53:a2c7:190e::9999/64"} {
				run(t, p.NetNS, "ip", "addr", "add", a, "dev", "eth0")
			}
			eventually(t, "the second address is usable", func() bool {
				return !strings.Contains(run(t, p.NetNS, "ip", "-6", "addr"), "tentative")
			})
			for from, to := range map[string][]netip.Addr{
				"10.219.9.9":           {q.ip4(), netip.MustParseAddr("10.219.0.1")},
				"fd53:a2c7:190e::9999": {q.ip6(), netip.MustParseAddr("fd53:a2c7:190e::1")},
			} {
				for _, dst := range to {
					var c net.Conn
					check(t, netns.Do(p.NetNS, func() (err error) {
						c, err = (&net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(from)}}).Dial("udp", at(dst, 53))
						return err
					}))
					timeout := 300 * time.Millisecond
					if tt.spoofed {
						timeout = patience
					}
					_, _, err := askOn(c, timeout)
					if (err == nil) != tt.spoofed {
						t.Errorf("from %s to %s: got %v, want an answer: %v", from, dst, err, tt.spoofed)
					}
					_ = c.Close()
				}
			}
			// Another one's MAC.
			run(t, p.NetNS, "ip", "link", "set", "eth0", "address", "0a:58:01:02:03:04")
			if tt.spoofed {
				wantAnswer(t, p.NetNS, "udp", at(q.ip4(), 53), "b")
			} else {
				wantNoAnswer(t, p.NetNS, "udp", at(q.ip4(), 53))
				wantNoAnswer(t, p.NetNS, "udp", at(q.ip6(), 53))
			}
		})
	}
}

// A pod cannot take over a neighbour's address: neither by ARP nor by neighbour
// discovery.
func TestNeighbourSpoofing(t *testing.T) {
	for _, tt := range []struct {
		name     string
		cfg      Config
		poisoned bool
	}{{"on", Config{}, false}, {"off", Config{NoAntiSpoof: true}, true}} {
		t.Run(tt.name, func(t *testing.T) {
			host := newNS(t)
			b := newBridge(t, host, tt.cfg)
			p, q := addPod(t, b, "attacker"), addPod(t, b, "victim")
			gw4, gw6 := netip.MustParseAddr("10.219.0.1"), netip.MustParseAddr("fd53:a2c7:190e::1")
			serve(t, host, "udp", ":53", "host")
			serve(t, q.NetNS, "udp", ":53", "victim")
			wantAnswer(t, q.NetNS, "udp", at(gw4, 53), "host")
			wantAnswer(t, q.NetNS, "udp", at(gw6, 53), "host")
			neighbours := func() string { return run(t, q.NetNS, "ip", "neigh") }
			evil := podMAC(p.result.IPs[0])
			spoof := func() {
				mac := podMAC(q.result.IPs[0])
				sendFrame(t, p.NetNS, arpReply(mac, evil, gw4, q.ip4()))
				sendFrame(t, p.NetNS, neighbourAdvert(mac, evil, p.ip6(), q.ip6(), gw6))
			}
			if tt.poisoned {
				eventually(t, "both entries are poisoned", func() bool {
					spoof()
					return strings.Count(neighbours(), evil.String()) == 2
				})
				return
			}
			if !strings.Contains(neighbours(), bridgeMAC("crisp0").String()) {
				t.Fatalf("the victim does not know its gateway: %s", neighbours())
			}
			spoof()
			wantAnswer(t, p.NetNS, "udp", at(q.ip4(), 53), "victim") // behind the frames
			wantAnswer(t, q.NetNS, "udp", at(gw6, 53), "host")
			for line := range strings.Lines(neighbours()) {
				if strings.Contains(line, evil.String()) && (strings.HasPrefix(line, gw4.String()+" ") || strings.HasPrefix(line, gw6.String()+" ")) {
					t.Errorf("poisoned: %s", line)
				}
			}
		})
	}
}

func arpReply(to, from net.HardwareAddr, claimed, toIP netip.Addr) []byte {
	f := append(append(append([]byte{}, to...), from...), 0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 2)
	f = append(append(f, from...), claimed.AsSlice()...)
	return append(append(f, to...), toIP.AsSlice()...)
}

func neighbourAdvert(to, from net.HardwareAddr, fromIP, toIP, claimed netip.Addr) []byte {
	icmp := append([]byte{136, 0, 0, 0, 0x20, 0, 0, 0}, claimed.AsSlice()...) // override
	icmp = append(append(icmp, 2, 1), from...)                                // target link-layer address
	sum := uint32(unix.IPPROTO_ICMPV6 + len(icmp))
	for _, part := range [][]byte{fromIP.AsSlice(), toIP.AsSlice(), icmp} {
		for i := 0; i < len(part); i += 2 {
			sum += uint32(part[i])<<8 | uint32(part[i+1])
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	icmp[2], icmp[3] = byte(^sum>>8), byte(^sum)
	f := append(append(append([]byte{}, to...), from...), 0x86, 0xdd, 0x60, 0, 0, 0, 0, byte(len(icmp)), unix.IPPROTO_ICMPV6, 255)
	return append(append(append(f, fromIP.AsSlice()...), toIP.AsSlice()...), icmp...)
}

// sendFrame sends an Ethernet frame from eth0 in ns.
func sendFrame(t *testing.T, ns *os.File, frame []byte) {
	t.Helper()
	check(t, netns.Do(ns, func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		link, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: link.Index})
	}))
}

package bridge

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/network/netns"
)

// The root tests work in network namespaces of their own: one that is "the host" to
// the Bridge, one for each pod, one for a neighbour on "the LAN". Nothing of the real
// host is touched, and everything goes with the namespaces.

const patience = 5 * time.Second // for what should take milliseconds

func requireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces, links and nftables rules in them")
	}
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newNS makes a namespace with lo up.
func newNS(t testing.TB) *os.File {
	t.Helper()
	requireRoot(t)
	ns := must(netns.New())(t)
	t.Cleanup(func() { _ = ns.Close() })
	run(t, ns, "ip", "link", "set", "lo", "up")
	return ns
}

// run executes a command inside ns and returns its output.
func run(t testing.TB, ns *os.File, name string, args ...string) string {
	t.Helper()
	out, err := tryRun(ns, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

func tryRun(ns *os.File, name string, args ...string) (string, error) {
	var out []byte
	err := netns.Do(ns, func() (err error) {
		out, err = exec.Command(name, args...).CombinedOutput()
		return err
	})
	return string(out), err
}

// newBridge makes a Bridge whose host is ns.
func newBridge(t testing.TB, ns *os.File, cfg Config) *Bridge {
	t.Helper()
	cfg.NetNS = ns
	b := must(New(cfg))(t)
	t.Cleanup(func() { check(t, b.Close()) })
	return b
}

type testPod struct {
	network.Pod
	result network.Result
}

func (p testPod) ip4() netip.Addr { return first(p.result.IPs, netip.Addr.Is4) }
func (p testPod) ip6() netip.Addr { return first(p.result.IPs, netip.Addr.Is6) }

func first(ips []netip.Addr, is func(netip.Addr) bool) netip.Addr {
	for _, ip := range ips {
		if is(ip) {
			return ip
		}
	}
	return netip.Addr{}
}

func podID(name string) string {
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:])
}

// planned is a pod that has a namespace and a plan, but no network yet.
func planned(t testing.TB, b *Bridge, name string, ports ...network.PortMapping) testPod {
	t.Helper()
	p := testPod{Pod: network.Pod{ID: podID(name), Namespace: "default", Name: name, Ports: ports}}
	p.NetNS = must(netns.New())(t)
	t.Cleanup(func() { _ = p.NetNS.Close() })
	p.result = must(b.Plan(context.Background(), p.Pod))(t)
	return p
}

func addPod(t testing.TB, b *Bridge, name string, ports ...network.PortMapping) testPod {
	t.Helper()
	p := planned(t, b, name, ports...)
	p.result = must(b.Setup(context.Background(), p.Pod, p.result))(t)
	return p
}

func removePod(t testing.TB, b *Bridge, p testPod) {
	t.Helper()
	check(t, b.Teardown(context.Background(), p.Pod, p.result))
}

// serve answers every connection or datagram in ns at address with "name peer", until
// the test ends.
func serve(t testing.TB, ns *os.File, proto, address, name string) {
	t.Helper()
	var closer io.Closer
	done := make(chan struct{}) // closed by the goroutine
	check(t, netns.Do(ns, func() error {
		if strings.HasPrefix(proto, "udp") {
			c, err := net.ListenPacket(proto, address)
			if err != nil {
				return err
			}
			closer = c
			go func() {
				defer close(done)
				var buf [64]byte
				for {
					_, from, err := c.ReadFrom(buf[:])
					if err != nil {
						return
					}
					_, _ = c.WriteTo([]byte(name+" "+from.String()), from) // The client reports what it misses.
				}
			}()
			return nil
		}
		l, err := net.Listen(proto, address)
		if err != nil {
			return err
		}
		closer = l
		go func() {
			defer close(done)
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(c, name+" "+c.RemoteAddr().String()) // The client reports what it misses.
				_ = c.Close()
			}
		}()
		return nil
	}))
	t.Cleanup(func() {
		_ = closer.Close()
		<-done
	})
}

// ask connects from ns and returns the name that answers, and the address that it
// was asked from.
func ask(ns *os.File, proto, address string, timeout time.Duration) (name string, from netip.Addr, err error) {
	var c net.Conn
	err = netns.Do(ns, func() (err error) {
		c, err = (&net.Dialer{Timeout: timeout}).Dial(proto, address)
		return err
	})
	if err != nil {
		return "", netip.Addr{}, err
	}
	defer func() { _ = c.Close() }()
	return askOn(c, timeout)
}

func askOn(c net.Conn, timeout time.Duration) (name string, from netip.Addr, err error) {
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return "", netip.Addr{}, err
	}
	if strings.HasPrefix(c.LocalAddr().Network(), "udp") {
		if _, err := c.Write([]byte("?")); err != nil {
			return "", netip.Addr{}, err
		}
	}
	var buf [256]byte
	n, err := c.Read(buf[:])
	if err != nil {
		return "", netip.Addr{}, err
	}
	name, peer, _ := strings.Cut(string(buf[:n]), " ")
	ap, err := netip.ParseAddrPort(peer)
	return name, ap.Addr().Unmap(), err
}

// wantAnswer fails the test unless want answers.
func wantAnswer(t testing.TB, ns *os.File, proto, address, want string) (from netip.Addr) {
	t.Helper()
	name, from, err := ask(ns, proto, address, patience)
	if err != nil {
		t.Errorf("%s %s: %v", proto, address, err)
	} else if name != want {
		t.Errorf("%s %s: got an answer of %q, want of %q", proto, address, name, want)
	}
	return from
}

// wantNoAnswer fails the test if anybody answers.
func wantNoAnswer(t testing.TB, ns *os.File, proto, address string) {
	t.Helper()
	if name, _, err := ask(ns, proto, address, 300*time.Millisecond); err == nil {
		t.Errorf("%s %s: got an answer of %q, want none", proto, address, name)
	}
}

func at(ip netip.Addr, port uint16) string { return netip.AddrPortFrom(ip, port).String() }

// lan connects a neighbour to the host: 192.0.2.1 and 2001:db8::1 are the host's,
// .2 and ::2 the neighbour's, who takes the host for its router.
func lan(t testing.TB, host *os.File) *os.File {
	t.Helper()
	ns := newNS(t)
	check(t, netns.Do(host, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "lan0"
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.Fd())})
	}))
	for _, line := range []string{"ip link set lan0 up", "ip addr add 192.0.2.1/24 dev lan0", "ip addr add 2001:db8::1/64 dev lan0 nodad"} {
		run(t, host, "sh", "-c", line)
	}
	for _, line := range []string{"ip link set eth0 up", "ip addr add 192.0.2.2/24 dev eth0", "ip addr add 2001:db8::2/64 dev eth0 nodad",
		"ip route add default via 192.0.2.1", "ip -6 route add default via 2001:db8::1"} {
		run(t, ns, "sh", "-c", line)
	}
	return ns
}

// readSysctl reads a setting in ns.
func readSysctl(t testing.TB, ns *os.File, name string) string {
	t.Helper()
	var v []byte
	check(t, netns.Do(ns, func() (err error) {
		v, err = os.ReadFile("/proc/sys/net/" + name)
		return err
	}))
	return strings.TrimSpace(string(v))
}

// linkNames lists the links in ns.
func linkNames(t testing.TB, ns *os.File) []string {
	t.Helper()
	var names []string
	check(t, netns.Do(ns, func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			names = append(names, l.Attrs().Name)
		}
		return err
	}))
	return names
}

// eventually waits for what a background goroutine does.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func isErrno(err error, errno unix.Errno) bool { return errors.Is(err, errno) }

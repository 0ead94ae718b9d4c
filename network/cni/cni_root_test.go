package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/network/netns"
)

// realPlugins are Debian's (containernetworking-plugins).
const realPlugins = "/usr/lib/cni"

// node is a network namespace that is the host to real plugins, with their state in a directory of its own. All of it
// goes with the namespace and the directory.
type node struct {
	t    *testing.T
	host *os.File
	data string // host-local's
	cni  *CNI
	conf string
	id   int
}

func newNode(t *testing.T, more ...string) *node {
	if os.Geteuid() != 0 {
		t.Skip("needs root: CNI plugins make links, addresses and firewall rules, in network namespaces of the test's own")
	}
	for _, p := range []string{"bridge", "host-local", "portmap", "bandwidth", "tuning"} {
		if _, err := os.Stat(filepath.Join(realPlugins, p)); err != nil {
			t.Skipf("needs Debian's containernetworking-plugins (hack/deps.sh): %v", err)
		}
	}
	host, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = host.Close() })
	dir := t.TempDir()
	n := &node{t: t, host: host, data: dir + "/ipam", conf: dir + "/net.d"}
	n.in(host, "ip", "link", "set", "lo", "up")
	if err := os.Mkdir(n.conf, 0o700); err != nil {
		t.Fatal(err)
	}
	// Without ipMasq: DEL of a pod whose namespace is gone leaves its rules (bridge 1.1.1).
	plugins := append([]string{fmt.Sprintf(`{"type":"bridge","bridge":"cnitest0","isGateway":true,"hairpinMode":true,"ipam":{"type":"host-local","dataDir":%q,
		"ranges":[[{"subnet":"10.213.77.0/24"}],[{"subnet":"fd63:6e69:77::/64"}]],"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}}`, n.data),
		`{"type":"portmap","snat":true,"capabilities":{"portMappings":true}}`}, more...)
	list := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"crisp-test","plugins":[%s]}`, strings.Join(plugins, ","))
	if err := os.WriteFile(n.conf+"/10-test.conflist", []byte(list), 0o600); err != nil {
		t.Fatal(err)
	}
	n.open()
	return n
}

// open is a new crispd's.
func (n *node) open() {
	n.t.Helper()
	c, err := New(Config{ConfDir: n.conf, BinDirs: []string{realPlugins}, ScratchDir: n.t.TempDir() + "/scratch", NetNS: n.host})
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = c.Close() })
	n.cni = c
}

func (n *node) try(ns *os.File, name string, args ...string) (string, error) {
	var out []byte
	err := netns.Do(ns, func() (err error) {
		out, err = exec.Command(name, args...).CombinedOutput()
		return err
	})
	return string(out), err
}

func (n *node) in(ns *os.File, name string, args ...string) string {
	n.t.Helper()
	out, err := n.try(ns, name, args...)
	if err != nil {
		n.t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return out
}

// pod is one, with a namespace.
func (n *node) pod() network.Pod {
	n.t.Helper()
	ns, err := netns.New()
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = ns.Close() })
	n.in(ns, "ip", "link", "set", "lo", "up")
	n.id++
	return network.Pod{
		ID: fmt.Sprintf("%064x", 0xc1500+n.id), Namespace: "default", Name: fmt.Sprintf("p%d", n.id), UID: "u",
		NetNS: ns, NetNSPath: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd()),
		Ports: []network.PortMapping{{Protocol: network.TCP, HostPort: uint16(18080 + n.id), ContainerPort: 8080}},
	}
}

func (n *node) up(p network.Pod) network.Result {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	planned, err := n.cni.Plan(ctx, p)
	if err != nil {
		n.t.Fatal(err)
	}
	r, err := n.cni.Setup(ctx, p, recorded(n.t, planned))
	if err != nil {
		n.t.Fatal(err)
	}
	return recorded(n.t, r)
}

// serve answers "pong" on the pod's port 8080, both families.
func (n *node) serve(p network.Pod) {
	n.t.Helper()
	var l net.Listener
	if err := netns.Do(p.NetNS, func() (err error) { l, err = net.Listen("tcp", ":8080"); return err }); err != nil {
		n.t.Fatal(err)
	}
	ended := make(chan struct{})
	n.t.Cleanup(func() { _ = l.Close(); <-ended })
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "pong")
			_ = c.Close()
		}
	}()
}

func (n *node) ask(from *os.File, to string) {
	n.t.Helper()
	var got []byte
	err := netns.Do(from, func() error {
		c, err := net.DialTimeout("tcp", to, 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		got, err = io.ReadAll(io.LimitReader(c, 16))
		return err
	})
	if err != nil || string(got) != "pong" {
		n.t.Errorf("%s: got %q, %v", to, got, err)
	}
}

// left is what plugins keep of pods: reserved addresses, links, port rules.
func (n *node) left() (l []string) {
	n.t.Helper()
	files, err := os.ReadDir(n.data + "/crisp-test")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		n.t.Fatal(err)
	}
	for _, f := range files {
		if ip, err := netip.ParseAddr(f.Name()); err == nil {
			l = append(l, ip.String())
		}
	}
	var links []struct{ Ifname string }
	if err := json.Unmarshal([]byte(n.in(n.host, "ip", "-j", "link", "show", "type", "veth")), &links); err != nil {
		n.t.Fatal(err)
	}
	for _, k := range links {
		if k.Ifname != "" {
			l = append(l, k.Ifname)
		}
	}
	for _, tool := range []string{"iptables", "ip6tables"} {
		for line := range strings.Lines(n.in(n.host, tool, "-w", "-t", "nat", "-S")) {
			if strings.HasPrefix(line, "-A CNI-DN-") || strings.Contains(line, "id: ") {
				l = append(l, strings.TrimSpace(line))
			}
		}
	}
	return l
}

func TestRealPlugins(t *testing.T) {
	n := newNode(t)
	until(t, "it is ready", func() bool { return n.cni.Status().Ready })
	a, b := n.pod(), n.pod()
	b.Ports = nil
	c := n.pod()
	ra, rb, rc := n.up(a), n.up(b), n.up(c)
	for _, r := range []network.Result{ra, rb, rc} {
		if len(r.IPs) != 2 || !netip.MustParsePrefix("10.213.77.0/24").Contains(r.IPs[0]) || !netip.MustParsePrefix("fd63:6e69:77::/64").Contains(r.IPs[1]) {
			t.Fatalf("got addresses %v", r.IPs)
		}
	}
	shown := n.in(a.NetNS, "ip", "addr", "show", "dev", "eth0")
	for _, ip := range ra.IPs {
		if !strings.Contains(shown, ip.String()+"/") {
			t.Errorf("%s is not on eth0:\n%s", ip, shown)
		}
	}
	n.serve(a)
	until(t, "the bridge's address is no duplicate", func() bool { return n.in(n.host, "ip", "-6", "addr", "show", "tentative") == "" })
	for _, ip := range ra.IPs {
		n.ask(n.host, net.JoinHostPort(ip.String(), "8080"))
		n.ask(b.NetNS, net.JoinHostPort(ip.String(), "8080"))
	}
	n.ask(n.host, fmt.Sprintf("10.213.77.1:%d", a.Ports[0].HostPort))
	n.ask(b.NetNS, fmt.Sprintf("10.213.77.1:%d", a.Ports[0].HostPort))

	// CHECK: it is well; then it is not. (Of a pod without host ports: portmap 1.1.1 looks for the rules of IPv4 in ip6tables.)
	if err := n.cni.check(t.Context(), n.cni.holds(b.ID), b, rb); err != nil {
		t.Errorf("CHECK of a pod that is well: %v", err)
	}
	n.in(b.NetNS, "ip", "addr", "del", rb.IPs[0].String()+"/24", "dev", "eth0")
	var failed *PluginError
	if err := n.cni.check(t.Context(), n.cni.holds(b.ID), b, rb); !errors.As(err, &failed) || failed.Plugin != "bridge" || failed.Verb != "CHECK" {
		t.Errorf("CHECK of a pod without its address: got %v", err)
	}

	// Two go in an orderly way, one of them twice.
	for _, gone := range []struct {
		network.Pod
		network.Result
	}{{a, ra}, {b, rb}, {a, ra}} {
		if err := n.cni.Teardown(t.Context(), gone.Pod, gone.Result); err != nil {
			t.Fatal(err)
		}
		if out, err := n.try(gone.NetNS, "ip", "link", "show", "dev", "eth0"); err == nil {
			t.Errorf("eth0 is still there: %s", out)
		}
	}
	left := n.left()
	if len(left) == 0 {
		t.Error("the third pod is gone, too")
	}
	for _, s := range left {
		for _, gone := range append(append([]netip.Addr{}, ra.IPs...), rb.IPs...) {
			if s == gone.String() || strings.Contains(s, gone.String()+":") {
				t.Errorf("left of the first pods: %s", s)
			}
		}
	}
	// Of the third the namespace goes first, and crispd and the configuration with it.
	_ = n.cni.Close()
	if err := os.RemoveAll(n.conf); err != nil {
		t.Fatal(err)
	}
	_ = c.NetNS.Close()
	c.NetNS = nil
	n.open()
	for range 2 {
		if err := n.cni.Teardown(t.Context(), c, rc); err != nil {
			t.Fatal(err)
		}
	}
	until(t, "nothing is left", func() bool { return len(n.left()) == 0 }) // the kernel takes its time with a namespace
}

// A chain that fails at its end has used an address by then: DEL gives it back.
func TestRealPluginsFailedAdd(t *testing.T) {
	n := newNode(t, `{"type":"tuning","sysctl":{"net.ipv4.conf.eth0.nonsense":"1"}}`)
	p := n.pod()
	planned, err := n.cni.Plan(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	planned = recorded(t, planned)
	_, err = n.cni.Setup(t.Context(), p, planned)
	var failed *PluginError
	if !errors.As(err, &failed) || failed.Plugin != "tuning" || failed.Verb != "ADD" {
		t.Fatalf("got %v", err)
	}
	if len(n.left()) == 0 {
		t.Fatal("there is nothing to undo: the test proves nothing")
	}
	if err := n.cni.Teardown(t.Context(), p, planned); err != nil {
		t.Fatal(err)
	}
	if l := n.left(); len(l) > 0 {
		t.Errorf("left: %q", l)
	}
}

func TestRealPluginsBandwidth(t *testing.T) {
	n := newNode(t, `{"type":"bandwidth","capabilities":{"bandwidth":true}}`)
	p := n.pod()
	p.Annotations = map[string]string{"kubernetes.io/ingress-bandwidth": "8M"}
	r := n.up(p)
	if shown := n.in(n.host, "tc", "qdisc", "show"); !strings.Contains(shown, "tbf") || !strings.Contains(shown, "rate 8Mbit") {
		t.Errorf("no limit of 8 Mbit/s:\n%s", shown)
	}
	if err := n.cni.Teardown(t.Context(), p, r); err != nil {
		t.Fatal(err)
	}
	if l := n.left(); len(l) > 0 {
		t.Errorf("left: %q", l)
	}
}

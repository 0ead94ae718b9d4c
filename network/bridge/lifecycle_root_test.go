package bridge

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/network/netns"
)

// podLinks are the pods' links in ns.
func podLinks(t testing.TB, ns *os.File) []string {
	t.Helper()
	var names []string
	for _, n := range linkNames(t, ns) {
		if linkPattern.MatchString(n) {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	return names
}

// ruleset is everything nft shows in ns, without counters.
func ruleset(t testing.TB, ns *os.File) string {
	t.Helper()
	return withoutCounters(run(t, ns, "nft", "list", "ruleset"))
}

var counterPattern = regexp.MustCompile(`packets \d+ bytes \d+`)

func withoutCounters(s string) string { return counterPattern.ReplaceAllString(s, "") }

// ourRules is what nft shows of our tables in ns, without counters.
func ourRules(t testing.TB, ns *os.File) string {
	t.Helper()
	return withoutCounters(run(t, ns, "nft", "list", "table", "inet", "crisp") + run(t, ns, "nft", "list", "table", "bridge", "crisp"))
}

func TestSetupAndTeardownLeaveNothing(t *testing.T) {
	host := newNS(t)
	b := newBridge(t, host, Config{})
	first := addPod(t, b, "first")
	rules, links := ruleset(t, host), podLinks(t, host)
	p := addPod(t, b, "a",
		network.PortMapping{Protocol: network.TCP, HostPort: 80, ContainerPort: 80},
		network.PortMapping{Protocol: network.UDP, HostPort: 53, ContainerPort: 53, HostIP: netip.MustParseAddr("127.0.0.1")})
	for range 2 { // Plan and Teardown are idempotent.
		if again := must(b.Plan(t.Context(), p.Pod))(t); fmt.Sprint(again) != fmt.Sprint(p.result) {
			t.Errorf("a second plan: got %v, want %v", again, p.result)
		}
	}
	link := must(netlinkIn(host, func() (netlink.Link, error) { return netlink.LinkByName(p.result.HostLink) }))(t)
	if a := link.Attrs(); a.Alias != "crisp "+p.ID || a.MTU != 1500 {
		t.Errorf("link on the host: alias %q, MTU %d", a.Alias, a.MTU)
	}
	for range 2 {
		removePod(t, b, p)
		if got := podLinks(t, host); !slices.Equal(got, links) {
			t.Errorf("links: got %v, want %v", got, links)
		}
		if got := ruleset(t, host); got != rules {
			t.Errorf("rules: got\n%s\nwant\n%s", got, rules)
		}
	}
	if q := addPod(t, b, "b"); slices.Equal(q.result.IPs, p.result.IPs) {
		t.Errorf("the addresses %v were given again at once", p.result.IPs)
	}
	removePod(t, b, first)
}

func netlinkIn[T any](ns *os.File, f func() (T, error)) (v T, err error) {
	err = netns.Do(ns, func() (err error) {
		v, err = f()
		return err
	})
	return v, err
}

// C-41: the namespace went first, or the link did, or the daemon knows nothing any more.
func TestTeardownOfWhatIsGone(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(t *testing.T, host *os.File, p testPod)
	}{
		{"nothing", func(*testing.T, *os.File, testPod) {}},
		{"link deleted", func(t *testing.T, host *os.File, p testPod) { run(t, host, "ip", "link", "del", p.result.HostLink) }},
		{"bridge deleted", func(t *testing.T, host *os.File, p testPod) { run(t, host, "ip", "link", "del", "crisp0") }},
		{"rules flushed", func(t *testing.T, host *os.File, p testPod) { run(t, host, "nft", "flush", "ruleset") }},
		{"namespace gone", func(t *testing.T, host *os.File, p testPod) {
			check(t, p.NetNS.Close())
			eventually(t, "the link goes with the namespace", func() bool { return len(podLinks(t, host)) == 0 })
		}},
	} {
		for _, restarted := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, restarted %v", tt.name, restarted), func(t *testing.T) {
				host := newNS(t)
				b := must(New(Config{NetNS: host}))(t)
				p := addPod(t, b, "a", network.PortMapping{Protocol: network.UDP, HostPort: 53, ContainerPort: 53})
				if restarted {
					check(t, b.Close())
					b = must(New(Config{NetNS: host}))(t)
				}
				defer func() { check(t, b.Close()) }()
				tt.do(t, host, p)
				p.NetNS = nil
				removePod(t, b, p)
				removePod(t, b, p)
				if got := podLinks(t, host); len(got) != 0 {
					t.Errorf("links: got %v", got)
				}
				check(t, b.Restore(t.Context(), nil))
				if got := run(t, host, "nft", "list", "ruleset"); strings.Contains(got, "elements") {
					t.Errorf("rules: got\n%s", got)
				}
			})
		}
	}
}

// "On error nothing of it is left but the reservation."
func TestSetupThatFails(t *testing.T) {
	host := newNS(t)
	b := newBridge(t, host, Config{})
	addPod(t, b, "first")
	rules, links := ruleset(t, host), podLinks(t, host)

	p := planned(t, b, "a", network.PortMapping{Protocol: network.TCP, HostPort: 80, ContainerPort: 80})
	run(t, p.NetNS, "ip", "link", "add", "eth0", "type", "bridge")
	_, err := b.Setup(t.Context(), p.Pod, p.result)
	if !isErrno(err, unix.EEXIST) || !strings.Contains(err.Error(), "create link "+p.result.HostLink) {
		t.Errorf("pod with an eth0: got %v", err)
	}
	run(t, p.NetNS, "ip", "link", "del", "eth0")
	run(t, p.NetNS, "sh", "-c", "ip link set lo up; ip link add x type bridge; ip link set x up; ip route add default dev x")
	_, err = b.Setup(t.Context(), p.Pod, p.result)
	if !isErrno(err, unix.EEXIST) || !strings.Contains(err.Error(), "add default route by 10.219.0.1 in the pod") {
		t.Errorf("pod with a default route: got %v", err)
	}
	if got := podLinks(t, host); !slices.Equal(got, links) {
		t.Errorf("links: got %v, want %v", got, links)
	}
	if got := ruleset(t, host); got != rules {
		t.Errorf("rules: got\n%s\nwant\n%s", got, rules)
	}
	run(t, p.NetNS, "ip", "link", "del", "x")
	must(b.Setup(t.Context(), p.Pod, p.result))(t)

	for name, in := range map[string]network.Pod{
		"no namespace": {ID: p.ID},
		"no plan":      {ID: podID("other"), NetNS: p.NetNS},
	} {
		if _, err := b.Setup(t.Context(), in, p.result); !errors.Is(err, network.ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", name, err)
		}
	}
	wrong := p.result
	wrong.IPs = []netip.Addr{netip.MustParseAddr("10.219.7.7")}
	if _, err := b.Setup(t.Context(), p.Pod, wrong); !errors.Is(err, network.ErrInvalid) {
		t.Errorf("other addresses: got %v, want ErrInvalid", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.Setup(ctx, p.Pod, p.result); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: got %v", err)
	}
}

// C-42: something has the name of the pod's link.
func TestLinkNameTaken(t *testing.T) {
	for _, tt := range []struct {
		name   string
		alias  string
		master bool
		ours   bool
	}{
		{"leftover", "crisp x", true, true},
		{"leftover without a mark", "", true, true},
		{"leftover of a deleted bridge", "crisp x", false, true},
		{"foreign", "", false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			host := newNS(t)
			b := newBridge(t, host, Config{})
			addPod(t, b, "first")
			p := planned(t, b, "a")
			run(t, host, "ip", "link", "add", p.result.HostLink, "type", "veth", "peer", "name", "other")
			if tt.alias != "" {
				run(t, host, "ip", "link", "set", p.result.HostLink, "alias", tt.alias)
			}
			if tt.master {
				run(t, host, "ip", "link", "set", p.result.HostLink, "master", "crisp0")
			}
			r := must(b.Setup(t.Context(), p.Pod, p.result))(t)
			if got := slices.Contains(linkNames(t, host), "other"); got == tt.ours {
				t.Errorf("the link that was there is still there: %v, want %v", got, !tt.ours)
			}
			if same := r.HostLink == p.result.HostLink; same != tt.ours {
				t.Errorf("link %s, planned %s", r.HostLink, p.result.HostLink)
			}
			serve(t, p.NetNS, "tcp", ":80", "a")
			wantAnswer(t, host, "tcp", at(p.ip4(), 80), "a")
			check(t, b.Teardown(t.Context(), p.Pod, r))
		})
	}
}

func TestExhaustionAndPorts(t *testing.T) {
	host := newNS(t)
	b := newBridge(t, host, Config{Subnets: []netip.Prefix{netipPrefix("10.1.2.0/29"), netipPrefix("fd00::/64")}})
	web := network.PortMapping{Protocol: network.TCP, HostPort: 80, ContainerPort: 80}
	a := planned(t, b, "a", web)
	if _, err := b.Plan(t.Context(), network.Pod{ID: podID("b"), Ports: []network.PortMapping{web}}); !errors.Is(err, network.ErrPortInUse) || !strings.Contains(err.Error(), a.ID) {
		t.Errorf("got %v, want ErrPortInUse that names the other pod", err)
	}
	for i := range 4 {
		planned(t, b, fmt.Sprint(i))
	}
	_, err := b.Plan(t.Context(), network.Pod{ID: podID("x")})
	if !errors.Is(err, network.ErrExhausted) || !strings.Contains(err.Error(), "pod range 10.1.2.0/29: 5 of 5 addresses in use") {
		t.Errorf("got %v, want ErrExhausted with the numbers", err)
	}
	removePod(t, b, a)
	planned(t, b, "x", web)
	if _, err := b.Plan(t.Context(), network.Pod{ID: podID("y"), Annotations: map[string]string{"kubernetes.io/egress-bandwidth": "fast"}}); !errors.Is(err, network.ErrInvalid) {
		t.Errorf("bandwidth: got %v, want ErrInvalid", err)
	}
	if got := len(b.pools[1].used); got != 5 {
		t.Errorf("IPv6 addresses in use: got %d, want 5: a failed plan keeps none", got)
	}
}

// SEC-115, C-45: what others break is repaired, at once where the kernel tells.
func TestRepair(t *testing.T) {
	for _, tt := range []struct {
		name   string
		break_ []string
		tick   bool // found by looking, not by being told
	}{
		{"flush ruleset", []string{"nft flush ruleset"}, false},
		{"delete table", []string{"nft delete table inet crisp"}, false},
		{"delete spoof check", []string{"nft delete table bridge crisp"}, false},
		{"flush table", []string{"nft flush table inet crisp"}, false},
		{"delete element", []string{"nft delete element inet crisp ports4 { tcp . 8080 }"}, false},
		{"rule in the way", []string{"nft insert rule inet crisp prerouting tcp dport 8080 accept"}, false},
		{"no forwarding", []string{"echo 0 > /proc/sys/net/ipv4/ip_forward", "echo 0 > /proc/sys/net/ipv6/conf/all/forwarding"}, true},
		{"bridge down", []string{"ip link set crisp0 down"}, true},
		{"bridge deleted", []string{"ip link del crisp0"}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			host := newNS(t)
			b := newBridge(t, host, Config{})
			far := lan(t, host)
			p := addPod(t, b, "a", network.PortMapping{Protocol: network.TCP, HostPort: 8080, ContainerPort: 80})
			serve(t, p.NetNS, "tcp", ":80", "a")
			run(t, host, "nft", "add table inet other; add chain inet other x; add rule inet other x counter")
			rules := ourRules(t, host)
			wantAnswer(t, far, "tcp", "192.0.2.1:8080", "a")
			wantAnswer(t, far, "tcp", "[2001:db8::1]:8080", "a")
			for _, line := range tt.break_ {
				run(t, host, "sh", "-c", line)
			}
			foreign := strings.Contains(tt.break_[0], "flush ruleset")
			start := time.Now()
			if tt.tick {
				b.check() // what the ticker does every 5 s
			}
			eventually(t, "repaired", func() bool { return b.Rebuilt() > 0 })
			t.Logf("repaired %v later", time.Since(start))
			wantAnswer(t, far, "tcp", "192.0.2.1:8080", "a")
			wantAnswer(t, far, "tcp", "[2001:db8::1]:8080", "a")
			if got := ourRules(t, host); got != rules {
				t.Errorf("rules: got\n%s\nwant\n%s", got, rules)
			}
			if got := strings.Contains(run(t, host, "nft", "list", "tables"), "inet other"); got == foreign {
				t.Errorf("foreign table there: %v", got)
			}
			if c := b.Status(); !c.Ready {
				t.Errorf("status: %+v", c)
			}
			q := addPod(t, b, "b")
			serve(t, q.NetNS, "tcp", ":80", "b")
			wantAnswer(t, p.NetNS, "tcp", at(q.ip6(), 80), "b")
			b.check()
			if n := b.Rebuilt(); n != 1 {
				t.Errorf("repaired %d times, want once", n)
			}
		})
	}
}

// The daemon dies; the next one finds everything, and what belongs to nobody.
func TestRestore(t *testing.T) {
	host := newNS(t)
	other := newBridge(t, host, Config{Bridge: "other0", Table: "other", Subnets: []netip.Prefix{netipPrefix("10.7.0.0/24")}})
	neighbour := addPod(t, other, "neighbour")
	b := must(New(Config{NetNS: host}))(t)
	check(t, b.UpdatePodCIDR("10.1.2.0/24,fd00:1::/64"))
	p := addPod(t, b, "a", network.PortMapping{Protocol: network.TCP, HostPort: 8080, ContainerPort: 80})
	q := addPod(t, b, "b")
	leftover := addPod(t, b, "leftover", network.PortMapping{Protocol: network.TCP, HostPort: 8081, ContainerPort: 80})
	serve(t, p.NetNS, "tcp", ":80", "a")
	// Half made: the link is not marked yet.
	run(t, host, "ip", "link", "add", linkName("crisp0", podID("half"), 0), "master", "crisp0", "type", "veth", "peer", "name", "half")
	run(t, host, "ip", "link", "add", "foreign", "type", "veth", "peer", "name", "foreign2")
	check(t, b.Close())
	run(t, host, "nft", "flush", "table", "inet", "crisp")

	b = newBridge(t, host, Config{})
	check(t, b.Restore(t.Context(), map[string]network.Restored{
		p.ID:           {Pod: p.Pod, Result: p.result},
		q.ID:           {Pod: q.Pod, Result: q.result},
		podID("gone"):  {Result: network.Result{Provider: Name, IPs: []netip.Addr{netip.MustParseAddr("10.1.2.77")}, HostLink: linkName("crisp0", podID("gone"), 0)}},
		podID("cni"):   {Result: network.Result{Provider: "cni", IPs: []netip.Addr{netip.MustParseAddr("10.1.2.78")}}},
		podID("mad"):   {Result: network.Result{Provider: Name, IPs: []netip.Addr{{}}, HostLink: "eth0"}},
		podID("empty"): {Result: network.Result{Provider: Name}},
		podID("twice"): {Result: network.Result{Provider: Name, IPs: p.result.IPs, HostLink: linkName("crisp0", podID("twice"), 0)}},
	}))
	want := []string{p.result.HostLink, q.result.HostLink, neighbour.result.HostLink}
	slices.Sort(want)
	if got := podLinks(t, host); !slices.Equal(got, want) {
		t.Errorf("links: got %v, want %v", got, want)
	}
	if !slices.Contains(linkNames(t, host), "foreign") {
		t.Error("a foreign link was collected")
	}
	wantAnswer(t, host, "tcp", "127.0.0.1:8080", "a")
	if got := ruleset(t, host); strings.Contains(got, leftover.ip4().String()) {
		t.Errorf("rules of a pod that is gone: %s", got)
	}
	// The range of the kubelet, and no address twice.
	r := addPod(t, b, "new")
	for _, ip := range r.result.IPs {
		if slices.Contains(p.result.IPs, ip) || slices.Contains(q.result.IPs, ip) || ip.String() == "10.1.2.77" ||
			!(netipPrefix("10.1.2.0/24").Contains(ip) || netipPrefix("fd00:1::/64").Contains(ip)) {
			t.Errorf("new pod got %s", ip)
		}
	}
	if _, err := b.Plan(t.Context(), network.Pod{ID: podID("p"), Ports: p.Ports}); !errors.Is(err, network.ErrPortInUse) {
		t.Errorf("restored host port: got %v, want ErrPortInUse", err)
	}
	removePod(t, b, p)
	wantNoAnswer(t, host, "tcp", "127.0.0.1:8080")
	serve(t, neighbour.NetNS, "tcp", ":80", "neighbour")
	wantAnswer(t, host, "tcp", at(neighbour.ip4(), 80), "neighbour")
}

// An empty node gets no bridge before its first pod.
func TestRestoreOfNothing(t *testing.T) {
	host := newNS(t)
	b := newBridge(t, host, Config{})
	check(t, b.Restore(t.Context(), nil))
	if got := linkNames(t, host); !slices.Equal(got, []string{"lo"}) {
		t.Errorf("links: got %v", got)
	}
	if got := ruleset(t, host); got != "" {
		t.Errorf("rules: got %s", got)
	}
	if c := b.Status(); !c.Ready {
		t.Errorf("status: got %+v", c)
	}
}

// What cannot be repaired at the start is no reason to end: Status tells, and it is tried again.
func TestRestoreOnABrokenHost(t *testing.T) {
	host := newNS(t)
	b := must(New(Config{NetNS: host}))(t)
	p := addPod(t, b, "a")
	check(t, b.Close())
	run(t, host, "ip", "link", "del", "crisp0")
	b = newBridge(t, host, Config{})
	run(t, host, "ip", "link", "add", "crisp0", "type", "veth", "peer", "name", "foreign")
	if err := b.Restore(t.Context(), map[string]network.Restored{p.ID: {Pod: p.Pod, Result: p.result}}); err == nil {
		t.Error("got no error")
	}
	if s := b.Status(); s.Ready || !strings.Contains(s.Message, "crisp0") {
		t.Errorf("status: got %+v", s)
	}
	if r := must(b.Plan(t.Context(), network.Pod{ID: podID("b")}))(t); slices.Equal(r.IPs, p.result.IPs) {
		t.Errorf("the addresses %v were given again", r.IPs)
	}
	run(t, host, "ip", "link", "del", "crisp0")
	eventually(t, "the network is repaired", func() bool { b.check(); return b.Status().Ready })
}

// SEC-118: daemons that die at any moment never give an address twice.
func TestRestoreAgainAndAgain(t *testing.T) {
	host := newNS(t)
	subnets := []netip.Prefix{netipPrefix("10.1.2.0/27"), netipPrefix("fd00::/64")}
	records := map[string]network.Restored{}
	for i := range 12 {
		b := must(New(Config{NetNS: host, Subnets: subnets}))(t)
		check(t, b.Restore(t.Context(), records))
		p := addPod(t, b, fmt.Sprint("kept", i))
		planned(t, b, fmt.Sprint("planned", i)) // not recorded: it dies with the daemon
		addPod(t, b, fmt.Sprint("lost", i))     // not recorded: collected
		for _, r := range records {
			if slices.ContainsFunc(p.result.IPs, func(ip netip.Addr) bool { return slices.Contains(r.Result.IPs, ip) }) {
				t.Fatalf("%v was given to two pods", p.result.IPs)
			}
		}
		records[p.ID] = network.Restored{Pod: p.Pod, Result: p.result}
		check(t, b.Close())
	}
	b := newBridge(t, host, Config{Subnets: subnets})
	check(t, b.Restore(t.Context(), records))
	if got := podLinks(t, host); len(got) != len(records) {
		t.Errorf("links: got %d, want %d", len(got), len(records))
	}
	if got := len(b.pools[0].used); got != len(records) {
		t.Errorf("addresses in use: got %d, want %d", got, len(records))
	}
}

func TestUpdatePodCIDR(t *testing.T) {
	host := newNS(t)
	b := newBridge(t, host, Config{})
	check(t, b.Restore(t.Context(), nil))
	far := lan(t, host)
	serve(t, far, "tcp", ":80", "lan")
	old := addPod(t, b, "old", network.PortMapping{Protocol: network.TCP, HostPort: 8080, ContainerPort: 80})
	serve(t, old.NetNS, "tcp", ":80", "old")
	check(t, b.UpdatePodCIDR(""))
	for _, bad := range []string{"nonsense", "10.1.2.3/24", "192.0.2.0/25", "192.0.2.0/24", "192.0.0.0/16"} {
		if err := b.UpdatePodCIDR(bad); !errors.Is(err, network.ErrInvalid) || !strings.Contains(err.Error(), "pod_cidr") {
			t.Errorf("%s: got %v, want ErrInvalid that names pod_cidr", bad, err)
		}
	}
	for range 2 {
		check(t, b.UpdatePodCIDR("10.1.2.0/24"))
	}
	fresh := addPod(t, b, "new")
	serve(t, fresh.NetNS, "tcp", ":80", "new")
	if got := fmt.Sprint(fresh.result.IPs, fresh.result.Subnets); got != "[10.1.2.2] [10.1.2.0/24]" {
		t.Errorf("new pod: got %s", got)
	}
	if got := run(t, fresh.NetNS, "ip", "-6", "addr", "show", "dev", "eth0"); got != "" {
		t.Errorf("IPv6 in a range without: %s", got)
	}
	wantAnswer(t, fresh.NetNS, "tcp", at(old.ip4(), 80), "old")
	wantAnswer(t, old.NetNS, "tcp", at(fresh.ip4(), 80), "new")
	wantAnswer(t, fresh.NetNS, "tcp", "192.0.2.1:8080", "old")
	wantAnswer(t, host, "tcp", "127.0.0.1:8080", "old")
	wantAnswer(t, host, "tcp", "[::1]:8080", "old")
	for _, p := range []testPod{old, fresh} {
		if seen := wantAnswer(t, p.NetNS, "tcp", "192.0.2.2:80", "lan"); seen.String() != "192.0.2.1" {
			t.Errorf("pod %s is seen as %s, want masqueraded", p.Name, seen)
		}
	}
	removePod(t, b, old)
	addrs := run(t, host, "ip", "addr", "show", "dev", "crisp0")
	if strings.Contains(addrs, "10.219.0.1") || strings.Contains(addrs, "fd53") || !strings.Contains(addrs, "10.1.2.1/24") {
		t.Errorf("addresses of the bridge after the last old pod went: %s", addrs)
	}
	wantAnswer(t, host, "tcp", at(fresh.ip4(), 80), "new")
}

func TestTwoBridges(t *testing.T) {
	host := newNS(t)
	a := newBridge(t, host, Config{})
	b := newBridge(t, host, Config{Bridge: "crisp1", Table: "crisp1", Subnets: []netip.Prefix{netipPrefix("10.7.0.0/24"), netipPrefix("fd07::/64")}})
	p, q := addPod(t, a, "same"), addPod(t, b, "same")
	serve(t, p.NetNS, "tcp", ":80", "p")
	serve(t, q.NetNS, "tcp", ":80", "q")
	for range 2 {
		wantAnswer(t, host, "tcp", at(p.ip4(), 80), "p")
		wantAnswer(t, host, "tcp", at(q.ip6(), 80), "q")
		wantAnswer(t, p.NetNS, "tcp", at(q.ip4(), 80), "q")
		check(t, a.Restore(t.Context(), nil))
		check(t, b.Restore(t.Context(), nil))
	}
	before := run(t, host, "nft", "list", "table", "inet", "crisp")
	check(t, b.Destroy())
	wantAnswer(t, host, "tcp", at(p.ip4(), 80), "p")
	if got := run(t, host, "nft", "list", "table", "inet", "crisp"); got != before {
		t.Errorf("rules of the other: got\n%s\nwant\n%s", got, before)
	}
	check(t, a.Destroy())
	check(t, a.Destroy())
	if got := linkNames(t, host); !slices.Equal(got, []string{"lo"}) {
		t.Errorf("links after Destroy: got %v", got)
	}
	if got := ruleset(t, host); got != "" {
		t.Errorf("rules after Destroy: got %s", got)
	}
	addPod(t, a, "again")
}

// C-36: foreign things in our places.
func TestForeignBridge(t *testing.T) {
	for _, kind := range []string{"bridge", "veth"} {
		t.Run(kind, func(t *testing.T) {
			host := newNS(t)
			run(t, host, "ip", "link", "add", "crisp0", "type", kind)
			_, err := New(Config{NetNS: host})
			if !errors.Is(err, network.ErrInvalid) || !strings.Contains(err.Error(), `link "crisp0" (`+kind+`) exists and is not ours`) {
				t.Errorf("got %v", err)
			}
			if !slices.Contains(linkNames(t, host), "crisp0") {
				t.Error("it is gone")
			}
		})
	}
	t.Run("later", func(t *testing.T) {
		host := newNS(t)
		b := newBridge(t, host, Config{})
		p := planned(t, b, "a")
		run(t, host, "ip", "link", "add", "crisp0", "type", "bridge")
		if _, err := b.Setup(t.Context(), p.Pod, p.result); !errors.Is(err, network.ErrInvalid) {
			t.Errorf("got %v, want ErrInvalid", err)
		}
		if c := b.Status(); c.Ready || c.Reason != "BridgeFailed" || !strings.Contains(c.Message, "not ours") {
			t.Errorf("status: got %+v", c)
		}
		if err := b.Destroy(); !errors.Is(err, network.ErrInvalid) || !slices.Contains(linkNames(t, host), "crisp0") {
			t.Errorf("destroy: got %v", err)
		}
		run(t, host, "ip", "link", "del", "crisp0")
		b.check() // what the ticker does every 5 s
		if c := b.Status(); !c.Ready {
			t.Errorf("status: got %+v", c)
		}
		must(b.Setup(t.Context(), p.Pod, p.result))(t)
	})
	t.Run("died before the mark", func(t *testing.T) {
		host := newNS(t)
		run(t, host, "ip", "link", "add", "crisp0", "address", bridgeMAC("crisp0").String(), "type", "bridge")
		addPod(t, newBridge(t, host, Config{}), "a")
	})
	t.Run("range in use", func(t *testing.T) {
		host := newNS(t)
		run(t, host, "sh", "-c", "ip link add x type bridge; ip addr add 10.219.5.1/24 dev x")
		b := newBridge(t, host, Config{})
		p := planned(t, b, "a")
		_, err := b.Setup(t.Context(), p.Pod, p.result)
		if !errors.Is(err, network.ErrInvalid) || !strings.Contains(err.Error(), `pod range 10.219.0.0/16: invalid network request: link "x" is in 10.219.5.0/24`) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("larger range in use", func(t *testing.T) {
		host := newNS(t)
		run(t, host, "sh", "-c", "ip link add x type bridge; ip addr add 10.0.0.5/8 dev x; ip addr add 10.219.0.0/32 dev x")
		addPod(t, newBridge(t, host, Config{}), "a")
	})
}

func TestNoIPv6OnTheHost(t *testing.T) {
	for _, scope := range []string{"all", "default"} {
		t.Run(scope, func(t *testing.T) {
			host := newNS(t)
			run(t, host, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/"+scope+"/disable_ipv6")
			b := newBridge(t, host, Config{})
			p := addPod(t, b, "a")
			serve(t, p.NetNS, "tcp", ":80", "a")
			wantAnswer(t, host, "tcp", at(p.ip4(), 80), "a")
			if len(p.result.IPs) != 1 {
				t.Errorf("addresses: got %v", p.result.IPs)
			}
			if err := b.UpdatePodCIDR("fd00:1::/64"); !errors.Is(err, network.ErrInvalid) {
				t.Errorf("IPv6 range only: got %v, want ErrInvalid", err)
			}
			check(t, b.UpdatePodCIDR("10.1.2.0/24,fd00:1::/64"))
			if p := addPod(t, b, "b"); fmt.Sprint(p.result.IPs) != "[10.1.2.2]" {
				t.Errorf("addresses: got %v", p.result.IPs)
			}
		})
	}
}

func TestV6Only(t *testing.T) {
	host := newNS(t)
	run(t, host, "sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_forward") // as the real host's may be 1
	b := newBridge(t, host, Config{Subnets: []netip.Prefix{netipPrefix("fd00::/64")}})
	p, q := addPod(t, b, "a", network.PortMapping{Protocol: network.TCP, HostPort: 8080, ContainerPort: 80}), addPod(t, b, "b")
	serve(t, p.NetNS, "tcp", ":80", "a")
	wantAnswer(t, q.NetNS, "tcp", at(p.ip6(), 80), "a")
	wantAnswer(t, host, "tcp", "[::1]:8080", "a")
	if v := readSysctl(t, host, "ipv4/ip_forward"); v != "0" {
		t.Errorf("ip_forward: got %s, want untouched", v)
	}
}

// A host that learned its default route from a router keeps on listening to it.
func TestForwardingKeepsRouterAdvertisements(t *testing.T) {
	host := newNS(t)
	lan(t, host)
	run(t, host, "sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_forward") // as the real host's may be 1
	run(t, host, "sh", "-c", "ip -6 route add default via 2001:db8::2 dev lan0 proto ra")
	run(t, host, "ip", "link", "add", "quiet0", "type", "bridge")
	addPod(t, newBridge(t, host, Config{}), "a")
	for link, want := range map[string]string{"lan0": "2", "quiet0": "1", "crisp0": "0"} {
		if v := readSysctl(t, host, "ipv6/conf/"+link+"/accept_ra"); v != want {
			t.Errorf("accept_ra of %s: got %s, want %s", link, v, want)
		}
	}
	for _, name := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		if v := readSysctl(t, host, name); v != "1" {
			t.Errorf("%s: got %s, want 1", name, v)
		}
	}
}

func TestMTU(t *testing.T) {
	for _, tt := range []struct {
		name   string
		cfg    int
		uplink string
		want   string
	}{
		{"configured", 1400, "9000", "1400"},
		{"of the uplink", 0, "9000", "9000"},
		{"too small for IPv6", 0, "1000", "1280"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			host := newNS(t)
			run(t, host, "sh", "-c", "ip link add up0 type veth peer name up1; ip link set up0 mtu "+tt.uplink+"; ip link set up0 up; ip addr add 192.0.2.1/24 dev up0; ip route add default via 192.0.2.2")
			p := addPod(t, newBridge(t, host, Config{MTU: tt.cfg}), "a")
			for link, ns := range map[string]*os.File{"crisp0": host, p.result.HostLink: host, "eth0": p.NetNS} {
				if got := strings.TrimSpace(run(t, ns, "sh", "-c", "ip link show "+link+" | sed -n 's/.*mtu \\([0-9]*\\).*/\\1/p'")); got != tt.want {
					t.Errorf("MTU of %s: got %s, want %s", link, got, tt.want)
				}
			}
		})
	}
}

// C-46: many at once.
func TestManyAtOnce(t *testing.T) {
	host := newNS(t)
	b := newBridge(t, host, Config{})
	check(t, b.Restore(t.Context(), nil))
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen := map[netip.Addr]string{}
	for worker := range 6 {
		wg.Go(func() { // waited for below
			for i := range 10 {
				ns, err := netns.New()
				if err != nil {
					t.Error(err)
					return
				}
				p := network.Pod{ID: podID(fmt.Sprint(worker, "/", i)), NetNS: ns,
					Ports: []network.PortMapping{{Protocol: network.TCP, HostPort: uint16(1000 + 10*worker + i), ContainerPort: 80}}}
				r, err := b.Plan(t.Context(), p)
				if err == nil {
					r, err = b.Setup(t.Context(), p, r)
				}
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				for _, ip := range r.IPs {
					if seen[ip] != "" {
						t.Errorf("%s was given to %s and %s", ip, seen[ip], p.ID)
					}
					seen[ip] = p.ID
				}
				mu.Unlock()
				if i == 5 {
					if err := b.UpdatePodCIDR(fmt.Sprintf("10.%d.0.0/16,fd0%d::/64", 30+worker, worker)); err != nil {
						t.Error(err)
					}
				}
				if i%2 == 0 {
					if err := b.Teardown(t.Context(), p, r); err != nil {
						t.Error(err)
					}
				}
				_ = ns.Close()
			}
		})
	}
	wg.Wait()
	// What is in the kernel is what is in memory.
	got := ruleset(t, host)
	check(t, b.rules.Rebuild())
	if want := ruleset(t, host); got != want {
		t.Errorf("rules: got\n%s\nwant\n%s", got, want)
	}
	if n := len(b.pods); n != 30 {
		t.Errorf("pods: got %d, want 30", n)
	}
}

// A pod in a user namespace owns its network namespace; the host's root sets it up all
// the same.
func TestPodInUserNamespace(t *testing.T) {
	for _, subnets := range [][]netip.Prefix{nil, DefaultSubnets()[:1]} {
		host := newNS(t)
		b := newBridge(t, host, Config{Subnets: subnets})
		p := planned(t, b, "a")
		cmd := exec.Command("cat")
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
			UidMappings: []syscall.SysProcIDMap{{HostID: 100000, Size: 65536}},
			GidMappings: []syscall.SysProcIDMap{{HostID: 100000, Size: 65536}},
		}
		stdin := must(cmd.StdinPipe())(t)
		check(t, cmd.Start())
		ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid))
		check(t, errors.Join(err, stdin.Close(), cmd.Wait()))
		defer func() { _ = ns.Close() }()
		p.NetNS = ns
		must(b.Setup(t.Context(), p.Pod, p.result))(t)
		serve(t, ns, "tcp", ":80", "a")
		for _, ip := range p.result.IPs {
			wantAnswer(t, host, "tcp", at(ip, 80), "a")
		}
		removePod(t, b, p)
	}
}

package bridge

import (
	"context"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/crisp-cri/crisp/network"
)

// shaped is a pod with annotations, set up.
func shaped(t testing.TB, b *Bridge, name string, annotations map[string]string) testPod {
	t.Helper()
	p := planned(t, b, name)
	p.Annotations = annotations
	p.result = must(b.Setup(context.Background(), p.Pod, p.result))(t)
	return p
}

var bothWays = map[string]string{"kubernetes.io/ingress-bandwidth": "8M", "kubernetes.io/egress-bandwidth": "4M"}

// shapers are the intermediate links in ns.
func shapers(t testing.TB, ns *os.File) (names []string) {
	t.Helper()
	for _, n := range linkNames(t, ns) {
		if strings.HasPrefix(n, shaperWord) {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	return names
}

var sentPattern = regexp.MustCompile(`(?s)qdisc tbf .*?Sent (\d+) bytes`)

// through is how many bytes went through the bucket of a link.
func through(t testing.TB, ns *os.File, link string) int {
	t.Helper()
	out := run(t, ns, "tc", "-s", "qdisc", "show", "dev", link)
	m := sentPattern.FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("no bucket on %s:\n%s", link, out)
	}
	return must(strconv.Atoi(m[1]))(t)
}

func TestBandwidth(t *testing.T) {
	host := newNS(t)
	b := newBridge(t, host, Config{})
	addPod(t, b, "free")
	rules, links := ruleset(t, host), linkNames(t, host)
	p := shaped(t, b, "slow", bothWays)
	shaper := shaperName(p.result.HostLink)
	for link, rate := range map[string]string{p.result.HostLink: "rate 8Mbit", shaper: "rate 4Mbit"} {
		if out := run(t, host, "tc", "qdisc", "show", "dev", link); !strings.Contains(out, rate) {
			t.Errorf("%s: got\n%s\nwant %s", link, out, rate)
		}
	}
	if out := run(t, host, "ip", "link", "show", "dev", shaper); !strings.Contains(out, "alias crisp "+p.ID) {
		t.Errorf("the intermediate link is not marked:\n%s", out)
	}
	// Everything, of both families, goes through the buckets and still arrives.
	serve(t, p.NetNS, "tcp", ":80", "slow")
	serve(t, host, "tcp", ":80", "host")
	for _, ip := range p.result.IPs {
		in, out := through(t, host, p.result.HostLink), through(t, host, shaper)
		wantAnswer(t, host, "tcp", at(ip, 80), "slow")
		if i, o := through(t, host, p.result.HostLink), through(t, host, shaper); i < in+200 || o < out+200 { // a connection's packets
			t.Errorf("%s: %d bytes went in by the bucket and %d out, want a connection's", ip, i-in, o-out)
		}
	}
	wantAnswer(t, p.NetNS, "tcp", "10.219.0.1:80", "host")
	for range 2 {
		removePod(t, b, p)
		if got := linkNames(t, host); !slices.Equal(got, links) {
			t.Errorf("links: got %v, want %v", got, links)
		}
	}
	if got := ruleset(t, host); got != rules {
		t.Errorf("rules: got\n%s\nwant\n%s", got, rules)
	}
}

// One direction only: what is not asked for costs no link.
func TestBandwidthOneWay(t *testing.T) {
	host := newNS(t)
	b := newBridge(t, host, Config{})
	in := shaped(t, b, "in", map[string]string{"kubernetes.io/ingress-bandwidth": "1G"})
	if got := shapers(t, host); len(got) != 0 {
		t.Errorf("intermediate links: got %v", got)
	}
	out := shaped(t, b, "out", map[string]string{"kubernetes.io/egress-bandwidth": "1P"})
	if got := run(t, host, "tc", "qdisc", "show", "dev", out.result.HostLink); strings.Contains(got, "tbf") {
		t.Errorf("got\n%s", got)
	}
	if got := run(t, host, "tc", "qdisc", "show", "dev", in.result.HostLink); !strings.Contains(got, "rate 1Gbit") {
		t.Errorf("got\n%s", got)
	}
}

// Nothing of it is left when it fails, and a foreign link of the name is not taken away.
func TestBandwidthThatFails(t *testing.T) {
	host := newNS(t)
	b := newBridge(t, host, Config{})
	addPod(t, b, "first")
	p := planned(t, b, "a")
	p.Annotations = bothWays
	run(t, host, "ip", "link", "add", shaperName(p.result.HostLink), "type", "ifb")
	run(t, host, "ip", "link", "set", shaperName(p.result.HostLink), "alias", "somebody's")
	rules, links := ruleset(t, host), linkNames(t, host)
	_, err := b.Setup(t.Context(), p.Pod, p.result)
	if err == nil || !strings.Contains(err.Error(), "somebody's") {
		t.Errorf("got %v", err)
	}
	if got := linkNames(t, host); !slices.Equal(got, links) {
		t.Errorf("links: got %v, want %v", got, links)
	}
	if got := ruleset(t, host); got != rules {
		t.Errorf("rules: got\n%s\nwant\n%s", got, rules)
	}
	// A leftover of a daemon that died before it was marked is no hindrance.
	run(t, host, "ip", "link", "del", shaperName(p.result.HostLink))
	run(t, host, "ip", "link", "add", shaperName(p.result.HostLink), "type", "ifb")
	p.result = must(b.Setup(t.Context(), p.Pod, p.result))(t)
	removePod(t, b, p)
	if got := shapers(t, host); len(got) != 0 {
		t.Errorf("intermediate links: got %v", got)
	}
}

// The next daemon keeps the limits of pods that live and collects those of pods that do not.
func TestBandwidthRestore(t *testing.T) {
	host := newNS(t)
	b := must(New(Config{NetNS: host}))(t)
	p, gone := shaped(t, b, "a", bothWays), shaped(t, b, "gone", bothWays)
	check(t, b.Close())
	check(t, gone.NetNS.Close()) // its link goes with it
	b = newBridge(t, host, Config{})
	check(t, b.Restore(t.Context(), map[string]network.Restored{p.ID: {Pod: p.Pod, Result: p.result}}))
	if got, want := shapers(t, host), []string{shaperName(p.result.HostLink)}; !slices.Equal(got, want) {
		t.Errorf("intermediate links: got %v, want %v", got, want)
	}
	p.NetNS = nil
	removePod(t, b, p)
	if got := shapers(t, host); len(got) != 0 {
		t.Errorf("intermediate links: got %v", got)
	}
}

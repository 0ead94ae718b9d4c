package nft

import (
	"encoding/json"
	"fmt"
	stdnet "net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/network/netns"
)

func requireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces and nftables rules in them")
	}
}

// openTest opens a Table in a network namespace of the test's own.
func openTest(t testing.TB) (*Table, *os.File) {
	t.Helper()
	requireRoot(t)
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	table, err := Open(ns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = table.Close() })
	return table, ns
}

func replace(table *Table, cfg Config, pods []Pod) error {
	table.Put(pods...)
	return table.Configure(cfg)
}

// nft runs nft(8) in ns.
func nft(t testing.TB, ns *os.File, args ...string) string {
	t.Helper()
	bin, err := exec.LookPath("nft")
	if err != nil {
		t.Skip("needs nft(8) to read the rules back: Debian package nftables")
	}
	var out []byte
	err = netns.Do(ns, func() error {
		out, err = exec.Command(bin, args...).CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("nft %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

var testPods = []Pod{
	{
		Link: "cr1a2b000000001", MAC: stdnet.HardwareAddr{0x0a, 0x58, 10, 1, 2, 3},
		IPs:       []netip.Addr{netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("fd00:1::3")},
		LinkLocal: netip.MustParseAddr("fe80::858:aff:fe01:203"),
		Ports: []network.PortMapping{
			{Protocol: network.TCP, HostPort: 8080, ContainerPort: 80},
			{Protocol: network.UDP, HostPort: 53, ContainerPort: 5353, HostIP: netip.MustParseAddr("192.0.2.1")},
			{Protocol: network.SCTP, HostPort: 9, ContainerPort: 10, HostIP: netip.MustParseAddr("2001:db8::1")},
			{Protocol: network.TCP, HostPort: 0, ContainerPort: 99},
		},
	},
	{
		Link: "cr1a2b000000002", MAC: stdnet.HardwareAddr{0x0a, 0x58, 10, 1, 2, 4},
		IPs: []netip.Addr{netip.MustParseAddr("10.1.2.4")},
		Ports: []network.PortMapping{
			{Protocol: network.UDP, HostPort: 53, ContainerPort: 53, HostIP: netip.MustParseAddr("127.0.0.1")},
			{Protocol: network.TCP, HostPort: 81, ContainerPort: 81, HostIP: netip.IPv4Unspecified()},
		},
	},
}

// SEC-117 (CVE-2024-6284): what the kernel has, read by another program, is what
// we meant: the rules as they are written in the code, the elements in the right
// order of bytes.
func TestKernelHasWhatWeMean(t *testing.T) {
	for name, cfg := range testConfigs {
		t.Run(name, func(t *testing.T) {
			table, ns := openTest(t)
			if err := replace(table, cfg, testPods); err != nil {
				t.Fatal(err)
			}
			for _, family := range cfg.families() {
				var want []string
				for _, ch := range cfg.chains(family) {
					want = append(want, "chain "+ch.name)
					for _, r := range ch.rule {
						want = append(want, r.cli)
					}
				}
				got := listedRules(nft(t, ns, "-s", "list", "table", familyName(family), cfg.Table))
				if d := cmp.Diff(want, got); d != "" {
					t.Errorf("rules of family %s as nft prints them (-want +got):\n%s", familyName(family), d)
				}
			}
			got := listedElements(t, nft(t, ns, "-j", "list", "ruleset"))
			want := map[string][]string{
				"ports4":     {"tcp 81 = 10.1.2.4 81", "tcp 8080 = 10.1.2.3 80"},
				"ports6":     {"tcp 8080 = fd00:1::3 80"},
				"addrports4": {"127.0.0.1 udp 53 = 10.1.2.4 53", "192.0.2.1 udp 53 = 10.1.2.3 5353"},
				"addrports6": {"2001:db8::1 sctp 9 = fd00:1::3 10"},
				"local4":     {"tcp 81", "tcp 8080"},
				"localaddr4": {"127.0.0.1 udp 53"},
				"local6":     {"tcp 8080"},
				"published":  {"tcp 81", "tcp 8080", "udp 53"},
			}
			if cfg.AntiSpoof {
				want["own4"] = []string{"cr1a2b000000001 0a:58:0a:01:02:03 10.1.2.3", "cr1a2b000000002 0a:58:0a:01:02:04 10.1.2.4"}
				want["own6"] = []string{"cr1a2b000000001 0a:58:0a:01:02:03 fd00:1::3", "cr1a2b000000001 0a:58:0a:01:02:03 fe80::858:aff:fe01:203"}
			}
			for _, s := range want {
				slices.Sort(s)
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("elements (-want +got):\n%s", d)
			}
		})
	}
}

// listedRules takes the chains and rules out of what nft prints.
func listedRules(text string) []string {
	var rules []string
	in := false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "chain "):
			in = true
			rules = append(rules, strings.TrimSuffix(line, " {"))
		case line == "}":
			in = false
		case in && line != "" && !strings.HasPrefix(line, "type "):
			// What nft 1.0.7 and later call the advertised address.
			rules = append(rules, strings.ReplaceAll(line, "icmpv6 taddr", "@th,64,128"))
		}
	}
	return rules
}

// listedElements takes the elements out of nft's JSON: set name to sorted elements.
func listedElements(t *testing.T, text string) map[string][]string {
	t.Helper()
	type set struct {
		Name string            `json:"name"`
		Elem []json.RawMessage `json:"elem"`
	}
	var ruleset struct {
		Nftables []struct{ Set, Map *set }
	}
	if err := json.Unmarshal([]byte(text), &ruleset); err != nil {
		t.Fatal(err)
	}
	words := func(raw json.RawMessage) string {
		var concat struct{ Concat []any }
		if err := json.Unmarshal(raw, &concat); err != nil {
			t.Fatalf("element %s: %v", raw, err)
		}
		return strings.Trim(fmt.Sprint(concat.Concat), "[]")
	}
	all := map[string][]string{}
	for _, o := range ruleset.Nftables {
		if o.Set != nil {
			for _, e := range o.Set.Elem {
				all[o.Set.Name] = append(all[o.Set.Name], words(e))
			}
		}
		if o.Map != nil {
			for _, e := range o.Map.Elem {
				var kv [2]json.RawMessage
				if err := json.Unmarshal(e, &kv); err != nil {
					t.Fatalf("element %s: %v", e, err)
				}
				all[o.Map.Name] = append(all[o.Map.Name], words(kv[0])+" = "+words(kv[1]))
			}
		}
	}
	for _, s := range all {
		slices.Sort(s)
	}
	return all
}

func TestAddRemove(t *testing.T) {
	table, ns := openTest(t)
	cfg := testConfigs["dual stack"]
	if err := replace(table, cfg, nil); err != nil {
		t.Fatal(err)
	}
	empty := nft(t, ns, "-s", "list", "ruleset")
	for _, p := range testPods {
		for range 2 { // idempotent
			if err := table.Add(p); err != nil {
				t.Fatal(err)
			}
		}
	}
	added := nft(t, ns, "-j", "list", "ruleset")
	if err := table.Rebuild(); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(listedElements(t, added), listedElements(t, nft(t, ns, "-j", "list", "ruleset"))); d != "" {
		t.Errorf("elements added one by one and all at once differ:\n%s", d)
	}
	for i, p := range testPods {
		if err := table.Remove(p.Link); err != nil {
			t.Fatal(err)
		}
		// Both pods publish udp 53, on different addresses.
		if got, want := slices.Contains(listedElements(t, nft(t, ns, "-j", "list", "ruleset"))["published"], "udp 53"), i == 0; got != want {
			t.Errorf("after removing pod %d: udp 53 published: got %v, want %v", i, got, want)
		}
	}
	if got := nft(t, ns, "-s", "list", "ruleset"); got != empty {
		t.Errorf("after removing all pods: got\n%s\nwant\n%s", got, empty)
	}
}

func TestChangesSurviveAFlush(t *testing.T) {
	cfg := testConfigs["dual stack"]
	for _, tt := range []struct {
		name string
		do   func(*Table) error
	}{
		{"add", func(tb *Table) error { return tb.Add(testPods[1]) }},
		{"remove", func(tb *Table) error { return tb.Remove(testPods[0].Link) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			table, ns := openTest(t)
			if err := replace(table, cfg, testPods[:1]); err != nil {
				t.Fatal(err)
			}
			nft(t, ns, "flush", "ruleset")
			if err := tt.do(table); err != nil {
				t.Fatal(err)
			}
			got := listedElements(t, nft(t, ns, "-j", "list", "ruleset"))
			if err := table.Rebuild(); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(listedElements(t, nft(t, ns, "-j", "list", "ruleset")), got); d != "" {
				t.Errorf("elements (-want +got):\n%s", d)
			}
		})
	}
}

func TestForeignTablesStay(t *testing.T) {
	table, ns := openTest(t)
	nft(t, ns, "add table inet other; add table bridge other; add table ip crisp; add chain ip crisp x")
	before := nft(t, ns, "list", "ruleset")
	for name, cfg := range testConfigs {
		if err := replace(table, cfg, testPods); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := table.Delete(cfg.Table); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got := nft(t, ns, "list", "ruleset"); got != before {
			t.Errorf("%s: foreign tables: got\n%s\nwant\n%s", name, got, before)
		}
	}
}

// A former configuration checked addresses, this one does not.
func TestAntiSpoofTurnedOff(t *testing.T) {
	table, ns := openTest(t)
	cfg := testConfigs["dual stack"]
	if err := replace(table, cfg, testPods); err != nil {
		t.Fatal(err)
	}
	cfg.AntiSpoof = false
	if err := table.Configure(cfg); err != nil {
		t.Fatal(err)
	}
	if got := nft(t, ns, "list", "tables"); strings.TrimSpace(got) != "table inet "+cfg.Table {
		t.Errorf("tables: got %q", got)
	}
}

// A thousand pods need more than one message and a bigger socket buffer.
func TestManyPods(t *testing.T) {
	table, ns := openTest(t)
	var pods []Pod
	for i := range 1500 {
		p := testPods[0]
		p.Link = fmt.Sprintf("cr1a2b%09x", i)
		p.IPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), netip.AddrFrom16([16]byte{0xfd, 14: byte(i >> 8), 15: byte(i)})}
		p.Ports = []network.PortMapping{{Protocol: network.TCP, HostPort: uint16(1000 + i), ContainerPort: 80}}
		pods = append(pods, p)
	}
	start := time.Now()
	if err := replace(table, testConfigs["dual stack"], pods); err != nil {
		t.Fatal(err)
	}
	t.Logf("rebuild with %d pods took %v", len(pods), time.Since(start))
	got := listedElements(t, nft(t, ns, "-j", "list", "ruleset"))
	for set, want := range map[string]int{"ports4": 1500, "ports6": 1500, "own4": 1500, "own6": 3000} {
		if len(got[set]) != want {
			t.Errorf("elements of %s: got %d, want %d", set, len(got[set]), want)
		}
	}
}

func TestMonitor(t *testing.T) {
	table, ns := openTest(t)
	cfg := testConfigs["dual stack"]
	if err := replace(table, cfg, testPods); err != nil {
		t.Fatal(err)
	}
	m, err := table.NewMonitor(cfg.Table)
	if err != nil {
		t.Fatal(err)
	}
	events := make(chan error) // Closed by the goroutine, which ends on Close.
	go func() {
		defer close(events)
		for {
			err := m.Next()
			if err != nil {
				if err != os.ErrClosed {
					events <- err
				}
				return
			}
			events <- nil
		}
	}()
	// What is ours or foreign is not told; the flush after it is the first event.
	quiet := func() {
		if err := table.Rebuild(); err != nil {
			t.Fatal(err)
		}
		nft(t, ns, "add table inet other; add chain inet other x; add rule inet other x drop; delete table inet other; add table ip crisp; delete table ip crisp")
	}
	for _, change := range []string{
		"flush ruleset",
		"delete table inet crisp",
		"flush table bridge crisp",
		"flush set inet crisp local4",
		"delete element inet crisp ports4 { tcp . 8080 }",
		"insert rule inet crisp prerouting drop",
	} {
		quiet()
		select {
		case err := <-events:
			t.Fatalf("event (%v) without a foreign change, before %q", err, change)
		default:
		}
		nft(t, ns, change)
		select {
		case err := <-events:
			if err != nil {
				t.Fatalf("after %q: %v", change, err)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("no event after %q", change)
		}
		// A change of several objects is several datagrams.
		for drained := false; !drained; {
			select {
			case <-events:
			case <-time.After(50 * time.Millisecond):
				drained = true
			}
		}
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	for err := range events {
		if err != nil {
			t.Error(err)
		}
	}
}

func BenchmarkAddRemove(b *testing.B) {
	table, _ := openTest(b)
	if err := replace(table, testConfigs["dual stack"], testPods[:1]); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := table.Add(testPods[1]); err != nil {
			b.Fatal(err)
		}
		if err := table.Remove(testPods[1].Link); err != nil {
			b.Fatal(err)
		}
	}
}

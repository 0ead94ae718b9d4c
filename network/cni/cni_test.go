package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/network"
)

var testPod = network.Pod{
	ID: strings.Repeat("ab", 32), Namespace: "default", Name: "web", UID: "u-1", NetNSPath: "/run/netns/test", CgroupPath: "/kubepods/pod1",
	Ports: []network.PortMapping{
		{Protocol: network.TCP, HostPort: 8080, ContainerPort: 80, HostIP: netip.MustParseAddr("127.0.0.1")},
		{Protocol: network.UDP, ContainerPort: 53},
	},
	Annotations: map[string]string{"kubernetes.io/ingress-bandwidth": "1M"},
	DNS:         network.DNS{Servers: []string{"192.0.2.53"}},
}

// recorded is a Result as it comes back from disk.
func recorded(t *testing.T, r network.Result) (back network.Result) {
	t.Helper()
	b, err := json.Marshal(r)
	if err == nil {
		err = json.Unmarshal(b, &back)
	}
	if err != nil {
		t.Fatal(err)
	}
	return back
}

func plan(t *testing.T, n *CNI) network.Result {
	t.Helper()
	r, err := n.Plan(t.Context(), testPod)
	if err != nil {
		t.Fatal(err)
	}
	return recorded(t, r)
}

func setup(t *testing.T, n *CNI) network.Result {
	t.Helper()
	r, err := n.Setup(t.Context(), testPod, plan(t, n))
	if err != nil {
		t.Fatal(err)
	}
	return recorded(t, r)
}

// gone waits until nobody has that number; a killed orphan is reaped by someone else.
func gone(t *testing.T, pid int) {
	t.Helper()
	until(t, fmt.Sprintf("process %d is gone", pid), func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(stat), ") Z ")
	})
}

func TestSetup(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "/run/nobody")
	w := newWorld(t)
	w.write("10-net.conflist", w.list("1.0.0", "net", nil, "one", "two"))
	n := w.open(testLimits)
	r := setup(t, n)
	if want := []netip.Addr{netip.MustParseAddr("fd00::3"), netip.MustParseAddr("10.1.2.3")}; !slices.Equal(r.IPs, want) {
		t.Errorf("got addresses %v, want %v", r.IPs, want)
	}
	if r.Provider != "cni" || r.CNI.Network != "net" || r.CNI.File != w.conf+"/10-net.conflist" || r.CNI.Added == nil {
		t.Errorf("got %+v, %+v", r, r.CNI)
	}
	l := w.told("ADD")
	if len(l) != 2 || l[0].Plugin != "one" || l[1].Plugin != "two" {
		t.Fatalf("got %v", l)
	}
	one := l[0]
	got := map[string]any{"netns": one.Netns, "ifname": one.IfName, "args": one.Args, "id": one.ID, "runtimeConfig": one.Conf["runtimeConfig"], "name": one.Conf["name"], "notify": one.Notify}
	want := map[string]any{
		"netns": "/run/netns/test", "ifname": "eth0", "id": testPod.ID, "name": "net", "notify": false,
		"args": "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=" + testPod.ID + ";K8S_POD_UID=u-1",
		"runtimeConfig": map[string]any{
			"portMappings":                      []any{map[string]any{"hostPort": 8080., "containerPort": 80., "protocol": "tcp", "hostIP": "127.0.0.1"}},
			"bandwidth":                         map[string]any{"ingressRate": 1e6, "ingressBurst": 4294967295.},
			"dns":                               map[string]any{"servers": []any{"192.0.2.53"}},
			"cgroupPath":                        "/kubepods/pod1",
			"io.kubernetes.cri.pod-annotations": map[string]any{"kubernetes.io/ingress-bandwidth": "1M"},
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the plugin was told (-want +got):\n%s", diff)
	}
	if l[1].Conf["prevResult"] == nil || l[1].Conf["runtimeConfig"] != nil {
		t.Errorf("the second plugin was told %v", l[1].Conf)
	}
	if err := n.Teardown(t.Context(), testPod, r); err != nil {
		t.Fatal(err)
	}
	if got := w.sequence("DEL"); got != "DEL two, DEL one" {
		t.Errorf("got %s", got)
	}
	if len(n.pods) > 0 {
		t.Errorf("it still knows %v", n.pods)
	}
}

// A file of the older kind, and an older version.
func TestSetupOldVersions(t *testing.T) {
	for _, version := range []string{"", "0.3.1", "0.4.0", "1.1.0"} {
		t.Run(version, func(t *testing.T) {
			w := newWorld(t)
			w.write("net.conf", fmt.Sprintf(`{"cniVersion":%q,"name":"old","type":"one","log":%q}`, version, w.log))
			n := w.open(testLimits)
			if version == "" { // its results are of another form
				if r := plan(t, n); r.CNI.Network != "old" {
					t.Errorf("got %+v", r.CNI)
				}
				return
			}
			r := setup(t, n)
			if len(r.IPs) != 2 {
				t.Errorf("got addresses %v", r.IPs)
			}
			if err := n.Teardown(t.Context(), testPod, r); err != nil {
				t.Error(err)
			}
			if l := w.told("DEL"); len(l) != 1 || (l[0].Conf["prevResult"] != nil) != (version != "0.3.1") {
				t.Errorf("got %v", l)
			}
		})
	}
}

func TestSetupFails(t *testing.T) {
	short := testLimits
	short.add = 300 * time.Millisecond
	for _, tt := range []struct {
		name, do string
		limits   limits
		want     []string // in the error
		is       error
	}{
		{"it errs", "err", testLimits, []string{"no address today; try tomorrow"}, nil},
		{"it errs in no form", "mutter", testLimits, []string{"exit status 2", "segmentation fault, or so"}, nil},
		{"it hangs", "hang", short, []string{"killed: no answer within 300ms"}, context.DeadlineExceeded},
		{"no JSON", "garbage", testLimits, []string{"invalid character"}, nil},
		{"a version that is not", "version", testLimits, []string{"9.9.9"}, nil},
		{"no address for eth0", "no address", testLimits, []string{"unusable result", "no address for eth0"}, nil},
		{"an interface that is not", "index", testLimits, []string{"unusable result", "interface 7"}, nil},
		{"holes in a list", "holes", testLimits, []string{"null in a list"}, nil},
		{"null", "null", testLimits, []string{"no address for eth0"}, nil},
		{"it prints without end", "print", testLimits, []string{"killed", "1048576 bytes"}, ErrOutput},
		{"it prints errors without end", "print errors", testLimits, []string{"killed", "1048576 bytes"}, ErrOutput},
		{"it is killed", "die", testLimits, []string{"signal: killed"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.write("net.conflist", w.list("1.0.0", "net", map[string]string{"ADD": tt.do}, "one"))
			n := w.open(tt.limits)
			planned := plan(t, n)
			_, err := n.Setup(t.Context(), testPod, planned)
			var failed *PluginError
			if !errors.As(err, &failed) || failed.Verb != "ADD" || failed.Plugin != "one" || tt.is != nil && !errors.Is(err, tt.is) {
				t.Fatalf("got %v", err)
			}
			for _, s := range append(tt.want, `cannot set up network of pod "default/web": CNI ADD plugin "one": `, " after ") {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("got %q, want %q in it", err, s)
				}
			}
			if tt.do == "err" {
				var said *types.Error
				if !errors.As(err, &said) || said.Code != types.ErrTryAgainLater {
					t.Errorf("the plugin's code is lost: %v", err)
				}
			}
			for _, l := range w.told("ADD") {
				gone(t, l.PID)
			}
			// The caller undoes, once.
			if err := n.Teardown(t.Context(), testPod, planned); err != nil {
				t.Error(err)
			}
			if got := w.sequence("ADD DEL"); got != "ADD one, DEL one" {
				t.Errorf("got %s", got)
			}
		})
	}
}

// A child that keeps the plugin's stdout delays nothing, and does not stay (C-44).
func TestSetupLeavesNoChild(t *testing.T) {
	w := newWorld(t)
	w.write("net.conflist", w.list("1.0.0", "net", map[string]string{"ADD": "fork"}, "one"))
	began := time.Now()
	if r := setup(t, w.open(testLimits)); len(r.IPs) != 2 {
		t.Errorf("got addresses %v", r.IPs)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("it took %v", took)
	}
	l := w.told("ADD")
	if len(l) != 1 || l[0].Child == 0 {
		t.Fatalf("got %v", l)
	}
	gone(t, l[0].Child)
}

func TestSetupIsCancelled(t *testing.T) {
	for _, how := range []string{"by the caller", "by Close"} {
		t.Run(how, func(t *testing.T) {
			w := newWorld(t)
			w.write("net.conflist", w.list("1.0.0", "net", map[string]string{"ADD": "hang"}, "one"))
			n := w.open(testLimits)
			planned := plan(t, n)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			done := make(chan error, 1)
			go func() {
				_, err := n.Setup(ctx, testPod, planned)
				done <- err
			}()
			until(t, "the plugin runs", func() bool { return len(w.told("ADD")) == 1 })
			want := context.Canceled
			if how == "by Close" {
				want = errClosed
				_ = n.Close()
			} else {
				cancel()
			}
			if err := <-done; !errors.Is(err, want) {
				t.Errorf("got %v, want %v", err, want)
			}
			gone(t, w.told("ADD")[0].PID)
		})
	}
}

// What a pod was attached to is in its record: what the directory has now does not matter.
func TestTeardownFromRecord(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(w *world)
	}{
		{"nothing changed", func(*world) {}},
		{"the configuration is gone", func(w *world) { _ = os.RemoveAll(w.conf) }},
		{"the configuration is another", func(w *world) { w.write("net.conflist", w.list("0.4.0", "other", nil, "two")) }},
		{"the configuration is broken", func(w *world) { w.write("net.conflist", "{") }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.write("net.conflist", w.list("1.0.0", "net", nil, "one"))
			n := w.open(testLimits)
			r := setup(t, n)
			_ = n.Close()
			tt.change(w)
			// Another crispd, for which CNI is not the network any more, and a pod without a namespace.
			n = w.open(testLimits, func(c *Config) { c.Standby = true })
			for range 2 { // DEL is idempotent
				if err := n.Teardown(t.Context(), testPod, r); err != nil {
					t.Fatal(err)
				}
			}
			if got := w.sequence("DEL"); got != "DEL one, DEL one" {
				t.Fatalf("got %s", got)
			}
			add, del := w.told("ADD")[0], w.told("DEL")[0]
			if del.Netns != "" || del.Conf["name"] != "net" || del.Args != add.Args {
				t.Errorf("got %+v", del)
			}
			prev, _ := json.Marshal(del.Conf["prevResult"])
			var want any
			_ = json.Unmarshal(r.CNI.Added, &want)
			if w, _ := json.Marshal(want); string(w) != string(prev) {
				t.Errorf("got prevResult %s, want %s", prev, w)
			}
			if diff := cmp.Diff(add.Conf["runtimeConfig"], del.Conf["runtimeConfig"]); diff != "" {
				t.Errorf("DEL was told other than ADD (-ADD +DEL):\n%s", diff)
			}
		})
	}
}

// A crash between intent and result: the intent is enough.
func TestTeardownOfIntent(t *testing.T) {
	w := newWorld(t)
	w.write("net.conflist", w.list("1.0.0", "net", nil, "one"))
	n := w.open(testLimits)
	r := plan(t, n)
	p := testPod
	var err error
	if p.NetNS, err = os.Open("/proc/self/ns/net"); err != nil {
		t.Fatal(err)
	}
	defer p.NetNS.Close()
	if err := n.Teardown(t.Context(), p, r); err != nil {
		t.Fatal(err)
	}
	if l := w.told("DEL"); len(l) != 1 || l[0].Netns != p.NetNSPath || l[0].Conf["prevResult"] != nil {
		t.Errorf("got %+v", l)
	}
}

func TestTeardownFails(t *testing.T) {
	short := testLimits
	short.del = 300 * time.Millisecond
	for _, tt := range []struct {
		do, want string
		limits   limits
	}{
		{"err", "no address today", testLimits}, {"hang", "no answer within 300ms", short}, {"print", "1048576 bytes", testLimits},
	} {
		t.Run(tt.do, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.write("net.conflist", w.list("1.0.0", "net", map[string]string{"DEL": tt.do}, "one"))
			n := w.open(tt.limits)
			r := setup(t, n)
			err := n.Teardown(t.Context(), testPod, r)
			if err == nil || !strings.HasPrefix(err.Error(), `cannot tear down network of pod "default/web": CNI DEL plugin "one": `) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v", err)
			}
			gone(t, w.told("DEL")[0].PID)
			if n.holds(testPod.ID) == nil {
				t.Error("it forgot a pod that still has its network")
			}
		})
	}
}

func TestPlanRefuses(t *testing.T) {
	w := newWorld(t)
	n := w.open(testLimits)
	if _, err := n.Plan(t.Context(), testPod); !errors.Is(err, network.ErrNotReady) {
		t.Errorf("got %v, want ErrNotReady", err)
	}
	w.write("net.conflist", w.list("1.0.0", "net", nil, "one"))
	for name, p := range map[string]network.Pod{
		"an argument more": {ID: "a", Name: "x;K8S_POD_NAMESPACE=kube-system"},
		"bandwidth":        {ID: "a", Name: "x", Annotations: map[string]string{"kubernetes.io/egress-bandwidth": "fast"}},
	} {
		if _, err := n.Plan(t.Context(), p); !errors.Is(err, network.ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", name, err)
		}
	}
	if _, err := n.Plan(t.Context(), testPod); err != nil { // at once, not with the next look
		t.Error(err)
	}
}

// SEC-114: a type that leads out of the plugins' directories is never executed, whether it is in a file or in a record.
func TestTypeWithPath(t *testing.T) {
	for _, typ := range []string{"../bin/one", "/bin/true", "..", ".", "", "a/b", `a\b`, "one\x00"} {
		w := newWorld(t)
		quoted, _ := json.Marshal(typ)
		text := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"net","plugins":[{"type":%s,"log":%q}]}`, quoted, w.log)
		w.write("net.conflist", text)
		n := w.open(testLimits)
		if _, err := n.Plan(t.Context(), testPod); !errors.Is(err, network.ErrNotReady) || !strings.Contains(err.Error(), "net.conflist: ") {
			t.Errorf("%q: got %v", typ, err)
		}
		r := network.Result{Provider: Name, CNI: &network.CNIAttachment{Network: "net", Interface: "eth0", Config: json.RawMessage(text)}}
		if _, err := n.Setup(t.Context(), testPod, r); err == nil {
			t.Errorf("%q: ADD with it works", typ)
		}
		if err := n.Teardown(t.Context(), testPod, r); err == nil {
			t.Errorf("%q: DEL with it works", typ)
		}
		if l := w.told("ADD DEL"); l != nil {
			t.Errorf("%q: it ran: %v", typ, l)
		}
	}
}

func TestRestoreOfAttachments(t *testing.T) {
	ns, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	run := func(t *testing.T, version string, do map[string]string, change ...func(*Config)) (*world, *CNI, network.Result) {
		w := newWorld(t)
		w.write("net.conflist", w.list(version, "net", do, "one"))
		n := w.open(testLimits)
		r := setup(t, n)
		_ = n.Close()
		n = w.open(testLimits, change...)
		p := testPod
		p.NetNS = ns
		pods := map[string]network.Restored{p.ID: {Pod: p, Result: r}, "other": {Result: network.Result{Provider: "bridge"}}}
		if err := n.Restore(t.Context(), pods); err != nil {
			t.Fatal(err)
		}
		return w, n, r
	}
	t.Run("GC and CHECK", func(t *testing.T) {
		w, n, r := run(t, "1.1.0", nil)
		until(t, "CHECK came", func() bool { return len(w.told("CHECK")) == 1 })
		if got := w.sequence("GC CHECK"); got != "GC one, CHECK one" {
			t.Errorf("got %s", got)
		}
		want := []any{map[string]any{"containerID": testPod.ID, "ifname": "eth0"}}
		if diff := cmp.Diff(any(want), w.told("GC")[0].Conf["cni.dev/valid-attachments"]); diff != "" {
			t.Errorf("the living (-want +got):\n%s", diff)
		}
		if w.told("CHECK")[0].Conf["prevResult"] == nil {
			t.Error("CHECK was not told the result of ADD")
		}
		if err := n.Teardown(t.Context(), testPod, r); err != nil {
			t.Error(err)
		}
	})
	t.Run("older plugins know no GC", func(t *testing.T) {
		w, _, _ := run(t, "0.4.0", nil)
		until(t, "CHECK came", func() bool { return len(w.told("CHECK")) == 1 })
		if got := w.sequence("GC"); got != "" {
			t.Errorf("got %s", got)
		}
	})
	t.Run("nothing is deleted while GC runs", func(t *testing.T) {
		w, n, r := run(t, "1.1.0", map[string]string{"GC": "hang"})
		until(t, "GC came", func() bool { return len(w.told("GC")) == 1 })
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if err := n.Teardown(ctx, testPod, r); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "waiting for CNI GC") {
			t.Errorf("got %v", err)
		}
		_ = unix.Kill(w.told("GC")[0].PID, unix.SIGKILL) // a GC that fails is not the end
		if err := n.Teardown(t.Context(), testPod, r); err != nil {
			t.Error(err)
		}
	})
	t.Run("standby", func(t *testing.T) {
		w, n, r := run(t, "1.1.0", nil, func(c *Config) { c.Standby = true })
		if err := n.Teardown(t.Context(), testPod, r); err != nil {
			t.Error(err)
		}
		if got := w.sequence("GC CHECK"); got != "" {
			t.Errorf("got %s", got)
		}
	})
	t.Run("without pods", func(t *testing.T) {
		w := newWorld(t)
		w.write("net.conflist", w.list("1.1.0", "net", nil, "one"))
		n := w.open(testLimits)
		if err := n.Restore(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		_ = setup(t, n)
		if got := w.sequence("GC CHECK ADD"); got != "ADD one" {
			t.Errorf("got %s", got)
		}
	})
}

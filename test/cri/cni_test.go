package cri

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// cniPlugins is where Debian's containernetworking-plugins are.
const cniPlugins = "/usr/lib/cni"

// cniNode is a crispd with a configuration directory of its own, empty at first.
type cniNode struct {
	*world
	t      *testing.T
	conf   string // directory
	data   string // of the host-local plugin
	bins   string // plugins of the test
	bridge string // the bridge plugin's
	subnet netip.Prefix
}

// newCNI starts a crispd that looks for CNI configurations (network mode "auto").
func newCNI(t *testing.T) *cniNode {
	t.Helper()
	need(t)
	n := &cniNode{t: t, conf: t.TempDir(), data: t.TempDir(), bins: t.TempDir()}
	// Registered before the daemon's, so that it runs after the pods are gone.
	t.Cleanup(func() {
		if n.bridge == "" {
			return
		}
		if _, err := os.Lstat("/sys/class/net/" + n.bridge); err != nil {
			return // no pod had it
		}
		if out, err := exec.Command("ip", "link", "del", n.bridge).CombinedOutput(); err != nil {
			t.Errorf("ip link del %s: %v\n%s", n.bridge, err, out)
		}
	})
	n.world = own(t, "--set", "network.mode=auto", "--set", "network.cni_conf_dir="+n.conf,
		"--set", fmt.Sprintf("network.cni_bin_dirs=[%q, %q]", n.bins, cniPlugins))
	n.bridge = "cn-" + n.Tag
	// Next to the range of the node's own bridge, which is 10.128.0.0/10.
	b := byte(len(n.Tag))
	for _, c := range []byte(n.Tag) {
		b = b*31 + c
	}
	n.subnet = netip.MustParsePrefix(fmt.Sprintf("10.%d.%d.0/24", 192+os.Getpid()%32, b))
	return n
}

// configure writes a network of a bridge with the plugins after it.
func (n *cniNode) configure(after ...string) {
	n.t.Helper()
	bridge, err := json.Marshal(map[string]any{
		"type": "bridge", "bridge": n.bridge, "isGateway": true, "hairpinMode": true,
		"ipam": map[string]any{
			"type": "host-local", "dataDir": n.data, "routes": []any{map[string]string{"dst": "0.0.0.0/0"}},
			"ranges": []any{[]any{map[string]string{"subnet": n.subnet.String()}}},
		},
	})
	if err != nil {
		n.t.Fatal(err)
	}
	list := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"net","plugins":[%s]}`, strings.Join(append([]string{string(bridge)}, after...), ","))
	mustWrite(n.t, filepath.Join(n.conf, "10-net.conflist"), list)
}

// plugin makes a plugin of a shell script.
func (n *cniNode) plugin(name, script string) {
	n.t.Helper()
	if err := os.WriteFile(filepath.Join(n.bins, name), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		n.t.Fatal(err)
	}
}

// reserved are the addresses that the host-local plugin thinks are in use.
func (n *cniNode) reserved() (l []string) {
	n.t.Helper()
	files, err := os.ReadDir(filepath.Join(n.data, "net"))
	if err != nil && !os.IsNotExist(err) {
		n.t.Fatal(err)
	}
	for _, f := range files {
		if ip, err := netip.ParseAddr(f.Name()); err == nil {
			l = append(l, ip.String())
		}
	}
	return l
}

func (n *cniNode) has(ip string) bool {
	a, err := netip.ParseAddr(ip)
	return err == nil && n.subnet.Contains(a)
}

// networkReady is the condition of Status.
func (w *world) networkReady(t *testing.T) *runtimeapi.RuntimeCondition {
	t.Helper()
	st, err := w.rt.Status(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range st.Status.Conditions {
		if c.Type == runtimeapi.NetworkReady {
			return c
		}
	}
	t.Fatal("there is no NetworkReady condition")
	return nil
}

// Real plugins: a pod gets its network from them as soon as there is a configuration, keeps the one it
// was born with through a crash of crispd, and is taken down by it even when the configuration is gone.
func TestCNI(t *testing.T) {
	n := newCNI(t)
	born := n.pod(t, named("born-before"))
	if n.has(born.ip()) {
		t.Fatalf("without a configuration: got %s, which is the plugins' range", born.ip())
	}
	n.configure()
	a, b := n.pod(t, named("cni-a")), n.pod(t, named("cni-b"))
	for _, p := range []*pod{a, b} {
		if !n.has(p.ip()) {
			t.Fatalf("%s: got address %s, want one in %s", p.cfg.Hostname, p.ip(), n.subnet)
		}
	}
	if c := n.networkReady(t); !c.Status {
		t.Errorf("got %v", c)
	}
	a.run([]string{"http", ":8080"}).says("listening")
	client := b.run([]string{"sleep"})
	works := func(when string) {
		t.Helper()
		if got := client.exec("get", "http://"+a.ip()+":8080/hostname"); got != "cni-a\n" {
			t.Errorf("%s: pod to pod: got %q", when, got)
		}
		if got, err := get(t, a.ip()+":8080"); err != nil || got != "cni-a" {
			t.Errorf("%s: host to pod: got %q, %v", when, got, err)
		}
	}
	works("at first")
	before := map[*pod]string{born: born.ip(), a: a.ip(), b: b.ip()}

	if err := os.Remove(filepath.Join(n.conf, "10-net.conflist")); err != nil {
		t.Fatal(err)
	}
	n.crash(t)
	n.again(t)
	for p, ip := range before {
		if got := p.ip(); got != ip || p.status().State != runtimeapi.PodSandboxState_SANDBOX_READY {
			t.Errorf("%s after a crash: got %v, want address %s", p.cfg.Hostname, p.status(), ip)
		}
	}
	works("after a crash, without the configuration")
	if late := n.pod(t); n.has(late.ip()) {
		t.Errorf("a new pod without a configuration: got %s of the plugins' range", late.ip())
	}
	if got := n.reserved(); len(got) != 2 {
		t.Errorf("the plugin holds %v, want two addresses: what follows proves nothing", got)
	}
	a.remove()
	if err := n.rt.StopPodSandbox(t.Context(), b.id); err != nil {
		t.Errorf("StopPodSandbox: %v", err)
	}
	if got := n.reserved(); len(got) != 0 {
		t.Errorf("after both pods were stopped the plugin still holds %v", got)
	}
}

// A plugin that fails: the message names it and what it said, and nothing is left of the pod, not even
// the address that the plugin before it gave out.
func TestCNIPluginThatFails(t *testing.T) {
	n := newCNI(t)
	n.plugin("broken", `cat >/dev/null
[ "$CNI_COMMAND" = ADD ] || exit 0
echo '{"cniVersion":"1.0.0","code":11,"msg":"the fabric is down","details":"switch 7"}'
exit 1
`)
	n.configure(`{"type":"broken"}`)
	cfg := n.podConfig("p")
	_, err := n.rt.RunPodSandbox(t.Context(), cfg, "")
	wantCode(t, err, codes.Internal, "broken", "the fabric is down", "switch 7")
	if list, err := n.rt.ListPodSandbox(t.Context(), nil); err != nil || len(list) != 0 {
		t.Errorf("the pod is there: %v, %v", list, err)
	}
	if got := n.reserved(); len(got) != 0 {
		t.Errorf("still reserved: %v", got)
	}
	// As soon as the configuration is mended, the same pod runs.
	n.configure()
	id, err := n.rt.RunPodSandbox(t.Context(), cfg, "")
	if err != nil {
		t.Fatal(err)
	}
	if p := n.adopt(t, id, cfg); !n.has(p.ip()) {
		t.Errorf("got address %s, want one in %s", p.ip(), n.subnet)
	} else {
		p.remove()
	}
}

// A configuration that cannot be read: Status says which file and why, and no pod comes up on a network
// that nobody meant for it. With a good one beside it, that one counts.
func TestCNIBrokenConfiguration(t *testing.T) {
	n := newCNI(t)
	mustWrite(t, filepath.Join(n.conf, "05-broken.conflist"), `{"cniVersion":"1.0.0","name":"broken","plugins":[`)
	eventually(t, "Status tells", func() bool { return !n.networkReady(t).Status })
	if c := n.networkReady(t); !strings.Contains(c.Message, "05-broken.conflist") {
		t.Errorf("got %v, want the file's name", c)
	}
	if _, err := n.rt.RunPodSandbox(t.Context(), n.podConfig("p"), ""); err == nil || !strings.Contains(err.Error(), "05-broken.conflist") {
		t.Errorf("RunPodSandbox: got %v, want the file's name", err)
	}
	n.configure()
	eventually(t, "Status tells", func() bool { return n.networkReady(t).Status })
	if p := n.pod(t); !n.has(p.ip()) {
		t.Errorf("got address %s, want one in %s", p.ip(), n.subnet)
	}
}

package cri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/test/leak"
)

func itoa(n int) string { return strconv.Itoa(n) }

// odd are bytes that a runtime might be tempted to change.
var odd = map[string]string{"a": "", "io.kubernetes.pod.name": "x y", "quote": `"'\`, "lines": "1\n2\t3", "utf8": "ä€𝄞", "long": strings.Repeat("z", 8000), "": "empty key"}

func TestPodComesAndGoes(t *testing.T) {
	w := need(t)
	p := w.pod(t, func(c *runtimeapi.PodSandboxConfig) {
		c.Metadata.Attempt = 3
		c.Labels, c.Annotations = odd, odd
	})
	st := p.status()
	if st.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Errorf("got %v, want READY", st.State)
	}
	if !proto.Equal(st.Metadata, p.cfg.Metadata) {
		t.Errorf("metadata: got %v, want %v", st.Metadata, p.cfg.Metadata)
	}
	for name, got := range map[string]map[string]string{"labels": st.Labels, "annotations": st.Annotations} {
		wantSameMap(t, name, got, odd)
	}
	if got, want := st.GetLinux().GetNamespaces().GetOptions(), p.cfg.Linux.SecurityContext.NamespaceOptions; !proto.Equal(got, want) {
		t.Errorf("namespace options: got %v, want %v", got, want)
	}
	if age := time.Since(time.Unix(0, st.CreatedAt)); age < 0 || age > time.Minute {
		t.Errorf("created %v ago", age)
	}
	if st.Network == nil || st.Network.Ip == "" {
		t.Errorf("network: got %v, want an address (without one the kubelet makes another pod)", st.Network)
	}

	if err := w.rt.StopPodSandbox(t.Context(), p.id); err != nil {
		t.Fatal(err)
	}
	st = p.status()
	if st.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("after stop: got %v, want NOTREADY", st.State)
	}
	wantSameMap(t, "labels after stop", st.Labels, odd)
	_, err := p.tryCreate([]string{"sleep"})
	wantCode(t, err, codes.FailedPrecondition, p.id)

	if err := w.rt.RemovePodSandbox(t.Context(), p.id); err != nil {
		t.Fatal(err)
	}
	_, err = w.rt.PodSandboxStatus(t.Context(), p.id, false)
	wantCode(t, err, codes.NotFound, p.id)
}

func wantSameMap(t *testing.T, what string, got, want map[string]string) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%s: got %d entries, want %d", what, len(got), len(want))
	}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s: %q is %q, want %q", what, k, got[k], v)
		}
	}
}

func TestPodStatusVerboseHasInfo(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	r, err := w.rt.PodSandboxStatus(t.Context(), p.id, true)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Info) == 0 {
		t.Error("no info")
	}
	if r, err = w.rt.PodSandboxStatus(t.Context(), p.id, false); err != nil || len(r.Info) != 0 {
		t.Errorf("got %v, %v; want no info without verbose", r.GetInfo(), err)
	}
}

func TestStopAndRemoveOfUnknownPodsSucceed(t *testing.T) {
	w := need(t)
	const nobody = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	if err := w.rt.StopPodSandbox(t.Context(), nobody); err != nil {
		t.Errorf("StopPodSandbox: %v", err)
	}
	if err := w.rt.RemovePodSandbox(t.Context(), nobody); err != nil {
		t.Errorf("RemovePodSandbox: %v", err)
	}
	_, err := w.rt.PodSandboxStatus(t.Context(), nobody, false)
	wantCode(t, err, codes.NotFound, nobody)
}

func TestStopAndRemoveArePossibleTwice(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	for range 2 {
		if err := w.rt.StopPodSandbox(t.Context(), p.id); err != nil {
			t.Errorf("StopPodSandbox: %v", err)
		}
	}
	for range 2 {
		if err := w.rt.RemovePodSandbox(t.Context(), p.id); err != nil {
			t.Errorf("RemovePodSandbox: %v", err)
		}
	}
}

func TestStopPodEndsItsContainersAtOnce(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	a, b := p.run([]string{"ignore"}), p.run([]string{"ignore"}) // they would outlast any grace
	a.says("ready")
	b.says("ready")
	start := time.Now()
	if err := w.rt.StopPodSandbox(t.Context(), p.id); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("took %v: it waited for a grace", d)
	}
	for _, c := range []*container{a, b} {
		st := c.status()
		if st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.ExitCode != 137 {
			t.Errorf("got %v, exit code %d; want EXITED, 137", st.State, st.ExitCode)
		}
	}
}

func TestRemovePodTakesARunningPodAway(t *testing.T) {
	w := need(t)
	w.leavesNothing(t, func() {
		p := w.pod(t)
		c := p.run([]string{"ignore"})
		c.says("ready")
		if err := w.rt.RemovePodSandbox(t.Context(), p.id); err != nil {
			t.Fatal(err)
		}
		_, err := w.rt.ContainerStatus(t.Context(), c.id, false)
		wantCode(t, err, codes.NotFound)
		p.remove()
	})
}

func TestPodsAreListedByFilter(t *testing.T) {
	w := need(t)
	a := w.pod(t, func(c *runtimeapi.PodSandboxConfig) { c.Labels = map[string]string{"app": "a", "both": w.Tag} })
	b := w.pod(t, func(c *runtimeapi.PodSandboxConfig) { c.Labels = map[string]string{"app": "b", "both": w.Tag} })
	if err := w.rt.StopPodSandbox(t.Context(), b.id); err != nil {
		t.Fatal(err)
	}
	ready := &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY}
	notReady := &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_NOTREADY}
	for _, c := range []struct {
		name   string
		filter *runtimeapi.PodSandboxFilter
		want   []string
	}{
		{"none", nil, []string{a.id, b.id}},
		{"empty", &runtimeapi.PodSandboxFilter{}, []string{a.id, b.id}},
		{"id", &runtimeapi.PodSandboxFilter{Id: a.id}, []string{a.id}},
		{"short id", &runtimeapi.PodSandboxFilter{Id: a.id[:13]}, []string{a.id}},
		{"unknown id", &runtimeapi.PodSandboxFilter{Id: "ffffffffffff"}, nil},
		{"ready", &runtimeapi.PodSandboxFilter{State: ready}, []string{a.id}},
		{"not ready", &runtimeapi.PodSandboxFilter{State: notReady}, []string{b.id}},
		{"label", &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"app": "b"}}, []string{b.id}},
		{"two labels", &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"app": "a", "both": w.Tag}}, []string{a.id}},
		{"a label that differs", &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"app": "a", "both": "x"}}, nil},
		{"id and state that contradict", &runtimeapi.PodSandboxFilter{Id: a.id, State: notReady}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			list, err := w.rt.ListPodSandbox(t.Context(), c.filter)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]*runtimeapi.PodSandbox{}
			for _, p := range list {
				got[p.Id] = p
			}
			for _, p := range []*pod{a, b} {
				var want bool
				for _, id := range c.want {
					want = want || id == p.id
				}
				if (got[p.id] != nil) != want {
					t.Errorf("pod %v listed: %t, want %t", p.cfg.Labels, got[p.id] != nil, want)
				}
			}
			if one := got[a.id]; one != nil && (!proto.Equal(one.Metadata, a.cfg.Metadata) || one.CreatedAt == 0 || one.Labels["app"] != "a") {
				t.Errorf("got %v", one)
			}
		})
	}
}

func TestPodIsFoundByShortID(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	r, err := w.rt.PodSandboxStatus(t.Context(), p.id[:13], false)
	if err != nil {
		t.Fatal(err)
	}
	if r.Status.Id != p.id {
		t.Errorf("got %s, want %s", r.Status.Id, p.id)
	}
}

func TestCreationTimesIncrease(t *testing.T) {
	w := need(t)
	var last int64
	for range 5 {
		p := w.pod(t)
		if at := p.status().CreatedAt; at <= last {
			t.Errorf("pod created at %d, the one before at %d", at, last)
		} else {
			last = at
		}
	}
	p := w.pod(t)
	for range 5 {
		if at := p.create([]string{"sleep"}).status().CreatedAt; at <= last {
			t.Errorf("container created at %d, what was before at %d", at, last)
		} else {
			last = at
		}
	}
}

func TestCallsForOnePodJoin(t *testing.T) {
	w := need(t)
	cfg := w.podConfig("joined")
	var wg sync.WaitGroup
	ids, errs := make([]string, 8), make([]error, 8)
	for i := range ids {
		wg.Go(func() { ids[i], errs[i] = w.rt.RunPodSandbox(t.Context(), cfg, "") })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Errorf("RunPodSandbox: %v", err)
	}
	made := map[string]bool{}
	for _, id := range ids {
		if id != "" {
			made[id] = true
		}
	}
	if len(made) != 1 {
		t.Errorf("got %d pods, want one", len(made))
	}
	for id := range made {
		w.adopt(t, id, cfg).remove()
	}
}

func TestCallThatTheCallerGaveUpIsJoinedByTheNext(t *testing.T) {
	w := need(t)
	for _, after := range []time.Duration{0, time.Millisecond, 3 * time.Millisecond, 10 * time.Millisecond} {
		cfg := w.podConfig("given-up")
		ctx, cancel := context.WithTimeout(t.Context(), after)
		_, err := w.rt.RunPodSandbox(ctx, cfg, "")
		cancel()
		if err != nil && status.Code(err) != codes.DeadlineExceeded && status.Code(err) != codes.Canceled {
			t.Errorf("after %v: got %v, want DeadlineExceeded", after, err)
		}
		id, err := w.rt.RunPodSandbox(t.Context(), cfg, "")
		if err != nil {
			t.Errorf("after %v: the next call failed: %v", after, err)
			continue
		}
		list, err := w.rt.ListPodSandbox(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		var n int
		for _, p := range list {
			if p.Metadata.Uid == cfg.Metadata.Uid {
				n++
			}
		}
		if n != 1 {
			t.Errorf("after %v: got %d pods, want one", after, n)
		}
		w.adopt(t, id, cfg).remove()
	}
}

func TestAnotherAttemptIsAnotherPod(t *testing.T) {
	w := need(t)
	a := w.pod(t)
	b := w.pod(t, func(c *runtimeapi.PodSandboxConfig) {
		c.Metadata = proto.CloneOf(a.cfg.Metadata)
		c.Metadata.Attempt++
	})
	if a.id == b.id {
		t.Error("two attempts, one pod")
	}
}

func TestBadPodsAreRefusedBeforeAnyEffect(t *testing.T) {
	w := need(t)
	for _, c := range []struct {
		name    string
		edit    editPod
		handler string
		code    codes.Code
		says    string
	}{
		{"no metadata", func(c *runtimeapi.PodSandboxConfig) { c.Metadata = nil }, "", codes.InvalidArgument, "metadata"},
		{"no name", func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Name = "" }, "", codes.InvalidArgument, "name"},
		{"no namespace", func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Namespace = "" }, "", codes.InvalidArgument, "namespace"},
		{"no uid", func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Uid = "" }, "", codes.InvalidArgument, "uid"},
		{"unknown handler", func(*runtimeapi.PodSandboxConfig) {}, "no-such", codes.InvalidArgument, "no-such"},
		{"log directory with ..", func(c *runtimeapi.PodSandboxConfig) { c.LogDirectory = w.LogDir + "/../../x" }, "", codes.InvalidArgument, "log"},
		{"relative log directory", func(c *runtimeapi.PodSandboxConfig) { c.LogDirectory = "logs" }, "", codes.InvalidArgument, "log"},
		{"NUL in the log directory", func(c *runtimeapi.PodSandboxConfig) { c.LogDirectory += "\x00" }, "", codes.InvalidArgument, "log"},
		{"cgroup parent that leads out", func(c *runtimeapi.PodSandboxConfig) { c.Linux.CgroupParent = "/../../x" }, "", codes.InvalidArgument, "cgroup"},
		{"hostname too long", func(c *runtimeapi.PodSandboxConfig) { c.Hostname = strings.Repeat("a", 65) }, "", codes.InvalidArgument, "hostname"},
		{"hostname with a newline", func(c *runtimeapi.PodSandboxConfig) { c.Hostname = "a\nb" }, "", codes.InvalidArgument, "hostname"},
		{"resolver that is no address", func(c *runtimeapi.PodSandboxConfig) {
			c.DnsConfig = &runtimeapi.DNSConfig{Servers: []string{"1.2.3.4\nnameserver 6.6.6.6"}}
		}, "", codes.InvalidArgument, "dns"},
		{"sysctl of the host", sysctls("kernel.panic", "1"), "", codes.InvalidArgument, "kernel.panic"},
		{"sysctl with a smuggled one", sysctls("kernel.shm_rmid_forced", "1+kernel.core_pattern=|/x"), "", codes.InvalidArgument, "shm_rmid_forced"},
		{"sysctl that leads out", sysctls("net/../kernel/core_pattern", "x"), "", codes.InvalidArgument, "core_pattern"},
		{"vm sysctl", sysctls("vm.swappiness", "1"), "", codes.InvalidArgument, "vm.swappiness"},
		{"hostname by sysctl", sysctls("kernel.hostname", "x"), "", codes.InvalidArgument, "kernel.hostname"},
		{"net sysctl with the host's network", func(c *runtimeapi.PodSandboxConfig) {
			sysctls("net.ipv4.ip_forward", "1")(c)
			c.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
		}, "", codes.InvalidArgument, "net.ipv4.ip_forward"},
		{"shm sysctl with the host's IPC", func(c *runtimeapi.PodSandboxConfig) {
			sysctls("kernel.shmmax", "1")(c)
			c.Linux.SecurityContext.NamespaceOptions.Ipc = runtimeapi.NamespaceMode_NODE
		}, "", codes.InvalidArgument, "kernel.shmmax"},
		{"network namespace of a container", func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_CONTAINER
		}, "", codes.InvalidArgument, "network"},
		{"host port out of range", func(c *runtimeapi.PodSandboxConfig) {
			c.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: 70000}}
		}, "", codes.InvalidArgument, "70000"},
		{"host port with a bad address", func(c *runtimeapi.PodSandboxConfig) {
			c.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: 8080, HostIp: "x"}}
		}, "", codes.InvalidArgument, "x"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := w.podConfig("bad")
			c.edit(cfg)
			w.leavesNothing(t, func() {
				r, err := w.CRI.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: cfg, RuntimeHandler: c.handler})
				wantCode(t, err, c.code)
				if err != nil && !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(c.says)) {
					t.Errorf("got %q, want it to say %q", err, c.says)
				}
				if err == nil {
					w.adopt(t, r.PodSandboxId, cfg).remove()
				}
			})
		})
	}
}

func sysctls(key, value string) editPod {
	return func(c *runtimeapi.PodSandboxConfig) { c.Linux.Sysctls = map[string]string{key: value} }
}

func TestSysctlsAreThePodsOwn(t *testing.T) {
	w := need(t)
	host := readFile(t, "/proc/sys/kernel/shm_rmid_forced")
	p := w.pod(t, func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "40000 50000", "fs.mqueue.msg_max": "37"}
	})
	c := p.run([]string{"sleep"})
	for file, want := range map[string]string{
		"kernel/shm_rmid_forced": "1\n", "net/ipv4/ip_local_port_range": "40000\t50000\n", "fs/mqueue/msg_max": "37\n",
		// Of pods with their own network (containerd's, reliability-and-security D1).
		"net/ipv4/ip_unprivileged_port_start": "0\n", "net/ipv4/ping_group_range": "0\t2147483647\n",
	} {
		if got := c.exec("cat", "/proc/sys/"+file); got != want {
			t.Errorf("%s: got %q, want %q", file, got, want)
		}
	}
	if got := readFile(t, "/proc/sys/kernel/shm_rmid_forced"); got != host {
		t.Errorf("the host's kernel.shm_rmid_forced changed from %q to %q", host, got)
	}
}

func TestCgroupParentOfTheKubelet(t *testing.T) {
	w := need(t)
	parent := w.Cgroups + "/kubepods/burstable/pod" + w.Tag
	trees, err := leak.Hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	for _, tree := range trees { // the kubelet makes it
		if err := os.MkdirAll(tree+parent, 0o755); err != nil {
			t.Fatal(err)
		}
		if cpus, err := os.ReadFile(filepath.Join(tree, "cpuset.cpus")); err == nil { // a new v1 cpuset is empty
			mems, err := os.ReadFile(filepath.Join(tree, "cpuset.mems"))
			if err != nil {
				t.Fatal(err)
			}
			for _, level := range []string{"", "/kubepods", "/kubepods/burstable", "/kubepods/burstable/pod" + w.Tag} {
				fill(t, tree+w.Cgroups+level, "cpuset.cpus", cpus)
				fill(t, tree+w.Cgroups+level, "cpuset.mems", mems)
			}
		}
	}
	t.Cleanup(func() { // and removes it
		for _, tree := range trees {
			for _, dir := range []string{parent, w.Cgroups + "/kubepods/burstable", w.Cgroups + "/kubepods"} {
				if err := os.Remove(tree + dir); err != nil {
					t.Error(err)
				}
			}
		}
	})
	p := w.pod(t, func(c *runtimeapi.PodSandboxConfig) { c.Linux.CgroupParent = parent })
	c := p.run([]string{"sleep"})
	for _, dir := range c.cgroups() {
		if !strings.Contains(dir, parent+"/") {
			t.Errorf("container's cgroup %s is not below %s", dir, parent)
		}
	}
	if len(c.cgroups()) < len(trees)-1 {
		t.Errorf("the container has %d cgroups, there are %d hierarchies", len(c.cgroups()), len(trees))
	}
	p.remove()
	for _, tree := range trees {
		entries, err := filepath.Glob(tree + parent + "/*/")
		if err != nil || len(entries) > 0 {
			t.Errorf("left in the kubelet's cgroup: %v %v", entries, err)
		}
		if _, err := os.Stat(tree + parent); err != nil {
			t.Errorf("the kubelet's own cgroup is gone: %v", err)
		}
	}
}

func fill(t *testing.T, dir, name string, value []byte) {
	t.Helper()
	if now, err := os.ReadFile(filepath.Join(dir, name)); err == nil && strings.TrimSpace(string(now)) != "" {
		return
	}
	if err := os.WriteFile(filepath.Join(dir, name), value, 0); err != nil {
		t.Fatal(err)
	}
}

func TestManyPodsAtOnce(t *testing.T) {
	w := need(t)
	const n = 20
	many := func() {
		cfgs := make([]*runtimeapi.PodSandboxConfig, n)
		for i := range cfgs {
			cfgs[i] = w.podConfig(fmt.Sprintf("many-%d", i))
		}
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() {
				if err := w.life(t.Context(), cfgs[i]); err != nil {
					t.Errorf("pod %d: %v", i, err)
				}
			})
		}
		wg.Wait()
	}
	many() // Go keeps the threads that so many calls at once need
	w.leavesNothing(t, many)
}

// life is a whole pod: two containers, one asked something, all removed. It is safe for concurrent use.
func (w *world) life(ctx context.Context, cfg *runtimeapi.PodSandboxConfig) (err error) {
	id, err := w.rt.RunPodSandbox(ctx, cfg, "")
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, w.rt.StopPodSandbox(ctx, id), w.rt.RemovePodSandbox(ctx, id), os.RemoveAll(cfg.LogDirectory))
	}()
	for _, name := range []string{"a", "b"} {
		c, err := w.rt.CreateContainer(ctx, id, w.containerConfig(name, "sleep"), cfg)
		if err != nil {
			return err
		}
		if err := w.rt.StartContainer(ctx, c); err != nil {
			return err
		}
		out, _, err := w.rt.ExecSync(ctx, c, []string{"/payload", "hostname"}, 20*time.Second)
		if err != nil {
			return err
		}
		if string(out) != cfg.Hostname+"\n" {
			return fmt.Errorf("hostname %q, want %q", out, cfg.Hostname)
		}
	}
	return nil
}

// TestPodCyclesLeaveNothing runs -cycles pods (500 for the long version), four at a time.
func TestPodCyclesLeaveNothing(t *testing.T) {
	w := need(t)
	w.leavesNothing(t, func() {
		work := make(chan *runtimeapi.PodSandboxConfig)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for cfg := range work {
					if err := w.life(t.Context(), cfg); err != nil {
						t.Error(err)
					}
				}
			})
		}
		for range *cycles {
			work <- w.podConfig("cycle")
		}
		close(work)
		wg.Wait()
	})
}

package podsandbox

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/network/netns"
	"github.com/crisp-cri/crisp/runtime/cgroup"
	"github.com/crisp-cri/crisp/runtime/spawn"
)

// The spawner keeps a thread in a mount namespace of its own. Were that the main thread, /proc/self/mountinfo would be
// that namespace's: keep everybody off it.
func init() { runtime.LockOSThread() }

// node is a Manager over the real kernel: spawner, cgroups and namespaces are real, the network and the images
// are fakes. Everything is its own: directories, cgroup root, directory of namespaces.
type node struct {
	*Manager
	t     testing.TB
	cfg   Config
	lower string
	logs  string
	spawn *spawn.Spawner
}

func newNode(t testing.TB) *node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes namespaces, mounts and cgroups")
	}
	dir := t.TempDir()
	built := filepath.Join(dir, "built")
	lower := filepath.Join(dir, "layer")
	if err := os.MkdirAll(filepath.Join(lower, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	goBuild(t, filepath.Join(built, "crisp-init"), "../cmd/crisp-init")
	goBuild(t, filepath.Join(lower, "bin/payload"), "../test/payload")
	s, err := spawn.New(filepath.Join(built, "crisp-init"), filepath.Join(dir, "scratch"))
	if err != nil {
		t.Fatal(err)
	}
	root := "/crisp-podsandbox-" + newID()[:8]
	driver, err := cgroup.New(t.Context(), cgroup.Config{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	ns, err := netns.OpenDir(filepath.Join(dir, "netns"))
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, lower: lower, logs: filepath.Join(dir, "logs"), spawn: s, cfg: Config{
		StateDir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run"),
		Spawner: FromSpawn(s), Cgroups: FromCgroup(driver), NetNS: ns,
		Images: newFakeImages(lower), Network: newFakeNetwork(),
	}}
	t.Cleanup(func() {
		for _, p := range n.Pods() {
			if err := n.RemovePod(context.Background(), p.ID); err != nil {
				t.Error(err)
			}
		}
		n.stop()
		if left, err := driver.Children(root); err != nil || len(left) > 0 {
			t.Errorf("cgroups left below %s: %v, %v", root, left, err)
		}
		if err := errors.Join(s.Close(), ns.Close(), driver.Close()); err != nil {
			t.Error(err)
		}
		removeRoot(t, root)
		if err := unix.Unmount(filepath.Join(dir, "netns"), unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	n.start()
	return n
}

// removeRoot removes the cgroup root, which the driver keeps.
func removeRoot(t testing.TB, root string) {
	trees, err := filepath.Glob("/sys/fs/cgroup/*" + root)
	if err != nil {
		t.Error(err)
	}
	for _, d := range append(trees, "/sys/fs/cgroup"+root) {
		if err := os.Remove(d); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	}
}

func goBuild(t testing.TB, out, dir string) {
	t.Helper()
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if flags := os.Getenv("CRISP_TEST_BUILDFLAGS"); flags != "" {
		cmd.Env = append(cmd.Env, "GOFLAGS="+flags)
	}
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build %s: %v\n%s", dir, err, b)
	}
}

func (n *node) start() {
	n.t.Helper()
	var err error
	if n.Manager, err = NewManager(n.cfg); err != nil {
		n.t.Fatal(err)
	}
	if err := n.Recover(context.Background()); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) stop() {
	n.t.Helper()
	if err := n.Close(); err != nil {
		n.t.Error(err)
	}
}

func (n *node) pod(change func(*PodConfig)) *Pod {
	n.t.Helper()
	c := &PodConfig{
		Identity: Identity{Name: "pod", Namespace: "test", UID: newID()[:8]},
		Hostname: "pod-host", LogDirectory: n.logs,
		Network: NamespacePod, PID: NamespaceContainer, IPC: NamespacePod,
		DNS: DNSConfig{Servers: []string{"192.0.2.1"}},
	}
	if change != nil {
		change(c)
	}
	id, err := n.RunPod(context.Background(), c)
	if err != nil {
		n.t.Fatal(err)
	}
	p, err := n.Pod(id)
	if err != nil {
		n.t.Fatal(err)
	}
	return p
}

func (n *node) container(p *Pod, change func(*ContainerConfig), args ...string) string {
	n.t.Helper()
	id, err := n.tryContainer(p, change, args...)
	if err != nil {
		n.t.Fatal(err)
	}
	return id
}

func (n *node) tryContainer(p *Pod, change func(*ContainerConfig), args ...string) (string, error) {
	caps := []string{"CAP_CHOWN", "CAP_KILL"}
	c := &ContainerConfig{
		Name: "c-" + newID()[:8], ImageID: "sha256:image", LogPath: "c/0.log", PID: p.Config.PID,
		Spec: &specs.Spec{
			Root: &specs.Root{},
			Process: &specs.Process{Args: append([]string{"/bin/payload"}, args...), Cwd: "/", Env: []string{"PATH=/bin"},
				Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}},
			Mounts: []specs.Mount{
				{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
				{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755"}},
				{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			},
			Linux: &specs.Linux{Resources: &specs.LinuxResources{}, Devices: []specs.LinuxDevice{{Path: "/dev/null", Type: "c", Major: 1, Minor: 3}}},
		},
	}
	if change != nil {
		change(c)
	}
	return n.CreateContainer(context.Background(), p.ID, c)
}

// state waits until a container is in state.
func (n *node) state(id string, want ContainerState) *Container {
	n.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		c, err := n.Container(id)
		if err != nil {
			n.t.Fatal(err)
		}
		if c.State == want {
			return c
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("container is %s (%s, %s), want %s", c.State, c.Reason, c.Message, want)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func TestRootLife(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	p := n.pod(nil)
	t.Logf("pod: %v", p.Timings)
	if p.State != PodReady || p.InitPID == 0 || len(p.IPs) != 1 {
		t.Errorf("got pod %+v", p)
	}
	id := n.container(p, nil, "echo", "hello", ",", "sleep")
	if err := n.StartContainer(ctx, id); err != nil {
		t.Fatal(err)
	}
	c := n.state(id, ContainerRunning)
	t.Logf("container: %v", c.Timings)
	r, err := n.ExecSync(ctx, id, []string{"/bin/payload", "echo", "from exec"}, 10*time.Second)
	if err != nil || string(r.Stdout) != "from exec\n" || r.ExitCode != 0 {
		t.Errorf("got exec %+v, %v", r, err)
	}
	if _, err := n.ExecSync(ctx, id, []string{"/bin/payload", "sleep"}, 50*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got exec %v, want a deadline", err)
	}
	if s, err := n.ContainerStats(id); err != nil || s.Cgroup.Pids.Current == 0 {
		t.Errorf("got stats %+v, %v", s, err)
	}
	began := time.Now()
	if err := n.StopContainer(ctx, id, 30*time.Second); err != nil {
		t.Fatal(err)
	}
	t.Logf("stop took %v", time.Since(began))
	if c = n.state(id, ContainerExited); c.FinishedAt.Before(c.StartedAt) {
		t.Errorf("got %+v", c)
	}
	log, err := os.ReadFile(c.LogPath)
	if err != nil || !strings.Contains(string(log), " stdout F hello\n") {
		t.Errorf("got log %q, %v", log, err)
	}
	if err := n.RemovePod(ctx, p.ID); err != nil {
		t.Fatal(err)
	}
	if l := n.Containers(); len(l) > 0 {
		t.Errorf("containers left: %v", l)
	}
	n.empty()
}

// empty checks that nothing is left on disk.
func (n *node) empty() {
	n.t.Helper()
	for _, d := range []string{n.cfg.StateDir, n.cfg.RunDir} {
		if l, err := os.ReadDir(filepath.Join(d, podsDir)); err != nil || len(l) > 0 {
			n.t.Errorf("left in %s: %v, %v", d, l, err)
		}
	}
	if l, err := n.cfg.NetNS.List(""); err != nil || len(l) > 0 {
		n.t.Errorf("network namespaces left: %v, %v", l, err)
	}
}

func TestRootRestart(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	p := n.pod(nil)
	running := n.container(p, nil, "sleep")
	created := n.container(p, nil, "sleep")
	exits := n.container(p, nil, "exit", "7")
	for _, id := range []string{running, exits} {
		if err := n.StartContainer(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	n.state(exits, ContainerExited)
	before := n.state(running, ContainerRunning)
	n.stop()
	n.start()
	q, err := n.Pod(p.ID)
	if err != nil || q.State != PodReady || q.InitPID != p.InitPID || q.IPs[0] != p.IPs[0] {
		t.Errorf("got pod %+v, %v", q, err)
	}
	if c := n.state(running, ContainerRunning); c.PID != before.PID || !c.StartedAt.Equal(before.StartedAt) {
		t.Errorf("got %+v, want %+v", c, before)
	}
	if c := n.state(exits, ContainerExited); c.ExitCode != 7 || c.Reason != reasonError {
		t.Errorf("got %+v", c)
	}
	if err := n.StartContainer(ctx, created); err != nil {
		t.Fatal(err)
	}
	r, err := n.ExecSync(ctx, created, []string{"/bin/payload", "true"}, 0)
	if err != nil {
		t.Errorf("got exec %+v, %v", r, err)
	}
	// While nobody looks, one container dies, and then the init.
	n.stop()
	if err := unix.Kill(before.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	n.start()
	if c := n.state(running, ContainerExited); c.ExitCode != 137 {
		t.Errorf("got %+v", c)
	}
	if err := unix.Kill(q.InitPID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if c := n.state(created, ContainerExited); c.ExitCode != 137 || c.Reason != reasonInitDied {
		t.Errorf("got %+v", c)
	}
	if q, err = n.Pod(p.ID); err != nil || q.State != PodNotReady || q.Reason != reasonInitDied {
		t.Errorf("got pod %+v, %v", q, err)
	}
}

func limited(bytes int64) func(*ContainerConfig) {
	return func(c *ContainerConfig) {
		c.Spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &bytes}
	}
}

// C-52
func TestRootOutOfMemory(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	p := n.pod(nil)
	id := n.container(p, limited(32<<20), "oom")
	if err := n.StartContainer(ctx, id); err != nil {
		t.Fatal(err)
	}
	if c := n.state(id, ContainerExited); c.Reason != reasonOOMKilled || c.ExitCode != 137 {
		t.Errorf("got %+v", c)
	}
	// Too little to begin with: an error that says so, not a hang.
	small, err := n.tryContainer(p, limited(16<<10), "sleep")
	if err == nil {
		err = n.StartContainer(ctx, small)
	}
	if err == nil || !strings.Contains(err.Error(), "16384 bytes is too low") {
		t.Errorf("got %v", err)
	}
	if err := n.RemovePod(ctx, p.ID); err != nil {
		t.Error(err)
	}
	n.empty()
}

// C-5A: without a PID namespace of its own nothing of a container outlives it either.
func TestRootHostPID(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	p := n.pod(func(c *PodConfig) { c.PID = NamespaceNode })
	stopped, ends := n.container(p, nil, "fork", "3", ",", "sleep"), n.container(p, nil, "fork", "3", ",", "sleep", "1", ",", "exit", "4")
	for _, id := range []string{stopped, ends} {
		if err := n.StartContainer(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	procs := func(id string) []int {
		c, err := n.Container(id)
		if err != nil {
			t.Fatal(err)
		}
		pids, err := n.cfg.Cgroups.Open(c.CgroupPath).Procs()
		if err != nil && !errors.Is(err, cgroup.ErrNotFound) {
			t.Error(err)
		}
		return pids
	}
	for deadline := time.Now().Add(10 * time.Second); len(procs(stopped)) < 4 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	if err := n.StopContainer(ctx, stopped, time.Minute); err != nil {
		t.Error(err)
	}
	if c := n.state(ends, ContainerExited); c.ExitCode != 4 {
		t.Errorf("got %+v", c)
	}
	for _, id := range []string{stopped, ends} {
		if l := procs(id); len(l) > 0 {
			t.Errorf("processes are left: %v", l)
		}
	}
	if err := n.RemovePod(ctx, p.ID); err != nil {
		t.Error(err)
	}
	n.empty()
}

// C-55: a stopped pod init is not needed to get rid of its pod.
func TestRootInitHangs(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	n.patience = 300 * time.Millisecond
	p := n.pod(nil)
	id := n.container(p, nil, "sleep")
	if err := n.StartContainer(ctx, id); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(p.InitPID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := n.StopContainer(ctx, id, 0); err != nil {
		t.Error(err)
	}
	if c := n.state(id, ContainerExited); c.ExitCode != 137 {
		t.Errorf("got %+v", c)
	}
	if err := n.RemovePod(ctx, p.ID); err != nil {
		t.Error(err)
	}
	n.empty()
}

// SEC-93, and: what the command left behind lives on, until its container ends.
func TestRootExecBackground(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	p := n.pod(nil)
	id := n.container(p, nil, "sleep")
	if err := n.StartContainer(ctx, id); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	r, err := n.ExecSync(ctx, id, []string{"/bin/payload", "daemonize"}, time.Minute)
	if err != nil || r.ExitCode != 0 {
		t.Errorf("got %+v, %v", r, err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("took %v", took)
	}
	c, err := n.Container(id)
	if err != nil {
		t.Fatal(err)
	}
	if l, err := n.cfg.Cgroups.Open(c.CgroupPath).Procs(); err != nil || len(l) != 2 {
		t.Errorf("got processes %v, %v, want the container's and the one left behind", l, err)
	}
	if err := n.RemovePod(ctx, p.ID); err != nil {
		t.Error(err)
	}
	n.empty()
}

// BenchmarkRootLife is a pod with one container, without network and images: p50 of each part.
func BenchmarkRootLife(b *testing.B) {
	n := newNode(b)
	ctx := context.Background()
	parts := map[string][]time.Duration{}
	measure := func(name string, f func() error) {
		began := time.Now()
		if err := f(); err != nil {
			b.Fatal(name, err)
		}
		parts[name] = append(parts[name], time.Since(began))
	}
	steps := map[string][]time.Duration{}
	note := func(what string, l []Timing) {
		for _, s := range l {
			steps[what+"/"+s.Step] = append(steps[what+"/"+s.Step], s.Duration)
		}
	}
	for b.Loop() {
		var pod *Pod
		var id string
		measure("run", func() error { pod = n.pod(nil); return nil })
		note("run", pod.Timings)
		measure("create", func() error { id = n.container(pod, nil, "sleep"); return nil })
		c, err := n.Container(id)
		if err != nil {
			b.Fatal(err)
		}
		note("create", c.Timings)
		measure("start", func() error { return n.StartContainer(ctx, id) })
		measure("exec", func() error { _, err := n.ExecSync(ctx, id, []string{"/bin/payload", "true"}, 0); return err })
		measure("stop", func() error { return n.StopContainer(ctx, id, time.Minute) })
		measure("remove", func() error { return n.RemoveContainer(ctx, id) })
		measure("stoppod", func() error { return n.StopPod(ctx, pod.ID) })
		measure("removepod", func() error { return n.RemovePod(ctx, pod.ID) })
	}
	for _, m := range []map[string][]time.Duration{parts, steps} {
		for name, l := range m {
			slices.Sort(l)
			b.ReportMetric(float64(l[len(l)/2].Microseconds()), strings.ReplaceAll(name, " ", "-")+"-p50-µs")
		}
	}
}

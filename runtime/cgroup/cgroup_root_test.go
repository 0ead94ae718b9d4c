package cgroup

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestLifecycle(t *testing.T) {
	eachLayout(t, func(t *testing.T, d *Driver) {
		pod := newPod(t, d)
		if created, err := d.CreatePod(t.Context(), pod); err != nil || created {
			t.Errorf("second CreatePod: created %v, %v", created, err)
		}
		c := newContainer(t, d, pod, "c", nil)
		p := start(t, join(t, c, ByBirth), "wait")
		if pids, err := c.Procs(); err != nil || !slices.Equal(pids, []int{p.Process.Pid}) {
			t.Errorf("Procs: %v, %v, want %d", pids, err, p.Process.Pid)
		}
		// In every hierarchy, not only the tracking one.
		own, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(own), c.Path()+"\n"); n != len(d.trees) {
			t.Errorf("process is in the cgroup in %d hierarchies, want %d:\n%s", n, len(d.trees), own)
		}

		if err := c.Remove(t.Context()); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), fmt.Sprint(p.Process.Pid)) {
			t.Errorf("Remove of a cgroup with a process: %v, want ErrBusy naming %d", err, p.Process.Pid)
		}
		if err := d.RemovePod(t.Context(), pod); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "crisp-c") {
			t.Errorf("RemovePod with a child: %v, want ErrBusy naming it", err)
		}
		if err := c.Kill(deadline(t, 10*time.Second)); err != nil {
			t.Fatal(err)
		}
		p.killed(t)
		for range 2 {
			if err := errors.Join(c.Kill(t.Context()), c.Remove(t.Context()), d.RemovePod(t.Context(), pod)); err != nil {
				t.Fatal(err)
			}
		}
		gone(t, d, pod)
	})
}

func TestKillForkingTree(t *testing.T) {
	eachLayout(t, func(t *testing.T, d *Driver) {
		c := newContainer(t, d, newPod(t, d), "c", nil)
		p := start(t, join(t, c, ByBirth), "forker", "2", "say ready")
		if err := c.Kill(deadline(t, 20*time.Second)); err != nil {
			t.Fatal(err)
		}
		p.killed(t)
		if pids, err := c.Procs(); err != nil || len(pids) > 0 {
			t.Errorf("after Kill: processes %v, %v", pids, err)
		}
		if err := c.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// C-59: somebody froze it, perhaps a cgroup that the container made below.
func TestKillFrozen(t *testing.T) {
	eachLayout(t, func(t *testing.T, d *Driver) {
		c := newContainer(t, d, newPod(t, d), "c", nil)
		p := start(t, join(t, c, ByBirth), "wait")
		if f := d.home("freezer"); f != absent {
			if err := d.kernel.write(f, c.file("freezer.state"), "FROZEN"); err != nil {
				t.Fatal(err)
			}
		}
		if u := d.unified(); u != absent {
			if err := d.kernel.write(u, c.file("cgroup.freeze"), "1"); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Kill(deadline(t, 10*time.Second)); err != nil {
			t.Fatal(err)
		}
		p.killed(t)
	})
}

// While a pod's init clones into a v1 cgroup, one of its threads is in it, and cgroup.procs has the whole init.
func TestKillSparesAVisitor(t *testing.T) {
	l, ok := trackOnly(t)["legacy"]
	if !ok {
		t.Skip("needs v1 hierarchies: v2 has no threads elsewhere")
	}
	d := testDriverOf(t, l)
	pod := newPod(t, d)
	home, c := newContainer(t, d, pod, "init", nil), newContainer(t, d, pod, "c", nil)
	p := start(t, join(t, c, ByBirth), "wait")
	dir := l.trees[l.tracker()].dir
	visitor := start(t, join(t, home, ByBirth), "visit", filepath.Join(dir, c.path, "tasks"), filepath.Join(dir, home.path, "tasks"))
	if pids, err := c.Procs(); err != nil || !slices.Contains(pids, visitor.Process.Pid) {
		t.Fatalf("in the cgroup: %v, %v; the visitor is not there, the test proves nothing", pids, err)
	}
	killed := make(chan error, 1)
	go func() { killed <- c.Kill(deadline(t, 20*time.Second)) }()
	p.killed(t)
	if _, err := io.WriteString(visitor.in, "\n"); err != nil { // it goes home
		t.Fatal(err)
	}
	visitor.expect(t, "ready")
	if err := <-killed; err != nil {
		t.Error(err)
	}
}

func TestKillDeadlineNamesProcesses(t *testing.T) {
	d := newTestDriver(t)
	f := d.home("freezer")
	if f == absent {
		t.Skip("needs a v1 freezer: it is what can keep a process from dying")
	}
	pod := newPod(t, d)
	c := newContainer(t, d, pod, "c", nil)
	p := start(t, join(t, c, ByBirth), "wait")
	// Freezing the pod's keeps the container's processes alive, and is not the container's to thaw.
	if err := d.kernel.write(f, pod+"/freezer.state", "FROZEN"); err != nil {
		t.Fatal(err)
	}
	err := c.Kill(deadline(t, 200*time.Millisecond))
	thawed := d.kernel.write(f, pod+"/freezer.state", "THAWED")
	if !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), fmt.Sprintf("%d (\"", p.Process.Pid)) || !strings.Contains(err.Error(), "state ") {
		t.Errorf("Kill of a frozen pod's container: %v, want ErrBusy naming process and state", err)
	}
	if thawed != nil {
		t.Fatal(thawed)
	}
	p.killed(t)
}

func TestExecSubCgroup(t *testing.T) {
	eachLayout(t, func(t *testing.T, d *Driver) {
		c := newContainer(t, d, newPod(t, d), "c", nil)
		p := start(t, join(t, c, ByBirth), "wait")
		e, j, err := c.Exec("exec-1", ByBirth)
		if err != nil {
			t.Fatal(err)
		}
		defer j.Close()
		x := start(t, j, "forker", "1", "say ready")
		if pids, err := c.Procs(); err != nil || !slices.Contains(pids, x.Process.Pid) || !slices.Contains(pids, p.Process.Pid) {
			t.Errorf("container's processes %v, %v: want %d and %d", pids, err, p.Process.Pid, x.Process.Pid)
		}
		if m := d.home("memory"); m != absent { // limits of the container hold for it
			want := ":memory:" + c.Path() + "\n"
			if d.trees[m].v2 {
				want = "0::" + c.Path() + "/exec-1\n"
			}
			own, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", x.Process.Pid))
			if err != nil || !strings.Contains(string(own), want) {
				t.Errorf("exec'd process is in %s, %v", own, err)
			}
		}
		if err := e.Kill(deadline(t, 10*time.Second)); err != nil {
			t.Fatal(err)
		}
		x.killed(t)
		if err := syscall.Kill(p.Process.Pid, 0); err != nil {
			t.Errorf("the container's own process: %v, want alive", err)
		}
		if err := e.Remove(t.Context()); err != nil {
			t.Error(err)
		}
		if _, j2, err := c.Exec("exec-1", ByBirth); err != nil {
			t.Errorf("same name again: %v", err)
		} else if err := j2.Close(); err != nil {
			t.Error(err)
		}
		// A handle opened by its path alone, as after a restart, removes it too; so does the container's.
		if err := d.Open(e.Path()).Remove(t.Context()); err != nil {
			t.Error(err)
		}
		if err := c.Kill(deadline(t, 10*time.Second)); err != nil {
			t.Fatal(err)
		}
		p.killed(t)
	})
}

// A pod init in a user namespace may not clone into the cgroup, but with files that root opened its child gets there.
func TestJoinByWritingFromUserNamespace(t *testing.T) {
	eachLayout(t, func(t *testing.T, d *Driver) {
		c := newContainer(t, d, newPod(t, d), "c", nil)
		e, j, err := c.Exec("exec-1", ByWriting)
		if err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct {
			name string
			in   *Cgroup
			join *Join
		}{
			{"container", c, join(t, c, ByWriting)},
			{"exec", e, j},
		} {
			t.Run(tt.name, func(t *testing.T) {
				enterFromUserns(t, d, tt.in, tt.join)
			})
		}
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	})
}

func enterFromUserns(t *testing.T, d *Driver, c *Cgroup, j *Join) {
	if v2 := d.unified() != absent; j.DirFD != nil || (j.Procs != nil) != v2 {
		t.Fatalf("got DirFD %v and Procs %v, want none, and one where there is a cgroup2 hierarchy (%v)", j.DirFD, j.Procs, v2)
	}
	args := []string{fmt.Sprint(len(j.Tasks)), "none"}
	// It cannot read the test binary's directory as uid 100000: hand it the file itself.
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	files := append([]*os.File{self}, j.Tasks...)
	if j.Procs != nil {
		args[1] = "procs"
		files = append(files, j.Procs)
	}
	cmd := exec.Command("/proc/self/fd/3", args...)
	cmd.Env = append(os.Environ(), roleVariable+"=enter")
	cmd.ExtraFiles = files
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100_000, Size: 1000}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids, Credential: &syscall.Credential{}, Pdeathsig: syscall.SIGKILL}
	p := &process{Cmd: cmd}
	if p.in, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.out = newReader(out)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Wait() }) // it ends with its child
	line, err := p.out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	pid := strings.TrimSpace(line)
	if pids, err := c.Procs(); err != nil || !strings.Contains(fmt.Sprint(pids), pid) {
		t.Errorf("Procs: %v, %v, want %q", pids, err, pid)
	}
	own, err := os.ReadFile("/proc/" + pid + "/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for i, h := range d.trees {
		want := c.Path()
		if !slices.Contains(c.trees, i) {
			want = c.outer.Path()
		}
		line := ":" + strings.Join(h.controllers, ",") + ":" + want + "\n"
		if h.v2 {
			line = "0::" + want + "\n"
		}
		if !strings.Contains(string(own), line) {
			t.Errorf("%s: want %q in\n%s", h.dir, line, own)
		}
	}
	if err := c.Kill(deadline(t, 10*time.Second)); err != nil {
		t.Error(err)
	}
}

func TestOOMKill(t *testing.T) {
	d := newTestDriver(t)
	c := newContainer(t, d, newPod(t, d), "c", mem(specs.LinuxMemory{Limit: ptr(int64(32 << 20)), Swap: ptr(int64(32 << 20))}))
	if n, err := c.OOMKills(); err != nil || n != 0 {
		t.Fatalf("OOMKills of a new cgroup: %d, %v", n, err)
	}
	p := start(t, join(t, c, ByBirth), "hog")
	p.killed(t)
	if n, err := c.OOMKills(); err != nil || n != 1 {
		t.Errorf("OOMKills: %d, %v, want 1", n, err)
	}
	s, err := c.Stats()
	if err != nil {
		t.Fatal(err)
	}
	if s.Memory.Limit != 32<<20 || s.Memory.Peak < 16<<20 || s.Memory.Peak > 33<<20 {
		t.Errorf("memory after the OOM kill: %+v", s.Memory)
	}
}

func TestCpusetIsFilled(t *testing.T) {
	d := newTestDriver(t)
	tree := d.home("cpuset")
	if tree == absent || d.trees[tree].v2 {
		t.Skip("needs a v1 cpuset: one of v2 needs no filling")
	}
	all := fileOf(t, d, "cpuset", "/", "cpuset.cpus")
	pod := newPod(t, d)
	inherits := newContainer(t, d, pod, "a", nil)
	first := newContainer(t, d, pod, "b", cpu(specs.LinuxCPU{Cpus: "0"}))
	for _, c := range []struct{ path, cpus string }{{pod, all}, {inherits.Path(), all}, {first.Path(), "0"}} {
		if got := fileOf(t, d, "cpuset", c.path, "cpuset.cpus"); got != c.cpus {
			t.Errorf("%s has CPUs %q, want %q", c.path, got, c.cpus)
		}
		if got := fileOf(t, d, "cpuset", c.path, "cpuset.mems"); got == "" {
			t.Errorf("%s has no memory nodes", c.path)
		}
	}
	// A parent that somebody made by hand and left empty.
	byHand := d.config.Root + "/by-hand"
	if err := d.kernel.mkdir(tree, byHand); err != nil {
		t.Fatal(err)
	}
	if created, err := d.CreatePod(t.Context(), byHand+"/pod"); err != nil || !created {
		t.Fatal(created, err)
	}
	if got := fileOf(t, d, "cpuset", byHand, "cpuset.cpus"); got != all {
		t.Errorf("parent made by hand has CPUs %q, want %q", got, all)
	}
	// More than the machine has: the error says what there is.
	err := d.Open(d.ContainerPath(pod, "c")).Create(t.Context(), cpu(specs.LinuxCPU{Cpus: "0-4000"}))
	if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "0-4000") {
		t.Errorf("CPUs that do not exist: %v, want ErrInvalid naming them", err)
	}
	gone(t, d, d.ContainerPath(pod, "c"))
}

func TestDevicesAreDenied(t *testing.T) {
	eachLayout(t, func(t *testing.T, d *Driver) {
		rules := []specs.LinuxDeviceCgroup{{Access: "rwm"}, // deny all
			{Allow: true, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(3)), Access: "rwm"}, // null
			{Allow: true, Type: "c", Access: "m"}}
		c := newContainer(t, d, newPod(t, d), "c", &specs.LinuxResources{Devices: rules})
		p := start(t, join(t, c, ByBirth), "device", "/dev/null", "/dev/zero", "/dev/kmsg")
		check := func() {
			if _, err := p.in.Write([]byte("\n")); err != nil {
				t.Fatal(err)
			}
			p.expect(t, "/dev/null false")
			p.expect(t, "/dev/zero true")
			p.expect(t, "/dev/kmsg true")
			p.expect(t, "done")
		}
		// SEC-25: an update does not open what was closed.
		if err := c.Update(t.Context(), &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}}); err != nil {
			t.Fatal(err)
		}
		check()
		if err := c.Kill(deadline(t, 10*time.Second)); err != nil {
			t.Error(err)
		}
	})
}

func TestUpdateReadBack(t *testing.T) {
	d := newTestDriver(t)
	c := newContainer(t, d, newPod(t, d), "c", kubelet())
	before, err := c.Applied()
	if err != nil {
		t.Fatal(err)
	}
	if before.CPUShares != 256 || before.CPUQuota != 50_000 || before.CPUPeriod != 100_000 || before.MemoryLimit != 64<<20 || before.MemorySwapLimit != 64<<20 {
		t.Errorf("after Create: %+v", before)
	}
	// The kubelet's in-place resize.
	if err := c.Update(t.Context(), &specs.LinuxResources{
		CPU:    &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(100_000))},
		Memory: &specs.LinuxMemory{Limit: ptr(int64(128 << 20)), Swap: ptr(int64(128 << 20))},
	}); err != nil {
		t.Fatal(err)
	}
	want := before
	want.CPUShares, want.CPUQuota, want.MemoryLimit, want.MemorySwapLimit = 512, 100_000, 128<<20, 128<<20
	v2 := d.trees[d.home("cpu")].v2
	if v2 {
		want.CPUWeight = 59 // the kubelet's formula
	}
	resized, err := c.Applied()
	if err != nil || fmt.Sprint(resized) != fmt.Sprint(want) {
		t.Errorf("after Update: %+v, %v\nwant %+v", resized, err, want)
	}
	// The kernel refuses the last of several: nothing has changed. A quota below 1 ms comes after
	// shares and before memory; a node that does not exist comes first.
	for name, r := range map[string]*specs.LinuxResources{
		"quota": {CPU: &specs.LinuxCPU{Cpus: "0", Shares: ptr(uint64(1024)), Quota: ptr(int64(10))}},
		"memory": {CPU: &specs.LinuxCPU{Shares: ptr(uint64(1024)), Quota: ptr(int64(20_000)), Period: ptr(uint64(50_000))},
			Memory: &specs.LinuxMemory{Limit: ptr(int64(1 << 20)), Swappiness: ptr(uint64(1000))}},
		"pids": {Memory: &specs.LinuxMemory{Limit: ptr(int64(32 << 20)), Swap: ptr(int64(32 << 20))}, Pids: &specs.LinuxPids{Limit: ptr(int64(1 << 40))}},
	} {
		refused := ErrInvalid
		if v2 && name == "memory" { // it has no swappiness: that is said before anything is written
			refused = ErrUnsupported
		}
		err := c.Update(t.Context(), r)
		if !errors.Is(err, refused) {
			t.Errorf("%s: %v, want %v", name, err, refused)
		}
		if got, err := c.Applied(); err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: after a refused Update: %+v, %v\nwant %+v", name, got, err, want)
		}
	}
}

func TestMemoryLimitBelowUsage(t *testing.T) {
	d := newTestDriver(t)
	c := newContainer(t, d, newPod(t, d), "c", mem(specs.LinuxMemory{Limit: ptr(int64(256 << 20)), Swap: ptr(int64(256 << 20))}))
	p := start(t, join(t, c, ByBirth), "wait")
	err := c.Update(t.Context(), mem(specs.LinuxMemory{Limit: ptr(int64(4096)), Swap: ptr(int64(4096))}))
	if !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "memory limit 4096 bytes") {
		t.Errorf("limit below usage: %v, want ErrBusy naming it", err)
	}
	if a, err := c.Applied(); err != nil || a.MemoryLimit != 256<<20 || a.MemorySwapLimit != 256<<20 {
		t.Errorf("after that: %+v, %v", a, err)
	}
	if err := c.Kill(deadline(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	p.killed(t)
}

func TestStatsOfARunningProcess(t *testing.T) {
	d := newTestDriver(t)
	c := newContainer(t, d, newPod(t, d), "c", kubelet())
	p := start(t, join(t, c, ByBirth), "forker", "1", "say ready")
	s, err := c.Stats()
	if err != nil {
		t.Fatal(err)
	}
	if s.CPU.Usage == 0 || s.CPU.User+s.CPU.System == 0 || s.Memory.Usage == 0 || s.Memory.WorkingSet > s.Memory.Usage ||
		s.Memory.RSS == 0 || s.Memory.Faults == 0 || s.Memory.Limit != 64<<20 || s.Pids.Current == 0 || s.Swap.Accounted && s.Swap.Limit != 0 {
		t.Errorf("stats: %+v", s)
	}
	pod, err := d.Open(d.PodPath("", "p")).Stats()
	if err != nil || pod.Memory.Usage < s.Memory.RSS/2 || pod.CPU.Usage < s.CPU.Usage {
		t.Errorf("the pod's stats: %+v, %v: want at least the container's", pod, err)
	}
	if err := c.Kill(deadline(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	p.killed(t)
	if err := c.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	for op, err := range map[string]error{
		"Stats":    second(c.Stats()),
		"Applied":  second(c.Applied()),
		"OOMKills": second(c.OOMKills()),
		"Procs":    second(c.Procs()),
		"Join":     second(c.Join(ByBirth)),
		"Update":   c.Update(t.Context(), kubelet()),
	} {
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("%s of a removed cgroup: %v, want ErrNotFound", op, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// Fifty at once, as after a restart of the kubelet; two calls for the pod's.
func TestParallelCreate(t *testing.T) {
	d := newTestDriver(t)
	pod := newPod(t, d)
	var wg sync.WaitGroup
	for i := range 50 { // each is one container's owner
		wg.Go(func() {
			if _, err := d.CreatePod(t.Context(), pod); err != nil {
				t.Error(err)
			}
			c := d.Open(d.ContainerPath(pod, fmt.Sprint(i)))
			if err := c.Create(t.Context(), kubelet()); err != nil {
				t.Error(err)
				return
			}
			if _, err := c.Stats(); err != nil {
				t.Error(err)
			}
			e, j, err := c.Exec("exec-1", ByBirth)
			if err != nil {
				t.Error(err)
				return
			}
			if err := errors.Join(j.Close(), e.Kill(t.Context()), c.Kill(t.Context()), c.Remove(t.Context())); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if left, err := d.Children(pod); err != nil || len(left) > 0 {
		t.Errorf("left below the pod: %v, %v", left, err)
	}
	if err := d.RemovePod(t.Context(), pod); err != nil {
		t.Error(err)
	}
}

// A container that may write its cgroups nests them deeper than a path can name.
func TestRemoveDeeperThanPathMax(t *testing.T) {
	eachLayout(t, func(t *testing.T, d *Driver) {
		c := newContainer(t, d, newPod(t, d), "c", nil)
		tree := d.tracker()
		nest(t, d, tree, c.Path(), 40, strings.Repeat("x", 200))
		if err := c.Kill(deadline(t, 10*time.Second)); err != nil {
			t.Error(err)
		}
		if err := c.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// Our short way for the usual rules gives what the library gives.
func TestDevicesAsTheLibrary(t *testing.T) {
	d := newTestDriver(t)
	tree := d.devices()
	if d.trees[tree].v2 {
		t.Skip("needs v1 devices: on v2 the library does it always")
	}
	pod := newPod(t, d)
	allow := func(kind string, major, minor int64, access string) specs.LinuxDeviceCgroup {
		return specs.LinuxDeviceCgroup{Allow: true, Type: kind, Major: &major, Minor: &minor, Access: access}
	}
	for name, list := range map[string][]specs.LinuxDeviceCgroup{
		"container": containerResources().Devices,
		"none":      {{Access: "rwm"}},
		"merged":    {{Access: "rwm"}, allow("c", 1, 3, "r"), allow("c", 1, 3, "wm"), allow("c", 1, -1, "m"), allow("b", 8, 0, "rm")},
		"duplicate": {{Access: "rwm"}, allow("c", 1, 3, "r"), allow("c", 1, 3, "r")},
	} {
		rules, err := deviceRules(list)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := allowList(rules); !ok {
			t.Errorf("%s: not taken the short way", name)
		}
		ours := newContainer(t, d, pod, "a", &specs.LinuxResources{Devices: list})
		theirs := newContainer(t, d, pod, "b", nil)
		if err := d.kernel.setDevices(tree, theirs.Path(), rules); err != nil {
			t.Fatal(err)
		}
		got, want := fileOf(t, d, "devices", ours.Path(), "devices.list"), fileOf(t, d, "devices", theirs.Path(), "devices.list")
		if !sameRules(strings.Split(got, "\n"), strings.Split(want, "\n")) {
			t.Errorf("%s: got\n%s\nwant\n%s", name, got, want)
		}
		if err := errors.Join(ours.Remove(t.Context()), theirs.Remove(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
	// Everything else is the library's.
	privileged := newContainer(t, d, pod, "c", &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}})
	if got := fileOf(t, d, "devices", privileged.Path(), "devices.list"); got != "a *:* rwm" {
		t.Errorf("allow all: %q", got)
	}
	// Nothing that the cgroup above denies is allowed.
	c := newContainer(t, d, pod, "d", &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Access: "rwm"}, allow("c", 1, 3, "r")}})
	err := d.Open(c.Path()+"/sub").Create(t.Context(), &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Access: "rwm"}, allow("c", 1, 3, "rw")}})
	if err == nil {
		t.Error("more was allowed than above")
	}
	gone(t, d, c.Path()+"/sub")
}

// One stops a container while another, who has seen its end already, removes its cgroup. Before Kill and Remove knew of each other,
// Kill waited for an event that the removal had cancelled, until its deadline.
func TestKillWhileAnotherRemoves(t *testing.T) {
	d := newTestDriver(t)
	tree := d.unified()
	if tree == absent {
		t.Skip("pure v1: nobody waits for cgroup.events")
	}
	pod := newPod(t, d)
	for n := range 20 {
		c := newContainer(t, d, pod, fmt.Sprint("c", n), nil)
		p := start(t, join(t, c, ByBirth), "wait")
		waited, waiting := make(chan error, 1), make(chan struct{})
		go func() { // what Kill does when its victim takes a while
			release, err := d.claims.kill(t.Context(), c.path)
			close(waiting)
			if err == nil {
				err = c.waitEmpty(deadline(t, 5*time.Second), tree)
				release()
			}
			waited <- err
		}()
		<-waiting
		// An event now, so that the kernel holds the next one back.
		for _, frozen := range []string{"1", "0"} {
			if err := d.kernel.write(tree, c.file("cgroup.freeze"), frozen); err != nil {
				t.Fatal(err)
			}
		}
		if err := p.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		p.killed(t)
		for {
			err := c.Remove(t.Context())
			if err == nil {
				break
			}
			if !errors.Is(err, ErrBusy) { // dead, and not yet off the cgroup's list
				t.Fatal(err)
			}
		}
		if err := <-waited; err != nil && !errors.Is(err, syscall.ENODEV) && !errors.Is(err, syscall.ENOENT) {
			t.Fatalf("round %d: %v", n, err)
		}
	}
}

package spawn

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// built holds crisp-init and the payload, compiled once for the package's root tests.
var built struct{ dir, init, payload string }

func TestMain(m *testing.M) {
	code := 1
	defer func() { os.Exit(code) }()
	if os.Geteuid() == 0 {
		dir, err := os.MkdirTemp("", "crisp-spawn-")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		built.dir, built.init, built.payload = dir, filepath.Join(dir, "crisp-init"), filepath.Join(dir, "payload")
		build(built.init, "github.com/crisp-cri/crisp/cmd/crisp-init")
		build(built.payload, "github.com/crisp-cri/crisp/test/payload")
	}
	code = m.Run()
}

func build(out, pkg string) {
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, pkg)
	if strings.Contains(pkg, "/test/") {
		cmd = exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, ".")
		cmd.Dir = "../../test/payload"
	}
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if flags := os.Getenv("CRISP_TEST_BUILDFLAGS"); flags != "" {
		cmd.Env = append(cmd.Env, "GOFLAGS="+flags)
	}
	if b, err := cmd.CombinedOutput(); err != nil {
		panic(string(b))
	}
}

// host is a Spawner with what its tests need; everything ends with the test.
type host struct {
	*Spawner
	t   *testing.T
	dir string
}

func newHost(t *testing.T) *host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes namespaces and mounts")
	}
	dir := t.TempDir()
	s, err := New(built.init, filepath.Join(dir, "scratch"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return &host{s, t, dir}
}

func newID() string {
	b := make([]byte, 32)
	rand.Read(b)
	return hex.EncodeToString(b)
}

type testPod struct {
	*Pod
	h     *host
	exits chan Exit
}

func (h *host) pod(change func(*PodArgs)) *testPod {
	h.t.Helper()
	id := newID()
	a := PodArgs{ID: id, Title: "test/" + h.t.Name(), Hostname: "pod-host", RunDir: filepath.Join(h.dir, "run", id)}
	if err := os.MkdirAll(a.RunDir, 0o700); err != nil {
		h.t.Fatal(err)
	}
	if change != nil {
		change(&a)
	}
	p := &testPod{h: h, exits: make(chan Exit, 16)}
	var err error
	if p.Pod, err = h.StartPod(h.ctx(), a, func(x Exit) { p.exits <- x }); err != nil {
		h.t.Fatalf("StartPod: %v", err)
	}
	if err := p.Ready(h.ctx()); err != nil {
		h.t.Errorf("Ready: %v", err)
	}
	h.t.Cleanup(func() {
		infos, err := p.List(context.Background())
		if err == nil {
			for _, i := range infos {
				if i.State == InitRunning {
					_ = p.Signal(context.Background(), i.ID, unix.SIGKILL)
					<-p.exits
				}
			}
		}
		if err := p.Shutdown(context.Background()); err != nil {
			h.t.Error(err)
		}
		p.Close()
	})
	return p
}

func (h *host) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	h.t.Cleanup(cancel)
	return ctx
}

// lower is a layer with the payload as /bin/payload.
func (h *host) lower() string {
	h.t.Helper()
	dir := filepath.Join(h.dir, "lower")
	if err := os.MkdirAll(filepath.Join(dir, "bin"), 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Link(built.payload, filepath.Join(dir, "bin/payload")); err != nil && !errors.Is(err, os.ErrExist) {
		h.t.Fatal(err)
	}
	return dir
}

func exampleSpec(args ...string) *specs.Spec {
	caps := []string{"CAP_CHOWN", "CAP_KILL"}
	return &specs.Spec{
		Root: &specs.Root{},
		Process: &specs.Process{
			Args: args, Cwd: "/", Env: []string{"PATH=/bin"},
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/shm", Type: "bind", Source: ShmSource},
			{Destination: "/dev/mqueue", Type: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/sys", Type: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		},
		Linux: &specs.Linux{
			Namespaces:    []specs.LinuxNamespace{{Type: specs.CgroupNamespace}},
			MaskedPaths:   []string{"/proc/kcore", "/proc/acpi", "/proc/scsi", "/proc/timer_list", "/nowhere"},
			ReadonlyPaths: []string{"/proc/sys", "/proc/bus"},
			Devices:       []specs.LinuxDevice{{Path: "/dev/null", Type: "c", Major: 1, Minor: 3}},
		},
	}
}

// create makes a container and returns its id and log file.
func (p *testPod) create(spec *specs.Spec, change func(*ContainerArgs)) (id, log string) {
	p.h.t.Helper()
	id = newID()
	dir := filepath.Join(p.h.dir, id)
	upper, work := filepath.Join(dir, "upper"), filepath.Join(dir, "work")
	for _, d := range []string{upper, work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			p.h.t.Fatal(err)
		}
	}
	root, err := p.h.MountRootfs(p.h.ctx(), RootfsArgs{Lower: []string{p.h.lower()}, Upper: upper, Work: work})
	if err != nil {
		p.h.t.Fatalf("MountRootfs: %v", err)
	}
	defer root.Close()
	log = filepath.Join(dir, "log")
	f, err := os.Create(log)
	if err != nil {
		p.h.t.Fatal(err)
	}
	defer f.Close()
	a := ContainerArgs{ID: id, Spec: spec, Rootfs: root, Log: f}
	if change != nil {
		change(&a)
	}
	if err := p.Create(p.h.ctx(), a); err != nil {
		p.h.t.Fatalf("Create: %v", err)
	}
	return id, log
}

// run starts a container, waits for its end and returns what it wrote.
func (p *testPod) run(spec *specs.Spec, change func(*ContainerArgs)) (Exit, string) {
	p.h.t.Helper()
	id, log := p.create(spec, change)
	if _, _, err := p.Start(p.h.ctx(), id); err != nil {
		p.h.t.Fatalf("Start: %v", err)
	}
	x := <-p.exits
	if x.ContainerID != id {
		p.h.t.Fatalf("exit of %s, want %s", x.ContainerID, id)
	}
	b, err := os.ReadFile(log)
	if err != nil {
		p.h.t.Fatal(err)
	}
	return x, string(b)
}

func TestContainerRunsAndIsLogged(t *testing.T) {
	p := newHost(t).pod(nil)
	x, out := p.run(exampleSpec("payload", "echo", "hello"), nil)
	if x.Code != 0 || !strings.Contains(out, "hello") {
		t.Errorf("got exit %+v and log %q, want 0 and hello", x, out)
	}
}

func TestExitCodesAndSignals(t *testing.T) {
	p := newHost(t).pod(nil)
	if x, out := p.run(exampleSpec("/bin/payload", "exit", "7"), nil); x.Code != 7 || x.Signal != 0 {
		t.Errorf("got %+v, log %q, want code 7", x, out)
	}
	id, _ := p.create(exampleSpec("/bin/payload", "sleep", "1000"), nil)
	if _, _, err := p.Start(p.h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	if err := p.Signal(p.h.ctx(), id, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if x := <-p.exits; x.Code != 137 || x.Signal != 9 {
		t.Errorf("got %+v, want code 137 by signal 9", x)
	}
}

func TestStartErrorsNameTheStep(t *testing.T) {
	p := newHost(t).pod(nil)
	tests := []struct {
		name   string
		change func(*specs.Spec)
		want   error
		text   string
	}{
		{"missing program", func(s *specs.Spec) { s.Process.Args = []string{"/bin/none"} }, unix.ENOENT, `exec "/bin/none"`},
		{"not in PATH", func(s *specs.Spec) { s.Process.Args = []string{"none"} }, unix.ENOENT, "executable file not found in $PATH"},
		{"not executable", func(s *specs.Spec) { s.Process.Args = []string{"/bin"} }, unix.EACCES, `exec "/bin"`},
		{"working directory is a file", func(s *specs.Spec) { s.Process.Cwd = "/bin/payload/x" }, unix.ENOTDIR, "working directory /bin/payload/x"},
		{"working directory through a descriptor", func(s *specs.Spec) { s.Process.Cwd = "/proc/self/fd/7" }, nil, "working directory /proc/self/fd/7"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			spec := exampleSpec("payload", "true")
			tt.change(spec)
			id, _ := p.create(spec, nil)
			_, _, err := p.Start(p.h.ctx(), id)
			var se *StartError
			if !errors.As(err, &se) || tt.want != nil && !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want a StartError with %q and %v", err, tt.text, tt.want)
			}
			if err := p.Remove(p.h.ctx(), id); err != nil {
				t.Errorf("Remove: %v", err)
			}
		})
	}
}

func TestExecRunsInTheContainer(t *testing.T) {
	p := newHost(t).pod(nil)
	spec := exampleSpec("/bin/payload", "sleep", "1000")
	id, _ := p.create(spec, nil)
	if _, _, err := p.Start(p.h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	for _, code := range []string{"0", "3"} {
		proc := *spec.Process
		proc.Args = []string{"payload", "exit", code}
		x, err := p.Exec(p.h.ctx(), ExecArgs{ContainerID: id, ExecID: "e" + code, Process: &proc})
		if err != nil {
			t.Fatal(err)
		}
		got, err := x.Wait(p.h.ctx())
		if err != nil || got != int(code[0]-'0') {
			t.Errorf("got %d, %v, want %s", got, err, code)
		}
	}
	proc := *spec.Process
	proc.Args = []string{"none"}
	if _, err := p.Exec(p.h.ctx(), ExecArgs{ContainerID: id, ExecID: "e", Process: &proc}); !errors.Is(err, unix.ENOENT) {
		t.Errorf("got %v, want ENOENT", err)
	}
}

func TestAttachFindsContainersAndExitsAgain(t *testing.T) {
	h := newHost(t)
	p := h.pod(nil)
	dead, _ := p.create(exampleSpec("/bin/payload", "exit", "5"), nil)
	alive, _ := p.create(exampleSpec("/bin/payload", "sleep", "1000"), nil)
	for _, id := range []string{dead, alive} {
		if _, _, err := p.Start(h.ctx(), id); err != nil {
			t.Fatal(err)
		}
	}
	<-p.exits
	p.Close() // the former daemon is gone
	again := make(chan Exit, 16)
	q, err := h.Attach(h.ctx(), p.Handle(), func(x Exit) { again <- x })
	if err != nil {
		t.Fatal(err)
	}
	p.Pod, p.exits = q, again // what the clean-up talks to
	if x := <-again; x.ContainerID != dead || x.Code != 5 {
		t.Errorf("got %+v, want the exit of %s with 5", x, dead)
	}
	infos, err := q.List(h.ctx())
	if err != nil || len(infos) != 2 {
		t.Fatalf("got %v, %v, want two containers", infos, err)
	}
	for _, i := range infos {
		if want := map[string]InitState{dead: InitExited, alive: InitRunning}[i.ID]; i.State != want {
			t.Errorf("container %s: got state %d, want %d", i.ID, i.State, want)
		}
	}
	bad := q.Handle()
	bad.StartTime++
	if _, err := h.Attach(h.ctx(), bad, func(Exit) {}); !errors.Is(err, ErrGone) {
		t.Errorf("another process with that pid: got %v, want ErrGone", err)
	}
}

func TestPodDeathIsSeen(t *testing.T) {
	h := newHost(t)
	p := h.pod(nil)
	if err := unix.Kill(p.PID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	if _, err := p.List(h.ctx()); !errors.Is(err, ErrGone) {
		t.Errorf("got %v, want ErrGone", err)
	}
	if _, err := h.Attach(h.ctx(), p.Handle(), func(Exit) {}); !errors.Is(err, ErrGone) {
		t.Errorf("Attach: got %v, want ErrGone", err)
	}
}

func TestSharedPIDNamespace(t *testing.T) {
	p := newHost(t).pod(func(a *PodArgs) { a.SharedPID = true })
	shared := func(a *ContainerArgs) { a.PID = PIDPod }
	_, out := p.run(exampleSpec("/bin/payload", "cat", "/proc/1/comm"), shared)
	if !strings.Contains(out, "crisp-init") {
		t.Errorf("PID 1 is %q, want the reaper", out)
	}
}

func BenchmarkPod(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root")
	}
	dir := b.TempDir()
	s, err := New(built.init, filepath.Join(dir, "scratch"))
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	for b.Loop() {
		id := newID()
		a := PodArgs{ID: id, Title: "bench/pod", Hostname: "pod-host", RunDir: filepath.Join(dir, "run", id)}
		if err := os.MkdirAll(a.RunDir, 0o700); err != nil {
			b.Fatal(err)
		}
		p, err := s.StartPod(context.Background(), a, func(x Exit) {})
		if err != nil {
			b.Fatal(err)
		}
		if err := p.Ready(context.Background()); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		p.Shutdown(context.Background())
		p.Close()
		b.StartTimer()
	}
}

// BenchmarkContainer measures create + start of a container in a running pod, without cgroups.
func BenchmarkContainer(b *testing.B) {
	// 500 is a machine with many processors: the kubelet masks a file of each (runc#5262).
	for _, masks := range []int{0, 500} {
		b.Run(fmt.Sprintf("masks=%d", masks), func(b *testing.B) { benchmarkContainer(b, masks) })
	}
}

func benchmarkContainer(b *testing.B, masks int) {
	if os.Geteuid() != 0 {
		b.Skip("needs root")
	}
	dir := b.TempDir()
	s, err := New(built.init, filepath.Join(dir, "scratch"))
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	ctx := context.Background()
	exits := make(chan Exit, 1)
	run := filepath.Join(dir, "run")
	lower := filepath.Join(dir, "lower")
	os.MkdirAll(run, 0o700)
	os.MkdirAll(filepath.Join(lower, "bin"), 0o755)
	if err := os.Link(built.payload, filepath.Join(lower, "bin/payload")); err != nil {
		b.Fatal(err)
	}
	var masked []string
	for i := range masks {
		name := fmt.Sprintf("/masked%d", i)
		if err := os.WriteFile(filepath.Join(lower, name), nil, 0o644); err != nil {
			b.Fatal(err)
		}
		masked = append(masked, name)
	}
	p, err := s.StartPod(ctx, PodArgs{ID: newID(), Title: "bench/container", Hostname: "h", RunDir: run}, func(x Exit) { exits <- x })
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	defer p.Shutdown(ctx)
	var create, start time.Duration
	for b.Loop() {
		id := newID()
		upper, work := filepath.Join(dir, id, "u"), filepath.Join(dir, id, "w")
		os.MkdirAll(upper, 0o755)
		os.MkdirAll(work, 0o755)
		t0 := time.Now()
		root, err := s.MountRootfs(ctx, RootfsArgs{Lower: []string{lower}, Upper: upper, Work: work})
		if err != nil {
			b.Fatal(err)
		}
		spec := exampleSpec("/bin/payload", "true")
		spec.Linux.MaskedPaths = append(spec.Linux.MaskedPaths, masked...)
		if err := p.Create(ctx, ContainerArgs{ID: id, Spec: spec, Rootfs: root}); err != nil {
			b.Fatal(err)
		}
		root.Close()
		t1 := time.Now()
		if _, _, err := p.Start(ctx, id); err != nil {
			b.Fatal(err)
		}
		create += t1.Sub(t0)
		start += time.Since(t1)
		<-exits
		if err := p.Remove(ctx, id); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(create.Microseconds())/float64(b.N), "µs/create")
	b.ReportMetric(float64(start.Microseconds())/float64(b.N), "µs/start")
}

func TestTerminals(t *testing.T) {
	p := newHost(t).pod(nil)
	spec := exampleSpec("/bin/payload", "stat", "/dev/console", "/proc/self/fd/0")
	spec.Process.Terminal = true
	if x, out := p.run(spec, nil); x.Code != 0 || !strings.Contains(out, "/dev/pts/0") {
		t.Errorf("got %+v, log %q, want stdin to be /dev/pts/0", x, out)
	}
	spec = exampleSpec("/bin/payload", "sleep", "1000")
	id, _ := p.create(spec, nil)
	if _, _, err := p.Start(p.h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	proc := *spec.Process
	proc.Args, proc.Terminal = []string{"payload", "echo", "hello"}, true
	x, err := p.Exec(p.h.ctx(), ExecArgs{ContainerID: id, ExecID: "tty", Process: &proc})
	if err != nil {
		t.Fatal(err)
	}
	terminal := x.TakeTerminal()
	defer terminal.Close()
	b := make([]byte, 100)
	n, _ := terminal.Read(b)
	if string(b[:n]) != "hello\r\n" {
		t.Errorf("got %q from the terminal, want hello", b[:n])
	}
	if code, err := x.Wait(p.h.ctx()); code != 0 || err != nil {
		t.Errorf("got %d, %v, want 0", code, err)
	}
}

func TestAttachStream(t *testing.T) {
	p := newHost(t).pod(nil)
	id, log := p.create(exampleSpec("/bin/payload", "stdin"), func(a *ContainerArgs) { a.Stdin = true })
	if _, _, err := p.Start(p.h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	var pipes [2][2]*os.File // a client that reads, one that never does
	for i := range pipes {
		var err error
		if pipes[i][0], pipes[i][1], err = os.Pipe(); err != nil {
			t.Fatal(err)
		}
		defer pipes[i][0].Close()
	}
	stdin, err := p.Attach(p.h.ctx(), id, true, pipes[0][1], nil)
	if err != nil || stdin == nil {
		t.Fatalf("Attach: got stdin %v, error %v", stdin, err)
	}
	if _, err := p.Attach(p.h.ctx(), id, false, pipes[1][1], nil); err != nil {
		t.Fatal(err)
	}
	pipes[0][1].Close()
	pipes[1][1].Close()
	line := []byte(strings.Repeat("x", 999) + "\n")
	read := make(chan int64)
	go func() {
		n, _ := io.Copy(io.Discard, pipes[0][0])
		read <- n
	}()
	const lines = 500 // more than the pipe of the client that never reads holds
	for range lines {
		if _, err := stdin.Write(line); err != nil {
			t.Fatal(err)
		}
	}
	stdin.Close()
	if err := p.CloseStdin(p.h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	if x := <-p.exits; x.Code != 0 {
		t.Errorf("got %+v, want code 0", x)
	}
	// The client that read must have all of it, unless it was too slow once: it reads from a 64 KiB pipe as fast as it is written.
	if n := <-read; n == 0 {
		t.Errorf("the attached client got nothing")
	}
	b, err := os.ReadFile(log)
	if n := strings.Count(string(b), "\n"); err != nil || n != lines {
		t.Errorf("the log has %d lines, error %v, want %d: a slow client must not cost any", n, err, lines)
	}
	if _, err := p.Attach(p.h.ctx(), id, false, nil, nil); !errors.Is(err, ErrState) {
		t.Errorf("attach to an exited container: got %v, want ErrState", err)
	}
}

func TestUserNamespace(t *testing.T) {
	h := newHost(t)
	if err := h.CheckUserNamespaces(h.ctx(), h.dir); errors.Is(err, ErrUnsupported) {
		t.Skip(err) // before Linux 6.3
	}
	ids := &IDMap{UID: 700000, GID: 800000, Size: 65536}
	p := h.pod(func(a *PodArgs) {
		a.Userns, a.Sysctls = ids, map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}
	})
	volume := filepath.Join(h.dir, "volume")
	if err := os.Mkdir(volume, 0o700); err != nil {
		t.Fatal(err)
	}
	userns, err := p.UserNS()
	if err != nil {
		t.Fatal(err)
	}
	defer userns.Close()
	adj := 500
	spec := func(args ...string) *specs.Spec {
		s := exampleSpec(args...)
		s.Process.OOMScoreAdj = &adj
		s.Mounts = append(s.Mounts, specs.Mount{
			Destination: "/volume", Type: "bind", Source: volume, Options: []string{"rbind"}, UIDMappings: []specs.LinuxIDMapping{{Size: 65536}},
		})
		return s
	}
	create := func(s *specs.Spec) (string, string) {
		dir := filepath.Join(h.dir, newID())
		upper, work := filepath.Join(dir, "upper"), filepath.Join(dir, "work")
		for _, d := range []string{upper, work} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Chown(d, int(ids.UID), int(ids.GID)); err != nil {
				t.Fatal(err)
			}
		}
		root, err := h.MountRootfs(h.ctx(), RootfsArgs{Lower: []string{h.lower()}, Upper: upper, Work: work, UserNS: userns})
		if err != nil {
			t.Fatalf("MountRootfs: %v", err)
		}
		defer root.Close()
		return p.create(s, func(a *ContainerArgs) { a.Rootfs = root })
	}
	id, log := create(spec("/bin/payload", "stat", "/bin/payload", "/dev/null", "/volume"))
	if _, _, err := p.Start(h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	x := <-p.exits
	b, _ := os.ReadFile(log)
	if x.Code != 0 || !strings.Contains(string(b), "/bin/payload mode=0100755 uid=0 ") || !strings.Contains(string(b), "/volume mode=040700 uid=0 ") ||
		!strings.Contains(string(b), "/dev/null mode=020666") {
		t.Errorf("got %+v, log:\n%s\nwant image and volume to belong to root", x, b)
	}
	id, log = create(spec("/bin/payload", "cat", "/proc/self/uid_map", "/proc/self/oom_score_adj"))
	if _, _, err := p.Start(h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	x = <-p.exits
	b, _ = os.ReadFile(log)
	if x.Code != 0 || !strings.Contains(string(b), "700000") || !strings.Contains(string(b), " 500\n") {
		t.Errorf("got %+v, log:\n%s\nwant a mapping to 700000 and 500", x, b)
	}
	id, log = create(spec("/bin/payload", "mkfile", "/volume/f", "text"))
	if _, _, err := p.Start(h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	x = <-p.exits
	var st unix.Stat_t
	err = unix.Stat(filepath.Join(volume, "f"), &st)
	b, _ = os.ReadFile(log)
	if x.Code != 0 || err != nil || st.Uid != 0 {
		t.Errorf("got %+v, owner %d, error %v, log:\n%s\nwant a file of root's on the volume", x, st.Uid, err, b)
	}
	id, _ = create(spec("/bin/payload", "sleep", "1000"))
	if _, _, err := p.Start(h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	proc := *spec("/bin/payload", "true").Process
	e, err := p.Exec(h.ctx(), ExecArgs{ContainerID: id, ExecID: "e", Process: &proc})
	if err != nil {
		t.Fatal(err)
	}
	if code, err := e.Wait(h.ctx()); code != 0 || err != nil {
		t.Errorf("exec: got %d, %v", code, err)
	}
}

// The thread that moves must not be the process's first, wherever the goroutine that makes it begins: /proc/self would be the base
// mount namespace's then. Seen as "no cgroup hierarchy is mounted".
func TestTheProcessStaysInItsMountNamespace(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a mount namespace")
	}
	before, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	for range 50 { // which thread a goroutine gets is chance
		th, err := startThread(filepath.Join(t.TempDir(), "scratch"))
		if err != nil {
			t.Fatal(err)
		}
		var tid int
		th.do(func() { tid = unix.Gettid() })
		th.close()
		if tid == os.Getpid() {
			t.Fatal("the process's first thread was moved")
		}
	}
	if after, err := os.Readlink("/proc/self/ns/mnt"); err != nil || after != before {
		t.Errorf("mount namespace of the process: got %s, %v, want %s", after, err, before)
	}
}

func TestSetUpErrorsNameTheStep(t *testing.T) {
	h := newHost(t)
	id := newID()
	a := PodArgs{ID: id, Title: "test/bad", RunDir: filepath.Join(h.dir, "run", id), Sysctls: map[string]string{"net.ipv4.no_such_thing": "1"}}
	if err := os.MkdirAll(a.RunDir, 0o700); err != nil {
		t.Fatal(err)
	}
	p, err := h.StartPod(h.ctx(), a, func(Exit) {})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.Ready(h.ctx()); !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), "sysctl net.ipv4.no_such_thing=1") {
		t.Errorf("got %v, want ENOENT of the sysctl", err)
	}
	if _, err := p.List(h.ctx()); err == nil {
		t.Error("a pod init that failed to set up answered")
	}
	if err := p.Shutdown(h.ctx()); err != nil {
		t.Error(err)
	}
}

// Seen as "clone pod init: permission denied" with 20 pods at once: with enough descriptors open, package syscall put its own pipe
// over the descriptor that the child was about to execute.
func TestManyOpenDescriptors(t *testing.T) {
	h := newHost(t)
	for range 300 {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if f.Fd()%10 == 0 { // the control socket of the next pod comes after each number once
			p := h.pod(nil)
			if x, out := p.run(exampleSpec("/bin/payload", "true"), nil); x.Code != 0 {
				t.Fatalf("descriptor %d: got %+v, log %q", f.Fd(), x, out)
			}
		}
	}
}

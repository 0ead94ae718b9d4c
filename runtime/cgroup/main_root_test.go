package cgroup

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// The test binary plays the processes in the cgroups: with the variable set it does one of
// these and nothing else.
const roleVariable = "CRISP_CGROUP_TEST_ROLE"

var roles = map[string]func(args []string){
	"wait":   func([]string) { ready(); forever() },
	"hog":    hog,
	"forker": forker,
	"enter":  enter,
	"inside": inside,
	"device": device,
	"visit":  visit,
}

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVariable); role != "" {
		roles[role](os.Args[1:])
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func ready() { fmt.Println("ready") }

// forever ends with the test: its standard input is a pipe that the test holds.
func forever() { _, _ = io.Copy(io.Discard, os.Stdin) }

// hog takes memory until it is stopped.
func hog([]string) {
	ready()
	var keep [][]byte
	for {
		b := make([]byte, 1<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		keep = append(keep, b)
		if len(keep) > 2048 { // something is wrong with the limit: spare the machine
			os.Exit(3)
		}
	}
}

// forker keeps making children that do the same, at most two levels and a few at a time, as long as it lives.
func forker(args []string) {
	depth, _ := strconv.Atoi(args[0])
	if depth == 0 {
		forever()
		return
	}
	for range 3 {
		child := exec.Command("/proc/self/exe", strconv.Itoa(depth-1))
		child.Env = append(os.Environ(), roleVariable+"=forker")
		child.Stdin = os.Stdin
		if err := child.Start(); err != nil {
			fmt.Println("fork:", err)
			os.Exit(1)
		}
		defer func() { _ = child.Wait() }()
	}
	if len(args) > 1 {
		ready()
	}
	for { // short-lived children, so that forks race with the kill
		child := exec.Command("/proc/self/exe", "0")
		child.Env = append(os.Environ(), roleVariable+"=forker")
		if child.Run() != nil { // its stdin is empty: it ends at once
			return
		}
	}
}

// enter is a pod init in a user namespace: it starts inside, in the cgroup of a Join ByWriting. Its descriptors from 3 on are this
// binary, args[1] tasks files, and, with args[2] "procs", the cgroup.procs.
func enter(args []string) {
	runtime.LockOSThread() // of which the child is born
	tasks, _ := strconv.Atoi(args[0])
	for i := range tasks {
		if _, err := os.NewFile(uintptr(4+i), "tasks").WriteString("0"); err != nil {
			fmt.Println("enter:", err)
			os.Exit(1)
		}
	}
	child := exec.Command("/proc/self/fd/3", args[1])
	child.Env = append(os.Environ(), roleVariable+"=inside")
	child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
	child.ExtraFiles = []*os.File{os.NewFile(3, "self")}
	if args[1] == "procs" {
		child.ExtraFiles = append(child.ExtraFiles, os.NewFile(uintptr(4+tasks), "cgroup.procs"))
	}
	if err := child.Start(); err != nil {
		fmt.Println("start:", err)
		os.Exit(1)
	}
	_ = child.Wait() // it is killed
}

// inside enters the cgroup2 hierarchy's part, if there is one, and waits.
func inside(args []string) {
	if args[0] == "procs" {
		if _, err := os.NewFile(4, "cgroup.procs").WriteString("0"); err != nil {
			fmt.Println("inside:", err)
			os.Exit(1)
		}
	}
	fmt.Println(os.Getpid())
	forever()
}

// visit moves a thread of its own into the cgroup whose tasks file it is told, as a pod's init does to
// clone into it on v1, and back to the other when it is told to go on.
func visit(args []string) {
	runtime.LockOSThread()
	if unix.Gettid() == os.Getpid() { // not the main thread, which is what /proc/PID/cgroup is of
		done := make(chan struct{})
		go func() { visit(args); close(done) }()
		<-done
		return
	}
	for _, tasks := range args {
		if err := os.WriteFile(tasks, []byte("0"), 0); err != nil {
			fmt.Println("visit:", err)
			os.Exit(1)
		}
		ready()
		if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
			os.Exit(1)
		}
	}
}

// device opens the devices it is told once it may, and says what came of it.
func device(args []string) {
	ready()
	in := bufio.NewReader(os.Stdin)
	_, _ = in.ReadString('\n')
	for _, name := range args {
		f, err := os.OpenFile(name, os.O_RDONLY, 0)
		if err == nil {
			_ = f.Close()
		}
		fmt.Println(name, errors.Is(err, syscall.EPERM))
	}
	fmt.Println("done")
	forever()
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes cgroups")
	}
}

// newTestDriver is a driver whose Root is this test's alone, and removed after it.
func newTestDriver(t testing.TB) *Driver {
	t.Helper()
	needRoot(t)
	l, err := detect()
	if err != nil {
		t.Fatal(err)
	}
	return testDriverOf(t, l)
}

var testRoots struct {
	sync.Mutex
	n int
}

func testDriverOf(t testing.TB, l *layout) *Driver {
	t.Helper()
	k, err := openCgroupfs(l.trees)
	if err != nil {
		t.Fatal(err)
	}
	testRoots.Lock()
	testRoots.n++
	root := fmt.Sprintf("/crisp-test-%d-%d", os.Getpid(), testRoots.n)
	testRoots.Unlock()
	d, err := newDriver(Config{Root: root}, l, k)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		c := d.Open(root)
		if err := errors.Join(c.Kill(ctx), c.Remove(ctx), d.Close()); err != nil {
			t.Error(err)
		}
	})
	return d
}

// trackOnly are nodes that this machine can play for what needs no controllers: v2, and pure v1.
func trackOnly(t *testing.T) map[string]*layout {
	t.Helper()
	needRoot(t)
	l, err := detect()
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]*layout{l.mode.String(): l}
	if l.mode != Hybrid {
		return m
	}
	v2 := &layout{mode: Unified, trees: slices.Clone(l.trees[:1])}
	v2.trees[0].controllers = nil // hugetlb: would have to be enabled in a root that is not ours
	m["unified"] = v2
	m["legacy"] = &layout{mode: Legacy, trees: l.trees[1:]}
	return m
}

func eachLayout(t *testing.T, test func(t *testing.T, d *Driver)) {
	for name, l := range trackOnly(t) {
		t.Run(name, func(t *testing.T) { test(t, testDriverOf(t, l)) })
	}
}

func newPod(t testing.TB, d *Driver) string {
	t.Helper()
	pod := d.PodPath("", "p")
	created, err := d.CreatePod(t.Context(), pod)
	if err != nil || !created {
		t.Fatalf("CreatePod: %v, %v", created, err)
	}
	return pod
}

func newContainer(t testing.TB, d *Driver, pod, id string, r *specs.LinuxResources) *Cgroup {
	t.Helper()
	c := d.Open(d.ContainerPath(pod, id))
	if err := c.Create(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	return c
}

// process is one of ours in a cgroup.
type process struct {
	*exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// start runs a role in the cgroup of j, and waits until it says it is ready.
func start(t testing.TB, j *Join, role string, args ...string) *process {
	t.Helper()
	p := &process{Cmd: exec.Command("/proc/self/exe", args...)}
	p.Env = append(os.Environ(), roleVariable+"="+role)
	p.Stderr = os.Stderr
	p.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if j.DirFD != nil {
		p.SysProcAttr.UseCgroupFD, p.SysProcAttr.CgroupFD = true, int(j.DirFD.Fd())
	}
	var err error
	if p.in, err = p.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.out = bufio.NewReader(out)
	// The move: into v1 before anything else runs, by a shell that then becomes the role.
	script := ""
	for i, f := range j.Tasks {
		p.ExtraFiles = append(p.ExtraFiles, f)
		script += fmt.Sprintf("echo 0 >&%d && exec %d>&- && ", i+3, i+3)
	}
	if script != "" {
		p.Path = "/bin/bash"
		p.Args = append([]string{"bash", "-c", script + `exec "$@"`, "bash"}, append([]string{exe(t)}, args...)...)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = p.Process.Kill() // may be over
		_ = p.Wait()
	})
	p.expect(t, "ready")
	return p
}

func exe(t testing.TB) string {
	t.Helper()
	name, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return name
}

func (p *process) expect(t testing.TB, want string) {
	t.Helper()
	line, err := p.out.ReadString('\n')
	if strings.TrimSpace(line) != want {
		t.Fatalf("process said %q (%v), want %q", line, err, want)
	}
}

func join(t testing.TB, c *Cgroup, e Entry) *Join {
	t.Helper()
	j, err := c.Join(e)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	})
	return j
}

// killed waits for the end of p and checks that a SIGKILL was it.
func (p *process) killed(t testing.TB) {
	t.Helper()
	_ = p.Wait() // the state says more
	if s, ok := p.ProcessState.Sys().(syscall.WaitStatus); !ok || !s.Signaled() || s.Signal() != syscall.SIGKILL {
		t.Errorf("process ended with %v, want killed", p.ProcessState)
	}
}

func deadline(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func gone(t testing.TB, d *Driver, path string) {
	t.Helper()
	for i, h := range d.trees {
		if _, err := d.kernel.read(i, path+"/cgroup.procs"); !errors.Is(err, unix.ENOENT) {
			t.Errorf("%s is still there in %s: %v", path, h.dir, err)
		}
	}
}

func fileOf(t testing.TB, d *Driver, controller, path, file string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(d.trees[d.home(controller)].dir, path, file))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

func newReader(r io.Reader) *bufio.Reader { return bufio.NewReader(r) }

// nest makes a chain of cgroups, each in the one before.
func nest(t *testing.T, d *Driver, tree int, path string, depth int, name string) {
	t.Helper()
	dir, err := d.kernel.open(tree, path, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		t.Fatal(err)
	}
	fd := int(dir.Fd())
	defer dir.Close()
	for i := range depth {
		if err := unix.Mkdirat(fd, name, 0o755); err != nil {
			t.Fatal(err)
		}
		next, err := unix.Openat(fd, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			_ = unix.Close(fd)
		}
		fd = next
	}
	_ = unix.Close(fd)
}

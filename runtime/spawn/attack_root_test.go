package spawn

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Attacks from within a container, and faults of a pod init's surroundings.

// number is a system call's for payload's verb "syscall".
func number(n int) string { return strconv.Itoa(n) }

// start runs a container that sleeps.
func (p *testPod) start(spec *specs.Spec, change func(*ContainerArgs)) (id string, pid int) {
	p.h.t.Helper()
	id, _ = p.create(spec, change)
	pid, _, err := p.Start(p.h.ctx(), id)
	if err != nil {
		p.h.t.Fatalf("Start: %v", err)
	}
	return id, pid
}

// exec runs payload in a container and returns what it wrote.
func (p *testPod) exec(id string, spec *specs.Spec, args ...string) string {
	p.h.t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		p.h.t.Fatal(err)
	}
	defer r.Close()
	proc := *spec.Process
	proc.Args = append([]string{"/bin/payload"}, args...)
	proc.Terminal = false
	x, err := p.Exec(p.h.ctx(), ExecArgs{ContainerID: id, ExecID: newID()[:16], Process: &proc, Stdout: w, Stderr: w})
	w.Close()
	if err != nil {
		p.h.t.Fatalf("Exec: %v", err)
	}
	if _, err := x.Wait(p.h.ctx()); err != nil {
		p.h.t.Fatalf("Wait: %v", err)
	}
	b := make([]byte, 64<<10)
	n, _ := r.Read(b)
	return string(b[:n])
}

// The host's null device is what a container has as stdin and below its masks. Its root owns the inode.
func TestNullDeviceOfTheHostCannotBeChanged(t *testing.T) {
	p := newHost(t).pod(nil)
	var before, after unix.Stat_t
	if err := unix.Stat(os.DevNull, &before); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Chmod(os.DevNull, before.Mode&0o7777)
		_ = unix.Chown(os.DevNull, int(before.Uid), int(before.Gid))
	})
	mode := strconv.Itoa(int(before.Mode&0o7777 | unix.S_ISVTX)) // harmless, should it succeed
	spec := exampleSpec("/bin/payload", "syscall", number(unix.SYS_FCHMOD), "0", mode, ",", "syscall", number(unix.SYS_FCHOWN), "0", "0", "5")
	if _, out := p.run(spec, nil); strings.Count(out, "EROFS") != 2 {
		t.Errorf("stdin of a container: got %q, want EROFS twice", out)
	}
	spec = exampleSpec("/bin/payload", "sleep", "1000")
	spec.Linux.MaskedPaths = []string{"/proc/version"}
	id, _ := p.start(spec, nil)
	if out := p.exec(id, spec, "syscall", number(unix.SYS_FCHMOD), "0", mode); !strings.Contains(out, "EROFS") {
		t.Errorf("stdin of an exec'd process: got %q, want EROFS", out)
	}
	if out := p.exec(id, spec, "mountinfo"); !strings.Contains(out, " /proc/version ro,nosuid,noexec") {
		t.Errorf("masked file: got mounts\n%s\nwant /proc/version to be read-only", out)
	}
	if out := p.exec(id, spec, "cat", "/proc/version"); out != "" {
		t.Errorf("masked file: got %q, want nothing", out)
	}
	if err := unix.Stat(os.DevNull, &after); err != nil || after.Mode != before.Mode || after.Gid != before.Gid {
		t.Errorf("got mode %#o, group %d of the host's null device, want %#o, %d", after.Mode, after.Gid, before.Mode, before.Gid)
	}
}

// A container's root can reach the sealed binary by a command that is a link to /proc/self/exe.
func TestSealedImageKeepsItsMode(t *testing.T) {
	h := newHost(t)
	if err := unix.Fchmod(int(h.image.Fd()), 0); !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EROFS) {
		t.Errorf("got %v, want EPERM of the sealed memfd or EROFS of the read-only mount", err)
	}
	w, err := os.OpenFile("/proc/self/fd/"+strconv.Itoa(int(h.image.Fd())), os.O_WRONLY, 0)
	if err == nil {
		if _, err = w.Write([]byte("x")); err == nil {
			t.Error("the sealed image could be written")
		}
		w.Close()
	}
	h.pod(nil) // still starts
}

// children are the pids of a process's children, oldest first.
func children(t *testing.T, pid int) (pids []string) {
	t.Helper()
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lists {
		b, _ := os.ReadFile(l) // a thread that is gone has none
		pids = append(pids, strings.Fields(string(b))...)
	}
	slices.SortFunc(pids, func(a, b string) int {
		x, _ := strconv.Atoi(a)
		y, _ := strconv.Atoi(b)
		return x - y
	})
	return pids
}

// SEC-06: what the containers of a pod can do to the PID 1 they share.
func TestReaperSurvivesItsContainers(t *testing.T) {
	p := newHost(t).pod(func(a *PodArgs) { a.SharedPID = true })
	spec := exampleSpec("/bin/payload", "sleep", "1000")
	id, _ := p.start(spec, func(a *ContainerArgs) { a.PID = PIDPod })
	for sig := 1; sig <= 64; sig++ {
		if sig == 32 || sig == 33 { // of the C library
			continue
		}
		if out := p.exec(id, spec, "kill", "1", number(sig)); out != "" {
			t.Fatalf("kill with %d: %q", sig, out)
		}
	}
	out := p.exec(id, spec, "cat", "/proc/1/comm", "/proc/1/status")
	if !strings.HasPrefix(out, "crisp-init") || !strings.Contains(out, "CapPrm:\t0000000000000000") ||
		!strings.Contains(out, "CapEff:\t0000000000000000") || !strings.Contains(out, "NoNewPrivs:\t1") {
		t.Errorf("PID 1 is\n%s\nwant a reaper without capabilities", out)
	}
	fds, err := filepath.Glob("/proc/" + strings.TrimSpace(children(t, p.PID())[0]) + "/fd/*")
	if err != nil || len(fds) != 3 {
		t.Errorf("PID 1 has descriptors %v, error %v, want stdio only", fds, err)
	}
	for _, path := range []string{"/proc/1/root/", "/proc/1/cwd/"} {
		if out := p.exec(id, spec, "ls", path); !strings.Contains(out, "permission denied") {
			t.Errorf("ls %s: got %q, want permission denied", path, out)
		}
	}
}

// What a container runs must not possess the keys of whoever started the daemon.
func TestSessionKeyringOfTheDaemonIsNotInherited(t *testing.T) {
	h := newHost(t)
	var ring int
	var err error
	h.thread.do(func() { // pod inits are cloned from here
		if ring, err = unix.KeyctlInt(unix.KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0); err == nil {
			const possessorAll = 0x3f000000
			err = unix.KeyctlSetperm(ring, possessorAll)
		}
	})
	if errors.Is(err, unix.ENOSYS) {
		t.Skip("this kernel has no keyrings")
	}
	if err != nil {
		t.Fatal(err)
	}
	p := h.pod(nil)
	spec := exampleSpec("/bin/payload", "sleep", "1000")
	id, _ := p.start(spec, nil)
	describe := []string{"syscall", number(unix.SYS_KEYCTL), number(unix.KEYCTL_DESCRIBE), number(ring), "0", "0"}
	if out := p.exec(id, spec, describe...); out == "ok\n" {
		t.Error("an exec'd process possesses the daemon's session keyring")
	}
}

// A pod's init that is out of descriptors must not die when a daemon connects.
func TestPodInitOutOfDescriptors(t *testing.T) {
	h := newHost(t)
	p := h.pod(nil)
	if _, err := p.List(h.ctx()); err != nil { // it is set up
		t.Fatal(err)
	}
	var before unix.Rlimit
	if err := unix.Prlimit(p.PID(), unix.RLIMIT_NOFILE, nil, &before); err != nil {
		t.Fatal(err)
	}
	if err := unix.Prlimit(p.PID(), unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: before.Max}, nil); err != nil {
		t.Fatal(err)
	}
	limited, cancel := context.WithTimeout(h.ctx(), 300*time.Millisecond)
	defer cancel()
	for range 2 { // one accept(2) was waiting, with a descriptor reserved
		if conn, err := greet(limited, p.Handle().RunDir); err == nil {
			defer conn.Close()
		}
	}
	select {
	case <-p.Done():
		t.Fatal("the pod's init died")
	default:
	}
	if err := unix.Prlimit(p.PID(), unix.RLIMIT_NOFILE, &before, nil); err != nil {
		t.Fatal(err)
	}
	q, err := h.Attach(h.ctx(), p.Handle(), func(Exit) {})
	if err != nil {
		t.Fatal(err)
	}
	p.Close()
	p.Pod = q
	if _, err := q.List(h.ctx()); err != nil {
		t.Errorf("List: %v", err)
	}
}

// A container that ends at once is exited, whoever is faster: the one who reports the start or the one who waits for the end.
func TestShortLivedContainersAreSeenToExit(t *testing.T) {
	p := newHost(t).pod(nil)
	for range 20 {
		id, _ := p.create(exampleSpec("/bin/payload", "true"), nil)
		if _, _, err := p.Start(p.h.ctx(), id); err != nil {
			t.Fatal(err)
		}
		<-p.exits
		if err := p.Remove(p.h.ctx(), id); err != nil {
			t.Fatalf("Remove after the exit: %v", err)
		}
	}
}

// An init that is stopped costs its callers a bounded time, is found again when it goes on, and does not hold up Close.
func TestStoppedPodInit(t *testing.T) {
	h := newHost(t)
	p := h.pod(nil)
	id, _ := p.start(exampleSpec("/bin/payload", "sleep", "1000"), nil)
	if err := unix.Kill(p.PID(), unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Kill(p.PID(), unix.SIGCONT) })
	p.conn.SendTimeout = 100 * time.Millisecond
	for { // until its socket is full
		ctx, cancel := context.WithTimeout(h.ctx(), time.Millisecond)
		err := p.Signal(ctx, id, 0)
		cancel()
		if errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, context.DeadlineExceeded) {
			break
		}
		if err != nil && !errors.Is(err, context.DeadlineExceeded) { // nil: it had not stopped yet
			t.Fatalf("got %v, want a deadline", err)
		}
	}
	if err := unix.Kill(p.PID(), unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	err := ErrGone
	for errors.Is(err, ErrGone) && h.ctx().Err() == nil { // it is connected to anew
		_, err = p.List(h.ctx())
	}
	if err != nil {
		t.Fatalf("List when it goes on: %v", err)
	}
	if err := unix.Kill(p.PID(), unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	conn := p.conn
	p.mu.Unlock()
	conn.Close()
	begun := time.Now()
	p.Close()
	if d := time.Since(begun); d > 5*time.Second {
		t.Errorf("Close took %v", d)
	}
	if err := unix.Kill(p.PID(), unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if p.Pod, err = h.Attach(h.ctx(), p.Handle(), func(x Exit) { p.exits <- x }); err != nil {
		t.Fatal(err)
	}
}

// layer gives the image links, as path → target.
func (h *host) layer(links map[string]string) {
	h.t.Helper()
	for path, target := range links {
		if err := os.Symlink(target, filepath.Join(h.lower(), path)); err != nil {
			h.t.Fatal(err)
		}
	}
}

// SEC-13 by way of a volume: the image leads a mount of the pod over /dev, and nodes and links would be made on the host.
func TestVolumeLedOverDev(t *testing.T) {
	h := newHost(t)
	h.layer(map[string]string{"data": "/dev"})
	p := h.pod(nil)
	volume := filepath.Join(h.dir, "volume")
	if err := os.Mkdir(volume, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(volume, "null"), []byte("canary"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tty := range []bool{false, true} {
		spec := exampleSpec("/bin/payload", "true")
		spec.Process.Terminal = tty
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/data", Type: "bind", Source: volume})
		p.run(spec, nil)
		entries, err := os.ReadDir(volume)
		b, _ := os.ReadFile(filepath.Join(volume, "null"))
		if err != nil || len(entries) != 1 || string(b) != "canary" {
			t.Fatalf("the volume has %v, error %v, null says %q; want it untouched", entries, err, b)
		}
	}
}

// CVE-2019-16884 class: the image leads a mount of the pod over /proc or /sys.
func TestVolumeLedIntoTheKernelsFileSystems(t *testing.T) {
	h := newHost(t)
	h.layer(map[string]string{"a": "/proc", "b": "/../proc/sys/", "c": "proc/self/attr", "d": "/sys/fs", "e": "/tmp"})
	p := h.pod(nil)
	for _, tt := range []struct {
		path    string
		refused bool
	}{{"/a", true}, {"/a/sys/net", true}, {"/b", true}, {"/c", true}, {"/d", true}, {"/e", false}, {"/proc/sys/kernel", false}} {
		spec := exampleSpec("/bin/payload", "true")
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: tt.path, Type: "bind", Source: h.dir})
		id, _ := p.create(spec, nil)
		_, _, err := p.Start(h.ctx(), id)
		if refused := err != nil && strings.Contains(err.Error(), "symbolic link of the image"); refused != tt.refused {
			t.Errorf("mount at %s: got %v, want it refused: %t", tt.path, err, tt.refused)
		}
		if err == nil {
			<-p.exits
		}
	}
}

// A terminal comes from a devpts or not at all, whatever the container has made of /dev/pts.
func TestTerminalOfSomethingElse(t *testing.T) {
	h := newHost(t)
	p := h.pod(nil)
	pts := filepath.Join(h.dir, "pts")
	if err := os.Mkdir(pts, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mknod(filepath.Join(pts, "ptmx"), unix.S_IFIFO|0o666, 0); err != nil {
		t.Fatal(err)
	}
	spec := exampleSpec("/bin/payload", "sleep", "1000")
	spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/dev/pts", Type: "bind", Source: pts})
	id, _ := p.start(spec, nil)
	proc := *spec.Process
	proc.Terminal = true
	if _, err := p.Exec(h.ctx(), ExecArgs{ContainerID: id, ExecID: "tty", Process: &proc}); err == nil || !strings.Contains(err.Error(), "not a devpts") {
		t.Errorf("got %v, want a refusal", err)
	}
}

// A source that is a link lies on the mount it leads to, not on the one its name suggests.
func TestPropagationOfALinkedSource(t *testing.T) {
	h := newHost(t)
	shared := filepath.Join(h.dir, "shared")
	link := filepath.Join(h.dir, "private", "link")
	for _, d := range []string{shared, filepath.Dir(link)} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(d, d, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(d, unix.MNT_DETACH) })
	}
	if err := errors.Join(unix.Mount("", shared, "", unix.MS_SHARED, ""), unix.Mount("", filepath.Dir(link), "", unix.MS_PRIVATE, ""),
		os.Symlink(shared, link)); err != nil {
		t.Fatal(err)
	}
	s := source{path: link, mount: 0, propagation: unix.MS_SHARED}
	if err := s.checkPropagation(); err != nil {
		t.Errorf("link to a shared mount: %v", err)
	}
	s.path = filepath.Dir(link)
	if err := s.checkPropagation(); !errors.Is(err, ErrInvalid) {
		t.Errorf("private mount: got %v, want ErrInvalid", err)
	}
}

// The end of a container kills what is being started in it; that is not a want of memory.
func TestExecAtTheEndOfItsContainer(t *testing.T) {
	p := newHost(t).pod(nil)
	spec := exampleSpec("/bin/payload", "sleep", "1000")
	for range 10 {
		id, pid := p.start(spec, nil)
		proc := *spec.Process
		proc.Args = []string{"/bin/payload", "sleep", "1000"}
		result := make(chan error, 4)
		for range cap(result) {
			go func() {
				x, err := p.Exec(p.h.ctx(), ExecArgs{ContainerID: id, ExecID: newID()[:16], Process: &proc})
				if err == nil {
					_, err = x.Wait(p.h.ctx())
				}
				result <- err
			}()
		}
		for len(children(t, p.PID())) < 3 && len(result) == 0 { // some are on their way
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for range cap(result) {
			if err := <-result; err != nil && !errors.Is(err, ErrState) {
				t.Errorf("got %v, want nil or ErrState", err)
			}
		}
		<-p.exits
	}
}

// openFiles are what the descriptors of a process lead to.
func openFiles(t *testing.T, pid int) []string {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	var l []string
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil {
			l = append(l, to)
		}
	}
	return l
}

// Containers and exec'd processes, good and bad, leave no descriptor, in the pod's init nor here.
func TestNoDescriptorIsLeftBehind(t *testing.T) {
	h := newHost(t)
	p := h.pod(func(a *PodArgs) { a.SharedPID = true })
	volume := func(s *specs.Spec, source string) *specs.Spec {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/volume", Type: "bind", Source: source, Options: []string{"rbind"}})
		return s
	}
	cycle := func() {
		tty := volume(exampleSpec("/bin/payload", "sleep", "1000"), h.dir)
		tty.Process.Terminal = true
		id, pid := p.start(tty, func(a *ContainerArgs) { a.PID = PIDPod; a.Stdin = true })
		p.exec(id, tty, "true")
		proc := *tty.Process
		for _, args := range [][]string{{"/bin/payload", "true"}, {"/none"}} {
			proc.Args = args
			if x, err := p.Exec(h.ctx(), ExecArgs{ContainerID: id, ExecID: newID()[:16], Process: &proc}); err == nil {
				x.TakeTerminal().Close()
				if _, err := x.Wait(h.ctx()); err != nil {
					t.Fatal(err)
				}
			}
		}
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		stdin, err := p.Attach(h.ctx(), id, true, w, nil)
		w.Close()
		if err != nil {
			t.Fatal(err)
		}
		stdin.Close()
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		<-p.exits
		_, _ = io.Copy(io.Discard, r) // the init has let go of its end
		r.Close()
		if err := p.Remove(h.ctx(), id); err != nil {
			t.Fatal(err)
		}
		for _, bad := range []*specs.Spec{exampleSpec("/none"), volume(exampleSpec("/bin/payload", "true"), "/proc/self/mounts")} {
			bad.Mounts[0].Options = append(bad.Mounts[0].Options, "unknown=option")
			id, _ := p.create(bad, nil)
			if _, _, err := p.Start(h.ctx(), id); err == nil {
				t.Fatal("a start with an unknown mount option succeeded")
			}
			if err := p.Remove(h.ctx(), id); err != nil {
				t.Fatal(err)
			}
		}
		id, _ = p.create(exampleSpec("/bin/payload", "true"), nil) // never started
		if err := p.Remove(h.ctx(), id); err != nil {
			t.Fatal(err)
		}
	}
	cycle()
	before, ours := openFiles(t, p.PID()), openFiles(t, os.Getpid())
	for range 5 {
		cycle()
	}
	if after := openFiles(t, p.PID()); len(after) != len(before) {
		t.Errorf("the pod's init has %d descriptors, had %d:\n%s", len(after), len(before), strings.Join(after, "\n"))
	}
	if after := openFiles(t, os.Getpid()); len(after) > len(ours) {
		t.Errorf("we have %d descriptors, had %d:\n%s", len(after), len(ours), strings.Join(after, "\n"))
	}
}

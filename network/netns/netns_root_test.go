package netns

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func requireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes and mounts network namespaces")
	}
}

func newNS(t testing.TB) *os.File {
	t.Helper()
	requireRoot(t)
	ns, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	return ns
}

// here is the namespace of the calling thread.
func here(t testing.TB) string {
	t.Helper()
	s, err := os.Readlink(threadNS)
	if err != nil {
		t.Error(err)
	}
	return s
}

func TestDo(t *testing.T) {
	a, b := newNS(t), newNS(t)
	home := here(t)
	boom := errors.New("boom")
	var inA, inB, nested string
	err := Do(a, func() error {
		inA = here(t)
		if err := Do(b, func() error { nested = here(t); return nil }); err != nil {
			return err
		}
		if here(t) != inA {
			t.Error("a nested Do moved its caller")
		}
		return boom
	})
	if !errors.Is(err, boom) {
		t.Errorf("got %v, want the function's own error", err)
	}
	if err := Do(b, func() error { inB = here(t); return nil }); err != nil {
		t.Fatal(err)
	}
	if inA == home || inB == home || inA == inB || nested != inB {
		t.Errorf("home %s, a %s, b %s, b inside a %s", home, inA, inB, nested)
	}
	if err := Do(nil, func() error {
		if here(t) != home {
			t.Error("nil is not home")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if err := Do(a, func() error { runtime.Goexit(); return nil }); !errors.Is(err, errExited) {
		t.Errorf("function that exits: got %v, want errExited", err)
	}
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	if err := Do(file, func() error { t.Error("ran"); return nil }); !errors.Is(err, unix.EINVAL) {
		t.Errorf("not a namespace: got %v, want EINVAL", err)
	}
}

// No goroutine finds itself elsewhere afterwards.
func TestDoLeavesThreadsAtHome(t *testing.T) {
	ns := newNS(t)
	home := here(t)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() { // waited for below
			for range 50 {
				if err := Do(ns, func() error {
					if here(t) == home {
						t.Error("not moved")
					}
					return nil
				}); err != nil {
					t.Error(err)
				}
				if got := here(t); got != home {
					t.Errorf("a goroutine is in %s, want %s", got, home)
				}
			}
		})
	}
	wg.Wait()
	// All threads of the process, also idle ones.
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		if got, err := os.Readlink("/proc/self/task/" + task.Name() + "/ns/net"); err == nil && got != home {
			t.Errorf("thread %s is in %s, want %s", task.Name(), got, home)
		}
	}
}

// testDir makes a Dir that is gone after the test.
func testDir(t *testing.T) (*Dir, string) {
	t.Helper()
	requireRoot(t)
	path := filepath.Join(t.TempDir(), "netns")
	d, err := OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = d.Close()
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return d, path
}

func mounts(t *testing.T, path string) int {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], path) { // the mount point
			n++
		}
	}
	return n
}

func TestPin(t *testing.T) {
	d, path := testDir(t)
	a, b := newNS(t), newNS(t)
	want := filepath.Join(path, "crisp-a")
	for range 2 {
		if got, err := d.Pin("crisp-a", a); err != nil || got != want {
			t.Fatalf("got %q, %v, want %q", got, err, want)
		}
	}
	if n := mounts(t, want); n != 1 {
		t.Errorf("mounted %d times, want once", n)
	}
	if _, err := d.Pin("crisp-a", b); !errors.Is(err, ErrExists) {
		t.Errorf("another namespace: got %v, want ErrExists", err)
	}
	got, err := d.Open("crisp-a")
	if err != nil {
		t.Fatal(err)
	}
	if same, err := Same(got, a); err != nil || !same {
		t.Errorf("same: got %v, %v", same, err)
	}
	_ = got.Close()
	// As other programs see it.
	if ip, err := exec.LookPath("nsenter"); err == nil {
		if out, err := exec.Command(ip, "--net="+want, "true").CombinedOutput(); err != nil {
			t.Errorf("nsenter: %v: %s", err, out)
		}
	}
	// A leftover of a crash: a file without a namespace.
	if err := os.WriteFile(filepath.Join(path, "crisp-b"), nil, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Open("crisp-b"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("file without a namespace: got %v, want ErrNotExist", err)
	}
	if _, err := d.Pin("crisp-b", b); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(path, "other"), nil, 0); err != nil {
		t.Fatal(err)
	}
	if names, err := d.List("crisp-"); err != nil || strings.Join(names, " ") != "crisp-a crisp-b" {
		t.Errorf("list: got %v, %v", names, err)
	}
	// Opening the directory again does not hide anything.
	again, err := OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = again.Close() }()
	for _, d := range []*Dir{again, d} {
		for _, name := range []string{"crisp-a", "crisp-b", "never"} {
			if err := d.Unpin(name); err != nil {
				t.Error(err)
			}
		}
	}
	if names, err := d.List(""); err != nil || strings.Join(names, " ") != "other" {
		t.Errorf("list after unpinning: got %v, %v", names, err)
	}
	if n := mounts(t, path); n != 1 {
		t.Errorf("%d mounts left in and on the directory, want 1", n)
	}
}

// C-41: taken apart by others.
func TestUnpinLeftovers(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"unmounted": func(p string) error { return unix.Unmount(p, unix.MNT_DETACH) },
		"removed": func(p string) error {
			return errors.Join(unix.Unmount(p, unix.MNT_DETACH), os.Remove(p))
		},
		"mounted twice": func(p string) error { return unix.Mount(p, p, "", unix.MS_BIND, "") },
	} {
		t.Run(name, func(t *testing.T) {
			d, _ := testDir(t)
			path, err := d.Pin("x", newNS(t))
			if err != nil {
				t.Fatal(err)
			}
			if err := spoil(path); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := d.Unpin("x"); err != nil {
					t.Error(err)
				}
			}
			if names, err := d.List(""); err != nil || len(names) != 0 {
				t.Errorf("left: %v, %v", names, err)
			}
		})
	}
}

func TestBadNames(t *testing.T) {
	d, _ := testDir(t)
	ns := newNS(t)
	for _, name := range []string{"", ".", "..", "a/b", "/etc", ".hidden", "a\x00b", strings.Repeat("x", 256)} {
		_, pin := d.Pin(name, ns)
		_, open := d.Open(name)
		for what, err := range map[string]error{"Pin": pin, "Open": open, "Unpin": d.Unpin(name)} {
			if !errors.Is(err, ErrName) {
				t.Errorf("%s(%q): got %v, want ErrName", what, name, err)
			}
		}
	}
	if _, err := OpenDir("relative"); err == nil {
		t.Error("a relative directory was opened")
	}
}

func TestSysctls(t *testing.T) {
	requireRoot(t)
	var s Sysctls
	for i := range 2*usesPerProc + 1 {
		ns := newNS(t)
		if err := Do(ns, func() error {
			if err := s.Write("ipv4/ip_default_ttl", "77"); err != nil {
				return err
			}
			v, err := os.ReadFile("/proc/sys/net/ipv4/ip_default_ttl")
			if strings.TrimSpace(string(v)) != "77" {
				t.Errorf("namespace %d: got %q", i, v)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	if v, err := os.ReadFile("/proc/sys/net/ipv4/ip_default_ttl"); err != nil || strings.TrimSpace(string(v)) == "77" {
		t.Errorf("the host's setting: got %q, %v", v, err)
	}
	if err := s.Write("ipv4/no_such", "1"); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "set net/ipv4/no_such to 1") {
		t.Errorf("got %v, want ErrNotExist", err)
	}
	if s.current.fd == unix.AT_FDCWD {
		t.Error("no procfs of its own was made")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func BenchmarkDo(b *testing.B) {
	ns := newNS(b)
	for b.Loop() {
		if err := Do(ns, func() error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}

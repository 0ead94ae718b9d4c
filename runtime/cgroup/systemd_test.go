package cgroup

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fakeUnits is systemd beside the kernel in memory: it moves a scope's process, and ends a scope that is told to.
type fakeUnits struct {
	*fake
	said []string
	err  error
}

func (u *fakeUnits) start(_ context.Context, s scope) error {
	u.said = append(u.said, fmt.Sprintf("start %s in %s (%s) with %d", s.name, s.slice, s.description, s.pid))
	if u.err != nil {
		return u.err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for at := range u.dirs {
		if path.Base(at.path) == s.name {
			u.moveLocked(s.pid, at)
			u.moveLocked(s.pid+1, at) // a child of its
		}
	}
	return nil
}

func (u *fakeUnits) stop(_ context.Context, name string) error {
	u.said = append(u.said, "stop "+name)
	return u.err
}

func (u *fakeUnits) close() error { return nil }

func (f *fake) moveLocked(pid int, to place) {
	for at, pids := range f.procsOf {
		f.procsOf[at] = slices.DeleteFunc(pids, func(p int) bool { return p == pid })
	}
	f.procsOf[to] = append(f.procsOf[to], pid)
}

func systemdDriver(t *testing.T, f *fake) (*Driver, *fakeUnits) {
	t.Helper()
	d, err := newDriver(Config{Systemd: true}, f.layout, f)
	if err != nil {
		t.Fatal(err)
	}
	u := &fakeUnits{fake: f}
	d.units = u
	return d, u
}

func TestSystemdPaths(t *testing.T) {
	d, _ := systemdDriver(t, newFake(unifiedLayout))
	for _, c := range []struct{ parent, want string }{
		{"", "/crisp.slice/crisp-p.scope"},
		{"-.slice", "/crisp-p.scope"},
		{"kubepods-burstable-pod1_2.slice", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/crisp-p.scope"},
		{"/kubepods.slice/kubepods-besteffort.slice", "/kubepods.slice/kubepods-besteffort.slice/crisp-p.scope"},
		{"memory.slice", "/_memory.slice/crisp-p.scope"},
		{"memory-x.slice", "/_memory.slice/memory-x.slice/crisp-p.scope"},
		{"_a.slice", "/__a.slice/crisp-p.scope"},
	} {
		if err := d.ValidateParent(c.parent); err != nil {
			t.Errorf("%q: %v", c.parent, err)
		}
		got := d.PodPath(c.parent, "p")
		if got != c.want {
			t.Errorf("PodPath(%q) = %q, want %q", c.parent, got, c.want)
		}
		if !d.Owned(got) || !d.ValidPodPath(got) {
			t.Errorf("%q: Owned %v, ValidPodPath %v", got, d.Owned(got), d.ValidPodPath(got))
		}
		if slice := unitOf(path.Base(path.Dir(got))); c.parent != "" && slice != path.Base(c.parent) {
			t.Errorf("%q lies in unit %q, want %q", got, slice, c.parent)
		}
	}
	for _, p := range []string{"/kubepods/pod1", "/x.scope", "/crisp-.scope", "/crisp/x"} {
		if d.Owned(p) {
			t.Errorf("%q is owned", p)
		}
	}
	if !d.Owned("/crisp/pod1") {
		t.Error("a pod of the cgroupfs driver is not owned")
	}
}

func TestSystemdPodLife(t *testing.T) {
	f := newFake(unifiedLayout)
	d, u := systemdDriver(t, f)
	ctx := t.Context()
	parent := "/kubepods.slice/kubepods-pod1.slice"
	if _, err := d.mkdirAll(0, parent); err != nil { // the kubelet's
		t.Fatal(err)
	}
	empty := f.String()
	pod := d.PodPath(parent, "p1")
	created, err := d.CreatePod(ctx, pod)
	if err != nil || !created {
		t.Fatalf("CreatePod: %v, %v", created, err)
	}
	leaf := place{0, d.InitPath(pod, "p1")}
	if err := d.Open(leaf.path).Create(ctx, nil); err != nil {
		t.Fatal(err)
	}
	f.procsOf[leaf] = []int{7, 8}
	if on := f.dirs[place{0, pod}]["cgroup.subtree_control"]; on != "" {
		t.Errorf("controllers before the scope is systemd's: %q", on)
	}
	f.onWrite = func(at place, name, value string) {
		if name == "cgroup.procs" {
			var pid int
			_, _ = fmt.Sscan(value, &pid) // a number of the fake's own
			f.moveLocked(pid, at)
		}
	}
	if err := d.Adopt(ctx, PodInit{PodPath: pod, PodID: "p1", PID: 7, Title: "ns/name"}); err != nil {
		t.Fatal(err)
	}
	if got := f.procsOf[leaf]; !slices.Equal(got, []int{7, 8}) {
		t.Errorf("in the leaf: %v, want the init and its child", got)
	}
	if on := f.dirs[place{0, pod}]["cgroup.subtree_control"]; on != "cpuset cpu io memory hugetlb pids" {
		t.Errorf("controllers of the scope: %q", on)
	}
	for file := range f.written {
		if path.Dir(file) == f.host(0, pod) && path.Base(file) != "cgroup.subtree_control" {
			t.Errorf("%s was written: it is systemd's", file)
		}
	}
	c := d.Open(d.ContainerPath(pod, "c1"))
	if err := c.Create(ctx, kubelet()); err != nil {
		t.Fatal(err)
	}
	f.procsOf[leaf] = nil
	if err := d.RemovePod(ctx, pod); err != nil {
		t.Fatal(err)
	}
	if err := d.RemovePod(ctx, pod); err != nil {
		t.Errorf("RemovePod again: %v", err)
	}
	if got := dirsOf(f.String()); got != dirsOf(empty) {
		t.Errorf("left:\n%swant:\n%s", got, dirsOf(empty))
	}
	want := "start crisp-p1.scope in kubepods-pod1.slice (crisp pod ns/name) with 7, stop crisp-p1.scope"
	if got := strings.Join(u.said, ", "); got != want {
		t.Errorf("systemd was told %q, want %q", got, want)
	}
}

// dirsOf are the directories of a fake's state.
func dirsOf(state string) string {
	var b strings.Builder
	for line := range strings.Lines(state) {
		if strings.HasSuffix(line, "/\n") {
			b.WriteString(line)
		}
	}
	return b.String()
}

func TestAdoptFails(t *testing.T) {
	f := newFake(unifiedLayout)
	d, u := systemdDriver(t, f)
	ctx := t.Context()
	pod := d.PodPath("", "p1")
	if _, err := d.CreatePod(ctx, pod); err != nil {
		t.Fatal(err)
	}
	u.err = errors.New("cannot reach systemd")
	err := d.Adopt(ctx, PodInit{PodPath: pod, PodID: "p1", PID: 7})
	if err == nil || !strings.Contains(err.Error(), `cannot adopt cgroup "/crisp.slice/crisp-p1.scope": start crisp-p1.scope in crisp.slice: cannot reach systemd`) {
		t.Errorf("Adopt: %v", err)
	}
	// It stays, and says so, for as long as systemd may believe in it.
	if err := d.RemovePod(ctx, pod); err == nil || !strings.Contains(err.Error(), "stop crisp-p1.scope: cannot reach systemd") {
		t.Errorf("RemovePod: %v", err)
	}
	u.err = nil
	if own, err := d.OwnPods(); err != nil || own["p1"] != pod {
		t.Errorf("OwnPods: %v, %v", own, err)
	}
	if err := d.RemovePod(ctx, pod); err != nil {
		t.Error(err)
	}
	if own, err := d.OwnPods(); err != nil || len(own) != 0 {
		t.Errorf("OwnPods: %v, %v", own, err)
	}
}

func TestAdoptIsNothingWithoutSystemd(t *testing.T) {
	f := newFake(unifiedLayout)
	before := f.String()
	if err := f.driver(t).Adopt(t.Context(), PodInit{PodPath: "/kubepods/pod1", PodID: "p1", PID: 7}); err != nil || f.String() != before {
		t.Errorf("Adopt: %v, and\n%s", err, f)
	}
}

// A process that has ended meanwhile is no hindrance, one that cannot be moved is.
func TestClearRoot(t *testing.T) {
	for _, c := range []struct {
		name string
		err  unix.Errno
		want error
	}{{"ended", unix.ESRCH, nil}, {"not to be moved", unix.EBUSY, unix.EBUSY}} {
		f := newFake(unifiedLayout)
		d, _ := systemdDriver(t, f)
		if _, err := d.mkdirAll(0, "/a/b"); err != nil {
			t.Fatal(err)
		}
		root := place{0, "/a"}
		f.procsOf[root] = []int{5}
		f.fail = func(op string) error {
			if strings.HasPrefix(op, "write") {
				delete(f.procsOf, root)
				return c.err
			}
			return nil
		}
		if err := d.clearRoot(t.Context(), "/a", "/a/b"); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

package cgroup

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func TestValidateParent(t *testing.T) {
	cgroupfs := &Driver{}
	systemd := &Driver{config: Config{Systemd: true}}
	for _, c := range []struct {
		name   string
		d      *Driver
		parent string
		ok     bool
	}{
		{"none", cgroupfs, "", true},
		{"kubelet", cgroupfs, "/kubepods/burstable/pod12-34", true},
		{"root", cgroupfs, "/", true},
		{"a slice is a fine directory", cgroupfs, "/system.slice", true},
		{"relative", cgroupfs, "kubepods", false},
		{"slice for cgroupfs", cgroupfs, "kubepods.slice", false},
		{"up", cgroupfs, "/kubepods/../x", false},
		{"up at the end", cgroupfs, "/kubepods/..", false},
		{"dot", cgroupfs, "/kubepods/./x", false},
		{"dots in a name", cgroupfs, "/kubepods/..x", true},
		{"NUL", cgroupfs, "/a\x00b", false},
		{"newline", cgroupfs, "/a\nb", false},
		{"not UTF-8", cgroupfs, "/a\xff", false},
		{"right to left", cgroupfs, "/a\u202eb", false},
		{"long", cgroupfs, "/" + strings.Repeat("a/", 2000), false},
		{"long name", cgroupfs, "/" + strings.Repeat("a", 256), false},
		{"systemd none", systemd, "", true},
		{"systemd slice", systemd, "kubepods-burstable-pod1_2.slice", true},
		{"systemd root slice", systemd, "-.slice", true},
		{"systemd path", systemd, "/kubepods.slice", true},
		{"systemd path of the kubelet", systemd, "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice", true},
		{"systemd escaped name", systemd, `a\x2db.slice`, true},
		{"systemd path to elsewhere", systemd, "/x.slice/kubepods.slice", false},
		{"systemd path that ends early", systemd, "/kubepods-burstable.slice", false},
		{"systemd path with slashes", systemd, "//kubepods.slice", false},
		{"systemd relative path", systemd, "kubepods.slice/kubepods-burstable.slice", false},
		{"systemd cgroupfs path", systemd, "/kubepods/burstable", false},
		{"systemd template", systemd, "a@b.slice", false},
		{"systemd space", systemd, "a b.slice", false},
		{"systemd first -", systemd, "-a.slice", false},
		{"systemd last -", systemd, "a-.slice", false},
		{"systemd long", systemd, strings.Repeat("a", 250) + ".slice", false},
		{"systemd NUL", systemd, "a\x00.slice", false},
		{"systemd scope", systemd, "x.scope", false},
		{"systemd empty part", systemd, "a--b.slice", false},
		{"systemd nothing", systemd, ".slice", false},
	} {
		err := c.d.ValidateParent(c.parent)
		if (err == nil) != c.ok {
			t.Errorf("%s: ValidateParent(%q) = %v, want ok %v", c.name, c.parent, err, c.ok)
		}
		if err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", c.name, err)
		}
		if err != nil && len(c.parent) < 100 && !strings.Contains(err.Error(), fmt.Sprintf("%q", c.parent)) {
			t.Errorf("%s: %v does not name %q", c.name, err, c.parent)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	noDevices := legacyLayout
	noDevices.trees = slices.DeleteFunc(slices.Clone(noDevices.trees), func(h hierarchy) bool { return h.name == "devices" })
	for _, c := range []struct {
		name   string
		config Config
		l      layout
		want   error
	}{
		{"systemd on v1", Config{Systemd: true}, hybridLayout, ErrUnsupported},
		{"systemd with a root that is no slice", Config{Systemd: true, Root: "/a b"}, unifiedLayout, ErrInvalid},
		{"relative root", Config{Root: "crisp"}, unifiedLayout, ErrInvalid},
		{"no way to limit devices", Config{}, noDevices, ErrUnsupported},
	} {
		if _, err := newDriver(c.config, &c.l, newFake(c.l)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

func TestPaths(t *testing.T) {
	d := newFake(unifiedLayout).driver(t)
	for _, c := range []struct{ got, want string }{
		{d.PodPath("", "p1"), "/crisp/podp1"},
		{d.PodPath("/kubepods/pod1/", "p1"), "/kubepods/pod1"},
		{d.InitPath("/kubepods/pod1", "p1"), "/kubepods/pod1/crisp-pod-p1"},
		{d.ContainerPath("/kubepods/pod1", "c1"), "/kubepods/pod1/crisp-c1"},
		{d.Open("/x").Path(), "/x"},
	} {
		if c.got != c.want {
			t.Errorf("got %q, want %q", c.got, c.want)
		}
	}
}

// A pod's life on a fake of each layout: the whole of the kernel's state after each step.
func TestPodLife(t *testing.T) {
	for _, l := range []layout{unifiedLayout, hybridLayout, legacyLayout} {
		t.Run(l.mode.String(), func(t *testing.T) {
			f := newFake(l)
			d := f.driver(t)
			ctx := t.Context()
			var b strings.Builder
			state := func(step string) { fmt.Fprintf(&b, "== %s\n%s", step, f) }
			empty := f.String()

			pod := d.PodPath("/kubepods/pod1", "p1")
			created, err := d.CreatePod(ctx, pod)
			if err != nil || !created {
				t.Fatalf("CreatePod: %v, %v", created, err)
			}
			state("pod")
			if created, err := d.CreatePod(ctx, pod); err != nil || created {
				t.Errorf("second CreatePod: %v, %v", created, err)
			}
			leaf, c := d.Open(d.InitPath(pod, "p1")), d.Open(d.ContainerPath(pod, "c1"))
			if err := errors.Join(leaf.Create(ctx, nil), c.Create(ctx, kubelet())); err != nil {
				t.Fatal(err)
			}
			state("init and container")
			e, j, err := c.Exec("exec-1", ByBirth)
			if err != nil {
				t.Fatal(err)
			}
			var names []string
			if j.DirFD != nil {
				names = append(names, "clone into "+j.DirFD.Name())
			}
			for _, file := range j.Tasks {
				names = append(names, "write "+file.Name())
			}
			if err := j.Close(); err != nil {
				t.Error(err)
			}
			fmt.Fprintf(&b, "== exec %s\n%s\n", e.Path(), strings.Join(names, "\n"))
			sources := c.BindSources()
			b.WriteString("== bind sources\n")
			for _, n := range slices.Sorted(maps.Keys(sources)) {
				fmt.Fprintf(&b, "%s: %s\n", n, sources[n])
			}
			fmt.Fprintf(&b, "== missing\n%s\n", strings.Join(d.Missing(), "\n"))
			for range 2 { // all idempotent; the exec'd one's goes with its container's
				if err := errors.Join(c.Remove(ctx), leaf.Remove(ctx), d.RemovePod(ctx, pod)); err != nil {
					t.Error(err)
				}
			}
			if err := d.RemovePod(ctx, "/kubepods"); err != nil {
				t.Error(err)
			}
			f.written = map[string]string{}
			if got := f.String(); got != empty {
				t.Errorf("left over:\n%s", got)
			}
			golden(t, "life-"+l.mode.String()+".golden", b.String())
		})
	}
}

// Whatever fails, nothing is left.
func TestCreateFailsCleanly(t *testing.T) {
	const pod = "/kubepods/pod1"
	for _, l := range []layout{unifiedLayout, hybridLayout, legacyLayout} {
		t.Run(l.mode.String(), func(t *testing.T) {
			// run makes a pod and a container with the n-th operation failing.
			run := func(n int) (f *fake, failed string, err error) {
				f = newFake(l)
				d := f.driver(t)
				for tree := range l.trees {
					if err := f.mkdir(tree, "/kubepods"); err != nil {
						t.Fatal(err)
					}
				}
				ops := 0
				f.fail = func(op string) error {
					if ops++; ops == n {
						failed = op
						return unix.EIO
					}
					return nil
				}
				if _, err = d.CreatePod(t.Context(), pod); err == nil {
					err = d.Open(d.ContainerPath(pod, "c1")).Create(t.Context(), kubelet())
					f.fail = nil
					if left := f.names(0, pod); err != nil && len(left) > 0 {
						t.Errorf("operation %d (%s) failed and left %v", n, failed, left)
					}
					if err != nil {
						// Whatever of the container is left would be in the way.
						if err := d.RemovePod(t.Context(), pod); err != nil {
							t.Errorf("operation %d (%s) failed: %v", n, failed, err)
						}
					}
				}
				return f, failed, err
			}
			all, _, err := run(0)
			if err != nil {
				t.Fatal(err)
			}
			for n := 1; n <= len(all.log)-len(l.trees); n++ {
				f, failed, err := run(n)
				if failed == "" {
					t.Fatalf("there is no operation %d", n)
				}
				// Controllers that cannot be enabled all at once are enabled one by one.
				if err == nil && strings.Contains(failed, "subtree_control") {
					continue
				}
				if !errors.Is(err, unix.EIO) {
					t.Errorf("operation %d (%s): %v, want EIO", n, failed, err)
				}
				for tree := range l.trees {
					if left := f.names(tree, "/kubepods"); len(left) > 0 {
						t.Errorf("operation %d (%s) failed and left %v in %s", n, failed, left, l.trees[tree].dir)
					}
				}
			}
		})
	}
}

func TestCreateCanceled(t *testing.T) {
	f := newFake(unifiedLayout)
	d := f.driver(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.CreatePod(ctx, "/x"); !errors.Is(err, context.Canceled) {
		t.Errorf("CreatePod: %v, want Canceled", err)
	}
	if err := d.Open("/x").Create(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("Create: %v, want Canceled", err)
	}
	if len(f.log) > 0 {
		t.Errorf("did %v", f.log)
	}
}

func TestControllers(t *testing.T) {
	limited := mem(specs.LinuxMemory{Limit: ptr(int64(1 << 20))})

	t.Run("processes in the pod's cgroup", func(t *testing.T) {
		f := newFake(unifiedLayout)
		d := f.driver(t)
		if err := d.kernel.mkdir(0, "/pod"); err != nil {
			t.Fatal(err)
		}
		f.procsOf[place{0, "/pod"}] = []int{42}
		_, err := d.CreatePod(t.Context(), "/pod")
		if !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "42") {
			t.Errorf("got %v, want ErrBusy naming 42", err)
		}
	})
	t.Run("one controller is refused", func(t *testing.T) {
		f := newFake(unifiedLayout)
		d := f.driver(t)
		f.fail = func(op string) error {
			if strings.HasPrefix(op, "write") && strings.Contains(op, "subtree_control") && strings.Contains(op, "+memory") {
				return unix.EINVAL
			}
			return nil
		}
		if _, err := d.CreatePod(t.Context(), "/pod"); err != nil {
			t.Fatal(err)
		}
		if err := d.Open("/pod/a").Create(t.Context(), cpu(specs.LinuxCPU{Shares: ptr(uint64(2))})); err != nil {
			t.Errorf("limit of another controller: %v", err)
		}
		err := d.Open("/pod/b").Create(t.Context(), limited)
		if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "controller memory is not enabled") {
			t.Errorf("got %v, want ErrUnsupported naming the controller", err)
		}
		if m := strings.Join(d.Missing(), "\n"); !strings.Contains(m, "memory controller could not be enabled in /") {
			t.Errorf("Missing: %q", m)
		}
	})
	t.Run("enabled down to the pod already", func(t *testing.T) {
		f := newFake(unifiedLayout)
		d := f.driver(t)
		if _, err := d.CreatePod(t.Context(), "/kubepods/pod1"); err != nil {
			t.Fatal(err)
		}
		f.log = nil
		if _, err := d.CreatePod(t.Context(), "/kubepods/pod2"); err != nil {
			t.Fatal(err)
		}
		want := []string{"mkdir /sys/fs/cgroup/kubepods/pod2", `write /sys/fs/cgroup/kubepods/pod2/cgroup.subtree_control "+cpuset +cpu +io +memory +hugetlb +pids"`}
		if !slices.Equal(f.log, want) {
			t.Errorf("did %q, want %q", f.log, want)
		}
	})
	t.Run("no such controller", func(t *testing.T) {
		l := unifiedLayout
		l.trees = slices.Clone(l.trees)
		l.trees[0].controllers = []string{"cpu"}
		d := newFake(l).driver(t)
		if _, err := d.CreatePod(t.Context(), "/pod"); err != nil {
			t.Fatal(err)
		}
		err := d.Open("/pod/a").Create(t.Context(), limited)
		if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "no memory controller") {
			t.Errorf("got %v, want ErrUnsupported naming the controller", err)
		}
	})
}

// Swap without accounting, huge pages without the controller, in the ways they can be missing.
func TestMissingIsTolerated(t *testing.T) {
	for _, c := range []struct {
		name   string
		l      layout
		remove []string // files the kernel lacks, everywhere
		want   []string
	}{
		{"unified, all there", unifiedLayout, nil, nil},
		{"unified without swap", unifiedLayout, []string{"memory.swap.max"}, []string{noSwap}},
		{"unified, huge page size unknown", unifiedLayout, []string{"hugetlb.2MB.max", "hugetlb.2MB.rsvd.max"}, []string{noHugetlb, noRsvd}},
		{"unified before 5.7", unifiedLayout, []string{"hugetlb.2MB.rsvd.max"}, []string{noRsvd}},
		{"hybrid", hybridLayout, nil, []string{noHugetlb}},
		{"legacy without swap", legacyLayout, []string{"memory.memsw.limit_in_bytes"}, []string{noSwap}},
	} {
		saved := controllerFiles
		controllerFiles = map[string]map[string]string{}
		for k, files := range saved {
			controllerFiles[k] = maps.Clone(files)
			maps.DeleteFunc(controllerFiles[k], func(file, _ string) bool { return slices.Contains(c.remove, file) })
		}
		f := newFake(c.l)
		d := f.driver(t)
		if _, err := d.CreatePod(t.Context(), "/pod"); err != nil {
			t.Fatal(err)
		}
		cg := d.Open("/pod/c")
		if err := errors.Join(cg.Create(t.Context(), kubelet()), cg.Update(t.Context(), kubelet())); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if got := d.Missing(); !slices.Equal(got, c.want) {
			t.Errorf("%s: Missing() = %q, want %q", c.name, got, c.want)
		}
		a, err := cg.Applied()
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		wantSwap := int64(64 << 20)
		if slices.Contains(c.want, noSwap) {
			wantSwap = 0
		}
		if a.MemoryLimit != 64<<20 || a.MemorySwapLimit != wantSwap {
			t.Errorf("%s: Applied %+v, want swap %d", c.name, a, wantSwap)
		}
		controllerFiles = saved
	}
}

func TestExecName(t *testing.T) {
	d := newFake(unifiedLayout).driver(t)
	for _, name := range []string{"", ".", "..", "a/b", "/a", "a\x00", "a\nb", strings.Repeat("a", 256)} {
		if _, _, err := d.Open("/c").Exec(name, ByBirth); !errors.Is(err, ErrInvalid) {
			t.Errorf("Exec(%q): %v, want ErrInvalid", name, err)
		}
	}
	if _, _, err := d.Open("/c").Exec("exec-1", ByBirth); !errors.Is(err, ErrNotFound) {
		t.Errorf("Exec in a cgroup that is not there: %v, want ErrNotFound", err)
	}
}

func TestRemovePodRefuses(t *testing.T) {
	f := newFake(hybridLayout)
	d := f.driver(t)
	if err := d.RemovePod(t.Context(), "/"); !errors.Is(err, ErrInvalid) {
		t.Errorf("RemovePod of the root: %v, want ErrInvalid", err)
	}
	if _, err := d.CreatePod(t.Context(), "/crisp"); err != nil {
		t.Fatal(err)
	}
	if err := d.RemovePod(t.Context(), "/crisp"); err != nil || f.dirs[place{0, "/crisp"}] == nil {
		t.Errorf("RemovePod of the drivers' own root: %v, want nothing done", err)
	}
	if _, err := d.CreatePod(t.Context(), "/crisp/pod1"); err != nil {
		t.Fatal(err)
	}
	f.procsOf[place{0, "/crisp/pod1"}] = []int{1 << 30}
	err := d.RemovePod(t.Context(), "/crisp/pod1")
	if !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), fmt.Sprint(1<<30)) {
		t.Errorf("RemovePod with a process: %v, want ErrBusy naming it", err)
	}
}

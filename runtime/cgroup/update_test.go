package cgroup

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func container(t *testing.T, l layout) (*fake, *Cgroup) {
	t.Helper()
	f := newFake(l)
	d := f.driver(t)
	if _, err := d.CreatePod(t.Context(), "/pod"); err != nil {
		t.Fatal(err)
	}
	c := d.Open(d.ContainerPath("/pod", "c"))
	if err := c.Create(t.Context(), kubelet()); err != nil {
		t.Fatal(err)
	}
	return f, c
}

// resize changes everything that an update can.
func resize() *specs.LinuxResources {
	return &specs.LinuxResources{
		CPU:            &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(80_000)), Period: ptr(uint64(200_000)), Cpus: "0-1", Mems: "0"},
		Memory:         &specs.LinuxMemory{Limit: ptr(int64(128 << 20)), Swap: ptr(int64(192 << 20))},
		HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 4 << 20}},
		Pids:           &specs.LinuxPids{Limit: ptr(int64(100))},
	}
}

func TestUpdateIsAllOrNothing(t *testing.T) {
	for _, l := range []layout{unifiedLayout, hybridLayout, legacyLayout} {
		t.Run(l.mode.String(), func(t *testing.T) {
			for n := 0; ; n++ {
				f, c := container(t, l)
				before, err := c.Applied()
				if err != nil {
					t.Fatal(err)
				}
				ops := 0
				var failed string
				f.fail = func(op string) error {
					if ops++; ops == n+1 {
						failed = op
						return unix.EINVAL
					}
					return nil
				}
				err = c.Update(t.Context(), resize())
				after, aerr := c.Applied()
				if aerr != nil {
					t.Fatal(aerr)
				}
				if err == nil {
					if n < 8 {
						t.Fatalf("only %d writes", n)
					}
					if fmt.Sprint(after) == fmt.Sprint(before) || after.CPUShares != 512 || after.CPUQuota != 80_000 || after.CPUPeriod != 200_000 ||
						after.MemoryLimit != 128<<20 || after.MemorySwapLimit != 192<<20 || after.CpusetCpus != "0-1" || after.PidsLimit != 100 {
						t.Errorf("applied: %+v", after)
					}
					return
				}
				if !errors.Is(err, ErrInvalid) || strings.Contains(err.Error(), "undo") {
					t.Errorf("write %d (%s): %v, want ErrInvalid", n, failed, err)
				}
				if fmt.Sprint(after) != fmt.Sprint(before) {
					t.Errorf("write %d (%s) failed: now %+v\nbefore %+v", n, failed, after, before)
				}
			}
		})
	}
}

// An undo that fails is not hidden.
func TestUpdateUndoFails(t *testing.T) {
	f, c := container(t, unifiedLayout)
	f.fail = func(op string) error {
		if strings.Contains(op, "memory.max") || strings.Contains(op, `cpu.weight "35"`) {
			return unix.EIO
		}
		return nil
	}
	err := c.Update(t.Context(), resize())
	if err == nil || !strings.Contains(err.Error(), "memory limit 134217728 bytes") || !strings.Contains(err.Error(), "undo cpu shares 512") {
		t.Errorf("got %v, want both failures", err)
	}
}

// What is not named stays as it is.
func TestUpdateLeavesTheRest(t *testing.T) {
	for _, l := range []layout{unifiedLayout, hybridLayout, legacyLayout} {
		for name, change := range map[string]struct {
			r    *specs.LinuxResources
			want func(a *Applied)
		}{
			"nothing":     {&specs.LinuxResources{}, func(*Applied) {}},
			"nil":         {nil, func(*Applied) {}},
			"shares":      {cpu(specs.LinuxCPU{Shares: ptr(uint64(1024))}), func(a *Applied) { a.CPUShares = 1024 }},
			"quota":       {cpu(specs.LinuxCPU{Quota: ptr(int64(70_000))}), func(a *Applied) { a.CPUQuota = 70_000 }},
			"period":      {cpu(specs.LinuxCPU{Period: ptr(uint64(200_000))}), func(a *Applied) { a.CPUPeriod = 200_000 }},
			"no quota":    {cpu(specs.LinuxCPU{Quota: ptr(int64(-1))}), func(a *Applied) { a.CPUQuota = -1 }},
			"cpus":        {cpu(specs.LinuxCPU{Cpus: "1"}), func(a *Applied) { a.CpusetCpus = "1" }},
			"devices too": {&specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}}, func(*Applied) {}},
		} {
			t.Run(l.mode.String()+" "+name, func(t *testing.T) {
				f, c := container(t, l)
				want, err := c.Applied()
				if err != nil {
					t.Fatal(err)
				}
				devices := fmt.Sprint(f.devices)
				change.want(&want)
				want.CPUWeight = 0
				if err := c.Update(t.Context(), change.r); err != nil {
					t.Fatal(err)
				}
				got, err := c.Applied()
				got.CPUWeight = 0
				if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("got %+v, %v\nwant %+v", got, err, want)
				}
				if got := fmt.Sprint(f.devices); got != devices {
					t.Errorf("device rules are %s now, were %s", got, devices)
				}
			})
		}
	}
}

func TestUpdateErrors(t *testing.T) {
	for _, c := range []struct {
		name string
		l    layout
		r    *specs.LinuxResources
		want error
	}{
		{"block I/O", unifiedLayout, &specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(100))}}, ErrUnsupported},
		{"unified on v1", hybridLayout, &specs.LinuxResources{Unified: map[string]string{"memory.high": "1"}}, ErrUnsupported},
		{"swap below memory", legacyLayout, mem(specs.LinuxMemory{Swap: ptr(int64(1))}), ErrInvalid},
	} {
		f, cg := container(t, c.l)
		f.log = nil
		if err := cg.Update(t.Context(), c.r); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		if len(f.log) > 0 {
			t.Errorf("%s: did %v", c.name, f.log)
		}
	}
}

// On v2 the kernel would kill instead of refusing.
func TestUpdateBelowUsage(t *testing.T) {
	const limit = 32 << 20
	for _, c := range []struct {
		name    string
		current uint64
		stat    string
		ok      bool
	}{
		{"below", limit, "anon 1\nfile 0\n", true},
		{"anonymous", limit + 1, "anon 33554433\nfile 0\nshmem 0\n", false},
		{"page cache goes", limit * 2, fmt.Sprintf("file %d\nshmem 0\n", limit), true},
		{"shared memory stays", limit * 2, fmt.Sprintf("file %d\nshmem %d\n", limit, limit/2), false},
		{"slab goes", limit + 4096, "file 0\nslab_reclaimable 4096\n", true},
		{"nonsense", limit * 2, "file 18446744073709551615\nshmem 1\nslab_reclaimable 18446744073709551615\n", true},
	} {
		f, cg := container(t, unifiedLayout)
		files := f.dirs[place{0, cg.Path()}]
		files["memory.current"], files["memory.stat"] = fmt.Sprint(c.current), c.stat
		err := cg.Update(t.Context(), mem(specs.LinuxMemory{Limit: ptr(int64(limit))}))
		if c.ok && err != nil || !c.ok && !errors.Is(err, ErrBusy) {
			t.Errorf("%s: %v, want ok %v or ErrBusy", c.name, err, c.ok)
		}
		if !c.ok && !strings.Contains(fmt.Sprint(err), fmt.Sprintf("memory limit %d bytes", limit)) {
			t.Errorf("%s: %v does not name the limit", c.name, err)
		}
	}
}

func TestBefore(t *testing.T) {
	for _, c := range []struct{ name, file, old, value, want string }{
		{"plain", "cpu.max", "max 100000\n", "1 2", "max 100000"},
		{"emptied", "cpuset.cpus", "\n", "0", ""},
		{"new device", "io.max", "\n", "8:0 rbps=1", "8:0 rbps=max wbps=max riops=max wiops=max"},
		{"known device", "io.max", "8:0 rbps=5 wbps=max riops=max wiops=max\n", "8:0 rbps=1", "8:0 rbps=5 wbps=max riops=max wiops=max"},
		{"second device", "io.max", "8:16 rbps=5\n", "8:1 rbps=1\n8:16 rbps=2", "8:16 rbps=5\n8:1 rbps=max wbps=max riops=max wiops=max"},
	} {
		if got := before(c.file, c.old, c.value); got != c.want {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
}

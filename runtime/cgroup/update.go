package cgroup

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Update applies the non-zero fields of r and leaves the rest alone, also where the
// kernel keeps two in one file. Device rules are never touched (SEC-25:
// GHSA-g54h-m393-cpwq). It is all or nothing: when a write is refused, those before it are undone
// and the error names the limit; only an error that also says "undo" left something changed.
//
// On v2, where the kernel would answer a memory limit below what cannot be
// reclaimed by killing, it is refused with ErrBusy.
func (c *Cgroup) Update(ctx context.Context, r *specs.LinuxResources) error {
	if err := ctx.Err(); err != nil {
		return c.errorf("update", "", err)
	}
	if r == nil {
		return nil
	}
	if r.BlockIO != nil {
		return c.errorf("update", "", &Error{Kind: ErrUnsupported, Step: "block I/O limits can only be set at the start"})
	}
	now, err := c.current(r)
	if err != nil {
		return c.errorf("update", "", err)
	}
	settings, err := c.driver.compile(r, now)
	if err != nil {
		return c.errorf("update", "", err)
	}
	if r.Memory != nil {
		if err := c.checkUsage(value(r.Memory.Limit), now); err != nil {
			return c.errorf("update", "", err)
		}
	}
	var done []setting
	undo := func(err error) error {
		for _, s := range slices.Backward(done) {
			if uerr := c.driver.kernel.write(s.tree, c.file(s.file), s.value); uerr != nil {
				err = errors.Join(err, c.errorf("update", "undo "+s.what, uerr))
			}
		}
		return err
	}
	for _, s := range settings {
		old, err := c.driver.kernel.read(s.tree, c.file(s.file))
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return undo(c.errorf("update", s.what, err))
		}
		written, err := c.apply(s)
		if err != nil {
			return undo(c.errorf("update", s.what, err))
		}
		if written != nil {
			s.value = before(s.file, old, s.value)
			done = append(done, s)
		}
	}
	return nil
}

// before returns what to write to a file to have old again after value was written.
func before(file, old, value string) string {
	old = strings.TrimSpace(old)
	if file != "io.max" {
		return old
	}
	// Only devices with a limit are listed: those that had none get none again.
	for line := range strings.Lines(value) {
		device, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		if device != "" && !strings.HasPrefix("\n"+old, "\n"+device+" ") && !strings.Contains(old, "\n"+device+" ") {
			old += "\n" + device + " rbps=max wbps=max riops=max wiops=max"
		}
	}
	return strings.TrimSpace(old)
}

// current reads what compiling r depends on.
func (c *Cgroup) current(r *specs.LinuxResources) (current, error) {
	now := freshCgroup
	now.fresh = false
	d := c.driver
	if t := d.home("cpu"); t != absent && r.CPU != nil && (value(r.CPU.Quota) != 0 || value(r.CPU.Period) != 0) {
		if err := c.currentCPU(t, &now.quota, &now.period); err != nil {
			return now, err
		}
	}
	if t := d.home("memory"); t != absent && r.Memory != nil {
		if err := c.currentMemory(t, &now); err != nil {
			return now, err
		}
	}
	return now, nil
}

func (c *Cgroup) currentCPU(tree int, quota *int64, period *uint64) error {
	if c.driver.trees[tree].v2 {
		data, err := c.read(tree, "cpu.max")
		if err != nil {
			return err
		}
		q, p, ok := parseCPUMax(data)
		if !ok {
			return c.unclear(tree, "cpu.max", data)
		}
		*quota, *period = q, p
		return nil
	}
	data, err := c.read(tree, "cpu.cfs_quota_us")
	if err != nil {
		return err
	}
	q, err := strconv.ParseInt(strings.TrimSpace(data), 10, 64)
	if err != nil {
		return c.unclear(tree, "cpu.cfs_quota_us", data)
	}
	if data, err = c.read(tree, "cpu.cfs_period_us"); err != nil {
		return err
	}
	p, ok := number(data)
	if !ok {
		return c.unclear(tree, "cpu.cfs_period_us", data)
	}
	*quota, *period = q, p
	return nil
}

func (c *Cgroup) currentMemory(tree int, now *current) error {
	files := [2]string{"memory.limit_in_bytes", "memory.memsw.limit_in_bytes"}
	if c.driver.trees[tree].v2 {
		files = [2]string{"memory.max", ""}
	}
	for i, to := range []*int64{&now.memory, &now.memsw} {
		if files[i] == "" {
			continue
		}
		data, err := c.read(tree, files[i])
		if i == 1 && errors.Is(err, unix.ENOENT) { // no swap accounting
			continue
		}
		if err != nil {
			return err
		}
		n, ok := limit(data)
		if !ok {
			return c.unclear(tree, files[i], data)
		}
		*to = n
	}
	return nil
}

func (c *Cgroup) read(tree int, file string) (string, error) {
	return c.driver.kernel.read(tree, c.file(file))
}

func (c *Cgroup) unclear(tree int, file, data string) error {
	return fmt.Errorf("%s of %s: cannot make sense of %q", file, c.driver.trees[tree].dir, data)
}

// checkUsage refuses a v2 memory limit (bytes) below what reclaim cannot get rid of: the kernel would set it
// and call the OOM killer. What is used may still grow between this look and the write; the kubelet knows (KEP-1287).
func (c *Cgroup) checkUsage(bytes int64, now current) error {
	t := c.driver.home("memory")
	if bytes <= 0 || t == absent || !c.driver.trees[t].v2 || now.memory != unlimited && bytes >= now.memory {
		return nil
	}
	data, err := c.read(t, "memory.current")
	if err != nil {
		return err
	}
	usage, _ := number(data)
	if usage <= uint64(bytes) {
		return nil
	}
	if data, err = c.read(t, "memory.stat"); err != nil {
		return err
	}
	var file, shmem, slab uint64
	for key, v := range flat(data) {
		switch key {
		case "file":
			file = v
		case "shmem": // counted as file, but cannot be dropped
			shmem = v
		case "slab_reclaimable":
			slab = v
		}
	}
	reclaimable := min(usage, file-min(file, shmem)+slab)
	if usage-reclaimable > uint64(bytes) {
		return &Error{Kind: ErrBusy, Step: fmt.Sprintf("memory limit %d bytes is below the %d bytes in use that cannot be reclaimed", bytes, usage-reclaimable)}
	}
	return nil
}

// Applied is what the kernel's files say of a cgroup's limits.
type Applied struct {
	// CPUShares is the weight relative to other containers, 2–262144. On v2 it is
	// converted back from CPUWeight, which has fewer values: who knows what was asked for should show that
	// if Weight of it is CPUWeight.
	CPUShares uint64
	CPUWeight uint64 // v2 cpu.weight, 1–10000; 0 on v1
	CPUQuota  int64  // microseconds of CPU time per period, -1 unlimited
	CPUPeriod uint64 // microseconds; 0: not known, without a cpu controller
	// MemoryLimit in bytes, -1 unlimited.
	MemoryLimit int64
	// MemorySwapLimit in bytes, memory+swap as in CRI and OCI; -1 unlimited, 0 when the
	// kernel does not account swap.
	MemorySwapLimit int64
	// CpusetCpus and CpusetMems as the cgroup itself has them, "0-3,7". On v2 "" is: no own restriction.
	CpusetCpus, CpusetMems string
	// PidsLimit, -1 unlimited.
	PidsLimit int64
	// Hugepages is bytes by page size ("2MB"); unlimited ones are left out.
	Hugepages map[string]uint64
	// Unified has the v2 files that the kubelet sets through CRI's unified map: memory.oom.group, memory.min,
	// memory.low, memory.high. Nil on v1.
	Unified map[string]string
}

var appliedUnified = []string{"memory.oom.group", "memory.min", "memory.low", "memory.high"}

// Applied reads the limits back from the kernel.
//
// Errors: ErrNotFound. A controller that the node or this part of the tree lacks leaves its fields unlimited.
func (c *Cgroup) Applied() (Applied, error) {
	a := Applied{CPUQuota: unlimited, MemoryLimit: unlimited, MemorySwapLimit: unlimited, PidsLimit: unlimited}
	d := c.driver
	if _, err := c.read(d.tracker(), "cgroup.procs"); errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return Applied{}, c.errorf("read limits of", "", err)
	}
	var errs []error
	for _, part := range []struct {
		controller string
		read       func(tree int, v2 bool, a *Applied) error
	}{
		{"cpu", c.appliedCPU}, {"memory", c.appliedMemory}, {"cpuset", c.appliedCpuset}, {"pids", c.appliedPids}, {"hugetlb", c.appliedHugepages},
	} {
		t := d.home(part.controller)
		if t == absent {
			continue
		}
		if err := part.read(t, d.trees[t].v2, &a); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, c.errorf("read limits of", part.controller, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return Applied{}, err
	}
	return a, nil
}

func (c *Cgroup) appliedCPU(tree int, v2 bool, a *Applied) error {
	file := "cpu.shares"
	if v2 {
		file = "cpu.weight"
	}
	data, err := c.read(tree, file)
	if err != nil {
		return err
	}
	n, ok := number(data)
	if !ok {
		return c.unclear(tree, file, data)
	}
	a.CPUShares = n
	if v2 {
		a.CPUShares, a.CPUWeight = Shares(n), n
	}
	return c.currentCPU(tree, &a.CPUQuota, &a.CPUPeriod)
}

func (c *Cgroup) appliedMemory(tree int, v2 bool, a *Applied) error {
	var now current
	now.memsw = 0 // stays 0 without swap accounting
	if err := c.currentMemory(tree, &now); err != nil {
		return err
	}
	a.MemoryLimit, a.MemorySwapLimit = now.memory, now.memsw
	if !v2 {
		return nil
	}
	data, err := c.read(tree, "memory.swap.max")
	switch swap, ok := limit(data); {
	case errors.Is(err, unix.ENOENT):
		a.MemorySwapLimit = 0
	case err != nil:
		return err
	case !ok:
		return c.unclear(tree, "memory.swap.max", data)
	case swap == unlimited, now.memory == unlimited:
		a.MemorySwapLimit = swap
	default:
		a.MemorySwapLimit = now.memory + swap
	}
	a.Unified = map[string]string{}
	for _, f := range appliedUnified {
		data, err := c.read(tree, f)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return err
		}
		a.Unified[f] = strings.TrimSpace(data)
	}
	return nil
}

func (c *Cgroup) appliedCpuset(tree int, _ bool, a *Applied) error {
	for f, to := range map[string]*string{"cpuset.cpus": &a.CpusetCpus, "cpuset.mems": &a.CpusetMems} {
		data, err := c.read(tree, f)
		if err != nil {
			return err
		}
		*to = strings.TrimSpace(data)
	}
	return nil
}

func (c *Cgroup) appliedPids(tree int, _ bool, a *Applied) error {
	data, err := c.read(tree, "pids.max")
	if err != nil {
		return err
	}
	n, ok := limit(data)
	if !ok {
		return c.unclear(tree, "pids.max", data)
	}
	a.PidsLimit = n
	return nil
}

func (c *Cgroup) appliedHugepages(tree int, v2 bool, a *Applied) error {
	found := map[string]uint64{}
	for _, size := range cgroups.HugePageSizes() {
		file := "hugetlb." + size + ".limit_in_bytes"
		if v2 {
			file = "hugetlb." + size + ".max"
		}
		data, err := c.read(tree, file)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return err
		}
		n, ok := number(data)
		if !ok {
			return c.unclear(tree, file, data)
		}
		if n != noLimit {
			found[size] = n
		}
	}
	if len(found) > 0 {
		a.Hugepages = maps.Clone(found)
	}
	return nil
}

package cgroup

import (
	"errors"
	"strings"
	"time"

	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"
)

// Stats is what a cgroup used and uses, all below it included. Limits that are
// not set are math.MaxUint64 (NoLimit).
type Stats struct {
	At       time.Time
	CPU      CPUStats
	Memory   MemoryStats
	Swap     SwapStats
	Pids     PidsStats
	IO       IOStats
	Hugepage []HugepageStats
}

// NoLimit stands for unlimited in Stats.
const NoLimit uint64 = noLimit

// CPUStats is CPU time since the cgroup was made.
type CPUStats struct {
	Usage, User, System uint64 // nanoseconds
	// Periods of CFS bandwidth control, how many of them the cgroup was throttled in, and for how many nanoseconds in all.
	Periods, ThrottledPeriods, ThrottledTime uint64
	PSI                                      *PSI // nil: the kernel has none (psi=0, or no cgroup2)
}

// MemoryStats is in bytes but for the faults.
type MemoryStats struct {
	Usage      uint64 // all that is charged, page cache included
	WorkingSet uint64 // Usage less the page cache that was not used lately, as the kubelet and cAdvisor define it
	RSS        uint64 // anonymous memory
	Cache      uint64 // page cache
	Mapped     uint64 // mapped files
	Kernel     uint64
	Peak       uint64 // highest Usage; 0: not known (v2 before Linux 5.19)
	Limit      uint64
	FailCount  uint64 // how often Usage hit a limit
	Faults     uint64 // minor and major
	MajFaults  uint64
	PSI        *PSI

	// ActiveFile and InactiveFile are the page cache that was, and that was not used lately.
	ActiveFile, InactiveFile uint64
}

// SwapStats is in bytes. Accounted is false when the kernel does not count swap per cgroup.
type SwapStats struct {
	Accounted bool
	Usage     uint64
	Limit     uint64 // of swap alone; on v1 the memory+swap limit less the memory limit
}

// PidsStats counts tasks, which are threads.
type PidsStats struct {
	Current uint64
	Limit   uint64
}

// IOStats is by device.
type IOStats struct {
	Devices []DeviceIO
	PSI     *PSI
}

// HugepageStats is in bytes.
type HugepageStats struct {
	PageSize  string // "2MB"
	Usage     uint64
	Peak      uint64 // 0 on v2, which does not say
	FailCount uint64
}

// reader reads files of one cgroup and keeps the first real error: what is not there is zero.
type reader struct {
	c     *Cgroup
	found bool // a file was there
	err   error
}

func (r *reader) text(tree int, file string) string {
	data, err := r.c.read(tree, file)
	r.found = r.found || err == nil
	// EOPNOTSUPP: pressure files of a kernel with psi=0.
	if err != nil && r.err == nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EOPNOTSUPP) {
		r.err = err
	}
	return data
}

func (r *reader) number(tree int, file string) uint64 {
	n, _ := number(r.text(tree, file))
	return n
}

// limitOf is number, but noLimit when the file is not there.
func (r *reader) limitOf(tree int, file string) uint64 {
	if n, ok := number(r.text(tree, file)); ok {
		return n
	}
	return noLimit
}

// Stats reads a cgroup's use of resources. What the node has no controller for is zero.
//
// Errors: ErrNotFound.
func (c *Cgroup) Stats() (*Stats, error) {
	d := c.driver
	r := &reader{c: c}
	s := &Stats{At: time.Now(), Memory: MemoryStats{Limit: noLimit}, Pids: PidsStats{Limit: noLimit}, Swap: SwapStats{Limit: noLimit}}
	r.cpu(s)
	if t := d.home("memory"); t != absent {
		if d.trees[t].v2 {
			r.memoryV2(t, s)
		} else {
			r.memoryV1(t, s)
		}
	}
	if t := d.home("pids"); t != absent {
		s.Pids.Current, s.Pids.Limit = r.number(t, "pids.current"), r.limitOf(t, "pids.max")
	}
	r.io(s)
	r.hugepages(s)
	if u := d.unified(); u != absent {
		// Pressure is measured in every cgroup2 cgroup, with or without controllers.
		s.CPU.PSI = parsePSI(r.text(u, "cpu.pressure"))
		s.Memory.PSI = parsePSI(r.text(u, "memory.pressure"))
		s.IO.PSI = parsePSI(r.text(u, "io.pressure"))
	}
	if r.err == nil && !r.found {
		r.err = unix.ENOENT
	}
	if r.err != nil {
		return nil, c.errorf("measure", "", r.err)
	}
	return s, nil
}

// nanosPerTick of v1 cpuacct.stat: USER_HZ is 100 on all architectures Go runs on.
const nanosPerTick = 10_000_000

func (r *reader) cpu(s *Stats) {
	d := r.c.driver
	// cgroup2's cpu.stat has usage in every cgroup, with or without the controller (Linux 4.15).
	u := d.unified()
	if u != absent {
		for key, v := range flat(r.text(u, "cpu.stat")) {
			switch key {
			case "usage_usec":
				s.CPU.Usage = v * 1000
			case "user_usec":
				s.CPU.User = v * 1000
			case "system_usec":
				s.CPU.System = v * 1000
			case "nr_periods":
				s.CPU.Periods = v
			case "nr_throttled":
				s.CPU.ThrottledPeriods = v
			case "throttled_usec":
				s.CPU.ThrottledTime = v * 1000
			}
		}
	} else if t := d.home("cpuacct"); t != absent {
		s.CPU.Usage = r.number(t, "cpuacct.usage")
		for key, v := range flat(r.text(t, "cpuacct.stat")) {
			switch key {
			case "user":
				s.CPU.User = v * nanosPerTick
			case "system":
				s.CPU.System = v * nanosPerTick
			}
		}
	}
	if t := d.home("cpu"); t != absent && t != u {
		for key, v := range flat(r.text(t, "cpu.stat")) {
			switch key {
			case "nr_periods":
				s.CPU.Periods = v
			case "nr_throttled":
				s.CPU.ThrottledPeriods = v
			case "throttled_time":
				s.CPU.ThrottledTime = v
			}
		}
	}
}

func (r *reader) memoryV2(t int, s *Stats) {
	m := &s.Memory
	m.Usage, m.Limit, m.Peak = r.number(t, "memory.current"), r.limitOf(t, "memory.max"), r.number(t, "memory.peak")
	for key, v := range flat(r.text(t, "memory.stat")) {
		switch key {
		case "anon":
			m.RSS = v
		case "file":
			m.Cache = v
		case "file_mapped":
			m.Mapped = v
		case "kernel": // Linux 5.18
			m.Kernel = v
		case "active_file":
			m.ActiveFile = v
		case "inactive_file":
			m.InactiveFile = v
		case "pgfault":
			m.Faults = v
		case "pgmajfault":
			m.MajFaults = v
		}
	}
	m.WorkingSet = m.Usage - min(m.Usage, m.InactiveFile)
	for key, v := range flat(r.text(t, "memory.events")) {
		if key == "max" {
			m.FailCount = v
		}
	}
	if n, ok := number(r.text(t, "memory.swap.current")); ok {
		s.Swap = SwapStats{Accounted: true, Usage: n, Limit: r.limitOf(t, "memory.swap.max")}
	}
}

func (r *reader) memoryV1(t int, s *Stats) {
	m := &s.Memory
	m.Usage, m.Limit = r.number(t, "memory.usage_in_bytes"), r.limitOf(t, "memory.limit_in_bytes")
	m.Peak, m.FailCount = r.number(t, "memory.max_usage_in_bytes"), r.number(t, "memory.failcnt")
	m.Kernel = r.number(t, "memory.kmem.usage_in_bytes")
	var swap uint64
	for key, v := range flat(r.text(t, "memory.stat")) {
		// total_ counts the cgroups below too.
		switch key {
		case "total_rss":
			m.RSS = v
		case "total_cache":
			m.Cache = v
		case "total_mapped_file":
			m.Mapped = v
		case "total_active_file":
			m.ActiveFile = v
		case "total_inactive_file":
			m.InactiveFile = v
		case "total_pgfault":
			m.Faults = v
		case "total_pgmajfault":
			m.MajFaults = v
		case "total_swap":
			swap = v
		}
	}
	m.WorkingSet = m.Usage - min(m.Usage, m.InactiveFile)
	if memsw, ok := number(r.text(t, "memory.memsw.limit_in_bytes")); ok {
		s.Swap = SwapStats{Accounted: true, Usage: swap, Limit: noLimit}
		// Memory+swap is charged first: where its limit is the same (no swap, the
		// kubelet's default) only its counter moves.
		m.FailCount += r.number(t, "memory.memsw.failcnt")
		if memsw != noLimit && m.Limit != noLimit {
			s.Swap.Limit = memsw - min(memsw, m.Limit)
		} else if memsw != noLimit {
			s.Swap.Limit = memsw
		}
	}
}

func (r *reader) io(s *Stats) {
	d := r.c.driver
	if t := d.home("io"); t != absent {
		s.IO.Devices = parseIOStat(r.text(t, "io.stat"))
		return
	}
	t := d.home("blkio")
	if t == absent {
		return
	}
	var ios deviceIOs
	ios.parseBlkio(r.text(t, "blkio.throttle.io_service_bytes_recursive"), func(dev *DeviceIO, op string, n uint64) {
		switch op {
		case "Read":
			dev.ReadBytes = n
		case "Write":
			dev.WriteBytes = n
		}
	})
	ios.parseBlkio(r.text(t, "blkio.throttle.io_serviced_recursive"), func(dev *DeviceIO, op string, n uint64) {
		switch op {
		case "Read":
			dev.Reads = n
		case "Write":
			dev.Writes = n
		}
	})
	s.IO.Devices = ios.list
}

func (r *reader) hugepages(s *Stats) {
	t := r.c.driver.home("hugetlb")
	if t == absent {
		return
	}
	for _, size := range cgroups.HugePageSizes() {
		h := HugepageStats{PageSize: size}
		prefix := "hugetlb." + size
		if r.c.driver.trees[t].v2 {
			h.Usage = r.number(t, prefix+".current")
			for key, v := range flat(r.text(t, prefix+".events")) {
				if key == "max" {
					h.FailCount = v
				}
			}
		} else {
			h.Usage = r.number(t, prefix+".usage_in_bytes")
			h.Peak, h.FailCount = r.number(t, prefix+".max_usage_in_bytes"), r.number(t, prefix+".failcnt")
		}
		s.Hugepage = append(s.Hugepage, h)
	}
}

// OOMKills counts processes of this cgroup that an OOM killer ended, on v2 those of the
// cgroups below too. Read it after the last process is gone and before Remove.
func (c *Cgroup) OOMKills() (uint64, error) {
	d := c.driver
	t := d.home("memory")
	if t == absent {
		return 0, &Error{Op: "count OOM kills of", Path: c.path, Kind: ErrUnsupported, Step: "this node has no memory controller"}
	}
	file := "memory.oom_control"
	if d.trees[t].v2 {
		file = "memory.events"
	}
	data, err := c.read(t, file)
	if err != nil {
		return 0, c.errorf("count OOM kills of", "", err)
	}
	return oomKills(data), nil
}

// oomKills takes the count from memory.events or v1 memory.oom_control. A group kill (v2
// memory.oom.group) counts each of its processes in oom_kill; should that be 0 it counts once.
func oomKills(data string) uint64 {
	var kills, groups uint64
	for key, v := range flat(data) {
		switch strings.TrimSpace(key) {
		case "oom_kill":
			kills = v
		case "oom_group_kill":
			groups = v
		}
	}
	return max(kills, groups)
}

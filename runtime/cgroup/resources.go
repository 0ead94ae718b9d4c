package cgroup

import (
	"fmt"
	"maps"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// setting is one value to write into one file of a cgroup.
type setting struct {
	tree  int    // hierarchy
	file  string // "memory.max"
	value string
	what  string // for errors: "memory limit 1048576 bytes"
	// missing says what it means that the kernel lacks the file. "": that is an
	// error; else it is left out and this is reported.
	missing string
	// or is tried instead when the kernel lacks file: an older name of the same thing.
	or *setting
}

// unlimited is -1 in OCI's, CRI's and our own fields.
const unlimited = -1

// Kernel defaults of a cgroup just made.
const (
	defaultPeriod = 100_000 // microseconds, both versions
	minShares     = 2       // cpu.shares, kernel/sched/sched.h MIN_SHARES
	maxShares     = 1 << 18 // MAX_SHARES
)

// current is what a cgroup has now, as far as compiling a change depends on it.
type current struct {
	fresh  bool   // just made: everything has the kernel's default, and no process is inside
	quota  int64  // microseconds per period, -1 unlimited
	period uint64 // microseconds
	memory int64  // bytes, -1 unlimited
	memsw  int64  // v1 memory+swap limit in bytes, -1 unlimited or not accounted
}

var freshCgroup = current{fresh: true, quota: unlimited, period: defaultPeriod, memory: unlimited, memsw: unlimited}

const (
	noSwap    = "swap limits are not applied: the kernel does not account swap per cgroup"
	noHugetlb = "huge page limits are not applied: the hugetlb controller is missing"
	noRsvd    = "huge page reservations are not limited, only their use: the kernel lacks hugetlb.<size>.rsvd"
)

// compiler turns resources into settings. Pure: it asks the kernel nothing.
type compiler struct {
	*layout
	now  current
	list []setting
	err  error
}

// compile returns the writes for the non-zero fields of r, in an order in which the kernel
// takes them. Device rules are not among them (see deviceRules).
//
// Errors are *Error without operation and path: ErrInvalid or ErrUnsupported, and Step.
func (l *layout) compile(r *specs.LinuxResources, now current) ([]setting, error) {
	c := &compiler{layout: l, now: now}
	c.cpuset(r.CPU)
	c.cpu(r.CPU)
	c.memory(r.Memory)
	c.pids(r.Pids)
	c.blockIO(r.BlockIO)
	c.hugepages(r.HugepageLimits)
	if r.Network != nil {
		c.fail(ErrUnsupported, "network classes and priorities")
	}
	if len(r.Rdma) > 0 {
		c.fail(ErrUnsupported, "rdma limits")
	}
	c.unifiedMap(r.Unified)
	return c.list, c.err
}

// fail keeps the first problem.
func (c *compiler) fail(kind error, format string, args ...any) {
	if c.err == nil {
		c.err = &Error{Kind: kind, Step: fmt.Sprintf(format, args...)}
	}
}

// controller finds a controller's hierarchy and says whether it is v2. ok is false, and the
// compilation failed, when the node has none.
func (c *compiler) controller(name, what string) (tree int, v2, ok bool) {
	tree = c.home(name)
	if tree == absent {
		c.fail(ErrUnsupported, "%s: this node has no %s controller", what, name)
		return absent, false, false
	}
	return tree, c.trees[tree].v2, true
}

func (c *compiler) add(s setting) { c.list = append(c.list, s) }

func (c *compiler) cpuset(cpu *specs.LinuxCPU) {
	if cpu == nil {
		return
	}
	for _, f := range []struct{ file, value, what string }{
		{"cpuset.cpus", cpu.Cpus, "CPUs " + cpu.Cpus},
		{"cpuset.mems", cpu.Mems, "memory nodes " + cpu.Mems},
	} {
		if f.value == "" {
			continue
		}
		if strings.Trim(f.value, "0123456789,-") != "" {
			c.fail(ErrInvalid, "%q is not a list of numbers and ranges", f.value)
			return
		}
		if tree, _, ok := c.controller("cpuset", f.what); ok {
			c.add(setting{tree: tree, file: f.file, value: f.value, what: f.what})
		}
	}
}

func (c *compiler) cpu(cpu *specs.LinuxCPU) {
	if cpu == nil {
		return
	}
	if cpu.Idle != nil {
		what := fmt.Sprintf("cpu idle %d", *cpu.Idle)
		if tree, _, ok := c.controller("cpu", what); ok {
			c.add(setting{tree: tree, file: "cpu.idle", value: strconv.FormatInt(*cpu.Idle, 10), what: what})
		}
	}
	if cpu.Shares != nil && *cpu.Shares != 0 {
		c.shares(*cpu.Shares)
	}
	c.bandwidth(cpu)
	c.realtime(cpu)
}

// shares beyond the kernel's range are brought into it, as the kernel itself does on v1.
func (c *compiler) shares(shares uint64) {
	what := fmt.Sprintf("cpu shares %d", shares)
	tree, v2, ok := c.controller("cpu", what)
	if !ok {
		return
	}
	shares = min(max(shares, minShares), maxShares)
	s := setting{tree: tree, file: "cpu.shares", value: strconv.FormatUint(shares, 10), what: what}
	if v2 {
		s.file, s.value = "cpu.weight", strconv.FormatUint(Weight(shares), 10)
	}
	c.add(s)
}

// bandwidth is quota, period and burst. What is not named stays: on v2 quota and
// period share a file.
func (c *compiler) bandwidth(cpu *specs.LinuxCPU) {
	quota, period := value(cpu.Quota), value(cpu.Period)
	if quota < 0 {
		quota = unlimited
	}
	var parts []string
	if quota != 0 {
		parts = append(parts, fmt.Sprintf("quota %d µs", quota))
	}
	if period != 0 {
		parts = append(parts, fmt.Sprintf("period %d µs", period))
	}
	if cpu.Burst != nil {
		parts = append(parts, fmt.Sprintf("burst %d µs", *cpu.Burst))
	}
	if len(parts) == 0 {
		return
	}
	what := "cpu " + strings.Join(parts, ", ")
	tree, v2, ok := c.controller("cpu", what)
	if !ok {
		return
	}
	put := func(file, value string) { c.add(setting{tree: tree, file: file, value: value, what: what}) }
	burst := "cpu.cfs_burst_us"
	if v2 {
		burst = "cpu.max.burst"
	}
	// burst may not exceed quota: lower it first, raise it last.
	if cpu.Burst != nil && *cpu.Burst == 0 {
		put(burst, "0")
	}
	switch {
	case quota == 0 && period == 0:
	case v2:
		if quota == 0 {
			quota = c.now.quota
		}
		v := "max"
		if quota != unlimited {
			v = strconv.FormatInt(quota, 10)
		}
		if period != 0 {
			v += " " + strconv.FormatUint(period, 10)
		}
		put("cpu.max", v)
	default:
		// The kernel refuses quota/period above the parent's after each single write:
		// the one that makes the ratio smaller goes first.
		q := func() {
			if quota != 0 {
				put("cpu.cfs_quota_us", strconv.FormatInt(quota, 10))
			}
		}
		p := func() {
			if period != 0 {
				put("cpu.cfs_period_us", strconv.FormatUint(period, 10))
			}
		}
		if period != 0 && period < c.now.period {
			q()
			p()
		} else {
			p()
			q()
		}
	}
	if cpu.Burst != nil && *cpu.Burst != 0 {
		put(burst, strconv.FormatUint(*cpu.Burst, 10))
	}
}

func (c *compiler) realtime(cpu *specs.LinuxCPU) {
	runtime, period := value(cpu.RealtimeRuntime), value(cpu.RealtimePeriod)
	if runtime == 0 && period == 0 {
		return
	}
	what := fmt.Sprintf("realtime cpu %d µs in %d µs", runtime, period)
	tree, v2, ok := c.controller("cpu", what)
	if !ok {
		return
	}
	if v2 {
		c.fail(ErrUnsupported, "%s: cgroup v2 cannot limit it", what)
		return
	}
	if period != 0 {
		c.add(setting{tree: tree, file: "cpu.rt_period_us", value: strconv.FormatUint(period, 10), what: what})
	}
	if runtime != 0 {
		c.add(setting{tree: tree, file: "cpu.rt_runtime_us", value: strconv.FormatInt(runtime, 10), what: what})
	}
}

func (c *compiler) memory(m *specs.LinuxMemory) {
	if m == nil {
		return
	}
	limit, swap, reservation := value(m.Limit), value(m.Swap), value(m.Reservation)
	for _, f := range []struct {
		name  string
		value int64
	}{{"memory limit", limit}, {"memory+swap limit", swap}, {"memory reservation", reservation}} {
		if f.value < unlimited {
			c.fail(ErrInvalid, "%s of %d bytes", f.name, f.value)
			return
		}
	}
	if limit == 0 && swap == 0 && reservation == 0 && m.Swappiness == nil && !value(m.DisableOOMKiller) {
		return
	}
	tree, v2, ok := c.controller("memory", "memory limit")
	if !ok {
		return
	}
	put := func(file string, v int64, what string) {
		s := setting{tree: tree, file: file, value: strconv.FormatInt(v, 10), what: what + " " + bytesText(v)}
		if v == unlimited && v2 {
			s.value = "max"
		}
		if strings.Contains(what, "swap") {
			s.missing = noSwap
		}
		c.add(s)
	}
	if v2 {
		c.memoryV2(limit, swap, put)
	} else {
		c.memoryV1(limit, swap, put)
	}
	if reservation != 0 && v2 {
		put("memory.low", reservation, "memory reservation")
	} else if reservation != 0 {
		put("memory.soft_limit_in_bytes", reservation, "memory reservation")
	}
	if v2 && (m.Swappiness != nil || value(m.DisableOOMKiller)) {
		c.fail(ErrUnsupported, "memory swappiness, disabling the OOM killer: cgroup v2 has neither")
		return
	}
	if m.Swappiness != nil {
		c.add(setting{tree: tree, file: "memory.swappiness", value: strconv.FormatUint(*m.Swappiness, 10), what: fmt.Sprintf("memory swappiness %d", *m.Swappiness)})
	}
	if value(m.DisableOOMKiller) {
		c.add(setting{tree: tree, file: "memory.oom_control", value: "1", what: "OOM killer disabled"})
	}
}

// memoryV1 orders the two so that memory+swap is never below memory, which the
// kernel would refuse (memory.rst, "Swap Extension").
func (c *compiler) memoryV1(limit, swap int64, put func(file string, v int64, what string)) {
	memory, memsw := limit, swap
	if memory == 0 {
		memory = c.now.memory
	}
	if memsw == 0 {
		memsw = c.now.memsw
	}
	if (limit != 0 || swap != 0) && above(memory, memsw) {
		c.fail(ErrInvalid, "memory limit %s is above the memory+swap limit %s", bytesText(memory), bytesText(memsw))
		return
	}
	putMemory := func() {
		if limit != 0 {
			put("memory.limit_in_bytes", limit, "memory limit")
		}
	}
	putMemsw := func() {
		if swap != 0 {
			put("memory.memsw.limit_in_bytes", swap, "memory+swap limit")
		}
	}
	if c.now.memsw != unlimited && above(swap, c.now.memsw) {
		putMemsw()
		putMemory()
	} else {
		putMemory()
		putMemsw()
	}
}

func bytesText(v int64) string {
	if v == unlimited {
		return "unlimited"
	}
	return strconv.FormatInt(v, 10) + " bytes"
}

// above compares limits: -1 is above all others.
func above(a, b int64) bool { return uint64(a) > uint64(b) }

// memoryV2 derives memory.swap.max, which is swap alone, from CRI's and OCI's memory+swap.
func (c *compiler) memoryV2(limit, swap int64, put func(file string, v int64, what string)) {
	if swap != 0 {
		memory := limit
		if memory == 0 {
			memory = c.now.memory
		}
		switch {
		case swap == unlimited, memory == unlimited:
		case swap < memory:
			c.fail(ErrInvalid, "memory limit %s is above the memory+swap limit %s", bytesText(memory), bytesText(swap))
			return
		default:
			swap -= memory
		}
		put("memory.swap.max", swap, "swap limit")
	}
	if limit != 0 {
		put("memory.max", limit, "memory limit")
	}
}

func (c *compiler) pids(p *specs.LinuxPids) {
	if p == nil || value(p.Limit) == 0 {
		return
	}
	limit := *p.Limit
	what := fmt.Sprintf("process limit %d", limit)
	v := strconv.FormatInt(limit, 10)
	if limit < 0 {
		v = "max"
	}
	if tree, _, ok := c.controller("pids", what); ok {
		c.add(setting{tree: tree, file: "pids.max", value: v, what: what})
	}
}

func (c *compiler) hugepages(limits []specs.LinuxHugepageLimit) {
	tree := c.home("hugetlb")
	for _, l := range limits {
		if !isPageSize(l.Pagesize) {
			c.fail(ErrInvalid, "huge page size %q", l.Pagesize)
			return
		}
		if tree == absent {
			continue // Missing says so
		}
		suffix := ".limit_in_bytes"
		if c.trees[tree].v2 {
			suffix = ".max"
		}
		s := setting{tree: tree, file: "hugetlb." + l.Pagesize + suffix, value: strconv.FormatUint(l.Limit, 10),
			what: fmt.Sprintf("%d bytes of %s huge pages", l.Limit, l.Pagesize)}
		// The kubelet names every size it knows, with 0 for those nobody asked for; a size
		// that the kernel does not know cannot be used anyway. Also on v2 where the controller is not enabled that far down.
		s.missing = noHugetlb
		c.add(s)
		// Reservations are limited too (Linux 5.7): what is not faulted in yet counts already.
		s.file, s.missing = "hugetlb."+l.Pagesize+".rsvd"+suffix, noRsvd
		c.add(s)
	}
}

// isPageSize accepts what names a hugetlb file: 64KB, 2MB, 1GB.
func isPageSize(s string) bool {
	unit := strings.TrimLeft(s, "0123456789")
	return len(unit) < len(s) && (unit == "KB" || unit == "MB" || unit == "GB")
}

// blockIO is minimal: weights and throttles as OCI has them; no leaf weights, which
// only the CFQ scheduler had (gone in Linux 5.0).
func (c *compiler) blockIO(b *specs.LinuxBlockIO) {
	if b == nil {
		return
	}
	name := "blkio"
	if c.home(name) == absent {
		name = "io"
	}
	tree, v2, ok := c.controller(name, "block I/O limit")
	if !ok {
		return
	}
	if value(b.LeafWeight) != 0 {
		c.fail(ErrUnsupported, "block I/O leaf weight")
	}
	if w := value(b.Weight); w != 0 {
		s := setting{tree: tree, value: strconv.Itoa(int(w)), what: fmt.Sprintf("block I/O weight %d", w)}
		or := s
		if v2 {
			s.file, or.file = "io.bfq.weight", "io.weight"
			or.value = strconv.FormatUint(cgroups.ConvertBlkIOToIOWeightValue(w), 10)
		} else {
			s.file, or.file = "blkio.bfq.weight", "blkio.weight"
		}
		s.or = &or
		c.add(s)
	}
	for _, d := range b.WeightDevice {
		if value(d.Weight) == 0 {
			continue
		}
		s := setting{tree: tree, file: "blkio.bfq.weight_device", value: fmt.Sprintf("%d:%d %d", d.Major, d.Minor, *d.Weight),
			what: fmt.Sprintf("block I/O weight %d of device %d:%d", *d.Weight, d.Major, d.Minor)}
		if v2 {
			s.file = "io.bfq.weight"
		}
		c.add(s)
	}
	for _, t := range []struct {
		v1, v2 string
		list   []specs.LinuxThrottleDevice
	}{
		{"blkio.throttle.read_bps_device", "rbps", b.ThrottleReadBpsDevice},
		{"blkio.throttle.write_bps_device", "wbps", b.ThrottleWriteBpsDevice},
		{"blkio.throttle.read_iops_device", "riops", b.ThrottleReadIOPSDevice},
		{"blkio.throttle.write_iops_device", "wiops", b.ThrottleWriteIOPSDevice},
	} {
		for _, d := range t.list {
			s := setting{tree: tree, file: t.v1, value: fmt.Sprintf("%d:%d %d", d.Major, d.Minor, d.Rate),
				what: fmt.Sprintf("%s %d of device %d:%d", t.v2, d.Rate, d.Major, d.Minor)}
			if v2 {
				s.file = "io.max"
				s.value = fmt.Sprintf("%d:%d %s=%d", d.Major, d.Minor, t.v2, d.Rate)
			}
			c.add(s)
		}
	}
}

// notV1 are the values of unified that ask for nothing on v1, or for what v1 cannot do but
// the kubelet asks for on every container whatever the node (1.37: memory.oom.group=1, memory.min=0,
// memory.low=0; memory.high=max with MemoryQoS off).
var notV1 = map[string][]string{
	"memory.oom.group": {"0", "1"},
	"memory.min":       {"0"},
	"memory.low":       {"0"},
	"memory.high":      {"max"},
	"memory.max":       {"max"},
	"memory.swap.max":  {"max"},
	"pids.max":         {"max"},
	"cpu.max":          {"max", "max 100000"},
}

// freshV2 are the kernel's defaults of a cgroup just made: writing them is a waste.
var freshV2 = map[string]string{
	"memory.oom.group": "0", "memory.min": "0", "memory.low": "0", "memory.high": "max", "memory.max": "max", "memory.swap.max": "max", "pids.max": "max",
}

// coreFiles are the only files of the cgroup core that unified may set; the others
// move, freeze or kill processes, or change the tree's shape.
var coreFiles = []string{"cgroup.max.depth", "cgroup.max.descendants"}

// unifiedMap applies raw v2 files, after everything else (OCI runtime-spec config-linux.md "Unified").
func (c *compiler) unifiedMap(unified map[string]string) {
	for _, file := range slices.Sorted(maps.Keys(unified)) {
		v := strings.TrimSpace(unified[file])
		what := fmt.Sprintf("unified %s=%q", file, v)
		controller, rest, ok := strings.Cut(file, ".")
		if !ok || controller == "" || rest == "" || strings.ContainsAny(file, "/\x00") || controller == "cgroup" && !slices.Contains(coreFiles, file) {
			c.fail(ErrInvalid, "%s: not a file that may be set", what)
			return
		}
		if c.mode != Unified {
			if !slices.Contains(notV1[file], v) {
				c.fail(ErrUnsupported, "%s: this node's controllers are cgroup v1", what)
				return
			}
			continue
		}
		if def, ok := freshV2[file]; c.now.fresh && ok && def == v && !c.named(file) {
			continue
		}
		if controller != "cgroup" && !slices.Contains(c.trees[0].controllers, controller) {
			c.fail(ErrUnsupported, "%s: this node has no %s controller", what, controller)
			return
		}
		c.add(setting{tree: 0, file: file, value: v, what: what})
	}
}

// named says whether a file is written already.
func (c *compiler) named(file string) bool {
	return slices.ContainsFunc(c.list, func(s setting) bool { return s.file == file })
}

func value[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// Weight is the cpu.weight (1–10000) of cgroup v2 for CPU shares (2–262144; 1024 is 100), by the kubelet's formula.
func Weight(shares uint64) uint64 { return cgroups.ConvertCPUSharesToCgroupV2Value(shares) }

// Shares is the way back from a cpu.weight. Several shares have the same weight, as the formula rounds
// up; of those it returns the one that stands for the roundest number of millicores
// (shares = millicores × 1024 / 1000, as the kubelet computes them).
//
// The kubelet's own cpuWeightToCPUShares is still the inverse of the linear formula of
// before 1.35 and would show 1024 shares as 2597.
func Shares(weight uint64) uint64 {
	if weight <= 1 {
		return minShares
	}
	if weight >= 10_000 {
		return maxShares
	}
	// Weight never falls as shares grow.
	low := sort.Search(maxShares, func(s int) bool { return Weight(uint64(s)) >= weight })
	high := sort.Search(maxShares, func(s int) bool { return Weight(uint64(s)) > weight }) - 1
	for _, step := range []int{1000, 500, 250, 200, 100, 50, 25, 20, 10, 5, 1} {
		milli := high * 1000 / 1024 / step * step
		// Rounding down may lose the millicore whose shares are high itself.
		for m := milli + step; m >= milli && m > 0; m -= step {
			if s := m * 1024 / 1000; s >= low && s <= high {
				return uint64(s)
			}
		}
	}
	return uint64(max(low, minShares))
}

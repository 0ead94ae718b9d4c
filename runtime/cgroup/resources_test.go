package cgroup

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func ptr[T any](v T) *T { return &v }

func cpu(c specs.LinuxCPU) *specs.LinuxResources { return &specs.LinuxResources{CPU: &c} }
func mem(m specs.LinuxMemory) *specs.LinuxResources {
	return &specs.LinuxResources{Memory: &m}
}

// kubelet is what kubelet 1.37 sends for a container with requests and limits.
func kubelet() *specs.LinuxResources {
	return &specs.LinuxResources{
		CPU:            &specs.LinuxCPU{Shares: ptr(uint64(256)), Quota: ptr(int64(50_000)), Period: ptr(uint64(100_000))},
		Memory:         &specs.LinuxMemory{Limit: ptr(int64(64 << 20)), Swap: ptr(int64(64 << 20))},
		HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 0}},
		Unified:        map[string]string{"memory.oom.group": "1", "memory.min": "0", "memory.low": "0"},
		Devices: []specs.LinuxDeviceCgroup{{Access: "rwm"},
			{Allow: true, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(3)), Access: "rwm"}, {Allow: true, Type: "b", Access: "m"}},
	}
}

func TestCompile(t *testing.T) {
	running := current{quota: 20_000, period: 100_000, memory: 64 << 20, memsw: 96 << 20}
	unset := current{quota: unlimited, period: 100_000, memory: unlimited, memsw: unlimited}
	cases := []struct {
		name string
		now  current
		r    *specs.LinuxResources
	}{
		{"kubelet, create", freshCgroup, kubelet()},
		{"kubelet, update", running, kubelet()},
		{"nothing", freshCgroup, &specs.LinuxResources{}},
		{"zero fields are unset", freshCgroup, &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: ptr(uint64(0)), Quota: ptr(int64(0)), Period: ptr(uint64(0))},
			Memory: &specs.LinuxMemory{Limit: ptr(int64(0)), Swap: ptr(int64(0))}, Pids: &specs.LinuxPids{Limit: ptr(int64(0))}}},
		{"shares below the least", freshCgroup, cpu(specs.LinuxCPU{Shares: ptr(uint64(1))})},
		{"shares above the most", freshCgroup, cpu(specs.LinuxCPU{Shares: ptr(uint64(1 << 20))})},
		{"quota alone keeps the period", running, cpu(specs.LinuxCPU{Quota: ptr(int64(30_000))})},
		{"period alone keeps the quota", running, cpu(specs.LinuxCPU{Period: ptr(uint64(50_000))})},
		{"period alone, no quota", unset, cpu(specs.LinuxCPU{Period: ptr(uint64(50_000))})},
		{"quota -1 lifts", running, cpu(specs.LinuxCPU{Quota: ptr(int64(-1))})},
		{"shorter period: quota first", running, cpu(specs.LinuxCPU{Quota: ptr(int64(10_000)), Period: ptr(uint64(50_000))})},
		{"longer period: period first", running, cpu(specs.LinuxCPU{Quota: ptr(int64(40_000)), Period: ptr(uint64(200_000))})},
		{"burst", running, cpu(specs.LinuxCPU{Quota: ptr(int64(40_000)), Burst: ptr(uint64(10_000))})},
		{"no burst", running, cpu(specs.LinuxCPU{Quota: ptr(int64(10_000)), Burst: ptr(uint64(0))})},
		{"idle", freshCgroup, cpu(specs.LinuxCPU{Idle: ptr(int64(1))})},
		{"realtime", freshCgroup, cpu(specs.LinuxCPU{RealtimeRuntime: ptr(int64(1000)), RealtimePeriod: ptr(uint64(1_000_000))})},
		{"cpuset", freshCgroup, cpu(specs.LinuxCPU{Cpus: "0-1,3", Mems: "0"})},
		{"cpuset with a newline", freshCgroup, cpu(specs.LinuxCPU{Cpus: "0\n1"})},
		{"memory raised beyond memory+swap: that first", running, mem(specs.LinuxMemory{Limit: ptr(int64(128 << 20)), Swap: ptr(int64(128 << 20))})},
		{"memory lowered: memory first", running, mem(specs.LinuxMemory{Limit: ptr(int64(32 << 20)), Swap: ptr(int64(32 << 20))})},
		{"memory alone leaves swap alone", running, mem(specs.LinuxMemory{Limit: ptr(int64(80 << 20))})},
		{"memory alone above memory+swap", running, mem(specs.LinuxMemory{Limit: ptr(int64(128 << 20))})},
		{"memory lifted alone", running, mem(specs.LinuxMemory{Limit: ptr(int64(-1))})},
		{"both lifted", running, mem(specs.LinuxMemory{Limit: ptr(int64(-1)), Swap: ptr(int64(-1))})},
		{"swap alone", running, mem(specs.LinuxMemory{Swap: ptr(int64(80 << 20))})},
		{"swap alone below memory", running, mem(specs.LinuxMemory{Swap: ptr(int64(32 << 20))})},
		{"swap below memory", freshCgroup, mem(specs.LinuxMemory{Limit: ptr(int64(2 << 20)), Swap: ptr(int64(1 << 20))})},
		{"unlimited swap", freshCgroup, mem(specs.LinuxMemory{Limit: ptr(int64(2 << 20)), Swap: ptr(int64(-1))})},
		{"negative memory", freshCgroup, mem(specs.LinuxMemory{Limit: ptr(int64(-2))})},
		{"reservation", freshCgroup, mem(specs.LinuxMemory{Reservation: ptr(int64(1 << 20))})},
		{"swappiness", freshCgroup, mem(specs.LinuxMemory{Swappiness: ptr(uint64(10))})},
		{"no OOM killer", freshCgroup, mem(specs.LinuxMemory{DisableOOMKiller: ptr(true)})},
		{"pids", freshCgroup, &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(100))}}},
		{"pids unlimited", freshCgroup, &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(-1))}}},
		{"huge pages", freshCgroup, &specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "1GB", Limit: 1 << 30}}}},
		{"huge page size as a path", freshCgroup, &specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB/../x", Limit: 1}}}},
		{"block I/O", freshCgroup, &specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(500)),
			ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{{LinuxBlockIODevice: blockDevice(8, 0), Rate: 1 << 20}},
			WeightDevice:          []specs.LinuxWeightDevice{{LinuxBlockIODevice: blockDevice(8, 16), Weight: ptr(uint16(100))}}}}},
		{"network", freshCgroup, &specs.LinuxResources{Network: &specs.LinuxNetwork{ClassID: ptr(uint32(1))}}},
		{"rdma", freshCgroup, &specs.LinuxResources{Rdma: map[string]specs.LinuxRdma{"mlx5": {}}}},
		{"unified high", freshCgroup, &specs.LinuxResources{Unified: map[string]string{"memory.high": "1000000"}}},
		{"unified no-op, update", running, &specs.LinuxResources{Unified: map[string]string{"memory.high": "max", "memory.min": "0"}}},
		{"unified of a missing controller", freshCgroup, &specs.LinuxResources{Unified: map[string]string{"misc.max": "x 1"}}},
		{"unified that moves processes", freshCgroup, &specs.LinuxResources{Unified: map[string]string{"cgroup.procs": "1"}}},
		{"unified path", freshCgroup, &specs.LinuxResources{Unified: map[string]string{"memory.x/../../cgroup.procs": "1"}}},
		{"unified depth", freshCgroup, &specs.LinuxResources{Unified: map[string]string{"cgroup.max.depth": "1"}}},
		{"unified overrides", freshCgroup, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(1 << 20))}, Unified: map[string]string{"memory.max": "max"}}},
	}
	layouts := []*layout{&unifiedLayout, &hybridLayout, &legacyLayout}
	var b strings.Builder
	for _, c := range cases {
		fmt.Fprintf(&b, "== %s\n", c.name)
		for _, l := range layouts {
			list, err := l.compile(c.r, c.now)
			if err != nil {
				kind := "?"
				for name, k := range map[string]error{"ErrInvalid": ErrInvalid, "ErrUnsupported": ErrUnsupported} {
					if errors.Is(err, k) {
						kind = name
					}
				}
				var e *Error
				if !errors.As(err, &e) {
					t.Errorf("%s: error %T, want *Error", c.name, err)
					continue
				}
				fmt.Fprintf(&b, "%s: %s: %s\n", l.mode, kind, e.Step)
				continue
			}
			for _, s := range list {
				fmt.Fprintf(&b, "%s: %s/%s %q (%s)", l.mode, strings.TrimPrefix(l.trees[s.tree].dir, "/sys/fs/"), s.file, s.value, s.what)
				if s.or != nil {
					fmt.Fprintf(&b, ", or %s %q", s.or.file, s.or.value)
				}
				if s.missing != "" {
					b.WriteString(", may be missing")
				}
				b.WriteString("\n")
			}
		}
	}
	golden(t, "compile.golden", b.String())
}

func blockDevice(major, minor int64) (d specs.LinuxBlockIODevice) {
	d.Major, d.Minor = major, minor
	return d
}

func TestShares(t *testing.T) {
	// What the kubelet asks for, in millicores, comes back as it was.
	for _, milli := range []uint64{10, 50, 100, 200, 250, 500, 1000, 1500, 2000, 4000, 8000, 16000, 64000} {
		shares := milli * 1024 / 1000
		if got := Shares(Weight(shares)); got != shares {
			t.Errorf("Shares(Weight(%d)) = %d for %dm", shares, got, milli)
		}
	}
	for _, c := range []struct{ weight, want uint64 }{{0, 2}, {1, 2}, {100, 1024}, {10_000, 1 << 18}, {20_000, 1 << 18}} {
		if got := Shares(c.weight); got != c.want {
			t.Errorf("Shares(%d) = %d, want %d", c.weight, got, c.want)
		}
	}
	// Whatever the weight, its shares have it.
	for w := uint64(1); w <= 10_000; w++ {
		if s := Shares(w); Weight(s) != w || s < minShares || s > maxShares {
			t.Fatalf("Shares(%d) = %d, whose weight is %d", w, s, Weight(s))
		}
	}
}

func TestDeviceRules(t *testing.T) {
	for _, c := range []struct {
		name string
		in   specs.LinuxDeviceCgroup
		want string // "" : ErrInvalid
	}{
		{"all", specs.LinuxDeviceCgroup{Access: "rwm"}, "a *:* rwm"},
		{"a", specs.LinuxDeviceCgroup{Type: "a", Access: "rwm"}, "a *:* rwm"},
		{"char", specs.LinuxDeviceCgroup{Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(3)), Access: "rw"}, "c 1:3 rw"},
		{"any minor", specs.LinuxDeviceCgroup{Type: "b", Major: ptr(int64(8)), Access: "m"}, "b 8:* m"},
		{"-1 is any", specs.LinuxDeviceCgroup{Type: "c", Major: ptr(int64(-1)), Minor: ptr(int64(-1)), Access: "m"}, "c *:* m"},
		{"no access", specs.LinuxDeviceCgroup{Type: "c", Major: ptr(int64(1))}, ""},
		{"odd access", specs.LinuxDeviceCgroup{Type: "c", Access: "rx"}, ""},
		{"odd type", specs.LinuxDeviceCgroup{Type: "x", Access: "r"}, ""},
		{"number without type", specs.LinuxDeviceCgroup{Major: ptr(int64(1)), Access: "rwm"}, ""},
	} {
		got, err := deviceRules([]specs.LinuxDeviceCgroup{c.in})
		if c.want == "" {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("%s: error %v, want ErrInvalid", c.name, err)
			}
			continue
		}
		if err != nil || got[0].CgroupString() != c.want {
			t.Errorf("%s: got %v, %v, want %s", c.name, got, err, c.want)
		}
	}
}

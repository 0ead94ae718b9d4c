package cgroup

import (
	"maps"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestNumbers(t *testing.T) {
	for _, c := range []struct {
		in    string
		n     uint64
		limit int64
		ok    bool
	}{
		{"0\n", 0, 0, true},
		{"4096", 4096, 4096, true},
		{"max\n", noLimit, -1, true},
		{"9223372036854771712\n", noLimit, -1, true}, // v1, pages of 4 KiB
		{"9223372036854710272", noLimit, -1, true},   // v1, pages of 64 KiB
		{"18446744073709551615", noLimit, -1, true},
		{"", 0, 0, false},
		{"-1", 0, 0, false},
		{"1 2", 0, 0, false},
		{"18446744073709551616", 0, 0, false},
	} {
		n, ok := number(c.in)
		if n != c.n || ok != c.ok {
			t.Errorf("number(%q) = %d, %v", c.in, n, ok)
		}
		if l, ok := limit(c.in); l != c.limit || ok != c.ok {
			t.Errorf("limit(%q) = %d, %v", c.in, l, ok)
		}
	}
}

func TestParseCPUMax(t *testing.T) {
	for _, c := range []struct {
		in     string
		quota  int64
		period uint64
		ok     bool
	}{
		{"max 100000\n", -1, 100_000, true}, {"50000 100000\n", 50_000, 100_000, true},
		{"", 0, 0, false}, {"max", 0, 0, false}, {"x 100000", 0, 100_000, false}, {"1 x", 1, 0, false},
	} {
		q, p, ok := parseCPUMax(c.in)
		if ok != c.ok || ok && (q != c.quota || p != c.period) {
			t.Errorf("parseCPUMax(%q) = %d, %d, %v", c.in, q, p, ok)
		}
	}
}

func TestParsePSI(t *testing.T) {
	in := "some avg10=1.50 avg60=0.25 avg300=0.01 total=123456\nfull avg10=0.00 avg60=0.00 avg300=NaN total=x\n"
	want := &PSI{Some: Pressure{1.5, 0.25, 0.01, 123_456_000}}
	if got := parsePSI(in); !cmp.Equal(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := parsePSI("what\n"); got != nil {
		t.Errorf("got %+v of nothing", got)
	}
}

func TestParseIO(t *testing.T) {
	want := []DeviceIO{{Major: 8, Minor: 0, ReadBytes: 1, WriteBytes: 2, Reads: 3, Writes: 4}, {Major: 253, Minor: 1}}
	if got := parseIOStat("8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n253:1 cost.usage=5\n(unknown)\nx:y rbytes=1\n"); !cmp.Equal(got, want) {
		t.Errorf("io.stat: %+v, want %+v", got, want)
	}
	var ios deviceIOs
	ios.parseBlkio("8:0 Read 1\n8:0 Write 2\n8:0 Total 3\n8:16 Read 4\nTotal 7\n8:0 Read x\n", func(d *DeviceIO, op string, n uint64) {
		if op == "Read" {
			d.ReadBytes = n
		}
	})
	if want := []DeviceIO{{Major: 8, ReadBytes: 1}, {Major: 8, Minor: 16, ReadBytes: 4}}; !cmp.Equal(ios.list, want) {
		t.Errorf("blkio: %+v, want %+v", ios.list, want)
	}
}

func TestEvents(t *testing.T) {
	for in, want := range map[string]bool{"populated 0\nfrozen 0\n": false, "populated 1\nfrozen 0\n": true, "": true, "frozen 1\npopulated 0\n": false} {
		if got := populated(in); got != want {
			t.Errorf("populated(%q) = %v", in, got)
		}
	}
	for in, want := range map[string]uint64{
		"low 0\nhigh 0\nmax 7\noom 1\noom_kill 3\noom_group_kill 1\n": 3,
		"oom_kill 0\noom_group_kill 1\n":                              1,
		"oom_kill_disable 0\nunder_oom 0\noom_kill 2\n":               2,
		"oom_kill_disable 0\nunder_oom 0\n":                           0, // Linux before 4.13
	} {
		if got := oomKills(in); got != want {
			t.Errorf("oomKills(%q) = %d, want %d", in, got, want)
		}
	}
}

func TestParseStat(t *testing.T) {
	for _, c := range []struct {
		in, comm, state string
		ok              bool
	}{
		{"12 (sh) S 1 2", "sh", "S", true},
		{"12 (a) D (b) D 1", "a) D (b", "D", true},
		{"12 ( ) Z 1", " ", "Z", true},
		{"12 (x)", "", "", false}, {"12 (x) ", "", "", false}, {"", "", "", false}, {") (", "", "", false},
	} {
		comm, state, ok := parseStat(c.in)
		if comm != c.comm || state != c.state || ok != c.ok {
			t.Errorf("parseStat(%q) = %q, %q, %v", c.in, comm, state, ok)
		}
	}
}

func TestDirents(t *testing.T) {
	var buf []byte
	entry := func(name string, kind byte) {
		size := (19 + len(name) + 1 + 7) &^ 7
		e := make([]byte, size)
		e[16], e[17], e[18] = byte(size), byte(size>>8), kind // as on amd64 and arm64
		copy(e[19:], name)
		buf = append(buf, e...)
	}
	entry(".", unix.DT_DIR)
	entry("..", unix.DT_DIR)
	entry("cpu.max", unix.DT_REG)
	entry("crisp-1", unix.DT_DIR)
	entry("memory.max", unix.DT_DIR) // a cgroup may be called so
	if got := direntDirectories(buf); !slices.Equal(got, []string{"crisp-1", "memory.max"}) {
		t.Errorf("got %q", got)
	}
}

// stats of a cgroup of each version, from files as a kernel has them.
func TestStatsFromFiles(t *testing.T) {
	const pressure = "some avg10=1.00 avg60=0.00 avg300=0.00 total=5\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0"
	f, c := container(t, unifiedLayout)
	maps.Copy(f.dirs[place{0, c.Path()}], map[string]string{
		"cpu.stat":       "usage_usec 30\nuser_usec 10\nsystem_usec 20\nnr_periods 5\nnr_throttled 2\nthrottled_usec 7",
		"memory.current": "1000", "memory.peak": "2000",
		"memory.stat":   "anon 400\nfile 500\nkernel 50\nfile_mapped 60\nactive_file 150\ninactive_file 300\npgfault 9\npgmajfault 1",
		"memory.events": "low 0\nmax 4\noom_kill 1", "memory.swap.current": "12", "pids.current": "3", "pids.max": "10",
		"io.stat": "8:0 rbytes=1 wbytes=2 rios=3 wios=4", "cpu.pressure": pressure, "memory.pressure": pressure, "io.pressure": pressure,
	})
	got, err := c.Stats()
	if err != nil || got.At.IsZero() {
		t.Fatal(got, err)
	}
	psi := &PSI{Some: Pressure{Avg10: 1, Total: 5000}}
	want := &Stats{
		At:       got.At,
		CPU:      CPUStats{Usage: 30_000, User: 10_000, System: 20_000, Periods: 5, ThrottledPeriods: 2, ThrottledTime: 7000, PSI: psi},
		Memory:   MemoryStats{Usage: 1000, WorkingSet: 700, RSS: 400, Cache: 500, Mapped: 60, Kernel: 50, Peak: 2000, Limit: 64 << 20, FailCount: 4, Faults: 9, MajFaults: 1, PSI: psi, ActiveFile: 150, InactiveFile: 300},
		Swap:     SwapStats{Accounted: true, Usage: 12, Limit: 0},
		Pids:     PidsStats{Current: 3, Limit: 10},
		IO:       IOStats{Devices: []DeviceIO{{Major: 8, ReadBytes: 1, WriteBytes: 2, Reads: 3, Writes: 4}}, PSI: psi},
		Hugepage: got.Hugepage, // depends on this machine's page sizes
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("v2: -want +got\n%s", d)
	}

	f, c = container(t, legacyLayout)
	put := func(controller string, files map[string]string) {
		maps.Copy(f.dirs[place{f.layout.home(controller), c.Path()}], files)
	}
	put("cpu", map[string]string{"cpu.stat": "nr_periods 5\nnr_throttled 2\nthrottled_time 7", "cpuacct.usage": "31", "cpuacct.stat": "user 1\nsystem 2"})
	put("memory", map[string]string{"memory.usage_in_bytes": "1000", "memory.max_usage_in_bytes": "2000", "memory.failcnt": "3", "memory.memsw.failcnt": "1",
		"memory.kmem.usage_in_bytes": "50", "memory.memsw.limit_in_bytes": "67108900",
		"memory.stat": "rss 1\ntotal_rss 400\ntotal_cache 500\ntotal_mapped_file 60\ntotal_active_file 150\ntotal_inactive_file 1200\ntotal_pgfault 9\ntotal_pgmajfault 1\ntotal_swap 12"})
	put("pids", map[string]string{"pids.current": "3", "pids.max": "max"})
	put("blkio", map[string]string{"blkio.throttle.io_service_bytes_recursive": "8:0 Read 1\n8:0 Write 2\nTotal 3", "blkio.throttle.io_serviced_recursive": "8:0 Read 3\n8:0 Write 4"})
	if got, err = c.Stats(); err != nil {
		t.Fatal(err)
	}
	want = &Stats{
		At:       got.At,
		CPU:      CPUStats{Usage: 31, User: 10_000_000, System: 20_000_000, Periods: 5, ThrottledPeriods: 2, ThrottledTime: 7},
		Memory:   MemoryStats{Usage: 1000, WorkingSet: 0, RSS: 400, Cache: 500, Mapped: 60, Kernel: 50, Peak: 2000, Limit: 64 << 20, FailCount: 4, Faults: 9, MajFaults: 1, ActiveFile: 150, InactiveFile: 1200},
		Swap:     SwapStats{Accounted: true, Usage: 12, Limit: 36},
		Pids:     PidsStats{Current: 3, Limit: math.MaxUint64},
		IO:       IOStats{Devices: []DeviceIO{{Major: 8, ReadBytes: 1, WriteBytes: 2, Reads: 3, Writes: 4}}},
		Hugepage: got.Hugepage,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("v1: -want +got\n%s", d)
	}
}

func FuzzParseFiles(f *testing.F) {
	for _, s := range []string{"usage_usec 1\nuser_usec 2\n", "populated 0\nfrozen 0\n", "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
		"8:0 rbytes=1 wbytes=2\n", "8:0 Read 1\nTotal 1\n", "max 100000\n", "12 (a) b) S 1\n", "9223372036854771712\n", "oom_kill 1\noom_group_kill 2\n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		for key := range flat(s) {
			if key == "" && s == "" {
				t.Fatal("a key of nothing")
			}
		}
		populated(s)
		oomKills(s)
		if p := parsePSI(s); p != nil && (math.IsNaN(p.Some.Avg10) || math.IsInf(p.Full.Avg60, 0)) {
			t.Fatalf("%+v", p)
		}
		if n, ok := limit(s); ok && n < unlimited {
			t.Fatalf("limit(%q) = %d", s, n)
		}
		if q, _, ok := parseCPUMax(s); ok && q < unlimited {
			t.Fatalf("parseCPUMax(%q) = %d", s, q)
		}
		seen := map[[2]uint32]bool{}
		for _, d := range parseIOStat(s) {
			if seen[[2]uint32{d.Major, d.Minor}] {
				t.Fatalf("parseIOStat(%q): device %d:%d twice", s, d.Major, d.Minor)
			}
			seen[[2]uint32{d.Major, d.Minor}] = true
		}
		var ios deviceIOs
		ios.parseBlkio(s, func(*DeviceIO, string, uint64) {})
		if _, state, ok := parseStat(s); ok && len(state) != 1 {
			t.Fatalf("parseStat(%q): state %q", s, state)
		}
		for _, pid := range appendPIDs(nil, []byte(s)) {
			if pid < 0 {
				t.Fatalf("pid %d of %q", pid, s)
			}
		}
		direntDirectories([]byte(s))
		before("io.max", s, s)
	})
}

func FuzzValidateParent(f *testing.F) {
	for _, s := range []string{"", "/", "/kubepods/burstable/pod1", "/a/../b", "a.slice", "/a\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, parent string) {
		d := &Driver{config: Config{Root: "/crisp"}}
		if d.ValidateParent(parent) != nil {
			return
		}
		// What is accepted is where it says, and nowhere else.
		pod := d.PodPath(parent, "p")
		want := "/" + strings.Join(strings.FieldsFunc(parent, func(r rune) bool { return r == '/' }), "/")
		if parent == "" {
			want = "/crisp/podp"
		}
		if pod != want || strings.ContainsAny(pod, "\x00\n") || slices.Contains(strings.Split(pod, "/"), "..") {
			t.Fatalf("%q gives %q, want %q", parent, pod, want)
		}
	})
}

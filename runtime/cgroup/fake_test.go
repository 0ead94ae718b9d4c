package cgroup

import (
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	devices "github.com/opencontainers/cgroups/devices/config"
	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares got with a file of testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (go test -update writes it anew)\ngot:\n%s\nwant:\n%s", file, got, want)
	}
}

// Layouts to test: what the three kinds of node have.
var (
	unifiedLayout = layout{mode: Unified, trees: []hierarchy{
		{dir: "/sys/fs/cgroup", v2: true, controllers: strings.Fields("cpuset cpu io memory hugetlb pids")},
	}}
	hybridLayout = layout{mode: Hybrid, trees: []hierarchy{
		{name: "unified", dir: "/sys/fs/cgroup/unified", v2: true, controllers: []string{"hugetlb"}},
		{name: "cpuset", dir: "/sys/fs/cgroup/cpuset", controllers: []string{"cpuset"}},
		{name: "devices", dir: "/sys/fs/cgroup/devices", controllers: []string{"devices"}},
		{name: "memory", dir: "/sys/fs/cgroup/memory", controllers: []string{"memory"}},
		{name: "cpu,cpuacct", aliases: []string{"cpu", "cpuacct"}, dir: "/sys/fs/cgroup/cpu,cpuacct", controllers: []string{"cpu", "cpuacct"}},
		{name: "pids", dir: "/sys/fs/cgroup/pids", controllers: []string{"pids"}},
		{name: "blkio", dir: "/sys/fs/cgroup/blkio", controllers: []string{"blkio"}},
		{name: "freezer", dir: "/sys/fs/cgroup/freezer", controllers: []string{"freezer"}},
		{name: "systemd", dir: "/sys/fs/cgroup/systemd", controllers: []string{"name=systemd"}},
	}}
	legacyLayout = layout{mode: Legacy, trees: append(slices.Clone(hybridLayout.trees[1:]),
		hierarchy{name: "hugetlb", dir: "/sys/fs/cgroup/hugetlb", controllers: []string{"hugetlb"}})}
)

// controllerFiles are the files a controller brings, with their defaults.
var controllerFiles = map[string]map[string]string{
	"v2 cpu": {"cpu.weight": "100", "cpu.max": "max 100000", "cpu.max.burst": "0", "cpu.idle": "0"},
	"v2 memory": {"memory.max": "max", "memory.low": "0", "memory.min": "0", "memory.high": "max", "memory.oom.group": "0",
		"memory.swap.max": "max", "memory.swap.current": "0", "memory.current": "0", "memory.peak": "0", "memory.stat": "anon 0\nfile 0\n",
		"memory.events": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0\n"},
	"v2 cpuset":  {"cpuset.cpus": "", "cpuset.mems": ""},
	"v2 pids":    {"pids.max": "max", "pids.current": "0"},
	"v2 io":      {"io.max": "", "io.weight": "default 100", "io.stat": ""},
	"v2 hugetlb": {"hugetlb.2MB.max": "max", "hugetlb.2MB.rsvd.max": "max", "hugetlb.2MB.current": "0", "hugetlb.2MB.events": "max 0"},
	"cpu":        {"cpu.shares": "1024", "cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000", "cpu.cfs_burst_us": "0", "cpu.rt_runtime_us": "0", "cpu.rt_period_us": "1000000"},
	"memory": {"memory.limit_in_bytes": "9223372036854771712", "memory.memsw.limit_in_bytes": "9223372036854771712",
		"memory.soft_limit_in_bytes": "9223372036854771712", "memory.usage_in_bytes": "0", "memory.swappiness": "60", "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n"},
	"cpuset":  {"cpuset.cpus": "", "cpuset.mems": ""},
	"pids":    {"pids.max": "max", "pids.current": "0"},
	"devices": {"devices.deny": "", "devices.allow": "", "devices.list": "a *:* rwm"},
	"blkio":   {"blkio.bfq.weight": "100", "blkio.throttle.read_bps_device": ""},
	"freezer": {"freezer.state": "THAWED"},
	"hugetlb": {"hugetlb.2MB.limit_in_bytes": "9223372036854771712", "hugetlb.2MB.rsvd.limit_in_bytes": "9223372036854771712"},
}

// fake is a kernel in memory, with those of its rules that this package has to
// respect: which files a cgroup has, no internal processes, limits that exclude each other.
type fake struct {
	mu      sync.Mutex
	layout  *layout
	dirs    map[place]map[string]string
	procsOf map[place][]int
	devices map[string]string
	written map[string]string // place and file → value, in the order of log
	log     []string          // every change
	fail    func(op string) error
	onWrite func(at place, name, value string) // called under mu after a write, if set
}

func newFake(l layout) *fake {
	f := &fake{layout: &l, dirs: map[place]map[string]string{}, procsOf: map[place][]int{}, devices: map[string]string{}, written: map[string]string{}}
	for i, h := range l.trees {
		root := place{i, "/"}
		f.dirs[root] = map[string]string{}
		f.addFiles(root, h.controllers)
		f.dirs[root]["cgroup.procs"], f.dirs[root]["tasks"] = "", ""
		if h.v2 {
			f.dirs[root]["cgroup.controllers"] = strings.Join(h.controllers, " ")
			f.dirs[root]["cgroup.subtree_control"] = ""
		}
		if _, ok := f.dirs[root]["cpuset.cpus"]; ok && !h.v2 {
			f.dirs[root]["cpuset.cpus"], f.dirs[root]["cpuset.mems"] = "0-7", "0"
		}
	}
	return f
}

func (f *fake) driver(t *testing.T) *Driver {
	t.Helper()
	d, err := newDriver(Config{}, f.layout, f)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func (f *fake) addFiles(p place, controllers []string) {
	for _, c := range controllers {
		if f.layout.trees[p.tree].v2 {
			c = "v2 " + c
		}
		for name, v := range controllerFiles[c] {
			if _, ok := f.dirs[p][name]; !ok {
				f.dirs[p][name] = v
			}
		}
	}
}

func (f *fake) host(tree int, p string) string { return path.Join(f.layout.trees[tree].dir, p) }

// step begins an operation that changes something, and may make it fail.
func (f *fake) step(op string, tree int, p, rest string) error {
	entry := op + " " + f.host(tree, p) + rest
	if f.fail != nil {
		if err := f.fail(entry); err != nil {
			return &fs.PathError{Op: op, Path: f.host(tree, p), Err: err}
		}
	}
	f.log = append(f.log, entry)
	return nil
}

func (f *fake) errno(op string, tree int, p string, err unix.Errno) error {
	return &fs.PathError{Op: op, Path: f.host(tree, p), Err: err}
}

func (f *fake) read(tree int, p string) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	at := place{tree, path.Dir(p)}
	name := path.Base(p)
	if name == "cgroup.procs" && f.dirs[at] != nil {
		return pidLines(f.procsOf[at]), nil
	}
	v, ok := f.dirs[at][name]
	if !ok {
		return "", f.errno("open", tree, p, unix.ENOENT)
	}
	return v + "\n", nil
}

func pidLines(pids []int) string {
	s := ""
	for _, pid := range pids {
		s += fmt.Sprintln(pid)
	}
	return s
}

func (f *fake) write(tree int, p, value string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	at := place{tree, path.Dir(p)}
	name := path.Base(p)
	old, ok := f.dirs[at][name]
	if !ok {
		return f.errno("open", tree, p, unix.ENOENT)
	}
	if err := f.step("write", tree, p, fmt.Sprintf(" %q", value)); err != nil {
		return err
	}
	v, errno := f.accept(at, name, old, value)
	if errno != 0 {
		f.log[len(f.log)-1] += " refused"
		return f.errno("write", tree, p, errno)
	}
	f.dirs[at][name] = v
	f.written[f.host(tree, p)] = v
	if f.onWrite != nil {
		f.onWrite(at, name, value)
	}
	return nil
}

// accept is what the kernel makes of a value.
func (f *fake) accept(at place, name, old, value string) (string, unix.Errno) {
	files := f.dirs[at]
	v1 := func(s string) string {
		if s == "-1" {
			return "9223372036854771712"
		}
		return s
	}
	size := func(s string) uint64 { n, _ := number(s); return n }
	switch name {
	case "cpu.max":
		quota, period, _ := strings.Cut(value, " ")
		if _, p, _ := strings.Cut(old, " "); period == "" {
			period = p
		}
		return quota + " " + period, 0
	case "memory.limit_in_bytes":
		if sw, ok := files["memory.memsw.limit_in_bytes"]; ok && size(v1(value)) > size(sw) {
			return "", unix.EINVAL
		}
		return v1(value), 0
	case "memory.memsw.limit_in_bytes":
		if size(v1(value)) < size(files["memory.limit_in_bytes"]) {
			return "", unix.EINVAL
		}
		return v1(value), 0
	case "devices.deny":
		files["devices.list"] = ""
		return value, 0
	case "devices.allow":
		files["devices.list"] = strings.TrimPrefix(files["devices.list"]+"\n"+value, "\n")
		return value, 0
	case "cgroup.subtree_control":
		if at.path != "/" && len(f.procsOf[at]) > 0 {
			return "", unix.EBUSY
		}
		now := strings.Fields(old)
		for _, c := range strings.Fields(value) {
			c = strings.TrimPrefix(c, "+")
			if !slices.Contains(strings.Fields(files["cgroup.controllers"]), c) {
				return "", unix.ENOENT
			}
			now = append(now, c)
		}
		for p := range f.dirs {
			if p.tree == at.tree && path.Dir(p.path) == at.path && p.path != "/" {
				f.dirs[p]["cgroup.controllers"] = strings.Join(now, " ")
				f.addFiles(p, now)
			}
		}
		return strings.Join(now, " "), 0
	}
	return strings.TrimSuffix(value, "\n"), 0
}

func (f *fake) mkdir(tree int, p string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	at, up := place{tree, p}, place{tree, path.Dir(p)}
	if f.dirs[at] != nil {
		return f.errno("mkdir", tree, p, unix.EEXIST)
	}
	if f.dirs[up] == nil {
		return f.errno("mkdir", tree, p, unix.ENOENT)
	}
	if err := f.step("mkdir", tree, p, ""); err != nil {
		return err
	}
	h := f.layout.trees[tree]
	f.dirs[at] = map[string]string{"cgroup.procs": "", "tasks": ""}
	if h.v2 {
		on := f.dirs[up]["cgroup.subtree_control"]
		f.dirs[at]["cgroup.controllers"], f.dirs[at]["cgroup.subtree_control"] = on, ""
		f.dirs[at]["cgroup.events"], f.dirs[at]["cgroup.kill"], f.dirs[at]["cgroup.max.depth"] = "populated 0\nfrozen 0", "", "max"
		f.dirs[at]["cpu.stat"] = "usage_usec 0"
		f.addFiles(at, strings.Fields(on))
	} else {
		f.addFiles(at, h.controllers)
	}
	return nil
}

func (f *fake) names(tree int, p string) []string {
	var l []string
	for at := range f.dirs {
		if at.tree == tree && path.Dir(at.path) == p && at.path != "/" {
			l = append(l, path.Base(at.path))
		}
	}
	slices.Sort(l)
	return l
}

func (f *fake) rmdir(tree int, p string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.rmdirLocked(tree, p)
}

func (f *fake) rmdirLocked(tree int, p string) error {
	at := place{tree, p}
	if f.dirs[at] == nil {
		return f.errno("rmdir", tree, p, unix.ENOENT)
	}
	if len(f.procsOf[at]) > 0 || len(f.names(tree, p)) > 0 {
		return f.errno("rmdir", tree, p, unix.EBUSY)
	}
	if err := f.step("rmdir", tree, p, ""); err != nil {
		return err
	}
	delete(f.dirs, at)
	maps.DeleteFunc(f.written, func(file, _ string) bool { return path.Dir(file) == f.host(tree, p) })
	delete(f.devices, f.host(tree, p))
	return nil
}

func (f *fake) children(tree int, p string) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.dirs[place{tree, p}] == nil {
		return nil, f.errno("open", tree, p, unix.ENOENT)
	}
	return f.names(tree, p), nil
}

func (f *fake) writeAll(tree int, p, file, value string) error {
	names, err := f.children(tree, p)
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := f.writeAll(tree, path.Join(p, n), file, value); err != nil {
			return err
		}
	}
	return f.write(tree, path.Join(p, file), value)
}

func (f *fake) removeBelow(tree int, p string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.removeBelowLocked(tree, p)
}

func (f *fake) removeBelowLocked(tree int, p string) error {
	for _, n := range f.names(tree, p) {
		if err := f.removeBelowLocked(tree, path.Join(p, n)); err != nil {
			return err
		}
		if err := f.rmdirLocked(tree, path.Join(p, n)); err != nil {
			return err
		}
	}
	return nil
}

func (f *fake) procs(tree int, p string) ([]int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.dirs[place{tree, p}] == nil {
		return nil, f.errno("open", tree, p, unix.ENOENT)
	}
	var l []int
	for at, pids := range f.procsOf {
		if at.tree == tree && (at.path == p || strings.HasPrefix(at.path, p+"/")) {
			l = append(l, pids...)
		}
	}
	slices.Sort(l)
	return l, nil
}

// open gives /dev/null: what is opened is only handed on.
func (f *fake) open(tree int, p string, _ int) (*os.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	at := place{tree, p}
	if b := path.Base(p); b == "cgroup.procs" || b == "tasks" {
		at.path = path.Dir(p)
	}
	if f.dirs[at] == nil {
		return nil, f.errno("open", tree, p, unix.ENOENT)
	}
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	fd, err := unix.FcntlInt(null.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	return os.NewFile(uintptr(fd), f.host(tree, p)), err
}

func (f *fake) setDevices(tree int, p string, rules []*devices.Rule) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var l []string
	for _, r := range rules {
		verb := "deny "
		if r.Allow {
			verb = "allow "
		}
		l = append(l, verb+r.CgroupString())
	}
	if err := f.step("devices", tree, p, " "+strings.Join(l, "; ")); err != nil {
		return err
	}
	f.devices[f.host(tree, p)] = strings.Join(l, "; ")
	return nil
}

// String is the whole state: directories, and in them what was written.
func (f *fake) String() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var lines []string
	for at := range f.dirs {
		if at.path != "/" {
			lines = append(lines, f.host(at.tree, at.path)+"/")
		}
	}
	for file, v := range f.written {
		lines = append(lines, fmt.Sprintf("%s = %q", file, v))
	}
	for dir, rules := range f.devices {
		lines = append(lines, fmt.Sprintf("%s devices %s", dir, rules))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n") + "\n"
}

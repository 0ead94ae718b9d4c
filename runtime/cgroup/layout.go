package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Mode is how the node's cgroup hierarchies are laid out.
type Mode int

const (
	// Unified is cgroup v2 only: one hierarchy with all controllers.
	Unified Mode = iota + 1
	// Hybrid is v1 for the controllers and a cgroup2 hierarchy besides, that only
	// groups processes (systemd calls it so too). Controllers of that cgroup2 hierarchy are not used.
	Hybrid
	// Legacy is v1 only.
	Legacy
)

func (m Mode) String() string {
	switch m {
	case Unified:
		return "unified"
	case Hybrid:
		return "hybrid"
	case Legacy:
		return "legacy"
	}
	return fmt.Sprintf("Mode(%d)", int(m))
}

// mountRoot is where every distribution mounts the hierarchies.
const mountRoot = "/sys/fs/cgroup"

// hierarchy is one mounted cgroup hierarchy.
type hierarchy struct {
	name        string   // below /sys/fs/cgroup: "memory", "cpu,cpuacct", "systemd", "unified"; "" is v2 at /sys/fs/cgroup itself
	aliases     []string // links beside it that point to it: "cpu", "cpuacct"
	dir         string   // where it is mounted
	v2          bool
	controllers []string // "memory"; "name=systemd" for a named one; v2: cgroup.controllers of its root
}

// layout is what the node has. It does not change while the node is up.
type layout struct {
	mode  Mode
	trees []hierarchy // cgroup2, if any, first
}

// absent is the index of a hierarchy that is not there.
const absent = -1

// unified is the index of the cgroup2 hierarchy.
func (l *layout) unified() int {
	if len(l.trees) > 0 && l.trees[0].v2 {
		return 0
	}
	return absent
}

// home is the index of the hierarchy in which a controller's files are.
func (l *layout) home(controller string) int {
	return slices.IndexFunc(l.trees, func(h hierarchy) bool {
		return (!h.v2 || l.mode == Unified) && slices.Contains(h.controllers, controller)
	})
}

// devices is the index of the hierarchy that takes device rules: the v1 controller, else
// cgroup2, where an eBPF program does it (Linux 4.15) without a controller.
func (l *layout) devices() int {
	if i := l.home("devices"); i != absent {
		return i
	}
	return l.unified()
}

// tracker is the index of the hierarchy that says which processes belong to a cgroup.
func (l *layout) tracker() int {
	if i := l.unified(); i != absent {
		return i
	}
	if i := l.home("freezer"); i != absent {
		return i
	}
	return 0
}

// managed are the controllers the kubelet's cgroup code manages too; others, and named hierarchies but systemd's,
// belong to somebody else. Order is that of creation.
var managed = []string{"cpuset", "devices", "memory", "cpu", "cpuacct", "pids", "blkio", "io", "hugetlb",
	"net_cls", "net_prio", "perf_event", "freezer", "rdma", "misc", "name=systemd"}

var detect = sync.OnceValues(func() (*layout, error) {
	l, err := detectAt("/proc/self")
	if err != nil {
		return nil, fmt.Errorf("cannot find out the cgroup layout: %w", err)
	}
	return l, nil
})

// Detect says how this node's hierarchies are laid out. It looks once; later
// calls return the same.
func Detect() (Mode, error) {
	l, err := detect()
	if err != nil {
		return 0, err
	}
	return l.mode, nil
}

// detectAt reads proc/mountinfo and proc/cgroup, and what the hierarchies' roots say of themselves.
func detectAt(proc string) (*layout, error) {
	mounts, err := os.Open(filepath.Join(proc, "mountinfo"))
	if err != nil {
		return nil, err
	}
	defer mounts.Close()
	own, err := os.ReadFile(filepath.Join(proc, "cgroup"))
	if err != nil {
		return nil, err
	}
	l, err := parseLayout(mounts, own)
	if err != nil {
		return nil, err
	}
	for i := range l.trees {
		h := &l.trees[i]
		if err := checkMount(h); err != nil {
			return nil, err
		}
		if h.v2 {
			data, err := os.ReadFile(filepath.Join(h.dir, "cgroup.controllers"))
			if err != nil {
				return nil, err
			}
			h.controllers = strings.Fields(string(data))
		}
		h.aliases = linksTo(h.dir)
	}
	return l, nil
}

// checkMount makes sure that what is at h.dir now is that hierarchy and nothing mounted over it.
func checkMount(h *hierarchy) error {
	var st unix.Statfs_t
	if err := unix.Statfs(h.dir, &st); err != nil {
		return &fs.PathError{Op: "statfs", Path: h.dir, Err: err}
	}
	want := int64(unix.CGROUP_SUPER_MAGIC)
	if h.v2 {
		want = unix.CGROUP2_SUPER_MAGIC
	}
	if int64(st.Type) != want {
		return fmt.Errorf("%s is covered by another file system", h.dir)
	}
	return nil
}

// linksTo names the symbolic links beside dir that point to it, as "cpu" does to "cpu,cpuacct".
func linksTo(dir string) []string {
	entries, err := os.ReadDir(filepath.Dir(dir))
	if err != nil || dir == mountRoot {
		return nil // no links to be found; they only matter inside containers
	}
	var names []string
	for _, e := range entries {
		if e.Type()&fs.ModeSymlink == 0 {
			continue
		}
		if to, err := os.Readlink(filepath.Join(filepath.Dir(dir), e.Name())); err == nil && to == filepath.Base(dir) {
			names = append(names, e.Name())
		}
	}
	return names
}

// parseLayout finds the hierarchies in mountinfo. own is /proc/PID/cgroup: it
// says which options of a v1 mount are controllers.
func parseLayout(mounts io.Reader, own []byte) (*layout, error) {
	infos, err := mountinfo.GetMountsFromReader(mounts, mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, err
	}
	// Of several mounts of one hierarchy take the one below /sys/fs/cgroup.
	slices.SortStableFunc(infos, func(a, b *mountinfo.Info) int { return rank(a) - rank(b) })
	hierarchies := parseOwn(own)
	var l layout
	seen := map[string]bool{}
	for _, m := range infos {
		h := hierarchy{dir: m.Mountpoint, name: nameOf(m.Mountpoint), v2: m.FSType == "cgroup2"}
		key := ""
		if !h.v2 {
			options := strings.Split(m.VFSOptions, ",")
			i := slices.IndexFunc(hierarchies, func(controllers []string) bool {
				return slices.ContainsFunc(controllers, func(c string) bool { return slices.Contains(options, c) })
			})
			if i < 0 {
				continue // a hierarchy nobody of ours is in
			}
			h.controllers = hierarchies[i]
			key = strings.Join(h.controllers, ",")
			if !slices.ContainsFunc(h.controllers, func(c string) bool { return slices.Contains(managed, c) }) {
				continue
			}
		}
		if !seen[key] {
			seen[key] = true
			l.trees = append(l.trees, h)
		}
	}
	slices.SortStableFunc(l.trees, func(a, b hierarchy) int { return order(a) - order(b) })
	switch v2 := seen[""]; {
	case len(l.trees) == 0:
		return nil, errors.New("no cgroup hierarchy is mounted")
	case v2 && len(l.trees) == 1:
		l.mode = Unified
	case v2:
		l.mode = Hybrid
	default:
		l.mode = Legacy
	}
	return &l, nil
}

func rank(m *mountinfo.Info) int {
	if m.Mountpoint == mountRoot || strings.HasPrefix(m.Mountpoint, mountRoot+"/") {
		return 0
	}
	return 1
}

func nameOf(mountpoint string) string {
	if rel, ok := strings.CutPrefix(mountpoint, mountRoot); ok {
		return strings.TrimPrefix(rel, "/")
	}
	return filepath.Base(mountpoint)
}

// order puts cgroup2 first, then v1 in the order of managed.
func order(h hierarchy) int {
	if h.v2 {
		return -1
	}
	first := len(managed)
	for _, c := range h.controllers {
		if i := slices.Index(managed, c); i >= 0 {
			first = min(first, i)
		}
	}
	return first
}

// parseOwn returns the controllers of each v1 hierarchy in /proc/PID/cgroup, whose lines are
// hierarchy-ID:controller-list:path (cgroups(7)).
func parseOwn(data []byte) [][]string {
	var l [][]string
	for line := range bytes.Lines(data) {
		_, rest, ok := bytes.Cut(line, []byte(":"))
		controllers, _, ok2 := bytes.Cut(rest, []byte(":"))
		if ok && ok2 && len(controllers) > 0 {
			l = append(l, strings.Split(string(controllers), ","))
		}
	}
	return l
}

package podsandbox

import (
	"context"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/runtime/cgroup"
)

// ContainerStats is what a container uses.
type ContainerStats struct {
	ID     string
	Cgroup *cgroup.Stats // CPU, memory, swap, processes, I/O, PSI; nil when it does not run

	// The writable layer, measured in the background: allocated bytes, and inodes, at WritableAt; that is zero until it was measured.
	WritableAt                    time.Time
	WritableBytes, WritableInodes uint64
	Mountpoint                    string // a path on the file system of the writable layers

	LogBytes uint64 // size of the present log file
}

// PodStats is what a pod uses: its pod-level cgroup, which holds its init too, and its network.
type PodStats struct {
	ID        string
	Cgroup    *cgroup.Stats
	Processes uint64
	// Interfaces, the default one first; none when the pod has the node's network.
	Interfaces []Interface
}

// diskUsage of a directory tree.
type diskUsage struct {
	At     time.Time // of the measurement
	Bytes  uint64    // allocated
	Inodes uint64
	took   time.Duration
}

// ContainerStats reads counters; it never walks a directory.
func (m *Manager) ContainerStats(id string) (*ContainerStats, error) {
	c, err := m.findContainer(id)
	if err != nil {
		return nil, err
	}
	v := c.view()
	if v == nil {
		return nil, fmt.Errorf("container %q: %w", id, ErrNotFound)
	}
	u := m.usage.of(c.id)
	s := &ContainerStats{ID: c.id, WritableAt: u.At, WritableBytes: u.Bytes, WritableInodes: u.Inodes, Mountpoint: m.cfg.StateDir}
	if v.State == ContainerRunning {
		if s.Cgroup, err = m.cgroupOf(c).Stats(); err != nil {
			return nil, err
		}
		if u.old() {
			m.usage.wanted(c.id, v.UpperDir)
		}
	}
	if v.LogPath != "" {
		var st syscall.Stat_t
		if syscall.Lstat(v.LogPath, &st) == nil && st.Mode&syscall.S_IFMT == syscall.S_IFREG {
			s.LogBytes = uint64(st.Size)
		}
	}
	return s, nil
}

// A measurement may be minUsageAge old, and usageCost times as old as it took, before somebody who asks causes another: a walk
// takes seconds on a large tree. So measuring takes at most a hundredth of one processor for each container. (containerd
// measures each container every 10 s, whoever asks.)
const (
	minUsageAge = time.Second
	usageCost   = 100
)

func (u *diskUsage) old() bool {
	return time.Since(u.At) > max(minUsageAge, usageCost*u.took)
}

// usage remembers how much disk writable layers use, and which are to be measured: by one goroutine, one after the other.
type usage struct {
	wake chan struct{} // cap 1: a hint, not a count

	mu    sync.Mutex
	sizes map[string]diskUsage // by container id
	queue map[string]string    // container id: directory
}

func (u *usage) init() {
	u.wake = make(chan struct{}, 1)
	u.sizes, u.queue = map[string]diskUsage{}, map[string]string{}
}

// of is the last measurement, zero if there was none.
func (u *usage) of(id string) diskUsage {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.sizes[id]
}

func (u *usage) known(id string, s diskUsage) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.sizes[id] = s
}

func (u *usage) forget(id string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.sizes, id)
	delete(u.queue, id)
}

func (u *usage) wanted(id, dir string) {
	u.mu.Lock()
	u.queue[id] = dir
	u.mu.Unlock()
	select {
	case u.wake <- struct{}{}:
	default:
	}
}

func (u *usage) next() (id, dir string, ok bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for id, dir := range u.queue {
		delete(u.queue, id)
		return id, dir, true
	}
	return "", "", false
}

// measure is the goroutine that walks.
func (m *Manager) measure() {
	ctx := lifetime(m.closing)
	for {
		id, dir, ok := m.usage.next()
		if !ok {
			select {
			case <-m.closing:
				return
			case <-m.usage.wake:
			}
			continue
		}
		s, err := measureTree(ctx, dir)
		if err != nil {
			klog.Background().V(4).Info("Could not measure a writable layer, ignoring", "containerID", id, "err", err)
			continue
		}
		m.mu.RLock()
		if m.containers[id] != nil {
			m.usage.known(id, s)
		}
		m.mu.RUnlock()
	}
}

// maxMeasured is how deep directories are measured. A container can nest them deeper than there are descriptors, of
// which the walk has one for each level.
const maxMeasured = 1000

// measureTree adds up a tree: allocated blocks and inodes, hard links once. It follows no links.
// What vanishes meanwhile does not count, nor what is below maxMeasured directories.
//
// Trust: the container writes in it while we look. Names are looked up one at a time, each in an open directory: what a path costs
// grows with its length, and that of all paths with the square of the depth.
func measureTree(ctx context.Context, dir string) (diskUsage, error) {
	m := measurement{usage: diskUsage{At: time.Now()}, linked: map[inode]bool{}}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return m.usage, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err == nil {
		m.add(&st)
	}
	err = m.walk(ctx, os.NewFile(uintptr(fd), dir), 0)
	m.usage.took = time.Since(m.usage.At)
	return m.usage, err
}

// measurement is a tree being added up.
type measurement struct {
	usage  diskUsage
	linked map[inode]bool // of those with several names, the ones that were counted
}

type inode struct{ dev, ino uint64 }

func (m *measurement) add(st *unix.Stat_t) {
	if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		i := inode{uint64(st.Dev), st.Ino}
		if m.linked[i] {
			return
		}
		m.linked[i] = true
	}
	m.usage.Bytes += uint64(st.Blocks) * 512
	m.usage.Inodes++
}

// walk adds what is in dir, which it closes. It ends early with ctx.
func (m *measurement) walk(ctx context.Context, dir *os.File, depth int) error {
	defer func() { _ = dir.Close() }() // only read
	fd := int(dir.Fd())
	for {
		names, _ := dir.Readdirnames(1024) // one that cannot be read has nothing that counts
		if len(names) == 0 {
			return nil
		}
		for _, name := range names {
			if err := ctx.Err(); err != nil {
				return err
			}
			var st unix.Stat_t
			if unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
				continue
			}
			m.add(&st)
			if st.Mode&unix.S_IFMT != unix.S_IFDIR || depth == maxMeasured {
				continue
			}
			below, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
			if err != nil {
				continue
			}
			if err := m.walk(ctx, os.NewFile(uintptr(below), name), depth+1); err != nil {
				return err
			}
		}
	}
}

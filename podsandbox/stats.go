package podsandbox

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"syscall"
	"time"

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

// measureTree adds up a tree: allocated blocks and inodes, hard links once. It follows no links.
// What vanishes meanwhile does not count.
func measureTree(ctx context.Context, dir string) (diskUsage, error) {
	u := diskUsage{At: time.Now()}
	type inode struct{ dev, ino uint64 }
	linked := map[inode]bool{}
	root, err := os.OpenRoot(dir) // the container writes in it while we look
	if err != nil {
		return u, err
	}
	defer func() { _ = root.Close() }() // only read
	err = fs.WalkDir(root.FS(), ".", func(_ string, d fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return nil
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return nil
		}
		if st.Nlink > 1 && !d.IsDir() {
			i := inode{uint64(st.Dev), st.Ino}
			if linked[i] {
				return nil
			}
			linked[i] = true
		}
		u.Bytes += uint64(st.Blocks) * 512
		u.Inodes++
		return nil
	})
	u.took = time.Since(u.At)
	return u, err
}

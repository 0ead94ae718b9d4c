package podsandbox

import (
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// Interface is what a pod's network interface counted since it was made.
type Interface struct {
	Name   string // valid UTF-8, which the kernel does not ask for
	Rx, Tx Traffic
}

// Traffic is one direction of an [Interface].
type Traffic struct {
	Bytes, Packets, Errors, Dropped uint64
}

// Limits of what a pod's interfaces may cost us. A pod with CAP_NET_ADMIN makes as many as it likes, with names of
// its choice, and each becomes eight time series (SEC-99).
const (
	maxInterfaces = 64      // shown
	maxNetDev     = 1 << 20 // bytes that are read: some 8000 interfaces
)

// defaultInterface is the name that bridge and CNI give a pod's first interface.
const defaultInterface = "eth0"

// interfacesOf reads the counters in the network namespace of a pod's init, the
// default interface first: eth0, else the first. Loopback is left out, as with cAdvisor.
//
// netNS is the namespace's pin. The process is held by a descriptor of its directory, which is good for that process only
// and not for another that gets its pid, and that it is in the namespace is asked of the same directory.
//
// Errors: fs.ErrNotExist or ESRCH when the process is gone.
//
// Trust: names are chosen by the pod.
func interfacesOf(pid int, netNS string) ([]Interface, error) {
	path := "/proc/" + strconv.Itoa(pid)
	proc, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(proc)
	var want, have unix.Stat_t
	if err := unix.Stat(netNS, &want); err != nil {
		return nil, &os.PathError{Op: "stat", Path: netNS, Err: err}
	}
	if err := unix.Fstatat(proc, "ns/net", &have, 0); err != nil {
		return nil, &os.PathError{Op: "stat", Path: path + "/ns/net", Err: err}
	}
	if want.Dev != have.Dev || want.Ino != have.Ino {
		return nil, &os.PathError{Op: "stat", Path: path + "/ns/net", Err: unix.ESRCH} // the pid is another's
	}
	data, err := readAt(proc, "net/dev", maxNetDev)
	if err != nil {
		return nil, &os.PathError{Op: "read", Path: path + "/net/dev", Err: err}
	}
	return parseNetDev(string(data)), nil
}

// readAt reads at most limit bytes of a file of procfs, which may come in pieces.
func readAt(dir int, name string, limit int) ([]byte, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	buf := make([]byte, 0, 4096)
	for len(buf) < limit {
		buf = slices.Grow(buf, 1024)
		n, err := unix.Read(fd, buf[len(buf):cap(buf)])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, err
		case n == 0:
			return buf, nil
		}
		buf = buf[:len(buf)+n]
	}
	return buf[:limit], nil
}

// parseNetDev parses /proc/<pid>/net/dev (proc_pid_net(5)): two lines of headings, then
//
//	eth0: bytes packets errs drop fifo frame compressed multicast  bytes packets errs drop fifo colls carrier compressed
//
// A name holds neither a colon nor a space (dev_valid_name, net/core/dev.c). What is not
// such a line, and a name that is no UTF-8, is passed over: protobuf refuses it, and one altered could be another's.
func parseNetDev(data string) []Interface {
	var l []Interface
	for line := range strings.Lines(data) {
		name, counters, ok := strings.Cut(line, ":")
		name = strings.TrimSpace(name)
		f := strings.Fields(counters)
		if !ok || name == "" || name == "lo" || len(f) < 16 || !utf8.ValidString(name) {
			continue
		}
		i := Interface{Name: name}
		switch {
		case !i.Rx.parse(f[:8]) || !i.Tx.parse(f[8:]):
		case name == defaultInterface && (len(l) == 0 || l[0].Name != name):
			l = slices.Insert(l, 0, i)
		case name != defaultInterface:
			l = append(l, i)
		}
		if len(l) > maxInterfaces {
			l = l[:maxInterfaces]
		}
	}
	return l
}

// parse takes a direction's counters; false if one of them is no number.
func (t *Traffic) parse(f []string) bool {
	for i, to := range []*uint64{&t.Bytes, &t.Packets, &t.Errors, &t.Dropped} {
		n, err := strconv.ParseUint(f[i], 10, 64)
		if err != nil {
			return false
		}
		*to = n
	}
	return true
}

// PodStats reads a ready pod's counters: its cgroup's, and those of its network unless it is the node's.
//
// Errors: ErrNotFound; ErrState when the pod is not ready, or stops being it.
func (m *Manager) PodStats(id string) (*PodStats, error) {
	p, v, err := m.readyPod(id)
	if err != nil {
		return nil, err
	}
	s := &PodStats{ID: p.id}
	g := m.cfg.Cgroups.Open(v.CgroupPath)
	if s.Cgroup, err = g.Stats(); err != nil {
		return nil, p.unlessStopped(err)
	}
	pids, err := g.Procs()
	if err != nil {
		return nil, p.unlessStopped(err)
	}
	s.Processes = uint64(len(pids))
	if s.Interfaces, err = m.interfaces(v); err != nil {
		return nil, p.unlessStopped(err)
	}
	return s, nil
}

// PodInterfaces is what PodStats has of the network, without the rest.
//
// Errors: as PodStats.
func (m *Manager) PodInterfaces(id string) ([]Interface, error) {
	p, v, err := m.readyPod(id)
	if err != nil {
		return nil, err
	}
	l, err := m.interfaces(v)
	if err != nil {
		return nil, p.unlessStopped(err)
	}
	return l, nil
}

// readyPod finds a pod whose counters can be read.
func (m *Manager) readyPod(id string) (*pod, *Pod, error) {
	p, err := m.findPod(id)
	if err != nil {
		return nil, nil, err
	}
	v := p.view()
	if v == nil {
		return nil, nil, fmt.Errorf("pod %q: %w", id, ErrNotFound)
	}
	if v.State != PodReady {
		return nil, nil, fmt.Errorf("%w: pod %q is not ready (%s): nothing of it runs", ErrState, p.id, v.Reason)
	}
	return p, v, nil
}

// unlessStopped is err, or ErrState if the pod was stopped meanwhile, which explains it.
func (p *pod) unlessStopped(err error) error {
	if p.phase() != podReady {
		return fmt.Errorf("%w: pod %q is not ready any more", ErrState, p.id)
	}
	return err
}

func (m *Manager) interfaces(v *Pod) ([]Interface, error) {
	if v.NetNSPath == "" || v.InitPID == 0 {
		return nil, nil
	}
	return m.readInterfaces(v.InitPID, v.NetNSPath)
}

// ProcessStats is about the processes of a container.
type ProcessStats struct {
	Processes uint64
	// Descriptors are the open files of all processes, Sockets those of them that are sockets; -1 when there
	// are too many processes, or descriptors, to look at each.
	Descriptors, Sockets int64
	// OpenFilesLimit is the soft RLIMIT_NOFILE of the container's first process; 0: not known, it is gone.
	OpenFilesLimit uint64
	OOMKills       uint64 // processes that an OOM killer ended
}

// What is looked at of one container at most: some 5 µs for a process, and 2 µs for a descriptor, to tell sockets from files.
const (
	maxProcesses   = 1024
	maxDescriptors = 2048
)

// ProcessStats looks at each process of a running container. It costs a few system calls for each process and, up to
// a limit, one for each open file.
//
// Errors: ErrNotFound; ErrState when the container does not run.
func (m *Manager) ProcessStats(id string) (*ProcessStats, error) {
	c, err := m.findContainer(id)
	if err != nil {
		return nil, err
	}
	v := c.view()
	if v == nil || v.State != ContainerRunning {
		return nil, fmt.Errorf("%w: container %q does not run", ErrState, c.id)
	}
	g := m.cgroupOf(c)
	pids, err := g.Procs()
	if err != nil {
		return nil, err
	}
	s := &ProcessStats{Processes: uint64(len(pids))}
	if s.OOMKills, err = g.OOMKills(); err != nil {
		return nil, err
	}
	s.countFiles(pids)
	var limit unix.Rlimit
	if slices.Contains(pids, v.PID) && unix.Prlimit(v.PID, unix.RLIMIT_NOFILE, nil, &limit) == nil {
		s.OpenFilesLimit = limit.Cur
	}
	return s, nil
}

// countFiles counts the open files of processes. One that ends meanwhile has none.
func (s *ProcessStats) countFiles(pids []int) {
	if len(pids) > maxProcesses {
		s.Descriptors, s.Sockets = -1, -1
		return
	}
	for _, pid := range pids {
		if pid == 0 {
			continue // of a PID namespace that is not below ours
		}
		fd, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/fd", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		most := int64(maxDescriptors) - s.Descriptors
		if s.Sockets < 0 {
			most = 0
		}
		files, sockets := countDescriptors(fd, most)
		_ = unix.Close(fd) // only read
		s.Descriptors += files
		switch {
		case s.Sockets < 0 || sockets < 0:
			s.Sockets = -1
		default:
			s.Sockets += sockets
		}
	}
}

// countDescriptors counts what is in a /proc/<pid>/fd: all, by its size (Linux 6.2, proc_pid_fd(5)) or by
// reading it, and the sockets; -1 if there are more than most.
func countDescriptors(dir int, most int64) (files, sockets int64) {
	var st unix.Stat_t
	if unix.Fstat(dir, &st) == nil && st.Size > most {
		return st.Size, -1
	}
	buf := make([]byte, 4096)
	link := make([]byte, len("socket:"))
	for {
		n, err := unix.ReadDirent(dir, buf)
		if err != nil || n <= 0 {
			return files, sockets
		}
		_, _, names := unix.ParseDirent(buf[:n], math.MaxInt, nil)
		for _, name := range names {
			if files++; files > most {
				sockets = -1
			}
			if sockets < 0 {
				continue
			}
			if n, err := unix.Readlinkat(dir, name, link); err == nil && string(link[:n]) == "socket:" {
				sockets++
			}
		}
	}
}

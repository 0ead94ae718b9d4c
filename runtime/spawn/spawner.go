package spawn

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/runtime/initproto"
)

// Names in a pod's run directory.
const (
	socketName  = "init.sock"
	journalName = "exits.journal"
	stderrName  = "init.log" // what the pod init says when it dies of a bug
)

const defaultShmSize = 64 << 20 // bytes

// podEnv is a pod init's environment: one processor, and a collector that keeps
// the heap of a process that does little at a megabyte or less.
var podEnv = []string{"GOMAXPROCS=1", "GOGC=20", "GOTRACEBACK=all", "GODEBUG=containermaxprocs=0,updatemaxprocs=0"}

// Spawner is what all pods of a daemon share. Safe for concurrent use.
type Spawner struct {
	image  *os.File
	thread *thread
	null   *os.File
}

// New seals the crisp-init binary at initPath and makes the base mount namespace. scratch is a directory of the
// daemon's own, used as a mount point for a moment inside that namespace.
func New(initPath, scratch string) (*Spawner, error) {
	image, err := sealImage(initPath)
	if err != nil {
		return nil, fmt.Errorf("seal %s: %w", initPath, err)
	}
	null, err := openNull()
	if err != nil {
		image.Close()
		return nil, fmt.Errorf("open %s: %w", os.DevNull, err)
	}
	t, err := startThread(scratch)
	if err != nil {
		image.Close()
		null.Close()
		return nil, err
	}
	return &Spawner{image: image, thread: t, null: null}, nil
}

// Close ends what pods share; pods live on.
func (s *Spawner) Close() error {
	s.thread.close()
	return errors.Join(s.image.Close(), s.null.Close())
}

// StartPod starts a pod's init and returns as soon as its namespaces are there; Pod.Ready says when it has set itself up, and
// everything else waits for that. So its network can be made meanwhile. onExit is called for each container exit, in
// order, from one goroutine; once more after the connection to the init was lost.
//
// Needs: CAP_SYS_ADMIN. On error nothing of the pod is left but files in RunDir.
func (s *Spawner) StartPod(ctx context.Context, a PodArgs, onExit func(Exit)) (*Pod, error) {
	defer a.Namespaces.Close()
	listener, err := listen(a.RunDir)
	if err != nil {
		return nil, err
	}
	defer unix.Close(listener)
	journal, err := os.OpenFile(filepath.Join(a.RunDir, journalName), os.O_CREATE|os.O_APPEND|os.O_WRONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	defer journal.Close()
	stderr, err := os.OpenFile(filepath.Join(a.RunDir, stderrName), os.O_CREATE|os.O_APPEND|os.O_WRONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	ours, theirs, err := initproto.Pair()
	if err != nil {
		return nil, err
	}
	theirsFile := os.NewFile(uintptr(theirs), "control")
	pid, pidfd, err := s.thread.clonePod(s.image, &a, podEnv, [4]*os.File{s.null, s.null, stderr, theirsFile})
	theirsFile.Close()
	if err != nil {
		unix.Close(ours)
		return nil, err
	}
	proc, err := watchProcess(pid, pidfd, true)
	if err != nil {
		unix.Close(ours)
		_ = unix.Kill(pid, unix.SIGKILL) // our own child, not reaped yet
		return nil, err
	}
	p, err := s.adopt(ctx, a, proc, ours, listener, journal, onExit)
	if err != nil {
		_ = proc.kill() // nothing else can be done about a child that refuses to die
		<-proc.done
		proc.close()
		return nil, errors.Join(err, lastWords(a.RunDir))
	}
	return p, nil
}

// adopt sets up a pod init that was just cloned.
func (s *Spawner) adopt(ctx context.Context, a PodArgs, proc *process, control, listener int, journal *os.File, onExit func(Exit)) (*Pod, error) {
	conn, err := initproto.NewConn(control)
	if err != nil {
		unix.Close(control)
		return nil, err
	}
	conn.SendTimeout = sendTimeout
	start, err := startTime(proc.pid)
	if err != nil {
		conn.Close()
		return nil, err
	}
	boot, err := bootID()
	if err != nil {
		conn.Close()
		return nil, err
	}
	setOOMScoreAdj(ctx, proc.pid)
	setup := initproto.Setup{
		PodID: a.ID, Title: a.Title, HostNet: a.HostNetwork, SharedPID: a.SharedPID,
	}
	if !a.HostNetwork {
		setup.Hostname = a.Hostname
	}
	if !a.HostIPC {
		setup.ShmSize = uint64(a.ShmSize)
		if setup.ShmSize == 0 {
			setup.ShmSize = defaultShmSize
		}
	}
	setup.Label = a.Label
	for k, v := range a.Sysctls {
		setup.Sysctls = append(setup.Sysctls, [2]string{k, v})
	}
	slices.SortFunc(setup.Sysctls, func(x, y [2]string) int { return compareStrings(x[0], y[0]) })
	fds := []int{listener, int(journal.Fd())}
	if err := conn.Send(initproto.Message{Type: initproto.TypeSetup, Body: setup.Encode(), FDs: fds}); err != nil {
		conn.Close()
		return nil, fmt.Errorf("set up pod init: %w", err)
	}
	h := Handle{PID: proc.pid, StartTime: start, BootID: boot, RunDir: a.RunDir, Userns: a.Userns != nil}
	return s.newPod(h, proc, conn, onExit), nil
}

func compareStrings(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// podOOMScoreAdj keeps the pod init alive when the kernel needs a victim: it is small, and its death is the pod's.
const podOOMScoreAdj = -998

// setOOMScoreAdj lowers a pod init's oom_score_adj; without CAP_SYS_RESOURCE it cannot be lowered and stays as it is.
func setOOMScoreAdj(ctx context.Context, pid int) {
	err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), strconv.AppendInt(nil, podOOMScoreAdj, 10), 0)
	if err != nil {
		klog.FromContext(ctx).V(2).Info("Pod init keeps the daemon's oom_score_adj, ignoring", "err", err)
	}
}

// lastWords is what a dead pod init left in its log: a panic, if anything.
func lastWords(runDir string) error {
	b, err := os.ReadFile(filepath.Join(runDir, stderrName))
	if err != nil || len(b) == 0 {
		return nil
	}
	return fmt.Errorf("pod init said: %s", b[:min(len(b), 4096)])
}

// listen makes the socket on which later daemons find the pod init. Only root gets into runDir (0700).
func listen(runDir string) (int, error) {
	dir, at, err := inDir(runDir)
	if err != nil {
		return -1, err
	}
	defer dir.Close()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if err := unix.Bind(fd, at); err != nil {
		unix.Close(fd)
		return -1, &os.PathError{Op: "bind", Path: filepath.Join(runDir, socketName), Err: err}
	}
	if err := unix.Listen(fd, 8); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("listen", err)
	}
	return fd, nil
}

// dial connects to a pod init.
func dial(runDir string) (*initproto.Conn, error) {
	dir, at, err := inDir(runDir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	// Connecting a unix socket never waits: EAGAIN is a full backlog, of an init that is stuck.
	if err := unix.Connect(fd, at); err != nil {
		unix.Close(fd)
		return nil, &os.PathError{Op: "connect", Path: filepath.Join(runDir, socketName), Err: err}
	}
	return initproto.NewConn(fd)
}

// inDir names the socket through a descriptor of its directory: sun_path has room for 107 bytes only, unix(7).
func inDir(runDir string) (*os.File, *unix.SockaddrUnix, error) {
	dir, err := os.Open(runDir)
	if err != nil {
		return nil, nil, err
	}
	return dir, &unix.SockaddrUnix{Name: fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), socketName)}, nil
}

// Attach finds a living pod init again and replays its journal: onExit is called for every exit
// since the pod's start, also those the former daemon has seen. ErrGone when the init is dead.
func (s *Spawner) Attach(ctx context.Context, h Handle, onExit func(Exit)) (*Pod, error) {
	proc, err := find(h)
	if err != nil {
		return nil, err
	}
	conn, err := greet(ctx, h.RunDir)
	if err != nil {
		gone := proc.dies(dyingTime)
		proc.close()
		if gone {
			return nil, ErrGone
		}
		return nil, fmt.Errorf("attach to pod init %d: %w", h.PID, err)
	}
	p := s.newPod(h, proc, conn, onExit)
	p.settle(nil) // greet has heard it
	if err := p.replay(); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

// dyingTime is how long a process may need from closing its sockets to being dead.
const dyingTime = 100 * time.Millisecond

// sendTimeout bounds how long a pod init may leave its socket full. A container cannot stop it, but an operator can.
const sendTimeout = 10 * time.Second

// greet connects and waits for Ready.
func greet(ctx context.Context, runDir string) (*initproto.Conn, error) {
	conn, err := dial(runDir)
	if err != nil {
		return nil, err
	}
	conn.SendTimeout = sendTimeout
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	m, err := conn.Recv()
	if err == nil {
		m.Close()
		var ready *initproto.Started
		if ready, err = initproto.DecodeStarted(m.Body); err == nil && (m.Type != initproto.TypeReady || ready.At > initproto.Version) {
			err = fmt.Errorf("pod init speaks protocol version %d, this daemon up to %d", ready.At, initproto.Version)
		}
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("expected Ready: %w", err)
	}
	return conn, nil
}

// ReadJournal returns the exits of a pod whose init is dead.
func ReadJournal(runDir string) ([]Exit, error) {
	b, err := os.ReadFile(filepath.Join(runDir, journalName))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var l []Exit
	for _, x := range initproto.ParseJournal(b) {
		l = append(l, asExit(&x))
	}
	return l, nil
}

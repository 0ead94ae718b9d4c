package main

import (
	"errors"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/initproto"
	"github.com/crisp-cri/crisp/runtime/sys"
)

// The pod init's side of what successor.go describes.

// statusPipe is what a successor says an errno through.
type statusPipe struct {
	read  *os.File
	write int // to be given to the init; -1: closed
}

func newStatusPipe() (*statusPipe, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, &sys.Error{Op: "pipe2", Err: err}
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		closeAll(fds[:])
		return nil, &sys.Error{Op: "fcntl", Err: err}
	}
	return &statusPipe{read: os.NewFile(uintptr(fds[0]), "status"), write: fds[1]}, nil
}

func (s *statusPipe) closeWrite() {
	closeAll([]int{s.write})
	s.write = -1
}

func (s *statusPipe) close() {
	s.closeWrite()
	_ = s.read.Close() // only read from
}

// outcome waits until the successor has become the program (nil), or says why it could not. Somebody in its PID namespace may
// have got hold of the pipe and say anything or keep it open: that is believed of the successor, and waited for while it lives.
//
// A successor that was killed before its execve counts as a program that was killed.
func (s *statusPipe) outcome(successor *child, program string) *step {
	raw, err := s.read.SyscallConn()
	if err != nil {
		return failed("start process", err)
	}
	over := make(chan struct{})
	defer close(over)
	go func() { // ends with this call
		select {
		case <-successor.done:
			_ = s.read.SetReadDeadline(time.Now()) // a pipe can
		case <-over:
		}
	}()
	var report [8]byte
	n := 0
	read := func(fd uintptr) bool {
		n, err = unix.Read(int(fd), report[:])
		return err != unix.EAGAIN && err != unix.EINTR
	}
	if raw.Read(read) != nil { // the deadline: what it said before its death is there
		_ = raw.Control(func(fd uintptr) { read(fd) })
	}
	if n < len(report) {
		return nil
	}
	<-successor.done
	step, errno := report[0], unix.Errno(uint32(report[4])|uint32(report[5])<<8|uint32(report[6])<<16|uint32(report[7])<<24)
	switch step {
	case stepSession:
		return failed("start session", &sys.Error{Op: "setsid", Err: errno})
	case stepTerminal:
		return failed("open terminal", &sys.Error{Op: "ioctl TIOCSCTTY", Err: errno})
	case stepSeccomp:
		return failed("load seccomp filter", &sys.Error{Op: "seccomp", Err: errno})
	}
	return failed("exec "+strconv.Quote(program), errno)
}

// procfs is the procfs of a PID namespace, for containers that join it. Its first process made it (rootfs.shareProcfs).
type procfs struct {
	mu     sync.Mutex
	mount  int    // -1: the namespace is gone
	number string // the directory of podPIDs it is attached to, "": it is detached
}

// clone returns a detached mount of it. Only what is attached can be cloned, before Linux 6.15.
func (f *procfs) clone(p *pod) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mount < 0 {
		return -1, unix.ESRCH
	}
	if f.number == "" {
		number, err := p.place(f.mount)
		if err != nil {
			return -1, err
		}
		f.number = number
	}
	return sys.CloneMount(f.mount, "", false)
}

// close lets go of it. nil: there is none.
func (f *procfs) close() {
	if f == nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.number != "" {
		// Neither can fail while nobody else knows the place, and what stays is an empty procfs.
		_ = unix.Unmount(podPIDs+"/"+f.number, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		_ = unix.Rmdir(podPIDs + "/" + f.number)
	}
	closeAll([]int{f.mount})
	f.mount = -1
}

// place attaches a procfs in our mount namespace, in a directory of its own.
func (p *pod) place(mount int) (number string, err error) {
	if err := p.makePlaces(); err != nil {
		return "", err
	}
	number = strconv.FormatInt(p.places.Add(1), 10)
	path := podPIDs + "/" + number
	if err := unix.Mkdir(path, 0o555); err != nil {
		return "", &sys.Error{Op: "mkdir", Path: path, Err: err}
	}
	if err := attachAt(mount, path); err != nil {
		_ = unix.Rmdir(path) // empty
		return "", err
	}
	return number, nil
}

// makePlaces makes the file system for those directories: few pods need it.
func makePlaces() error {
	fd, err := sys.CreateMount("tmpfs", [][2]string{{"size", "0k"}, {"mode", "0555"}},
		unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd) // attached, or dissolved by this
	return attachAt(fd, podPIDs)
}

// joined is what a container needs to join a PID namespace.
type joined struct {
	ns     int
	procfs int // detached mount
	// What the container then shares with others, for those that join it in turn: the procfs of its namespace, which stays
	// its owner's, or our namespace.
	of  *procfs
	pid initproto.PIDMode
}

func (j *joined) close() { closeAll([]int{j.ns, j.procfs}) }

// join opens the PID namespace that a container shares.
func (p *pod) join(plan *initproto.Container) (j joined, err error) {
	j = joined{ns: -1, procfs: -1, pid: plan.PID}
	ch, proc, mode := p.reaper, (*procfs)(nil), initproto.PIDReaper
	switch {
	case plan.PID == initproto.PIDTarget:
		p.mu.Lock()
		if t := p.containers[plan.TargetID]; t != nil {
			ch, proc, mode = t.child, t.procfs, t.pid
		} else {
			ch = nil
		}
		p.mu.Unlock()
	case ch != nil:
		<-p.reaperReady
		proc = p.reaperProcfs
	}
	if ch != nil {
		j.ns, err = p.children.namespace(ch, "pid")
	}
	switch {
	case plan.PID == initproto.PIDTarget && (ch == nil || errors.Is(err, unix.ESRCH)):
		return j, errors.New("target container " + plan.TargetID + " is not running any more")
	case ch == nil:
		return j, unix.ESRCH
	case err != nil:
		return j, err
	}
	switch j.of = proc; {
	case mode == initproto.PIDHost: // ours
		j.pid = mode
		j.procfs, err = sys.CreateMount("proc", nil, protections&^unix.MOUNT_ATTR_RDONLY)
	case proc == nil:
		err = &sys.Error{Op: "find the procfs of the processes to join", Err: unix.ENOENT}
	default:
		j.procfs, err = proc.clone(p)
	}
	if err != nil {
		j.close()
	}
	return j, err
}

package main

import (
	"encoding/binary"
	"errors"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/initproto"
	"github.com/crisp-cri/crisp/runtime/sys"
)

// The pod init's side of what successor.go describes.

// pageSize is what is mapped for a pid. The kernel rounds up.
const pageSize = 4096

// heir is what the pod init knows of a successor to come.
type heir struct {
	read  *os.File // of the pipe through which it says an errno
	write int      // to be given to the init; -1: closed
	page  int      // descriptor of the page, for the init; -1: closed
	pid   *uint32  // the page: 0 until the successor was cloned
}

func newHeir() (*heir, error) {
	h := &heir{write: -1, page: -1}
	var err error
	if h.page, err = unix.MemfdCreate("pid", unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL); err == unix.EINVAL { // before Linux 6.3
		h.page, err = unix.MemfdCreate("pid", unix.MFD_CLOEXEC)
	}
	if err != nil {
		return nil, &sys.Error{Op: "memfd_create", Err: err}
	}
	if err := unix.Ftruncate(h.page, pageSize); err != nil {
		h.close()
		return nil, &sys.Error{Op: "ftruncate memfd", Err: err}
	}
	if h.pid, err = mapPage(h.page); err != nil {
		h.close()
		return nil, err
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		h.close()
		return nil, &sys.Error{Op: "pipe2", Err: err}
	}
	h.write = fds[1]
	if err := unix.SetNonblock(fds[0], true); err != nil {
		_ = unix.Close(fds[0]) // nothing in it
		h.close()
		return nil, &sys.Error{Op: "fcntl", Err: err}
	}
	h.read = os.NewFile(uintptr(fds[0]), "status")
	return h, nil
}

// given closes what the init has been given.
func (h *heir) given() {
	closeAll([]int{h.write, h.page})
	h.write, h.page = -1, -1
}

func (h *heir) close() {
	h.given()
	if h.read != nil {
		_ = h.read.Close() // only read from
	}
	if h.pid != nil {
		unmapPage(h.pid)
		h.pid = nil
	}
}

// saying is what came through the pipe before its end.
type saying struct {
	report [8]byte // step, errno
	n      int
}

// listen reads the pipe until its end, or the deadline of h.read.
func (h *heir) listen(raw syscall.RawConn) (s saying) {
	read := func(fd uintptr) bool {
		var err error
		s.n, err = unix.Read(int(fd), s.report[:])
		return err != unix.EAGAIN && err != unix.EINTR
	}
	if raw.Read(read) != nil { // the deadline: what was said before a death is there
		_ = raw.Control(func(fd uintptr) { read(fd) })
	}
	return s
}

// succeed waits until init has a successor and that has become the program, or says why not. Both may be nil: there is none,
// and init is dead. It settles what fork has let be expected.
//
// The pipe ends when both have closed it. Somebody in the successor's PID namespace may have got hold of it and say anything or
// keep it open: that is believed of the successor, and waited for while it lives. A successor that was killed before its execve counts as
// a program that was killed.
func (c *children) succeed(h *heir, init *child, program string) (successor *child, s *step) {
	raw, err := h.read.SyscallConn()
	if err != nil {
		c.settle()
		return nil, failed("start process", err)
	}
	said := make(chan saying, 1)
	go func() { said <- h.listen(raw) }() // this call waits for it
	var last saying
	heard := false
	select {
	case last = <-said:
		heard = true
	case <-init.done: // the pid is there by now, or never will be
	}
	if heard && atomic.LoadUint32(h.pid) == 0 {
		<-init.done
	}
	if pid := atomic.LoadUint32(h.pid); pid != 0 {
		successor = c.adopt(int(pid))
	}
	c.settle()
	if !heard && successor != nil {
		select {
		case last = <-said:
			heard = true
		case <-successor.done:
		}
	}
	if !heard {
		_ = h.read.SetReadDeadline(time.Now()) // a pipe can
		last = <-said
	}
	if last.n < len(last.report) {
		return successor, nil
	}
	if successor != nil {
		<-successor.done
	}
	return successor, last.step(program)
}

func (s *saying) step(program string) *step {
	word := func(b []byte) uint32 { return binary.NativeEndian.Uint32(b) }
	errno := unix.Errno(word(s.report[4:]))
	switch word(s.report[:]) {
	case stepClone:
		f := failed("clone process", errno)
		if errno == unix.EPERM || errno == unix.ENOSYS {
			f.text = "the seccomp profile must allow clone(2), unless no_new_privs is set"
		}
		return f
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

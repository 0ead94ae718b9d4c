package main

import (
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/sys"
)

// children are the pod init's child processes. A child is registered before it can be reaped: fork and
// reap exclude each other. Orphans that were given to us are reaped and forgotten.
type children struct {
	signals chan os.Signal

	// mu is held across clone+exec and across wait4(WNOHANG): neither waits for anybody.
	mu    sync.Mutex
	alive map[int]*child
	// expecting counts children that will give us a successor (successor.go) which we do not know yet.
	expecting int
}

// child is one of them. done is closed when it was reaped; status and at are valid then.
type child struct {
	pid    int
	done   chan struct{}
	status unix.WaitStatus
	at     time.Time
}

// dead says whether the child has ended.
func (c *child) dead() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// ends waits for the end of the child, for a while.
func (c *child) ends(within time.Duration) bool {
	t := time.NewTimer(within)
	defer t.Stop()
	select {
	case <-c.done:
		return true
	case <-t.C:
		return false
	}
}

func (c *children) init() {
	c.alive = map[int]*child{}
	c.signals = make(chan os.Signal, 1) // SIGCHLD says "look", it does not count
	signal.Notify(c.signals, unix.SIGCHLD)
	// Signals that would end us have a handler that does nothing. (Ignoring them would be inherited by every
	// program we start: SIG_IGN survives execve, a handler does not.)
	signal.Notify(make(chan os.Signal, 1), unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE, unix.SIGUSR1, unix.SIGUSR2)
}

// reap collects the dead, for ever.
func (c *children) reap() {
	for range c.signals {
		c.reapAll()
	}
}

// reapAll collects who is dead now. While a successor is expected, a dead child that we do not know may be it: then
// only those we know are collected, and the others stay until settle.
func (c *children) reapAll() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.expecting == 0 {
		for c.reapOne(-1) {
		}
		return
	}
	for pid := range c.alive {
		c.reapOne(pid)
	}
}

// reapOne collects the child pid, or any (-1), if it is dead. Caller holds mu.
func (c *children) reapOne(pid int) bool {
	var status unix.WaitStatus
	for {
		dead, err := unix.Wait4(pid, &status, unix.WNOHANG, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || dead <= 0 {
			return false
		}
		if ch := c.alive[dead]; ch != nil {
			delete(c.alive, dead)
			ch.status, ch.at = status, time.Now()
			close(ch.done)
		}
		return true
	}
}

// adopt registers a successor. It cannot have been reaped.
func (c *children) adopt(pid int) *child {
	c.mu.Lock()
	defer c.mu.Unlock()
	ch := &child{pid: pid, done: make(chan struct{})}
	c.alive[pid] = ch
	return ch
}

// settle says that an expected successor was adopted, or will never come.
func (c *children) settle() {
	c.mu.Lock()
	c.expecting--
	c.mu.Unlock()
	c.reapAll() // whose SIGCHLD came while it was to be left alone
}

// signal sends a signal to a child that is not reaped yet, so that the pid is its own.
func (c *children) signal(ch *child, sig unix.Signal) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.alive[ch.pid] != ch {
		return unix.ESRCH
	}
	return unix.Kill(ch.pid, sig)
}

// namespace opens /proc/PID/ns/name of a child that is not reaped yet.
func (c *children) namespace(ch *child, name string) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.alive[ch.pid] != ch { // its number may be another's by now
		return -1, unix.ESRCH
	}
	path := "/proc/" + itoa(ch.pid) + "/ns/" + name
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &sys.Error{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// birth says how a child is born.
type birth struct {
	role     string // argument of crisp-init
	oomScore string // its second; "": as ours
	title    string // argv[0], for ps
	clone    uintptr
	files    [4]int // its 0–3
	cgroupFD int    // cgroup v2 directory to be born in, -1: ours
	tasks    []int  // v1 cgroups to be born in: their tasks files
	heir     *heir  // not nil: it will have a successor
}

// fork starts a child of ours from our own sealed binary.
func (c *children) fork(b birth) (*child, error) {
	attr := syscall.ProcAttr{
		// A container's init lives for milliseconds: no collector, one processor, and nobody need look for CPU limits.
		Env:   []string{"GOMAXPROCS=1", "GOGC=off", "GOTRACEBACK=none", "GODEBUG=containermaxprocs=0,updatemaxprocs=0"},
		Files: []uintptr{uintptr(b.files[0]), uintptr(b.files[1]), uintptr(b.files[2]), uintptr(b.files[3]), selfFD},
		Sys:   &syscall.SysProcAttr{Cloneflags: b.clone},
	}
	if b.role == "reaper" {
		attr.Env = []string{"GOMAXPROCS=1", "GOTRACEBACK=none", "GODEBUG=containermaxprocs=0,updatemaxprocs=0"}
		// It dies with us. The signal comes at the death of the thread that forked: our caller has the main thread,
		// which lives as long as the process.
		attr.Sys.Pdeathsig = syscall.SIGKILL
	}
	if b.cgroupFD >= 0 {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, b.cgroupFD
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	args := []string{b.title, b.role}
	if b.oomScore != "" {
		args = append(args, b.oomScore)
	}
	var pid int
	err := c.bornIn(b.tasks, func() (err error) {
		pid, err = syscall.ForkExec(selfPath, args, &attr)
		return err
	})
	if err == syscall.E2BIG {
		err = syscall.ENOMEM // two or three words are not too long: their page could not be charged to the cgroup it is born in
	}
	if err != nil {
		return nil, &sys.Error{Op: "clone", Path: b.role + " init", Err: err}
	}
	ch := &child{pid: pid, done: make(chan struct{})}
	c.alive[pid] = ch
	if b.heir != nil {
		c.expecting++
	}
	return ch, nil
}

// bornIn runs fork on a thread whose children are born in the v1 cgroups of the tasks files. This is the only place where
// the pod init moves a thread; it is not moved back, it ends. It is never the main thread: the main goroutine keeps that.
//
// On v1 a thread that moves itself takes no lock, while a process that is moved waits for an RCU grace period, 5 to 15 ms:
// so the child does not enter its cgroups, it is born in them, as on v2.
func (c *children) bornIn(tasks []int, fork func() error) error {
	if len(tasks) == 0 {
		return fork()
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and the thread ends with this goroutine, wherever it got to
		for _, fd := range tasks {
			if _, err := unix.Write(fd, []byte("0")); err != nil {
				done <- &sys.Error{Op: "write", Path: "cgroup tasks", Err: err}
				return
			}
		}
		done <- fork()
	}()
	return <-done
}

package spawn

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// process is a pod init as the kernel knows it: a pidfd, which unlike a pid cannot come to mean
// another process.
type process struct {
	pid   int
	pidfd *os.File
	child bool // of ours: we reap it
	done  chan struct{}
	wait  sync.WaitGroup
}

// watchProcess takes over pidfd and watches; done is closed when the process has died. The wait is the
// runtime poller's: a pod costs no thread.
func watchProcess(pid, pidfd int, child bool) (*process, error) {
	if err := unix.SetNonblock(pidfd, true); err != nil {
		unix.Close(pidfd)
		return nil, os.NewSyscallError("fcntl pidfd", err)
	}
	p := &process{pid: pid, pidfd: os.NewFile(uintptr(pidfd), "pidfd"), child: child, done: make(chan struct{})}
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		p.pidfd.Close()
		return nil, err
	}
	p.wait.Add(1) // the watcher
	go func() {
		defer p.wait.Done()
		number := -1
		err := raw.Read(func(fd uintptr) bool {
			number = int(fd)
			poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(poll, 0)
			return err == nil && n == 1
		})
		if err != nil { // closed by us: the process may live on
			return
		}
		if p.child {
			var si unix.Siginfo
			for unix.Waitid(unix.P_PIDFD, number, &si, unix.WEXITED, nil) == unix.EINTR { // reaps; ECHILD if somebody was faster
			}
		}
		close(p.done)
	}()
	return p, nil
}

// alive asks the kernel rather than the watcher, who may not have heard yet: what was opened by the pid before the answer yes was
// the process's own.
func (p *process) alive() bool {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return false
	}
	alive := false
	err = raw.Control(func(fd uintptr) {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}} // readable: dead, pidfd_open(2)
		for {
			n, err := unix.Poll(poll, 0)
			if err == unix.EINTR {
				continue
			}
			alive = err == nil && n == 0
			return
		}
	})
	return err == nil && alive
}

func (p *process) kill() error {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var kerr error
	if err := raw.Control(func(fd uintptr) { kerr = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) }); err != nil {
		return err
	}
	if kerr == unix.ESRCH {
		return nil
	}
	return os.NewSyscallError("pidfd_send_signal", kerr)
}

// dies waits for the death of the process, for a while.
func (p *process) dies(within time.Duration) bool {
	t := time.NewTimer(within)
	defer t.Stop()
	select {
	case <-p.done:
		return true
	case <-t.C:
		return false
	}
}

// close stops watching.
func (p *process) close() {
	p.pidfd.Close()
	p.wait.Wait()
}

// find opens the process of a handle if it is still that process.
func find(h Handle) (*process, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	if h.BootID != boot || h.PID <= 0 {
		return nil, ErrGone
	}
	fd, err := unix.PidfdOpen(h.PID, 0)
	if err == unix.ESRCH || err == unix.EINVAL {
		return nil, ErrGone
	}
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	// The start time is read after the pidfd was opened: if it is the recorded one, the pidfd is its.
	start, err := startTime(h.PID)
	if err != nil || start != h.StartTime {
		unix.Close(fd)
		return nil, ErrGone
	}
	return watchProcess(h.PID, fd, false)
}

// bootID identifies the kernel's life, random(4).
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// startTime is field 22 of /proc/PID/stat, in clock ticks since boot, proc_pid_stat(5).
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseStartTime(b)
}

func parseStartTime(stat []byte) (uint64, error) {
	// The second field is the name in parentheses and may hold anything, ")" included.
	i := bytes.LastIndexByte(stat, ')')
	if i < 0 {
		return 0, fmt.Errorf("malformed stat line %q", stat)
	}
	f := bytes.Fields(stat[i+1:])
	if len(f) < 20 {
		return 0, fmt.Errorf("stat line has %d fields after the name, want at least 20", len(f))
	}
	return strconv.ParseUint(string(f[19]), 10, 64)
}

package sys

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A HeldError says which process holds a lock file.
type HeldError struct{ PID string } // as it wrote it; "" if it had not got that far

func (e *HeldError) Error() string { return "in use by process " + e.PID }

// handOver is how long a lock of a dead process may outlive it: a child that it was cloning has its descriptors
// until its execve.
const handOver = 5 * time.Second

// LockFile opens the file at path (0600, made if missing) and takes an flock(2) on it, which the kernel drops with the
// process however it dies, and writes the pid into it. If a living process has it the error is a *HeldError.
// Closing the file releases it; the file stays, for removing it would let two processes hold locks on two files of one name.
func LockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	fd := int(f.Fd())
	err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	if err == unix.EWOULDBLOCK {
		b := make([]byte, 20)
		n, _ := f.ReadAt(b, 0) // short, as a rule; what cannot be read stays unnamed
		owner := strings.TrimSpace(string(b[:n]))
		if alive(owner) {
			return nil, errors.Join(&HeldError{PID: owner}, f.Close())
		}
		if err = waitLock(f); err == os.ErrDeadlineExceeded {
			return nil, &HeldError{PID: owner} // the file is the waiter's; it ends with the lock
		}
	}
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		return nil, errors.Join(&os.PathError{Op: "lock", Path: path, Err: err}, f.Close())
	}
	return f, nil
}

func waitLock(f *os.File) error {
	got := make(chan error, 1)
	go func() { // ends when the lock is free
		got <- ignoringEINTR(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX) })
	}()
	t := time.NewTimer(handOver)
	defer t.Stop()
	select {
	case err := <-got:
		return err
	case <-t.C:
		return os.ErrDeadlineExceeded
	}
}

func ignoringEINTR(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

// alive reports whether the process of that number runs. Nonsense counts as alive: somebody has the lock.
func alive(pid string) bool {
	n, err := strconv.Atoi(pid)
	if err != nil || n <= 0 {
		return true
	}
	fd, err := unix.PidfdOpen(n, 0)
	if err != nil {
		return err != unix.ESRCH
	}
	defer unix.Close(fd)
	// A pidfd is readable when its process has ended, reaped or not.
	ready, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return err != nil || ready == 0
}

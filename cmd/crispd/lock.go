package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// instanceLock keeps a second crispd away from a state root: an flock(2) on the
// file "lock" in it, which the kernel drops with the process however it dies. The
// file also holds the owner's pid, for the second one's error message only.
type instanceLock struct{ file *os.File }

// lockStateRoot takes the lock, or names who has it.
func lockStateRoot(stateRoot string) (*instanceLock, error) {
	path := filepath.Join(stateRoot, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot lock state root %s: %w", stateRoot, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("cannot lock state root %s: flock: %w", stateRoot, err)
		}
		owner, _ := io.ReadAll(io.LimitReader(f, 32)) // allowed: bounded; unreadable: the owner stays unnamed
		return nil, fmt.Errorf("state root %s is in use by another crispd, pid %s", stateRoot, strings.TrimSpace(string(owner)))
	}
	l := &instanceLock{file: f}
	if err := errors.Join(f.Truncate(0), writePID(f)); err != nil {
		l.release()
		return nil, fmt.Errorf("cannot lock state root %s: %w", stateRoot, err)
	}
	return l, nil
}

func writePID(f *os.File) error {
	_, err := fmt.Fprintf(f, "%d\n", os.Getpid())
	return err
}

// release drops the lock. The file stays: removing it would let two processes
// hold locks on two files of the same name.
func (l *instanceLock) release() { l.file.Close() }

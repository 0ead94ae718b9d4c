package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/crisp-cri/crisp/runtime/sys"
)

// instanceLock keeps a second crispd away from a state root: the file "lock" in it, see sys.LockFile.
type instanceLock struct{ file *os.File }

// lockStateRoot takes the lock, or names who has it.
func lockStateRoot(stateRoot string) (*instanceLock, error) {
	f, err := sys.LockFile(filepath.Join(stateRoot, "lock"))
	var held *sys.HeldError
	if errors.As(err, &held) {
		return nil, fmt.Errorf("state root %s is in use by another crispd, pid %s", stateRoot, held.PID)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot lock state root %s: %w", stateRoot, err)
	}
	return &instanceLock{file: f}, nil
}

// release drops the lock.
func (l *instanceLock) release() { l.file.Close() }

package sys

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLockFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	f, err := LockFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// flock(2) belongs to the open file description: a second open in this process is as good as another process.
	var held *HeldError
	if _, err := LockFile(path); !errors.As(err, &held) || held.PID != strconv.Itoa(os.Getpid()) {
		t.Errorf("got %v, want held by %d", err, os.Getpid())
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if f, err = LockFile(path); err != nil {
		t.Fatalf("after release: %v", err)
	}
	f.Close()
}

// The owner was killed while it cloned a child: the child has the lock's descriptor for a moment longer.
func TestLockFileOutlivesItsOwnerForAMoment(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(strconv.Itoa(dead.Process.Pid) + "\n"); err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 1)
	go func() {
		l, err := LockFile(path)
		if err == nil {
			err = l.Close()
		}
		got <- err
	}()
	if err := f.Close(); err != nil { // the child's execve
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Errorf("got %v, want the lock of a dead process", err)
	}
}

package cri

import (
	"testing"

	"golang.org/x/sys/unix"
)

func kill(t *testing.T, pid int, signal unix.Signal) {
	t.Helper()
	if err := unix.Kill(pid, signal); err != nil {
		t.Fatalf("kill %d: %v", pid, err)
	}
}

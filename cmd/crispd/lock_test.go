package main

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

func TestLockStateRoot(t *testing.T) {
	dir := t.TempDir()
	first, err := lockStateRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	// flock(2) belongs to the open file description, so a second open in the same process is a second crispd.
	_, err = lockStateRoot(dir)
	if want := fmt.Sprintf("%s is in use by another crispd, pid %d", dir, os.Getpid()); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q in it", err, want)
	}
	first.release()
	second, err := lockStateRoot(dir)
	if err != nil {
		t.Fatalf("after the first released: %v", err)
	}
	second.release()
}

package spawn

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestCheckUserNamespaces(t *testing.T) {
	h := newHost(t)
	before := ownChildren(t)
	if err := h.CheckUserNamespaces(h.ctx(), h.dir, h.dir); err != nil {
		if errors.Is(err, ErrUnsupported) {
			t.Skip(err) // before Linux 6.3
		}
		t.Fatal(err)
	}
	dir := filepath.Join(h.dir, "ramfs")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("ramfs", dir, "ramfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	for _, tt := range []struct{ name, dir, says string }{
		{"a file system that cannot", dir, "file system ramfs, mounted at " + dir},
		{"no directory", dir + "/nowhere", "no such file"},
	} {
		if err := h.CheckUserNamespaces(h.ctx(), h.dir, tt.dir); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: got %v, want ErrUnsupported that says %q", tt.name, err, tt.says)
		}
	}
	// The pod inits that were tried are dead and reaped.
	for pid := range ownChildren(t) {
		if !before[pid] {
			t.Errorf("a child is left: %s", pid)
		}
	}
}

// ownChildren are the pids of our children, dead ones too.
func ownChildren(t *testing.T) map[string]bool {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	own := map[string]bool{}
	for _, file := range all {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		if after := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])); after[1] == strconv.Itoa(os.Getpid()) {
			own[filepath.Base(filepath.Dir(file))] = true
		}
	}
	return own
}

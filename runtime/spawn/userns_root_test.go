package spawn

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestCheckUserNamespaces(t *testing.T) {
	h := newHost(t)
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
	var si unix.Siginfo
	if err := unix.Waitid(unix.P_ALL, 0, &si, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil); err != unix.ECHILD {
		t.Errorf("a child is left: %v", err)
	}
}

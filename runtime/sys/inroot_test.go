package sys

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// tree makes a root directory with a sibling "canary" that nothing may reach.
func tree(t *testing.T) (root int, dir, canary string) {
	t.Helper()
	base := t.TempDir()
	dir, canary = filepath.Join(base, "root"), filepath.Join(base, "canary")
	for _, d := range []string{dir, canary, filepath.Join(dir, "etc")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(root) })
	return root, dir, canary
}

func TestEnsureInRoot(t *testing.T) {
	tests := []struct {
		name   string
		links  map[string]string // path below the root → target
		path   string
		kind   Kind
		policy Links
		want   string // where it is, below the root
		err    error
	}{
		{name: "there", path: "/etc", want: "etc"},
		{name: "missing directories", path: "/a/b/c", want: "a/b/c"},
		{name: "missing file", path: "/a/b/f", kind: RegularFile, want: "a/b/f"},
		{name: "root itself", path: "/", want: "."},
		{name: "dots", path: "//./a/./b", want: "a/b"},
		{name: "absolute link", links: map[string]string{"l": "/etc"}, path: "/l/x", want: "etc/x"},
		{name: "dangling absolute link", links: map[string]string{"run": "/var/run"}, path: "/run/secrets", want: "var/run/secrets"},
		{name: "dangling relative link", links: map[string]string{"etc/l": "../new/deep"}, path: "/etc/l/x", want: "new/deep/x"},
		{name: "dangling link as the last component", links: map[string]string{"etc/resolv.conf": "/run/resolv.conf"}, path: "/etc/resolv.conf", kind: RegularFile, want: "run/resolv.conf"},
		{name: "link out of the root", links: map[string]string{"l": "../../canary"}, path: "/l/x", want: "canary/x"},
		{name: "absolute link out of the root", links: map[string]string{"l": "/../../../canary/"}, path: "/l/x", want: "canary/x"},
		{name: "dot-dot beyond the root", path: "/../../../canary/x", want: "canary/x"},
		{name: "loop", links: map[string]string{"a": "b", "b": "a"}, path: "/a/x", err: unix.ELOOP},
		{name: "link where none may be", links: map[string]string{"proc": "/etc"}, path: "/proc", policy: RefuseLinks, err: unix.ELOOP},
		{name: "dangling link where none may be", links: map[string]string{"proc": "/none"}, path: "/proc", policy: RefuseLinks, err: unix.ELOOP},
		{name: "below a file", links: nil, path: "/file/x", err: unix.ENOTDIR},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root, dir, canary := tree(t)
			if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			for path, target := range tt.links {
				if err := os.Symlink(target, filepath.Join(dir, path)); err != nil {
					t.Fatal(err)
				}
			}
			fd, err := EnsureInRoot(root, tt.path, tt.kind, tt.policy)
			if !errors.Is(err, tt.err) {
				t.Fatalf("got error %v, want %v", err, tt.err)
			}
			if err == nil {
				defer unix.Close(fd)
				var got, want unix.Stat_t
				if err := unix.Fstat(fd, &got); err != nil {
					t.Fatal(err)
				}
				if err := unix.Lstat(filepath.Join(dir, tt.want), &want); err != nil {
					t.Fatalf("nothing at %s: %v", tt.want, err)
				}
				if got.Ino != want.Ino {
					t.Errorf("got inode %d, want %d of %s", got.Ino, want.Ino, tt.want)
				}
				if isFile := got.Mode&unix.S_IFMT == unix.S_IFREG; isFile != (tt.kind == RegularFile) {
					t.Errorf("got mode %o, want kind %d", got.Mode, tt.kind)
				}
			}
			if l, err := os.ReadDir(canary); err != nil || len(l) != 0 {
				t.Errorf("outside the root: %v, %v", l, err)
			}
		})
	}
}

// TestEnsureInRootUnderRace swaps a directory with a link to the canary while paths below it are made
// (CVE-2021-30465, CVE-2024-45310: SEC-10, SEC-11 at the level of the walk).
func TestEnsureInRootUnderRace(t *testing.T) {
	root, dir, canary := tree(t)
	if err := os.Mkdir(filepath.Join(dir, "v"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../../canary", filepath.Join(dir, "w")); err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Renameat2(unix.AT_FDCWD, filepath.Join(dir, "v"), unix.AT_FDCWD, filepath.Join(dir, "w"), unix.RENAME_EXCHANGE)
			}
		}
	}()
	for range 2000 {
		fd, err := EnsureInRoot(root, "/v/a/b", Directory, FollowInRoot)
		if err == nil {
			unix.Close(fd)
		}
		os.RemoveAll(filepath.Join(dir, "v/a"))
		os.RemoveAll(filepath.Join(dir, "w/a"))
	}
	close(stop)
	<-done
	if l, err := os.ReadDir(canary); err != nil || len(l) != 0 {
		t.Errorf("outside the root: %v, %v", l, err)
	}
}

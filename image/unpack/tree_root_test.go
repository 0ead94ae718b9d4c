package unpack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/image/imagetest"
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: entries have owners, devices and trusted attributes")
	}
}

// unpackArchive unpacks bytes into a new directory.
func unpackArchive(t testing.TB, archive []byte, limits Limits) (root string, _ Result, _ error) {
	t.Helper()
	needRoot(t)
	root = filepath.Join(t.TempDir(), "fs")
	if err := os.Mkdir(root, 0o700); err != nil {
		t.Fatal(err)
	}
	result, err := unpackInto(root, archive, limits)
	return root, result, err
}

// unpackInto unpacks the only layer of an image.
func unpackInto(root string, archive []byte, limits Limits) (Result, error) {
	result, err := layerInto(root, archive, limits)
	if err != nil || result.Loose == nil {
		return result, err
	}
	tie, err := os.MkdirTemp(filepath.Dir(root), "tie")
	if err == nil {
		defer os.RemoveAll(tie)
		_, _, err = Tie(context.Background(), root, nil, result.ImpliedRoot, result.Loose, tie)
	}
	return result, err
}

func layerInto(root string, archive []byte, limits Limits) (Result, error) {
	open := func(context.Context) io.Reader { return bytes.NewReader(archive) }
	return Layer(context.Background(), open, root, limits, NewBudget(1<<30, 1<<20))
}

func unpackEntries(t testing.TB, entries ...imagetest.Entry) (string, Result, error) {
	t.Helper()
	return unpackArchive(t, imagetest.Tar(entries...), Limits{})
}

// show prints a tree, one line an entry: name, kind, mode, owner, and what
// matters for the kind; links of one file share a number.
func show(t testing.TB, root string) string {
	t.Helper()
	var lines []string
	groups := map[uint64]int{}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // as below
		}
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(root, path)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err == unix.ENOENT {
			return nil // overlayfs lists whiteouts of directories that are in one layer only
		} else if err != nil {
			return err
		}
		line := fmt.Sprintf("%s %s %04o %d:%d", name, kindName(st.Mode), st.Mode&0o7777, st.Uid, st.Gid)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %q", clip(string(text)))
		case unix.S_IFLNK:
			target, _ := os.Readlink(path)
			line += " -> " + target
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" %d,%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if groups[st.Ino] == 0 {
				groups[st.Ino] = len(groups) + 1
			}
			line += fmt.Sprintf(" link#%d", groups[st.Ino])
		}
		for _, key := range xattrsOf(path) {
			value := make([]byte, 256)
			n, err := unix.Lgetxattr(path, key, value)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %s=%q", key, value[:n])
		}
		if st.Mtim.Sec == imagetest.Time.Unix() {
			line += " @T"
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(lines, "\n") + "\n"
}

func kindName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "file"
	case unix.S_IFDIR:
		return "dir"
	case unix.S_IFLNK:
		return "symlink"
	case unix.S_IFCHR:
		return "char"
	case unix.S_IFBLK:
		return "block"
	case unix.S_IFIFO:
		return "fifo"
	}
	return "other"
}

func xattrsOf(path string) []string {
	buf := make([]byte, 4096)
	n, err := unix.Llistxattr(path, buf)
	if err != nil || n == 0 {
		return nil
	}
	keys := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
	slices.Sort(keys)
	return keys
}

// canary is a set of directories that a hostile layer might reach from root:
// one called etc beside each of root's parents in the test's directory, and the
// host's /etc. check fails the test if anything in them changed.
type canary struct {
	before map[string]string
	dirs   []string
}

func newCanary(t testing.TB, root string) *canary {
	t.Helper()
	c := &canary{dirs: []string{"/etc"}}
	top := filepath.Dir(filepath.Dir(root))
	for dir := filepath.Dir(root); len(dir) >= len(top); dir = filepath.Dir(dir) {
		etc := filepath.Join(dir, "etc")
		if err := os.MkdirAll(filepath.Join(etc, "sub"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(etc, "passwd"), []byte("canary"), 0o640); err != nil {
			t.Fatal(err)
		}
		c.dirs = append(c.dirs, etc)
	}
	c.before = c.snapshot(t)
	return c
}

func (c *canary) snapshot(t testing.TB) map[string]string {
	t.Helper()
	state := map[string]string{}
	for _, dir := range c.dirs {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		add := func(path string) {
			var st syscall.Stat_t
			if err := syscall.Lstat(path, &st); err != nil {
				return
			}
			// ctime changes with every change of content, attributes or links.
			state[path] = fmt.Sprint(st.Mode, st.Uid, st.Gid, st.Size, st.Nlink, st.Ctim, st.Mtim, xattrsOf(path))
		}
		add(dir)
		for _, e := range entries {
			add(filepath.Join(dir, e.Name()))
		}
	}
	return state
}

func (c *canary) check(t testing.TB) {
	t.Helper()
	after := c.snapshot(t)
	for path, was := range c.before {
		if now := after[path]; now != was {
			t.Errorf("the layer reached %s: it was %s, is %q", path, was, now)
		}
	}
	for path := range after {
		if c.before[path] == "" {
			t.Errorf("the layer made %s", path)
		}
	}
}

// overlay mounts lowers (topmost first) and returns the path of the merged
// tree. The mount is in no namespace: it is reached through its descriptor and
// goes with it.
func overlay(t testing.TB, lowers ...string) string {
	t.Helper()
	// By descriptor: fsconfig(2) takes no string longer than 255 bytes.
	var names []string
	for _, dir := range append(lowers, t.TempDir()) {
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		names = append(names, fmt.Sprintf("/proc/self/fd/%d", fd))
	}
	fsfd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Fatalf("fsopen overlay: %v", err)
	}
	defer unix.Close(fsfd)
	if err := unix.FsconfigSetString(fsfd, "lowerdir", strings.Join(names, ":")); err != nil {
		t.Fatalf("lowerdir: %v", err)
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		t.Fatalf("overlay of %v: %v", lowers, err)
	}
	fd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		t.Fatalf("fsmount: %v", err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fmt.Sprintf("/proc/self/fd/%d/", fd)
}

// TestCanary: the canary notices what the tests rely on it for.
func TestCanary(t *testing.T) {
	for name, do := range map[string]func(etc string) error{
		"new file": func(etc string) error { return os.WriteFile(filepath.Join(etc, "new"), nil, 0o644) },
		"content":  func(etc string) error { return os.WriteFile(filepath.Join(etc, "passwd"), []byte("CANARY"), 0o640) },
		"mode":     func(etc string) error { return os.Chmod(filepath.Join(etc, "passwd"), 0o644) },
		"owner":    func(etc string) error { return os.Lchown(filepath.Join(etc, "passwd"), os.Getuid(), os.Getgid()) },
		"times":    func(etc string) error { return os.Chtimes(etc, imagetest.Time, imagetest.Time) },
		"link": func(etc string) error {
			return os.Link(filepath.Join(etc, "passwd"), filepath.Join(filepath.Dir(etc), "stolen"))
		},
		"removal": func(etc string) error { return os.Remove(filepath.Join(etc, "passwd")) },
	} {
		t.Run(name, func(t *testing.T) {
			c := newCanary(t, filepath.Join(t.TempDir(), "layer", "fs"))
			if !maps.Equal(c.before, c.snapshot(t)) {
				t.Error("it sees a change where there is none")
			}
			if err := do(c.dirs[1]); err != nil {
				t.Fatal(err)
			}
			if maps.Equal(c.before, c.snapshot(t)) {
				t.Error("it sees no change")
			}
		})
	}
}

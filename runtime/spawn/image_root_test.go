package spawn

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/sys"
)

// TestPartOfAnImage: on this kernel, and the way of kernels that cannot clone a detached mount.
func TestPartOfAnImage(t *testing.T) {
	h := newHost(t)
	upper, lower := filepath.Join(h.dir, "image", "upper"), filepath.Join(h.dir, "image", "lower")
	for path, text := range map[string]string{lower + "/d/f": "lower", lower + "/d/g": "g", upper + "/d/f": "upper"} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/d/../../../d", upper+"/link"); err != nil {
		t.Fatal(err)
	}
	for name, part := range map[string]func(whole int) (int, error){
		"now": func(whole int) (int, error) { return h.partOf(whole, "link") },
		"before Linux 6.15": func(whole int) (int, error) {
			target, err := sys.OpenInRoot(whole, "link", unix.O_PATH, sys.FollowInRoot)
			if err != nil {
				return -1, err
			}
			defer unix.Close(target)
			return h.partOfOld(whole, target)
		},
	} {
		t.Run(name, func(t *testing.T) {
			whole, err := h.MountImage(h.ctx(), ImageArgs{Lower: []string{upper, lower}})
			if err != nil {
				t.Fatal(err)
			}
			defer whole.Close()
			fd, err := part(int(whole.Fd()))
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			for file, want := range map[string]string{"f": "upper", "g": "g"} {
				at, err := sys.OpenInRoot(fd, "/../"+file, unix.O_RDONLY, sys.FollowInRoot)
				if err != nil {
					t.Fatal(err)
				}
				f := os.NewFile(uintptr(at), file)
				defer f.Close()
				buf := make([]byte, 16)
				if n, _ := f.Read(buf); string(buf[:n]) != want {
					t.Errorf("%s: got %q, want %q", file, buf[:n], want)
				}
			}
			if _, err := unix.Openat(fd, "new", unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o644); err != unix.EROFS {
				t.Errorf("writing: got %v, want EROFS", err)
			}
		})
	}
	if _, err := h.MountImage(h.ctx(), ImageArgs{Lower: []string{upper, lower}, SubPath: "d/nothing"}); !errors.Is(err, unix.ENOENT) {
		t.Errorf("a path that is not there: got %v, want ENOENT", err)
	}
}

package spawn

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
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

// TestHangingSource: a source on a file system that does not answer holds up Create until its deadline, nothing else of the pod, and when
// it answers after all nothing is left.
func TestHangingSource(t *testing.T) {
	h := newHost(t)
	p := h.pod(nil)
	dir := filepath.Join(h.dir, "hangs")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	server, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if err := unix.Mount("crisp-test-hangs", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", server.Fd())); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	upper, work := filepath.Join(h.dir, "u"), filepath.Join(h.dir, "w")
	if err := errors.Join(os.Mkdir(upper, 0o755), os.Mkdir(work, 0o755)); err != nil {
		t.Fatal(err)
	}
	root, err := h.MountRootfs(h.ctx(), RootfsArgs{Lower: []string{h.lower()}, Upper: upper, Work: work})
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	spec := exampleSpec("payload", "true")
	spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/v", Type: "bind", Source: dir + "/volume", Options: []string{"rbind"}})
	before := len(openFiles(t, os.Getpid()))
	ctx, cancel := context.WithCancelCause(h.ctx())
	done := make(chan error, 1)
	go func() { done <- p.Create(ctx, ContainerArgs{ID: newID(), Spec: spec, Rootfs: root}) }() // ends with ctx
	if x, out := p.run(exampleSpec("payload", "echo", "meanwhile"), nil); x.Code != 0 {
		t.Errorf("another container of the pod: got %v, %q", x, out)
	}
	gaveUp := errors.New("gave up")
	cancel(gaveUp)
	if err := <-done; !errors.Is(err, gaveUp) {
		t.Errorf("got %v, want what ended the call", err)
	}
	if err := server.Close(); err != nil { // whoever waits for it is told that it is gone
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		if n := len(openFiles(t, os.Getpid())); n <= before-1 { // the server's own
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("got %d open files, want %d: the opener has left some", n, before-1)
		}
		time.Sleep(time.Millisecond) // for the goroutine in the kernel to come back: nothing tells
	}
}

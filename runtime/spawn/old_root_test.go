package spawn

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/initproto"
)

// The ways that only older kernels take are tried on every kernel.

// A legacy context takes any option and fails when the overlay is made: the probe has to foresee that.
func TestLowerdirPlusProbe(t *testing.T) {
	h := newHost(t)
	fd, err := overlayOf(t, h.dir).mount(0)
	if err == nil {
		unix.Close(fd)
	}
	if got, want := lowerdirPlus(), err == nil; got != want {
		t.Errorf("the probe says %v, a mount says %v", got, err)
	}
}

// Before Linux 6.7, and before 6.15 where a layer is a detached mount.
func TestOverlayOfOlderKernels(t *testing.T) {
	h := newHost(t)
	o := overlayOf(t, h.dir)
	if err := o.addEmpty(); err != nil {
		t.Fatal(err)
	}
	before := len(mountsOf(t))
	fd, err := h.mountOverlayOld(o, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for name, want := range map[string]string{"one": "upper layer", "two": "lower layer"} {
		if got, err := os.ReadFile(filepath.Join(fdPath(fd), name)); err != nil || string(got) != want {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, want)
		}
	}
	if err := os.WriteFile(filepath.Join(fdPath(fd), "three"), nil, 0o644); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(o.upper, "three")); err != nil {
		t.Errorf("what was written is not in the writable layer: %v", err)
	}
	if after := mountsOf(t); len(after) != before {
		t.Errorf("%d mounts on the host, before %d:\n%s", len(after), before, strings.Join(after, "\n"))
	}
	ro := overlayOf(t, h.dir)
	ro.upper, ro.work = "", ""
	fd, err = h.mountOverlayOld(ro, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := os.WriteFile(filepath.Join(fdPath(fd), "three"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("writing to a read-only one: got %v, want EROFS", err)
	}
}

// A pod that was cloned while something was attached had a copy of it: "move_mount /root: no such file or directory".
func TestMountsAsideAreSeenByNobody(t *testing.T) {
	h := newHost(t)
	o := overlayOf(t, h.dir)
	o.upper, o.work = "", "" // a volatile one is mounted once
	device := initproto.Device{Path: "/dev/x", Mode: unix.S_IFCHR | 0o666, Major: 1, Minor: 3}
	made := make(chan error)
	go func() { // received below
		var errs []error
		for range 50 {
			fd, err := h.mountOverlayOld(o, 0)
			errs = append(errs, err)
			unix.Close(fd)
			fds, err := h.thread.makeDevices([]*initproto.Device{&device})
			errs = append(errs, err)
			closeFDs(fds)
		}
		made <- errors.Join(errs...)
	}()
	for looks := 0; ; looks++ {
		select {
		case err := <-made:
			if err != nil {
				t.Fatal(err)
			}
			if looks < 10 {
				t.Fatalf("looked %d times meanwhile: that proves nothing", looks)
			}
			return
		default:
		}
		err := h.thread.once(func() error {
			text, err := os.ReadFile("/proc/thread-self/mountinfo")
			if n := strings.Count(string(text), "\n"); err == nil && n != 3 {
				err = fmt.Errorf("the base mount namespace has %d mounts, want its three:\n%s", n, text)
			}
			return err
		})
		if err != nil {
			t.Error(err)
			<-made
			return
		}
	}
}

func TestOverlayOfOlderKernelsTooManyLayers(t *testing.T) {
	h := newHost(t)
	paths := make([]string, 500)
	for i := range paths {
		paths[i] = h.dir
	}
	o, err := openLayers(paths, nil)
	defer o.close()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.mountOverlayOld(o, 0); !errors.Is(err, ErrUnsupported) {
		t.Errorf("got %v, want ErrUnsupported", err)
	}
}

func mountsOf(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(strings.Split(string(text), "\n"), func(l string) bool { return l == "" })
}

// overlayOf is an overlay of two layers and a writable one, below dir.
func overlayOf(t *testing.T, dir string) *overlay {
	t.Helper()
	dir = filepath.Join(dir, "overlay")
	for path, text := range map[string]string{"a/one": "upper layer", "b/one": "lower layer", "b/two": "lower layer", "upper/.keep": "", "work/.keep": ""} {
		path = filepath.Join(dir, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	o, err := openLayers([]string{filepath.Join(dir, "a"), filepath.Join(dir, "b")}, nil)
	t.Cleanup(o.close)
	if err != nil {
		t.Fatal(err)
	}
	o.upper, o.work = filepath.Join(dir, "upper"), filepath.Join(dir, "work")
	return o
}

func TestImageBeforeSealExec(t *testing.T) {
	newHost(t) // needs root, and what it needs
	src, err := os.Open("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	image, err := imageOnMount(src)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	path := "/proc/self/fd/" + strconv.Itoa(int(image.Fd()))
	if err := image.Chmod(0); !errors.Is(err, unix.EROFS) {
		t.Errorf("chmod: got %v, want EROFS", err)
	}
	for _, flags := range []int{os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC} {
		if w, err := os.OpenFile(path, flags, 0); !errors.Is(err, unix.EROFS) {
			w.Close()
			t.Errorf("open with flags %#o: got %v, want EROFS", flags, err)
		}
	}
	got, err := os.ReadFile(path)
	want, werr := os.ReadFile("/bin/true")
	if err != nil || werr != nil || !bytes.Equal(got, want) {
		t.Errorf("the copy differs: %v, %v", err, werr)
	}
	cmd := exec.Command("/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{image}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("the copy does not run: %v\n%s", err, out)
	}
}

package cri

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/test/images"
)

// canary is a directory of the host into which nothing may lead, with what a runtime might touch.
func (w *world) canary(t *testing.T) (dir string, unchanged func()) {
	t.Helper()
	dir = filepath.Join(w.StateDir, "canary")
	for _, name := range []string{"secret", "ptmx", "mtab", "passwd", "group", "null"} {
		mustWrite(t, filepath.Join(dir, name), name+" of the host\n")
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	before := fileTree(t, dir)
	return dir, func() {
		t.Helper()
		if after := fileTree(t, dir); after != before {
			t.Errorf("the host changed:\n%s\nwas\n%s", after, before)
		}
	}
}

// tryRun makes and starts a container, runs some execs in it if it starts, and removes it.
func (p *pod) tryRun(edits ...editContainer) (started bool) {
	c, err := p.tryCreate([]string{"cat", "/etc/hostname", "/etc/passwd", ",", "sleep"}, edits...)
	if err != nil {
		return false
	}
	if err := p.w.rt.StartContainer(p.t.Context(), c.id); err == nil {
		started = true
		for _, args := range [][]string{{"ls", "/"}, {"mkfile", "/etc/x", "x"}, {"touch", "/dev/x"}} {
			_, _ = c.try(args...) // whatever it says: the canary is what counts
		}
	}
	c.remove()
	return started
}

// SEC-12, SEC-13, SEC-21, SEC-22: links in the image where the runtime mounts and writes.
func TestLinksInTheImageNeverLeadOut(t *testing.T) {
	w := need(t)
	dir, unchanged := w.canary(t)
	up := strings.Repeat("../", 12)
	p := w.pod(t)
	for _, at := range []string{"proc", "sys", "sys/fs/cgroup", "dev", "dev/shm", "dev/pts", "dev/mqueue", "etc", "etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/passwd", "etc/group", "etc/mtab", "run", "run/secrets", "var/run", "tmp", "volume"} {
		for kind, target := range map[string]string{"absolute": dir, "relative": up + dir[1:], "dangling": dir + "/new/deep", "of proc": "/proc/1/root", "self": "/proc/self/root" + dir} {
			t.Run(at+" "+kind, func(t *testing.T) {
				files := []images.File{{Name: "payload", FromHost: filepath.Join(filepath.Dir(w.certs), "payload")}}
				for parent := filepath.Dir(at); parent != "."; parent = filepath.Dir(parent) {
					files = append(files, images.File{Name: parent, Dir: true})
				}
				files = append(files, images.File{Name: at, Symlink: target})
				id, _ := w.forge(t, "links", images.Image{Layers: [][]images.File{files}})
				source := t.TempDir()
				mustWrite(t, source+"/mark", "mark\n")
				p.tryRun(withImage(id), withMounts(&runtimeapi.Mount{HostPath: source, ContainerPath: "/volume/sub"}, &runtimeapi.Mount{HostPath: source + "/mark", ContainerPath: "/run/secrets/token"}))
				unchanged()
				if table := readFile(t, "/proc/self/mountinfo"); strings.Contains(table, dir) || strings.Contains(table, source) {
					t.Errorf("something is mounted on the host: %s", table)
				}
			})
		}
	}
}

// SEC-12: proc and sys are what they should be, or the container does not start.
func TestProcAndSysAreReal(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	for at, magic := range map[string]string{"proc": "type=0x9fa0", "sys": "type=0x62656572"} {
		for _, target := range []string{"/tmp", "../tmp", "/no/such", "."} {
			files := []images.File{{Name: "payload", FromHost: filepath.Join(filepath.Dir(w.certs), "payload")}, {Name: "tmp", Dir: true}, {Name: at, Symlink: target}}
			id, _ := w.forge(t, "procsys", images.Image{Layers: [][]images.File{files}})
			c, err := p.tryCreate([]string{"sleep"}, withImage(id))
			if err == nil {
				err = w.rt.StartContainer(t.Context(), c.id)
			}
			if err != nil {
				continue
			}
			if got := c.exec("statfs", "/"+at); !strings.Contains(got, magic) {
				t.Errorf("/%s -> %s: got %q, want %s", at, target, got, magic)
			}
			c.remove()
		}
	}
}

// SEC-04
func TestWorkingDirectoryThroughALinkIsMadeInside(t *testing.T) {
	w := need(t)
	dir, unchanged := w.canary(t)
	p := w.pod(t)
	for _, target := range []string{dir, strings.Repeat("../", 12) + dir[1:]} {
		id, _ := w.forge(t, "workdir", images.Image{Layers: w.layers(t, images.File{Name: "a", Symlink: target}), Config: v1.Config{WorkingDir: "/a/new"}})
		p.tryRun(withImage(id))
		p.tryRun(func(c *runtimeapi.ContainerConfig) { withImage(id)(c); c.WorkingDir = "/a/newer" })
		unchanged()
	}
}

// SEC-14, SEC-20
func TestVolumesOfTheImageNeverReadTheHost(t *testing.T) {
	w := need(t)
	dir, unchanged := w.canary(t)
	p := w.pod(t)
	for _, path := range []string{"/../../../.." + dir, "/proc", "/proc/self", "/sys", "/dev", "/", "..", "/a/../.." + dir} {
		id, _ := w.forge(t, "volumes", images.Image{Layers: w.layers(t), Config: v1.Config{Volumes: map[string]struct{}{path: {}}}})
		c, err := p.tryCreate([]string{"sleep"}, withImage(id))
		if err == nil {
			err = w.rt.StartContainer(t.Context(), c.id)
		}
		if err == nil {
			if r, err := c.try("cat", dir+"/secret"); err == nil && r.ExitCode == 0 {
				t.Errorf("VOLUME %s: the container reads %q", path, r.Stdout)
			}
			if got := c.exec("statfs", "/proc"); !strings.Contains(got, "type=0x9fa0") {
				t.Errorf("VOLUME %s: /proc is %q", path, got)
			}
			c.remove()
		}
		unchanged()
	}
}

// exchange swaps a and b as fast as it can until the context ends; stop waits for it.
func exchange(t *testing.T, a, b string) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		for ctx.Err() == nil {
			if err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	return func() {
		t.Helper()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("exchange: %v", err)
		}
	}
}

// SEC-10, SEC-11: a mount target swapped for a link while it is being mounted.
func TestSwappedMountTargetsNeverLeadOut(t *testing.T) {
	w := need(t)
	dir, unchanged := w.canary(t)
	vol := t.TempDir()
	if err := os.Mkdir(vol+"/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(dir, vol+"/link"); err != nil {
		t.Fatal(err)
	}
	marker := t.TempDir()
	mustWrite(t, marker+"/marker", "marker\n")
	p := w.pod(t)
	stop := exchange(t, vol+"/sub", vol+"/link")
	defer stop()
	deadline := time.Now().Add(8 * time.Second)
	var started int
	for i := 0; i < 150 && time.Now().Before(deadline); i++ {
		c, err := p.tryCreate([]string{"sleep"}, withMounts(
			&runtimeapi.Mount{HostPath: vol, ContainerPath: "/vol"}, &runtimeapi.Mount{HostPath: marker, ContainerPath: "/vol/sub/in"}, &runtimeapi.Mount{HostPath: marker, ContainerPath: "/vol/link/in"}))
		if err != nil {
			continue
		}
		if err := w.rt.StartContainer(t.Context(), c.id); err == nil {
			started++
			if r, err := c.try("cat", "/vol/sub/secret"); err == nil && r.ExitCode == 0 {
				t.Fatal("the container sees the host")
			}
		}
		c.remove()
		if table := readFile(t, "/proc/self/mountinfo"); strings.Contains(table, marker) || strings.Contains(table, dir) {
			t.Fatalf("mounted on the host: %s", table)
		}
	}
	t.Logf("%d containers started", started)
	unchanged()
}

// SEC-15: /dev is a volume whose null is swapped for a link to a file of proc while paths are masked with it.
func TestSwappedNullNeverUnmasks(t *testing.T) {
	w := need(t)
	dev := t.TempDir()
	if err := unix.Mknod(dev+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/proc/version", dev+"/link"); err != nil {
		t.Fatal(err)
	}
	p := w.pod(t)
	stop := exchange(t, dev+"/null", dev+"/link")
	defer stop()
	masked := existing(t, "/proc/timer_list", "/proc/keys", "/proc/interrupts", "/proc/kcore")
	deadline := time.Now().Add(6 * time.Second)
	for i := 0; i < 100 && time.Now().Before(deadline); i++ {
		c, err := p.tryCreate([]string{"sleep"}, withMounts(&runtimeapi.Mount{HostPath: dev, ContainerPath: "/dev"}), withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.MaskedPaths, s.ReadonlyPaths = masked, []string{"/proc/sys"}
		}))
		if err != nil {
			continue
		}
		if err := w.rt.StartContainer(t.Context(), c.id); err == nil {
			for _, path := range masked {
				if got := c.exec("stat", path); !strings.Contains(got, "rdev=1:3") {
					t.Errorf("%s is %q, want the null device", path, got)
				}
			}
			c.fails("mkfile", "/proc/sys/kernel/domainname", "x")
		}
		c.remove()
	}
}

// existing are those of the paths that this kernel has; it wants one at least.
func existing(t *testing.T, paths ...string) (have []string) {
	t.Helper()
	for _, path := range paths {
		if _, err := os.Lstat(path); err == nil {
			have = append(have, path)
		}
	}
	if len(have) == 0 {
		t.Fatalf("this kernel has none of %v", paths)
	}
	return have
}

// SEC-24: nothing of the image is run by the runtime.
func TestNoProgramOfTheImageIsRunByTheRuntime(t *testing.T) {
	w := need(t)
	_, unchanged := w.canary(t)
	var files []images.File
	for _, name := range []string{"xz", "unpigz", "gzip", "zstd", "tar", "nsenter", "socat", "nft", "iptables", "mount", "ip", "sh"} {
		for _, dir := range []string{"bin", "usr/bin", "sbin"} {
			files = append(files, images.File{Name: dir, Dir: true}, images.File{Name: dir + "/" + name, Text: "#!/payload touch /marker\n", Mode: 0o755})
		}
	}
	id, _ := w.forge(t, "programs", images.Image{Layers: w.layers(t, files...)})
	c := w.pod(t).run([]string{"sleep"}, withImage(id))
	c.exec("true")
	if _, err := w.rt.ContainerStats(t.Context(), c.id); err != nil {
		t.Error(err)
	}
	if got := c.exec("ls", "/"); strings.Contains(got, "marker") {
		t.Error("a program of the image was run")
	}
	if _, err := os.Stat("/marker"); err == nil {
		t.Error("a program of the image was run on the host")
	}
	unchanged()
}

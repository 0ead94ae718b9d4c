package cri

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func withMounts(mounts ...*runtimeapi.Mount) editContainer {
	return func(c *runtimeapi.ContainerConfig) { c.Mounts = append(c.Mounts, mounts...) }
}

func TestBindMounts(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	dir := t.TempDir()
	mustWrite(t, dir+"/file", "content\n")
	mustWrite(t, dir+"/sub/below", "below\n")
	if err := os.Symlink("sub", dir+"/link"); err != nil {
		t.Fatal(err)
	}
	c := p.run([]string{"sleep"}, withMounts(
		&runtimeapi.Mount{HostPath: dir, ContainerPath: "/rw"},
		&runtimeapi.Mount{HostPath: dir, ContainerPath: "/ro", Readonly: true},
		&runtimeapi.Mount{HostPath: dir + "/file", ContainerPath: "/new/dirs/file"},
		&runtimeapi.Mount{HostPath: dir + "/link", ContainerPath: "/link"},
		&runtimeapi.Mount{HostPath: dir + "/sub", ContainerPath: "/rw/sub/../other"},
		&runtimeapi.Mount{HostPath: dir + "/made/by/runtime", ContainerPath: "/made"},
	))
	for path, want := range map[string]string{"/rw/file": "content\n", "/ro/file": "content\n", "/new/dirs/file": "content\n", "/link/below": "below\n", "/rw/other/below": "below\n"} {
		if got := c.exec("cat", path); got != want {
			t.Errorf("%s: got %q, want %q", path, got, want)
		}
	}
	c.exec("mkfile", "/rw/written", "x")
	if got := readFile(t, dir+"/written"); got != "x\n" {
		t.Errorf("on the host: got %q", got)
	}
	if msg := c.fails("mkfile", "/ro/written", "x"); !strings.Contains(msg, "read-only") {
		t.Errorf("got %q, want EROFS", msg)
	}
	if info, err := os.Stat(dir + "/made/by/runtime"); err != nil || !info.IsDir() {
		t.Errorf("a missing host path is made, as by containerd and CRI-O: %v, %v", info, err)
	}
	// The kubelet finds the termination message through these.
	st := c.status()
	if len(st.Mounts) != len(c.cfg.Mounts) {
		t.Fatalf("got %d mounts in the status, want %d", len(st.Mounts), len(c.cfg.Mounts))
	}
	for i, m := range c.cfg.Mounts {
		if got := st.Mounts[i]; got.HostPath != m.HostPath || got.ContainerPath != m.ContainerPath || got.Readonly != m.Readonly {
			t.Errorf("mount %d: got %v, want %v", i, got, m)
		}
	}
	// Never in the host's mount table: nothing can be busy or left there.
	if table := readFile(t, "/proc/self/mountinfo"); strings.Contains(table, dir) || strings.Contains(table, c.id) {
		t.Errorf("the host's mount table shows the container's mounts: %s", table)
	}
}

func TestMountsCoverEachOtherByDepth(t *testing.T) {
	w := need(t)
	outer, inner := t.TempDir(), t.TempDir()
	mustWrite(t, outer+"/who", "outer\n")
	mustWrite(t, outer+"/in/who", "covered\n")
	mustWrite(t, inner+"/who", "inner\n")
	c := w.pod(t).run([]string{"sleep"}, withMounts( // in the wrong order
		&runtimeapi.Mount{HostPath: inner, ContainerPath: "/a/in"},
		&runtimeapi.Mount{HostPath: outer, ContainerPath: "/a"},
	))
	if got := c.exec("cat", "/a/who", "/a/in/who"); got != "outer\ninner\n" {
		t.Errorf("got %q", got)
	}
}

func TestMountReplacesADefaultOne(t *testing.T) {
	w := need(t)
	dir := t.TempDir()
	mustWrite(t, dir+"/hosts", "10.0.0.1 kubelet-made\n")
	mustWrite(t, dir+"/shm/x", "x\n")
	c := w.pod(t).run([]string{"sleep"}, withMounts(
		&runtimeapi.Mount{HostPath: dir + "/hosts", ContainerPath: "/etc/hosts"},
		&runtimeapi.Mount{HostPath: dir + "/shm", ContainerPath: "/dev/shm"},
	))
	if got := c.exec("cat", "/etc/hosts", "/dev/shm/x"); got != "10.0.0.1 kubelet-made\nx\n" {
		t.Errorf("got %q", got)
	}
	if n := strings.Count(c.exec("mountinfo"), " /etc/hosts "); n != 1 {
		t.Errorf("/etc/hosts is mounted %d times", n)
	}
}

// shared is a directory on a mount of its own that propagates; it is gone at the test's end.
func shared(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestPropagation(t *testing.T) {
	w := need(t)
	for _, c := range []struct {
		name                 string
		mode                 runtimeapi.MountPropagation
		intoContainer, toAll bool
	}{
		{"private", runtimeapi.MountPropagation_PROPAGATION_PRIVATE, false, false},
		{"host to container", runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, true, false},
		{"bidirectional", runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := shared(t)
			for _, sub := range []string{"early", "host", "container"} {
				if err := os.Mkdir(dir+"/"+sub, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			mountAt := func(sub string) {
				if err := unix.Mount("tmpfs", dir+"/"+sub, "tmpfs", 0, "size=4k"); err != nil {
					t.Fatal(err)
				}
				mustWrite(t, dir+"/"+sub+"/there", "yes\n")
				t.Cleanup(func() {
					if err := unix.Unmount(dir+"/"+sub, unix.MNT_DETACH); err != nil {
						t.Error(err)
					}
				})
			}
			mountAt("early")
			p := w.pod(t, privilegedPod)
			x := p.run([]string{"sleep"}, privilegedContainer, withMounts(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/v", Propagation: c.mode}))
			if got := x.exec("cat", "/v/early/there"); got != "yes\n" {
				t.Errorf("a mount that was there before (rbind): got %q", got)
			}
			mountAt("host")
			r, err := x.try("cat", "/v/host/there")
			if err != nil || (r.ExitCode == 0) != c.intoContainer {
				t.Errorf("a mount of the host: got exit code %d, %v; want it to be seen: %t", r.GetExitCode(), err, c.intoContainer)
			}
			x.exec("mount-tmpfs", "/v/container", ",", "mkfile", "/v/container/there", "yes")
			_, err = os.Stat(dir + "/container/there")
			if (err == nil) != c.toAll {
				t.Errorf("a mount of the container: got %v, want it to be seen on the host: %t", err, c.toAll)
			}
			if c.toAll {
				if err := unix.Unmount(dir+"/container", unix.MNT_DETACH); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func TestHostToContainerNeedsASharedSource(t *testing.T) {
	w := need(t)
	// "/" is private here, and so is a plain directory on it.
	if strings.Contains(strings.SplitN(readFile(t, "/proc/self/mountinfo"), " - ", 2)[0], "shared:") {
		t.Skip("the host's mounts are shared")
	}
	p := w.pod(t)
	c, err := p.tryCreate([]string{"sleep"}, withMounts(&runtimeapi.Mount{HostPath: t.TempDir(), ContainerPath: "/v", Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}))
	if err == nil {
		err = w.rt.StartContainer(t.Context(), c.id)
	}
	if err == nil || !strings.Contains(err.Error(), "shared") {
		t.Errorf("got %v, want an error that says what the source must be", err)
	}
}

func TestReadOnlyMountsAreRecursiveOnlyIfAsked(t *testing.T) {
	w := need(t)
	dir := shared(t)
	if err := os.Mkdir(dir+"/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir+"/sub", "tmpfs", 0, "size=4k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir+"/sub", unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	c := w.pod(t).run([]string{"sleep"}, withMounts(
		&runtimeapi.Mount{HostPath: dir, ContainerPath: "/ro", Readonly: true},
		&runtimeapi.Mount{HostPath: dir, ContainerPath: "/rro", Readonly: true, RecursiveReadOnly: true},
	))
	c.fails("touch", "/ro/x")
	c.exec("touch", "/ro/sub/x")
	c.fails("touch", "/rro/x")
	if msg := c.fails("touch", "/rro/sub/y"); !strings.Contains(msg, "read-only") {
		t.Errorf("got %q, want EROFS below, too", msg)
	}
	s, err := w.rt.Status(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range s.RuntimeHandlers {
		if !h.GetFeatures().GetRecursiveReadOnlyMounts() {
			t.Errorf("handler %q does not advertise recursive_read_only_mounts", h.Name)
		}
	}
	if !c.status().Mounts[1].RecursiveReadOnly {
		t.Error("the status does not say that the mount is recursively read-only")
	}
}

func TestReadOnlyRootFilesystem(t *testing.T) {
	w := need(t)
	dir := t.TempDir()
	c := w.pod(t).run([]string{"sleep"}, withMounts(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/rw"}), func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.ReadonlyRootfs = true
	})
	for _, path := range []string{"/x", "/etc/x", "/etc/passwd", "/etc/hosts", "/etc/resolv.conf", "/etc/hostname"} {
		if msg := c.fails("mkfile", path, "x"); !strings.Contains(msg, "read-only") {
			t.Errorf("%s: got %q, want EROFS", path, msg)
		}
	}
	for _, path := range []string{"/rw/x", "/dev/shm/x", "/dev/x"} {
		c.exec("mkfile", path, "x")
	}
}

func TestDefaultMounts(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"})
	table := map[string]string{}
	for line := range strings.Lines(c.exec("mountinfo")) {
		f := strings.Fields(line)
		before, after, _ := strings.Cut(line, " - ")
		g := strings.Fields(after)
		table[f[4]] = strings.Join(append(strings.Fields(before)[5:6], g[0], g[2]), " ")
	}
	for path, want := range map[string][]string{ // reliability-and-security D1
		"/":             {"rw", "overlay"},
		"/proc":         {"nosuid", "nodev", "noexec", "proc"},
		"/dev":          {"nosuid", "tmpfs", "mode=755", "size=65536k"},
		"/dev/pts":      {"nosuid", "noexec", "devpts", "ptmxmode=666", "mode=620", "gid=5"},
		"/dev/shm":      {"nosuid", "nodev", "noexec", "tmpfs", "size=65536k"},
		"/dev/mqueue":   {"nosuid", "nodev", "noexec", "mqueue"},
		"/sys":          {"ro", "nosuid", "nodev", "noexec", "sysfs"},
		"/etc/hosts":    {"rw"},
		"/etc/hostname": {"rw"},
	} {
		got, ok := table[path]
		if !ok {
			t.Errorf("%s is not mounted", path)
			continue
		}
		for _, flag := range want {
			if !contains(strings.FieldsFunc(got, func(r rune) bool { return r == ' ' || r == ',' }), flag) {
				t.Errorf("%s: got %q, want %q in it", path, got, flag)
			}
		}
	}
	if !strings.Contains(table["/"], "volatile") { // since Linux 6.17 written fsync=volatile
		t.Errorf("/: got %q, want it volatile", table["/"])
	}
	var cgroups int
	for path, flags := range table {
		if path == "/sys/fs/cgroup" || strings.HasPrefix(path, "/sys/fs/cgroup/") {
			cgroups++
			if !strings.HasPrefix(flags, "ro,") {
				t.Errorf("%s is writable: %s", path, flags)
			}
		}
		if strings.HasPrefix(path, "/run") {
			t.Errorf("%s is mounted; CRI containers have no /run of the runtime's", path)
		}
	}
	if cgroups == 0 {
		t.Error("/sys/fs/cgroup is not mounted")
	}
	if got := c.exec("cgroup"); strings.Contains(got, c.id) {
		t.Errorf("the cgroup namespace does not begin at the container's cgroup: %q", got)
	}
}

func contains(all []string, one string) bool {
	for _, s := range all {
		if s == one {
			return true
		}
	}
	return false
}

func TestDeviceFiles(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"})
	for name, want := range map[string]string{"null": "1:3", "zero": "1:5", "full": "1:7", "random": "1:8", "urandom": "1:9", "tty": "5:0"} {
		got := c.exec("stat", "/dev/"+name)
		if !strings.Contains(got, "mode=020666") || !strings.Contains(got, "rdev="+want) {
			t.Errorf("/dev/%s: got %q, want mode 666, device %s", name, got, want)
		}
	}
	for name, want := range map[string]string{"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2", "core": "/proc/kcore", "ptmx": "pts/ptmx"} {
		if got := c.exec("stat", "/dev/"+name); !strings.Contains(got, "-> "+want+"\n") {
			t.Errorf("/dev/%s: got %q, want a link to %s", name, got, want)
		}
	}
	if got := c.exec("ls", "/dev"); strings.Contains(got, "console") {
		t.Errorf("a console without a terminal: %q", got)
	}
}

func TestSourceOfAMountIsResolvedOnce(t *testing.T) {
	w := need(t)
	dir := t.TempDir()
	mustWrite(t, dir+"/first/who", "first\n")
	mustWrite(t, dir+"/second/who", "second\n")
	if err := os.Symlink("first", dir+"/source"); err != nil {
		t.Fatal(err)
	}
	c := w.pod(t).create([]string{"sleep"}, withMounts(&runtimeapi.Mount{HostPath: dir + "/source", ContainerPath: "/v"}))
	if err := os.Remove(dir + "/source"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("second", dir+"/source"); err != nil {
		t.Fatal(err)
	}
	c.start()
	if got := c.exec("cat", "/v/who"); got != "first\n" {
		t.Errorf("got %q, want what it was at CreateContainer", got)
	}
}

// Devices, sockets and pipes are mounted as what they are; nothing opens them.
func TestSourcesOfEveryKind(t *testing.T) {
	w := need(t)
	dir := t.TempDir()
	l, err := net.Listen("unix", dir+"/socket")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if err := errors.Join(unix.Mkfifo(dir+"/fifo", 0o600), unix.Mknod(dir+"/device", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5)))); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, dir+"/file", "content\n")
	var mounts []*runtimeapi.Mount
	for _, name := range []string{"socket", "fifo", "device", "file"} {
		mounts = append(mounts, &runtimeapi.Mount{HostPath: dir + "/" + name, ContainerPath: "/v/" + name})
	}
	c := w.pod(t).run([]string{"sleep"}, withMounts(mounts...))
	for name, want := range map[string]string{"socket": "mode=014", "fifo": "mode=010600", "device": "mode=0206", "file": "mode=0100644"} {
		if got := c.exec("stat", "/v/"+name); !strings.Contains(got, want) {
			t.Errorf("%s: got %q, want %s", name, got, want)
		}
	}
	if got := c.exec("stat", "/v/device"); !strings.Contains(got, "rdev=1:5") {
		t.Errorf("device: got %q, want 1:5", got)
	}
	served := make(chan error, 1)
	go func() { // ends with the listener
		conn, err := l.Accept()
		if err == nil {
			_, err = io.Copy(conn, io.LimitReader(conn, 5))
			err = errors.Join(err, conn.Close())
		}
		served <- err
	}()
	if got := c.exec("dial", "unix", "/v/socket", "hello"); !strings.Contains(got, "hello") {
		t.Errorf("the socket: got %q", got)
	}
	if err := <-served; err != nil {
		t.Errorf("the host's end of the socket: %v", err)
	}
}

// CRI 0.37 Mount.mount_options: of the mount and of all that is mounted below it, and of no other mount of the same source.
func TestMountOptions(t *testing.T) {
	w := need(t)
	if s, err := w.rt.Status(t.Context(), false); err != nil || !s.GetFeatures().GetMountOptions() {
		t.Errorf("got %v, %v; want features.mount_options", s.GetFeatures(), err)
	}
	dir := shared(t)
	if err := os.Mkdir(dir+"/below", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir+"/below", "tmpfs", 0, "size=16m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir+"/below", unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	payload, err := os.ReadFile(filepath.Join(filepath.Dir(w.certs), "payload"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/below/payload", payload, 0o755); err != nil {
		t.Fatal(err)
	}
	options := []string{"noexec", "nodev", "nosuid"}
	p := w.pod(t)
	c := p.run([]string{"sleep"}, withMounts(
		&runtimeapi.Mount{HostPath: dir, ContainerPath: "/plain"},
		&runtimeapi.Mount{HostPath: dir, ContainerPath: "/all", MountOptions: options},
		&runtimeapi.Mount{HostPath: dir, ContainerPath: "/nosuid", Readonly: true, MountOptions: []string{"nosuid", "nosuid"}},
		&runtimeapi.Mount{HostPath: dir, ContainerPath: "/rro", Readonly: true, RecursiveReadOnly: true, MountOptions: []string{"noexec"}},
		&runtimeapi.Mount{HostPath: dir, ContainerPath: "/slave", Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, MountOptions: options},
	))
	table := c.exec("mountinfo")
	for path, want := range map[string]string{
		"/plain": "rw,relatime", "/plain/below": "rw,relatime",
		"/all": "rw,nosuid,nodev,noexec,relatime", "/all/below": "rw,nosuid,nodev,noexec,relatime",
		"/nosuid": "ro,nosuid,relatime", "/nosuid/below": "rw,nosuid,relatime",
		"/rro": "ro,noexec,relatime", "/rro/below": "ro,noexec,relatime",
		"/slave": "rw,nosuid,nodev,noexec,relatime", "/slave/below": "rw,nosuid,nodev,noexec,relatime",
	} {
		if got := strings.Fields(mountLine(table, path)); len(got) < 6 || got[5] != want {
			t.Errorf("%s: got %q, want options %s", path, got, want)
		}
	}
	execIn := func(path string) int32 {
		r, err := w.execSync(t, &runtimeapi.ExecSyncRequest{ContainerId: c.id, Cmd: []string{path, "true"}, Timeout: 20})
		if err != nil {
			return -1 // could not be started
		}
		return r.ExitCode
	}
	if got := execIn("/plain/below/payload"); got != 0 {
		t.Errorf("without noexec: got %d", got)
	}
	if got := execIn("/all/below/payload"); got == 0 {
		t.Error("with noexec a program below the volume could be executed")
	}
	if got := c.status().Mounts[1].MountOptions; !slices.Equal(got, options) {
		t.Errorf("status: got %v, want them echoed", got)
	}
	// The source itself is as it was.
	if got := mountLine(readFile(t, "/proc/self/mountinfo"), dir+"/below"); strings.Contains(got, "noexec") {
		t.Errorf("the host's mount has become %q", got)
	}
	w.leavesNothing(t, func() {
		_, err := p.tryCreate([]string{"sleep"}, withMounts(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/v", MountOptions: []string{"noexec", "exec"}}))
		wantCode(t, err, codes.InvalidArgument, "config.mounts[0].mount_options[1]", `"exec"`)
	})
}

// fileTree is a listing of a directory with contents, to see whether anything changed.
func fileTree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		b.WriteString(path + " " + info.Mode().String())
		if info.Mode().IsRegular() {
			b.WriteString(" " + readFile(t, path))
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// On a node with many processors the kubelet masks hundreds of paths.
func TestFiveHundredMaskedPaths(t *testing.T) {
	w := need(t)
	dir := t.TempDir()
	var masked, listed []string
	for i := range 500 {
		name := "/file" + itoa(i)
		if i%5 == 0 {
			name = "/dir" + itoa(i)
			mustWrite(t, dir+name+"/in", "secret\n")
		} else {
			mustWrite(t, dir+name, "secret\n")
		}
		masked, listed = append(masked, "/v"+name), append(listed, name[1:])
	}
	mustWrite(t, dir+"/plain", "plain\n")
	slices.Sort(listed)
	before := fileTree(t, dir)
	c := w.pod(t).run([]string{"sleep"}, withMounts(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/v"}), withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.MaskedPaths = masked
	}))
	if got := c.exec(append([]string{"cat"}, masked[1:5]...)...); got != "" {
		t.Errorf("masked files: got %q, want nothing", got)
	}
	stats := c.exec(append([]string{"stat"}, masked...)...)
	for i, line := range slices.Collect(strings.Lines(stats)) {
		want := "rdev=1:3"
		if i%5 == 0 {
			want = "mode=040555"
		}
		if !strings.Contains(line, want) {
			t.Errorf("got %q, want %s", line, want)
		}
	}
	if got := c.exec("ls", "/v/dir0", "/v/dir495"); got != "" {
		t.Errorf("masked directories: got %q, want nothing in them", got)
	}
	c.fails("touch", "/v/dir0/x")
	for _, name := range []string{"/v/file1", "/v/dir0"} {
		c.fails("rm", name) // a mount point
	}
	if got := c.exec("cat", "/v/plain"); got != "plain\n" {
		t.Errorf("what is not masked: got %q", got)
	}
	if got := strings.Fields(c.exec("ls", "/v")); !slices.Equal(got, append(listed, "plain")) {
		t.Errorf("got %d names, want all", len(got))
	}
	if after := fileTree(t, dir); after != before {
		t.Error("the files behind the masks have changed")
	}
}

// procMount Unmasked: the kubelet sends empty lists.
func TestUnmaskedProc(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	c := p.run([]string{"sleep"}, withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) { s.MaskedPaths, s.ReadonlyPaths = nil, nil }))
	for line := range strings.Lines(c.exec("mountinfo")) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], "/proc/") {
			t.Errorf("something is mounted over /proc: %s", line)
		}
	}
	c.exec("mkfile", "/proc/sys/kernel/domainname", "unmasked") // of the pod's UTS namespace
	if got := c.exec("cat", "/proc/sys/kernel/domainname"); got != "unmasked\n" {
		t.Errorf("got %q", got)
	}
}

package cri

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/test/images"
)

// Tests that are called after a number of the project's list of advisories (docs/SECURITY.md has the table) and that
// had no other name yet.

// CVE-2021-21334: two containers of one image never see each other's environment.
func TestSEC05_EnvironmentsAreApart(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	env := func(value string) editContainer {
		return func(c *runtimeapi.ContainerConfig) {
			c.Envs = []*runtimeapi.KeyValue{{Key: "SECRET", Value: []byte(value)}}
		}
	}
	a, b := p.run([]string{"sleep"}, env("of-a")), p.run([]string{"sleep"}, env("of-b"))
	for c, want := range map[*container]string{a: "of-a", b: "of-b"} {
		if got := c.exec("cat", "/proc/1/environ") + c.exec("env"); strings.Count(got, want) != 2 || strings.Count(got, "of-") != 2 {
			t.Errorf("got %q, want %s only", got, want)
		}
	}
}

// CVE-2025-52565: /dev/pts is a volume, and what will be the terminal's path is swapped all the time.
func TestSEC16_SwappedTerminalsNeverLeadOut(t *testing.T) {
	w := need(t)
	dir, unchanged := w.canary(t)
	p := w.pod(t)
	pts := t.TempDir()
	mustWrite(t, pts+"/0", "plain\n")
	mustWrite(t, pts+"/ptmx", "plain\n")
	if err := os.Symlink(dir+"/secret", pts+"/1"); err != nil {
		t.Fatal(err)
	}
	stop := exchange(t, pts+"/0", pts+"/1")
	defer stop()
	for range rounds(20) {
		c, err := p.tryCreate([]string{"sleep"}, withMounts(&runtimeapi.Mount{HostPath: pts, ContainerPath: "/dev/pts"}), func(c *runtimeapi.ContainerConfig) { c.Tty = true })
		if err == nil {
			err = w.rt.StartContainer(t.Context(), c.id)
		}
		if err == nil {
			if got := c.exec("stat", "/dev/console"); !strings.Contains(got, "rdev=136:") {
				t.Fatalf("/dev/console is %q", got)
			}
		}
		if c != nil {
			c.remove()
		}
	}
	unchanged()
}

// CVE-2025-52881: nothing may be mounted where the runtime itself, or the kernel, will be asked through /proc.
func TestSEC17_NothingIsMountedOverProc(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	source := t.TempDir()
	mustWrite(t, source+"/file", "x")
	for _, target := range []string{"/proc/self", "/proc/self/attr", "/proc/thread-self/attr/exec", "/proc/sys", "/proc/sys/net/ipv4", "/proc/1", "//proc/../proc/sys", "/sys/../proc/sys/kernel"} {
		for _, from := range []string{source, source + "/file"} {
			c, err := p.tryCreate([]string{"sleep"}, withMounts(&runtimeapi.Mount{HostPath: from, ContainerPath: target}))
			if err == nil {
				err = w.rt.StartContainer(t.Context(), c.id)
				c.remove()
			}
			if err == nil {
				t.Errorf("%s could be mounted at %s", from, target)
			}
		}
	}
	// By a link of the image.
	id, _ := w.forge(t, "toproc", images.Image{Layers: w.layers(t, images.File{Name: "l", Symlink: "/proc/sys"}, images.File{Name: "m", Symlink: "proc"})})
	for _, target := range []string{"/l", "/l/kernel", "/m/sys", "/m/self"} {
		c, err := p.tryCreate([]string{"sleep"}, withImage(id), withMounts(&runtimeapi.Mount{HostPath: source, ContainerPath: target}))
		if err == nil {
			err = w.rt.StartContainer(t.Context(), c.id)
			c.remove()
		}
		if err == nil {
			t.Errorf("a volume could be mounted at %s, which leads into /proc", target)
		}
	}
}

// Files of the image that are read or written for it are no files: nothing hangs, nothing of the host is read.
func TestSEC22_SpecialFilesWhereFilesAreExpected(t *testing.T) {
	w := need(t)
	_, unchanged := w.canary(t)
	p := w.pod(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, at := range []string{"etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/passwd", "etc/group", "run/secrets"} {
		for _, target := range []string{"/dev/zero", "/dev/stdin", "/proc/kmsg", "/proc/self/fd/0"} {
			id, _ := w.forge(t, "special", images.Image{Layers: w.layers(t, images.File{Name: at, Symlink: target}), Config: v1.Config{User: "somebody"}})
			source := t.TempDir()
			c, err := p.tryCreate([]string{"sleep"}, withImage(id), withMounts(&runtimeapi.Mount{HostPath: source, ContainerPath: "/run/secrets"}))
			if err != nil {
				continue
			}
			_ = w.rt.StartContainer(ctx, c.id) // whatever it says: that it says it counts
			c.remove()
		}
	}
	if ctx.Err() != nil {
		t.Error("something hung")
	}
	unchanged()
}

// CVE-2023-2431: a profile that was asked for is there, or there is no container.
func TestSEC31_NoProfileIsEverLeftOut(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	dir := t.TempDir()
	mustWrite(t, dir+"/text", "no JSON")
	mustWrite(t, dir+"/empty", "")
	mustWrite(t, dir+"/action", `{"defaultAction":"SCMP_ACT_WHATEVER"}`)
	mustWrite(t, dir+"/call", `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["no_such_call_at_all"],"action":"SCMP_ACT_WHATEVER"}]}`)
	for _, c := range []struct {
		name, ref string
		typ       runtimeapi.SecurityProfile_ProfileType
	}{
		{"no file named", "", runtimeapi.SecurityProfile_Localhost},
		{"missing", dir + "/missing", runtimeapi.SecurityProfile_Localhost},
		{"relative", "text", runtimeapi.SecurityProfile_Localhost},
		{"a directory", dir, runtimeapi.SecurityProfile_Localhost},
		{"no JSON", dir + "/text", runtimeapi.SecurityProfile_Localhost},
		{"empty", dir + "/empty", runtimeapi.SecurityProfile_Localhost},
		{"unknown action", dir + "/action", runtimeapi.SecurityProfile_Localhost},
		{"unknown action of a call", dir + "/call", runtimeapi.SecurityProfile_Localhost},
		{"a file for the default", dir + "/text", runtimeapi.SecurityProfile_RuntimeDefault},
		{"unknown type", "", 7},
	} {
		t.Run(c.name, func(t *testing.T) {
			x, err := p.on(t).tryCreate([]string{"sleep"}, withSeccomp(c.typ, c.ref))
			if err == nil {
				x.remove()
				t.Error("the container was made")
			}
		})
	}
}

// CVE-2022-4318, CVE-2026-15809: no environment variable writes into /etc/passwd.
func TestSEC43_HomeWritesNoAccount(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	was := p.output([]string{"cat", "/etc/passwd"})
	for _, home := range []string{"/x\nroot2::0:0::/:/bin/sh", "/x\rroot2::0:0::/:/bin/sh", "/x:/bin/evil", `/x\nroot2::0:0::/:/bin/sh`} {
		c, err := p.tryCreate([]string{"cat", "/etc/passwd"}, asUser(4242), func(c *runtimeapi.ContainerConfig) {
			c.Envs = []*runtimeapi.KeyValue{{Key: "HOME", Value: []byte(home)}}
		})
		if err != nil {
			continue // refused
		}
		c.start()
		c.wait()
		if got := c.output("stdout"); got != was {
			t.Errorf("HOME=%q: /etc/passwd is %q, was %q", home, got, was)
		}
	}
}

// CVE-2022-2995 and its kin: who is in a group that is kept out is kept out.
func TestSEC44_AGroupThatIsDeniedStaysDenied(t *testing.T) {
	w := need(t)
	id, _ := w.forge(t, "denied", images.Image{Layers: w.layers(t, images.File{Name: "file", Text: "readable\n", Mode: 0o604, GID: 4321})})
	p := w.pod(t)
	for _, groups := range [][]int64{nil, {4321}} {
		c := p.run([]string{"sleep"}, withImage(id), asUser(1000), withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) { s.SupplementalGroups = groups }))
		if r, err := c.try("cat", "/file"); err != nil || (r.ExitCode == 0) == (groups != nil) {
			t.Errorf("groups %v: got %v, %v", groups, r, err)
		}
	}
}

// CVE-2019-11245: the second container of a configuration is the first's equal.
func TestSEC45_TheImagesUserIsForEveryStart(t *testing.T) {
	w := need(t)
	id, _ := w.forge(t, "user", images.Image{Layers: w.layers(t), Config: v1.Config{User: "4711:4712"}})
	p := w.pod(t)
	for range 3 {
		c := p.create([]string{"id"}, withImage(id))
		c.start()
		c.wait()
		if got := c.output("stdout"); !strings.Contains(got, "uid=4711 gid=4712") {
			t.Errorf("got %q", got)
		}
		c.remove()
	}
}

// CVE-2022-0811: a value of a sysctl is a value.
func TestSEC50_51_SysctlsOfTheHostStay(t *testing.T) {
	w := need(t)
	host := func() (all string) {
		for _, f := range []string{"kernel/core_pattern", "kernel/panic", "kernel/shm_rmid_forced", "kernel/hostname", "kernel/domainname", "kernel/msgmax", "fs/mqueue/msg_max", "vm/swappiness", "net/ipv4/ip_forward", "user/max_user_namespaces"} {
			b, err := os.ReadFile("/proc/sys/" + f)
			all += fmt.Sprint(f, " ", string(b), err, "\n")
		}
		return all
	}
	before := host()
	nodeNet := func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
	}
	nodeIPC := func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Ipc = runtimeapi.NamespaceMode_NODE
	}
	plain := func(*runtimeapi.PodSandboxConfig) {}
	for _, c := range []struct {
		key, value string
		pod        editPod
	}{
		{"kernel.shm_rmid_forced", "1+kernel.core_pattern=|/x", plain},
		{"kernel.shm_rmid_forced", "1;kernel.core_pattern=|/x", plain},
		{"kernel.shm_rmid_forced", "1\nkernel.core_pattern=|/x", plain},
		{"kernel.shm_rmid_forced", "1\x00", plain},
		{"kernel.shm_rmid_forced", strings.Repeat("1", 64<<10), plain},
		{"net/../kernel/core_pattern", "x", plain},
		{"net..ipv4", "x", plain},
		{"net.ipv4/../../kernel/panic", "1", plain},
		{"../kernel/panic", "1", plain},
		{"", "1", plain},
		{"kernel.hostname", "x", plain}, {"vm.swappiness", "1", plain}, {"user.max_user_namespaces", "1", plain}, {"kernel.core_pattern", "x", plain}, {"no.such.thing", "1", plain},
		{"net.ipv4.ip_forward", "0", nodeNet},
		{"kernel.msgmax", "1", nodeIPC}, {"fs.mqueue.msg_max", "1", nodeIPC},
	} {
		id, err := w.rt.RunPodSandbox(t.Context(), func() *runtimeapi.PodSandboxConfig {
			cfg := w.podConfig("sysctl")
			c.pod(cfg)
			sysctls(c.key, c.value)(cfg)
			return cfg
		}(), "")
		if err == nil {
			t.Errorf("%q = %.40q was taken", c.key, c.value)
			w.adopt(t, id, &runtimeapi.PodSandboxConfig{LogDirectory: t.TempDir()}).remove()
		}
	}
	if after := host(); after != before {
		t.Errorf("the host has\n%swas\n%s", after, before)
	}
}

// CVE-2021-41103, CVE-2024-25621: a user of the host finds no way to what images and pods have, also where a state root was there
// before with any mode.
func TestSEC66_UsersOfTheHostSeeNothing(t *testing.T) {
	w := need(t)
	id, _ := w.forge(t, "setuid", images.Image{Layers: w.layers(t, images.File{Name: "su", FromHost: filepath.Join(filepath.Dir(w.certs), "payload"), Mode: 0o4755})})
	w.pod(t).run([]string{"sleep"}, withImage(id))
	asNobody := func(args ...string) string {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		if err != nil && len(out) == 0 {
			t.Fatalf("%v: %v", args, err)
		}
		return string(out)
	}
	for dir, known := range map[string][]string{w.StateDir + "/state": {"pods", "images", "lock"}, w.RunDir + "/run": {"pods", "cni"}} {
		for _, name := range known {
			path := filepath.Join(dir, name)
			if _, err := os.Lstat(path); err != nil {
				t.Errorf("the test looks at the wrong place: %v", err)
			}
			if out := asNobody("find", path); !strings.Contains(out, "Permission denied") || strings.Count(out, "\n") > 1 {
				t.Errorf("nobody can see %s: %.300q", path, out)
			}
		}
	}
}

// CVE-2020-8557: what a container may write into files that the runtime made is on the disk that its own files are on, not on the
// tmpfs that the node lives on.
func TestSEC97_FilesOfTheRuntimeDoNotFillRun(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"})
	table := c.exec("mountinfo")
	for _, path := range []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"} {
		f := strings.Fields(mountLine(table, path))
		if len(f) < 5 || !strings.Contains(f[3], filepath.Base(w.StateDir)+"/state/pods/") {
			t.Errorf("%s: got mount %q, want a file of the state root", path, f)
		}
	}
	if _, _, err := w.rt.ExecSync(t.Context(), c.id, []string{"/payload", "mkfile", "/etc/hostname", strings.Repeat("x", 4096)}, time.Minute); err != nil {
		t.Error(err)
	}
	var names []string
	for _, dir := range []string{w.RunDir + "/run/pods/" + c.p.id} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			names = append(names, e.Name())
		}
	}
	if want := []string{"exits.journal", "init.log", "init.sock", "pod.json"}; !slices.Equal(names, want) {
		t.Errorf("in the run root are %q, want %q", names, want)
	}
}

// CVE-2025-0750: a log path leads below the pod's log directory or nowhere.
func TestSEC100_LogPathsLeadNowhere(t *testing.T) {
	w := need(t)
	dir, unchanged := w.canary(t)
	p := w.pod(t)
	mounts := readFile(t, "/proc/self/mountinfo")
	for _, path := range []string{"../../canary/secret", "/" + dir + "/new", "a/../../../canary/x", "x\x00y", strings.Repeat("x", 5000), "..", "."} {
		c, err := p.tryCreate([]string{"sleep"}, func(c *runtimeapi.ContainerConfig) { c.LogPath = path })
		if err == nil {
			_ = w.rt.StartContainer(t.Context(), c.id) // the canary is what counts
			c.remove()
			if !strings.HasPrefix(path, "/") {
				t.Errorf("log path %.40q was taken", path)
			}
			continue
		}
		wantCode(t, err, codes.InvalidArgument)
	}
	for _, name := range []string{"../x", "a/b", "a\x00b", strings.Repeat("x", 5000)} {
		cfg := w.podConfig("p")
		cfg.Metadata.Name = name
		id, err := w.CRI.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: cfg})
		if err == nil {
			w.adopt(t, id.PodSandboxId, cfg).remove()
		}
	}
	unchanged()
	if after := readFile(t, "/proc/self/mountinfo"); after != mounts {
		t.Errorf("the host's mounts are\n%s\nwere\n%s", after, mounts)
	}
}

// A container with a pod-level limit that eats all memory takes itself, not its pod's init, and never another network.
func TestSEC96_MemoryOfAPodIsNotItsInits(t *testing.T) {
	w := need(t)
	p := w.pod(t, func(c *runtimeapi.PodSandboxConfig) { c.Linux.CgroupParent = w.kubepod(t, 64<<20) })
	net := namespaces(t, p.run([]string{"sleep"}).anyPID())["net"]
	for range rounds(5) {
		c := p.run([]string{"oom"})
		if st := c.wait(); st.ExitCode != 137 {
			t.Errorf("got exit code %d, want 137", st.ExitCode)
		}
		c.remove()
		if st := p.status(); st.State != runtimeapi.PodSandboxState_SANDBOX_READY {
			t.Fatalf("the pod is %v", st.State)
		}
		c = p.run([]string{"sleep"})
		if got := namespaces(t, c.anyPID())["net"]; got != net {
			t.Errorf("the network namespace changed from %s to %s", net, got)
		}
		c.remove()
	}
}

// kubepod makes a cgroup like the kubelet's for a pod, with a memory limit in bytes, and returns its name as cgroup_parent.
func (w *world) kubepod(t *testing.T, limit int64) string {
	t.Helper()
	name := filepath.Join("/", w.Cgroups, fmt.Sprint("kubepod-", w.next))
	for _, root := range []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup"} {
		for _, file := range []string{"memory.limit_in_bytes", "memory.max"} {
			dir := root + name
			if _, err := os.Stat(filepath.Join(root, w.Cgroups, file)); err != nil {
				continue
			}
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, file), fmt.Append(nil, limit), 0o644); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				dirs, err := filepath.Glob("/sys/fs/cgroup/*" + name) // crispd made those of the other controllers
				if err != nil {
					t.Error(err)
				}
				for _, dir := range append(dirs, "/sys/fs/cgroup"+name) {
					if err := unix.Rmdir(dir); err != nil && err != unix.ENOENT {
						t.Errorf("%s: %v", dir, err)
					}
				}
			})
			return name
		}
	}
	t.Fatal("no memory controller")
	return ""
}

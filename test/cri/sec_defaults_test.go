package cri

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var update = flag.Bool("update", false, "write the golden files")

// golden compares with a file of testdata, or writes it.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		mustWrite(t, path, got)
		return
	}
	if diff := cmp.Diff(strings.Split(readFile(t, path), "\n"), strings.Split(got, "\n")); diff != "" {
		t.Errorf("%s (-want +got; -update writes it):\n%s", path, diff)
	}
}

// What a container is given, in whole: identity, capabilities, mounts, devices, hidden paths. What depends on the host is
// written in words. Each line that changes here changes what a container can do to its node.
func TestContainersHaveExactlyThis(t *testing.T) {
	w := need(t)
	byDefault := withSeccomp(runtimeapi.SecurityProfile_RuntimeDefault, "")
	restricted := withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.NoNewPrivs = true
		s.Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL"}}
		s.RunAsUser, s.RunAsGroup, s.SupplementalGroups = uid(1000), uid(3000), []int64{2000}
		s.ReadonlyRootfs = true
	})
	of := func(p *pod, edits ...editContainer) *container { return p.run([]string{"sleep"}, edits...) }
	for name, c := range map[string]*container{
		"default":    of(w.pod(t), kubelets, byDefault),
		"restricted": of(w.pod(t), kubelets, byDefault, restricted),
		"privileged": of(w.pod(t, privilegedPod), privilegedContainer),
	} {
		t.Run(name, func(t *testing.T) { golden(t, "hardening-"+name+".txt", c.on(t).hardening()) })
	}
}

func TestUsernsContainersHaveExactlyThis(t *testing.T) {
	w := needUserns(t)
	c := w.usernsPod(t).run([]string{"sleep"}, kubelets, withSeccomp(runtimeapi.SecurityProfile_RuntimeDefault, ""), func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = usernsOf(firstID)
	})
	golden(t, "hardening-userns.txt", c.hardening())
}

// kubelets are the paths that the kubelet hides and protects.
var kubelets = withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
	s.MaskedPaths, s.ReadonlyPaths = kubeletMasked, kubeletReadonly
})

// hardening describes a container from the inside.
func (c *container) hardening() string {
	t := c.p.t
	t.Helper()
	var b strings.Builder
	section := func(title, text string) { fmt.Fprintf(&b, "== %s\n%s", title, text) }

	// The first process, and one that is exec'd.
	status := func(text string) (out string) {
		for _, name := range []string{"Uid", "Gid", "Groups", "Umask", "NoNewPrivs", "Seccomp", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
			value := strings.Join(statusField(text, name), " ")
			if strings.HasPrefix(name, "Cap") {
				if n, err := strconv.ParseUint(value, 16, 64); err == nil && n == allCaps(t) {
					value = "all of this kernel"
				}
			}
			out += strings.TrimSpace(name+": "+value) + "\n"
		}
		return out
	}
	first, exec := status(c.exec("cat", "/proc/1/status")), status(c.exec("status"))
	section("/proc/1/status", first)
	if exec != first {
		section("an exec'd process, which differs", exec)
	}
	own, daemons := c.exec("limits"), readFile(t, fmt.Sprintf("/proc/%d/limits", c.p.w.PID))
	section("limits", map[bool]string{true: "those of crispd\n", false: own}[sameLimits(own, daemons)])

	section("mounts", c.mountTable())
	section("/dev", c.devices())
	section("masked", c.masks())
	return b.String()
}

// sameLimits compares limits(5) but for the soft number of open files, which crispd raises for itself.
func sameLimits(a, b string) bool {
	files := regexp.MustCompile(`(?m)^Max open files +\d+`)
	return files.ReplaceAllString(a, "") == files.ReplaceAllString(b, "")
}

// mountTable is target, flags, type and options of each mount.
func (c *container) mountTable() string {
	var lines []string
	table := c.exec("mountinfo")
	for line := range strings.Lines(table) {
		before, after, _ := strings.Cut(strings.TrimSpace(line), " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		target, flags, kind, options := f[4], f[5], g[0], g[2]
		switch {
		case slices.Contains(kubeletMasked, target) || slices.Contains(kubeletReadonly, target):
			continue // where the kernel has them: see masks
		case strings.HasPrefix(target, "/sys/fs/cgroup"): // each host has others
			if kind != "cgroup" && kind != "cgroup2" && kind != "tmpfs" {
				c.p.t.Errorf("%s is a %s", target, kind)
			}
			line = "/sys/fs/cgroup… " + flags + " cgroup"
		case strings.HasPrefix(target, "/etc/"):
			line = target + " " + flags + " file of the state root"
		case strings.HasPrefix(target, "/dev/") && f[3] != "/":
			line = target + " " + flags + " device of the host"
		case kind == "overlay": // its options are directories, and what a kernel's version calls them
			line = target + " " + flags + " " + kind
		default:
			line = target + " " + flags + " " + kind + " " + options
		}
		if len(f) > 6 {
			line += " " + strings.Trim(regexp.MustCompile(`:\d+`).ReplaceAllString(strings.Join(f[6:], " "), ""), " ")
		}
		lines = append(lines, line)
	}
	slices.Sort(lines)
	return strings.Join(slices.Compact(lines), "\n") + "\n"
}

// devices is /dev, but for the host's if it has all of them.
func (c *container) devices() string {
	usual := map[string]bool{"null": true, "zero": true, "full": true, "random": true, "urandom": true, "tty": true, "console": true, "ptmx": true}
	var out strings.Builder
	more := 0
	for line := range strings.Lines(c.exec("tree", "/dev")) {
		path, _, _ := strings.Cut(line, " ")
		name := strings.TrimPrefix(path, "/dev/")
		if strings.Contains(line, " dev ") && !usual[name] && !strings.HasPrefix(name, "pts/") {
			if _, err := os.Lstat(path); err != nil {
				c.p.t.Errorf("%s is no device of the host's", path)
			}
			more++
			continue
		}
		if info, err := os.Lstat(path); err == nil && info.IsDir() && !slices.Contains([]string{"", "pts", "shm", "mqueue"}, name) && path != "/dev" {
			continue // a directory of the host's devices
		}
		out.WriteString(line)
	}
	if more > 0 {
		out.WriteString("and the other devices of the host\n")
	}
	return out.String()
}

// masks says of what the kubelet hides and protects whether it is. What this kernel has not is as good as hidden.
func (c *container) masks() string {
	var out strings.Builder
	for _, path := range kubeletMasked {
		r, err := c.try("tree", path)
		if err != nil {
			c.p.t.Fatal(err)
		}
		text := string(r.Stdout)
		if r.ExitCode != 0 || strings.Contains(text, " dev 1:3") || strings.Count(text, "\n") == 1 && strings.Contains(mountLine(c.exec("mountinfo"), path), " tmpfs ") {
			fmt.Fprintf(&out, "%s hidden\n", path)
		} else if _, err := os.Lstat(path); err == nil && path == "/proc/interrupts" { // every kernel has that
			fmt.Fprintf(&out, "%s visible\n", path)
		}
	}
	for _, path := range kubeletReadonly {
		if line := mountLine(c.exec("mountinfo"), path); strings.Contains(line, " ro,") {
			fmt.Fprintf(&out, "%s read-only\n", path)
		} else if path == "/proc/sys" {
			fmt.Fprintf(&out, "%s writable\n", path)
		}
	}
	return out.String()
}

// lastCall is the newest system call of x86_64 that the golden file knows, newestKnown that the profile does.
const (
	lastCall    = 470
	newestKnown = 466
	clone3      = 435
)

// SEC-32: every system call there is, tried in a container with the default profile and the default capabilities. The file says which
// are refused with EPERM, which with ENOSYS, and which are not (-). (package seccomp asks its programs about arguments and
// other architectures; this asks the kernel, through everything that lies between.)
func TestSEC32_EverySystemCall(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"}, withSeccomp(runtimeapi.SecurityProfile_RuntimeDefault, ""))
	r, err := w.execSync(t, &runtimeapi.ExecSyncRequest{ContainerId: c.id, Cmd: []string{"/payload", "probe", "0", strconv.Itoa(lastCall + 10)}, Timeout: 110})
	if err != nil || r.ExitCode != 0 {
		t.Fatalf("got %v, exit code %d: %s", err, r.GetExitCode(), r.GetStderr())
	}
	got := map[int]string{}
	for line := range strings.Lines(string(r.Stdout)) {
		var n int
		var verdict string
		if _, err := fmt.Sscan(line, &n, &verdict); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		got[n] = verdict
	}
	const file = "testdata/syscalls-amd64.txt"
	if *update {
		names := callNames(t)
		var b strings.Builder
		for n := range lastCall + 1 {
			if got[n] == "ENOSYS" && n != clone3 && n <= newestKnown {
				got[n] = "-" // allowed: this kernel has it not, or not for such arguments
			}
			if got[n] != "" {
				fmt.Fprintf(&b, "%d %s %s\n", n, got[n], names[n])
			}
		}
		mustWrite(t, file, b.String())
		return
	}
	known := 0
	for line := range strings.Lines(readFile(t, file)) {
		var n int
		var want, name string
		if _, err := fmt.Sscan(line, &n, &want, &name); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		known++
		switch {
		case got[n] == want:
		case want == "-" && got[n] == "ENOSYS": // not in this kernel
		default:
			t.Errorf("%d %s: got %s, want %s", n, name, got[n], want)
		}
	}
	if known < 400 {
		t.Errorf("the file has %d calls only", known)
	}
	for n := lastCall + 1; n <= lastCall+10; n++ {
		if got[n] != "ENOSYS" {
			t.Errorf("%d, which the profile cannot know: got %s, want ENOSYS", n, got[n])
		}
	}
}

// callNames are from the kernel's header, for the reader of the golden file.
func callNames(t *testing.T) map[int]string {
	names := map[int]string{}
	for n := range lastCall + 1 {
		names[n] = "?"
	}
	for line := range strings.Lines(readFile(t, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h")) {
		var n int
		var name string
		if _, err := fmt.Sscanf(line, "#define __NR_%s %d", &name, &n); err == nil {
			names[n] = name
		}
	}
	return names
}

package cri

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/test/images"
)

func privilegedPod(c *runtimeapi.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true }
func privilegedContainer(c *runtimeapi.ContainerConfig) {
	c.Linux.SecurityContext.Privileged = true
}

func withSecurity(edit func(*runtimeapi.LinuxContainerSecurityContext)) editContainer {
	return func(c *runtimeapi.ContainerConfig) { edit(c.Linux.SecurityContext) }
}

func uid(n int64) *runtimeapi.Int64Value { return &runtimeapi.Int64Value{Value: n} }

func asUser(n int64) editContainer {
	return withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUser = uid(n) })
}

// defaultCaps are containerd's and Docker's 14.
const defaultCaps = 0xa80425fb

func allCaps(t *testing.T) uint64 {
	t.Helper()
	last, err := strconv.Atoi(strings.TrimSpace(readFile(t, "/proc/sys/kernel/cap_last_cap")))
	if err != nil {
		t.Fatal(err)
	}
	all := uint64(1)<<(last+1) - 1
	// What this process may not have, no container can be given.
	bound, err := strconv.ParseUint(statusField(readFile(t, "/proc/self/status"), "CapBnd")[0], 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return all & bound
}

func TestCapabilitySetsAreExact(t *testing.T) {
	w := need(t)
	all := allCaps(t)
	caps := func(add, drop string) editContainer {
		return withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Capabilities = &runtimeapi.Capability{AddCapabilities: strings.Fields(add), DropCapabilities: strings.Fields(drop)}
		})
	}
	none := func(*runtimeapi.ContainerConfig) {}
	p, privileged := w.pod(t), w.pod(t, privilegedPod)
	for _, c := range []struct {
		name string
		pod  *pod
		edit editContainer
		want uint64 // bounding, and for root permitted and effective
	}{
		{"default", p, none, defaultCaps},
		{"add", p, caps("NET_ADMIN", ""), defaultCaps | 1<<unix.CAP_NET_ADMIN},
		{"add with CAP_", p, caps("CAP_SYS_TIME", ""), defaultCaps | 1<<unix.CAP_SYS_TIME},
		{"drop", p, caps("", "CHOWN KILL"), defaultCaps &^ (1<<unix.CAP_CHOWN | 1<<unix.CAP_KILL)},
		{"add and drop the same: drop wins", p, caps("NET_ADMIN", "NET_ADMIN"), defaultCaps},
		{"drop ALL", p, caps("", "ALL"), 0},
		{"drop ALL, add one", p, caps("NET_BIND_SERVICE", "ALL"), 1 << unix.CAP_NET_BIND_SERVICE},
		{"add ALL", p, caps("ALL", ""), all},
		{"add ALL, drop one", p, caps("ALL", "SYS_ADMIN"), all &^ (1 << unix.CAP_SYS_ADMIN)},
		{"privileged", privileged, privilegedContainer, all},
	} {
		for _, user := range []int64{0, 1000} {
			t.Run(fmt.Sprintf("%s, uid %d", c.name, user), func(t *testing.T) {
				x := c.pod.on(t).run([]string{"status", ",", "sleep"}, c.edit, asUser(user))
				x.says("CapAmb")
				effective := c.want
				if user != 0 {
					effective = 0 // capabilities(7): a non-root execve leaves none without ambient ones
				}
				for who, text := range map[string]string{"init": x.output("stdout"), "exec": x.exec("status")} {
					for field, want := range map[string]uint64{"CapInh": 0, "CapAmb": 0, "CapBnd": c.want, "CapPrm": effective, "CapEff": effective} {
						got, err := strconv.ParseUint(statusField(text, field)[0], 16, 64)
						if err != nil {
							t.Fatal(err)
						}
						if got != want {
							t.Errorf("%s: %s is %016x, want %016x", who, field, got, want)
						}
					}
				}
			})
		}
	}
}

func TestAmbientCapabilities(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"}, asUser(1000), withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Capabilities = &runtimeapi.Capability{AddAmbientCapabilities: []string{"NET_BIND_SERVICE"}}
	}))
	text := c.exec("status")
	if got, want := statusField(text, "CapAmb")[0], fmt.Sprintf("%016x", 1<<unix.CAP_NET_BIND_SERVICE); got != want {
		t.Errorf("CapAmb: got %s, want %s", got, want)
	}
	if got := statusField(text, "CapEff")[0]; got != fmt.Sprintf("%016x", 1<<unix.CAP_NET_BIND_SERVICE) {
		t.Errorf("CapEff: got %s", got)
	}
}

func TestUsersAndGroups(t *testing.T) {
	w := need(t)
	accounts := images.File{Name: "etc/passwd", Text: "root:x:0:0:root:/root:/bin/sh\napp:x:1002:1003::/home/app:/bin/sh\n7:x:0:0:number:/:/bin/sh\n"}
	groups := images.File{Name: "etc/group", Text: "root:x:0:\napp:x:1003:\nextra:x:50000:app\nmore:x:50001:app,root\n"}
	img := func(t *testing.T, user string) string {
		id, _ := w.forge(t, fmt.Sprintf("user-x%x", user), images.Image{Layers: append(w.layers(t), []images.File{accounts, groups}), Config: v1.Config{User: user}})
		return id
	}
	p := w.pod(t)
	merge, strict := runtimeapi.SupplementalGroupsPolicy_Merge, runtimeapi.SupplementalGroupsPolicy_Strict
	for _, c := range []struct {
		name   string
		image  string // USER
		edit   func(*runtimeapi.LinuxContainerSecurityContext)
		uid    int64
		gid    int64
		groups string // as getgroups(2) lists them, sorted
	}{
		{"root by default", "", nil, 0, 0, "0 50001"},
		{"image, uid", "1002", nil, 1002, 1003, "1003 50000 50001"},
		{"image, name", "app", nil, 1002, 1003, "1003 50000 50001"},
		{"image, uid and gid", "1002:50000", nil, 1002, 50000, "50000 50001"},
		{"image, name and group", "app:extra", nil, 1002, 50000, "50000 50001"},
		{"image, uid that passwd lacks", "4000", nil, 4000, 0, "0"},
		{"run as user", "", func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUser = uid(1002) }, 1002, 1003, "1003 50000 50001"},
		{"run as username", "", func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUsername = "app" }, 1002, 1003, "1003 50000 50001"},
		{"run as user and group", "", func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUser, s.RunAsGroup = uid(1002), uid(77) }, 1002, 77, "77 50000 50001"},
		{"run as user wins over image", "4000", func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUser = uid(1002) }, 1002, 1003, "1003 50000 50001"},
		{"run as root wins over image", "app", func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUser = uid(0) }, 0, 0, "0 50001"},
		{"supplemental, merged", "", func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.RunAsUser, s.SupplementalGroups, s.SupplementalGroupsPolicy = uid(1002), []int64{9, 8}, merge
		}, 1002, 1003, "8 9 1003 50000 50001"},
		{"supplemental, strict", "", func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.RunAsUser, s.SupplementalGroups, s.SupplementalGroupsPolicy = uid(1002), []int64{9, 8}, strict
		}, 1002, 1003, "8 9 1003"},
		{"strict without any", "", func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.RunAsUser, s.SupplementalGroupsPolicy = uid(1002), strict
		}, 1002, 1003, "1003"},
		// CVE-2026-46680, CVE-2026-30892: a number is never looked up as a name.
		{"a number that is also a name", "7", nil, 7, 0, "0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			id := img(t, c.image)
			x := p.on(t).run([]string{"id", ",", "sleep"}, withImage(id), withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
				if c.edit != nil {
					c.edit(s)
				}
			}))
			x.says("uid=")
			for who, text := range map[string]string{"init": x.output("stdout"), "exec": x.exec("id")} {
				want := fmt.Sprintf("uid=%d euid=%d gid=%d egid=%d groups=", c.uid, c.uid, c.gid, c.gid)
				head, list, _ := strings.Cut(strings.TrimSpace(text), "groups=")
				if head+"groups=" != want {
					t.Errorf("%s: got %q, want %q", who, head, want)
				}
				if got, want := withGID(list, c.gid), withGID(c.groups, c.gid); got != want {
					t.Errorf("%s: got groups %q, want %q", who, got, want)
				}
			}
			u := x.status().GetUser().GetLinux()
			if u == nil || u.Uid != c.uid || u.Gid != c.gid {
				t.Errorf("status: got user %v, want %d:%d", u, c.uid, c.gid)
			} else {
				var list []string
				for _, g := range u.SupplementalGroups {
					list = append(list, strconv.FormatInt(g, 10))
				}
				if got, want := withGID(strings.Join(list, " "), c.gid), withGID(c.groups, c.gid); got != want {
					t.Errorf("status: got groups %q, want %q", got, want)
				}
			}
			x.remove()
		})
	}
}

// withGID is a list of groups as numbers in order, gid among them: whether the
// primary group is also a supplementary one makes no difference to access.
func withGID(list string, gid int64) string {
	set := map[int64]bool{gid: true}
	for _, f := range strings.Fields(list) {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return "not numbers: " + list
		}
		set[n] = true
	}
	var out []string
	for n := int64(0); n <= 1<<17; n++ {
		if set[n] {
			out = append(out, strconv.FormatInt(n, 10))
		}
	}
	return strings.Join(out, " ")
}

func TestImageStatusTellsTheKubeletTheUser(t *testing.T) {
	w := need(t)
	for user, want := range map[string]string{"": "name ", "1002": "uid 1002", "1003:1004": "uid 1003", "www-data": "name www-data", "www-data:33": "name www-data"} {
		id, _ := w.forge(t, fmt.Sprintf("kubelet-user-x%x", user), images.Image{Layers: w.layers(t), Config: v1.Config{User: user}})
		r, err := w.im.ImageStatus(t.Context(), &runtimeapi.ImageSpec{Image: id}, false)
		if err != nil {
			t.Fatal(err)
		}
		got := "name " + r.Image.Username
		if r.Image.Uid != nil {
			got = fmt.Sprintf("uid %d", r.Image.Uid.Value)
		}
		if got != want {
			t.Errorf("USER %q: got %s, want %s (RunAsNonRoot depends on it)", user, got, want)
		}
	}
}

// SEC-41
func TestUsersOutOfRangeNeverBecomeRoot(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	for _, user := range []string{"2147483648", "4294967295", "4294967296", "-1", "00", "0x0", "1e3", "1 ", "1:4294967296", strings.Repeat("9", 30)} {
		t.Run(user, func(t *testing.T) {
			p := p.on(t)
			name, _, _ := strings.Cut(user, ":")
			id, _ := w.forge(t, fmt.Sprintf("range-%x", user), images.Image{
				Layers: append(w.layers(t), []images.File{{Name: "etc/passwd", Text: "root:x:0:0::/:\n" + name + ":x:0:0::/:\n"}}), Config: v1.Config{User: user}})
			c, err := p.tryCreate([]string{"id", ",", "sleep"}, withImage(id))
			if err == nil {
				err = w.rt.StartContainer(t.Context(), c.id)
			}
			if err != nil {
				return // refused
			}
			c.says("uid=")
			if out := c.output("stdout"); strings.HasPrefix(out, "uid=0 ") && user != "00" {
				t.Errorf("USER %q runs as root: %s", user, out)
			}
		})
	}
}

// SEC-42
func TestHostileAccountsFilesNeitherHangNorFollow(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	for name, file := range map[string]images.File{
		"link to the host":  {Symlink: "../../../../../../../etc/shadow"},
		"link to a device":  {Symlink: "/dev/zero"},
		"link to itself":    {Symlink: "/etc/passwd"},
		"a directory":       {Dir: true},
		"a very long line":  {Text: strings.Repeat("a", 11<<20)},
		"many short lines":  {Text: strings.Repeat("a:x:1:1::/:\n", 1<<20)},
		"binary":            {Text: "\x00\xff:::::\n:::::::::\n"},
		"number overflows":  {Text: "app:x:99999999999999999999:0::/:\n"},
		"negative number":   {Text: "app:x:-1:0::/:\n"},
		"link to something": {Symlink: "../proc/kcore"},
	} {
		t.Run(name, func(t *testing.T) {
			p := p.on(t)
			file.Name = "etc/passwd"
			layers := [][]images.File{{{Name: "payload", FromHost: filepath.Join(filepath.Dir(w.certs), "payload")}, {Name: "etc", Dir: true}, file}}
			id, _ := w.forge(t, "accounts", images.Image{Layers: layers, Config: v1.Config{User: "app"}})
			before := rss(t, w.PID)
			c, err := p.tryCreate([]string{"id"}, withImage(id))
			if err == nil {
				err = w.rt.StartContainer(t.Context(), c.id)
			}
			if err == nil {
				t.Error("a user that is nowhere was found")
			}
			if grown := rss(t, w.PID) - before; grown > 64<<20 {
				t.Errorf("the daemon grew by %d MiB", grown>>20)
			}
		})
	}
}

// rss is a process' resident memory in bytes.
func rss(t *testing.T, pid int) int64 {
	t.Helper()
	f := procField(pid, "VmRSS")
	if len(f) == 0 {
		t.Fatalf("process %d is gone", pid)
	}
	n, err := strconv.ParseInt(f[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n << 10
}

func TestNoNewPrivileges(t *testing.T) {
	w := need(t)
	id, _ := w.forge(t, "setuid", images.Image{Layers: w.layers(t, images.File{Name: "setuid-payload", FromHost: filepath.Join(filepath.Dir(w.certs), "payload"), Mode: 0o4755})})
	p := w.pod(t)
	for _, c := range []struct {
		nnp  bool
		euid string
	}{{false, "euid=0"}, {true, "euid=1000"}} {
		x := p.run([]string{"sleep"}, withImage(id), asUser(1000), withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) { s.NoNewPrivs = c.nnp }))
		if got := statusField(x.exec("status"), "NoNewPrivs")[0]; (got == "1") != c.nnp {
			t.Errorf("NoNewPrivs: got %s, want %t", got, c.nnp)
		}
		r, err := w.execSync(t, &runtimeapi.ExecSyncRequest{ContainerId: x.id, Cmd: []string{"/setuid-payload", "id"}, Timeout: 10})
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(r.Stdout), c.euid) {
			t.Errorf("no_new_privs %t: got %q, want %s", c.nnp, r.Stdout, c.euid)
		}
		y := p.run([]string{"id"}, withImage(id), asUser(1000), func(cfg *runtimeapi.ContainerConfig) {
			cfg.Command, cfg.Linux.SecurityContext.NoNewPrivs = []string{"/setuid-payload"}, c.nnp
		})
		y.wait()
		if out := y.output("stdout"); !strings.Contains(out, c.euid) {
			t.Errorf("no_new_privs %t, first process: got %q, want %s", c.nnp, out, c.euid)
		}
	}
}

func withSeccomp(typ runtimeapi.SecurityProfile_ProfileType, ref string) editContainer {
	return withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: typ, LocalhostRef: ref}
	})
}

func TestSeccomp(t *testing.T) {
	w := need(t)
	p, privileged := w.pod(t), w.pod(t, privilegedPod)
	profile := filepath.Join(t.TempDir(), "profile.json")
	mustWrite(t, profile, `{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64"],"syscalls":[{"names":["getpriority"],"action":"SCMP_ACT_ERRNO","errnoRet":77}]}`)
	const byDefault, local, off = runtimeapi.SecurityProfile_RuntimeDefault, runtimeapi.SecurityProfile_Localhost, runtimeapi.SecurityProfile_Unconfined
	none := func(*runtimeapi.ContainerConfig) {}
	for _, c := range []struct {
		name string
		pod  *pod
		edit []editContainer
		mode string // Seccomp: of /proc/self/status
	}{
		{"unset", p, []editContainer{none}, "0"},
		{"unconfined", p, []editContainer{withSeccomp(off, "")}, "0"},
		{"runtime default", p, []editContainer{withSeccomp(byDefault, "")}, "2"},
		{"runtime default, user", p, []editContainer{withSeccomp(byDefault, ""), asUser(1000)}, "2"},
		{"runtime default, no_new_privs", p, []editContainer{withSeccomp(byDefault, ""), asUser(1000), withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) { s.NoNewPrivs = true })}, "2"},
		{"runtime default, no capabilities", p, []editContainer{withSeccomp(byDefault, ""), withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL"}}
		})}, "2"},
		{"localhost", p, []editContainer{withSeccomp(local, profile)}, "2"},
		{"privileged", privileged, []editContainer{privilegedContainer, withSeccomp(byDefault, "")}, "0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := c.pod.on(t).run([]string{"status", ",", "sleep"}, c.edit...)
			x.says("Seccomp:")
			for who, text := range map[string]string{"init": x.output("stdout"), "exec": x.exec("status")} {
				if got := statusField(text, "Seccomp")[0]; got != c.mode {
					t.Errorf("%s: got mode %s, want %s", who, got, c.mode)
				}
			}
			if c.name == "localhost" {
				if got := x.exec("syscall", "140"); got != "errno 77\n" && got != unix.ErrnoName(unix.Errno(77))+"\n" { // getpriority(2)
					t.Errorf("getpriority: got %q, want errno 77 of the profile", got)
				}
			}
		})
	}
}

// What RuntimeDefault refuses (reliability-and-security D2). Errnos: the filter
// answers before the kernel does, so kernels that lack a feature make no difference.
func TestRuntimeDefaultSeccompRefuses(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	c := p.run([]string{"sleep"}, withSeccomp(runtimeapi.SecurityProfile_RuntimeDefault, ""), withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"SYS_PTRACE"}}
	}))
	for name, call := range map[string]struct {
		args []string
		want string
	}{
		"getpid":                   {[]string{"39"}, "ok"},
		"socket(AF_INET)":          {[]string{"41", "2", "1", "0"}, "ok"},
		"socket(AF_ALG)":           {[]string{"41", "38", "1", "0"}, "EPERM"},
		"socket(AF_VSOCK)":         {[]string{"41", "40", "1", "0"}, "EPERM"},
		"unshare(NEWUSER)":         {[]string{"272", "0x10000000"}, "EPERM"},
		"unshare(0)":               {[]string{"272", "0"}, "EPERM"},
		"clone(NEWNS)":             {[]string{"56", "0x00020000", "0"}, "EPERM"},
		"clone3":                   {[]string{"435", "0", "0"}, "ENOSYS"},
		"mount":                    {[]string{"165", "0", "0", "0", "0", "0"}, "EPERM"},
		"umount2":                  {[]string{"166", "0", "0"}, "EPERM"},
		"pivot_root":               {[]string{"155", "0", "0"}, "EPERM"},
		"setns":                    {[]string{"308", "0", "0"}, "EPERM"},
		"bpf":                      {[]string{"321", "0", "0", "0"}, "EPERM"},
		"perf_event_open":          {[]string{"298", "0", "0", "0", "0", "0"}, "EPERM"},
		"keyctl":                   {[]string{"250", "0", "0", "0", "0", "0"}, "EPERM"},
		"add_key":                  {[]string{"248", "0", "0", "0", "0", "0"}, "EPERM"},
		"userfaultfd":              {[]string{"323", "0"}, "EPERM"},
		"io_uring_setup":           {[]string{"425", "1", "0"}, "EPERM"},
		"open_by_handle_at":        {[]string{"304", "0", "0", "0"}, "EPERM"},
		"kexec_load":               {[]string{"246", "0", "0", "0", "0"}, "EPERM"},
		"init_module":              {[]string{"175", "0", "0", "0"}, "EPERM"},
		"reboot":                   {[]string{"169", "0", "0", "0", "0"}, "EPERM"},
		"personality(ADDR_NO_RND)": {[]string{"135", "0x0040000"}, "EPERM"},
		"personality(0)":           {[]string{"135", "0"}, "ok"},
		"one nobody knows":         {[]string{"4000"}, "ENOSYS"},
	} {
		if got := c.exec(append([]string{"syscall"}, call.args...)...); got != call.want+"\n" {
			t.Errorf("%s: got %q, want %s", name, got, call.want)
		}
	}
}

// kubeletMasked and kubeletReadonly are the kubelet's default lists (without the per-CPU entries).
var (
	kubeletMasked   = []string{"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap", "/proc/absent-on-every-kernel"}
	kubeletReadonly = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

func TestMaskedAndReadOnlyPaths(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	c := p.run([]string{"sleep"}, withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.MaskedPaths, s.ReadonlyPaths = append(kubeletMasked, kubeletMasked...), kubeletReadonly
	}))
	plain := p.run([]string{"sleep"})
	for _, path := range kubeletMasked {
		was, err := plain.try("stat", path)
		if err != nil {
			t.Fatal(err)
		}
		if was.ExitCode != 0 {
			continue // not on this kernel
		}
		got := c.exec("stat", path)
		switch {
		case strings.Contains(string(was.Stdout), "mode=04"): // a directory: empty and read-only
			if list := c.exec("ls", path); list != "" {
				t.Errorf("%s: got %q, want an empty directory", path, list)
			}
			c.fails("mkdir", path+"/x")
		case !strings.Contains(got, "rdev=1:3"):
			t.Errorf("%s: got %q, want the null device", path, got)
		}
		if n := strings.Count(c.exec("mountinfo"), " "+path+" "); n != 1 {
			t.Errorf("%s is mounted %d times, want once though it is listed twice", path, n)
		}
	}
	for path, write := range map[string][]string{
		"/proc/sys":           {"mkfile", "/proc/sys/kernel/domainname", "x"},
		"/proc/sysrq-trigger": {"mkfile", "/proc/sysrq-trigger", "h"},
		"/proc/irq":           {"mkfile", "/proc/irq/default_smp_affinity", "1"},
	} {
		if _, err := os.Lstat(path); err != nil {
			continue // not on this kernel
		}
		if msg := c.fails(write...); !strings.Contains(msg, "read-only") {
			t.Errorf("%s: got %q, want EROFS", path, msg)
		}
	}
	// With empty lists nothing is masked: that is how an unmasked /proc is asked for.
	for _, path := range existing(t, "/proc/timer_list", "/proc/keys", "/proc/interrupts", "/proc/kcore") {
		if got := plain.exec("stat", path); strings.Contains(got, "rdev=") {
			t.Errorf("%s is masked without being listed: %q", path, got)
		}
	}
}

func TestPrivileged(t *testing.T) {
	w := need(t)
	c := w.pod(t, privilegedPod).run([]string{"sleep"}, privilegedContainer)
	c.exec("mkdir", "/m", ",", "mount-tmpfs", "/m")
	if got := c.exec("mountinfo"); strings.Contains(mountLine(got, "/sys"), " ro,") || mountLine(got, "/sys") == "" {
		t.Errorf("/sys: got %q, want it writable", mountLine(got, "/sys"))
	}
	// All devices of the host, and access to them.
	host, err := os.ReadDir("/dev")
	if err != nil {
		t.Fatal(err)
	}
	names := strings.Fields(c.exec("ls", "/dev"))
	for _, e := range host {
		if e.Type()&os.ModeDevice != 0 && e.Name() != "console" && e.Name() != "ptmx" && !contains(names, e.Name()) {
			t.Errorf("/dev/%s is missing", e.Name())
		}
	}
	c.exec("mknod", "/node", "1", "1", ",", "stat", "/node")
	plain := w.pod(t).run([]string{"mkdir", "/m", ",", "sleep"})
	plain.exec("wait", "/m")
	if msg := plain.fails("mount-tmpfs", "/m"); !strings.Contains(msg, "not permitted") {
		t.Errorf("got %q, want EPERM", msg)
	}
}

func mountLine(table, point string) string {
	for line := range strings.Lines(table) {
		if f := strings.Fields(line); len(f) > 5 && f[4] == point {
			return line
		}
	}
	return ""
}

// SEC-25
func TestDevicesAreAnAllowList(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	check := func(t *testing.T, c *container) {
		t.Helper()
		for name, dev := range map[string][2]string{"mem": {"1", "1"}, "loop-control": {"10", "237"}, "kmsg": {"1", "11"}} {
			node := "/node-" + name
			r, err := c.try("mknod", node, dev[0], dev[1], ",", "cat", node)
			if err != nil {
				t.Fatal(err)
			}
			if r.ExitCode == 0 || !strings.Contains(string(r.Stderr), "not permitted") {
				t.Errorf("%s: got exit code %d, %q; want EPERM", name, r.ExitCode, r.Stderr)
			}
			c.exec("rm", node)
		}
		for _, name := range []string{"null", "zero", "full", "random", "urandom"} {
			c.exec("touch", "/dev/"+name)
		}
	}
	c := p.run([]string{"sleep"})
	check(t, c)
	if err := w.rt.UpdateContainerResources(t.Context(), c.id, &runtimeapi.ContainerResources{Linux: &runtimeapi.LinuxContainerResources{CpuShares: 300}}); err != nil {
		t.Fatal(err)
	}
	check(t, c)
}

// A directory of the host stands for the devices in it, a link for what it leads to.
func TestDeviceDirectoriesAndLinks(t *testing.T) {
	w := need(t)
	dir := t.TempDir()
	for name, minor := range map[string]uint32{"kmsg": 11, "deep/zero": 5} {
		path := filepath.Join(dir, "all", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(1, minor))); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(filepath.Join(dir, "all", "kmsg"), filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, filepath.Join(dir, "all", "file"), "no device")
	ask := func(host, permissions string) editContainer {
		return func(c *runtimeapi.ContainerConfig) {
			c.Devices = []*runtimeapi.Device{{HostPath: filepath.Join(dir, host), ContainerPath: "/dev/mine", Permissions: permissions}}
		}
	}
	p := w.pod(t)
	c := p.run([]string{"sleep"}, ask("all", "r"))
	for path, number := range map[string]string{"/dev/mine/kmsg": "1:11", "/dev/mine/deep/zero": "1:5"} {
		if got := c.exec("stat", path); !strings.Contains(got, number) {
			t.Errorf("%s: got %q, want device %s", path, got, number)
		}
	}
	c.fails("stat", "/dev/mine/file")
	c = p.run([]string{"sleep"}, ask("link", "rwm"))
	if got := c.exec("stat", "/dev/mine"); !strings.Contains(got, "1:11") {
		t.Errorf("through a link: got %q, want device 1:11", got)
	}
	for name, host := range map[string]string{"not there": "nothing", "a file": "all/file"} {
		_, err := p.tryCreate([]string{"true"}, ask(host, "r"))
		wantCode(t, err, codes.InvalidArgument, "config.devices[0].host_path", host)
		if t.Failed() {
			t.Log(name)
		}
	}
}

func TestDevicesThatAreAskedFor(t *testing.T) {
	w := need(t)
	if _, err := os.Stat("/dev/kmsg"); err != nil {
		t.Skipf("no device to give: %v", err)
	}
	p := w.pod(t)
	c := p.run([]string{"sleep"}, func(c *runtimeapi.ContainerConfig) {
		c.Devices = []*runtimeapi.Device{{HostPath: "/dev/kmsg", ContainerPath: "/dev/mine", Permissions: "r"}, {HostPath: "/dev/kmsg", ContainerPath: "/deep/down", Permissions: "rwm"}}
	})
	for _, path := range []string{"/dev/mine", "/deep/down"} {
		if got := c.exec("stat", path); !strings.Contains(got, "rdev=1:11") {
			t.Errorf("%s: got %q, want device 1:11", path, got)
		}
	}
	only := p.run([]string{"sleep"}, func(c *runtimeapi.ContainerConfig) {
		c.Devices = []*runtimeapi.Device{{HostPath: "/dev/kmsg", ContainerPath: "/dev/mine", Permissions: "r"}}
	})
	// Opening for reading never reads: cat would wait for the kernel to say more.
	if msg := only.fails("touch", "/dev/mine"); !strings.Contains(msg, "not permitted") {
		t.Errorf("writing: got %q, want EPERM", msg)
	}
}

func TestLimitsAreTheDaemons(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"limits", ",", "umask", ",", "sleep"})
	c.says("Max realtime timeout")
	// Go raises its own soft limit of open files; what a container gets must be what the daemon was given.
	var daemon unix.Rlimit
	if err := unix.Prlimit(w.PID, unix.RLIMIT_NOFILE, nil, &daemon); err != nil {
		t.Fatal(err)
	}
	limits := map[string]string{}
	for line := range strings.Lines(c.output("stdout")) {
		if rest, ok := strings.CutPrefix(line, "Max "); ok && len(rest) > 22 {
			limits[strings.TrimSpace(rest[:21])] = strings.Join(strings.Fields(rest[22:])[:2], " ")
		}
	}
	var own unix.Rlimit // of this process, which started the daemon; not yet raised by its own Go runtime
	if err := unix.Prlimit(os.Getppid(), unix.RLIMIT_NOFILE, nil, &own); err != nil {
		t.Fatal(err)
	}
	if got, want := limits["open files"], fmt.Sprintf("%d %d", own.Cur, own.Max); got != want {
		t.Logf("this process' parent has %s; the daemon has %d %d", want, daemon.Cur, daemon.Max)
		if got != fmt.Sprintf("%d %d", daemon.Cur, daemon.Max) {
			t.Errorf("open files: got %s", got)
		}
	}
	for name, resource := range map[string]int{"processes": unix.RLIMIT_NPROC, "core file size": unix.RLIMIT_CORE, "stack size": unix.RLIMIT_STACK} {
		var want unix.Rlimit
		if err := unix.Prlimit(w.PID, resource, nil, &want); err != nil {
			t.Fatal(err)
		}
		if got, want := limits[name], limit(want.Cur)+" "+limit(want.Max); got != want {
			t.Errorf("%s: got %s, want the daemon's %s", name, got, want)
		}
	}
	if got := c.output("stdout"); !strings.Contains(got, "\n0022\n") {
		t.Errorf("umask: got %q, want 0022", got[max(0, len(got)-40):])
	}
}

func limit(n uint64) string {
	if n == unix.RLIM_INFINITY {
		return "unlimited"
	}
	return strconv.FormatUint(n, 10)
}

func TestOOMScoreAdj(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	for _, want := range []int64{0, 500, 1000} {
		c := p.run([]string{"sleep"}, func(c *runtimeapi.ContainerConfig) { c.Linux.Resources.OomScoreAdj = want })
		if got := c.exec("cat", "/proc/1/oom_score_adj"); got != fmt.Sprintf("%d\n", want) {
			t.Errorf("got %q, want %d", got, want)
		}
	}
	// Lowering it needs CAP_SYS_RESOURCE, which some hosts lack: then it is clamped to the daemon's own.
	c := p.run([]string{"sleep"}, func(c *runtimeapi.ContainerConfig) { c.Linux.Resources.OomScoreAdj = -900 })
	own := readFile(t, "/proc/"+itoa(w.PID)+"/oom_score_adj")
	if got := c.exec("cat", "/proc/1/oom_score_adj"); got != "-900\n" && got != own {
		t.Errorf("got %q, want -900 or the daemon's %q", got, own)
	}
}

// SEC-03
func TestContainersHaveNoDescriptorsOfTheRuntimes(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	c := p.run([]string{"fds", ",", "sleep"})
	eventually(t, "it has said what it has open", func() bool { return strings.Count(c.output("stdout"), "\n") >= 3 })
	for who, text := range map[string]string{"init": c.output("stdout"), "exec": c.exec("fds")} {
		var numbers []string
		for line := range strings.Lines(text) {
			number, _, _ := strings.Cut(strings.TrimSpace(line), " ")
			numbers = append(numbers, number)
		}
		if got := strings.Join(numbers, " "); got != "0 1 2" {
			t.Errorf("%s: got descriptors\n%s, want 0, 1 and 2", who, text)
		}
	}
	// As the kernel sees it, too: the payload hides what Go itself opens.
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", c.pid()))
	if err != nil {
		t.Fatal(err)
	}
	var null unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/fd/0", c.pid()), &null); err != nil || null.Mode&unix.S_IFMT != unix.S_IFCHR || null.Rdev != unix.Mkdev(1, 3) {
		t.Errorf("stdin: got mode %o, device %d, %v; want the null device", null.Mode, null.Rdev, err)
	}
	for _, e := range entries {
		target, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", c.pid(), e.Name()))
		if err == nil && (strings.HasPrefix(target, w.StateDir) || strings.HasPrefix(target, w.RunDir) || strings.Contains(target, "memfd:") || strings.HasPrefix(target, "socket:")) {
			t.Errorf("descriptor %s of the container is %s", e.Name(), target)
		}
	}
}

// SEC-03
func TestWorkingDirectoryNeverLeadsOut(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	for n := range 16 {
		for _, dir := range []string{fmt.Sprintf("/proc/self/fd/%d", n), fmt.Sprintf("/proc/self/fd/%d/../../../..", n), fmt.Sprintf("/proc/thread-self/fd/%d", n)} {
			c, err := p.tryCreate([]string{"cat", "./proc/sys/kernel/hostname", ",", "pwd", ",", "ls", "."}, func(c *runtimeapi.ContainerConfig) { c.WorkingDir = dir })
			if err == nil {
				err = w.rt.StartContainer(t.Context(), c.id)
			}
			if err != nil {
				continue
			}
			c.wait()
			if out := c.output("stdout"); strings.Contains(out, "boot\n") || strings.Contains(out, "(unreachable)") || strings.Contains(out, "lost+found") {
				t.Errorf("%s: got %q, which is the host", dir, out)
			}
		}
	}
}

// SEC-01
func TestRuntimeBinaryIsOutOfReach(t *testing.T) {
	w := need(t)
	hostBinary := filepath.Join(filepath.Dir(w.crispd), "crisp-init")
	before := readFile(t, hostBinary)
	id, _ := w.forge(t, "selfexe", images.Image{Layers: w.layers(t, images.File{Name: "self", Symlink: "/proc/self/exe"}, images.File{Name: "script", Text: "#!/proc/self/exe\n", Mode: 0o755})})
	podOptions, containerOptions := withNamespaces(func(o *runtimeapi.NamespaceOption) { o.Pid = nsPod })
	p := w.pod(t, podOptions)
	c := p.run([]string{"sleep"}, withImage(id), containerOptions, withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"SYS_PTRACE"}}
	}))
	for _, cmd := range []string{"/self", "/script", "/proc/self/exe", "/proc/1/exe"} {
		for range 20 {
			// At the moment of the execve that name is the runtime's own program, which may start and
			// complains; what counts is that it can't be changed.
			_, _ = w.execSync(t, &runtimeapi.ExecSyncRequest{ContainerId: c.id, Cmd: []string{cmd, "echo", "x"}, Timeout: 10})
		}
	}
	for _, path := range []string{"/proc/1/exe", "/proc/self/exe"} {
		if r, err := c.try("mkfile", path, "overwritten"); err != nil || r.ExitCode == 0 {
			t.Errorf("%s could be opened for writing: %v, %v", path, r, err)
		}
	}
	if readFile(t, hostBinary) != before {
		t.Error("the host's crisp-init changed")
	}
}

// SEC-05
func TestNoSocketIsInReachOfAHostNetworkPod(t *testing.T) {
	w := need(t)
	podOptions, containerOptions := withNamespaces(func(o *runtimeapi.NamespaceOption) { o.Network = nsNode })
	c := w.pod(t, podOptions).run([]string{"sleep"}, containerOptions)
	snap, err := w.scope().Take()
	if err != nil {
		t.Fatal(err)
	}
	for name := range snap["abstract socket"] {
		t.Errorf("abstract socket %s", name)
	}
	if got := c.exec("cat", "/proc/net/unix"); !strings.Contains(got, w.Socket) {
		t.Errorf("the test looks at the wrong network namespace: %d bytes", len(got))
	}
	for dir, want := range map[string]os.FileMode{filepath.Join(w.StateDir, "state"): 0o700, filepath.Join(w.RunDir, "run"): 0o711} {
		info, err := os.Stat(dir)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm()&^want != 0 {
			t.Errorf("%s has mode %v, want at most %v", dir, info.Mode(), want)
		}
	}
	info, err := os.Stat(w.Socket)
	if err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("the socket: got %v, %v; want mode 0660", info.Mode(), err)
	}
}

// SEC-18, SEC-33
func TestCgroupsCanNotBeWritten(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"}, withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"SYS_PTRACE", "DAC_OVERRIDE"}}
	}))
	for _, dir := range append([]string{"/sys/fs/cgroup"}, prefixed("/sys/fs/cgroup/", strings.Fields(c.exec("ls", "/sys/fs/cgroup")))...) {
		r, err := c.try("mkdir", dir+"/escape")
		if err != nil || r.ExitCode == 0 {
			t.Errorf("a cgroup was made in %s: %v, %v", dir, r, err)
		}
		r, err = c.try("mkfile", dir+"/release_agent", "/x")
		if err != nil || r.ExitCode == 0 {
			t.Errorf("%s/release_agent was written: %v, %v", dir, r, err)
		}
	}
}

func prefixed(prefix string, names []string) []string {
	var all []string
	for _, n := range names {
		all = append(all, prefix+n)
	}
	return all
}

// SEC-26
func TestHugeConfigurationsAreAppliedWholeOrRefused(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	dir := t.TempDir()
	c := p.create([]string{"sleep"}, func(c *runtimeapi.ContainerConfig) {
		for i := range 5000 {
			c.Envs = append(c.Envs, &runtimeapi.KeyValue{Key: fmt.Sprintf("V%d", i), Value: []byte(strings.Repeat("x", 100))})
		}
		for i := range 300 {
			c.Mounts = append(c.Mounts, &runtimeapi.Mount{HostPath: dir, ContainerPath: fmt.Sprintf("/m/%d", i)})
		}
		c.Annotations = map[string]string{"big": strings.Repeat("a", 1<<20)}
	})
	c.start()
	if got := strings.Count(c.exec("env"), "\nV"); got < 4999 {
		t.Errorf("got %d variables, want 5000", got)
	}
	if got := strings.Count(c.exec("mountinfo"), " /m/"); got != 300 {
		t.Errorf("got %d mounts, want 300", got)
	}
	ns, host := namespaces(t, c.anyPID()), namespaces(t, os.Getpid())
	for _, kind := range []string{"net", "ipc", "uts", "pid", "mnt", "cgroup"} {
		if ns[kind] == host[kind] {
			t.Errorf("%s is the host's", kind)
		}
	}
}

// SEC-52
func TestAnnotationsChangeNothing(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	facts := func(edit editContainer) string {
		c := p.run([]string{"sleep"}, edit)
		text := c.exec("status")
		return fmt.Sprint(statusField(text, "CapBnd"), statusField(text, "Seccomp"), statusField(text, "NoNewPrivs"), c.exec("ls", "/dev"), len(strings.Split(c.exec("mountinfo"), "\n")))
	}
	plain := facts(func(*runtimeapi.ContainerConfig) {})
	with := facts(func(c *runtimeapi.ContainerConfig) {
		c.Annotations = map[string]string{
			"org.systemd.property.ExecStart": "'x'", "run.oci.keep_original_groups": "1", "run.oci.mount_context_type": "context", "io.kubernetes.cri-o.Devices": "/dev/kmsg",
			"io.kubernetes.cri-o.TrySkipVolumeSELinuxLabel": "true", "cdi.k8s.io/x": "vendor.com/class=dev", "io.containerd.rdt-class": "x", "blockio.resources.beta.kubernetes.io/pod": "x",
			"run.oci.hooks.stderr": "/x", "io.kubernetes.cri.untrusted-workload": "true", "seccomp.security.alpha.kubernetes.io/pod": "unconfined",
		}
	})
	if plain != with {
		t.Errorf("with annotations: got %s, want %s", with, plain)
	}
}

func TestPrivilegedNeedsAPrivilegedPod(t *testing.T) {
	w := need(t)
	_, err := w.pod(t).tryCreate([]string{"sleep"}, privilegedContainer)
	wantCode(t, err, codes.InvalidArgument, "privileged")
}

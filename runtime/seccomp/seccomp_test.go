package seccomp

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	moby "github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/seccomp/bpf"
)

var update = flag.Bool("update", false, "write the golden files anew")

var archNames = [arches]string{"x86_64", "x86", "x32", "aarch64", "arm"}

// data is a call of an architecture.
func data(a arch, nr uint32, args ...uint64) *bpf.Data {
	if a == x32 {
		nr |= x32Bit
	}
	d := &bpf.Data{Nr: nr, Arch: a.audit()}
	copy(d.Args[:], args)
	return d
}

func mustCompile(t testing.TB, p *specs.LinuxSeccomp, goarch string) *bpf.Machine {
	t.Helper()
	program, err := CompileFor(p, goarch)
	if err != nil {
		t.Fatal(err)
	}
	m, err := bpf.Load(program.BPF)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func mustDefault(t testing.TB, caps []string, goarch string) *specs.LinuxSeccomp {
	t.Helper()
	p, err := Default(caps, goarch)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// outcomeName is what people call what a filter returns.
func outcomeName(ret uint32) string {
	switch ret & unix.SECCOMP_RET_ACTION_FULL {
	case unix.SECCOMP_RET_ALLOW:
		return "ALLOW"
	case unix.SECCOMP_RET_ERRNO:
		return unix.ErrnoName(unix.Errno(ret & unix.SECCOMP_RET_DATA))
	default:
		return fmt.Sprintf("%#x", ret)
	}
}

// default14 are the capabilities of an ordinary container.
var default14 = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP",
	"CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SYS_CHROOT", "CAP_MKNOD", "CAP_AUDIT_WRITE", "CAP_SETFCAP",
}

// argumentCases are SEC-32's calls that depend on arguments.
var argumentCases = []struct {
	name, says string
	args       []uint64
}{
	{"socket", "AF_UNIX", []uint64{unix.AF_UNIX}},
	{"socket", "AF_INET6", []uint64{unix.AF_INET6}},
	{"socket", "AF_NETLINK", []uint64{unix.AF_NETLINK}},
	{"socket", "AF_PACKET", []uint64{unix.AF_PACKET}},
	{"socket", "37", []uint64{37}},
	{"socket", "AF_ALG", []uint64{unix.AF_ALG}},
	{"socket", "AF_NFC", []uint64{39}},
	{"socket", "AF_VSOCK", []uint64{unix.AF_VSOCK}},
	{"socket", "AF_KCM", []uint64{41}},
	{"socket", "AF_ALG and garbage above", []uint64{1<<32 | unix.AF_ALG}},
	{"socketcall", "SYS_SOCKET", []uint64{1}},
	{"socketcall", "SYS_BIND", []uint64{2}},
	{"ipc", "SEMOP", []uint64{1}},
	{"clone", "a thread", []uint64{unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_THREAD}},
	{"clone", "a process", []uint64{uint64(unix.SIGCHLD)}},
	{"clone", "CLONE_NEWUSER", []uint64{unix.CLONE_NEWUSER | uint64(unix.SIGCHLD)}},
	{"clone", "CLONE_NEWNS", []uint64{unix.CLONE_NEWNS}},
	{"clone", "CLONE_NEWCGROUP", []uint64{unix.CLONE_NEWCGROUP}},
	{"clone", "CLONE_NEWNET", []uint64{unix.CLONE_NEWNET}},
	{"clone3", "", nil},
	{"unshare", "CLONE_NEWUSER", []uint64{unix.CLONE_NEWUSER}},
	{"personality", "0", []uint64{0}},
	{"personality", "PER_LINUX32", []uint64{8}},
	{"personality", "ADDR_NO_RANDOMIZE", []uint64{0x40000}},
	{"personality", "ask", []uint64{0xffffffff}},
}

// describe prints what a program says of every call by name, and of the argument cases.
func describe(m *bpf.Machine, a arch) map[string]string {
	out := map[string]string{}
	for i := range calls {
		if n := calls[i].numbers[a]; n != none {
			d := data(a, uint32(n))
			ret, _ := m.Run(d)
			says := outcomeName(ret)
			if ret == unix.SECCOMP_RET_ALLOW && !m.AlwaysAllowed(d.Arch, d.Nr) || slices.ContainsFunc(argumentCases, func(c struct {
				name, says string
				args       []uint64
			}) bool {
				return c.name == calls[i].name && c.says != ""
			}) {
				says = "see below"
			}
			out[calls[i].name] = says
		}
	}
	for _, c := range argumentCases {
		if row, err := lookUp(c.name); err == nil && row.numbers[a] != none && c.says != "" {
			ret, _ := m.Run(data(a, uint32(row.numbers[a]), c.args...))
			out[c.name+" "+c.says] = outcomeName(ret)
		}
	}
	for _, n := range []uint32{600, 1000, 0xffff} {
		ret, _ := m.Run(data(a, n))
		out[fmt.Sprintf("number %d", n)] = outcomeName(ret)
	}
	return out
}

// SEC-32: the golden file says for every call of every architecture what the default profile does to it, and what
// each capability changes.
func TestDefaultGolden(t *testing.T) {
	for _, goarch := range []string{"amd64", "arm64"} {
		t.Run(goarch, func(t *testing.T) {
			base := mustCompile(t, mustDefault(t, default14, goarch), goarch)
			var b strings.Builder
			for _, a := range families[goarch] {
				says := describe(base, a)
				fmt.Fprintf(&b, "== %s\n", archNames[a])
				by := map[string][]string{}
				for name, outcome := range says {
					by[outcome] = append(by[outcome], name)
				}
				for _, outcome := range slices.Sorted(maps.Keys(by)) {
					slices.Sort(by[outcome])
					fmt.Fprintf(&b, "%s:\n", outcome)
					for _, name := range by[outcome] {
						fmt.Fprintf(&b, "\t%s\n", name)
					}
				}
			}
			for _, c := range []string{
				"CAP_DAC_READ_SEARCH", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_MODULE", "CAP_SYS_PACCT", "CAP_SYS_PTRACE", "CAP_SYS_RAWIO",
				"CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_SYS_NICE", "CAP_SYSLOG", "CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN",
			} {
				with := mustCompile(t, mustDefault(t, append(slices.Clone(default14), c), goarch), goarch)
				for _, a := range families[goarch] {
					before, after := describe(base, a), describe(with, a)
					var changed []string
					for name, outcome := range after {
						if before[name] != outcome {
							changed = append(changed, fmt.Sprintf("\t%s: %s\n", name, outcome))
						}
					}
					slices.Sort(changed)
					fmt.Fprintf(&b, "== %s with %s\n%s", archNames[a], c, strings.Join(changed, ""))
				}
			}
			file := filepath.Join("testdata", "default-"+goarch+".txt")
			if *update {
				if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got := b.String(); got != string(want) {
				t.Errorf("the default profile changed; see with -update and git diff %s", file)
			}
		})
	}
}

// What matters most, without a golden file.
func TestDefaultRefuses(t *testing.T) {
	m := mustCompile(t, mustDefault(t, default14, "amd64"), "amd64")
	for _, a := range families["amd64"] {
		for _, name := range []string{
			"unshare", "setns", "mount", "umount2", "pivot_root", "keyctl", "add_key", "request_key", "bpf", "perf_event_open", "userfaultfd",
			"io_uring_setup", "io_uring_enter", "io_uring_register", "kexec_load", "open_by_handle_at", "swapon", "init_module",
			"finit_module", "fsopen", "move_mount", "open_tree", "mount_setattr", "reboot", "acct", "settimeofday",
		} {
			c, err := lookUp(name)
			if err != nil {
				t.Fatal(err)
			}
			if got, _ := m.Run(data(a, uint32(c.numbers[a]))); got != unix.SECCOMP_RET_ERRNO|uint32(unix.EPERM) {
				t.Errorf("%s %s: got %#x, want EPERM", archNames[a], name, got)
			}
		}
		c, err := lookUp("socket")
		if err != nil {
			t.Fatal(err)
		}
		families := []uint64{1<<32 | unix.AF_ALG, 1<<63 | unix.AF_VSOCK, 1 << 31, 1<<31 | unix.AF_ALG}
		for family := range uint64(70) {
			families = append(families, family)
		}
		for _, family := range families {
			want := uint32(unix.SECCOMP_RET_ALLOW)
			// What the kernel looks at is an int.
			if f := uint32(family); f == unix.AF_ALG || f == unix.AF_VSOCK || f > lastFamily {
				want = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
			}
			if got, _ := m.Run(data(a, uint32(c.numbers[a]), family)); got != want {
				t.Errorf("%s socket(%d): got %#x, want %#x", archNames[a], family, got, want)
			}
		}
	}
	for selector := range uint64(30) {
		if got, _ := m.Run(data(x86, 102, selector)); got != unix.SECCOMP_RET_ERRNO|uint32(unix.EPERM) {
			t.Errorf("socketcall(%d): got %#x, want EPERM", selector, got)
		}
	}
}

// A call costs few instructions, and the usual ones none since Linux 5.11.
func TestDefaultIsCheap(t *testing.T) {
	for _, goarch := range []string{"amd64", "arm64"} {
		m := mustCompile(t, mustDefault(t, default14, goarch), goarch)
		if m.Len() > 400 {
			t.Errorf("%s: got %d instructions, want at most 400", goarch, m.Len())
		}
		most := 0
		for _, a := range families[goarch] {
			for i := range calls {
				n := calls[i].numbers[a]
				if n == none {
					continue
				}
				_, steps := m.Run(data(a, uint32(n)))
				most = max(most, steps)
			}
			for _, name := range []string{"read", "write", "futex", "epoll_pwait", "openat", "close", "mmap2", "mmap", "recvfrom", "sendto"} {
				c, err := lookUp(name)
				if err != nil {
					t.Fatal(err)
				}
				if n := c.numbers[a]; n != none && !m.AlwaysAllowed(data(a, uint32(n)).Arch, data(a, uint32(n)).Nr) {
					t.Errorf("%s %s: the kernel has to run the program for it", archNames[a], name)
				}
			}
		}
		if most > 25 {
			t.Errorf("%s: got %d instructions for a call, want at most 25", goarch, most)
		}
		_, read := m.Run(data(families[goarch][0], uint32(callIndex()["read"].numbers[families[goarch][0]])))
		t.Logf("%s: %d instructions; at most %d for a call, %d for read", goarch, m.Len(), most, read)
	}
}

func TestActions(t *testing.T) {
	errno, large := uint(unix.EINVAL), uint(4096)
	tests := []struct {
		in    specs.LinuxSeccompAction
		errno *uint
		want  uint32
		err   error
	}{
		{specs.ActKill, nil, unix.SECCOMP_RET_KILL_THREAD, nil},
		{specs.ActKillThread, nil, unix.SECCOMP_RET_KILL_THREAD, nil},
		{specs.ActKillProcess, nil, unix.SECCOMP_RET_KILL_PROCESS, nil},
		{specs.ActTrap, nil, unix.SECCOMP_RET_TRAP, nil},
		{specs.ActErrno, nil, unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM), nil},
		{specs.ActErrno, &errno, unix.SECCOMP_RET_ERRNO | uint32(unix.EINVAL), nil},
		{specs.ActTrace, &errno, unix.SECCOMP_RET_TRACE | uint32(unix.EINVAL), nil},
		{specs.ActLog, nil, unix.SECCOMP_RET_LOG, nil},
		{specs.ActAllow, nil, unix.SECCOMP_RET_ALLOW, nil},
		{specs.ActAllow, &errno, 0, ErrInvalid},
		{specs.ActErrno, &large, 0, ErrInvalid},
		{specs.ActNotify, nil, 0, ErrUnsupported},
		{"", nil, 0, ErrInvalid},
		{"SCMP_ACT_NOPE", nil, 0, ErrInvalid},
	}
	for _, tt := range tests {
		t.Run(string(tt.in), func(t *testing.T) {
			got, err := action(tt.in, tt.errno)
			if got != tt.want || !errors.Is(err, tt.err) || (err == nil) != (tt.err == nil) {
				t.Errorf("got %#x, %v, want %#x, %v", got, err, tt.want, tt.err)
			}
		})
	}
}

// parseProfile reads a profile without the file.
func parseProfile(t testing.TB, text, goarch string, caps ...string) *specs.LinuxSeccomp {
	t.Helper()
	p, err := parse([]byte(text), caps, goarch)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestMeaning(t *testing.T) {
	// one rule about read(2), or two
	one := func(args string) string {
		return `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","args":[` + args + `]}]}`
	}
	two := func(a, b string) string {
		return `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],` + a + `},{"names":["read"],` + b + `}]}`
	}
	const (
		allow = unix.SECCOMP_RET_ALLOW
		eperm = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
		nosys = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
		kill  = unix.SECCOMP_RET_KILL_THREAD
	)
	tests := []struct {
		name, profile string
		call          *bpf.Data
		want          uint32
	}{
		{"newer than the profile", `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["openat2"],"action":"SCMP_ACT_ALLOW"}]}`, data(x86_64, 438), nosys},
		{"older than the profile", `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["openat2"],"action":"SCMP_ACT_ALLOW"}]}`, data(x86_64, 436), eperm},
		{"newer, kill by default", `{"defaultAction":"SCMP_ACT_KILL_PROCESS","syscalls":[{"names":["openat2"],"action":"SCMP_ACT_ALLOW"}]}`, data(x86_64, 438), nosys},
		{"newer, allowed by default", `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["openat2"],"action":"SCMP_ACT_ERRNO"}]}`, data(x86_64, 438), allow},
		{"the redundant rule counts for what is newest", `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["openat2"],"action":"SCMP_ACT_ERRNO"}]}`, data(x86_64, 436), eperm},
		{"no rules, no newest", `{"defaultAction":"SCMP_ACT_ERRNO"}`, data(x86_64, 1000), eperm},
		{"the tracer's -1", `{"defaultAction":"SCMP_ACT_ALLOW"}`, data(x86_64, 0xffffffff), allow},
		{"which is the only one", `{"defaultAction":"SCMP_ACT_ALLOW"}`, data(x86_64, 0xfffffffe), kill},
		{"the first rule without conditions decides", two(`"action":"SCMP_ACT_ALLOW"`, `"action":"SCMP_ACT_KILL"`), data(x86_64, 0), allow},
		{"also after one with conditions", two(`"action":"SCMP_ACT_KILL","args":[{"index":0,"value":7,"op":"SCMP_CMP_EQ"}]`, `"action":"SCMP_ACT_ALLOW"`), data(x86_64, 0, 7), allow},
		{"also before one with conditions", two(`"action":"SCMP_ACT_ALLOW"`, `"action":"SCMP_ACT_KILL","args":[{"index":0,"value":7,"op":"SCMP_CMP_EQ"}]`), data(x86_64, 0, 7), allow},
		{"rules with conditions in order", two(`"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":9,"op":"SCMP_CMP_LT"}]`, `"action":"SCMP_ACT_KILL","args":[{"index":1,"value":7,"op":"SCMP_CMP_EQ"}]`), data(x86_64, 0, 7, 7), allow},
		{"all conditions of a rule", one(`{"index":0,"value":7,"op":"SCMP_CMP_EQ"},{"index":1,"value":7,"op":"SCMP_CMP_EQ"}`), data(x86_64, 0, 7, 8), eperm},
		{"any of those on the same argument", one(`{"index":0,"value":7,"op":"SCMP_CMP_EQ"},{"index":0,"value":9,"op":"SCMP_CMP_EQ"}`), data(x86_64, 0, 9), allow},
		{"upper half", one(`{"index":0,"value":7,"op":"SCMP_CMP_EQ"}`), data(x86_64, 0, 1<<32|7), eperm},
		{"upper half of a mask", one(`{"index":0,"value":1095216660480,"valueTwo":21474836480,"op":"SCMP_CMP_MASKED_EQ"}`), data(x86_64, 0, 6<<32), eperm},
		{"upper half of a mask, equal", one(`{"index":0,"value":1095216660480,"valueTwo":21474836480,"op":"SCMP_CMP_MASKED_EQ"}`), data(x86_64, 0, 5<<32|9), allow},
		{"value outside the mask", one(`{"index":0,"value":15,"valueTwo":19,"op":"SCMP_CMP_MASKED_EQ"}`), data(x86_64, 0, 3), allow},

		{"x32 not in the profile", `{"defaultAction":"SCMP_ACT_ALLOW"}`, data(x32, 1), kill},
		{"x86 not in the profile", `{"defaultAction":"SCMP_ACT_ALLOW"}`, data(x86, 1), kill},
		{"arm on amd64", `{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_ARM"]}`, data(arm, 1), kill},
		{"x32 in the profile", `{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X32"]}`, data(x32, 1), allow},
		{"x32 has numbers of its own", `{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X32"],"syscalls":[{"names":["ioctl"],"action":"SCMP_ACT_ERRNO"}]}`, data(x32, 514), eperm},
		{"newest of x32", `{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X32"],"syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]}`, data(x32, 5), nosys},
		{"Docker's old form", `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"name":"read","action":"SCMP_ACT_ALLOW","args":[]}]}`, data(x86_64, 0), allow},
		{"archMap", `{"defaultAction":"SCMP_ACT_ALLOW","archMap":[{"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86"]},
			{"architecture":"SCMP_ARCH_AARCH64","subArchitectures":["SCMP_ARCH_ARM"]}]}`, data(x86, 1), allow},
		{"names of other architectures", `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["s390_pci_mmio_read","riscv_flush_icache","swapcontext","read"],"action":"SCMP_ACT_ALLOW"}]}`, data(x86_64, 0), allow},

		// Sockets and IPC of 32-bit programs go through one call whose arguments are in memory.
		{"socketcall follows socket, allowed", `{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86"],"syscalls":[{"names":["socket"],"action":"SCMP_ACT_ALLOW"}]}`, data(x86, 102, 1), allow},
		{"but only that one", `{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86"],"syscalls":[{"names":["socket"],"action":"SCMP_ACT_ALLOW"}]}`, data(x86, 102, 2), eperm},
		{"socketcall follows socket, refused", `{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],"syscalls":[{"names":["socket"],"action":"SCMP_ACT_ERRNO"}]}`, data(x86, 102, 1), eperm},
		{"accept has no number of its own", `{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],"syscalls":[{"names":["accept"],"action":"SCMP_ACT_ERRNO"}]}`, data(x86, 102, 5), eperm},
		{"some families refused: all are, they can't be seen", `{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],"syscalls":[{"names":["socket"],"action":"SCMP_ACT_ERRNO","args":[{"index":0,"value":38,"op":"SCMP_CMP_EQ"}]}]}`, data(x86, 102, 1), eperm},
		{"some families allowed: none is", `{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86"],"syscalls":[{"names":["socket"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":38,"op":"SCMP_CMP_LT"}]}]}`, data(x86, 102, 1), eperm},
		{"a profile that names socketcall decides", `{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86"],"syscalls":[{"names":["socket"],"action":"SCMP_ACT_ALLOW"},{"names":["socketcall"],"action":"SCMP_ACT_ERRNO"}]}`, data(x86, 102, 1), eperm},
		{"ipc follows shmat", `{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],"syscalls":[{"names":["shmat"],"action":"SCMP_ACT_ERRNO"}]}`, data(x86, 117, 21), eperm},
		{"whatever version it says", `{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],"syscalls":[{"names":["shmat"],"action":"SCMP_ACT_ERRNO"}]}`, data(x86, 117, 1<<16|21), eperm},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := mustCompile(t, parseProfile(t, tt.profile, "amd64"), "amd64")
			if got, _ := m.Run(tt.call); got != tt.want {
				t.Errorf("got %#x, want %#x", got, tt.want)
			}
		})
	}
}

// arm's private calls lie far above the others: what is between is new, what is there is not.
func TestArmPrivateCalls(t *testing.T) {
	m := mustCompile(t, mustDefault(t, nil, "arm64"), "arm64")
	for nr, want := range map[uint32]uint32{
		0xf0001: unix.SECCOMP_RET_ALLOW, 0xf0005: unix.SECCOMP_RET_ALLOW, 0xf0003: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM),
		600: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS), 0xeffff: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS),
	} {
		if got, _ := m.Run(data(arm, nr)); got != want {
			t.Errorf("%#x: got %#x, want %#x", nr, got, want)
		}
	}
}

func TestDockerConditions(t *testing.T) {
	const profile = `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
		{"names":["chroot"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_CHROOT"]}},
		{"names":["mount"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_ADMIN","CAP_SYS_CHROOT"]}},
		{"names":["ptrace"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"4.8"}},
		{"names":["bpf"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"200.0"}},
		{"names":["kcmp"],"action":"SCMP_ACT_ALLOW","excludes":{"minKernel":"200.0"}},
		{"names":["acct"],"action":"SCMP_ACT_ALLOW","excludes":{"caps":["CAP_SYS_CHROOT"]}},
		{"names":["arch_prctl"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["amd64","x32"]}},
		{"names":["modify_ldt"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["arm64"]}},
		{"names":["iopl"],"action":"SCMP_ACT_ALLOW","excludes":{"arches":["amd64"]}},
		{"names":["removexattrat"],"action":"SCMP_ACT_ALLOW"}]}`
	tests := []struct {
		call    string
		caps    []string
		allowed bool
	}{
		{"chroot", nil, false},
		{"chroot", []string{"CAP_SYS_CHROOT"}, true},
		{"mount", []string{"CAP_SYS_CHROOT"}, false},
		{"mount", []string{"CAP_SYS_CHROOT", "CAP_SYS_ADMIN"}, true},
		{"ptrace", nil, true},
		{"bpf", nil, false},
		{"kcmp", nil, true},
		{"acct", nil, true},
		{"acct", []string{"CAP_SYS_CHROOT"}, false},
		{"arch_prctl", nil, true},
		{"modify_ldt", nil, false},
		{"iopl", nil, false},
	}
	for _, tt := range tests {
		m := mustCompile(t, parseProfile(t, profile, "amd64", tt.caps...), "amd64")
		got, _ := m.Run(data(x86_64, uint32(callIndex()[tt.call].numbers[x86_64])))
		if (got == unix.SECCOMP_RET_ALLOW) != tt.allowed {
			t.Errorf("%s with %v: got %#x, want allowed %v", tt.call, tt.caps, got, tt.allowed)
		}
	}
}

// SEC-31 (CVE-2023-2431): no bad profile is taken, and none means unconfined.
func TestLoadFile(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o666); err != nil {
		t.Fatal(err)
	}
	const rule = `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[%s]}`
	tests := []struct {
		name, path string
		err        error
	}{
		{"empty path", "", ErrInvalid},
		{"relative path", "profile.json", ErrInvalid},
		{"missing", filepath.Join(dir, "missing"), os.ErrNotExist},
		{"directory", dir, ErrInvalid},
		{"FIFO", fifo, ErrInvalid},
		{"device", "/dev/null", ErrInvalid},
		{"too large", write("large", strings.Repeat(" ", maxFile)+"{}"), ErrInvalid},
		{"empty file", write("empty", ""), ErrInvalid},
		{"no JSON", write("text", "allow everything"), ErrInvalid},
		{"rubbish at the end", write("rubbish", `{"defaultAction":"SCMP_ACT_ALLOW"} x`), ErrInvalid},
		{"null", write("null", "null"), ErrInvalid},
		{"nothing in it", write("nothing", "{}"), ErrInvalid},
		{"an array", write("array", "[]"), ErrInvalid},
		{"no default", write("nodefault", `{"syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]}`), ErrInvalid},
		{"unknown default", write("default", `{"defaultAction":"SCMP_ACT_MAYBE"}`), ErrInvalid},
		{"unknown action", write("action", fmt.Sprintf(rule, `{"names":["read"],"action":"ALLOW"}`)), ErrInvalid},
		{"no action", write("noaction", fmt.Sprintf(rule, `{"names":["read"]}`)), ErrInvalid},
		{"unknown call", write("call", fmt.Sprintf(rule, `{"names":["read","raed"],"action":"SCMP_ACT_ALLOW"}`)), ErrInvalid},
		{"unknown call in a rule that is redundant", write("redundant", fmt.Sprintf(rule, `{"names":["raed"],"action":"SCMP_ACT_ERRNO"}`)), ErrInvalid},
		{"unknown call in a rule that does not apply", write("excluded", fmt.Sprintf(rule, `{"names":["raed"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["s390x"]}}`)), ErrInvalid},
		{"no names", write("nonames", fmt.Sprintf(rule, `{"names":[],"action":"SCMP_ACT_ALLOW"}`)), ErrInvalid},
		{"null rule", write("nullrule", fmt.Sprintf(rule, `null`)), ErrInvalid},
		{"name and names", write("names", fmt.Sprintf(rule, `{"name":"read","names":["write"],"action":"SCMP_ACT_ALLOW"}`)), ErrInvalid},
		{"unknown operator", write("op", fmt.Sprintf(rule, `{"names":["read"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":1,"op":"=="}]}`)), ErrInvalid},
		{"seventh argument", write("arg", fmt.Sprintf(rule, `{"names":["read"],"action":"SCMP_ACT_ALLOW","args":[{"index":6,"value":1,"op":"SCMP_CMP_EQ"}]}`)), ErrInvalid},
		{"unknown architecture", write("arch", `{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_Z80"]}`), ErrInvalid},
		{"architectures and archMap", write("archs", `{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],"archMap":[{"architecture":"SCMP_ARCH_X86_64"}]}`), ErrInvalid},
		{"unknown flag", write("flag", `{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_NEW_LISTENER"]}`), ErrInvalid},
		{"notify", write("notify", fmt.Sprintf(rule, `{"names":["read"],"action":"SCMP_ACT_NOTIFY"}`)), ErrUnsupported},
		{"listener", write("listener", `{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/run/x"}`), ErrUnsupported},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			begin := time.Now()
			p, err := LoadFile(tt.path)
			if p != nil || !errors.Is(err, tt.err) {
				t.Errorf("got %+v, %v, want %v", p, err, tt.err)
			}
			if d := time.Since(begin); d > 5*time.Second {
				t.Errorf("took %v", d)
			}
		})
	}
	path := write("good", fmt.Sprintf(rule, `{"names":["read"],"action":"SCMP_ACT_ALLOW"}`))
	link := filepath.Join(dir, "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{path, link} {
		p, err := LoadFile(path)
		if err != nil || len(p.Syscalls) != 1 {
			t.Errorf("got %+v, %v", p, err)
		}
	}
}

// Docker's own default profile is a valid file, and means what Default means, but for what Default says it changes.
func TestDockerDefaultAsFile(t *testing.T) {
	text, err := json.Marshal(moby.DefaultProfile())
	if err != nil {
		t.Fatal(err)
	}
	ours := mustCompile(t, mustDefault(t, default14, "amd64"), "amd64")
	docker := mustCompile(t, parseProfile(t, string(text), "amd64", default14...), "amd64")
	for _, a := range families["amd64"] {
		for i := range calls {
			n := calls[i].numbers[a]
			if n == none || slices.Contains([]string{"socketcall", "lsm_get_self_attr", "lsm_list_modules", "lsm_set_self_attr"}, calls[i].name) {
				continue
			}
			got, _ := docker.Run(data(a, uint32(n), unix.AF_INET))
			want, _ := ours.Run(data(a, uint32(n), unix.AF_INET))
			if got != want {
				t.Errorf("%s %s: Docker %#x, ours %#x", archNames[a], calls[i].name, got, want)
			}
		}
	}
}

func TestFlags(t *testing.T) {
	tests := []struct {
		in   []specs.LinuxSeccompFlag
		want uint32
		err  error
	}{
		{nil, unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, nil},
		{[]specs.LinuxSeccompFlag{}, unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, nil},
		{[]specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog, specs.LinuxSeccompFlagSpecAllow}, unix.SECCOMP_FILTER_FLAG_LOG | unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, nil},
		{[]specs.LinuxSeccompFlag{"SECCOMP_FILTER_FLAG_TSYNC"}, 0, nil},
		{[]specs.LinuxSeccompFlag{specs.LinuxSeccompFlagWaitKillableRecv}, 0, ErrUnsupported},
		{[]specs.LinuxSeccompFlag{"LOG"}, 0, ErrInvalid},
	}
	for _, tt := range tests {
		got, err := filterFlags(tt.in)
		if got != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("%q: got %#x, %v, want %#x, %v", tt.in, got, err, tt.want, tt.err)
		}
	}
}

func TestCompileErrors(t *testing.T) {
	if _, err := Compile(nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("nil: got %v, want ErrInvalid", err)
	}
	if _, err := Compile(&specs.LinuxSeccomp{}); !errors.Is(err, ErrInvalid) {
		t.Errorf("empty: got %v, want ErrInvalid", err)
	}
	if _, err := CompileFor(&specs.LinuxSeccomp{DefaultAction: specs.ActAllow}, "riscv64"); !errors.Is(err, ErrUnsupported) {
		t.Errorf("riscv64: got %v, want ErrUnsupported", err)
	}
	// More rules than a program can hold.
	p := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno}
	for i := range uint64(2000) {
		p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: []string{"read"}, Action: specs.ActAllow,
			Args: []specs.LinuxSeccompArg{{Index: uint(i % 2), Value: i << 20, Op: specs.OpEqualTo}}})
	}
	if _, err := Compile(p); !errors.Is(err, ErrUnsupported) {
		t.Errorf("2000 rules: got %v, want ErrUnsupported", err)
	}
}

func TestCacheIsBounded(t *testing.T) {
	if _, err := native(runtime.GOARCH); err != nil {
		t.Skip(err)
	}
	var first Program
	for i := range uint64(3 * cacheSize) {
		p := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow,
			Args: []specs.LinuxSeccompArg{{Value: i, Op: specs.OpEqualTo}}}}}
		a, err := Compile(p)
		if err != nil {
			t.Fatal(err)
		}
		b, err := Compile(p)
		if err != nil {
			t.Fatal(err)
		}
		if &a.BPF[0] != &b.BPF[0] {
			t.Fatal("compiled twice")
		}
		if i == 0 {
			first = a
		} else if &a.BPF[0] == &first.BPF[0] {
			t.Fatal("another profile's program")
		}
	}
	if len(cache.programs) != cacheSize || len(cache.order) != cacheSize {
		t.Errorf("got %d programs, %d keys, want %d", len(cache.programs), len(cache.order), cacheSize)
	}
}

// judge is what a policy says of a call, rule by rule: the model of the program.
func (p *policy) judge(a arch, nr uint32, args [6]uint64) uint32 {
	for i := range p.tables {
		t := &p.tables[i]
		if t.arch != a {
			continue
		}
		v := t.verdicts[nr]
		switch {
		case v == nil && t.hasNewest && nr > t.newest && !(a == arm && nr >= armPrivate):
			return unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
		case v == nil:
			return p.def
		case v.fixed:
			return v.action
		}
		for _, r := range v.rules {
			if !slices.ContainsFunc(r.conditions, func(c condition) bool {
				v, value := args[c.arg], c.value
				if c.op == specs.OpMaskedEqual {
					value &= c.mask
				}
				if !a.wide() {
					v, value = uint64(uint32(v)), uint64(uint32(value))
					c.mask = uint64(uint32(c.mask))
				}
				c.value = value
				return !c.matches(v)
			}) {
				return r.action
			}
		}
		return p.def
	}
	return unix.SECCOMP_RET_KILL_THREAD
}

// check compares a program with its model around everything the profile mentions.
func check(t *testing.T, p *specs.LinuxSeccomp, goarch string) {
	t.Helper()
	program, err := CompileFor(p, goarch)
	if err != nil {
		return // refused: fine
	}
	m, err := bpf.Load(program.BPF)
	if err != nil {
		t.Fatal("the kernel would refuse the program:", err)
	}
	pol, err := newPolicy(p, families[goarch])
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for _, a := range families[goarch] {
		numbers := []uint32{0, 1, 2, 500, 512, 547, 548, 0xf0000, 0xf0007, 0x3fffffff}
		var table *table
		for i := range pol.tables {
			if pol.tables[i].arch == a {
				table = &pol.tables[i]
				numbers = append(numbers, table.newest, table.newest+1)
				for n := range table.verdicts {
					numbers = append(numbers, n, n+1, n-1)
				}
			}
		}
		for _, n := range numbers {
			if n >= x32Bit {
				continue
			}
			samples := [][6]uint64{{}}
			if table != nil && table.verdicts[n] != nil {
				var values []uint64
				for _, r := range table.verdicts[n].rules {
					for _, c := range r.conditions {
						values = append(values, c.value, c.value+1, c.value-1, c.mask, c.value|c.mask, c.value^1<<(rng.IntN(64)), uint64(uint32(c.value)))
					}
				}
				for range min(4*len(values), 60) {
					var s [6]uint64
					for i := range s {
						s[i] = values[rng.IntN(len(values))]
					}
					samples = append(samples, s)
				}
			}
			for _, args := range samples {
				got, _ := m.Run(data(a, n, args[:]...))
				if want := pol.judge(a, n, args); got != want {
					t.Fatalf("%s %d %#x: got %#x, want %#x", archNames[a], n, args, got, want)
				}
			}
		}
	}
}

// FuzzCompile: no file makes us panic, every program is one the kernel takes, and it does what the profile says.
func FuzzCompile(f *testing.F) {
	text, err := json.Marshal(moby.DefaultProfile())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	for _, seed := range []string{
		`{}`, `null`, `{"defaultAction":"SCMP_ACT_ALLOW"}`,
		`{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,"architectures":["SCMP_ARCH_X86","SCMP_ARCH_X32","SCMP_ARCH_ARM"],"syscalls":[
			{"names":["socket","bind","prctl"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":38,"op":"SCMP_CMP_LT"},{"index":1,"value":4294967296,"op":"SCMP_CMP_GE"}]},
			{"names":["prctl"],"action":"SCMP_ACT_LOG","args":[{"index":0,"value":255,"valueTwo":3,"op":"SCMP_CMP_MASKED_EQ"}]}]}`,
		`{"defaultAction":"SCMP_ACT_KILL","syscalls":[{"name":"personality","action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"},{"index":0,"value":18446744073709551615,"op":"SCMP_CMP_NE"}]}]}`,
		`{"defaultAction":"SCMP_ACT_TRACE","archMap":[{"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86"]}],"syscalls":[{"names":["read"],"action":"SCMP_ACT_ERRNO","errnoRet":4095,"excludes":{"caps":["CAP_X"],"minKernel":"3.1"}}]}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, goarch := range []string{"amd64", "arm64"} {
			p, err := parse(text, []string{"CAP_SYS_ADMIN"}, goarch)
			if err != nil {
				if !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrUnsupported) {
					t.Fatalf("got %v: neither invalid nor unsupported", err)
				}
				continue
			}
			check(t, p, goarch)
		}
	})
}

// FuzzRules makes valid profiles of random bytes: the fuzzer rarely finds names and operators by itself.
func FuzzRules(f *testing.F) {
	f.Add([]byte("seccomp"), uint64(1))
	f.Add(make([]byte, 600), uint64(2))
	operators := []specs.LinuxSeccompOperator{specs.OpEqualTo, specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpGreaterThan, specs.OpGreaterEqual, specs.OpMaskedEqual}
	acts := []specs.LinuxSeccompAction{specs.ActAllow, specs.ActErrno, specs.ActLog, specs.ActTrap, specs.ActKillProcess, specs.ActKill, specs.ActTrace}
	f.Fuzz(func(t *testing.T, recipe []byte, seed uint64) {
		if len(recipe) > 2000 {
			return
		}
		rng := rand.New(rand.NewPCG(seed, 3))
		p := &specs.LinuxSeccomp{DefaultAction: acts[seed%uint64(len(acts))], Architectures: []specs.Arch{specs.ArchX86, specs.ArchX32, specs.ArchARM}[:seed/7%4]}
		value := func() uint64 { return rng.Uint64() >> rng.IntN(64) }
		for len(recipe) >= 3 {
			s := specs.LinuxSyscall{Action: acts[int(recipe[0])%len(acts)]}
			for range 1 + recipe[1]%3 {
				s.Names = append(s.Names, calls[(int(recipe[2])+int(recipe[1])*rng.IntN(3))%len(calls)].name)
			}
			for range recipe[0] / 64 {
				s.Args = append(s.Args, specs.LinuxSeccompArg{Index: uint(rng.IntN(6)), Op: operators[rng.IntN(len(operators))], Value: value(), ValueTwo: value()})
			}
			p.Syscalls = append(p.Syscalls, s)
			recipe = recipe[3:]
		}
		check(t, p, "amd64")
		check(t, p, "arm64")
	})
}

func TestParseRelease(t *testing.T) {
	for in, want := range map[string]string{"6.18.5-gentoo": "6.18", "5.15.0-91-generic": "5.15", "4.8": "4.8", "6.1-rc5": "6.1", "7.0+": "7.0"} {
		if got, err := parseRelease(in); err != nil || got.String() != want {
			t.Errorf("%q: got %s, %v, want %s", in, got.String(), err, want)
		}
	}
	for _, in := range []string{"", "linux", "6", "6.", "a.b"} {
		if got, err := parseRelease(in); err == nil {
			t.Errorf("%q: got %v, want an error", in, got)
		}
	}
}

func BenchmarkDefault(b *testing.B) {
	for b.Loop() {
		mustDefault(b, default14, "amd64")
	}
}

func BenchmarkCompile(b *testing.B) {
	p := mustDefault(b, default14, "amd64")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := CompileFor(p, "amd64"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCompileCached(b *testing.B) {
	p := mustDefault(b, default14, runtime.GOARCH)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Compile(p); err != nil {
			b.Fatal(err)
		}
	}
}

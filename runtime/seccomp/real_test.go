//go:build amd64

package seccomp

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The tests of this file load programs into the kernel, in a child: a filter can't be taken off again. No
// root is needed: no_new_privs is set.

// childEnv says to TestMain that this process is the child, and which filter it loads.
const childEnv = "CRISP_SECCOMP_TEST_CHILD"

func TestMain(m *testing.M) {
	if which := os.Getenv(childEnv); which != "" {
		if err := child(which); err != nil {
			fmt.Println("child:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// probe is a call to make under the default profile: what comes back must not be mistaken for an answer of the
// kernel itself, so calls that are let through have arguments that fail in another way.
type probe struct {
	name string
	abi  arch
	nr   uintptr
	args [3]uintptr
	want unix.Errno // 0: succeeds
}

const bad = ^uintptr(0) // no address, no descriptor

var probes = []probe{
	{"getpid", x86_64, unix.SYS_GETPID, [3]uintptr{}, 0},
	{"read of no descriptor", x86_64, unix.SYS_READ, [3]uintptr{bad}, unix.EBADF},
	{"socket AF_UNIX", x86_64, unix.SYS_SOCKET, [3]uintptr{unix.AF_UNIX, unix.SOCK_STREAM}, 0},
	{"socket AF_ALG", x86_64, unix.SYS_SOCKET, [3]uintptr{unix.AF_ALG, unix.SOCK_SEQPACKET}, unix.EPERM},
	{"socket AF_VSOCK", x86_64, unix.SYS_SOCKET, [3]uintptr{unix.AF_VSOCK, unix.SOCK_STREAM}, unix.EPERM},
	{"socket AF_ALG in disguise", x86_64, unix.SYS_SOCKET, [3]uintptr{1<<32 | unix.AF_ALG, unix.SOCK_SEQPACKET}, unix.EPERM},
	{"socket 60", x86_64, unix.SYS_SOCKET, [3]uintptr{60, unix.SOCK_STREAM}, unix.EAFNOSUPPORT},
	{"clone CLONE_NEWUSER", x86_64, unix.SYS_CLONE, [3]uintptr{unix.CLONE_NEWUSER}, unix.EPERM},
	{"clone3", x86_64, unix.SYS_CLONE3, [3]uintptr{bad, 0}, unix.ENOSYS},
	{"unshare", x86_64, unix.SYS_UNSHARE, [3]uintptr{0}, unix.EPERM},
	{"setns", x86_64, unix.SYS_SETNS, [3]uintptr{bad}, unix.EPERM},
	{"mount", x86_64, unix.SYS_MOUNT, [3]uintptr{}, unix.EPERM},
	{"pivot_root", x86_64, unix.SYS_PIVOT_ROOT, [3]uintptr{}, unix.EPERM},
	{"keyctl", x86_64, unix.SYS_KEYCTL, [3]uintptr{99}, unix.EPERM},
	{"add_key", x86_64, unix.SYS_ADD_KEY, [3]uintptr{}, unix.EPERM},
	{"bpf", x86_64, unix.SYS_BPF, [3]uintptr{bad}, unix.EPERM},
	{"perf_event_open", x86_64, unix.SYS_PERF_EVENT_OPEN, [3]uintptr{}, unix.EPERM},
	{"userfaultfd", x86_64, unix.SYS_USERFAULTFD, [3]uintptr{bad}, unix.EPERM},
	{"io_uring_setup", x86_64, unix.SYS_IO_URING_SETUP, [3]uintptr{}, unix.EPERM},
	{"kexec_load", x86_64, unix.SYS_KEXEC_LOAD, [3]uintptr{0, bad}, unix.EPERM},
	{"open_by_handle_at", x86_64, unix.SYS_OPEN_BY_HANDLE_AT, [3]uintptr{}, unix.EPERM},
	{"personality ADDR_NO_RANDOMIZE", x86_64, unix.SYS_PERSONALITY, [3]uintptr{0x40000}, unix.EPERM},
	{"personality ask", x86_64, unix.SYS_PERSONALITY, [3]uintptr{0xffffffff}, 0},
	{"number 1000", x86_64, 1000, [3]uintptr{}, unix.ENOSYS},

	{"x32 socket AF_ALG", x32, 41, [3]uintptr{unix.AF_ALG}, unix.EPERM},
	{"x32 unshare", x32, 272, [3]uintptr{0}, unix.EPERM},
	{"x32 number 1000", x32, 1000, [3]uintptr{}, unix.ENOSYS},

	{"i386 getpid", x86, 20, [3]uintptr{}, 0},
	{"i386 socket AF_ALG", x86, 359, [3]uintptr{unix.AF_ALG, unix.SOCK_SEQPACKET}, unix.EPERM},
	{"i386 socket AF_UNIX", x86, 359, [3]uintptr{unix.AF_UNIX, unix.SOCK_STREAM}, 0},
	{"i386 socketcall", x86, 102, [3]uintptr{1}, unix.EPERM},
	{"i386 unshare", x86, 310, [3]uintptr{0}, unix.EPERM},
	{"i386 add_key", x86, 286, [3]uintptr{}, unix.EPERM},
	{"i386 clone3", x86, 435, [3]uintptr{}, unix.ENOSYS},
	{"i386 mount", x86, 21, [3]uintptr{}, unix.EPERM},
	{"i386 number 1000", x86, 1000, [3]uintptr{}, unix.ENOSYS},
}

// do makes the call of a probe.
func (p *probe) do(int80 func(nr, a, b, c uint32) int32) unix.Errno {
	switch p.abi {
	case x86:
		if ret := int80(uint32(p.nr), uint32(p.args[0]), uint32(p.args[1]), uint32(p.args[2])); ret < 0 && ret > -maxErrno {
			return unix.Errno(-ret)
		}
		return 0
	case x32:
		_, _, errno := unix.RawSyscall(p.nr|x32Bit, p.args[0], p.args[1], p.args[2])
		return errno
	default:
		_, _, errno := unix.RawSyscall(p.nr, p.args[0], p.args[1], p.args[2])
		return errno
	}
}

// newInt80 makes a function that calls the kernel as 32-bit programs do. Its code is written by hand into a page of its
// own: Go's assembler is not for tests.
func newInt80() (func(nr, a, b, c uint32) int32, error) {
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_32BIT)
	if err != nil {
		return nil, err
	}
	// Go passes the arguments in rax, rbx, rcx, rdi and expects the result in rax. No register but
	// rsp, rbp and r14 needs keeping (cmd/compile/abi-internal.md).
	copy(page, []byte{
		0x89, 0xfa, // mov edx, edi
		0xcd, 0x80, // int 0x80
		0x48, 0x31, 0xff, // xor rdi, rdi
		0x66, 0x45, 0x0f, 0xef, 0xff, // pxor xmm15, xmm15
		0xc3, // ret
	})
	code := unsafe.Pointer(&page[0])
	closure := &code // a func value points to a pointer to code
	return *(*func(nr, a, b, c uint32) int32)(unsafe.Pointer(&closure)), nil
}

// load installs a program on the calling thread.
func load(program Program) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	prog := unix.SockFprog{Len: uint16(len(program.BPF) / unix.SizeofSockFilter), Filter: (*unix.SockFilter)(unsafe.Pointer(&program.BPF[0]))}
	if _, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, uintptr(program.Flags), uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	return nil
}

// child loads a filter and tries the probes on the same thread.
func child(which string) error {
	runtime.LockOSThread()
	int80, err := newInt80()
	if err != nil {
		return err
	}
	profile, err := Default(default14, "amd64")
	if err != nil {
		return err
	}
	program, err := Compile(profile)
	if err != nil {
		return err
	}
	if which == "default" {
		if err := load(program); err != nil {
			return err
		}
	}
	status, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return err
	}
	mode := bytes.Contains(status, []byte("Seccomp:\t2"))
	fmt.Println("filter", mode)
	for i := range probes {
		if which != "default" && probes[i].nr == unix.SYS_CLONE && probes[i].abi == x86_64 {
			continue // it would be a fork
		}
		fmt.Printf("%s=%d\n", probes[i].name, probes[i].do(int80))
	}
	return nil
}

// runChild returns what the probes got.
func runChild(t *testing.T, which string) map[string]string {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+which)
	out, err := cmd.CombinedOutput()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && bytes.Contains(out, []byte("x32 number 1000=")) && !bytes.Contains(out, []byte("i386 getpid=")) {
			t.Skipf("this kernel has no int 0x80: %v", err)
		}
		t.Fatalf("%v\n%s", err, out)
	}
	got := map[string]string{}
	for line := range strings.Lines(string(out)) {
		if i := strings.LastIndexByte(line, '='); i >= 0 {
			got[line[:i]] = strings.TrimSpace(line[i+1:])
		} else if name, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			got[name] = value
		}
	}
	return got
}

// SEC-32: the default profile in a real kernel, by all three doors.
func TestDefaultInKernel(t *testing.T) {
	got := runChild(t, "default")
	if got["filter"] != "true" {
		t.Error("the kernel says that there is no filter")
	}
	for _, p := range probes {
		if want := fmt.Sprint(int(p.want)); got[p.name] != want {
			t.Errorf("%s: got errno %s, want %s (%s)", p.name, got[p.name], want, unix.ErrnoName(p.want))
		}
	}
}

package seccomp

import (
	"slices"

	moby "github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// lastFamily leaves room: AF_MAX was 46 in Linux 6.18.
const lastFamily = 63

// Default is the profile RuntimeDefault for a container with the bounding set caps
// ("CAP_CHOWN", …) on arch (a GOARCH): containerd's, which is Docker's, with these differences
// to Docker's:
//
//   - socket(2) for all address families but AF_ALG (CVE-2026-31431, "Copy Fail") and AF_VSOCK (it
//     reaches the hypervisor past all network policy), as containerd; Docker lists those that current kernels
//     have. containerd's rule for the newer ones, "more than 40", compares 64 bits where the kernel looks at 32:
//     socket(1<<32 | AF_ALG) gets through. Here each number up to lastFamily is a rule.
//   - The lsm_* calls for everybody.
//   - socketcall(2) for nobody: a filter cannot see which family it asks for, so a 32-bit program could get
//     around the first (in containerd it can). 32-bit programs use socket(2) itself since Linux 4.3.
func Default(caps []string, arch string) (*specs.LinuxSeccomp, error) {
	p := moby.DefaultProfile()
	calls := make([]*moby.Syscall, 0, len(p.Syscalls))
	for _, s := range p.Syscalls {
		if slices.Contains(s.Names, "socket") {
			continue
		}
		s.Names = slices.DeleteFunc(s.Names, func(name string) bool { return name == "socketcall" })
		calls = append(calls, s)
	}
	calls = append(calls, allow(nil, "lsm_get_self_attr", "lsm_list_modules", "lsm_set_self_attr"))
	calls = append(calls, allow([]specs.LinuxSeccompArg{{Op: specs.OpLessThan, Value: unix.AF_ALG}}, "socket"))
	for family := uint64(unix.AF_ALG + 1); family <= lastFamily; family++ {
		if family != unix.AF_VSOCK {
			calls = append(calls, allow([]specs.LinuxSeccompArg{{Op: specs.OpEqualTo, Value: family}}, "socket"))
		}
	}
	// Said in so many words, or the rules for bind(2) and others would hold for it too.
	calls = append(calls, &moby.Syscall{LinuxSyscall: specs.LinuxSyscall{
		Names: []string{socketcall}, Action: p.DefaultAction, ErrnoRet: p.DefaultErrnoRet,
	}})
	p.Syscalls = calls
	return expand(p, caps, arch)
}

func allow(args []specs.LinuxSeccompArg, names ...string) *moby.Syscall {
	return &moby.Syscall{LinuxSyscall: specs.LinuxSyscall{Names: names, Action: specs.ActAllow, Args: args}}
}

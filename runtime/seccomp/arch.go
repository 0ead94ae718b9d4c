package seccomp

import (
	"fmt"
	"slices"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// arch is an architecture as a filter sees it: a column of the table of calls.
type arch uint8

const (
	x86_64 arch = iota
	x86
	x32
	aarch64
	arm
	arches
)

// call is a row of the table of calls.
type call struct {
	name    string
	numbers [arches]int32
}

// none is the number of a call that an architecture lacks.
const none = -1

// x32Bit marks the calls of x32, which share AUDIT_ARCH_X86_64 with x86_64.
const x32Bit = 0x40000000

// armPrivate is where ARM's private calls begin, far above the common ones.
const armPrivate = 0xf0000

// family is what one machine can run: the native architecture first.
type family []arch

var families = map[string]family{
	"amd64": {x86_64, x86, x32},
	"arm64": {aarch64, arm},
}

// archOf are the names that profiles use. Those of other machines say nothing about ours.
var archOf = map[specs.Arch]arch{
	specs.ArchX86_64: x86_64, specs.ArchX86: x86, specs.ArchX32: x32, specs.ArchAARCH64: aarch64, specs.ArchARM: arm,
}

var foreignArches = []specs.Arch{
	specs.ArchMIPS, specs.ArchMIPS64, specs.ArchMIPS64N32, specs.ArchMIPSEL, specs.ArchMIPSEL64, specs.ArchMIPSEL64N32,
	specs.ArchPPC, specs.ArchPPC64, specs.ArchPPC64LE, specs.ArchS390, specs.ArchS390X, specs.ArchPARISC, specs.ArchPARISC64,
	specs.ArchRISCV64, specs.ArchLOONGARCH64, specs.ArchM68K, specs.ArchSH, specs.ArchSHEB,
}

// audit is the value of seccomp_data.arch.
func (a arch) audit() uint32 {
	switch a {
	case x86:
		return unix.AUDIT_ARCH_I386
	case aarch64:
		return unix.AUDIT_ARCH_AARCH64
	case arm:
		return unix.AUDIT_ARCH_ARM
	default:
		return unix.AUDIT_ARCH_X86_64
	}
}

// wide says whether both halves of arguments are compared. libseccomp takes x32 for a 32-bit architecture.
func (a arch) wide() bool { return a == x86_64 || a == aarch64 }

// native returns the family of a GOARCH.
func native(goarch string) (family, error) {
	f, ok := families[goarch]
	if !ok {
		return nil, fmt.Errorf("%w: no system call table for %s", ErrUnsupported, goarch)
	}
	return f, nil
}

// pick returns those of a family that a profile is for, the native one always.
func (f family) pick(names []specs.Arch) ([]arch, error) {
	picked := []arch{f[0]}
	for _, name := range names {
		a, ok := archOf[name]
		if !ok {
			if !slices.Contains(foreignArches, name) {
				return nil, fmt.Errorf("%w: unknown architecture %.64q", ErrInvalid, name)
			}
			continue
		}
		if slices.Contains(f, a) && !slices.Contains(picked, a) {
			picked = append(picked, a)
		}
	}
	return picked, nil
}

// callIndex finds rows of the table.
var callIndex = sync.OnceValue(func() map[string]*call {
	m := make(map[string]*call, len(calls))
	for i := range calls {
		m[calls[i].name] = &calls[i]
	}
	return m
})

// lookUp finds a call by name, on whatever architecture it exists.
func lookUp(name string) (*call, error) {
	c, ok := callIndex()[name]
	if !ok {
		return nil, fmt.Errorf("%w: unknown system call %.64q", ErrInvalid, name)
	}
	return c, nil
}

// via says how a call of x86 is also reached: through another one, whose first argument selects it.
type via struct {
	mux      string // socketcall or ipc
	selector uint64
}

const socketcall, ipc = "socketcall", "ipc"

// selectorMask are the bits of the first argument that select: ipc(2) takes a version in the upper ones.
var selectorMask = map[string]uint64{socketcall: 0xffffffff, ipc: 0xffff}

// viaX86 is by name. The selectors are those of linux/net.h and linux/ipc.h.
var viaX86 = map[string]via{
	"socket": {socketcall, 1}, "bind": {socketcall, 2}, "connect": {socketcall, 3}, "listen": {socketcall, 4},
	"accept": {socketcall, 5}, "getsockname": {socketcall, 6}, "getpeername": {socketcall, 7},
	"socketpair": {socketcall, 8}, "send": {socketcall, 9}, "recv": {socketcall, 10}, "sendto": {socketcall, 11},
	"recvfrom": {socketcall, 12}, "shutdown": {socketcall, 13}, "setsockopt": {socketcall, 14},
	"getsockopt": {socketcall, 15}, "sendmsg": {socketcall, 16}, "recvmsg": {socketcall, 17},
	"accept4": {socketcall, 18}, "recvmmsg": {socketcall, 19}, "sendmmsg": {socketcall, 20},

	"semop": {ipc, 1}, "semget": {ipc, 2}, "semctl": {ipc, 3}, "semtimedop": {ipc, 4}, "msgsnd": {ipc, 11},
	"msgrcv": {ipc, 12}, "msgget": {ipc, 13}, "msgctl": {ipc, 14}, "shmat": {ipc, 21}, "shmdt": {ipc, 22},
	"shmget": {ipc, 23}, "shmctl": {ipc, 24},
}

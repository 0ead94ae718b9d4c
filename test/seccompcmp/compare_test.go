// Package seccompcmp compares the programs of runtime/seccomp with those of libseccomp, built from the same
// profiles the way runc does, by running both for every call of every architecture and for the
// arguments at which a comparison can change its mind.
package seccompcmp

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/seccomp/libseccomp-golang"
	"golang.org/x/sys/unix"

	crisp "github.com/crisp-cri/crisp/runtime/seccomp"
	"github.com/crisp-cri/crisp/runtime/seccomp/bpf"
	"github.com/crisp-cri/crisp/runtime/seccomp/seccomptest"
)

type machine struct {
	goarch string
	arches []archInfo // the native one first
}

type archInfo struct {
	name  specs.Arch
	lib   seccomp.ScmpArch
	audit uint32
	bit   uint32 // x32
}

var machines = []machine{
	{"amd64", []archInfo{
		{specs.ArchX86_64, seccomp.ArchAMD64, unix.AUDIT_ARCH_X86_64, 0},
		{specs.ArchX86, seccomp.ArchX86, unix.AUDIT_ARCH_I386, 0},
		{specs.ArchX32, seccomp.ArchX32, unix.AUDIT_ARCH_X86_64, 0x40000000},
	}},
	{"arm64", []archInfo{
		{specs.ArchAARCH64, seccomp.ArchARM64, unix.AUDIT_ARCH_AARCH64, 0},
		{specs.ArchARM, seccomp.ArchARM, unix.AUDIT_ARCH_ARM, 0},
	}},
}

var actions = map[specs.LinuxSeccompAction]seccomp.ScmpAction{
	specs.ActKill: seccomp.ActKillThread, specs.ActKillThread: seccomp.ActKillThread, specs.ActKillProcess: seccomp.ActKillProcess,
	specs.ActTrap: seccomp.ActTrap, specs.ActErrno: seccomp.ActErrno, specs.ActTrace: seccomp.ActTrace,
	specs.ActAllow: seccomp.ActAllow, specs.ActLog: seccomp.ActLog,
}

var ops = map[specs.LinuxSeccompOperator]seccomp.ScmpCompareOp{
	specs.OpNotEqual: seccomp.CompareNotEqual, specs.OpLessThan: seccomp.CompareLess, specs.OpLessEqual: seccomp.CompareLessOrEqual,
	specs.OpEqualTo: seccomp.CompareEqual, specs.OpGreaterEqual: seccomp.CompareGreaterEqual,
	specs.OpGreaterThan: seccomp.CompareGreater, specs.OpMaskedEqual: seccomp.CompareMaskedEqual,
}

func libAction(a specs.LinuxSeccompAction, errno *uint) seccomp.ScmpAction {
	out := actions[a]
	if a == specs.ActErrno || a == specs.ActTrace {
		code := int16(unix.EPERM)
		if errno != nil {
			code = int16(*errno)
		}
		out = out.SetReturnCode(code)
	}
	return out
}

// reference is runc's InitSeccomp (libcontainer/seccomp/seccomp_linux.go) without loading.
func reference(t testing.TB, p *specs.LinuxSeccomp, m machine) *bpf.Machine {
	t.Helper()
	def := libAction(p.DefaultAction, p.DefaultErrnoRet)
	filter, err := seccomp.NewFilter(def)
	if err != nil {
		t.Fatal(err)
	}
	defer filter.Release()
	// The native architecture of the machine that we play.
	if m.arches[0].lib != seccomp.ArchAMD64 {
		if err := filter.AddArch(m.arches[0].lib); err != nil {
			t.Fatal(err)
		}
		if err := filter.RemoveArch(seccomp.ArchAMD64); err != nil {
			t.Fatal(err)
		}
	}
	for _, a := range m.arches[1:] {
		if slices.Contains(p.Architectures, a.name) {
			if err := filter.AddArch(a.lib); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, s := range p.Syscalls {
		act := libAction(s.Action, s.ErrnoRet)
		for _, name := range s.Names {
			number, err := seccomp.GetSyscallFromName(name)
			if err != nil {
				continue // runc: unknown calls are ignored
			}
			if act == def {
				continue // runc: "the rule is redundant"
			}
			if err := addRules(filter, number, act, s.Args); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
	}
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := filter.ExportBPF(f); err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	out, err := bpf.Load(program)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func addRules(filter *seccomp.ScmpFilter, number seccomp.ScmpSyscall, act seccomp.ScmpAction, args []specs.LinuxSeccompArg) error {
	if len(args) == 0 {
		return filter.AddRule(number, act)
	}
	var conditions []seccomp.ScmpCondition
	var seen [6]int
	for _, a := range args {
		c, err := seccomp.MakeCondition(a.Index, ops[a.Op], a.Value, a.ValueTwo)
		if err != nil {
			return err
		}
		conditions = append(conditions, c)
		seen[a.Index]++
	}
	if slices.Max(seen[:]) < 2 {
		return filter.AddRuleConditional(number, act, conditions)
	}
	for _, c := range conditions {
		if err := filter.AddRuleConditional(number, act, []seccomp.ScmpCondition{c}); err != nil {
			return err
		}
	}
	return nil
}

// conditionsOf are the conditions a profile has for a call of an architecture.
func conditionsOf(p *specs.LinuxSeccomp, a archInfo, nr uint32) []specs.LinuxSeccompArg {
	name, err := seccomp.ScmpSyscall(nr).GetNameByArch(a.lib)
	if err != nil {
		return nil
	}
	var l []specs.LinuxSeccompArg
	for _, s := range p.Syscalls {
		if slices.Contains(s.Names, name) {
			l = append(l, s.Args...)
		}
	}
	return l
}

// numberOf are libseccomp's numbers of an architecture by name, without x32's bit. (Its own look-up by name gives negative numbers for calls
// that x86 also makes through socketcall and ipc.)
func numberOf(a archInfo) map[string]uint32 {
	m := map[string]uint32{}
	for n := range uint32(1000) {
		if name, err := seccomp.ScmpSyscall(n | a.bit).GetNameByArch(a.lib); err == nil {
			m[name] = n
		}
	}
	return m
}

// newest is the largest number that a profile names.
func newest(p *specs.LinuxSeccomp, numbers map[string]uint32) int64 {
	largest := int64(-1)
	for _, s := range p.Syscalls {
		for _, name := range s.Names {
			if n, ok := numbers[name]; ok {
				largest = max(largest, int64(n))
			}
		}
	}
	return largest
}

// model is what a profile means for one call, read directly; ok is false where it does not say (calls of x86
// through socketcall and ipc). It is the judge where the two programs differ.
func model(p *specs.LinuxSeccomp, a archInfo, name string, args [6]uint64) (ret uint32, ok bool) {
	def := code(p.DefaultAction, p.DefaultErrnoRet)
	if a.name == specs.ArchX86 && (name == "socketcall" || name == "ipc") {
		return 0, false
	}
	wide := a.name == specs.ArchX86_64 || a.name == specs.ArchAARCH64
	matches := func(c specs.LinuxSeccompArg) bool {
		v, value, mask := args[c.Index], c.Value, ^uint64(0)
		if c.Op == specs.OpMaskedEqual {
			mask, value = c.Value, c.ValueTwo&c.Value
		}
		if !wide {
			v, value = uint64(uint32(v)), uint64(uint32(value))
		}
		switch c.Op {
		case specs.OpNotEqual:
			return v != value
		case specs.OpLessThan:
			return v < value
		case specs.OpLessEqual:
			return v <= value
		case specs.OpGreaterThan:
			return v > value
		case specs.OpGreaterEqual:
			return v >= value
		}
		return v&mask == value
	}
	conditional, found := def, false
	for _, s := range p.Syscalls {
		act := code(s.Action, s.ErrnoRet)
		if !slices.Contains(s.Names, name) || act == def {
			continue
		}
		if len(s.Args) == 0 {
			return act, true
		}
		var seen [6]int
		all, some := true, false
		for _, c := range s.Args {
			seen[c.Index]++
			all = all && matches(c)
			some = some || matches(c)
		}
		if !found && (all || some && slices.Max(seen[:]) > 1) {
			conditional, found = act, true
		}
	}
	return conditional, true
}

// code is what a filter returns for an action.
func code(a specs.LinuxSeccompAction, errno *uint) uint32 {
	data := uint32(unix.EPERM)
	if errno != nil {
		data = uint32(*errno)
	}
	switch a {
	case specs.ActErrno:
		return unix.SECCOMP_RET_ERRNO | data
	case specs.ActTrace:
		return unix.SECCOMP_RET_TRACE | data
	}
	return map[specs.LinuxSeccompAction]uint32{
		specs.ActKill: unix.SECCOMP_RET_KILL_THREAD, specs.ActKillThread: unix.SECCOMP_RET_KILL_THREAD,
		specs.ActKillProcess: unix.SECCOMP_RET_KILL_PROCESS, specs.ActTrap: unix.SECCOMP_RET_TRAP,
		specs.ActAllow: unix.SECCOMP_RET_ALLOW, specs.ActLog: unix.SECCOMP_RET_LOG,
	}[a]
}

// samples are arguments to try.
func samples(conditions []specs.LinuxSeccompArg) [][6]uint64 {
	l := [][6]uint64{{}, {^uint64(0), ^uint64(0), ^uint64(0), ^uint64(0), ^uint64(0), ^uint64(0)}}
	if len(conditions) == 0 {
		return l
	}
	byArg := map[uint][]uint64{}
	for _, c := range conditions {
		v := seccomptest.Values(c.Value)
		if c.Op == specs.OpMaskedEqual {
			v = append(v, seccomptest.Values(c.ValueTwo)...)
			v = append(v, c.Value&c.ValueTwo, ^c.Value|c.ValueTwo, c.ValueTwo|^c.Value&0xffff)
		}
		byArg[c.Index] = append(byArg[c.Index], v...)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	indices := slices.Sorted(maps.Keys(byArg))
	for _, arg := range indices {
		for _, v := range byArg[arg] {
			// The others: at random values that matter to them.
			for range 1 + 3*(len(byArg)-1) {
				var s [6]uint64
				for _, other := range indices {
					s[other] = byArg[other][rng.IntN(len(byArg[other]))]
				}
				s[arg] = v
				l = append(l, s)
			}
		}
	}
	return l
}

type difference struct {
	arch specs.Arch
	nr   uint32
}

// newestOfLibrary is the largest common number that this libseccomp knows. Above it only crisp can know what the profile means.
func newestOfLibrary() uint32 {
	for n := uint32(600); ; n-- {
		if _, err := seccomp.ScmpSyscall(n).GetNameByArch(seccomp.ArchARM64); err == nil {
			return n
		}
	}
}

// compare returns how many calls libseccomp judges otherwise than the profile says.
func compare(t *testing.T, p *specs.LinuxSeccomp, m machine, except ...difference) (libWrong int) {
	t.Helper()
	program, err := crisp.CompileFor(p, m.goarch)
	if err != nil {
		t.Fatal(err)
	}
	ours, err := bpf.Load(program.BPF)
	if err != nil {
		t.Fatal(err)
	}
	ref := reference(t, p, m)
	known := newestOfLibrary()

	var numbers []uint32
	for n := range uint32(700) {
		numbers = append(numbers, n)
	}
	numbers = append(numbers, 0xeffff, 0x3fffffff, 0x7fffffff, 0xfffffffe, 0xffffffff)
	for n := range uint32(16) {
		numbers = append(numbers, 0xf0000+n)
	}
	refuses := !slices.Contains([]specs.LinuxSeccompAction{specs.ActAllow, specs.ActLog, specs.ActTrace}, p.DefaultAction)
	calls, bad, oursSteps, refSteps := 0, 0, 0, 0
	for i, a := range m.arches {
		inProfile := i == 0 || slices.Contains(p.Architectures, a.name)
		byName := numberOf(a)
		last := newest(p, byName)
		for _, n := range numbers {
			if slices.Contains(except, difference{a.name, n}) || a.bit > 0 && n > 0x10000 {
				continue
			}
			if n > known && n < 0x10000 {
				continue // the profile may name it, libseccomp may not
			}
			stub := refuses && inProfile && last >= 0 && int64(n) > last && !(a.name == specs.ArchARM && n >= 0xf0000)
			if a.name == specs.ArchX86_64 && n >= 0x40000000 && n != 0xffffffff {
				stub = false // x32
				if slices.Contains(p.Architectures, specs.ArchX32) {
					continue // compared under its own name
				}
			}
			for _, args := range samples(conditionsOf(p, a, n|a.bit)) {
				d := &bpf.Data{Nr: n | a.bit, Arch: a.audit, Args: args}
				got, steps := ours.Run(d)
				want, libSteps := ref.Run(d)
				if stub {
					want = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
				}
				calls++
				oursSteps += steps
				refSteps += libSteps
				if got != want {
					name, err := seccomp.ScmpSyscall(n | a.bit).GetNameByArch(a.lib)
					if judged, ok := model(p, a, name, args); err == nil && ok && got == judged {
						libWrong++
						continue
					}
					if bad++; bad < 10 {
						t.Errorf("%s %s (%d) %#x: got %#x, libseccomp %#x", a.name, name, n|a.bit, args, got, want)
					}
				}
			}
		}
	}
	for _, audit := range []uint32{0, unix.AUDIT_ARCH_MIPS, unix.AUDIT_ARCH_PPC64LE, unix.AUDIT_ARCH_RISCV64, 0xffffffff} {
		d := &bpf.Data{Nr: 1, Arch: audit}
		got, _ := ours.Run(d)
		if want, _ := ref.Run(d); got != want {
			t.Errorf("architecture %#x: got %#x, libseccomp %#x", audit, got, want)
		}
	}
	if bad > 0 {
		t.Errorf("%d of %d calls differ", bad, calls)
	}
	t.Logf("%d calls, %d judged wrong by libseccomp; instructions: %d, libseccomp %d; run on average: %.1f, libseccomp %.1f",
		calls, libWrong, ours.Len(), ref.Len(), float64(oursSteps)/float64(calls), float64(refSteps)/float64(calls))
	return libWrong
}

// The table of names must be libseccomp's, as far as that goes.
func TestTable(t *testing.T) {
	compared := 0
	for _, m := range machines {
		for _, a := range m.arches {
			numbers := []uint32{}
			for n := range uint32(1000) {
				numbers = append(numbers, n)
			}
			for n := range uint32(16) {
				numbers = append(numbers, 0xf0000+n)
			}
			for _, n := range numbers {
				name, err := seccomp.ScmpSyscall(n | a.bit).GetNameByArch(a.lib)
				if err != nil {
					continue
				}
				// The profile that refuses only this call says which number it has.
				p := &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: []specs.Arch{a.name},
					Syscalls: []specs.LinuxSyscall{{Names: []string{name}, Action: specs.ActErrno}}}
				program, err := crisp.CompileFor(p, m.goarch)
				if err != nil {
					t.Errorf("%s %s: %v", a.name, name, err)
					continue
				}
				ours, err := bpf.Load(program.BPF)
				if err != nil {
					t.Fatal(err)
				}
				if got, _ := ours.Run(&bpf.Data{Nr: n | a.bit, Arch: a.audit}); got != unix.SECCOMP_RET_ERRNO|uint32(unix.EPERM) {
					t.Errorf("%s %s: %d is not its number here", a.name, name, n)
				}
				compared++
			}
		}
	}
	t.Logf("%d names compared", compared)
	if compared < 1800 {
		t.Error("too few: is this libseccomp complete?")
	}
}

func TestDefaultProfile(t *testing.T) {
	for _, m := range machines {
		for _, caps := range [][]string{
			nil,
			{"CAP_SYS_CHROOT", "CAP_KILL"},
			{"CAP_SYS_ADMIN"},
			{"CAP_SYS_BOOT", "CAP_SYS_MODULE", "CAP_SYS_PACCT", "CAP_SYS_PTRACE", "CAP_SYS_RAWIO", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_SYS_NICE", "CAP_SYSLOG", "CAP_BPF", "CAP_PERFMON", "CAP_DAC_READ_SEARCH"},
			{"CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_BPF", "CAP_PERFMON", "CAP_SYSLOG"},
		} {
			t.Run(fmt.Sprint(m.goarch, caps), func(t *testing.T) {
				p, err := crisp.Default(caps, m.goarch)
				if err != nil {
					t.Fatal(err)
				}
				// libseccomp cannot refuse socketcall while it allows what goes through it; see Default.
				// It does not know uretprobe.
				if n := compare(t, p, m, difference{specs.ArchX86, 102}, difference{specs.ArchX86_64, 335}); n > 0 {
					t.Errorf("libseccomp differs for %d calls", n)
				}
			})
		}
	}
}

func arg(i uint, op specs.LinuxSeccompOperator, v uint64, two ...uint64) specs.LinuxSeccompArg {
	a := specs.LinuxSeccompArg{Index: i, Op: op, Value: v}
	if len(two) > 0 {
		a.ValueTwo = two[0]
	}
	return a
}

func call(action specs.LinuxSeccompAction, name string, args ...specs.LinuxSeccompArg) specs.LinuxSyscall {
	return specs.LinuxSyscall{Names: []string{name}, Action: action, Args: args}
}

func TestLocalhostProfiles(t *testing.T) {
	all := []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32, specs.ArchAARCH64, specs.ArchARM}
	everyOp := []specs.LinuxSeccompOperator{
		specs.OpEqualTo, specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpGreaterThan, specs.OpGreaterEqual, specs.OpMaskedEqual,
	}
	values := []uint64{0, 1, 5, 0x7fffffff, 0x80000000, 0xffffffff, 1 << 32, 1<<32 | 7, 5 << 32, 1<<63 | 3, ^uint64(0)}
	nosys, zero := uint(unix.ENOSYS), uint(0)
	type profile struct {
		name   string
		p      specs.LinuxSeccomp
		except []difference
	}
	var profiles []profile
	for _, op := range everyOp {
		for _, v := range values {
			var two []uint64
			if op == specs.OpMaskedEqual {
				two = []uint64{v & 0xf000_0000_ffff_0005}
			}
			profiles = append(profiles, profile{fmt.Sprintf("%s %#x", op, v), specs.LinuxSeccomp{
				DefaultAction: specs.ActErrno, Architectures: all,
				Syscalls: []specs.LinuxSyscall{call(specs.ActAllow, "read", arg(0, op, v, two...)), call(specs.ActAllow, "lseek", arg(1, op, v, two...))},
			}, nil})
		}
	}
	e := specs.ActErrno
	profiles = append(profiles, []profile{
		{"nothing", specs.LinuxSeccomp{DefaultAction: specs.ActAllow}, nil},
		{"nothing, all architectures", specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: all}, nil},
		{"critest", specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"chmod", "fchmodat"}, Action: e}, call(e, "sethostname")}}, nil},
		{"kill by default", specs.LinuxSeccomp{DefaultAction: specs.ActKillProcess, Architectures: all, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"read", "write", "exit", "exit_group", "futex", "rt_sigreturn"}, Action: specs.ActAllow}}}, nil},
		{"log by default", specs.LinuxSeccomp{DefaultAction: specs.ActLog, Architectures: all, Syscalls: []specs.LinuxSyscall{
			call(specs.ActKill, "kexec_load"), call(specs.ActTrap, "ptrace"), call(specs.ActKillThread, "bpf")}}, nil},
		{"trace by default", specs.LinuxSeccomp{DefaultAction: specs.ActTrace, DefaultErrnoRet: &nosys, Architectures: all, Syscalls: []specs.LinuxSyscall{
			call(specs.ActAllow, "read"), {Names: []string{"write"}, Action: specs.ActTrace}}}, nil},
		{"errnos", specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: all, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"mkdir", "mkdirat"}, Action: e, ErrnoRet: &nosys}, {Names: []string{"rmdir"}, Action: e, ErrnoRet: &zero}}}, nil},
		{"masked value outside the mask", specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: all, Syscalls: []specs.LinuxSyscall{
			call(e, "ioctl", arg(1, specs.OpMaskedEqual, 0xff, 0x101)), call(e, "prctl", arg(0, specs.OpMaskedEqual, 0xf00000000, 0x10f00000001))}}, nil},
		{"all of several", specs.LinuxSeccomp{DefaultAction: e, Architectures: all, Syscalls: []specs.LinuxSyscall{
			call(specs.ActAllow, "mmap", arg(2, specs.OpMaskedEqual, 4, 0), arg(3, specs.OpEqualTo, 0x22), arg(1, specs.OpLessEqual, 1<<20)),
			call(specs.ActAllow, "prctl", arg(0, specs.OpGreaterThan, 10), arg(1, specs.OpLessThan, 1<<33), arg(4, specs.OpNotEqual, 7))}}, nil},
		{"one of several", specs.LinuxSeccomp{DefaultAction: e, Architectures: all, Syscalls: []specs.LinuxSyscall{
			call(specs.ActAllow, "prctl", arg(0, specs.OpEqualTo, 4)), call(specs.ActAllow, "prctl", arg(0, specs.OpEqualTo, 15), arg(1, specs.OpGreaterEqual, 1<<32)),
			call(specs.ActAllow, "prctl", arg(1, specs.OpMaskedEqual, 0xf0, 0x30), arg(2, specs.OpEqualTo, 9)),
			call(specs.ActAllow, "prctl", arg(5, specs.OpLessThan, 3))}}, nil},
		{"same argument twice", specs.LinuxSeccomp{DefaultAction: e, Architectures: all, Syscalls: []specs.LinuxSyscall{
			call(specs.ActAllow, "prctl", arg(0, specs.OpGreaterThan, 10), arg(0, specs.OpLessThan, 5)),
			call(specs.ActAllow, "ioctl", arg(1, specs.OpEqualTo, 10), arg(1, specs.OpEqualTo, 5), arg(2, specs.OpEqualTo, 8))}}, nil},
		{"many values", specs.LinuxSeccomp{DefaultAction: e, Architectures: all, Syscalls: manyValues("personality", 60)}, nil},
		{"many large values", specs.LinuxSeccomp{DefaultAction: e, Architectures: all, Syscalls: append(manyValues("personality", 20),
			call(specs.ActAllow, "personality", arg(0, specs.OpEqualTo, 1<<40)))}, nil},
		{"some values refused", specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: all, Syscalls: []specs.LinuxSyscall{
			call(e, "ioctl", arg(1, specs.OpEqualTo, 0x5412)), call(e, "ioctl", arg(1, specs.OpEqualTo, 0x541c)), call(e, "ioctl", arg(1, specs.OpGreaterThan, 0xfffffff0))}}, nil},
		{"with and without conditions", specs.LinuxSeccomp{DefaultAction: e, Architectures: all, Syscalls: []specs.LinuxSyscall{
			call(specs.ActAllow, "prctl", arg(0, specs.OpEqualTo, 4)), call(specs.ActAllow, "prctl"),
			call(specs.ActLog, "ioctl"), call(specs.ActAllow, "ioctl", arg(1, specs.OpEqualTo, 4)),
			call(specs.ActTrap, "mkdir", arg(1, specs.OpEqualTo, 4)), call(specs.ActLog, "mkdir")}}, nil},
		{"redundant", specs.LinuxSeccomp{DefaultAction: e, Architectures: all, Syscalls: []specs.LinuxSyscall{
			call(specs.ActAllow, "prctl", arg(0, specs.OpEqualTo, 4)), call(e, "prctl"), call(e, "ioctl", arg(1, specs.OpEqualTo, 4)), call(specs.ActAllow, "ioctl")}}, nil},
		{"native only", specs.LinuxSeccomp{DefaultAction: e, Syscalls: []specs.LinuxSyscall{{Names: []string{"read", "write", "openat"}, Action: specs.ActAllow}}}, nil},
		{"without x32", specs.LinuxSeccomp{DefaultAction: e, Architectures: []specs.Arch{specs.ArchX86}, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"read", "write", "openat"}, Action: specs.ActAllow}}}, nil},
		{"sockets refused", specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: all, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"socket", "accept", "sendmsg", "semop", "shmat", "msgget"}, Action: e}}}, nil},
		{"sockets allowed", specs.LinuxSeccomp{DefaultAction: e, Architectures: all, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"read", "socket", "bind", "recv", "recvmmsg", "semget", "shmctl"}, Action: specs.ActAllow}}}, nil},
		{"some sockets refused", specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: all, Syscalls: []specs.LinuxSyscall{
			call(e, "socket", arg(0, specs.OpEqualTo, 38))}}, nil},
		// Without x86: libseccomp takes the three for rules about the same socketcall and says EEXIST.
		{"audit sockets, as podman has it", specs.LinuxSeccomp{DefaultAction: e, Architectures: []specs.Arch{specs.ArchX32, specs.ArchARM}, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"socket"}, Action: e, ErrnoRet: ptr(uint(unix.EINVAL)), Args: []specs.LinuxSeccompArg{arg(0, specs.OpEqualTo, 16), arg(2, specs.OpEqualTo, 9)}},
			call(specs.ActAllow, "socket", arg(2, specs.OpNotEqual, 9)), call(specs.ActAllow, "socket", arg(0, specs.OpNotEqual, 16))}}, nil},
		{"every call, alternately", everyCall(all), nil},
	}...)
	for _, m := range machines {
		for _, pr := range profiles {
			t.Run(m.goarch+"/"+pr.name, func(t *testing.T) {
				if n := compare(t, &pr.p, m, pr.except...); n > 0 {
					t.Errorf("libseccomp differs for %d calls", n)
				}
			})
		}
	}
}

func ptr[T any](v T) *T { return &v }

func manyValues(name string, n int) (l []specs.LinuxSyscall) {
	for i := range n {
		l = append(l, call(specs.ActAllow, name, arg(0, specs.OpEqualTo, uint64(i*i))))
	}
	return l
}

// everyCall is the longest program: no two neighbours have the same outcome.
func everyCall(all []specs.Arch) specs.LinuxSeccomp {
	p := specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: all}
	for n := range uint32(460) {
		name, err := seccomp.ScmpSyscall(n).GetNameByArch(seccomp.ArchAMD64)
		if err != nil || name == "socketcall" {
			continue
		}
		action := []specs.LinuxSeccompAction{specs.ActAllow, specs.ActTrap, specs.ActLog}[n%3]
		if n%4 == 0 {
			p.Syscalls = append(p.Syscalls, call(action, name, arg(uint(n%6), specs.OpMaskedEqual, uint64(n)<<8|1, 1), arg(uint(n+1)%6, specs.OpLessThan, uint64(n)<<16)))
			continue
		}
		p.Syscalls = append(p.Syscalls, call(action, name))
	}
	return p
}

// At random, so that there is something nobody thought of. Rules of one call have one action: which of two
// conditional rules wins when both match is the one thing in which libseccomp has no order.
func TestRandomProfiles(t *testing.T) {
	all := []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32, specs.ArchAARCH64, specs.ArchARM}
	names := []string{"read", "write", "prctl", "ioctl", "mmap", "lseek", "openat", "kill", "statx", "cachestat", "_llseek", "mmap2"}
	everyOp := slices.Collect(func(yield func(specs.LinuxSeccompOperator) bool) {
		for op := range ops {
			if !yield(op) {
				return
			}
		}
	})
	slices.Sort(everyOp)
	acts := []specs.LinuxSeccompAction{specs.ActAllow, specs.ActLog, specs.ActTrap, specs.ActKillProcess, specs.ActErrno}
	seed := uint64(20260203)
	rng := rand.New(rand.NewPCG(seed, 0))
	value := func() uint64 {
		v := rng.Uint64() >> rng.IntN(64)
		if rng.IntN(3) == 0 {
			v &= 0xff
		}
		return v
	}
	wrong := 0
	for i := range 120 {
		p := &specs.LinuxSeccomp{DefaultAction: acts[rng.IntN(len(acts))], Architectures: all[:rng.IntN(len(all)+1)]}
		for _, name := range names {
			action := acts[rng.IntN(len(acts))]
			for range rng.IntN(5) {
				var args []specs.LinuxSeccompArg
				for _, index := range rng.Perm(6)[:rng.IntN(4)] {
					args = append(args, arg(uint(index), everyOp[rng.IntN(len(everyOp))], value(), value()))
				}
				p.Syscalls = append(p.Syscalls, call(action, name, args...))
			}
		}
		m := machines[i%2]
		if !t.Run(fmt.Sprintf("%d", i), func(t *testing.T) { wrong += compare(t, p, m) }) {
			t.Fatalf("profile %d of seed %d", i, seed)
		}
	}
	t.Logf("libseccomp judged %d calls otherwise than the profiles say", wrong)
}

func TestVersion(t *testing.T) {
	major, minor, micro := seccomp.GetLibraryVersion()
	t.Logf("libseccomp %d.%d.%d, newest call known: %d", major, minor, micro, newestOfLibrary())
	if newestOfLibrary() < 450 {
		t.Error("too old to say much")
	}
}

package seccomp

import (
	"fmt"
	"maps"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// policy is a profile without names: what happens to each call of each architecture.
type policy struct {
	def    uint32 // SECCOMP_RET_*, of calls without a verdict
	tables []table
}

// table is the part of one architecture.
type table struct {
	arch     arch
	verdicts map[uint32]*verdict // by number, without x32Bit
	// multiplexed are the verdicts of calls that x86 also makes through socketcall and ipc, by name.
	multiplexed map[string]*verdict
	// newest is the largest number that the profile names; calls above it get ENOSYS if hasNewest.
	newest    uint32
	hasNewest bool
}

// verdict is what happens to one call: fixed, or the action of the first rule that matches, or the default.
type verdict struct {
	fixed  bool
	action uint32 // if fixed
	rules  []rule
}

// rule matches when all its conditions do.
type rule struct {
	conditions []condition
	action     uint32
}

// condition compares an argument, as an unsigned number.
type condition struct {
	arg   uint
	op    specs.LinuxSeccompOperator
	value uint64
	mask  uint64 // of OpMaskedEqual
}

// maxErrno is the largest the kernel passes on (MAX_ERRNO, linux/err.h).
const maxErrno = 4095

// action translates one to what a filter returns.
func action(a specs.LinuxSeccompAction, errno *uint) (uint32, error) {
	var ret uint32
	switch a {
	case specs.ActKill, specs.ActKillThread:
		ret = unix.SECCOMP_RET_KILL_THREAD
	case specs.ActKillProcess:
		ret = unix.SECCOMP_RET_KILL_PROCESS
	case specs.ActTrap:
		ret = unix.SECCOMP_RET_TRAP
	case specs.ActLog:
		ret = unix.SECCOMP_RET_LOG
	case specs.ActAllow:
		ret = unix.SECCOMP_RET_ALLOW
	case specs.ActErrno, specs.ActTrace:
		ret = unix.SECCOMP_RET_ERRNO
		if a == specs.ActTrace {
			ret = unix.SECCOMP_RET_TRACE
		}
		data := uint(unix.EPERM) // config-linux.md: "If not specified then its default value is EPERM."
		if errno != nil {
			data = *errno
		}
		if data > maxErrno {
			return 0, fmt.Errorf("%w: errno %d is more than %d", ErrInvalid, data, maxErrno)
		}
		return ret | uint32(data), nil
	case specs.ActNotify:
		return 0, fmt.Errorf("%w: action %s", ErrUnsupported, a)
	default:
		return 0, fmt.Errorf("%w: unknown action %.64q", ErrInvalid, a)
	}
	if errno != nil { // config-linux.md: "the runtime MUST print and error and fail"
		return 0, fmt.Errorf("%w: action %s with an errno", ErrInvalid, a)
	}
	return ret, nil
}

// refuses says whether an action keeps the call from being made. A tracer is trusted to know what to do (runc).
func refuses(ret uint32) bool {
	switch ret & unix.SECCOMP_RET_ACTION_FULL {
	case unix.SECCOMP_RET_ALLOW, unix.SECCOMP_RET_LOG, unix.SECCOMP_RET_TRACE:
		return false
	}
	return true
}

// newPolicy checks a profile whole and translates it for the architectures of a family.
func newPolicy(p *specs.LinuxSeccomp, f family) (*policy, error) {
	if p.ListenerPath != "" || p.ListenerMetadata != "" {
		return nil, fmt.Errorf("%w: listenerPath", ErrUnsupported)
	}
	def, err := action(p.DefaultAction, p.DefaultErrnoRet)
	if err != nil {
		return nil, fmt.Errorf("defaultAction: %w", err)
	}
	picked, err := f.pick(p.Architectures)
	if err != nil {
		return nil, err
	}
	out := &policy{def: def}
	for _, a := range picked {
		out.tables = append(out.tables, table{arch: a, verdicts: map[uint32]*verdict{}, multiplexed: map[string]*verdict{}})
	}
	named := map[string]bool{}
	for i, s := range p.Syscalls {
		if err := out.add(&s, named); err != nil {
			return nil, fmt.Errorf("syscalls[%d]: %w", i, err)
		}
	}
	for i := range out.tables {
		t := &out.tables[i]
		t.hasNewest = t.hasNewest && refuses(def)
		t.addMultiplexed(def, named)
	}
	return out, nil
}

// add takes one entry of a profile in.
func (p *policy) add(s *specs.LinuxSyscall, named map[string]bool) error {
	ret, err := action(s.Action, s.ErrnoRet)
	if err != nil {
		return err
	}
	rules, err := newRules(s.Args, ret)
	if err != nil {
		return err
	}
	if len(s.Names) == 0 {
		return fmt.Errorf("%w: no names", ErrInvalid)
	}
	for _, name := range s.Names {
		c, err := lookUp(name)
		if err != nil {
			return err
		}
		named[name] = true
		for i := range p.tables {
			p.tables[i].add(c, rules, ret, p.def)
		}
	}
	return nil
}

// newRules translates the conditions of an entry. None: no rules.
func newRules(args []specs.LinuxSeccompArg, ret uint32) ([]rule, error) {
	var seen [6]int
	all := rule{action: ret}
	for _, a := range args {
		if a.Index >= uint(len(seen)) {
			return nil, fmt.Errorf("%w: argument %d, a call has 6", ErrInvalid, a.Index)
		}
		c := condition{arg: a.Index, op: a.Op, value: a.Value}
		switch a.Op {
		case specs.OpEqualTo, specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpGreaterThan, specs.OpGreaterEqual:
		case specs.OpMaskedEqual:
			c.mask, c.value = a.Value, a.ValueTwo
		default:
			return nil, fmt.Errorf("%w: unknown operator %.64q", ErrInvalid, a.Op)
		}
		seen[a.Index]++
		all.conditions = append(all.conditions, c)
	}
	if len(args) == 0 {
		return nil, nil
	}
	if slices.Max(seen[:]) < 2 {
		return []rule{all}, nil
	}
	// runc: "If two or more arguments have the same condition, revert to old behavior, adding each condition as a separate rule."
	var each []rule
	for _, c := range all.conditions {
		each = append(each, rule{conditions: []condition{c}, action: ret})
	}
	return each, nil
}

func (t *table) add(c *call, rules []rule, ret, def uint32) {
	n := uint32(c.numbers[t.arch])
	exists := c.numbers[t.arch] != none
	if exists && n < armPrivate {
		t.newest, t.hasNewest = max(t.newest, n), true
	}
	if ret == def {
		return
	}
	if exists {
		verdictOf(t.verdicts, n).add(rules, ret)
	}
	if _, ok := viaX86[c.name]; ok && t.arch == x86 { // also those that have no number of their own: accept, send, recv, semop
		verdictOf(t.multiplexed, c.name).add(rules, ret)
	}
}

func verdictOf[K comparable](m map[K]*verdict, k K) *verdict {
	v := m[k]
	if v == nil {
		v = &verdict{}
		m[k] = v
	}
	return v
}

func (v *verdict) add(rules []rule, ret uint32) {
	switch {
	case v.fixed:
	case len(rules) == 0:
		*v = verdict{fixed: true, action: ret}
	default:
		v.rules = append(v.rules, rules...)
	}
}

// strictest is the action that the kernel would choose if all actions of a verdict were returned by filters of
// their own, seccomp(2).
func (v *verdict) strictest(def uint32) uint32 {
	if v.fixed {
		return v.action
	}
	ret := def
	for _, r := range v.rules {
		if int32(r.action&unix.SECCOMP_RET_ACTION_FULL) < int32(ret&unix.SECCOMP_RET_ACTION_FULL) {
			ret = r.action
		}
	}
	return ret
}

// addMultiplexed gives the calls that are also made through socketcall and ipc the same verdict there, unless the
// profile names these itself. Their arguments are in memory, which a filter can't read: of what conditions
// decide between, the strictest holds.
func (t *table) addMultiplexed(def uint32, named map[string]bool) {
	for _, name := range slices.Sorted(maps.Keys(t.multiplexed)) {
		v := viaX86[name]
		ret := t.multiplexed[name].strictest(def)
		if named[v.mux] || ret == def {
			continue
		}
		c := condition{op: specs.OpMaskedEqual, mask: selectorMask[v.mux], value: v.selector}
		mux := uint32(callIndex()[v.mux].numbers[t.arch])
		t.newest = max(t.newest, mux)
		verdictOf(t.verdicts, mux).add([]rule{{conditions: []condition{c}, action: ret}}, ret)
	}
}

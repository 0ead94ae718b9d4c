package seccomp

import (
	"fmt"
	"math"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A program is laid out like this, and written from its end to its beginning: jumps go
// forward only, so a target's distance is known when the jump is written.
//
//	ld arch
//	jeq x86_64 ──▶ ld nr
//	               jge 0x40000000 ──▶ the numbers of x32 …
//	               jge 158 ─┬▶ …                    a binary search over ranges of
//	                        └▶ jge 60 ─┬▶ …          numbers with the same outcome
//	                                   └▶ ret ALLOW
//	jeq x86    ──▶ ld nr …
//	ret KILL
//
// An outcome is a return or a block that looks at arguments. Since Linux 5.11 the kernel runs
// the program once per call number when it is loaded, and not at all for calls that are always allowed.

// Opcodes, linux/bpf_common.h.
const (
	opLoad  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	opAnd   = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
	opJump  = unix.BPF_JMP | unix.BPF_JA
	opEqual = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	opAbove = unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K
	opFrom  = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
	opRet   = unix.BPF_RET | unix.BPF_K
)

// Offsets in struct seccomp_data, linux/seccomp.h. Arguments are 64 bits in native byte order; all
// our architectures are little-endian.
const (
	offsetNumber = 0
	offsetArch   = 4
	offsetArgs   = 16
)

// maxProgram is BPF_MAXINSNS.
const maxProgram = 4096

// pos is an instruction, counted from the end of the program.
type pos int

type assembler struct {
	code   []unix.SockFilter // the last instruction first
	rets   map[uint32]pos    // the latest return of each value
	blocks map[string]pos    // the latest block of each set of rules
}

func (a *assembler) emit(code uint16, k uint32, jt, jf uint8) pos {
	a.code = append(a.code, unix.SockFilter{Code: code, Jt: jt, Jf: jf, K: k})
	return pos(len(a.code) - 1)
}

// distance is how many instructions the next one must skip to reach t.
func (a *assembler) distance(t pos) int { return len(a.code) - int(t) - 1 }

// near returns a place with the effect of t that a conditional jump reaches, also after one more instruction.
func (a *assembler) near(t pos) pos {
	if a.distance(t) < math.MaxUint8 {
		return t
	}
	if i := a.code[t]; i.Code == opRet {
		return a.ret(i.K)
	}
	return a.emit(opJump, uint32(a.distance(t)), 0, 0)
}

// branch writes a conditional jump.
func (a *assembler) branch(code uint16, k uint32, yes, no pos) pos {
	if yes == no {
		return yes
	}
	yes = a.near(yes)
	no = a.near(no)
	return a.emit(code, k, uint8(a.distance(yes)), uint8(a.distance(no)))
}

// ret returns a place that returns v.
func (a *assembler) ret(v uint32) pos {
	if p, ok := a.rets[v]; ok && a.distance(p) < math.MaxUint8 {
		return p
	}
	p := a.emit(opRet, v, 0, 0)
	a.rets[v] = p
	return p
}

// load writes a load that goes on at next.
func (a *assembler) load(offset uint32, next pos) pos {
	if a.distance(next) > 0 {
		a.emit(opJump, uint32(a.distance(next)), 0, 0)
	}
	return a.emit(opLoad, offset, 0, 0)
}

// step is where a range of numbers (of calls, or values of an argument) begins, and what happens to them.
type step struct {
	from    uint32
	outcome outcome
}

// outcome is a return, or rules with a return for what none of them matches.
type outcome struct {
	ret   uint32
	rules []rule
	wide  bool   // the rules compare both halves of arguments
	key   string // identifies the rules; "" without
}

func (o outcome) same(p outcome) bool { return o.ret == p.ret && o.key == p.key }

// merge drops steps that change nothing.
func merge(steps []step) []step {
	return slices.CompactFunc(steps, func(a, b step) bool { return a.outcome.same(b.outcome) })
}

// assemble writes the program of a policy.
func assemble(p *policy) ([]unix.SockFilter, error) {
	a := &assembler{rets: map[uint32]pos{}, blocks: map[string]pos{}}
	next := a.ret(unix.SECCOMP_RET_KILL_THREAD) // an architecture that is not in the profile
	type section struct {
		audit uint32
		start pos
	}
	var sections []section
	for i := len(p.tables) - 1; i >= 0; i-- {
		t := &p.tables[i]
		if t.arch == x32 {
			continue // part of x86_64
		}
		search := a.search(p.steps(t))
		sections = append(sections, section{t.arch.audit(), a.load(offsetNumber, search)})
	}
	// The native architecture was written last and is asked for first.
	for _, s := range sections {
		next = a.branch(opEqual, s.audit, s.start, next)
	}
	a.load(offsetArch, next)
	if len(a.code) > maxProgram {
		return nil, fmt.Errorf("%w: the program has %d instructions, the kernel takes %d", ErrUnsupported, len(a.code), maxProgram)
	}
	slices.Reverse(a.code)
	return a.code, nil
}

// steps are what happens to the numbers of an architecture, from 0 on.
func (p *policy) steps(t *table) []step {
	steps := p.numbers(t, 0)
	if t.arch != x86_64 {
		return merge(steps)
	}
	// The numbers of x32 follow; without x32 they are another architecture's. -1 is no call: a tracer sets it to skip
	// one, seccomp(2).
	last := steps[len(steps)-1].outcome
	other := slices.IndexFunc(p.tables, func(t table) bool { return t.arch == x32 })
	if other >= 0 {
		steps = append(steps, p.numbers(&p.tables[other], x32Bit)...)
	} else {
		steps = append(steps, step{x32Bit, outcome{ret: unix.SECCOMP_RET_KILL_THREAD}})
	}
	return merge(append(steps, step{math.MaxUint32, last}))
}

// numbers are the steps of one table, whose numbers have bit set.
func (p *policy) numbers(t *table, bit uint32) []step {
	def := outcome{ret: p.def}
	steps := []step{{bit, def}}
	at := func(n uint32, o outcome) {
		if last := &steps[len(steps)-1]; last.from == n|bit {
			last.outcome = o
			return
		}
		steps = append(steps, step{n | bit, o})
	}
	nosys := outcome{ret: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)}
	beyond := !t.hasNewest
	leave := func(until uint32) { // the known numbers, when the next verdict is for until
		if !beyond && until > t.newest {
			beyond = true
			at(t.newest+1, nosys)
			if t.arch == arm && until >= armPrivate {
				at(armPrivate, def)
			}
		}
	}
	for _, n := range sortedKeys(t.verdicts) {
		leave(n)
		v := t.verdicts[n]
		o := outcome{ret: v.action}
		if !v.fixed {
			wide := t.arch.wide()
			o = outcome{ret: p.def, rules: v.rules, wide: wide, key: fmt.Sprint(wide, v.rules)}
		}
		at(n, o)
		at(n+1, def)
	}
	leave(math.MaxUint32)
	return steps
}

func sortedKeys(m map[uint32]*verdict) []uint32 {
	keys := make([]uint32, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// search writes a binary search for the number in the accumulator; it is at least the first step's.
func (a *assembler) search(steps []step) pos {
	if len(steps) == 1 {
		return a.outcome(steps[0].outcome)
	}
	middle := len(steps) / 2
	yes := a.search(steps[middle:])
	no := a.search(steps[:middle])
	return a.branch(opFrom, steps[middle].from, yes, no)
}

func (a *assembler) outcome(o outcome) pos {
	if o.key == "" {
		return a.ret(o.ret)
	}
	if p, ok := a.blocks[o.key]; ok {
		return p
	}
	p, ok := a.ranges(o)
	if !ok {
		p = a.ruleByRule(o)
	}
	a.blocks[o.key] = p
	return p
}

// ruleByRule writes the rules one after another.
func (a *assembler) ruleByRule(o outcome) pos {
	no := a.ret(o.ret)
	for _, r := range slices.Backward(o.rules) {
		yes := a.ret(r.action)
		for _, c := range slices.Backward(r.conditions) {
			yes = a.compare(c, yes, no, o.wide)
		}
		no = yes
	}
	return no
}

// compare writes a test of one argument.
func (a *assembler) compare(c condition, yes, no pos, wide bool) pos {
	low, high := uint32(c.value), uint32(c.value>>32)
	lowAt := uint32(offsetArgs + 8*c.arg)
	highAt := lowAt + 4
	switch c.op {
	case specs.OpNotEqual:
		yes, no = no, yes
		fallthrough
	case specs.OpEqualTo:
		p := a.load(lowAt, a.branch(opEqual, low, yes, no))
		if !wide {
			return p
		}
		return a.load(highAt, a.branch(opEqual, high, p, no))
	case specs.OpMaskedEqual:
		p := a.load(lowAt, a.emitMask(uint32(c.mask), a.branch(opEqual, low&uint32(c.mask), yes, no)))
		if highMask := uint32(c.mask >> 32); wide && highMask != 0 {
			p = a.load(highAt, a.emitMask(highMask, a.branch(opEqual, high&highMask, p, no)))
		}
		return p
	case specs.OpLessThan, specs.OpLessEqual:
		yes, no = no, yes
	}
	op := uint16(opAbove)
	if c.op == specs.OpGreaterEqual || c.op == specs.OpLessThan {
		op = opFrom
	}
	p := a.load(lowAt, a.branch(op, low, yes, no))
	if !wide {
		return p
	}
	equal := a.branch(opEqual, high, p, no)
	return a.load(highAt, a.branch(opAbove, high, yes, equal))
}

// emitMask writes an AND that goes on at next, which was written last.
func (a *assembler) emitMask(mask uint32, next pos) pos {
	if a.distance(next) > 0 {
		a.emit(opJump, uint32(a.distance(next)), 0, 0)
	}
	return a.emit(opAnd, mask, 0, 0)
}

// ranges writes rules that all look at one argument as a binary search. ok is false if they are of
// another kind.
func (a *assembler) ranges(o outcome) (p pos, ok bool) {
	if len(o.rules) < 3 {
		return 0, false
	}
	arg := o.rules[0].conditions[0].arg
	starts := []uint64{0}
	for _, r := range o.rules {
		c := r.conditions[0]
		if len(r.conditions) > 1 || c.arg != arg || c.op == specs.OpMaskedEqual || c.value > math.MaxUint32 {
			return 0, false
		}
		starts = append(starts, c.value, c.value+1) // nothing changes anywhere else
	}
	slices.Sort(starts)
	starts = slices.Compact(starts)
	var steps []step
	above := outcome{}
	for _, s := range starts {
		v := o.at(s)
		if s <= math.MaxUint32 {
			steps = append(steps, step{uint32(s), v})
		}
		above = v // of the largest, and of all that are larger
	}
	high := a.ret(above.ret)
	p = a.load(uint32(offsetArgs+8*arg), a.search(merge(steps)))
	if !o.wide {
		return p, true
	}
	return a.load(uint32(offsetArgs+8*arg+4), a.branch(opEqual, 0, p, high)), true
}

// at is the outcome for a value of the only argument that the rules look at.
func (o outcome) at(v uint64) outcome {
	for _, r := range o.rules {
		if r.conditions[0].matches(v) {
			return outcome{ret: r.action}
		}
	}
	return outcome{ret: o.ret}
}

// matches says what compare writes.
func (c condition) matches(v uint64) bool {
	switch c.op {
	case specs.OpEqualTo:
		return v == c.value
	case specs.OpNotEqual:
		return v != c.value
	case specs.OpLessThan:
		return v < c.value
	case specs.OpLessEqual:
		return v <= c.value
	case specs.OpGreaterThan:
		return v > c.value
	case specs.OpGreaterEqual:
		return v >= c.value
	default:
		return v&c.mask == c.value
	}
}

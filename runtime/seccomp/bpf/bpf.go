// Package bpf runs seccomp programs without the kernel: tests ask them about any call of any architecture, and
// crisp-init, which it is small for, whether a filter lets it go on once it is loaded.
package bpf

import (
	"encoding/binary"
	"errors"
	"strconv"

	"golang.org/x/sys/unix"
)

// Data is struct seccomp_data, linux/seccomp.h.
type Data struct {
	Nr   uint32
	Arch uint32
	IP   uint64
	Args [6]uint64
}

// word is the 32-bit word at an offset, on a little-endian machine.
func (d *Data) word(offset uint32) uint32 {
	switch offset {
	case 0:
		return d.Nr
	case 4:
		return d.Arch
	case 8:
		return uint32(d.IP)
	case 12:
		return uint32(d.IP >> 32)
	}
	arg := d.Args[(offset-16)/8]
	if offset%8 == 4 {
		arg >>= 32
	}
	return uint32(arg)
}

// Machine is a program that passed the kernel's checks.
type Machine struct{ code []unix.SockFilter }

const (
	dataSize    = 64
	maxProgram  = 4096
	returnValue = unix.BPF_RET | unix.BPF_K
	load        = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	jump        = unix.BPF_JMP | unix.BPF_JA
)

// Load decodes a program of struct sock_filter in little-endian order and checks it as the kernel does (bpf_check_classic in
// net/core/filter.c and seccomp_check_filter in kernel/seccomp.c), as far as this package knows the instructions; others
// are refused.
func Load(program []byte) (*Machine, error) {
	if len(program)%unix.SizeofSockFilter != 0 {
		return nil, errors.New(strconv.Itoa(len(program)) + " bytes are no whole instructions")
	}
	var code []unix.SockFilter
	for b := program; len(b) > 0; b = b[unix.SizeofSockFilter:] {
		code = append(code, unix.SockFilter{Code: binary.LittleEndian.Uint16(b), Jt: b[2], Jf: b[3], K: binary.LittleEndian.Uint32(b[4:])})
	}
	if len(code) == 0 || len(code) > maxProgram {
		return nil, errors.New(strconv.Itoa(len(code)) + " instructions")
	}
	for pc, i := range code {
		left := uint64(len(code) - pc - 1) // instructions behind this one
		switch i.Code {
		case load:
			if i.K%4 != 0 || i.K >= dataSize {
				return nil, bad(pc, "load outside of the data")
			}
		case jump:
			if uint64(i.K) >= left {
				return nil, bad(pc, "jump out of the program")
			}
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K,
			unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K, unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K:
			if uint64(max(i.Jt, i.Jf)) >= left {
				return nil, bad(pc, "branch out of the program")
			}
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, returnValue:
		default:
			return nil, bad(pc, "unknown instruction "+strconv.Itoa(int(i.Code)))
		}
	}
	if code[len(code)-1].Code != returnValue {
		return nil, errors.New("the last instruction is no return")
	}
	return &Machine{code}, nil
}

func bad(pc int, what string) error {
	return errors.New("instruction " + strconv.Itoa(pc) + ": " + what)
}

// Len is the number of instructions.
func (m *Machine) Len() int { return len(m.code) }

// Run returns what the program returns for one call, and how many instructions that took.
func (m *Machine) Run(d *Data) (ret uint32, steps int) {
	ret, steps, _ = m.run(d)
	return ret, steps
}

// AlwaysAllowed says whether the kernel lets all calls of one number through without running the program
// (since 5.11, seccomp_is_const_allow): it allows them without a look at anything but architecture and number.
func (m *Machine) AlwaysAllowed(arch, nr uint32) bool {
	ret, _, looked := m.run(&Data{Nr: nr, Arch: arch})
	return ret == unix.SECCOMP_RET_ALLOW && !looked
}

// run also says whether the program looked at arguments.
func (m *Machine) run(d *Data) (ret uint32, steps int, looked bool) {
	var acc uint32
	for pc := 0; ; pc++ {
		i := &m.code[pc]
		steps++
		var yes bool
		switch i.Code {
		case load:
			looked = looked || i.K > 4
			acc = d.word(i.K)
			continue
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			acc &= i.K
			continue
		case jump:
			pc += int(i.K)
			continue
		case returnValue:
			return i.K, steps, looked
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			yes = acc == i.K
		case unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K:
			yes = acc > i.K
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			yes = acc >= i.K
		case unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K:
			yes = acc&i.K != 0
		}
		if yes {
			pc += int(i.Jt)
		} else {
			pc += int(i.Jf)
		}
	}
}

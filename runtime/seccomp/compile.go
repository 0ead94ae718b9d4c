package seccomp

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"runtime"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Program is what seccomp(2) takes with SECCOMP_SET_MODE_FILTER.
type Program struct {
	// BPF is an array of struct sock_filter in native byte order. Programs are shared: it must not
	// be changed.
	BPF   []byte
	Flags uint32 // SECCOMP_FILTER_FLAG_*
}

// cacheSize is how many different profiles are kept compiled. A node has a handful: the default for each
// set of capabilities, and some files.
const cacheSize = 64

var cache = struct {
	mu       sync.Mutex
	programs map[[sha256.Size]byte]Program
	order    [][sha256.Size]byte // oldest first
}{programs: map[[sha256.Size]byte]Program{}}

// Compile translates a profile for this machine, or finds it compiled. ErrInvalid, ErrUnsupported.
func Compile(p *specs.LinuxSeccomp) (Program, error) {
	text, err := json.Marshal(p)
	if err != nil {
		return Program{}, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	key := sha256.Sum256(text)
	cache.mu.Lock()
	program, ok := cache.programs[key]
	cache.mu.Unlock()
	if ok {
		return program, nil
	}
	// Two at a time may compile the same: it takes less than a millisecond.
	if program, err = CompileFor(p, runtime.GOARCH); err != nil {
		return Program{}, err
	}
	cache.mu.Lock()
	defer cache.mu.Unlock()
	if _, ok := cache.programs[key]; ok {
		return program, nil
	}
	if len(cache.order) == cacheSize {
		delete(cache.programs, cache.order[0])
		cache.order = cache.order[1:]
	}
	cache.programs[key] = program
	cache.order = append(cache.order, key)
	return program, nil
}

// CompileFor is Compile for a machine of another GOARCH, and always compiles.
func CompileFor(p *specs.LinuxSeccomp, goarch string) (Program, error) {
	f, err := native(goarch)
	if err != nil {
		return Program{}, err
	}
	if p == nil {
		return Program{}, fmt.Errorf("%w: none", ErrInvalid)
	}
	flags, err := filterFlags(p.Flags)
	if err != nil {
		return Program{}, err
	}
	policy, err := newPolicy(p, f)
	if err != nil {
		return Program{}, err
	}
	code, err := assemble(policy)
	if err != nil {
		return Program{}, err
	}
	b := make([]byte, 0, len(code)*unix.SizeofSockFilter)
	for _, i := range code {
		b = binary.NativeEndian.AppendUint16(b, i.Code)
		b = append(b, i.Jt, i.Jf)
		b = binary.NativeEndian.AppendUint32(b, i.K)
	}
	return Program{BPF: b, Flags: flags}, nil
}

// filterFlags translates flags. None said: SPEC_ALLOW, as runc does (without it kernels before 5.16 turn off
// speculation for the container, which costs much and protects from nothing outside it).
func filterFlags(names []specs.LinuxSeccompFlag) (uint32, error) {
	if len(names) == 0 { // config.json does not tell an empty list from none
		return unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, nil
	}
	var flags uint32
	for _, f := range names {
		switch f {
		case "SECCOMP_FILTER_FLAG_TSYNC":
			// Nothing to do: the thread that loads the filter is the one that calls execve(2), which ends the others.
		case specs.LinuxSeccompFlagLog:
			flags |= unix.SECCOMP_FILTER_FLAG_LOG
		case specs.LinuxSeccompFlagSpecAllow:
			flags |= unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
		case specs.LinuxSeccompFlagWaitKillableRecv:
			return 0, fmt.Errorf("%w: flag %s", ErrUnsupported, f)
		default:
			return 0, fmt.Errorf("%w: unknown flag %.64q", ErrInvalid, f)
		}
	}
	return flags, nil
}

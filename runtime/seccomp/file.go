package seccomp

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	moby "github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// maxFile is how large a profile may be, bytes. Docker's default has 12 KiB.
const maxFile = 1 << 20

// LoadFile reads the profile of a Localhost SecurityProfile: JSON in the form of the OCI
// specification or of Docker (archMap, includes, excludes, name). The path must be absolute.
//
// Conditions of Docker's form on capabilities are judged by bounding; without it, as if the container had
// none. (containerd ignores all conditions.)
//
// The profile is checked as [Compile] does, so that a bad one is refused when the container is
// created. A profile that says nothing is an error: it must never mean unconfined (CVE-2023-2431).
func LoadFile(path string, bounding ...string) (*specs.LinuxSeccomp, error) {
	p, err := loadFile(path, bounding)
	if err != nil {
		return nil, fmt.Errorf("cannot load seccomp profile %.4096q: %w", path, err)
	}
	return p, nil
}

func loadFile(path string, bounding []string) (*specs.LinuxSeccomp, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("%w: the path is not absolute", ErrInvalid)
	}
	text, err := readFile(path)
	if err != nil {
		return nil, err
	}
	return parse(text, bounding, runtime.GOARCH)
}

// parse is LoadFile without the file.
func parse(text []byte, bounding []string, goarch string) (*specs.LinuxSeccomp, error) {
	var file moby.Seccomp
	if err := json.Unmarshal(text, &file); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	p, err := expand(&file, bounding, goarch)
	if err != nil {
		return nil, err
	}
	if _, err := CompileFor(p, goarch); err != nil {
		return nil, err
	}
	return p, nil
}

// readFile reads a regular file of the host. O_NONBLOCK: a FIFO must not hold us up.
func readFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: not a regular file", ErrInvalid)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1)) // allowed: bounded by maxFile
	if err != nil {
		return nil, err
	}
	if len(text) > maxFile {
		return nil, fmt.Errorf("%w: more than %d bytes", ErrInvalid, maxFile)
	}
	return text, nil
}

// dockerArch is what Docker's conditions call a GOARCH.
var dockerArch = map[string]string{"386": "x86", "amd64": "amd64", "arm": "arm", "arm64": "arm64"}

// expand turns Docker's form into the specification's: what holds here stays. Names are checked in entries that
// do not hold, too.
func expand(file *moby.Seccomp, caps []string, goarch string) (*specs.LinuxSeccomp, error) {
	f, err := native(goarch)
	if err != nil {
		return nil, err
	}
	if len(file.Architectures) > 0 && len(file.ArchMap) > 0 {
		return nil, fmt.Errorf("%w: both architectures and archMap", ErrInvalid)
	}
	p := file.LinuxSeccomp
	p.Syscalls = nil
	for _, m := range file.ArchMap {
		if a, ok := archOf[m.Arch]; ok && a == f[0] {
			p.Architectures = append([]specs.Arch{m.Arch}, m.SubArches...)
		}
	}
	for i, s := range file.Syscalls {
		if s == nil {
			return nil, fmt.Errorf("syscalls[%d]: %w: null", i, ErrInvalid)
		}
		names := s.Names
		if s.Name != "" {
			if len(names) > 0 {
				return nil, fmt.Errorf("syscalls[%d]: %w: both name and names", i, ErrInvalid)
			}
			names = []string{s.Name}
		}
		for _, name := range names {
			if _, err := lookUp(name); err != nil {
				return nil, fmt.Errorf("syscalls[%d]: %w", i, err)
			}
		}
		ok, err := applies(s, caps, dockerArch[goarch])
		if err != nil {
			return nil, err
		}
		if ok {
			out := s.LinuxSyscall
			out.Names = slices.Clone(names)
			p.Syscalls = append(p.Syscalls, out)
		}
	}
	return &p, nil
}

// applies judges includes (all must hold) and excludes (none may).
func applies(s *moby.Syscall, caps []string, arch string) (bool, error) {
	has := func(name string) bool { return slices.Contains(caps, name) }
	if x := s.Excludes; x != nil {
		newer, err := atLeast(x.MinKernel)
		if err != nil {
			return false, err
		}
		if slices.Contains(x.Arches, arch) || slices.ContainsFunc(x.Caps, has) || x.MinKernel != nil && newer {
			return false, nil
		}
	}
	if x := s.Includes; x != nil {
		newer, err := atLeast(x.MinKernel)
		if err != nil {
			return false, err
		}
		lacks := func(name string) bool { return !has(name) }
		if len(x.Arches) > 0 && !slices.Contains(x.Arches, arch) || slices.ContainsFunc(x.Caps, lacks) || !newer {
			return false, nil
		}
	}
	return true, nil
}

// atLeast says whether the kernel has version v; nil: yes. (Features are probed elsewhere; here
// the form of the file asks for a version.)
func atLeast(v *moby.KernelVersion) (bool, error) {
	if v == nil {
		return true, nil
	}
	k, err := kernel()
	if err != nil {
		return false, err
	}
	return k.Kernel > v.Kernel || k.Kernel == v.Kernel && k.Major >= v.Major, nil
}

var kernel = sync.OnceValues(func() (moby.KernelVersion, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return moby.KernelVersion{}, os.NewSyscallError("uname", err)
	}
	return parseRelease(unix.ByteSliceToString(u.Release[:]))
})

// parseRelease reads the first two numbers of "6.18.5-gentoo".
func parseRelease(release string) (v moby.KernelVersion, err error) {
	first, rest, _ := strings.Cut(release, ".")
	second := rest
	if i := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		second = rest[:i]
	}
	v.Kernel, err = strconv.ParseUint(first, 10, 16)
	if err == nil {
		v.Major, err = strconv.ParseUint(second, 10, 16)
	}
	if err != nil {
		return v, errors.Join(fmt.Errorf("kernel release %.64q", release), err)
	}
	return v, nil
}

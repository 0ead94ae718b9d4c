// Package caps turns capability names into sets, as CRI and the OCI runtime specification use them. See
// capabilities(7).
//
// Names are accepted with and without "CAP_", in any case; returned with it, in
// the kernel's order. What this kernel does not know is an error when it is asked for by name and left out of ALL. ALL is
// also without what this process cannot hand on, because it is not in its bounding set: a daemon that runs in a
// container itself can still run privileged ones, with what there is.
package caps

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/moby/sys/capability"
)

// ErrUnknown is returned for a name that is no capability of this kernel.
var ErrUnknown = errors.New("unknown capability")

// all is what this kernel has, in order of number.
var all = sync.OnceValues(func() ([]capability.Cap, error) { return capability.ListSupported() })

// givable is what a child of this process can have at most: all of the kernel's that are in the bounding set.
var givable = sync.OnceValues(func() ([]capability.Cap, error) {
	l, err := all()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(l), func(c capability.Cap) bool {
		in, err := capability.GetBound(c)
		return err == nil && !in
	}), nil
})

// index finds a capability of this kernel by its name without CAP_.
var index = sync.OnceValues(func() (map[string]capability.Cap, error) {
	l, err := all()
	if err != nil {
		return nil, err
	}
	m := make(map[string]capability.Cap, len(l))
	for _, c := range l {
		m[strings.ToUpper(c.String())] = c
	}
	return m, nil
})

// defaults are containerd's and Docker's: mask 0xa80425fb.
var defaults = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP",
	"CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SYS_CHROOT", "CAP_MKNOD", "CAP_AUDIT_WRITE", "CAP_SETFCAP",
}

// Default returns what a container gets when nothing is said.
func Default() []string { return append([]string(nil), defaults...) }

// All returns every capability of this kernel that this process can hand on.
func All() ([]string, error) {
	l, err := givable()
	if err != nil {
		return nil, err
	}
	return names(^uint64(0), l), nil
}

// Mask returns the set as capset(2) numbers it. Unknown: ErrUnknown.
func Mask(names []string) (uint64, error) {
	var m uint64
	for _, n := range names {
		c, err := number(n)
		if err != nil {
			return 0, err
		}
		m |= 1 << c
	}
	return m, nil
}

// Apply changes base as a CRI Capability message says: ADD ALL, then DROP ALL, then what is added, then what is dropped
// by name, so that a drop by name always wins.
func Apply(base, add, drop []string) ([]string, error) {
	l, err := all()
	if err != nil {
		return nil, err
	}
	m, err := Mask(base)
	if err != nil {
		return nil, err
	}
	var added, dropped uint64
	for _, n := range add {
		if isAll(n) {
			every, err := givable()
			if err != nil {
				return nil, err
			}
			m |= bits(every)
			continue
		}
		c, err := number(n)
		if err != nil {
			return nil, fmt.Errorf("add: %w", err)
		}
		added |= 1 << c
	}
	for _, n := range drop {
		if isAll(n) {
			m = 0
			continue
		}
		c, err := number(n)
		if err != nil {
			return nil, fmt.Errorf("drop: %w", err)
		}
		dropped |= 1 << c
	}
	return names((m|added)&^dropped, l), nil
}

func isAll(name string) bool { return bare(name) == "ALL" }

func bare(name string) string { return strings.TrimPrefix(strings.ToUpper(name), "CAP_") }

func number(name string) (capability.Cap, error) {
	m, err := index()
	if err != nil {
		return 0, err
	}
	c, ok := m[bare(name)]
	if !ok {
		return 0, fmt.Errorf("%w %q", ErrUnknown, name)
	}
	return c, nil
}

func bits(l []capability.Cap) (mask uint64) {
	for _, c := range l {
		mask |= 1 << c
	}
	return mask
}

func names(mask uint64, known []capability.Cap) []string {
	var l []string
	for _, c := range known {
		if mask&(1<<c) != 0 {
			l = append(l, "CAP_"+strings.ToUpper(c.String()))
		}
	}
	return l
}

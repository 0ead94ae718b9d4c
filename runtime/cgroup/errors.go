package cgroup

import (
	"errors"
	"strconv"

	"golang.org/x/sys/unix"
)

// Sentinels; every error of this package that has a kind is an [*Error] that
// unwraps to one of them and to its cause.
var (
	// ErrInvalid is returned for a cgroup_parent, name or limit that can never
	// work, and for a limit the kernel refused (EINVAL, ERANGE, EACCES).
	ErrInvalid = errors.New("invalid argument")
	// ErrUnsupported is returned for a limit whose controller this node does not
	// have, or that its cgroup version cannot express.
	ErrUnsupported = errors.New("not supported")
	// ErrBusy is returned when processes or child cgroups are left in a cgroup to be removed or
	// killed, when a controller cannot be enabled because of them, and for a memory limit below what is in use.
	ErrBusy = errors.New("busy")
	// ErrNotFound is returned when the cgroup does not exist.
	ErrNotFound = errors.New("cgroup not found")
)

// Error is a failed operation on a cgroup.
type Error struct {
	Op   string // "create", "update", "kill", …
	Path string // of the cgroup, below the hierarchies' roots
	Step string // "memory limit 4096 bytes", "mkdir"; "" when Op says it all
	Kind error  // a sentinel, or nil: the host's fault or ours
	Err  error  // the cause, often an *fs.PathError; nil when Step says it all
}

func (e *Error) Error() string {
	s := "cannot " + e.Op + " cgroup " + strconv.Quote(e.Path)
	if e.Step != "" {
		s += ": " + e.Step
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap returns Kind and Err.
func (e *Error) Unwrap() []error {
	var l []error
	if e.Kind != nil {
		l = append(l, e.Kind)
	}
	if e.Err != nil {
		l = append(l, e.Err)
	}
	return l
}

// kindOf classifies what the kernel answered to an access of a cgroup file or directory.
func kindOf(err error) error {
	var kind *Error
	switch {
	case errors.As(err, &kind):
		return kind.Kind
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV): // ENODEV: removed while open
		return ErrNotFound
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ERANGE), errors.Is(err, unix.EACCES), errors.Is(err, unix.ENOSPC):
		// EACCES, ENOSPC: cpuset outside its parent's, or emptied below its processes.
		return ErrInvalid
	case errors.Is(err, unix.EBUSY):
		return ErrBusy
	case errors.Is(err, unix.EOPNOTSUPP):
		return ErrUnsupported
	}
	return nil
}

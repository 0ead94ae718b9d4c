package podsandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// logMode is containerd's: readable for a group that an administrator may give to log collectors.
const logMode = 0o640

// openLog opens or makes a container's log file: name below dir, whose missing directories are made.
//
// Nothing on the way from dir may be a symbolic link, and the file must be a regular one with a
// single name: a planted link, FIFO or device is refused, and no FIFO without a reader can hang us (CVE-2026-53489,
// SEC-100, SEC-101). dir itself is the kubelet's word.
//
// Trust: what is below dir may have been made by a container that mounts it. Undo: none, logs are the kubelet's to remove.
func openLog(dir, name string) (*os.File, error) {
	if !filepath.IsLocal(name) {
		return nil, fmt.Errorf("%w: log path %q leads out of the log directory", ErrInvalid, name)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	at, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	defer func() { _ = unix.Close(at) }() // O_PATH: nothing to lose
	parts := strings.Split(filepath.Clean(name), "/")
	for i, part := range parts[:len(parts)-1] {
		here := filepath.Join(dir, filepath.Join(parts[:i+1]...))
		if err := unix.Mkdirat(at, part, 0o755); err != nil && err != unix.EEXIST {
			return nil, &fs.PathError{Op: "mkdir", Path: here, Err: err}
		}
		fd, err := unix.Openat(at, part, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: here, Err: err}
		}
		_ = unix.Close(at) // as above
		at = fd
	}
	path := filepath.Join(dir, name)
	// O_NONBLOCK: a FIFO without a reader is ENXIO, not a wait. It means nothing to a regular file.
	fd, err := unix.Openat(at, parts[len(parts)-1], unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, logMode)
	if err != nil {
		return nil, &fs.PathError{Op: "open log", Path: path, Err: err}
	}
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	switch {
	case err != nil:
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		err = errors.New("it is not a regular file")
	case st.Nlink != 1:
		err = fmt.Errorf("it has %d names: somebody linked it", st.Nlink)
	}
	if err != nil {
		_ = unix.Close(fd) // nothing was written
		return nil, &fs.PathError{Op: "open log", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

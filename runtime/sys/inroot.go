// Package sys holds the few system-call recipes that both the daemon and
// crisp-init need: resolving paths inside an untrusted root, and new-style
// mounts. It is linked into crisp-init and imports only small packages.
//
// Errors are *[Error]: the operation, the object, the errno.
package sys

import (
	"errors"
	"strings"

	"golang.org/x/sys/unix"
)

// Error is a failed system call on an object. It unwraps to the errno.
type Error struct {
	Op   string // "openat2", "move_mount", …
	Path string // the object as the caller named it, "" if it has no name
	Err  error  // always a unix.Errno
}

func (e *Error) Error() string {
	if e.Path == "" {
		return e.Op + ": " + e.Err.Error()
	}
	return e.Op + " " + e.Path + ": " + e.Err.Error()
}

func (e *Error) Unwrap() error { return e.Err }

func wrap(op, path string, err error) error {
	if err == nil {
		return nil
	}
	return &Error{Op: op, Path: path, Err: err}
}

// Links says what happens to symbolic links on the way to a target.
type Links uint8

const (
	// FollowInRoot resolves links as the container would: "/" and ".." never leave the root.
	FollowInRoot Links = iota
	// RefuseLinks fails with ELOOP at the first link (CVE-2019-19921 class: /proc, /sys,
	// /dev of an image must be ordinary directories).
	RefuseLinks
)

// Kind of a target that does not exist yet.
type Kind uint8

const (
	Directory Kind = iota
	RegularFile
)

const maxLinks = 40 // MAXSYMLINKS, path_resolution(7)

// OpenInRoot opens path below the directory root as the container would see it.
// Magic links of procfs are refused. The path is relative to root whether or not
// it begins with "/".
//
// Trust: everything below root may be hostile and change while we look.
func OpenInRoot(root int, path string, flags uint64, links Links) (int, error) {
	how := unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	if links == RefuseLinks {
		how.Resolve |= unix.RESOLVE_NO_SYMLINKS
	}
	if path == "" {
		path = "."
	}
	for {
		fd, err := unix.Openat2(root, path, &how)
		// EAGAIN: something was renamed while ".." was resolved, openat2(2): try again.
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		return fd, wrap("open", path, err)
	}
}

// EnsureInRoot opens path below root with O_PATH and makes what is missing of it:
// directories (0755), and as the last component a directory or an empty file
// (0644). A dangling link on the way is followed and its target made, inside root.
//
// The walk holds a descriptor of each directory it passed and never asks the kernel
// for "..", so a tree that is renamed meanwhile cannot lead it out.
//
// Needs: CAP_DAC_OVERRIDE in the user namespace that owns root. Undo: none, an empty
// mount point stays in the writable layer.
func EnsureInRoot(root int, path string, kind Kind, links Links) (int, error) {
	fd, err := OpenInRoot(root, path, unix.O_PATH, links)
	if err == nil || !errors.Is(err, unix.ENOENT) {
		return fd, err
	}
	todo := split(path)
	if fd, err := ensureLast(root, todo, kind, links); err == nil {
		return fd, nil
	}
	w := walk{stack: []int{root}}
	defer w.close()
	for followed := 0; len(todo) > 0; {
		name := todo[0]
		todo = todo[1:]
		if name == ".." {
			w.pop()
			continue
		}
		last := len(todo) == 0
		fd, link, err := w.step(name, last && kind == RegularFile)
		if err != nil {
			return -1, wrap("make", path, err)
		}
		if link == "" {
			w.push(fd)
			continue
		}
		if followed++; followed > maxLinks || links == RefuseLinks {
			return -1, wrap("make", path, unix.ELOOP)
		}
		if strings.HasPrefix(link, "/") {
			w.rewind()
		}
		todo = append(split(link), todo...)
	}
	return w.take(path)
}

// ensureLast is EnsureInRoot where only the last component is missing, as of most mount points: the kernel walks to its directory, which
// costs half as many system calls as walking there by steps. An error says nothing but that the steps are to be tried.
func ensureLast(root int, path []string, kind Kind, links Links) (int, error) {
	if len(path) < 2 || path[len(path)-1] == ".." {
		return -1, unix.ENOENT
	}
	last := len(path) - 1
	dir, err := OpenInRoot(root, strings.Join(path[:last], "/"), unix.O_PATH|unix.O_DIRECTORY, links)
	if err != nil {
		return -1, err
	}
	w := walk{stack: []int{root, dir}}
	defer w.close()
	fd, link, err := w.step(path[last], kind == RegularFile)
	if link != "" { // somebody made it meanwhile, or it dangles: where it leads depends on the way here
		return -1, unix.ELOOP
	}
	return fd, err
}

// split cuts a path into its components; "." and "" are none.
func split(path string) []string {
	var l []string
	for _, c := range strings.Split(path, "/") {
		if c != "" && c != "." {
			l = append(l, c)
		}
	}
	return l
}

// walk is a position in a tree: the descriptors from the root down to it. The root is the caller's.
type walk struct{ stack []int }

func (w *walk) top() int    { return w.stack[len(w.stack)-1] }
func (w *walk) push(fd int) { w.stack = append(w.stack, fd) }
func (w *walk) pop() {
	if len(w.stack) > 1 {
		_ = unix.Close(w.top()) // O_PATH: nothing to lose
		w.stack = w.stack[:len(w.stack)-1]
	}
}
func (w *walk) rewind() {
	for len(w.stack) > 1 {
		w.pop()
	}
}
func (w *walk) close() { w.rewind() }

// take hands the deepest descriptor to the caller.
func (w *walk) take(path string) (int, error) {
	if len(w.stack) == 1 {
		return OpenInRoot(w.top(), ".", unix.O_PATH|unix.O_DIRECTORY, RefuseLinks)
	}
	fd := w.top()
	w.stack = w.stack[:len(w.stack)-1]
	return fd, nil
}

// step opens name below the top, making it if it is missing. For a link it
// returns where it points to instead of a descriptor.
func (w *walk) step(name string, file bool) (fd int, link string, err error) {
	for {
		fd, err = unix.Openat(w.top(), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err == unix.EINTR {
			continue
		}
		if err != unix.ENOENT {
			break
		}
		if file {
			var made int
			if made, err = unix.Openat(w.top(), name, unix.O_CREAT|unix.O_EXCL|unix.O_RDONLY|unix.O_CLOEXEC, 0o644); err == nil {
				_ = unix.Close(made) // just created, nothing written
			}
		} else {
			err = unix.Mkdirat(w.top(), name, 0o755)
		}
		if err != nil && err != unix.EEXIST {
			return -1, "", err
		}
	}
	if err != nil {
		return -1, "", err
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
		buf := make([]byte, unix.PathMax)
		var n int
		n, err = unix.Readlinkat(fd, "", buf)
		_ = unix.Close(fd) // O_PATH
		if err == nil && n == 0 {
			err = unix.ENOENT
		}
		return -1, string(buf[:max(n, 0)]), err
	}
	if err != nil {
		_ = unix.Close(fd) // O_PATH
		return -1, "", err
	}
	return fd, "", nil
}

package podsandbox

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// removeTrees deletes the named directories in root and everything below them.
//
// The trees were written by a container: they may be nested deeper than there are descriptors or stack for a
// recursion. Directories that are not empty are therefore moved up into root and emptied there,
// so that the walk is never more than one directory deep. Links are not followed. One that was interrupted is
// finished by the next.
//
// Trust: everything below root is hostile, but nobody writes it any more. Undo: none.
func removeTrees(root string, names ...string) error {
	dir, err := os.OpenFile(root, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }() // a directory: nothing to lose
	r := remover{root: int(dir.Fd())}
	present, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, n := range present {
		if rest, ok := strings.CutPrefix(n, movedPrefix); ok {
			r.todo = append(r.todo, n)
			if i, err := strconv.Atoi(rest); err == nil {
				r.next = max(r.next, i+1)
			}
		} else if slices.Contains(names, n) {
			r.todo = append(r.todo, n)
		}
	}
	for len(r.todo) > 0 {
		n := r.todo[len(r.todo)-1]
		r.todo = r.todo[:len(r.todo)-1]
		if err := r.empty(n); err != nil {
			return err
		}
		if err := ignoringEINTR(func() error { return unix.Unlinkat(r.root, n, unix.AT_REMOVEDIR) }); err != nil {
			return &fs.PathError{Op: "rmdir", Path: n, Err: err}
		}
	}
	return nil
}

// movedPrefix marks directories on their way out.
const movedPrefix = ".removing-"

type remover struct {
	root int
	next int      // number of the next name in root
	todo []string // in root, to be emptied and removed
}

// moveUp moves a directory from dir to root.
func (r *remover) moveUp(dir int, name string) error {
	to := movedPrefix + strconv.Itoa(r.next)
	r.next++
	err := ignoringEINTR(func() error { return unix.Renameat2(dir, name, r.root, to, unix.RENAME_NOREPLACE) })
	if err != nil {
		return &fs.PathError{Op: "rename", Path: name, Err: err}
	}
	r.todo = append(r.todo, to)
	return nil
}

// empty removes what is in a directory of root, and moves up its directories that are not empty.
func (r *remover) empty(name string) error {
	fd, err := unix.Openat(r.root, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: name, Err: err}
	}
	dir := os.NewFile(uintptr(fd), name)
	defer func() { _ = dir.Close() }() // as above
	for {
		names, err := dir.Readdirnames(1024)
		if len(names) == 0 {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		for _, n := range names {
			if err := r.removeIn(fd, n); err != nil {
				return fmt.Errorf("%s: %w", n, err)
			}
		}
		// What was removed may confuse the position: begin again.
		if _, err := dir.Seek(0, 0); err != nil {
			return err
		}
	}
}

func (r *remover) removeIn(dir int, name string) error {
	err := ignoringEINTR(func() error { return unix.Unlinkat(dir, name, 0) })
	if err == unix.EPERM {
		// Immutable or append-only, chattr(1); so may its directory be.
		clearFlags(dir, ".")
		clearFlags(dir, name)
		err = ignoringEINTR(func() error { return unix.Unlinkat(dir, name, 0) })
	}
	if err != unix.EISDIR {
		return ifAny("unlink", name, err)
	}
	err = ignoringEINTR(func() error { return unix.Unlinkat(dir, name, unix.AT_REMOVEDIR) })
	if err == unix.EPERM {
		clearFlags(dir, ".")
		clearFlags(dir, name)
		err = ignoringEINTR(func() error { return unix.Unlinkat(dir, name, unix.AT_REMOVEDIR) })
	}
	if err == unix.ENOTEMPTY || err == unix.EEXIST {
		return r.moveUp(dir, name)
	}
	return ifAny("rmdir", name, err)
}

func ifAny(op, name string, err error) error {
	if err == nil || err == unix.ENOENT {
		return nil
	}
	return &fs.PathError{Op: op, Path: name, Err: err}
}

// clearFlags removes the immutable and append-only flags, as far as the file system has them:
// whoever cannot be helped fails at the next unlink.
func clearFlags(dir int, name string) {
	const immutable, appendOnly = 0x10, 0x20 // FS_IMMUTABLE_FL, FS_APPEND_FL of linux/fs.h
	var st unix.Stat_t
	if unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return // opening a device may do something
	}
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
	if err == nil && flags&(immutable|appendOnly) != 0 {
		_ = unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, flags&^(immutable|appendOnly)) // the unlink tells
	}
}

func ignoringEINTR(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

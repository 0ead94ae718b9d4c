package unpack

import (
	"container/list"
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/image/fault"
)

// openDirs is how many directories of a layer are kept open.
const openDirs = 256

// dir is an open directory of the tree. The file descriptor (O_PATH) is closed
// when the last user is gone: the cache, or a file maker.
type dir struct {
	fd    int
	ino   uint64
	depth int
	users atomic.Int32
}

func (d *dir) use() *dir { d.users.Add(1); return d }

func (d *dir) done() {
	if d.users.Add(-1) == 0 {
		_ = unix.Close(d.fd) // O_PATH: nothing to lose
	}
}

// tree is the layer being made. Its methods are for the archive's goroutine only.
type tree struct {
	root     *dir
	rootName string // as the kernel names it
	maxDepth int
	// implied is asked before a directory that the archive leaves out is made; left, if nothing in this layer hides
	// what the layers below have in its place, told of it.
	implied func(up *dir, base string) error
	left    func(d *dir) error

	open   map[string]*list.Element // by cleaned path; values are *openDir
	recent *list.List               // front: last used
}

type openDir struct {
	path string
	dir  *dir
}

// openTree opens the directory at path as the root of a tree.
func openTree(path string, maxDepth int) (*tree, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	root, err := newDir(fd, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	rootName, err := fdName(fd)
	if err != nil {
		root.done()
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return &tree{root: root, rootName: rootName, maxDepth: maxDepth, open: map[string]*list.Element{}, recent: list.New()}, nil
}

// fdName returns the kernel's name of an open file (proc_pid_fd(5)).
func fdName(fd int) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlink("/proc/self/fd/"+strconv.Itoa(fd), buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// realName is the path of an open directory in the tree, without links; "" is the root.
func (t *tree) realName(d *dir) (string, error) {
	name, err := fdName(d.fd)
	if err == unix.ENAMETOOLONG {
		return "", fmt.Errorf("%w: a directory whose path is longer than %d bytes", fault.Limit, unix.PathMax)
	}
	return strings.TrimPrefix(strings.TrimPrefix(name, t.rootName), "/"), err
}

// depthOf counts the directories between the root and fd. The name by which fd
// was opened does not tell: a layer can chain symbolic links, each leading
// PATH_MAX deeper.
func (t *tree) depthOf(fd int) (int, error) {
	name, err := fdName(fd)
	if err == unix.ENAMETOOLONG {
		return t.maxDepth, nil
	}
	if err != nil {
		return 0, err
	}
	return strings.Count(strings.TrimPrefix(name, t.rootName), "/"), nil
}

func newDir(fd, depth int) (*dir, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	d := &dir{fd: fd, ino: st.Ino, depth: depth}
	d.users.Store(1)
	return d, nil
}

func (t *tree) close() {
	t.forget()
	t.root.done()
}

// forget closes all cached directories: something that may be on their paths was replaced.
func (t *tree) forget() {
	for e := t.recent.Front(); e != nil; e = e.Next() {
		e.Value.(*openDir).dir.done()
	}
	t.recent.Init()
	clear(t.open)
}

// lookup returns the directory at a cleaned path ("" is the root), following
// symbolic links inside the root. The caller must not keep it beyond the next
// call, or use it. Errors: ENOENT, ENOTDIR, ELOOP as of openat2(2).
func (t *tree) lookup(name string) (*dir, error) {
	if name == "" {
		return t.root, nil
	}
	if e, ok := t.open[name]; ok {
		t.recent.MoveToFront(e)
		return e.Value.(*openDir).dir, nil
	}
	fd, err := t.openIn(name)
	if err != nil {
		return nil, err
	}
	depth, err := t.depthOf(fd)
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	d, err := newDir(fd, depth)
	if err != nil {
		return nil, err
	}
	t.remember(name, d)
	return d, nil
}

func (t *tree) remember(name string, d *dir) {
	if t.recent.Len() >= openDirs {
		oldest := t.recent.Back()
		entry := t.recent.Remove(oldest).(*openDir)
		delete(t.open, entry.path)
		entry.dir.done()
	}
	t.open[name] = t.recent.PushFront(&openDir{path: name, dir: d})
}

func (t *tree) openIn(name string) (int, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		fd, err := unix.Openat2(t.root.fd, name, &how)
		// openat2(2): EAGAIN when a ".." could not be resolved safely because of
		// a rename anywhere on the machine; "userspace should retry".
		if err != unix.EAGAIN && err != unix.EINTR {
			return fd, err
		}
	}
}

// parent returns the directory that holds a cleaned, non-empty name, making
// what is missing on the way, and the last component.
func (t *tree) parent(name string) (*dir, string, error) {
	above, base := path.Split(name)
	d, err := t.ensure(strings.TrimSuffix(above, "/"))
	return d, base, err
}

// impliedMode is the mode of directories that an archive leaves out, unless a layer below has them.
const impliedMode = 0o755

// ensure returns the directory at a cleaned path and makes it, and those above
// it, where they are missing: archives may leave out parents. They get impliedMode
// and belong to root.
func (t *tree) ensure(name string) (*dir, error) {
	d, err := t.lookup(name)
	if err != unix.ENOENT && err != unix.ENOTDIR {
		return d, explainParent(err)
	}
	up, base, err := t.parent(name)
	if err != nil {
		return nil, err
	}
	up = up.use()
	defer up.done()
	was, err := kindOf(up, base)
	switch {
	case err != nil:
		return nil, err
	case was == isWhiteout:
		if err := unix.Unlinkat(up.fd, base, 0); err != nil {
			return nil, err
		}
	case was != absent:
		return nil, fmt.Errorf("%w: the parent %q is not a directory, nor a link to one in this layer", fault.Corrupt, clip(name))
	}
	if err := t.implied(up, base); err != nil {
		return nil, err
	}
	if d, err = t.mkdir(up, name, base); err != nil {
		return nil, err
	}
	if was == isWhiteout {
		err = setXattr(d, ".", opaqueXattr, []byte("y"))
	} else {
		err = t.left(d)
	}
	if err != nil {
		return nil, err
	}
	return d, chmodDir(d, impliedMode)
}

func explainParent(err error) error {
	switch err {
	case unix.ELOOP, unix.ENAMETOOLONG:
		return fmt.Errorf("%w: parent directory: %w", fault.Corrupt, err)
	}
	return err
}

// mkdir makes directory base in up and opens it under its full name. Its mode
// is 0700 until the caller sets it. Errors: EEXIST as it is.
func (t *tree) mkdir(up *dir, name, base string) (*dir, error) {
	if up.depth >= t.maxDepth {
		return nil, fmt.Errorf("%w: directories are nested more than %d deep", fault.Limit, t.maxDepth)
	}
	if err := unix.Mkdirat(up.fd, base, 0o700); err != nil {
		return nil, err
	}
	fd, err := unix.Openat(up.fd, base, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	d, err := newDir(fd, up.depth+1)
	if err != nil {
		return nil, err
	}
	t.remember(name, d)
	return d, nil
}

// kind is what a name in the tree is now.
type kind int

const (
	absent kind = iota
	isDir
	isWhiteout // char device 0:0; only we make them
	isOther
)

func kindOf(d *dir, base string) (kind, error) {
	var st unix.Stat_t
	err := unix.Fstatat(d.fd, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case err == unix.ENOENT:
		return absent, nil
	case err != nil:
		return absent, err
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		return isDir, nil
	case st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0:
		return isWhiteout, nil
	}
	return isOther, nil
}

// removeTree removes base in parent, whatever it is. It follows no link. Its
// open files are bounded by the depth limit.
func removeTree(parent int, base string) error {
	err := unix.Unlinkat(parent, base, 0)
	if err != unix.EISDIR {
		return err
	}
	fd, err := unix.Openat(parent, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	buf := make([]byte, 8<<10)
	for removed := 1; removed > 0; {
		// Removing may make readdir skip entries: start over until none is left.
		if _, err := unix.Seek(fd, 0, 0); err != nil {
			return err
		}
		removed = 0
		for {
			n, err := unix.ReadDirent(fd, buf)
			if err != nil {
				return err
			}
			if n == 0 {
				break
			}
			_, _, names := unix.ParseDirent(buf[:n], -1, nil)
			for _, name := range names {
				if err := removeTree(fd, name); err != nil {
					return err
				}
				removed++
			}
		}
	}
	return unix.Unlinkat(parent, base, unix.AT_REMOVEDIR)
}

// The functions below set one attribute of a directory held by O_PATH, or of
// base in one, without opening base and without following it.

func chmodDir(d *dir, mode uint32) error {
	return unix.Fchmodat(d.fd, ".", mode, 0)
}

func timesOf(modified, accessed time.Time) [2]unix.Timespec {
	if modified.IsZero() {
		modified = time.Unix(0, 0)
	}
	if accessed.IsZero() {
		accessed = modified
	}
	return [2]unix.Timespec{
		{Sec: accessed.Unix(), Nsec: int64(accessed.Nanosecond())},
		{Sec: modified.Unix(), Nsec: int64(modified.Nanosecond())},
	}
}

// setXattr sets an attribute of base in d ("." for d itself). xattr(7) has no
// call relative to a directory before Linux 6.13; d's entry in /proc/self/fd is
// a magic link to the directory itself, and lsetxattr(2) does not follow base.
func setXattr(d *dir, base, key string, value []byte) error {
	err := unix.Lsetxattr("/proc/self/fd/"+strconv.Itoa(d.fd)+"/"+base, key, value, 0)
	return ignoreUserXattr(key, err)
}

// ignoreUserXattr drops the errors of file systems and file types that cannot
// hold user.* (xattr(7): regular files and directories only). Nothing that runs
// depends on those, as it may on security.capability.
func ignoreUserXattr(key string, err error) error {
	if strings.HasPrefix(key, "user.") && (errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.EPERM)) {
		return nil
	}
	return err
}

// clip shortens a name from an archive for an error text.
func clip(name string) string {
	if len(name) > 200 {
		return name[:200] + "..."
	}
	return name
}

package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/sys"
)

// DefaultDir is where ip-netns(8) looks.
const DefaultDir = "/run/netns"

// Sentinels.
var (
	// ErrExists is returned by Pin when the name shows another namespace.
	ErrExists = errors.New("name is taken by another network namespace")
	// ErrName is returned for a name that is not a plain file name.
	ErrName = errors.New("invalid network namespace name")
)

// Dir is a directory in which network namespaces are visible as files: an nsfs
// mount on an empty file each, as ip-netns(8) makes them. It is safe for
// concurrent use on different names. The directory belongs to root; nothing in
// it is written by a container.
type Dir struct {
	path string
	fd   *os.File // O_PATH
}

// OpenDir makes the directory where it is missing and, like ip-netns(8), makes it
// a shared mount point of its own, so that a namespace pinned later is also seen
// in other mount namespaces that were given the directory (CNI daemons in pods),
// and so that ip-netns(8) will not mount it over itself later and hide ours.
//
// Needs: CAP_SYS_ADMIN. Undo: none, the directory is shared with other programs.
func OpenDir(path string) (*Dir, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("cannot open directory of network namespaces %q: not an absolute path", path)
	}
	if err := os.MkdirAll(path, 0o755); err != nil {
		return nil, fmt.Errorf("cannot open directory of network namespaces: %w", err)
	}
	// EINVAL: not a mount point yet.
	err := unix.Mount("", path, "none", unix.MS_SHARED|unix.MS_REC, "")
	if errors.Is(err, unix.EINVAL) {
		err = makeShared(path)
	} else if err != nil {
		err = &os.PathError{Op: "make shared", Path: path, Err: err}
	}
	if err != nil {
		return nil, err
	}
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return &Dir{path: path, fd: os.NewFile(uintptr(fd), path)}, nil
}

// makeShared bind-mounts path over itself, with a peer group of its own. mount(2) alone would leave it in the group of
// the mount that path is on, where that one is shared (as systemd makes all): whatever is mounted on it would be there
// twice, on it and below it. It is put there when it is shared already, so that its copies in other
// mount namespaces are of its group, too.
func makeShared(path string) error {
	fd, err := sys.CloneMount(unix.AT_FDCWD, path, true)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, propagation := range []uint64{unix.MS_PRIVATE, unix.MS_SHARED} {
		if err := sys.SetMountAttr(fd, true, unix.MountAttr{Propagation: propagation}); err != nil {
			return &os.PathError{Op: "make shared", Path: path, Err: err}
		}
	}
	at, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(at)
	return sys.AttachMount(fd, at, path)
}

// Close releases the directory. Pinned namespaces stay.
func (d *Dir) Close() error { return d.fd.Close() }

// Path is the host path of name, whether or not it exists.
func (d *Dir) Path(name string) string { return filepath.Join(d.path, name) }

// Pin makes ns visible as name and returns its path. It is idempotent: the same
// namespace under the same name is left as it is, and a file without a namespace
// on it (a leftover of a crash) is used.
//
// Needs: CAP_SYS_ADMIN. Undo: Unpin. Trust: name comes from us; no slash, no dot.
func (d *Dir) Pin(name string, ns *os.File) (string, error) {
	path := d.Path(name)
	if err := checkName(name); err != nil {
		return "", fmt.Errorf("cannot pin network namespace: %w", err)
	}
	fd, err := unix.Openat(int(d.fd.Fd()), name, unix.O_RDONLY|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("cannot pin network namespace: %w", &os.PathError{Op: "create", Path: path, Err: err})
	}
	f := os.NewFile(uintptr(fd), path)
	defer func() { _ = f.Close() }() // Read-only: nothing can be lost.
	if isNS(f) {
		same, err := Same(f, ns)
		if err != nil {
			return "", fmt.Errorf("cannot pin network namespace: %w", err)
		}
		if !same {
			return "", fmt.Errorf("cannot pin network namespace at %s: %w", path, ErrExists)
		}
		return path, nil
	}
	tree, err := unix.OpenTree(int(ns.Fd()), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err == nil {
		defer func() { _ = unix.Close(tree) }() // Attached or given up by now.
		err = unix.MoveMount(tree, "", int(d.fd.Fd()), name, unix.MOVE_MOUNT_F_EMPTY_PATH)
	}
	if err != nil {
		_ = unix.Unlinkat(int(d.fd.Fd()), name, 0) // The first error tells; a leftover file is reused.
		return "", fmt.Errorf("cannot pin network namespace: %w", &os.PathError{Op: "bind mount", Path: path, Err: err})
	}
	return path, nil
}

// Unpin takes name away. It is idempotent, and it does not matter whether the
// mount, the file, both or neither are left. The namespace itself goes when
// nothing else refers to it.
func (d *Dir) Unpin(name string) error {
	if err := checkName(name); err != nil {
		return fmt.Errorf("cannot unpin network namespace: %w", err)
	}
	path := d.Path(name)
	// Someone may have mounted more than once. Detached, as a process that has the
	// file open keeps the mount busy. EINVAL: not a mount point (any more).
	for {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err == nil {
			continue
		}
		if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("cannot unpin network namespace: %w", &os.PathError{Op: "unmount", Path: path, Err: err})
		}
		break
	}
	if err := unix.Unlinkat(int(d.fd.Fd()), name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("cannot unpin network namespace: %w", &os.PathError{Op: "unlink", Path: path, Err: err})
	}
	return nil
}

// Open opens the namespace pinned as name. It returns fs.ErrNotExist when there
// is no such file or no namespace is mounted on it.
func (d *Dir) Open(name string) (*os.File, error) {
	if err := checkName(name); err != nil {
		return nil, fmt.Errorf("cannot open network namespace: %w", err)
	}
	path := d.Path(name)
	fd, err := unix.Openat(int(d.fd.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	if !isNS(f) {
		_ = f.Close() // Not what was asked for.
		return nil, &os.PathError{Op: "open network namespace", Path: path, Err: fs.ErrNotExist}
	}
	return f, nil
}

// List returns the names in the directory that start with prefix, sorted, whether
// or not a namespace is still mounted on them: what a collector has to look at.
func (d *Dir) List(prefix string) ([]string, error) {
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return nil, fmt.Errorf("cannot list network namespaces: %w", err)
	}
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// isNS reports whether f is a namespace, not an ordinary file.
func isNS(f *os.File) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(int(f.Fd()), &st) == nil && st.Type == unix.NSFS_MAGIC
}

// checkName refuses what is not one plain path element.
func checkName(name string) error {
	if name == "" || len(name) > 255 || name[0] == '.' || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("%w %q", ErrName, name)
	}
	return nil
}

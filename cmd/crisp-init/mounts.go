package main

import (
	"errors"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/initproto"
	"github.com/crisp-cri/crisp/runtime/sys"
)

// Paths of the base mount namespace, which crispd made (runtime/spawn, makeBase): a read-only tmpfs
// with an unmasked /proc and /sys, and these empty mount points.
const (
	newRoot = "/root"
	podShm  = "/shm"
	podPIDs = "/pids"
)

// A step is a failed step of a start: its name is what the user reads.
type step struct {
	name string
	err  error
	text string // instead of the errno's, where that misleads
}

func failed(name string, err error) *step {
	if err == nil {
		return nil
	}
	return &step{name: name, err: err}
}

// message is what is sent to the pod init.
func (s *step) message() initproto.Message {
	f := initproto.Failure{Kind: initproto.FailStart, Step: s.name, Text: s.text}
	var e *sys.Error
	if errors.As(s.err, &e) {
		f.Step += ": " + e.Op
		if e.Path != "" {
			f.Step += " " + e.Path
		}
	}
	var errno unix.Errno
	if errors.As(s.err, &errno) {
		f.Errno = uint32(errno)
	} else if f.Text == "" && s.err != nil {
		f.Text = s.err.Error()
	}
	return initproto.Message{Type: initproto.TypeFailed, Body: f.Encode()}
}

// emptyDir is a detached, empty, read-only tmpfs: the root of the reaper and the mask
// of directories.
func emptyDir() (int, error) {
	return sys.CreateMount("tmpfs", [][2]string{{"size", "0k"}, {"nr_inodes", "2"}, {"mode", "0555"}},
		unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
}

func attachAt(fd int, path string) error {
	target, err := sys.OpenInRoot(unix.AT_FDCWD, path, unix.O_PATH|unix.O_DIRECTORY, sys.RefuseLinks)
	if err != nil {
		return err
	}
	defer unix.Close(target)
	return sys.AttachMount(fd, target, path)
}

// enterRoot makes the attached mount root our root directory and lets go of the old one.
// pivot_root(".", ".") stacks the old root over the new one, pivot_root(2) NOTES.
func enterRoot(root int) error {
	if err := unix.Fchdir(root); err != nil {
		return &sys.Error{Op: "fchdir", Path: "new root", Err: err}
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return &sys.Error{Op: "pivot_root", Err: err}
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return &sys.Error{Op: "umount", Path: "old root", Err: err}
	}
	if err := unix.Chdir("/"); err != nil {
		return &sys.Error{Op: "chdir", Path: "/", Err: err}
	}
	return nil
}

// rootfs is the container's root while it is furnished: everything goes through the
// descriptor, nothing through a path (R1 in docs/SECURITY).
type rootfs struct {
	fd     int
	dev    int    // descriptor of the tmpfs at /dev, -1 without one
	devpts int    // descriptor of the devpts mount, -1 without one
	procfs *stamp // that of a PID namespace we are not in, nil: ours
	kernel []kernelMount
	later  []laterReadonly
}

// kernelMount is a procfs or sysfs of ours.
type kernelMount struct {
	fd   int
	id   uint64 // of the mount, statx(2)
	kind initproto.MountKind
	path string
}

type laterReadonly struct {
	fd   int
	path string
}

// furnish runs the mount plan inside root, in its order, then makes device nodes and links, then
// masks. The root itself becomes read-only last, so that missing mount points can be made.
//
// Needs: CAP_SYS_ADMIN, CAP_MKNOD in the user namespace of the mount namespace. Runs on: the locked
// main thread. Undo: the death of the mount namespace. Trust: the image controls every path
// component below root; other containers may change shared volumes meanwhile.
func (r *rootfs) furnish(c *initproto.Container, fds []int) *step {
	for i := range c.Mounts {
		m := &c.Mounts[i]
		if err := r.mount(m, fds); err != nil {
			return failed("mount "+m.Target, err)
		}
	}
	for i := range c.Devices {
		if err := r.device(&c.Devices[i]); err != nil {
			return failed("make device "+c.Devices[i].Path, err)
		}
	}
	for _, l := range c.Links {
		if err := r.link(l[0], l[1]); err != nil {
			return failed("make link "+l[1], err)
		}
	}
	for _, l := range r.later {
		if err := sys.SetMountAttr(l.fd, false, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return failed("make read-only "+l.path, err)
		}
	}
	for _, p := range c.Readonly {
		if err := r.readonly(p); err != nil {
			return failed("make read-only "+p, err)
		}
	}
	if err := r.mask(c, fds); err != nil {
		return err
	}
	return nil
}

func (r *rootfs) mount(m *initproto.Mount, fds []int) error {
	fd, err := r.source(m, fds)
	if err != nil {
		return err
	}
	kind, links := sys.Directory, sys.FollowInRoot
	if m.File {
		kind = sys.RegularFile
	}
	if m.Strict {
		links = sys.RefuseLinks
	}
	target, err := sys.EnsureInRoot(r.fd, m.Target, kind, links)
	if err != nil {
		if m.Strict && (errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR)) {
			return errors.New("must be mounted on an ordinary directory, the image has a symbolic link or file there")
		}
		return err
	}
	defer unix.Close(target)
	if err := r.checkTarget(target, m.Target); err != nil {
		return err
	}
	if err := sys.AttachMount(fd, target, ""); err != nil {
		return err
	}
	switch m.Kind {
	case initproto.MountDevpts:
		r.devpts = fd
	case initproto.MountTmpfs:
		if m.Target == devDir {
			r.dev = fd
		}
	case initproto.MountProc, initproto.MountSysfs:
		id, err := mountID(fd)
		if err != nil {
			return err
		}
		r.kernel = append(r.kernel, kernelMount{fd, id, m.Kind, m.Target})
	}
	if m.ReadonlyAfter {
		r.later = append(r.later, laterReadonly{fd, m.Target})
	}
	return nil
}

const devDir = "/dev"

// checkTarget refuses a target in our procfs or sysfs that is not named so: a link of the image leads there, and a
// volume would take the place of what the kernel says (CVE-2019-16884 class).
func (r *rootfs) checkTarget(target int, path string) error {
	if len(r.kernel) == 0 {
		return nil
	}
	id, err := mountID(target)
	if err != nil {
		return err
	}
	for _, k := range r.kernel {
		if k.id == id && path != k.path && !strings.HasPrefix(path, k.path+"/") {
			return errors.New("a symbolic link of the image leads into " + k.path)
		}
	}
	return nil
}

// mountID identifies the mount that a descriptor leads to, statx(2), Linux 5.8.
func mountID(fd int) (uint64, error) {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st); err != nil {
		return 0, &sys.Error{Op: "statx", Err: err}
	}
	return st.Mnt_id, nil
}

// source returns the detached (or, for the pod's /dev/shm, movable) mount of a step.
func (r *rootfs) source(m *initproto.Mount, fds []int) (int, error) {
	switch m.Kind {
	case initproto.MountFD:
		return fds[m.FD], nil
	case initproto.MountProc:
		if r.procfs != nil {
			return r.joinedProcfs(m)
		}
		return sys.CreateMount("proc", m.Data, m.Attr)
	case initproto.MountSysfs:
		return sys.CreateMount("sysfs", m.Data, m.Attr)
	case initproto.MountTmpfs:
		return sys.CreateMount("tmpfs", m.Data, m.Attr)
	case initproto.MountDevpts:
		return sys.CreateMount("devpts", m.Data, m.Attr)
	case initproto.MountMqueue:
		return sys.CreateMount("mqueue", m.Data, m.Attr)
	case initproto.MountCgroup2:
		return sys.CreateMount("cgroup2", m.Data, m.Attr)
	case initproto.MountShm:
		// Our mount namespace is a copy of the pod init's, with its /shm: the same file system. It is
		// cloned here because a container may mount it twice.
		return sys.CloneMount(unix.AT_FDCWD, podShm, false)
	}
	return -1, errors.New("unknown kind of mount")
}

// protections are what a mount of a shared file system may have or not have.
const protections = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC

// joinedProcfs is one more mount of the procfs of a PID namespace that others live in. Its options are theirs.
func (r *rootfs) joinedProcfs(m *initproto.Mount) (int, error) {
	if len(m.Data) > 0 {
		return -1, errors.New("the procfs of a shared PID namespace takes no options of one container")
	}
	fd, err := r.procfs.next()
	if err != nil {
		return -1, err
	}
	return fd, sys.SetMountAttr(fd, false, unix.MountAttr{Attr_set: m.Attr & protections, Attr_clr: protections &^ m.Attr})
}

// shareProcfs sends the pod init a mount of our procfs, for containers that may join our PID namespace. They cannot make
// one: that takes a process in the namespace with rights that nobody in there may see (successor.go).
func (r *rootfs) shareProcfs(control *initproto.Conn) *step {
	for _, k := range r.kernel {
		if k.kind != initproto.MountProc {
			continue
		}
		fd, err := sys.CloneMount(k.fd, "", false) // without what was mounted below
		if err != nil {
			return failed("share procfs", err)
		}
		defer unix.Close(fd)
		return failed("share procfs", control.Send(initproto.Message{Type: initproto.TypeProcfs, FDs: []int{fd}}))
	}
	return nil
}

// device makes a node. Its directory is opened first; the last component is never
// followed.
func (r *rootfs) device(d *initproto.Device) error {
	dir, name, err := r.parent(d.Path)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	dev := int(unix.Mkdev(d.Major, d.Minor))
	err = unix.Mknodat(dir, name, d.Mode, dev) // the umask is 0 until the process's own is set
	if err == unix.EEXIST {
		if err := unix.Unlinkat(dir, name, 0); err != nil {
			return &sys.Error{Op: "unlink", Path: d.Path, Err: err}
		}
		err = unix.Mknodat(dir, name, d.Mode, dev)
	}
	if err != nil {
		return &sys.Error{Op: "mknod", Err: err}
	}
	if err := unix.Fchownat(dir, name, int(d.UID), int(d.GID), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &sys.Error{Op: "chown", Err: err}
	}
	return nil
}

func (r *rootfs) link(target, path string) error {
	dir, name, err := r.parent(path)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	if err := unix.Symlinkat(target, dir, name); err != nil && err != unix.EEXIST {
		return &sys.Error{Op: "symlink", Err: err}
	}
	return nil
}

// parent opens (makes) the directory of path. What belongs into our /dev goes there even if a volume was mounted over it, by a link
// of the image, since: nothing of ours may appear in a directory of the host (CVE-2026-41579 class).
func (r *rootfs) parent(path string) (dir int, name string, err error) {
	i := strings.LastIndexByte(path, '/')
	if below, ok := strings.CutPrefix(path[:i+1], devDir+"/"); ok && r.dev >= 0 {
		dir, err = sys.EnsureInRoot(r.dev, below, sys.Directory, sys.RefuseLinks)
		return dir, path[i+1:], err
	}
	dir, err = sys.EnsureInRoot(r.fd, path[:i], sys.Directory, sys.FollowInRoot)
	return dir, path[i+1:], err
}

// readonly makes a path read-only with all below it, by mounting it over itself. A path that
// is not there needs no protection.
func (r *rootfs) readonly(path string) error {
	target, err := sys.OpenInRoot(r.fd, path, unix.O_PATH, sys.FollowInRoot)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(target)
	fd, err := sys.CloneMount(target, "", true)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := sys.SetMountAttr(fd, true, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return err
	}
	return sys.AttachMount(fd, target, "")
}

// mask hides paths: a file below the null device, a directory below an empty read-only one. Both
// come from descriptors that nothing in the container could have touched (CVE-2025-31133), made once and
// cloned: 500 masks cost 500 clones, not 500 file systems.
func (r *rootfs) mask(c *initproto.Container, fds []int) *step {
	if len(c.Masked) == 0 {
		return nil
	}
	empty, err := emptyDir()
	if err != nil {
		return failed("make the empty directory for masks", err)
	}
	defer unix.Close(empty)
	dir, file := stamp{fd: empty}, stamp{fd: fds[c.NullFD]}
	for _, p := range c.Masked {
		if err := r.maskOne(p, &dir, &file); err != nil {
			return failed("mask "+p, err)
		}
	}
	return nil
}

func (r *rootfs) maskOne(path string, dir, file *stamp) error {
	target, err := sys.OpenInRoot(r.fd, path, unix.O_PATH, sys.FollowInRoot)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(target)
	var st unix.Stat_t
	if err := unix.Fstat(target, &st); err != nil {
		return &sys.Error{Op: "fstat", Err: err}
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return dir.put(target)
	}
	return file.put(target)
}

// stamp is a mount to be put in many places: first itself, then copies of it. (A detached
// mount can be cloned only since Linux 6.15, an attached one always.)
type stamp struct {
	fd   int
	used bool
}

// next returns what has to be attached before next is called again.
func (s *stamp) next() (int, error) {
	if !s.used {
		s.used = true
		return s.fd, nil
	}
	return sys.CloneMount(s.fd, "", false)
}

func (s *stamp) put(target int) error {
	fd, err := s.next()
	if err != nil {
		return err
	}
	if fd != s.fd {
		defer unix.Close(fd)
	}
	return sys.AttachMount(fd, target, "")
}

// gone: the path is not there, or leads through something that is not a directory.
func gone(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) }

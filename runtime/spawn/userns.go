package spawn

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/initproto"
	"github.com/crisp-cri/crisp/runtime/sys"
)

// What pods with a user namespace need of the host's side: mounts whose owners are mapped, and device nodes.
// Nothing is ever chowned: a file's owner on disk is what the container sees.

// idmapTo maps the owners of a detached clone of s to a user namespace, mount_setattr(2).
func (s *source) idmapTo(fd, userns int) error {
	err := idmap(fd, userns, s.recursive)
	if err == nil || s.device != nil {
		return err
	}
	for _, m := range s.mounts() {
		if clone, cerr := sys.CloneMount(unix.AT_FDCWD, m.Mountpoint, false); cerr == nil {
			merr := idmap(clone, userns, false)
			unix.Close(clone)
			switch {
			case errors.Is(merr, unix.EINVAL):
				return fmt.Errorf("%w: the file system %s, mounted at %s, cannot be id-mapped for the pod's user namespace", ErrUnsupported, m.FSType, m.Mountpoint)
			case errors.Is(merr, unix.EPERM):
				return fmt.Errorf("%w: the mount at %s (%s) is id-mapped already, or belongs to another user namespace", ErrUnsupported, m.Mountpoint, m.FSType)
			}
		}
	}
	return err
}

func idmap(fd, userns int, recursive bool) error {
	return unwrapErrno(sys.SetMountAttr(fd, recursive, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userns)}))
}

// mounts are the one that s is in and, if it is recursive, those below. It is for errors: what cannot be found out is left out.
func (s *source) mounts() []*mountinfo.Info {
	fd, err := unix.Open(s.path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	path, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd)) // links resolved
	if err != nil {
		return nil
	}
	id, err := mountIDAt(s.path)
	if err != nil {
		return nil
	}
	list, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		below := s.recursive && strings.HasPrefix(m.Mountpoint, path+"/")
		return !below && uint64(m.ID) != id, false
	})
	if err != nil {
		return nil
	}
	return list
}

// mountIDAt identifies the mount that a path leads to, statx(2), Linux 5.8.
func mountIDAt(path string) (uint64, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st); err != nil {
		return 0, os.NewSyscallError("statx", err)
	}
	return st.Mnt_id, nil
}

// devices are the nodes that have to be made for the container, in the order of their sources.
func (c *compiled) devices() (list []*initproto.Device) {
	for i := range c.sources {
		if d := c.sources[i].device; d != nil {
			list = append(list, d)
		}
	}
	return list
}

// makeDevices makes nodes and returns each as a detached mount. A user namespace has no mknod(2), and a node of the
// host's, bound into the container, would have the host's owner and path; these have what the specification says, once they are
// id-mapped, and are the container's alone: its root may change their mode.
//
// They are made in a mount namespace aside, where a mount can be attached: before Linux 6.15 only an attached one can be cloned.
//
// Needs: CAP_MKNOD, CAP_SYS_ADMIN. Undo: closing the descriptors.
func (t *thread) makeDevices(nodes []*initproto.Device) (fds []int, err error) {
	if len(nodes) == 0 {
		return nil, nil
	}
	err = t.aside(func() (err error) {
		fds, err = makeDevices(nodes)
		return err
	})
	if err != nil {
		closeFDs(fds)
		return nil, err
	}
	return fds, nil
}

// makeDevices returns with an error also what was made before it. Runs on: a thread aside.
func makeDevices(nodes []*initproto.Device) (fds []int, err error) {
	fs, err := sys.CreateMount("tmpfs", [][2]string{{"nr_inodes", strconv.Itoa(len(nodes) + 2)}, {"size", "64k"}, {"mode", "0700"}},
		unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fs)
	if err := attach(fs, unix.AT_FDCWD, asideRoot); err != nil {
		return nil, err
	}
	for i, d := range nodes {
		name := strconv.Itoa(i)
		err := unix.Mknodat(fs, name, d.Mode, int(unix.Mkdev(d.Major, d.Minor)))
		if err == nil {
			err = unix.Fchownat(fs, name, int(d.UID), int(d.GID), unix.AT_SYMLINK_NOFOLLOW)
		}
		if err == nil {
			err = unix.Fchmodat(fs, name, d.Mode&0o7777, 0) // the umask; nobody else is in there
		}
		if err != nil {
			return fds, fmt.Errorf("make device %s (%d:%d): %w", d.Path, d.Major, d.Minor, err)
		}
		fd, err := sys.CloneMount(fs, name, false)
		if err != nil {
			return fds, fmt.Errorf("make device %s: %w", d.Path, err)
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

// probedIDs are ids that no mapping of the probe's is ever used for.
var probedIDs = IDMap{UID: 1 << 30, GID: 1 << 30, Size: 65536}

// CheckUserNamespaces tries what a pod with a user namespace needs: a pod init in one, id-mapped clones of the mounts that the
// directories dirs are in, and an id-mapped tmpfs. An error is ErrUnsupported and says what this node lacks.
//
// Needs: CAP_SYS_ADMIN. It leaves nothing.
func (s *Spawner) CheckUserNamespaces(ctx context.Context, dirs ...string) error {
	userns, err := s.probeUserns(ctx)
	if err != nil {
		return fmt.Errorf("%w: user namespaces: %w", ErrUnsupported, err)
	}
	defer userns.Close()
	ns := int(userns.Fd())
	tmpfs, err := sys.CreateMount("tmpfs", nil, 0)
	if err == nil {
		err = idmap(tmpfs, ns, false)
		unix.Close(tmpfs)
	}
	if err != nil {
		return fmt.Errorf("%w: id-mapped tmpfs (Linux 6.3): %w", ErrUnsupported, err)
	}
	for _, dir := range dirs {
		fd, err := sys.CloneMount(unix.AT_FDCWD, dir, false)
		if err != nil {
			return fmt.Errorf("%w: id-mapped mounts: %w", ErrUnsupported, err)
		}
		err = (&source{path: dir}).idmapTo(fd, ns)
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("id-mapped clone of %s: %w", dir, err)
		}
	}
	return nil
}

// probeUserns starts a pod init that is told nothing, and ends it as soon as its user namespace is open.
func (s *Spawner) probeUserns(ctx context.Context) (*os.File, error) {
	ours, theirs, err := initproto.Pair()
	if err != nil {
		return nil, err
	}
	defer unix.Close(ours)
	control := os.NewFile(uintptr(theirs), "control")
	defer control.Close()
	pid, pidfd, err := s.thread.clonePod(s.image, &PodArgs{Title: "probe", HostNetwork: true, HostIPC: true, Userns: &probedIDs}, podEnv, [4]*os.File{s.null, s.null, s.null, control})
	if errors.Is(err, unix.ENOSPC) {
		return nil, fmt.Errorf("%w (the limit user.max_user_namespaces is reached)", err)
	}
	if err != nil {
		return nil, err
	}
	proc, err := watchProcess(pid, pidfd, true)
	if err != nil {
		_ = unix.Kill(pid, unix.SIGKILL) // our own child, not reaped yet
		return nil, err
	}
	defer proc.close()
	userns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", pid))
	err = errors.Join(err, proc.kill())
	select {
	case <-proc.done:
	case <-ctx.Done():
		err = errors.Join(err, context.Cause(ctx))
	}
	if err != nil && userns != nil {
		userns.Close()
		userns = nil
	}
	return userns, err
}

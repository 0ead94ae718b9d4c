package check

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

var kernelProbes = []Probe{
	{"kernel", "openat2", Required, "paths inside images could not be resolved safely", askOpenat2},
	{"kernel", "mount by fd", Required, "(fsopen, fsmount, open_tree, move_mount) mounts travel to the pod as descriptors", askMountAPI},
	{"kernel", "mount_setattr", Required, "read-only and propagation of mounts are set with it", askMountSetattr},
	{"kernel", "recursive read-only", Wanted, "mounts with recursive_read_only are refused", askRecursiveReadOnly},
	{"kernel", "overlay", Required, "containers' root file systems are overlays on state_root's file system", askOverlay},
	{"kernel", "overlay lowerdir+", Wanted, "images of many layers use the old option, which is limited to a page", askOverlayLowerdirPlus},
	{"kernel", "overlay volatile", Wanted, "writable layers are synced when a container ends, which is slow", askOverlayVolatile},
	{"kernel", "idmapped mounts", Wanted, "pods with a user namespace are not possible", askIDMap},
	{"kernel", "user namespaces", Wanted, "pods with a user namespace are not possible", askUserNS},
	{"kernel", "pidfd", Required, "processes are watched and signalled by pidfd, never by number", askPidfd},
	{"kernel", "seccomp filter", Required, "system calls of containers could not be filtered", askSeccomp},
	{"kernel", "memfd sealing", Required, "the pod init runs from a sealed copy", askMemfd},
}

// verdictOf turns a system call's error into an answer: ENOSYS, EINVAL and
// EOPNOTSUPP are the kernel's ways to say that it lacks something; anything else
// says that we could not ask.
func verdictOf(err error) Answer {
	switch {
	case err == nil:
		return Answer{Verdict: Yes}
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENODEV):
		return no("%v", err)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return unknown("%v (crispd check needs root)", err)
	default:
		return unknown("%v", err)
	}
}

func askOpenat2(h *host) Answer {
	fd, err := unix.Openat2(unix.AT_FDCWD, h.scratch, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC | unix.O_DIRECTORY,
		Resolve: unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return verdictOf(os.NewSyscallError("openat2", err))
	}
	unix.Close(fd)
	return Answer{Verdict: Yes}
}

// detachedTmpfs makes a tmpfs that is mounted nowhere.
func detachedTmpfs() (int, error) {
	fsfd, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, os.NewSyscallError("fsopen tmpfs", err)
	}
	defer unix.Close(fsfd)
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return -1, os.NewSyscallError("fsconfig tmpfs", err)
	}
	mfd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, 0)
	return mfd, os.NewSyscallError("fsmount tmpfs", err)
}

// cloneTree is open_tree(2) of path, detached.
func cloneTree(path string) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	return fd, os.NewSyscallError("open_tree", err)
}

func askMountAPI(h *host) Answer {
	mfd, err := detachedTmpfs()
	if err != nil {
		return verdictOf(err)
	}
	defer unix.Close(mfd)
	tfd, err := cloneTree(h.scratch)
	if err != nil {
		return verdictOf(err)
	}
	defer unix.Close(tfd)
	// move_mount onto nothing: a kernel that has it answers ENOENT or EINVAL, one that lacks it ENOSYS.
	err = unix.MoveMount(mfd, "", -1, "", unix.MOVE_MOUNT_F_EMPTY_PATH)
	if errors.Is(err, unix.ENOSYS) {
		return verdictOf(os.NewSyscallError("move_mount", err))
	}
	return Answer{Verdict: Yes}
}

func askMountSetattr(*host) Answer {
	mfd, err := detachedTmpfs()
	if err != nil {
		return verdictOf(err)
	}
	defer unix.Close(mfd)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID, Propagation: unix.MS_PRIVATE}
	return verdictOf(os.NewSyscallError("mount_setattr", unix.MountSetattr(mfd, "", unix.AT_EMPTY_PATH, &attr)))
}

func askRecursiveReadOnly(h *host) Answer {
	tfd, err := cloneTree(h.scratch)
	if err != nil {
		return verdictOf(err)
	}
	defer unix.Close(tfd)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	return verdictOf(os.NewSyscallError("mount_setattr", unix.MountSetattr(tfd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr)))
}

// tryOverlay makes a detached overlay on state_root's file system with set's options.
func tryOverlay(h *host, lowerKey string, flags ...string) error {
	dir, err := os.MkdirTemp(h.scratch, "overlay-")
	if err != nil {
		return err
	}
	for _, sub := range []string{"lower", "upper", "work"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			return err
		}
	}
	fsfd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("fsopen overlay", err)
	}
	defer unix.Close(fsfd)
	for _, kv := range [][2]string{{lowerKey, "lower"}, {"upperdir", "upper"}, {"workdir", "work"}} {
		if err := unix.FsconfigSetString(fsfd, kv[0], filepath.Join(dir, kv[1])); err != nil {
			return os.NewSyscallError("fsconfig overlay "+kv[0], err)
		}
	}
	for _, f := range flags {
		if err := unix.FsconfigSetFlag(fsfd, f); err != nil {
			return os.NewSyscallError("fsconfig overlay "+f, err)
		}
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return os.NewSyscallError("fsconfig overlay create", err)
	}
	mfd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("fsmount overlay", err)
	}
	return unix.Close(mfd)
}

func askOverlay(h *host) Answer { return verdictOf(tryOverlay(h, "lowerdir")) }

func askOverlayLowerdirPlus(h *host) Answer { return verdictOf(tryOverlay(h, "lowerdir+")) }

func askOverlayVolatile(h *host) Answer { return verdictOf(tryOverlay(h, "lowerdir", "volatile")) }

// userNSAttr clones into a user namespace where ids 0 to 65535 are the host's 100000 to 165535.
func userNSAttr() *syscall.SysProcAttr {
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 65536}}
	return &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}
}

func askUserNS(*host) Answer {
	child, err := startHelper(userNSAttr())
	if err != nil {
		return no("clone(CLONE_NEWUSER): %v%s", err, maxUserNS())
	}
	if err := child.end(); err != nil {
		return unknown("%v", err)
	}
	return Answer{Verdict: Yes}
}

// maxUserNS explains ENOSPC, which clone(2) returns when the sysctl's limit is reached.
func maxUserNS() string {
	data, err := os.ReadFile("/proc/sys/user/max_user_namespaces")
	if err != nil {
		return ""
	}
	return fmt.Sprintf(" (user.max_user_namespaces is %s)", trim(data))
}

func askIDMap(h *host) Answer {
	child, err := startHelper(userNSAttr())
	if err != nil {
		return unknown("clone(CLONE_NEWUSER): %v", err)
	}
	defer func() { _ = child.end() }() // its end is not the question
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", child.process.Pid))
	if err != nil {
		return unknown("%v", err)
	}
	defer ns.Close()
	tfd, err := cloneTree(h.scratch)
	if err != nil {
		return verdictOf(err)
	}
	defer unix.Close(tfd)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())}
	a := verdictOf(os.NewSyscallError("mount_setattr", unix.MountSetattr(tfd, "", unix.AT_EMPTY_PATH, &attr)))
	a.Detail = joined("on "+fsName(h.scratch), a.Detail)
	if a.Verdict != Yes {
		return a
	}
	tmpfs, err := detachedTmpfs() // Linux 6.3: the pod's files, emptyDirs in memory, devices
	if err != nil {
		return verdictOf(err)
	}
	defer unix.Close(tmpfs)
	if err := unix.MountSetattr(tmpfs, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		a = verdictOf(os.NewSyscallError("mount_setattr", err))
		a.Detail = joined("on a tmpfs", a.Detail)
	}
	return a
}

func askPidfd(*host) Answer {
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return verdictOf(os.NewSyscallError("pidfd_open", err))
	}
	defer unix.Close(fd)
	return verdictOf(os.NewSyscallError("pidfd_send_signal", unix.PidfdSendSignal(fd, 0, nil, 0)))
}

func askSeccomp(*host) Answer {
	// seccomp(SECCOMP_GET_ACTION_AVAIL), Linux 4.14; EOPNOTSUPP says that the action is unknown.
	if err := seccompActionAvailable(unix.SECCOMP_RET_ERRNO); err != nil {
		return verdictOf(os.NewSyscallError("seccomp", err))
	}
	return Answer{Verdict: Yes}
}

func askMemfd(*host) Answer {
	fd, err := unix.MemfdCreate("crisp-check", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return verdictOf(os.NewSyscallError("memfd_create", err))
	}
	defer unix.Close(fd)
	_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	return verdictOf(os.NewSyscallError("fcntl F_ADD_SEALS", err))
}

package spawn

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/sys"
)

// sealImage copies the crisp-init binary into a memfd that nobody can write to. Replacing the file on
// disk never touches running pods, and a container that gets hold of /proc/PID/exe finds a
// sealed file (CVE-2019-5736). Before Linux 6.3 the copy is on a read-only mount instead, see imageOnMount.
//
// Needs: CAP_SYS_ADMIN before Linux 6.3. Undo: closing it.
func sealImage(path string) (*os.File, error) {
	src, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	fd, err := unix.MemfdCreate("crisp-init", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|mfdExec)
	if err == unix.EINVAL { // before Linux 6.3
		return imageOnMount(src)
	}
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	w := os.NewFile(uintptr(fd), "crisp-init")
	defer w.Close()
	if _, err := io.Copy(w, src); err != nil {
		return nil, err
	}
	// Open it anew, read-only: an executable that is open for writing gives ETXTBSY.
	ro, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("open memfd", err)
	}
	// The mode is sealed as well: an image whose command leads to /proc/self/exe runs this file as the
	// container's root, who owns it and could make it executable for nobody, chmod(2).
	const seals = unix.F_SEAL_WRITE | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL | sealExec
	if _, err = unix.FcntlInt(w.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		unix.Close(ro)
		return nil, os.NewSyscallError("fcntl F_ADD_SEALS", err)
	}
	return os.NewFile(uintptr(ro), "crisp-init"), nil
}

// imageOnMount is sealImage for kernels that cannot seal a file's mode: the copy is the one file of a tmpfs that
// is mounted nowhere, read-only. Neither its content nor its mode can be changed through a descriptor of it, and there is
// no other way to it.
//
// Needs: CAP_SYS_ADMIN. Undo: closing it.
func imageOnMount(src io.Reader) (*os.File, error) {
	mount, err := sys.CreateMount("tmpfs", [][2]string{{"mode", "0555"}, {"nr_inodes", "2"}}, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
	if err != nil {
		return nil, err
	}
	defer unix.Close(mount)
	const name = "crisp-init"
	fd, err := unix.Openat(mount, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o555)
	if err != nil {
		return nil, &os.PathError{Op: "create", Path: name, Err: err}
	}
	w := os.NewFile(uintptr(fd), name)
	_, err = io.Copy(w, src)
	if err = errors.Join(err, w.Chmod(0o555), w.Close()); err != nil { // not what the umask makes of it
		return nil, err
	}
	if err := sys.SetMountAttr(mount, false, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return nil, err
	}
	ro, err := unix.Openat(mount, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(ro), name), nil
}

// Linux 6.3.
const (
	mfdExec  = 0x10 // MFD_EXEC
	sealExec = 0x20 // F_SEAL_EXEC
)

// openNull opens the null device through a read-only mount of its own. What stands in for a stream that is not
// wanted is the one file of the host that a container gets: its root, who owns the inode, could change mode and
// owner of the host's /dev/null through it. Reading and writing a device does not mind the mount.
//
// Needs: CAP_SYS_ADMIN. Undo: closing it.
func openNull() (*os.File, error) {
	s := source{path: os.DevNull, mount: -1, attr: nullAttr, propagation: unix.MS_PRIVATE}
	mount, _, err := s.open(-1)
	if err != nil {
		return nil, err
	}
	defer unix.Close(mount)
	return reopen(mount)
}

// reopen opens the file of a descriptor anew, on the same mount, for reading and writing.
func reopen(fd int) (*os.File, error) {
	return os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_RDWR, 0)
}

// thread is the one locked thread that lives in the base mount namespace: pod inits
// are cloned from it. Work is done one piece at a time, which costs nothing: forks exclude each other in
// package syscall anyway.
type thread struct {
	work chan func()
	gone chan struct{}
	ns   int // descriptor of the base mount namespace
}

// startThread makes the base mount namespace and the thread in it.
//
// The namespace has a read-only tmpfs as root and in it: an unmasked /proc and /sys (a user
// namespace may mount its own only where it sees a whole one), /root, /shm, /pids and /host, empty mount points. A pod
// init gets a copy of it, a container a copy of that: starting one costs three mounts, not the
// host's thousands.
//
// Needs: CAP_SYS_ADMIN. Undo: the namespace goes with the thread and the last pod.
func startThread(scratch string) (*thread, error) {
	t := &thread{work: make(chan func()), gone: make(chan struct{})}
	ready := make(chan error, 1)
	go offMainThread(func() {
		defer close(t.gone)
		err := enterBase(scratch)
		if err == nil {
			t.ns, err = unix.Open("/proc/thread-self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		ready <- err
		if err != nil {
			return
		}
		for f := range t.work {
			f()
		}
	})
	if err := <-ready; err != nil {
		<-t.gone
		return nil, fmt.Errorf("make base mount namespace: %w", err)
	}
	return t, nil
}

// offMainThread runs f locked to a thread that is not the process's first, and ends that thread with it.
// /proc/self is the first thread's: if that moved, the whole process would see another mount table, proc(5).
func offMainThread(f func()) {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		f() // never unlocked: the thread ends with the goroutine
		return
	}
	started := make(chan struct{})
	go offMainThread(func() {
		close(started)
		f()
	})
	<-started // while we hold the first thread the other goroutine cannot get it
	runtime.UnlockOSThread()
}

// do runs f on the thread and waits for it.
func (t *thread) do(f func()) {
	done := make(chan struct{})
	t.work <- func() { defer close(done); f() }
	<-done
}

func (t *thread) close() {
	close(t.work)
	<-t.gone
	unix.Close(t.ns)
}

// once runs f on a thread of its own in the base mount namespace, which ends with f.
func (t *thread) once(f func() error) error {
	done := make(chan error, 1)
	go offMainThread(func() {
		err := t.enter(0)
		if err == nil {
			err = f()
		}
		done <- err
	})
	return <-done
}

// aside runs f on a thread of its own in a mount namespace of its own, a copy of the base's; both end with f. What f
// mounts there is seen by no pod, not even by one that is cloned meanwhile, and needs no unmounting.
func (t *thread) aside(f func() error) error {
	return t.once(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		return f()
	})
}

// asideRoot is an empty directory of the base mount namespace: the mount point of containers' roots.
const asideRoot = "/root"

// enterBase moves the calling thread. Runs on: a locked thread that is never unlocked.
func enterBase(scratch string) error {
	if err := os.MkdirAll(scratch, 0o700); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	// Nothing mounted here may travel back to the host.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return os.NewSyscallError("mount --make-rprivate /", err)
	}
	root, err := sys.CreateMount("tmpfs", [][2]string{{"size", "64k"}, {"mode", "0555"}}, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(root)
	for _, dir := range []string{"proc", "sys", "root", "shm", "pids", "host"} {
		if err := unix.Mkdirat(root, dir, 0o555); err != nil {
			return &os.PathError{Op: "mkdir", Path: dir, Err: err}
		}
	}
	if err := attach(root, unix.AT_FDCWD, scratch); err != nil {
		return err
	}
	const flags = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	for _, fs := range [][2]string{{"proc", "proc"}, {"sysfs", "sys"}} {
		fd, err := sys.CreateMount(fs[0], nil, flags)
		if err != nil {
			return err
		}
		err = attach(fd, root, fs[1])
		unix.Close(fd)
		if err != nil {
			return err
		}
	}
	if err := sys.SetMountAttr(root, false, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return err
	}
	if err := unix.Fchdir(root); err != nil {
		return os.NewSyscallError("fchdir", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return os.NewSyscallError("pivot_root", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return os.NewSyscallError("umount old root", err)
	}
	return os.NewSyscallError("chdir", unix.Chdir("/"))
}

// newSessionKeyring gives the calling thread, and so the pod it clones next, an empty session keyring. A container makes one
// more of its own; exec'd processes have the pod's. Without this they would possess the daemon's keys, session-keyring(7).
//
// Runs on: the base thread; each pod's replaces that of the one before.
func newSessionKeyring() error {
	_, err := unix.KeyctlInt(unix.KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0) // 0: without a name nobody else can join it
	if err == unix.ENOSYS || err == unix.EPERM || err == unix.EACCES {     // no keyrings here, and so no keys
		return nil
	}
	return os.NewSyscallError("keyctl join session keyring", err)
}

func attach(fd, dir int, path string) error {
	target, err := unix.Openat(dir, path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(target)
	return sys.AttachMount(fd, target, path)
}

// clonePod clones a pod init: born in its cgroup and its namespaces, of which the mount namespace is a copy of the base's and others
// may be prepared.
func (t *thread) clonePod(image *os.File, a *PodArgs, env []string, files [4]*os.File) (pid, pidfd int, err error) {
	pidfd = -1
	attr := &syscall.ProcAttr{
		Env: env,
		// The image is among them so that the child's execve finds it: package syscall moves descriptors that are not listed
		// out of its way, whatever they are.
		Files: []uintptr{files[0].Fd(), files[1].Fd(), files[2].Fd(), files[3].Fd(), image.Fd()},
		Sys:   &syscall.SysProcAttr{Cloneflags: a.namespaces(), PidFD: &pidfd, Setsid: true},
	}
	if a.CgroupDir != nil {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, int(a.CgroupDir.Fd())
	}
	if ids := a.Userns; ids != nil {
		// One clone makes all namespaces, and the kernel makes the user namespace first: it owns the others. The child must become
		// its root before execve, or it loses its capabilities, capabilities(7).
		attr.Sys.Cloneflags |= unix.CLONE_NEWUSER
		attr.Sys.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: int(ids.UID), Size: int(ids.Size)}}
		attr.Sys.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: int(ids.GID), Size: int(ids.Size)}}
		attr.Sys.GidMappingsEnableSetgroups = true
		attr.Sys.Credential = &syscall.Credential{Uid: 0, Gid: 0}
	}
	fork := func() (err error) {
		if err = newSessionKeyring(); err == nil {
			pid, err = syscall.ForkExec("/proc/self/fd/4", []string{"crisp-init: " + a.Title, "pod"}, attr)
		}
		return err
	}
	inCgroup := func() error {
		if err := enterTasks(a.CgroupTasks); err != nil {
			return err
		}
		return fork()
	}
	switch {
	case a.Namespaces != nil:
		attr.Sys.Cloneflags &^= a.Namespaces.flags
		err = a.Namespaces.do(inCgroup)
	case len(a.CgroupTasks) > 0:
		err = t.once(inCgroup)
	default:
		t.do(func() { err = fork() })
	}
	if err != nil {
		return 0, -1, &sys.Error{Op: "clone pod init", Err: err}
	}
	if pidfd < 0 { // the kernel gave none with clone (before 5.2): only we can reap it, so the pid is its own
		if pidfd, err = unix.PidfdOpen(pid, 0); err != nil {
			return pid, -1, os.NewSyscallError("pidfd_open", err)
		}
	}
	return pid, pidfd, nil
}

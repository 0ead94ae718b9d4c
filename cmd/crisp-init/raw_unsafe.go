package main

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/initproto"
	"github.com/crisp-cri/crisp/runtime/sys"
)

// System calls that x/sys/unix lacks or makes for all threads at once (package syscall's Setresuid
// and its kin do): here they must concern the calling thread only.

// setID sets the real, effective and saved id of the calling thread.
func setID(call uintptr, id uint32) error {
	if _, _, errno := unix.RawSyscall(call, uintptr(id), uintptr(id), uintptr(id)); errno != 0 {
		return errno
	}
	return nil
}

// dropCapabilities takes every capability, and the way to get one by execve(2), from all threads of the process: a tracer
// chooses the thread.
func dropCapabilities() error {
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); errno != 0 {
		return &sys.Error{Op: "prctl PR_SET_NO_NEW_PRIVS", Err: errno}
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3} // pid 0: the calling thread
	var none [2]unix.CapUserData
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&hdr)), uintptr(unsafe.Pointer(&none)), 0); errno != 0 {
		return &sys.Error{Op: "capset", Err: errno}
	}
	return nil
}

// setGroups sets the supplementary groups of the calling thread.
func setGroups(groups []uint32) error {
	var first unsafe.Pointer
	if len(groups) > 0 {
		first = unsafe.Pointer(&groups[0])
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(first), 0); errno != 0 {
		return errno
	}
	return nil
}

// loadSeccomp installs a filter on the calling thread, seccomp(2). program is an array of
// struct sock_filter (8 bytes each).
func loadSeccomp(program []byte, flags uint32) error {
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, uintptr(flags), uintptr(unsafe.Pointer(fprog(program))))
	if errno != 0 {
		return &sys.Error{Op: "seccomp", Err: errno}
	}
	return nil
}

func fprog(program []byte) *unix.SockFprog {
	return &unix.SockFprog{
		Len:    uint16(len(program) / unix.SizeofSockFilter),
		Filter: (*unix.SockFilter)(unsafe.Pointer(&program[0])),
	}
}

// setComm sets the name that ps(1) shows for the calling thread; for the main thread it is the process's.
func setComm(name string) error {
	b := append([]byte(name), 0)
	return unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&b[0])), 0, 0, 0)
}

// openPeer opens the terminal that belongs to a pty master: TIOCGPTPEER needs no path, so nobody can put
// another file there (CVE-2025-52565).
func openPeer(master int) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(master), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return -1, &sys.Error{Op: "ioctl TIOCGPTPEER", Err: errno}
	}
	return int(r), nil
}

// successorFlags: a child of our parent, with nothing shared; its pid goes to *parent_tid of ours before it runs.
const successorFlags = unix.CLONE_PARENT | unix.CLONE_PARENT_SETTID | uint64(unix.SIGCHLD)

// Steps that can fail, as they are said through statusFD.
const (
	stepClone = iota + 1
	stepSession
	stepTerminal
	stepSeccomp
	stepExec
)

// successor is all that the successor needs, made before it is: it can neither allocate nor grow its stack.
type successor struct {
	path       *byte
	argv, envv []*byte // NULL at the end
	terminal   bool
	filter     *unix.SockFprog // nil: it is loaded
	flags      uintptr
	pid        *uint32   // where the kernel writes its pid
	report     [2]uint32 // step, errno
}

func newSuccessor(p *initproto.Process, path string, pid *uint32) (*successor, error) {
	s := &successor{terminal: p.Terminal, pid: pid}
	var err error
	if s.path, err = syscall.BytePtrFromString(path); err != nil {
		return nil, err
	}
	if s.argv, err = syscall.SlicePtrFromStrings(p.Args); err != nil {
		return nil, err
	}
	if s.envv, err = syscall.SlicePtrFromStrings(p.Env); err != nil {
		return nil, err
	}
	if len(p.Seccomp) > 0 && p.NoNewPrivs {
		s.filter, s.flags = fprog(p.Seccomp), uintptr(p.SeccompFlags)
	}
	return s, nil
}

// bear clones the successor, and ends us.
//
// In the child there is one thread, and no Go runtime but this stack: from the clone on, nothing but raw system calls. Like
// package syscall's forkAndExecInChild1, which shares memory with its parent until execve; this must not.
//
//go:noinline
//go:nosplit
//go:norace
func (s *successor) bear() {
	pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, uintptr(successorFlags), 0, uintptr(unsafe.Pointer(s.pid)), 0, 0, 0)
	if errno != 0 {
		s.fail(stepClone, errno)
	}
	if pid != 0 {
		// Not with the process, which has threads to end first: the pod init waits for the end of the pipe.
		_, _, _ = syscall.RawSyscall6(unix.SYS_CLOSE, statusFD, 0, 0, 0, 0, 0)
		exit()
	}
	if _, _, errno = syscall.RawSyscall6(unix.SYS_SETSID, 0, 0, 0, 0, 0, 0); errno != 0 {
		s.fail(stepSession, errno)
	}
	if s.terminal {
		if _, _, errno = syscall.RawSyscall6(unix.SYS_IOCTL, 0, unix.TIOCSCTTY, 0, 0, 0, 0); errno != 0 {
			s.fail(stepTerminal, errno)
		}
	}
	if s.filter != nil {
		_, _, errno = syscall.RawSyscall6(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, s.flags, uintptr(unsafe.Pointer(s.filter)), 0, 0, 0)
		if errno != 0 {
			s.fail(stepSeccomp, errno)
		}
	}
	_, _, errno = syscall.RawSyscall6(unix.SYS_EXECVE, uintptr(unsafe.Pointer(s.path)), uintptr(unsafe.Pointer(&s.argv[0])), uintptr(unsafe.Pointer(&s.envv[0])), 0, 0, 0)
	s.fail(stepExec, errno)
}

// fail says through the pipe what failed, and ends the process. It is like bear.
//
//go:noinline
//go:nosplit
//go:norace
func (s *successor) fail(step uint32, errno syscall.Errno) {
	s.report[0], s.report[1] = step, uint32(errno)
	_, _, _ = syscall.RawSyscall6(unix.SYS_WRITE, statusFD, uintptr(unsafe.Pointer(&s.report)), unsafe.Sizeof(s.report), 0, 0, 0)
	exit()
}

// exit ends the process without the runtime, also where a filter refuses to.
//
//go:noinline
//go:nosplit
//go:norace
func exit() {
	for {
		_, _, _ = syscall.RawSyscall6(unix.SYS_EXIT_GROUP, 1, 0, 0, 0, 0, 0)
		pid, _, _ := syscall.RawSyscall6(unix.SYS_GETPID, 0, 0, 0, 0, 0, 0)
		_, _, _ = syscall.RawSyscall6(unix.SYS_KILL, pid, uintptr(unix.SIGKILL), 0, 0, 0, 0)
	}
}

// mapPage maps a page that a process of ours and we share.
func mapPage(fd int) (*uint32, error) {
	b, err := unix.Mmap(fd, 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, &sys.Error{Op: "mmap", Err: err}
	}
	return (*uint32)(unsafe.Pointer(&b[0])), nil
}

// keepFromChildren keeps a mapped page out of the memory of processes that we clone.
func keepFromChildren(page *uint32) error {
	if err := unix.Madvise(unsafe.Slice((*byte)(unsafe.Pointer(page)), pageSize), unix.MADV_DONTFORK); err != nil {
		return &sys.Error{Op: "madvise MADV_DONTFORK", Err: err}
	}
	return nil
}

func unmapPage(page *uint32) {
	_ = unix.Munmap(unsafe.Slice((*byte)(unsafe.Pointer(page)), pageSize)) // ours, as mapPage made it
}

// resetSignals gives every signal its default action.
func resetSignals() {
	var action [4]uint64 // the kernel's struct sigaction: handler SIG_DFL, no flags, no restorer, empty mask
	for sig := 1; sig <= 64; sig++ {
		// EINVAL: SIGKILL and SIGSTOP
		_, _, _ = syscall.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&action)), 0, 8, 0, 0)
	}
}

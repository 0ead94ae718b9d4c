package main

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

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
	fprog := unix.SockFprog{
		Len:    uint16(len(program) / unix.SizeofSockFilter),
		Filter: (*unix.SockFilter)(unsafe.Pointer(&program[0])),
	}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, uintptr(flags), uintptr(unsafe.Pointer(&fprog)))
	if errno != 0 {
		return &sys.Error{Op: "seccomp", Err: errno}
	}
	return nil
}

// linkUp sets IFF_UP on an interface of our network namespace, netdevice(7).
func linkUp(name string) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return &sys.Error{Op: "socket", Err: err}
	}
	defer unix.Close(s)
	var req struct { // struct ifreq
		name  [unix.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}
	copy(req.name[:unix.IFNAMSIZ-1], name)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s), unix.SIOCGIFFLAGS, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return &sys.Error{Op: "ioctl SIOCGIFFLAGS", Path: name, Err: errno}
	}
	req.flags |= unix.IFF_UP
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s), unix.SIOCSIFFLAGS, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return &sys.Error{Op: "ioctl SIOCSIFFLAGS", Path: name, Err: errno}
	}
	return nil
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

package check

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// seccompActionAvailable is seccomp(SECCOMP_GET_ACTION_AVAIL), for which x/sys has no wrapper.
func seccompActionAvailable(action uint32) error {
	const getActionAvail = 2 // SECCOMP_GET_ACTION_AVAIL, linux/seccomp.h
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, getActionAvail, 0, uintptr(unsafe.Pointer(&action)))
	if errno != 0 {
		return errno
	}
	return nil
}

package main

import (
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/initproto"
	"github.com/crisp-cri/crisp/runtime/sys"
)

// runReaper is PID 1 of the PID namespace that the containers of a `pid: POD` pod share. It reaps
// and does nothing else. The containers can see it and, as root with CAP_KILL, signal it: the kernel
// drops signals for a PID 1 that has no handler for them, SIGKILL from inside included
// (pid_namespaces(7)); the others get a handler here that does nothing, for those of Go's runtime would end us. They can look at
// /proc/1: it is not dumpable, has no descriptor but the null device and its root is an empty read-only directory
// (CVE-2019-14891 class, SEC-06). A container with CAP_SYS_PTRACE can trace it all the same, and finds a process
// without a capability.
func runReaper() {
	// While we are alone: see rootfs.shareProcfs.
	proc, err := sys.CreateMount("proc", nil, protections&^unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		fatal("make procfs", err)
	}
	if err := initproto.NewBlockingConn(controlFD).Send(initproto.Message{Type: initproto.TypeProcfs, FDs: []int{proc}}); err != nil {
		fatal("send procfs", err)
	}
	_ = unix.Close(proc) // it has been sent
	// fd 3 tells the pod init that we are ready, by being closed.
	if err := emptyRoot(); err != nil {
		fatal("empty root", err)
	}
	signal.Notify(make(chan os.Signal, 1)) // all of them; nobody reads it
	chld := make(chan os.Signal, 1)
	signal.Notify(chld, unix.SIGCHLD)
	if err := dropCapabilities(); err != nil {
		fatal("drop capabilities", err)
	}
	_ = unix.Close(controlFD) // EOF is the message
	for {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if err == unix.EINTR {
				continue
			}
			if pid <= 0 {
				break
			}
		}
		<-chld
	}
}

// emptyRoot makes a fresh empty tmpfs, read-only, our root. Runs on: the locked main
// thread, in a mount namespace of our own.
func emptyRoot() error {
	fd, err := emptyDir()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := attachAt(fd, newRoot); err != nil {
		return err
	}
	return enterRoot(fd)
}

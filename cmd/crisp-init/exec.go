package main

import (
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/initproto"
	"github.com/crisp-cri/crisp/runtime/sys"
)

// Descriptors of the message to an exec'd process's init.
const (
	execMountNS = iota
	execCgroupNS
	execPIDNS
	execStatus // the successor's pipe
	execPage   // and where its pid is to be written
	execProcs  // if Exec.ProcsFD says so
)

// runExec is the init of one more process in a container. It enters the container's mount and cgroup namespace; into
// its PID namespace comes only the successor.
func runExec() {
	control := initproto.NewBlockingConn(controlFD)
	m, err := control.Recv()
	if err != nil {
		fatal("receive what to run", err)
	}
	x, err := initproto.DecodeExec(m.Body, len(m.FDs))
	if err != nil {
		giveUp(control, failed("read what to run", err))
	}
	giveUp(control, startExec(x, m.FDs, control))
}

// startExec returns only on failure.
func startExec(x *initproto.Exec, fds []int, control *initproto.Conn) *step {
	if s := joinCgroup(fds, x.ProcsFD); s != nil {
		return s
	}
	warnings, s := oomScore(&x.Process)
	if s != nil {
		return s
	}
	labels, s := openLabels(ownAttributes, &x.Process)
	if s != nil {
		return s
	}
	if _, err := unix.Setsid(); err != nil {
		return failed("start session", &sys.Error{Op: "setsid", Err: err})
	}
	// Threads of one process share their root and working directory until told otherwise, and a thread
	// that shares them may not enter a mount namespace, setns(2).
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return failed("enter container", &sys.Error{Op: "unshare CLONE_FS", Err: err})
	}
	next, s := prepareSuccession(fds[execStatus], fds[execPage], control)
	if s != nil {
		return s
	}
	if s := next.enter(fds[execPIDNS]); s != nil {
		return s
	}
	if err := unix.Setns(fds[execCgroupNS], unix.CLONE_NEWCGROUP); err != nil {
		return failed("enter container", &sys.Error{Op: "setns cgroup", Err: err})
	}
	if err := unix.Setns(fds[execMountNS], unix.CLONE_NEWNS); err != nil {
		return failed("enter container", &sys.Error{Op: "setns mnt", Err: err})
	}
	if x.Process.Terminal {
		pts, err := sys.OpenInRoot(unix.AT_FDCWD, "/dev/pts", unix.O_PATH|unix.O_DIRECTORY, sys.RefuseLinks)
		if err != nil {
			return failed("open terminal", err)
		}
		peer, err := openTerminal(pts, &x.Process, control)
		if err != nil {
			return failed("open terminal", err)
		}
		_ = unix.Close(peer) // stdio keeps it open
	}
	return become(&x.Process, &initproto.Hooks{}, labels, control, next, warnings)
}

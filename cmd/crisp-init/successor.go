package main

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/initproto"
	"github.com/crisp-cri/crisp/runtime/seccomp/bpf"
	"github.com/crisp-cri/crisp/runtime/sys"
)

// How a process comes into a PID namespace in which others are running already.
//
// Whoever is in a PID namespace is seen by all in it, and a container that was given CAP_SYS_PTRACE, and has no user namespace
// between itself and the host, may look into what it sees and take it over: memory, descriptors, root directory, rights
// (ptrace(2), /proc/PID/{mem,fd,root}, process_vm_writev(2), pidfd_getfd(2); CVE-2016-9962). Not being dumpable does not stop it.
// So nothing ever shows there that has more than the container has. The init of an exec'd process, and that of a
// container that shares a PID namespace, does its work outside, in the pod init's PID namespace, and its last act is to clone
// its successor, which is born inside
//
//   - with the container's root, working directory and namespaces;
//   - with its user, groups, exact capabilities, no_new_privs and seccomp filter (but see filterFirst);
//   - with no descriptor but stdio and a pipe through which it can say an errno: the control socket is closed before;
//   - with memory of its own, a copy of the init's: who takes it over changes the copy. (The child of a vfork has its parent's memory,
//     and the parent is outside.) The init knows nothing that the program is not meant to know;
//   - in a session and process group of the init's alone, so that it can signal nobody else;
//
// and that does setsid(2), takes the terminal if there is one, and execve(2): raw system calls only, for a copy of one thread of a Go
// program has no Go runtime. It is the pod init's child (CLONE_PARENT), and its exit goes where the init's would have gone. The kernel writes its pid into
// a page that the init shares with the pod init, and the successor with nobody (MADV_DONTFORK).
//
// What is left to somebody who takes it over: to be the program, with the program's rights.

// statusFD is the successor's pipe to the pod init. EOF means execve or death. Number 4 was our binary's, which is closed.
const statusFD = selfFD

// succession is an init's side of it.
type succession struct {
	control *initproto.Conn
	pid     *uint32 // the shared page
}

// prepareSuccession takes the pipe and the page.
func prepareSuccession(status, page int, control *initproto.Conn) (*succession, *step) {
	// Always another number: what came through the control socket lies above.
	if err := unix.Dup3(status, statusFD, unix.O_CLOEXEC); err != nil {
		return nil, failed("prepare process", &sys.Error{Op: "dup3", Err: err})
	}
	pid, err := mapPage(page)
	if err == nil {
		err = keepFromChildren(pid)
	}
	if err != nil {
		return nil, failed("prepare process", err)
	}
	return &succession{control: control, pid: pid}, nil
}

// enter makes the calling thread one whose children are born in the PID namespace.
//
// Needs: CAP_SYS_ADMIN in the user namespaces of both PID namespaces. Runs on: the locked main thread.
func (n *succession) enter(pidNS int) *step {
	if err := unix.Setns(pidNS, unix.CLONE_NEWPID); err != nil {
		return failed("enter PID namespace", &sys.Error{Op: "setns pid", Err: err})
	}
	return nil
}

// fork makes the successor and ends this process. It returns only on failure, while the control socket is still there.
//
// The thread has everything that the program shall have. Runs on: the locked main thread.
func (n *succession) fork(p *initproto.Process, path string, warnings []string) *step {
	s, err := newSuccessor(p, path, n.pid)
	if err != nil {
		return failed("prepare process", err)
	}
	// What package syscall does at execve, and the successor cannot: the soft RLIMIT_NOFILE that the Go runtime raised is given
	// back, by an execve that fails.
	_ = syscall.Exec("", []string{""}, nil) // ENOENT, execve(2)
	// The change of credentials has reset it to what fs.suid_dumpable says.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return failed("prctl PR_SET_DUMPABLE", err)
	}
	early := len(p.Seccomp) > 0 && p.NoNewPrivs && filterFirst(p)
	if early {
		s.filter = nil
	}
	forking := initproto.Forking{Program: path, Warnings: warnings}
	if err := n.control.Send(initproto.Message{Type: initproto.TypeForking, Body: forking.Encode()}); err != nil {
		return failed("tell the pod init", err)
	}
	// From here on what fails is said through the pipe. The runtime's handlers are no use in the successor, and execve would leave a
	// signal to them until then: now a signal ends us, or is ignored by default, like that of the runtime's preemption.
	resetSignals()
	_ = unix.Close(controlFD) // sent: nothing is buffered
	if early {
		if err := loadSeccomp(p.Seccomp, p.SeccompFlags); err != nil {
			s.fail(stepSeccomp, errnoOf(err))
		}
	}
	s.bear()
	return nil // not reached
}

// filterFirst says whether the filter can be loaded before the fork, because it allows what is still to be done. With
// no_new_privs it need not: then the successor loads it itself, just before execve, and until then somebody who takes it over has the
// container's rights without its filter. No profile that lets a shell run is of that kind.
//
// (Without no_new_privs it has been loaded already: that needs CAP_SYS_ADMIN, which the successor must not have.)
func filterFirst(p *initproto.Process) bool {
	m, err := bpf.Load(p.Seccomp)
	if err != nil { // instructions of another compiler: the kernel may know them
		return false
	}
	calls := []bpf.Data{
		{Nr: unix.SYS_CLONE, Args: [6]uint64{successorFlags}},
		{Nr: unix.SYS_CLOSE, Args: [6]uint64{statusFD}},
		{Nr: unix.SYS_SETSID},
		{Nr: unix.SYS_EXECVE},
		{Nr: unix.SYS_WRITE, Args: [6]uint64{statusFD}},
		{Nr: unix.SYS_EXIT_GROUP},
	}
	if p.Terminal {
		calls = append(calls, bpf.Data{Nr: unix.SYS_IOCTL, Args: [6]uint64{0, unix.TIOCSCTTY}})
	}
	for i := range calls {
		calls[i].Arch = auditArch
		ret, _ := m.Run(&calls[i])
		if action := ret & unix.SECCOMP_RET_ACTION_FULL; action != unix.SECCOMP_RET_ALLOW && action != unix.SECCOMP_RET_LOG {
			return false
		}
	}
	return true
}

func errnoOf(err error) (errno unix.Errno) {
	errors.As(err, &errno)
	return errno
}

package main

import (
	"os"
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
//   - with no descriptor but stdio and a pipe through which it can say an errno: the control socket is left out by
//     unshare(CLONE_FILES);
//   - with memory of its own, a copy of the init's: who takes it over changes the copy. (The child of a vfork has its parent's memory,
//     and the parent is outside.) The init knows nothing that the program is not meant to know;
//   - in a session and process group of the init's alone, so that it can signal nobody else;
//
// and that does setsid(2), takes the terminal if there is one, and execve(2): raw system calls only, for a copy of one thread of a Go
// program has no Go runtime. It is the pod init's child (CLONE_PARENT), and its exit goes where the init's would have gone.
//
// What is left to somebody who takes it over: to be the program, with the program's rights.

// statusFD is the successor's pipe to the pod init. EOF means execve or death. Number 4 was our binary's, which is closed.
const statusFD = selfFD

// succession is an init's side of it.
type succession struct {
	say chan initproto.Message // the last word to the pod init, and the end of this process
}

// prepareSuccession makes the calling thread one whose child will be born with none of our
// descriptors but those below controlFD and status.
//
// Runs on: the locked main thread, which from here on has a table of
// descriptors of its own; all other threads keep the old one.
func prepareSuccession(status int, control *initproto.Conn) (*succession, *step) {
	if err := unix.Unshare(unix.CLONE_FILES); err != nil {
		return nil, failed("prepare process", &sys.Error{Op: "unshare CLONE_FILES", Err: err})
	}
	// Always another number: the control socket was the first of ours, and what came through it lies above.
	if err := unix.Dup3(status, statusFD, unix.O_CLOEXEC); err != nil && status != statusFD {
		return nil, failed("prepare process", &sys.Error{Op: "dup3", Err: err})
	}
	n := &succession{say: make(chan initproto.Message)}
	go func() { // never on the main thread, which is the main goroutine's; ends the process
		_ = control.Send(<-n.say) // if the pod init is gone nobody waits
		os.Exit(0)
	}()
	return n, nil
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
	s, err := newSuccessor(p, path)
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
	// The runtime's handlers are no use in the successor, and execve would leave a signal to them until then. From here on a
	// signal ends us, or is ignored by default, like that of the runtime's preemption.
	resetSignals()
	_ = unix.Close(controlFD) // this thread's; the socket lives on
	if early {
		if err := loadSeccomp(p.Seccomp, p.SeccompFlags); err != nil {
			n.end(failed("load seccomp filter", err).message())
		}
	}
	pid, err := s.bear()
	if err != nil {
		f := failed("clone process", err)
		if len(p.Seccomp) > 0 && (err == unix.EPERM || err == unix.ENOSYS) {
			f.text = "the seccomp profile must allow clone(2), unless no_new_privs is set"
		}
		n.end(f.message())
	}
	born := initproto.Born{PID: pid, Program: path, Warnings: warnings}
	n.end(initproto.Message{Type: initproto.TypeBorn, Body: born.Encode()})
	return nil // not reached
}

// end says the last word and ends the process.
func (n *succession) end(m initproto.Message) {
	n.say <- m
	select {}
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
		{Nr: unix.SYS_FUTEX},
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

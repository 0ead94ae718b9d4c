package spawn

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/sys"
)

// Namespaces are a pod's network, IPC and UTS namespace before there is a pod: on a thread that has made them and waits to clone the pod's
// init, which inherits them. Making a network namespace takes a millisecond of the kernel's time, which so passes while the daemon
// writes the pod's record and makes its cgroups.
//
// Nothing outlives the thread, and the thread nothing but Close, StartPod or the daemon. A nil *Namespaces is one of a
// pod that has none to prepare.
type Namespaces struct {
	flags uintptr // CLONE_NEW… that the thread has done
	work  chan func(made error)
	gone  chan struct{} // closed when the thread has ended
	close sync.Once
}

// namespaces are the CLONE_NEW… flags of a pod init's clone.
func (a *PodArgs) namespaces() uintptr {
	flags := uintptr(unix.CLONE_NEWNS)
	if !a.HostNetwork {
		flags |= unix.CLONE_NEWNET | unix.CLONE_NEWUTS
	}
	if !a.HostIPC {
		flags |= unix.CLONE_NEWIPC
	}
	return flags
}

// Prepare begins to make the namespaces of a pod, of whose arguments it looks at HostNetwork, HostIPC and Userns only, and does not
// wait for them: an error is StartPod's. A pod with a user namespace has none to prepare: that owns the
// others, and is the init's own. So has one that uses the host's.
//
// Needs: CAP_SYS_ADMIN. Undo: Close.
func (s *Spawner) Prepare(a PodArgs) *Namespaces {
	flags := a.namespaces() &^ unix.CLONE_NEWNS
	if flags == 0 || a.Userns != nil {
		return nil
	}
	n := &Namespaces{flags: flags, work: make(chan func(error)), gone: make(chan struct{})}
	go offMainThread(func() { // owned by n: close waits for it
		defer close(n.gone)
		made := s.thread.enter(flags)
		if made == nil && flags&unix.CLONE_NEWNET != 0 {
			// Here it meets nobody; the init would wait for the network that is made meanwhile.
			made = sys.LinkUp("lo")
		}
		for f := range n.work {
			f(made)
		}
	})
	return n
}

// do runs f on the thread, which ends then. Once, and not after Close.
func (n *Namespaces) do(f func() error) error {
	done := make(chan error, 1)
	n.work <- func(made error) {
		if made != nil {
			done <- made
			return
		}
		done <- f()
	}
	n.close.Do(func() { close(n.work) })
	return <-done
}

// Close ends the thread; the namespaces live on if an init was cloned into them. It is idempotent.
func (n *Namespaces) Close() {
	if n == nil {
		return
	}
	n.close.Do(func() { close(n.work) })
	<-n.gone
}

// enter moves the calling thread into the base mount namespace, and into new namespaces of the kinds of flags.
//
// Runs on: a locked thread that is never unlocked.
func (t *thread) enter(flags uintptr) error {
	if err := unix.Unshare(unix.CLONE_FS | int(flags)); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	return os.NewSyscallError("setns", unix.Setns(t.ns, unix.CLONE_NEWNS))
}

// enterTasks moves the calling thread into the v1 cgroups of the tasks files, so that what it clones is born there. A thread that
// moves itself takes no lock; a process that is moved waits for an RCU grace period, which was most of a pod's start
// (5 to 15 ms).
//
// Runs on: a locked thread that is never unlocked.
func enterTasks(tasks []*os.File) error {
	for _, file := range tasks {
		if _, err := unix.Write(int(file.Fd()), []byte("0")); err != nil {
			return &os.PathError{Op: "join cgroup", Path: file.Name(), Err: err}
		}
	}
	return nil
}

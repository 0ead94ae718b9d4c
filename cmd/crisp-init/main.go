// Command crisp-init is the process of a pod. It is started by crispd, never by hand, in one of
// four roles (its first argument; the second, if there is one, is its oom_score_adj):
//
//	pod        the pod's first process: holds its namespaces, is the parent of its containers,
//	           writes their logs, collects their exits (pod.go, children.go, start.go)
//	container  a container's init, from clone to execve: mounts, user, capabilities, seccomp
//	           (container.go, mounts.go, process.go)
//	exec       the same for one more process in a running container (exec.go, process.go)
//	reaper     PID 1 of a pod-wide PID namespace (reaper.go)
//
// It is a static binary without cgo, kept small because it runs once per pod: no fmt, no net, no
// encoding/json. What it is told comes over runtime/initproto; who tells it is the daemon, which is
// trusted. What it meets in a container's root file system is not.
package main

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/sys"
)

// controlFD is the descriptor of the control socket that every role but the reaper starts with.
const controlFD = 3

// selfPath is our binary in the child of a fork, until its execve: descriptor 4 of every role, which has no other use.
const selfPath = "/proc/self/fd/4"

// The main goroutine keeps the main thread: namespaces, credentials, capabilities, seccomp and
// no_new_privs belong to a thread, and execve(2) keeps those of the thread that calls it.
func init() { runtime.LockOSThread() }

// oomScoreErr is why the oom_score_adj of our second argument could not be set.
var oomScoreErr error

func main() {
	role := ""
	if len(os.Args) > 1 {
		role = os.Args[1]
	}
	// A process that is not dumpable belongs to the host's root, in whose user namespace we may not be: what is
	// to be written to our own files below /proc is written first, proc_pid(5).
	if len(os.Args) > 2 {
		oomScoreErr = setOOMScoreAdj(os.Args[2])
	}
	// Nobody may look into us with ptrace(2) or /proc/PID/{fd,mem,root} but somebody with CAP_SYS_PTRACE, and no user namespace
	// between itself and us: successor.go is about those.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		fatal("prctl PR_SET_DUMPABLE", err)
	}
	// The control socket was passed to us, and to nobody after us: its EOF means execve or death. What lies above it
	// the daemon has inherited from whoever started it: that goes no further.
	if err := unix.CloseRange(controlFD, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		fatal("close_range", err)
	}
	if role == "reaper" {
		_ = unix.Close(selfFD) // of no more use; the others keep its number from being another's
	}
	// A memfd's name is the number it was started by; ps(1) shall show ours.
	if err := setComm("crisp-init"); err != nil {
		fatal("prctl PR_SET_NAME", err)
	}
	switch role {
	case "pod":
		runPod()
	case "container":
		runContainer()
	case "exec":
		runExec()
	case "reaper":
		runReaper()
	default:
		fatal("crisp-init is started by crispd; role "+role, unix.EINVAL)
	}
}

// setOOMScoreAdj writes our oom_score_adj, which everything we start inherits.
func setOOMScoreAdj(value string) error {
	const path = "/proc/self/oom_score_adj"
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &sys.Error{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte(value)); err != nil {
		return &sys.Error{Op: "write", Path: path, Err: err}
	}
	return nil
}

// fatal ends the process before it has anybody to tell; the daemon keeps the pod init's stderr
// in the pod's run directory.
func fatal(what string, err error) {
	_, _ = os.Stderr.WriteString("crisp-init: " + what + ": " + err.Error() + "\n") // nowhere else to complain
	os.Exit(1)
}

package main

import (
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/initproto"
	"github.com/crisp-cri/crisp/runtime/sys"
)

// hookHost is a mount point of the base mount namespace (see newRoot): for the host's file tree, on its way to be our root.
const hookHost = "/host"

// What the pod init adds to the descriptors of a container with such hooks, after those of the plan.
const (
	hookHostTree = iota // a detached copy of the host's mount tree
	hookConfig          // the text of config.json
	hookFDs             // how many
)

// maxHookOutput bounds what is kept of a hook's output, for its error: the end of it.
const maxHookOutput = 1 << 10

// createHooks brings us to where the hooks of a create belong: all mounts are made, the root directory is the host's file tree,
// and the container's root file system lies in it at BUNDLE/rootfs. There it waits while the daemon runs those of
// the runtime namespace, then runs createContainer's ("the path MUST resolve in the runtime namespace … MUST be executed in the
// container namespace", config.md).
//
// What they mount below BUNDLE/rootfs the container gets; the host's tree is a private copy and dissolves when the container's root
// is entered. It is made only for containers with such hooks, as it copies all mounts of the host.
//
// They have the rights of the host's root (or of the user namespace's), and so run where no container can see them: in the PID
// namespace that the container gets for itself, which has nobody else yet, but for a container that joins one in the pod init's.
// Nothing of a hook's session outlives it.
//
// Needs, Runs on: as furnish. Trust: hooks and their paths are the host administrator's.
func (r *rootfs) createHooks(h *initproto.Hooks, fds []int, control *initproto.Conn) *step {
	if s := r.showHost(h, fds[hookHostTree], fds[hookConfig]); s != nil {
		return s
	}
	if err := control.Send(initproto.Message{Type: initproto.TypeAtHooks}); err != nil {
		return failed("tell the pod init", err)
	}
	m, err := control.Recv()
	if err != nil {
		return failed("wait for the hooks of the runtime namespace", err)
	}
	if m.Type != initproto.TypeDone {
		return failed("wait for the hooks of the runtime namespace", initproto.ErrMalformed)
	}
	return runHooks("createContainer", h.CreateContainer, h.State, "creating", h.Bundle)
}

// showHost makes the host's file tree our root directory, with the bundle in it.
func (r *rootfs) showHost(h *initproto.Hooks, host, config int) *step {
	const what = "make the bundle for hooks"
	if err := attachAt(host, hookHost); err != nil {
		return failed(what, err)
	}
	cover, err := sys.OpenInRoot(host, h.Hide, unix.O_PATH|unix.O_DIRECTORY, sys.FollowInRoot)
	if err != nil {
		return failed(what, err)
	}
	defer unix.Close(cover)
	// The root of a user namespace could not even pass the directories above the bundle, and no hook need see other containers'.
	tmpfs, err := sys.CreateMount("tmpfs", [][2]string{{"mode", "0755"}, {"size", "32m"}}, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return failed(what, err)
	}
	defer unix.Close(tmpfs)
	if err := sys.AttachMount(tmpfs, cover, h.Hide); err != nil {
		return failed(what, err)
	}
	bundle, err := sys.EnsureInRoot(tmpfs, h.Bundle[len(h.Hide):], sys.Directory, sys.RefuseLinks)
	if err != nil {
		return failed(what, err)
	}
	defer unix.Close(bundle)
	if err := copyConfig(config, bundle); err != nil {
		return failed(what, err)
	}
	place, err := sys.EnsureInRoot(bundle, "rootfs", sys.Directory, sys.RefuseLinks)
	if err != nil {
		return failed(what, err)
	}
	defer unix.Close(place)
	if err := sys.AttachMount(r.fd, place, "rootfs"); err != nil { // moves it, with all that is mounted in it
		return failed(what, err)
	}
	if err := enterRoot(host); err != nil {
		return failed(what, err)
	}
	return nil
}

// copyConfig writes config.json into the directory dir.
func copyConfig(from, dir int) error {
	to, err := unix.Openat(dir, "config.json", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return &sys.Error{Op: "create", Path: "config.json", Err: err}
	}
	defer unix.Close(to)
	var at int64
	for {
		n, err := unix.Sendfile(to, from, &at, 1<<20)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return &sys.Error{Op: "write", Path: "config.json", Err: err}
		}
		if n == 0 {
			return nil
		}
	}
}

// runHooks runs hooks one after the other, until one fails. rest is the state but for status and pid, dir the
// working directory ("": ours).
func runHooks(kind string, hooks []initproto.Hook, rest, status, dir string) *step {
	if len(hooks) == 0 {
		return nil
	}
	// "For hooks executed in the container namespace, it is the pid as seen by the container" (runtime.md "State").
	state := `{"status":"` + status + `","pid":` + strconv.Itoa(os.Getpid()) + `,` + rest
	for i := range hooks {
		if s := runHook(kind, &hooks[i], state, dir); s != nil {
			return s
		}
	}
	return nil
}

// runHook runs one hook to its end, in a session of its own.
//
// It waits in poll(2), not in the runtime's poller: see runContainer.
func runHook(kind string, h *initproto.Hook, state, dir string) *step {
	name := "run " + kind + " hook " + h.Path
	stdin, err := unix.MemfdCreate("state", unix.MFD_CLOEXEC)
	if err != nil {
		return failed(name, &sys.Error{Op: "memfd_create", Err: err})
	}
	defer unix.Close(stdin)
	if _, err := unix.Pwrite(stdin, []byte(state), 0); err != nil { // a new file in memory: whole, at offset 0 for its reader
		return failed(name, &sys.Error{Op: "write state", Err: err})
	}
	var out [2]int
	if err := unix.Pipe2(out[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return failed(name, &sys.Error{Op: "pipe2", Err: err})
	}
	defer unix.Close(out[0])
	args := h.Args
	if len(args) == 0 {
		args = []string{h.Path}
	}
	pidfd := -1
	err = unix.SetNonblock(out[1], false) // the hook's end
	pid := 0
	if err == nil {
		pid, err = syscall.ForkExec(h.Path, args, &syscall.ProcAttr{
			Dir: dir, Env: h.Env, Files: []uintptr{uintptr(stdin), uintptr(out[1]), uintptr(out[1])},
			Sys: &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd},
		})
	}
	_ = unix.Close(out[1]) // the hook has it
	if err != nil {
		return failed(name, err)
	}
	if pidfd >= 0 {
		defer unix.Close(pidfd)
	}
	output, late := follow(pidfd, out[0], time.Duration(h.Timeout)*time.Second)
	_ = unix.Kill(-pid, unix.SIGKILL) // what it left, or itself; it is not reaped yet, so the pid is its own
	var status unix.WaitStatus
	for {
		if _, err = unix.Wait4(pid, &status, 0, nil); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return failed(name, &sys.Error{Op: "wait4", Err: err})
	}
	s := &step{name: name}
	switch {
	case late:
		s.text = "ended after its timeout of " + strconv.FormatInt(h.Timeout, 10) + " s"
	case status.Signaled():
		s.text = "was killed by signal " + strconv.Itoa(int(status.Signal()))
	case status.ExitStatus() != 0:
		s.text = "exit status " + strconv.Itoa(status.ExitStatus())
	default:
		return nil
	}
	if len(output) > 0 {
		s.text += ", it said " + strconv.Quote(string(output))
	}
	return s
}

// follow reads what a hook writes until it has ended, or its time is up, and keeps the end of it. What its children hold open is not
// waited for. limit 0 is none.
func follow(pidfd, out int, limit time.Duration) (output []byte, late bool) {
	end := time.Now().Add(limit)
	fds := []unix.PollFd{{Fd: int32(out), Events: unix.POLLIN}, {Fd: int32(pidfd), Events: unix.POLLIN}}
	buf := make([]byte, 4096)
	for {
		wait := -1
		if limit > 0 {
			left := time.Until(end)
			if left <= 0 {
				return output, true
			}
			wait = int((left + time.Millisecond - 1) / time.Millisecond)
		}
		if _, err := unix.Poll(fds, wait); err != nil && err != unix.EINTR {
			return output, false
		}
		ended := fds[1].Revents != 0
		for fds[0].Fd >= 0 {
			n, err := unix.Read(out, buf)
			if err == unix.EINTR {
				continue
			}
			if n > 0 {
				output = append(output, buf[:n]...)
				output = output[max(0, len(output)-maxHookOutput):]
				if ended {
					continue
				}
				break // and look at the time
			}
			if n == 0 {
				fds[0].Fd = -1 // nobody writes any more; poll(2) leaves it out
			}
			break // EAGAIN
		}
		if ended {
			return output, false
		}
	}
}

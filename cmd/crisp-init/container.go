package main

import (
	"errors"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/initproto"
	"github.com/crisp-cri/crisp/runtime/sys"
)

// What the pod init adds to the descriptors of a container that joins a PID namespace, at their end.
const (
	joinPIDNS  = iota
	joinStatus // the successor's pipe
	joinPage   // and where its pid is to be written
	joinProcfs // a detached procfs of that namespace
	joinFDs    // how many
)

// runContainer is a container's init until its execve. It was cloned into its own mount namespace
// (a copy of the pod init's: a handful of mounts) and, if it is the first there, its PID namespace; network, IPC, UTS and user
// namespace it has by birth. It speaks with the pod init only, over controlFD.
//
// It uses blocking system calls and never the runtime's poller: the poller's own descriptors are closed
// with all others before execve.
func runContainer() {
	control := initproto.NewBlockingConn(controlFD)
	m, err := control.Recv()
	if err != nil {
		fatal("receive what to run", err)
	}
	c, err := initproto.DecodeContainer(m.Body, len(m.FDs))
	if err != nil {
		giveUp(control, failed("read what to run", err))
	}
	giveUp(control, startContainer(c, m.FDs, control))
}

// giveUp reports a failed start and ends the process.
func giveUp(control *initproto.Conn, s *step) {
	if err := control.Send(s.message()); err != nil {
		fatal(s.name, err) // the pod init is gone: stderr is the container's, and all there is
	}
	os.Exit(1)
}

// startContainer returns only on failure.
func startContainer(c *initproto.Container, fds []int, control *initproto.Conn) *step {
	// 1. We were born in our cgroups, or enter the last of them now. The cgroup namespace is made then and not by the clone: its
	// root is the cgroup one is in at that moment, cgroup_namespaces(7), and for clone(2) that is the parent's.
	if s := joinCgroup(fds, c.ProcsFD); s != nil {
		return s
	}
	if c.NewCgroupNS {
		if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
			return failed("make cgroup namespace", &sys.Error{Op: "unshare", Err: err})
		}
	}
	// 2. Was set first of all, through the base namespace's /proc: the container has had no hand in that.
	warnings, s := oomScore(&c.Process)
	if s != nil {
		return s
	}
	labels, s := openLabels(ownAttributes, &c.Process)
	if s != nil {
		return s
	}
	// 3. The root file system: put in place, furnished through its descriptor, entered.
	if _, err := unix.Setsid(); err != nil {
		return failed("start session", &sys.Error{Op: "setsid", Err: err})
	}
	unix.Umask(0)
	var next *succession
	var joins []int
	r := &rootfs{fd: fds[c.RootFD], dev: -1, devpts: -1}
	if c.PID.Joins() {
		fds, joins = fds[:len(fds)-joinFDs], fds[len(fds)-joinFDs:]
		if next, s = prepareSuccession(joins[joinStatus], joins[joinPage], control); s != nil {
			return s
		}
		r.procfs = &stamp{fd: joins[joinProcfs]}
	}
	root := r.fd
	if err := attachAt(root, newRoot); err != nil {
		return failed("mount root file system", err)
	}
	if s := r.furnish(c, fds); s != nil {
		return s
	}
	cwd, err := sys.EnsureInRoot(root, c.Process.Cwd, sys.Directory, sys.FollowInRoot)
	if err != nil && !errors.Is(err, unix.EACCES) {
		return failed("make working directory "+c.Process.Cwd, err)
	}
	if err == nil {
		_ = unix.Close(cwd) // O_PATH; entered by path, after all descriptors are closed
	}
	if c.PID == initproto.PIDNew {
		if s := r.shareProcfs(control); s != nil {
			return s
		}
	}
	if c.Process.Terminal {
		if err := r.console(&c.Process, control); err != nil {
			return failed("open terminal", err)
		}
		if next == nil {
			if err := unix.IoctlSetInt(0, unix.TIOCSCTTY, 0); err != nil {
				return failed("open terminal", &sys.Error{Op: "ioctl TIOCSCTTY", Err: err})
			}
		}
	}
	if c.Hooks.View {
		if s := r.createHooks(&c.Hooks, fds[len(fds)-hookFDs:], control); s != nil {
			return s
		}
	}
	if next != nil { // after the hooks, which have more rights than the container
		if s := next.enter(joins[joinPIDNS]); s != nil {
			return s
		}
	}
	if c.RootReadonly {
		if err := sys.SetMountAttr(root, false, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return failed("make root file system read-only", err)
		}
	}
	if err := enterRoot(root); err != nil {
		return failed("enter root file system", err)
	}
	// 4. The process.
	return become(&c.Process, &c.Hooks, labels, control, next, warnings)
}

// joinCgroup enters the cgroup2 hierarchy's part of our cgroup, if the pod init, in a user namespace, was not allowed to
// clone us into it: "0" means the writer, with all its threads. The daemon opened the file, and the kernel checks the opener's rights
// (Linux 5.16). It comes before anything that costs memory.
func joinCgroup(fds []int, procs int) *step {
	if procs < 0 {
		return nil
	}
	if _, err := unix.Write(fds[procs], []byte("0")); err != nil {
		return failed("join cgroup", &sys.Error{Op: "write", Path: "cgroup.procs", Err: err})
	}
	return nil
}

// oomScore reports what became of the oom_score_adj that main has set. Without CAP_SYS_RESOURCE the value cannot go below
// the one we have: then it stays, with a warning.
func oomScore(p *initproto.Process) (warnings []string, s *step) {
	switch {
	case !p.SetOOMScoreAdj || oomScoreErr == nil:
		return nil, nil
	case errors.Is(oomScoreErr, unix.EACCES) || errors.Is(oomScoreErr, unix.EPERM):
		return []string{"oom_score_adj " + strconv.FormatInt(p.OOMScoreAdj, 10) + " is below what this host allows us; kept as it is"}, nil
	}
	return nil, failed("set oom_score_adj", oomScoreErr)
}

// console opens a terminal in the container's own devpts, makes it stdin, stdout, stderr and /dev/console, and sends the master's descriptor to the pod init. Every step goes through descriptors.
func (r *rootfs) console(p *initproto.Process, control *initproto.Conn) error {
	if r.devpts < 0 {
		return errors.New("the container has no devpts mount of its own")
	}
	peer, err := openTerminal(r.devpts, p, control)
	if err != nil {
		return err
	}
	defer unix.Close(peer)
	dir, name, err := r.parent("/dev/console")
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	target, err := sys.EnsureInRoot(dir, name, sys.RegularFile, sys.RefuseLinks)
	if err != nil {
		return err
	}
	defer unix.Close(target)
	bind, err := sys.CloneMount(peer, "", false)
	if err != nil {
		return err
	}
	defer unix.Close(bind)
	return sys.AttachMount(bind, target, "/dev/console")
}

// openTerminal makes a new terminal of the devpts instance that the directory descriptor pts leads to. The leader of the session
// it shall control has still to take it.
func openTerminal(pts int, p *initproto.Process, control *initproto.Conn) (peer int, err error) {
	if err := checkDevpts(pts); err != nil { // of an exec'd process's container: before anything there is opened
		return -1, err
	}
	master, err := sys.OpenInRoot(pts, "ptmx", unix.O_RDWR|unix.O_NOCTTY, sys.RefuseLinks)
	if err != nil {
		return -1, err
	}
	defer unix.Close(master)
	if err := checkDevpts(master); err != nil {
		return -1, err
	}
	if err := unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		return -1, &sys.Error{Op: "ioctl TIOCSPTLCK", Err: err}
	}
	if peer, err = openPeer(master); err != nil {
		return -1, err
	}
	if err := control.Send(initproto.Message{Type: initproto.TypeConsole, FDs: []int{master}}); err != nil {
		return -1, err
	}
	if err := unix.Fchown(peer, int(p.UID), -1); err != nil {
		return -1, &sys.Error{Op: "fchown terminal", Err: err}
	}
	for fd := range 3 {
		if err := unix.Dup3(peer, fd, 0); err != nil {
			return -1, &sys.Error{Op: "dup3", Err: err}
		}
	}
	return peer, nil
}

// checkDevpts makes sure that fd is of a devpts: another file system, in user space for one, could answer openPeer with the
// number of any descriptor of ours.
func checkDevpts(fd int) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return &sys.Error{Op: "fstatfs /dev/pts", Err: err}
	}
	if st.Type != unix.DEVPTS_SUPER_MAGIC {
		return errors.New("/dev/pts is not a devpts")
	}
	return nil
}

package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Kill kills all processes in the cgroup and below it with SIGKILL and waits until they
// are gone, or ctx ends: then the error is ErrBusy and the context's, and names
// the processes left, their state and where in the kernel they hang. A cgroup that
// does not exist has no processes.
//
// With cgroup2 one write of cgroup.kill (Linux 5.14) does it, so that no fork escapes. Without,
// the cgroup is frozen, each process killed through its pidfd, and thawed, until none is left.
// A cgroup that somebody froze is thawed: in v1 a frozen process does not die.
//
// A cgroup once killed is spent: Remove it, and Create it anew for a new process. The kernel takes what is
// cloned into it from outside for a fork that raced with the kill, and kills it: it compares the kill counter
// of the parent's cgroup with that of the new one (cgroup_css_set_fork and cgroup_post_fork, kernel/cgroup/cgroup.c; seen
// on 6.18). Entering by writing cgroup.procs is not affected.
//
// Needs: write access to the cgroup; without cgroup.kill CAP_KILL.
func (c *Cgroup) Kill(ctx context.Context) error {
	start := time.Now()
	release, err := c.driver.claims.kill(ctx, c.path)
	if err == nil {
		err = c.kill(ctx)
		release()
	}
	if err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	if ctx.Err() != nil {
		step := fmt.Sprintf("after %v %s", time.Since(start).Round(time.Millisecond), c.driver.left(c.driver.tracker(), c.path))
		return &Error{Op: "kill", Path: c.path, Step: step, Kind: ErrBusy, Err: ctx.Err()}
	}
	return c.errorf("kill", "", err)
}

func (c *Cgroup) kill(ctx context.Context) error {
	d := c.driver
	tree := d.tracker()
	if !d.trees[tree].v2 {
		return c.killEach(ctx, tree)
	}
	events, err := d.kernel.read(tree, c.file("cgroup.events"))
	if err != nil || !populated(events) {
		return err
	}
	err = d.kernel.write(tree, c.file("cgroup.kill"), "1")
	if errors.Is(err, unix.ENOENT) {
		return c.killEach(ctx, tree)
	}
	if err != nil {
		return err
	}
	if f := d.home("freezer"); f != absent {
		if err := d.thaw(f, c.path); err != nil {
			return err
		}
	}
	if err := c.waitForFew(ctx, tree); err != nil {
		return err
	}
	return c.waitEmpty(ctx, tree)
}

// few is how many processes are worth a descriptor each to wait for.
const few = 8

// waitForFew waits for the processes themselves when they are few. It may return
// early; it only saves time: the kernel tells of a change of cgroup.events at most
// every 10 ms (CGROUP_FILE_NOTIFY_MIN_INTV), so that killing a container started just now took
// 8 ms, and takes 0.7 with this.
func (c *Cgroup) waitForFew(ctx context.Context, tree int) error {
	pids, err := c.driver.kernel.procs(tree, c.path)
	if err != nil || len(pids) == 0 || len(pids) > few {
		return err
	}
	members, err := c.members(tree, pids)
	for _, m := range members {
		if err == nil {
			err = m.wait(ctx)
		}
		err = errors.Join(err, m.Close())
	}
	return err
}

// thaw makes a v1 freezer cgroup and all below it runnable again. It need not
// exist (an exec'd tree's does not).
func (d *Driver) thaw(tree int, full string) error {
	err := d.kernel.writeAll(tree, full, "freezer.state", "THAWED")
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// waitEmpty waits for "populated 0" in cgroup.events (cgroup-v2.rst, "[Un]populated
// Notification"), which covers the cgroups below too.
func (c *Cgroup) waitEmpty(ctx context.Context, tree int) error {
	// O_NONBLOCK only to get it into Go's poller: waiting takes no thread.
	f, err := c.driver.kernel.open(tree, c.file("cgroup.events"), unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return err
	}
	defer f.Close()
	return waitFor(ctx, f, func(fd int) (bool, error) {
		buf := make([]byte, 256)
		n, err := unix.Pread(fd, buf, 0)
		if err != nil {
			return false, err
		}
		return !populated(string(buf[:n])), nil
	})
}

// waitFor calls done now and whenever f has an event, until it says so, fails, or ctx ends.
func waitFor(ctx context.Context, f *os.File, done func(fd int) (bool, error)) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) }) // wakes the wait below; it fails only when that is over
	defer stop()
	var failed error
	// The poller is reset before the first call, so an event between a call and the wait is not lost.
	err = conn.Read(func(fd uintptr) bool {
		ok, err := done(int(fd))
		failed = err
		return ok || err != nil
	})
	if failed != nil {
		return failed
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return context.Cause(ctx)
	}
	return err
}

// killEach kills without cgroup.kill. Each round ends with a death, so it
// ends unless processes come faster than they can be killed, which the freezer prevents.
func (c *Cgroup) killEach(ctx context.Context, tree int) error {
	for {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		victim, left, err := c.killRound(tree)
		if err != nil || left == 0 {
			return err
		}
		if victim == nil { // all that were listed went by themselves
			continue
		}
		err = victim.wait(ctx)
		if err = errors.Join(err, victim.Close()); err != nil {
			return err
		}
	}
}

// killRound freezes the cgroup, kills all that is in it, thaws it, and returns how many it
// found and one of those it killed.
func (c *Cgroup) killRound(tree int) (victim *member, found int, err error) {
	if err := c.freeze(tree); err != nil {
		return nil, 0, err
	}
	defer func() {
		// Whatever happens: nothing stays frozen, and what was killed can die now.
		err = errors.Join(err, c.unfreeze(tree))
		if err != nil && victim != nil {
			err = errors.Join(err, victim.Close())
			victim = nil
		}
	}()
	pids, err := c.driver.kernel.procs(tree, c.path)
	if err != nil {
		return nil, 0, err
	}
	if slices.Contains(pids, 0) {
		return nil, len(pids), errors.New("it has processes of a PID namespace that is not below ours")
	}
	for chunk := range slices.Chunk(pids, 256) { // as many descriptors at a time
		members, err := c.members(tree, chunk)
		for _, m := range members {
			if err == nil {
				err = m.kill()
			}
			if err == nil && victim == nil {
				victim = m
				continue
			}
			err = errors.Join(err, m.Close())
		}
		if err != nil {
			return victim, len(pids), err
		}
	}
	return victim, len(pids), nil
}

// member is a process of a cgroup, held by a pidfd (Linux 5.3; non-blocking, for Go's poller, 5.10).
type member struct {
	*os.File
	fd int
}

// members opens those of pids that are in the cgroup.
//
// A number may be another process's by the time we use it. A pidfd is one process's for good: what
// is still listed after it was opened is ours, or was and is dead. (Or visits; those are left out.)
func (c *Cgroup) members(tree int, pids []int) (members []*member, err error) {
	opened := map[int]int{}
	defer func() {
		for _, fd := range opened {
			_ = unix.Close(fd) // a pidfd: nothing to lose
		}
	}()
	for _, pid := range pids {
		if pid == 0 {
			continue // of another PID namespace
		}
		fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
		if err == unix.ESRCH {
			continue
		}
		if err != nil {
			return nil, os.NewSyscallError("pidfd_open", err)
		}
		opened[pid] = fd
	}
	listed, err := c.driver.kernel.procs(tree, c.path)
	if err != nil {
		return nil, err
	}
	for _, pid := range listed {
		if fd, ok := opened[pid]; ok && !c.visits(tree, pid) {
			members = append(members, &member{os.NewFile(uintptr(fd), fmt.Sprintf("pidfd of %d", pid)), fd})
			delete(opened, pid)
		}
	}
	return members, nil
}

// visits says whether a process of a v1 cgroup.procs is only there with a thread and at home elsewhere:
// a pod's init that clones into the cgroup (Tasks of a Join). v2 has no such thing. One that cannot be
// read has ended; the main thread of one that is ending is shown in "/" (proc_cgroup_show, kernel/cgroup/cgroup.c).
func (c *Cgroup) visits(tree, pid int) bool {
	t := &c.driver.trees[tree]
	if t.v2 {
		return false
	}
	data, err := readProc(pid, "cgroup") // cgroups(7): hierarchy-ID:controller-list:path
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(data)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) == 3 && slices.Contains(strings.Split(f[1], ","), t.controllers[0]) {
			return f[2] != "/" && !strings.HasSuffix(f[2], c.path) && !strings.Contains(f[2], c.path+"/")
		}
	}
	return false
}

// kill sends SIGKILL; one that is dead already is as good.
func (m *member) kill() error {
	err := unix.PidfdSendSignal(m.fd, unix.SIGKILL, nil, 0)
	if err == unix.ESRCH {
		return nil
	}
	return os.NewSyscallError("pidfd_send_signal", err)
}

// wait waits until the process is dead, reaped or not.
func (m *member) wait(ctx context.Context) error {
	return waitFor(ctx, m.File, func(fd int) (bool, error) {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		if err == unix.EINTR {
			err = nil
		}
		return n > 0, err
	})
}

func (c *Cgroup) freeze(tree int) error {
	if c.driver.trees[tree].v2 {
		return c.driver.kernel.write(tree, c.file("cgroup.freeze"), "1")
	}
	if c.driver.home("freezer") != tree {
		return nil // no freezer at all: kill without
	}
	// It may stay FREEZING while processes come and go; those present are stopped all the same.
	return c.driver.kernel.write(tree, c.file("freezer.state"), "FROZEN")
}

func (c *Cgroup) unfreeze(tree int) error {
	if c.driver.trees[tree].v2 {
		return c.driver.kernel.write(tree, c.file("cgroup.freeze"), "0")
	}
	if c.driver.home("freezer") != tree {
		return nil
	}
	return c.driver.thaw(tree, c.path)
}

// readProc reads a file of /proc/PID, at most 64 KiB.
func readProc(pid int, name string) ([]byte, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/%s", pid, name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 64<<10)) // allowed: bounded by the LimitReader
}

// maxNamed bounds how many processes or cgroups an error names.
const maxNamed = 8

// left says what keeps a cgroup from being removed: child cgroups, processes with their state
// ("D in nfs_wait_bit_killable").
func (d *Driver) left(tree int, full string) string {
	var parts []string
	if names, err := d.kernel.children(tree, full); err == nil && len(names) > 0 {
		more := ""
		if n := len(names) - maxNamed; n > 0 {
			names, more = names[:maxNamed], fmt.Sprintf(" and %d more", n)
		}
		parts = append(parts, fmt.Sprintf("child cgroups left: %s%s", strings.Join(names, ", "), more))
	}
	if pids, err := d.kernel.procs(tree, full); err == nil && len(pids) > 0 {
		var l []string
		for _, pid := range pids[:min(len(pids), maxNamed)] {
			l = append(l, describe(pid))
		}
		more := ""
		if n := len(pids) - maxNamed; n > 0 {
			more = fmt.Sprintf(" and %d more", n)
		}
		parts = append(parts, fmt.Sprintf("processes left: %s%s", strings.Join(l, ", "), more))
	}
	return strings.Join(parts, "; ")
}

// describe names a process: 123 ("sh") state D in nfs_wait_bit_killable.
func describe(pid int) string {
	if pid == 0 {
		return "one of another PID namespace"
	}
	s := fmt.Sprint(pid)
	if stat, err := readProc(pid, "stat"); err == nil {
		if comm, state, ok := parseStat(string(stat)); ok {
			s += fmt.Sprintf(" (%q) state %s", comm, state)
		}
	}
	if where, err := readProc(pid, "wchan"); err == nil && len(where) > 0 && string(where) != "0" {
		s += " in " + string(where)
	}
	return s
}

// parseStat takes name and state from /proc/PID/stat: "123 (na)me) S 1 …". The name may contain anything.
func parseStat(stat string) (comm, state string, ok bool) {
	_, rest, ok := strings.Cut(stat, "(")
	end := strings.LastIndex(rest, ") ")
	if !ok || end < 0 || len(rest) < end+3 {
		return "", "", false
	}
	return rest[:end], rest[end+2 : end+3], true
}

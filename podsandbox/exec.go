package podsandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/runtime/spawn"
)

const (
	// maxExecOutput bounds each stream of ExecSync, in bytes: what containerd and CRI-O keep (CVE-2022-1708, CVE-2022-31030).
	maxExecOutput = 16 << 20
	// drainTime is how long ExecSync reads on after the process has ended, when others hold its output open (SEC-93).
	drainTime = time.Second
)

// ExecSync runs a command in a running container and collects its output. A timeout of 0 is none. When it
// is over the command and all its children are killed, and the error is context.DeadlineExceeded.
//
// A process that the command left behind may live on; its output is not waited for.
func (m *Manager) ExecSync(ctx context.Context, id string, argv []string, timeout time.Duration) (*ExecResult, error) {
	c, err := m.findContainer(id)
	if err != nil {
		return nil, err
	}
	op, err := m.begin("exec in container", c.object())
	if err != nil {
		return nil, err
	}
	defer m.end(op)
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, timeout, fmt.Errorf("command %q timed out after %v: %w", argv, timeout, context.DeadlineExceeded))
		defer cancel()
	}
	r, err := m.execSync(ctx, op, c, argv)
	return r, op.fail(err)
}

func (m *Manager) execSync(ctx context.Context, op *operation, c *container, argv []string) (*ExecResult, error) {
	if len(argv) == 0 {
		return nil, fmt.Errorf("%w: no command", ErrInvalid)
	}
	var stdout, stderr output
	if err := errors.Join(stdout.open(), stderr.open()); err != nil {
		return nil, errors.Join(err, stdout.close(), stderr.close())
	}
	defer func() { _ = errors.Join(stdout.close(), stderr.close()) }() // only read from
	op.at("start process")
	x, err := m.exec(ctx, c, argv, stdio{stdout: stdout.write, stderr: stderr.write})
	// Ours would keep the reader from seeing the end.
	if err := errors.Join(err, stdout.closeWrite(), stderr.closeWrite()); err != nil {
		x.giveUp(ctx)
		return nil, err
	}
	defer x.release(ctx)
	var readers sync.WaitGroup
	readers.Go(stdout.collect)
	readers.Go(stderr.collect)
	op.at("wait for the process")
	code, err := x.wait(ctx)
	// What the process itself has written is in the pipes already; this is for what others write.
	deadline := time.Now()
	if err == nil {
		deadline = deadline.Add(drainTime)
	}
	err = errors.Join(err, stdout.read.SetReadDeadline(deadline), stderr.read.SetReadDeadline(deadline))
	readers.Wait()
	if err != nil {
		return nil, err
	}
	return &ExecResult{Stdout: stdout.kept, Stderr: stderr.kept, ExitCode: code}, nil
}

// running is an exec'd process and its cgroup.
type running struct {
	Exec
	cgroup Cgroup
	id     string
}

// stdio are the standard streams of a process to start; nil is the null device. With tty
// it gets a terminal instead.
type stdio struct {
	stdin, stdout, stderr *os.File
	tty                   bool
}

// exec starts a process with the container's own settings but for its arguments. On error there is
// nothing to release.
func (m *Manager) exec(ctx context.Context, c *container, argv []string, s stdio) (*running, error) {
	now := c.now.Load()
	if now.state.Phase != containerRunning {
		return nil, fmt.Errorf("%w: the container is %s", ErrState, now.state.Phase)
	}
	i, err := c.pod.living()
	if err != nil {
		return nil, err
	}
	prog, err := c.filter(now.spec)
	if err != nil {
		return nil, err
	}
	id := newID()[:16]
	cg, join, err := m.cgroupOf(c).Exec("exec-"+id, c.pod.entry())
	if err != nil {
		return nil, err
	}
	defer func() { _ = join.Close() }() // the init has its own
	e, err := i.Exec(ctx, spawn.ExecArgs{
		ContainerID: c.id, ExecID: id, Process: execProcess(now.spec.Process, argv, s.tty),
		Seccomp: prog.BPF, SeccompFlags: prog.Flags,
		CgroupDir: join.DirFD, CgroupTasks: join.Tasks, CgroupProcs: join.Procs,
		Stdin: s.stdin, Stdout: s.stdout, Stderr: s.stderr,
	})
	r := &running{Exec: e, cgroup: cg, id: c.id}
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		r.giveUp(ctx) // a start that was given up may come to something
		return nil, err
	}
	return r, nil
}

// giveUp ends what was started, if anything.
func (r *running) giveUp(ctx context.Context) {
	if r == nil {
		return
	}
	r.kill(ctx)
	r.release(ctx)
}

// execProcess is the container's process with another command line, with or without a terminal.
func execProcess(p *specs.Process, argv []string, tty bool) *specs.Process {
	e := *p
	e.Args = argv
	e.CommandLine = ""
	e.Terminal = tty
	e.ConsoleSize = nil
	return &e
}

// wait waits for the end of the process, or of ctx: then exactly the process and its children are killed.
func (r *running) wait(ctx context.Context) (int, error) {
	code, err := r.Wait(ctx)
	if err == nil {
		return code, nil
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	r.kill(ctx)
	return 0, err
}

func (r *running) kill(ctx context.Context) {
	kill, cancel := context.WithTimeout(context.WithoutCancel(ctx), killLimit)
	defer cancel()
	if err := r.cgroup.Kill(kill); err != nil {
		klog.FromContext(ctx).Error(err, "Could not kill an exec'd process, leaving it to its container's end", "containerID", r.id)
	}
}

// release gives the cgroup back. With processes left in it, it goes with the container's.
func (r *running) release(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killLimit)
	defer cancel()
	if err := r.cgroup.Remove(ctx); err != nil {
		klog.FromContext(ctx).V(4).Info("Kept the cgroup of an exec'd process, ignoring", "containerID", r.id, "err", err)
	}
}

// output is one stream of an exec'd process.
type output struct {
	read, write *os.File
	kept        []byte // valid when collect has returned
}

func (o *output) open() (err error) {
	o.read, o.write, err = os.Pipe()
	return err
}

func (o *output) closeWrite() error { return closeFile(&o.write) }

func (o *output) close() error { return errors.Join(closeFile(&o.read), closeFile(&o.write)) }

// collect reads until the end of the stream or the read deadline: it keeps what it may and drops the rest,
// so that the process never waits for us.
func (o *output) collect() {
	var err error
	o.kept, err = io.ReadAll(io.LimitReader(o.read, maxExecOutput))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		// We were slow until now, on a busy machine: what the process left in the pipe is not lost by that.
		rest, _ := io.ReadAll(io.LimitReader(remains{o.read}, min(maxRemains, int64(maxExecOutput-len(o.kept))))) // as far as it comes
		o.kept = append(o.kept, rest...)
	}
	if len(o.kept) == maxExecOutput {
		_, _ = io.Copy(io.Discard, o.read) // as above
	}
}

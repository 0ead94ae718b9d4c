package podsandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/network/netns"
	"github.com/crisp-cri/crisp/runtime/spawn"
)

// Streams are a client's ends of an interactive exec or an attach; nil is a stream that is not wanted. The reads
// and writes of a client that is gone must fail: it is who serves the client that sees to it, and ends ctx.
type Streams struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer // with TTY everything comes by Stdout
	TTY            bool
	Resize         <-chan WindowSize // of the terminal; nil or closed: no more

	// Go runs what may still sit in a Read or Write of the client's when Exec or Attach has returned. Who serves
	// the client then ends these, and waits. nil: nobody waits.
	Go func(func())
}

func (s *Streams) spawn(f func()) {
	if s.Go == nil {
		go f()
		return
	}
	s.Go(f)
}

// WindowSize is a terminal's, in characters.
type WindowSize struct{ Width, Height uint16 }

// Attached clients that read slowly: how far each stream of one may lag behind before it is dropped, and, when all of them
// together hold allBacklogs of the daemon's memory, how far it still may. In bytes.
const (
	attachBacklog = 16 << 20
	smallBacklog  = 1 << 20
	allBacklogs   = 256 << 20
)

// attachPipe is the size of the pipes between a pod's init and the daemon, in bytes: what pipe-max-size allows without
// privilege, pipe(7). It bridges the time until the daemon reads.
const attachPipe = 1 << 20

// Exec runs a command in a running container with a client's streams and returns its exit code. When ctx ends,
// the command and its children are killed.
func (m *Manager) Exec(ctx context.Context, id string, argv []string, s Streams) (code int, err error) {
	c, err := m.findContainer(id)
	if err != nil {
		return 0, err
	}
	op, err := m.begin("exec in container", c.object())
	if err != nil {
		return 0, err
	}
	defer m.end(op)
	code, err = m.execStreams(ctx, op, c, argv, s)
	return code, op.fail(err)
}

func (m *Manager) execStreams(ctx context.Context, op *operation, c *container, argv []string, s Streams) (int, error) {
	if len(argv) == 0 {
		return 0, fmt.Errorf("%w: no command", ErrInvalid)
	}
	p := stdio{tty: s.TTY}
	var ours [3]*os.File
	if !s.TTY {
		wanted := [3]bool{s.Stdin != nil, s.Stdout != nil, s.Stderr != nil}
		theirs := [3]**os.File{&p.stdin, &p.stdout, &p.stderr}
		for i := range ours {
			if !wanted[i] {
				continue
			}
			r, w, err := os.Pipe()
			if err != nil {
				closeFiles(ours[:], p.files())
				return 0, err
			}
			ours[i], *theirs[i] = r, w
			if i == 0 {
				ours[i], *theirs[i] = w, r
			}
		}
	}
	op.at("start process")
	x, err := m.exec(ctx, c, argv, p)
	closeFiles(p.files())
	if err != nil {
		closeFiles(ours[:])
		return 0, err
	}
	defer x.release(ctx)
	if s.TTY {
		t := x.TakeTerminal()
		if t == nil {
			x.kill(ctx)
			return 0, errors.New("the pod init gave no terminal")
		}
		ours[1] = t
		if s.Stdin != nil {
			s.spawn(func() { feed(t, s.Stdin, nil) })
		}
		s.spawn(func() { resize(ctx, t, s.Resize) })
	} else if in := ours[0]; in != nil {
		s.spawn(func() { feed(in, s.Stdin, func() { _ = in.Close() }) }) // a pipe: the end of the command's input
	}
	var outputs sync.WaitGroup
	for i, w := range [3]io.Writer{1: s.Stdout, 2: s.Stderr} {
		if r := ours[i]; i > 0 && r != nil {
			outputs.Go(func() { deliver(w, r) })
		}
	}
	op.at("wait for the process")
	code, err := x.wait(ctx)
	// What the process itself has written is there already; this is for what others write.
	deadline := time.Now()
	if err == nil {
		deadline = deadline.Add(drainTime)
	}
	for _, r := range ours[1:] {
		if r != nil {
			err = errors.Join(err, r.SetReadDeadline(deadline))
		}
	}
	outputs.Wait()
	closeFiles(ours[:])
	return code, err
}

func (s *stdio) files() []*os.File { return []*os.File{s.stdin, s.stdout, s.stderr} }

// closeFiles closes pipes and terminals, which buffer nothing that could be lost.
func closeFiles(lists ...[]*os.File) {
	for _, l := range lists {
		for _, f := range l {
			if f != nil {
				_ = f.Close()
			}
		}
	}
}

// feed copies a client's input until the client's end of it, or until w is closed. What nobody takes is read on and dropped: the
// protocols have one reader for all streams of a client, and it must get on. It is not waited for: it sits in the client's Read
// until who serves the client closes it, which happens when we return.
func feed(w io.Writer, r io.Reader, end func()) {
	_, err := io.Copy(w, r)
	if end != nil {
		end()
	}
	if err != nil { // of w, or r has none left to read
		_, _ = io.Copy(io.Discard, r) // until its end
	}
}

// deliver copies output to a client. When the client is gone the rest is read and dropped: the command ends by its context. At the
// deadline of r it gives what is there and waits for no more.
func deliver(w io.Writer, r *os.File) {
	if w == nil {
		w = io.Discard
	}
	_, err := io.Copy(w, r)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		// A client that was slow until now: what the command left in the pipe is not lost by that.
		_, _ = io.Copy(w, io.LimitReader(remains{r}, maxRemains))
	case err != nil && !ended(err):
		_, _ = io.Copy(io.Discard, r) // until the end, or the deadline
	}
}

// maxRemains bounds what is read after the deadline, in bytes: more than a pipe or a terminal holds, less than
// somebody who goes on writing can make.
const maxRemains = 1 << 20

// remains reads what a pipe or a terminal holds; that it has run empty is its end. A deadline that has passed does not stop it.
type remains struct{ *os.File }

func (f remains) Read(b []byte) (n int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	if cerr := raw.Control(func(fd uintptr) { // not raw.Read, which heeds the deadline
		for {
			if n, err = unix.Read(int(fd), b); err != unix.EINTR {
				return
			}
		}
	}); cerr != nil {
		return 0, cerr
	}
	if err != nil || n <= 0 {
		return 0, io.EOF // EAGAIN, or its last writer is gone
	}
	return n, nil
}

// ended: the reading side is over: deadline, closed, or a terminal whose last process is gone (EIO, pty(7)).
func ended(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, os.ErrClosed) || errors.Is(err, unix.EIO)
}

// resize follows the client's window. It ends with the channel, which who serves the client closes.
func resize(ctx context.Context, terminal *os.File, sizes <-chan WindowSize) {
	raw, err := terminal.SyscallConn()
	if err != nil || sizes == nil {
		return
	}
	for {
		select {
		case s, ok := <-sizes:
			if !ok {
				return
			}
			_ = raw.Control(func(fd uintptr) { // a closed terminal has no size
				_ = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: s.Height, Col: s.Width})
			})
		case <-ctx.Done():
			return
		}
	}
}

// Attach joins a client to a running container: its output from now on, and its stdin. It returns when the
// container has ended, or with ctx, or when the client's stdin is over: but a client that was the first of a stdin_once container without
// a terminal gets the output that its input brings about. (So do Docker and containerd, and `kubectl run --leave-stdin-open` counts on it.)
//
// Neither the container nor its log ever wait for a client: one that lags more than 16 MiB behind is dropped, with ErrSlow.
func (m *Manager) Attach(ctx context.Context, id string, s Streams) error {
	c, err := m.findContainer(id)
	if err != nil {
		return err
	}
	op, err := m.begin("attach to container", c.object())
	if err != nil {
		return err
	}
	defer m.end(op)
	return op.fail(m.attach(ctx, c, s))
}

func (m *Manager) attach(ctx context.Context, c *container, s Streams) error {
	if phase := c.now.Load().state.Phase; phase != containerRunning {
		return fmt.Errorf("%w: the container is %s", ErrState, phase)
	}
	i, err := c.pod.living()
	if err != nil {
		return err
	}
	var reads, writes [2]*os.File
	for n, w := range [2]io.Writer{s.Stdout, s.Stderr} {
		if w == nil {
			continue
		}
		r, w, err := os.Pipe()
		if err != nil {
			closeFiles(reads[:], writes[:])
			return err
		}
		reads[n], writes[n] = r, w
		_, _ = unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, attachPipe) // EPERM beyond pipe-user-pages-soft: then it is smaller
	}
	stdin, err := i.Attach(ctx, c.id, s.Stdin != nil || s.TTY, writes[0], writes[1])
	closeFiles(writes[:])
	if err != nil {
		closeFiles(reads[:])
		return err
	}
	attached, detach := context.WithCancelCause(ctx)
	inputOver := make(chan struct{})
	if stdin != nil {
		defer func() { _ = stdin.Close() }() // our duplicate; wakes who writes to it
		if s.TTY {
			s.spawn(func() { resize(attached, stdin, s.Resize) })
		}
		if s.Stdin != nil {
			s.spawn(func() { feed(stdin, s.Stdin, func() { m.inputOver(ctx, i, c, s, stdin, inputOver) }) })
		}
	} else if s.Stdin != nil {
		s.spawn(func() { _, _ = io.Copy(io.Discard, s.Stdin) }) // the container has no stdin
	}
	var detached <-chan struct{} = inputOver
	if c.rec.Config.StdinOnce && !s.TTY && (s.Stdout != nil || s.Stderr != nil) {
		detached = nil // its end is the container's affair, not ours
	}
	outputsOver := m.relayAll(attached, detach, s, reads)
	var ended <-chan struct{}
	if outputsOver == nil {
		ended = c.ended // else its last output counts
	}

	var why error
	select {
	case <-outputsOver:
		why = m.whyOver(ctx, i, c)
	case <-ended:
	case <-detached:
	case <-attached.Done():
		if cause := context.Cause(attached); ctx.Err() == nil {
			why = cause // too slow. Else the client is gone, which is no error
		}
	}
	detach(nil)
	return why
}

// inputOver passes the end of a client's input on.
func (m *Manager) inputOver(ctx context.Context, i PodInit, c *container, s Streams, stdin *os.File, over chan struct{}) {
	defer close(over)
	if s.TTY {
		return // others may type on
	}
	_ = stdin.Close() // a pipe ends with the last descriptor of it, and this is one
	if !c.rec.Config.StdinOnce {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killLimit)
	defer cancel()
	_ = i.CloseStdin(ctx, c.id) // the container has ended
}

// whyOver says why a container's outputs are over for a client that wants more: it has ended, or its init dropped the client, which it
// does when the pipe is full because we did not get to read it.
func (m *Manager) whyOver(ctx context.Context, i PodInit, c *container) error {
	all, err := i.List(ctx)
	if err != nil {
		return nil // the init is gone, and with it the container
	}
	for _, info := range all {
		if info.ID == c.id && info.State == spawn.InitRunning { // it is not any more before a client is told
			return errLags
		}
	}
	return nil
}

// errLags is why an attached client is dropped.
var errLags = fmt.Errorf("%w: it is more than %d MiB behind the container's output", ErrSlow, attachBacklog>>20)

// relayAll brings the wanted outputs to the client. The channel it returns is closed when both have ended; never, when none is
// wanted. It detaches a client that is too slow. When attached is done it lets go of the pipes.
func (m *Manager) relayAll(attached context.Context, detach context.CancelCauseFunc, s Streams, reads [2]*os.File) <-chan struct{} {
	wanted := 0
	var running sync.WaitGroup
	for n, w := range [2]io.Writer{s.Stdout, s.Stderr} {
		if w == nil {
			continue
		}
		wanted++
		b := &backlog{held: &m.backlogs}
		b.more.L = &b.mu
		context.AfterFunc(attached, func() {
			b.finish()
			_ = reads[n].Close() // read-only; tells the init that nobody listens
		})
		s.spawn(func() {
			if !b.fill(reads[n]) {
				detach(errLags)
			}
		})
		running.Add(1) // the writer
		s.spawn(func() {
			defer running.Done()
			b.drain(attached, w)
		})
	}
	if wanted == 0 {
		return nil
	}
	over := make(chan struct{})
	s.spawn(func() {
		running.Wait()
		close(over)
	})
	return over
}

// maxWrite is what a client is given at once, in bytes: a message of its protocol, which it may want to hold as a whole.
const maxWrite = 64 << 10

// backlog is output between a pipe, which is emptied at once, and a client, who takes his time.
type backlog struct {
	held *atomic.Int64 // bytes in all backlogs

	mu      sync.Mutex
	more    sync.Cond // of L: mu
	waiting []byte
	writing int  // bytes that the client is being given
	over    bool // nothing is added any more
}

// fill reads r until it ends; false: the client is too far behind.
func (b *backlog) fill(r io.Reader) bool {
	defer b.finish()
	buf := make([]byte, 64<<10)
	for {
		n, err := r.Read(buf)
		if !b.add(buf[:n]) {
			return false
		}
		if err != nil {
			return true
		}
	}
}

func (b *backlog) add(p []byte) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.over {
		return true // nobody reads it
	}
	b.waiting = append(b.waiting, p...)
	b.more.Signal()
	all := b.held.Add(int64(len(p)))
	lag := len(b.waiting) + b.writing
	return lag <= smallBacklog || lag <= attachBacklog && all <= allBacklogs
}

func (b *backlog) finish() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.over = true
	b.more.Signal()
}

// drain writes to the client until there is no more, the client is gone, or ctx is done.
func (b *backlog) drain(ctx context.Context, w io.Writer) {
	for {
		p := b.next()
		if len(p) == 0 || ctx.Err() != nil {
			break
		}
		if _, err := w.Write(p); err != nil {
			break
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.over = true
	b.held.Add(-int64(len(b.waiting) + b.writing))
	b.waiting, b.writing = nil, 0
}

// next is what there is to write, when there is some; empty at the end.
func (b *backlog) next() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held.Add(-int64(b.writing))
	b.writing = 0
	for len(b.waiting) == 0 && !b.over {
		b.more.Wait()
	}
	b.writing = min(len(b.waiting), maxWrite)
	p := b.waiting[:b.writing]
	if b.waiting = b.waiting[b.writing:]; len(b.waiting) == 0 {
		b.waiting = nil // p is the client's until the next call
	}
	return p
}

// dialTimeout bounds connecting over loopback, where only a packet filter of the pod's own can make one wait.
const dialTimeout = 10 * time.Second

// DialPod connects to a TCP port in a pod, as a process in it would by "localhost": IPv4 first, then IPv6. It works for pods in the
// host's network, too.
func (m *Manager) DialPod(ctx context.Context, id string, port uint16) (net.Conn, error) {
	p, err := m.findPod(id)
	if err != nil {
		return nil, err
	}
	i, err := p.living()
	if err != nil {
		return nil, err
	}
	ns, err := i.NetNS()
	if err != nil {
		return nil, fmt.Errorf("cannot reach pod %q: open its network namespace: %w", p.object(), err)
	}
	defer func() { _ = ns.Close() }() // read-only
	var conn net.Conn
	err = netns.Do(ns, func() error {
		var errs [2]error
		for n, host := range []string{"127.0.0.1", "::1"} {
			// The literal addresses need no resolver, and a dialer without fallback opens its socket on this thread.
			d := net.Dialer{FallbackDelay: -1, Timeout: dialTimeout}
			if conn, errs[n] = d.DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(int(port)))); errs[n] == nil {
				return nil
			}
		}
		return errors.Join(errs[:]...)
	})
	if err != nil {
		return nil, fmt.Errorf("cannot reach port %d of pod %q: %w", port, p.object(), err)
	}
	return conn, nil
}

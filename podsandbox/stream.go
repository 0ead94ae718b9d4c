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
	"time"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/network/netns"
)

// Streams are a client's ends of an interactive exec or an attach; nil is a stream that is not wanted. The reads
// and writes of a client that is gone must fail: it is who serves the client that sees to it, and ends ctx.
type Streams struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer // with TTY everything comes by Stdout
	TTY            bool
	Resize         <-chan WindowSize // of the terminal; nil or closed: no more
}

// WindowSize is a terminal's, in characters.
type WindowSize struct{ Width, Height uint16 }

// attachBacklog is how much output an attached client may lag behind before it is dropped, in bytes.
const attachBacklog = 16 << 20

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
			go feed(t, s.Stdin, nil)
		}
		go resize(ctx, t, s.Resize)
	} else if ours[0] != nil {
		go feed(ours[0], s.Stdin, func() { _ = ours[0].Close() }) // a pipe: the end of the command's input
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

// feed copies a client's input until either end is closed. It is not waited for: it sits in the client's Read
// until who serves the client closes it, which happens when we return.
func feed(w io.Writer, r io.Reader, end func()) {
	_, _ = io.Copy(w, r) // the command may not want it all
	if end != nil {
		end()
	}
}

// deliver copies output to a client. When the client is gone the rest is read and dropped: the command ends by its context.
func deliver(w io.Writer, r *os.File) {
	if w == nil {
		w = io.Discard
	}
	if _, err := io.Copy(w, r); err != nil && !ended(err) {
		_, _ = io.Copy(io.Discard, r) // until the end, or the deadline
	}
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
// container has ended, when the client wants only stdin and that is over, or with ctx. Neither the container nor its log ever
// wait for a client: one that lags more than 16 MiB behind is dropped.
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
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
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
	inputDone := make(chan struct{})
	if stdin != nil {
		defer func() { _ = stdin.Close() }() // our duplicate
		if s.TTY {
			go resize(ctx, stdin, s.Resize)
		}
		if s.Stdin != nil {
			go feed(stdin, s.Stdin, func() {
				if !s.TTY {
					_ = stdin.Close() // a pipe ends with the last descriptor of it, and this is one
				}
				if c.rec.Config.StdinOnce && !s.TTY {
					_ = i.CloseStdin(context.WithoutCancel(ctx), c.id) // the container has ended
				}
				close(inputDone)
			})
		}
	}
	var outputs sync.WaitGroup
	for n, w := range [2]io.Writer{s.Stdout, s.Stderr} {
		if w != nil {
			outputs.Go(func() { relay(ctx, w, reads[n]) })
		}
	}
	stop := context.AfterFunc(ctx, func() { closeFiles(reads[:]) })
	defer stop()
	if s.Stdout == nil && s.Stderr == nil {
		select {
		case <-inputDone:
		case <-ctx.Done():
		}
	}
	outputs.Wait()
	closeFiles(reads[:])
	return nil
}

// relay moves output from a pipe to a client through a buffer, so that the pipe is emptied at once. When the
// client is more than attachBacklog behind, the pipe is left to fill, and the pod's init drops it.
func relay(ctx context.Context, w io.Writer, r *os.File) {
	var mu sync.Mutex
	more := sync.NewCond(&mu)
	var backlog []byte
	over := false
	finish := func() {
		mu.Lock()
		over = true
		mu.Unlock()
		more.Broadcast()
	}
	var reader sync.WaitGroup
	reader.Go(func() {
		defer finish()
		buf := make([]byte, 64<<10)
		for {
			n, err := r.Read(buf)
			mu.Lock()
			backlog = append(backlog, buf[:n]...)
			tooFar := len(backlog) > attachBacklog
			mu.Unlock()
			more.Broadcast()
			if err != nil || tooFar {
				return
			}
		}
	})
	defer reader.Wait()
	defer func() { _ = r.Close() }() // ends the reader, and tells the init that nobody listens
	stop := context.AfterFunc(ctx, finish)
	defer stop()
	for {
		mu.Lock()
		for len(backlog) == 0 && !over {
			more.Wait()
		}
		chunk := backlog
		backlog = nil
		mu.Unlock()
		if len(chunk) == 0 || ctx.Err() != nil {
			return
		}
		if _, err := w.Write(chunk); err != nil {
			return
		}
	}
}

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
			d := net.Dialer{FallbackDelay: -1}
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

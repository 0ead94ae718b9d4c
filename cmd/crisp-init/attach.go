package main

import (
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/initproto"
	"github.com/crisp-cri/crisp/runtime/logs"
)

// tap is an attached client: pipes to the daemon that get what the container prints, each chunk before the log has it. Neither log
// nor container ever wait for a client: the daemon empties the pipes at once and closes them when the client lags. For the daemon
// they wait, tapPatience at most. Guarded by the sink's lock, under which Chunk is called; when it is detached nobody else has it.
type tap struct {
	fds [2]int // by logs.Stream; -1: not wanted, or dropped
}

// tapPatience is how long a full pipe is waited for before the client is dropped, in milliseconds: a container can print faster than
// the daemon gets to run on a busy machine. It is spent once, for a daemon that hangs; one that has died has closed its pipes.
const tapPatience = 200

// Chunk implements logs.Tap.
func (t *tap) Chunk(stream logs.Stream, data []byte) bool {
	fd := t.fds[stream]
	for fd >= 0 && len(data) > 0 {
		n, err := unix.Write(fd, data)
		switch {
		case err == nil:
			data = data[n:]
		case err == unix.EINTR:
		case err == unix.EAGAIN && writable(fd):
		default: // EAGAIN: too slow. EPIPE: gone
			t.close()
			return false
		}
	}
	return true
}

// writable waits until a pipe is not full, tapPatience at most.
func writable(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	n, err := unix.Poll(p, tapPatience)
	return n > 0 || err == unix.EINTR // a signal: the write says how it is
}

func (t *tap) close() { closeAll(t.fds[:]) }

// attach adds a client to a running container.
func (p *pod) attach(id string, bits int64, m *initproto.Message) initproto.Message {
	t := &tap{fds: [2]int{-1, -1}}
	pipes := 0
	for stream, bit := range [...]int64{logs.Stdout: initproto.AttachStdout, logs.Stderr: initproto.AttachStderr} {
		if bits&bit == 0 {
			continue
		}
		if pipes >= len(m.FDs) {
			t.close()
			return failure(initproto.FailStart, "attach", initproto.ErrMalformed)
		}
		t.fds[stream] = m.TakeFD(pipes)
		_ = unix.SetNonblock(t.fds[stream], true) // F_SETFL on a descriptor we own
		pipes++
	}
	reply := done()
	c, failed := p.running(id, "attach")
	if c == nil {
		t.close()
		return failed
	}
	if bits&initproto.AttachStdin != 0 {
		fd, err := p.dupInput(c)
		if err != nil {
			t.close()
			return failure(initproto.FailStart, "attach to stdin", err)
		}
		if fd >= 0 {
			reply.FDs = []int{fd}
		}
	}
	if pipes == 0 {
		return reply
	}
	c.sink.Attach(t) // may wait for a disk: not under the lock
	p.mu.Lock()
	ended := c.state == initproto.StateExited
	if !ended {
		c.taps = append(c.taps, t)
	}
	p.mu.Unlock()
	if ended { // watch has not seen it
		c.sink.Detach(t)
		t.close()
	}
	return reply
}

// running finds a running container, or says why there is none.
func (p *pod) running(id, what string) (*container, initproto.Message) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.containers[id]
	if c == nil {
		return nil, failure(initproto.FailNotFound, what, unix.ESRCH)
	}
	if c.state != initproto.StateRunning {
		return nil, failure(initproto.FailState, what, unix.ESRCH)
	}
	return c, initproto.Message{}
}

// dupInput duplicates the descriptor that leads to the container's stdin; -1 if there is none.
func (p *pod) dupInput(c *container) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	in := c.input()
	if in < 0 {
		return -1, nil
	}
	return unix.FcntlInt(uintptr(in), unix.F_DUPFD_CLOEXEC, controlFD+1)
}

// input is the descriptor that leads to the container's stdin; -1 without one. Caller holds pod.mu.
func (c *container) input() int {
	switch {
	case c.terminal != nil:
		return int(c.terminal.Fd())
	case c.stdin != nil:
		return int(c.stdin.Fd())
	}
	return -1
}

// detach ends clients of a container that has ended.
func (c *container) detach(taps []*tap) {
	for _, t := range taps {
		c.sink.Detach(t) // when it returns nobody calls Chunk
		t.close()
	}
}

// closeStdin is the end of the first client of a stdin_once container.
func (p *pod) closeStdin(id string) initproto.Message {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.containers[id]
	if c == nil {
		return failure(initproto.FailNotFound, "close stdin", unix.ESRCH)
	}
	if c.stdin != nil {
		_ = c.stdin.Close() // a pipe: nothing is buffered
		c.stdin = nil
	}
	return done()
}

package cri

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// farewellTime is how long a client may take to read the end of its session, what is written already and the exit status; and
// then to close its end of the connection.
const farewellTime = 10 * time.Second

// session is one exec, attach or port-forward with its client. Its context ends with the client's connection: the
// library's have no such thing, and a command whose client is gone must not live on. (The kubelet expects as much: it closes its
// end when the user does.)
type session struct {
	streamer   *streamer
	ctx        context.Context // the session's life; in a struct because the library hands on none
	cancel     context.CancelFunc
	background sync.WaitGroup // see spawn and enter

	mu   sync.Mutex
	over bool        // nothing is begun any more
	conn *clientConn // nil until it is hijacked
}

// begin makes a session; nil when the server drains or has been stopped. It counts as a handler.
func (s *streamer) begin(interactive bool) *session {
	x := &session{streamer: s}
	life := context.Background()
	if interactive {
		life = s.interactive
	}
	x.ctx, x.cancel = context.WithCancel(life)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sessions == nil || s.interactive.Err() != nil {
		x.cancel()
		return nil
	}
	s.handlers.Add(1) // the session's handler
	s.sessions[x] = struct{}{}
	return x
}

// whyOver is why the session's context has ended.
func (x *session) whyOver() error {
	if errors.Is(context.Cause(x.ctx), errShutdown) {
		return errShutdown
	}
	return errors.New("the client left")
}

// end closes the connection, if the library has not, and waits for all that the session has started.
func (x *session) end() {
	x.cancel()
	x.mu.Lock()
	x.over = true
	c := x.conn
	x.mu.Unlock()
	if c != nil {
		_ = c.Close() // lingers in the background
	}
	x.background.Wait()
	x.streamer.mu.Lock()
	delete(x.streamer.sessions, x)
	x.streamer.mu.Unlock()
}

// abort ends the session at once, whatever it is at.
func (x *session) abort() {
	x.cancel()
	x.mu.Lock()
	x.over = true
	c := x.conn
	x.mu.Unlock()
	if c != nil {
		c.abort()
	}
}

// spawn runs what the session waits for at its end. To be called by who does not let the session end, as a
// handler or after enter.
func (x *session) spawn(f func()) { x.background.Go(f) }

// enter makes the session wait for the caller's background.Done; false: it is over.
func (x *session) enter() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.over {
		return false
	}
	x.background.Add(1) // the caller
	return true
}

// lastWords bounds what is still to be written: the status, and what a slow client has not read yet.
func (x *session) lastWords() {
	x.mu.Lock()
	c := x.conn
	x.mu.Unlock()
	if c != nil {
		c.lastWords()
	}
}

// hijacker hands out connections that are watched.
type hijacker struct {
	http.ResponseWriter
	session *session
}

// Hijack implements http.Hijacker. The connection of a session that is over is closed; that is no error, of
// which x/net/websocket makes a panic.
func (h *hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(h.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	early, err := rw.Reader.Peek(rw.Reader.Buffered())
	if err != nil {
		return nil, nil, errors.Join(err, conn.Close())
	}
	c := &clientConn{Conn: conn, session: h.session}
	h.session.mu.Lock()
	over := h.session.over
	h.session.conn = c
	if !over {
		h.session.background.Go(c.watch)
	}
	h.session.mu.Unlock()
	if over {
		c.abort()
	}
	// What was read ahead, then the connection through us.
	r := bufio.NewReader(io.MultiReader(bytes.NewReader(bytes.Clone(early)), c))
	return c, bufio.NewReadWriter(r, bufio.NewWriter(c)), nil
}

// clientConn is the connection of a session: it tells when the client is gone, and closes in a way that loses nothing on its way to the
// client. The library has the only reader and the writers.
type clientConn struct {
	net.Conn
	session *session

	mu      sync.Mutex
	closed  bool
	ending  bool     // the write deadline stays as it is
	gone    bool     // the client's end is closed
	watched *os.File // a duplicate; nil before watch and after close
}

// Read implements net.Conn. Its first error tells that the client is gone, but for a deadline: that is the library's idle timeout.
func (c *clientConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err == nil {
		return n, nil
	}
	c.mu.Lock()
	closed := c.closed
	c.mu.Unlock()
	if closed {
		return n, net.ErrClosed
	}
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() {
		c.left()
	}
	return n, err
}

// watch ends the session when the client closes its end, also while the library does not read because somebody does not
// take what the client has sent. It ends with the connection.
func (c *clientConn) watch() {
	f, err := c.duplicate()
	if errors.Is(err, net.ErrClosed) {
		return
	}
	if err != nil {
		klog.Background().Error(err, "Could not watch the connection of a streaming client, relying on its reader")
		return
	}
	defer func() { _ = f.Close() }() // only looked at
	raw, err := f.SyscallConn()
	if err != nil {
		return // closed meanwhile
	}
	// Called at each arrival; between them the goroutine waits in the poller.
	if err := raw.Read(func(fd uintptr) bool { return hungUp(int32(fd)) }); err == nil {
		c.left()
	}
}

// duplicate makes a second descriptor of the connection, for a second goroutine to wait at.
func (c *clientConn) duplicate() (*os.File, error) {
	t, ok := tcp(c.Conn).(*net.TCPConn)
	if !ok {
		return nil, errors.New("not a TCP connection")
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	if cerr := raw.Control(func(p uintptr) { fd, err = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 3) }); cerr != nil || err != nil {
		return nil, errors.Join(cerr, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err))
	}
	f := os.NewFile(uintptr(fd), "streaming client") // non-blocking, as the original: waits in the poller
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errors.Join(net.ErrClosed, f.Close())
	}
	c.watched = f
	return f, nil
}

// hungUp says whether the peer has closed its end, whatever it has sent before (poll(2), POLLRDHUP).
func hungUp(fd int32) bool {
	p := []unix.PollFd{{Fd: fd, Events: unix.POLLRDHUP}}
	_, err := unix.Poll(p, 0)
	return err == nil && p[0].Revents != 0
}

// left notes that the client is gone, and ends the session.
func (c *clientConn) left() {
	c.mu.Lock()
	c.gone = true
	c.mu.Unlock()
	c.session.cancel()
	c.lastWords() // for who is stuck in a write
}

// lastWords sets the last write deadline.
func (c *clientConn) lastWords() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ending {
		c.ending = true
		_ = c.Conn.SetWriteDeadline(time.Now().Add(c.session.streamer.farewell)) // closed: there is nothing to write
	}
}

// SetDeadline implements net.Conn.
func (c *clientConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (c *clientConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	return c.Conn.SetReadDeadline(t)
}

// SetWriteDeadline implements net.Conn. It has no effect after lastWords.
func (c *clientConn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.ending {
		return nil
	}
	return c.Conn.SetWriteDeadline(t)
}

// Close says that there is no more to come, and lets the client read what it has not yet: a socket that is closed with input unread
// resets the connection, and what is on its way is lost (RFC 2525, 2.17). So the session waits in the background for the client to close
// its end, a few seconds at most. The first call is before the session waits for the background: session.end makes one.
func (c *clientConn) Close() error {
	c.session.cancel()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	c.closeLocked()
	if c.gone {
		return c.Conn.Close()
	}
	c.session.background.Go(c.linger)
	return nil
}

// closeLocked ends the reader and the watcher. Caller holds mu.
func (c *clientConn) closeLocked() {
	c.closed = true
	_ = c.Conn.SetReadDeadline(time.Unix(1, 0)) // closed by abort: as good
	if c.watched != nil {
		_ = c.watched.Close() // only looked at
	}
}

// linger is the end of Close.
func (c *clientConn) linger() {
	raw := tcp(c.Conn)
	defer func() { _ = raw.Close() }() // nothing is left to say
	if t, ok := c.Conn.(*tls.Conn); ok {
		_ = t.CloseWrite() // the client may have gone
	}
	if t, ok := raw.(*net.TCPConn); ok {
		_ = t.CloseWrite() // as above
	}
	if err := raw.SetReadDeadline(time.Now().Add(c.session.streamer.farewell)); err != nil {
		return // aborted
	}
	_, _ = io.Copy(io.Discard, raw) // however it ends
}

// abort closes the connection at once.
func (c *clientConn) abort() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.closeLocked()
	}
	_ = tcp(c.Conn).Close() // the client sees it
}

// tcp is the connection below TLS.
func tcp(c net.Conn) net.Conn {
	if t, ok := c.(*tls.Conn); ok {
		return t.NetConn()
	}
	return c
}

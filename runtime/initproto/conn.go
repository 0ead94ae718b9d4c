package initproto

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Constants of the implementation.
const (
	headerLen = 8
	// frameBody keeps a frame well below the default socket buffer
	// (net.core.wmem_default, 208 KiB): a frame is sent whole or not at all.
	frameBody = 48 << 10
	// frameFDs is below the kernel's SCM_MAX_FD (253).
	frameFDs = 240

	// MaxBody and MaxFDs bound a message: a body larger than ARG_MAX-sized
	// environments, more mounts than anybody has. They bound what a broken peer
	// can make us allocate.
	MaxBody = 16 << 20
	MaxFDs  = 4096

	flagMore = 1
)

// ErrTooLarge is returned for a message beyond MaxBody or MaxFDs.
var ErrTooLarge = errors.New("message too large")

// Message is one message. The receiver owns FDs and closes them.
type Message struct {
	Type Type
	Req  uint32 // request number; replies carry their request's, events 0
	Body []byte
	FDs  []int
}

// Close closes the descriptors that came with m.
func (m *Message) Close() {
	for _, fd := range m.FDs {
		if fd >= 0 {
			_ = unix.Close(fd) // received by SCM_RIGHTS: nothing is buffered in it
		}
	}
	m.FDs = nil
}

// TakeFD hands the descriptor at index i to the caller; -1 if i is -1. It can be taken once.
func (m *Message) TakeFD(i int) int {
	if i < 0 {
		return -1
	}
	fd := m.FDs[i]
	m.FDs[i] = -1
	return fd
}

// Conn is one end of a connection. One goroutine may receive while any
// number send.
type Conn struct {
	file *os.File        // nil: blocking, fd is used as it is
	raw  syscall.RawConn // of file
	fd   int             // blocking mode

	// SendTimeout bounds each Send of a connection made by NewConn; 0: no bound. Set it before use.
	SendTimeout time.Duration

	sending sync.Mutex // frames of two messages never mix
}

// NewConn returns a connection that waits in the runtime's poller. It takes over fd.
func NewConn(fd int) (*Conn, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	f := os.NewFile(uintptr(fd), "control")
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	return &Conn{file: f, raw: raw}, nil
}

// NewBlockingConn returns a connection that waits in the system call itself: for
// a process that has one thread of work and must not start a poller. The
// descriptor stays the caller's.
func NewBlockingConn(fd int) *Conn { return &Conn{fd: fd} }

// SetDeadline bounds sends and receives; the zero time removes the bound. Not in blocking mode.
func (c *Conn) SetDeadline(t time.Time) error { return c.file.SetDeadline(t) }

// Close closes the connection; pending calls return an error.
func (c *Conn) Close() error {
	if c.file == nil {
		return nil
	}
	return c.file.Close()
}

// Send sends one message. The descriptors stay the caller's.
func (c *Conn) Send(m Message) error {
	if len(m.Body) > MaxBody || len(m.FDs) > MaxFDs {
		return ErrTooLarge
	}
	c.sending.Lock()
	defer c.sending.Unlock()
	if c.SendTimeout > 0 && c.file != nil {
		if err := c.file.SetWriteDeadline(time.Now().Add(c.SendTimeout)); err != nil {
			return closedOr(err)
		}
	}
	body, fds := m.Body, m.FDs
	frame := make([]byte, 0, headerLen+min(len(body), frameBody))
	for {
		b, f := body[:min(len(body), frameBody)], fds[:min(len(fds), frameFDs)]
		body, fds = body[len(b):], fds[len(f):]
		more := len(body) > 0 || len(fds) > 0
		frame = append(frame[:0], byte(m.Type), 0, byte(len(f)), 0)
		if more {
			frame[1] = flagMore
		}
		frame = binary.LittleEndian.AppendUint32(frame, m.Req)
		frame = append(frame, b...)
		var oob []byte
		if len(f) > 0 {
			oob = unix.UnixRights(f...)
		}
		if err := c.sendFrame(frame, oob); err != nil {
			return os.NewSyscallError("sendmsg", err)
		}
		if !more {
			return nil
		}
	}
}

func (c *Conn) sendFrame(frame, oob []byte) error {
	if c.file == nil {
		return ignoringEINTR(func() error { return unix.Sendmsg(c.fd, frame, oob, nil, unix.MSG_NOSIGNAL) })
	}
	var err error
	werr := c.raw.Write(func(fd uintptr) bool {
		err = ignoringEINTR(func() error { return unix.Sendmsg(int(fd), frame, oob, nil, unix.MSG_NOSIGNAL) })
		return err != unix.EAGAIN
	})
	if werr != nil {
		return closedOr(werr)
	}
	return err
}

// Recv receives one message; io.EOF when the peer is gone.
func (c *Conn) Recv() (Message, error) {
	var m Message
	for first := true; ; first = false {
		frame, fds, err := c.recvFrame()
		if err != nil {
			m.Close()
			if err == unix.ECONNRESET { // closed with unread data of ours
				err = io.EOF
			}
			return Message{}, err
		}
		m.FDs = append(m.FDs, fds...)
		if len(frame) == 0 && len(fds) == 0 {
			m.Close()
			return Message{}, io.EOF
		}
		if len(frame) < headerLen || int(frame[2]) != len(fds) {
			m.Close()
			return Message{}, ErrMalformed
		}
		t, req := Type(frame[0]), binary.LittleEndian.Uint32(frame[4:])
		if first {
			m.Type, m.Req, m.Body = t, req, frame[headerLen:]
		} else {
			m.Body = append(m.Body, frame[headerLen:]...)
		}
		if t != m.Type || req != m.Req || frame[3] != 0 || frame[1] > flagMore {
			m.Close()
			return Message{}, ErrMalformed
		}
		if len(m.Body) > MaxBody || len(m.FDs) > MaxFDs {
			m.Close()
			return Message{}, ErrTooLarge
		}
		if frame[1]&flagMore == 0 {
			return m, nil
		}
	}
}

// recvFrame waits for a frame without holding a buffer, then reads it into one of just its size.
func (c *Conn) recvFrame() (frame []byte, fds []int, err error) {
	if c.file == nil {
		return recvmsg(c.fd)
	}
	rerr := c.raw.Read(func(fd uintptr) bool {
		frame, fds, err = recvmsg(int(fd))
		return err != unix.EAGAIN
	})
	if rerr != nil {
		return nil, nil, closedOr(rerr)
	}
	return frame, fds, err
}

// closedOr turns the poller's own error for a closed file, which has no name outside package os, into os.ErrClosed.
func closedOr(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return os.ErrClosed
}

func recvmsg(fd int) ([]byte, []int, error) {
	var size int
	var none [1]byte
	err := ignoringEINTR(func() (err error) {
		size, _, err = unix.Recvfrom(fd, none[:], unix.MSG_PEEK|unix.MSG_TRUNC)
		return err
	})
	if err != nil || size == 0 {
		return nil, nil, err
	}
	buf := make([]byte, size)
	oob := make([]byte, unix.CmsgSpace(frameFDs*4))
	var n, oobn, flags int
	err = ignoringEINTR(func() (err error) {
		n, oobn, flags, _, err = unix.Recvmsg(fd, buf, oob, unix.MSG_CMSG_CLOEXEC)
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	fds, err := rights(oob[:oobn])
	if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		// MSG_CTRUNC: the peer sent more than it should, or we are out of descriptors.
		err = os.NewSyscallError("recvmsg", unix.EMFILE)
	}
	if err != nil {
		(&Message{FDs: fds}).Close()
		return nil, nil, err
	}
	return buf[:n], fds, nil
}

func rights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var fds []int
	for i := range msgs {
		if msgs[i].Header.Level != unix.SOL_SOCKET || msgs[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		f, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			return fds, err
		}
		fds = append(fds, f...)
	}
	return fds, nil
}

func ignoringEINTR(call func() error) error {
	for {
		err := call()
		if err != unix.EINTR {
			return err
		}
	}
}

// Pair returns two connected sockets, close-on-exec, blocking.
func Pair() (a, b int, err error) {
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, -1, os.NewSyscallError("socketpair", err)
	}
	return p[0], p[1], nil
}

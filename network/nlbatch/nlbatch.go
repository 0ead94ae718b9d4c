// Package nlbatch sends several netlink requests in one system call and reads the
// answer to all of them.
//
// rtnetlink and nfnetlink handle a message inside the sender's sendto(2), one
// request after the other, so when that returns, all answers are queued on the
// socket. [Conn.Do] therefore asks for an acknowledgement of the last request only
// (errors come unasked), and a pod's ten requests cost two system calls instead of
// twenty: pod start waits for them. For everything that is not on that path, and
// for whatever is read from the kernel, use github.com/vishvananda/netlink.
//
// A [Body] is a request's payload, built by appending.
package nlbatch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// maxBatch bounds the bytes of one Do: the socket's send buffer, which the kernel
// only uses while a batch is sent.
const maxBatch = 16 << 20

// errNoAnswer is returned by Do when the kernel did not answer the last request
// and reported no error either.
var errNoAnswer = errors.New("no answer from the kernel")

// Message is one request.
type Message struct {
	// Step is what the request is for, in the words of an error message: "bring up eth0".
	Step  string
	Type  uint16 // RTM_NEWLINK, NFNL_SUBSYS_NFTABLES<<8 | NFT_MSG_NEWRULE, …
	Flags uint16 // NLM_F_REQUEST is added
	Body  Body
}

// Conn is a netlink socket in one network namespace. It is safe for concurrent
// use; calls wait for each other.
type Conn struct {
	file   *os.File
	portID uint32

	mu  sync.Mutex // held during a Do: an answer belongs to the request before it
	seq uint32
	buf []byte
}

// Dial opens a socket for protocol (NETLINK_ROUTE, NETLINK_NETFILTER) in the
// network namespace of the calling thread.
func Dial(protocol int) (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	file := os.NewFile(uintptr(fd), "netlink")
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		_ = file.Close() // Nothing was sent.
		return nil, fmt.Errorf("bind netlink socket: %w", err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		_ = file.Close() // Nothing was sent.
		return nil, fmt.Errorf("name of netlink socket: %w", err)
	}
	// Error texts of the kernel (4.12); without them the errno has to do.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)
	// An error message would carry a copy of our request.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	return &Conn{file: file, portID: sa.(*unix.SockaddrNetlink).Pid}, nil
}

// PortID is the address of this socket, the sender of the kernel's notifications
// about what was done through it.
func (c *Conn) PortID() uint32 { return c.portID }

// Close closes the socket, after a Do that is running.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.file.Close()
}

// Do sends msgs in one piece and returns the first error, which is
// "step: errno" with the kernel's own text behind it where there is one.
// rtnetlink goes on after an error: the requests behind the failed one may or may
// not have had their effect. An nfnetlink batch has no effect then.
func (c *Conn) Do(msgs ...Message) error {
	if len(msgs) == 0 {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	first := c.seq + 1
	buf := c.buf[:0]
	ack := lastRequest(msgs)
	for i, m := range msgs {
		flags := m.Flags | unix.NLM_F_REQUEST
		if i == ack {
			flags |= unix.NLM_F_ACK
		}
		c.seq++
		buf = binary.NativeEndian.AppendUint32(buf, uint32(unix.SizeofNlMsghdr+len(m.Body)))
		buf = binary.NativeEndian.AppendUint16(buf, m.Type)
		buf = binary.NativeEndian.AppendUint16(buf, flags)
		buf = binary.NativeEndian.AppendUint32(buf, c.seq)
		buf = binary.NativeEndian.AppendUint32(buf, 0)
		buf = append(buf, m.Body...)
		buf = pad(buf)
	}
	if len(buf) > maxBatch {
		return fmt.Errorf("%s and %d more: %d bytes of netlink requests, at most %d", msgs[0].Step, len(msgs)-1, len(buf), maxBatch)
	}
	if cap(buf) <= 64<<10 {
		c.buf = buf // Kept for the next one; a whole ruleset is not.
	}
	fd := int(c.file.Fd())
	if err := c.send(fd, buf); err != nil {
		return fmt.Errorf("%s: send to netlink: %w", msgs[0].Step, err)
	}
	return c.answers(fd, msgs, first, first+uint32(ack))
}

// lastRequest is the index of the last message that the kernel answers: the end
// of an nfnetlink batch is not one.
func lastRequest(msgs []Message) int {
	for i := len(msgs) - 1; i > 0; i-- {
		if msgs[i].Type != unix.NFNL_MSG_BATCH_END {
			return i
		}
	}
	return 0
}

// send makes room in the socket where the default (net.core.wmem_default) is too little.
func (c *Conn) send(fd int, buf []byte) error {
	kernel := &unix.SockaddrNetlink{Family: unix.AF_NETLINK}
	err := unix.Sendto(fd, buf, 0, kernel)
	if errors.Is(err, unix.EMSGSIZE) {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, maxBatch); err != nil {
			return fmt.Errorf("set send buffer: %w", err)
		}
		err = unix.Sendto(fd, buf, 0, kernel)
	}
	return err
}

// answers reads what is queued. Answers to earlier requests (of a Do that gave
// up) are passed over.
func (c *Conn) answers(fd int, msgs []Message, first, last uint32) error {
	var failed error
	var buf [8192]byte
	for {
		n, _, err := unix.Recvfrom(fd, buf[:], unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOBUFS):
			// More errors than the socket holds; the first ones are enough.
			continue
		case errors.Is(err, unix.EAGAIN) && failed != nil:
			return failed
		case errors.Is(err, unix.EAGAIN):
			return fmt.Errorf("%s: %w", msgs[len(msgs)-1].Step, errNoAnswer)
		case err != nil:
			return fmt.Errorf("%s: receive from netlink: %w", msgs[0].Step, err)
		}
		for rest := buf[:n]; len(rest) >= unix.SizeofNlMsghdr; {
			size := int(binary.NativeEndian.Uint32(rest))
			if size < unix.SizeofNlMsghdr || size > len(rest) {
				return fmt.Errorf("%s: malformed netlink answer", msgs[0].Step)
			}
			m := rest[:size]
			rest = rest[min(align(size), len(rest)):]
			seq := binary.NativeEndian.Uint32(m[8:])
			i := seq - first
			if binary.NativeEndian.Uint16(m[4:]) != unix.NLMSG_ERROR || i > last-first+1 || len(m) < unix.SizeofNlMsghdr+4 {
				continue
			}
			errno := unix.Errno(-int32(binary.NativeEndian.Uint32(m[unix.SizeofNlMsghdr:])))
			if errno == 0 {
				if seq == last && failed == nil {
					return nil
				}
				continue
			}
			if failed == nil {
				failed = stepError(msgs, int(i), errno, extAck(m))
			}
		}
	}
}

func stepError(msgs []Message, i int, errno unix.Errno, text string) error {
	step := msgs[min(i, len(msgs)-1)].Step
	if text != "" {
		return fmt.Errorf("%s: %w (%s)", step, errno, text)
	}
	return fmt.Errorf("%s: %w", step, errno)
}

// extAck is the kernel's own words in an error message, "" where it has none
// (linux/netlink.h, NLMSGERR_ATTR_MSG).
func extAck(m []byte) string {
	const tlvs, msg = unix.NLM_F_ACK_TLVS, 1
	if binary.NativeEndian.Uint16(m[6:])&tlvs == 0 {
		return ""
	}
	attrs := m[min(len(m), unix.SizeofNlMsghdr+4+unix.SizeofNlMsghdr):] // capped: header of the request only
	for len(attrs) >= unix.SizeofRtAttr {
		n := int(binary.NativeEndian.Uint16(attrs))
		if n < unix.SizeofRtAttr || n > len(attrs) {
			return ""
		}
		if binary.NativeEndian.Uint16(attrs[2:]) == msg {
			return unix.ByteSliceToString(attrs[unix.SizeofRtAttr:n])
		}
		attrs = attrs[min(align(n), len(attrs)):]
	}
	return ""
}

func align(n int) int { return (n + 3) &^ 3 }

func pad(b []byte) []byte {
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// Index is the index of the link called name in the socket's namespace.
func (c *Conn) Index(name string) (int32, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return 0, fmt.Errorf("index of link %q: %w", name, err)
	}
	// Any socket will do, and unlike RTM_GETLINK it takes no lock (netdevice(7)).
	if err := unix.IoctlIfreq(int(c.file.Fd()), unix.SIOCGIFINDEX, ifr); err != nil {
		return 0, fmt.Errorf("index of link %q: %w", name, err)
	}
	return int32(ifr.Uint32()), nil
}

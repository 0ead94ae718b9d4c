package nlbatch

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Body is the payload of a request: a fixed header, then attributes. Methods
// append and return the longer Body, like the functions of package binary.
type Body []byte

// Link starts a body of RTM_*LINK (struct ifinfomsg). change says which of the
// IFF_ flags to set to those in flags.
func Link(family uint8, index int32, flags, change uint32) Body {
	b := Body{family, 0, 0, 0}
	b = binary.NativeEndian.AppendUint32(b, uint32(index))
	b = binary.NativeEndian.AppendUint32(b, flags)
	return binary.NativeEndian.AppendUint32(b, change)
}

// Addr starts a body of RTM_*ADDR (struct ifaddrmsg).
func Addr(family uint8, bits int, index int32) Body {
	return binary.NativeEndian.AppendUint32(Body{family, uint8(bits), 0, unix.RT_SCOPE_UNIVERSE}, uint32(index))
}

// DefaultRoute starts a body of RTM_*ROUTE (struct rtmsg): a unicast route to
// everything, in the main table, made at boot as far as routing daemons are concerned.
func DefaultRoute(family uint8) Body {
	return Body{family, 0, 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST, 0, 0, 0, 0}
}

// NFGen starts a body of an nfnetlink message (struct nfgenmsg).
func NFGen(family uint8, resource uint16) Body {
	return binary.BigEndian.AppendUint16(Body{family, unix.NFNETLINK_V0}, resource)
}

// Attr appends an attribute.
func (b Body) Attr(typ uint16, data []byte) Body {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofRtAttr+len(data)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, data...)
	return pad(b)
}

// String appends a NUL-terminated string.
func (b Body) String(typ uint16, s string) Body {
	return b.Attr(typ, append([]byte(s), 0))
}

// Uint8 appends a byte.
func (b Body) Uint8(typ uint16, v uint8) Body { return b.Attr(typ, []byte{v}) }

// Uint32 appends a number in the machine's byte order (rtnetlink).
func (b Body) Uint32(typ uint16, v uint32) Body {
	return b.Attr(typ, binary.NativeEndian.AppendUint32(nil, v))
}

// BE32 appends a number in network byte order (nfnetlink).
func (b Body) BE32(typ uint16, v uint32) Body {
	return b.Attr(typ, binary.BigEndian.AppendUint32(nil, v))
}

// Nest appends an attribute that contains what fill appends. Its length is 16
// bits: the caller keeps the contents below 64 KiB.
func (b Body) Nest(typ uint16, fill func(Body) Body) Body {
	start := len(b)
	b = append(b, 0, 0, 0, 0)
	b = fill(b)
	binary.NativeEndian.PutUint16(b[start:], uint16(len(b)-start))
	binary.NativeEndian.PutUint16(b[start+2:], typ)
	return b
}

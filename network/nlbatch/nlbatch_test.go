package nlbatch

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The numbers in the wanted bytes are those of a little-endian machine.
func TestBody(t *testing.T) {
	for _, tt := range []struct {
		name string
		in   Body
		want string
	}{
		{"link", Link(unix.AF_INET6, 7, 1, 0x0101), "0a000000 07000000 01000000 01010000"},
		{"addr", Addr(unix.AF_INET, 24, 7), "02180000 07000000"},
		{"route", DefaultRoute(unix.AF_INET), "02000000 fe030001 00000000"},
		{"nfgen", NFGen(1, 10), "0100000a"},
		{"string, padded", Body(nil).String(3, "lo"), "07000300 6c6f0000"},
		{"byte", Body(nil).Uint8(4, 9), "05000400 09000000"},
		{"native", Body(nil).Uint32(4, 0x01020304), "08000400 04030201"},
		{"network order", Body(nil).BE32(4, 0x01020304), "08000400 01020304"},
		{"empty", Body(nil).Attr(1, nil), "04000100"},
		{"nested", Body(nil).Nest(1, func(b Body) Body { return b.Uint8(2, 3).Nest(4, func(b Body) Body { return b }) }).Uint8(5, 6),
			"10000100 05000200 03000000 04000400 05000500 06000000"},
	} {
		want, err := hex.DecodeString(strings.ReplaceAll(tt.want, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(tt.in, want) {
			t.Errorf("%s: got %x, want %x", tt.name, []byte(tt.in), want)
		}
	}
}

func TestExtAck(t *testing.T) {
	header := make([]byte, 16+4+16) // message, errno, header of the request
	flagged := bytes.Clone(header)
	flagged[7] = 0x02 // NLM_F_ACK_TLVS
	for _, tt := range []struct {
		name string
		in   []byte
		want string
	}{
		{"none", header, ""},
		{"not flagged", append(bytes.Clone(header), Body(nil).String(1, "x")...), ""},
		{"text", append(bytes.Clone(flagged), Body(nil).Uint32(2, 1).String(1, "no such thing")...), "no such thing"},
		{"truncated", append(bytes.Clone(flagged), 200, 0, 1, 0), ""},
		{"short", flagged[:20], ""},
		{"zero length", append(bytes.Clone(flagged), 0, 0, 1, 0), ""},
	} {
		if got := extAck(tt.in); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

// These need no privileges: the kernel refuses them.
func TestDo(t *testing.T) {
	c, err := Dial(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	get := func(step string, index int32) Message {
		return Message{Step: step, Type: unix.RTM_DELLINK, Body: Link(unix.AF_UNSPEC, index, 0, 0)}
	}
	if err := c.Do(); err != nil {
		t.Errorf("nothing: got %v", err)
	}
	for _, n := range []int{1, 2, 50} {
		var msgs []Message
		for i := range n {
			msgs = append(msgs, get(string(rune('a'+i%26)), 1<<30))
		}
		msgs[0].Step = "delete the first"
		err := c.Do(msgs...)
		if !(errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EPERM)) || !strings.HasPrefix(err.Error(), "delete the first: ") {
			t.Errorf("%d messages: got %v, want the first one's error", n, err)
		}
	}
	if _, err := c.Index("lo"); err != nil {
		t.Error(err)
	}
	if _, err := c.Index("no-such-link"); !errors.Is(err, unix.ENODEV) {
		t.Errorf("index: got %v, want ENODEV", err)
	}
	big := Message{Step: "big", Type: unix.RTM_DELLINK, Body: make(Body, maxBatch)}
	if err := c.Do(big); err == nil || !strings.Contains(err.Error(), "bytes of netlink requests") {
		t.Errorf("too big: got %v", err)
	}
}

func FuzzExtAck(f *testing.F) {
	f.Add(make([]byte, 40))
	f.Add([]byte{36, 0, 0, 0, 2, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 8, 0, 1, 0, 'a', 'b', 'c', 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < unix.SizeofNlMsghdr+4 {
			return // answers checks it
		}
		if s := extAck(b); len(s) > len(b) {
			t.Errorf("%d bytes out of %d", len(s), len(b))
		}
	})
}

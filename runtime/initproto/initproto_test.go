package initproto

import (
	"bytes"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func pair(t *testing.T) (a, b *Conn) {
	t.Helper()
	x, y, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	if a, err = NewConn(x); err != nil {
		t.Fatal(err)
	}
	if b, err = NewConn(y); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func TestConnCarriesBodiesAndDescriptorsOfAnySize(t *testing.T) {
	tests := []struct {
		name string
		body int
		fds  int
	}{
		{"empty", 0, 0},
		{"small", 10, 1},
		{"one full frame", frameBody, frameFDs},
		{"one byte and one descriptor more than a frame", frameBody + 1, frameFDs + 1},
		{"a 2 MiB environment and 1000 mounts", 2 << 20, 1000},
		{"many descriptors, no body", 0, 600},
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a, b := pair(t)
			want := Message{Type: TypeCreate, Req: 7, Body: bytes.Repeat([]byte{'x'}, tt.body)}
			for range tt.fds {
				want.FDs = append(want.FDs, int(null.Fd()))
			}
			sent := make(chan error, 1)
			go func() { sent <- a.Send(want) }()
			got, err := b.Recv()
			if err != nil {
				t.Fatalf("Recv: %v", err)
			}
			defer got.Close()
			if err := <-sent; err != nil {
				t.Fatalf("Send: %v", err)
			}
			if got.Type != want.Type || got.Req != want.Req || !bytes.Equal(got.Body, want.Body) || len(got.FDs) != tt.fds {
				t.Errorf("got type %d req %d body of %d with %d descriptors, want type %d req %d body of %d with %d",
					got.Type, got.Req, len(got.Body), len(got.FDs), want.Type, want.Req, len(want.Body), tt.fds)
			}
			for _, fd := range got.FDs {
				flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
				if err != nil || flags&unix.FD_CLOEXEC == 0 {
					t.Fatalf("descriptor %d: flags %#x, error %v: want close-on-exec", fd, flags, err)
				}
			}
		})
	}
}

func TestConnRefusesTooMuch(t *testing.T) {
	a, _ := pair(t)
	if err := a.Send(Message{Body: make([]byte, MaxBody+1)}); err != ErrTooLarge {
		t.Errorf("got %v, want ErrTooLarge", err)
	}
}

func TestConnEndsWithEOF(t *testing.T) {
	a, b := pair(t)
	if err := a.Send(Message{Type: TypeDone}); err != nil {
		t.Fatal(err)
	}
	a.Close()
	if m, err := b.Recv(); err != nil || m.Type != TypeDone {
		t.Fatalf("got %v, %v, want Done", m, err)
	}
	if _, err := b.Recv(); err != io.EOF {
		t.Errorf("got %v, want EOF", err)
	}
}

func TestConnRefusesMalformedFrames(t *testing.T) {
	tests := []struct{ name, frame string }{
		{"short header", "\x01\x00"},
		{"unknown flag", "\x01\x02\x00\x00\x00\x00\x00\x00"},
		{"claims a descriptor that did not come", "\x01\x00\x01\x00\x00\x00\x00\x00"},
		{"reserved byte set", "\x01\x00\x00\x01\x00\x00\x00\x00"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			x, y, err := Pair()
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(x)
			b, err := NewConn(y)
			if err != nil {
				t.Fatal(err)
			}
			defer b.Close()
			if _, err := unix.Write(x, []byte(tt.frame)); err != nil {
				t.Fatal(err)
			}
			if _, err := b.Recv(); err != ErrMalformed {
				t.Errorf("got %v, want ErrMalformed", err)
			}
		})
	}
}

func exampleContainer() *Container {
	return &Container{
		ID: "c1", PID: PIDTarget, TargetID: "c0",
		Process: Process{
			Args: []string{"/bin/sh", "-c", "x"}, Env: []string{"A=\xff"}, Cwd: "/", UID: 1, GID: 2, Groups: []uint32{3, 4}, Umask: 0o22,
			Bounding: 0xa80425fb, Effective: 1, Permitted: 2, Inheritable: 3, Ambient: 1 << 40, NoNewPrivs: true,
			Seccomp: []byte{1, 2, 3, 4, 5, 6, 7, 8}, SeccompFlags: 2, OOMScoreAdj: -998, SetOOMScoreAdj: true,
			Rlimits: []Rlimit{{Resource: 7, Soft: 1024, Hard: 1 << 63}}, Terminal: true, Keyring: "_ses.c1",
		},
		NewCgroupNS: true, RootFD: 1, RootReadonly: true,
		Mounts: []Mount{
			{Kind: MountProc, Target: "/proc", FD: -1, Attr: 14, Strict: true},
			{Kind: MountFD, Target: "/data", FD: 0, File: true},
			{Kind: MountTmpfs, Target: "/dev", FD: -1, Data: [][2]string{{"mode", "755"}}, ReadonlyAfter: true},
		},
		Devices: []Device{{Path: "/dev/null", Mode: unix.S_IFCHR | 0o666, Major: 1, Minor: 3, UID: 5, GID: 6}},
		Links:   [][2]string{{"/proc/self/fd", "/dev/fd"}}, NullFD: 0, Masked: []string{"/proc/kcore"}, Readonly: []string{"/proc/sys"},
		CgroupFD: 2, TasksFD: 3, Tasks: 2, ProcsFD: 6, LogFD: 5, Stdin: true, StdinOnce: true,
	}
}

func TestMessagesSurviveTheWire(t *testing.T) {
	setup := &Setup{PodID: "p", Title: "ns/n", Hostname: "h", Sysctls: [][2]string{{"net.x", "1"}}, ShmSize: 1 << 26, HostNet: true, SharedPID: true}
	if got, err := DecodeSetup(setup.Encode()); err != nil || !cmp.Equal(got, setup) {
		t.Errorf("Setup: %v\n%s", err, cmp.Diff(setup, got))
	}
	c := exampleContainer()
	if got, err := DecodeContainer(c.Encode(), 7); err != nil || !cmp.Equal(got, c) {
		t.Errorf("Container: %v\n%s", err, cmp.Diff(c, got))
	}
	x := &Exec{ContainerID: "c", ExecID: "e", Process: c.Process, CgroupFD: 3, TasksFD: -1, ProcsFD: 4}
	if got, err := DecodeExec(x.Encode(), 5); err != nil || !cmp.Equal(got, x) {
		t.Errorf("Exec: %v\n%s", err, cmp.Diff(x, got))
	}
	f := &Failure{Kind: FailStart, Step: "mount /proc", Errno: 1, Text: "t"}
	if got, err := DecodeFailure(f.Encode()); err != nil || *got != *f {
		t.Errorf("Failure: got %v, %v", got, err)
	}
	s := &Started{PID: 7, At: 1 << 60, Warnings: []string{"w"}}
	if got, err := DecodeStarted(s.Encode()); err != nil || !cmp.Equal(got, s) {
		t.Errorf("Started: got %v, %v", got, err)
	}
	e := &Exited{ContainerID: "c", ExecID: "e", Status: 9, At: 5}
	forking := &Forking{Program: "/bin/true", Warnings: []string{"a"}}
	if got, err := DecodeForking(forking.Encode()); err != nil || !cmp.Equal(got, forking) {
		t.Errorf("Forking: got %+v, %v", got, err)
	}
	if got, err := DecodeExited(e.Encode()); err != nil || *got != *e {
		t.Errorf("Exited: got %v, %v", got, err)
	}
	l := []ContainerInfo{{ID: "c", State: StateExited, PID: 4, StartedAt: 1, Status: 256, ExitedAt: 2, LogBytes: 3, LogDropped: 4}}
	if got, err := DecodeListing(EncodeListing(l)); err != nil || !cmp.Equal(got, l) {
		t.Errorf("Listing: got %v, %v", got, err)
	}
}

func TestDecodeContainerRefusesIndicesWithoutDescriptor(t *testing.T) {
	tests := []struct {
		name   string
		change func(*Container)
	}{
		{"root", func(c *Container) { c.RootFD = 7 }},
		{"no root", func(c *Container) { c.RootFD = -1 }},
		{"mount", func(c *Container) { c.Mounts[1].FD = 7 }},
		{"negative mount", func(c *Container) { c.Mounts[1].FD = -1 }},
		{"null", func(c *Container) { c.NullFD = 9 }},
		{"masks without a null device", func(c *Container) { c.NullFD, c.Masked = -1, []string{"/proc/kcore"} }},
		{"last of the cgroup files", func(c *Container) { c.Tasks = 5 }},
		{"cgroup.procs", func(c *Container) { c.ProcsFD = 7 }},
		{"huge count", func(c *Container) { c.Tasks = 1 << 62 }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := exampleContainer()
			tt.change(c)
			if _, err := DecodeContainer(c.Encode(), 7); err != ErrMalformed {
				t.Errorf("got %v, want ErrMalformed", err)
			}
		})
	}
}

func TestDecodersRefuseCutAndPaddedBodies(t *testing.T) {
	body := exampleContainer().Encode()
	for n := range body {
		if _, err := DecodeContainer(body[:n], 6); err == nil {
			t.Fatalf("a body cut to %d of %d bytes decoded", n, len(body))
		}
	}
	if _, err := DecodeContainer(append(body, 0), 6); err == nil {
		t.Error("a body with a byte too many decoded")
	}
}

func TestParseJournal(t *testing.T) {
	x := Exited{ContainerID: "abc", Status: 0x8b, At: 1234567890}
	tests := []struct {
		name, in string
		want     []Exited
	}{
		{"empty", "", nil},
		{"round trip", string(JournalLine(&x)), []Exited{x}},
		{"torn last line", string(JournalLine(&x)) + "exit abc 1", []Exited{x}},
		{"foreign line", "hello\n" + string(JournalLine(&x)), []Exited{x}},
		{"bad status", "exit a -1 2\nexit a 4294967296 2\n", nil},
		{"no id", "exit  1 2\n", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := ParseJournal([]byte(tt.in)); !cmp.Equal(got, tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(exampleContainer().Encode())
	f.Add((&Setup{PodID: "p", Sysctls: [][2]string{{"a", "b"}}}).Encode())
	f.Add(EncodeListing([]ContainerInfo{{ID: "c"}}))
	f.Add([]byte(strings.Repeat("\xff", 20)))
	f.Fuzz(func(t *testing.T, b []byte) {
		// Whatever decodes encodes to something that decodes to the same.
		if c, err := DecodeContainer(b, 6); err == nil {
			again, err := DecodeContainer(c.Encode(), 7)
			if err != nil || !cmp.Equal(c, again) {
				t.Errorf("Container: %v\n%s", err, cmp.Diff(c, again))
			}
		}
		if s, err := DecodeSetup(b); err == nil {
			if again, err := DecodeSetup(s.Encode()); err != nil || !cmp.Equal(s, again) {
				t.Errorf("Setup: %v", err)
			}
		}
		_, _ = DecodeExec(b, 6)
		_, _ = DecodeListing(b)
		_, _ = DecodeFailure(b)
		_, _ = DecodeStarted(b)
		_, _ = DecodeForking(b)
		_, _ = DecodeExited(b)
		_, _ = DecodeTarget(b)
	})
}

func FuzzJournal(f *testing.F) {
	f.Add([]byte("exit abc 0 1\nexit def 256 2\n"))
	f.Add([]byte("exit"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, x := range ParseJournal(b) {
			got := ParseJournal(JournalLine(&x))
			if len(got) != 1 || got[0] != x {
				t.Errorf("got %v, want %v", got, x)
			}
		}
	})
}

func TestClosedConnSaysSo(t *testing.T) {
	a, _ := pair(t)
	a.SendTimeout = time.Minute
	a.Close()
	if err := a.Send(Message{Type: TypeDone}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Send: got %v, want os.ErrClosed", err)
	}
	if _, err := a.Recv(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Recv: got %v, want os.ErrClosed", err)
	}
}

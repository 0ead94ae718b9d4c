package cgroup

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
)

// manager is systemd at the other end of a D-Bus connection, as far as a transient scope goes: it authenticates anybody and answers
// StartTransientUnit, StartUnit and StopUnit.
type manager struct {
	listener net.Listener
	answer   func(m *manager, call string, unit string) reply

	mu    sync.Mutex
	units map[string][]property // guarded by mu; those that are active
	calls []string              // guarded by mu
	jobs  int                   // guarded by mu
	wg    sync.WaitGroup
}

// reply is what the manager makes of a call.
type reply struct {
	err    string // a D-Bus error's name, instead of a job
	result string // of the job; "": it does not end
	early  bool   // the job's end is told before its name
	hangUp bool   // the connection ends instead of the answer; what was asked for is done
}

var done = reply{result: "done"}

func startManager(t *testing.T) *manager {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "private"))
	if err != nil {
		t.Fatal(err)
	}
	m := &manager{listener: l, units: map[string][]property{}, answer: func(*manager, string, string) reply { return done }}
	m.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			m.wg.Go(func() { defer c.Close(); m.serve(c) })
		}
	})
	t.Cleanup(func() { l.Close(); m.wg.Wait() })
	return m
}

// bus connects as openBus does, but to m.
func (m *manager) bus(t *testing.T) *bus {
	t.Helper()
	b := &bus{dial: func(ctx context.Context, signals dbus.SignalHandler) (*dbus.Conn, error) {
		return dialBus(ctx, "unix:path="+m.listener.Addr().String(), signals)
	}}
	t.Cleanup(func() {
		if err := b.close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

// serve speaks D-Bus: the handshake ("Authentication Protocol" of its specification), then messages.
func (m *manager) serve(c net.Conn) {
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadString('\n')
		switch line = strings.TrimSpace(strings.TrimPrefix(line, "\x00")); {
		case err != nil:
			return
		case line == "AUTH":
			fmt.Fprint(c, "REJECTED EXTERNAL\r\n")
		case strings.HasPrefix(line, "AUTH "):
			fmt.Fprint(c, "OK 0123456789abcdef0123456789abcdef\r\n")
		case line == "NEGOTIATE_UNIX_FD":
			fmt.Fprint(c, "AGREE_UNIX_FD\r\n")
		case line == "BEGIN":
			m.messages(r, c)
			return
		default:
			fmt.Fprint(c, "ERROR\r\n")
		}
	}
}

func (m *manager) messages(r io.Reader, w io.Writer) {
	serial := uint32(0)
	send := func(kind dbus.Type, headers map[dbus.HeaderField]dbus.Variant, body ...any) {
		serial++
		if len(body) > 0 {
			headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(body...))
		}
		msg := &dbus.Message{Type: kind, Headers: headers, Body: body}
		var b bytes.Buffer
		if err := msg.EncodeTo(&b, binary.LittleEndian); err != nil {
			panic(err)
		}
		data := b.Bytes()
		binary.LittleEndian.PutUint32(data[8:], serial)
		_, _ = w.Write(data) // the client may be gone
	}
	for {
		msg, err := dbus.DecodeMessage(r)
		if err != nil {
			return
		}
		member, _ := msg.Headers[dbus.FieldMember].Value().(string)
		unit, _ := msg.Body[0].(string)
		job, a := m.handle(member, unit, msg.Body)
		if a.hangUp {
			return
		}
		answered := map[dbus.HeaderField]dbus.Variant{dbus.FieldReplySerial: dbus.MakeVariant(msg.Serial())}
		if a.err != "" {
			answered[dbus.FieldErrorName] = dbus.MakeVariant(a.err)
			send(dbus.TypeError, answered, "no")
			continue
		}
		end := func(job dbus.ObjectPath, result string) {
			send(dbus.TypeSignal, map[dbus.HeaderField]dbus.Variant{
				dbus.FieldPath: dbus.MakeVariant(managerPath), dbus.FieldInterface: dbus.MakeVariant(managerIface), dbus.FieldMember: dbus.MakeVariant("JobRemoved"),
			}, uint32(1), job, unit, result)
		}
		end("/org/freedesktop/systemd1/job/0", "canceled") // a former one of that unit
		if a.early {
			end(job, a.result)
		}
		send(dbus.TypeMethodReply, answered, job)
		if !a.early && a.result != "" {
			end(job, a.result)
		}
	}
}

func (m *manager) handle(member, unit string, body []any) (dbus.ObjectPath, reply) {
	a := m.answer(m, member, unit)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls = append(m.calls, member)
	m.jobs++
	job := dbus.ObjectPath(fmt.Sprintf("/org/freedesktop/systemd1/job/%d", m.jobs))
	if a.err != "" {
		return job, a
	}
	switch member {
	case "StartTransientUnit":
		if m.units[unit] != nil {
			return job, reply{err: errExists}
		}
		var p []property
		if err := dbus.Store(body[2:3], &p); err != nil {
			panic(err)
		}
		m.units[unit] = p
	case "StopUnit":
		if m.units[unit] == nil {
			return job, reply{err: errNoUnit}
		}
		delete(m.units, unit)
	}
	return job, a
}

func (m *manager) active() map[string][]property {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.units)
}

func (m *manager) called() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return strings.Join(m.calls, " ")
}

// on answers only the n-th call with a, all others with done.
func on(n int, a reply) func(*manager, string, string) reply {
	return func(m *manager, _, _ string) reply {
		m.mu.Lock()
		defer m.mu.Unlock()
		if len(m.calls) == n {
			return a
		}
		return done
	}
}

func TestScopeOnBus(t *testing.T) {
	for _, c := range []struct {
		name   string
		answer func(*manager, string, string) reply
		want   string // calls
		err    string
	}{
		{"started", nil, "StartTransientUnit", ""},
		{"ended before it has a name", on(0, reply{result: "done", early: true}), "StartTransientUnit", ""},
		{"failed", on(0, reply{result: "failed"}), "StartTransientUnit", "systemd's job ended: failed"},
		{"refused", on(0, reply{err: "org.freedesktop.DBus.Error.AccessDenied"}), "StartTransientUnit", "no"},
		{"hung up after it was done", on(0, reply{hangUp: true}), "StartTransientUnit StartTransientUnit StartUnit", ""},
		{"left the bus", on(0, reply{err: "org.freedesktop.DBus.Error.NoReply"}), "StartTransientUnit StartTransientUnit", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := startManager(t)
			if c.answer != nil {
				m.answer = c.answer
			}
			b := m.bus(t)
			err := b.start(t.Context(), scope{name: "crisp-1.scope", slice: "a.slice", description: "d", pid: 7})
			if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
				t.Errorf("start: %v, want %q", err, c.err)
			}
			if got := m.called(); got != c.want {
				t.Errorf("calls %q, want %q", got, c.want)
			}
			if c.err != "" {
				return
			}
			var got []string
			for _, p := range m.active()["crisp-1.scope"] {
				got = append(got, p.Name+"="+p.Value.String())
			}
			want := []string{`Description="d"`, `Slice="a.slice"`, "PIDs=@au [7]", "Delegate=true", "TasksMax=@t 18446744073709551615",
				"DefaultDependencies=false", `CollectMode="inactive-or-failed"`}
			if !slices.Equal(got, want) {
				t.Errorf("properties %q, want %q", got, want)
			}
			if err := errors.Join(b.stop(t.Context(), "crisp-1.scope"), b.stop(t.Context(), "crisp-1.scope")); err != nil || len(m.active()) > 0 {
				t.Errorf("stop, twice: %v, left: %v", err, m.active())
			}
		})
	}
}

// One slow answer keeps nobody else waiting, and who gives up says what for.
func TestBusManyAtOnce(t *testing.T) {
	m := startManager(t)
	m.answer = func(_ *manager, _, unit string) reply {
		if unit == "slow.scope" {
			return reply{}
		}
		return done
	}
	b := m.bus(t)
	ctx, cancel := context.WithCancel(t.Context())
	slow := make(chan error, 1)
	go func() { slow <- b.start(ctx, scope{name: "slow.scope"}) }()
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if err := b.start(t.Context(), scope{name: fmt.Sprintf("%d.scope", i)}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	cancel()
	if err := <-slow; !errors.Is(err, context.Canceled) {
		t.Errorf("the slow one: %v, want that it was cancelled", err)
	}
	if len(b.jobs.waiting) != 0 {
		t.Errorf("still waiting for %v", b.jobs.waiting)
	}
}

func TestBusComesBack(t *testing.T) {
	m := startManager(t)
	b := m.bus(t)
	dial, absent := b.dial, 0
	b.dial = func(ctx context.Context, signals dbus.SignalHandler) (*dbus.Conn, error) {
		if absent++; absent < 4 {
			return nil, errors.New("connection refused")
		}
		return dial(ctx, signals)
	}
	if err := b.start(t.Context(), scope{name: "a.scope"}); err != nil {
		t.Errorf("systemd that comes back: %v", err)
	}
	b2 := &bus{dial: func(context.Context, dbus.SignalHandler) (*dbus.Conn, error) { return nil, errors.New("no such file") }}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := b2.start(ctx, scope{name: "a.scope"}); err == nil || !strings.Contains(err.Error(), "cannot reach systemd: no such file") {
		t.Errorf("without systemd: %v", err)
	}
}

// A server that never answers the handshake ends with the context.
func TestBusDialHangs(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "silent"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if conn, err := dialBus(ctx, "unix:path="+l.Addr().String(), &jobs{}); err == nil {
		conn.Close()
		t.Error("got a connection")
	}
}

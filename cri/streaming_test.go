package cri

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/crisp-cri/crisp/podsandbox"
)

// streamPods runs what a test puts there.
type streamPods struct {
	*fakePods
	exec   func(ctx context.Context, s podsandbox.Streams) (int, error)
	attach func(ctx context.Context, s podsandbox.Streams) error
	dial   func(ctx context.Context) (net.Conn, error)
}

func (p *streamPods) Exec(ctx context.Context, _ string, _ []string, s podsandbox.Streams) (int, error) {
	return p.exec(ctx, s)
}
func (p *streamPods) Attach(ctx context.Context, _ string, s podsandbox.Streams) error {
	return p.attach(ctx, s)
}
func (p *streamPods) DialPod(ctx context.Context, _ string, _ uint16) (net.Conn, error) {
	return p.dial(ctx)
}

// newTestStreamer serves on loopback until the test's end, which waits for all sessions.
func newTestStreamer(t *testing.T, pods *streamPods, change ...func(*streamer)) *streamer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	pods.fakePods = &fakePods{}
	s := newStreamer(StreamingConfig{Listener: l}, pods)
	for _, f := range change {
		f(s)
	}
	var running sync.WaitGroup
	running.Go(s.run)
	t.Cleanup(func() {
		s.stop()
		running.Wait()
	})
	return s
}

func (s *streamer) mustURL(t *testing.T, method string, request any) string {
	t.Helper()
	u, err := s.url(method, request)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func (s *streamer) execURL(t *testing.T, tty bool) string {
	return s.mustURL(t, "exec", &runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"x"}, Stdin: true, Stdout: true, Stderr: !tty, Tty: tty})
}

// streamProtocols are what clients speak; what is not "spdy" is a WebSocket's.
var streamProtocols = []string{"spdy", remotecommand.StreamProtocolV5Name, remotecommand.StreamProtocolV4Name, remotecommand.StreamProtocolV1Name}

// testClient is a client below the level of client-go: it can be impolite.
type testClient struct {
	ws   *websocket.Conn // of a WebSocket
	spdy httpstream.Connection
	in   httpstream.Stream // of SPDY: stdin
	out  httpstream.Stream
	err  httpstream.Stream
	raw  net.Conn
}

// open connects to an exec or attach with stdin, stdout, and stderr.
func open(t *testing.T, protocol, address string) *testClient {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := net.Dial("tcp", u.Host)
	if err != nil {
		t.Fatal(err)
	}
	c := &testClient{raw: raw}
	t.Cleanup(func() { _ = raw.Close() }) // closed by the test already, or who cares
	if protocol != "spdy" {
		cfg, err := websocket.NewConfig("ws://"+u.Host+u.Path, "http://localhost")
		if err != nil {
			t.Fatal(err)
		}
		cfg.Protocol = []string{protocol}
		if c.ws, err = websocket.NewClient(cfg, raw); err != nil {
			t.Fatal(err)
		}
		return c
	}
	fmt.Fprintf(raw, "POST %s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n", u.Path)
	head := make([]byte, 0, 1024)
	for one := make([]byte, 1); !bytes.HasSuffix(head, []byte("\r\n\r\n")); head = append(head, one[0]) {
		if _, err := raw.Read(one); err != nil {
			t.Fatalf("%v after %q", err, head)
		}
	}
	if !bytes.HasPrefix(head, []byte("HTTP/1.1 101")) {
		t.Fatalf("got %q", head)
	}
	if c.spdy, err = spdy.NewClientConnection(closedTwice{raw}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.spdy.Close() }) // ends who holds what nobody has read
	for kind, s := range map[string]*httpstream.Stream{"error": &c.err, "stdin": &c.in, "stdout": &c.out, "stderr": new(httpstream.Stream)} {
		h := http.Header{}
		h.Set("streamType", kind)
		if *s, err = c.spdy.CreateStream(h); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// closedTwice can be: spdystream keeps a goroutine for a second to tell somebody of an error.
type closedTwice struct{ net.Conn }

func (c closedTwice) Close() error {
	_ = c.Conn.Close()
	return nil
}

// send sends stdin.
func (c *testClient) send(b []byte) error {
	if c.ws == nil {
		_, err := c.in.Write(b)
		return err
	}
	return websocket.Message.Send(c.ws, append([]byte{0}, b...))
}

// next is the next message of a WebSocket that is not empty but for its channel.
func (c *testClient) next(t *testing.T) []byte {
	t.Helper()
	for {
		var b []byte
		if err := websocket.Message.Receive(c.ws, &b); err != nil {
			t.Fatal(err)
		}
		if len(b) > 1 {
			return b
		}
	}
}

func TestTokensAreGoodOnceForAMinuteAndNotTooMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var tokens tokens
		add := func() string {
			t.Helper()
			token, err := tokens.add("exec", "request")
			if err != nil {
				t.Fatal(err)
			}
			return token
		}
		good := func(method, token string) bool {
			r, ok := tokens.take(method, token)
			return ok && r == "request"
		}
		one := add()
		if len(one) < 22 {
			t.Errorf("%q can be guessed", one)
		}
		if !good("exec", one) || good("exec", one) {
			t.Error("a token is not good exactly once")
		}
		if wrong := add(); good("attach", wrong) || good("exec", wrong) {
			t.Error("a token for exec was good for attach, or after that")
		}
		if good("exec", "") || good("exec", "guess") {
			t.Error("what is no token is one")
		}
		old := add()
		time.Sleep(tokenLife + time.Nanosecond) // the bubble's clock
		if good("exec", old) {
			t.Error("a token was good after its time")
		}
		for range maxTokens {
			add()
		}
		_, err := tokens.add("exec", "request")
		wantStatus(t, toStatus(err), codes.ResourceExhausted, "unused")
		time.Sleep(tokenLife + time.Nanosecond)
		add()
		if n := len(tokens.unused); n != 1 {
			t.Errorf("%d tokens are kept, want the new one", n)
		}
	})
}

// What has no token gets an error; nothing is ever redirected (CVE-2020-8559), and little is read.
func TestStreamingRefusesWhatHasNoToken(t *testing.T) {
	s := newTestStreamer(t, &streamPods{})
	exec := strings.TrimPrefix(s.execURL(t, false), s.base.String())
	for _, test := range []struct {
		name, request string
		want          string
	}{
		{"unknown token", "GET /exec/x HTTP/1.1\r\nHost: x\r\n\r\n", "404"},
		{"no token", "GET /exec HTTP/1.1\r\nHost: x\r\n\r\n", "404"},
		{"root", "GET / HTTP/1.1\r\nHost: x\r\n\r\n", "404"},
		{"empty path", "GET http://x HTTP/1.1\r\nHost: x\r\n\r\n", "404"},
		{"double slash", "GET /" + exec + " HTTP/1.1\r\nHost: x\r\n\r\n", "404"},
		{"dots", "GET /a/.." + exec + " HTTP/1.1\r\nHost: x\r\n\r\n", "404"},
		{"other method", "DELETE " + exec + " HTTP/1.1\r\nHost: x\r\n\r\n", "405"},
		{"no upgrade", "GET " + exec + " HTTP/1.1\r\nHost: x\r\n\r\n", "400"},
		{"used by that", "GET " + exec + " HTTP/1.1\r\nHost: x\r\n\r\n", "404"},
		{"large header", "GET /exec/x HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 64<<10) + "\r\n\r\n", "431"},
		{"no HTTP", "\x80\x03\x00\x01", "400"},
	} {
		conn, err := net.Dial("tcp", s.base.Host)
		if err != nil {
			t.Fatal(err)
		}
		go func() { // ends with the connection: the server may stop reading before the end
			_, _ = io.WriteString(conn, test.request)
			_ = conn.(*net.TCPConn).CloseWrite()
		}()
		answer, _ := io.ReadAll(conn) // it may be reset after the answer
		_ = conn.Close()
		if !strings.HasPrefix(string(answer), "HTTP/1.1 "+test.want) {
			t.Errorf("%s: got %.60q, want %s", test.name, answer, test.want)
		}
	}
}

// Connections that say nothing are bounded: the oldest goes for the next, and who has a token is served.
func TestStreamingStrangersGiveWay(t *testing.T) {
	s := newTestStreamer(t, &streamPods{exec: func(context.Context, podsandbox.Streams) (int, error) { return 0, nil }})
	const more = 20
	conns := make([]net.Conn, maxStrangers+more)
	for i := range conns {
		var err error
		if conns[i], err = net.Dial("tcp", s.base.Host); err != nil {
			t.Fatal(err)
		}
		defer conns[i].Close()
	}
	for _, c := range conns[:more] {
		if n, err := c.Read(make([]byte, 1)); err == nil {
			t.Errorf("read %d bytes", n)
		}
	}
	c := open(t, remotecommand.StreamProtocolV5Name, s.execURL(t, false))
	if got := c.next(t); got[0] != remotecommand.StreamErr || !strings.Contains(string(got), "Success") {
		t.Errorf("got %q", got)
	}
}

func TestWebSocketV5(t *testing.T) {
	for _, test := range []struct {
		name string
		code int
		err  error
		want string
	}{
		{"success", 0, nil, `{"status":"Success"}`},
		{"exit code", 42, nil, `{"status":"Failure","message":"command terminated with non-zero exit code: exit code 42","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"42"}]}}`},
		{"error", 0, errors.New("no such program"), `{"status":"Failure","message":"no such program","reason":"InternalError","code":500}`},
	} {
		t.Run(test.name, func(t *testing.T) {
			var size podsandbox.WindowSize
			s := newTestStreamer(t, &streamPods{exec: func(_ context.Context, s podsandbox.Streams) (int, error) {
				size = <-s.Resize
				in, err := io.ReadAll(s.Stdin) // until the signal of its end
				_, oerr := fmt.Fprintf(s.Stdout, "got %s", in)
				_, eerr := io.WriteString(s.Stderr, "and more")
				return test.code, errors.Join(err, oerr, eerr, test.err)
			}})
			c := open(t, remotecommand.StreamProtocolV5Name, s.execURL(t, false))
			for _, m := range []string{"\x04{\"Width\":80,\"Height\":25}", "\x00hel", "\x00", "", "\x09no such channel", "\x01not for us", "\x00lo", "\xff\x01", "\xff\x00", "\xff\x00"} {
				if err := websocket.Message.Send(c.ws, []byte(m)); err != nil {
					t.Fatal(err)
				}
			}
			for _, want := range []string{"\x01got hello", "\x02and more", "\x03" + test.want} {
				if got := string(c.next(t)); got != want {
					t.Errorf("got  %q\nwant %q", got, want)
				}
			}
			var b []byte
			if err := websocket.Message.Receive(c.ws, &b); !errors.Is(err, io.EOF) {
				t.Errorf("got %q, %v; want the end", b, err)
			}
			if want := (podsandbox.WindowSize{Width: 80, Height: 25}); size != want {
				t.Errorf("got size %v, want %v", size, want)
			}
		})
	}
}

// The same fields as cri-streaming sends for v4, read by the same client.
func TestOutcomeIsWhatTheLibrarySends(t *testing.T) {
	for _, code := range []int{0, 7} {
		answers := map[string]any{}
		for _, protocol := range []string{remotecommand.StreamProtocolV4Name, remotecommand.StreamProtocolV5Name} {
			s := newTestStreamer(t, &streamPods{exec: func(context.Context, podsandbox.Streams) (int, error) { return code, nil }})
			got := open(t, protocol, s.execURL(t, false)).next(t)
			var answer map[string]any
			if err := json.Unmarshal(got[1:], &answer); err != nil || got[0] != remotecommand.StreamErr {
				t.Fatalf("%s: %v in %q", protocol, err, got)
			}
			answers[protocol] = answer
		}
		v4, v5 := fmt.Sprint(answers[remotecommand.StreamProtocolV4Name]), fmt.Sprint(answers[remotecommand.StreamProtocolV5Name])
		if v4 != v5 {
			t.Errorf("v4 says %s\nv5 says %s", v4, v5)
		}
	}
}

func TestReadSizes(t *testing.T) {
	for _, test := range []struct {
		name string
		in   io.Reader
		want string
	}{
		{"two", strings.NewReader(`{"Width":1,"Height":2}{"Width":65535,"Height":0}`), "[{1 2} {65535 0}]"},
		{"too large", strings.NewReader(`{"Width":65536,"Height":2}{"Width":1,"Height":2}`), "[]"},
		{"nonsense", strings.NewReader(`{"Width":1,"Height":2} hello`), "[{1 2}]"},
		{"endless", io.MultiReader(strings.NewReader(`{"Width":1,"Height":2}"`), io.LimitReader(zeros{}, 1<<30)), "[{1 2}]"},
	} {
		sizes := make(chan remotecommand.TerminalSize)
		go readSizes(t.Context(), test.in, sizes) // ends with what is received below
		var got []remotecommand.TerminalSize
		for s := range sizes {
			got = append(got, s)
		}
		if fmt.Sprint(got) != test.want {
			t.Errorf("%s: got %v, want %s", test.name, got, test.want)
		}
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return copy(b, bytes.Repeat([]byte("0"), len(b))), nil }

// A session's context ends when its client goes, also when nobody has read all that the client has sent.
func TestSessionEndsWithItsClient(t *testing.T) {
	for _, protocol := range streamProtocols {
		for _, rude := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s rude=%t", protocol, rude), func(t *testing.T) {
				started, ended := make(chan struct{}), make(chan struct{})
				s := newTestStreamer(t, &streamPods{exec: func(ctx context.Context, s podsandbox.Streams) (int, error) {
					close(started)
					<-ctx.Done()
					close(ended)
					return 0, ctx.Err()
				}})
				c := open(t, protocol, s.execURL(t, false))
				<-started
				if err := c.send(bytes.Repeat([]byte("x"), 100<<10)); err != nil {
					t.Fatal(err)
				}
				if rude {
					if err := c.raw.(*net.TCPConn).SetLinger(0); err != nil {
						t.Fatal(err)
					}
				}
				if err := c.raw.Close(); err != nil {
					t.Fatal(err)
				}
				<-ended
			})
		}
	}
}

// What was written before the end reaches a client that reads late, although it has sent what nobody read: a plain close
// would reset the connection and lose it.
func TestSessionCloseLosesNothing(t *testing.T) {
	for _, protocol := range streamProtocols[:2] {
		t.Run(protocol, func(t *testing.T) {
			sent := make(chan struct{})
			done := make(chan struct{})
			big := bytes.Repeat([]byte("0123456789abcdef"), 8<<10)
			s := newTestStreamer(t, &streamPods{exec: func(_ context.Context, s podsandbox.Streams) (int, error) {
				<-sent
				defer close(done)
				for b := big; len(b) > 0; b = b[4096:] {
					if _, err := s.Stdout.Write(b[:4096]); err != nil {
						return 0, err
					}
				}
				return 0, nil
			}})
			c := open(t, protocol, s.execURL(t, false))
			if err := c.send(bytes.Repeat([]byte("x"), 50<<10)); err != nil {
				t.Fatal(err)
			}
			if err := c.raw.(*net.TCPConn).SetReadBuffer(16 << 10); err != nil {
				t.Fatal(err)
			}
			close(sent)
			var got []byte
			if protocol == "spdy" { // its client reads all the time
				var err error
				if got, err = io.ReadAll(c.out); err != nil {
					t.Error(err)
				}
			} else {
				<-done
				for m := c.next(t); m[0] == remotecommand.StreamStdOut; m = c.next(t) {
					got = append(got, m[1:]...)
				}
			}
			if !bytes.Equal(got, big) {
				t.Errorf("got %d bytes, want %d", len(got), len(big))
			}
			_ = c.raw.Close() // so that nobody lingers
		})
	}
}

// A session that is over does not wait for a client that reads nothing.
func TestSessionEndIsNotHeldUpByItsClient(t *testing.T) {
	for _, protocol := range streamProtocols {
		t.Run(protocol, func(t *testing.T) {
			served := make(chan struct{})
			s := newTestStreamer(t, &streamPods{attach: func(_ context.Context, s podsandbox.Streams) error {
				s.Go(func() { // as Attach has it
					b := make([]byte, 15<<20) // more than the sockets take
					for {
						if _, err := s.Stdout.Write(b); err != nil {
							return
						}
					}
				})
				_, _ = s.Stdin.Read(make([]byte, 1)) // the client has seen the beginning
				return podsandbox.ErrSlow
			}}, func(s *streamer) {
				s.farewell = 100 * time.Millisecond
				handler := s.http.Handler
				s.http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					defer close(served)
					handler.ServeHTTP(w, r)
				})
			})
			address := s.mustURL(t, "attach", &runtimeapi.AttachRequest{ContainerId: "c", Stdin: true, Stdout: true, Stderr: true})
			c := open(t, protocol, address)
			if c.ws != nil {
				if _, err := io.ReadFull(c.ws, make([]byte, 1<<10)); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.send([]byte("x")); err != nil {
				t.Fatal(err)
			}
			select {
			case <-served:
			case <-time.After(20 * time.Second):
				t.Fatal("the session goes on")
			}
		})
	}
}

func TestSessionIdleTimeout(t *testing.T) {
	for _, protocol := range streamProtocols {
		t.Run(protocol, func(t *testing.T) {
			s := newTestStreamer(t, &streamPods{exec: func(ctx context.Context, s podsandbox.Streams) (int, error) {
				<-ctx.Done()
				return 0, ctx.Err()
			}}, func(s *streamer) { s.idle = 100 * time.Millisecond })
			c := open(t, protocol, s.execURL(t, false))
			if c.ws == nil {
				<-c.spdy.CloseChan()
				return
			}
			_, _ = io.Copy(io.Discard, c.raw) // ends when the server has closed it
		})
	}
}

// A WebSocket frame that says it is of 2^62 bytes costs nothing and ends its session (SEC-94).
func TestWebSocketFrameWithoutEnd(t *testing.T) {
	for _, protocol := range streamProtocols[1:] {
		s := newTestStreamer(t, &streamPods{exec: func(ctx context.Context, s podsandbox.Streams) (int, error) {
			<-ctx.Done()
			return 0, ctx.Err()
		}})
		c := open(t, protocol, s.execURL(t, false))
		frame := []byte{0x82, 0xff}                         // final, binary; masked, the length is in 8 bytes
		frame = binary.BigEndian.AppendUint64(frame, 1<<62) // x/net ignores a 63rd bit
		frame = append(frame, 0, 0, 0, 0)
		if _, err := c.raw.Write(frame); err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, c.raw) // ends when the server has closed it
	}
}

// Many sessions of each kind, cut off wherever they are, leave no goroutine: goleak looks at the end.
func TestManySessionsLeaveNothing(t *testing.T) {
	echo, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var echoing sync.WaitGroup
	echoing.Go(func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			echoing.Go(func() {
				_, _ = io.Copy(c, c) // whatever comes
				_ = c.Close()
			})
		}
	})
	t.Cleanup(func() {
		_ = echo.Close()
		echoing.Wait()
	})
	copying := func(ctx context.Context, s podsandbox.Streams) error {
		s.Go(func() { _, _ = io.Copy(s.Stdout, s.Stdin) })
		<-ctx.Done()
		return ctx.Err()
	}
	s := newTestStreamer(t, &streamPods{
		exec:   func(ctx context.Context, s podsandbox.Streams) (int, error) { return 0, copying(ctx, s) },
		attach: copying,
		dial: func(ctx context.Context) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", echo.Addr().String())
		},
	})
	var all sync.WaitGroup
	for i := range 100 {
		protocol := streamProtocols[i%len(streamProtocols)]
		attach := &runtimeapi.AttachRequest{ContainerId: "c", Stdin: true, Stdout: true, Stderr: true}
		forward := &runtimeapi.PortForwardRequest{PodSandboxId: "p", Port: []int32{7}}
		addresses := []string{s.execURL(t, false), s.mustURL(t, "attach", attach), s.mustURL(t, "portforward", forward)}
		kind := i / len(streamProtocols) % len(addresses)
		switch {
		case kind == 2 && protocol == remotecommand.StreamProtocolV5Name:
			protocol = tunnelProtocol
		case kind == 2 && protocol == remotecommand.StreamProtocolV1Name:
			protocol = remotecommand.StreamProtocolV4Name
		case kind == 2 && protocol == "spdy":
			kind = 0
		}
		c := open(t, protocol, addresses[kind])
		all.Go(func() {
			if i%3 == 0 {
				_ = c.raw.(*net.TCPConn).SetLinger(0) // rude
			}
			for n := range i % 5 {
				if c.ws != nil && protocol == tunnelProtocol {
					_, _ = c.ws.Write([]byte("this is no SPDY")) // the server may close it
					continue
				}
				_ = c.send(bytes.Repeat([]byte("x"), n<<14)) // as above
			}
			_ = c.raw.Close()
		})
	}
	all.Wait()
}

// The end of the server is the end of its sessions, whatever they wait for.
func TestStreamerStopEndsSessions(t *testing.T) {
	var started sync.WaitGroup
	started.Add(2 * len(streamProtocols))
	hang := func(ctx context.Context) error {
		started.Done()
		<-ctx.Done()
		return ctx.Err()
	}
	s := newTestStreamer(t, &streamPods{
		exec:   func(ctx context.Context, _ podsandbox.Streams) (int, error) { return 0, hang(ctx) },
		attach: func(ctx context.Context, _ podsandbox.Streams) error { return hang(ctx) },
	})
	for _, protocol := range streamProtocols {
		open(t, protocol, s.execURL(t, false))
		open(t, protocol, s.mustURL(t, "attach", &runtimeapi.AttachRequest{ContainerId: "c", Stdin: true, Stdout: true, Stderr: true}))
	}
	started.Wait()
	s.stop()
	if x := s.begin(false); x != nil {
		t.Error("a session began after the end")
	}
}

// When the daemon drains, attaches and terminals end at once, and their clients are told why; other commands come to their end.
func TestStreamerDrain(t *testing.T) {
	hang := func(ctx context.Context) error {
		<-ctx.Done()
		return context.Cause(ctx)
	}
	release, lasts := make(chan struct{}), make(chan error, 1)
	var started sync.WaitGroup
	started.Add(3)
	s := newTestStreamer(t, &streamPods{
		exec: func(ctx context.Context, s podsandbox.Streams) (int, error) {
			started.Done()
			if s.TTY {
				return 0, hang(ctx)
			}
			<-release
			lasts <- ctx.Err()
			return 0, nil
		},
		attach: func(ctx context.Context, _ podsandbox.Streams) error { started.Done(); return hang(ctx) },
	})
	attached := open(t, remotecommand.StreamProtocolV5Name, s.mustURL(t, "attach", &runtimeapi.AttachRequest{ContainerId: "c", Stdin: true, Stdout: true, Stderr: true}))
	terminal := open(t, remotecommand.StreamProtocolV5Name, s.execURL(t, true))
	open(t, remotecommand.StreamProtocolV5Name, s.execURL(t, false))
	started.Wait()
	s.drain()
	for name, c := range map[string]*testClient{"attach": attached, "terminal": terminal} {
		words := []byte{}
		for !bytes.Contains(words, []byte("{")) {
			words = c.next(t)
		}
		if !bytes.Contains(words, []byte(errShutdown.Error())) {
			t.Errorf("%s: told %q", name, words)
		}
	}
	close(release)
	if err := <-lasts; err != nil {
		t.Errorf("a command without a terminal: %v", err)
	}
	if x := s.begin(false); x != nil {
		t.Error("a session began while the server drained")
	}
}

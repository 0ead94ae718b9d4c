package cri

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/util/exec"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"

	"github.com/crisp-cri/crisp/test/leak"
)

// The tests of exec, attach and port-forward use the clients of kubectl and crictl, over both transports: SPDY, and WebSocket with
// v5.channel.k8s.io and, of port-forward, SPDY/3.1+portforward.k8s.io.
var transports = []string{"spdy", "websocket"}

// client speaks one transport.
type client struct {
	transport string
	tls       rest.TLSClientConfig
}

func (c client) executor(t *testing.T, address string) remotecommand.Executor {
	t.Helper()
	cfg := &rest.Config{TLSClientConfig: c.tls}
	var e remotecommand.Executor
	var err error
	if c.transport == "spdy" {
		u, perr := url.Parse(address)
		if perr != nil {
			t.Fatal(perr)
		}
		e, err = remotecommand.NewSPDYExecutor(cfg, http.MethodPost, u)
	} else {
		e, err = remotecommand.NewWebSocketExecutor(cfg, http.MethodGet, address)
	}
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// dial opens a port-forward session.
func (c client) dial(t *testing.T, address string) httpstream.Connection {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	cfg := &rest.Config{TLSClientConfig: c.tls}
	var d httpstream.Dialer
	if c.transport == "spdy" {
		tr, up, terr := spdy.RoundTripperFor(cfg)
		if terr != nil {
			t.Fatal(terr)
		}
		d = spdy.NewDialerForStreaming(up, &http.Client{Transport: tr}, http.MethodPost, u)
	} else if d, err = portforward.NewSPDYOverWebsocketDialerForStreaming(u, cfg); err != nil {
		t.Fatal(err)
	}
	conn, protocol, err := d.Dial(portforward.PortForwardProtocolV1Name)
	if err != nil {
		t.Fatal(err)
	}
	if protocol != portforward.PortForwardProtocolV1Name {
		t.Errorf("got protocol %q", protocol)
	}
	return conn
}

// eachTransport runs a test over both transports.
func eachTransport(t *testing.T, test func(t *testing.T, c client)) {
	for _, name := range transports {
		t.Run(name, func(t *testing.T) { test(t, client{transport: name}) })
	}
}

// deadline bounds a session of a test.
func deadline(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// execURL asks for an exec with the streams of o.
func (c *container) execURL(t *testing.T, o remotecommand.StreamOptions, args ...string) string {
	t.Helper()
	r, err := c.p.w.rt.Exec(t.Context(), &runtimeapi.ExecRequest{
		ContainerId: c.id, Cmd: append([]string{"/payload"}, args...),
		Stdin: o.Stdin != nil, Stdout: o.Stdout != nil, Stderr: o.Stderr != nil, Tty: o.Tty,
	})
	if err != nil {
		t.Fatal(err)
	}
	return r.Url
}

func (c *container) attachURL(t *testing.T, o remotecommand.StreamOptions) string {
	t.Helper()
	r, err := c.p.w.rt.Attach(t.Context(), &runtimeapi.AttachRequest{
		ContainerId: c.id, Stdin: o.Stdin != nil, Stdout: o.Stdout != nil, Stderr: o.Stderr != nil, Tty: o.Tty,
	})
	if err != nil {
		t.Fatal(err)
	}
	return r.Url
}

func (p *pod) forwardURL(t *testing.T) string {
	t.Helper()
	r, err := p.w.rt.PortForward(t.Context(), &runtimeapi.PortForwardRequest{PodSandboxId: p.id})
	if err != nil {
		t.Fatal(err)
	}
	return r.Url
}

// output is written by a client and looked at by its test meanwhile.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

func (o *output) says(t *testing.T, text string) {
	t.Helper()
	eventually(t, fmt.Sprintf("the client sees %q", text), func() bool { return strings.Contains(o.String(), text) })
}

// numbered checks what the payload's spam prints.
func numbered(t *testing.T, what, got string, lines int) {
	t.Helper()
	i := 0
	for line := range strings.Lines(got) {
		if !strings.HasPrefix(line, itoa(i)+".") || !strings.HasSuffix(line, "\n") {
			t.Errorf("%s: line %d is %.40q", what, i, line)
			return
		}
		i++
	}
	if i != lines {
		t.Errorf("%s: got %d lines, want %d", what, i, lines)
	}
}

func TestStreamedExecSeparatesStreamsAndGivesTheExitCode(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"})
	eachTransport(t, func(t *testing.T, cl client) {
		var out, errs output
		o := remotecommand.StreamOptions{Stdout: &out, Stderr: &errs}
		err := cl.executor(t, c.execURL(t, o, "echo", "out", ",", "err", "err", ",", "exit", "7")).StreamWithContext(deadline(t), o)
		var exit exec.CodeExitError
		if !errors.As(err, &exit) || exit.Code != 7 {
			t.Errorf("got %v, want exit code 7", err)
		}
		if out.String() != "out\n" || errs.String() != "err\n" {
			t.Errorf("got stdout %q, stderr %q", out.String(), errs.String())
		}

		out = output{}
		o = remotecommand.StreamOptions{Stdout: &out}
		if err := cl.executor(t, c.execURL(t, o, "spam", "40000", "255")).StreamWithContext(deadline(t), o); err != nil {
			t.Error(err)
		}
		numbered(t, "exec", out.String(), 40000)
	})
	if data := readFile(t, c.logFile()); data != "" {
		t.Errorf("an exec's output is in the container's log: %.100q", data)
	}
}

func TestStreamedExecOfAMissingProgramSaysSo(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"})
	eachTransport(t, func(t *testing.T, cl client) {
		r, err := w.rt.Exec(t.Context(), &runtimeapi.ExecRequest{ContainerId: c.id, Cmd: []string{"/no/such"}, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		err = cl.executor(t, r.Url).StreamWithContext(deadline(t), remotecommand.StreamOptions{Stdout: io.Discard})
		if err == nil || !strings.Contains(err.Error(), "/no/such") || strings.Contains(err.Error(), "exit code") {
			t.Errorf("got %v, want an error that names the program", err)
		}
	})
}

// The end of the client's input is the command's end of file; its output comes after that.
func TestStreamedExecPassesStdinAndItsEnd(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"})
	eachTransport(t, func(t *testing.T, cl client) {
		sent := strings.Repeat("0123456789abcde\n", 64<<10) // 1 MiB
		var out output
		o := remotecommand.StreamOptions{Stdin: strings.NewReader(sent), Stdout: &out}
		if err := cl.executor(t, c.execURL(t, o, "stdin", ",", "echo", "end")).StreamWithContext(deadline(t), o); err != nil {
			t.Fatal(err)
		}
		if got := out.String(); got != sent+"end\n" {
			t.Errorf("got %d bytes that end with %q, want the %d sent and then \"end\"", len(got), got[max(0, len(got)-20):], len(sent))
		}
	})
}

// A command that does not want all of its input: the client's rest must neither block it nor cost it the output.
func TestStreamedExecThatLeavesInputUnread(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"})
	eachTransport(t, func(t *testing.T, cl client) {
		in, out := endless(t), &output{}
		o := remotecommand.StreamOptions{Stdin: in, Stdout: out}
		err := cl.executor(t, c.execURL(t, o, "take", "100000", ",", "spam", "20000", "99", ",", "exit", "3")).StreamWithContext(deadline(t), o)
		var exit exec.CodeExitError
		if !errors.As(err, &exit) || exit.Code != 3 {
			t.Errorf("got %v, want exit code 3", err)
		}
		numbered(t, "exec", out.String(), 20000)
	})
}

// plenty of input: more than a pipe or a terminal takes, less than the sockets do, and no end of it. (With more than they
// take, TCP has no way to say that the client has closed its end; its kernel gives up after a minute or two.)
func plenty(t *testing.T) io.Reader {
	r, w := io.Pipe()
	t.Cleanup(func() { _ = w.Close() }) // only an error of the reader's could be lost
	return io.MultiReader(bytes.NewReader(make([]byte, 192<<10)), r)
}

// endless input, which ends with the test.
func endless(t *testing.T) io.Reader {
	r, w := io.Pipe()
	done := make(chan struct{})
	go func() { // ends with the reader
		defer close(done)
		b := make([]byte, 32<<10)
		for {
			if _, err := w.Write(b); err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		_ = r.Close() // its only error is of the writer
		<-done
	})
	return r
}

// sizes are a window's, as kubectl tells them.
type sizes chan remotecommand.TerminalSize

func (s sizes) Next() *remotecommand.TerminalSize {
	size, ok := <-s
	if !ok {
		return nil
	}
	return &size
}

func TestStreamedExecWithATerminalThatIsResized(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"})
	alone := len(c.pids())
	eachTransport(t, func(t *testing.T, cl client) {
		in, typing := io.Pipe()
		defer in.Close()
		var out output
		queue := make(sizes)
		o := remotecommand.StreamOptions{Stdin: in, Stdout: &out, Tty: true, TerminalSizeQueue: queue}
		e := cl.executor(t, c.execURL(t, o, "window"))
		ended := make(chan error, 1)
		go func() { ended <- e.StreamWithContext(deadline(t), o) }()
		for _, size := range []remotecommand.TerminalSize{{Width: 80, Height: 25}, {Width: 132, Height: 50}, {Width: 1, Height: 65535}} {
			queue <- size
			out.says(t, fmt.Sprintf("window %d %d\r\n", size.Height, size.Width))
		}
		if _, err := typing.Write([]byte{3}); err != nil { // Ctrl-C: the terminal's own signal
			t.Fatal(err)
		}
		err := <-ended
		close(queue)
		var exit exec.CodeExitError
		if !errors.As(err, &exit) || exit.Code != 130 {
			t.Errorf("got %v, want exit code 130: SIGINT came by the terminal", err)
		}
		eventually(t, "the exec'd process is gone", func() bool { return len(c.on(t).pids()) == alone })
	})
}

// on is the container in a subtest.
func (c *container) on(t *testing.T) *container {
	d := *c
	d.t, d.p = t, c.p.on(t)
	return &d
}

// The kubelet closes its connection when the user's is gone. Then the command must not live on, whatever it does, nor its children.
func TestExecEndsWithItsClient(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"})
	eventually(t, "the container's process runs", func() bool { return len(c.pids()) == 1 })
	for _, test := range []struct {
		name string
		edit func(t *testing.T, o *remotecommand.StreamOptions)
	}{
		{"output only", func(t *testing.T, o *remotecommand.StreamOptions) {}},
		{"input that nobody reads", func(t *testing.T, o *remotecommand.StreamOptions) { o.Stdin = plenty(t) }},
		{"terminal", func(t *testing.T, o *remotecommand.StreamOptions) { o.Stdin, o.Stderr, o.Tty = plenty(t), nil, true }},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachTransport(t, func(t *testing.T, cl client) {
				c := c.on(t)
				for _, how := range []cut{orderly, rude} {
					var out output
					o := remotecommand.StreamOptions{Stdout: &out, Stderr: io.Discard}
					test.edit(t, &o)
					between := newCutter(t, c.execURL(t, o, "fork", "2", ",", "ignore"))
					ended := make(chan error, 1)
					go func() { ended <- cl.executor(t, between.url).StreamWithContext(deadline(t), o) }()
					out.says(t, "ready")
					between.cut(how)
					eventually(t, "the command and its children are gone", func() bool { return len(c.pids()) == 1 })
					<-ended // what the client makes of it is its own affair: over SPDY, success
				}
			})
		})
	}
}

// cut is how a connection ends.
type cut bool

const (
	orderly cut = false // FIN
	rude    cut = true  // RST, with whatever is under way
)

// cutter stands between one client and the daemon.
type cutter struct {
	url     string // leads through us
	mu      sync.Mutex
	conns   []*net.TCPConn
	gone    bool
	serving sync.WaitGroup
	l       net.Listener
}

func newCutter(t *testing.T, address string) *cutter {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	daemon := u.Host
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u.Host = l.Addr().String()
	c := &cutter{url: u.String(), l: l}
	c.serving.Go(func() {
		client, err := l.Accept()
		if err != nil {
			return // nobody came
		}
		server, err := net.Dial("tcp", daemon)
		if err != nil {
			t.Error(err)
			_ = client.Close() // it sees it
			return
		}
		a, b := client.(*net.TCPConn), server.(*net.TCPConn)
		c.mu.Lock()
		c.conns = []*net.TCPConn{a, b}
		c.mu.Unlock()
		for _, d := range [][2]*net.TCPConn{{a, b}, {b, a}} {
			c.serving.Go(func() {
				_, _ = io.Copy(d[0], d[1]) // however it ends
				_ = d[0].CloseWrite()
			})
		}
	})
	t.Cleanup(func() { c.cut(orderly) })
	return c
}

// cut ends the connection, once.
func (c *cutter) cut(how cut) {
	c.mu.Lock()
	if c.gone {
		c.mu.Unlock()
		return
	}
	c.gone = true
	conns := c.conns
	c.mu.Unlock()
	_ = c.l.Close()
	for _, conn := range conns {
		if how == rude {
			_ = conn.SetLinger(0) // closed already: as good
		}
		_ = conn.Close()
	}
	c.serving.Wait()
}

func TestAttachWithStdinOnceEndsTheContainersInput(t *testing.T) {
	w := need(t)
	eachTransport(t, func(t *testing.T, cl client) {
		c := w.pod(t).run([]string{"stdin", ",", "echo", "end"}, func(c *runtimeapi.ContainerConfig) { c.Stdin, c.StdinOnce = true, true })
		var out output
		o := remotecommand.StreamOptions{Stdin: strings.NewReader("hello\n"), Stdout: &out, Stderr: io.Discard}
		if err := cl.executor(t, c.attachURL(t, o)).StreamWithContext(deadline(t), o); err != nil {
			t.Fatal(err)
		}
		if out.String() != "hello\nend\n" {
			t.Errorf("got %q", out.String())
		}
		if st := c.wait(); st.ExitCode != 0 {
			t.Errorf("got exit code %d", st.ExitCode)
		}
		if got := c.output("stdout"); got != "hello\nend\n" {
			t.Errorf("log: got %q", got)
		}
	})
}

// The first client's departure is the end of its input, too.
func TestAttachWithStdinOnceAndAClientThatIsCutOff(t *testing.T) {
	w := need(t)
	eachTransport(t, func(t *testing.T, cl client) {
		c := w.pod(t).run([]string{"stdin", ",", "echo", "end"}, func(c *runtimeapi.ContainerConfig) { c.Stdin, c.StdinOnce = true, true })
		in, typing := io.Pipe()
		defer in.Close()
		var out output
		o := remotecommand.StreamOptions{Stdin: in, Stdout: &out, Stderr: io.Discard}
		between := newCutter(t, c.attachURL(t, o))
		ended := make(chan error, 1)
		go func() { ended <- cl.executor(t, between.url).StreamWithContext(deadline(t), o) }()
		if _, err := typing.Write([]byte("half a line")); err != nil {
			t.Fatal(err)
		}
		out.says(t, "half a line")
		between.cut(rude)
		<-ended
		c.wait()
		if got := c.output("stdout"); got != "half a lineend\n" {
			t.Errorf("log: got %q", got)
		}
	})
}

// As with Docker and containerd: `kubectl run --leave-stdin-open` ends with its input, the container stays and can be attached to
// again.
func TestAttachWithoutStdinOnceEndsWithTheClientsInput(t *testing.T) {
	w := need(t)
	eachTransport(t, func(t *testing.T, cl client) {
		c := w.pod(t).run([]string{"stdin"}, func(c *runtimeapi.ContainerConfig) { c.Stdin = true })
		for _, text := range []string{"first\n", "second\n"} {
			o := remotecommand.StreamOptions{Stdin: strings.NewReader(text), Stdout: io.Discard, Stderr: io.Discard}
			if err := cl.executor(t, c.attachURL(t, o)).StreamWithContext(deadline(t), o); err != nil {
				t.Fatal(err)
			}
			c.says(text)
		}
		if st := c.status(); st.State != running {
			t.Errorf("the container is %v", st.State)
		}
	})
}

func TestAttachToATerminal(t *testing.T) {
	w := need(t)
	eachTransport(t, func(t *testing.T, cl client) {
		c := w.pod(t).run([]string{"window"}, func(c *runtimeapi.ContainerConfig) { c.Stdin, c.Tty = true, true })
		in, typing := io.Pipe()
		defer in.Close()
		var out output
		queue := make(sizes)
		o := remotecommand.StreamOptions{Stdin: in, Stdout: &out, Tty: true, TerminalSizeQueue: queue}
		e := cl.executor(t, c.attachURL(t, o))
		ended := make(chan error, 1)
		go func() { ended <- e.StreamWithContext(deadline(t), o) }()
		queue <- remotecommand.TerminalSize{Width: 81, Height: 26}
		out.says(t, "window 26 81\r\n")
		if _, err := typing.Write([]byte{3}); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
		close(queue)
		if st := c.wait(); st.ExitCode != 130 {
			t.Errorf("got exit code %d, want 130", st.ExitCode)
		}
	})
}

// A client that reads sees what the log gets, and the log gets all of it.
func TestAttachToAFastWriterLeavesTheLogWhole(t *testing.T) {
	w := need(t)
	eachTransport(t, func(t *testing.T, cl client) {
		const lines = 100_000
		c := w.pod(t).run([]string{"stdin", ",", "spam", itoa(lines), "99"}, func(c *runtimeapi.ContainerConfig) { c.Stdin, c.StdinOnce = true, true })
		var watching output
		second := remotecommand.StreamOptions{Stdout: &watching}
		watched := make(chan error, 1)
		go func() { watched <- cl.executor(t, c.attachURL(t, second)).StreamWithContext(deadline(t), second) }()
		in, typing := io.Pipe()
		var out output
		o := remotecommand.StreamOptions{Stdin: in, Stdout: &out, Stderr: io.Discard}
		ended := make(chan error, 1)
		go func() { ended <- cl.executor(t, c.attachURL(t, o)).StreamWithContext(deadline(t), o) }()
		var hello strings.Builder
		for i := 0; !strings.Contains(watching.String(), "hello"); i++ { // the second client's attach has no other sign
			if _, err := fmt.Fprintf(typing, "hello %d\n", i); err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&hello, "hello %d\n", i)
			out.says(t, fmt.Sprintf("hello %d\n", i))
		}
		start := time.Now()
		if err := typing.Close(); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(<-ended, <-watched); err != nil {
			t.Fatal(err)
		}
		t.Logf("%d MB to the log and two clients in %v", lines/10_000, time.Since(start))
		numbered(t, "first client", strings.TrimPrefix(out.String(), hello.String()), lines)
		_, after, _ := strings.Cut(watching.String(), "0.")
		numbered(t, "second client", "0."+after, lines)
		c.wait()
		numbered(t, "log", strings.TrimPrefix(c.output("stdout"), hello.String()), lines)
	})
}

// A client that does not read is dropped and told why; neither the container nor its log wait for it.
func TestAttachDropsAClientThatIsTooSlow(t *testing.T) {
	w := need(t)
	eachTransport(t, func(t *testing.T, cl client) {
		const lines = 64 << 10 // of 1 KiB
		c := w.pod(t).run([]string{"stdin", ",", "spam", itoa(lines), "1023"}, func(c *runtimeapi.ContainerConfig) { c.Stdin, c.StdinOnce = true, true })
		slow := &stuck{release: make(chan struct{}), reached: make(chan struct{})}
		o := remotecommand.StreamOptions{Stdin: strings.NewReader("go\n"), Stdout: slow}
		ended := make(chan error, 1)
		go func() { ended <- cl.executor(t, c.attachURL(t, o)).StreamWithContext(deadline(t), o) }()
		<-slow.reached
		if st := c.wait(); st.ExitCode != 0 {
			t.Errorf("got exit code %d", st.ExitCode)
		}
		numbered(t, "log", strings.TrimPrefix(c.output("stdout"), "go\n"), lines)
		close(slow.release)
		if err := <-ended; err == nil {
			t.Error("the client was told that it has seen everything")
		} else {
			t.Logf("the client saw %d bytes of %d, then: %v", slow.n, lines<<10, err)
		}
	})
}

// stuck takes one write and no more until it is released.
type stuck struct {
	release, reached chan struct{}
	once             sync.Once
	n                int
}

func (s *stuck) Write(b []byte) (int, error) {
	s.once.Do(func() { close(s.reached) })
	<-s.release
	s.n += len(b)
	return len(b), nil
}

// forward opens one connection of a port-forward session: its data, and how it ended.
type forwarded struct {
	data, errs httpstream.Stream
}

func forward(t *testing.T, conn httpstream.Connection, id, port int) forwarded {
	t.Helper()
	h := http.Header{}
	h.Set("port", itoa(port))
	h.Set("requestID", itoa(id))
	h.Set("streamType", "error")
	errs, err := conn.CreateStream(h)
	if err != nil {
		t.Fatal(err)
	}
	if err := errs.Close(); err != nil { // we have nothing to say on it
		t.Fatal(err)
	}
	h.Set("streamType", "data")
	data, err := conn.CreateStream(h)
	if err != nil {
		t.Fatal(err)
	}
	return forwarded{data, errs}
}

// says sends text and its end, and returns what comes until the other side's.
func (f forwarded) says(t *testing.T, text string) (answer, problem string) {
	t.Helper()
	_, werr := io.WriteString(f.data, text)
	if err := errors.Join(werr, f.data.Close()); err != nil {
		t.Errorf("send: %v", err)
	}
	got, err := io.ReadAll(f.data)
	if err != nil {
		t.Errorf("receive: %v", err)
	}
	why, err := io.ReadAll(f.errs)
	if err != nil {
		t.Errorf("receive error: %v", err)
	}
	return string(got), string(why)
}

func TestPortForward(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	p.run([]string{"listen", "tcp4", "127.0.0.1:7"}).says("listening")
	four := p.run([]string{"http", "127.0.0.1:80"})
	four.says("listening")
	p.run([]string{"http", "[::1]:80"}).says("listening")
	eachTransport(t, func(t *testing.T, cl client) {
		conn := cl.dial(t, p.forwardURL(t))
		defer conn.Close()
		// Half-close: the echo of all of it comes after our end.
		big := strings.Repeat("0123456789abcdef", 64<<10)
		if got, problem := forward(t, conn, 1, 7).says(t, big); got != big || problem != "" {
			t.Errorf("got %d bytes, error %q; want %d", len(got), problem, len(big))
		}
		// What refuses says so, and ends nothing else: one that is open meanwhile goes on.
		open := forward(t, conn, 2, 7)
		if problem, err := io.ReadAll(forward(t, conn, 3, 9).errs); err != nil || !strings.Contains(string(problem), "refused") {
			t.Errorf("got error %q, %v; want it to say that the port refuses", problem, err)
		}
		broken := forward(t, conn, 4, 7)
		if err := broken.data.Reset(); err != nil {
			t.Fatal(err)
		}
		if got, problem := open.says(t, "still there"); got != "still there" || problem != "" {
			t.Errorf("got %q, error %q", got, problem)
		}
		// IPv4 comes first.
		if got, problem := forward(t, conn, 5, 80).says(t, "GET / HTTP/1.0\r\n\r\n"); !strings.Contains(got, "on 127.0.0.1:80") {
			t.Errorf("got %q, error %q; want it from 127.0.0.1", got, problem)
		}
	})
	four.stop(0)
	eachTransport(t, func(t *testing.T, cl client) {
		conn := cl.dial(t, p.forwardURL(t))
		defer conn.Close()
		if got, problem := forward(t, conn, 1, 80).says(t, "GET / HTTP/1.0\r\n\r\n"); !strings.Contains(got, "on [::1]:80") {
			t.Errorf("got %q, error %q; want it from ::1", got, problem)
		}
	})
}

func TestPortForwardToAPodInTheHostsNetwork(t *testing.T) {
	w := need(t)
	p := w.pod(t, func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
	})
	c := p.run([]string{"listen", "tcp4", "127.0.0.1:0"})
	c.says("listening")
	_, port, err := net.SplitHostPort(strings.TrimSpace(strings.TrimPrefix(c.output("stdout"), "listening on ")))
	if err != nil {
		t.Fatal(err)
	}
	number, err := net.LookupPort("tcp", port)
	if err != nil {
		t.Fatal(err)
	}
	eachTransport(t, func(t *testing.T, cl client) {
		conn := cl.dial(t, p.forwardURL(t))
		defer conn.Close()
		if got, problem := forward(t, conn, 1, number).says(t, "hello"); got != "hello" || problem != "" {
			t.Errorf("got %q, error %q", got, problem)
		}
	})
}

func TestStreamingURLIsGoodOnce(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"})
	address := c.execURL(t, remotecommand.StreamOptions{Stdout: io.Discard}, "true")
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	if ip := net.ParseIP(u.Hostname()); ip == nil || !ip.IsLoopback() {
		t.Errorf("%s is not on loopback", address)
	}
	eachTransport(t, func(t *testing.T, cl client) {
		o := remotecommand.StreamOptions{Stdout: io.Discard}
		address := c.execURL(t, o, "true")
		if err := cl.executor(t, address).StreamWithContext(deadline(t), o); err != nil {
			t.Fatal(err)
		}
		if err := cl.executor(t, address).StreamWithContext(deadline(t), o); err == nil {
			t.Error("the URL worked twice")
		}
	})
	for _, request := range []*runtimeapi.ExecRequest{{ContainerId: c.id, Cmd: []string{"x"}}, {ContainerId: c.id, Cmd: []string{"x"}, Stdout: true, Stderr: true, Tty: true}} {
		_, err := w.CRI.Exec(t.Context(), request)
		wantCode(t, err, codes.InvalidArgument)
	}
}

// Many sessions of all kinds at once, half of which are cut off in the middle, leave nothing.
func TestManyStreamingSessions(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	c := p.run([]string{"stdin"}, func(c *runtimeapi.ContainerConfig) { c.Stdin = true })
	tty := p.run([]string{"window"}, func(c *runtimeapi.ContainerConfig) { c.Stdin, c.Tty = true, true })
	p.run([]string{"listen", "tcp4", "127.0.0.1:7"}).says("listening")
	tty.says("window")

	// session runs one and cuts it off in the middle.
	session := func(t *testing.T, i int) {
		cl := client{transport: transports[i%2]}
		how := cut(i/2%2 == 0)
		input := plenty
		if how == rude {
			input = endless
		}
		var out output
		var run func(between *cutter) error
		var between *cutter
		ready := "ready"
		switch kind := i / 4 % 5; kind {
		case 0, 1: // exec, without and with a terminal
			o := remotecommand.StreamOptions{Stdin: input(t), Stdout: &out, Tty: kind == 1}
			between = newCutter(t, c.execURL(t, o, "ignore"))
			run = func(between *cutter) error { return cl.executor(t, between.url).StreamWithContext(deadline(t), o) }
		case 2: // attach
			in, typing := io.Pipe()
			ready = fmt.Sprintf("session %d\n", i)
			go func() { _, _ = io.WriteString(typing, ready) }() // ends with the reader
			t.Cleanup(func() { _ = in.Close() })
			o := remotecommand.StreamOptions{Stdin: in, Stdout: &out, Stderr: io.Discard}
			between = newCutter(t, c.attachURL(t, o))
			run = func(between *cutter) error { return cl.executor(t, between.url).StreamWithContext(deadline(t), o) }
		case 3: // attach to a terminal
			o := remotecommand.StreamOptions{Stdin: input(t), Stdout: &out, Tty: true}
			between = newCutter(t, tty.attachURL(t, o))
			ready = "" // it prints nothing of itself
			run = func(between *cutter) error { return cl.executor(t, between.url).StreamWithContext(deadline(t), o) }
		case 4:
			between = newCutter(t, p.forwardURL(t))
			run = func(between *cutter) error {
				conn := cl.dial(t, between.url)
				defer conn.Close()
				f := forward(t, conn, 1, 7)
				if _, err := io.WriteString(f.data, "ready"); err != nil {
					return err
				}
				_, err := io.Copy(&out, f.data)
				return errors.Join(err, io.ErrUnexpectedEOF)
			}
		}
		ended := make(chan error, 1)
		go func() { ended <- run(between) }()
		out.says(t, ready)
		between.cut(how)
		<-ended // what the client makes of it is its own affair
	}
	many := func() {
		t.Run("all", func(t *testing.T) {
			for i := range 100 {
				t.Run(itoa(i), func(t *testing.T) {
					t.Parallel()
					session(t, i)
				})
			}
		})
	}
	before, err := w.scope().Take()
	if err != nil {
		t.Fatal(err)
	}
	many() // threads and sockets of the busiest moment stay
	// The commands of clients that broke off end when crispd has noticed; the snapshot that counts comes after them.
	eventually(t, "the first hundred are over", func() bool {
		now, err := w.scope().Take()
		if err != nil {
			t.Fatal(err)
		}
		return !slices.ContainsFunc(leak.Compare(before, now), func(d leak.Difference) bool {
			return d.Kind != leak.Threads && !(d.Kind == leak.FDs && d.Thing == "socket:[N]")
		})
	})
	w.leavesNothing(t, many)
	if st := c.status(); st.State != running {
		t.Errorf("the container is %v", st.State)
	}
}

// TLS, and the idle timeout, are a daemon's settings.
func TestStreamingOverTLSAndItsIdleTimeout(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	ca := selfSigned(t, cert, key)
	w := own(t, "--set", "streaming.tls_cert="+cert, "--set", "streaming.tls_key="+key, "--set", "streaming.idle_timeout=1s")
	p := w.pod(t)
	c := p.run([]string{"listen", "tcp4", "127.0.0.1:7"})
	c.says("listening")
	eachTransport(t, func(t *testing.T, cl client) {
		c := c.on(t)
		cl.tls = rest.TLSClientConfig{CAData: ca}
		var out output
		o := remotecommand.StreamOptions{Stdin: strings.NewReader("hello\n"), Stdout: &out}
		address := c.execURL(t, o, "stdin")
		if !strings.HasPrefix(address, "https://127.0.0.1:") {
			t.Errorf("got %s", address)
		}
		if err := cl.executor(t, address).StreamWithContext(deadline(t), o); err != nil || out.String() != "hello\n" {
			t.Errorf("got %q, %v", out.String(), err)
		}
		conn := cl.dial(t, p.forwardURL(t))
		if got, problem := forward(t, conn, 1, 7).says(t, "hello"); got != "hello" || problem != "" {
			t.Errorf("got %q, error %q", got, problem)
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		// Who does not trust the certificate is refused.
		cl.tls = rest.TLSClientConfig{}
		if err := cl.executor(t, c.execURL(t, o, "stdin")).StreamWithContext(deadline(t), o); err == nil || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("got %v, want an error about the certificate", err)
		}
	})
	// client-go's own WebSocket client is never idle: it pings. SPDY's exec does not.
	cl := client{transport: "spdy", tls: rest.TLSClientConfig{CAData: ca}}
	o := remotecommand.StreamOptions{Stdout: io.Discard}
	ended := make(chan error, 1)
	go func() { ended <- cl.executor(t, c.execURL(t, o, "sleep")).StreamWithContext(deadline(t), o) }()
	eventually(t, "the command runs", func() bool { return len(c.pids()) == 2 })
	eventually(t, "the command is ended with its idle session", func() bool { return len(c.pids()) == 1 })
	<-ended
}

// selfSigned writes a certificate for 127.0.0.1 and its key, and returns the former.
func selfSigned(t *testing.T, certFile, keyFile string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	mustWrite(t, certFile, string(cert))
	mustWrite(t, keyFile, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})))
	return cert
}

// A daemon that stops ends the sessions; their containers stay.
func TestStreamingSessionsEndWithTheDaemon(t *testing.T) {
	w := own(t, "--set", "drain_timeout=1s")
	c := w.pod(t).run([]string{"stdin"}, func(c *runtimeapi.ContainerConfig) { c.Stdin = true })
	cl := client{transport: "websocket"}
	var out output
	exec := remotecommand.StreamOptions{Stdout: &out}
	attach := remotecommand.StreamOptions{Stdout: io.Discard}
	ended := make(chan error, 2)
	execURL, attachURL := c.execURL(t, exec, "ignore"), c.attachURL(t, attach)
	go func() { ended <- cl.executor(t, execURL).StreamWithContext(deadline(t), exec) }()
	go func() { ended <- cl.executor(t, attachURL).StreamWithContext(deadline(t), attach) }()
	out.says(t, "ready")
	if err := errors.Join(w.disconnect(), w.Stop()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := <-ended; err == nil {
			t.Error("a client was told that all is well")
		}
	}
	if err := w.start(); err != nil {
		t.Fatal(err)
	}
	if st := c.status(); st.State != running {
		t.Errorf("the container is %v", st.State)
	}
	if n := len(c.pids()); n != 1 {
		t.Errorf("got %d processes, want the container's one: an exec ends with its client", n)
	}
	o := remotecommand.StreamOptions{Stdin: strings.NewReader("again\n"), Stdout: io.Discard}
	if err := cl.executor(t, c.attachURL(t, o)).StreamWithContext(deadline(t), o); err != nil {
		t.Fatal(err)
	}
	c.says("again")
}

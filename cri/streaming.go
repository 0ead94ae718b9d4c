package cri

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/klog/v2"
	"k8s.io/streaming/pkg/httpstream/wsstream"
	utilexec "k8s.io/utils/exec"

	"github.com/crisp-cri/crisp/podsandbox"
)

// StreamingConfig is for exec, attach and port-forward, which the kubelet and crictl speak over a connection of their own. The
// calls of that name return a URL with a token, good once and for a minute.
//
// The protocols are of Kubernetes' libraries: SPDY (v1 to v4) and the older WebSocket ones of k8s.io/cri-streaming, WebSocket v5 of
// k8s.io/streaming's wsstream, and for port-forward SPDY in a WebSocket (KEP-4006), which golang.org/x/net/websocket carries.
type StreamingConfig struct {
	// Listener is where sessions are served; its address is in the URLs, so it must be one that the kubelet can dial:
	// loopback, as a rule. Nil: the three calls answer Unimplemented.
	Listener net.Listener
	TLS      *tls.Config   // nil: plain HTTP, which is for loopback
	Idle     time.Duration // 0: four hours, the kubelet's own
}

// What a client that has not shown a token yet may cost.
const (
	headerTimeout = 10 * time.Second // to say what it wants
	headerBytes   = 16 << 10         // to say it in
	maxStrangers  = 256              // such connections at a time; the oldest goes for the next
)

// defaultIdle is what the kubelet and containerd have.
const defaultIdle = 4 * time.Hour

// streamer serves sessions.
type streamer struct {
	base     url.URL // of the URLs that are given out
	idle     time.Duration
	farewell time.Duration // farewellTime, but in tests
	pods     Pods
	tokens   tokens
	listener net.Listener
	http     *http.Server

	handlers sync.WaitGroup // and all that sessions started

	// interactive is the life of sessions that have no end of their own: attaches, and commands with a terminal. hangUp ends it.
	interactive context.Context
	hangUp      context.CancelCauseFunc

	mu        sync.Mutex
	sessions  map[*session]struct{} // nil when stopped
	strangers []net.Conn            // connections that no session has, in the order in which they came
}

func newStreamer(cfg StreamingConfig, pods Pods) *streamer {
	s := &streamer{
		base: url.URL{Scheme: "http", Host: cfg.Listener.Addr().String()},
		idle: cfg.Idle, farewell: farewellTime, pods: pods, listener: cfg.Listener, sessions: map[*session]struct{}{},
	}
	s.interactive, s.hangUp = context.WithCancelCause(context.Background())
	if cfg.TLS != nil {
		s.base.Scheme = "https"
		s.listener = tls.NewListener(cfg.Listener, cfg.TLS)
	}
	if s.idle <= 0 {
		s.idle = defaultIdle
	}
	s.http = &http.Server{
		Handler: http.HandlerFunc(s.serve), ConnState: s.track,
		ReadHeaderTimeout: headerTimeout, MaxHeaderBytes: headerBytes,
	}
	s.http.SetKeepAlivesEnabled(false) // one connection, one session
	return s
}

// run serves until stop.
func (s *streamer) run() {
	if err := s.http.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) {
		klog.Background().Error(err, "Streaming server ended; exec, attach and port-forward do not work any more")
	}
}

// errShutdown is why drain ended a session.
var errShutdown = errors.New("crispd is shutting down")

// drain refuses new sessions and ends those that would hold up a restart until its patience is over, and be cut off then: attaches, and commands
// with a terminal. Other commands may still come to their end.
func (s *streamer) drain() { s.hangUp(errShutdown) }

// stop ends all sessions and waits for them.
func (s *streamer) stop() {
	s.drain()
	_ = s.http.Close() // closes what is not hijacked
	s.mu.Lock()
	sessions := s.sessions
	s.sessions = nil
	s.mu.Unlock()
	for x := range sessions {
		x.abort()
	}
	s.handlers.Wait()
}

// track implements http.Server.ConnState.
func (s *streamer) track(c net.Conn, state http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch state {
	case http.StateNew:
		s.strangers = append(s.strangers, c)
		if len(s.strangers) > maxStrangers {
			_ = tcp(s.strangers[0]).Close() // its read fails, and it is told of here
			s.strangers = s.strangers[1:]
		}
	case http.StateHijacked, http.StateClosed:
		if i := slices.Index(s.strangers, c); i >= 0 {
			s.strangers = slices.Delete(s.strangers, i, i+1)
		}
	}
}

// url gives out a token for r, which is one of the three requests.
func (s *streamer) url(method string, r any) (string, error) {
	token, err := s.tokens.add(method, r)
	if err != nil {
		return "", err
	}
	return s.base.JoinPath(method, token).String(), nil
}

// serve runs a session if the request brings a token. It never redirects (CVE-2020-8559).
func (s *streamer) serve(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodPost {
		w.Header().Set("Allow", "GET, POST")
		http.Error(w, "GET or POST only", http.StatusMethodNotAllowed)
		return
	}
	method, token, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	wanted, ok := s.tokens.take(method, token)
	if !ok {
		http.NotFound(w, r)
		return
	}
	x := s.begin(isInteractive(wanted))
	if x == nil {
		http.Error(w, "shutting down", http.StatusServiceUnavailable)
		return
	}
	defer s.handlers.Done()
	defer x.end()
	w = &hijacker{ResponseWriter: w, session: x}
	// The library logs each client's departure as an error.
	r = r.WithContext(klog.NewContext(x.ctx, klog.Logger{}))
	switch wanted := wanted.(type) {
	case *runtimeapi.ExecRequest:
		e := executor{x, remotecommand.Options{Stdin: wanted.GetStdin(), Stdout: wanted.GetStdout(), Stderr: wanted.GetStderr(), TTY: wanted.GetTty()}}
		if wsstream.IsWebSocketRequestWithStreamCloseProtocol(r) {
			e.serveV5(w, r, func(c *channels) error {
				return e.ExecInContainer(x.ctx, "", "", wanted.GetContainerId(), wanted.GetCmd(), c.stdin, c.stdout, c.stderr, e.wanted.TTY, c.resize, 0)
			})
			return
		}
		remotecommand.ServeExec(w, r, e, "", "", wanted.GetContainerId(), wanted.GetCmd(), &e.wanted,
			s.idle, remotecommand.DefaultStreamCreationTimeout, remotecommand.SupportedStreamingProtocols)
	case *runtimeapi.AttachRequest:
		e := executor{x, remotecommand.Options{Stdin: wanted.GetStdin(), Stdout: wanted.GetStdout(), Stderr: wanted.GetStderr(), TTY: wanted.GetTty()}}
		if wsstream.IsWebSocketRequestWithStreamCloseProtocol(r) {
			e.serveV5(w, r, func(c *channels) error {
				return e.AttachContainer(x.ctx, "", "", wanted.GetContainerId(), c.stdin, c.stdout, c.stderr, e.wanted.TTY, c.resize)
			})
			return
		}
		remotecommand.ServeAttach(w, r, e, "", "", wanted.GetContainerId(), &e.wanted,
			s.idle, remotecommand.DefaultStreamCreationTimeout, remotecommand.SupportedStreamingProtocols)
	case *runtimeapi.PortForwardRequest:
		serve := func(w http.ResponseWriter, r *http.Request) {
			portforward.ServePortForward(w, r, forwarder{x}, wanted.GetPodSandboxId(), "", &portforward.V4Options{Ports: wanted.GetPort()},
				s.idle, remotecommand.DefaultStreamCreationTimeout, portforward.SupportedProtocols)
		}
		if wsstream.IsWebSocketRequestWithTunnelingProtocol(r) {
			serveTunnel(w, r, serve)
			return
		}
		serve(w, r)
	}
}

// isInteractive says whether a session lasts for as long as its client likes.
func isInteractive(request any) bool {
	switch r := request.(type) {
	case *runtimeapi.ExecRequest:
		return r.GetTty()
	case *runtimeapi.AttachRequest:
		return true
	}
	return false
}

// executor runs what a session asks for. It implements the library's Executor and Attacher, whose contexts are the session's at best:
// the session's own is used.
type executor struct {
	x      *session
	wanted remotecommand.Options
}

func (e executor) ExecInContainer(_ context.Context, _, _, id string, argv []string, in io.Reader, out, errs io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize, _ time.Duration) error {
	defer e.x.lastWords()
	code, err := e.x.streamer.pods.Exec(e.x.ctx, id, argv, e.streams(in, out, errs, resize))
	switch {
	case err != nil && e.x.ctx.Err() != nil:
		// For a client that has closed only its own end, and for the library's log, where all else is an error.
		return utilexec.CodeExitError{Err: fmt.Errorf("killed: %w", e.x.whyOver()), Code: killedExit}
	case err != nil:
		return err
	case code != 0:
		return utilexec.CodeExitError{Err: fmt.Errorf("exit code %d", code), Code: code}
	}
	return nil
}

// killedExit is the exit code of what SIGKILL has ended.
const killedExit = 128 + 9

func (e executor) AttachContainer(_ context.Context, _, _, id string, in io.Reader, out, errs io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize) error {
	defer e.x.lastWords()
	err := e.x.streamer.pods.Attach(e.x.ctx, id, e.streams(in, out, errs, resize))
	switch {
	case e.x.ctx.Err() == nil:
		return err
	case errors.Is(e.x.whyOver(), errShutdown):
		return fmt.Errorf("detached, the container runs on: %w", errShutdown)
	}
	return nil // the client left
}

// streams translates what the library hands us: a stream that was not asked for is nil over SPDY, but not over WebSocket.
func (e executor) streams(in io.Reader, out, errs io.WriteCloser, resize <-chan remotecommand.TerminalSize) podsandbox.Streams {
	s := podsandbox.Streams{TTY: e.wanted.TTY, Go: e.x.spawn}
	if e.wanted.Stdin {
		s.Stdin = in
	}
	if e.wanted.Stdout {
		s.Stdout = out
	}
	if e.wanted.Stderr && !e.wanted.TTY {
		s.Stderr = errs
	}
	if resize == nil {
		return s
	}
	sizes := make(chan podsandbox.WindowSize)
	s.Resize = sizes
	e.x.spawn(func() {
		defer close(sizes)
		for {
			select {
			case r, ok := <-resize:
				if !ok {
					return
				}
				select {
				case sizes <- podsandbox.WindowSize{Width: r.Width, Height: r.Height}:
				case <-e.x.ctx.Done():
					return
				}
			case <-e.x.ctx.Done():
				return
			}
		}
	})
	return s
}

// forwarder implements the library's PortForwarder, for one session: the library's contexts never end.
type forwarder struct{ x *session }

// PortForward moves bytes between one connection of a client and a port of a pod. Its end, however it comes, is the end of this
// connection only.
func (f forwarder) PortForward(_ context.Context, id, _ string, port int32, client io.ReadWriteCloser) error {
	if !f.x.enter() {
		return nil // the client left
	}
	defer f.x.background.Done()
	if port < 1 || port > 65535 {
		return fmt.Errorf("port %d is not between 1 and 65535", port)
	}
	conn, err := f.x.streamer.pods.DialPod(f.x.ctx, id, uint16(port))
	if f.x.ctx.Err() != nil && err != nil {
		return nil // the client left
	}
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // its last byte was read or nobody wants it
	stop := context.AfterFunc(f.x.ctx, func() { _ = conn.Close() })
	defer stop()
	f.x.spawn(func() { // ends with the client's stream, which the library closes when we return
		_, err := io.Copy(conn, client) // whoever ends it, the other direction goes on
		if c, ok := conn.(interface{ CloseWrite() error }); ok {
			_ = c.CloseWrite() // the client has said all it had to say
		}
		if err != nil {
			_, _ = io.Copy(io.Discard, client) // nobody listens: the client's other connections must not wait for this one
		}
	})
	_, err = io.Copy(client, conn)
	if f.x.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
		return nil // the client left
	}
	return err
}

// errNoStreaming is for servers that were made without.
var errNoStreaming = fmt.Errorf("%w: this server has no address for streaming", podsandbox.ErrUnsupported)

func (s *runtimeService) Exec(_ context.Context, r *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	var c checker
	c.id("container_id", r.GetContainerId())
	c.argv("cmd", r.GetCmd())
	c.streams(r.GetTty(), r.GetStdin(), r.GetStdout(), r.GetStderr())
	if err := c.err(); err != nil {
		return nil, err
	}
	id, err := s.streamable(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	u, err := s.streamer.url("exec", &runtimeapi.ExecRequest{
		ContainerId: id, Cmd: r.GetCmd(), Tty: r.GetTty(), Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(),
	})
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ExecResponse{Url: u}, nil
}

func (s *runtimeService) Attach(_ context.Context, r *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	var c checker
	c.id("container_id", r.GetContainerId())
	c.streams(r.GetTty(), r.GetStdin(), r.GetStdout(), r.GetStderr())
	if err := c.err(); err != nil {
		return nil, err
	}
	id, err := s.streamable(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	u, err := s.streamer.url("attach", &runtimeapi.AttachRequest{
		ContainerId: id, Tty: r.GetTty(), Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(),
	})
	if err != nil {
		return nil, err
	}
	return &runtimeapi.AttachResponse{Url: u}, nil
}

func (s *runtimeService) PortForward(_ context.Context, r *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	var c checker
	c.id("pod_sandbox_id", r.GetPodSandboxId())
	for i, p := range r.GetPort() {
		if p < 1 || p > 65535 {
			c.bad(fmt.Sprintf("port[%d]", i), "%d is not between 1 and 65535", p)
		}
	}
	if err := c.err(); err != nil {
		return nil, err
	}
	if s.streamer == nil {
		return nil, errNoStreaming
	}
	p, err := s.cfg.Pods.Pod(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if p.State != podsandbox.PodReady {
		return nil, fmt.Errorf("cannot forward ports of pod %q: %w: it is not ready (%s)", p.ID, podsandbox.ErrState, p.Reason)
	}
	u, err := s.streamer.url("portforward", &runtimeapi.PortForwardRequest{PodSandboxId: p.ID, Port: r.GetPort()})
	if err != nil {
		return nil, err
	}
	return &runtimeapi.PortForwardResponse{Url: u}, nil
}

// streams checks which streams are asked for; a terminal has no stderr of its own.
func (c *checker) streams(tty, stdin, stdout, stderr bool) {
	if tty && stderr {
		c.bad("stderr", "must not be asked for together with tty")
	}
	if !stdin && !stdout && !stderr {
		c.bad("stdin, stdout, stderr", "one must be asked for")
	}
}

// streamable is the full id of a running container.
func (s *runtimeService) streamable(id string) (string, error) {
	if s.streamer == nil {
		return "", errNoStreaming
	}
	c, err := s.cfg.Pods.Container(id)
	if err != nil {
		return "", err
	}
	if c.State != podsandbox.ContainerRunning {
		return "", fmt.Errorf("cannot stream to container %q: %w: it is %s", c.ID, podsandbox.ErrState, c.State)
	}
	return c.ID, nil
}

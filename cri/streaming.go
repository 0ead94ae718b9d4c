package cri

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/klog/v2"
	utilexec "k8s.io/utils/exec"

	"github.com/crisp-cri/crisp/podsandbox"
)

// StreamingConfig is for exec, attach and port-forward, which the kubelet and crictl speak over a connection of their own. The
// calls of that name return a URL with a token, good once and for a minute.
type StreamingConfig struct {
	// Listener is where sessions are served; its address is in the URLs, so it must be one that the kubelet can dial:
	// loopback, as a rule. Nil: the three calls answer Unimplemented.
	Listener net.Listener
	TLS      *tls.Config   // nil: plain HTTP, which is for loopback
	Idle     time.Duration // 0: four hours, the kubelet's own
}

// headerTimeout bounds what a connection may take to say what it wants.
const headerTimeout = 30 * time.Second

// streamer serves sessions.
type streamer struct {
	streaming.Server
	listener net.Listener
	http     *http.Server

	sessions sync.WaitGroup // handlers
	mu       sync.Mutex
	conns    map[*session]struct{} // hijacked: the HTTP server knows them no more. nil when stopped
}

func newStreamer(cfg StreamingConfig, pods Pods) (*streamer, error) {
	base := &url.URL{Scheme: "http", Host: cfg.Listener.Addr().String()}
	s := &streamer{listener: cfg.Listener, conns: map[*session]struct{}{}}
	if cfg.TLS != nil {
		base.Scheme = "https"
		s.listener = tls.NewListener(cfg.Listener, cfg.TLS)
	}
	c := streaming.DefaultConfig
	c.BaseURL = base
	if cfg.Idle > 0 {
		c.StreamIdleTimeout = cfg.Idle
	}
	var err error
	if s.Server, err = streaming.NewServer(c, sessions{pods}); err != nil {
		return nil, fmt.Errorf("cannot make streaming server: %w", err)
	}
	s.http = &http.Server{Handler: http.HandlerFunc(s.serve), ReadHeaderTimeout: headerTimeout}
	return s, nil
}

// run serves until stop.
func (s *streamer) run() {
	if err := s.http.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) {
		klog.Background().Error(err, "Streaming server ended; exec, attach and port-forward do not work any more")
	}
}

// stop ends all sessions and waits for them.
func (s *streamer) stop() {
	_ = s.http.Close() // closes what is not hijacked
	s.mu.Lock()
	conns := s.conns
	s.conns = nil
	s.mu.Unlock()
	for c := range conns {
		_ = c.Close() // its session ends by that
	}
	s.sessions.Wait()
}

// serve gives each session a context that ends with its connection: the library's has no such thing, and a command whose client is
// gone must not live on.
func (s *streamer) serve(w http.ResponseWriter, r *http.Request) {
	s.sessions.Add(1) // this handler
	defer s.sessions.Done()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	s.ServeHTTP(&hijacker{ResponseWriter: w, streamer: s, gone: cancel}, r.WithContext(ctx))
}

// hijacker hands out connections that are watched.
type hijacker struct {
	http.ResponseWriter
	streamer *streamer
	gone     context.CancelFunc
}

// Hijack implements http.Hijacker.
func (h *hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(h.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	c := &session{Conn: conn, streamer: h.streamer, gone: h.gone}
	if !h.streamer.add(c) {
		_ = conn.Close() // nothing was said
		return nil, nil, http.ErrServerClosed
	}
	// What was read ahead, then the connection through us.
	early, err := rw.Reader.Peek(rw.Reader.Buffered())
	if err != nil {
		return nil, nil, errors.Join(err, c.Close())
	}
	r := bufio.NewReader(io.MultiReader(bytes.NewReader(bytes.Clone(early)), c))
	return c, bufio.NewReadWriter(r, rw.Writer), nil
}

// session is a hijacked connection. Its protocols read all the time, so the first error of a read tells that
// the client is gone.
type session struct {
	net.Conn
	streamer *streamer
	gone     context.CancelFunc
}

func (c *session) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	var timeout net.Error
	if err != nil && !(errors.As(err, &timeout) && timeout.Timeout()) {
		c.gone()
	}
	return n, err
}

func (c *session) Close() error {
	c.gone()
	c.streamer.remove(c)
	return c.Conn.Close()
}

// add registers a session's connection; false when the server has been stopped.
func (s *streamer) add(c *session) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conns == nil {
		return false
	}
	s.conns[c] = struct{}{}
	return true
}

func (s *streamer) remove(c *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

// sessions runs what a session asks for. It implements streaming.Runtime.
type sessions struct{ pods Pods }

func (s sessions) Exec(ctx context.Context, id string, argv []string, in io.Reader, out, errs io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	code, err := s.pods.Exec(ctx, id, argv, streams(ctx, in, out, errs, tty, resize))
	if err != nil {
		return err
	}
	if code != 0 {
		return utilexec.CodeExitError{Err: fmt.Errorf("exit code %d", code), Code: code}
	}
	return nil
}

func (s sessions) Attach(ctx context.Context, id string, in io.Reader, out, errs io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	return s.pods.Attach(ctx, id, streams(ctx, in, out, errs, tty, resize))
}

// streams translates what the library hands us: a stream that was not asked for is a nil interface there.
func streams(ctx context.Context, in io.Reader, out, errs io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) podsandbox.Streams {
	s := podsandbox.Streams{Stdin: in, TTY: tty}
	if out != nil {
		s.Stdout = out
	}
	if errs != nil && !tty {
		s.Stderr = errs
	}
	if resize == nil {
		return s
	}
	sizes := make(chan podsandbox.WindowSize)
	s.Resize = sizes
	go func() { // ends with the session
		defer close(sizes)
		for {
			select {
			case r, ok := <-resize:
				if !ok {
					return
				}
				select {
				case sizes <- podsandbox.WindowSize{Width: r.Width, Height: r.Height}:
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return s
}

// PortForward moves bytes between one connection of a client and a port of a pod. Its end, however it comes, is the end of this
// connection only.
func (s sessions) PortForward(ctx context.Context, id string, port int32, client io.ReadWriteCloser) error {
	if port < 1 || port > 65535 {
		return fmt.Errorf("port %d is not between 1 and 65535", port)
	}
	conn, err := s.pods.DialPod(ctx, id, uint16(port))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // its last byte was read or nobody wants it
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	go func() { // ends with the client's stream, which the library closes when we return
		_, _ = io.Copy(conn, client) // whoever ends it, the other direction goes on
		if c, ok := conn.(interface{ CloseWrite() error }); ok {
			_ = c.CloseWrite() // the client has said all it had to say
		}
	}()
	_, err = io.Copy(client, conn)
	if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
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
	return s.streamer.GetExec(&runtimeapi.ExecRequest{
		ContainerId: id, Cmd: r.GetCmd(), Tty: r.GetTty(), Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(),
	})
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
	return s.streamer.GetAttach(&runtimeapi.AttachRequest{
		ContainerId: id, Tty: r.GetTty(), Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(),
	})
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
	return s.streamer.GetPortForward(&runtimeapi.PortForwardRequest{PodSandboxId: p.ID, Port: r.GetPort()})
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

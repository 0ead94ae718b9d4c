package cri

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"

	"golang.org/x/net/websocket"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/klog/v2"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
	"k8s.io/streaming/pkg/httpstream/wsstream"
	utilexec "k8s.io/utils/exec"
)

// channels are the streams of an exec or attach over WebSocket.
type channels struct {
	stdin          io.Reader
	stdout, stderr io.WriteCloser
	resize         <-chan remotecommand.TerminalSize
}

// serveV5 serves an exec or attach with v5.channel.k8s.io, which is v4 with a signal for the end of one stream: the
// client's stdin can end before the session. The protocol is wsstream's; what is here is cri-streaming's
// createWebSocketStreams, ServeExec and ServeAttach, which stop at v4.
func (e executor) serveV5(w http.ResponseWriter, r *http.Request, run func(*channels) error) {
	kinds := make([]wsstream.ChannelType, remotecommand.StreamResize+1)
	kinds[remotecommand.StreamStdIn] = channelType(e.wanted.Stdin, wsstream.ReadChannel)
	kinds[remotecommand.StreamStdOut] = channelType(e.wanted.Stdout, wsstream.WriteChannel)
	kinds[remotecommand.StreamStdErr] = channelType(e.wanted.Stderr, wsstream.WriteChannel)
	kinds[remotecommand.StreamErr] = wsstream.WriteChannel
	kinds[remotecommand.StreamResize] = wsstream.ReadChannel
	conn := wsstream.NewConn(map[string]wsstream.ChannelProtocolConfig{remotecommand.StreamProtocolV5Name: {Binary: true, Channels: kinds}})
	conn.SetIdleTimeout(e.x.streamer.idle)
	_, streams, err := conn.Open(w, r)
	if err != nil {
		klog.Background().V(2).Info("Could not open a WebSocket for a streaming client", "err", err)
		return
	}
	defer func() { _ = conn.Close() }() // the session closes what is below it
	// An empty message tells the client that it is connected.
	first := remotecommand.StreamErr
	switch {
	case e.wanted.Stdout:
		first = remotecommand.StreamStdOut
	case e.wanted.Stderr:
		first = remotecommand.StreamStdErr
	}
	if _, err := streams[first].Write(nil); err != nil {
		return // the client left
	}
	sizes := make(chan remotecommand.TerminalSize)
	e.x.spawn(func() { readSizes(e.x.ctx, streams[remotecommand.StreamResize], sizes) })
	err = run(&channels{streams[remotecommand.StreamStdIn], streams[remotecommand.StreamStdOut], streams[remotecommand.StreamStdErr], sizes})
	words, merr := json.Marshal(outcomeOf(err))
	if merr != nil {
		klog.Background().Error(merr, "Could not tell a streaming client how its session ended")
		return
	}
	_, _ = streams[remotecommand.StreamErr].Write(words) // the client may have left
}

func channelType(wanted bool, t wsstream.ChannelType) wsstream.ChannelType {
	if wanted {
		return t
	}
	return wsstream.IgnoreChannel
}

// maxSize bounds a window's size as JSON, in bytes.
const maxSize = 1 << 10

// readSizes reads what the client says of its window, until it says nonsense or leaves. It closes sizes.
func readSizes(ctx context.Context, r io.Reader, sizes chan<- remotecommand.TerminalSize) {
	defer close(sizes)
	limited := &io.LimitedReader{R: r}
	decoder := json.NewDecoder(limited)
	for {
		limited.N = maxSize
		var s remotecommand.TerminalSize
		if err := decoder.Decode(&s); err != nil {
			_, _ = io.Copy(io.Discard, r) // the other channels go on
			return
		}
		select {
		case sizes <- s:
		case <-ctx.Done():
			return
		}
	}
}

// outcome is what the error channel carries at the end since v4: a metav1.Status, of which
// client-go reads these fields. cri-streaming has the same, for itself.
type outcome struct {
	Status  string          `json:"status"`
	Message string          `json:"message,omitempty"`
	Reason  string          `json:"reason,omitempty"`
	Details *outcomeDetails `json:"details,omitempty"`
	Code    int             `json:"code,omitempty"`
}

type outcomeDetails struct {
	Causes []outcomeCause `json:"causes"`
}

type outcomeCause struct {
	Type    string `json:"reason"`
	Message string `json:"message"`
}

// outcomeOf says how a session ended.
func outcomeOf(err error) outcome {
	if err == nil {
		return outcome{Status: "Success"}
	}
	var exit utilexec.CodeExitError
	if errors.As(err, &exit) {
		return outcome{
			Status: "Failure", Reason: remotecommand.NonZeroExitCodeReason,
			Message: fmt.Sprintf("command terminated with non-zero exit code: %v", exit),
			Details: &outcomeDetails{[]outcomeCause{{remotecommand.ExitCodeCauseType, strconv.Itoa(exit.Code)}}},
		}
	}
	return outcome{Status: "Failure", Reason: "InternalError", Code: http.StatusInternalServerError, Message: err.Error()}
}

// tunnelProtocol is port-forward's SPDY in binary messages of a WebSocket (KEP-4006).
const tunnelProtocol = portforward.WebsocketsSPDYTunnelingPortForwardV1

// serveTunnel serves a port-forward whose SPDY comes in a WebSocket. x/net/websocket's Conn is a net.Conn of binary messages:
// to serve, which gets a request as if the client had upgraded to SPDY itself, it is the hijacked connection.
func serveTunnel(w http.ResponseWriter, r *http.Request, serve func(http.ResponseWriter, *http.Request)) {
	websocket.Server{
		Handshake: func(c *websocket.Config, _ *http.Request) error {
			if !slices.Contains(c.Protocol, tunnelProtocol) {
				return fmt.Errorf("none of the protocols %q is %s", c.Protocol, tunnelProtocol)
			}
			c.Protocol = []string{tunnelProtocol}
			return nil
		},
		Handler: func(ws *websocket.Conn) {
			ws.PayloadType = websocket.BinaryFrame
			inner := r.Clone(r.Context())
			inner.Header = http.Header{}
			inner.Header.Set(httpstream.HeaderConnection, httpstream.HeaderUpgrade)
			inner.Header.Set(httpstream.HeaderUpgrade, spdy.HeaderSpdy31)
			inner.Header.Set(httpstream.HeaderProtocolVersion, portforward.ProtocolV1Name)
			serve(&tunnel{ws: ws, header: http.Header{}}, inner)
		},
	}.ServeHTTP(w, r)
}

// tunnel is a response whose connection is a WebSocket. Nothing of the response itself reaches the client, whose
// request has been answered.
type tunnel struct {
	ws     *websocket.Conn
	header http.Header
}

func (t *tunnel) Header() http.Header         { return t.header }
func (t *tunnel) Write(b []byte) (int, error) { return len(b), nil }
func (t *tunnel) WriteHeader(int)             {}

// Hijack implements http.Hijacker.
func (t *tunnel) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return tunnelConn{t.ws}, bufio.NewReadWriter(bufio.NewReader(t.ws), bufio.NewWriter(t.ws)), nil
}

// tunnelConn is a WebSocket as what is in it has it.
type tunnelConn struct{ *websocket.Conn }

// Close implements net.Conn. Of an error, the client being gone, spdystream would keep a goroutine for a second to tell
// somebody.
func (c tunnelConn) Close() error {
	_ = c.Conn.Close() // the session closes what is below
	return nil
}

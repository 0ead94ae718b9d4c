package cri

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"k8s.io/client-go/tools/remotecommand"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// CVE-2022-1708, CVE-2022-31030: what exec'd programs print costs the daemon 16 MiB each, not what they print.
func TestSEC90_OutputWithoutEndCostsLittle(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"})
	wide := w.wide(t)
	const parallel, printed = 4, 256 << 20
	var running sync.WaitGroup
	for range parallel {
		running.Go(func() {
			r, err := wide.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: c.id, Timeout: 120, Cmd: []string{"/payload", "spam", itoa(printed >> 10), "1023"}})
			if err != nil || len(r.Stdout) > 16<<20 {
				t.Errorf("got %d bytes, %v", len(r.GetStdout()), err)
			}
		})
	}
	running.Wait()
	// Kept, marshalled, on their way; the collector keeps as much again.
	if got, limit := rss(t, w.PID), int64(parallel*16<<20*6+64<<20); got > limit {
		t.Errorf("crispd has %d MiB, want at most %d", got>>20, limit>>20)
	}
}

// raw speaks with the streaming server without any client's help.
type raw struct {
	net.Conn
	r *bufio.Reader
}

func dialRaw(t *testing.T, address string) *raw {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.DialTimeout("tcp", u.Host, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	return &raw{c, bufio.NewReader(c)}
}

// ask sends a request; nil if the server hung up instead of answering.
func (c *raw) ask(method, path, headers string) *http.Response {
	_, _ = fmt.Fprintf(c, "%s %s HTTP/1.1\r\nHost: x\r\n%s\r\n", method, path, headers) // refusal may come before the end
	r, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return nil
	}
	return r
}

// ends says whether the server ends the connection.
func (c *raw) ends() bool {
	_, err := io.Copy(io.Discard, c.r)
	ne, ok := err.(net.Error)
	return !ok || !ne.Timeout()
}

// CVE-2018-1002105, CVE-2020-8559, CVE-2020-27813, CVE-2026-35469: who speaks with the streaming server without a token, or with one and not
// as he should, gets nothing and costs nothing.
func TestSEC94_TheStreamingServerIsNotImpressed(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"})
	o := remotecommand.StreamOptions{Stdout: io.Discard, Stderr: io.Discard}
	good := func() *url.URL {
		u, err := url.Parse(c.execURL(t, o, "true"))
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	const (
		spdy      = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n"
		websocket = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n"
	)
	u := good()
	before := rss(t, w.PID)
	for _, path := range []string{"/", "/exec/", "/exec/x", "/attach/x", "/portforward/x", "/exec/..%2f..", "//exec/x", "/exec", "/debug/pprof/", "/metrics", u.Path + "x", strings.Replace(u.Path, "/exec/", "/attach/", 1), "http://example.org" + u.Path + "y", strings.Repeat("/x", 4000)} {
		for _, upgrade := range []string{"", spdy, websocket} {
			if r := dialRaw(t, u.String()).ask("POST", path, "Content-Length: 0\r\n"+upgrade); r != nil && r.StatusCode < 400 {
				t.Errorf("%.60s: got %s", path, r.Status)
			}
		}
	}
	if r := dialRaw(t, u.String()).ask("GET", u.Path, "X: "+strings.Repeat("x", 4<<20)+"\r\n"); r != nil && r.StatusCode < 400 {
		t.Errorf("header of 4 MiB: got %s", r.Status)
	}
	for name, attack := range map[string]struct {
		upgrade string
		frame   []byte
	}{
		"SPDY SETTINGS with 2^32-1 entries":  {spdy, []byte{0x80, 3, 0, 4, 0, 0, 0, 4, 0xff, 0xff, 0xff, 0xff}},
		"SPDY SYN_STREAM of a bad length":    {spdy, []byte{0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff}},
		"SPDY headers that are no zlib":      {spdy, append([]byte{0x80, 3, 0, 1, 0, 0, 0, 14, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0}, "abcd"...)},
		"WebSocket frame of 2^63 bytes":      {websocket, []byte{0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4}},
		"WebSocket frame of 2^62 bytes":      {websocket, []byte{0x82, 0xff, 0x40, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4}},
		"WebSocket resize that is no object": {websocket, append([]byte{0x82, 0x80 | 4, 0, 0, 0, 0}, "\x04xyz"...)},
	} {
		t.Run(name, func(t *testing.T) {
			u := good()
			s := dialRaw(t, u.String())
			if r := s.ask("GET", u.Path, attack.upgrade); r == nil || r.StatusCode != http.StatusSwitchingProtocols {
				t.Fatalf("the test does not speak its protocol: %v", r)
			}
			if _, err := s.Write(attack.frame); err != nil {
				t.Fatal(err)
			}
			if tcp, ok := s.Conn.(*net.TCPConn); ok {
				_ = tcp.CloseWrite() // no more will come: what is waited for is lost
			}
			if !s.ends() {
				t.Error("the connection is still there")
			}
		})
	}
	var idle []net.Conn
	for range 1000 {
		n, err := net.Dial("tcp", u.Host)
		if err != nil {
			t.Fatal(err)
		}
		idle = append(idle, n)
	}
	if got := c.exec("echo", "served"); got != "served\n" {
		t.Errorf("got %q", got)
	}
	if after := rss(t, w.PID); after > before+64<<20 {
		t.Errorf("crispd has %d MiB, had %d", after>>20, before>>20)
	}
	for _, n := range idle {
		_ = n.Close() // never used
	}
}

// CVE-2023-44487 and its kin: somebody who may use the socket can't stop others from using it, nor end the daemon.
func TestSEC95_FloodsOfHTTP2(t *testing.T) {
	w := need(t)
	before, pid := rss(t, w.PID), w.PID
	dial := func(t *testing.T) (net.Conn, *http2.Framer) {
		t.Helper()
		c, err := net.Dial("unix", w.Socket)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, http2.ClientPreface); err != nil {
			t.Fatal(err)
		}
		f := http2.NewFramer(c, c)
		if err := f.WriteSettings(); err != nil {
			t.Fatal(err)
		}
		return c, f
	}
	headers := func(path string) []byte {
		var b bytes.Buffer
		e := hpack.NewEncoder(&b)
		for _, h := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", path}, {":authority", "x"}, {"content-type", "application/grpc"}, {"te", "trailers"}} {
			if err := e.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]}); err != nil {
				t.Fatal(err)
			}
		}
		return b.Bytes()
	}
	drain := func(c net.Conn) (done chan struct{}) {
		done = make(chan struct{})
		go func() { defer close(done); _, _ = io.Copy(io.Discard, c) }() // until it is closed
		return done
	}
	t.Run("rapid reset", func(t *testing.T) {
		c, f := dial(t)
		done := drain(c)
		for i := range uint32(20_000) {
			if f.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: headers("/runtime.v1.RuntimeService/Version"), EndHeaders: true}) != nil || f.WriteRSTStream(2*i+1, http2.ErrCodeCancel) != nil {
				break // the server has had enough
			}
		}
		_ = c.Close()
		<-done
	})
	t.Run("CONTINUATION without end", func(t *testing.T) {
		c, f := dial(t)
		done := drain(c)
		err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headers("/runtime.v1.RuntimeService/Version")})
		literal := append([]byte{0, 1, 'x', 0x7f, 0x81, 0x7f}, bytes.Repeat([]byte("y"), 16<<10-10)...) // a field of 16 KiB
		for i := 0; i < 4096 && err == nil; i++ {
			err = f.WriteContinuation(1, false, literal)
		}
		if err == nil {
			t.Error("the server took 64 MiB of headers")
		}
		_ = c.Close()
		<-done
	})
	t.Run("many streams", func(t *testing.T) {
		c, f := dial(t)
		done := drain(c)
		for i := range uint32(20_000) {
			if f.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: headers("/runtime.v1.RuntimeService/ExecSync"), EndHeaders: true}) != nil {
				break
			}
		}
		if _, err := w.rt.Version(t.Context(), ""); err != nil {
			t.Errorf("another client meanwhile: %v", err)
		}
		_ = c.Close()
		<-done
	})
	t.Run("a path without a slash", func(t *testing.T) {
		c, f := dial(t)
		for i, path := range []string{"runtime.v1.RuntimeService/Version", "", "Version", "/", "//", "/a/b/c"} {
			if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1), BlockFragment: headers(path), EndHeaders: true, EndStream: true}); err != nil {
				break
			}
		}
		f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
		answered := 0
		for answered < 6 {
			frame, err := f.ReadFrame()
			if err != nil {
				break // hung up: refused as well
			}
			if h, ok := frame.(*http2.MetaHeadersFrame); ok {
				for _, field := range h.Fields {
					if field.Name == "grpc-status" && field.Value == "0" {
						t.Errorf("stream %d was answered well", h.StreamID)
					}
				}
				if h.StreamEnded() {
					answered++
				}
			}
			if _, ok := frame.(*http2.RSTStreamFrame); ok {
				answered++
			}
		}
		_ = c.Close()
	})
	t.Run("a message of 100 MiB", func(t *testing.T) {
		_, err := w.CRI.Version(t.Context(), &runtimeapi.VersionRequest{Version: strings.Repeat("x", 100<<20)})
		wantCode(t, err, codes.ResourceExhausted)
	})
	t.Run("a message that is longer than what follows", func(t *testing.T) {
		c, f := dial(t)
		if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headers("/runtime.v1.RuntimeService/Version"), EndHeaders: true}); err != nil {
			t.Fatal(err)
		}
		message := binary.BigEndian.AppendUint32([]byte{0}, 0xffffffff)
		if err := f.WriteData(1, true, message); err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
	})
	if _, err := w.rt.Version(t.Context(), ""); err != nil || w.PID != pid {
		t.Errorf("afterwards: %v", err)
	}
	if after := rss(t, w.PID); after > before+256<<20 { // a message of 16 MiB is let in, a larger one is not
		t.Errorf("crispd has %d MiB, had %d", after>>20, before>>20)
	}
}

// CVE-2019-11248, CVE-2020-15257: crispd listens where it says and nowhere else.
func TestSEC98_OneListenerOnLoopback(t *testing.T) {
	w := need(t)
	w.pod(t).run([]string{"sleep"})
	own := map[string]bool{} // inodes of sockets
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", w.PID))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil {
			if inode, ok := strings.CutPrefix(to, "socket:["); ok {
				own[strings.TrimSuffix(inode, "]")] = true
			}
		}
	}
	listening := 0
	for file, loopback := range map[string]string{"tcp": "0100007F:", "tcp6": "00000000000000000000000001000000:"} {
		for i, line := range strings.Split(readFile(t, fmt.Sprintf("/proc/%d/net/%s", w.PID, file)), "\n") {
			f := strings.Fields(line)
			if i == 0 || len(f) < 10 || f[3] != "0A" || !own[f[9]] {
				continue
			}
			listening++
			if !strings.HasPrefix(f[1], loopback) {
				t.Errorf("it listens on %s", f[1])
			}
		}
	}
	for _, file := range []string{"udp", "udp6", "raw", "raw6"} {
		for _, line := range strings.Split(readFile(t, fmt.Sprintf("/proc/%d/net/%s", w.PID, file)), "\n") {
			if f := strings.Fields(line); len(f) > 9 && own[f[9]] {
				t.Errorf("it has a %s socket: %s", file, line)
			}
		}
	}
	if listening != 1 {
		t.Errorf("it listens on %d TCP sockets, want one, for streams", listening)
	}
	for _, line := range strings.Split(readFile(t, fmt.Sprintf("/proc/%d/net/unix", w.PID)), "\n") {
		f := strings.Fields(line)
		if len(f) < 7 || !own[f[6]] {
			continue
		}
		if flags, err := strconv.ParseUint(f[3], 16, 64); err == nil && flags&0x10000 != 0 && (len(f) < 8 || f[7] != w.Socket) { // __SO_ACCEPTCON
			t.Errorf("it listens on a unix socket besides its own: %s", line)
		}
	}
}

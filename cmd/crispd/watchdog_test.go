package main

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Who is well pings, who is not does not, and who is well again pings again.
func TestWatch(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	answers := []error{nil, errors.New("hangs"), errors.New("hangs"), nil}
	asked, pings := 0, []int{}
	watch(ctx, 30*time.Millisecond, func(ctx context.Context) error {
		if deadline, ok := ctx.Deadline(); !ok || time.Until(deadline) > 10*time.Millisecond {
			t.Errorf("deadline %v (%v), want a third of the interval", deadline, ok)
		}
		if asked == len(answers) {
			cancel()
			return ctx.Err()
		}
		asked++
		return answers[asked-1]
	}, func() { pings = append(pings, asked) })
	if asked != 4 || len(pings) != 2 || pings[0] != 1 || pings[1] != 4 {
		t.Errorf("asked %d times, pinged after %v, want 4 and [1 4]", asked, pings)
	}
}

// answering is a CRI server of which one list fails or hangs.
type answering struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	pods, containers func(context.Context) error
}

func (a answering) ListPodSandbox(ctx context.Context, _ *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	return &runtimeapi.ListPodSandboxResponse{}, a.pods(ctx)
}

func (a answering) ListContainers(ctx context.Context, _ *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	return &runtimeapi.ListContainersResponse{}, a.containers(ctx)
}

func TestProbe(t *testing.T) {
	fine := func(context.Context) error { return nil }
	hang := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	for _, c := range []struct {
		name   string
		server answering
		want   string
	}{
		{"well", answering{pods: fine, containers: fine}, ""},
		{"pods hang", answering{pods: hang, containers: fine}, "cannot list pods"},
		{"containers hang", answering{pods: fine, containers: hang}, "cannot list containers"},
	} {
		t.Run(c.name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "crisp.sock")
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			s := grpc.NewServer()
			runtimeapi.RegisterRuntimeServiceServer(s, c.server)
			served := make(chan error, 1)
			go func() { served <- s.Serve(l) }()
			defer func() { s.Stop(); <-served }()
			p, err := newProbe(socket)
			if err != nil {
				t.Fatal(err)
			}
			defer p.close()
			limit := time.Minute
			if c.want != "" {
				limit = 100 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			err = p.ask(ctx)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	p, err := newProbe(filepath.Join(t.TempDir(), "nobody"))
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	if err := p.ask(t.Context()); err == nil {
		t.Error("nobody listens, and it is well")
	}
}

// asPassed runs this test program as systemd would: with a socket at descriptor 3.
func asPassed(t *testing.T, test string, files []*os.File, env ...string) string {
	t.Helper()
	// LISTEN_PID is the program's own: a shell knows it before it becomes it.
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, os.Args[0], "-test.run=^"+test+"$", "-test.v")
	cmd.Env = append(os.Environ(), env...)
	cmd.ExtraFiles = files
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

func TestPassed(t *testing.T) {
	if want := os.Getenv("CRISPD_TEST_SOCKET"); want != "" {
		passedInChild(t, want)
		return
	}
	if l, err := passed("/run/x"); l != nil || err != nil {
		t.Errorf("nothing was passed: %v, %v", l, err)
	}
	path := filepath.Join(t.TempDir(), "crisp.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for _, c := range []struct {
		name, socket, n string
		files           []*os.File
		want            string
	}{
		{"one", path, "1", []*os.File{f}, "serves"},
		{"another one", path + "2", "1", []*os.File{f}, "ListenStream the same"},
		{"two", path, "2", []*os.File{f, f}, "2 sockets"},
		{"no socket", path, "1", []*os.File{dir}, "cannot serve what systemd passed"},
	} {
		out := asPassed(t, "TestPassed", c.files, "CRISPD_TEST_SOCKET="+c.socket, "LISTEN_FDS="+c.n)
		if !strings.Contains(out, c.want) {
			t.Errorf("%s: want %q in\n%s", c.name, c.want, out)
		}
	}
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		t.Error("the socket's file is gone: it is systemd's")
	}
}

func passedInChild(t *testing.T, path string) {
	l, err := passed(path)
	if err != nil {
		t.Log(err)
		return
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if _, err := l.Accept(); err != nil {
		t.Fatal(err)
	}
	if os.Getenv("LISTEN_FDS") != "" {
		t.Error("children would think that it is theirs")
	}
	l.Close()
	t.Log("serves")
}

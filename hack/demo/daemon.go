package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// client is the CRI as crispd serves it.
type client struct {
	runtimeapi.RuntimeServiceClient
	runtimeapi.ImageServiceClient
}

// daemon is a running crispd and the connection to it.
type daemon struct {
	process *os.Process
	conn    *grpc.ClientConn
	client  client
	log     *tail
	exited  chan error
}

// startDaemon starts crispd on its defaults, with places of our own, and waits
// until it says that it serves (sd_notify(3)).
func (w *world) startDaemon(ctx context.Context) (*daemon, error) {
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: w.path("notify"), Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	defer notify.Close()

	args := []string{
		"serve", "--config", os.DevNull, "--state-root", w.state + "/state", "--run-root", w.path("run"), "--socket", w.socket,
		"--set", "network.bridge=" + w.bridge, "--set", "network.table=" + w.table, "--set", "network.netns_dir=" + w.path("netns"),
		"--set", "network.subnets=" + w.subnets(), "--set", "cgroup.root=" + w.cgroups,
	}
	cmd := exec.Command(w.crispd, args...)
	d := &daemon{log: &tail{}, exited: make(chan error, 1)}
	cmd.Stdout, cmd.Stderr = d.log, io.Writer(d.log)
	if w.verbose {
		cmd.Stderr = io.MultiWriter(d.log, os.Stderr)
	}
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+w.path("notify"))
	// It must not die of the terminal's Ctrl-C before the pod is taken down.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	d.process = cmd.Process
	go func() { d.exited <- cmd.Wait() }() // stop waits

	ready := make(chan error, 1)
	go func() { ready <- awaitReady(notify) }() // ends when notify is closed, at the latest
	select {
	case err = <-ready:
	case werr := <-d.exited:
		d.exited <- werr
		err = fmt.Errorf("crispd ended at once: %v%s", werr, d.lastLog())
	case <-ctx.Done():
		err = ctx.Err()
	case <-time.After(20 * time.Second):
		err = fmt.Errorf("crispd was not ready after 20 s%s", d.lastLog())
	}
	if err == nil {
		d.conn, err = grpc.NewClient("unix://"+w.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	}
	if err != nil {
		return nil, errors.Join(err, d.stop())
	}
	d.client = client{runtimeapi.NewRuntimeServiceClient(d.conn), runtimeapi.NewImageServiceClient(d.conn)}
	return d, nil
}

func awaitReady(notify *net.UnixConn) error {
	buf := make([]byte, 4096)
	for {
		n, err := notify.Read(buf)
		if err != nil {
			return err
		}
		if bytes.Contains(buf[:n], []byte("READY=1")) {
			return nil
		}
	}
}

// stop ends crispd as an operator would, with SIGTERM.
func (d *daemon) stop() error {
	if d.conn != nil {
		d.conn.Close()
	}
	if err := d.process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case err := <-d.exited:
		return err
	case <-time.After(40 * time.Second):
		return errors.Join(errors.New("crispd did not end within 40 s of SIGTERM"), d.process.Kill())
	}
}

// lastLog is the end of crispd's log, for error messages.
func (d *daemon) lastLog() string {
	lines := strings.Split(strings.TrimSpace(d.log.String()), "\n")
	return "\ncrispd's last words:\n  " + strings.Join(lines[max(0, len(lines)-12):], "\n  ")
}

// tail keeps the last of what is written to it. It is safe for concurrent use.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	t.buf = t.buf[max(0, len(t.buf)-64<<10):]
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.buf)
}

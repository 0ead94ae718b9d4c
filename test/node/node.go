// Package node runs a crispd of one's own for the demo, the tests and the
// benchmarks: its own roots, socket, bridge, nft table, network namespaces and
// cgroups, all with one random tag in their names, so that nodes, and whatever
// else runs on the machine, do not meet. [Node.Leftovers] finds what is left of it.
//
//	n, err := node.New(node.Options{Crispd: "bin/crispd"})
//	defer n.Remove()
//	err = n.Start(ctx)          // crispd serves
//	n.CRI.RunPodSandbox(…)
//	err = n.Stop()              // SIGTERM; or Kill
//	err = n.Start(ctx)          // the next crispd on the same roots
package node

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
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

// CRI is both services of a runtime's socket.
type CRI struct {
	runtimeapi.RuntimeServiceClient
	runtimeapi.ImageServiceClient
}

// Options of a node.
type Options struct {
	Crispd string    // path of the binary; crisp-init is beside it
	Args   []string  // more arguments for crispd serve, such as --set KEY=VALUE
	Log    io.Writer // gets crispd's log, too; nil: nobody
	Tag    string    // instead of a random one, 6 hexadecimal digits: the node of an earlier process, or boot
}

// Node is a crispd and what it owns. Its methods are for one goroutine; CRI is
// for any number.
type Node struct {
	Tag      string // 6 hexadecimal digits
	StateDir string // everything that survives crispd
	RunDir   string
	LogDir   string // for pods' LogDirectory
	Socket   string
	Bridge   string // link
	Table    string // nft, family inet
	Cgroups  string // parent of all cgroups, such as "/crisp-node-a1b2c3"
	CRI      CRI    // valid after Start
	PID      int    // crispd's, after Start

	options Options
	conn    *grpc.ClientConn
	process *os.Process
	exited  chan error // one value, when the process ended
	log     tail
	seen    map[int]string // pid → start time of what Leftovers looks for
}

// New makes the node's directories. Remove takes them away again.
func New(o Options) (*Node, error) {
	tag := o.Tag
	if tag == "" {
		b := make([]byte, 3)
		rand.Read(b) // never fails (crypto/rand)
		tag = hex.EncodeToString(b)
	} else if b, err := hex.DecodeString(tag); err != nil || len(b) != 3 {
		return nil, fmt.Errorf("tag %q: want 6 hexadecimal digits", tag)
	}
	n := &Node{
		Tag: tag, options: o,
		StateDir: "/var/tmp/crisp-node-" + tag,
		RunDir:   "/run/crisp-node-" + tag,
		Bridge:   "crisp-" + tag, Table: "crisp_" + tag, Cgroups: "/crisp-node-" + tag,
		seen: map[int]string{},
	}
	n.LogDir, n.Socket = n.StateDir+"/logs", n.RunDir+"/crisp.sock"
	for _, dir := range []string{n.StateDir, n.RunDir, n.LogDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, errors.Join(err, n.removeDirs())
		}
	}
	return n, nil
}

// Endpoint is the socket as crictl and cri-client want it.
func (n *Node) Endpoint() string { return "unix://" + n.Socket }

// LinkPrefixes start the names of the pods' links on the host: their own, and those that limit bandwidth
// (package network/bridge, names.go).
func (n *Node) LinkPrefixes() []string {
	sum := sha256.Sum256([]byte(n.Bridge))
	tag := hex.EncodeToString(sum[:2])
	return []string{"cr" + tag, "cs" + tag}
}

// Args is crispd's command line.
func (n *Node) Args() []string {
	return append([]string{
		"serve", "--config", os.DevNull, "--state-root", n.StateDir + "/state", "--run-root", n.RunDir + "/run", "--socket", n.Socket,
		"--set", "network.mode=bridge", // not this machine's CNI, should it have one
		"--set", "network.bridge=" + n.Bridge, "--set", "network.table=" + n.Table, "--set", "network.netns_dir=" + n.RunDir + "/netns",
		"--set", "network.subnets=" + n.subnets(), "--set", "cgroup.driver=cgroupfs", "--set", "cgroup.root=" + n.Cgroups,
	}, n.options.Args...)
}

// Start starts crispd and waits until it says that it serves (sd_notify(3)).
// On error none is running, and the error has the end of its log.
func (n *Node) Start(ctx context.Context) error {
	notifyPath := n.RunDir + "/notify"
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notifyPath, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer os.Remove(notifyPath)
	defer notify.Close()

	cmd := exec.Command(n.options.Crispd, n.Args()...)
	cmd.Stderr = &n.log
	if n.options.Log != nil {
		cmd.Stderr = io.MultiWriter(&n.log, n.options.Log)
	}
	cmd.Stdout = cmd.Stderr
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+notifyPath)
	// It must not die of the terminal's Ctrl-C: pods are taken down through it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("cannot start crispd: %w", err)
	}
	n.process, n.PID, n.exited = cmd.Process, cmd.Process.Pid, make(chan error, 1)
	go func() { n.exited <- cmd.Wait() }() // Stop and Kill wait

	ready := make(chan error, 1)
	go func() { ready <- awaitReady(notify) }() // ends when notify is closed, at the latest
	select {
	case err = <-ready:
	case werr := <-n.exited:
		n.exited <- werr
		err = fmt.Errorf("it ended at once: %v", werr)
	case <-ctx.Done():
		err = ctx.Err()
	case <-time.After(30 * time.Second):
		err = errors.New("not ready after 30 s")
	}
	if err == nil {
		n.conn, err = grpc.NewClient(n.Endpoint(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	}
	if err != nil {
		err = fmt.Errorf("cannot start crispd: %w%s", err, n.LastLog())
		return errors.Join(err, n.Kill())
	}
	n.CRI = CRI{runtimeapi.NewRuntimeServiceClient(n.conn), runtimeapi.NewImageServiceClient(n.conn)}
	return nil
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

// Stop ends crispd as an operator would, with SIGTERM. Pods live on. Without a
// running crispd it does nothing.
func (n *Node) Stop() error {
	return n.end(syscall.SIGTERM, func(err error) error {
		if err != nil {
			return fmt.Errorf("crispd did not end well: %w%s", err, n.LastLog())
		}
		return nil
	})
}

// Kill ends crispd with SIGKILL, as a crash would.
func (n *Node) Kill() error { return n.end(syscall.SIGKILL, func(error) error { return nil }) }

func (n *Node) end(sig syscall.Signal, judge func(error) error) error {
	if n.process == nil {
		return nil
	}
	if n.conn != nil {
		n.conn.Close()
	}
	if err := n.process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	defer func() { n.process, n.conn = nil, nil }()
	select {
	case err := <-n.exited:
		return judge(err)
	case <-time.After(45 * time.Second):
		err := n.process.Kill()
		<-n.exited
		return errors.Join(fmt.Errorf("crispd did not end within 45 s of %s%s", sig, n.LastLog()), err)
	}
}

// LastLog is the end of crispd's log, for error messages.
func (n *Node) LastLog() string {
	lines := strings.Split(strings.TrimSpace(n.log.String()), "\n")
	return "\ncrispd's last words:\n  " + strings.Join(lines[max(0, len(lines)-15):], "\n  ")
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

// subnets are ranges of this node's own, by its tag.
func (n *Node) subnets() string {
	return fmt.Sprintf(`["%s", "fd63:7269:%s::/64"]`, n.subnet4(), n.Tag[:4])
}

func (n *Node) subnet4() string {
	b, err := hex.DecodeString(n.Tag)
	if err != nil {
		panic(err) // New made it
	}
	return fmt.Sprintf("10.%d.%d.0/24", 128+b[0]%64, b[1])
}

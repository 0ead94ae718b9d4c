package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/network/netns"
)

const (
	// maxOutput bounds each of stdout and stderr of a plugin, in bytes. Who prints more is killed.
	maxOutput = 1 << 20
	// maxQuote bounds what an error quotes of a plugin's output, in bytes.
	maxQuote = 512
	// outputDelay is how long a plugin's output is waited for after its whole process
	// group is dead: something that left the group may hold it.
	outputDelay = 2 * time.Second
)

// ErrOutput is returned when a plugin printed more than a megabyte.
var ErrOutput = fmt.Errorf("more than %d bytes of output", maxOutput)

// PluginError says which plugin failed at what, and how long it had run. Err is a
// *types.Error where the plugin answered as the specification wants it, and else
// whatever kept it from that: an *exec.ExitError, ErrOutput, a context's error.
type PluginError struct {
	Verb   string // ADD, DEL, CHECK, STATUS, GC
	Plugin string // its type
	Took   time.Duration
	Err    error
}

func (e *PluginError) Error() string {
	return fmt.Sprintf("CNI %s plugin %q: %v after %v", e.Verb, e.Plugin, e.Err, roundTime(e.Took))
}

func (e *PluginError) Unwrap() error { return e.Err }

// roundTime keeps two or three digits.
func roundTime(d time.Duration) time.Duration {
	switch {
	case d >= time.Second:
		return d.Round(100 * time.Millisecond)
	case d >= time.Millisecond:
		return d.Round(time.Millisecond)
	default:
		return d.Round(time.Microsecond)
	}
}

// runner executes the plugins of one operation, one after another, for libcni. It
// implements invoke.Exec.
type runner struct {
	version.PluginDecoder
	netns  *os.File // where plugins run; nil: where the process does
	plugin string   // the one that libcni is at, "" before the first
	began  time.Time
}

var _ invoke.Exec = (*runner)(nil)

// fail gives err, which libcni returned, the plugin and the time.
func (r *runner) fail(verb string, err error) error {
	var failed *PluginError
	switch {
	case errors.As(err, &failed):
		return failed
	case r.plugin == "":
		return fmt.Errorf("CNI %s: %w", verb, err)
	}
	return &PluginError{Verb: verb, Plugin: r.plugin, Took: time.Since(r.began), Err: err}
}

// inner is what libcni wrapped into "plugin type=… failed (add)", which fail says better.
func inner(err error) error {
	if e := errors.Unwrap(err); e != nil {
		return e
	}
	return err
}

// FindInPath implements invoke.Exec. libcni asks it before each plugin.
func (r *runner) FindInPath(plugin string, dirs []string) (string, error) {
	r.plugin, r.began = plugin, time.Now()
	return findPlugin(plugin, dirs)
}

// findPlugin is the path of a plugin's program. A type that is no plain file name
// is refused: it would lead out of dirs (CVE-2021-20206).
func findPlugin(plugin string, dirs []string) (string, error) {
	if err := checkType(plugin); err != nil {
		return "", err
	}
	for _, dir := range dirs {
		path := filepath.Join(dir, plugin)
		if fi, err := os.Stat(path); err == nil && fi.Mode().IsRegular() {
			return path, nil
		}
	}
	return "", fmt.Errorf("no such program in %s", strings.Join(dirs, ", "))
}

// ExecPlugin implements invoke.Exec: it runs one plugin until it exits, ctx ends, or
// it prints too much. Whatever is left of its process group is then killed: a
// plugin that leaves a daemon behind must make it a session of its own, as
// daemon(3) does.
//
// The plugin dies with crispd (PR_SET_PDEATHSIG): an ADD that went on would
// compete with the DEL of the next crispd's recovery.
//
// Needs: root, as plugins do. Runs on: any goroutine; it is bound to its thread
// meanwhile, whose end the plugin would take for crispd's. Trust: plugins are the
// administrator's, and run with all our rights; their output is not trusted.
func (r *runner) ExecPlugin(ctx context.Context, path string, stdin []byte, env []string) ([]byte, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stdout, stderr := &output{full: cancel}, &output{full: cancel}
	cmd := exec.CommandContext(ctx, path)
	cmd.Env = slices.DeleteFunc(env, ours)
	cmd.Dir = "/"
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), stdout, stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	group := &group{}
	cmd.Cancel = func() error { return group.kill(cmd.Process.Pid) }
	cmd.WaitDelay = outputDelay
	err := netns.Do(r.netns, func() error {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := cmd.Start(); err != nil {
			return err
		}
		awaitExit(cmd.Process.Pid)
		group.end(cmd.Process.Pid)
		return cmd.Wait()
	})
	if len(stderr.text) > 0 {
		klog.FromContext(ctx).V(4).Info("CNI plugin wrote to stderr", "plugin", r.plugin, "stderr", quote(stderr.text))
	}
	if err == nil {
		if err = checkResult(stdout.text); err == nil {
			return stdout.text, nil
		}
		return nil, &PluginError{Verb: verbOf(env), Plugin: r.plugin, Took: time.Since(r.began), Err: err}
	}
	if cause := context.Cause(ctx); cause != nil {
		err = fmt.Errorf("killed: %w", cause)
	} else {
		err = diagnosis(err, stdout.text, stderr.text)
	}
	return nil, &PluginError{Verb: verbOf(env), Plugin: r.plugin, Took: time.Since(r.began), Err: err}
}

// checkResult refuses what libcni would trip over: it converts results without
// expecting null in their lists. What is no JSON is libcni's to refuse.
func checkResult(stdout []byte) error {
	var lists struct{ Interfaces, IPs, Routes []*json.RawMessage }
	if json.Unmarshal(stdout, &lists) != nil {
		return nil
	}
	for _, l := range [][]*json.RawMessage{lists.Interfaces, lists.IPs, lists.Routes} {
		if slices.Contains(l, nil) {
			return errors.New("unusable result: null in a list")
		}
	}
	return nil
}

// ours says whether an environment variable is systemd's to crispd: a plugin that
// uses it would speak for crispd.
func ours(variable string) bool {
	name, _, _ := strings.Cut(variable, "=")
	return name == "NOTIFY_SOCKET" || strings.HasPrefix(name, "WATCHDOG_") || strings.HasPrefix(name, "LISTEN_")
}

func verbOf(env []string) string {
	for _, v := range env {
		if verb, ok := strings.CutPrefix(v, "CNI_COMMAND="); ok {
			return verb
		}
	}
	return ""
}

// group is a plugin's process group, which is killed by its number: only as long as
// the plugin is not reaped, for until then nobody else can get that number.
type group struct {
	mu    sync.Mutex
	ended bool
}

func (g *group) kill(leader int) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ended {
		return os.ErrProcessDone
	}
	return unix.Kill(-leader, unix.SIGKILL) // a process group has no pidfd
}

// end kills what is left, before the leader is reaped.
func (g *group) end(leader int) {
	_ = g.kill(leader) // there is nothing to be done about who cannot be killed
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ended = true
}

// awaitExit waits for the end of a child without reaping it.
func awaitExit(pid int) {
	for {
		var info unix.Siginfo
		if err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOWAIT, nil); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// diagnosis is why a plugin failed: by its own words, where there are any.
func diagnosis(err error, stdout, stderr []byte) error {
	var said types.Error
	if json.Unmarshal(stdout, &said) == nil && (said.Msg != "" || said.Code != 0) {
		said.Msg, said.Details = shorten(said.Msg), shorten(said.Details)
		if said.Msg == "" {
			said.Msg = fmt.Sprintf("code %d", said.Code)
		}
		return &said
	}
	for _, text := range [][]byte{stderr, stdout} {
		if text = bytes.TrimSpace(text); len(text) > 0 {
			return fmt.Errorf("%w: %s", err, quote(text))
		}
	}
	return err
}

func shorten(s string) string {
	if len(s) <= maxQuote {
		return s
	}
	return strings.ToValidUTF8(s[:maxQuote], "") + "…"
}

func quote(b []byte) string { return fmt.Sprintf("%q", shorten(string(b))) }

// output keeps what a plugin prints, and says when it is too much. It is written by
// one goroutine, and read when that has ended. (A bytes.Buffer would let io.Copy go
// round Write.)
type output struct {
	text []byte
	full context.CancelCauseFunc
}

func (o *output) Write(b []byte) (int, error) {
	if len(o.text)+len(b) > maxOutput {
		o.full(ErrOutput)
		return 0, ErrOutput
	}
	o.text = append(o.text, b...)
	return len(b), nil
}

// checkType refuses a plugin type that is no plain file name.
func checkType(plugin string) error {
	if plugin == "" || plugin == "." || plugin == ".." || strings.ContainsAny(plugin, "/\\\x00") {
		return fmt.Errorf("%w: plugin type %q is no plain file name", network.ErrInvalid, shorten(plugin))
	}
	return nil
}

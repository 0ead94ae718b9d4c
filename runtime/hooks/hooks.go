// Package hooks runs hooks of the OCI runtime specification in the daemon's own
// namespaces, which the specification calls the runtime's: prestart, createRuntime, poststart and
// poststop. Those of the container's namespaces crisp-init runs.
//
// When they run package podsandbox knows. A hook is a program of the host that its
// administrator named, in a CDI file; no pod can name one.
package hooks

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// maxOutput bounds what is kept of a hook's output, for its error: the end of it.
const maxOutput = 1 << 10

// outputWait is how long output is waited for that others hold open when a hook has ended.
const outputWait = 100 * time.Millisecond

// Error is a hook that failed.
type Error struct {
	Kind string // "createRuntime"
	Path string
	// Err is *exec.ExitError, what exec.Command says of a program that cannot be run, or the end of its time: errTimeout, or the cause
	// of the context.
	Err    error
	Output string // the end of what it wrote
}

func (e *Error) Error() string {
	text := fmt.Sprintf("%s hook %s: %v", e.Kind, e.Path, e.Err)
	if e.Output != "" {
		text += fmt.Sprintf(", it said %q", e.Output)
	}
	return text
}

func (e *Error) Unwrap() error { return e.Err }

var errTimeout = errors.New("ended after its timeout")

// Run runs hooks in their order; the first that fails, with an *Error, ends it. Each gets state on stdin, its own environment and no other,
// and dir as working directory. When ctx or a hook's own time ends the hook is killed, with all of its process group.
//
// Needs: whatever the hooks do. Trust: the hooks are the administrator's.
func Run(ctx context.Context, kind string, list []specs.Hook, state *specs.State, dir string) error {
	if len(list) == 0 {
		return nil
	}
	text, err := json.Marshal(state)
	if err != nil {
		return err
	}
	for i := range list {
		if err := run(ctx, kind, &list[i], text, dir); err != nil {
			return err
		}
	}
	return nil
}

// RunAll is Run for hooks of which each is run whatever became of those before.
func RunAll(ctx context.Context, kind string, list []specs.Hook, state *specs.State, dir string) error {
	var errs []error
	for i := range list {
		errs = append(errs, Run(ctx, kind, list[i:i+1], state, dir))
	}
	return errors.Join(errs...)
}

func run(ctx context.Context, kind string, h *specs.Hook, state []byte, dir string) error {
	if h.Timeout != nil {
		var cancel context.CancelFunc
		limit := time.Duration(*h.Timeout) * time.Second
		ctx, cancel = context.WithTimeoutCause(ctx, limit, fmt.Errorf("%w of %v", errTimeout, limit))
		defer cancel()
	}
	cmd := exec.CommandContext(ctx, h.Path)
	if len(h.Args) > 0 {
		cmd.Args = h.Args
	}
	cmd.Env = append([]string{}, h.Env...) // not nil, which would be ours
	cmd.Dir = dir
	cmd.Stdin = bytes.NewReader(state)
	out := &tail{}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) } // before it is waited for: the pid is its own
	cmd.WaitDelay = outputWait
	err := cmd.Run()
	switch {
	case err == nil || errors.Is(err, exec.ErrWaitDelay): // it left somebody behind who holds its output
		return nil
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	}
	return &Error{Kind: kind, Path: h.Path, Err: err, Output: out.String()}
}

// tail keeps the end of what is written to it.
type tail struct {
	mu   sync.Mutex // with ErrWaitDelay a writer may be left
	kept []byte
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.kept = append(t.kept, b[max(0, len(b)-maxOutput):]...)
	t.kept = t.kept[max(0, len(t.kept)-maxOutput):]
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.kept))
}

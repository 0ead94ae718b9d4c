package hooks

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func sh(script string, env ...string) specs.Hook {
	return specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", script}, Env: env}
}

var state = &specs.State{Version: specs.Version, ID: "c1", Status: specs.StateCreating, Pid: 7, Bundle: "/b", Annotations: map[string]string{"k": "v"}}

func TestHooksRunInOrderWithTheState(t *testing.T) {
	t.Setenv("OURS", "secret")
	dir := t.TempDir()
	err := Run(t.Context(), "createRuntime", []specs.Hook{
		sh("cat > state; echo first > order; /usr/bin/env > env; pwd > cwd", "A=1"), sh("echo second >> order"),
	}, state, dir)
	if err != nil {
		t.Fatal(err)
	}
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if got := read("order"); got != "first\nsecond\n" {
		t.Errorf("order is %q", got)
	}
	if got := read("env"); !strings.Contains(got, "A=1\n") || strings.Contains(got, "OURS") {
		t.Errorf("environment is %q, want A=1 and nothing of ours", got)
	}
	if got := read("cwd"); got != dir+"\n" {
		t.Errorf("working directory is %q, want %s", got, dir)
	}
	var got specs.State
	if err := json.Unmarshal([]byte(read("state")), &got); err != nil || got.ID != "c1" || got.Pid != 7 || got.Status != specs.StateCreating || got.Bundle != "/b" || got.Annotations["k"] != "v" {
		t.Errorf("state is %+v (%v)", got, err)
	}
}

func TestFailingHookStopsTheRow(t *testing.T) {
	one := 1
	late := sh("echo slow; sleep 100 & sleep 100")
	late.Timeout = &one
	canceled, cancel := context.WithCancelCause(t.Context())
	why := errors.New("stopped")
	cancel(why)
	for _, tt := range []struct {
		name string
		ctx  context.Context
		hook specs.Hook
		want []string
		is   error
	}{
		{"exit status", t.Context(), sh("echo no such gpu >&2; exit 3"), []string{"poststart hook /bin/sh: exit status 3", "no such gpu"}, nil},
		{"not there", t.Context(), specs.Hook{Path: "/nothere"}, []string{"poststart hook /nothere: ", "no such file"}, os.ErrNotExist},
		{"timeout", t.Context(), late, []string{"timeout of 1s", "slow"}, errTimeout},
		{"canceled", canceled, sh("true"), []string{"stopped"}, why},
	} {
		t.Run(tt.name, func(t *testing.T) {
			marker := filepath.Join(t.TempDir(), "ran")
			err := Run(tt.ctx, "poststart", []specs.Hook{tt.hook, sh("touch " + marker)}, state, "/")
			var e *Error
			if !errors.As(err, &e) || tt.is != nil && !errors.Is(err, tt.is) {
				t.Fatalf("got %v, want an *Error that is %v", err, tt.is)
			}
			for _, text := range tt.want {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("got %q, want it to say %q", err, text)
				}
			}
			if _, err := os.Stat(marker); err == nil {
				t.Error("the next hook ran all the same")
			}
		})
	}
	var exit *exec.ExitError
	if err := Run(t.Context(), "x", []specs.Hook{sh("exit 3")}, state, "/"); !errors.As(err, &exit) {
		t.Errorf("got %v, want an *exec.ExitError", err)
	}
}

func TestAllPoststopHooksRun(t *testing.T) {
	marker := filepath.Join(t.TempDir(), "ran")
	err := RunAll(t.Context(), "poststop", []specs.Hook{sh("exit 1"), sh("touch " + marker), sh("exit 2")}, state, "/")
	if err == nil || !strings.Contains(err.Error(), "status 1") || !strings.Contains(err.Error(), "status 2") {
		t.Errorf("got %v, want both failures", err)
	}
	if _, err := os.Stat(marker); err != nil {
		t.Error("a failing hook kept the next from running")
	}
}

// A hook may leave a process behind that holds its output; it may print more than a pipe holds; and not read its state.
func TestHooksAreNotWaitedForLongerThanTheyLive(t *testing.T) {
	big := *state
	big.Annotations = map[string]string{"k": strings.Repeat("x", 1<<20)}
	for name, script := range map[string]string{
		"leaves a child": "sleep 3 & exit 0", "talks": "head -c 1000000 /dev/zero", "does not read": "exit 0",
	} {
		t.Run(name, func(t *testing.T) {
			if err := Run(t.Context(), "poststart", []specs.Hook{sh(script)}, &big, "/"); err != nil {
				t.Error(err)
			}
		})
	}
	err := Run(t.Context(), "poststart", []specs.Hook{sh("head -c 1000000 /dev/zero | tr '\\0' x; echo end; exit 1")}, state, "/")
	if err == nil || !strings.Contains(err.Error(), "end") || len(err.Error()) > 2*maxOutput {
		t.Errorf("got an error of %d bytes, want the end of the output", len(err.Error()))
	}
}

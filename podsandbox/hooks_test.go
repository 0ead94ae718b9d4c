package podsandbox

import (
	"context"
	"errors"
	"os/exec"
	"slices"
	"sync"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crisp-cri/crisp/runtime/hooks"
	"github.com/crisp-cri/crisp/runtime/spawn"
)

// withHooks is a container with one hook of each kind that this package runs; of createContainer's the init runs all.
func withHooks(name string) *ContainerConfig {
	cfg := containerConfig(name)
	one := func(kind string) []specs.Hook { return []specs.Hook{{Path: "/" + kind}} }
	cfg.Spec.Hooks = &specs.Hooks{
		Prestart: one("prestart"), CreateRuntime: one("createRuntime"), CreateContainer: one("createContainer"), //nolint:staticcheck // deprecated, and in use
		Poststart: one("poststart"), Poststop: one("poststop"),
	}
	return cfg
}

// ranHooks notes which hooks run, as operations of a world.
type ranHooks struct {
	mu    sync.Mutex
	kinds []string
	fail  string // the kind that fails
}

func (w *world) runHooks(ctx context.Context, kind string, list []specs.Hook, state *specs.State, dir string) error {
	if err := w.op(ctx, "hook."+kind); err != nil {
		return err
	}
	if state.ID == "" || state.Bundle != dir || list[0].Path != "/"+kind {
		w.t.Errorf("hook %s got state %+v in %s", kind, state, dir)
	}
	r := &w.ran
	r.mu.Lock()
	defer r.mu.Unlock()
	r.kinds = append(r.kinds, kind)
	if kind == r.fail {
		return &hooks.Error{Kind: kind, Path: list[0].Path, Err: new(exec.ExitError)}
	}
	return nil
}

func (r *ranHooks) list() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.kinds)
}

func TestHooksOfALife(t *testing.T) {
	for _, tt := range []struct {
		name, fail string
		want       []string
		reason     string
	}{
		{"all well", "", []string{"prestart", "createRuntime", "poststart", "poststop"}, reasonError},
		{"prestart", "prestart", []string{"prestart", "poststop"}, reasonStartError},
		{"createRuntime", "createRuntime", []string{"prestart", "createRuntime", "poststop"}, reasonStartError},
		{"poststart", "poststart", []string{"prestart", "createRuntime", "poststart", "poststop"}, reasonError},
		{"poststop", "poststop", []string{"prestart", "createRuntime", "poststart", "poststop"}, reasonError},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDaemon(t)
			defer d.close()
			ran := &d.ran
			ran.fail = tt.fail
			pod := d.run("a")
			id, err := d.CreateContainer(t.Context(), pod, withHooks("c"))
			if err != nil {
				t.Fatal(err)
			}
			if got := ran.list(); len(got) > 0 {
				t.Errorf("CreateContainer ran %q", got)
			}
			err = d.StartContainer(t.Context(), id)
			var start *spawn.StartError
			if failed := tt.fail != "" && tt.fail != "poststop"; failed != errors.As(err, &start) || failed != (err != nil) {
				t.Errorf("start: got %v", err)
			}
			if c := d.mustContainer(id); c.State == ContainerRunning {
				d.initOf(pod).exit(id, 137)
			}
			if c := d.ended(id); c.Reason != tt.reason {
				t.Errorf("got reason %q, want %q", c.Reason, tt.reason)
			}
			if err := d.RemoveContainer(t.Context(), id); err != nil {
				t.Error(err)
			}
			if got := ran.list(); !slices.Equal(got, tt.want) {
				t.Errorf("ran %q, want %q", got, tt.want)
			}
			d.removeAll()
		})
	}
}

// What was never started has no hooks to undo.
func TestNoHooksOfAContainerThatNeverStarted(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	ran := &d.ran
	if _, err := d.CreateContainer(t.Context(), d.run("a"), withHooks("c")); err != nil {
		t.Fatal(err)
	}
	d.removeAll()
	if got := ran.list(); len(got) > 0 {
		t.Errorf("ran %q", got)
	}
}

// Wherever the daemon dies: a container whose first hook has run gets its poststop hook, sooner or later.
func TestCrashInHooks(t *testing.T) {
	var pod, id string
	var started bool
	crashSweep(t, func(d *daemon) {
		id, started = "", false
		ctx := context.Background()
		var err error
		if pod, err = d.RunPod(ctx, podConfig("a")); err != nil {
			return
		}
		if id, err = d.CreateContainer(ctx, pod, withHooks("c")); err != nil {
			return
		}
		started = d.StartContainer(ctx, id) == nil
	}, func(d *daemon) {
		l := d.Containers()
		if started && (len(l) != 1 || l[0].State != ContainerRunning) {
			d.t.Errorf("got %+v, want it running", l)
		}
		for _, c := range l {
			if c.State == ContainerRunning {
				d.initOf(pod).exit(c.ID, 0)
				d.ended(c.ID)
			}
			if err := d.RemoveContainer(context.Background(), c.ID); err != nil {
				d.t.Error(err)
			}
		}
		kinds := d.ran.list()
		if slices.Contains(kinds, "prestart") && !slices.Contains(kinds, "poststop") {
			d.t.Errorf("ran %q, and never poststop", kinds)
		}
	})
}

package podsandbox

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/runtime/hooks"
	"github.com/crisp-cri/crisp/runtime/spawn"
)

// Hooks of the OCI runtime specification, which CDI files name. Its create has no counterpart here until the start: a
// created container has no process. So all hooks of a create run when StartContainer is called, in its order (runtime.md
// "Lifecycle"):
//
//	prestart, createRuntime   here, while the container's init waits before pivot_root(2)
//	createContainer           in the container's namespaces, by its init
//	startContainer            in the container, by its init
//	                          … the container's program runs
//	poststart                 here
//	poststop                  here, once its cgroup is gone, whether the start had succeeded or not
//
// A hook that fails ends the start, and the container (so does one of poststart: runtime.md of 1.3); only poststop's failures are just
// logged. Poststop hooks are owed from before the first other hook until they have run, on disk: a daemon that dies meanwhile
// leaves them to the next, so that they may run twice. A container that was never started owes none.

// prepare runs the hooks of a create. On error the container's init is dead, or will be as soon as its cgroup is killed.
func (m *Manager) prepare(ctx context.Context, op *operation, c *container, i PodInit) error {
	spec := c.now.Load().spec
	if !spawn.NeedsPrepare(spec) {
		return nil
	}
	config, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	var pid int
	err = op.step(ctx, "prepare for hooks", func(ctx context.Context) (err error) {
		pid, err = i.Prepare(ctx, c.id, config)
		return err
	})
	if err != nil {
		return err
	}
	err = m.runHooks(ctx, op, c, "prestart", spec.Hooks.Prestart, specs.StateCreating, pid) //nolint:staticcheck // deprecated, and in use
	if err == nil {
		err = m.runHooks(ctx, op, c, "createRuntime", spec.Hooks.CreateRuntime, specs.StateCreating, pid)
	}
	if err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.patience)
		defer cancel()
		return errors.Join(err, i.Abandon(ctx, c.id))
	}
	return nil
}

// runHooks runs hooks of one kind. The error is a *spawn.StartError.
func (m *Manager) runHooks(ctx context.Context, op *operation, c *container, kind string, list []specs.Hook, status specs.ContainerState, pid int) error {
	if len(list) == 0 {
		return nil
	}
	return op.step(ctx, kind+" hooks", func(ctx context.Context) error {
		dir := m.store.containerDir(c.pod.id, c.id)
		state := spawn.State(c.id, dir, c.now.Load().spec)
		state.Status, state.Pid = status, pid
		err := m.cfg.RunHooks(ctx, kind, list, state, dir)
		var failed *hooks.Error
		if errors.As(err, &failed) {
			return &spawn.StartError{Step: "run " + kind + " hook " + failed.Path, Err: err}
		}
		return err
	})
}

// oweHooks records that poststop hooks are to run.
func (m *Manager) oweHooks(c *container) error {
	now := c.now.Load()
	if now.spec.Hooks == nil || len(now.spec.Hooks.Poststop) == 0 || now.state.Poststop {
		return nil
	}
	s := now.state
	s.Poststop = true
	if err := m.store.appendState(m.store.containerDir(c.pod.id, c.id), &s); err != nil {
		return err
	}
	m.publishContainer(c, s, now.spec)
	return nil
}

// poststart runs the hooks of a container that runs; if one fails the container is killed.
func (m *Manager) poststart(ctx context.Context, op *operation, c *container, pid int) error {
	h := c.now.Load().spec.Hooks
	if h == nil || len(h.Poststart) == 0 {
		return nil
	}
	err := m.runHooks(ctx, op, c, "poststart", h.Poststart, specs.StateRunning, pid)
	if err == nil || errors.Is(context.Cause(ctx), ErrState) { // it is being stopped, and has its grace
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killLimit)
	defer cancel()
	return errors.Join(err, m.cgroupOf(c).Kill(ctx)) // its exit comes as any other
}

// poststop runs what is owed of a container that has ended. The caller holds the turn.
func (m *Manager) poststop(ctx context.Context, c *container) {
	now := c.now.Load()
	if !now.state.Poststop {
		return
	}
	log := klog.FromContext(ctx)
	ctx, cancel := context.WithTimeout(klog.NewContext(lifetime(m.closing), log), operationLimit)
	defer cancel()
	if now.spec != nil && now.spec.Hooks != nil {
		dir := m.store.containerDir(c.pod.id, c.id)
		state := spawn.State(c.id, dir, now.spec)
		state.Status = specs.StateStopped
		for _, h := range now.spec.Hooks.Poststop {
			err := m.cfg.RunHooks(ctx, "poststop", []specs.Hook{h}, state, dir)
			select {
			case <-m.closing: // the next daemon runs them
				return
			default:
			}
			if err != nil {
				log.Error(err, "Hook of an ended container failed, ignoring", "containerID", c.id)
			}
		}
	}
	m.noteContainer(ctx, c, func(s *containerState) { s.Poststop = false })
}

// poststopSoon is poststop, by itself: hooks can take long, and nobody who ends a container waits for them but
// its removal. The caller may hold the turn.
func (m *Manager) poststopSoon(ctx context.Context, c *container) {
	ctx = context.WithoutCancel(ctx)
	if now := c.now.Load(); !now.state.Poststop || now.state.Phase != containerExited {
		return
	}
	m.owned.Go(func() {
		limited, cancel := context.WithTimeout(lifetime(m.closing), operationLimit)
		defer cancel()
		if err := c.turn.take(limited); err != nil {
			return // who removes it runs them, or the next daemon
		}
		defer c.turn.pass()
		if c.phase() == containerExited {
			m.poststop(ctx, c)
		}
	})
}

// makeBundle makes what config.json calls root.path, for hooks.
func (c *container) makeBundle(dir string) error {
	if c.spec.Hooks == nil {
		return nil
	}
	return os.Mkdir(filepath.Join(dir, rootfsDir), 0o700)
}

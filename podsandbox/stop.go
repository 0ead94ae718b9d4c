package podsandbox

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/runtime/spawn"
)

// maxGrace keeps arithmetic with grace periods from overflowing.
const maxGrace = 365 * 24 * time.Hour

// stop is a container being stopped. Others may join it and shorten it.
type stop struct {
	*call[struct{}]
	sooner chan struct{} // killAt was moved; cap 1: a hint, not a count

	mu     sync.Mutex
	killAt time.Time // when the grace period ends
}

// shorten moves the kill to an earlier time.
func (s *stop) shorten(killAt time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if killAt.Before(s.killAt) {
		s.killAt = killAt
		select {
		case s.sooner <- struct{}{}:
		default:
		}
	}
}

func (s *stop) deadline() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.killAt
}

// StopContainer sends the stop signal, waits for grace at most, and kills what is left in
// the container's cgroup. With a grace of 0 it kills at once. It is idempotent; an unknown id is no error. A second call joins
// the first, and shortens it if its grace ends earlier.
func (m *Manager) StopContainer(ctx context.Context, id string, grace time.Duration) error {
	c, err := m.findContainer(id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return m.stopAndWait(ctx, c, grace, fromCaller)
}

func (m *Manager) stopAndWait(ctx context.Context, c *container, grace time.Duration, from origin) error {
	if c.phase().shown() == ContainerExited {
		return nil
	}
	s, err := m.stopCall(ctx, c, min(max(grace, 0), maxGrace), from)
	if err != nil {
		return err
	}
	_, err = s.wait(ctx)
	return err
}

func (m *Manager) stopCall(ctx context.Context, c *container, grace time.Duration, from origin) (*stop, error) {
	killAt := time.Now().Add(grace)
	m.mu.Lock()
	defer m.mu.Unlock()
	if c.stopping != nil {
		c.stopping.shorten(killAt)
		return c.stopping, nil
	}
	op := &operation{what: "stop container", object: c.object(), began: time.Now()}
	if err := m.refuses(); err != nil && from == fromCaller {
		return nil, op.fail(err)
	}
	if c.starting != nil && c.cancelStart != nil {
		c.cancelStart(fmt.Errorf("%w: the container is being stopped", ErrState))
	}
	s := &stop{call: newCall[struct{}](op), sooner: make(chan struct{}, 1), killAt: killAt}
	c.stopping = s
	m.registerLocked(op)
	m.owned.Go(func() {
		defer m.end(op)
		err := m.stop(context.WithoutCancel(ctx), op, c, s)
		m.mu.Lock()
		c.stopping = nil
		m.mu.Unlock()
		s.finish(struct{}{}, op.fail(err))
	})
	return s, nil
}

func (m *Manager) stop(ctx context.Context, op *operation, c *container, s *stop) error {
	runs, err := m.askToStop(ctx, op, c, s)
	if err != nil || !runs {
		return err
	}
	op.at("wait for the grace period")
	if ended, err := m.awaitEnd(c, s); err != nil || ended {
		return err
	}
	if err := op.step(ctx, "kill", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, killLimit)
		defer cancel()
		return m.cgroupOf(c).Kill(ctx)
	}); err != nil {
		return err // when it dies after all, its exit comes as any other
	}
	return op.step(ctx, "wait for the exit", func(ctx context.Context) error { return m.awaitExit(ctx, c) })
}

// askToStop sends the stop signal, once in the life of a container, and says whether there is something to wait for.
func (m *Manager) askToStop(ctx context.Context, op *operation, c *container, s *stop) (runs bool, err error) {
	op.at("wait for its turn")
	limited, cancel := context.WithTimeout(ctx, killLimit)
	defer cancel()
	if err := c.turn.take(limited); err != nil {
		return false, err
	}
	defer c.turn.pass()
	state := c.now.Load().state
	switch state.Phase {
	case containerCreated:
		return false, m.neverStart(ctx, c)
	case containerRunning:
	default:
		return false, nil
	}
	if !state.KillAt.IsZero() { // of a stop that a former daemon began, or of one that failed: no second signal
		s.shorten(state.KillAt)
		return true, nil
	}
	killAt := s.deadline()
	if !killAt.After(time.Now()) {
		return true, nil
	}
	m.noteContainer(ctx, c, func(s *containerState) { s.KillAt = killAt.Round(0) })
	sig, err := ParseSignal(c.rec.Config.StopSignal)
	if err != nil {
		sig = unix.SIGTERM // validated at the creation
	}
	i, err := c.pod.living()
	if err == nil {
		err = op.step(limited, "send "+unix.SignalName(sig), func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, m.patience)
			defer cancel()
			return i.Signal(ctx, c.id, sig)
		})
	}
	if err != nil && !errors.Is(err, spawn.ErrState) && !errors.Is(err, spawn.ErrNotFound) {
		// It did not get the signal; so it gets its grace for nothing, and is killed then.
		klog.FromContext(ctx).Error(err, "Could not send the stop signal, waiting to kill", "containerID", c.id)
	}
	return true, nil
}

// neverStart ends a created container: stopped, it must not start any more. The caller holds the turn.
func (m *Manager) neverStart(ctx context.Context, c *container) error {
	now := time.Now().Round(0)
	if err := m.changeContainer(ctx, c, containerExit, should, func(s *containerState) {
		s.ExitCode, s.Reason, s.Message, s.FinishedAt = codeUnknown, reasonNotStarted, "stopped before it was started", now
	}); err != nil {
		return err
	}
	m.afterExit(ctx, c)
	return nil
}

// noteContainer records a fact that does not change the phase. The caller holds the turn.
func (m *Manager) noteContainer(ctx context.Context, c *container, update func(*containerState)) {
	now := c.now.Load()
	s := now.state
	update(&s)
	if err := m.store.appendState(m.store.containerDir(c.pod.id, c.id), &s); err != nil {
		klog.FromContext(ctx).Error(err, "Could not record a fact about a container, going on", "containerID", c.id)
	}
	m.publishContainer(c, s, now.spec)
}

// awaitEnd waits for the exit until the grace period is over and says whether it came.
//
// Errors: ErrUnavailable when the daemon ends first: the next goes on.
func (m *Manager) awaitEnd(c *container, s *stop) (ended bool, err error) {
	for {
		timer := time.NewTimer(time.Until(s.deadline()))
		select {
		case <-c.ended:
			timer.Stop()
			return true, nil
		case <-s.sooner:
			timer.Stop()
		case <-m.closing:
			timer.Stop()
			return false, fmt.Errorf("%w: the daemon is stopping", ErrUnavailable)
		case <-timer.C:
			return false, nil
		}
	}
}

// awaitExit waits for the exit of a container whose processes are all dead. A pod init that
// does not report it is not waited for for long (C-55): what we did is known.
func (m *Manager) awaitExit(ctx context.Context, c *container) error {
	timer := time.NewTimer(m.patience)
	defer timer.Stop()
	select {
	case <-c.ended:
		return nil
	case <-m.closing:
		return fmt.Errorf("%w: the daemon is stopping", ErrUnavailable)
	case <-timer.C:
	}
	return m.lose(ctx, c, reasonInitDied, "killed; the pod's init did not say how it ended")
}

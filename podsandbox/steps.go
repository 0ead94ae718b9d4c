package podsandbox

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"
)

// step is one part of what a pod or a container is made of.
type step struct {
	name string
	do   func(ctx context.Context) error
	// undo takes it away. It is idempotent, works from the record alone whether or not do ever ran, and is given a
	// context that the caller of the operation cannot cancel.
	undo func(ctx context.Context) error
	// stays says that StopPod leaves it, so that the pod can be shown until RemovePod.
	stays bool
	// base says that what the steps after it made stands on it, or is found by it: it is undone when nothing of that is left.
	base bool
	// beside says that do runs on a goroutine of its own, beside the steps that follow, up to the first that is after it. It shares
	// nothing with them that either changes.
	beside bool
	after  string // name of a step that is beside
}

// Bounds of the implementation. They only keep what hangs from being kept for ever.
const (
	// operationLimit bounds the making of a pod or a container and the like. The kubelet waits for at most 4 minutes.
	operationLimit = 5 * time.Minute
	// undoLimit bounds one undo.
	undoLimit = 30 * time.Second
	// killLimit is how long killed processes may take to die.
	killLimit = 30 * time.Second
	// initLimit is how long a pod init may take to answer a small request (C-55).
	initLimit = 10 * time.Second
)

// A StepError says which step of which operation failed, and after how long.
type StepError struct {
	Step string
	Took time.Duration // of the step
	Err  error
}

func (e *StepError) Error() string {
	return fmt.Sprintf("step %s: %v (after %v)", e.Step, e.Err, e.Took.Round(time.Millisecond))
}

func (e *StepError) Unwrap() error { return e.Err }

// operation is something that is being done to a pod or a container.
type operation struct {
	what, object string // "run pod", "ns/name"
	began        time.Time
	current      atomic.Pointer[currentStep]
	timings      []Timing // of the steps done; owned by the goroutine that runs the operation
}

type currentStep struct {
	name  string
	since time.Time
}

// at notes that a step begins.
func (op *operation) at(name string) {
	op.current.Store(&currentStep{name: name, since: time.Now()})
}

// fail puts the operation's name before an error.
func (op *operation) fail(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("cannot %s %q: %w", op.what, op.object, err)
}

// where says what the operation is at, for those who stop waiting for it.
func (op *operation) where() string {
	s := op.current.Load()
	if s == nil {
		return fmt.Sprintf("not begun after %v", time.Since(op.began).Round(time.Millisecond))
	}
	return fmt.Sprintf("still at step %s after %v (%v in all)", s.name,
		time.Since(s.since).Round(time.Millisecond), time.Since(op.began).Round(time.Millisecond))
}

// run does the steps and stops at the first that fails; nothing of them runs any more when it returns. It undoes nothing.
func (op *operation) run(ctx context.Context, steps []step) (err error) {
	besides := map[string]chan ran{}
	var order []string // of besides, so that errors are joined and timings listed as the steps are
	join := func(name string) error {
		done := besides[name]
		if done == nil {
			return nil
		}
		op.at(name)
		r := <-done
		delete(besides, name)
		return op.note(r)
	}
	defer func() {
		for _, name := range order {
			err = errors.Join(err, join(name))
		}
	}()
	for _, s := range steps {
		switch {
		case s.do == nil:
			continue
		case s.after != "":
			if err := join(s.after); err != nil {
				return err
			}
		case s.beside:
			done := make(chan ran, 1)
			besides[s.name] = done
			order = append(order, s.name)
			go func() { done <- op.time(ctx, s.name, s.do) }() // join waits for it
			continue
		}
		if err := op.step(ctx, s.name, s.do); err != nil {
			return err
		}
	}
	return nil
}

// ran is a step that was done.
type ran struct {
	name string
	took time.Duration
	err  error // of do
}

// step runs one.
func (op *operation) step(ctx context.Context, name string, do func(context.Context) error) error {
	op.at(name)
	return op.note(op.time(ctx, name, do))
}

func (op *operation) note(r ran) error {
	if r.err != nil {
		return &StepError{Step: r.name, Took: r.took, Err: r.err}
	}
	op.timings = append(op.timings, Timing{Step: r.name, Duration: r.took})
	return nil
}

func (op *operation) time(ctx context.Context, name string, do func(context.Context) error) ran {
	began := time.Now()
	err := context.Cause(ctx)
	if err == nil {
		err = do(ctx)
	}
	took := time.Since(began)
	klog.FromContext(ctx).V(4).Info("Ran step", "operation", op.what, "object", op.object, "step", name, "duration", took, "err", err)
	return ran{name, took, err}
}

// undo undoes all steps that which selects, last first, whatever fails, and joins the errors. A base stays if anything failed.
// It is given time of its own.
func (op *operation) undo(ctx context.Context, steps []step, which func(step) bool) error {
	ctx = context.WithoutCancel(ctx)
	var errs []error
	for i := len(steps) - 1; i >= 0; i-- {
		s := steps[i]
		if s.undo == nil || !which(s) || s.base && len(errs) > 0 {
			continue
		}
		name := "undo " + s.name
		op.at(name)
		began := time.Now()
		ctx, cancel := context.WithTimeout(ctx, undoLimit)
		err := s.undo(ctx)
		cancel()
		took := time.Since(began)
		klog.FromContext(ctx).V(4).Info("Undid step", "operation", op.what, "object", op.object, "step", s.name, "duration", took, "err", err)
		if err != nil {
			errs = append(errs, &StepError{Step: name, Took: took, Err: err})
		}
	}
	return errors.Join(errs...)
}

func all(step) bool         { return true }
func whatStops(s step) bool { return !s.stays }
func whatStays(s step) bool { return s.stays }

// call is something that is done once while several may wait for it.
type call[T any] struct {
	op   *operation
	done chan struct{} // closed by finish
	// valid when done is closed
	value T
	err   error
}

func newCall[T any](op *operation) *call[T] { return &call[T]{op: op, done: make(chan struct{})} }

func (c *call[T]) finish(value T, err error) {
	c.value, c.err = value, err
	close(c.done)
}

// wait waits for the end of the call, or of ctx; the call goes on then.
func (c *call[T]) wait(ctx context.Context) (T, error) {
	select {
	case <-c.done:
		return c.value, c.err
	case <-ctx.Done():
		var none T
		return none, c.op.fail(fmt.Errorf("%s: %w", c.op.where(), context.Cause(ctx)))
	}
}

// turn is a lock that can be waited for with a context. Its holder may change the object and may do
// system calls meanwhile.
type turn chan struct{}

func newTurn() turn { return make(turn, 1) }

func (t turn) take(ctx context.Context) error {
	select {
	case t <- struct{}{}:
		return nil
	default:
	}
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("another operation on it does not end: %w", context.Cause(ctx))
	}
}

func (t turn) pass() { <-t }

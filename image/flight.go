package image

import (
	"context"
	"errors"
	"sync"
)

var errClosed = errors.New("the image store is closed")

// flights let callers that want the same thing share one doing of it. The doing
// has a context of its own: it goes on while anyone waits, and is cancelled when
// the last waiter has gone. The zero value is ready.
type flights struct {
	mu      sync.Mutex
	byKey   map[string]*flight
	settle  bool // the last waiter, having given up, waits until the doer has cleaned up; set before use
	closed  bool
	running sync.WaitGroup // the doers
}

type flight struct {
	done    chan struct{} // closed by the doer when value and err are set
	cancel  context.CancelCauseFunc
	waiters int // guarded by flights.mu
	value   string
	err     error
}

// do returns what f returns, called by this or by an earlier caller with the
// same key. led says that it was this one. ctx bounds the waiting.
func (g *flights) do(ctx context.Context, key string, f func(context.Context) (string, error)) (led bool, value string, err error) {
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return true, "", errClosed
	}
	if err := ctx.Err(); err != nil {
		g.mu.Unlock()
		return true, "", context.Cause(ctx)
	}
	fl, joined := g.byKey[key]
	if !joined {
		fl = &flight{done: make(chan struct{})}
		if g.byKey == nil {
			g.byKey = map[string]*flight{}
		}
		g.byKey[key] = fl
		var own context.Context
		own, fl.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
		g.running.Add(1) // the doer; close waits for it
		go func() {
			defer g.running.Done()
			fl.value, fl.err = f(own)
			fl.cancel(nil)
			g.mu.Lock()
			if g.byKey[key] == fl {
				delete(g.byKey, key)
			}
			g.mu.Unlock()
			close(fl.done)
		}()
	}
	fl.waiters++
	g.mu.Unlock()

	select {
	case <-fl.done:
		return !joined, fl.value, fl.err
	case <-ctx.Done():
	}
	g.mu.Lock()
	fl.waiters--
	last := fl.waiters == 0
	if last {
		fl.cancel(context.Cause(ctx))
		if g.byKey[key] == fl {
			delete(g.byKey, key) // nobody may join what is ending
		}
	}
	g.mu.Unlock()
	if last && g.settle {
		<-fl.done
	}
	return !joined, "", context.Cause(ctx)
}

// close cancels all doings and waits for them. Later calls of do fail.
func (g *flights) close() {
	g.mu.Lock()
	g.closed = true
	for _, fl := range g.byKey {
		fl.cancel(errClosed)
	}
	g.mu.Unlock()
	g.running.Wait()
}

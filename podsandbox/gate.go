package podsandbox

import (
	"context"
	"fmt"
	"sync"
)

// gate lets operations into a pod until it is closed: then those inside are cancelled, and waited for.
type gate struct {
	mu     sync.Mutex
	closed error // why; nil while open
	inside map[*operation]context.CancelCauseFunc
	empty  chan struct{} // closed when closed and nobody is inside; made by the first close
}

// enter lets op in. cancel must make it leave soon.
func (g *gate) enter(op *operation, cancel context.CancelCauseFunc) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed != nil {
		return g.closed
	}
	if g.inside == nil {
		g.inside = map[*operation]context.CancelCauseFunc{}
	}
	g.inside[op] = cancel
	return nil
}

func (g *gate) leave(op *operation) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.inside, op)
	if g.closed != nil && len(g.inside) == 0 {
		g.signalLocked()
	}
}

func (g *gate) signalLocked() {
	select {
	case <-g.empty:
	default:
		close(g.empty)
	}
}

// close refuses all from now on, and waits until nobody is inside. It can be called again.
func (g *gate) close(ctx context.Context, why error) error {
	g.mu.Lock()
	if g.closed == nil {
		g.closed = why
		g.empty = make(chan struct{})
	}
	var who string
	for op, cancel := range g.inside {
		cancel(why)
		who = fmt.Sprintf("%s %q", op.what, op.object)
	}
	if len(g.inside) == 0 {
		g.signalLocked()
	}
	empty := g.empty
	g.mu.Unlock()
	select {
	case <-empty:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s does not end: %w", who, context.Cause(ctx))
	}
}

package cgroup

import (
	"context"
	"strings"
	"sync"
)

// claims keep a cgroup from being removed while somebody waits for it to become empty.
//
// The kernel tells of "populated 0" up to 10 ms late (CGROUP_FILE_NOTIFY_MIN_INTV), by a timer that the cgroup's
// removal cancels, and removal itself wakes nobody who polls cgroup.events (kernfs): who waits would wait for ever. So
// Remove waits for a Kill of the same cgroup or one below it, and a Kill for a Remove of the same or one above it.
// Both are bounded by their contexts.
type claims struct {
	mu       sync.Mutex
	kills    map[string]int // by path
	removals map[string]int
	changed  chan struct{} // closed and replaced when something is released
}

func newClaims() *claims {
	return &claims{kills: map[string]int{}, removals: map[string]int{}, changed: make(chan struct{})}
}

// kill claims path for a Kill. On success the caller calls release.
func (c *claims) kill(ctx context.Context, path string) (release func(), err error) {
	return c.take(ctx, c.kills, path, func() bool {
		for removed := range c.removals {
			if below(path, removed) {
				return false
			}
		}
		return true
	})
}

// remove claims path for a Remove.
func (c *claims) remove(ctx context.Context, path string) (release func(), err error) {
	return c.take(ctx, c.removals, path, func() bool {
		for killed := range c.kills {
			if below(killed, path) {
				return false
			}
		}
		return true
	})
}

func (c *claims) take(ctx context.Context, held map[string]int, path string, free func() bool) (func(), error) {
	for {
		c.mu.Lock()
		if free() {
			held[path]++
			c.mu.Unlock()
			return func() { c.release(held, path) }, nil
		}
		changed := c.changed
		c.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (c *claims) release(held map[string]int, path string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if held[path]--; held[path] == 0 {
		delete(held, path)
	}
	close(c.changed)
	c.changed = make(chan struct{})
}

// below reports whether path is top or lies below it.
func below(path, top string) bool {
	return path == top || top == "/" || strings.HasPrefix(path, top+"/")
}

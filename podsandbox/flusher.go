package podsandbox

import (
	"errors"
	"io/fs"
	"sync"

	"k8s.io/klog/v2"
)

// flusher makes files durable in the background, in one goroutine, which Close waits for. On
// a slow disk what waits is merged: a file is synced once for all that was written to it.
type flusher struct {
	done chan struct{} // closed when the goroutine has ended

	mu      sync.Mutex
	wake    *sync.Cond
	closed  bool
	pending map[string]struct{}
	order   []string // of pending
}

func newFlusher() *flusher {
	f := &flusher{done: make(chan struct{}), pending: map[string]struct{}{}}
	f.wake = sync.NewCond(&f.mu)
	go f.run()
	return f
}

// later asks for files and directories to be made durable, in this order. A nil flusher does nothing.
func (f *flusher) later(paths ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range paths {
		if _, ok := f.pending[p]; !ok {
			f.pending[p] = struct{}{}
			f.order = append(f.order, p)
		}
	}
	f.wake.Signal()
}

func (f *flusher) run() {
	defer close(f.done)
	for {
		f.mu.Lock()
		for len(f.order) == 0 && !f.closed {
			f.wake.Wait()
		}
		todo := f.order
		f.order = nil
		clear(f.pending)
		closed := f.closed
		f.mu.Unlock()
		for _, p := range todo {
			// Gone meanwhile: then nobody needs it any more.
			if err := syncFile(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
				klog.Background().Error(err, "Could not make a record durable; a power cut now may lose it", "path", p)
			}
		}
		if closed && len(todo) == 0 {
			return
		}
	}
}

// close finishes what was asked for.
func (f *flusher) close() {
	f.mu.Lock()
	f.closed = true
	f.wake.Signal()
	f.mu.Unlock()
	<-f.done
}

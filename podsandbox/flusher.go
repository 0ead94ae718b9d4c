package podsandbox

import (
	"errors"
	"io/fs"
	"sync"
	"time"

	"k8s.io/klog/v2"
)

// flushDelay is how long what is written down may wait for its sync, and so how much a power cut may take. While a sync is
// under way whoever makes a file on that file system waits for it, and every pod makes a dozen: synced one by one, each step
// of a pod's start waited for the sync of the one before it. A second's worth is synced together.
const flushDelay = time.Second

// flusher makes files durable in the background, in one goroutine, which close waits for. A file is synced
// once for all that was written to it meanwhile.
type flusher struct {
	delay time.Duration
	sync  func(path string) error // syncFile, but in tests
	done  chan struct{}           // closed when the goroutine has ended

	mu      sync.Mutex
	wake    *sync.Cond
	closed  bool
	due     bool // what is pending is to be synced without further delay
	pending map[string]struct{}
	order   []string    // of pending
	timer   *time.Timer // of the last that found nothing waiting; nil before
}

func newFlusher(delay time.Duration, syncPath func(path string) error) *flusher {
	f := &flusher{delay: delay, sync: syncPath, done: make(chan struct{}), pending: map[string]struct{}{}}
	f.wake = sync.NewCond(&f.mu)
	go f.run()
	return f
}

// later asks for files and directories to be made durable, in this order, within the delay.
func (f *flusher) later(paths ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.order) == 0 {
		f.timer = time.AfterFunc(f.delay, func() { f.now() }) // finds less to do, or nothing, if somebody was in a hurry
	}
	f.addLocked(paths)
}

// now asks for files and directories to be made durable at once, after all that waits already.
func (f *flusher) now(paths ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.addLocked(paths)
	f.due = len(f.order) > 0
	f.wake.Signal()
}

func (f *flusher) addLocked(paths []string) {
	for _, p := range paths {
		if _, ok := f.pending[p]; !ok {
			f.pending[p] = struct{}{}
			f.order = append(f.order, p)
		}
	}
}

func (f *flusher) run() {
	defer close(f.done)
	for {
		f.mu.Lock()
		for !f.due && !f.closed {
			f.wake.Wait()
		}
		todo := f.order
		f.order, f.due = nil, false
		clear(f.pending)
		closed := f.closed
		f.mu.Unlock()
		for _, p := range todo {
			// Gone meanwhile: then nobody needs it any more.
			if err := f.sync(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
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
	if f.timer != nil {
		f.timer.Stop()
	}
	f.wake.Signal()
	f.mu.Unlock()
	<-f.done
}

package logs

import (
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// buffers are what copying needs while there is data. Their memory is mapped, not of
// Go's heap: pages are used only as far as data reached, and are given
// back by munmap without a collection.
type buffers struct {
	memory []byte
	in     []byte // readSize
	out    []byte // length 0, capacity outSize
}

// pool is shared by all streams of the process: at most maxBuffers exist.
type pool struct {
	mu    sync.Mutex
	freed sync.Cond // some came back, or new ones may be made
	exist int
	free  []*buffers
	used  bool        // since the janitor looked last
	armed bool        // the janitor will look
	timer *time.Timer // the janitor's, nil before the first use
}

var shared = newPool()

func newPool() *pool {
	p := &pool{}
	p.freed.L = &p.mu
	return p
}

// keepFor is how long unused buffers are kept: output comes in bursts.
const keepFor = time.Second

// get waits for buffers.
func (p *pool) get() (*buffers, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.free) == 0 && p.exist == maxBuffers {
		p.freed.Wait()
	}
	p.used = true
	if n := len(p.free); n > 0 {
		b := p.free[n-1]
		p.free = p.free[:n-1]
		return b, nil
	}
	m, err := unix.Mmap(-1, 0, readSize+outSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	p.exist++
	return &buffers{memory: m, in: m[:readSize:readSize], out: m[readSize:readSize]}, nil
}

// put gives buffers back.
func (p *pool) put(b *buffers) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free = append(p.free, b)
	p.freed.Signal()
	if p.armed {
		return
	}
	p.armed = true
	if p.timer == nil {
		p.timer = time.AfterFunc(keepFor, p.sweep)
		return
	}
	p.timer.Reset(keepFor)
}

// sweep is the janitor: it unmaps the free buffers once nobody used one for keepFor, and
// does not come again until there are some.
func (p *pool) sweep() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.used || len(p.free) < p.exist {
		p.used = false
		p.timer.Reset(keepFor)
		return
	}
	kept := p.free[:0]
	for _, b := range p.free {
		if unix.Munmap(b.memory) != nil {
			kept = append(kept, b)
		}
	}
	clear(p.free[len(kept):])
	p.free, p.exist, p.armed = kept, len(kept), false
	p.freed.Broadcast()
}

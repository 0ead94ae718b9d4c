package main

import (
	"os"
	"time"

	"github.com/crisp-cri/crisp/runtime/logs"
)

// drainTime is how long the end of a container waits for output of processes that outlived it. In
// a PID namespace of its own there are none: the kernel has killed them before we hear of the exit.
const drainTime = 100 * time.Millisecond

// copy logs one stream until its end. The goroutine belongs to the container: drain waits for it,
// closeIO ends it.
func (c *container) copy(src *os.File, stream logs.Stream) {
	c.outputs = append(c.outputs, src)
	c.copying.Add(1) // this stream's reader
	go func() {
		defer c.copying.Done()
		_ = c.sink.Copy(src, stream) // EOF, or closed under it; write errors are counted by the sink
	}()
}

// drain waits until all output of an ended container is in its log, or drainTime has passed because
// somebody else holds the pipe; what they write later is logged still.
func (c *container) drain() {
	all := make(chan struct{})
	go func() {
		c.copying.Wait()
		close(all)
	}()
	t := time.NewTimer(drainTime)
	defer t.Stop()
	select {
	case <-all:
	case <-t.C:
	}
}

// closeIO ends the copying and closes everything.
func (c *container) closeIO() {
	for _, f := range append(c.outputs, c.stdin) {
		if f != nil {
			_ = f.Close() // read ends, or a stdin nobody reads
		}
	}
	c.copying.Wait()
	_ = c.sink.Close() // its last error was counted
}

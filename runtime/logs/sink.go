package logs

import (
	"bytes"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Sink is the log of one container. It owns the file. Safe for concurrent use: one Copy per
// stream, and Swap, Attach, Stats at any time.
type Sink struct {
	// mu is held while one batch is written, so a disk that hangs (not one that fails) holds up
	// both streams and Swap, and nothing but this container.
	mu   sync.Mutex
	file *os.File // nil: output is read and forgotten
	torn bool     // the file ends within a record, which could not be cut off
	taps []Tap

	written, lines, dropped atomic.Uint64
	errno                   atomic.Uint32

	// The kernel's edge, replaced by tests.
	now      func() time.Time
	write    func(fd int, p []byte) (int, error)
	truncate func(fd int, size int64) error
}

// Stats counts since the sink was made.
type Stats struct {
	Bytes   uint64 // bytes written to log files, framing included
	Lines   uint64 // full lines among them
	Dropped uint64 // bytes of the container that could not be written, newlines included
	// LastError is of the last write that failed, 0: none ever did. Writes may work again since.
	LastError unix.Errno
}

// Tap gets what the container prints, as it was read.
type Tap interface {
	// Chunk is called with the sink locked: it must not block for long and must not keep
	// data. If it returns false the tap is detached: too slow, or gone.
	Chunk(stream Stream, data []byte) (keep bool)
}

// NewSink returns a sink that appends to file and owns it from now on; it must be open with O_APPEND. With nil
// everything is read and forgotten.
func NewSink(file *os.File) *Sink {
	return &Sink{file: file, now: time.Now, write: unix.Write, truncate: unix.Ftruncate}
}

// Swap continues in file, which it owns from now on, and closes the old one: when it returns, no byte
// goes there any more. The error is of that close; the new file is in use anyway.
func (s *Sink) Swap(file *os.File) error {
	s.mu.Lock()
	old := s.file
	s.file, s.torn = file, false
	s.mu.Unlock()
	if old == nil {
		return nil
	}
	return old.Close()
}

// Close closes the file. What is read from now on is forgotten.
func (s *Sink) Close() error { return s.Swap(nil) }

// Attach lets w see everything that is read from now on.
func (s *Sink) Attach(w Tap) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taps = append(s.taps, w)
}

// Detach undoes Attach: when it returns, w is not called any more.
func (s *Sink) Detach(w Tap) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keepTaps(func(t Tap) bool { return t != w })
}

func (s *Sink) keepTaps(keep func(Tap) bool) {
	kept := s.taps[:0]
	for _, t := range s.taps {
		if keep(t) {
			kept = append(kept, t)
		}
	}
	clear(s.taps[len(kept):])
	s.taps = kept
}

// Stats never waits for a write.
func (s *Sink) Stats() Stats {
	return Stats{
		Bytes: s.written.Load(), Lines: s.lines.Load(), Dropped: s.dropped.Load(),
		LastError: unix.Errno(s.errno.Load()),
	}
}

// source starts a stream.
func (s *Sink) source(stream Stream) *source {
	c := &source{stream: stream}
	c.flush = func(records []byte) []byte {
		s.flush(c, records)
		return records[:0]
	}
	return c
}

// take logs what was just read of a stream, using the free memory of out.
func (s *Sink) take(c *source, data, out []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.taps) > 0 {
		s.keepTaps(func(t Tap) bool { return t.Chunk(c.stream, data) })
	}
	if s.file == nil {
		c.pending = c.pending[:0]
		return
	}
	c.stamp(s.now())
	s.flush(c, c.frame(out, data))
}

// end logs the unfinished line of a stream that ended.
func (s *Sink) end(c *source) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file == nil || len(c.pending) == 0 {
		return
	}
	c.stamp(s.now())
	out := make([]byte, 0, prefixLen+len(c.pending)+1)
	s.flush(c, c.record(out, tagPartial, nil))
	c.pending = nil
}

// flush writes whole records of one stream, or counts what could not be written.
func (s *Sink) flush(c *source, records []byte) {
	lines := c.lines
	c.lines = 0
	if len(records) == 0 {
		return
	}
	if c.open && c.lost {
		if e := c.emptyRecord(); s.append(e) == len(e) {
			c.open = false
		} else {
			_, lost := content(records)
			s.dropped.Add(lost)
			return
		}
	}
	n := s.append(records)
	if n > 0 {
		c.open, c.lost = endsOpen(records[:n]), false
	}
	if n < len(records) {
		lines, _ = content(records[:n])
		_, lost := content(records[n:])
		s.dropped.Add(lost)
		c.lost = true
	}
	s.lines.Add(lines)
}

// append writes records as far as the file takes them and returns how much of them
// is whole in it. When it cannot write all, it cuts off the record that was begun.
func (s *Sink) append(records []byte) int {
	fd := int(s.file.Fd())
	if s.torn {
		if n, err := s.writeAll(fd, []byte{'\n'}); n == 0 {
			s.errno.Store(uint32(err))
			return 0
		}
		s.torn = false
	}
	n, err := s.writeAll(fd, records)
	if err != 0 {
		s.errno.Store(uint32(err))
		if whole := bytes.LastIndexByte(records[:n], '\n') + 1; whole < n {
			s.torn = !s.cut(fd, int64(n-whole))
			n = whole
		}
	}
	s.written.Add(uint64(n))
	return n
}

// cut takes n bytes off the end of the file. That works on a full disk.
func (s *Sink) cut(fd int, n int64) bool {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Size < n {
		return false
	}
	return s.truncate(fd, st.Size-n) == nil
}

// writeAll writes p until an error. The disk may take a part of a write before it is full.
func (s *Sink) writeAll(fd int, p []byte) (done int, errno unix.Errno) {
	for done < len(p) {
		n, err := s.write(fd, p[done:])
		switch {
		case n > 0:
			done += n
		case err == unix.EINTR:
		case err == nil:
			return done, unix.EIO // write(2) of something returns 0 for no file we know
		default:
			errno, ok := err.(unix.Errno)
			if !ok {
				errno = unix.EIO
			}
			return done, errno
		}
	}
	return done, 0
}

package logs

import (
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Copy logs src, the read end of a non-blocking pipe or the master of a terminal, until its end and
// returns nil then. It holds no buffer while src is silent.
//
// It ends early with an error when src is closed, or when src's read deadline passes
// (os.ErrDeadlineExceeded): a process that outlived its container may keep the pipe open for ever.
// What lay in the pipe at the deadline is logged still. Every end logs what is left of an unfinished line.
//
// Write errors end nothing; see [Sink.Stats].
func (s *Sink) Copy(src *os.File, stream Stream) error {
	conn, err := src.SyscallConn()
	if err != nil {
		return err
	}
	r := reader{sink: s, source: s.source(stream)}
	burst := r.burst // one closure, not one for each wait
	for r.end == nil && err == nil {
		err = conn.Read(burst)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		if cerr := conn.Control(func(fd uintptr) { r.burst(fd) }); cerr != nil {
			err = cerr
		}
	}
	s.end(r.source)
	if r.end == io.EOF {
		return nil
	}
	return errors.Join(r.end, err)
}

// reader empties one stream into the sink.
type reader struct {
	sink   *Sink
	source *source
	end    error // io.EOF, or of read(2)
}

// burst reads until there is nothing to read or the stream has had its share. It returns false to be called again
// when there is more: only after EAGAIN, for an end of file is announced once.
func (r *reader) burst(fd uintptr) (done bool) {
	b, err := shared.get()
	if err != nil {
		r.end = err
		return true
	}
	defer shared.put(b)
	for range burstReads {
		n, err := unix.Read(int(fd), b.in)
		switch {
		case n > 0:
			r.sink.take(r.source, b.in[:n], b.out)
		case err == unix.EAGAIN:
			return false
		case err == unix.EINTR:
		case n == 0, err == unix.EIO: // EIO: a terminal that nobody has open any more
			r.end = io.EOF
			return true
		default:
			r.end = os.NewSyscallError("read", err)
			return true
		}
	}
	return true
}

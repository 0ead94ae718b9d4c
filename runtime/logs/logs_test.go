package logs

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "write the golden files anew")

// clock counts milliseconds from a fixed time whose nanoseconds end in zeros.
func clock() func() time.Time {
	t := time.Date(2026, 2, 3, 4, 5, 6, 120_000_000, time.FixedZone("", 3600))
	return func() time.Time {
		t = t.Add(time.Millisecond)
		return t
	}
}

func openLog(t testing.TB, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func newLog(t testing.TB) (*Sink, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "0.log")
	s := NewSink(openLog(t, path))
	s.now = clock()
	t.Cleanup(func() { s.Close() })
	return s, path
}

func contentOf(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func outBuffer() []byte { return make([]byte, 0, outSize) }

// record is one parsed line of a log.
type record struct {
	stream, tag, content string
}

// parse reads a log as the kubelet does (cri-client/pkg/logs parseCRILog), but refuses what it would skip.
func parse(log string) ([]record, error) {
	var l []record
	for len(log) > 0 {
		line, rest, found := strings.Cut(log, "\n")
		log = rest
		if !found {
			return l, fmt.Errorf("no newline at the end: %.60q", line)
		}
		parts := strings.SplitN(line, " ", 4)
		if len(parts) != 4 || len(parts[0]) != len(timeFormat) {
			return l, fmt.Errorf("torn record %.60q", line)
		}
		if _, err := time.Parse(timeFormat, parts[0]); err != nil {
			return l, err
		}
		if parts[1] != "stdout" && parts[1] != "stderr" || parts[2] != "F" && parts[2] != "P" {
			return l, fmt.Errorf("bad stream or tag in %.60q", line)
		}
		if len(parts[3]) > MaxContent {
			return l, fmt.Errorf("record of %d bytes", len(parts[3]))
		}
		l = append(l, record{parts[1], parts[2], parts[3]})
	}
	return l, nil
}

// join undoes the framing of one stream.
func join(records []record, stream string) string {
	var b strings.Builder
	for _, r := range records {
		if r.stream != stream {
			continue
		}
		b.WriteString(r.content)
		if r.tag == "F" {
			b.WriteByte('\n')
		}
	}
	return b.String()
}

func mustParse(t testing.TB, log string) []record {
	t.Helper()
	r, err := parse(log)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestGolden(t *testing.T) {
	long := strings.Repeat("0123456789abcdef", MaxContent/16)
	tests := []struct {
		name   string
		chunks []string // "2" in front: stderr
	}{
		{"lines", []string{"1hello\nworld\n", "2oops\n", "1again\n"}},
		{"empty lines", []string{"1\n\n \n"}},
		{"line in pieces", []string{"1he", "1l", "1lo\nwo", "1rld\n"}},
		{"streams do not mix within a line", []string{"1out", "2err", "1put\n", "2or\n"}},
		{"bytes unchanged", []string{"1\x00\xff\r\n\t\u202e \n"}},
		{"unfinished at the end", []string{"1prompt> ", "2half"}},
		{"exactly one part", []string{"1" + long + "\n"}},
		{"one part and one byte", []string{"1" + long + "x\n"}},
		{"two parts exactly", []string{"1" + long + long + "\n"}},
		{"full part at the end", []string{"1" + long}},
		{"long line in pieces", []string{"1" + long[:10000], "1" + long[:10000], "1" + long[:14000] + "\nnext\n"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, path := newLog(t)
			streams := []*source{s.source(Stdout), s.source(Stderr)}
			for _, c := range tt.chunks {
				s.take(streams[c[0]-'1'], []byte(c[1:]), outBuffer())
			}
			s.end(streams[0])
			s.end(streams[1])
			got := contentOf(t, path)
			mustParse(t, got)
			if st := s.Stats(); st.Bytes != uint64(len(got)) || st.Dropped != 0 || st.LastError != 0 {
				t.Errorf("got %+v, want %d bytes", st, len(got))
			}
			got = strings.ReplaceAll(got, long, "<16KiB>") // readable golden files
			file := filepath.Join("testdata", strings.ReplaceAll(tt.name, " ", "-")+".log")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if want := contentOf(t, file); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// pipeTo starts a Copy from a pipe; done gives its result.
func pipeTo(t testing.TB, s *Sink, stream Stream) (w *os.File, r *os.File, done chan error) {
	t.Helper()
	r, w, err := os.Pipe() // non-blocking, as crisp-init makes them
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	done = make(chan error, 1)
	go func() { done <- s.Copy(r, stream) }()
	return w, r, done
}

func TestCopyBothStreams(t *testing.T) {
	s, path := newLog(t)
	var input [2]bytes.Buffer
	for i := range input {
		for n := range 20000 {
			fmt.Fprintf(&input[i], "%d %s\n", n, strings.Repeat("x", n%300))
		}
		input[i].WriteString(strings.Repeat("y", 3*MaxContent+i) + "\nend")
	}
	var writers sync.WaitGroup
	var dones []chan error
	for i := range input {
		w, _, done := pipeTo(t, s, Stream(i))
		dones = append(dones, done)
		writers.Go(func() {
			if _, err := io.Copy(struct{ io.Writer }{w}, bytes.NewReader(input[i].Bytes())); err != nil {
				t.Error(err)
			}
			w.Close()
		})
	}
	writers.Wait()
	for _, done := range dones {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	records := mustParse(t, contentOf(t, path))
	for i := range input {
		if got := join(records, Stream(i).String()); got != input[i].String() {
			t.Errorf("%v: got %d bytes, want the %d that went in", Stream(i), len(got), input[i].Len())
		}
	}
	if st := s.Stats(); st.Lines != 2*20001 {
		t.Errorf("got %d lines, want %d", st.Lines, 2*20001)
	}
}

func TestTimesDoNotGoBack(t *testing.T) {
	s, path := newLog(t)
	a, b := s.source(Stdout), s.source(Stderr)
	for range 100 {
		s.take(a, []byte("a\n"), outBuffer())
		s.take(b, []byte("b\n"), outBuffer())
	}
	var times []string
	for line := range strings.Lines(contentOf(t, path)) {
		times = append(times, line[:len(timeFormat)])
	}
	if len(times) != 200 || !slices.IsSorted(times) {
		t.Errorf("got %d times, sorted %v", len(times), slices.IsSorted(times))
	}
}

// A process that outlives its container keeps the pipe open.
func TestCopyStopsAtDeadline(t *testing.T) {
	s, path := newLog(t)
	w, r, done := pipeTo(t, s, Stdout)
	if _, err := w.WriteString("last words\nand half"); err != nil {
		t.Fatal(err)
	}
	if err := r.SetReadDeadline(time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v, want os.ErrDeadlineExceeded", err)
	}
	if got := join(mustParse(t, contentOf(t, path)), "stdout"); got != "last words\nand half" {
		t.Errorf("got %q", got)
	}
}

// A stream that never pauses is stopped as well.
func TestCopyStopsUnderFire(t *testing.T) {
	s, _ := newLog(t)
	s.Close() // read and forget: fast
	w, r, done := pipeTo(t, s, Stdout)
	var writer sync.WaitGroup
	writer.Go(func() {
		for b := make([]byte, 32<<10); ; {
			if _, err := w.Write(b); err != nil {
				return
			}
		}
	})
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil {
		t.Error("got no error, want one that says closed")
	}
	writer.Wait()
}

func TestTerminal(t *testing.T) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	conn, err := master.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var peer int
	if err := conn.Control(func(fd uintptr) {
		var n int
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err != nil {
			return
		}
		n, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		if err == nil {
			peer, err = unix.Open(fmt.Sprintf("/dev/pts/%d", n), unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	s, path := newLog(t)
	done := make(chan error, 1)
	go func() { done <- s.Copy(master, Stdout) }()
	if _, err := unix.Write(peer, []byte("on a terminal\n$ ")); err != nil {
		t.Fatal(err)
	}
	unix.Close(peer)
	if err := <-done; err != nil {
		t.Errorf("got %v, want nil: EIO is the end of a terminal", err)
	}
	if got := join(mustParse(t, contentOf(t, path)), "stdout"); got != "on a terminal\r\n$ " {
		t.Errorf("got %q", got)
	}
}

// C-62: rotation at full speed loses and doubles nothing.
func TestSwapWhilePrinting(t *testing.T) {
	dir := t.TempDir()
	name := func(i int) string { return filepath.Join(dir, fmt.Sprintf("%03d.log", i)) }
	s := NewSink(openLog(t, name(0)))
	w, _, done := pipeTo(t, s, Stdout)
	const lines = 200000
	var writer sync.WaitGroup
	writer.Go(func() {
		defer w.Close()
		var b []byte
		for i := range lines {
			b = fmt.Appendf(b, "%d\n", i)
			if len(b) > 5000 || i == lines-1 {
				if _, err := w.Write(b); err != nil {
					t.Error(err)
				}
				b = b[:0]
			}
		}
	})
	const files = 100
	for i := 1; i < files; i++ {
		if err := s.Swap(openLog(t, name(i))); err != nil {
			t.Fatal(err)
		}
		before := contentOf(t, name(i-1))
		defer func() {
			if after := contentOf(t, name(i-1)); after != before {
				t.Errorf("file %d grew by %d bytes after the swap", i-1, len(after)-len(before))
			}
		}()
	}
	writer.Wait()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	n := 0
	for i := range files {
		for _, r := range mustParse(t, contentOf(t, name(i))) {
			if want := fmt.Sprint(n); r.tag != "F" || r.content != want {
				t.Fatalf("file %d: got %+v, want line %s", i, r, want)
			}
			n++
		}
	}
	if n != lines {
		t.Errorf("got %d lines, want %d", n, lines)
	}
}

// disk is a fake of write(2) and ftruncate(2) over a real file.
type disk struct {
	room     int        // bytes until full, -1: endless
	errno    unix.Errno // when full
	truncate error
	chunk    int // most bytes of one write, 0: all
}

func (d *disk) write(fd int, p []byte) (int, error) {
	if d.chunk > 0 && len(p) > d.chunk {
		p = p[:d.chunk]
	}
	if d.room >= 0 {
		if d.room == 0 {
			return -1, d.errno
		}
		p = p[:min(len(p), d.room)]
		d.room -= len(p)
	}
	return unix.Write(fd, p)
}

func (d *disk) ftruncate(fd int, size int64) error {
	if d.truncate != nil {
		return d.truncate
	}
	return unix.Ftruncate(fd, size)
}

func (d *disk) under(s *Sink) { s.write, s.truncate = d.write, d.ftruncate }

// C-23, C-24: for every number of bytes that fit on the disk, and every way it fails, the file is whole
// records, what is in it is a prefix of what was printed then, the rest is counted, and logging resumes.
func TestFullDisk(t *testing.T) {
	const before = "first\nsecond line\n\nthe fourth\n"
	for _, errno := range []unix.Errno{unix.ENOSPC, unix.EIO, unix.EDQUOT, unix.EFBIG, unix.EROFS, unix.EBADF} {
		for room := range 200 {
			s, path := newLog(t)
			d := &disk{room: room, errno: errno}
			d.under(s)
			c := s.source(Stdout)
			s.take(c, []byte(before), outBuffer())
			got := mustParse(t, contentOf(t, path))
			st := s.Stats()
			text := join(got, "stdout")
			if text != before[:len(text)] || st.Dropped != uint64(len(before)-len(text)) {
				t.Fatalf("%v after %d bytes: got %q and %+v", errno, room, text, st)
			}
			if st.Lines != uint64(len(got)) || st.Bytes != uint64(len(contentOf(t, path))) {
				t.Fatalf("%v after %d bytes: got %+v, want %d lines in %d bytes", errno, room, st, len(got), len(contentOf(t, path)))
			}
			if st.Dropped > 0 && st.LastError != errno {
				t.Fatalf("got last error %v, want %v", st.LastError, errno)
			}
			if rest, _, found := strings.Cut(before[len(text):], "\n"); found && int(st.Bytes)+prefixLen+len(rest)+1 <= room {
				t.Fatalf("%v after %d bytes: got %q, and there was room for %q", errno, room, text, rest)
			}
			d.room = -1
			s.take(c, []byte("after\n"), outBuffer())
			if all := mustParse(t, contentOf(t, path)); len(all) != len(got)+1 || all[len(got)] != (record{"stdout", "F", "after"}) {
				t.Fatalf("%v after %d bytes: got %v after it worked again", errno, room, all)
			}
			s.Close()
		}
	}
}

// A disk so broken that the torn record can't even be cut off: it is ended at least, and what follows is whole.
func TestTornRecordIsEnded(t *testing.T) {
	for room := 1; room < 60; room++ {
		s, path := newLog(t)
		d := &disk{room: room, errno: unix.EIO, truncate: unix.EIO}
		d.under(s)
		c := s.source(Stdout)
		s.take(c, []byte("0123456789abcdef\n"), outBuffer())
		d.room = -1
		s.take(c, []byte("after\n"), outBuffer())
		log := contentOf(t, path)
		i := strings.IndexByte(log, '\n')
		last := mustParse(t, log[i+1:])
		if want := (record{"stdout", "F", "after"}); len(last) == 0 || last[len(last)-1] != want || len(last) > 2 {
			t.Errorf("room for %d bytes: got %q", room, log)
		}
		s.Close()
	}
}

// What was torn in one file does not concern the next.
func TestSwapAfterTornRecord(t *testing.T) {
	s, _ := newLog(t)
	d := &disk{room: 10, errno: unix.EIO, truncate: unix.EIO}
	d.under(s)
	c := s.source(Stdout)
	s.take(c, []byte("torn\n"), outBuffer())
	next := filepath.Join(t.TempDir(), "1.log")
	if err := s.Swap(openLog(t, next)); err != nil {
		t.Fatal(err)
	}
	d.room = -1
	s.take(c, []byte("whole\n"), outBuffer())
	if got, want := mustParse(t, contentOf(t, next)), []record{{"stdout", "F", "whole"}}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// A line that lost a part must not be joined with the next one by who reads the log.
func TestLineWithLostPartEnds(t *testing.T) {
	long := strings.Repeat("x", MaxContent)
	s, path := newLog(t)
	d := &disk{room: -1, errno: unix.ENOSPC}
	d.under(s)
	c := s.source(Stdout)
	s.take(c, []byte(long+"x"), outBuffer()) // P in the file
	d.room = 0
	s.take(c, []byte("yyy\n"), outBuffer()) // its end is lost
	d.room = -1
	s.take(c, []byte("next\n"), outBuffer())
	got := mustParse(t, contentOf(t, path))
	want := []record{{"stdout", "P", long}, {"stdout", "F", ""}, {"stdout", "F", "next"}}
	if !slices.Equal(got, want) {
		t.Errorf("got %d records, want P, an empty F, next: %.100v", len(got), got[min(1, len(got)):])
	}
	if st := s.Stats(); st.Dropped != uint64(len("xyyy\n")) {
		t.Errorf("got %d dropped, want %d", st.Dropped, len("xyyy\n"))
	}
}

// The kernel may take less than it was given, and interrupt.
func TestShortWrites(t *testing.T) {
	s, path := newLog(t)
	d := &disk{room: -1, chunk: 7}
	d.under(s)
	write := s.write
	n := 0
	s.write = func(fd int, p []byte) (int, error) {
		if n++; n%3 == 0 {
			return -1, unix.EINTR
		}
		return write(fd, p)
	}
	const text = "one\ntwo\nthree\n"
	s.take(s.source(Stdout), []byte(text), outBuffer())
	if got := join(mustParse(t, contentOf(t, path)), "stdout"); got != text {
		t.Errorf("got %q", got)
	}
}

// The real thing, without root: /dev/full.
func TestDevFull(t *testing.T) {
	f, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := NewSink(f)
	defer s.Close()
	w, _, done := pipeTo(t, s, Stdout)
	data := bytes.Repeat([]byte("0123456789abcde\n"), 64<<10) // more than a pipe holds
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got, want := s.Stats(), (Stats{Dropped: uint64(len(data)), LastError: unix.ENOSPC}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestNoFile(t *testing.T) {
	s := NewSink(nil)
	w, _, done := pipeTo(t, s, Stdout)
	if _, err := w.WriteString("nobody reads this\n"); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got := s.Stats(); got != (Stats{}) {
		t.Errorf("got %+v, want zeros", got)
	}
}

// tap keeps what it gets, as long as it has room.
type tap struct {
	got  []string
	room int
}

func (p *tap) Chunk(s Stream, data []byte) bool {
	if p.room == 0 {
		return false
	}
	p.room--
	p.got = append(p.got, s.String()+":"+string(data))
	return true
}

func TestTaps(t *testing.T) {
	s, path := newLog(t)
	c := s.source(Stderr)
	a, slow := &tap{room: 10}, &tap{room: 1}
	s.Attach(a)
	s.Attach(slow)
	s.take(c, []byte("one"), outBuffer())
	s.take(c, []byte("\ntwo\n"), outBuffer())
	slow.room = 10
	s.take(c, []byte("three\n"), outBuffer())
	s.Detach(a)
	s.take(c, []byte("four\n"), outBuffer())
	if want := []string{"stderr:one", "stderr:\ntwo\n", "stderr:three\n"}; !slices.Equal(a.got, want) {
		t.Errorf("got %q, want %q", a.got, want)
	}
	if want := []string{"stderr:one"}; !slices.Equal(slow.got, want) {
		t.Errorf("slow tap: got %q, want %q", slow.got, want)
	}
	if got := join(mustParse(t, contentOf(t, path)), "stderr"); got != "one\ntwo\nthree\nfour\n" {
		t.Errorf("got %q", got)
	}
}

func TestBuffersAreSharedAndGivenBack(t *testing.T) {
	p := newPool()
	var l []*buffers
	for range maxBuffers {
		b, err := p.get()
		if err != nil {
			t.Fatal(err)
		}
		l = append(l, b)
	}
	fifth := make(chan *buffers)
	go func() {
		b, err := p.get()
		if err != nil {
			t.Error(err)
		}
		fifth <- b
	}()
	p.put(l[0])
	if got := <-fifth; got != l[0] {
		t.Error("the fifth did not get what was put back")
	}
	for _, b := range l {
		p.put(b)
	}
	p.timer.Stop() // the test is the janitor
	p.sweep()      // used a moment ago
	if p.exist != maxBuffers {
		t.Errorf("got %d buffers after the first look, want %d", p.exist, maxBuffers)
	}
	p.sweep()
	if p.exist != 0 || len(p.free) != 0 || p.armed {
		t.Errorf("got %d buffers, armed %v, want none", p.exist, p.armed)
	}
}

// No allocation for a line or a batch, whatever its lines look like.
func TestNoAllocations(t *testing.T) {
	s, path := newLog(t)
	c := s.source(Stdout)
	out := outBuffer()
	data := []byte(strings.Repeat("a line of some length\n", 1000) + strings.Repeat("z", 5000) + "\nunfinished")
	s.take(c, data, out) // pending grows once
	if n := testing.AllocsPerRun(50, func() { s.take(c, data, out) }); n != 0 {
		t.Errorf("got %v allocations for a batch of 1000 lines, want 0", n)
	}
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
}

// FuzzFraming: whatever is printed, in whatever pieces, comes out of the log again.
func FuzzFraming(f *testing.F) {
	f.Add([]byte("hello\nworld"), uint16(3), uint16(0))
	f.Add([]byte("\n\n\n"), uint16(1), uint16(0))
	f.Add(bytes.Repeat([]byte("x"), 2*MaxContent+1), uint16(5000), uint16(0))
	f.Add(append(bytes.Repeat([]byte("x"), MaxContent), '\n'), uint16(MaxContent), uint16(1))
	f.Add([]byte("disk\nfull\n"), uint16(4), uint16(50))
	fd, err := unix.MemfdCreate("log", unix.MFD_CLOEXEC)
	if err != nil {
		f.Fatal(err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFL, unix.O_APPEND); err != nil {
		f.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "log")
	out := outBuffer()
	f.Fuzz(func(t *testing.T, data []byte, piece, room uint16) {
		// Long lines are rare in what a fuzzer makes: a repeated input is one.
		if len(data) > 0 && len(data) < 2000 && piece%7 == 0 {
			data = bytes.Repeat(data, 1+3*MaxContent/len(data))
			piece = max(piece, 500)
		}
		if err := file.Truncate(0); err != nil {
			t.Fatal(err)
		}
		s := NewSink(file)
		s.now = clock()
		d := &disk{room: -1, errno: unix.ENOSPC}
		if room > 0 {
			d.room = int(room)
		}
		d.under(s)
		c := s.source(Stdout)
		for rest := data; len(rest) > 0; {
			n := min(len(rest), 1+int(piece))
			s.take(c, rest[:n], out)
			if len(c.pending) > MaxContent {
				t.Fatalf("holds %d bytes", len(c.pending))
			}
			rest = rest[n:]
		}
		s.end(c)
		log := make([]byte, s.Stats().Bytes+1)
		n, err := file.ReadAt(log, 0)
		if !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		records, err := parse(string(log[:n]))
		if err != nil {
			t.Fatal(err)
		}
		got := join(records, "stdout")
		st := s.Stats()
		if room == 0 && got != string(data) {
			t.Fatalf("got %d bytes %.100q, want %d %.100q", len(got), got, len(data), data)
		}
		if len(got)+int(st.Dropped) != len(data) || got != string(data[:len(got)]) {
			t.Fatalf("got %d bytes in the log and %d dropped of %d", len(got), st.Dropped, len(data))
		}
	})
}

// BenchmarkFraming is the work without the system calls.
func BenchmarkFraming(b *testing.B) {
	for _, n := range []int{1, 20, 100, 1000, 20000} {
		b.Run(fmt.Sprintf("line=%d", n), func(b *testing.B) {
			s := NewSink(nil)
			c := s.source(Stdout)
			c.flush = func(p []byte) []byte { return p[:0] }
			data := bytes.Repeat(append(bytes.Repeat([]byte("x"), n-1), '\n'), readSize/n+1)[:readSize]
			out := outBuffer()
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				c.stamp(time.Now())
				c.frame(out, data)
			}
		})
	}
}

// BenchmarkFile is what one core does with data that is there: framing and write(2).
func BenchmarkFile(b *testing.B) {
	for _, n := range []int{20, 100, 1000} {
		b.Run(fmt.Sprintf("line=%d", n), func(b *testing.B) {
			s, path := newLog(b)
			s.now = time.Now
			c := s.source(Stdout)
			data := bytes.Repeat(append(bytes.Repeat([]byte("x"), n-1), '\n'), readSize/n+1)[:readSize]
			out := outBuffer()
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				s.take(c, data, out)
				if i%1024 == 1023 { // 64 MiB read: rotate
					b.StopTimer()
					os.Remove(path)
					if err := s.Swap(openLog(b, path)); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
			}
		})
	}
}

// BenchmarkPipe is the whole way from a process that prints 100-byte lines as fast as it can (a core of its own).
func BenchmarkPipe(b *testing.B) {
	s, path := newLog(b)
	s.now = time.Now
	w, _, done := pipeTo(b, s, Stdout)
	data := bytes.Repeat(append(bytes.Repeat([]byte("x"), 99), '\n'), 640)
	b.SetBytes(int64(len(data)))
	for i := 0; b.Loop(); i++ {
		if _, err := w.Write(data); err != nil {
			b.Fatal(err)
		}
		if i%1024 == 1023 {
			b.StopTimer()
			os.Remove(path)
			if err := s.Swap(openLog(b, path)); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
	}
	w.Close()
	if err := <-done; err != nil {
		b.Fatal(err)
	}
}

package podsandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// slowWriter takes its first bytes, and the rest when it may.
type slowWriter struct {
	got  bytes.Buffer // not embedded: io.Copy would use its ReadFrom
	more <-chan time.Time
	once sync.Once
}

func (w *slowWriter) Write(b []byte) (int, error) {
	w.once.Do(func() { <-w.more })
	return w.got.Write(b)
}

// A client that is slower than drainTime gets all that the command has written, although a child of the command holds its output open.
func TestExecGivesASlowClientTheRest(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	id := d.startNew(d.run("a"), "c")
	// Nothing tells when the deadline has passed: it is waited for.
	w := &slowWriter{more: time.After(drainTime + 200*time.Millisecond)}
	code, err := d.Exec(ctx, id, []string{"background much"}, Streams{Stdout: w, Stderr: io.Discard})
	if err != nil || code != 0 {
		t.Fatalf("got %d, %v", code, err)
	}
	if want := muchOutput(); !bytes.Equal(w.got.Bytes(), want) {
		t.Errorf("got %d bytes, want %d", w.got.Len(), len(want))
	}
	d.removeAll()
}

func TestRemainsIsWhatAPipeHolds(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close() // stays open while r is read
	for _, want := range []string{"", "what is there", ""} {
		if _, err := io.WriteString(w, want); err != nil {
			t.Fatal(err)
		}
		if err := r.SetReadDeadline(time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("got %v, want that the deadline has passed", err)
		}
		if got, err := io.ReadAll(remains{r}); err != nil || string(got) != want {
			t.Errorf("got %q, %v; want %q", got, err, want)
		}
	}
}

func newBacklog(held *atomic.Int64) *backlog {
	b := &backlog{held: held}
	b.more.L = &b.mu
	return b
}

func TestBacklogDropsWhoIsTooFarBehind(t *testing.T) {
	mib := make([]byte, 1<<20)
	for _, test := range []struct {
		name   string
		others int64 // held by other clients
		want   int   // MiB that are kept
	}{
		{"alone", 0, attachBacklog >> 20},
		{"among many slow ones", allBacklogs, smallBacklog >> 20},
	} {
		var held atomic.Int64
		held.Store(test.others)
		b := newBacklog(&held)
		kept := 0
		for b.add(mib) {
			kept++
		}
		if kept != test.want {
			t.Errorf("%s: %d MiB were kept, want %d", test.name, kept, test.want)
		}
		b.finish()
		if !b.add(mib) {
			t.Errorf("%s: what comes after the end counts", test.name)
		}
		var got countWriter
		b.drain(t.Context(), &got)
		if got.all != (kept+1)<<20 || got.largest > maxWrite {
			t.Errorf("%s: the client got %d bytes, %d at once", test.name, got.all, got.largest)
		}
		if n := held.Load(); n != test.others {
			t.Errorf("%s: %d bytes are held at the end, want %d", test.name, n, test.others)
		}
	}
}

type countWriter struct{ all, largest int }

func (c *countWriter) Write(b []byte) (int, error) {
	c.all, c.largest = c.all+len(b), max(c.largest, len(b))
	return len(b), nil
}

// Between a pipe and a client nothing is lost or changes its order; a client that goes away leaves nothing held.
func TestBacklogPassesEverythingOn(t *testing.T) {
	want := muchOutput()
	for _, most := range []int{1 << 30, 1000} {
		var held atomic.Int64
		b := newBacklog(&held)
		got := &leavingWriter{most: most}
		var both sync.WaitGroup
		both.Go(func() {
			if !b.fill(bytes.NewReader(want)) {
				t.Error("the client was too far behind")
			}
		})
		both.Go(func() { b.drain(t.Context(), got) })
		both.Wait()
		if most > len(want) && !bytes.Equal(got.Bytes(), want) {
			t.Errorf("got %d bytes, want %d", got.Len(), len(want))
		}
		if n := held.Load(); n != 0 {
			t.Errorf("client that takes %d bytes: %d are held at the end", most, n)
		}
	}
}

// leavingWriter takes so many bytes and then fails.
type leavingWriter struct {
	bytes.Buffer
	most int
}

func (w *leavingWriter) Write(b []byte) (int, error) {
	if w.Len()+len(b) > w.most {
		return 0, io.ErrClosedPipe
	}
	return w.Buffer.Write(b)
}

// muchOutput is nearly what a pipe holds.
func muchOutput() []byte {
	var b bytes.Buffer
	for i := 0; b.Len() < 60<<10; i++ {
		fmt.Fprintln(&b, "line", i)
	}
	return b.Bytes()
}

package logs

import (
	"bytes"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/sys"
)

// C-23 on a real disk: a tmpfs of 64 KiB that belongs to nobody's mount namespace.
func TestFullTmpfs(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts a tmpfs")
	}
	mount, err := sys.CreateMount("tmpfs", [][2]string{{"size", "64k"}}, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(mount)
	fd, err := unix.Openat(mount, "0.log", unix.O_CREAT|unix.O_APPEND|unix.O_RDWR|unix.O_CLOEXEC, 0o640)
	if err != nil {
		t.Fatal(err)
	}
	filler, err := unix.Openat(mount, "filler", unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0o640)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(filler, make([]byte, 16<<10)); err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "0.log")
	s := NewSink(file)
	defer s.Close()
	w, _, done := pipeTo(t, s, Stdout)

	data := bytes.Repeat([]byte("0123456789abcdef0123456789abcdef0123456789\n"), 20000)
	if _, err := w.Write(data); err != nil { // comes to an end: nothing blocks
		t.Fatal(err)
	}
	w.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	st := s.Stats()
	read := func() string {
		b, err := io.ReadAll(io.NewSectionReader(file, 0, 1<<20))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	got := join(mustParse(t, read()), "stdout")
	if st.LastError != unix.ENOSPC || len(got) == 0 || got != string(data[:len(got)]) || uint64(len(got))+st.Dropped != uint64(len(data)) {
		t.Errorf("got %d bytes in the log and %+v, of %d", len(got), st, len(data))
	}

	if err := unix.Ftruncate(filler, 0); err != nil {
		t.Fatal(err)
	}
	unix.Close(filler)
	w, _, done = pipeTo(t, s, Stdout)
	if _, err := w.WriteString("there is room again\n"); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	records := mustParse(t, read())
	if last := records[len(records)-1]; last.content != "there is room again" {
		t.Errorf("got %+v as the last record", last)
	}
}

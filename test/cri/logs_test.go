package cri

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Fixed width, nanoseconds (cri-reference B.6).
var logTime = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}(Z|[+-]\d\d:\d\d)$`)

func TestLogLinesAreTheCRIsFormat(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"echo", "one", ",", "err", "two", ",", "echo", ",", "echo", "  spaces  ", ",", "part", "no newline"})
	c.wait()
	lines := readLog(t, c.logFile())
	want := []logLine{{stream: "stdout", tag: "F", text: "one"}, {stream: "stderr", tag: "F", text: "two"}, {stream: "stdout", tag: "F"},
		{stream: "stdout", tag: "F", text: "  spaces  "}, {stream: "stdout", tag: "P", text: "no newline"}}
	var out []logLine // stdout and stderr are two pipes: their order is by arrival
	for _, stream := range []string{"stdout", "stderr"} {
		for _, l := range lines {
			if l.stream == stream {
				out = append(out, l)
			}
		}
	}
	if len(lines) != len(want) || len(out) != len(want) {
		t.Fatalf("got %d lines: %v", len(lines), lines)
	}
	for i, w := range []logLine{want[0], want[2], want[3], want[4], want[1]} {
		if got := out[i]; got.stream != w.stream || got.tag != w.tag || got.text != w.text {
			t.Errorf("line %d: got %v, want %v", i, got, w)
		}
	}
	for i, l := range lines {
		at, err := time.Parse(time.RFC3339Nano, l.time)
		if err != nil || !logTime.MatchString(l.time) {
			t.Errorf("time %q: %v", l.time, err)
		}
		if age := time.Since(at); age < 0 || age > time.Minute {
			t.Errorf("line of %v ago", age)
		}
		if i > 0 && len(l.time) != len(lines[0].time) {
			t.Errorf("times differ in width: %q, %q", lines[0].time, l.time)
		}
	}
	info, err := os.Stat(c.logFile())
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != 0o640 {
		t.Errorf("mode %v, want 0640", info.Mode())
	}
}

func TestLongLinesAreSplitInto16KiB(t *testing.T) {
	w := need(t)
	for _, c := range []struct {
		name  string
		bytes int
		tags  string
		sizes []int
	}{
		{"fits", 16384, "F", []int{16384}},
		{"one more", 16385, "PF", []int{16384, 1}},
		{"twice", 32768, "PF", []int{16384, 16384}},
		{"long", 100000, "PPPPPPF", []int{16384, 16384, 16384, 16384, 16384, 16384, 1696}},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := w.pod(t).run([]string{"spam", "1", itoa(c.bytes)})
			x.wait()
			var tags string
			var sizes []int
			for _, l := range readLog(t, x.logFile()) {
				tags += l.tag
				sizes = append(sizes, len(l.text))
			}
			if tags != c.tags {
				t.Errorf("tags: got %s of sizes %v, want %s", tags, sizes, c.tags)
				return
			}
			for i := range sizes {
				if sizes[i] != c.sizes[i] {
					t.Errorf("sizes: got %v, want %v", sizes, c.sizes)
					break
				}
			}
		})
	}
}

func TestNothingIsLostWhenAContainerExits(t *testing.T) {
	w := need(t)
	const lines = 200_000
	c := w.pod(t).run([]string{"spam", itoa(lines), "50"})
	st := c.wait()
	// EXITED means that the log is whole.
	got := readLog(t, c.logFile())
	if len(got) != lines || st.ExitCode != 0 {
		t.Fatalf("got %d lines, exit code %d; want %d, 0", len(got), st.ExitCode, lines)
	}
	for i, l := range got {
		if !strings.HasPrefix(l.text, itoa(i)+".") || len(l.text) != 50 {
			t.Fatalf("line %d is %q", i, l.text)
		}
	}
}

func TestRotationLosesAndRepeatsNothing(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"spam", "400000", "60", ",", "echo", "end", ",", "touch", "/done", ",", "sleep"})
	file := c.logFile()
	var files []string
	for i := range 5 { // the kubelet renames, then asks
		rotated := file + "." + itoa(i)
		if err := os.Rename(file, rotated); err != nil {
			t.Fatal(err)
		}
		if err := w.rt.ReopenContainerLog(t.Context(), c.id); err != nil {
			t.Fatal(err)
		}
		size := fileSize(t, rotated)
		if _, err := os.Stat(file); err != nil {
			t.Errorf("no new file: %v", err)
		}
		files = append(files, rotated)
		defer func() {
			if now := fileSize(t, rotated); now != size {
				t.Errorf("%s grew from %d to %d after ReopenContainerLog returned", rotated, size, now)
			}
		}()
	}
	c.exec("wait", "/done")
	eventually(t, "the last line is logged", func() bool { // not by says: it would read 40 MB each time
		lines := readTail(t, file)
		return strings.HasSuffix(lines, " end\n")
	})
	files = append(files, file)
	var next int
	for _, f := range files {
		for _, l := range readLog(t, f) {
			if l.text == "end" {
				continue
			}
			if !strings.HasPrefix(l.text, itoa(next)+".") {
				t.Fatalf("%s: got %q, want line %d", f, l.text, next)
			}
			next++
		}
	}
	if next != 400000 {
		t.Errorf("got %d lines, want 400000", next)
	}
}

// readTail is the last 100 bytes of a file.
func readTail(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 100)
	n, err := f.ReadAt(buf, max(0, fileSize(t, path)-100))
	if err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return string(buf[:n])
}

func fileSize(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

func TestReopenNeedsARunningContainer(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"true"})
	c.wait()
	if err := os.Rename(c.logFile(), c.logFile()+".1"); err != nil {
		t.Fatal(err)
	}
	wantCode(t, w.rt.ReopenContainerLog(t.Context(), c.id), codes.FailedPrecondition, c.cfg.Metadata.Name)
	if _, err := os.Stat(c.logFile()); err == nil {
		t.Error("an error, but a new file all the same")
	}
}

func TestAFullLogDiskNeverBlocksTheContainer(t *testing.T) {
	w := need(t)
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	p := w.pod(t, func(c *runtimeapi.PodSandboxConfig) { c.LogDirectory = filepath.Join(disk, "pod") })
	t.Cleanup(func() { // before the pod goes: its init must not keep the disk busy for ever
		p.remove()
		if err := unix.Unmount(disk, 0); err != nil {
			t.Errorf("the log disk is still in use: %v", err)
		}
	})
	c := p.run([]string{"spam", "200000", "100", ",", "mkfile", "/done", "x", ",", "sleep"}) // 20 MB
	c.exec("wait", "/done")
	if size := fileSize(t, c.logFile()); size > 64<<10 {
		t.Errorf("log has %d bytes on a disk of 64 KiB: the test tests nothing", size)
	}
	// Whole lines only: a reader must not choke on what was cut.
	readLog(t, c.logFile())
	c.exec("true")
	// When there is room again, logging goes on, and lines of the log are whole.
	if err := os.Truncate(c.logFile(), 0); err != nil {
		t.Fatal(err)
	}
	d := p.run([]string{"echo", "room again"})
	d.wait()
	if got := d.output("stdout"); got != "room again\n" {
		t.Errorf("got %q", got)
	}
}

func TestLostLogBytesAreCounted(t *testing.T) {
	w := need(t)
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	p := w.pod(t, func(c *runtimeapi.PodSandboxConfig) { c.LogDirectory = filepath.Join(disk, "pod") })
	t.Cleanup(func() {
		p.remove()
		if err := unix.Unmount(disk, 0); err != nil {
			t.Error(err)
		}
	})
	c := p.run([]string{"spam", "10000", "100"})
	c.wait()
	r, err := w.rt.ContainerStatus(t.Context(), c.id, true)
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for _, v := range r.Info {
		text.WriteString(v)
	}
	// reliability-and-security C0, I7: "or a counter of lost bytes says otherwise".
	if !regexp.MustCompile(`(?i)"[a-z_]*(lost|dropped)[a-z_]*":\s*[1-9]`).MatchString(text.String()) {
		t.Errorf("a log that lost lines says so nowhere: %s", text.String())
	}
}

func TestPlantedLogFilesAreNotFollowed(t *testing.T) {
	w := need(t)
	canary := filepath.Join(t.TempDir(), "canary")
	mustWrite(t, canary, "untouched")
	for name, plant := range map[string]func(string) error{
		"symlink":   func(path string) error { return os.Symlink(canary, path) },
		"fifo":      func(path string) error { return unix.Mkfifo(path, 0o600) },
		"directory": func(path string) error { return os.Mkdir(path, 0o755) },
	} {
		t.Run(name, func(t *testing.T) {
			p := w.pod(t)
			cfg := p.config([]string{"echo", "written"})
			if err := os.MkdirAll(p.cfg.LogDirectory, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := plant(filepath.Join(p.cfg.LogDirectory, cfg.LogPath)); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			id, err := w.rt.CreateContainer(t.Context(), p.id, cfg, p.cfg)
			if err == nil {
				err = w.rt.StartContainer(t.Context(), id)
			}
			if err == nil {
				t.Error("it was taken for a log file")
			}
			if d := time.Since(start); d > 5*time.Second {
				t.Errorf("took %v", d)
			}
		})
	}
	if got := readFile(t, canary); got != "untouched" {
		t.Errorf("the symlink was followed: %q", got)
	}
}

func TestContainerWithoutALog(t *testing.T) {
	w := need(t)
	p := w.pod(t, func(c *runtimeapi.PodSandboxConfig) { c.LogDirectory = "" })
	c := p.run([]string{"spam", "100000", "80", ",", "exit", "4"}) // more than a pipe holds
	if st := c.wait(); st.ExitCode != 4 || st.LogPath != "" {
		t.Errorf("got exit code %d, log path %q", st.ExitCode, st.LogPath)
	}
}

package podsandbox

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestParseSignal(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want unix.Signal
	}{
		{"", unix.SIGTERM}, {"SIGTERM", unix.SIGTERM}, {"term", unix.SIGTERM}, {"15", unix.SIGTERM}, {"SIGKILL", unix.SIGKILL},
		{"SIGIOT", unix.SIGABRT}, {"SIGCLD", unix.SIGCHLD}, {"SIGPOLL", unix.SIGIO}, {"SIGPWR", unix.SIGPWR}, {"SIGSTKFLT", unix.SIGSTKFLT},
		{"SIGRTMIN", 34}, {"SIGRTMIN+3", 37}, {"rtmin+3", 37}, {"SIGRTMINPLUS15", 49}, {"SIGRTMAXMINUS14", 50}, {"SIGRTMAX-1", 63}, {"SIGRTMAX", 64}, {"64", 64},
		{"0", 0}, {"65", 0}, {"-1", 0}, {"SIGNOPE", 0}, {"SIGRTMIN+31", 0}, {"SIGRTMIN-1", 0}, {"SIGRTMAX+1", 0}, {"SIG", 0}, {"SIGTERM ", 0},
	} {
		got, err := ParseSignal(tc.in)
		if got != tc.want || (err != nil) != (tc.want == 0) || err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: got %d, %v, want %d", tc.in, got, err, tc.want)
		}
	}
}

// All names of CRI's enum Signal (api.proto 0.37, without its prefix SIGNAL_).
func TestParseSignalCRI(t *testing.T) {
	names := strings.Fields(`SIGABRT SIGALRM SIGBUS SIGCHLD SIGCLD SIGCONT SIGFPE SIGHUP SIGILL SIGINT SIGIO SIGIOT SIGKILL SIGPIPE
		SIGPOLL SIGPROF SIGPWR SIGQUIT SIGSEGV SIGSTKFLT SIGSTOP SIGSYS SIGTERM SIGTRAP SIGTSTP SIGTTIN SIGTTOU SIGURG SIGUSR1 SIGUSR2
		SIGVTALRM SIGWINCH SIGXCPU SIGXFSZ SIGRTMIN SIGRTMAX`)
	for i := 1; i <= 15; i++ {
		names = append(names, "SIGRTMINPLUS"+strconv.Itoa(i))
	}
	for i := 1; i <= 14; i++ {
		names = append(names, "SIGRTMAXMINUS"+strconv.Itoa(i))
	}
	if len(names) != 65 {
		t.Errorf("got %d names, want 65", len(names))
	}
	for _, n := range names {
		if sig, err := ParseSignal(n); err != nil || sig == 0 {
			t.Errorf("%s: got %d, %v", n, sig, err)
		}
	}
}

func FuzzParseSignal(f *testing.F) {
	for _, s := range []string{"SIGTERM", "9", "SIGRTMIN+3", "SIGRTMAXMINUS1", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if sig, err := ParseSignal(s); (err == nil) != (sig >= 1 && sig <= 64) {
			t.Errorf("%q: got %d, %v", s, sig, err)
		}
	})
}

// SEC-100, SEC-101
func TestOpenLog(t *testing.T) {
	dir := t.TempDir()
	outside := filepath.Join(dir, "outside")
	logs := filepath.Join(dir, "logs")
	for _, d := range []string{outside, logs} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	secret := filepath.Join(outside, "secret")
	err := errors.Join(
		os.WriteFile(secret, []byte("secret"), 0o600),
		os.Symlink(secret, filepath.Join(logs, "link")),
		os.Symlink(outside, filepath.Join(logs, "dirlink")),
		os.Symlink("nowhere", filepath.Join(logs, "dangling")),
		os.Link(secret, filepath.Join(logs, "hard")),
		unix.Mkfifo(filepath.Join(logs, "fifo"), 0o600),
		os.Mkdir(filepath.Join(logs, "dir"), 0o755),
	)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		want error // nil: it opens; errAny: any error
	}{
		{"0.log", nil},
		{"0.log", nil}, // again
		{"a/b/c/0.log", nil},
		{"./x/../y.log", nil},
		{"link", unix.ELOOP},
		{"dangling", unix.ELOOP},
		{"dirlink/0.log", unix.ENOTDIR},
		{"fifo", unix.ENXIO},
		{"dir", unix.EISDIR},
		{"hard", errAny},
		{"../outside/0.log", ErrInvalid},
		{"/etc/passwd", ErrInvalid},
		{"", ErrInvalid},
		{"a\x00b", unix.EINVAL},
		{strings.Repeat("n", 5000), unix.ENAMETOOLONG},
	} {
		f, err := openLog(logs, tc.name)
		switch {
		case tc.want == nil && err != nil:
			t.Errorf("%q: %v", tc.name, err)
		case tc.want == errAny && err == nil, tc.want != nil && tc.want != errAny && !errors.Is(err, tc.want):
			t.Errorf("%q: got %v, want %v", tc.name, err, tc.want)
		}
		if f != nil {
			f.Close()
		}
	}
	if b, err := os.ReadFile(secret); err != nil || string(b) != "secret" {
		t.Errorf("got %q, %v", b, err)
	}
	if l, err := os.ReadDir(outside); err != nil || len(l) != 1 {
		t.Errorf("got %v, %v", l, err)
	}
	f, err := openLog(logs, "mode.log")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil || flags&unix.O_APPEND == 0 {
		t.Errorf("got flags %#x, %v, want O_APPEND", flags, err)
	}
}

var errAny = errors.New("any error")

func TestRemoveTrees(t *testing.T) {
	root := t.TempDir()
	outside := t.TempDir()
	canary := filepath.Join(outside, "canary")
	if err := os.WriteFile(canary, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	make := func() {
		t.Helper()
		upper := filepath.Join(root, "upper")
		err := errors.Join(
			os.MkdirAll(filepath.Join(upper, "a/b/c"), 0o755),
			os.MkdirAll(filepath.Join(upper, ".removing-0/x"), 0o755), // a name of ours, chosen by the container
			os.Symlink(outside, filepath.Join(upper, "a/link")),
			os.Symlink(outside, filepath.Join(upper, "link")),
			unix.Mkfifo(filepath.Join(upper, "a/fifo"), 0o600),
			os.WriteFile(filepath.Join(upper, "a/b/file"), nil, 0),
			os.Mkdir(filepath.Join(root, "work"), 0o700),
			os.Mkdir(filepath.Join(root, "work/work"), 0),
		)
		if err != nil {
			t.Fatal(err)
		}
	}
	make()
	if err := os.WriteFile(filepath.Join(root, "stays"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := removeTrees(root, "upper", "work"); err != nil {
			t.Fatal(err)
		}
	}
	check := func() {
		t.Helper()
		if l, err := os.ReadDir(root); err != nil || len(l) != 1 || l[0].Name() != "stays" {
			t.Errorf("got %v, %v, want only what stays", l, err)
		}
		if _, err := os.Stat(canary); err != nil {
			t.Errorf("what a link pointed to is gone: %v", err)
		}
	}
	check()
	// One that was interrupted: the top is under another name already.
	make()
	if err := os.Rename(filepath.Join(root, "upper/a"), filepath.Join(root, movedPrefix+"0")); err != nil {
		t.Fatal(err)
	}
	if err := removeTrees(root, "upper", "work"); err != nil {
		t.Fatal(err)
	}
	check()
	if err := removeTrees(filepath.Join(root, "missing"), "upper"); err != nil {
		t.Error(err)
	}
}

// A container can nest directories deeper than PATH_MAX and than there are descriptors.
func TestRemoveDeepTree(t *testing.T) {
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "upper"), 0o755); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(filepath.Join(root, "upper"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	const depth = 10_000
	for range depth {
		if err := unix.Mkdirat(fd, "a-rather-long-name", 0o755); err != nil {
			t.Fatal(err)
		}
		next, err := unix.Openat(fd, "a-rather-long-name", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
		fd = next
	}
	unix.Close(fd)
	if err := removeTrees(root, "upper"); err != nil {
		t.Fatal(err)
	}
	if l, err := os.ReadDir(root); err != nil || len(l) != 0 {
		t.Errorf("got %v, %v", l, err)
	}
}

func TestWriteFiles(t *testing.T) {
	host := t.TempDir()
	err := errors.Join(
		os.WriteFile(filepath.Join(host, "resolv.conf"), []byte("nameserver 198.51.100.1\n"), 0o644),
		os.WriteFile(filepath.Join(host, "hosts"), []byte("127.0.0.1 the-host\n"), 0o644),
	)
	if err != nil {
		t.Fatal(err)
	}
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name                    string
		config                  PodConfig
		resolv, hosts, hostname string
	}{
		{"own network", PodConfig{Hostname: "h", Network: NamespacePod, DNS: DNSConfig{Servers: []string{"192.0.2.1", "2001:db8::1"}, Searches: []string{"a.b", "c"}, Options: []string{"ndots:5"}}},
			"search a.b c\nnameserver 192.0.2.1\nnameserver 2001:db8::1\noptions ndots:5\n", "10.0.0.1\th\n", "h\n"},
		{"host's network", PodConfig{Hostname: "ignored", Network: NamespaceNode}, "nameserver 198.51.100.1\n", "127.0.0.1 the-host\n", name + "\n"},
		{"host's DNS", PodConfig{Hostname: "h", Network: NamespacePod}, "nameserver 198.51.100.1\n", "127.0.0.1\tlocalhost\n", "h\n"},
	} {
		dir := t.TempDir()
		if err := writeFiles(dir, host, &tc.config, []netip.Addr{netip.MustParseAddr("10.0.0.1")}); err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		for file, want := range map[string]string{"resolv.conf": tc.resolv, "hosts": tc.hosts, "hostname": tc.hostname} {
			b, err := os.ReadFile(filepath.Join(dir, file))
			st, serr := os.Stat(filepath.Join(dir, file))
			if err != nil || serr != nil || !strings.Contains(string(b), want) || file != "hosts" && string(b) != want || st.Mode() != 0o644 {
				t.Errorf("%s: %s: got %q %v, want %q", tc.name, file, b, st.Mode(), want)
			}
		}
	}
	// A host's file has a limit.
	if err := os.Truncate(filepath.Join(host, "resolv.conf"), maxHostFile+1); err != nil {
		t.Fatal(err)
	}
	if err := writeFiles(t.TempDir(), host, &PodConfig{Hostname: "h", Network: NamespacePod}, nil); err == nil {
		t.Error("a huge resolv.conf was copied")
	}
}

func TestMeasureTree(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Link(filepath.Join(dir, "file"), filepath.Join(dir, "same")), os.Symlink("/", filepath.Join(dir, "link"))); err != nil {
		t.Fatal(err)
	}
	u, err := measureTree(context.Background(), dir)
	if err != nil || u.Inodes != 3 || u.Bytes < 8192 || u.Bytes > 1<<20 {
		t.Errorf("got %+v, %v, want 3 inodes", u, err)
	}
}

// Directories nested as deep as a container likes cost neither time nor descriptors that we do not have.
func TestMeasureDeepTree(t *testing.T) {
	dir := t.TempDir()
	const depth = 3000
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o700); err != nil {
		t.Fatal(err)
	}
	at, err := unix.Open(filepath.Join(dir, "d"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	for range depth {
		if err == nil {
			err = unix.Mkdirat(at, "d", 0o700)
		}
		below := -1
		if err == nil {
			below, err = unix.Openat(at, "d", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		}
		_ = unix.Close(at)
		at = below
	}
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.Close(at)
	u, err := measureTree(context.Background(), dir)
	if err != nil || u.Inodes != maxMeasured+2 { // dir itself, and the last, which is not looked into
		t.Errorf("got %+v, %v, want %d inodes", u, err, maxMeasured+2)
	}
	if err := removeTrees(dir, "d"); err != nil {
		t.Error(err)
	}
}

// What a process wrote in time is kept, also if nobody got to read it before the deadline.
func TestCollectAfterDeadline(t *testing.T) {
	var o output
	if err := o.open(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = o.close() }()
	if _, err := o.write.WriteString("in time"); err != nil {
		t.Fatal(err)
	}
	if err := o.read.SetReadDeadline(time.Now()); err != nil {
		t.Fatal(err)
	}
	if o.collect(); string(o.kept) != "in time" {
		t.Errorf("kept %q", o.kept)
	}
}

// The flusher syncs what it was asked for when its time has come, somebody is in a hurry, or it ends; each path once, in order; and does
// not mind what is gone.
func TestFlusher(t *testing.T) {
	const never = 1000 * time.Hour
	for _, c := range []struct {
		name  string
		delay time.Duration
		do    func(f *flusher)
		want  string
	}{
		{"at the end", never, func(f *flusher) { f.later("a", "b"); f.later("b", "gone", "c"); f.close() }, "a b gone c"},
		{"when it is time", 0, func(f *flusher) { f.later("a", "b") }, "a b"},
		{"at once, after what waits", never, func(f *flusher) { f.later("a"); f.now("b") }, "a b"},
		{"at once, what waits already", never, func(f *flusher) { f.later("a", "b"); f.now("a") }, "a b"},
		{"at once, nothing else", never, func(f *flusher) { f.now("a") }, "a"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synced := make(chan string, 10)
			f := newFlusher(c.delay, func(path string) error {
				synced <- path
				if path == "gone" {
					return os.ErrNotExist
				}
				return nil
			})
			c.do(f)
			var got []string
			for range strings.Fields(c.want) {
				got = append(got, <-synced)
			}
			if strings.Join(got, " ") != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
			f.close()
			if len(synced) != 0 || len(f.order) != 0 || len(f.pending) != 0 {
				t.Errorf("synced %d more, left %v", len(synced), f.order)
			}
		})
	}
}

// It makes real files durable.
func TestSyncFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, filepath.Dir(path)} {
		if err := syncFile(p); err != nil {
			t.Error(err)
		}
	}
	if err := syncFile(path + "x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

func TestGate(t *testing.T) {
	var g gate
	why := errors.New("why")
	ctx, cancel := context.WithCancelCause(context.Background())
	op := &operation{what: "do", object: "it"}
	if err := g.enter(op, cancel); err != nil {
		t.Fatal(err)
	}
	short, done := context.WithCancel(context.Background())
	done()
	if err := g.close(short, why); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), `do "it" does not end`) {
		t.Errorf("got %v", err)
	}
	if context.Cause(ctx) != why {
		t.Errorf("got cause %v, want %v", context.Cause(ctx), why)
	}
	if err := g.enter(&operation{}, cancel); err != why {
		t.Errorf("got %v, want %v", err, why)
	}
	go g.leave(op)
	for range 2 {
		if err := g.close(context.Background(), errors.New("other")); err != nil {
			t.Error(err)
		}
	}
}

// Steps that are beside others begin in order and are waited for: by the step after them, and when one fails.
func TestStepsBeside(t *testing.T) {
	why := errors.New("why")
	for _, c := range []struct {
		name        string
		main, side  error // of the steps a, and b beside it
		want, trace string
	}{
		{"all well", nil, nil, "", "record a b commit"},
		{"a fails, b is waited for", why, nil, "step a", "record a b"},
		{"b fails, what is after it is not done", nil, why, "step b", "record a b"},
		{"both fail", why, why, "step a,step b", "record a b"},
	} {
		t.Run(c.name, func(t *testing.T) {
			op := &operation{}
			var did []string // by the steps, in an order that the channel makes certain
			began := make(chan struct{})
			do := func(name string, err error) func(context.Context) error {
				return func(context.Context) error {
					did = append(did, name)
					return err
				}
			}
			err := op.run(t.Context(), []step{
				{name: "record", do: do("record", nil)},
				{name: "b", beside: true, do: func(ctx context.Context) error {
					<-began // with b before a in the list, this hangs unless they run beside each other
					return do("b", c.side)(ctx)
				}},
				{name: "a", do: func(ctx context.Context) error {
					defer close(began)
					return do("a", c.main)(ctx)
				}},
				{name: "commit", after: "b", do: do("commit", nil)},
			})
			if got := strings.Join(did, " "); got != c.trace {
				t.Errorf("did %q, want %q", got, c.trace)
			}
			for want := range strings.SplitSeq(c.want, ",") {
				if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
					t.Errorf("got %v, want %q", err, c.want)
				}
			}
			var timed []string
			for _, step := range op.timings {
				timed = append(timed, step.Step)
			}
			if got := strings.Join(timed, " "); err == nil && got != c.trace {
				t.Errorf("timed %q, want %q", got, c.trace)
			}
		})
	}
}

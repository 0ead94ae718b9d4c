package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

func TestIsJournal(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, stream string
		want         bool
	}{
		{"it is", fmt.Sprintf("%d:%d", st.Dev, st.Ino), true},
		{"redirected since", fmt.Sprintf("%d:%d", st.Dev, st.Ino+1), false},
		{"not systemd's", "", false},
		{"nonsense", "x", false},
	} {
		if got := isJournal(f, c.stream); got != c.want {
			t.Errorf("%s: got %v", c.name, got)
		}
	}
}

func TestPrefixed(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"a line", "a\n", "<6>a\n"},
		{"two", "a\n b\n", "<6>a\n<6> b\n"},
		{"no end", "a", "<6>a"},
		{"nothing", "", ""},
	} {
		var b bytes.Buffer
		if n, err := (&prefixed{&b, "<6>"}).Write([]byte(c.in)); err != nil || n != len(c.in) || b.String() != c.want {
			t.Errorf("%s: got %q, %d, %v, want %q", c.name, b.String(), n, err, c.want)
		}
	}
}

// What klog writes to the journal, and what it writes elsewhere. klog is the program's: in children.
func TestLogging(t *testing.T) {
	if os.Getenv("CRISPD_TEST_LOG") != "" {
		setLogging(2)
		klog.InfoS("Said", "key", "two\nlines")
		klog.V(2).InfoS("Said in more detail")
		klog.V(4).InfoS("Not said")
		klog.ErrorS(errors.New("cause"), "Failed")
		return
	}
	for _, c := range []struct {
		name    string
		journal bool
		want    []string // what each line begins with
	}{
		{"journal", true, []string{`<6>"Said" key=<`, "<6>\ttwo", "<6>\tlines", "<6> >", `<6>"Said in more detail"`, `<3>"Failed" err="cause"`}},
		{"terminal", false, []string{"I", "\ttwo", "\tlines", " >", "I", "E"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			cmd := exec.Command(os.Args[0], "-test.run=^TestLogging$")
			cmd.Stderr = f
			cmd.Env = append(os.Environ(), "CRISPD_TEST_LOG=1", "JOURNAL_STREAM=")
			if c.journal {
				var st unix.Stat_t
				if err := unix.Fstat(int(f.Fd()), &st); err != nil {
					t.Fatal(err)
				}
				cmd.Env = append(cmd.Env, fmt.Sprintf("JOURNAL_STREAM=%d:%d", st.Dev, st.Ino))
			}
			if err := cmd.Run(); err != nil {
				t.Fatal(err)
			}
			said, err := os.ReadFile(f.Name())
			if err != nil {
				t.Fatal(err)
			}
			lines := strings.Split(strings.TrimSuffix(string(said), "\n"), "\n")
			if len(lines) != len(c.want) {
				t.Fatalf("got %d lines, want %d:\n%s", len(lines), len(c.want), said)
			}
			for i, l := range lines {
				if !strings.HasPrefix(l, c.want[i]) {
					t.Errorf("line %d is %q, want %q", i, l, c.want[i])
				}
			}
		})
	}
}

// The configuration that packages install: each of its commented keys is the default, so whoever
// uncomments one changes nothing.
func TestPackagedConfig(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "hack", "packaging", "config.toml"))
	if err != nil {
		t.Fatal(err)
	}
	var keys strings.Builder
	n := 0
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "#") && !strings.HasPrefix(line, "# ") {
			line, n = line[1:], n+1
		}
		keys.WriteString(line)
	}
	for name, s := range map[string]string{"as it is": string(text), "uncommented": keys.String()} {
		cfg, err := loadWith(t, s)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var got, want bytes.Buffer
		defaults := Defaults()
		defaults.derive()
		if err := errors.Join(cfg.Print(&got), defaults.Print(&want)); err != nil {
			t.Fatal(err)
		}
		if got.String() != want.String() {
			t.Errorf("%s: differs from the defaults:\n%s", name, got.String())
		}
	}
	if n < 5 {
		t.Errorf("found %d commented keys: the test reads the file wrongly", n)
	}
}

package apparmor

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// fake is a policy of a kernel with these profiles, and a parser that says err, or adds the profile it is given.
func fake(t *testing.T, list string) (p *Policy, err *error, texts *[]string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "profiles")
	if err := os.WriteFile(file, []byte(list), 0o600); err != nil {
		t.Fatal(err)
	}
	err, texts = new(error), new([]string)
	return &Policy{list: file, parser: func(_ context.Context, text string) error {
		*texts = append(*texts, text)
		if *err == nil {
			return os.WriteFile(file, []byte(list+Default+" (enforce)\n"), 0o600)
		}
		return *err
	}}, err, texts
}

func TestProfilesThatAreLoaded(t *testing.T) {
	p, _, _ := fake(t, "docker-default (enforce)\na b (complain)\nx//child (enforce)\n/usr/bin/man (enforce)\nodd (x) (enforce)\nbare\n")
	for name, want := range map[string]bool{
		"docker-default": true, "a b": true, "x//child": true, "/usr/bin/man": true, "odd (x)": true,
		"x": false, "docker-defaul": false, "": false, "bare": false, "a": false, "child": false, "odd": false,
	} {
		if got, err := p.Has(name); err != nil || got != want {
			t.Errorf("%q: got %v, %v; want %v", name, got, err, want)
		}
	}
	p.list += ".nothere"
	if _, err := p.Has("x"); err == nil || !strings.Contains(err.Error(), "securityfs") {
		t.Errorf("without securityfs: got %v", err)
	}
}

func TestDefaultProfileIsLoadedAgain(t *testing.T) {
	p, broken, texts := fake(t, "")
	if err := p.Load(t.Context()); err != nil || p.Problem() != nil || len(*texts) != 1 {
		t.Fatalf("Load: %v, problem %v, parsed %d times", err, p.Problem(), len(*texts))
	}
	if err := p.Ensure(t.Context()); err != nil || len(*texts) != 1 {
		t.Errorf("Ensure of a loaded one: %v, parsed %d times", err, len(*texts))
	}
	if err := os.WriteFile(p.list, nil, 0o600); err != nil { // aa-remove-unknown
		t.Fatal(err)
	}
	*broken = errors.New("no parser")
	if err := p.Ensure(t.Context()); err == nil || !strings.Contains(err.Error(), "cannot load AppArmor profile crisp-default: no parser") || p.Problem() == nil {
		t.Errorf("Ensure: got %v, problem %v", err, p.Problem())
	}
	*broken = nil
	if err := p.Ensure(t.Context()); err != nil || p.Problem() != nil {
		t.Errorf("Ensure: got %v, problem %v", err, p.Problem())
	}
}

// What must stand in the profile, and what a confined daemon adds.
func TestDefaultProfileText(t *testing.T) {
	p := &Policy{}
	text := p.text()
	for _, rule := range []string{
		"profile crisp-default ", "deny mount,", "deny /proc/sysrq-trigger rwklx,", "deny /proc/kcore rwklx,", "deny /sys/firmware/** rwklx,",
		"deny /sys/kernel/security/** rwklx,", "signal (receive) peer=unconfined,", "ptrace (trace, read, tracedby, readby) peer=crisp-default,",
	} {
		if !strings.Contains(text, rule) {
			t.Errorf("the profile has no %q", rule)
		}
	}
	if strings.Contains(text, "@") {
		t.Error("a placeholder is left")
	}
	p.label = "/usr/local/bin/crispd"
	if got := p.text(); !strings.Contains(got, "  signal (receive) peer=\"/usr/local/bin/crispd\",\n") {
		t.Errorf("the daemon's label is not in it:\n%s", got)
	}
}

package selinux

import (
	"regexp"
	"testing"
)

func TestLevelIsOnesOwn(t *testing.T) {
	form := regexp.MustCompile(`^s0:c([0-9]+),c([0-9]+)$`)
	taken := map[string]bool{}
	for range 500 { // all of one name: every next one is beside the last
		l := Level("ns/pod/uid/0", func(l string) bool { return taken[l] })
		if !form.MatchString(l) || taken[l] {
			t.Fatalf("got %q, taken %v", l, taken[l])
		}
		taken[l] = true
	}
	none := func(string) bool { return false }
	if a, b := Level("a", none), Level("a", none); a != b {
		t.Errorf("the same pod has %q, then %q", a, b)
	}
	if a, b := Level("a", none), Level("b", none); a == b {
		t.Errorf("two pods have %q", a)
	}
}

func TestPairsOfCategories(t *testing.T) {
	const pairs = categories * (categories - 1) / 2
	for n, want := range map[uint64]string{0: "s0:c0,c1", 1022: "s0:c0,c1023", 1023: "s0:c1,c2", pairs - 1: "s0:c1022,c1023"} {
		if got := pair(n); got != want {
			t.Errorf("pair %d: got %q, want %q", n, got, want)
		}
	}
	seen := make(map[string]bool, pairs)
	for n := range uint64(pairs) {
		seen[pair(n)] = true
	}
	if len(seen) != pairs {
		t.Errorf("%d different pairs, want %d", len(seen), pairs)
	}
}

func TestLevelOfALabel(t *testing.T) {
	for in, want := range map[string]string{
		"system_u:system_r:container_t:s0:c1,c2": "s0:c1,c2", "system_u:system_r:spc_t:s0": "s0", "u:r:t": "", "x": "",
	} {
		if got := LevelOf(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

// On a kernel without SELinux, which most that run this test are, there is nothing to be had.
func TestNoLabelsWithoutAPolicy(t *testing.T) {
	if Enabled() {
		process, mount, err := Labels(Options{Level: "s0:c1,c2"})
		if err != nil || LevelOf(process) != "s0:c1,c2" || LevelOf(mount) != "s0:c1,c2" {
			t.Errorf("got %q, %q, %v", process, mount, err)
		}
		return
	}
	if _, _, err := Labels(Options{Level: "s0:c1,c2"}); err != ErrNoPolicy {
		t.Errorf("got %v, want ErrNoPolicy", err)
	}
}

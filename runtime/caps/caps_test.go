package caps

import (
	"errors"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestDefaultMask(t *testing.T) {
	if m, err := Mask(Default()); err != nil || m != 0xa80425fb {
		t.Errorf("got %#x, %v, want 0xa80425fb", m, err)
	}
}

func TestApply(t *testing.T) {
	every, err := All()
	if err != nil || len(every) == 0 {
		t.Fatalf("got %d capabilities, %v, want some", len(every), err)
	}
	without := func(l []string, n string) []string {
		return slices.DeleteFunc(slices.Clone(l), func(s string) bool { return s == n })
	}
	tests := []struct {
		name            string
		base, add, drop []string
		want            []string
	}{
		{"nothing", []string{"CAP_KILL"}, nil, nil, []string{"CAP_KILL"}},
		{"prefix and case do not matter", nil, []string{"kill", "Cap_Chown"}, nil, []string{"CAP_CHOWN", "CAP_KILL"}},
		{"add ALL", []string{"CAP_KILL"}, []string{"ALL"}, nil, every},
		{"drop ALL", Default(), nil, []string{"all"}, nil},
		{"add ALL, drop one", nil, []string{"ALL"}, []string{"SYS_ADMIN"}, without(every, "CAP_SYS_ADMIN")},
		{"drop ALL, add one", Default(), []string{"NET_ADMIN"}, []string{"ALL"}, []string{"CAP_NET_ADMIN"}},
		{"a drop by name wins", nil, []string{"KILL", "CHOWN"}, []string{"KILL"}, []string{"CAP_CHOWN"}},
		{"add ALL, drop ALL", Default(), []string{"ALL"}, []string{"ALL"}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Apply(tt.base, tt.add, tt.drop)
			if err != nil || !slices.Equal(got, tt.want) {
				t.Errorf("got %v, %v, want %v", got, err, tt.want)
			}
		})
	}
}

func TestUnknownNames(t *testing.T) {
	if _, err := Apply(nil, []string{"NOPE"}, nil); !errors.Is(err, ErrUnknown) {
		t.Errorf("add: got %v, want ErrUnknown", err)
	}
	if _, err := Apply(nil, nil, []string{""}); !errors.Is(err, ErrUnknown) {
		t.Errorf("drop: got %v, want ErrUnknown", err)
	}
	if _, err := Mask([]string{"ALL"}); !errors.Is(err, ErrUnknown) {
		t.Errorf("Mask: got %v, want ErrUnknown", err)
	}
}

// A set beyond the bounding set cannot be had: capset(2) says EPERM, and no privileged container would start.
func TestAllIsWithinTheBoundingSet(t *testing.T) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, after, found := strings.Cut(string(status), "CapBnd:")
	text, _, _ := strings.Cut(after, "\n")
	bound, err := strconv.ParseUint(strings.TrimSpace(text), 16, 64)
	if !found || err != nil {
		t.Fatalf("CapBnd of /proc/self/status: %q, %v", text, err)
	}
	every, err := All()
	if err != nil {
		t.Fatal(err)
	}
	added, err := Apply(nil, []string{"ALL"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, set := range map[string][]string{"All": every, "add ALL": added} {
		if got, err := Mask(set); err != nil || got != bound {
			t.Errorf("%s: got %#x, %v, want the bounding set %#x", name, got, err, bound)
		}
	}
}

package caps

import (
	"errors"
	"slices"
	"testing"
)

func TestDefaultMask(t *testing.T) {
	if m, err := Mask(Default()); err != nil || m != 0xa80425fb {
		t.Errorf("got %#x, %v, want 0xa80425fb", m, err)
	}
}

func TestApply(t *testing.T) {
	every, err := All()
	if err != nil || len(every) < 38 {
		t.Fatalf("got %d capabilities, %v, want at least 38", len(every), err)
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

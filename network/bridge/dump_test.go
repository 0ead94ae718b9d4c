package bridge

import (
	"errors"
	"testing"

	"github.com/vishvananda/netlink"
)

// Seen as "list links: results may be incomplete or inconsistent" when pods came while the pod range changed.
func TestWholeLists(t *testing.T) {
	other := errors.New("another error")
	tests := []struct {
		name string
		errs []error // of each call
		want error
	}{
		{"at once", []error{nil}, nil},
		{"interrupted twice", []error{netlink.ErrDumpInterrupted, netlink.ErrDumpInterrupted, nil}, nil},
		{"another error", []error{netlink.ErrDumpInterrupted, other}, other},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			calls := 0
			got, err := whole(func() ([]int, error) {
				calls++
				return []int{calls}, tt.errs[calls-1]
			})
			if err != tt.want || calls != len(tt.errs) || got[0] != calls {
				t.Errorf("got %v, %v after %d calls, want the last of %d and %v", got, err, calls, len(tt.errs), tt.want)
			}
		})
	}
}

package cri

import (
	"fmt"
	"testing"
	"time"
)

func TestRates(t *testing.T) {
	var r rates
	began := time.Unix(1700000000, 0)
	const sec = uint64(time.Second)
	for i, step := range []struct {
		name  string
		after time.Duration
		total uint64
		want  int64 // -1: none
	}{
		{"first", 0, 5 * sec, -1},
		{"too soon", 500 * time.Millisecond, 6 * sec, -1},
		{"half a core", 2 * time.Second, 6 * sec, 500_000_000},
		{"asked again", 2*time.Second + 1, 7 * sec, 500_000_000},
		{"two cores", 4 * time.Second, 10 * sec, 2_000_000_000},
		{"idle", 14 * time.Second, 10 * sec, 0},
		{"counts anew", 15 * time.Second, 1 * sec, -1},
		{"the clock was set back", 10 * time.Second, 2 * sec, -1},
		{"forgotten", 15*time.Second + 2*rateAge, 3 * sec, -1},
	} {
		got := int64(-1)
		if v := r.of("a", began.Add(step.after), step.total); v != nil {
			got = int64(v.Value)
		}
		if got != step.want {
			t.Errorf("step %d, %s: got %d, want %d", i, step.name, got, step.want)
		}
	}
	for i := range 1000 {
		r.of(fmt.Sprint(i), began.Add(time.Hour), 1)
	}
	r.of("a", began.Add(2*time.Hour), 1)
	if len(r.known) != 1 {
		t.Errorf("%d are remembered an hour later, want 1", len(r.known))
	}
}

package main

import (
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestPercentile(t *testing.T) {
	hundred := make([]time.Duration, 100)
	for i := range hundred {
		hundred[99-i] = time.Duration(i + 1)
	}
	for _, c := range []struct {
		name string
		all  []time.Duration
		p    int
		want time.Duration
	}{
		{"none", nil, 50, 0},
		{"one", []time.Duration{7}, 95, 7},
		{"median of two is the lower", []time.Duration{9, 1}, 50, 1},
		{"p50 of 1 to 100", hundred, 50, 50},
		{"p95 of 1 to 100", hundred, 95, 95},
		{"p100", hundred, 100, 100},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := percentile(c.all, c.p); got != c.want {
				t.Errorf("got %d, want %d", got, c.want)
			}
		})
	}
}

// A budget must not be exceeded by chance, and what was not measured is not within it.
func TestBudgets(t *testing.T) {
	for _, b := range budgets {
		if b.limit < 1.6*b.typical {
			t.Errorf("%s: limit %v is less than 1.6 × the typical %v", b.name, b.limit, b.typical)
		}
	}
	well := func() ([]measured, []load) {
		laps := map[string][]time.Duration{}
		for _, op := range append([]string{"up"}, operations...) {
			laps[op] = []time.Duration{10}
		}
		lists := map[string][2]time.Duration{}
		for _, what := range listed {
			lists[what] = [2]time.Duration{10, 90}
		}
		m := measured{laps: laps, cpu: 5}
		return []measured{m, m}, []load{{pods: 10, few: 1, lists: lists, first: laps["up"], last: laps["up"], memory: 1 << 20, log: 5, copy: 5}}
	}
	for _, c := range []struct {
		name  string
		spoil func(results []measured, l *load)
		want  string // in the error; "" none
	}{
		{"all well", func([]measured, *load) {}, ""},
		{"slow exec", func(r []measured, _ *load) {
			r[1].laps = map[string][]time.Duration{"up": {10}, "run": {10}, "start": {10}, "exec": {36}, "remove": {10}}
		}, "exec, × floor (p10) is 3.60"},
		{"a list that looks at every pod for every pod", func(_ []measured, l *load) { l.lists["ListContainers"] = [2]time.Duration{10, 1000} }, "ListContainers"},
		{"fat pods", func(_ []measured, l *load) { l.memory = 2 << 20 }, "memory"},
		{"no log", func(_ []measured, l *load) { l.log, l.copy = 0, 0 }, "stdout"},
	} {
		t.Run(c.name, func(t *testing.T) {
			results, loads := well()
			c.spoil(results, &loads[0])
			err := checkBudgets(io.Discard, results, loads)
			if (err == nil) != (c.want == "") || err != nil && (!strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n")) {
				t.Errorf("got %v, want %q alone", err, c.want)
			}
		})
	}
	if err := checkBudgets(io.Discard, nil, nil); err == nil {
		t.Error("nothing measured is within the budgets")
	}
}

func TestSteps(t *testing.T) {
	s := newSteps()
	for _, info := range []string{`{"timings":[{"step":"record","took":"1ms"},{"step":"cgroup","took":"20µs"}]}`, `{"timings":[{"step":"record","took":"3ms"}]}`, `{}`} {
		if err := s.add("pod", info); err != nil {
			t.Error(err)
		}
	}
	if want := []string{"pod: record", "pod: cgroup"}; !slices.Equal(s.order, want) {
		t.Errorf("got %v, want %v", s.order, want)
	}
	if got := s.took["pod: record"]; !slices.Equal(got, []time.Duration{time.Millisecond, 3 * time.Millisecond}) {
		t.Errorf("got %v", got)
	}
	for _, bad := range []string{"", `{"timings":[{"step":"a","took":"soon"}]}`} {
		if s.add("pod", bad) == nil {
			t.Errorf("%q is no error", bad)
		}
	}
}

func TestCount(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte(strings.Repeat("line\n", 3<<18)+"rest"), 0o600); err != nil {
		t.Fatal(err)
	}
	if n, err := count(path); n != 3<<18 || err != nil {
		t.Errorf("got %d, %v", n, err)
	}
	if _, err := count(path + "x"); err == nil {
		t.Error("no error")
	}
}

package main

import (
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

package network

import (
	"errors"
	"testing"
)

func FuzzParseBandwidth(f *testing.F) {
	for _, s := range []string{"10M", "1k", "0.5G", "1Ki", "", "M", "1e3", "-1M", "999P"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parseBandwidth(s)
		if err == nil && (n < minBandwidth || n > maxBandwidth) || err != nil && !errors.Is(err, ErrInvalid) {
			t.Fatalf("%q: got %d, %v", s, n, err)
		}
	})
}

func TestParseBandwidth(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want uint64 // 0: an error
	}{
		{"10M", 10e6}, {"1k", 1000}, {"1Ki", 1024}, {"1.5G", 15e8}, {"1P", 1e15},
		{"", 0}, {"M", 0}, {"10m", 0}, {"10MB", 0}, {"10 M", 0}, {"-1M", 0}, {"1.2.3M", 0}, {"999", 0}, {"2P", 0}, {"1e9", 0},
	} {
		if got, err := parseBandwidth(tt.in); got != tt.want || (err == nil) != (tt.want != 0) {
			t.Errorf("%q: got %d, %v, want %d", tt.in, got, err, tt.want)
		}
	}
}

func TestBandwidthOf(t *testing.T) {
	for _, tt := range []struct {
		name    string
		in      map[string]string
		want    Bandwidth
		invalid bool
	}{
		{"none", map[string]string{"a": "b"}, Bandwidth{}, false},
		{"both", map[string]string{annotationIngress: "1M", annotationEgress: "2k"}, Bandwidth{1e6, 2e3}, false},
		{"one", map[string]string{annotationEgress: "2k"}, Bandwidth{Egress: 2e3}, false},
		{"the second is wrong", map[string]string{annotationIngress: "1M", annotationEgress: "fast"}, Bandwidth{}, true},
	} {
		if got, err := BandwidthOf(tt.in); got != tt.want || errors.Is(err, ErrInvalid) != tt.invalid {
			t.Errorf("%s: got %v, %v", tt.name, got, err)
		}
	}
}

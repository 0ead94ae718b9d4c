package bridge

import "testing"

func TestBucket(t *testing.T) {
	for _, tt := range []struct {
		rate        uint64
		burst, wait uint32 // bytes
	}{
		{1e3, minBurst, 3},
		{8e6, minBurst, 25_000},
		{1e9, 6_250_000, 3_125_000},
		{1e15, maxBurst, maxQueue},
	} {
		got := bucket(1, tt.rate)
		if got.Rate != tt.rate/8 || got.Limit != tt.burst+tt.wait || got.Buffer == 0 {
			t.Errorf("%d bit/s: got %+v, want a burst of %d bytes and a queue of %d", tt.rate, got, tt.burst, tt.wait)
		}
	}
}

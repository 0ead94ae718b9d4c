package cri

import (
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// leastInterval is how far apart two measurements must be to make a rate: within less, a clock tick decides.
	leastInterval = time.Second
	// rateAge is how long a measurement is kept that nobody asked for again: of what was removed.
	rateAge = 10 * time.Minute
)

// rates remembers the CPU time that containers and pods had used when somebody asked last, to say how much they use
// now (usage_nano_cores). The kernel counts only totals; the kubelet derives the rate itself for containers, but not for
// pods. The zero value is ready. Safe for concurrent use.
type rates struct {
	mu     sync.Mutex
	known  map[string]rate // by id
	pruned time.Time
}

// rate is of the interval that ended at.
type rate struct {
	at    time.Time
	total uint64 // nanoseconds of CPU time
	cores *runtimeapi.UInt64Value
}

// of is nanoseconds of CPU time in a second; nil at first, when there is nothing to compare with. Who asks twice within
// leastInterval gets the same.
func (r *rates) of(id string, at time.Time, total uint64) *runtimeapi.UInt64Value {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.known == nil {
		r.known = map[string]rate{}
	}
	r.pruneLocked(at)
	last, ok := r.known[id]
	elapsed := at.Sub(last.at)
	switch {
	case !ok || total < last.total:
		r.known[id] = rate{at: at, total: total}
		return nil
	case elapsed < leastInterval:
		return last.cores
	}
	cores := number(uint64(float64(total-last.total) / elapsed.Seconds()))
	r.known[id] = rate{at: at, total: total, cores: cores}
	return cores
}

func (r *rates) pruneLocked(now time.Time) {
	if now.Sub(r.pruned) < rateAge {
		return
	}
	r.pruned = now
	for id, v := range r.known {
		if now.Sub(v.at) > rateAge {
			delete(r.known, id)
		}
	}
}

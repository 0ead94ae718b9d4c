// Package seccomptest has what tests of seccomp programs ask them.
package seccomptest

import "math"

// Values are arguments around v at which a comparison with it may change its mind.
func Values(v uint64) []uint64 {
	l := []uint64{v, v + 1, v - 1, ^v, 0, 1, math.MaxUint32, math.MaxUint32 + 1, math.MaxUint64, v | 1<<32, v + 1<<32, v - 1<<32, v | 1<<63, uint64(uint32(v)), uint64(uint32(v)) + 1, v &^ math.MaxUint32}
	for bit := range 64 {
		l = append(l, v^1<<bit)
	}
	return l
}

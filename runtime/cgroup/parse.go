package cgroup

import (
	"iter"
	"math"
	"strconv"
	"strings"
)

// Parsers of what the kernel writes. They take any input; what they do not
// understand (a later kernel's line, a custom kernel's) they pass over.

// flat iterates over a flat keyed file: "key value" lines (cgroup-v2.rst, "Format").
func flat(data string) iter.Seq2[string, uint64] {
	return func(yield func(string, uint64) bool) {
		for line := range strings.Lines(data) {
			key, v, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
			if !ok {
				continue
			}
			if n, err := strconv.ParseUint(v, 10, 64); err == nil && !yield(key, n) {
				return
			}
		}
	}
}

// populated says whether cgroup.events has live processes in the cgroup or below.
func populated(data string) bool {
	for key, v := range flat(data) {
		if key == "populated" {
			return v != 0
		}
	}
	return true // unknown: keep waiting
}

// number parses a single value; "max" and the v1 kernel's way to say unlimited are noLimit.
func number(data string) (uint64, bool) {
	data = strings.TrimSpace(data)
	if data == "max" {
		return noLimit, true
	}
	n, err := strconv.ParseUint(data, 10, 64)
	if err != nil {
		return 0, false
	}
	if n >= unlimitedV1 {
		n = noLimit
	}
	return n, true
}

const (
	// noLimit is how unsigned limits say unlimited.
	noLimit = math.MaxUint64
	// unlimitedV1 and above is unlimited in v1: PAGE_COUNTER_MAX pages in bytes, which is
	// LONG_MAX rounded down to a page, of up to 64 KiB.
	unlimitedV1 = math.MaxInt64 &^ 0xffff
)

// limit is number with -1 for unlimited.
func limit(data string) (int64, bool) {
	n, ok := number(data)
	if n == noLimit {
		return unlimited, ok
	}
	return int64(n), ok
}

// PSI is a pressure stall: how long processes waited for a resource (Documentation/accounting/psi.rst).
type PSI struct {
	Some, Full Pressure
}

// Pressure is one line of a pressure file.
type Pressure struct {
	Avg10, Avg60, Avg300 float64 // percent of the last 10, 60, 300 seconds
	Total                uint64  // nanoseconds
}

// parsePSI parses a pressure file; nil when it has no line that can be understood.
func parsePSI(data string) *PSI {
	var p PSI
	found := false
	for line := range strings.Lines(data) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		to := &p.Some
		switch fields[0] {
		case "some":
		case "full":
			to = &p.Full
		default:
			continue
		}
		found = true
		for _, f := range fields[1:] {
			key, v, _ := strings.Cut(f, "=")
			switch key {
			case "avg10":
				to.Avg10 = percent(v)
			case "avg60":
				to.Avg60 = percent(v)
			case "avg300":
				to.Avg300 = percent(v)
			case "total":
				if n, err := strconv.ParseUint(v, 10, 64); err == nil {
					to.Total = n * 1000
				}
			}
		}
	}
	if !found {
		return nil
	}
	return &p
}

func percent(s string) float64 {
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || math.IsNaN(f) || math.IsInf(f, 0) {
		return 0
	}
	return f
}

// DeviceIO is what was read and written on one block device.
type DeviceIO struct {
	Major, Minor          uint32
	ReadBytes, WriteBytes uint64
	Reads, Writes         uint64 // operations
}

// deviceIOs collects by device, in the order of appearance.
type deviceIOs struct{ list []DeviceIO }

func (d *deviceIOs) of(major, minor uint32) *DeviceIO {
	for i := range d.list {
		if d.list[i].Major == major && d.list[i].Minor == minor {
			return &d.list[i]
		}
	}
	d.list = append(d.list, DeviceIO{Major: major, Minor: minor})
	return &d.list[len(d.list)-1]
}

func deviceNumber(s string) (major, minor uint32, ok bool) {
	a, b, ok := strings.Cut(s, ":")
	if !ok {
		return 0, 0, false
	}
	x, err1 := strconv.ParseUint(a, 10, 32)
	y, err2 := strconv.ParseUint(b, 10, 32)
	return uint32(x), uint32(y), err1 == nil && err2 == nil
}

// parseIOStat parses v2 io.stat: "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0".
func parseIOStat(data string) []DeviceIO {
	var ios deviceIOs
	for line := range strings.Lines(data) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		major, minor, ok := deviceNumber(fields[0])
		if !ok {
			continue
		}
		dev := ios.of(major, minor)
		for _, f := range fields[1:] {
			key, v, _ := strings.Cut(f, "=")
			n, err := strconv.ParseUint(v, 10, 64)
			if err != nil {
				continue
			}
			switch key {
			case "rbytes":
				dev.ReadBytes = n
			case "wbytes":
				dev.WriteBytes = n
			case "rios":
				dev.Reads = n
			case "wios":
				dev.Writes = n
			}
		}
	}
	return ios.list
}

// parseBlkio adds a v1 blkio file of lines "8:0 Read 1" to ios; set stores one value.
func (d *deviceIOs) parseBlkio(data string, set func(dev *DeviceIO, op string, n uint64)) {
	for line := range strings.Lines(data) {
		fields := strings.Fields(line)
		if len(fields) != 3 {
			continue // "Total 3"
		}
		major, minor, ok := deviceNumber(fields[0])
		n, err := strconv.ParseUint(fields[2], 10, 64)
		if ok && err == nil {
			set(d.of(major, minor), fields[1], n)
		}
	}
}

// parseCPUMax parses v2 cpu.max: "max 100000" or "50000 100000", microseconds.
func parseCPUMax(data string) (quota int64, period uint64, ok bool) {
	fields := strings.Fields(data)
	if len(fields) != 2 {
		return 0, 0, false
	}
	quota, ok = limit(fields[0])
	period, err := strconv.ParseUint(fields[1], 10, 64)
	return quota, period, ok && err == nil
}

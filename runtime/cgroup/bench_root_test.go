package cgroup

import (
	"errors"
	"slices"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// containerResources is what cri makes of an ordinary container: the kubelet's limits
// and the default device rules.
func containerResources() *specs.LinuxResources {
	r := kubelet()
	r.Devices = []specs.LinuxDeviceCgroup{{Access: "rwm"}}
	for _, d := range [][2]int64{{1, 3}, {1, 5}, {1, 7}, {1, 8}, {1, 9}, {5, 0}, {5, 2}, {10, 200}, {136, -1}} {
		r.Devices = append(r.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: ptr(d[0]), Minor: ptr(d[1]), Access: "rwm"})
	}
	for _, kind := range []string{"c", "b"} {
		r.Devices = append(r.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: kind, Access: "m"})
	}
	return r
}

// clock collects the durations of named steps and reports their medians.
type clock map[string][]time.Duration

func (c clock) time(b *testing.B, step string, f func() error) {
	start := time.Now()
	err := f()
	c[step] = append(c[step], time.Since(start))
	if err != nil {
		b.Fatal(step, err)
	}
}

func (c clock) report(b *testing.B) {
	for step, l := range c {
		slices.Sort(l)
		b.ReportMetric(float64(l[len(l)/2].Microseconds()), step+"-p50-µs")
	}
}

// BenchmarkContainer is all that this package does in a container's life, without a process.
func BenchmarkContainer(b *testing.B) {
	d := newTestDriver(b)
	pod := newPod(b, d)
	r := containerResources()
	steps := clock{}
	for b.Loop() {
		c := d.Open(d.ContainerPath(pod, "c"))
		steps.time(b, "create", func() error { return c.Create(b.Context(), r) })
		var j *Join
		steps.time(b, "join", func() (err error) { j, err = c.Join(ByBirth); return errors.Join(err, j.Close()) })
		steps.time(b, "kill", func() error { return c.Kill(b.Context()) })
		steps.time(b, "remove", func() error { return c.Remove(b.Context()) })
	}
	steps.report(b)
}

// BenchmarkPod is the pod's part: the pod-level cgroup and the leaf of its init, without limits.
func BenchmarkPod(b *testing.B) {
	d := newTestDriver(b)
	pod := d.PodPath("", "p")
	steps := clock{}
	for b.Loop() {
		steps.time(b, "create", func() error { return second(d.CreatePod(b.Context(), pod)) })
		leaf := d.Open(d.InitPath(pod, "p"))
		steps.time(b, "leaf", func() error { return leaf.Create(b.Context(), nil) })
		steps.time(b, "remove", func() error {
			return errors.Join(leaf.Kill(b.Context()), leaf.Remove(b.Context()), d.RemovePod(b.Context(), pod))
		})
	}
	steps.report(b)
}

func BenchmarkExec(b *testing.B) {
	d := newTestDriver(b)
	c := newContainer(b, d, newPod(b, d), "c", nil)
	for b.Loop() {
		e, j, err := c.Exec("exec-1", ByBirth)
		if err := errors.Join(err, j.Close(), e.Kill(b.Context()), e.Remove(b.Context())); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkKillProcess is Kill of a cgroup with a process that has just come, and with one that has been there longer
// than the kernel's 10 ms between notifications.
func BenchmarkKillProcess(b *testing.B) {
	for name, age := range map[string]time.Duration{"young": 0, "old": 15 * time.Millisecond} {
		b.Run(name, func(b *testing.B) {
			d := newTestDriver(b)
			pod := newPod(b, d)
			steps := clock{}
			for b.Loop() {
				c := newContainer(b, d, pod, "c", nil)
				p := start(b, join(b, c, ByBirth), "wait")
				<-time.After(age) // part of what is measured: the process's age
				steps.time(b, "kill", func() error { return c.Kill(b.Context()) })
				p.killed(b)
				steps.time(b, "remove", func() error { return c.Remove(b.Context()) })
			}
			steps.report(b)
		})
	}
}

func BenchmarkStats(b *testing.B) {
	d := newTestDriver(b)
	c := newContainer(b, d, newPod(b, d), "c", kubelet())
	for b.Loop() {
		if _, err := c.Stats(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkUpdate(b *testing.B) {
	d := newTestDriver(b)
	c := newContainer(b, d, newPod(b, d), "c", kubelet())
	r := kubelet()
	for b.Loop() {
		if err := c.Update(b.Context(), r); err != nil {
			b.Fatal(err)
		}
	}
}

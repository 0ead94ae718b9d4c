package bridge

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/crisp-cri/crisp/network"
)

// BenchmarkSetupTeardown is one pod after the other, in a namespace that is made
// outside the measured time.
func BenchmarkSetupTeardown(b *testing.B) {
	for _, bb := range []struct {
		name  string
		cfg   Config
		ports []network.PortMapping
		full  int // pods that are there already
	}{
		{name: "dual stack"},
		{name: "v4 only", cfg: Config{Subnets: DefaultSubnets()[:1]}},
		{name: "no spoof check", cfg: Config{NoAntiSpoof: true}},
		{name: "tcp and udp host port", ports: []network.PortMapping{
			{Protocol: network.TCP, HostPort: 8080, ContainerPort: 80}, {Protocol: network.UDP, HostPort: 53, ContainerPort: 53}}},
		{name: "with 200 pods", full: 200},
	} {
		b.Run(bb.name, func(b *testing.B) {
			host := newNS(b)
			br := newBridge(b, host, bb.cfg)
			for i := range bb.full {
				addPod(b, br, fmt.Sprintf("old%d", i))
			}
			addPod(b, br, "first") // makes the bridge
			ctx := context.Background()
			var plan, setup, teardown []time.Duration
			for i := 0; b.Loop(); i++ {
				b.StopTimer()
				p := planned(b, br, fmt.Sprintf("pod%d", i), bb.ports...)
				b.StartTimer()
				t0 := time.Now()
				r := must(br.Plan(ctx, p.Pod))(b)
				t1 := time.Now()
				r = must(br.Setup(ctx, p.Pod, r))(b)
				t2 := time.Now()
				check(b, br.Teardown(ctx, p.Pod, r))
				plan, setup, teardown = append(plan, t1.Sub(t0)), append(setup, t2.Sub(t1)), append(teardown, time.Since(t2))
			}
			for name, ds := range map[string][]time.Duration{"setup": setup, "teardown": teardown} {
				slices.Sort(ds)
				b.ReportMetric(float64(ds[len(ds)/2].Microseconds()), "µs/"+name+"-p50")
				b.ReportMetric(float64(ds[len(ds)*99/100].Microseconds()), "µs/"+name+"-p99")
			}
		})
	}
}

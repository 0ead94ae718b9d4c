package bridge

import (
	"context"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/network/netns"
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
			for name, ds := range map[string][]time.Duration{"plan": plan, "setup": setup, "teardown": teardown} {
				slices.Sort(ds)
				b.ReportMetric(float64(ds[len(ds)/2].Nanoseconds())/1e3, "µs/"+name+"-p50")
				b.ReportMetric(float64(ds[len(ds)*99/100].Nanoseconds())/1e3, "µs/"+name+"-p99")
			}
		})
	}
}

// BenchmarkSetupTeardownParallel is eight at a time, their namespaces included.
func BenchmarkSetupTeardownParallel(b *testing.B) {
	host := newNS(b)
	br := newBridge(b, host, Config{})
	addPod(b, br, "first")
	ctx := context.Background()
	var n atomic.Int64
	b.SetParallelism(8 / runtime.GOMAXPROCS(0))
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			ns, err := netns.New()
			if err != nil {
				b.Error(err)
				return
			}
			p := network.Pod{ID: podID(fmt.Sprint(n.Add(1))), NetNS: ns}
			r, err := br.Plan(ctx, p)
			if err == nil {
				r, err = br.Setup(ctx, p, r)
			}
			if err == nil {
				err = br.Teardown(ctx, p, r)
			}
			if err != nil {
				b.Error(err)
			}
			_ = ns.Close()
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "pods/s")
}

// BenchmarkTraffic is what a packet from pod to pod costs, with and without the check
// of source addresses: a datagram there and back, and 64 KiB by TCP.
func BenchmarkTraffic(b *testing.B) {
	for _, bb := range []struct {
		name string
		cfg  Config
	}{{"spoof check", Config{}}, {"no spoof check", Config{NoAntiSpoof: true}}} {
		host := newNS(b)
		br := newBridge(b, host, bb.cfg)
		p, q := addPod(b, br, "a"), addPod(b, br, "b")
		serve(b, q.NetNS, "udp", ":53", "b")
		b.Run(bb.name+"/udp", func(b *testing.B) {
			c := must(netlinkIn(p.NetNS, func() (net.Conn, error) { return net.Dial("udp", at(q.ip4(), 53)) }))(b)
			defer func() { _ = c.Close() }()
			var buf [64]byte
			for b.Loop() {
				must(c.Write(buf[:1]))(b)
				must(c.Read(buf[:]))(b)
			}
		})
		b.Run(bb.name+"/tcp", func(b *testing.B) {
			l := must(netlinkIn(q.NetNS, func() (net.Listener, error) { return net.Listen("tcp", ":0") }))(b)
			done := make(chan int64) // the bytes received; sent once
			go func() {
				c, err := l.Accept()
				if err != nil {
					done <- 0
					return
				}
				n, _ := io.Copy(io.Discard, c) // The number tells.
				_ = c.Close()
				done <- n
			}()
			_, port, _ := net.SplitHostPort(l.Addr().String())
			c := must(netlinkIn(p.NetNS, func() (net.Conn, error) { return net.Dial("tcp", q.ip4().String()+":"+port) }))(b)
			block := make([]byte, 64<<10)
			b.SetBytes(int64(len(block)))
			sent := int64(0)
			for b.Loop() {
				sent += int64(must(c.Write(block))(b))
			}
			_ = c.Close()
			if got := <-done; got != sent {
				b.Errorf("received %d bytes of %d", got, sent)
			}
			_ = l.Close()
		})
	}
}

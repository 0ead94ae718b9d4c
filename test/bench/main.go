// Command bench measures how long a pod takes and what many of them cost, and prints
// each operation with its ratio to the floor, all from one run (make bench, as root):
//
//	floor   the bare system calls for the same pod, no runtime at all (floor.go, package floor)
//	crispd  a crispd of its own (package node)
//	others  any runtime whose CRI socket is given: -peer containerd=unix:///run/…
//
// Machines differ and are never quite idle: compare ratios, not milliseconds.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// operations in the order of a pod's life; "up" is the sum of the first three.
var operations = []string{"run", "create", "start", "exec", "stop", "remove"}

// target makes one pod after another.
type target interface {
	name() string
	// cycle takes one pod from nothing to nothing and calls lap after each operation; with "" after
	// what is not to be measured.
	cycle(ctx context.Context, i int, lap func(operation string)) error
	// cpu is what the target has used of the processors so far, with all that it has started and that has ended; 0 if it
	// cannot tell.
	cpu() (time.Duration, error)
	close() error
}

func main() {
	var o options
	flag.StringVar(&o.crispd, "crispd", "bin/crispd", "the daemon; crisp-init is beside it; \"\": leave it out")
	flag.StringVar(&o.payload, "payload", "out/payload", "test/payload, static")
	flag.StringVar(&o.floor, "floor", "out/floor", "test/bench/floor, static")
	flag.StringVar(&o.trivial, "trivial", "out/trivial", "test/bench/trivial, static")
	flag.IntVar(&o.n, "n", 100, "pods to measure of each target, one after another")
	flag.IntVar(&o.pods, "pods", 200, "pods to hold at once")
	flag.IntVar(&o.peerPods, "peer-pods", 20, "pods that a peer is to hold")
	flag.IntVar(&o.lines, "lines", 1_000_000, "lines of 100 bytes that a container prints")
	flag.StringVar(&o.spdy, "spdy", "", "test/cri/spdyexec; \"\": exec over SPDY is not measured")
	quick := flag.Bool("quick", false, "n 30, pods 60, lines 200000: less than a minute")
	flag.BoolVar(&o.budgets, "budgets", false, "fail when a budget is exceeded; see budgets")
	flag.BoolVar(&o.bare, "bare-floor", false, "the floor makes cgroups in cgroup2 only and sets no limits")
	flag.Var(&o.peers, "peer", "NAME=ENDPOINT of another runtime's CRI socket; may be repeated")
	flag.Parse()
	if *quick {
		o.n, o.pods, o.lines = 30, 60, 200_000
	}
	// What reads our output may end before we do (head): there is a floor and a crispd to end.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type options struct {
	crispd, payload, floor, trivial, spdy string
	n, pods, peerPods, lines              int
	bare                                  bool // the floor does less: floorTarget
	budgets                               bool
	peers                                 peerList
}

// peerList collects -peer flags.
type peerList [][2]string

func (p *peerList) String() string { return fmt.Sprint(*p) }
func (p *peerList) Set(text string) error {
	name, endpoint, ok := strings.Cut(text, "=")
	if !ok {
		return errors.New("want NAME=ENDPOINT")
	}
	*p = append(*p, [2]string{name, endpoint})
	return nil
}

// measured are the durations of one target, by operation.
type measured struct {
	name string
	laps map[string][]time.Duration
	cpu  time.Duration // of all rounds
}

func run(ctx context.Context, o options) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("needs root: makes pods")
	}
	targets, closeAll, err := openTargets(ctx, o)
	defer func() { err = errors.Join(err, closeAll()) }()
	if err != nil {
		return err
	}
	results := make([]measured, len(targets))
	for i, t := range targets {
		results[i] = measured{name: t.name(), laps: map[string][]time.Duration{}}
	}
	// Interleaved, so that what else the machine does hits all alike; the first round warms up.
	for round := range o.n + 1 {
		for i, t := range targets {
			up := time.Duration(0)
			last := time.Now()
			lap := func(op string) {
				now := time.Now()
				took := now.Sub(last)
				last = now
				if round == 0 || op == "" {
					return
				}
				results[i].laps[op] = append(results[i].laps[op], took)
				if op == "run" || op == "create" || op == "start" {
					up += took
				}
			}
			before, err := t.cpu()
			if err != nil {
				return err
			}
			last = time.Now()
			if err := t.cycle(ctx, round, lap); err != nil {
				return fmt.Errorf("%s, pod %d: %w", t.name(), round, err)
			}
			after, err := t.cpu()
			if err != nil {
				return err
			}
			if round > 0 {
				results[i].cpu += after - before
				results[i].laps["up"] = append(results[i].laps["up"], up)
			}
		}
	}
	print(results, o)
	var names []string
	var loads []load
	for _, t := range targets {
		r, ok := t.(*runtimeTarget)
		if !ok {
			continue
		}
		if r.steps != nil {
			r.steps.print()
		}
		l, err := r.measureLoad(ctx, o)
		if err != nil {
			return fmt.Errorf("%s: %w", r.title, err)
		}
		names, loads = append(names, r.title), append(loads, l)
	}
	printLoads(names, loads)
	if o.budgets {
		return checkBudgets(os.Stdout, results, loads)
	}
	return nil
}

// print writes a table in Markdown.
func print(results []measured, o options) {
	fmt.Printf("%d pods each, one at a time, interleaved; milliseconds p10 / p50 / p95; (p10 and p50 × floor's)\n\n", o.n)
	fmt.Print("| |")
	for _, r := range results {
		fmt.Printf(" %s |", r.name)
	}
	fmt.Print("\n|---|" + strings.Repeat("---|", len(results)) + "\n")
	for _, op := range append([]string{"up"}, operations...) {
		label := op
		if op == "up" {
			label = "**up** (run + create + start)"
		}
		fmt.Printf("| %s |", label)
		floor := results[0].laps[op]
		for i, r := range results {
			p10, p50, p95 := percentile(r.laps[op], 10), percentile(r.laps[op], 50), percentile(r.laps[op], 95)
			cell := fmt.Sprintf("%.2f / %.2f / %.2f", ms(p10), ms(p50), ms(p95))
			if i > 0 && len(floor) > 0 {
				cell += fmt.Sprintf(" (%.1f, %.1f ×)", float64(p10)/float64(percentile(floor, 10)), float64(p50)/float64(percentile(floor, 50)))
			}
			fmt.Printf(" %s |", cell)
		}
		fmt.Println()
	}
	fmt.Print("| processor time per pod, up to its removal |")
	for i, r := range results {
		cell := " –"
		if r.cpu > 0 {
			cell = fmt.Sprintf(" %.2f", ms(r.cpu)/float64(o.n))
			if i > 0 {
				cell += fmt.Sprintf(" (%.1f ×)", float64(r.cpu)/float64(results[0].cpu))
			}
		}
		fmt.Print(cell + " |")
	}
	fmt.Println()
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// percentile by nearest rank; 0 for no values.
func percentile(all []time.Duration, p int) time.Duration {
	if len(all) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(all))
	return sorted[min(len(sorted)-1, (len(sorted)*p+99)/100-1)]
}

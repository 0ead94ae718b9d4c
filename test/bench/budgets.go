package main

import (
	"errors"
	"fmt"
	"io"
)

// budget is a limit that holds on any machine, busy or not: a ratio of things that were measured in one run, the fastest tenth of
// many or the best of some, or memory.
type budget struct {
	name    string
	typical float64 // on the development machine, idle and at load 15 alike
	limit   float64 // at least 1.6 × that: who exceeds it has made something worse
	got     func(r *outcome) float64
}

// outcome is what one run has measured, as far as budgets go.
type outcome struct {
	floor, crispd measured
	load          load
}

func (r *outcome) overFloor(op string) float64 {
	return float64(percentile(r.crispd.laps[op], 10)) / float64(percentile(r.floor.laps[op], 10))
}

// perPod is how much longer a call takes for each pod when there are all than when there are few; what it costs without any pod
// makes it less than 1.
func (r *outcome) perPod(what string) float64 {
	pair := r.load.lists[what]
	return float64(pair[1]) / float64(r.load.pods) / (float64(pair[0]) / float64(r.load.few))
}

var budgets = []budget{
	{"pod up, × floor (p10)", 1.9, 3.2, func(r *outcome) float64 { return r.overFloor("up") }},
	{"run, × floor (p10)", 1.6, 3, func(r *outcome) float64 { return r.overFloor("run") }},
	{"start, × floor (p10)", 1.7, 3.2, func(r *outcome) float64 { return r.overFloor("start") }},
	{"exec, × floor (p10)", 1.9, 3.5, func(r *outcome) float64 { return r.overFloor("exec") }},
	{"remove, × floor (p10)", 1.5, 4, func(r *outcome) float64 { return r.overFloor("remove") }},
	{"processor time per pod, × floor", 2, 3.5, func(r *outcome) float64 { return float64(r.crispd.cpu) / float64(r.floor.cpu) }},
	{"memory per pod, MiB of PSS", 0.8, 1.5, func(r *outcome) float64 { return float64(r.load.memory) / (1 << 20) }},
	{"up of the last fifth of the pods, × first (p10)", 1.1, 2, func(r *outcome) float64 {
		return float64(percentile(r.load.last, 10)) / float64(percentile(r.load.first, 10))
	}},
	{"ListPodSandbox per pod, × with a tenth of the pods", 0.2, 2, func(r *outcome) float64 { return r.perPod("ListPodSandbox") }},
	{"ListContainers per pod, × with a tenth of the pods", 0.2, 2, func(r *outcome) float64 { return r.perPod("ListContainers") }},
	{"ListContainerStats per pod, × with a tenth of the pods", 1, 2, func(r *outcome) float64 { return r.perPod("ListContainerStats") }},
	{"ListPodSandboxMetrics per pod, × with a tenth of the pods", 1, 2, func(r *outcome) float64 { return r.perPod("ListPodSandboxMetrics") }},
	{"pipe to file without a runtime, × stdout into the log", 2, 5, func(r *outcome) float64 { return r.load.copy / r.load.log }},
}

// checkBudgets prints all and fails if one is exceeded. results begin with the floor and crispd; loads with crispd.
func checkBudgets(out io.Writer, results []measured, loads []load) error {
	if len(results) < 2 || len(loads) < 1 {
		return errors.New("budgets need crispd and the floor")
	}
	r := &outcome{results[0], results[1], loads[0]}
	fmt.Fprint(out, "\n| budget | got | typical | limit |\n|---|---|---|---|\n")
	var errs []error
	for _, b := range budgets {
		got := b.got(r)
		fmt.Fprintf(out, "| %s | %.2f | %.1f | %.1f |\n", b.name, got, b.typical, b.limit)
		if !(got <= b.limit) { // NaN exceeds it, too
			errs = append(errs, fmt.Errorf("%s is %.2f, above its limit of %.1f", b.name, got, b.limit))
		}
	}
	return errors.Join(errs...)
}

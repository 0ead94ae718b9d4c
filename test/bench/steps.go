package main

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// steps is how long the steps of making pods and containers took by crispd's own clock, from the verbose statuses of the pods that
// were made: what of an operation's time is whose.
type steps struct {
	order []string // "pod: cgroup", as first seen
	took  map[string][]time.Duration
}

func newSteps() *steps { return &steps{took: map[string][]time.Duration{}} }

func (r *runtimeTarget) readSteps(ctx context.Context, pod, container string) error {
	p, err := r.cri.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod, Verbose: true})
	if err != nil {
		return err
	}
	c, err := r.cri.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: container, Verbose: true})
	if err != nil {
		return err
	}
	for _, of := range []struct{ what, info string }{{"pod", p.Info["info"]}, {"container", c.Info["info"]}} {
		if err := r.steps.add(of.what, of.info); err != nil {
			return fmt.Errorf("read timings of %s: %w", of.what, err)
		}
	}
	return nil
}

// add reads the timings of a verbose status.
func (s *steps) add(what, info string) error {
	var v struct {
		Timings []struct{ Step, Took string }
	}
	if err := json.Unmarshal([]byte(info), &v); err != nil {
		return err
	}
	for _, t := range v.Timings {
		took, err := time.ParseDuration(t.Took)
		if err != nil {
			return err
		}
		name := what + ": " + t.Step
		if s.took[name] == nil {
			s.order = append(s.order, name)
		}
		s.took[name] = append(s.took[name], took)
	}
	return nil
}

// print writes a table in Markdown.
func (s *steps) print() {
	if len(s.order) == 0 {
		return
	}
	fmt.Print("\n| step, by crispd's own clock | ms, p50 / p95 |\n|---|---|\n")
	for _, name := range s.order {
		fmt.Printf("| %s | %.2f / %.2f |\n", name, ms(percentile(s.took[name], 50)), ms(percentile(s.took[name], 95)))
	}
}

package cri

import (
	"fmt"
	"sync"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/test/images"
)

// Every Stop and Remove succeeds of what is not there, of what was stopped or removed before, and while another call does the
// same (critest "idempotence", and what it leaves out).
func TestStopsAndRemovalsAreIdempotent(t *testing.T) {
	w := need(t)
	ctx := t.Context()
	const nobody = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	ref := w.push(t, "idempotent", images.Image{Layers: [][]images.File{{{Name: "f", Text: "idempotent"}}}})
	pull := func() string {
		id, err := w.im.PullImage(ctx, &runtimeapi.ImageSpec{Image: ref}, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	calls := map[string]struct {
		make func() string // something to stop or remove
		call func(id string) error
	}{
		"StopContainer": {func() string { return w.pod(t).run([]string{"trap"}).id }, func(id string) error { return w.rt.StopContainer(ctx, id, 1) }},
		"StopContainer of an exited one": {func() string { c := w.pod(t).run([]string{"true"}); c.wait(); return c.id },
			func(id string) error { return w.rt.StopContainer(ctx, id, 1) }},
		"RemoveContainer":                {func() string { return w.pod(t).run([]string{"ignore"}).id }, func(id string) error { return w.rt.RemoveContainer(ctx, id) }},
		"RemoveContainer of a created":   {func() string { return w.pod(t).create([]string{"sleep"}).id }, func(id string) error { return w.rt.RemoveContainer(ctx, id) }},
		"StopPodSandbox":                 {func() string { p := w.pod(t); p.run([]string{"ignore"}); return p.id }, func(id string) error { return w.rt.StopPodSandbox(ctx, id) }},
		"RemovePodSandbox of a running":  {func() string { p := w.pod(t); p.run([]string{"ignore"}); return p.id }, func(id string) error { return w.rt.RemovePodSandbox(ctx, id) }},
		"RemovePodSandbox of an empty":   {func() string { return w.pod(t).id }, func(id string) error { return w.rt.RemovePodSandbox(ctx, id) }},
		"RemoveImage by id":              {pull, func(id string) error { return w.im.RemoveImage(ctx, &runtimeapi.ImageSpec{Image: id}) }},
		"RemoveImage by name":            {func() string { pull(); return ref }, func(id string) error { return w.im.RemoveImage(ctx, &runtimeapi.ImageSpec{Image: id}) }},
		"RemoveImage of an unknown name": {func() string { return "registry.example/nobody/has/this:1" }, func(id string) error { return w.im.RemoveImage(ctx, &runtimeapi.ImageSpec{Image: id}) }},
	}
	for name, c := range calls {
		t.Run(name, func(t *testing.T) {
			if err := c.call(nobody); err != nil {
				t.Errorf("unknown: %v", err)
			}
			if err := c.call("sha256:" + nobody); err != nil {
				t.Errorf("unknown: %v", err)
			}
			id := c.make()
			var all sync.WaitGroup
			for i := range 6 {
				all.Go(func() {
					if err := c.call(id); err != nil {
						t.Errorf("call %d of several: %v", i, err)
					}
				})
			}
			all.Wait()
			for i := range 2 {
				if err := c.call(id); err != nil {
					t.Errorf("again, %d: %v", i, err)
				}
			}
		})
	}
}

// All of them at once for one pod: whoever comes first, all succeed and nothing is left.
func TestStopsAndRemovalsAtOnce(t *testing.T) {
	w := need(t)
	ctx := t.Context()
	w.leavesNothing(t, func() {
		for round := range 3 {
			p := w.pod(t)
			c, created := p.run([]string{"ignore"}), p.create([]string{"sleep"})
			var all sync.WaitGroup
			for name, call := range map[string]func() error{
				"StopContainer":    func() error { return w.rt.StopContainer(ctx, c.id, 1) },
				"kill":             func() error { return w.rt.StopContainer(ctx, c.id, 0) },
				"RemoveContainer":  func() error { return w.rt.RemoveContainer(ctx, c.id) },
				"remove created":   func() error { return w.rt.RemoveContainer(ctx, created.id) },
				"StopPodSandbox":   func() error { return w.rt.StopPodSandbox(ctx, p.id) },
				"RemovePodSandbox": func() error { return w.rt.RemovePodSandbox(ctx, p.id) },
			} {
				for i := range 2 {
					all.Go(func() {
						if err := call(); err != nil {
							t.Error(fmt.Sprintf("round %d, %s %d: %v", round, name, i, err))
						}
					})
				}
			}
			all.Wait()
			p.remove() // its logs
		}
	})
}

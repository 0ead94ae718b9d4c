package podsandbox

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crisp-cri/crisp/runtime/cgroup"
	"github.com/crisp-cri/crisp/runtime/spawn"
)

// C-74, C-79: all calls in any order on the same few objects, by callers some of whom leave early, while containers
// end and inits die. Nothing deadlocks, every error is one of those that are documented, and in the end nothing is left.
func TestStress(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	anyPod := func() string {
		if l := d.Pods(); len(l) > 0 {
			return l[rand.IntN(len(l))].ID
		}
		return newID()
	}
	anyContainer := func() string {
		if l := d.Containers(); len(l) > 0 {
			return l[rand.IntN(len(l))].ID
		}
		return newID()
	}
	calls := []func(ctx context.Context) error{
		func(ctx context.Context) error {
			c := podConfig(fmt.Sprint("p", rand.IntN(3)))
			if rand.IntN(4) == 0 {
				c.Echo = []byte("another")
			}
			_, err := d.RunPod(ctx, c)
			return err
		},
		func(ctx context.Context) error { return d.StopPod(ctx, anyPod()) },
		func(ctx context.Context) error { return d.RemovePod(ctx, anyPod()) },
		func(ctx context.Context) error {
			_, err := d.CreateContainer(ctx, anyPod(), containerConfig(fmt.Sprint("c", rand.IntN(3)), []string{"/program", "/stubborn", "/missing"}[rand.IntN(3)]))
			return err
		},
		func(ctx context.Context) error { return d.StartContainer(ctx, anyContainer()) },
		func(ctx context.Context) error { return d.StartContainer(ctx, anyContainer()) },
		func(ctx context.Context) error {
			return d.StopContainer(ctx, anyContainer(), time.Duration(rand.IntN(20))*time.Millisecond)
		},
		func(ctx context.Context) error { return d.RemoveContainer(ctx, anyContainer()) },
		func(ctx context.Context) error { return d.ReopenLog(ctx, anyContainer()) },
		func(ctx context.Context) error {
			_, err := d.ExecSync(ctx, anyContainer(), []string{"echo"}, time.Second)
			return err
		},
		func(ctx context.Context) error {
			return d.UpdateContainer(ctx, anyContainer(), &specs.LinuxResources{}, nil)
		},
		func(context.Context) error { _, err := d.ContainerStats(anyContainer()); return err },
		func(context.Context) error { // a container ends
			d.world.mu.Lock()
			defer d.world.mu.Unlock()
			for _, i := range d.inits {
				for id := range i.containers {
					i.exitLocked(id, rand.IntN(2))
					return nil
				}
			}
			return nil
		},
		func(context.Context) error { // sometimes an init dies
			d.world.mu.Lock()
			defer d.world.mu.Unlock()
			for _, i := range d.inits {
				if rand.IntN(20) == 0 {
					i.dieLocked()
				}
				return nil
			}
			return nil
		},
		func(context.Context) error { d.Operations(); return nil },
	}
	expected := []error{ErrNotFound, ErrState, ErrExists, context.DeadlineExceeded, context.Canceled, cgroup.ErrNotFound, spawn.ErrGone, spawn.ErrState, spawn.ErrNotFound}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for ctx.Err() == nil {
				call, cancel := context.WithTimeout(ctx, time.Duration(rand.IntN(50))*time.Millisecond)
				err := calls[rand.IntN(len(calls))](call)
				cancel()
				var start *spawn.StartError
				if err == nil || errors.As(err, &start) {
					continue
				}
				known := false
				for _, e := range expected {
					known = known || errors.Is(err, e)
				}
				if !known {
					t.Errorf("got error %v", err)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() {
		wg.Wait()
		d.Manager.busy.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatalf("deadlock: %+v", d.Operations())
	}
	d.retryUndoing()
	d.removeAll()
}

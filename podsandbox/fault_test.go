package podsandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The sweeps below let the n-th operation on the kernel, the network, the images or the store fail, for
// n = 1, 2, 3 … until the request succeeds, and check each time what must always be true (I1 to I4):
//
//   - An object that a caller does not know leaves nothing behind, at once or when the janitor has been.
//   - One that is known is listed, can be stopped and removed, and then leaves nothing behind.
//   - The same request succeeds when the fault is over.

// maxSweep is more operations than any request has.
const maxSweep = 200

// sweep calls one with faults at n, and at n and m for all m after n, until there is nothing left to fail.
func sweep(t *testing.T, one func(t *testing.T, faults []int) (failed bool, ops int)) {
	for n := 1; ; n++ {
		if n > maxSweep {
			t.Fatal("it never succeeds")
		}
		failed, ops := one(t, []int{n})
		if t.Failed() {
			return
		}
		if !failed && n > ops {
			return
		}
		for m := n + 1; m <= ops; m++ {
			one(t, []int{n, m})
			if t.Failed() {
				return
			}
		}
	}
}

// where names the operations that failed, for messages.
func (d *daemon) where(faults []int) string {
	var l []string
	for _, n := range faults {
		l = append(l, d.describe(n))
	}
	return strings.Join(l, " and ")
}

func TestRunPodFaults(t *testing.T) {
	sweep(t, func(t *testing.T, faults []int) (bool, int) {
		d := newDaemon(t)
		defer d.close()
		d.reset()
		d.failAt(faults...)
		id, err := d.RunPod(context.Background(), podConfig("a"))
		ops := d.total()
		if err != nil {
			if !errors.Is(err, errInjected) || !strings.HasPrefix(err.Error(), `cannot run pod "ns/a": step `) {
				t.Errorf("%s: got error %v", d.where(faults), err)
			}
			if l := d.Pods(); len(l) > 0 {
				t.Errorf("%s: a pod that was not made is shown: %+v", d.where(faults), l[0])
			}
			// The same request works at once, even while something of the first is left.
			d.heal()
			if id, err = d.RunPod(context.Background(), podConfig("a")); err != nil {
				t.Errorf("%s: retry: %v", d.where(faults), err)
			}
			d.retryUndoing()
			if l := d.leftovers(id); len(l) > 0 {
				t.Errorf("%s: left over:\n%s", d.where(faults), strings.Join(l, "\n"))
			}
			d.removeAll()
			return true, ops
		}
		if p := d.mustPod(id); p.State != PodReady {
			t.Errorf("%s: got %+v", d.where(faults), p)
		}
		d.removeAll()
		return false, ops
	})
}

func TestCreateContainerFaults(t *testing.T) {
	sweep(t, func(t *testing.T, faults []int) (bool, int) {
		d := newDaemon(t)
		defer d.close()
		pod := d.run("a")
		before := d.leftovers()
		d.reset()
		d.failAt(faults...)
		id, err := d.CreateContainer(context.Background(), pod, volumeConfig("c"))
		ops := d.total()
		failed := err != nil
		if failed {
			if !errors.Is(err, errInjected) || !strings.HasPrefix(err.Error(), `cannot create container "ns/a/c": step `) {
				t.Errorf("%s: got error %v", d.where(faults), err)
			}
			if l := d.Containers(); len(l) > 0 {
				t.Errorf("%s: a container that was not made is shown: %+v", d.where(faults), l[0])
			}
			d.heal()
			d.retryUndoing()
			if l := d.leftovers(); fmt.Sprint(l) != fmt.Sprint(before) {
				t.Errorf("%s: left over:\n%s", d.where(faults), strings.Join(l, "\n"))
			}
			if id, err = d.CreateContainer(context.Background(), pod, volumeConfig("c")); err != nil {
				t.Errorf("%s: retry: %v", d.where(faults), err)
			}
		}
		d.heal()
		if err := d.StartContainer(context.Background(), id); err != nil {
			t.Errorf("%s: start: %v", d.where(faults), err)
		}
		d.removeAll()
		return failed, ops
	})
}

// Stop and remove: what fails can be repeated until it works, and the pod is listed for as long.
func TestRemovePodFaults(t *testing.T) {
	sweep(t, func(t *testing.T, faults []int) (bool, int) {
		d := newDaemon(t)
		defer d.close()
		ctx := context.Background()
		pod := d.run("a")
		d.startNew(pod, "r", "/stubborn")
		d.create(pod, "c")
		d.reset()
		d.failAt(faults...)
		err := d.StopPod(ctx, pod)
		if err == nil {
			err = d.RemovePod(ctx, pod)
		}
		d.Manager.busy.Wait()
		ops := d.total()
		if err == nil {
			if l := d.leftovers(); len(l) > 0 {
				t.Errorf("%s: left over:\n%s", d.where(faults), strings.Join(l, "\n"))
			}
			return false, ops
		}
		if !errors.Is(err, errInjected) {
			t.Errorf("%s: got error %v", d.where(faults), err)
		}
		if p, err := d.Pod(pod); err != nil || p.State != PodNotReady {
			t.Errorf("%s: got %+v, %v", d.where(faults), p, err)
		}
		d.heal()
		d.removeAll()
		return true, ops
	})
}

// What cannot be undone stays on record: a daemon that is killed before it could leaves it to the next.
func TestUndoKeepsRecordOfPod(t *testing.T) {
	d := newDaemon(t)
	fails := func(context.Context) error { return errInjected }
	d.hook("network.Setup", fails)
	d.hook("network.Teardown", fails)
	if _, err := d.RunPod(context.Background(), podConfig("a")); !errors.Is(err, errInjected) {
		t.Errorf("got %v", err)
	}
	d.close()
	d.hook("network.Teardown", nil)
	d.reset()
	next := d.world.daemon(nil)
	defer next.close()
	if n := next.did("network.Teardown"); n != 1 {
		t.Errorf("the next daemon tore the network down %d times", n)
	}
	if l := next.leftovers(); len(l) > 0 {
		t.Errorf("left over: %v", l)
	}
}

// A pod whose deletion was cut short is not taken for one whose making was: its addresses may be another pod's.
func TestRemovalCutShort(t *testing.T) {
	d := newDaemon(t)
	pod := d.run("a")
	d.hook("store.removePodRest", func(context.Context) error { return errInjected })
	if err := d.RemovePod(context.Background(), pod); !errors.Is(err, errInjected) {
		t.Errorf("got %v", err)
	}
	d.close()
	if err := os.Remove(filepath.Join(d.store.podDir(pod), stateFile)); err != nil { // as far as the killed daemon got
		t.Fatal(err)
	}
	d.hook("store.removePodRest", nil)
	d.reset()
	next := d.world.daemon(nil)
	defer next.close()
	if n := next.did("network.Teardown"); n != 0 {
		t.Errorf("the next daemon tore the network down %d times more", n)
	}
	if l := next.leftovers(); len(l) > 0 {
		t.Errorf("left over: %v", l)
	}
}

// A container whose processes cannot be killed keeps its record and its image's layers, below which they run.
func TestUndoKeepsWhatRuns(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(d *daemon, pod string) error
	}{
		{"create", func(d *daemon, pod string) error {
			d.hook("init.Create", func(context.Context) error { return errInjected })
			_, err := d.CreateContainer(context.Background(), pod, containerConfig("c"))
			return err
		}},
		{"remove", func(d *daemon, pod string) error {
			return d.RemoveContainer(context.Background(), d.create(pod, "c"))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDaemon(t)
			defer d.close()
			pod := d.run("a")
			d.hook("cgroup.Kill", func(context.Context) error { return errInjected })
			if err := tt.do(d, pod); !errors.Is(err, errInjected) {
				t.Errorf("got %v", err)
			}
			l := strings.Join(d.leftovers(pod), "\n")
			if !strings.Contains(l, "image ") {
				t.Errorf("its image was given back, left are: %s", l)
			}
			if dirs, err := ids(filepath.Join(d.store.podDir(pod), containersDir)); len(dirs) != 1 {
				t.Errorf("got records %v, %v", dirs, err)
			}
			d.hook("cgroup.Kill", nil)
			d.retryUndoing()
			d.removeAll()
		})
	}
}

// A full disk keeps nobody from stopping and removing (C-20).
func TestFullDisk(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	ctx := context.Background()
	pod := d.run("a")
	id := d.startNew(pod, "r")
	full := errors.New("no space left on device")
	d.hook("store.appendState", func(context.Context) error { return full })
	if err := d.StopContainer(ctx, id, time.Minute); err != nil {
		t.Error(err)
	}
	if c := d.mustContainer(id); c.State != ContainerExited || c.ExitCode != 143 {
		t.Errorf("got %+v", c)
	}
	if err := d.StopPod(ctx, pod); err != nil {
		t.Error(err)
	}
	if _, err := d.RunPod(ctx, podConfig("b")); !errors.Is(err, full) {
		t.Errorf("got %v, want ENOSPC", err)
	}
	d.removeAll()
}

// crashSweep runs script in a daemon that dies at its n-th operation, for all n, and then lets check see what
// the next daemon makes of it.
func crashSweep(t *testing.T, script func(d *daemon), check func(d *daemon)) {
	for n := 1; ; n++ {
		if n > maxSweep {
			t.Fatal("it never ends")
		}
		d := newDaemon(t)
		d.reset()
		d.crashAt(n)
		d.crashLater = n
		script(d)
		d.Manager.busy.Wait()
		_ = d.Close() // dead daemons tell nobody
		d.world.mu.Lock()
		crashed := d.dead
		d.world.mu.Unlock()
		at := d.describe(n)
		d.reset()
		t.Run(at, func(t *testing.T) {
			d.world.t = t
			next := &daemon{Manager: d.manager(nil), world: d.world}
			check(next)
			// Whatever is shown can be removed, and nothing is left.
			next.removeAll()
			next.close()
			// Nor does another start find anything.
			last := &daemon{Manager: d.manager(nil), world: d.world}
			if l := last.leftovers(); len(last.Pods()) > 0 || len(l) > 0 {
				t.Errorf("after another start: %v", l)
			}
			last.close()
		})
		d.world.t = t
		if !crashed || t.Failed() {
			return
		}
	}
}

// C-01: what was not answered is gone or ready, and the retry works and gives one pod.
func TestCrashInRunPod(t *testing.T) {
	var id string
	crashSweep(t, func(d *daemon) {
		id, _ = d.RunPod(context.Background(), podConfig("a"))
	}, func(d *daemon) {
		l := d.Pods()
		if len(l) > 1 || len(l) == 1 && l[0].State != PodReady || id != "" && (len(l) == 0 || l[0].ID != id) {
			d.t.Errorf("got pods %+v, the caller knows %q", l, id)
		}
		if len(l) == 0 && len(d.leftovers()) > 0 {
			d.t.Errorf("left over: %v", d.leftovers())
		}
		again := d.run("a")
		if len(l) == 1 && again != l[0].ID {
			d.t.Errorf("got %s, want %s", again, l[0].ID)
		}
		if len(d.Pods()) != 1 {
			d.t.Errorf("got pods %+v", d.Pods())
		}
		d.startNew(again, "c")
	})
}

// C-02, C-03: created or not at all, started once or not at all.
func TestCrashInContainer(t *testing.T) {
	var pod, id string
	var started bool
	crashSweep(t, func(d *daemon) {
		ctx := context.Background()
		started = false
		id = ""
		var err error
		if pod, err = d.RunPod(ctx, podConfig("a")); err != nil {
			return
		}
		if id, err = d.CreateContainer(ctx, pod, volumeConfig("c")); err != nil {
			return
		}
		started = d.StartContainer(ctx, id) == nil
	}, func(d *daemon) {
		l := d.Containers()
		if id != "" && (len(l) != 1 || l[0].ID != id) {
			d.t.Errorf("got containers %v, the caller knows %s", l, id)
		}
		if started && l[0].State != ContainerRunning {
			d.t.Errorf("got %+v, want it running", l[0])
		}
		if len(l) == 0 {
			return
		}
		switch l[0].State {
		case ContainerCreated:
			if err := d.StartContainer(context.Background(), l[0].ID); err != nil {
				d.t.Errorf("start: %v", err)
			}
		case ContainerRunning:
			if l[0].PID == 0 || l[0].StartedAt.IsZero() {
				d.t.Errorf("got %+v", l[0])
			}
			d.initOf(pod).exit(l[0].ID, 5)
			if c := d.ended(l[0].ID); c.ExitCode != 5 {
				d.t.Errorf("got %+v", c)
			}
		default:
			d.t.Errorf("got %+v", l[0])
		}
	})
}

// A daemon that ends finishes what it is undoing, and leaves the rest to the next: each can take a minute.
func TestCloseLeavesUndoing(t *testing.T) {
	d := newDaemon(t)
	fails := func(context.Context) error { return errInjected }
	d.hook("network.Setup", fails)
	d.hook("network.Teardown", fails)
	for _, name := range []string{"a", "b", "c"} {
		if _, err := d.RunPod(context.Background(), podConfig(name)); !errors.Is(err, errInjected) {
			t.Errorf("got %v", err)
		}
	}
	d.reset()
	entered, release := make(chan struct{}, 3), make(chan struct{})
	d.hook("network.Teardown", func(context.Context) error { entered <- struct{}{}; <-release; return errInjected })
	d.retry <- struct{}{}
	<-entered
	closed := make(chan struct{})
	go func() { defer close(closed); d.close() }()
	<-d.closing
	close(release)
	<-closed
	if n := d.did("network.Teardown"); n != 1 {
		t.Errorf("%d pods were undone before the end, want 1", n)
	}
	d.hook("network.Teardown", nil)
	next := d.world.daemon(nil)
	defer next.close()
	if l := next.leftovers(); len(l) > 0 {
		t.Errorf("left over: %v", l)
	}
}

// Of a container whose start was not recorded, and that ended while nobody looked, the start is known all the same.
func TestStartAndExitWhileDown(t *testing.T) {
	d := newDaemon(t)
	pod := d.run("a")
	id := d.create(pod, "c")
	d.hook("store.appendState", func(context.Context) error { return errInjected })
	if err := d.StartContainer(context.Background(), id); err != nil {
		t.Fatal(err)
	}
	d.close()
	d.initOf(pod).exit(id, 5)
	d.hook("store.appendState", nil)
	d.reset()
	d.hook("init.List", func(context.Context) error { // the replay of exits has its chance to be first
		for n := 0; n < 100 && d.did("store.appendState") == 0; n++ {
			time.Sleep(time.Millisecond)
		}
		return nil
	})
	next := d.world.daemon(nil)
	defer next.close()
	if c := next.ended(id); c.ExitCode != 5 || c.StartedAt.IsZero() || c.FinishedAt.Before(c.StartedAt) {
		t.Errorf("got %+v", c)
	}
	next.removeAll()
}

// C-04, C-05, C-06: what is known stays listed until it is gone, and goes on request.
func TestCrashInRemove(t *testing.T) {
	var stopped bool
	crashSweep(t, func(d *daemon) {
		ctx := context.Background()
		d.crashAt(0)
		pod := d.run("a")
		id := d.startNew(pod, "c")
		d.create(pod, "e")
		d.reset()
		d.crashAt(d.crashLater)
		stopped = d.StopContainer(ctx, id, 50*time.Millisecond) == nil
		if d.StopPod(ctx, pod) == nil {
			_ = d.RemovePod(ctx, pod)
		}
	}, func(d *daemon) {
		for _, c := range d.Containers() {
			if c.Config.Name == "c" && stopped && (c.State != ContainerExited || c.ExitCode != 143) {
				d.t.Errorf("got %+v, want its true end", c)
			}
		}
		for _, p := range d.Pods() {
			if p.State == PodReady {
				d.startNew(p.ID, "late")
			}
		}
	})
}

// A container that ended while nobody looked has its true exit code (C-12), and a pod whose init died its reason (C-54).
func TestExitsWhileDown(t *testing.T) {
	d := newDaemon(t)
	pod, dying := d.run("a"), d.run("b")
	seven, stays := d.startNew(pod, "seven"), d.startNew(pod, "stays")
	three, killed := d.startNew(dying, "three"), d.startNew(dying, "killed")
	d.close()
	d.initOf(pod).exit(seven, 7)
	d.initOf(dying).exit(three, 3)
	d.initOf(dying).die()
	d = d.daemon(nil)
	defer d.close()
	if c := d.ended(seven); c.ExitCode != 7 || c.Reason != reasonError {
		t.Errorf("got %+v", c)
	}
	if c := d.mustContainer(stays); c.State != ContainerRunning || c.PID == 0 {
		t.Errorf("got %+v", c)
	}
	if c := d.ended(three); c.ExitCode != 3 {
		t.Errorf("got %+v", c)
	}
	if c := d.ended(killed); c.ExitCode != 137 || c.Reason != reasonInitDied {
		t.Errorf("got %+v", c)
	}
	if p := d.mustPod(dying); p.State != PodNotReady || p.Reason != reasonInitDied {
		t.Errorf("got %+v", p)
	}
	if p := d.mustPod(pod); p.State != PodReady {
		t.Errorf("got %+v", p)
	}
	d.removeAll()
}

// C-17
func TestReboot(t *testing.T) {
	d := newDaemon(t)
	pod := d.run("a")
	running, created, exited := d.startNew(pod, "r"), d.create(pod, "c"), d.startNew(pod, "e")
	d.initOf(pod).exit(exited, 0)
	d.ended(exited)
	d.close()
	// Everything in the kernel is gone, and the run root.
	d.world.mu.Lock()
	clear(d.inits)
	clear(d.cgroups)
	clear(d.pins)
	clear(d.journal)
	clear(d.images.holders)
	d.all = nil
	d.world.mu.Unlock()
	if err := os.RemoveAll(filepath.Join(d.dir, "run")); err != nil {
		t.Fatal(err)
	}
	d = d.daemon(func(c *Config) { c.BootID = "boot-2" })
	defer d.close()
	if p := d.mustPod(pod); p.State != PodNotReady || p.Reason != reasonReboot || p.IPs != nil {
		t.Errorf("got %+v", p)
	}
	for _, id := range []string{running, created} {
		if c := d.mustContainer(id); c.State != ContainerExited || c.Reason != reasonReboot || c.ExitCode != codeUnknown || c.FinishedAt.IsZero() {
			t.Errorf("got %+v", c)
		}
	}
	if c := d.mustContainer(exited); c.Reason != reasonCompleted || c.ExitCode != 0 {
		t.Errorf("got %+v", c)
	}
	if len(d.network.reserved) > 0 {
		t.Errorf("addresses are still taken: %v", d.network.reserved)
	}
	if d.did("spawn.Attach") > 0 {
		t.Error("a pid of the former boot was used")
	}
	d.run("a") // the name is free
	d.removeAll()
}

// C-14
func TestInitDoesNotAnswerAtStart(t *testing.T) {
	d := newDaemon(t)
	sick, well := d.run("sick"), d.run("well")
	id := d.startNew(sick, "c")
	d.close()
	first := true
	d.hook("spawn.Attach", func(ctx context.Context) error {
		if d.world.mu.Lock(); first {
			first = false
			d.world.mu.Unlock()
			return errors.New("does not greet")
		}
		d.world.mu.Unlock()
		return nil
	})
	d = d.daemon(nil)
	defer d.close()
	states := map[PodState]int{}
	for _, p := range d.Pods() {
		states[p.State]++
		if p.State == PodNotReady && p.Reason != reasonUnreachable {
			t.Errorf("got %+v", p)
		}
	}
	if states[PodReady] != 1 || states[PodNotReady] != 1 {
		t.Errorf("got %v", states)
	}
	_, _, _ = well, id, sick
	d.removeAll()
}

// What fails while a daemon recovers: it starts all the same (but for the network), and what it could not do then can be done later.
func TestRecoverFaults(t *testing.T) {
	prepare := func() *daemon {
		d := newDaemon(t)
		ctx := context.Background()
		living, dying, stopped := d.run("living"), d.run("dying"), d.run("stopped")
		d.startNew(living, "r")
		d.create(living, "c")
		d.startNew(dying, "r")
		d.startNew(stopped, "r")
		if err := d.StopPod(ctx, stopped); err != nil {
			t.Fatal(err)
		}
		half, cancel := context.WithCancel(ctx)
		// One that is half made: the daemon dies in its network's set-up.
		d.hook("network.Setup", func(context.Context) error {
			d.world.mu.Lock()
			defer d.world.mu.Unlock()
			d.dead = true
			return errCrashed
		})
		_, _ = d.RunPod(half, podConfig("half"))
		cancel()
		d.hook("network.Setup", nil)
		_ = d.Manager.Close()
		d.reset()
		d.initOf(dying).die()
		return d
	}
	for n := 1; ; n++ {
		if n > maxSweep {
			t.Fatal("it never succeeds")
		}
		d := prepare()
		d.failAt(n)
		m, err := NewManager(d.config())
		if err != nil {
			t.Fatal(err)
		}
		m.patience = 200 * time.Millisecond
		m.store.fault = func(what string) error { return d.op(context.Background(), what) }
		d.world.mu.Lock()
		clear(d.images.holders)
		d.world.mu.Unlock()
		err = m.Recover(context.Background())
		ops := d.total()
		at := d.describe(n)
		if err != nil { // a broken network keeps nobody from listing and stopping pods
			t.Errorf("%s: %v", at, err)
		}
		d.heal()
		d.Manager = m
		for name, want := range map[string]int{"living": 1, "dying": 1, "stopped": 1, "half": 0} {
			got := 0
			for _, p := range m.Pods() {
				if p.Config.Name == name {
					got++
				}
			}
			if got != want {
				t.Errorf("%s: pod %s is listed %d times, want %d", at, name, got, want)
			}
		}
		if err == nil {
			m.retryUndoing()
			d.removeAll()
		}
		d.close()
		if n > ops {
			t.Logf("%d operations", ops)
		}
		if t.Failed() || n > ops {
			return
		}
	}
}

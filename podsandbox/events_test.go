package podsandbox

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
)

// happened is what a test compares of an event.
type happened struct {
	kind EventKind
	id   string
}

// waiting takes what is in the queue. The Manager puts an event there before the call that caused it returns.
func waiting(t *testing.T, s *Subscription) (l []*Event) {
	t.Helper()
	for {
		select {
		case e := <-s.Events():
			l = append(l, e)
		default:
			return l
		}
	}
}

func short(l []*Event) (out []happened) {
	for _, e := range l {
		out = append(out, happened{e.Kind, e.ID})
	}
	return out
}

func TestEventsOfALife(t *testing.T) {
	w := newWorld(t)
	d := w.daemon(nil)
	defer d.close()
	ctx := context.Background()
	s, err := d.Subscribe()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	check := func(step string, want ...happened) []*Event {
		t.Helper()
		got := waiting(t, s)
		if !slices.Equal(short(got), want) {
			t.Errorf("%s: got %v, want %v", step, short(got), want)
		}
		return got
	}
	pod := d.run("p")
	for _, e := range check("run", happened{EventCreated, pod}, happened{EventStarted, pod}) {
		if e.Pod.ID != pod || e.Pod.State != PodReady || len(e.Containers) != 0 || e.At.IsZero() {
			t.Errorf("run: got %+v", e)
		}
	}
	a := d.create(pod, "a")
	check("create", happened{EventCreated, a})
	if err := d.StartContainer(ctx, a); err != nil {
		t.Fatal(err)
	}
	if l := check("start", happened{EventStarted, a}); len(l) == 1 {
		if c := l[0].Containers; len(c) != 1 || c[0].ID != a || c[0].State != ContainerRunning {
			t.Errorf("start: got containers %+v", c)
		}
	}
	b := d.create(pod, "b")
	if l := check("create another", happened{EventCreated, b}); len(l) == 1 && len(l[0].Containers) != 2 {
		t.Errorf("create another: got %d containers, want 2", len(l[0].Containers))
	}
	if err := d.NotePodResources(ctx, pod, func([]byte) ([]byte, error) { return []byte("x"), nil }); err != nil {
		t.Fatal(err)
	}
	check("a fact that nobody lists")
	if err := d.StopContainer(ctx, a, 0); err != nil {
		t.Fatal(err)
	}
	if l := check("stop", happened{EventStopped, a}); len(l) == 1 {
		i := slices.IndexFunc(l[0].Containers, func(c *Container) bool { return c.ID == a })
		if c := l[0].Containers[i]; c.State != ContainerExited || c.FinishedAt.IsZero() {
			t.Errorf("stop: got %+v", c)
		}
	}
	if err := d.StopContainer(ctx, a, 0); err != nil {
		t.Fatal(err)
	}
	check("stop again")
	if err := d.RemoveContainer(ctx, a); err != nil {
		t.Fatal(err)
	}
	if l := check("remove", happened{EventDeleted, a}); len(l) == 1 && len(l[0].Containers) != 1 {
		t.Errorf("remove: got %d containers, want 1", len(l[0].Containers))
	}
	if err := d.RemoveContainer(ctx, b); err != nil {
		t.Fatal(err)
	}
	check("remove what never ran", happened{EventStopped, b}, happened{EventDeleted, b})
	c := d.startNew(pod, "c")
	waiting(t, s)
	if err := d.StopPod(ctx, pod); err != nil {
		t.Fatal(err)
	}
	check("stop pod", happened{EventStopped, pod}, happened{EventStopped, c})
	if err := d.RemovePod(ctx, pod); err != nil {
		t.Fatal(err)
	}
	if l := check("remove pod", happened{EventDeleted, c}, happened{EventDeleted, pod}); len(l) == 2 && (l[1].Pod == nil || l[1].Pod.State != PodNotReady) {
		t.Errorf("remove pod: got %+v", l[1].Pod)
	}
}

// What was never shown has no events: neither its making nor its undoing.
func TestNoEventsOfWhatFailed(t *testing.T) {
	w := newWorld(t)
	d := w.daemon(nil)
	defer d.close()
	s, err := d.Subscribe()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	w.reset()
	w.failAt(3)
	if _, err := d.RunPod(context.Background(), podConfig("p")); err == nil {
		t.Fatal("the pod was made")
	}
	if got := waiting(t, s); len(got) != 0 {
		t.Errorf("got %v", short(got))
	}
}

// A reader that does not read loses its own subscription and nothing else.
func TestSlowReaderIsDropped(t *testing.T) {
	var f Feed
	slow, err := f.Subscribe()
	if err != nil {
		t.Fatal(err)
	}
	fast, err := f.Subscribe()
	if err != nil {
		t.Fatal(err)
	}
	got := 0
	for range subscriptionSize + 10 {
		f.Announce(Event{})
		<-fast.Events()
		got++
	}
	if got != subscriptionSize+10 || fast.Err() != nil {
		t.Errorf("the other reader: got %d events, %v", got, fast.Err())
	}
	select {
	case <-slow.Ended():
	default:
		t.Fatal("it was not dropped")
	}
	n := 0
	for range slow.Events() {
		n++
	}
	if n != subscriptionSize || !errors.Is(slow.Err(), ErrSlow) {
		t.Errorf("got %d events, %v; want %d, %v", n, slow.Err(), subscriptionSize, ErrSlow)
	}
	slow.Close()
	fast.Close()
	fast.Close()
	if fast.Err() != nil || f.readers.Load() != 0 {
		t.Errorf("closed: got %v, %d readers", fast.Err(), f.readers.Load())
	}
}

func TestFeedEnds(t *testing.T) {
	w := newWorld(t)
	d := w.daemon(nil)
	s, err := d.Subscribe()
	if err != nil {
		t.Fatal(err)
	}
	d.close()
	if _, open := <-s.Events(); open || !errors.Is(s.Err(), ErrUnavailable) {
		t.Errorf("got open %v, %v", open, s.Err())
	}
	if _, err := d.Subscribe(); !errors.Is(err, ErrUnavailable) {
		t.Errorf("subscribe after the end: got %v", err)
	}
}

// Many announcers, readers that come and go: nothing is lost for those that stay. For the race detector.
func TestFeedInParallel(t *testing.T) {
	var f Feed
	const announcers, each = 4, 500
	stays, err := f.Subscribe()
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range announcers {
		wg.Go(func() {
			for range each {
				f.Announce(Event{})
			}
		})
		wg.Go(func() {
			for range 50 {
				if s, err := f.Subscribe(); err == nil {
					select {
					case <-s.Events():
					default:
					}
					s.Close()
				}
			}
		})
	}
	wg.Wait()
	stays.Close()
	n := 0
	for range stays.Events() {
		n++
	}
	if n != announcers*each {
		t.Errorf("got %d events, want %d", n, announcers*each)
	}
}

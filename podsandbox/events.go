package podsandbox

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// ErrSlow is why a [Subscription] ended whose reader was too slow.
var ErrSlow = errors.New("reader is too slow")

// EventKind is what happened to a pod or a container. It follows what List and Status
// show: an event is born in the moment in which they begin to show it.
type EventKind string

const (
	EventCreated EventKind = "created" // it is shown for the first time
	EventStarted EventKind = "started" // its program runs; of a pod: it is ready
	EventStopped EventKind = "stopped" // it runs no more, or never will; of a pod: it is not ready any more
	EventDeleted EventKind = "deleted" // it is not shown any more
)

// Event is one thing that happened, with its pod as it was then. All of it is read-only.
type Event struct {
	Kind EventKind
	// ID of the container, or of the pod, if it happened to the pod itself.
	ID string
	At time.Time
	// Pod as it was right after; of a deleted one as it was last.
	Pod *Pod
	// Containers of the pod right after, in no order: not those that are deleted.
	Containers []*Container
}

// subscriptionSize is how many events wait for one reader: a pod of ten containers has some 40 in its whole life. A queue
// is 32 KiB; an event is some 100 bytes, one for all readers, and shares its snapshots with the lists.
const subscriptionSize = 4096

// Feed hands events to those who subscribed. The zero value is ready. Safe for concurrent use; nothing in it
// waits for a reader.
type Feed struct {
	readers atomic.Int32 // how many are in open: whoever has news looks at it before collecting them

	mu    sync.Mutex
	open  map[*Subscription]struct{} // those that have not ended
	ended error                      // why there are no more; nil while there are
}

// Subscription is one reader's queue of events. Made by Subscribe; it ends by Close, with the feed, or when it is full.
type Subscription struct {
	feed  *Feed
	queue chan *Event   // written and closed by feed, with its mu held
	ended chan struct{} // closed by feed with queue
	err   error         // guarded by feed.mu: why it ended
}

// Subscribe begins a queue of all events from now on, in the order in which they happen, none left out. The
// caller reads it until it ends, and closes it.
func (f *Feed) Subscribe() (*Subscription, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended != nil {
		return nil, f.ended
	}
	s := &Subscription{feed: f, queue: make(chan *Event, subscriptionSize), ended: make(chan struct{})}
	if f.open == nil {
		f.open = map[*Subscription]struct{}{}
	}
	f.open[s] = struct{}{}
	f.readers.Add(1)
	return s, nil
}

// Announce puts an event into all queues. One that is full ends with ErrSlow: nobody waits for a reader.
func (f *Feed) Announce(e Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for s := range f.open {
		select {
		case s.queue <- &e:
		default:
			f.endLocked(s, fmt.Errorf("%w: %d events wait for it", ErrSlow, subscriptionSize))
		}
	}
}

// End ends all subscriptions; there are no more.
func (f *Feed) End(why error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = why
	for s := range f.open {
		f.endLocked(s, why)
	}
}

func (f *Feed) endLocked(s *Subscription, why error) {
	if _, ok := f.open[s]; !ok {
		return
	}
	delete(f.open, s)
	f.readers.Add(-1)
	s.err = why
	close(s.queue)
	close(s.ended)
}

// Events is closed when the subscription ends, behind what is still in the queue. What it gives is others' too: read-only.
func (s *Subscription) Events() <-chan *Event { return s.queue }

// Ended is closed when the subscription ends, at once.
func (s *Subscription) Ended() <-chan struct{} { return s.ended }

// Err is why it ended: ErrSlow, or what the feed ended with; nil while it has not, and after Close.
func (s *Subscription) Err() error {
	s.feed.mu.Lock()
	defer s.feed.mu.Unlock()
	return s.err
}

// Close ends the subscription. It may be called twice, and after it ended.
func (s *Subscription) Close() {
	s.feed.mu.Lock()
	defer s.feed.mu.Unlock()
	s.feed.endLocked(s, nil)
}

// Subscribe is Feed.Subscribe for the events of this node's pods, once Recover is done.
//
// Errors: ErrUnavailable.
func (m *Manager) Subscribe() (*Subscription, error) {
	if err := m.refuses(); err != nil {
		return nil, fmt.Errorf("cannot subscribe to events: %w", err)
	}
	return m.events.Subscribe()
}

// announceLocked is called with mu held, so that events are in the order of the changes, and each shows the pod as the change left it.
func (m *Manager) announceLocked(p *pod, view *Pod, id string, kinds ...EventKind) {
	if m.events.readers.Load() == 0 || view == nil {
		return
	}
	e := Event{ID: id, At: time.Now(), Pod: view}
	for _, c := range p.containers {
		if v := c.view(); v != nil {
			e.Containers = append(e.Containers, v)
		}
	}
	for _, e.Kind = range kinds {
		m.events.Announce(e)
	}
}

// announcePodLocked says what a change of a pod means to those who see it. Stages between that show the same are none.
func (m *Manager) announcePodLocked(p *pod, was, now *Pod) {
	switch {
	case was == nil && now == nil:
	case was == nil && now.State == PodReady:
		m.announceLocked(p, now, p.id, EventCreated, EventStarted)
	case was == nil:
		m.announceLocked(p, now, p.id, EventCreated)
	case now == nil:
		m.announceLocked(p, was, p.id, EventDeleted)
	case was.State == PodReady && now.State != PodReady:
		m.announceLocked(p, now, p.id, EventStopped)
	case was.State != PodReady && now.State == PodReady:
		m.announceLocked(p, now, p.id, EventStarted)
	}
}

// announceContainerLocked is announcePodLocked for a container. One of a pod that is not shown has no events: its pod's
// making is being undone.
func (m *Manager) announceContainerLocked(c *container, was, now *Container) {
	kind := EventKind("")
	switch {
	case was == nil && now == nil:
	case was == nil:
		kind = EventCreated
	case now == nil:
		kind = EventDeleted
	case was.State == now.State:
	case now.State == ContainerRunning:
		kind = EventStarted
	case now.State == ContainerExited:
		kind = EventStopped
	}
	if kind != "" {
		m.announceLocked(c.pod, c.pod.view(), c.id, kind)
	}
}

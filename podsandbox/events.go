package podsandbox

import (
	"errors"
	"fmt"
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

// subscriptionSize is how many events wait for one reader: a pod of ten containers has some 40 in its whole life. An
// event is some 100 bytes and shares its snapshots with the lists.
const subscriptionSize = 4096

// Subscription is one reader's queue of events. Made by Subscribe, ended by Close, by the Manager's Close, or by
// the Manager when it is full.
type Subscription struct {
	m *Manager
	// queue is written and closed by the Manager alone, with mu held, and never waited for.
	queue chan Event
	err   error // guarded by m.mu: why it ended
}

// Subscribe begins a queue of all events from now on, in the order in which they happen, none left out. The
// caller reads it until it is closed, or closes it.
func (m *Manager) Subscribe() (*Subscription, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.refuses(); err != nil {
		return nil, fmt.Errorf("cannot subscribe to events: %w", err)
	}
	s := &Subscription{m: m, queue: make(chan Event, subscriptionSize)}
	if m.subscriptions == nil {
		m.subscriptions = map[*Subscription]struct{}{}
	}
	m.subscriptions[s] = struct{}{}
	return s, nil
}

// Events is closed when the subscription ends; Err then says why. Of one that was too slow nothing
// more is worth reading: events behind those in the queue are lost.
func (s *Subscription) Events() <-chan Event { return s.queue }

// Err is why the subscription ended: ErrSlow, ErrUnavailable with the Manager; nil while it has not, and after Close.
func (s *Subscription) Err() error {
	s.m.mu.RLock()
	defer s.m.mu.RUnlock()
	return s.err
}

// Close ends the subscription. It may be called twice, and after it ended.
func (s *Subscription) Close() {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	s.m.endSubscriptionLocked(s, nil)
}

func (m *Manager) endSubscriptionLocked(s *Subscription, why error) {
	if _, ok := m.subscriptions[s]; !ok {
		return
	}
	delete(m.subscriptions, s)
	s.err = why
	close(s.queue)
}

// endSubscriptionsLocked is for the Manager's end.
func (m *Manager) endSubscriptionsLocked() {
	for s := range m.subscriptions {
		m.endSubscriptionLocked(s, fmt.Errorf("%w: the daemon is stopping", ErrUnavailable))
	}
}

// announceLocked puts an event into all queues. One that is full is ended: nobody waits for a reader.
func (m *Manager) announceLocked(p *pod, view *Pod, id string, kinds ...EventKind) {
	if len(m.subscriptions) == 0 || view == nil || len(kinds) == 0 {
		return
	}
	e := Event{ID: id, At: time.Now(), Pod: view}
	for _, c := range p.containers {
		if v := c.view(); v != nil {
			e.Containers = append(e.Containers, v)
		}
	}
	for _, e.Kind = range kinds {
		for s := range m.subscriptions {
			select {
			case s.queue <- e:
			default:
				m.endSubscriptionLocked(s, fmt.Errorf("%w: %d events wait for it", ErrSlow, subscriptionSize))
			}
		}
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

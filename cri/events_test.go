package cri

import (
	"context"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/podsandbox"
)

// subscribed is a client whose subscription is made when it returns.
func (w *world) subscribed(t *testing.T, ctx context.Context) runtimeapi.RuntimeService_GetContainerEventsClient {
	t.Helper()
	s, err := w.runtime.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Header(); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestGetContainerEvents(t *testing.T) {
	w := newWorld(t)
	w.pods.feed = &podsandbox.Feed{}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s := w.subscribed(t, ctx)
	at := time.Unix(1700000200, 7)
	for kind, want := range eventTypes {
		w.pods.feed.Announce(podsandbox.Event{Kind: kind, ID: containerID, At: at, Pod: somePod(), Containers: []*podsandbox.Container{someContainer()}})
		e, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		pod, c := e.PodSandboxStatus, e.ContainersStatuses
		if e.ContainerEventType != want || e.ContainerId != containerID || e.CreatedAt != at.UnixNano() ||
			pod.GetId() != podID || pod.GetMetadata().GetUid() != "u-1" || pod.State != runtimeapi.PodSandboxState_SANDBOX_READY ||
			pod.GetLinux().GetNamespaces().GetOptions().GetPid() != runtimeapi.NamespaceMode_CONTAINER ||
			len(c) != 1 || c[0].Id != containerID || c[0].State != runtimeapi.ContainerState_CONTAINER_RUNNING || c[0].GetResources().GetLinux().GetCpuShares() != 512 {
			t.Errorf("%s: got %v", kind, e)
		}
	}
	if len(eventTypes) != len(runtimeapi.ContainerEventType_name) {
		t.Errorf("%d kinds of events, CRI has %d", len(eventTypes), len(runtimeapi.ContainerEventType_name))
	}
	cancel()
	_, err := s.Recv()
	wantStatus(t, err, codes.Canceled, "")
}

// Many events at once, more than gRPC keeps in flight, to a client that reads.
func TestNoEventIsLost(t *testing.T) {
	w := newWorld(t)
	w.pods.feed = &podsandbox.Feed{}
	s := w.subscribed(t, t.Context())
	const many = 2000
	pod := somePod()
	for i := range many {
		w.pods.feed.Announce(podsandbox.Event{Kind: podsandbox.EventStarted, ID: podID, At: time.Unix(0, int64(i)), Pod: pod})
	}
	for i := range many {
		e, err := s.Recv()
		if err != nil || e.CreatedAt != int64(i) {
			t.Fatalf("event %d: got %v, %v", i, e.GetCreatedAt(), err)
		}
	}
}

// C-69: a client that never reads is dropped, in the middle of a message, and nothing waits for it.
func TestSlowClientOfEventsIsDropped(t *testing.T) {
	w := newWorld(t)
	feed := &podsandbox.Feed{}
	w.pods.feed = feed
	s := w.subscribed(t, t.Context())
	pod := somePod()
	pod.Config.Annotations = map[string]string{"note": strings.Repeat("x", 100_000)} // more than a stream's window
	other, err := feed.Subscribe()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	for range 6000 {
		feed.Announce(podsandbox.Event{Kind: podsandbox.EventStarted, ID: podID, Pod: pod})
		<-other.Events()
	}
	if other.Err() != nil {
		t.Errorf("a reader that reads: got %v", other.Err())
	}
	// The server ends the call although the client has not read a byte. What was under way comes first.
	n := 0
	for err == nil {
		if _, err = s.Recv(); err == nil {
			n++
		}
	}
	wantStatus(t, err, codes.ResourceExhausted, "too slow")
	if n > 1000 {
		t.Errorf("got %d events, want only what was under way", n)
	}
}

// A stream of events does not hold up the end; what waits for a client that does not read neither.
func TestEventsEndWhenTheServerDrains(t *testing.T) {
	for _, tt := range []struct {
		name  string
		reads bool
	}{{"a client that reads", true}, {"one that does not", false}} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.pods.feed = &podsandbox.Feed{}
			s := w.subscribed(t, t.Context())
			if !tt.reads {
				pod := somePod()
				pod.Config.Annotations = map[string]string{"note": strings.Repeat("x", 100_000)}
				for range 100 {
					w.pods.feed.Announce(podsandbox.Event{Kind: podsandbox.EventStarted, ID: podID, Pod: pod})
				}
			}
			w.server.Drain()
			var err error
			for err == nil {
				_, err = s.Recv()
			}
			wantStatus(t, err, codes.Unavailable, "shutting down")
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			w.server.GracefulStop(ctx)
			if ctx.Err() != nil {
				t.Error("GracefulStop waited for a stream of events")
			}
		})
	}
	w := newWorld(t) // without a feed: not to be had
	s, err := w.runtime.GetContainerEvents(t.Context(), &runtimeapi.GetEventsRequest{})
	if err == nil {
		_, err = s.Recv()
	}
	wantStatus(t, err, codes.Unavailable, "")
}

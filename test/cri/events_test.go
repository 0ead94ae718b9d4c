package cri

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	eventCreated = runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT
	eventStarted = runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT
	eventStopped = runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT
	eventDeleted = runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT
)

// listen subscribes; when it returns crispd has the subscription.
func (w *world) listen(t *testing.T, ctx context.Context) grpc.ServerStreamingClient[runtimeapi.ContainerEventResponse] {
	t.Helper()
	s, err := w.CRI.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Header(); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestEventsOfAPodsLife(t *testing.T) {
	w := need(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s := w.listen(t, ctx)
	p := w.pod(t)
	// next is the pod's next event; other tests' pods are none of our business.
	next := func(id string, kind runtimeapi.ContainerEventType) *runtimeapi.ContainerEventResponse {
		t.Helper()
		for {
			e, err := s.Recv()
			if err != nil {
				t.Fatalf("while waiting for %v of %s: %v", kind, id, err)
			}
			if e.GetPodSandboxStatus().GetId() != p.id {
				continue
			}
			if e.ContainerId != id || e.ContainerEventType != kind {
				t.Fatalf("got %v of %s, want %v of %s", e.ContainerEventType, e.ContainerId, kind, id)
			}
			if e.PodSandboxStatus.GetMetadata().GetUid() != p.cfg.Metadata.Uid || e.PodSandboxStatus.CreatedAt == 0 || time.Since(time.Unix(0, e.CreatedAt)) > time.Minute {
				t.Errorf("got %v", e)
			}
			return e
		}
	}
	next(p.id, eventCreated)
	e := next(p.id, eventStarted)
	if e.PodSandboxStatus.State != runtimeapi.PodSandboxState_SANDBOX_READY || e.PodSandboxStatus.GetNetwork().GetIp() == "" || len(e.ContainersStatuses) != 0 {
		t.Errorf("got %v", e)
	}
	only := func(e *runtimeapi.ContainerEventResponse) *runtimeapi.ContainerStatus {
		t.Helper()
		if len(e.ContainersStatuses) != 1 {
			t.Fatalf("got %d containers, want 1: %v", len(e.ContainersStatuses), e)
		}
		return e.ContainersStatuses[0]
	}
	c := p.create([]string{"exit", "7"})
	if st := only(next(c.id, eventCreated)); st.Id != c.id || st.State != created || st.GetMetadata().GetName() != c.cfg.Metadata.Name || st.GetImage().GetImage() == "" || st.ImageRef == "" {
		t.Errorf("created: got %v", st)
	}
	c.start()
	if st := only(next(c.id, eventStarted)); st.State != running || st.StartedAt == 0 {
		t.Errorf("started: got %v", st)
	}
	if st := only(next(c.id, eventStopped)); st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.ExitCode != 7 || st.FinishedAt == 0 || st.Reason != "Error" {
		t.Errorf("stopped: got %v", st)
	}
	c.remove()
	if e := next(c.id, eventDeleted); len(e.ContainersStatuses) != 0 {
		t.Errorf("deleted: it still has %v", e.ContainersStatuses)
	}
	long := p.run([]string{"sleep"})
	next(long.id, eventCreated)
	next(long.id, eventStarted)
	p.remove()
	next(p.id, eventStopped)
	next(long.id, eventStopped)
	next(long.id, eventDeleted)
	if e := next(p.id, eventDeleted); e.PodSandboxStatus.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("deleted: got %v", e.PodSandboxStatus)
	}
	cancel()
	_, err := s.Recv()
	wantCode(t, err, codes.Canceled)
}

func TestNoEventIsLost(t *testing.T) {
	w := need(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	first, second := w.listen(t, ctx), w.listen(t, ctx)
	p := w.pod(t)
	const many = 20
	cfgs := make([]*runtimeapi.ContainerConfig, many)
	for i := range cfgs {
		cfgs[i] = p.config([]string{"true"})
	}
	var wg sync.WaitGroup
	errs := make([]error, many)
	for i, cfg := range cfgs {
		wg.Go(func() {
			id, err := w.rt.CreateContainer(ctx, p.id, cfg, p.cfg)
			if err == nil {
				err = errors.Join(w.rt.StartContainer(ctx, id), w.rt.StopContainer(ctx, id, 5), w.rt.RemoveContainer(ctx, id))
			}
			errs[i] = err
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	p.remove()
	for name, s := range map[string]grpc.ServerStreamingClient[runtimeapi.ContainerEventResponse]{"first": first, "second": second} {
		got := map[string][]runtimeapi.ContainerEventType{}
		for {
			e, err := s.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if e.GetPodSandboxStatus().GetId() != p.id {
				continue
			}
			got[e.ContainerId] = append(got[e.ContainerId], e.ContainerEventType)
			if e.ContainerId == p.id && e.ContainerEventType == eventDeleted {
				break
			}
		}
		if len(got) != many+1 {
			t.Errorf("%s: events of %d objects, want %d", name, len(got), many+1)
		}
		for id, kinds := range got {
			if want := []runtimeapi.ContainerEventType{eventCreated, eventStarted, eventStopped, eventDeleted}; !slices.Equal(kinds, want) {
				t.Errorf("%s: %s: got %v, want %v", name, id, kinds, want)
			}
		}
	}
}

func TestDeathOfAPodsInitIsAnEvent(t *testing.T) {
	w := need(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	p := w.pod(t)
	c := p.run([]string{"sleep"})
	s := w.listen(t, ctx)
	r, err := w.rt.PodSandboxStatus(ctx, p.id, true)
	if err != nil {
		t.Fatal(err)
	}
	var info struct{ PID int }
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil || info.PID < 2 {
		t.Fatalf("got %v, %v", info, err)
	}
	if err := syscall.Kill(info.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	var got []string
	for len(got) < 2 {
		e, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if e.GetPodSandboxStatus().GetId() == p.id && e.ContainerEventType == eventStopped {
			got = append(got, e.ContainerId)
		}
	}
	if !slices.Contains(got, p.id) || !slices.Contains(got, c.id) {
		t.Errorf("got stopped events of %v, want %s and %s", got, p.id, c.id)
	}
}

// A subscriber must not hold up the end of crispd, nor be left hanging.
func TestEventsEndWithTheDaemon(t *testing.T) {
	w := own(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	w.pod(t)
	// On a connection of its own: the node's is closed before crispd is told to stop.
	s, err := w.wide(t).GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err == nil {
		_, err = s.Header()
	}
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { // ends with the stream
		for {
			if _, err := s.Recv(); err != nil {
				ended <- err
				return
			}
		}
	}()
	began := time.Now()
	if err := errors.Join(w.disconnect(), w.Stop()); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("crispd took %v to stop", took)
	}
	err = <-ended
	if errors.Is(err, io.EOF) {
		t.Error("the stream ended as if there were nothing more to come")
	}
	wantCode(t, err, codes.Unavailable)
	if err := w.start(); err != nil {
		t.Fatal(err)
	}
	w.listen(t, ctx) // again
}

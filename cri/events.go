package cri

import (
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/podsandbox"
)

var eventTypes = map[podsandbox.EventKind]runtimeapi.ContainerEventType{
	podsandbox.EventCreated: runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT,
	podsandbox.EventStarted: runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT,
	podsandbox.EventStopped: runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT,
	podsandbox.EventDeleted: runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT,
}

// GetContainerEvents sends what happens to containers, and, with the pod's id for the container's as containerd
// and CRI-O do it, to pods, until the client's context ends or crispd drains. The headers are sent at once: all that
// happens after a client has them is sent to it.
//
// A client that does not read is dropped with podsandbox.ErrSlow when its queue is full; nobody waits for it. Its
// stream can be in the middle of a message then, and only the end of the call gets a sender out of that: so
// the sender is a goroutine of its own, which GracefulStop waits for.
func (s *runtimeService) GetContainerEvents(_ *runtimeapi.GetEventsRequest, stream grpc.ServerStreamingServer[runtimeapi.ContainerEventResponse]) error {
	sub, err := s.cfg.Pods.Subscribe()
	if err != nil {
		return err
	}
	defer sub.Close()
	if err := stream.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	sent := make(chan error, 1) // one: the sender never waits for us
	s.senders.Go(func() { sent <- s.sendEvents(sub, stream) })
	select {
	case err = <-sent:
		return err
	case <-sub.Ended():
		return fmt.Errorf("cannot go on sending events: %w", sub.Err())
	case <-stream.Context().Done():
		return stream.Context().Err()
	case <-s.draining:
		return fmt.Errorf("%w: crispd is shutting down; subscribe to the next", podsandbox.ErrUnavailable)
	}
}

// sendEvents ends with the subscription, or with the stream.
func (s *runtimeService) sendEvents(sub *podsandbox.Subscription, stream grpc.ServerStreamingServer[runtimeapi.ContainerEventResponse]) error {
	for e := range sub.Events() {
		m, err := s.criEvent(e)
		if err != nil {
			return err
		}
		if err := stream.Send(m); err != nil {
			return err
		}
	}
	return sub.Err()
}

// criEvent reads nothing from the kernel: it is about a moment that has passed. Resources are those asked for.
func (s *runtimeService) criEvent(e *podsandbox.Event) (*runtimeapi.ContainerEventResponse, error) {
	pod, _, err := podStatus(e.Pod)
	if err != nil {
		return nil, err
	}
	out := &runtimeapi.ContainerEventResponse{
		ContainerId: e.ID, ContainerEventType: eventTypes[e.Kind], CreatedAt: e.At.UnixNano(), PodSandboxStatus: pod,
	}
	for _, ctr := range e.Containers {
		status, _, err := s.containerStatus(ctr, askedOf(ctr))
		if err != nil {
			return nil, err
		}
		out.ContainersStatuses = append(out.ContainersStatuses, status)
	}
	return out, nil
}

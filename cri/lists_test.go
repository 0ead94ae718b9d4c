package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/image"
)

// received is what a stream sent until its end: the items, and the size of the largest message.
func received[R, T any](t *testing.T, s grpc.ServerStreamingClient[R], err error, items func(*R) []T) (all []T, messages, largest int) {
	t.Helper()
	for err == nil {
		var m *R
		if m, err = s.Recv(); err == nil {
			if len(items(m)) == 0 {
				t.Error("got a message without items")
			}
			all = append(all, items(m)...)
			messages++
			largest = max(largest, proto.Size(any(m).(proto.Message)))
		}
	}
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return all, messages, largest
}

// A list of more than a message may hold: each item once, in order, in pieces.
func TestStreamsOfMuch(t *testing.T) {
	w := newWorld(t)
	const many = 300
	big := map[string]string{"note": strings.Repeat("x", 100_000)}
	w.pods.pods, w.pods.containers = nil, nil
	for i := range many {
		pod, ctr := somePod(), someContainer()
		pod.ID, pod.Config.Annotations = fmt.Sprintf("%064x", i), big
		ctr.ID, ctr.Config.Annotations = fmt.Sprintf("%064x", i), big
		w.pods.pods, w.pods.containers = append(w.pods.pods, pod), append(w.pods.containers, ctr)
	}
	pods, err := w.runtime.StreamPodSandboxes(t.Context(), &runtimeapi.StreamPodSandboxesRequest{})
	gotPods, messages, largest := received(t, pods, err, (*runtimeapi.StreamPodSandboxesResponse).GetPodSandboxes)
	if len(gotPods) != many || messages < many/4 || largest > 2*pieceSize {
		t.Errorf("got %d pods in %d messages of up to %d bytes", len(gotPods), messages, largest)
	}
	for i, p := range gotPods {
		if p.Id != w.pods.pods[i].ID {
			t.Fatalf("got %s as the %d., want %s", p.Id, i, w.pods.pods[i].ID)
		}
	}
	containers, err := w.runtime.StreamContainers(t.Context(), &runtimeapi.StreamContainersRequest{})
	if got, _, largest := received(t, containers, err, (*runtimeapi.StreamContainersResponse).GetContainers); len(got) != many || largest > 2*pieceSize {
		t.Errorf("got %d containers, up to %d bytes", len(got), largest)
	}
	// The list as one message does not fit.
	if _, err := w.runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{}); err == nil {
		t.Error("the list fits: this test shows nothing")
	}
	// A client that goes away in the middle ends the call; goleak sees whether it did.
	ctx, cancel := context.WithCancel(t.Context())
	s, err := w.runtime.StreamPodSandboxes(ctx, &runtimeapi.StreamPodSandboxesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	cancel()
}

func TestStreamsOfEach(t *testing.T) {
	w := measuredWorld(t)
	ctx := t.Context()
	check := func(name string, got, want int) {
		t.Helper()
		if got != want {
			t.Errorf("%s: got %d, want %d", name, got, want)
		}
	}
	pods, err := w.runtime.StreamPodSandboxes(ctx, &runtimeapi.StreamPodSandboxesRequest{Filter: &runtimeapi.PodSandboxFilter{Id: "ffff"}})
	none, messages, _ := received(t, pods, err, (*runtimeapi.StreamPodSandboxesResponse).GetPodSandboxes)
	check("pods, none matches", len(none), 0)
	check("messages of nothing", messages, 0)
	containers, err := w.runtime.StreamContainers(ctx, &runtimeapi.StreamContainersRequest{})
	got, _, _ := received(t, containers, err, (*runtimeapi.StreamContainersResponse).GetContainers)
	check("containers", len(got), 2)
	exited := &runtimeapi.ContainerFilter{State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_EXITED}}
	containers, err = w.runtime.StreamContainers(ctx, &runtimeapi.StreamContainersRequest{Filter: exited})
	got, _, _ = received(t, containers, err, (*runtimeapi.StreamContainersResponse).GetContainers)
	check("exited containers", len(got), 1)
	stats, err := w.runtime.StreamContainerStats(ctx, &runtimeapi.StreamContainerStatsRequest{})
	gotStats, _, _ := received(t, stats, err, (*runtimeapi.StreamContainerStatsResponse).GetContainerStats)
	check("container stats", len(gotStats), 1)
	podStats, err := w.runtime.StreamPodSandboxStats(ctx, &runtimeapi.StreamPodSandboxStatsRequest{})
	gotPodStats, _, _ := received(t, podStats, err, (*runtimeapi.StreamPodSandboxStatsResponse).GetPodSandboxStats)
	check("pod stats", len(gotPodStats), 1)
	metrics, err := w.runtime.StreamPodSandboxMetrics(ctx, &runtimeapi.StreamPodSandboxMetricsRequest{})
	gotMetrics, _, _ := received(t, metrics, err, (*runtimeapi.StreamPodSandboxMetricsResponse).GetPodSandboxMetrics)
	check("pod metrics", len(gotMetrics), 1)
	second := busybox()
	second.ID, second.RepoTags = "sha256:"+strings.Repeat("77", 32), []string{"other:1"}
	w.images.list = []image.Image{busybox(), second}
	images, err := w.image.StreamImages(ctx, &runtimeapi.StreamImagesRequest{})
	gotImages, _, _ := received(t, images, err, (*runtimeapi.StreamImagesResponse).GetImages)
	check("images", len(gotImages), 2)
	images, err = w.image.StreamImages(ctx, &runtimeapi.StreamImagesRequest{Filter: &runtimeapi.ImageFilter{Image: &runtimeapi.ImageSpec{Image: second.ID}}})
	gotImages, _, _ = received(t, images, err, (*runtimeapi.StreamImagesResponse).GetImages)
	check("images with a filter", len(gotImages), 1)

	// An error is the stream's, as it is the list's.
	w.pods.containers[0].Config.Echo = []byte{0xff}
	s, err := w.runtime.StreamContainers(ctx, &runtimeapi.StreamContainersRequest{})
	if err == nil {
		_, err = s.Recv()
	}
	if err == nil || errors.Is(err, io.EOF) || !strings.Contains(err.Error(), containerID) {
		t.Errorf("got %v, want an error that names %s", err, containerID)
	}
}

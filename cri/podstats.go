package cri

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/cgroup"
)

// PodSandboxStats of a pod that is not ready is refused: nothing of it runs, and counters that
// went back to zero would be taken for a restart.
func (s *runtimeService) PodSandboxStats(ctx context.Context, r *runtimeapi.PodSandboxStatsRequest) (*runtimeapi.PodSandboxStatsResponse, error) {
	if err := checkID("pod_sandbox_id", r.GetPodSandboxId()); err != nil {
		return nil, err
	}
	pod, err := s.cfg.Pods.Pod(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	stats, err := s.podStats(ctx, pod, s.runningByPod()[pod.ID])
	if err != nil {
		return nil, err
	}
	return &runtimeapi.PodSandboxStatsResponse{Stats: stats}, nil
}

// ListPodSandboxStats is about ready pods. One that stops meanwhile, or cannot be measured, is left out.
func (s *runtimeService) ListPodSandboxStats(ctx context.Context, r *runtimeapi.ListPodSandboxStatsRequest) (*runtimeapi.ListPodSandboxStatsResponse, error) {
	f := r.GetFilter()
	var pods []*podsandbox.Pod
	for _, pod := range s.cfg.Pods.Pods() {
		if pod.State == podsandbox.PodReady && matches(pod.ID, f.GetId(), pod.Config.Labels, f.GetLabelSelector()) {
			pods = append(pods, pod)
		}
	}
	running := s.runningByPod()
	all := make([]*runtimeapi.PodSandboxStats, len(pods)) // nil: left out
	err := spread(ctx, pods, func(i int, pod *podsandbox.Pod) error {
		stats, err := s.podStats(ctx, pod, running[pod.ID])
		all[i] = stats
		return onlyThis(ctx, err)
	})
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ListPodSandboxStatsResponse{Stats: present(all)}, nil
}

// isGone says that what was to be measured has ended or was removed since it was listed.
func isGone(err error) bool {
	return errors.Is(err, podsandbox.ErrNotFound) || errors.Is(err, podsandbox.ErrState) || errors.Is(err, cgroup.ErrNotFound)
}

// onlyThis is what measuring one of many comes to for the list: nothing, unless the caller is gone. One
// sick container must not hide all others from the kubelet's eviction.
func onlyThis(ctx context.Context, err error) error {
	if err == nil || isGone(err) {
		return nil
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	klog.FromContext(ctx).Error(err, "Left out of a list of statistics")
	return nil
}

// present leaves out nils.
func present[T any](all []*T) (out []*T) {
	for _, v := range all {
		if v != nil {
			out = append(out, v)
		}
	}
	return out
}

// runningByPod lists running containers by the id of their pod.
func (s *runtimeService) runningByPod() map[string][]*podsandbox.Container {
	out := map[string][]*podsandbox.Container{}
	for _, ctr := range s.cfg.Pods.Containers() {
		if ctr.State == podsandbox.ContainerRunning {
			out[ctr.PodID] = append(out[ctr.PodID], ctr)
		}
	}
	return out
}

func (s *runtimeService) podStats(ctx context.Context, pod *podsandbox.Pod, running []*podsandbox.Container) (*runtimeapi.PodSandboxStats, error) {
	stats, err := s.cfg.Pods.PodStats(pod.ID)
	if err != nil {
		return nil, fmt.Errorf("cannot measure pod %q: %w", pod.ID, err)
	}
	var total runtimeapi.ContainerStats
	cgroupStats(&total, stats.Cgroup)
	total.Cpu.UsageNanoCores = s.rates.of(pod.ID, stats.Cgroup.At, stats.Cgroup.CPU.Usage)
	at := stats.Cgroup.At.UnixNano()
	out := &runtimeapi.PodSandboxStats{
		Attributes: &runtimeapi.PodSandboxAttributes{
			Id: pod.ID, Metadata: podMetadata(pod), Labels: pod.Config.Labels, Annotations: pod.Config.Annotations,
		},
		Linux: &runtimeapi.LinuxPodSandboxStats{
			Cpu: total.Cpu, Memory: total.Memory, Io: total.Io,
			Process: &runtimeapi.ProcessUsage{Timestamp: at, ProcessCount: number(stats.Processes)},
			Network: networkUsage(at, stats.Interfaces),
		},
	}
	for _, ctr := range running {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		one, err := s.statsOf(ctr)
		if isGone(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out.Linux.Containers = append(out.Linux.Containers, one)
	}
	return out, nil
}

// networkUsage is nil for a pod with the node's network, as cAdvisor has it.
func networkUsage(at int64, l []podsandbox.Interface) *runtimeapi.NetworkUsage {
	if len(l) == 0 {
		return nil
	}
	out := &runtimeapi.NetworkUsage{Timestamp: at}
	for i, nic := range l {
		usage := &runtimeapi.NetworkInterfaceUsage{
			Name:    nic.Name,
			RxBytes: number(nic.Rx.Bytes), RxErrors: number(nic.Rx.Errors),
			TxBytes: number(nic.Tx.Bytes), TxErrors: number(nic.Tx.Errors),
		}
		if i == 0 {
			out.DefaultInterface = usage
		} else {
			out.Interfaces = append(out.Interfaces, usage) // "excluding the default", the proto says
		}
	}
	return out
}

// UpdatePodSandboxResources records what the kubelet says, for a verbose status. There is nothing to apply: the pod's own
// cgroup is the kubelet's, and it has resized that already (KEP-2837). The kubelet tolerates Unimplemented here, but no other error.
func (s *runtimeService) UpdatePodSandboxResources(ctx context.Context, r *runtimeapi.UpdatePodSandboxResourcesRequest) (*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	var c checker
	c.id("pod_sandbox_id", r.GetPodSandboxId())
	c.resources("overhead", r.GetOverhead())
	c.resources("resources", r.GetResources())
	if c.err() != nil {
		return nil, c.err()
	}
	err := s.cfg.Pods.NotePodResources(ctx, r.GetPodSandboxId(), func(before []byte) ([]byte, error) {
		now := &runtimeapi.UpdatePodSandboxResourcesRequest{}
		if err := proto.Unmarshal(before, now); err != nil {
			return nil, fmt.Errorf("cannot read what was recorded before: %w", err)
		}
		if r.GetOverhead() != nil {
			now.Overhead = r.GetOverhead()
		}
		if r.GetResources() != nil {
			now.Resources = r.GetResources()
		}
		return wire.Marshal(now)
	})
	if err != nil {
		return nil, err
	}
	return &runtimeapi.UpdatePodSandboxResourcesResponse{}, nil
}

// overlayResources puts what UpdatePodSandboxResources recorded into the config as it is shown.
func overlayResources(config *runtimeapi.PodSandboxConfig, recorded []byte) error {
	if len(recorded) == 0 {
		return nil
	}
	var r runtimeapi.UpdatePodSandboxResourcesRequest
	if err := proto.Unmarshal(recorded, &r); err != nil {
		return err
	}
	if config.Linux == nil {
		config.Linux = &runtimeapi.LinuxPodSandboxConfig{}
	}
	if r.GetOverhead() != nil {
		config.Linux.Overhead = r.GetOverhead()
	}
	if r.GetResources() != nil {
		config.Linux.Resources = r.GetResources()
	}
	return nil
}

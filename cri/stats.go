package cri

import (
	"context"
	"fmt"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/cgroup"
)

func (s *runtimeService) ContainerStats(_ context.Context, r *runtimeapi.ContainerStatsRequest) (*runtimeapi.ContainerStatsResponse, error) {
	if err := checkID("container_id", r.GetContainerId()); err != nil {
		return nil, err
	}
	ctr, err := s.cfg.Pods.Container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	stats, err := s.statsOf(ctr)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ContainerStatsResponse{Stats: stats}, nil
}

// ListContainerStats is about running containers, as the proto says. One that ends meanwhile, or cannot be measured, is left out.
func (s *runtimeService) ListContainerStats(ctx context.Context, r *runtimeapi.ListContainerStatsRequest) (*runtimeapi.ListContainerStatsResponse, error) {
	f := r.GetFilter()
	var running []*podsandbox.Container
	for _, ctr := range s.cfg.Pods.Containers() {
		if ctr.State == podsandbox.ContainerRunning && matches(ctr.ID, f.GetId(), ctr.Config.Labels, f.GetLabelSelector()) &&
			strings.HasPrefix(ctr.PodID, f.GetPodSandboxId()) {
			running = append(running, ctr)
		}
	}
	all := make([]*runtimeapi.ContainerStats, len(running)) // nil: left out
	err := spread(ctx, running, func(i int, ctr *podsandbox.Container) error {
		stats, err := s.statsOf(ctr)
		all[i] = stats
		return onlyThis(ctx, err)
	})
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ListContainerStatsResponse{Stats: present(all)}, nil
}

func (s *runtimeService) statsOf(ctr *podsandbox.Container) (*runtimeapi.ContainerStats, error) {
	stats, err := s.cfg.Pods.ContainerStats(ctr.ID)
	if err != nil {
		return nil, fmt.Errorf("cannot measure container %q: %w", ctr.ID, err)
	}
	out := &runtimeapi.ContainerStats{Attributes: &runtimeapi.ContainerAttributes{
		Id: ctr.ID, Metadata: containerMetadata(ctr), Labels: ctr.Config.Labels, Annotations: ctr.Config.Annotations,
	}}
	if stats.Cgroup != nil {
		cgroupStats(out, stats.Cgroup)
		out.Cpu.UsageNanoCores = s.rates.of(ctr.ID, stats.Cgroup.At, stats.Cgroup.CPU.Usage)
	}
	if !stats.WritableAt.IsZero() { // measured at least once
		out.WritableLayer = &runtimeapi.FilesystemUsage{
			Timestamp:  stats.WritableAt.UnixNano(),
			FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: stats.Mountpoint},
			UsedBytes:  number(stats.WritableBytes),
			InodesUsed: number(stats.WritableInodes),
		}
	}
	return out, nil
}

// cgroupStats translates what the kernel counted.
func cgroupStats(out *runtimeapi.ContainerStats, s *cgroup.Stats) {
	at := s.At.UnixNano()
	out.Cpu = &runtimeapi.CpuUsage{Timestamp: at, UsageCoreNanoSeconds: number(s.CPU.Usage), Psi: pressure(s.CPU.PSI)}
	m := &s.Memory
	out.Memory = &runtimeapi.MemoryUsage{
		Timestamp: at, WorkingSetBytes: number(m.WorkingSet), UsageBytes: number(m.Usage), RssBytes: number(m.RSS),
		PageFaults: number(m.Faults), MajorPageFaults: number(m.MajFaults), Psi: pressure(m.PSI),
		AvailableBytes: left(m.Limit, m.WorkingSet),
	}
	if s.Swap.Accounted {
		out.Swap = &runtimeapi.SwapUsage{Timestamp: at, SwapUsageBytes: number(s.Swap.Usage), SwapAvailableBytes: left(s.Swap.Limit, s.Swap.Usage)}
	}
	if s.IO.PSI != nil {
		out.Io = &runtimeapi.IoUsage{Timestamp: at, Psi: pressure(s.IO.PSI)}
	}
}

// left is what a limit still allows; nil without a limit, as cAdvisor and the kubelet have it.
func left(limit, used uint64) *runtimeapi.UInt64Value {
	if limit == cgroup.NoLimit {
		return nil
	}
	return number(limit - min(limit, used))
}

func number(v uint64) *runtimeapi.UInt64Value { return &runtimeapi.UInt64Value{Value: v} }

// pressure: in both, totals are nanoseconds and averages percent.
func pressure(p *cgroup.PSI) *runtimeapi.PsiStats {
	if p == nil {
		return nil
	}
	data := func(v cgroup.Pressure) *runtimeapi.PsiData {
		return &runtimeapi.PsiData{Total: v.Total, Avg10: v.Avg10, Avg60: v.Avg60, Avg300: v.Avg300}
	}
	return &runtimeapi.PsiStats{Some: data(p.Some), Full: data(p.Full)}
}

package cri

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/cgroup"
)

func psi(base uint64) *cgroup.PSI {
	return &cgroup.PSI{Some: cgroup.Pressure{Avg10: 1, Total: base * 1e9}, Full: cgroup.Pressure{Avg10: 2, Total: (base + 1) * 1e9}}
}

// fullStats is a cgroup in which every counter is another number.
func fullStats() *cgroup.Stats {
	return &cgroup.Stats{
		At:  time.Unix(1700000100, 0),
		CPU: cgroup.CPUStats{Usage: 101e9, User: 102e9, System: 103e9, Periods: 104, ThrottledPeriods: 105, ThrottledTime: 106e9, PSI: psi(110)},
		Memory: cgroup.MemoryStats{
			Usage: 201, WorkingSet: 202, RSS: 203, Cache: 204, Mapped: 205, Kernel: 206, Peak: 207, Limit: 208, FailCount: 209, Faults: 210, MajFaults: 211,
			PSI: psi(220), ActiveFile: 212, InactiveFile: 213,
		},
		Swap: cgroup.SwapStats{Accounted: true, Usage: 301, Limit: 302},
		Pids: cgroup.PidsStats{Current: 401, Limit: 402},
		IO: cgroup.IOStats{PSI: psi(510), Devices: []cgroup.DeviceIO{
			{Major: 4095, Minor: 1, ReadBytes: 501, WriteBytes: 502, Reads: 503, Writes: 504},
			{Major: 4095, Minor: 2, ReadBytes: 505, WriteBytes: 506, Reads: 507, Writes: 508},
		}},
		Hugepage: []cgroup.HugepageStats{{PageSize: "2MB", Usage: 601, Peak: 602}, {PageSize: "1GB", Usage: 603, Peak: 604}},
	}
}

// measuredWorld has a pod with a running and an exited container, all of which can be measured.
func measuredWorld(t testing.TB) *world {
	w := newWorld(t)
	exited := someContainer()
	exited.ID, exited.State = strings.Repeat("d3", 32), podsandbox.ContainerExited
	w.pods.containers = []*podsandbox.Container{someContainer(), exited}
	w.pods.stats = &podsandbox.ContainerStats{
		ID: containerID, Cgroup: fullStats(), WritableAt: time.Unix(1700000050, 0), WritableBytes: 701, WritableInodes: 702, Mountpoint: "/", LogBytes: 703,
	}
	w.pods.processes = &podsandbox.ProcessStats{Processes: 801, Descriptors: 802, Sockets: 803, OpenFilesLimit: 804, OOMKills: 805}
	w.pods.podStats = map[string]*podsandbox.PodStats{podID: {
		ID: podID, Cgroup: fullStats(), Processes: 901,
		Interfaces: []podsandbox.Interface{
			{Name: "eth0", Rx: podsandbox.Traffic{Bytes: 1, Packets: 2, Errors: 3, Dropped: 4}, Tx: podsandbox.Traffic{Bytes: 5, Packets: 6, Errors: 7, Dropped: 8}},
			{Name: "net1", Rx: podsandbox.Traffic{Bytes: 11}, Tx: podsandbox.Traffic{Bytes: 15}},
		},
	}}
	return w
}

// samples are metrics by name and own labels, "name{a,b}", after a check of each against its descriptor.
func samples(t *testing.T, keys map[string][]string, metrics []*runtimeapi.Metric, base []string) map[string]uint64 {
	t.Helper()
	out := map[string]uint64{}
	for _, m := range metrics {
		want, ok := keys[m.Name]
		if !ok {
			t.Errorf("%s has no descriptor", m.Name)
			continue
		}
		if m.Value == nil {
			t.Errorf("%s has no value, which crashes the kubelet", m.Name)
			continue
		}
		if len(m.LabelValues) != len(want) {
			t.Errorf("%s: %d label values for keys %v", m.Name, len(m.LabelValues), want)
			continue
		}
		if !slices.Equal(m.LabelValues[:len(base)], base) {
			t.Errorf("%s: got labels %q, want %q first", m.Name, m.LabelValues, base)
		}
		if m.Timestamp != 0 {
			t.Errorf("%s: timestamp %d, but it was measured for this call", m.Name, m.Timestamp)
		}
		if counts := strings.HasSuffix(m.Name, "_total") && m.Name != "container_fs_inodes_total" || m.Name == "container_memory_failcnt"; counts != (m.MetricType == runtimeapi.MetricType_COUNTER) {
			t.Errorf("%s is a %v", m.Name, m.MetricType)
		}
		key := m.Name
		if own := m.LabelValues[len(base):]; len(own) > 0 {
			key += "{" + strings.Join(own, ",") + "}"
		}
		if _, twice := out[key]; twice {
			t.Errorf("%s is there twice, which makes Prometheus refuse all", key)
		}
		out[key] = m.Value.Value
	}
	return out
}

func TestMetricsAreThoseOfTheDescriptors(t *testing.T) {
	w := measuredWorld(t)
	descriptors, err := w.runtime.ListMetricDescriptors(t.Context(), &runtimeapi.ListMetricDescriptorsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string][]string{}
	for _, d := range descriptors.Descriptors {
		if keys[d.Name] != nil || d.Help == "" || !strings.HasPrefix(d.Name, "container_") || !slices.Equal(d.LabelKeys[:len(baseLabels)], baseLabels) {
			t.Errorf("got descriptor %v", d)
		}
		keys[d.Name] = d.LabelKeys
	}
	resp, err := w.runtime.ListPodSandboxMetrics(t.Context(), &runtimeapi.ListPodSandboxMetricsRequest{})
	if err != nil || len(resp.PodMetrics) != 1 || len(resp.PodMetrics[0].ContainerMetrics) != 1 {
		t.Fatalf("got %v, %v; want one pod with one container", resp, err)
	}
	pod := resp.PodMetrics[0]
	if pod.PodSandboxId != podID || pod.ContainerMetrics[0].ContainerId != containerID {
		t.Errorf("got pod %s, container %s", pod.PodSandboxId, pod.ContainerMetrics[0].ContainerId)
	}
	got := samples(t, keys, pod.Metrics, []string{"/kubepods/pod1", "", "", "web", "prod", ""})
	want := map[string]uint64{}
	for nic, base := range map[string]uint64{"eth0": 1, "net1": 11} {
		for i, f := range networkFamilies {
			name := f.name + "{" + nic + "}"
			want[name] = 0
			if nic == "eth0" || strings.HasSuffix(f.name, "_bytes_total") {
				want[name] = base + uint64([]int{0, 1, 3, 2, 4, 5, 7, 6}[i]) // bytes, packets, dropped, errors; both ways
			}
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("pod: got (+), want (-):\n%s", diff)
	}

	got = samples(t, keys, pod.ContainerMetrics[0].Metrics, []string{"/kubepods/pod1/c", containerID, "registry.test/busybox:1", "web", "prod", "main"})
	if age := time.Since(time.Unix(int64(got["container_last_seen"]), 0)); age < 0 || age > time.Minute {
		t.Errorf("container_last_seen: got %d", got["container_last_seen"])
	}
	delete(got, "container_last_seen")
	for name := range got { // of the machine that the test runs on
		if strings.HasPrefix(name, "container_fs_inodes_") || strings.HasPrefix(name, "container_fs_limit_bytes") {
			delete(got, name)
		} else if strings.HasPrefix(name, "container_fs_usage_bytes{") {
			if got[name] != 701+703 {
				t.Errorf("%s: got %d, want the writable layer and the log", name, got[name])
			}
			delete(got, name)
		}
	}
	want = map[string]uint64{
		"container_cpu_usage_seconds_total{total}": 101, "container_cpu_user_seconds_total": 102, "container_cpu_system_seconds_total": 103,
		"container_cpu_cfs_periods_total": 104, "container_cpu_cfs_throttled_periods_total": 105, "container_cpu_cfs_throttled_seconds_total": 106,
		"container_pressure_cpu_waiting_seconds_total": 110, "container_pressure_cpu_stalled_seconds_total": 111,
		"container_memory_usage_bytes": 201, "container_memory_working_set_bytes": 202, "container_memory_rss": 203, "container_memory_cache": 204,
		"container_memory_mapped_file": 205, "container_memory_kernel_usage": 206, "container_memory_max_usage_bytes": 207, "container_spec_memory_limit_bytes": 208,
		"container_memory_failcnt": 209, "container_memory_failures_total{pgfault,container}": 210, "container_memory_failures_total{pgmajfault,container}": 211,
		"container_memory_failures_total{pgfault,hierarchy}": 210, "container_memory_failures_total{pgmajfault,hierarchy}": 211,
		"container_memory_total_active_file_bytes": 212, "container_memory_total_inactive_file_bytes": 213,
		"container_pressure_memory_waiting_seconds_total": 220, "container_pressure_memory_stalled_seconds_total": 221,
		"container_memory_swap": 301, "container_spec_memory_swap_limit_bytes": 302,
		"container_threads": 401, "container_threads_max": 402,
		"container_fs_reads_bytes_total{4095:1}": 501, "container_fs_writes_bytes_total{4095:1}": 502, "container_fs_reads_total{4095:1}": 503, "container_fs_writes_total{4095:1}": 504,
		"container_fs_reads_bytes_total{4095:2}": 505, "container_fs_writes_bytes_total{4095:2}": 506, "container_fs_reads_total{4095:2}": 507, "container_fs_writes_total{4095:2}": 508,
		"container_blkio_device_usage_total{4095:1,4095,1,Read}": 501, "container_blkio_device_usage_total{4095:1,4095,1,Write}": 502,
		"container_blkio_device_usage_total{4095:2,4095,2,Read}": 505, "container_blkio_device_usage_total{4095:2,4095,2,Write}": 506,
		"container_pressure_io_waiting_seconds_total": 510, "container_pressure_io_stalled_seconds_total": 511,
		"container_hugetlb_usage_bytes{2MB}": 601, "container_hugetlb_max_usage_bytes{2MB}": 602, "container_hugetlb_usage_bytes{1GB}": 603, "container_hugetlb_max_usage_bytes{1GB}": 604,
		"container_processes": 801, "container_file_descriptors": 802, "container_sockets": 803, "container_ulimits_soft{max_open_files}": 804, "container_oom_events_total": 805,
		"container_start_time_seconds": 101, "container_spec_cpu_period": 100000, "container_spec_cpu_shares": 512, "container_spec_memory_reservation_limit_bytes": 0,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("container: got (+), want (-):\n%s", diff)
	}
	// Every family has a value somewhere, but the one that this container does not have.
	for name := range keys {
		of := append(slices.Clone(pod.Metrics), pod.ContainerMetrics[0].Metrics...)
		if !slices.ContainsFunc(of, func(m *runtimeapi.Metric) bool { return m.Name == name }) && name != "container_spec_cpu_quota" {
			t.Errorf("%s: descriptor without a metric", name)
		}
	}
}

// What a kernel, or a container, does not have is no series: never a made-up 0.
func TestMetricsWithoutWhatTheKernelLacks(t *testing.T) {
	w := measuredWorld(t)
	s := fullStats()
	s.CPU.PSI, s.Memory.PSI, s.IO.PSI, s.IO.Devices, s.Hugepage = nil, nil, nil, nil, []cgroup.HugepageStats{{PageSize: "2MB", Usage: 1}}
	s.Swap = cgroup.SwapStats{Limit: cgroup.NoLimit}
	s.Memory.Peak, s.Memory.Limit, s.Pids.Limit = 0, cgroup.NoLimit, cgroup.NoLimit
	w.pods.stats.Cgroup, w.pods.stats.Mountpoint = s, "/nowhere"
	w.pods.processes.Descriptors, w.pods.processes.Sockets, w.pods.processes.OpenFilesLimit = -1, -1, 0
	w.pods.containers[0].Spec.Linux.Resources.CPU.Quota = ptr(int64(25000))
	w.pods.containers[0].Spec.Linux.Resources.Unified = map[string]string{"memory.low": "4096"}
	resp, err := w.runtime.ListPodSandboxMetrics(t.Context(), &runtimeapi.ListPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]uint64{}
	for _, m := range resp.PodMetrics[0].ContainerMetrics[0].Metrics {
		got[m.Name] = m.Value.GetValue()
	}
	for name := range got {
		for _, absent := range []string{"pressure", "_fs_", "blkio", "hugetlb_max", "memory_swap", "max_usage", "file_descriptors", "sockets", "ulimits"} {
			if strings.Contains(name, absent) && name != "container_spec_memory_swap_limit_bytes" {
				t.Errorf("got %s", name)
			}
		}
	}
	for name, want := range map[string]uint64{
		"container_spec_memory_limit_bytes": 0, "container_spec_memory_swap_limit_bytes": 0, "container_threads_max": 0,
		"container_spec_cpu_quota": 25000, "container_spec_memory_reservation_limit_bytes": 4096,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s: got %d, %v; want %d", name, v, ok, want)
		}
	}
}

// What ends while it is measured is left out, and nothing else with it.
func TestMetricsOfWhatEndsMeanwhile(t *testing.T) {
	w := measuredWorld(t)
	gone := somePod()
	gone.ID = strings.Repeat("b2", 32) // has no PodStats
	w.pods.pods = append(w.pods.pods, gone)
	stopped := somePod()
	stopped.ID, stopped.State = strings.Repeat("b3", 32), podsandbox.PodNotReady
	w.pods.pods = append(w.pods.pods, stopped)
	w.pods.processes = nil // the container ended between two looks at it
	resp, err := w.runtime.ListPodSandboxMetrics(t.Context(), &runtimeapi.ListPodSandboxMetricsRequest{})
	if err != nil || len(resp.PodMetrics) != 1 || resp.PodMetrics[0].PodSandboxId != podID || len(resp.PodMetrics[0].ContainerMetrics) != 0 {
		t.Errorf("got %v, %v; want the one pod without its container", resp, err)
	}
	stats, err := w.runtime.ListPodSandboxStats(t.Context(), &runtimeapi.ListPodSandboxStatsRequest{})
	if err != nil || len(stats.Stats) != 1 || stats.Stats[0].Attributes.Id != podID {
		t.Errorf("got %v, %v; want the one pod", stats, err)
	}
}

func TestPodSandboxStats(t *testing.T) {
	w := measuredWorld(t)
	w.pods.stats.Cgroup.Swap.Usage = 300
	got, err := w.runtime.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: podID[:8]})
	if err != nil {
		t.Fatal(err)
	}
	const at = 1700000100 * int64(time.Second)
	p := func(base uint64) *runtimeapi.PsiStats {
		return &runtimeapi.PsiStats{Some: &runtimeapi.PsiData{Avg10: 1, Total: base * 1e9}, Full: &runtimeapi.PsiData{Avg10: 2, Total: (base + 1) * 1e9}}
	}
	want := &runtimeapi.PodSandboxStats{
		Attributes: &runtimeapi.PodSandboxAttributes{
			Id: podID, Metadata: &runtimeapi.PodSandboxMetadata{Name: "web", Uid: "u-1", Namespace: "prod", Attempt: 2},
			Labels: somePod().Config.Labels, Annotations: somePod().Config.Annotations,
		},
		Linux: &runtimeapi.LinuxPodSandboxStats{
			Cpu: &runtimeapi.CpuUsage{Timestamp: at, UsageCoreNanoSeconds: number(101e9), Psi: p(110)},
			Memory: &runtimeapi.MemoryUsage{
				Timestamp: at, WorkingSetBytes: number(202), UsageBytes: number(201), RssBytes: number(203), PageFaults: number(210), MajorPageFaults: number(211),
				AvailableBytes: number(6), Psi: p(220),
			},
			Io:      &runtimeapi.IoUsage{Timestamp: at, Psi: p(510)},
			Process: &runtimeapi.ProcessUsage{Timestamp: at, ProcessCount: number(901)},
			Network: &runtimeapi.NetworkUsage{
				Timestamp:        at,
				DefaultInterface: &runtimeapi.NetworkInterfaceUsage{Name: "eth0", RxBytes: number(1), RxErrors: number(3), TxBytes: number(5), TxErrors: number(7)},
				Interfaces:       []*runtimeapi.NetworkInterfaceUsage{{Name: "net1", RxBytes: number(11), RxErrors: number(0), TxBytes: number(15), TxErrors: number(0)}},
			},
		},
	}
	one, err := w.runtime.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: containerID})
	if err != nil {
		t.Fatal(err)
	}
	if one.Stats.Swap.GetSwapUsageBytes().GetValue() != 300 || one.Stats.Io.GetPsi() == nil {
		t.Errorf("container: got swap %v, io %v", one.Stats.Swap, one.Stats.Io)
	}
	want.Linux.Containers = []*runtimeapi.ContainerStats{one.Stats}
	if diff := cmp.Diff(want, got.Stats, protocmp.Transform()); diff != "" {
		t.Errorf("got (+), want (-):\n%s", diff)
	}

	w.pods.podStats[podID].Interfaces = nil
	if got, err = w.runtime.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: podID}); err != nil || got.Stats.Linux.Network != nil {
		t.Errorf("the node's network: got %v, %v", got, err)
	}
	// The kubelet asks for "" to find out whether this is Unimplemented.
	_, err = w.runtime.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{})
	wantStatus(t, err, codes.InvalidArgument, "pod_sandbox_id")
	_, err = w.runtime.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: "ffff"})
	wantStatus(t, err, codes.NotFound, "ffff")
	delete(w.pods.podStats, podID)
	_, err = w.runtime.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: podID})
	wantStatus(t, err, codes.FailedPrecondition, podID)
}

func TestListPodSandboxStatsFilters(t *testing.T) {
	w := measuredWorld(t)
	other := somePod()
	other.ID = strings.Repeat("b2", 32)
	other.Config.Labels = map[string]string{"app": "db"}
	w.pods.pods = append(w.pods.pods, other)
	w.pods.podStats[other.ID] = w.pods.podStats[podID]
	for _, tt := range []struct {
		name   string
		filter *runtimeapi.PodSandboxStatsFilter
		want   []string
	}{
		{"none", nil, []string{podID, other.ID}},
		{"short id", &runtimeapi.PodSandboxStatsFilter{Id: "b2b2"}, []string{other.ID}},
		{"label", &runtimeapi.PodSandboxStatsFilter{LabelSelector: map[string]string{"app": "web"}}, []string{podID}},
		{"both", &runtimeapi.PodSandboxStatsFilter{Id: podID, LabelSelector: map[string]string{"app": "db"}}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp, err := w.runtime.ListPodSandboxStats(t.Context(), &runtimeapi.ListPodSandboxStatsRequest{Filter: tt.filter})
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, s := range resp.Stats {
				got = append(got, s.Attributes.Id)
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestUpdatePodSandboxResources(t *testing.T) {
	w := newWorld(t)
	send := func(r *runtimeapi.UpdatePodSandboxResourcesRequest) error {
		_, err := w.runtime.UpdatePodSandboxResources(t.Context(), r)
		return err
	}
	a, b, c := &runtimeapi.LinuxContainerResources{CpuShares: 77}, &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 88}, &runtimeapi.LinuxContainerResources{CpuQuota: 99}
	for _, r := range []*runtimeapi.UpdatePodSandboxResourcesRequest{{PodSandboxId: podID, Overhead: a, Resources: b}, {PodSandboxId: podID}, {PodSandboxId: podID, Resources: c}} {
		if err := send(r); err != nil {
			t.Fatal(err)
		}
	}
	config := podRequest().GetConfig()
	if err := overlayResources(config, w.pods.resources); err != nil || !proto.Equal(config.Linux.Overhead, a) || !proto.Equal(config.Linux.Resources, c) {
		t.Errorf("got %v, %v", config.Linux, err)
	}
	if err := overlayResources(&runtimeapi.PodSandboxConfig{}, w.pods.resources); err != nil {
		t.Errorf("a config without linux: %v", err)
	}
	w.pods.pods[0].Resources = w.pods.resources
	status, err := w.runtime.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: podID, Verbose: true})
	if err != nil || !strings.Contains(status.Info["info"], `"cpu_quota":99`) || !strings.Contains(status.Info["info"], `"cpu_shares":77`) {
		t.Errorf("got %v, %v", status.GetInfo(), err)
	}
	wantStatus(t, send(&runtimeapi.UpdatePodSandboxResourcesRequest{}), codes.InvalidArgument, "pod_sandbox_id")
	wantStatus(t, send(&runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: podID, Overhead: &runtimeapi.LinuxContainerResources{CpuShares: -1}}), codes.InvalidArgument, "overhead.cpu_shares")
	w.pods.err = fmt.Errorf("%w: stopped", podsandbox.ErrState)
	wantStatus(t, send(&runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: podID}), codes.FailedPrecondition, "stopped")
}

func TestSpread(t *testing.T) {
	items := make([]int, 100)
	for i := range items {
		items[i] = i
	}
	got := make([]int, len(items))
	if err := spread(t.Context(), items, func(i, item int) error { got[i] = item; return nil }); err != nil || !slices.Equal(got, items) {
		t.Errorf("got %v, %v", got, err)
	}
	if err := spread(t.Context(), nil, func(int, int) error { panic("called") }); err != nil {
		t.Error(err)
	}
	failure := errors.New("no")
	if err := spread(t.Context(), items, func(i, _ int) error {
		if i == 3 {
			return failure
		}
		return nil
	}); !errors.Is(err, failure) {
		t.Errorf("got %v, want %v", err, failure)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if err := spread(ctx, items, func(i, _ int) error {
		if i == 3 {
			cancel()
		}
		return nil
	}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

// What the translation of 30 pods costs, without reading the kernel.
func BenchmarkListPodSandboxMetrics(b *testing.B) {
	w := measuredWorld(b)
	w.pods.pods, w.pods.containers = nil, nil
	for i := range 30 {
		pod, ctr := somePod(), someContainer()
		pod.ID = fmt.Sprintf("%064x", i+1)
		ctr.ID, ctr.PodID = fmt.Sprintf("%064x", i+100), pod.ID
		w.pods.pods, w.pods.containers = append(w.pods.pods, pod), append(w.pods.containers, ctr)
		w.pods.podStats[pod.ID] = w.pods.podStats[podID]
	}
	for b.Loop() {
		resp, err := w.runtime.ListPodSandboxMetrics(b.Context(), &runtimeapi.ListPodSandboxMetricsRequest{})
		if err != nil || len(resp.PodMetrics) != 30 {
			b.Fatalf("got %d, %v", len(resp.GetPodMetrics()), err)
		}
	}
}

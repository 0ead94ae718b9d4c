package cri

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/cgroup"
)

// Metrics are what a kubelet with PodAndContainerStatsFromCRI shows at /metrics/cadvisor instead of cAdvisor's own:
// the same names (cAdvisor lib/metrics/prometheus.go) with the same labels (the kubelet's
// containerPrometheusLabelsFunc), so that dashboards and alerts go on working. CRI has only whole numbers: seconds are cut.
//
// A pod's own cgroup has no series, as with containerd: it would double the cost of a scrape. Its sums are in
// ListPodSandboxStats. Of pods there is the network.
//
// Left out is what the kernel does not count by cgroup without an I/O scheduler of its own (fs time, merges,
// sectors), and, for one container, what it or the kernel does not have: a series is never a made-up zero.

// baseLabels begin the labels of every family. For a pod itself name, image and container are "".
var baseLabels = []string{"id", "name", "image", "pod", "namespace", "container"}

// A family is one metric with all its series.
type family struct {
	name, help string
	kind       runtimeapi.MetricType
	labels     []string // behind the base ones
}

const (
	counter = runtimeapi.MetricType_COUNTER
	gauge   = runtimeapi.MetricType_GAUGE
)

// cgroupFamily is of containers, read from a container's cgroup alone.
type cgroupFamily struct {
	family
	values func(*cgroup.Stats, series)
}

// containerFamily is of containers, with what else is known of one.
type containerFamily struct {
	family
	values func(*measured, series)
}

// networkFamily has a series for each of a pod's interfaces.
type networkFamily struct {
	family
	value func(*podsandbox.Interface) uint64
}

// series takes one value, with those of the family's own labels.
type series func(v uint64, labels ...string)

// measured is all that is known of one container at one moment.
type measured struct {
	at        time.Time
	ctr       *podsandbox.Container
	stats     *podsandbox.ContainerStats // Cgroup is not nil
	processes *podsandbox.ProcessStats
	asked     *runtimeapi.LinuxContainerResources
	host      *hostView
}

// one is a family with a single series.
func one(f func(*cgroup.Stats) uint64) func(*cgroup.Stats, series) {
	return func(s *cgroup.Stats, put series) { put(f(s)) }
}

// unless0 is one, but for 0, which says that the kernel does not know.
func unless0(f func(*cgroup.Stats) uint64) func(*cgroup.Stats, series) {
	return func(s *cgroup.Stats, put series) {
		if v := f(s); v != 0 {
			put(v)
		}
	}
}

func inSeconds(nanoseconds uint64) uint64 { return nanoseconds / uint64(time.Second) }

// noLimitIs0 is how cAdvisor writes limits that are not set.
func noLimitIs0(v uint64) uint64 {
	if v == cgroup.NoLimit {
		return 0
	}
	return v
}

// stalled is one of the six pressure families; the kernel may have none.
func stalled(of func(*cgroup.Stats) *cgroup.PSI, line func(*cgroup.PSI) cgroup.Pressure) func(*cgroup.Stats, series) {
	return func(s *cgroup.Stats, put series) {
		if p := of(s); p != nil {
			put(inSeconds(line(p).Total))
		}
	}
}

func cpuPSI(s *cgroup.Stats) *cgroup.PSI        { return s.CPU.PSI }
func memoryPSI(s *cgroup.Stats) *cgroup.PSI     { return s.Memory.PSI }
func ioPSI(s *cgroup.Stats) *cgroup.PSI         { return s.IO.PSI }
func someStalled(p *cgroup.PSI) cgroup.Pressure { return p.Some }
func allStalled(p *cgroup.PSI) cgroup.Pressure  { return p.Full }

var cgroupFamilies = []cgroupFamily{
	{family{"container_cpu_usage_seconds_total", "Cumulative cpu time consumed in seconds.", counter, []string{"cpu"}},
		func(s *cgroup.Stats, put series) { put(inSeconds(s.CPU.Usage), "total") }},
	{family{"container_cpu_user_seconds_total", "Cumulative user cpu time consumed in seconds.", counter, nil},
		one(func(s *cgroup.Stats) uint64 { return inSeconds(s.CPU.User) })},
	{family{"container_cpu_system_seconds_total", "Cumulative system cpu time consumed in seconds.", counter, nil},
		one(func(s *cgroup.Stats) uint64 { return inSeconds(s.CPU.System) })},
	{family{"container_cpu_cfs_periods_total", "Number of elapsed enforcement period intervals.", counter, nil},
		one(func(s *cgroup.Stats) uint64 { return s.CPU.Periods })},
	{family{"container_cpu_cfs_throttled_periods_total", "Number of throttled period intervals.", counter, nil},
		one(func(s *cgroup.Stats) uint64 { return s.CPU.ThrottledPeriods })},
	{family{"container_cpu_cfs_throttled_seconds_total", "Total time duration the container has been throttled.", counter, nil},
		one(func(s *cgroup.Stats) uint64 { return inSeconds(s.CPU.ThrottledTime) })},

	{family{"container_memory_cache", "Number of bytes of page cache memory.", gauge, nil},
		one(func(s *cgroup.Stats) uint64 { return s.Memory.Cache })},
	{family{"container_memory_rss", "Size of RSS in bytes.", gauge, nil},
		one(func(s *cgroup.Stats) uint64 { return s.Memory.RSS })},
	{family{"container_memory_kernel_usage", "Size of kernel memory allocated in bytes.", gauge, nil},
		one(func(s *cgroup.Stats) uint64 { return s.Memory.Kernel })},
	{family{"container_memory_mapped_file", "Size of memory mapped files in bytes.", gauge, nil},
		one(func(s *cgroup.Stats) uint64 { return s.Memory.Mapped })},
	{family{"container_memory_swap", "Container swap usage in bytes.", gauge, nil},
		func(s *cgroup.Stats, put series) {
			if s.Swap.Accounted {
				put(s.Swap.Usage)
			}
		}},
	{family{"container_memory_failcnt", "Number of memory usage hits limits", counter, nil},
		one(func(s *cgroup.Stats) uint64 { return s.Memory.FailCount })},
	{family{"container_memory_usage_bytes", "Current memory usage in bytes, including all memory regardless of when it was accessed", gauge, nil},
		one(func(s *cgroup.Stats) uint64 { return s.Memory.Usage })},
	{family{"container_memory_max_usage_bytes", "Maximum memory usage recorded in bytes", gauge, nil},
		unless0(func(s *cgroup.Stats) uint64 { return s.Memory.Peak })},
	{family{"container_memory_working_set_bytes", "Current working set in bytes.", gauge, nil},
		one(func(s *cgroup.Stats) uint64 { return s.Memory.WorkingSet })},
	{family{"container_memory_total_active_file_bytes", "Current total active file in bytes.", gauge, nil},
		one(func(s *cgroup.Stats) uint64 { return s.Memory.ActiveFile })},
	{family{"container_memory_total_inactive_file_bytes", "Current total inactive file in bytes.", gauge, nil},
		one(func(s *cgroup.Stats) uint64 { return s.Memory.InactiveFile })},
	{family{"container_memory_failures_total", "Cumulative count of memory allocation failures.", counter, []string{"failure_type", "scope"}},
		func(s *cgroup.Stats, put series) {
			// Counted with all cgroups below; cgroup2 knows no other way, and cAdvisor writes both scopes there, too.
			for _, scope := range []string{"container", "hierarchy"} {
				put(s.Memory.Faults, "pgfault", scope)
				put(s.Memory.MajFaults, "pgmajfault", scope)
			}
		}},

	{family{"container_hugetlb_usage_bytes", "Current hugepage usage in bytes", gauge, []string{"pagesize"}},
		func(s *cgroup.Stats, put series) {
			for _, h := range s.Hugepage {
				put(h.Usage, h.PageSize)
			}
		}},
	{family{"container_hugetlb_max_usage_bytes", "Maximum hugepage usage recorded in bytes", gauge, []string{"pagesize"}},
		func(s *cgroup.Stats, put series) {
			for _, h := range s.Hugepage {
				if h.Peak >= h.Usage { // cgroup2 does not say
					put(h.Peak, h.PageSize)
				}
			}
		}},

	{family{"container_pressure_cpu_waiting_seconds_total", "Total time duration tasks in the container have waited due to CPU congestion.", counter, nil}, stalled(cpuPSI, someStalled)},
	{family{"container_pressure_cpu_stalled_seconds_total", "Total time duration no tasks in the container could make progress due to CPU congestion.", counter, nil}, stalled(cpuPSI, allStalled)},
	{family{"container_pressure_memory_waiting_seconds_total", "Total time duration tasks in the container have waited due to memory congestion.", counter, nil}, stalled(memoryPSI, someStalled)},
	{family{"container_pressure_memory_stalled_seconds_total", "Total time duration no tasks in the container could make progress due to memory congestion.", counter, nil}, stalled(memoryPSI, allStalled)},
	{family{"container_pressure_io_waiting_seconds_total", "Total time duration tasks in the container have waited due to IO congestion.", counter, nil}, stalled(ioPSI, someStalled)},
	{family{"container_pressure_io_stalled_seconds_total", "Total time duration no tasks in the container could make progress due to IO congestion.", counter, nil}, stalled(ioPSI, allStalled)},

	{family{"container_threads", "Number of threads running inside the container.", gauge, nil},
		one(func(s *cgroup.Stats) uint64 { return s.Pids.Current })},
	{family{"container_threads_max", "Maximum number of threads allowed inside the container, infinity if value is zero.", gauge, nil},
		one(func(s *cgroup.Stats) uint64 { return noLimitIs0(s.Pids.Limit) })},
}

var containerFamilies = []containerFamily{
	{family{"container_last_seen", "Last time a container was seen by the exporter", gauge, nil},
		func(m *measured, put series) { put(uint64(m.at.Unix())) }},
	{family{"container_start_time_seconds", "Start time of the container since unix epoch in seconds.", gauge, nil},
		func(m *measured, put series) { put(uint64(m.ctr.StartedAt.Unix())) }},
	{family{"container_oom_events_total", "Count of out of memory events observed for the container", counter, nil},
		func(m *measured, put series) { put(m.processes.OOMKills) }},

	{family{"container_fs_inodes_free", "Number of available Inodes", gauge, []string{"device"}}, ofFS(func(fs *unix.Statfs_t, _ *measured) uint64 { return fs.Ffree })},
	{family{"container_fs_inodes_total", "Number of Inodes", gauge, []string{"device"}}, ofFS(func(fs *unix.Statfs_t, _ *measured) uint64 { return fs.Files })},
	{family{"container_fs_limit_bytes", "Number of bytes that can be consumed by the container on this filesystem.", gauge, []string{"device"}},
		ofFS(func(fs *unix.Statfs_t, _ *measured) uint64 { return fs.Blocks * uint64(fs.Frsize) })},
	{family{"container_fs_usage_bytes", "Number of bytes that are consumed by the container on this filesystem.", gauge, []string{"device"}},
		ofFS(func(_ *unix.Statfs_t, m *measured) uint64 { return m.stats.WritableBytes + m.stats.LogBytes })},
	{family{"container_fs_reads_bytes_total", "Cumulative count of bytes read", counter, []string{"device"}}, ofIO(func(d *cgroup.DeviceIO) uint64 { return d.ReadBytes })},
	{family{"container_fs_reads_total", "Cumulative count of reads completed", counter, []string{"device"}}, ofIO(func(d *cgroup.DeviceIO) uint64 { return d.Reads })},
	{family{"container_fs_writes_bytes_total", "Cumulative count of bytes written", counter, []string{"device"}}, ofIO(func(d *cgroup.DeviceIO) uint64 { return d.WriteBytes })},
	{family{"container_fs_writes_total", "Cumulative count of writes completed", counter, []string{"device"}}, ofIO(func(d *cgroup.DeviceIO) uint64 { return d.Writes })},
	{family{"container_blkio_device_usage_total", "Blkio Device bytes usage", counter, []string{"device", "major", "minor", "operation"}},
		func(m *measured, put series) {
			for _, d := range m.stats.Cgroup.IO.Devices {
				name, major, minor := m.host.device(d.Major, d.Minor), strconv.Itoa(int(d.Major)), strconv.Itoa(int(d.Minor))
				put(d.ReadBytes, name, major, minor, "Read")
				put(d.WriteBytes, name, major, minor, "Write")
			}
		}},

	{family{"container_processes", "Number of processes running inside the container.", gauge, nil},
		func(m *measured, put series) { put(m.processes.Processes) }},
	{family{"container_file_descriptors", "Number of open file descriptors for the container.", gauge, nil},
		func(m *measured, put series) {
			if m.processes.Descriptors >= 0 {
				put(uint64(m.processes.Descriptors))
			}
		}},
	{family{"container_sockets", "Number of open sockets for the container.", gauge, nil},
		func(m *measured, put series) {
			if m.processes.Sockets >= 0 {
				put(uint64(m.processes.Sockets))
			}
		}},
	{family{"container_ulimits_soft", "Soft ulimit values for the container root process. Unlimited if -1, except priority and nice", gauge, []string{"ulimit"}},
		func(m *measured, put series) {
			if m.processes.OpenFilesLimit != 0 {
				put(m.processes.OpenFilesLimit, "max_open_files")
			}
		}},

	{family{"container_spec_cpu_period", "CPU period of the container.", gauge, nil},
		func(m *measured, put series) { put(uint64(orElse(m.asked.GetCpuPeriod(), 100_000))) }}, // the kernel's default
	{family{"container_spec_cpu_quota", "CPU quota of the container.", gauge, nil},
		func(m *measured, put series) {
			if v := m.asked.GetCpuQuota(); v > 0 {
				put(uint64(v))
			}
		}},
	{family{"container_spec_cpu_shares", "CPU share of the container.", gauge, nil},
		func(m *measured, put series) { put(uint64(orElse(m.asked.GetCpuShares(), 1024))) }}, // the kernel's default
	{family{"container_spec_memory_limit_bytes", "Memory limit for the container.", gauge, nil},
		func(m *measured, put series) { put(noLimitIs0(m.stats.Cgroup.Memory.Limit)) }},
	{family{"container_spec_memory_reservation_limit_bytes", "Memory reservation limit for the container.", gauge, nil},
		func(m *measured, put series) { put(reservation(m.asked)) }},
	{family{"container_spec_memory_swap_limit_bytes", "Memory swap limit for the container.", gauge, nil},
		func(m *measured, put series) { put(noLimitIs0(m.stats.Cgroup.Swap.Limit)) }},
}

var networkFamilies = []networkFamily{
	{family{"container_network_receive_bytes_total", "Cumulative count of bytes received", counter, []string{"interface"}}, func(i *podsandbox.Interface) uint64 { return i.Rx.Bytes }},
	{family{"container_network_receive_packets_total", "Cumulative count of packets received", counter, []string{"interface"}}, func(i *podsandbox.Interface) uint64 { return i.Rx.Packets }},
	{family{"container_network_receive_packets_dropped_total", "Cumulative count of packets dropped while receiving", counter, []string{"interface"}}, func(i *podsandbox.Interface) uint64 { return i.Rx.Dropped }},
	{family{"container_network_receive_errors_total", "Cumulative count of errors encountered while receiving", counter, []string{"interface"}}, func(i *podsandbox.Interface) uint64 { return i.Rx.Errors }},
	{family{"container_network_transmit_bytes_total", "Cumulative count of bytes transmitted", counter, []string{"interface"}}, func(i *podsandbox.Interface) uint64 { return i.Tx.Bytes }},
	{family{"container_network_transmit_packets_total", "Cumulative count of packets transmitted", counter, []string{"interface"}}, func(i *podsandbox.Interface) uint64 { return i.Tx.Packets }},
	{family{"container_network_transmit_packets_dropped_total", "Cumulative count of packets dropped while transmitting", counter, []string{"interface"}}, func(i *podsandbox.Interface) uint64 { return i.Tx.Dropped }},
	{family{"container_network_transmit_errors_total", "Cumulative count of errors encountered while transmitting", counter, []string{"interface"}}, func(i *podsandbox.Interface) uint64 { return i.Tx.Errors }},
}

// orElse is v, or what stands for one that is not set.
func orElse(v, unset int64) int64 {
	if v > 0 {
		return v
	}
	return unset
}

// reservation is what the kubelet's memory manager asks for as memory.low, in bytes; 0 without.
func reservation(asked *runtimeapi.LinuxContainerResources) uint64 {
	n, err := strconv.ParseUint(asked.GetUnified()["memory.low"], 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// ofFS is about the file system of the writable layer.
func ofFS(f func(*unix.Statfs_t, *measured) uint64) func(*measured, series) {
	return func(m *measured, put series) {
		if fs, device, ok := m.host.fileSystem(m.stats.Mountpoint); ok {
			put(f(fs, m), device)
		}
	}
}

// ofIO has a series for each block device that the container used.
func ofIO(f func(*cgroup.DeviceIO) uint64) func(*measured, series) {
	return func(m *measured, put series) {
		for i := range m.stats.Cgroup.IO.Devices {
			d := &m.stats.Cgroup.IO.Devices[i]
			put(f(d), m.host.device(d.Major, d.Minor))
		}
	}
}

// hostView is what the containers of one call have in common: it is looked up once. Safe for concurrent use.
type hostView struct {
	mu      sync.Mutex
	devices map[[2]uint32]string
	mounted map[string]*mounted
}

type mounted struct {
	fs     unix.Statfs_t
	device string
	ok     bool
}

func newHostView() *hostView {
	return &hostView{devices: map[[2]uint32]string{}, mounted: map[string]*mounted{}}
}

// device is the name of a block device, "/dev/sda1"; of one without a name, "8:1".
func (h *hostView) device(major, minor uint32) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.deviceLocked(major, minor)
}

func (h *hostView) deviceLocked(major, minor uint32) string {
	key := [2]uint32{major, minor}
	name, ok := h.devices[key]
	if !ok {
		name = strconv.Itoa(int(major)) + ":" + strconv.Itoa(int(minor))
		if to, err := os.Readlink("/sys/dev/block/" + name); err == nil {
			name = "/dev/" + filepath.Base(to)
		}
		h.devices[key] = name
	}
	return name
}

func (h *hostView) fileSystem(path string) (*unix.Statfs_t, string, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := h.mounted[path]
	if m == nil {
		m = &mounted{}
		h.mounted[path] = m
		var st unix.Stat_t
		if unix.Statfs(path, &m.fs) == nil && unix.Stat(path, &st) == nil {
			m.ok, m.device = true, h.deviceLocked(unix.Major(st.Dev), unix.Minor(st.Dev))
		}
	}
	return &m.fs, m.device, m.ok
}

// ListMetricDescriptors names all families; what the kubelet does not find here when it starts it drops later.
func (s *runtimeService) ListMetricDescriptors(context.Context, *runtimeapi.ListMetricDescriptorsRequest) (*runtimeapi.ListMetricDescriptorsResponse, error) {
	resp := &runtimeapi.ListMetricDescriptorsResponse{}
	add := func(f *family) {
		resp.Descriptors = append(resp.Descriptors, &runtimeapi.MetricDescriptor{Name: f.name, Help: f.help, LabelKeys: concat(baseLabels, f.labels)})
	}
	for i := range cgroupFamilies {
		add(&cgroupFamilies[i].family)
	}
	for i := range containerFamilies {
		add(&containerFamilies[i].family)
	}
	for i := range networkFamilies {
		add(&networkFamilies[i].family)
	}
	return resp, nil
}

func concat(a, b []string) []string { return append(a[:len(a):len(a)], b...) }

// ListPodSandboxMetrics measures ready pods and their running containers. What ends meanwhile is left out, and what
// cannot be measured, too, with a line in the log: it must not hide the others.
func (s *runtimeService) ListPodSandboxMetrics(ctx context.Context, _ *runtimeapi.ListPodSandboxMetricsRequest) (*runtimeapi.ListPodSandboxMetricsResponse, error) {
	var pods []*podsandbox.Pod
	for _, pod := range s.cfg.Pods.Pods() {
		if pod.State == podsandbox.PodReady {
			pods = append(pods, pod)
		}
	}
	running, host := s.runningByPod(), newHostView()
	all := make([]*runtimeapi.PodSandboxMetrics, len(pods)) // nil: gone meanwhile
	err := spread(ctx, pods, func(i int, pod *podsandbox.Pod) error {
		all[i] = s.podMetrics(ctx, pod, running[pod.ID], host)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ListPodSandboxMetricsResponse{PodMetrics: present(all)}, nil
}

func (s *runtimeService) podMetrics(ctx context.Context, pod *podsandbox.Pod, running []*podsandbox.Container, host *hostView) *runtimeapi.PodSandboxMetrics {
	interfaces, err := s.cfg.Pods.PodInterfaces(pod.ID)
	if err != nil {
		if !isGone(err) {
			klog.FromContext(ctx).Error(err, "Could not measure a pod, leaving it out", "sandboxID", pod.ID)
		}
		return nil
	}
	out := &runtimeapi.PodSandboxMetrics{PodSandboxId: pod.ID}
	labels := []string{pod.CgroupPath, "", "", pod.Config.Name, pod.Config.Namespace, ""}
	for n := range interfaces {
		own := concat(labels, []string{interfaces[n].Name})
		for i := range networkFamilies {
			f := &networkFamilies[i]
			out.Metrics = append(out.Metrics, metric(&f.family, own, f.value(&interfaces[n])))
		}
	}
	for _, ctr := range running {
		if ctx.Err() != nil {
			return nil // the call fails, whatever is returned
		}
		m, err := s.containerMetrics(pod, ctr, host)
		switch {
		case isGone(err):
		case err != nil:
			klog.FromContext(ctx).Error(err, "Could not measure a container, leaving it out", "sandboxID", pod.ID, "containerID", ctr.ID)
		default:
			out.ContainerMetrics = append(out.ContainerMetrics, m)
		}
	}
	return out
}

func (s *runtimeService) containerMetrics(pod *podsandbox.Pod, ctr *podsandbox.Container, host *hostView) (*runtimeapi.ContainerMetrics, error) {
	m := &measured{at: time.Now(), ctr: ctr, asked: askedOf(ctr), host: host}
	var err error
	if m.stats, err = s.cfg.Pods.ContainerStats(ctr.ID); err != nil {
		return nil, err
	}
	if m.stats.Cgroup == nil {
		return nil, podsandbox.ErrState // it has ended
	}
	if m.processes, err = s.cfg.Pods.ProcessStats(ctr.ID); err != nil {
		return nil, err
	}
	image, err := echoedImage(ctr.Config.Echo)
	if err != nil {
		return nil, err
	}
	labels := []string{ctr.CgroupPath, ctr.ID, imageName(image), pod.Config.Name, pod.Config.Namespace, ctr.Config.Name}
	out := &runtimeapi.ContainerMetrics{ContainerId: ctr.ID, Metrics: make([]*runtimeapi.Metric, 0, len(containerFamilies)+len(cgroupFamilies)+16)}
	var f *family
	put := func(v uint64, own ...string) {
		all := labels
		if len(own) > 0 {
			all = concat(labels, own)
		}
		out.Metrics = append(out.Metrics, metric(f, all, v))
	}
	for i := range cgroupFamilies {
		f = &cgroupFamilies[i].family
		cgroupFamilies[i].values(m.stats.Cgroup, put)
	}
	for i := range containerFamilies {
		f = &containerFamilies[i].family
		containerFamilies[i].values(m, put)
	}
	return out, nil
}

// metric has no timestamp: 0 says that it was measured for this call. Value is never nil, which the kubelet does not check.
func metric(f *family, labels []string, v uint64) *runtimeapi.Metric {
	return &runtimeapi.Metric{Name: f.name, MetricType: f.kind, LabelValues: labels, Value: number(v)}
}

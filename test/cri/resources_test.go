package cri

import (
	"strconv"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const mib = 1 << 20

func withResources(r *runtimeapi.LinuxContainerResources) editContainer {
	return func(c *runtimeapi.ContainerConfig) { c.Linux.Resources = r }
}

func number(t *testing.T, text string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// v2 says whether the controllers are cgroup2's.
func v2(c *container) bool {
	c.t.Helper()
	for _, dir := range c.cgroups() {
		if strings.HasPrefix(dir, "/sys/fs/cgroup/memory/") {
			return false
		}
	}
	return true
}

func TestLimitsAreApplied(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"}, withResources(&runtimeapi.LinuxContainerResources{
		CpuPeriod: 50000, CpuQuota: 25000, CpuShares: 512, MemoryLimitInBytes: 64 * mib, CpusetCpus: "0", CpusetMems: "0",
	}))
	if v2(c) {
		for file, want := range map[string]string{"cpu.max": "25000 50000", "memory.max": "67108864", "cpuset.cpus": "0"} {
			if got := c.cgroupFile(file); got != want {
				t.Errorf("%s: got %s, want %s", file, got, want)
			}
		}
	} else {
		for file, want := range map[string]string{"cpu.cfs_quota_us": "25000", "cpu.cfs_period_us": "50000", "cpu.shares": "512", "memory.limit_in_bytes": "67108864", "cpuset.cpus": "0"} {
			if got := c.cgroupFile(file); got != want {
				t.Errorf("%s: got %s, want %s", file, got, want)
			}
		}
	}
	r := c.status().GetResources().GetLinux()
	if r == nil || r.CpuPeriod != 50000 || r.CpuQuota != 25000 || r.CpuShares != 512 || r.MemoryLimitInBytes != 64*mib || r.CpusetCpus != "0" {
		t.Errorf("status: got %v", r)
	}
	if got := c.exec("cat", "/proc/self/status"); statusField(got, "Cpus_allowed_list")[0] != "0" {
		t.Errorf("an exec'd process may run on CPUs %v, want 0", statusField(got, "Cpus_allowed_list"))
	}
}

func TestUpdateIsAppliedAndReadBack(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	for _, state := range []runtimeapi.ContainerState{created, running} {
		c := p.create([]string{"sleep"}, withResources(&runtimeapi.LinuxContainerResources{CpuShares: 1024, MemoryLimitInBytes: 64 * mib, OomScoreAdj: 100}))
		if state == running {
			c.start()
		}
		update := func(r *runtimeapi.LinuxContainerResources) error {
			return w.rt.UpdateContainerResources(t.Context(), c.id, &runtimeapi.ContainerResources{Linux: r})
		}
		if err := update(&runtimeapi.LinuxContainerResources{CpuShares: 256, CpuQuota: 30000, CpuPeriod: 100000}); err != nil {
			t.Fatal(err)
		}
		want := func(what string, ok func(*runtimeapi.LinuxContainerResources) bool) {
			t.Helper()
			if r := c.status().GetResources().GetLinux(); !ok(r) {
				t.Errorf("%v, %s: got %v", state, what, r)
			}
		}
		want("cpu changed, memory not", func(r *runtimeapi.LinuxContainerResources) bool {
			return r.CpuShares == 256 && r.CpuQuota == 30000 && r.CpuPeriod == 100000 && r.MemoryLimitInBytes == 64*mib
		})
		if err := update(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 128 * mib, CpusetCpus: "1"}); err != nil {
			t.Fatal(err)
		}
		want("memory and cpuset changed, cpu not", func(r *runtimeapi.LinuxContainerResources) bool {
			return r.CpuShares == 256 && r.CpuQuota == 30000 && r.MemoryLimitInBytes == 128*mib && r.CpusetCpus == "1"
		})
		if err := update(&runtimeapi.LinuxContainerResources{CpuQuota: -1}); err != nil {
			t.Fatal(err)
		}
		want("no quota", func(r *runtimeapi.LinuxContainerResources) bool { return r.CpuQuota == -1 || r.CpuQuota == 0 })
		if state == created {
			c.start()
			want("after start", func(r *runtimeapi.LinuxContainerResources) bool {
				return r.CpuShares == 256 && r.MemoryLimitInBytes == 128*mib && r.CpusetCpus == "1"
			})
		}
		if got := statusField(c.exec("status"), "Cpus_allowed_list")[0]; got != "1" {
			t.Errorf("%v: it may run on CPUs %s, want 1", state, got)
		}
	}
}

func TestFailedUpdateChangesNothing(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"}, withResources(&runtimeapi.LinuxContainerResources{CpuShares: 512, MemoryLimitInBytes: 64 * mib}))
	before := c.status().Resources.String()
	for name, r := range map[string]*runtimeapi.LinuxContainerResources{
		"a cpuset that is not there": {CpuShares: 100, MemoryLimitInBytes: 32 * mib, CpusetCpus: "4000"},
		"a quota the kernel refuses": {CpuShares: 100, MemoryLimitInBytes: 32 * mib, CpuPeriod: 100000, CpuQuota: 10},
		"a limit below what it uses": {CpuShares: 100, MemoryLimitInBytes: 4096},
	} {
		t.Run(name, func(t *testing.T) {
			err := w.rt.UpdateContainerResources(t.Context(), c.id, &runtimeapi.ContainerResources{Linux: r})
			if err == nil {
				t.Error("it succeeded")
			}
			if after := c.status().Resources.String(); after != before {
				t.Errorf("got %s after a failed update, want %s", after, before)
			}
			c.exec("true")
		})
	}
}

func TestMemoryBeyondTheLimitIsReportedAsOOMKilled(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	limit := withResources(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 32 * mib})
	t.Run("first process", func(t *testing.T) {
		st := p.run([]string{"oom"}, limit).wait()
		if st.Reason != "OOMKilled" || st.ExitCode != 137 {
			t.Errorf("got %q, %d; want OOMKilled, 137", st.Reason, st.ExitCode)
		}
	})
	t.Run("not for others of the pod", func(t *testing.T) {
		other := p.run([]string{"sleep"})
		p.run([]string{"oom"}, limit).wait()
		other.stop(5)
		if st := other.status(); st.Reason == "OOMKilled" {
			t.Errorf("the other container: got %q", st.Reason)
		}
	})
	t.Run("not for a SIGKILL", func(t *testing.T) {
		c := p.run([]string{"sleep"}, limit)
		c.stop(0)
		if st := c.status(); st.Reason != "Error" {
			t.Errorf("got %q, want Error", st.Reason)
		}
	})
	t.Run("the pod lives on", func(t *testing.T) {
		if st := p.status(); st.State != runtimeapi.PodSandboxState_SANDBOX_READY {
			t.Errorf("got %v", st.State)
		}
		p.output([]string{"true"})
	})
}

func TestFourMebibytesAreEnoughToStart(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	// The payload is a Go program of some 2 MiB; runc fails at this limit before it runs.
	c := p.run([]string{"echo", "hello"}, withResources(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 4 * mib}))
	if st := c.wait(); st.ExitCode != 0 {
		t.Errorf("got exit code %d, %s, %s", st.ExitCode, st.Reason, st.Message)
	}
	if got := c.output("stdout"); got != "hello\n" {
		t.Errorf("got %q", got)
	}
}

func TestALimitTooSmallToStartIsNamed(t *testing.T) {
	w := need(t)
	p := w.pod(t).used()
	w.leavesNothing(t, func() {
		c, err := p.tryCreate([]string{"sleep"}, withResources(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 << 10}))
		if err == nil {
			err = w.rt.StartContainer(t.Context(), c.id)
			defer c.remove()
		}
		if err == nil || !strings.Contains(err.Error(), "memory limit") || !strings.Contains(err.Error(), "65536") && !strings.Contains(err.Error(), "64 KiB") && !strings.Contains(err.Error(), "64KiB") {
			t.Errorf("got %v, want an error that names the memory limit and its size", err)
		}
	})
}

func TestStats(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	c := p.run([]string{"fill", "/file", "8", ",", "touch", "/filled", ",", "burn", "1", ",", "sleep"}, withResources(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 128 * mib}), func(c *runtimeapi.ContainerConfig) {
		c.Labels = map[string]string{"app": "stats"}
	})
	c.exec("wait", "/filled") // before the first question: the layer is measured only now and then
	var st *runtimeapi.ContainerStats
	eventually(t, "it has used a tenth of a second of CPU", func() bool { // of a second of the clock: the machine may be busy
		var err error
		if st, err = w.rt.ContainerStats(t.Context(), c.id); err != nil {
			t.Fatal(err)
		}
		return st.GetCpu().GetUsageCoreNanoSeconds().GetValue() > uint64(100*time.Millisecond)
	})
	if a := st.Attributes; a.GetId() != c.id || a.GetMetadata().GetName() != c.cfg.Metadata.Name || a.GetLabels()["app"] != "stats" {
		t.Errorf("attributes: got %v", a)
	}
	if cpu := st.Cpu.UsageCoreNanoSeconds.Value; cpu > uint64(20*time.Second) {
		t.Errorf("CPU: got %v", time.Duration(cpu))
	}
	m := st.Memory
	if set := m.GetWorkingSetBytes().GetValue(); set < 200<<10 || set > 128*mib {
		t.Errorf("working set: got %d", set)
	}
	if m.GetUsageBytes().GetValue() < m.GetWorkingSetBytes().GetValue() {
		t.Errorf("usage %d is less than the working set %d", m.GetUsageBytes().GetValue(), m.GetWorkingSetBytes().GetValue())
	}
	if m.GetRssBytes().GetValue() == 0 || m.GetPageFaults().GetValue() == 0 {
		t.Errorf("rss %d, page faults %d", m.GetRssBytes().GetValue(), m.GetPageFaults().GetValue())
	}
	if got, want := m.GetAvailableBytes().GetValue(), 128*mib-m.GetWorkingSetBytes().GetValue(); got != want {
		t.Errorf("available: got %d, want limit - working set = %d", got, want)
	}
	for name, at := range map[string]int64{"cpu": st.Cpu.Timestamp, "memory": m.Timestamp, "writable layer": st.GetWritableLayer().GetTimestamp()} {
		if age := time.Since(time.Unix(0, at)); age < 0 || age > time.Minute {
			t.Errorf("%s: taken %v ago", name, age)
		}
	}
	eventually(t, "the writable layer shows the file", func() bool {
		if st, err := w.rt.ContainerStats(t.Context(), c.id); err == nil {
			layer := st.GetWritableLayer()
			return layer.GetUsedBytes().GetValue() >= 8*mib && layer.GetUsedBytes().GetValue() < 10*mib && layer.GetInodesUsed().GetValue() >= 1 && layer.GetFsId().GetMountpoint() != ""
		}
		return false
	})

	t.Run("list", func(t *testing.T) {
		idle, gone := p.create([]string{"sleep"}), p.run([]string{"true"})
		gone.wait()
		for name, f := range map[string]*runtimeapi.ContainerStatsFilter{
			"id": {Id: c.id}, "pod": {PodSandboxId: p.id}, "label": {LabelSelector: map[string]string{"app": "stats"}}, "all": nil, "short": {Id: c.id[:12]},
		} {
			list, err := w.rt.ListContainerStats(t.Context(), f)
			if err != nil {
				t.Fatal(err)
			}
			var found bool
			for _, one := range list {
				found = found || one.Attributes.Id == c.id
				if one.Attributes.Id == idle.id || one.Attributes.Id == gone.id {
					t.Errorf("%s: a container that does not run is listed", name)
				}
			}
			if !found {
				t.Errorf("%s: the container is not listed", name)
			}
		}
		list, err := w.rt.ListContainerStats(t.Context(), &runtimeapi.ContainerStatsFilter{PodSandboxId: "ffffffffffff"})
		if err != nil || len(list) != 0 {
			t.Errorf("another pod: got %v, %v", list, err)
		}
	})
}

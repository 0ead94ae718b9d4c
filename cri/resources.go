package cri

import (
	"context"
	"maps"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/cgroup"
)

// limits translates CRI's resources, in which zero is "not specified", to the
// specification's, in which nil is.
//
// A memory limit without a swap limit allows no swap: memory+swap is set to the same. That is what
// the other runtimes do, and the kubelet (NoSwap) where it can count swap.
func limits(r *runtimeapi.LinuxContainerResources) *specs.LinuxResources {
	out := &specs.LinuxResources{}
	if r == nil {
		return out
	}
	cpu := specs.LinuxCPU{Cpus: r.GetCpusetCpus(), Mems: r.GetCpusetMems()}
	if v := r.GetCpuShares(); v != 0 {
		cpu.Shares = ptr(uint64(v))
	}
	if v := r.GetCpuQuota(); v != 0 {
		cpu.Quota = ptr(v)
	}
	if v := r.GetCpuPeriod(); v != 0 {
		cpu.Period = ptr(uint64(v))
	}
	if cpu != (specs.LinuxCPU{}) {
		out.CPU = &cpu
	}
	var memory specs.LinuxMemory
	if v := r.GetMemoryLimitInBytes(); v != 0 {
		memory.Limit, memory.Swap = ptr(v), ptr(v)
	}
	if v := r.GetMemorySwapLimitInBytes(); v != 0 {
		memory.Swap = ptr(v)
	}
	if memory != (specs.LinuxMemory{}) {
		out.Memory = &memory
	}
	for _, h := range r.GetHugepageLimits() {
		out.HugepageLimits = append(out.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: h.GetPageSize(), Limit: h.GetLimit()})
	}
	if len(r.GetUnified()) > 0 {
		out.Unified = r.GetUnified()
	}
	return out
}

// classPrefixes begin annotations that choose a class of block I/O or of the cache (resctrl), for runtimes that have such
// classes (github.com/intel/goresctrl).
var classPrefixes = []string{"blockio.resources.beta.kubernetes.io/", "rdt.resources.beta.kubernetes.io/", "io.kubernetes.cri.rdt-class"}

// noteClasses says in the log that classes are asked for, and that there are none here. It is no error, for anybody who can make
// a pod can write its annotations, and the pod may run elsewhere next time.
func (s *runtimeService) noteClasses(ctx context.Context, pod *podsandbox.Pod, config *runtimeapi.ContainerConfig) {
	for _, annotations := range []map[string]string{pod.Config.Annotations, config.GetAnnotations()} {
		for key := range annotations {
			if slices.ContainsFunc(classPrefixes, func(p string) bool { return strings.HasPrefix(key, p) }) {
				klog.FromContext(ctx).Info("Annotation asks for a class of block I/O or cache, which crisp does not have, ignoring", "annotation", clip(key))
			}
		}
	}
}

// asked translates back what a specification asks for.
func asked(r *specs.LinuxResources, oomScoreAdj *int) *runtimeapi.LinuxContainerResources {
	out := &runtimeapi.LinuxContainerResources{}
	if oomScoreAdj != nil {
		out.OomScoreAdj = int64(*oomScoreAdj)
	}
	if r == nil {
		return out
	}
	if c := r.CPU; c != nil {
		out.CpuShares = int64(value(c.Shares))
		out.CpuQuota = value(c.Quota)
		out.CpuPeriod = int64(value(c.Period))
		out.CpusetCpus, out.CpusetMems = c.Cpus, c.Mems
	}
	if m := r.Memory; m != nil {
		out.MemoryLimitInBytes = value(m.Limit)
		out.MemorySwapLimitInBytes = value(m.Swap)
	}
	for _, h := range r.HugepageLimits {
		out.HugepageLimits = append(out.HugepageLimits, &runtimeapi.HugepageLimit{PageSize: h.Pagesize, Limit: h.Limit})
	}
	out.Unified = r.Unified
	return out
}

// applied overlays what was asked for with what the kernel's files say; this is what
// users see of a resize. Unlimited is shown as what was asked for, if that is no limit either.
func applied(out *runtimeapi.LinuxContainerResources, a cgroup.Applied) *runtimeapi.LinuxContainerResources {
	// cpu.weight has fewer values than shares: the asked one is exact if it leads to this weight.
	if a.CPUWeight == 0 || out.CpuShares == 0 || cgroup.Weight(uint64(out.CpuShares)) != a.CPUWeight {
		out.CpuShares = int64(a.CPUShares)
	}
	if a.CPUPeriod != 0 {
		out.CpuPeriod = int64(a.CPUPeriod)
		show(&out.CpuQuota, a.CPUQuota)
	}
	show(&out.MemoryLimitInBytes, a.MemoryLimit)
	show(&out.MemorySwapLimitInBytes, a.MemorySwapLimit)
	if a.CpusetCpus != "" {
		out.CpusetCpus = a.CpusetCpus
	}
	if a.CpusetMems != "" {
		out.CpusetMems = a.CpusetMems
	}
	for _, h := range out.HugepageLimits {
		if limit, ok := a.Hugepages[h.PageSize]; ok {
			h.Limit = limit
		}
	}
	if a.Unified != nil && len(out.Unified) > 0 {
		out.Unified = maps.Clone(out.Unified)
		for k := range out.Unified {
			if v, ok := a.Unified[k]; ok {
				out.Unified[k] = v
			}
		}
	}
	return out
}

// show stores a limit of the kernel's, of which -1 is none.
func show(field *int64, kernel int64) {
	switch {
	case kernel >= 0:
		*field = kernel
	case *field > 0:
		*field = 0
	}
}

func ptr[T any](v T) *T { return &v }

func value[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

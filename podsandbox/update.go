package podsandbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/runtime/cgroup"
)

// UpdateContainer changes the limits of a created or running container: what r leaves out stays as it is. It is all or
// nothing. A nil oomScoreAdj stays, too.
func (m *Manager) UpdateContainer(ctx context.Context, id string, r *specs.LinuxResources, oomScoreAdj *int) error {
	c, err := m.findContainer(id)
	if err != nil {
		return err
	}
	op, err := m.begin("update container", c.object())
	if err != nil {
		return err
	}
	defer m.end(op)
	return op.fail(m.update(ctx, op, c, r, oomScoreAdj))
}

func (m *Manager) update(ctx context.Context, op *operation, c *container, r *specs.LinuxResources, oomScoreAdj *int) error {
	if err := c.turn.take(ctx); err != nil {
		return err
	}
	defer c.turn.pass()
	now := c.now.Load()
	phase := now.state.Phase
	if phase != containerCreated && phase != containerRunning {
		return fmt.Errorf("%w: the container is %s", ErrState, phase)
	}
	if oomScoreAdj != nil && (*oomScoreAdj < -1000 || *oomScoreAdj > 1000) {
		return fmt.Errorf("%w: oom_score_adj %d is not between -1000 and 1000", ErrInvalid, *oomScoreAdj)
	}
	cg := m.cgroupOf(c)
	spec := updated(now.spec, r, oomScoreAdj)
	// A full disk says so before anything has changed. (A limit could not be taken back: no update says "none".)
	if err := op.step(ctx, "record", func(context.Context) error { return m.store.writeConfig(c.pod.id, c.id, spec) }); err != nil {
		return err
	}
	if err := op.step(ctx, "apply", func(ctx context.Context) error { return explainLimit(cg.Update(ctx, r), spec) }); err != nil {
		return errors.Join(err, m.store.writeConfig(c.pod.id, c.id, now.spec))
	}
	state := now.state
	if oomScoreAdj != nil {
		if phase == containerRunning {
			setOOMScoreAdj(ctx, cg, *oomScoreAdj)
		} else {
			state.OOMScoreAdj = oomScoreAdj // the pod's init has the old one already
			m.noteContainer(ctx, c, func(s *containerState) { s.OOMScoreAdj = oomScoreAdj })
		}
	}
	m.publishContainer(c, state, spec)
	return nil
}

// updated is the spec with what r names.
func updated(old *specs.Spec, r *specs.LinuxResources, oomScoreAdj *int) *specs.Spec {
	spec, linux := *old, *old.Linux
	spec.Linux = &linux
	if r != nil {
		linux.Resources = merged(linux.Resources, r)
	}
	if oomScoreAdj != nil {
		process := *old.Process
		process.OOMScoreAdj = oomScoreAdj
		spec.Process = &process
	}
	return &spec
}

// merged is a with the non-zero fields of b, as cgroup.Update applies them.
func merged(a, b *specs.LinuxResources) *specs.LinuxResources {
	var r specs.LinuxResources
	if a != nil {
		r = *a
	}
	if b.CPU != nil {
		var cpu specs.LinuxCPU
		if r.CPU != nil {
			cpu = *r.CPU
		}
		set(&cpu.Shares, b.CPU.Shares)
		set(&cpu.Quota, b.CPU.Quota)
		set(&cpu.Burst, b.CPU.Burst)
		set(&cpu.Period, b.CPU.Period)
		set(&cpu.RealtimeRuntime, b.CPU.RealtimeRuntime)
		set(&cpu.RealtimePeriod, b.CPU.RealtimePeriod)
		set(&cpu.Idle, b.CPU.Idle)
		cpu.Cpus = orElse(b.CPU.Cpus, cpu.Cpus)
		cpu.Mems = orElse(b.CPU.Mems, cpu.Mems)
		r.CPU = &cpu
	}
	if b.Memory != nil {
		var mem specs.LinuxMemory
		if r.Memory != nil {
			mem = *r.Memory
		}
		set(&mem.Limit, b.Memory.Limit)
		set(&mem.Reservation, b.Memory.Reservation)
		set(&mem.Swap, b.Memory.Swap)
		set(&mem.Swappiness, b.Memory.Swappiness)
		r.Memory = &mem
	}
	if b.Pids != nil && b.Pids.Limit != nil && *b.Pids.Limit != 0 {
		r.Pids = b.Pids
	}
	if len(b.HugepageLimits) > 0 {
		l := slices.Clone(r.HugepageLimits)
		for _, h := range b.HugepageLimits {
			if i := slices.IndexFunc(l, func(x specs.LinuxHugepageLimit) bool { return x.Pagesize == h.Pagesize }); i >= 0 {
				l[i] = h
			} else {
				l = append(l, h)
			}
		}
		r.HugepageLimits = l
	}
	if len(b.Unified) > 0 {
		u := maps.Clone(r.Unified)
		if u == nil {
			u = map[string]string{}
		}
		maps.Copy(u, b.Unified)
		r.Unified = u
	}
	return &r
}

// set copies what is given and not zero: zero means "leave" in an update (CRI, UpdateContainerResources).
func set[T comparable](to **T, from *T) {
	var zero T
	if from != nil && *from != zero {
		*to = from
	}
}

func orElse(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// setOOMScoreAdj writes oom_score_adj of all processes of a container. What the kernel
// refuses (lowering it without CAP_SYS_RESOURCE) stays as it is, as containerd's restrict_oom_score_adj does.
//
// A number may be another process's by the time it is opened: the directory of /proc is one process's for good, and what is
// still listed after it was opened is ours.
func setOOMScoreAdj(ctx context.Context, cg Cgroup, adj int) {
	log := klog.FromContext(ctx)
	pids, err := cg.Procs()
	if err != nil {
		log.Error(err, "Could not set oom_score_adj, ignoring")
		return
	}
	for _, pid := range pids {
		dir, err := unix.Open("/proc/"+strconv.Itoa(pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			continue // dead
		}
		if still, err := cg.Procs(); err == nil && slices.Contains(still, pid) {
			if err := writeAt(dir, "oom_score_adj", strconv.Itoa(adj)); err != nil {
				log.V(2).Info("Process keeps its oom_score_adj, ignoring", "pid", pid, "err", err)
			}
		}
		_ = unix.Close(dir) // O_PATH: nothing to lose
	}
}

func writeAt(dir int, name, value string) error {
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("open", err)
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte(value))
	return os.NewSyscallError("write", err)
}

// Resources reads a container's limits back from the kernel. An exited container has no cgroup any more:
// cgroup.ErrNotFound.
func (m *Manager) Resources(id string) (cgroup.Applied, error) {
	c, err := m.findContainer(id)
	if err != nil {
		return cgroup.Applied{}, err
	}
	return m.cgroupOf(c).Applied()
}

package podsandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/image"
	"github.com/crisp-cri/crisp/runtime/seccomp"
	"github.com/crisp-cri/crisp/runtime/spawn"
	"github.com/crisp-cri/crisp/runtime/user"
)

// Reasons of an exited container. The kubelet interprets OOMKilled; the others are for people.
const (
	reasonCompleted  = "Completed"
	reasonError      = "Error"
	reasonOOMKilled  = "OOMKilled"
	reasonStartError = "StartError"
	reasonNotStarted = "NotStarted" // stopped before it was started
	reasonUnknown    = "Unknown"
)

// Exit codes that no process returned.
const (
	codeStartError = 128 // as containerd's
	codeUnknown    = 255 // as containerd's
	codeKilled     = 128 + int(unix.SIGKILL)
)

// container is one container in memory.
type container struct {
	id     string
	pod    *pod
	rec    *containerRecord
	made   *call[string]
	handed atomic.Bool

	// turn is held by who changes the container. Nobody waits for a grace period with it.
	turn  turn
	draft containerState // of the making: User
	spec  *specs.Spec    // of the making: as asked for, then with the user
	// Of the making: what the init is given, open until it has it. Here and not in the steps, which the undoing makes anew.
	rootfs, log *os.File
	volumes     map[string]*os.File // images mounted besides, by ImageVolume.Source
	now         atomic.Pointer[containerNow]
	ended       chan struct{}                   // closed when it is exited
	prog        atomic.Pointer[seccomp.Program] // compiled when first needed

	// guarded by Manager.mu
	starting    *call[struct{}]
	cancelStart context.CancelCauseFunc // of starting
	stopping    *stop
	removing    *call[struct{}]
}

// containerNow is a container at one moment.
type containerNow struct {
	state containerState
	spec  *specs.Spec // read-only
	view  *Container  // nil when not to be shown
}

func (c *container) phase() containerPhase { return c.now.Load().state.Phase }
func (c *container) view() *Container      { return c.now.Load().view }
func (c *container) object() string        { return c.pod.object() + "/" + c.rec.Config.Name }

func (c *container) name() containerName {
	return containerName{pod: c.pod.id, name: c.rec.Config.Name, attempt: c.rec.Config.Attempt}
}

func newContainer(p *pod, r *containerRecord) *container {
	c := &container{id: r.ID, pod: p, rec: r, turn: newTurn(), ended: make(chan struct{})}
	c.now.Store(&containerNow{state: containerState{Phase: containerMaking}})
	return c
}

// CreateContainer makes a container in a ready pod and returns its id; nothing runs yet. Calls with the same pod, name and attempt
// join as RunPod's do.
func (m *Manager) CreateContainer(ctx context.Context, podID string, cfg *ContainerConfig) (id string, err error) {
	p, err := m.findPod(podID)
	if err != nil {
		return "", fmt.Errorf("cannot create container %q: %w", cfg.Name, err)
	}
	if err := validContainer(cfg); err != nil {
		return "", fmt.Errorf("cannot create container %q: %w", p.object()+"/"+cfg.Name, err)
	}
	c, err := m.claimContainer(ctx, p, cfg)
	if err != nil {
		return "", err
	}
	if id, err = c.made.wait(ctx); err != nil {
		return "", err
	}
	c.handed.Store(true)
	return id, nil
}

func validContainer(c *ContainerConfig) error {
	switch {
	case c.Name == "":
		return fmt.Errorf("%w: a container needs a name", ErrInvalid)
	case c.Spec == nil || c.Spec.Process == nil || len(c.Spec.Process.Args) == 0 || c.Spec.Linux == nil:
		return fmt.Errorf("%w: nothing to run", ErrInvalid)
	case c.LogPath != "" && !filepath.IsLocal(c.LogPath):
		return fmt.Errorf("%w: log path %q leads out of the log directory", ErrInvalid, c.LogPath)
	}
	if _, err := pidMode(c); err != nil {
		return err
	}
	_, err := ParseSignal(c.StopSignal)
	return err
}

func pidMode(c *ContainerConfig) (spawn.PIDMode, error) {
	switch c.PID {
	case NamespaceContainer, "":
		return spawn.PIDPrivate, nil
	case NamespacePod:
		return spawn.PIDPod, nil
	case NamespaceNode:
		return spawn.PIDHost, nil
	case NamespaceTarget:
		return spawn.PIDTarget, nil
	}
	return 0, fmt.Errorf("%w: PID namespace mode %q", ErrInvalid, c.PID)
}

// claimContainer finds the container of that name and attempt, or begins to make it.
func (m *Manager) claimContainer(ctx context.Context, p *pod, cfg *ContainerConfig) (*container, error) {
	op := &operation{what: "create container", object: p.object() + "/" + cfg.Name, began: time.Now()}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.refuses(); err != nil {
		return nil, op.fail(err)
	}
	if phase := p.phase(); phase != podReady {
		return nil, op.fail(fmt.Errorf("%w: the pod is %s", ErrState, phase))
	}
	name := containerName{pod: p.id, name: cfg.Name, attempt: cfg.Attempt}
	var displaced *container
	if h := m.names[name]; h != nil {
		phase := h.phase()
		same := sameContainer(h.rec.Config, cfg)
		switch {
		case same && (phase == containerMaking || phase == containerCreated):
			return h, nil
		case phase == containerExited || phase == containerRemoving || phase == containerUndoing:
		case phase == containerCreated && !h.handed.Load():
			displaced = h // nobody was ever told its id (C-72)
		default:
			return nil, op.fail(fmt.Errorf("%w: container %s (%s, for %v) has that name and attempt %d",
				ErrExists, h.id, phase, time.Since(h.rec.CreatedAt).Round(time.Millisecond), cfg.Attempt))
		}
	}
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	if err := p.gate.enter(op, cancel); err != nil {
		cancel(err)
		return nil, op.fail(err)
	}
	c := newContainer(p, &containerRecord{ID: newID(), PodID: p.id, Config: cfg, CreatedAt: m.newTimeLocked()})
	c.spec = cfg.Spec
	c.made = newCall[string](op)
	m.containers[c.id] = c
	p.containers[c.id] = c
	m.names[name] = c
	m.registerLocked(op)
	m.owned.Go(func() {
		defer m.end(op)
		defer p.gate.leave(op)
		defer cancel(nil)
		ctx, cancelLimit := context.WithTimeout(ctx, operationLimit)
		defer cancelLimit()
		defer context.AfterFunc(lifetime(m.closing), cancelLimit)()
		err := m.makeContainer(ctx, op, c, displaced)
		c.made.finish(c.id, op.fail(err))
	})
	return c, nil
}

func (m *Manager) makeContainer(ctx context.Context, op *operation, c *container, displaced *container) error {
	if err := c.turn.take(ctx); err != nil {
		return err
	}
	defer c.turn.pass()
	var err error
	if displaced != nil {
		err = op.step(ctx, "remove abandoned container", func(ctx context.Context) error { return m.removeAndWait(ctx, displaced, fromOperation) })
	}
	if err == nil {
		err = op.run(ctx, m.containerSteps(op, c))
	}
	if err == nil {
		return nil
	}
	return errors.Join(err, m.undoContainer(ctx, op, c))
}

// undoContainer unmakes a container that nobody was told of. The caller holds the turn.
func (m *Manager) undoContainer(ctx context.Context, op *operation, c *container) error {
	if err := m.changeContainer(ctx, c, containerFail, forget, nil); err != nil {
		return err
	}
	if err := op.undo(ctx, m.containerSteps(op, c), all); err != nil {
		return err
	}
	return m.changeContainer(ctx, c, containerIsGone, forget, nil)
}

func (m *Manager) unmakeContainer(ctx context.Context, op *operation, c *container) error {
	ctx, cancel := context.WithTimeout(ctx, operationLimit)
	defer cancel()
	if err := c.turn.take(ctx); err != nil {
		return err
	}
	defer c.turn.pass()
	switch c.phase() {
	case containerMaking, containerUndoing:
		return m.undoContainer(ctx, op, c)
	case containerCreated, containerRunning, containerExited, containerRemoving:
		// Of a pod that is being unmade because its own state was lost.
		return m.removeContainerNow(ctx, op, c)
	}
	return nil
}

// containerSteps is what a container is made of.
func (m *Manager) containerSteps(op *operation, c *container) []step {
	p, cfg := c.pod, c.rec.Config
	dir := m.store.containerDir(p.id, c.id)
	upper, work := filepath.Join(dir, upperDir), filepath.Join(dir, workDir)
	var layers image.Layers
	volumes := make([]image.Layers, len(cfg.Volumes))
	return []step{
		{name: "record", base: true,
			do:   func(context.Context) error { return m.store.createContainer(c.rec) },
			undo: func(context.Context) error { return m.store.removeContainer(p.id, c.id) },
		},
		{name: "image", base: true, // processes that cannot be killed run from its layers
			do: func(context.Context) (err error) {
				if layers, err = m.cfg.Images.Acquire(cfg.ImageID, c.id); err != nil {
					return err
				}
				for i, v := range cfg.Volumes {
					if volumes[i], err = m.cfg.Images.Acquire(v.ImageID, c.id); err != nil {
						return v.fail(err)
					}
				}
				return nil
			},
			undo: func(context.Context) error {
				m.cfg.Images.Release(c.id)
				m.wantCollection()
				return nil
			},
		},
		{name: "cgroup", beside: true,
			do: func(ctx context.Context) error {
				return explainLimit(m.cgroupOf(c).Create(ctx, cfg.Spec.Linux.Resources), cfg.Spec)
			},
			undo: func(ctx context.Context) error { return m.removeCgroup(ctx, c) },
		},
		{name: "rootfs",
			do: func(ctx context.Context) (err error) {
				// The overlay's root has the mode of upper, and the container's user must get in.
				if err = errors.Join(p.mkdir(upper, 0o755), p.mkdir(work, 0o700), c.makeBundle(dir)); err != nil {
					return err
				}
				userns, err := p.userns()
				if err != nil {
					return err
				}
				defer func() { _ = closeFile(&userns) }() // only a reference
				c.rootfs, err = m.cfg.Spawner.MountRootfs(ctx, spawn.RootfsArgs{Lower: layers.Lower, Upper: upper, Work: work, UserNS: userns, Label: c.spec.Linux.MountLabel})
				return err
			},
			undo: func(context.Context) error { return closeFile(&c.rootfs) },
		},
		{name: "image volumes",
			do: func(ctx context.Context) error {
				if len(cfg.Volumes) == 0 {
					return nil
				}
				userns, err := p.userns()
				if err != nil {
					return err
				}
				defer func() { _ = closeFile(&userns) }() // only a reference
				c.volumes = make(map[string]*os.File, len(cfg.Volumes))
				for i, v := range cfg.Volumes {
					f, err := m.cfg.Spawner.MountImage(ctx, spawn.ImageArgs{Lower: volumes[i].Lower, SubPath: v.SubPath, UserNS: userns, Label: c.spec.Linux.MountLabel})
					if err != nil {
						return v.fail(err)
					}
					c.volumes[v.Source] = f
				}
				return nil
			},
			undo: func(context.Context) error { return c.closeVolumes() },
		},
		{name: "user", do: func(context.Context) error { return c.resolveUser(c.rootfs) }},
		{name: "seccomp", do: func(context.Context) error {
			_, err := c.filter(c.spec)
			return err
		}},
		{name: "log",
			do: func(context.Context) (err error) {
				if p.rec.Config.LogDirectory == "" || cfg.LogPath == "" {
					return nil
				}
				c.log, err = openLog(p.rec.Config.LogDirectory, cfg.LogPath)
				return err
			},
			undo: func(context.Context) error { return closeFile(&c.log) },
		},
		{name: "config", beside: true,
			do: func(context.Context) error { return m.store.writeConfig(p.id, c.id, c.spec) },
		}, // its undo is "record"'s
		{name: "init", after: "cgroup",
			do:   func(ctx context.Context) error { return m.handOver(ctx, c, c.rootfs, c.log) },
			undo: func(ctx context.Context) error { return m.takeBack(ctx, c) },
		},
		// The commit point.
		{name: "commit", after: "config", do: func(ctx context.Context) error {
			if err := errors.Join(closeFile(&c.rootfs), c.closeVolumes(), closeFile(&c.log)); err != nil {
				return err
			}
			return m.commitContainer(ctx, op, c)
		}},
	}
}

// mkdir makes a directory of that mode, whatever the umask, that belongs to the root of the pod's user namespace.
func (p *pod) mkdir(path string, mode os.FileMode) error {
	if err := os.Mkdir(path, mode); err != nil {
		return err
	}
	if ids := p.rec.Config.Userns; ids != nil { // of an empty directory: nothing is ever chowned with its content
		if err := os.Lchown(path, int(ids.UID), int(ids.GID)); err != nil {
			return err
		}
	}
	return os.Chmod(path, mode)
}

// userns opens the pod's user namespace; nil, nil if it is the host's. The caller closes it.
func (p *pod) userns() (*os.File, error) {
	if p.rec.Config.Userns == nil {
		return nil, nil
	}
	i, err := p.living()
	if err != nil {
		return nil, err
	}
	return i.UserNS()
}

// closeFile closes *f once, if it is open.
func closeFile(f **os.File) error {
	if *f == nil {
		return nil
	}
	err := (*f).Close()
	*f = nil
	return err
}

// closeVolumes lets go of the mounted images.
func (c *container) closeVolumes() error {
	var errs []error
	for _, f := range c.volumes {
		errs = append(errs, f.Close())
	}
	c.volumes = nil
	return errors.Join(errs...)
}

// fail says of which volume an error is.
func (v *ImageVolume) fail(err error) error {
	return fmt.Errorf("%w at %s: image %s: %w", ErrImageVolume, v.Target, v.ImageID, err)
}

// resolveUser finds out who the container runs as, and completes the spec.
func (c *container) resolveUser(rootfs *os.File) error {
	id, err := user.Resolve(rootfs, c.rec.Config.User)
	if err != nil {
		return err
	}
	// The caller's spec is not ours to change.
	spec, process, linux := *c.spec, *c.spec.Process, *c.spec.Linux
	for _, g := range process.User.AdditionalGids { // of CDI devices
		if !slices.Contains(id.Groups, g) {
			id.Groups = append(slices.Clip(id.Groups), g)
		}
	}
	if err := c.pod.hasIDs(&id); err != nil {
		return err
	}
	c.draft.User = id
	process.User.UID, process.User.GID, process.User.AdditionalGids = id.UID, id.GID, id.Groups
	process.User.Username = id.Username
	if id.Home != "" && !slices.ContainsFunc(process.Env, func(kv string) bool { return strings.HasPrefix(kv, "HOME=") }) {
		process.Env = append(slices.Clip(process.Env), "HOME="+id.Home)
	}
	linux.Devices = slices.Clone(linux.Devices)
	for i := range linux.Devices {
		d := &linux.Devices[i]
		if d.UID == nil {
			d.UID = &id.UID
		}
		if d.GID == nil {
			d.GID = &id.GID
		}
	}
	spec.Process, spec.Linux = &process, &linux
	c.spec = &spec
	return nil
}

// hasIDs checks that the pod's user namespace has a user: one of an image may be any, and the kernel would say EINVAL.
func (p *pod) hasIDs(id *user.Identity) error {
	ids := p.rec.Config.Userns
	if ids == nil {
		return nil
	}
	for _, n := range append([]uint32{id.UID, id.GID}, id.Groups...) {
		if n >= ids.Size {
			return fmt.Errorf("%w: user or group %d is not in the pod's user namespace, which has the ids 0 to %d", ErrInvalid, n, ids.Size-1)
		}
	}
	return nil
}

// filter is the container's compiled seccomp program; empty when unconfined.
func (c *container) filter(spec *specs.Spec) (*seccomp.Program, error) {
	if p := c.prog.Load(); p != nil {
		return p, nil
	}
	p := &seccomp.Program{}
	if spec.Linux != nil && spec.Linux.Seccomp != nil {
		compiled, err := seccomp.Compile(spec.Linux.Seccomp)
		if err != nil {
			return nil, err
		}
		p = &compiled
	}
	c.prog.Store(p)
	return p, nil
}

func (m *Manager) cgroupOf(c *container) Cgroup {
	return m.cfg.Cgroups.Open(m.cfg.Cgroups.ContainerPath(c.pod.rec.CgroupPath, c.id))
}

func (m *Manager) removeCgroup(ctx context.Context, c *container) error {
	cg := m.cgroupOf(c)
	if err := cg.Kill(ctx); err != nil {
		return err
	}
	return cg.Remove(ctx)
}

// handOver gives everything to the pod's init.
func (m *Manager) handOver(ctx context.Context, c *container, rootfs, log *os.File) error {
	i, err := c.pod.living()
	if err != nil {
		return err
	}
	cg := m.cgroupOf(c)
	join, err := cg.Join(c.pod.entry())
	if err != nil {
		return err
	}
	defer func() { _ = join.Close() }() // the init has its own
	mode, err := pidMode(c.rec.Config)
	if err != nil {
		return err
	}
	prog, err := c.filter(c.spec)
	if err != nil {
		return err
	}
	return i.Create(ctx, spawn.ContainerArgs{
		ID: c.id, Spec: c.spec, Rootfs: rootfs, Images: c.volumes,
		CgroupDir: join.DirFD, CgroupTasks: join.Tasks, CgroupProcs: join.Procs, CgroupMounts: cg.BindSources(),
		PID: mode, TargetID: c.rec.Config.TargetID,
		Bundle: m.store.containerDir(c.pod.id, c.id), BundleRoot: m.store.state,
		Seccomp: prog.BPF, SeccompFlags: prog.Flags,
		Log: log, Stdin: c.rec.Config.Stdin, StdinOnce: c.rec.Config.StdinOnce,
	})
}

// takeBack makes the pod's init forget the container. A dead init has.
func (m *Manager) takeBack(ctx context.Context, c *container) error {
	i, err := c.pod.living()
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, m.patience)
	defer cancel()
	err = i.Remove(ctx, c.id)
	if errors.Is(err, spawn.ErrGone) || errors.Is(err, spawn.ErrNotFound) {
		return nil
	}
	return err
}

func (m *Manager) commitContainer(ctx context.Context, op *operation, c *container) error {
	if err := m.changeContainer(ctx, c, containerCommit, must, func(s *containerState) {
		s.User = c.draft.User
		s.Timings = append([]Timing(nil), op.timings...)
	}); err != nil {
		return err
	}
	m.usage.known(c.id, diskUsage{At: time.Now()}) // nothing was written yet
	dir := m.store.containerDir(c.pod.id, c.id)
	m.store.flush.later(filepath.Join(dir, containerFile), filepath.Join(dir, configFile), filepath.Join(dir, stateFile), dir, filepath.Dir(dir))
	return nil
}

// changeContainer moves a container to its next phase. The caller holds the turn.
func (m *Manager) changeContainer(ctx context.Context, c *container, e containerEvent, d durability, update func(*containerState)) error {
	old := c.now.Load()
	s := old.state
	was := s.Phase
	next, err := was.next(e)
	if err != nil {
		return err
	}
	s.Phase = next
	if update != nil {
		update(&s)
	}
	if d == must { // before anybody sees it
		if err := m.store.appendState(m.store.containerDir(c.pod.id, c.id), &s); err != nil {
			return err
		}
	}
	spec := old.spec
	if e == containerCommit {
		spec = c.spec
	}
	m.publishContainer(c, s, spec)
	if d == should { // a fact, whether or not there is room for it
		if err := m.store.appendState(m.store.containerDir(c.pod.id, c.id), &s); err != nil {
			klog.FromContext(ctx).Error(err, "Could not record the state of a container, going on", "containerID", c.id, "was", was, "now", next)
		}
	}
	if was != next {
		klog.FromContext(ctx).V(2).Info("Changed state of container", "sandboxID", c.pod.id, "containerID", c.id, "event", e, "was", was, "now", next, "reason", s.Reason)
	}
	return nil
}

// publishContainer makes s what everybody sees, and keeps the indexes in step.
func (m *Manager) publishContainer(c *container, s containerState, spec *specs.Spec) {
	now := &containerNow{state: s, spec: spec}
	if s.Phase.shown() != "" {
		now.view = m.containerView(c, &s, spec)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	defer m.announceContainerLocked(c, c.view(), now.view)
	c.now.Store(now)
	switch s.Phase {
	case containerExited, containerRemoving:
		select {
		case <-c.ended:
		default:
			close(c.ended)
		}
	case containerGone:
		if m.containers[c.id] == c {
			delete(m.containers, c.id)
		}
		delete(c.pod.containers, c.id)
		if m.names[c.name()] == c {
			delete(m.names, c.name())
		}
		m.usage.forget(c.id)
	}
}

func (m *Manager) containerView(c *container, s *containerState, spec *specs.Spec) *Container {
	cfg := c.rec.Config
	v := &Container{
		ID: c.id, PodID: c.pod.id, Config: cfg, Spec: spec, User: s.User, State: s.Phase.shown(),
		CreatedAt: c.rec.CreatedAt, StartedAt: s.StartedAt, FinishedAt: s.FinishedAt,
		LogLost:  s.LogLost,
		ExitCode: s.ExitCode, Reason: s.Reason, Message: s.Message, Timings: s.Timings,
		CgroupPath: m.cfg.Cgroups.ContainerPath(c.pod.rec.CgroupPath, c.id),
		UpperDir:   filepath.Join(m.store.containerDir(c.pod.id, c.id), upperDir),
	}
	if v.State == ContainerRunning {
		v.PID = s.PID
	}
	if dir := c.pod.rec.Config.LogDirectory; dir != "" && cfg.LogPath != "" {
		v.LogPath = filepath.Join(dir, cfg.LogPath)
	}
	return v
}

// StartContainer runs a created container. A *spawn.StartError says that its process could
// not be started: it is exited then, with reason StartError.
func (m *Manager) StartContainer(ctx context.Context, id string) error {
	c, err := m.findContainer(id)
	if err != nil {
		return err
	}
	call, err := m.startCall(ctx, c)
	if err != nil {
		return err
	}
	_, err = call.wait(ctx)
	return err
}

func (m *Manager) startCall(ctx context.Context, c *container) (*call[struct{}], error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c.starting != nil {
		return c.starting, nil
	}
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	call, err := m.joinLocked(ctx, &c.starting, "start container", c.object(), fromCaller, func(joined context.Context, op *operation) error {
		defer cancel(nil)
		// joinLocked's context bounds the time, cancel ends it early.
		limited, stop := context.WithCancelCause(joined)
		defer stop(nil)
		defer context.AfterFunc(ctx, func() { stop(context.Cause(ctx)) })()
		if err := c.pod.gate.enter(op, stop); err != nil {
			return err
		}
		defer c.pod.gate.leave(op)
		return m.start(limited, op, c)
	})
	if err != nil {
		cancel(err)
		return nil, err
	}
	c.cancelStart = cancel
	return call, nil
}

func (m *Manager) start(ctx context.Context, op *operation, c *container) error {
	if err := c.turn.take(ctx); err != nil {
		return err
	}
	defer c.turn.pass()
	if _, err := c.phase().next(containerStarted); err != nil {
		return err
	}
	i, err := c.pod.living()
	if err != nil {
		return err
	}
	if err := m.oweHooks(c); err != nil {
		return err
	}
	if err := m.prepare(ctx, op, c, i); err != nil {
		return m.startFailed(ctx, c, err)
	}
	var pid int
	var at time.Time
	err = op.step(ctx, "start process", func(ctx context.Context) (err error) {
		pid, at, err = i.Start(ctx, c.id)
		return err
	})
	if err != nil {
		return m.startFailed(ctx, c, err)
	}
	if adj := c.now.Load().state.OOMScoreAdj; adj != nil {
		setOOMScoreAdj(ctx, m.cgroupOf(c), *adj)
	}
	// It runs, whether or not that can be recorded: after a restart the pod's init tells.
	if err := m.changeContainer(ctx, c, containerStarted, should, func(s *containerState) {
		s.PID, s.StartedAt = pid, at.Round(0)
		s.Timings = append(slices.Clip(s.Timings), op.timings...)
	}); err != nil {
		return err
	}
	m.store.flush.later(filepath.Join(m.store.containerDir(c.pod.id, c.id), stateFile))
	return m.poststart(ctx, op, c, pid)
}

// startFailed decides what a failed start means for the container.
func (m *Manager) startFailed(ctx context.Context, c *container, err error) error {
	cause := context.Cause(ctx)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killLimit)
	defer cancel()
	var failed *spawn.StartError
	message := ""
	switch {
	case errors.As(err, &failed):
		err = m.explainStart(c, err)
		message = failed.Error()
		if text := err.Error(); strings.Contains(text, "memory limit") {
			message = text
		}
	case cause != nil:
		// It hung. Nothing of it may begin to run later.
		message = "ended while it was being started: " + cause.Error()
		if kerr := m.cgroupOf(c).Kill(ctx); kerr != nil {
			err = errors.Join(err, kerr)
		}
	default:
		return err // the init is gone, or did not take the request: others deal with that
	}
	now := time.Now().Round(0)
	cerr := m.changeContainer(ctx, c, containerExit, should, func(s *containerState) {
		s.ExitCode, s.Reason, s.Message, s.FinishedAt = codeStartError, reasonStartError, message, now
	})
	m.afterExit(ctx, c)
	return errors.Join(err, cerr)
}

// explainStart says so if it was the memory limit.
func (m *Manager) explainStart(c *container, err error) error {
	r := c.now.Load().spec
	if r == nil || r.Linux == nil || r.Linux.Resources == nil || r.Linux.Resources.Memory == nil || r.Linux.Resources.Memory.Limit == nil {
		return err
	}
	kills, kerr := m.cgroupOf(c).OOMKills()
	if errors.Is(err, unix.ENOMEM) || kerr == nil && kills > 0 {
		return fmt.Errorf("%w: the memory limit of %d bytes is too low to start the container", err, *r.Linux.Resources.Memory.Limit)
	}
	return err
}

// explainLimit names the memory limit where the kernel found it too small.
func explainLimit(err error, spec *specs.Spec) error {
	if err == nil || !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOMEM) || spec.Linux.Resources == nil || spec.Linux.Resources.Memory == nil || spec.Linux.Resources.Memory.Limit == nil {
		return err
	}
	return fmt.Errorf("%w: the memory limit of %d bytes is too low", err, *spec.Linux.Resources.Memory.Limit)
}

// onExit is what a pod's init calls for each exit, also for those we know. They wait for ready, if it is not nil.
func (m *Manager) onExit(p *pod, ready <-chan struct{}) func(spawn.Exit) {
	return func(x spawn.Exit) {
		m.owned.Go(func() {
			if ready != nil {
				select {
				case <-ready:
				case <-m.closing: // the next daemon is told, too
					return
				}
			}
			ctx, cancel := context.WithTimeout(lifetime(m.closing), operationLimit)
			defer cancel()
			m.exited(ctx, p, x)
		})
	}
}

// exited records the end of a container. It is idempotent.
func (m *Manager) exited(ctx context.Context, p *pod, x spawn.Exit) {
	m.mu.RLock()
	c := p.containers[x.ContainerID]
	m.mu.RUnlock()
	if c == nil {
		return // removed
	}
	if err := c.turn.take(ctx); err != nil {
		klog.FromContext(ctx).Error(err, "Could not record the exit of a container; the journal has it", "containerID", c.id)
		return
	}
	defer c.turn.pass()
	m.exitedNow(ctx, c, x)
}

// exitedNow is exited for the holder of the turn.
func (m *Manager) exitedNow(ctx context.Context, c *container, x spawn.Exit) {
	switch c.phase() {
	case containerCreated, containerRunning: // created: the reply to Start was lost
	default:
		return
	}
	log := klog.FromContext(ctx)
	if mode, _ := pidMode(c.rec.Config); mode != spawn.PIDPrivate {
		// With a PID namespace of its own, all died with its first process.
		ctx, cancel := context.WithTimeout(ctx, m.patience)
		if err := m.cgroupOf(c).Kill(ctx); err != nil {
			log.Error(err, "Processes of an exited container do not die, going on", "containerID", c.id)
		}
		cancel()
	}
	reason := reasonError
	if x.Code == 0 {
		reason = reasonCompleted
	} else if kills, err := m.cgroupOf(c).OOMKills(); err == nil && kills > 0 {
		reason = reasonOOMKilled
	}
	lost := m.logLost(ctx, c)
	if err := m.changeContainer(ctx, c, containerExit, should, func(s *containerState) {
		s.ExitCode, s.Reason, s.LogLost = x.Code, reason, lost
		s.FinishedAt = x.At.Round(0)
		if s.FinishedAt.Before(s.StartedAt) { // the clock was set back
			s.FinishedAt = s.StartedAt
		}
	}); err != nil {
		log.Error(err, "Container exited in an impossible state, ignoring", "containerID", c.id)
		return
	}
	m.afterExit(ctx, c)
}

// logLost asks the pod's init how much output of an exited container could not be written. A dead one does not say.
func (m *Manager) logLost(ctx context.Context, c *container) uint64 {
	i, err := c.pod.living()
	if err != nil || c.pod.rec.Config.LogDirectory == "" || c.rec.Config.LogPath == "" {
		return 0
	}
	ctx, cancel := context.WithTimeout(ctx, m.patience)
	defer cancel()
	infos, err := i.List(ctx)
	if err != nil {
		return 0
	}
	n := slices.IndexFunc(infos, func(info spawn.ContainerInfo) bool { return info.ID == c.id })
	if n < 0 {
		return 0
	}
	if lost := infos[n].LogDropped; lost > 0 {
		klog.FromContext(ctx).Info("Container's log lost output", "containerID", c.id, "bytes", lost)
	}
	return infos[n].LogDropped
}

// afterExit gives back the cgroup, whose counters were read, and makes the exit durable. What fails here is done again by
// the pod's stop, or the removal. The caller holds the turn.
func (m *Manager) afterExit(ctx context.Context, c *container) {
	log := klog.FromContext(ctx)
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.patience)
	defer cancel()
	if err := m.removeCgroup(limited, c); err != nil {
		log.Error(err, "Could not remove the cgroup of an exited container, trying again when its pod stops", "containerID", c.id)
	}
	m.store.flush.now(filepath.Join(m.store.containerDir(c.pod.id, c.id), stateFile))
	m.usage.wanted(c.id, filepath.Join(m.store.containerDir(c.pod.id, c.id), upperDir))
	m.poststopSoon(ctx, c)
}

// settle waits until the exit of a container is dealt with, and makes sure that its cgroup is gone.
func (m *Manager) settle(ctx context.Context, c *container) error {
	if err := c.turn.take(ctx); err != nil {
		return err
	}
	defer c.turn.pass()
	return m.removeCgroup(ctx, c)
}

// lose ends a container whose init nobody watches any more: for the reason given, unless its true end is known.
func (m *Manager) lose(ctx context.Context, c *container, reason, message string) error {
	if err := c.turn.take(ctx); err != nil {
		return err
	}
	defer c.turn.pass()
	code := codeUnknown
	switch c.phase() {
	case containerRunning:
		if reason == reasonInitDied {
			code = codeKilled // that is what we do to it
		}
	case containerCreated:
	default:
		return nil
	}
	killCtx, cancel := context.WithTimeout(ctx, killLimit)
	defer cancel()
	if err := m.cgroupOf(c).Kill(killCtx); err != nil {
		return err
	}
	now := time.Now().Round(0)
	if err := m.changeContainer(ctx, c, containerExit, should, func(s *containerState) {
		s.ExitCode, s.Reason, s.Message = code, reason, message
		s.FinishedAt = now
		if s.FinishedAt.Before(s.StartedAt) {
			s.FinishedAt = s.StartedAt
		}
	}); err != nil {
		return err
	}
	m.afterExit(ctx, c)
	return nil
}

// RemoveContainer deletes a container, and kills it before if it runs. It is idempotent; an unknown id is no error.
func (m *Manager) RemoveContainer(ctx context.Context, id string) error {
	c, err := m.findContainer(id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return m.removeAndWait(ctx, c, fromCaller)
}

func (m *Manager) removeAndWait(ctx context.Context, c *container, from origin) error {
	m.mu.Lock()
	call, err := m.joinLocked(ctx, &c.removing, "remove container", c.object(), from, func(ctx context.Context, op *operation) error {
		return m.removeContainer(ctx, op, c)
	})
	m.mu.Unlock()
	if err != nil {
		return err
	}
	_, err = call.wait(ctx)
	return err
}

func (m *Manager) removeContainer(ctx context.Context, op *operation, c *container) error {
	for {
		if c.phase() == containerRunning || m.isStarting(c) {
			if err := op.step(ctx, "kill", func(ctx context.Context) error { return m.stopAndWait(ctx, c, 0, fromOperation) }); err != nil {
				return err
			}
		}
		op.at("wait for its turn")
		if err := c.turn.take(ctx); err != nil {
			return err
		}
		if c.phase() != containerRunning {
			break
		}
		c.turn.pass() // it was started before the turn was ours
	}
	defer c.turn.pass()
	switch c.phase() {
	case containerGone:
		return nil
	case containerMaking, containerUndoing:
		return m.undoContainer(ctx, op, c)
	}
	return m.removeContainerNow(ctx, op, c)
}

// removeContainerNow deletes a container that does not run. The caller holds the turn.
func (m *Manager) removeContainerNow(ctx context.Context, op *operation, c *container) error {
	if c.phase() == containerRunning { // of a pod whose state was lost: its init is being killed
		if err := m.changeContainer(ctx, c, containerExit, forget, nil); err != nil {
			return err
		}
	}
	m.poststop(ctx, c) // still owed after a reboot, or when nobody had time
	if err := m.changeContainer(ctx, c, containerRemove, should, nil); err != nil {
		return err
	}
	if err := op.undo(ctx, m.containerSteps(op, c), all); err != nil {
		return err
	}
	return m.changeContainer(ctx, c, containerIsGone, forget, nil)
}

func (m *Manager) isStarting(c *container) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return c.starting != nil
}

// ReopenLog gives a running container a new log file: when it returns, no byte goes to the old one.
func (m *Manager) ReopenLog(ctx context.Context, id string) error {
	c, err := m.findContainer(id)
	if err != nil {
		return err
	}
	op, err := m.begin("reopen log of", c.object())
	if err != nil {
		return err
	}
	defer m.end(op)
	return op.fail(m.reopenLog(ctx, op, c))
}

func (m *Manager) reopenLog(ctx context.Context, op *operation, c *container) error {
	if phase := c.phase(); phase != containerRunning {
		return fmt.Errorf("%w: the container is %s", ErrState, phase)
	}
	i, err := c.pod.living()
	if err != nil {
		return err
	}
	dir, name := c.pod.rec.Config.LogDirectory, c.rec.Config.LogPath
	if dir == "" || name == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, m.patience)
	defer cancel()
	return op.step(ctx, "reopen", func(ctx context.Context) error {
		f, err := openLog(dir, name)
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }() // the init has its own
		return i.ReopenLog(ctx, c.id, f)
	})
}

package podsandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/runtime/cgroup"
	"github.com/crisp-cri/crisp/runtime/spawn"
)

// Reasons why a pod is not ready.
const (
	reasonStopped     = "Stopped"
	reasonReboot      = "Reboot"       // the node was rebooted
	reasonInitDied    = "InitDied"     // its init is dead, and so are its containers
	reasonUnreachable = "Unreachable"  // its init does not answer
	reasonDamaged     = "StateDamaged" // its state file cannot be read
	reasonSuperseded  = "Superseded"   // a newer pod has the same identity
)

// pod is one pod in memory. It is in the Manager's index from its intent until nothing is left of it.
type pod struct {
	id     string
	rec    *podRecord // immutable once written to disk
	made   *call[string]
	handed atomic.Bool // the id was given to a caller who still listened

	// turn is held by who changes the pod: makes, stops, removes it, or deals with its death.
	turn turn
	// draft is what the making has found out so far; it becomes the first line of the state. Owned by the making, and by its undoing.
	draft podState
	// Of the making: what the init will be cloned into.
	namespaces *spawn.Namespaces
	now        atomic.Pointer[podNow]
	init       atomic.Pointer[PodInit] // nil when there is none that answers
	gate       gate                    // of what makes or starts containers
	// adopted ends when systemd knows the pod's cgroup, or does not; nil of pods that are not of this daemon's making. Owned as draft is.
	adopted *call[struct{}]

	// guarded by Manager.mu
	containers map[string]*container
	stopping   *call[struct{}]
	removing   *call[struct{}]
}

// podNow is a pod at one moment.
type podNow struct {
	state podState
	view  *Pod // nil when not to be shown
}

func (p *pod) phase() podPhase { return p.now.Load().state.Phase }
func (p *pod) view() *Pod      { return p.now.Load().view }
func (p *pod) object() string  { return p.rec.Config.Namespace + "/" + p.rec.Config.Name }

// entry is how the pod's containers, and what is exec'd in them, get into their cgroups.
func (p *pod) entry() cgroup.Entry {
	if p.rec.Config.Userns != nil {
		return cgroup.ByWriting // the init, which clones them, is nobody on the host
	}
	return cgroup.ByBirth
}

// facts is what is known of it: of one that is being made, the draft.
func (p *pod) facts() *podState {
	s := &p.now.Load().state
	if s.Phase == podMaking || s.Phase == podUndoing {
		return &p.draft
	}
	return s
}

// networkResult is what the pod has of the network, or was promised; nil when nothing (any more).
func (p *pod) networkResult() *network.Result {
	f := p.facts()
	if f.NetworkDown {
		return nil
	}
	if f.Network != nil {
		return f.Network
	}
	return p.rec.Network
}

// living is the pod's init, or ErrState.
func (p *pod) living() (PodInit, error) {
	if i := p.init.Load(); i != nil {
		return *i, nil
	}
	return nil, fmt.Errorf("%w: pod %q has no init", ErrState, p.id)
}

func newPod(r *podRecord) *pod {
	p := &pod{id: r.ID, rec: r, turn: newTurn(), containers: map[string]*container{}}
	p.now.Store(&podNow{state: podState{Phase: podMaking}})
	return p
}

// RunPod makes a pod and returns its id. A call with the identity of one that is being made waits for
// that one; with the identity of one that is ready it returns that one's id, if it asks for the
// same: else ErrExists.
func (m *Manager) RunPod(ctx context.Context, c *PodConfig) (id string, err error) {
	if err := m.validPod(c); err != nil {
		return "", fmt.Errorf("cannot run pod %q: %w", c.Namespace+"/"+c.Name, err)
	}
	p, err := m.claimPod(ctx, c)
	if err != nil {
		return "", err
	}
	if id, err = p.made.wait(ctx); err != nil {
		return "", err
	}
	p.handed.Store(true)
	return id, nil
}

func (m *Manager) validPod(c *PodConfig) error {
	if c.Name == "" || c.Namespace == "" {
		return fmt.Errorf("%w: a pod needs a name and a namespace", ErrInvalid)
	}
	if c.LogDirectory != "" && !filepath.IsAbs(c.LogDirectory) {
		return fmt.Errorf("%w: log directory %q is not absolute", ErrInvalid, c.LogDirectory)
	}
	if err := m.cfg.Cgroups.ValidateParent(c.CgroupParent); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return validDNS(c.DNS)
}

// claimPod finds the pod of that identity, or begins to make it.
func (m *Manager) claimPod(ctx context.Context, c *PodConfig) (*pod, error) {
	op := &operation{what: "run pod", object: c.Namespace + "/" + c.Name, began: time.Now()}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.refuses(); err != nil {
		return nil, op.fail(err)
	}
	var displaced *pod
	if h := m.identities[c.Identity]; h != nil {
		phase := h.phase()
		if samePod(h.rec.Config, c) {
			return h, nil
		}
		if phase != podReady || h.handed.Load() {
			return nil, op.fail(fmt.Errorf("%w: pod %s (%s, for %v) has that identity and another configuration",
				ErrExists, h.id, phase, time.Since(h.rec.CreatedAt).Round(time.Millisecond)))
		}
		displaced = h // nobody was ever told its id (C-72)
	}
	p := newPod(&podRecord{ID: newID(), Config: c, CreatedAt: m.newTimeLocked(), BootID: m.cfg.BootID})
	p.rec.CgroupPath = m.cfg.Cgroups.PodPath(c.CgroupParent, p.id)
	if c.Network != NamespaceNode {
		p.rec.NetNSName = m.cfg.NetNSPrefix + p.id
	}
	p.made = newCall[string](op)
	m.pods[p.id] = p
	m.identities[c.Identity] = p
	m.registerLocked(op)
	m.owned.Go(func() {
		defer m.end(op)
		ctx, cancel := m.detach(ctx)
		defer cancel()
		err := m.makePod(ctx, op, p, displaced)
		p.made.finish(p.id, op.fail(err))
	})
	return p, nil
}

// makePod runs the steps, and unmakes what was made if one fails.
func (m *Manager) makePod(ctx context.Context, op *operation, p *pod, displaced *pod) error {
	if err := p.turn.take(ctx); err != nil {
		return err
	}
	defer p.turn.pass()
	var err error
	if displaced != nil {
		err = op.step(ctx, "remove abandoned pod", func(ctx context.Context) error { return m.removePodAndWait(ctx, displaced, fromOperation) })
	}
	if err == nil {
		err = op.run(ctx, m.podSteps(op, p))
	}
	if err == nil {
		return nil
	}
	return errors.Join(err, m.undoPod(ctx, op, p))
}

// undoPod unmakes a pod that nobody was told of. What cannot be undone now is tried again by the janitor. The
// caller holds the turn.
func (m *Manager) undoPod(ctx context.Context, op *operation, p *pod) error {
	if err := m.changePod(ctx, p, podFail, forget, nil); err != nil {
		return err
	}
	if err := m.undoPodContainers(ctx, p); err != nil {
		return err
	}
	if err := op.undo(ctx, m.podSteps(op, p), all); err != nil {
		return err
	}
	return m.changePod(ctx, p, podIsGone, forget, nil)
}

func (m *Manager) unmakePod(ctx context.Context, op *operation, p *pod) error {
	ctx, cancel := context.WithTimeout(ctx, operationLimit)
	defer cancel()
	if err := p.turn.take(ctx); err != nil {
		return err
	}
	defer p.turn.pass()
	if p.phase() != podUndoing && p.phase() != podMaking {
		return nil
	}
	return m.undoPod(ctx, op, p)
}

// undoPodContainers: a pod that was never committed has containers only if its state was lost.
func (m *Manager) undoPodContainers(ctx context.Context, p *pod) error {
	var errs []error
	for _, c := range m.containersOf(p) {
		errs = append(errs, m.unmakeContainer(ctx, &operation{what: "undo container", object: c.id}, c))
	}
	return errors.Join(errs...)
}

// podSteps is what a pod is made of.
func (m *Manager) podSteps(op *operation, p *pod) []step {
	c := p.rec.Config
	var steps []step
	add := func(s step) { steps = append(steps, s) }

	// No record goes before this one: it ends with the daemon. The kernel makes them during the next steps.
	add(step{name: "namespaces", stays: true,
		do: func(context.Context) error {
			p.namespaces = m.cfg.Spawner.Prepare(m.podArgs(p))
			return nil
		},
		undo: func(context.Context) error {
			p.namespaces.Close()
			return nil
		},
	})
	if c.Network != NamespaceNode {
		add(step{name: "plan network", do: func(ctx context.Context) error {
			r, err := m.cfg.Network.Plan(ctx, m.networkPod(p))
			if err == nil {
				r.Provider = cmp.Or(r.Provider, m.cfg.Network.Name())
				p.rec.Network = &r
			}
			return err
		}}) // the reservation is given back by "network"
	}
	add(step{name: "record", stays: true, base: true,
		do:   func(context.Context) error { return m.store.createPod(p.rec) },
		undo: func(context.Context) error { return m.store.removePod(p.id) },
	})
	add(step{name: "files", stays: true, beside: true, do: func(context.Context) error {
		if err := m.store.may("store.writeFiles"); err != nil {
			return err
		}
		return writeFiles(m.store.podDir(p.id), m.cfg.HostFiles, c, addresses(p.rec.Network))
	}})
	add(step{name: "cgroup",
		do:   func(ctx context.Context) error { return m.makePodCgroups(ctx, p) },
		undo: func(ctx context.Context) error { return m.removePodCgroups(ctx, p) },
	})
	add(step{name: "init",
		do:   func(ctx context.Context) error { return m.startInit(ctx, p) },
		undo: func(ctx context.Context) error { return m.endInit(ctx, p) },
	})
	if c.Network != NamespaceNode {
		add(step{name: "pin network namespace",
			do:   func(context.Context) error { return m.pin(p) },
			undo: func(context.Context) error { return m.cfg.NetNS.Unpin(p.rec.NetNSName) },
		})
		add(step{name: "network", after: "files", // where it may change the addresses
			do:   func(ctx context.Context) error { return m.setupNetwork(ctx, p) },
			undo: func(ctx context.Context) error { return m.teardownNetwork(ctx, p) },
		})
	}
	// Both went on while the network was made: systemd's work on the pod's scope, and the init's on its namespaces.
	add(step{name: "adopt cgroup", stays: true, do: func(ctx context.Context) error {
		if p.adopted == nil {
			return nil
		}
		_, err := p.adopted.wait(ctx)
		return err
	}})
	add(step{name: "init ready", stays: true, do: func(ctx context.Context) error {
		i, err := p.living()
		if err != nil {
			return err
		}
		return i.Ready(ctx)
	}})
	// The commit point: nothing below is ever undone because of this operation.
	add(step{name: "commit", stays: true, after: "files", do: func(ctx context.Context) error { return m.commitPod(ctx, op, p) }})
	return steps
}

func (m *Manager) makePodCgroups(ctx context.Context, p *pod) error {
	ours, err := m.cfg.Cgroups.CreatePod(ctx, p.rec.CgroupPath)
	if err != nil {
		return err
	}
	p.draft.CgroupOurs = ours
	return m.initCgroup(p).Create(ctx, nil)
}

func (m *Manager) initCgroup(p *pod) Cgroup {
	return m.cfg.Cgroups.Open(m.cfg.Cgroups.InitPath(p.rec.CgroupPath, p.id))
}

// removePodCgroups kills a pod init that is not ours to shut down (of a daemon that crashed before the commit, or
// one that does not answer), too: it is in its leaf.
func (m *Manager) removePodCgroups(ctx context.Context, p *pod) error {
	leaf := m.initCgroup(p)
	if err := leaf.Kill(ctx); err != nil {
		return err
	}
	if err := leaf.Remove(ctx); err != nil {
		return err
	}
	owned := m.cfg.Cgroups.Owned(p.rec.CgroupPath)
	if !owned && !p.facts().CgroupOurs {
		return nil
	}
	err := m.cfg.Cgroups.RemovePod(ctx, p.rec.CgroupPath)
	if !owned && errors.Is(err, cgroup.ErrBusy) {
		// All that was ours is gone from it: others were given the same cgroup_parent. To them it was there, and it stays.
		klog.FromContext(ctx).V(2).Info("Kept a pod-level cgroup that others use", "sandboxID", p.id, "path", p.rec.CgroupPath, "err", err)
		return nil
	}
	return err
}

// podArgs is what a pod's init is started with, but for what is made for it.
func (m *Manager) podArgs(p *pod) spawn.PodArgs {
	c := p.rec.Config
	return spawn.PodArgs{
		ID: p.id, Title: p.object(), RunDir: m.store.runDir(p.id),
		HostNetwork: c.Network == NamespaceNode, HostIPC: c.IPC == NamespaceNode, SharedPID: c.PID == NamespacePod,
		Hostname: c.Hostname, Sysctls: c.Sysctls, Userns: c.Userns, Label: c.Label,
	}
}

func (m *Manager) startInit(ctx context.Context, p *pod) error {
	join, err := m.initCgroup(p).Join(cgroup.ByBirth) // the one who clones it is us
	if err != nil {
		return err
	}
	defer func() { _ = join.Close() }() // nothing was written
	a := m.podArgs(p)
	a.Namespaces, a.CgroupDir, a.CgroupTasks = p.namespaces, join.DirFD, join.Tasks
	i, err := m.cfg.Spawner.StartPod(ctx, a, m.onExit(p, nil))
	if err != nil {
		return err
	}
	h := i.Handle()
	p.draft.Handle = &h
	p.init.Store(&i)
	p.adopted = newCall[struct{}](&operation{what: "adopt cgroup", object: p.object(), began: time.Now()})
	m.owned.Go(func() { // endInit and the step of that name wait
		p.adopted.finish(struct{}{}, m.cfg.Cgroups.Adopt(ctx, cgroup.PodInit{PodPath: p.rec.CgroupPath, PodID: p.id, PID: h.PID, Title: p.object()}))
	})
	return nil
}

func (m *Manager) endInit(ctx context.Context, p *pod) error {
	if p.adopted != nil { // nobody makes anything in a cgroup that is being removed
		select {
		case <-p.adopted.done:
		case <-ctx.Done():
			return fmt.Errorf("its cgroup is still being adopted: %w", context.Cause(ctx))
		}
	}
	i := p.init.Load()
	if i == nil {
		return nil // what there may be is killed with its cgroup
	}
	if err := (*i).Shutdown(ctx); err != nil {
		return err
	}
	p.init.CompareAndSwap(i, nil)
	return (*i).Close()
}

func (m *Manager) pin(p *pod) error {
	i, err := p.living()
	if err != nil {
		return err
	}
	ns, err := i.NetNS()
	if err != nil {
		return err
	}
	defer func() { _ = ns.Close() }() // only a reference
	_, err = m.cfg.NetNS.Pin(p.rec.NetNSName, ns)
	return err
}

func (m *Manager) setupNetwork(ctx context.Context, p *pod) error {
	i, err := p.living()
	if err != nil {
		return err
	}
	ns, err := i.NetNS()
	if err != nil {
		return err
	}
	defer func() { _ = ns.Close() }() // only a reference
	np := m.networkPod(p)
	np.NetNS = ns
	r, err := m.cfg.Network.Setup(ctx, np, *p.rec.Network)
	if err != nil {
		return err
	}
	r.Provider = p.rec.Network.Provider
	p.draft.Network = &r
	if slices.Equal(r.IPs, p.rec.Network.IPs) {
		return nil
	}
	// The addresses were not known before (CNI); no container has the file mounted yet.
	return replaceHosts(m.store.podDir(p.id), p.rec.Config, r.IPs)
}

// teardownNetwork is idempotent also where a network is not: once it is done it is never done again, since
// the addresses may be another pod's.
func (m *Manager) teardownNetwork(ctx context.Context, p *pod) error {
	r := p.networkResult()
	if r == nil {
		return nil
	}
	n, err := m.networkOf(r)
	if err != nil {
		return err
	}
	np := m.networkPod(p)
	if np.NetNS, err = m.cfg.NetNS.Open(p.rec.NetNSName); err == nil {
		defer func() { _ = np.NetNS.Close() }() // only a reference
	} else {
		np.NetNS = nil // gone, with all that was in it
	}
	if err := n.Teardown(ctx, np, *r); err != nil {
		return err
	}
	switch p.phase() {
	case podMaking, podUndoing:
		p.draft.NetworkDown = true
	default:
		m.notePod(ctx, p, func(s *podState) { s.NetworkDown = true })
	}
	return nil
}

func (m *Manager) networkPod(p *pod) network.Pod {
	c := p.rec.Config
	return network.Pod{
		ID: p.id, Namespace: c.Namespace, Name: c.Name, UID: c.UID,
		Ports: c.Ports, Annotations: c.Annotations, Labels: c.Labels,
		DNS: network.DNS(c.DNS), CgroupPath: p.rec.CgroupPath,
		NetNSPath: m.cfg.NetNS.Path(p.rec.NetNSName),
	}
}

func (m *Manager) commitPod(ctx context.Context, op *operation, p *pod) error {
	i, err := p.living()
	if err != nil {
		return err
	}
	select {
	case <-i.Done():
		return spawn.ErrGone
	default:
	}
	p.draft.Timings = append([]Timing(nil), op.timings...)
	if err := m.changePod(ctx, p, podCommit, must, func(s *podState) {
		s.Handle, s.Network, s.CgroupOurs, s.Timings = p.draft.Handle, p.draft.Network, p.draft.CgroupOurs, p.draft.Timings
	}); err != nil {
		return err
	}
	dir := m.store.podDir(p.id)
	m.store.flush.later(filepath.Join(dir, podFile), filepath.Join(dir, stateFile), dir, filepath.Dir(dir))
	m.watch(p, i)
	return nil
}

// durability says what a change of state needs of the disk.
type durability int

const (
	must   durability = iota // the change happens only if it can be recorded
	should                   // it is a fact; that it could not be recorded is logged
	forget                   // recovery finds it out without
)

// changePod moves a pod to its next phase. The caller holds the turn.
func (m *Manager) changePod(ctx context.Context, p *pod, e podEvent, d durability, update func(*podState)) error {
	s := p.now.Load().state
	was := s.Phase
	next, err := s.Phase.next(e)
	if err != nil {
		return err
	}
	s.Phase, s.At = next, time.Now().Round(0)
	if update != nil {
		update(&s)
	}
	if d != forget {
		if err := m.store.appendState(m.store.podDir(p.id), &s); err != nil {
			if d == must {
				return err
			}
			klog.FromContext(ctx).Error(err, "Could not record the state of a pod, going on", "sandboxID", p.id, "was", was, "now", next)
		}
	}
	m.publishPod(p, s)
	if was != next {
		klog.FromContext(ctx).V(2).Info("Changed state of pod", "sandboxID", p.id, "event", e, "was", was, "now", next, "reason", s.Reason)
	}
	return nil
}

// notePod records a fact that does not change the phase. The caller holds the turn.
func (m *Manager) notePod(ctx context.Context, p *pod, update func(*podState)) {
	s := p.now.Load().state
	update(&s)
	if err := m.store.appendState(m.store.podDir(p.id), &s); err != nil {
		klog.FromContext(ctx).Error(err, "Could not record a fact about a pod, going on", "sandboxID", p.id)
	}
	m.publishPod(p, s)
}

// publishPod makes s what everybody sees, and keeps the indexes in step.
func (m *Manager) publishPod(p *pod, s podState) {
	now := &podNow{state: s}
	if s.Phase.shown() {
		now.view = m.podView(p, &s)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	defer m.announcePodLocked(p, p.view(), now.view)
	p.now.Store(now)
	if s.Phase != podMaking && s.Phase != podReady && m.identities[p.rec.Config.Identity] == p {
		delete(m.identities, p.rec.Config.Identity)
	}
	if s.Phase == podGone && m.pods[p.id] == p {
		delete(m.pods, p.id)
	}
}

func (m *Manager) podView(p *pod, s *podState) *Pod {
	dir := m.store.podDir(p.id)
	v := &Pod{
		ID: p.id, Config: p.rec.Config, State: PodNotReady, Reason: s.Reason, CreatedAt: p.rec.CreatedAt,
		CgroupPath: p.rec.CgroupPath, Timings: s.Timings, Resources: s.Resources,
		ResolvConf: filepath.Join(dir, resolvConfName), Hosts: filepath.Join(dir, hostsName), HostnameFile: filepath.Join(dir, hostnameName),
	}
	if s.Phase == podReady {
		v.State, v.Reason = PodReady, ""
		if s.Handle != nil {
			v.InitPID = s.Handle.PID
		}
	}
	if p.rec.NetNSName != "" && !s.NetworkDown {
		v.NetNSPath = m.cfg.NetNS.Path(p.rec.NetNSName)
		v.IPs = addresses(s.Network)
	}
	return v
}

// watch waits for the death of a pod's init.
func (m *Manager) watch(p *pod, i PodInit) {
	m.owned.Go(func() {
		select {
		case <-m.closing:
		case <-i.Done():
			ctx, cancel := context.WithTimeout(lifetime(m.closing), operationLimit)
			defer cancel()
			m.podDied(ctx, p)
		}
	})
}

// podDied deals with the death of a pod's init: nobody supervises the containers any more, so they are killed.
func (m *Manager) podDied(ctx context.Context, p *pod) {
	log := klog.FromContext(ctx)
	why := fmt.Errorf("%w: the pod's init is dead", ErrState)
	if err := p.gate.close(ctx, why); err != nil {
		log.Error(err, "Could not end what ran in a pod whose init died, going on", "sandboxID", p.id)
	}
	if err := p.turn.take(ctx); err != nil {
		log.Error(err, "Could not deal with the death of a pod's init", "sandboxID", p.id)
		return
	}
	defer p.turn.pass()
	switch p.phase() {
	case podReady, podDead:
		log.Info("Pod init died, killing its containers", "sandboxID", p.id, "pod", klog.KRef(p.rec.Config.Namespace, p.rec.Config.Name))
	case podStopping: // a stop failed half-way
	default:
		return // we ended it
	}
	m.buryPod(ctx, p, reasonInitDied, "the pod's init died, and the container was killed")
}

// buryPod marks a pod as dead and ends its containers: with what the journal says of them, else with reason. The caller
// holds the turn.
func (m *Manager) buryPod(ctx context.Context, p *pod, reason, message string) {
	log := klog.FromContext(ctx)
	if err := m.changePod(ctx, p, podDie, should, func(s *podState) {
		if s.Phase == podDead {
			s.Reason = reason
		}
	}); err != nil {
		log.Error(err, "Pod died in an impossible state, ignoring", "sandboxID", p.id)
	}
	exits, err := m.cfg.Spawner.ReadJournal(m.store.runDir(p.id))
	if err != nil {
		log.Error(err, "Could not read a pod's journal of exits, going on without", "sandboxID", p.id)
	}
	for _, x := range exits {
		m.exited(ctx, p, x)
	}
	var wg sync.WaitGroup
	for _, c := range m.containersOf(p) {
		wg.Go(func() {
			if err := m.lose(ctx, c, reason, message); err != nil {
				log.Error(err, "Could not end a container of a dead pod; StopPodSandbox will try again", "containerID", c.id)
			}
		})
	}
	wg.Wait()
}

// StopPod ends all containers of a pod at once and takes everything of it out of the kernel. It is idempotent; an unknown id is no error.
func (m *Manager) StopPod(ctx context.Context, id string) error {
	p, err := m.findPod(id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	m.mu.Lock()
	call, err := m.joinLocked(ctx, &p.stopping, "stop pod", p.object(), fromCaller, func(ctx context.Context, op *operation) error {
		return m.stopPod(ctx, op, p)
	})
	m.mu.Unlock()
	if err != nil {
		return err
	}
	_, err = call.wait(ctx)
	return err
}

// origin is who asks for an operation.
type origin int

const (
	fromCaller    origin = iota // refused while the daemon drains
	fromOperation               // part of one that runs, which may finish
)

// joinLocked returns the call in slot, or begins it: do runs on a context of its own.
func (m *Manager) joinLocked(ctx context.Context, slot **call[struct{}], what, object string, from origin, do func(context.Context, *operation) error) (*call[struct{}], error) {
	if *slot != nil {
		return *slot, nil
	}
	op := &operation{what: what, object: object, began: time.Now()}
	if err := m.refuses(); err != nil && from == fromCaller {
		return nil, op.fail(err)
	}
	c := newCall[struct{}](op)
	*slot = c
	m.registerLocked(op)
	m.owned.Go(func() {
		defer m.end(op)
		ctx, cancel := m.detach(ctx)
		defer cancel()
		err := do(ctx, op)
		m.mu.Lock()
		*slot = nil
		m.mu.Unlock()
		c.finish(struct{}{}, op.fail(err))
	})
	return c, nil
}

func (m *Manager) stopPod(ctx context.Context, op *operation, p *pod) error {
	op.at("wait for its turn")
	if err := p.turn.take(ctx); err != nil {
		return err
	}
	defer p.turn.pass()
	return m.stopPodNow(ctx, op, p)
}

// stopPodNow is stopPod for the holder of the turn.
func (m *Manager) stopPodNow(ctx context.Context, op *operation, p *pod) error {
	switch p.phase() {
	case podStopped, podRemoving, podGone:
		return nil
	}
	if err := m.changePod(ctx, p, podStop, should, func(s *podState) {
		if s.Reason == "" {
			s.Reason = reasonStopped
		}
	}); err != nil {
		return err
	}
	if err := op.step(ctx, "end what runs in it", func(ctx context.Context) error {
		return p.gate.close(ctx, fmt.Errorf("%w: the pod is being stopped", ErrState))
	}); err != nil {
		return err
	}
	if err := op.step(ctx, "stop containers", func(ctx context.Context) error { return m.stopContainersOf(ctx, p) }); err != nil {
		return err // the init must not go before them: in PID namespaces of their own they would live on
	}
	if err := op.undo(ctx, m.podSteps(op, p), whatStops); err != nil {
		return err
	}
	return m.changePod(ctx, p, podIsDown, should, nil)
}

func (m *Manager) stopContainersOf(ctx context.Context, p *pod) error {
	var wg sync.WaitGroup
	l := m.containersOf(p)
	errs := make([]error, len(l))
	for i, c := range l {
		wg.Go(func() {
			if p := c.phase(); p == containerMaking || p == containerUndoing {
				errs[i] = m.unmakeContainer(ctx, &operation{what: "undo container", object: c.id}, c)
				return
			}
			if errs[i] = m.stopAndWait(ctx, c, 0, fromOperation); errs[i] == nil {
				errs[i] = m.settle(ctx, c)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (m *Manager) containersOf(p *pod) []*container {
	m.mu.RLock()
	defer m.mu.RUnlock()
	l := make([]*container, 0, len(p.containers))
	for _, c := range p.containers {
		l = append(l, c)
	}
	return l
}

// RemovePod stops a pod and deletes everything of it. It is idempotent; an unknown id is no error.
func (m *Manager) RemovePod(ctx context.Context, id string) error {
	p, err := m.findPod(id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return m.removePodAndWait(ctx, p, fromCaller)
}

func (m *Manager) removePodAndWait(ctx context.Context, p *pod, from origin) error {
	m.mu.Lock()
	call, err := m.joinLocked(ctx, &p.removing, "remove pod", p.object(), from, func(ctx context.Context, op *operation) error {
		return m.removePod(ctx, op, p)
	})
	m.mu.Unlock()
	if err != nil {
		return err
	}
	_, err = call.wait(ctx)
	return err
}

func (m *Manager) removePod(ctx context.Context, op *operation, p *pod) error {
	op.at("wait for its turn")
	if err := p.turn.take(ctx); err != nil {
		return err
	}
	defer p.turn.pass()
	if p.phase() == podGone {
		return nil
	}
	if err := m.stopPodNow(ctx, op, p); err != nil {
		return err
	}
	if err := m.changePod(ctx, p, podRemove, should, nil); err != nil {
		return err
	}
	if err := op.step(ctx, "remove containers", func(ctx context.Context) error {
		var errs []error
		for _, c := range m.containersOf(p) {
			errs = append(errs, m.removeAndWait(ctx, c, fromOperation))
		}
		return errors.Join(errs...)
	}); err != nil {
		return err
	}
	if err := op.undo(ctx, m.podSteps(op, p), whatStays); err != nil {
		return err
	}
	return m.changePod(ctx, p, podIsGone, forget, nil)
}

// detach is the context of an operation of its own: it has the caller's values, but ends by a limit, or with the daemon.
func (m *Manager) detach(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), operationLimit)
	stop := context.AfterFunc(lifetime(m.closing), cancel)
	return ctx, func() { stop(); cancel() }
}

// lifetime is a context that ends when the channel is closed: for background work that no caller waits for.
type lifetime chan struct{}

func (lifetime) Deadline() (time.Time, bool) { return time.Time{}, false }
func (l lifetime) Done() <-chan struct{}     { return l }
func (lifetime) Value(any) any               { return nil }
func (l lifetime) Err() error {
	select {
	case <-l:
		return context.Canceled
	default:
		return nil
	}
}

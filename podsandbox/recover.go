package podsandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/runtime/cgroup"
	"github.com/crisp-cri/crisp/runtime/spawn"
	"github.com/crisp-cri/crisp/runtime/user"
)

// recoverLimit bounds the recovery of one pod: one that is sick must not hold up the others (C-14).
const recoverLimit = 10 * time.Second

// Recover finds again what a former daemon left: it reads the records, looks at the kernel, and finishes or undoes
// each pod alone, in parallel. One bad pod never stops it, nor does a broken network, which says so in its Status: an error is that of the
// state root itself. Until it is done everything else is ErrUnavailable.
func (m *Manager) Recover(ctx context.Context) error {
	began := time.Now()
	ids, err := m.recordedIDs()
	if err != nil {
		return fmt.Errorf("cannot recover pods: %w", err)
	}
	// 1. What the records say.
	var f found
	each(ids, func(id string) { m.loadPod(ctx, &f, id) })
	m.indexRecovered(ctx)
	pods := m.allPods()
	// 2. Layers that are in use, before anybody collects them.
	m.acquireImages(ctx, &f)
	// 3. The network, before any address is given out or given back.
	m.restoreNetworks(ctx, append(slices.Clone(pods), f.foreign...))
	// 4. Each pod.
	each(pods, func(p *pod) {
		ctx, cancel := context.WithTimeout(ctx, recoverLimit)
		defer cancel()
		m.recoverPod(ctx, p)
		for _, c := range m.containersOf(p) {
			m.poststopSoon(ctx, c)
		}
	})
	// 5. What has our name and no record.
	known := func(id string) bool {
		m.mu.RLock()
		defer m.mu.RUnlock()
		return m.pods[id] != nil || m.containers[id] != nil ||
			slices.ContainsFunc(f.foreign, func(p *pod) bool { return p.id == id || p.containers[id] != nil })
	}
	for _, p := range pods {
		f.parents = append(f.parents, p.rec.CgroupPath)
	}
	m.collectOrphans(ctx, f.parents, known)
	m.open.Store(true)
	klog.FromContext(ctx).Info("Recovered pods", "pods", len(m.Pods()), "containers", len(m.Containers()), "duration", time.Since(began))
	m.wantCollection()
	return nil
}

// found is what the records said besides the pods we know how to handle.
type found struct {
	mu sync.Mutex
	// foreign pods have records of another version. They are left alone, and what they use is not given to others.
	foreign []*pod
	// parents are pod-level cgroups that may have something of ours below them.
	parents []string
}

func (f *found) addForeign(p *pod) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.foreign = append(f.foreign, p)
}

func (f *found) addParent(path string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.parents = append(f.parents, path)
}

// each calls f for all of list, as many at a time as is good for a disk and a few processors, and waits.
func each[T any](list []T, f func(T)) {
	var wg sync.WaitGroup
	slots := make(chan struct{}, max(16, 4*runtime.GOMAXPROCS(0))) // how many run at once
	for _, x := range list {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			f(x)
		})
	}
	wg.Wait()
}

// recordedIDs are the pods that have a directory under either root.
func (m *Manager) recordedIDs() ([]string, error) {
	a, err := ids(filepath.Join(m.store.state, podsDir))
	if err != nil {
		return nil, err
	}
	b, err := ids(filepath.Join(m.store.run, podsDir))
	if err != nil {
		return nil, err
	}
	a = append(a, b...)
	slices.Sort(a)
	return slices.Compact(a), nil
}

// loadPod reads a pod's records into the index.
func (m *Manager) loadPod(ctx context.Context, f *found, id string) {
	log := klog.FromContext(ctx)
	dir := m.store.podDir(id)
	var rec podRecord
	err := readRecord(filepath.Join(dir, podFile), &rec)
	if err != nil && !errors.Is(err, errVersion) {
		if copyErr := m.readCopy(id, &rec); copyErr == nil {
			if !errors.Is(err, fs.ErrNotExist) {
				log.Error(err, "Record of pod is damaged, using the copy in the run root", "sandboxID", id)
			}
			err = nil
		}
	}
	if err == nil && (rec.ID != id || rec.Config == nil) {
		err = fmt.Errorf("%w: it is of pod %q", errDamaged, rec.ID)
	}
	switch {
	case errors.Is(err, errVersion):
		log.Error(err, "Record of pod cannot be used, leaving the pod alone", "sandboxID", id, "path", dir)
		m.leaveAlone(f, id, &rec)
		return
	case errors.Is(err, fs.ErrNotExist):
		// Made before, or removed after, everything else: there is nothing behind it.
		m.deleteLeftover(ctx, id)
		return
	case err != nil && uncommitted(dir):
		// Ended in the middle of writing it: as above.
		m.deleteLeftover(ctx, id)
		return
	case err != nil:
		// A guess at where its processes are; only cgroups with our names are ever looked at there.
		if rec.CgroupPath != "" && m.cfg.Cgroups.ValidPodPath(rec.CgroupPath) {
			f.addParent(rec.CgroupPath)
		}
		m.setPodAside(ctx, id, err)
		return
	}
	p := newPod(&rec)
	p.handed.Store(true)
	p.made = newCall[string](&operation{what: "run pod", object: p.object()})
	p.made.finish(p.id, nil)
	var s podState
	found, err := readState(dir, &s)
	switch {
	case errors.Is(err, errVersion):
		log.Error(err, "State of pod cannot be used, leaving the pod alone", "sandboxID", id, "path", dir)
		m.leaveAlone(f, id, &rec)
		return
	case err != nil:
		// It was committed: somebody knows it. It can be stopped and removed like any other.
		log.Error(err, "State of pod is damaged, showing it as not ready", "sandboxID", id, "path", dir)
		s = podState{Phase: podDead, Reason: reasonDamaged, At: time.Now()}
	case !found:
		s = podState{Phase: podMaking}
	case s.Phase == podReady:
		s.Phase = podDead // until its init is found
	}
	// For recovery the phases between are: dead with reason "" is "was ready".
	p.now.Store(&podNow{state: s})
	containers, _ := ids(filepath.Join(dir, containersDir)) // none there: no containers
	for _, cid := range containers {
		m.loadContainer(ctx, p, cid)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pods[p.id] = p
	for _, c := range p.containers {
		m.containers[c.id] = c
	}
}

// uncommitted says whether the state file in dir, whose first line is the commit of a run or
// a create, has no line yet: nobody has been told the object's id.
func uncommitted(dir string) bool {
	found, err := readState(dir, new(json.RawMessage))
	return !found && err == nil
}

// leaveAlone remembers as much of a pod of another version as is needed to take nothing away from it.
func (m *Manager) leaveAlone(f *found, id string, rec *podRecord) {
	rec.ID = id
	if rec.Config == nil {
		rec.Config = &PodConfig{}
	}
	p := newPod(rec)
	p.now.Store(&podNow{state: podState{Phase: podDead}})
	containers, _ := ids(filepath.Join(m.store.podDir(id), containersDir)) // none there: none to know
	for _, cid := range containers {
		var c containerRecord
		if err := readRecord(filepath.Join(m.store.containerDir(id, cid), containerFile), &c); (err == nil || errors.Is(err, errVersion)) && c.Config != nil {
			c.ID = cid
			p.containers[cid] = newContainer(p, &c)
		}
	}
	f.addForeign(p)
}

// readCopy reads the copy of a pod's record in the run root, and puts it back.
func (m *Manager) readCopy(id string, rec *podRecord) error {
	b, err := readFile(filepath.Join(m.store.runDir(id), podFile))
	if err != nil {
		return err
	}
	if err := decodeRecord(b, rec); err != nil {
		return err
	}
	dir := m.store.podDir(id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return replaceFile(filepath.Join(dir, podFile), b)
}

// deleteLeftover deletes a pod's directories without a record.
func (m *Manager) deleteLeftover(ctx context.Context, id string) {
	containers, _ := ids(filepath.Join(m.store.podDir(id), containersDir)) // none there: none to delete
	var errs []error
	for _, cid := range containers {
		errs = append(errs, m.store.removeContainer(id, cid))
	}
	if err := errors.Join(append(errs, m.store.removePod(id))...); err != nil {
		klog.FromContext(ctx).Error(err, "Could not delete what is left of a pod without a record, ignoring", "sandboxID", id)
	}
}

func (m *Manager) setPodAside(ctx context.Context, id string, why error) {
	to, err := m.store.setAside(m.store.podDir(id), "pod-"+id, time.Now())
	klog.FromContext(ctx).Error(errors.Join(why, err), "Record of pod cannot be read, set it aside", "sandboxID", id, "path", to)
	if err := os.RemoveAll(m.store.runDir(id)); err != nil {
		klog.FromContext(ctx).Error(err, "Could not delete a pod's run directory, ignoring", "sandboxID", id)
	}
}

// loadContainer reads a container's records.
func (m *Manager) loadContainer(ctx context.Context, p *pod, id string) {
	log := klog.FromContext(ctx)
	dir := m.store.containerDir(p.id, id)
	var rec containerRecord
	err := readRecord(filepath.Join(dir, containerFile), &rec)
	if err == nil && (rec.ID != id || rec.PodID != p.id || rec.Config == nil) {
		err = fmt.Errorf("%w: it is of container %q of pod %q", errDamaged, rec.ID, rec.PodID)
	}
	var s containerState
	found := false
	if err == nil {
		if found, err = readState(dir, &s); err != nil {
			// It was committed: somebody knows it. Whether it runs, the pod's init knows.
			log.Error(err, "State of container is damaged, asking the pod's init", "containerID", id, "path", dir)
			s = containerState{Phase: containerRunning, Message: "its state file was damaged"}
			found, err = true, nil
		}
	}
	var c *container
	if err == nil {
		c = newContainer(p, &rec)
		if !found {
			s = containerState{Phase: containerMaking}
		} else if c.spec, err = m.store.readConfig(p.id, id); err != nil && s.Phase.shown() == ContainerExited {
			log.Error(err, "Configuration of exited container cannot be read, going on without", "containerID", id)
			err = nil
		} else if err == nil && s.User.Home == "" && c.spec.Process != nil { // of a damaged state
			u := c.spec.Process.User
			s.User = user.Identity{UID: u.UID, GID: u.GID, Groups: u.AdditionalGids, Username: u.Username}
		}
	}
	if errors.Is(err, fs.ErrNotExist) || err != nil && !errors.Is(err, errVersion) && uncommitted(dir) {
		// As with a pod: not written yet, or not whole. (Without a config.json there is no commit.)
		if err := m.store.removeContainer(p.id, id); err != nil {
			log.Error(err, "Could not delete what is left of a container without a record, ignoring", "containerID", id)
		}
		return
	}
	if err != nil {
		to, aerr := m.store.setAside(dir, "container-"+id, time.Now())
		log.Error(errors.Join(err, aerr), "Record of container cannot be read, set it aside", "containerID", id, "path", to)
		return // collectOrphans ends what there is of it
	}
	c.handed.Store(true)
	c.made = newCall[string](&operation{what: "create container", object: c.object()})
	c.made.finish(c.id, nil)
	c.now.Store(&containerNow{state: s, spec: c.spec})
	if s.Phase.shown() == ContainerExited {
		close(c.ended)
	}
	p.containers[c.id] = c
}

// indexRecovered builds the indexes, and makes everything visible, from the oldest to the newest.
func (m *Manager) indexRecovered(ctx context.Context) {
	pods := m.allPods()
	slices.SortFunc(pods, func(a, b *pod) int { return a.rec.CreatedAt.Compare(b.rec.CreatedAt) })
	for _, p := range pods {
		m.mu.Lock()
		if p.rec.CreatedAt.After(m.lastTime) {
			m.lastTime = p.rec.CreatedAt
		}
		for _, c := range p.containers {
			if c.rec.CreatedAt.After(m.lastTime) {
				m.lastTime = c.rec.CreatedAt
			}
			if h := m.names[c.name()]; h == nil || h.rec.CreatedAt.Before(c.rec.CreatedAt) {
				m.names[c.name()] = c
			}
		}
		if s := p.now.Load().state; s.Phase == podDead && s.Reason == "" {
			if old := m.identities[p.rec.Config.Identity]; old != nil {
				// The newest counts: two ready pods of one identity would make the kubelet start a third.
				o := old.now.Load().state
				o.Reason = reasonSuperseded
				old.now.Store(&podNow{state: o})
				klog.FromContext(ctx).Info("Two pods have the same identity, showing the older as not ready", "older", old.id, "newer", p.id)
			}
			m.identities[p.rec.Config.Identity] = p
		}
		m.mu.Unlock()
		for _, c := range m.containersOf(p) {
			now := c.now.Load()
			m.publishContainer(c, now.state, now.spec)
			if upper := filepath.Join(m.store.containerDir(p.id, c.id), upperDir); now.state.Phase.shown() != "" {
				m.usage.wanted(c.id, upper)
			}
		}
	}
}

func (m *Manager) allPods() []*pod {
	m.mu.RLock()
	defer m.mu.RUnlock()
	l := make([]*pod, 0, len(m.pods))
	for _, p := range m.pods {
		l = append(l, p)
	}
	return l
}

// acquireImages pins the layers of all containers that may still run.
func (m *Manager) acquireImages(ctx context.Context, f *found) {
	m.mu.RLock()
	l := make([]*container, 0, len(m.containers))
	for _, c := range m.containers {
		l = append(l, c)
	}
	m.mu.RUnlock()
	for _, p := range f.foreign {
		for _, c := range p.containers {
			l = append(l, c)
		}
	}
	for _, c := range l {
		images := []string{c.rec.Config.ImageID}
		for _, v := range c.rec.Config.Volumes {
			images = append(images, v.ImageID)
		}
		for _, id := range images {
			if _, err := m.cfg.Images.Acquire(id, c.id); err != nil {
				klog.FromContext(ctx).Error(err, "Image of container is missing, going on", "containerID", c.id, "imageID", id)
			}
		}
	}
}

// restoreNetworks tells every network which pods hold something of it, also those that will be undone: until then their
// addresses are taken.
func (m *Manager) restoreNetworks(ctx context.Context, pods []*pod) {
	byProvider := map[string]map[string]network.Restored{}
	var files []*os.File
	defer func() {
		for _, f := range files {
			_ = f.Close() // only references
		}
	}()
	for _, p := range pods {
		if s := p.now.Load().state; s.Phase == podMaking || s.Phase == podUndoing {
			p.draft = s // what a run had found out before its commit is not known
		}
		r := p.networkResult()
		if r == nil || p.rec.NetNSName == "" {
			continue
		}
		np := m.networkPod(p)
		if ns, err := m.cfg.NetNS.Open(p.rec.NetNSName); err == nil && p.rec.BootID == m.cfg.BootID {
			np.NetNS = ns
			files = append(files, ns)
		}
		if byProvider[r.Provider] == nil {
			byProvider[r.Provider] = map[string]network.Restored{}
		}
		byProvider[r.Provider][p.id] = network.Restored{Pod: np, Result: *r}
	}
	for _, n := range append([]network.Network{m.cfg.Network}, m.cfg.Networks...) {
		if n == nil {
			continue
		}
		if err := n.Restore(ctx, byProvider[n.Name()]); err != nil {
			klog.FromContext(ctx).Error(err, "Network is not as its pods need it, going on", "network", n.Name())
		}
		delete(byProvider, n.Name())
	}
	for provider, l := range byProvider {
		klog.FromContext(ctx).Info("Pods have a network that is not configured any more; stopping them will fail", "provider", provider, "pods", len(l))
	}
}

// recoverPod brings one pod into a state that is true.
func (m *Manager) recoverPod(ctx context.Context, p *pod) {
	log := klog.FromContext(ctx)
	if err := p.turn.take(ctx); err != nil {
		log.Error(err, "Could not recover pod", "sandboxID", p.id)
		return
	}
	defer p.turn.pass()
	op := &operation{what: "recover pod", object: p.object(), began: time.Now()}
	s := p.now.Load().state
	rebooted := p.rec.BootID != m.cfg.BootID
	switch s.Phase {
	case podMaking, podUndoing:
		log.Info("Undoing a pod whose making did not end", "sandboxID", p.id)
		if err := m.undoPod(ctx, op, p); err != nil {
			log.Error(err, "Could not undo a pod, trying again later", "sandboxID", p.id)
		}
		return
	case podStopped, podRemoving:
		// Nothing of it is in the kernel.
		m.closeGate(p)
		m.finishContainers(ctx, p)
		m.endContainers(ctx, p)
		m.publishPod(p, s)
		return
	case podStopping:
		m.closeGate(p)
	}
	switch {
	case rebooted:
		m.recoverRebooted(ctx, op, p)
	case s.Phase == podDead && s.Reason == reasonDamaged, s.Handle == nil:
		m.recoverDead(ctx, p, reasonDamaged, "the pod's state was damaged, and the container was killed")
	default:
		m.recoverLiving(ctx, p, s)
	}
}

func (m *Manager) closeGate(p *pod) {
	done, cancel := context.WithCancel(context.Background())
	cancel()
	_ = p.gate.close(done, fmt.Errorf("%w: the pod is being stopped", ErrState)) // nobody is inside yet
}

// recoverRebooted: everything of the pod is gone with the former boot, but not what networks keep on disk (C-17).
func (m *Manager) recoverRebooted(ctx context.Context, op *operation, p *pod) {
	log := klog.FromContext(ctx)
	const message = "the node was rebooted"
	m.closeGate(p)
	s := p.now.Load().state
	if s.Phase == podDead {
		s.Reason = reasonReboot
	}
	m.publishPod(p, s)
	m.notePod(ctx, p, func(*podState) {})
	for _, c := range m.containersOf(p) {
		if c.phase() == containerMaking {
			if err := m.unmakeContainer(ctx, &operation{what: "undo container", object: c.id}, c); err != nil {
				log.Error(err, "Could not undo a container, trying again later", "containerID", c.id)
			}
			continue
		}
		if err := m.lose(ctx, c, reasonReboot, message); err != nil {
			log.Error(err, "Could not end a container of before the reboot", "containerID", c.id)
		}
	}
	// Gives back the addresses; the rest finds nothing.
	if err := op.undo(ctx, m.podSteps(op, p), whatStops); err != nil {
		log.Error(err, "Could not take down a pod of before the reboot; StopPodSandbox will try again", "sandboxID", p.id)
	}
}

// recoverDead deals with a pod whose init is gone or cannot be found.
func (m *Manager) recoverDead(ctx context.Context, p *pod, reason, message string) {
	m.closeGate(p)
	m.finishContainers(ctx, p)
	m.buryPod(ctx, p, reason, message)
	// buryPod's die does not touch a reason in other phases than dead.
	s := p.now.Load().state
	if s.Phase == podDead {
		s.Reason = reason
	}
	m.publishPod(p, s)
}

// recoverLiving attaches to a pod's init.
func (m *Manager) recoverLiving(ctx context.Context, p *pod, s podState) {
	log := klog.FromContext(ctx)
	reconciled := make(chan struct{}) // which knows more of an exit than the journal: when it was started
	defer close(reconciled)
	i, err := m.cfg.Spawner.Attach(ctx, *s.Handle, m.onExit(p, reconciled))
	switch {
	case errors.Is(err, spawn.ErrGone):
		log.Info("Pod init died while nobody looked, killing its containers", "sandboxID", p.id)
		m.recoverDead(ctx, p, reasonInitDied, "the pod's init died, and the container was killed")
		return
	case err != nil:
		// It is alive but does not answer. Its containers run on; StopPod works without it, by the cgroups.
		log.Error(err, "Pod init does not answer, showing the pod as not ready", "sandboxID", p.id)
		m.closeGate(p)
		m.finishContainers(ctx, p)
		if s.Phase == podDead {
			s.Reason = reasonUnreachable
		}
		m.publishPod(p, s)
		return
	}
	p.init.Store(&i)
	if s.Phase == podDead && s.Reason == "" {
		s.Phase = podReady
	} else {
		m.closeGate(p)
	}
	m.publishPod(p, s)
	m.reconcile(ctx, p, i)
	m.watch(p, i)
}

// finishContainers undoes the containers of a pod whose making did not end.
func (m *Manager) finishContainers(ctx context.Context, p *pod) {
	for _, c := range m.containersOf(p) {
		if c.phase() != containerMaking {
			continue
		}
		if err := m.unmakeContainer(ctx, &operation{what: "undo container", object: c.id}, c); err != nil {
			klog.FromContext(ctx).Error(err, "Could not undo a container, trying again later", "containerID", c.id)
		}
	}
}

// endContainers ends, for the record, the containers of a pod that is stopped: an exit may not have been recorded (a full disk).
func (m *Manager) endContainers(ctx context.Context, p *pod) {
	exits, err := m.cfg.Spawner.ReadJournal(m.store.runDir(p.id))
	if err != nil {
		klog.FromContext(ctx).Error(err, "Could not read a pod's journal of exits, going on without", "sandboxID", p.id)
	}
	for _, x := range exits {
		m.exited(ctx, p, x)
	}
	for _, c := range m.containersOf(p) {
		if err := m.lose(ctx, c, reasonUnknown, "its end was not recorded"); err != nil {
			klog.FromContext(ctx).Error(err, "Could not end a container of a stopped pod", "containerID", c.id)
		}
	}
}

// reconcile compares our containers with those that the pod's init holds.
func (m *Manager) reconcile(ctx context.Context, p *pod, i PodInit) {
	log := klog.FromContext(ctx)
	infos, err := i.List(ctx)
	if err != nil {
		log.Error(err, "Pod init does not list its containers, going on with the records", "sandboxID", p.id)
		return
	}
	held := map[string]spawn.ContainerInfo{}
	for _, info := range infos {
		held[info.ID] = info
	}
	for _, c := range m.containersOf(p) {
		info, ok := held[c.id]
		delete(held, c.id)
		if err := m.reconcileContainer(ctx, c, info, ok); err != nil {
			log.Error(err, "Could not bring a container up to date", "containerID", c.id)
		}
	}
	for id := range held { // their records are gone or set aside
		log.Info("Killing a container without a record", "sandboxID", p.id, "containerID", id)
		if err := m.endUnknown(ctx, p, i, id); err != nil {
			log.Error(err, "Could not end a container without a record", "containerID", id)
		}
	}
}

func (m *Manager) reconcileContainer(ctx context.Context, c *container, info spawn.ContainerInfo, held bool) error {
	if err := c.turn.take(ctx); err != nil {
		return err
	}
	defer c.turn.pass()
	phase := c.phase()
	switch phase {
	case containerMaking, containerUndoing:
		return m.undoContainer(ctx, &operation{what: "undo container", object: c.id}, c)
	case containerCreated, containerRunning:
	default:
		return nil
	}
	switch {
	case held && info.State == spawn.InitCreated:
		if phase == containerRunning { // a guess, of a damaged state: the init knows better
			now := c.now.Load()
			s := now.state
			s.Phase, s.Message = containerCreated, ""
			m.publishContainer(c, s, now.spec)
		}
		return nil
	case held && info.State == spawn.InitPrepared: // the daemon died in its hooks: nobody knows how far they got
		i, err := c.pod.living()
		if err == nil {
			err = i.Abandon(ctx, c.id)
		}
		if err != nil {
			return err
		}
	case held && (info.State == spawn.InitRunning || info.State == spawn.InitStarting):
		if phase == containerRunning {
			if c.now.Load().state.PID == 0 { // as above
				m.noteContainer(ctx, c, func(s *containerState) { s.PID, s.StartedAt, s.Message = info.PID, info.StartedAt.Round(0), "" })
			}
			return nil
		}
		return m.changeContainer(ctx, c, containerStarted, should, func(s *containerState) { // the reply to Start was lost
			s.PID, s.StartedAt = info.PID, info.StartedAt.Round(0)
		})
	case held && !info.Exit.At.IsZero():
		if phase == containerCreated {
			if err := m.changeContainer(ctx, c, containerStarted, should, func(s *containerState) { s.StartedAt = info.StartedAt.Round(0) }); err != nil {
				return err
			}
		}
		m.exitedNow(ctx, c, info.Exit)
		return nil
	}
	// The start failed and its reply was lost, or the container is not held at all.
	now := time.Now().Round(0)
	if err := m.changeContainer(ctx, c, containerExit, should, func(s *containerState) {
		s.ExitCode, s.Reason, s.Message, s.FinishedAt = codeUnknown, reasonUnknown, "the pod's init does not hold it any more", now
		if held {
			s.ExitCode, s.Reason, s.Message = codeStartError, reasonStartError, "it could not be started while the daemon was down"
		}
	}); err != nil {
		return err
	}
	m.afterExit(ctx, c)
	return nil
}

// endUnknown kills a container that the pod's init holds and no record knows.
func (m *Manager) endUnknown(ctx context.Context, p *pod, i PodInit, id string) error {
	cg := m.cfg.Cgroups.Open(m.cfg.Cgroups.ContainerPath(p.rec.CgroupPath, id))
	if err := cg.Kill(ctx); err != nil {
		return err
	}
	if err := i.Signal(ctx, id, unix.SIGKILL); err != nil && !errors.Is(err, spawn.ErrState) && !errors.Is(err, spawn.ErrNotFound) {
		return err
	}
	err := i.Remove(ctx, id)
	if errors.Is(err, spawn.ErrState) {
		err = nil // its exit is on the way; the init forgets it when the pod ends
	}
	return errors.Join(err, cg.Remove(ctx))
}

// collectOrphans removes kernel objects with our names that belong to no pod; known tells the ids of pods and containers.
func (m *Manager) collectOrphans(ctx context.Context, podLevel []string, known func(id string) bool) {
	log := klog.FromContext(ctx)
	names, err := m.cfg.NetNS.List(m.cfg.NetNSPrefix)
	if err != nil {
		log.Error(err, "Could not look for network namespaces nobody owns, ignoring")
	}
	for _, n := range names {
		id := strings.TrimPrefix(n, m.cfg.NetNSPrefix)
		if !isID(id) || known(id) {
			continue
		}
		log.Info("Removing a network namespace without a pod", "name", n)
		if err := m.cfg.NetNS.Unpin(n); err != nil {
			log.Error(err, "Could not remove a network namespace without a pod, ignoring", "name", n)
		}
	}
	parents := map[string]bool{}
	for _, path := range podLevel {
		parents[path] = true
	}
	own, err := m.cfg.Cgroups.OwnPods()
	if err != nil {
		log.Error(err, "Could not look for cgroups nobody owns, ignoring")
	}
	unknown := map[string]bool{}
	for id, path := range own {
		if isID(id) && !known(id) {
			parents[path], unknown[path] = true, true
		}
	}
	for path := range parents {
		m.collectCgroups(ctx, path, known)
		if unknown[path] {
			if err := m.cfg.Cgroups.RemovePod(ctx, path); err != nil {
				log.Error(err, "Could not remove a cgroup without a pod, ignoring", "path", path)
			}
		}
	}
}

// collectCgroups kills and removes our leaves below a pod-level cgroup that belong to nobody.
func (m *Manager) collectCgroups(ctx context.Context, path string, known func(id string) bool) {
	log := klog.FromContext(ctx)
	children, err := m.cfg.Cgroups.Children(path)
	if err != nil {
		log.Error(err, "Could not look for cgroups nobody owns, ignoring", "path", path)
	}
	for _, name := range children {
		rest, ours := strings.CutPrefix(name, cgroup.LeafPrefix)
		podID, isInit := strings.CutPrefix(rest, "pod-")
		if !ours || known(rest) || isInit && known(podID) || !isInit && !isID(rest) || isInit && !isID(podID) {
			continue
		}
		log.Info("Removing a cgroup without a record", "path", filepath.Join(path, name))
		cg := m.cfg.Cgroups.Open(filepath.Join(path, name))
		if err := errors.Join(cg.Kill(ctx), cg.Remove(ctx)); err != nil {
			log.Error(err, "Could not remove a cgroup without a record, ignoring", "path", filepath.Join(path, name))
		}
	}
}

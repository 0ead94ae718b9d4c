package podsandbox

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/image"
	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/runtime/hooks"
)

// Config of a [Manager]. What has no default must be set.
type Config struct {
	StateDir string // absolute; see the package's documentation
	RunDir   string // absolute, on a tmpfs

	Spawner Spawner
	Cgroups Cgroups
	Images  image.Images
	// Network of new pods. Networks are further ones, for pods that were born with them.
	Network  network.Network
	Networks []network.Network
	NetNS    NetNSDir
	// NetNSPrefix begins the names in NetNS. What has it and no record is removed at start, so no
	// two daemons may share it in one directory. "" is "crisp-".
	NetNSPrefix string

	// RunHooks runs OCI hooks of the runtime namespace, up to the first that fails. nil is hooks.Run.
	RunHooks func(ctx context.Context, kind string, list []specs.Hook, state *specs.State, dir string) error

	// HostFiles is the directory of the host's resolv.conf and hosts. "" is /etc.
	HostFiles string
	// BootID tells this boot from others. "" reads the kernel's.
	BootID string
}

// Manager owns the node's pods and containers. Safe for concurrent use.
//
// Lock order: a pod's turn, a container's turn, mu, the feed's. mu is held for no system call.
type Manager struct {
	cfg   Config
	store *store

	open      atomic.Bool // Recover is done
	draining  atomic.Bool
	closing   chan struct{} // closed by Close
	closeOnce sync.Once
	closeErr  error          // valid after closeOnce
	owned     sync.WaitGroup // all goroutines of ours
	busy      sync.WaitGroup // operations that callers asked for; Drain waits for them
	usage     usage          // of writable layers
	patience  time.Duration  // with a pod init: initLimit, but in tests
	retry     chan struct{}  // wakes the janitor; cap 1: a wish, not a count
	collect   chan struct{}  // wakes the collector of images; cap 1: a wish, not a count
	backlogs  atomic.Int64   // bytes that attached clients have not read yet

	// mu guards the indexes below. Pods and containers are in them from their intent to their end.
	mu         sync.RWMutex
	pods       map[string]*pod
	containers map[string]*container
	identities map[Identity]*pod // the newest that is being made or ready
	names      map[containerName]*container
	operations map[*operation]struct{}
	lastTime   time.Time // the latest creation time given out

	events         Feed                                             // announced to with mu held
	readInterfaces func(pid int, netNS string) ([]Interface, error) // interfacesOf, but in tests
}

// containerName is what makes two CreateContainer calls the same call.
type containerName struct {
	pod, name string
	attempt   uint32
}

// NewManager opens the state. Call Recover before anything else.
func NewManager(cfg Config) (*Manager, error) {
	if cfg.NetNSPrefix == "" {
		cfg.NetNSPrefix = "crisp-"
	}
	if cfg.HostFiles == "" {
		cfg.HostFiles = "/etc"
	}
	if cfg.RunHooks == nil {
		cfg.RunHooks = hooks.Run
	}
	if cfg.BootID == "" {
		b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return nil, fmt.Errorf("cannot tell this boot from others: %w", err)
		}
		cfg.BootID = strings.TrimSpace(string(b))
	}
	for _, d := range []string{cfg.StateDir, cfg.RunDir} {
		if !filepath.IsAbs(d) {
			return nil, fmt.Errorf("%w: directory %q is not absolute", ErrInvalid, d)
		}
	}
	s, err := openStore(cfg.StateDir, cfg.RunDir)
	if err != nil {
		return nil, fmt.Errorf("cannot open pods' state: %w", err)
	}
	m := &Manager{
		cfg: cfg, store: s, patience: initLimit, closing: make(chan struct{}), retry: make(chan struct{}, 1), collect: make(chan struct{}, 1),
		pods: map[string]*pod{}, containers: map[string]*container{},
		identities: map[Identity]*pod{}, names: map[containerName]*container{}, operations: map[*operation]struct{}{},
	}
	m.usage.init()
	m.readInterfaces = interfacesOf
	m.owned.Go(m.janitor)
	m.owned.Go(m.measure)
	m.owned.Go(m.collectImages)
	return m, nil
}

// Drain refuses new work and waits until what runs has ended, or ctx has.
func (m *Manager) Drain(ctx context.Context) {
	m.mu.Lock()
	m.draining.Store(true)
	m.mu.Unlock()
	done := make(chan struct{})
	go func() { // ends with the last operation, which is bounded
		m.busy.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
		for _, op := range m.Operations() {
			klog.FromContext(ctx).Info("Operation did not end in time, leaving it to the next start", "operation", op.What, "object", op.Object, "step", op.Step)
		}
	}
}

// Close ends the daemon's side; pods live on. Drain first. A second Close does nothing.
func (m *Manager) Close() error {
	m.closeOnce.Do(func() { m.closeErr = m.close() })
	return m.closeErr
}

func (m *Manager) close() error {
	m.mu.Lock()
	m.draining.Store(true)
	m.mu.Unlock()
	m.events.End(fmt.Errorf("%w: the daemon is stopping", ErrUnavailable))
	close(m.closing)
	m.busy.Wait()
	var errs []error
	m.mu.RLock()
	pods := make([]*pod, 0, len(m.pods))
	for _, p := range m.pods {
		pods = append(pods, p)
	}
	m.mu.RUnlock()
	for _, p := range pods {
		if i := p.init.Swap(nil); i != nil {
			errs = append(errs, (*i).Close())
		}
	}
	m.owned.Wait()
	m.store.flush.close()
	return errors.Join(errs...)
}

// begin registers an operation. It ends with end.
func (m *Manager) begin(what, object string) (*operation, error) {
	op := &operation{what: what, object: object, began: time.Now()}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.refuses(); err != nil {
		return nil, op.fail(err)
	}
	m.registerLocked(op)
	return op, nil
}

func (m *Manager) refuses() error {
	switch {
	case m.draining.Load():
		return fmt.Errorf("%w: the daemon is stopping", ErrUnavailable)
	case !m.open.Load():
		return fmt.Errorf("%w: the daemon is still recovering", ErrUnavailable)
	}
	return nil
}

func (m *Manager) registerLocked(op *operation) {
	m.operations[op] = struct{}{}
	m.busy.Add(1)
}

func (m *Manager) end(op *operation) {
	m.mu.Lock()
	delete(m.operations, op)
	m.mu.Unlock()
	m.busy.Done()
}

// Operation is something that runs now.
type Operation struct {
	What, Object string // "run pod", "ns/name"
	Began        time.Time
	Step         string // "" before the first
	StepBegan    time.Time
}

// Operations returns what runs now, longest first.
func (m *Manager) Operations() []Operation {
	m.mu.RLock()
	l := make([]Operation, 0, len(m.operations))
	for op := range m.operations {
		o := Operation{What: op.what, Object: op.object, Began: op.began}
		if s := op.current.Load(); s != nil {
			o.Step, o.StepBegan = s.name, s.since
		}
		l = append(l, o)
	}
	m.mu.RUnlock()
	slices.SortFunc(l, func(a, b Operation) int { return a.Began.Compare(b.Began) })
	return l
}

// Pod finds a pod by its id, or the beginning of it.
func (m *Manager) Pod(id string) (*Pod, error) {
	p, err := m.findPod(id)
	if err != nil {
		return nil, err
	}
	if v := p.view(); v != nil {
		return v, nil
	}
	return nil, fmt.Errorf("pod %q: %w", id, ErrNotFound)
}

// Container finds a container by its id, or the beginning of it.
func (m *Manager) Container(id string) (*Container, error) {
	c, err := m.findContainer(id)
	if err != nil {
		return nil, err
	}
	if v := c.view(); v != nil {
		return v, nil
	}
	return nil, fmt.Errorf("container %q: %w", id, ErrNotFound)
}

// Pods returns all pods, newest first.
func (m *Manager) Pods() []*Pod {
	m.mu.RLock()
	l := make([]*Pod, 0, len(m.pods))
	for _, p := range m.pods {
		if v := p.view(); v != nil {
			l = append(l, v)
		}
	}
	m.mu.RUnlock()
	slices.SortFunc(l, func(a, b *Pod) int { return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), cmp.Compare(a.ID, b.ID)) })
	return l
}

// Containers returns all containers, newest first.
func (m *Manager) Containers() []*Container {
	m.mu.RLock()
	l := make([]*Container, 0, len(m.containers))
	for _, c := range m.containers {
		if v := c.view(); v != nil {
			l = append(l, v)
		}
	}
	m.mu.RUnlock()
	slices.SortFunc(l, func(a, b *Container) int {
		return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	return l
}

func (m *Manager) findPod(id string) (*pod, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if err := m.recovered(); err != nil {
		return nil, err
	}
	return find("pod", m.pods, id, func(p *pod) bool { return p.phase().shown() })
}

func (m *Manager) findContainer(id string) (*container, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if err := m.recovered(); err != nil {
		return nil, err
	}
	return find("container", m.containers, id, func(c *container) bool { return c.phase().shown() != "" })
}

// recovered: before recovery is done nobody may be told that something does not exist (C-10).
func (m *Manager) recovered() error {
	if !m.open.Load() {
		return fmt.Errorf("%w: the daemon is still recovering", ErrUnavailable)
	}
	return nil
}

// find looks up a full id, or the only one that begins with id.
func find[T any](kind string, all map[string]T, id string, shown func(T) bool) (found T, err error) {
	var none T
	if id == "" {
		return none, fmt.Errorf("%w: empty %s id", ErrInvalid, kind)
	}
	if o, ok := all[id]; ok && shown(o) {
		return o, nil
	}
	n := 0
	if len(id) < idLen && isHex(id) {
		for full, o := range all {
			if strings.HasPrefix(full, id) && shown(o) {
				found = o
				n++
			}
		}
	}
	switch n {
	case 0:
		return none, fmt.Errorf("%s %q: %w", kind, id, ErrNotFound)
	case 1:
		return found, nil
	}
	return none, fmt.Errorf("%s %q: %w: %d begin with it", kind, id, ErrAmbiguous, n)
}

// newTimeLocked is a creation time: now, but later than any before, also across restarts.
func (m *Manager) newTimeLocked() time.Time {
	t := time.Now().Round(0) // without the monotonic clock, as it comes back from disk
	if !t.After(m.lastTime) {
		t = m.lastTime.Add(1)
	}
	m.lastTime = t
	return t
}

// newID returns 64 hexadecimal digits.
func newID() string {
	b := make([]byte, idLen/2)
	_, _ = rand.Read(b) // never fails, crypto/rand
	return hex.EncodeToString(b)
}

// networkOf is the network a pod was born with.
func (m *Manager) networkOf(r *network.Result) (network.Network, error) {
	for _, n := range append([]network.Network{m.cfg.Network}, m.cfg.Networks...) {
		if n != nil && n.Name() == r.Provider {
			return n, nil
		}
	}
	return nil, fmt.Errorf("%w: the pod's network provider %q is not configured any more", ErrUnavailable, r.Provider)
}

// samePod says whether a second RunPod asks for the same as the first. The runtime handler is not in CRI's config.
func samePod(a, b *PodConfig) bool {
	if len(a.Echo) > 0 || len(b.Echo) > 0 {
		return bytes.Equal(a.Echo, b.Echo) && a.RuntimeHandler == b.RuntimeHandler
	}
	return reflect.DeepEqual(a, b)
}

func sameContainer(a, b *ContainerConfig) bool {
	if len(a.Alike) > 0 && len(b.Alike) > 0 {
		return bytes.Equal(a.Alike, b.Alike) && a.ImageID == b.ImageID
	}
	if len(a.Echo) > 0 || len(b.Echo) > 0 {
		return bytes.Equal(a.Echo, b.Echo) && a.ImageID == b.ImageID
	}
	x, y := *a, *b
	x.Spec, y.Spec = nil, nil
	return reflect.DeepEqual(x, y)
}

// janitorPeriod is how often the undoing of what was never shown is tried again (I3: within 60 s).
const janitorPeriod = 15 * time.Second

// wantCollection: a container's image may be nobody's now.
func (m *Manager) wantCollection() {
	select {
	case m.collect <- struct{}{}:
	default: // somebody wished it already
	}
}

// collectImages is the goroutine that frees images which were removed while a container used them.
func (m *Manager) collectImages() {
	ctx := lifetime(m.closing)
	for {
		select {
		case <-m.closing:
			return
		case <-m.collect:
		}
		if err := m.cfg.Images.CollectGarbage(ctx); err != nil && ctx.Err() == nil {
			klog.Background().Error(err, "Could not collect images nobody uses; the next removal will")
		}
	}
}

// janitor retries what could not be undone: pods and containers that no caller knows.
func (m *Manager) janitor() {
	t := time.NewTicker(janitorPeriod)
	defer t.Stop()
	for {
		select {
		case <-m.closing:
			return
		case <-t.C:
		case <-m.retry:
		}
		m.retryUndoing()
	}
}

func (m *Manager) retryUndoing() {
	var pods []*pod
	var containers []*container
	m.mu.RLock()
	for _, p := range m.pods {
		if p.phase() == podUndoing {
			pods = append(pods, p)
		}
	}
	for _, c := range m.containers {
		if c.phase() == containerUndoing {
			containers = append(containers, c)
		}
	}
	m.mu.RUnlock()
	ctx, life := context.Background(), lifetime(m.closing)
	for _, c := range containers {
		if life.Err() != nil {
			return // the next daemon undoes them
		}
		if err := m.unmakeContainer(ctx, &operation{what: "undo container", object: c.id}, c); err != nil {
			klog.Background().Error(err, "Could not undo a failed container, trying again", "containerID", c.id)
		}
	}
	for _, p := range pods {
		if life.Err() != nil {
			return // as above
		}
		if err := m.unmakePod(ctx, &operation{what: "undo pod", object: p.object()}, p); err != nil {
			klog.Background().Error(err, "Could not undo a failed pod, trying again", "sandboxID", p.id)
		}
	}
}

func addresses(r *network.Result) []netip.Addr {
	if r == nil {
		return nil
	}
	return r.IPs
}

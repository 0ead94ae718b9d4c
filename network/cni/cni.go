// Package cni gives pods their network by the plugins of others, as the Container
// Network Interface specifies it (CNI SPEC.md 1.1), with its library, libcni.
//
//	/etc/cni/net.d ──watch──▶ found ──Plan──▶ Result.CNI: the whole list ──▶ the pod's record
//	                            │                                               │
//	                          STATUS                    ADD (Setup), CHECK, DEL (Teardown)
//	                            ▼                                               ▼
//	                         Status()                  plugin after plugin, each in a process group of its own
//
// [CNI] implements network.Network. The first valid file of the configuration directory,
// in the order of their names, is the network of new pods; what is not valid is named in
// Status and ignored. What a pod is attached to, and what ADD returned, is in its
// record and nowhere else: libcni's cache is not used. So DEL works after the
// configuration was changed or removed, after a crash in the middle of ADD, and after
// a reboot.
//
// What is where: config.go reads and checks the directory, watch.go keeps it and the answer to
// STATUS up to date, request.go says what plugins are told and what their answers
// mean, plugin.go executes them and bounds time and output.
//
// # What it does not do
//
// The DNS part of a result is not used: a pod's resolv.conf is what CRI says. A host port
// without a plugin that has the capability portMappings is not published, without an
// error: the network may do it by itself (as Cilium does). There is one network
// for each pod, and no chaining with the embedded bridge.
package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/network"
)

// Name of this provider in network.Result.
const Name = "cni"

// DefaultConfDir is where everybody puts configurations.
const DefaultConfDir = "/etc/cni/net.d"

// DefaultBinDirs are where everybody's instructions install plugins, and where Debian does.
func DefaultBinDirs() []string { return []string{"/opt/cni/bin", "/usr/lib/cni"} }

// Limits of a verb, over all plugins of the list.
const (
	addLimit    = 2 * time.Minute // the kubelet waits for 4
	delLimit    = time.Minute
	checkLimit  = 30 * time.Second
	statusLimit = 15 * time.Second
	gcLimit     = time.Minute
)

// How often the configuration directory is read, and STATUS is asked.
const (
	confPeriod   = 2 * time.Second
	statusPeriod = 10 * time.Second
)

// errClosed is the cause when Close ends what runs.
var errClosed = errors.New("crispd is stopping")

// Config of a CNI.
type Config struct {
	// ConfDir has the configuration files; "": DefaultConfDir. It need not exist.
	ConfDir string
	// BinDirs have the plugins' programs, the first that has one wins; nil: DefaultBinDirs.
	BinDirs []string
	// ScratchDir is for libcni's files while an ADD runs. It is made, with mode 0700.
	ScratchDir string
	// Standby is for a daemon that gives new pods another network: nothing is watched,
	// asked or collected, only the pods that were born with it are served.
	Standby bool
	// NetNS is where plugins run; nil: where the process does. It is borrowed until Close.
	NetNS *os.File
}

// CNI is the networks that others' plugins make. All methods are safe for concurrent use.
type CNI struct {
	cfg    Config
	limits limits

	now    atomic.Pointer[found]
	status atomic.Pointer[answer]

	life   context.Context // until Close
	end    context.CancelCauseFunc
	owned  sync.WaitGroup
	change chan struct{} // capacity 1: found is another, ask STATUS again

	mu   sync.Mutex
	pods map[string]*attachment // that hold a Result
	// collected is closed when Restore's garbage collection has ended, nil before
	// Restore: until then nothing may be added or deleted (CNI SPEC.md "GC").
	collected chan struct{}
}

// limits are constants but in tests.
type limits struct {
	add, del, check, status, gc time.Duration
	confPeriod, statusPeriod    time.Duration
}

// attachment serialises the verbs of one pod ("The container runtime must not invoke
// parallel operations for the same container", CNI SPEC.md).
type attachment struct {
	turn chan struct{} // capacity 1: holding its element is having the turn
}

var _ network.Network = (*CNI)(nil)

// New reads the configuration directory and, unless Standby, starts to watch it.
func New(cfg Config) (*CNI, error) {
	return newCNI(cfg, limits{addLimit, delLimit, checkLimit, statusLimit, gcLimit, confPeriod, statusPeriod})
}

func newCNI(cfg Config, l limits) (*CNI, error) {
	if cfg.ConfDir == "" {
		cfg.ConfDir = DefaultConfDir
	}
	if cfg.BinDirs == nil {
		cfg.BinDirs = DefaultBinDirs()
	}
	for _, dir := range append([]string{cfg.ConfDir, cfg.ScratchDir}, cfg.BinDirs...) {
		if !filepath.IsAbs(dir) {
			return nil, fmt.Errorf("%w: directory %q is not absolute", network.ErrInvalid, dir)
		}
	}
	// What an earlier crispd left there is of no use to anybody.
	if err := errors.Join(os.RemoveAll(cfg.ScratchDir), os.MkdirAll(cfg.ScratchDir, 0o700)); err != nil {
		return nil, fmt.Errorf("cannot make directory for CNI: %w", err)
	}
	n := &CNI{cfg: cfg, limits: l, pods: map[string]*attachment{}, change: make(chan struct{}, 1)}
	n.life, n.end = context.WithCancelCause(context.Background())
	n.now.Store(&found{})
	if !cfg.Standby {
		n.refresh()
		n.owned.Go(n.watchDir)
		n.owned.Go(n.watchStatus)
	}
	return n, nil
}

// Close ends the watching and whatever plugin runs, and waits. Pods keep their network.
func (n *CNI) Close() error {
	n.end(errClosed)
	n.owned.Wait()
	return nil
}

// Name implements network.Network.
func (n *CNI) Name() string { return Name }

// Refresh reads the configuration directory now.
func (n *CNI) Refresh() {
	if !n.cfg.Standby {
		n.refresh()
	}
}

// Configured says whether there was a configuration, valid or not, when the directory
// was last read. It does not block.
func (n *CNI) Configured() bool {
	f := n.now.Load()
	return f.list != nil || len(f.problems) > 0
}

// UpdatePodCIDR implements network.Network: the plugins have their own ways to learn it.
func (n *CNI) UpdatePodCIDR(string) error { return nil }

// Plan implements network.Network. It decides which network the pod gets, and what a
// plugin could not be told is refused.
func (n *CNI) Plan(_ context.Context, p network.Pod) (network.Result, error) {
	fail := func(err error) (network.Result, error) {
		return network.Result{}, fmt.Errorf("cannot plan network of pod %q: %w", object(p), err)
	}
	if _, err := request(p, ""); err != nil {
		return fail(err)
	}
	f := n.refresh()
	if f.list == nil {
		return fail(fmt.Errorf("%w: %s", network.ErrNotReady, n.missing(f)))
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.attachmentLocked(p.ID)
	return network.Result{
		Provider: Name,
		CNI:      &network.CNIAttachment{Network: f.list.Name, File: f.file, Interface: ifName, Config: f.list.Bytes},
	}, nil
}

// Setup implements network.Network with ADD.
func (n *CNI) Setup(ctx context.Context, p network.Pod, planned network.Result) (network.Result, error) {
	r, err := n.setup(ctx, p, planned)
	if err != nil {
		return network.Result{}, fmt.Errorf("cannot set up network of pod %q: %w", object(p), err)
	}
	return r, nil
}

func (n *CNI) setup(ctx context.Context, p network.Pod, planned network.Result) (network.Result, error) {
	if p.NetNSPath == "" {
		return network.Result{}, fmt.Errorf("%w: its network namespace has no path", network.ErrInvalid)
	}
	op, err := n.begin(ctx, n.attachment(p.ID), p, planned, p.NetNSPath, n.limits.add)
	if err != nil {
		return network.Result{}, err
	}
	defer op.end()
	scratch, err := os.MkdirTemp(n.cfg.ScratchDir, "add-")
	if err != nil {
		return network.Result{}, err
	}
	defer func() { _ = os.RemoveAll(scratch) }() // else the next New does
	lib := libcni.NewCNIConfigWithCacheDir(n.cfg.BinDirs, scratch, op.runner)
	result, err := lib.AddNetworkList(op.ctx, op.list, op.request)
	if err != nil {
		return network.Result{}, op.runner.fail("ADD", inner(err))
	}
	attachment := *planned.CNI
	r := planned
	r.CNI = &attachment
	if r.IPs, attachment.Added, err = resultOf(result, op.list.CNIVersion); err != nil {
		return network.Result{}, op.runner.fail("ADD", fmt.Errorf("unusable result: %w", err))
	}
	return r, nil
}

// resultOf is what is recorded of ADD's result.
func resultOf(result types.Result, listVersion string) (ips []netip.Addr, added json.RawMessage, err error) {
	if ips, err = addresses(result); err != nil {
		return nil, nil, err
	}
	if listVersion == "" {
		listVersion = "0.1.0" // CNI SPEC.md: what has no version is of the first
	}
	// Plugins get it back in the version of their configuration.
	if result, err = result.GetAsVersion(listVersion); err != nil {
		return nil, nil, err
	}
	if added, err = json.Marshal(result); err == nil && len(added) > maxConfig {
		err = fmt.Errorf("more than %d bytes", maxConfig)
	}
	return ips, added, err
}

// Teardown implements network.Network with DEL. Plugins must not mind when there is
// nothing to delete (CNI SPEC.md "DEL"), so it is repeated after any doubt.
func (n *CNI) Teardown(ctx context.Context, p network.Pod, r network.Result) error {
	netns := p.NetNSPath
	if p.NetNS == nil {
		netns = "" // it is gone, and its name may be another's
	}
	op, err := n.begin(ctx, n.attachment(p.ID), p, r, netns, n.limits.del)
	if err == nil {
		defer op.end()
		lib := n.library(op.runner)
		if err = withPrevious(op.list, r.CNI.Added); err == nil {
			if err = lib.DelNetworkList(op.ctx, op.list, op.request); err != nil {
				err = op.runner.fail("DEL", inner(err))
			}
		}
	}
	if err != nil {
		return fmt.Errorf("cannot tear down network of pod %q: %w", object(p), err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.pods, p.ID)
	return nil
}

// check asks the plugins whether all is as they left it. A pod that was taken down meanwhile
// is none of its business.
func (n *CNI) check(ctx context.Context, a *attachment, p network.Pod, r network.Result) error {
	op, err := n.begin(ctx, a, p, r, p.NetNSPath, n.limits.check)
	if err != nil {
		return err
	}
	defer op.end()
	if n.holds(p.ID) != a {
		return nil
	}
	if err := withPrevious(op.list, r.CNI.Added); err != nil {
		return err
	}
	lib := n.library(op.runner)
	err = lib.CheckNetworkList(op.ctx, op.list, op.request)
	if err == nil || errors.Is(err, libcni.ErrorCheckNotSupp) {
		return nil
	}
	return op.runner.fail("CHECK", err)
}

// library is libcni without a cache: of a directory that does not exist it reads nothing.
func (n *CNI) library(r *runner) *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir(n.cfg.BinDirs, filepath.Join(n.cfg.ScratchDir, "none"), r)
}

// operation is one verb on one pod.
type operation struct {
	ctx     context.Context
	list    *libcni.NetworkConfigList
	request *libcni.RuntimeConf
	runner  *runner
	end     func()
}

// begin waits for garbage collection and for the pod's turn, which end gives back.
func (n *CNI) begin(ctx context.Context, a *attachment, p network.Pod, r network.Result, netns string, limit time.Duration) (*operation, error) {
	if r.CNI == nil {
		return nil, fmt.Errorf("%w: its record says nothing of CNI", network.ErrInvalid)
	}
	list, err := parseList(r.CNI.Config)
	if err != nil {
		return nil, fmt.Errorf("recorded configuration of network %q: %w", r.CNI.Network, err)
	}
	req, err := request(p, netns)
	if err != nil {
		return nil, err
	}
	req.IfName = r.CNI.Interface
	n.mu.Lock()
	collected := n.collected
	n.mu.Unlock()
	if collected != nil {
		select {
		case <-collected:
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for CNI GC: %w", context.Cause(ctx))
		}
	}
	select {
	case a.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for another CNI operation on the pod: %w", context.Cause(ctx))
	}
	ctx, cancel := n.bounded(ctx, limit)
	return &operation{ctx: ctx, list: list, request: req, runner: &runner{netns: n.cfg.NetNS}, end: func() {
		cancel()
		<-a.turn
	}}, nil
}

// bounded ends by a limit, or with Close.
func (n *CNI) bounded(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancelLimit := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer within %v: %w", limit, context.DeadlineExceeded))
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(n.life, func() { cancel(context.Cause(n.life)) })
	return ctx, func() {
		stop()
		cancel(nil)
		cancelLimit()
	}
}

// holds is the pod's attachment, nil when it has none (any more).
func (n *CNI) holds(id string) *attachment {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.pods[id]
}

// attachment is the pod's, made if it has none.
func (n *CNI) attachment(id string) *attachment {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.attachmentLocked(id)
}

func (n *CNI) attachmentLocked(id string) *attachment {
	a := n.pods[id]
	if a == nil {
		a = &attachment{turn: make(chan struct{}, 1)}
		n.pods[id] = a
	}
	return a
}

// Restore implements network.Network. Plugins that can are told which attachments live
// (GC), and are then asked whether those are as they should be (CHECK); both in the
// background, and what they say is logged. Without a pod of ours on the network there is no
// GC: those that another runtime has on it would go.
func (n *CNI) Restore(ctx context.Context, pods map[string]network.Restored) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	var living []network.Restored
	for id, r := range pods {
		if r.Result.Provider != Name || r.Result.CNI == nil {
			continue
		}
		n.attachmentLocked(id)
		living = append(living, r)
	}
	if n.cfg.Standby || len(living) == 0 || n.collected != nil {
		return nil
	}
	list := n.now.Load().list
	collected := make(chan struct{})
	n.collected = collected
	log := klog.FromContext(ctx)
	n.owned.Go(func() {
		ctx := klog.NewContext(n.life, log)
		n.collect(ctx, list, living)
		close(collected)
		n.checkAll(ctx, living)
	})
	return nil
}

// collect is GC.
func (n *CNI) collect(ctx context.Context, list *libcni.NetworkConfigList, living []network.Restored) {
	args := &libcni.GCArgs{}
	for _, r := range living {
		if list != nil && r.Result.CNI.Network == list.Name {
			args.ValidAttachments = append(args.ValidAttachments, types.GCAttachment{ContainerID: r.Pod.ID, IfName: r.Result.CNI.Interface})
		}
	}
	if len(args.ValidAttachments) == 0 {
		return
	}
	ctx, cancel := n.bounded(ctx, n.limits.gc)
	defer cancel()
	lib := n.library(&runner{netns: n.cfg.NetNS})
	if err := lib.GCNetworkList(ctx, list, args); err != nil && n.life.Err() == nil {
		klog.FromContext(ctx).Error(err, "CNI plugins could not collect garbage, ignoring", "network", list.Name)
	}
}

// checkAll is CHECK of those whose namespace was there, one after another: it may not
// take the machine from the pods.
func (n *CNI) checkAll(ctx context.Context, living []network.Restored) {
	for _, r := range living {
		a := n.holds(r.Pod.ID)
		if a == nil || r.Pod.NetNS == nil || r.Result.CNI.Added == nil {
			continue
		}
		if n.life.Err() != nil {
			return
		}
		if err := n.check(ctx, a, r.Pod, r.Result); err != nil && n.life.Err() == nil {
			klog.FromContext(ctx).Error(err, "A pod's network is not as it should be", "pod", klog.KRef(r.Pod.Namespace, r.Pod.Name), "sandboxID", r.Pod.ID)
		}
	}
}

func object(p network.Pod) string { return p.Namespace + "/" + p.Name }

package cgroup

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"
)

// Config of a [Driver].
type Config struct {
	// Systemd selects the systemd driver, whose parents are slices. It needs cgroup v2.
	Systemd bool
	// Root is the parent of pods that come without a cgroup_parent, an absolute
	// path below the hierarchies' roots, "" meaning "/crisp". It is made when needed and stays.
	// For the systemd driver it names a slice: /crisp is crisp.slice, /a/b is a-b.slice.
	Root string
}

const defaultRoot = "/crisp"

// Driver makes the cgroups of one node. It holds one descriptor of each
// hierarchy's root and is safe for concurrent use.
type Driver struct {
	*layout
	config Config
	kernel kernel
	claims *claims
	units  units // systemd; nil with the cgroupfs driver

	mu      sync.Mutex
	missing map[string]bool // guarded by mu: reasons, see Missing
}

// New looks at the node's hierarchies (see Detect) and opens their roots.
//
// The systemd driver connects to systemd: where none answers it is an error, after ctx's end or half a minute.
//
// Needs: write access to the cgroup file systems; for device rules on v2 CAP_BPF or CAP_SYS_ADMIN.
func New(ctx context.Context, config Config) (*Driver, error) {
	l, err := detect()
	if err != nil {
		return nil, err
	}
	k, err := openCgroupfs(l.trees)
	if err != nil {
		return nil, fmt.Errorf("cannot open the cgroup hierarchies: %w", err)
	}
	d, err := newDriver(config, l, k)
	if err != nil {
		return nil, errors.Join(err, k.close())
	}
	if config.Systemd {
		b, err := openBus(ctx)
		if err != nil {
			return nil, errors.Join(err, k.close())
		}
		d.units = b
	}
	// The library opens /sys/fs/cgroup at its first use, and for good. Now, and not with some privileged container: a descriptor that
	// appears later looks like a leak. It does not matter whether there is such a file.
	_, _ = cgroups.ReadFile(l.trees[0].dir, "cgroup.procs")
	return d, nil
}

func newDriver(config Config, l *layout, k kernel) (*Driver, error) {
	if config.Systemd && l.mode != Unified {
		return nil, fmt.Errorf("%w: the systemd cgroup driver needs cgroup v2, and this node's layout is %s; use cgroupfs in crispd and in the kubelet", ErrUnsupported, l.mode)
	}
	if config.Root == "" {
		config.Root = defaultRoot
	}
	d := &Driver{layout: l, config: config, kernel: k, claims: newClaims(), missing: map[string]bool{}}
	if err := validPath(config.Root); err != nil {
		return nil, fmt.Errorf("cgroup root: %w", err)
	}
	if config.Systemd {
		if err := d.ValidateParent(rootSlice(config.Root)); err != nil {
			return nil, fmt.Errorf("cgroup root %q: %w", config.Root, err)
		}
	}
	if l.devices() == absent {
		// Never run a container that can open any device.
		return nil, fmt.Errorf("%w: device access cannot be limited: neither the v1 devices controller nor cgroup2 is mounted", ErrUnsupported)
	}
	d.probe()
	return d, nil
}

// probe finds what the kubelet asks for always and this node lacks. On v2 the
// root has no memory.swap.max: that is found out by the first limit.
func (d *Driver) probe() {
	if d.home("hugetlb") == absent {
		d.report(noHugetlb)
	}
	if m := d.home("memory"); m != absent && !d.trees[m].v2 {
		if _, err := d.kernel.read(m, "/memory.memsw.limit_in_bytes"); errors.Is(err, unix.ENOENT) {
			d.report(noSwap)
		}
	}
}

// Close lets go of the hierarchies' roots.
func (d *Driver) Close() error {
	var errs []error
	if d.units != nil {
		errs = append(errs, d.units.close())
	}
	if k, ok := d.kernel.(*cgroupfs); ok {
		errs = append(errs, k.close())
	}
	return errors.Join(errs...)
}

// Mode says how the hierarchies are laid out.
func (d *Driver) Mode() Mode { return d.mode }

// Missing says, sorted, which limits this node cannot apply and that were or will be left out
// silently; the rest of what a node lacks is an error when asked for.
func (d *Driver) Missing() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var l []string
	for reason := range d.missing {
		l = append(l, reason)
	}
	slices.Sort(l)
	return l
}

func (d *Driver) report(reason string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.missing[reason] = true
}

// maxPath bounds a cgroup_parent, so that with our leaves and the longest file name it stays below PATH_MAX.
const maxPath = 2048

// ValidateParent checks a cgroup_parent as the kubelet sends it: "" or an absolute path for the
// cgroupfs driver, a slice for the systemd driver (parseSlice). The error is ErrInvalid and names it.
func (d *Driver) ValidateParent(parent string) error {
	if parent == "" {
		return nil
	}
	if d.config.Systemd {
		if err := validText(parent); err != nil {
			return err
		}
		if _, err := parseSlice(parent); err != nil {
			return fmt.Errorf("%w: cgroup_parent %q %w", ErrInvalid, parent, err)
		}
		return nil
	}
	return validPath(parent)
}

// ValidPodPath reports whether a path may be one that PodPath made, of either driver: of a record that is damaged.
func (d *Driver) ValidPodPath(podPath string) bool {
	return validPath(podPath) == nil
}

// validText refuses what no path is made of.
func validText(parent string) error {
	if len(parent) > maxPath {
		return fmt.Errorf("%w: cgroup_parent of %d bytes is longer than %d", ErrInvalid, len(parent), maxPath)
	}
	if strings.ContainsFunc(parent, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\uFFFD' || r >= 0x202a && r <= 0x202e }) {
		return fmt.Errorf("%w: cgroup_parent %q has control characters or is not UTF-8", ErrInvalid, parent)
	}
	return nil
}

// validPath checks a path below the hierarchies' roots.
func validPath(parent string) error {
	if err := validText(parent); err != nil {
		return err
	}
	bad := func(why string) error {
		return fmt.Errorf("%w: cgroup_parent %q %s", ErrInvalid, parent, why)
	}
	if !strings.HasPrefix(parent, "/") {
		return bad("is not an absolute path; the cgroupfs driver needs one like /kubepods/burstable")
	}
	for part := range strings.SplitSeq(parent, "/") {
		if part == ".." || part == "." {
			return bad("has a . or .. in it")
		}
		if len(part) > unix.NAME_MAX {
			return bad("has a name longer than 255 bytes")
		}
	}
	return nil
}

// PodPath is the pod-level cgroup: parent, or with an empty one "<Root>/pod<podID>"; with the systemd driver a scope below
// parent's slice, or Root's. The parent is valid.
func (d *Driver) PodPath(parent, podID string) string {
	if d.config.Systemd {
		return d.scopePath(parent, podID)
	}
	if parent == "" {
		return path.Join(d.config.Root, rootPrefix+podID)
	}
	return path.Clean(parent)
}

const rootPrefix = "pod" // of pods' names below Root

// Owned says whether a pod-level cgroup is the pod's alone by its name and place, whoever made it: below Root, or a scope. RemovePod is
// ours to call then, in any case.
func (d *Driver) Owned(podPath string) bool {
	return isScope(podPath) || path.Dir(podPath) == d.config.Root && strings.HasPrefix(path.Base(podPath), rootPrefix)
}

// OwnPods finds the pod-level cgroups below Root, and below its slice, by the id of their pods. Recovery finds with it what no
// record knows. Pods that the kubelet named a parent for are not among them.
func (d *Driver) OwnPods() (map[string]string, error) {
	found := map[string]string{}
	look := func(parent string, podOf func(name string) (string, bool)) error {
		names, err := d.Children(parent)
		for _, name := range names {
			if id, ok := podOf(name); ok {
				found[id] = path.Join(parent, name)
			}
		}
		return err
	}
	err := look(d.config.Root, func(name string) (string, bool) { return strings.CutPrefix(name, rootPrefix) })
	if d.config.Systemd {
		err = errors.Join(err, look(path.Dir(d.scopePath("", "")), podOfScope))
	}
	return found, err
}

// LeafPrefix begins the names of all cgroups that InitPath and ContainerPath name.
const LeafPrefix = "crisp-"

// InitPath is the leaf of the pod's init.
func (d *Driver) InitPath(podPath, podID string) string {
	return path.Join(podPath, LeafPrefix+"pod-"+podID)
}

// ContainerPath is the cgroup of a container.
func (d *Driver) ContainerPath(podPath, containerID string) string {
	return path.Join(podPath, LeafPrefix+containerID)
}

// Open returns a handle without touching the kernel.
func (d *Driver) Open(path string) *Cgroup {
	c := &Cgroup{driver: d, path: path}
	for i := range d.trees {
		c.trees = append(c.trees, i)
	}
	return c
}

// Children names the child cgroups of a path in any hierarchy, sorted; none if it does not exist.
// Recovery finds with it what no record knows.
func (d *Driver) Children(path string) ([]string, error) {
	seen := map[string]bool{}
	for i := range d.trees {
		names, err := d.kernel.children(i, path)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, &Error{Op: "list", Path: path, Err: err}
		}
		for _, n := range names {
			seen[n] = true
		}
	}
	var l []string
	for n := range seen {
		l = append(l, n)
	}
	slices.Sort(l)
	return l, nil
}

// CreatePod makes the pod-level cgroup where it is missing, and above it what is missing too, and on v2
// enables all controllers down to its children. It is idempotent.
//
// created says that it existed in no hierarchy before: then RemovePod is ours to
// call; else it is the kubelet's. (See also Owned.)
//
// A scope has controllers, and systemd's blessing, only after Adopt.
//
// Undo: on error what this call made is removed; else RemovePod.
func (d *Driver) CreatePod(ctx context.Context, path string) (created bool, err error) {
	op := func(step string, kind, err error) error {
		return &Error{Op: "create pod", Path: path, Step: step, Kind: kind, Err: err}
	}
	if err := ctx.Err(); err != nil {
		return false, op("", nil, err)
	}
	var made []place
	undo := func(err error) error {
		for _, p := range slices.Backward(made) {
			err = errors.Join(err, d.kernel.rmdir(p.tree, p.path))
		}
		return err
	}
	created = true
	for tree := range d.trees {
		list, err := d.mkdirAll(tree, path)
		made = append(made, list...)
		if err != nil {
			return false, undo(op("", kindOf(err), err))
		}
		if len(list) == 0 {
			created = false
		}
	}
	if t := d.home("cpuset"); t != absent && !d.trees[t].v2 {
		if _, err := d.fillCpuset(t, path); err != nil {
			return false, undo(op("fill cpuset", kindOf(err), err))
		}
	}
	if d.mode == Unified && !isScope(path) {
		if err := d.enableControllers(path); err != nil {
			return false, undo(op("enable controllers", kindOf(err), err))
		}
	}
	return created, nil
}

// place is one directory.
type place struct {
	tree int
	path string
}

// mkdirAll makes a cgroup and those above it, and returns what it made, top first.
func (d *Driver) mkdirAll(tree int, full string) ([]place, error) {
	err := d.kernel.mkdir(tree, full)
	switch {
	case err == nil:
		return []place{{tree, full}}, nil
	case errors.Is(err, unix.EEXIST):
		return nil, nil
	case !errors.Is(err, unix.ENOENT) || full == "/":
		return nil, err
	}
	made, err := d.mkdirAll(tree, path.Dir(full))
	if err != nil {
		return made, err
	}
	err = d.kernel.mkdir(tree, full)
	if err == nil {
		made = append(made, place{tree, full})
	} else if errors.Is(err, unix.EEXIST) {
		err = nil
	}
	return made, err
}

// cpusetFiles have to be filled before a process can enter a v1 cpuset (cpusets.rst, "Usage Examples and Syntax").
var cpusetFiles = [2]string{"/cpuset.cpus", "/cpuset.mems"}

// fillCpuset makes sure that a v1 cpuset is not empty, by copying the nearest
// filled one above it down to it, and returns what it has.
func (d *Driver) fillCpuset(tree int, full string) (have [2]string, err error) {
	empty := false
	for i, f := range cpusetFiles {
		if have[i], err = d.kernel.read(tree, path.Join(full, f)); err != nil {
			return have, err
		}
		have[i] = strings.TrimSpace(have[i])
		empty = empty || have[i] == ""
	}
	if !empty || full == "/" {
		return have, nil
	}
	above, err := d.fillCpuset(tree, path.Dir(full))
	if err != nil {
		return have, err
	}
	for i, f := range cpusetFiles {
		if have[i] == "" {
			have[i] = above[i]
			if err := d.kernel.write(tree, path.Join(full, f), have[i]); err != nil {
				return have, err
			}
		}
	}
	return have, nil
}

// enableControllers makes all of the root's controllers usable by the children of full (cgroup v2).
func (d *Driver) enableControllers(full string) error {
	want := d.trees[0].controllers
	have, err := d.words(full, "cgroup.controllers")
	if err != nil {
		return err
	}
	// Usually the kubelet enabled them down to here.
	if len(without(want, have)) > 0 && full != "/" {
		if err := d.enableControllers(path.Dir(full)); err != nil {
			return err
		}
	}
	enabled, err := d.words(full, "cgroup.subtree_control")
	if err != nil {
		return err
	}
	lacking := without(want, enabled)
	if len(lacking) == 0 {
		return nil
	}
	// A cgroup with processes cannot hand out controllers, but for the root ("No
	// Internal Process Constraint", cgroup-v2.rst). For threaded ones the kernel would go along, and
	// turn the subtree into a threaded one: look first.
	if full != "/" {
		if pids, err := d.kernel.read(0, path.Join(full, "cgroup.procs")); err != nil {
			return err
		} else if pids != "" {
			return &Error{Op: "enable controllers in", Path: full, Kind: ErrBusy,
				Step: "it has processes of its own: " + strings.Join(strings.Fields(pids), ", ")}
		}
	}
	file := path.Join(full, "cgroup.subtree_control")
	if err := d.kernel.write(0, file, "+"+strings.Join(lacking, " +")); err == nil {
		return nil
	}
	// One that is refused (cpu, while realtime processes run: EINVAL) must not keep out the others. A container that
	// is limited by it will fail, and say so.
	for _, c := range lacking {
		if err := d.kernel.write(0, file, "+"+c); err != nil {
			d.report(fmt.Sprintf("the %s controller could not be enabled in %s: %v", c, full, err))
		}
	}
	return nil
}

// words reads a file of names, like cgroup.controllers.
func (d *Driver) words(full, file string) ([]string, error) {
	data, err := d.kernel.read(0, path.Join(full, file))
	return strings.Fields(data), err
}

// without returns what of list is not in other.
func without(list, other []string) []string {
	var l []string
	for _, s := range list {
		if !slices.Contains(other, s) {
			l = append(l, s)
		}
	}
	return l
}

// RemovePod removes the pod-level cgroup, not what is below it: children or processes
// left in it are an ErrBusy that names them. It is idempotent. Config.Root stays. A scope, which
// is the pod's alone, goes with all that is in it.
func (d *Driver) RemovePod(ctx context.Context, path string) error {
	if err := ctx.Err(); err != nil {
		return &Error{Op: "remove pod", Path: path, Err: err}
	}
	if path == "/" {
		return &Error{Op: "remove pod", Path: path, Kind: ErrInvalid, Step: "it is not a pod's"}
	}
	if path == d.config.Root { // somebody's cgroup_parent: others may be about to use it
		return nil
	}
	if isScope(path) {
		return d.removeScope(ctx, path)
	}
	var errs []error
	for tree := range d.trees {
		err := d.kernel.rmdir(tree, path)
		if err == nil || errors.Is(err, unix.ENOENT) {
			continue
		}
		errs = append(errs, &Error{Op: "remove pod", Path: path, Step: d.left(tree, path), Kind: kindOf(err), Err: err})
	}
	return errors.Join(errs...)
}

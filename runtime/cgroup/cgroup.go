package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Cgroup is a handle to one cgroup in all hierarchies (or, for an exec'd tree, in the tracking one).
// The cgroup need not exist. Safe for concurrent use, except that Update
// expects no other Update of the same cgroup meanwhile.
type Cgroup struct {
	driver *Driver
	path   string
	trees  []int   // hierarchies it lives in
	outer  *Cgroup // of an exec'd tree: the container's cgroup, which it joins in the other hierarchies
}

// Path is the cgroup's path below each hierarchy's root.
func (c *Cgroup) Path() string { return c.path }

func (c *Cgroup) errorf(op, step string, err error) error {
	e := &Error{Op: op, Path: c.path, Step: step, Kind: kindOf(err), Err: err}
	if inner, ok := err.(*Error); ok && inner.Op == "" { // of compile: it has the step and the kind
		e.Step, e.Kind, e.Err = inner.Step, inner.Kind, inner.Err
	}
	return e
}

func (c *Cgroup) file(name string) string { return c.path + "/" + name }

// Create makes the cgroup in every hierarchy and applies r, device rules
// included; a nil r limits nothing. A v1 cpuset is filled from the one above
// unless r names CPUs and memory nodes. One that exists is taken over.
//
// Errors: ErrInvalid and ErrUnsupported name the limit. Undo: on error what it made
// is removed; else Remove.
func (c *Cgroup) Create(ctx context.Context, r *specs.LinuxResources) error {
	if err := ctx.Err(); err != nil {
		return c.errorf("create", "", err)
	}
	d := c.driver
	var settings []setting
	if r != nil {
		var err error
		if settings, err = d.compile(r, freshCgroup); err != nil {
			return c.errorf("create", "", err)
		}
	}
	var made []int
	undo := func(err error) error {
		for _, tree := range slices.Backward(made) {
			err = errors.Join(err, d.kernel.rmdir(tree, c.path))
		}
		return err
	}
	for _, tree := range c.trees {
		err := d.kernel.mkdir(tree, c.path)
		if err == nil {
			made = append(made, tree)
		} else if !errors.Is(err, unix.EEXIST) {
			return undo(c.errorf("create", "", err))
		}
	}
	if err := c.inheritCpuset(settings); err != nil {
		return undo(c.errorf("create", "fill cpuset", err))
	}
	for _, s := range settings {
		if _, err := c.apply(s); err != nil {
			return undo(c.errorf("create", s.what, err))
		}
	}
	if r != nil && len(r.Devices) > 0 {
		if err := c.setDevices(r.Devices); err != nil {
			return undo(c.errorf("create", "device rules", err))
		}
	}
	return nil
}

// inheritCpuset copies to a v1 cpuset what the settings do not name.
func (c *Cgroup) inheritCpuset(settings []setting) error {
	d := c.driver
	tree := d.home("cpuset")
	if tree == absent || d.trees[tree].v2 || !slices.Contains(c.trees, tree) {
		return nil
	}
	var above [2]string
	for i, f := range cpusetFiles {
		if slices.ContainsFunc(settings, func(s setting) bool { return s.tree == tree && "/"+s.file == f }) {
			continue
		}
		if above[i] == "" {
			var err error
			if above, err = d.fillCpuset(tree, path.Dir(c.path)); err != nil {
				return err
			}
		}
		if err := d.kernel.write(tree, c.path+f, above[i]); err != nil {
			return err
		}
	}
	return nil
}

// apply writes one setting. written is the one that was: s, its alternative, or nil
// when the kernel lacks the file and that is tolerated.
func (c *Cgroup) apply(s setting) (written *setting, err error) {
	err = c.driver.kernel.write(s.tree, c.file(s.file), s.value)
	if !errors.Is(err, unix.ENOENT) {
		return &s, c.explain(s, err)
	}
	if s.or != nil {
		return c.apply(*s.or)
	}
	if _, gone := c.driver.kernel.read(s.tree, c.file("cgroup.procs")); gone != nil {
		return nil, err
	}
	if s.missing != "" {
		c.driver.report(s.missing)
		return nil, nil
	}
	return nil, c.lacks(s)
}

// lacks says why a file is not there although the cgroup is.
func (c *Cgroup) lacks(s setting) error {
	controller, _, _ := strings.Cut(s.file, ".")
	step := s.what + ": this kernel has no " + s.file
	if c.driver.trees[s.tree].v2 {
		if on, err := c.driver.words(path.Dir(c.path), "cgroup.subtree_control"); err == nil && !slices.Contains(on, controller) {
			step = fmt.Sprintf("%s: controller %s is not enabled in %q (only %s)", s.what, controller, path.Dir(c.path), strings.Join(on, " "))
		}
	}
	return &Error{Step: step, Kind: ErrUnsupported}
}

// explain adds to a refused write what the errno does not say.
func (c *Cgroup) explain(s setting, err error) error {
	d := c.driver
	switch {
	case errors.Is(err, unix.EBUSY) && strings.HasPrefix(s.file, "memory."):
		if usage, rerr := d.kernel.read(s.tree, c.file("memory.usage_in_bytes")); rerr == nil {
			return fmt.Errorf("%w (%s bytes are in use and cannot be reclaimed)", err, strings.TrimSpace(usage))
		}
	case errors.Is(err, unix.EINVAL) && strings.HasPrefix(s.file, "cpu.cfs_"), errors.Is(err, unix.EINVAL) && s.file == "cpu.max":
		return fmt.Errorf("%w (quota is at least 1000 µs, period 1000 to 1000000 µs, and on v1 their ratio at most the pod's)", err)
	case (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EACCES)) && strings.HasPrefix(s.file, "cpuset."):
		if have, rerr := d.kernel.read(s.tree, path.Join(path.Dir(c.path), s.file)); rerr == nil {
			return fmt.Errorf("%w (the cgroup above has %s)", err, strings.TrimSpace(have))
		}
	}
	return err
}

// Entry says how a process gets into a cgroup.
type Entry int

const (
	// ByBirth: it is born there. Who clones it must be allowed to write cgroup.procs of the cgroup2 hierarchy here
	// and in the nearest cgroup above both itself and this one: root of the node is.
	ByBirth Entry = iota
	// ByWriting: it enters the cgroup2 hierarchy itself, once it is there. For a child of a process that may not clone into it:
	// clone3(2) checks the caller, so that a pod init in a user namespace gets EACCES; a write to cgroup.procs is checked
	// with the credentials of who opened the file. Slower: the move of a process waits for the kernel.
	ByWriting
)

// Join is what a process needs to enter a cgroup. The caller closes it.
type Join struct {
	// DirFD is the cgroup's directory in the cgroup2 hierarchy, O_PATH, for
	// CLONE_INTO_CGROUP (clone3(2), Linux 5.7); nil in Legacy mode and ByWriting.
	DirFD *os.File
	// Tasks are the v1 hierarchies' tasks files, open for writing: the thread that clones writes "0" to each first, and
	// the child is born in the thread's cgroups. To move just the calling thread takes no lock; to move a process waits for an RCU grace
	// period, 5 to 15 ms here (cgroup_procs_write_start, kernel/cgroup/cgroup.c). The thread stays where it went: it should end.
	// It may be as unprivileged as it likes: the kernel checks the opener's credentials.
	Tasks []*os.File
	// Procs is cgroup.procs of the cgroup2 hierarchy, open for writing, to which the process itself writes "0" (so may any of its
	// threads: all go along); nil in Legacy mode and ByBirth. Who writes may be unprivileged, as above.
	Procs *os.File
}

// Close closes all files.
func (j *Join) Close() error {
	var errs []error
	for _, f := range append([]*os.File{j.DirFD, j.Procs}, j.Tasks...) {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// Join opens what a process needs to get into the cgroup in the way of e.
func (c *Cgroup) Join(e Entry) (*Join, error) {
	d := c.driver
	j := &Join{}
	for tree := range d.trees {
		home := c
		if !slices.Contains(c.trees, tree) {
			home = c.outer
		}
		name, flags := home.file("tasks"), unix.O_WRONLY
		switch v2 := d.trees[tree].v2; {
		case v2 && e == ByWriting:
			name = home.file("cgroup.procs")
		case v2:
			name, flags = home.path, unix.O_PATH|unix.O_DIRECTORY
		}
		f, err := d.kernel.open(tree, name, flags)
		if err != nil {
			return nil, errors.Join(c.errorf("join", "", err), j.Close())
		}
		switch v2 := d.trees[tree].v2; {
		case v2 && e == ByWriting:
			j.Procs = f
		case v2:
			j.DirFD = f
		default:
			j.Tasks = append(j.Tasks, f)
		}
	}
	return j, nil
}

// Exec makes a child cgroup for one exec'd process and its descendants, and opens what
// the process needs to get into it in the way of how. It exists in the tracking hierarchy alone, without controllers,
// so that it can be killed as one while the container's limits hold.
//
// Undo: Kill and Remove of the handle; Remove of the container's does it too.
func (c *Cgroup) Exec(name string, how Entry) (*Cgroup, *Join, error) {
	if name == "" || name == "." || name == ".." || len(name) > unix.NAME_MAX || strings.ContainsAny(name, "/\n\x00") {
		return nil, nil, &Error{Op: "create exec", Path: c.path, Kind: ErrInvalid, Step: fmt.Sprintf("name %q", name)}
	}
	d := c.driver
	tree := d.tracker()
	e := &Cgroup{driver: d, path: path.Join(c.path, name), trees: []int{tree}, outer: c}
	if err := d.kernel.mkdir(tree, e.path); err != nil {
		return nil, nil, e.errorf("create exec", "", err)
	}
	j, err := e.Join(how)
	if err != nil {
		return nil, nil, errors.Join(err, d.kernel.rmdir(tree, e.path))
	}
	return e, j, nil
}

// Procs lists the processes in the cgroup and all below it, as the tracking hierarchy has them.
// A process of a PID namespace that is not below ours is 0.
func (c *Cgroup) Procs() ([]int, error) {
	pids, err := c.driver.kernel.procs(c.driver.tracker(), c.path)
	if err != nil {
		return nil, c.errorf("list processes of", "", err)
	}
	return pids, nil
}

// Remove removes the cgroup and all below it, in all hierarchies. It is idempotent.
// Processes left in it are an ErrBusy that names them: Kill first.
//
// rmdir of a cgroup cannot be cancelled: ctx is looked at before each hierarchy.
func (c *Cgroup) Remove(ctx context.Context) error {
	d := c.driver
	release, err := d.claims.remove(ctx, c.path)
	if err != nil {
		return c.errorf("remove", "wait for who kills it", err)
	}
	defer release()
	var errs []error
	for _, tree := range c.trees {
		if err := ctx.Err(); err != nil {
			errs = append(errs, c.errorf("remove", "", err))
			break
		}
		err := d.kernel.rmdir(tree, c.path)
		if errors.Is(err, unix.EBUSY) {
			if err = d.kernel.removeBelow(tree, c.path); err == nil {
				err = d.kernel.rmdir(tree, c.path)
			}
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, c.errorf("remove", d.left(tree, c.path), err))
		}
	}
	return errors.Join(errs...)
}

// BindSources returns what is to appear below a container's /sys/fs/cgroup on v1 and hybrid nodes:
// for each hierarchy and each link to one its name there, and the absolute host path
// of this cgroup in it. On v2 it is empty: there the container mounts cgroup2 itself.
func (c *Cgroup) BindSources() map[string]string {
	d := c.driver
	if d.mode == Unified {
		return nil
	}
	m := map[string]string{}
	for _, h := range d.trees {
		source := filepath.Join(h.dir, c.path)
		m[h.name] = source
		for _, a := range h.aliases {
			m[a] = source
		}
	}
	return m
}

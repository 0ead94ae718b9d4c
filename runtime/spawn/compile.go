package spawn

import (
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/caps"
	"github.com/crisp-cri/crisp/runtime/initproto"
)

// compiled is a container as a value: the plan for crisp-init, what the daemon must
// open for it, and what the caller hands over. The message's descriptors are the sources', in
// order, then the donated ones.
type compiled struct {
	plan    initproto.Container
	sources []source
	donated []int
}

// nullAttr are the attributes of a mount of the host's null device that a container gets to see: see openNull.
const nullAttr = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC

// source is a mount to be made from a path of the host.
type source struct {
	path      string
	mount     int  // index into plan.Mounts; -1: the null device for masks
	recursive bool // rbind
	attr      uint64
	// attrBelow is for everything below as well (KEP-3857), AT_RECURSIVE.
	attrBelow uint64
	// file is the mount itself, made before; the caller's.
	file           *os.File
	propagation    uint64 // MS_PRIVATE, MS_SLAVE, MS_SHARED
	propagateBelow bool   // rprivate, rslave, rshared
	idmap          bool   // to the pod's user namespace
	// device is a node to be made; there is no path then. made is its detached mount.
	device *initproto.Device
	made   int
}

// flagAttr are mount options that mount_setattr(2) knows.
var flagAttr = map[string]uint64{
	"ro": unix.MOUNT_ATTR_RDONLY, "nosuid": unix.MOUNT_ATTR_NOSUID, "nodev": unix.MOUNT_ATTR_NODEV,
	"noexec": unix.MOUNT_ATTR_NOEXEC, "noatime": unix.MOUNT_ATTR_NOATIME, "strictatime": unix.MOUNT_ATTR_STRICTATIME,
	"nodiratime": unix.MOUNT_ATTR_NODIRATIME,
}

// belowAttr are those of them that OCI knows for all mounts below as well (config-linux.md "Linux mount options").
var belowAttr = map[string]uint64{
	"rro": unix.MOUNT_ATTR_RDONLY, "rnosuid": unix.MOUNT_ATTR_NOSUID, "rnodev": unix.MOUNT_ATTR_NODEV, "rnoexec": unix.MOUNT_ATTR_NOEXEC,
}

// propagationOf are the propagation options of mount(8).
var propagationOf = map[string]uint64{
	"private": unix.MS_PRIVATE, "slave": unix.MS_SLAVE, "shared": unix.MS_SHARED,
}

// ignoredOption: defaults, or without meaning for a new instance.
var ignoredOption = map[string]bool{"rw": true, "suid": true, "dev": true, "exec": true, "relatime": true, "bind": true, "newinstance": true, "defaults": true}

var kindOf = map[string]initproto.MountKind{
	"proc": initproto.MountProc, "sysfs": initproto.MountSysfs, "tmpfs": initproto.MountTmpfs,
	"devpts": initproto.MountDevpts, "mqueue": initproto.MountMqueue,
}

// ImageSource begins the Mount.Source of an image: a key of ContainerArgs.Images.
const ImageSource = "crisp:image:"

// ShmSource is the Mount.Source of the pod-wide /dev/shm.
const ShmSource = "crisp:shm"

// compile turns a specification into a plan. It is pure: no system call but for the descriptors' numbers. userns: the
// pod has a user namespace of its own.
func compile(a *ContainerArgs, userns bool) (*compiled, error) {
	s := a.Spec
	if s == nil || s.Process == nil || s.Root == nil || s.Linux == nil {
		return nil, fmt.Errorf("%w: process, root and linux must be there", ErrInvalid)
	}
	c := &compiled{}
	p, err := compileProcess(s.Process, a.Seccomp, a.SeccompFlags)
	if err != nil {
		return nil, err
	}
	p.Keyring = "_ses." + a.ID
	h, err := compileHooks(a, userns)
	if err != nil {
		return nil, err
	}
	c.plan = initproto.Container{
		ID: a.ID, TargetID: a.TargetID, Process: *p,
		RootReadonly: s.Root.Readonly,
		NullFD:       -1, CgroupFD: -1, TasksFD: -1, ProcsFD: -1, LogFD: -1,
		Masked: s.Linux.MaskedPaths, Readonly: s.Linux.ReadonlyPaths,
		Stdin: a.Stdin, StdinOnce: a.StdinOnce,
		Hooks: *h,
	}
	switch a.PID {
	case PIDPrivate:
		c.plan.PID = initproto.PIDNew
	case PIDPod:
		c.plan.PID = initproto.PIDReaper
	case PIDHost:
		c.plan.PID = initproto.PIDHost
	case PIDTarget:
		c.plan.PID = initproto.PIDTarget
	default:
		return nil, fmt.Errorf("%w: PID mode %d", ErrInvalid, a.PID)
	}
	for _, ns := range s.Linux.Namespaces {
		if ns.Type == specs.CgroupNamespace && ns.Path == "" {
			c.plan.NewCgroupNS = true
		}
	}
	ownDev := false
	images := maps.Clone(a.Images)
	for i := range s.Mounts {
		m := &s.Mounts[i]
		if !path.IsAbs(m.Destination) || strings.ContainsRune(m.Destination, 0) {
			return nil, fmt.Errorf("%w: mount destination %q must be an absolute path", ErrInvalid, m.Destination)
		}
		if path.Clean(m.Destination) == "/dev" {
			ownDev = m.Type == "tmpfs"
		}
		if err := c.mount(m, a.CgroupMounts, images); err != nil {
			return nil, fmt.Errorf("mount %s: %w", m.Destination, err)
		}
	}
	label(c.plan.Mounts, s.Linux.MountLabel)
	// A /dev that is somebody's directory is left as it is (CVE-2025-31133 class).
	if ownDev {
		c.plan.Links = append(c.plan.Links, [][2]string{
			{"/proc/self/fd", "/dev/fd"}, {"/proc/self/fd/0", "/dev/stdin"}, {"/proc/self/fd/1", "/dev/stdout"},
			{"/proc/self/fd/2", "/dev/stderr"}, {"/proc/kcore", "/dev/core"}, {"pts/ptmx", "/dev/ptmx"},
		}...)
	}
	for i := range s.Linux.Devices {
		d := &s.Linux.Devices[i]
		if !ownDev && strings.HasPrefix(path.Clean(d.Path), "/dev/") {
			continue
		}
		node, err := compileDevice(d)
		if err != nil {
			return nil, err
		}
		if userns { // mknod(2) is the host's root's alone
			c.bind(initproto.Mount{Target: node.Path}, source{device: &node, idmap: true, propagation: unix.MS_PRIVATE})
			continue
		}
		c.plan.Devices = append(c.plan.Devices, node)
	}
	if len(c.plan.Masked) > 0 {
		c.plan.NullFD = len(c.sources)
		c.sources = append(c.sources, source{path: os.DevNull, mount: -1, attr: nullAttr, propagation: unix.MS_PRIVATE})
	}
	donate := func(f *os.File) int {
		if f == nil {
			return -1
		}
		c.donated = append(c.donated, int(f.Fd()))
		return len(c.sources) + len(c.donated) - 1
	}
	if a.Rootfs == nil {
		return nil, fmt.Errorf("%w: no root file system", ErrInvalid)
	}
	c.plan.RootFD = donate(a.Rootfs)
	c.plan.CgroupFD = donate(a.CgroupDir)
	for i, f := range a.CgroupTasks {
		if n := donate(f); i == 0 {
			c.plan.TasksFD = n
		}
	}
	c.plan.Tasks = len(a.CgroupTasks)
	c.plan.ProcsFD = donate(a.CgroupProcs)
	c.plan.LogFD = donate(a.Log)
	return c, nil
}

// mount adds the step (or, for v1 cgroups, the steps) of one mount.
func (c *compiled) mount(m *specs.Mount, cgroups map[string]string, images map[string]*os.File) error {
	step := initproto.Mount{Target: path.Clean(m.Destination), FD: -1}
	src := source{path: m.Source, propagation: unix.MS_PRIVATE, propagateBelow: true}
	bind := m.Type == "bind"
	src.idmap = len(m.UIDMappings) > 0
	for _, o := range m.Options {
		key, value, hasValue := strings.Cut(o, "=")
		if below := strings.TrimPrefix(o, "r"); propagationOf[o] != 0 || propagationOf[below] != 0 {
			src.propagation, src.propagateBelow = propagationOf[below], below != o
			continue
		}
		switch {
		case o == "rbind":
			bind, src.recursive = true, true
		case o == "bind":
			bind = true
		case belowAttr[o] != 0:
			src.attrBelow |= belowAttr[o]
		case flagAttr[o] != 0:
			step.Attr |= flagAttr[o]
		case ignoredOption[o]:
		case hasValue && !bind:
			step.Data = append(step.Data, [2]string{key, value})
		default:
			return fmt.Errorf("%w: unknown option %q", ErrInvalid, o)
		}
	}
	switch {
	case m.Source == ShmSource:
		step.Kind = initproto.MountShm
	case bind && strings.HasPrefix(m.Source, ImageSource):
		if src.file = images[m.Source]; src.file == nil {
			return fmt.Errorf("%w: no image was given for source %q", ErrInvalid, m.Source)
		}
		delete(images, m.Source) // a mount has one place
		c.bind(step, src)
		return nil
	case bind:
		if !path.IsAbs(m.Source) {
			return fmt.Errorf("%w: source %q must be an absolute path", ErrInvalid, m.Source)
		}
		if step.Target == "/" {
			return fmt.Errorf("%w: cannot mount over the root file system", ErrInvalid)
		}
		c.bind(step, src)
		return nil
	case m.Type == "cgroup":
		c.cgroup(step, cgroups)
		return nil
	case kindOf[m.Type] != 0:
		step.Kind = kindOf[m.Type]
	default:
		return fmt.Errorf("%w: unknown type %q", ErrInvalid, m.Type)
	}
	step.Attr |= src.attrBelow // nothing is below a new file system
	step.Strict = true
	if step.Kind == initproto.MountTmpfs && step.Attr&unix.MOUNT_ATTR_RDONLY != 0 {
		step.Attr &^= unix.MOUNT_ATTR_RDONLY
		step.ReadonlyAfter = true
	}
	c.plan.Mounts = append(c.plan.Mounts, step)
	return nil
}

// label gives new file systems that take one an SELinux label: procfs, sysfs and cgroup2 have the policy's.
func label(mounts []initproto.Mount, label string) {
	if label == "" {
		return
	}
	for i := range mounts {
		switch m := &mounts[i]; m.Kind {
		case initproto.MountTmpfs, initproto.MountDevpts, initproto.MountMqueue:
			m.Data = append(m.Data, [2]string{"context", label})
		}
	}
}

// bind adds a step whose mount the daemon opens.
func (c *compiled) bind(step initproto.Mount, src source) {
	step.Kind, step.FD = initproto.MountFD, len(c.sources)
	src.mount, src.attr = len(c.plan.Mounts), step.Attr
	c.sources = append(c.sources, src)
	c.plan.Mounts = append(c.plan.Mounts, step)
}

// cgroup adds /sys/fs/cgroup: on v2 one mount of the container's own cgroup namespace; on v1 and
// hybrid hosts a tmpfs with the container's own sub-tree of each hierarchy in it, so that there is nothing of other
// cgroups to see and no file system to remount (CVE-2022-0492).
func (c *compiled) cgroup(step initproto.Mount, hierarchies map[string]string) {
	step.Strict = true
	if len(hierarchies) == 0 {
		step.Kind = initproto.MountCgroup2
		c.plan.Mounts = append(c.plan.Mounts, step)
		return
	}
	attr := step.Attr
	dir := step
	dir.Kind, dir.Data = initproto.MountTmpfs, [][2]string{{"mode", "755"}, {"size", "64k"}}
	if dir.Attr&unix.MOUNT_ATTR_RDONLY != 0 {
		dir.Attr &^= unix.MOUNT_ATTR_RDONLY
		dir.ReadonlyAfter = true
	}
	c.plan.Mounts = append(c.plan.Mounts, dir)
	for _, name := range slices.Sorted(maps.Keys(hierarchies)) {
		c.bind(initproto.Mount{Target: step.Target + "/" + name, Attr: attr, Strict: true},
			source{path: hierarchies[name], propagation: unix.MS_PRIVATE})
		if parts := strings.Split(name, ","); len(parts) > 1 { // cpu,cpuacct: programs look for cpu
			for _, p := range parts {
				c.plan.Links = append(c.plan.Links, [2]string{name, step.Target + "/" + p})
			}
		}
	}
}

func compileDevice(d *specs.LinuxDevice) (initproto.Device, error) {
	if !path.IsAbs(d.Path) || path.Clean(d.Path) == "/" {
		return initproto.Device{}, fmt.Errorf("%w: device path %q must be absolute", ErrInvalid, d.Path)
	}
	node := initproto.Device{Path: path.Clean(d.Path), Major: uint32(d.Major), Minor: uint32(d.Minor), Mode: 0o666}
	if d.FileMode != nil {
		node.Mode = uint32(*d.FileMode) & 0o7777
	}
	switch d.Type {
	case "c", "u":
		node.Mode |= unix.S_IFCHR
	case "b":
		node.Mode |= unix.S_IFBLK
	case "p":
		node.Mode |= unix.S_IFIFO
	default:
		return initproto.Device{}, fmt.Errorf("%w: device %s has unknown type %q", ErrInvalid, d.Path, d.Type)
	}
	if d.UID != nil {
		node.UID = *d.UID
	}
	if d.GID != nil {
		node.GID = *d.GID
	}
	return node, nil
}

// rlimitOf are the resources of getrlimit(2), as the OCI specification names them.
var rlimitOf = map[string]uint32{
	"RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_DATA": unix.RLIMIT_DATA,
	"RLIMIT_STACK": unix.RLIMIT_STACK, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_RSS": unix.RLIMIT_RSS,
	"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE, "RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK,
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
	"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME": unix.RLIMIT_RTTIME,
}

const defaultUmask = 0o022

func compileProcess(p *specs.Process, seccomp []byte, flags uint32) (*initproto.Process, error) {
	if len(p.Args) == 0 || p.Args[0] == "" {
		return nil, fmt.Errorf("%w: no command", ErrInvalid)
	}
	for _, s := range append(slices.Clone(p.Args), p.Env...) {
		if strings.ContainsRune(s, 0) {
			return nil, fmt.Errorf("%w: argument or environment with a NUL byte", ErrInvalid)
		}
	}
	cwd := p.Cwd
	if cwd == "" {
		cwd = "/"
	}
	if strings.ContainsAny(p.ApparmorProfile+p.SelinuxLabel, "\x00\n") {
		return nil, fmt.Errorf("%w: AppArmor profile %q or SELinux label %q", ErrInvalid, p.ApparmorProfile, p.SelinuxLabel)
	}
	if !path.IsAbs(cwd) {
		return nil, fmt.Errorf("%w: working directory %q must be absolute", ErrInvalid, cwd)
	}
	out := &initproto.Process{
		Args: p.Args, Env: p.Env, Cwd: cwd,
		UID: p.User.UID, GID: p.User.GID, Groups: p.User.AdditionalGids, Umask: defaultUmask,
		NoNewPrivs: p.NoNewPrivileges, Seccomp: seccomp, SeccompFlags: flags, Terminal: p.Terminal,
		AppArmor: p.ApparmorProfile, SELinux: p.SelinuxLabel,
	}
	if p.User.Umask != nil {
		out.Umask = *p.User.Umask
	}
	if p.OOMScoreAdj != nil {
		out.SetOOMScoreAdj, out.OOMScoreAdj = true, int64(*p.OOMScoreAdj)
	}
	for _, l := range p.Rlimits {
		r, ok := rlimitOf[l.Type]
		if !ok {
			return nil, fmt.Errorf("%w: unknown rlimit %q", ErrInvalid, l.Type)
		}
		out.Rlimits = append(out.Rlimits, initproto.Rlimit{Resource: r, Soft: l.Soft, Hard: l.Hard})
	}
	if c := p.Capabilities; c != nil {
		for _, set := range []struct {
			names []string
			mask  *uint64
		}{
			{c.Bounding, &out.Bounding}, {c.Effective, &out.Effective}, {c.Permitted, &out.Permitted},
			{c.Inheritable, &out.Inheritable}, {c.Ambient, &out.Ambient},
		} {
			m, err := caps.Mask(set.names)
			if err != nil {
				return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
			}
			*set.mask = m
		}
	}
	return out, nil
}

// compileExec is compile for an exec'd process. shared is the null device, which is opened anew for streams that are not
// wanted; closeNull closes that.
func compileExec(a *ExecArgs, shared *os.File) (x *initproto.Exec, fds []int, closeNull func(), err error) {
	p, err := compileProcess(a.Process, a.Seccomp, a.SeccompFlags)
	if err != nil {
		return nil, nil, nil, err
	}
	x = &initproto.Exec{ContainerID: a.ContainerID, ExecID: a.ExecID, Process: *p, CgroupFD: -1, TasksFD: -1, Tasks: len(a.CgroupTasks), ProcsFD: -1}
	null, err := reopen(int(shared.Fd()))
	if err != nil {
		return nil, nil, nil, err
	}
	for _, f := range []*os.File{a.Stdin, a.Stdout, a.Stderr} {
		if f == nil {
			f = null
		}
		fds = append(fds, int(f.Fd()))
	}
	if a.CgroupDir != nil {
		x.CgroupFD = len(fds)
		fds = append(fds, int(a.CgroupDir.Fd()))
	}
	if len(a.CgroupTasks) > 0 {
		x.TasksFD = len(fds)
		for _, f := range a.CgroupTasks {
			fds = append(fds, int(f.Fd()))
		}
	}
	if a.CgroupProcs != nil {
		x.ProcsFD = len(fds)
		fds = append(fds, int(a.CgroupProcs.Fd()))
	}
	return x, fds, func() { null.Close() }, nil
}

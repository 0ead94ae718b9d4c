package initproto

// Process is how a program is run, for a container's first process and for exec'd ones.
type Process struct {
	Args []string
	Env  []string // "KEY=value", bytes as they came
	Cwd  string

	UID, GID uint32
	Groups   []uint32
	Umask    uint32

	// Capability sets as bit masks, capabilities(7).
	Bounding, Effective, Permitted, Inheritable, Ambient uint64

	NoNewPrivs   bool
	Seccomp      []byte // struct sock_filter array, native byte order; empty: none
	SeccompFlags uint32

	OOMScoreAdj    int64
	SetOOMScoreAdj bool
	Rlimits        []Rlimit
	Terminal       bool
	// Keyring is the name of the session keyring to make and join, session-keyring(7).
	Keyring string

	// AppArmor is the profile to change to at execve, SELinux the label; "": none.
	AppArmor, SELinux string
}

// Hook is a program that runs at one point of a start (OCI runtime-spec, config.md "POSIX-platform Hooks").
type Hook struct {
	Path    string // absolute
	Args    []string
	Env     []string
	Timeout int64 // seconds; 0: no limit
}

// Hooks are what a container's init does for hooks.
type Hooks struct {
	// View: before pivot_root(2) the init shows itself the host's file tree, says AtHooks and waits. Two descriptors more come
	// with Run: a detached copy of the host's mount tree, and the text of config.json.
	View bool
	// Bundle is the container's bundle in that tree; Hide, above it, is covered by a directory that has nothing
	// but the bundle. Absolute and clean.
	Bundle, Hide    string
	State           string // the OCI state in JSON after "status" and "pid": `"id":"…",…}`
	CreateContainer []Hook // run in the host's file tree
	StartContainer  []Hook // run in the container's
}

// Rlimit is one setrlimit(2).
type Rlimit struct {
	Resource   uint32
	Soft, Hard uint64
}

// MountKind says what a mount is made from.
type MountKind uint8

const (
	MountFD      MountKind = iota + 1 // a detached mount that came as a descriptor
	MountProc                         // procfs of the container's PID namespace
	MountSysfs                        // sysfs of the pod's network namespace
	MountTmpfs                        //
	MountDevpts                       //
	MountMqueue                       // of the pod's IPC namespace
	MountCgroup2                      // of the container's cgroup namespace
	MountShm                          // the pod-wide /dev/shm
)

// Mount is one step of the mount plan. Steps are run in order; each target is
// resolved inside the container's root when its turn comes.
type Mount struct {
	Kind   MountKind
	Target string // absolute inside the container
	FD     int    // MountFD: index into the message's descriptors
	// Attr, Clear: MOUNT_ATTR_* set and cleared by mount_setattr(2). For MountFD the
	// daemon has set them already.
	Attr uint64
	Data [][2]string // fsconfig(2) strings; an empty value is a flag
	// File: the target is (made as) a file, not a directory.
	File bool
	// Strict: no component of the target may be a symbolic link (CVE-2019-19921 class).
	Strict bool
	// ReadonlyAfter: set read-only once all mounts are in place (a tmpfs that gets mount points first).
	ReadonlyAfter bool
}

// Device is one node to make below the root with mknod(2), or to bind when MountFD ≥ 0.
type Device struct {
	Path     string // absolute inside the container
	Mode     uint32 // S_IFCHR|S_IFBLK|S_IFIFO and permission bits
	Major    uint32
	Minor    uint32
	UID, GID uint32
}

// PIDMode says in which PID namespace the process is born.
type PIDMode uint8

const (
	PIDNew    PIDMode = iota // a new one
	PIDReaper                // the pod's
	PIDHost                  // the pod init's own
	PIDTarget                // that of container TargetID
)

// Joins says whether others are in that namespace already.
func (m PIDMode) Joins() bool { return m == PIDReaper || m == PIDTarget }

// Container is the body of TypeCreate and, together with the same
// descriptors, of TypeRun. Indices count the message's descriptors.
type Container struct {
	ID       string
	PID      PIDMode
	TargetID string
	Process  Process

	// NewCgroupNS: unshare a cgroup namespace once inside the cgroup.
	NewCgroupNS bool

	RootFD       int // detached mount of the root file system
	RootReadonly bool
	Mounts       []Mount
	Devices      []Device
	Links        [][2]string // symbolic links to make: target, path
	NullFD       int         // detached mount of a verified /dev/null, for masking files; -1: none, and nothing is masked
	Masked       []string
	Readonly     []string

	CgroupFD int // directory to be born in; -1: none
	TasksFD  int // first of Tasks consecutive v1 tasks files, which the cloning thread enters; -1: none
	Tasks    int
	ProcsFD  int // cgroup.procs of the cgroup2 hierarchy, which the process enters by itself; -1: it was born there
	LogFD    int // -1: output is dropped

	Stdin     bool
	StdinOnce bool

	Hooks Hooks
}

// Exec is the body of TypeExec. Descriptors: stdin, stdout, stderr (three), then as the
// indices say.
type Exec struct {
	ContainerID string
	ExecID      string
	Process     Process
	CgroupFD    int
	TasksFD     int
	Tasks       int
	ProcsFD     int
}

func (p *Process) encode(e *encoder) {
	e.strings(p.Args)
	e.strings(p.Env)
	e.string(p.Cwd)
	e.uint(uint64(p.UID))
	e.uint(uint64(p.GID))
	list(e, p.Groups, func(e *encoder, g uint32) { e.uint(uint64(g)) })
	e.uint(uint64(p.Umask))
	for _, m := range []uint64{p.Bounding, p.Effective, p.Permitted, p.Inheritable, p.Ambient} {
		e.uint(m)
	}
	e.bool(p.NoNewPrivs)
	e.bytes(p.Seccomp)
	e.uint(uint64(p.SeccompFlags))
	e.int(p.OOMScoreAdj)
	e.bool(p.SetOOMScoreAdj)
	list(e, p.Rlimits, func(e *encoder, r Rlimit) { e.uint(uint64(r.Resource)); e.uint(r.Soft); e.uint(r.Hard) })
	e.bool(p.Terminal)
	e.string(p.Keyring)
	e.string(p.AppArmor)
	e.string(p.SELinux)
}

func (p *Process) decode(d *decoder) {
	p.Args = d.strings()
	p.Env = d.strings()
	p.Cwd = d.string()
	p.UID, p.GID = uint32(d.uint()), uint32(d.uint())
	p.Groups = unlist(d, func(d *decoder) uint32 { return uint32(d.uint()) })
	p.Umask = uint32(d.uint())
	for _, m := range []*uint64{&p.Bounding, &p.Effective, &p.Permitted, &p.Inheritable, &p.Ambient} {
		*m = d.uint()
	}
	p.NoNewPrivs = d.bool()
	p.Seccomp = d.bytes()
	p.SeccompFlags = uint32(d.uint())
	p.OOMScoreAdj = d.int()
	p.SetOOMScoreAdj = d.bool()
	p.Rlimits = unlist(d, func(d *decoder) Rlimit {
		return Rlimit{Resource: uint32(d.uint()), Soft: d.uint(), Hard: d.uint()}
	})
	p.Terminal = d.bool()
	p.Keyring = d.string()
	p.AppArmor, p.SELinux = d.string(), d.string()
}

func (h *Hooks) encode(e *encoder) {
	e.bool(h.View)
	e.string(h.Bundle)
	e.string(h.Hide)
	e.string(h.State)
	for _, l := range [][]Hook{h.CreateContainer, h.StartContainer} {
		list(e, l, func(e *encoder, k Hook) {
			e.string(k.Path)
			e.strings(k.Args)
			e.strings(k.Env)
			e.int(k.Timeout)
		})
	}
}

func (h *Hooks) decode(d *decoder) {
	h.View = d.bool()
	h.Bundle, h.Hide, h.State = d.string(), d.string(), d.string()
	for _, l := range []*[]Hook{&h.CreateContainer, &h.StartContainer} {
		*l = unlist(d, func(d *decoder) Hook {
			return Hook{Path: d.string(), Args: d.strings(), Env: d.strings(), Timeout: d.int()}
		})
	}
}

func pairs(e *encoder, l [][2]string) {
	list(e, l, func(e *encoder, kv [2]string) { e.string(kv[0]); e.string(kv[1]) })
}

func unpairs(d *decoder) [][2]string {
	return unlist(d, func(d *decoder) [2]string { return [2]string{d.string(), d.string()} })
}

// Encode returns the body.
func (c *Container) Encode() []byte {
	e := &encoder{}
	e.string(c.ID)
	e.uint(uint64(c.PID))
	e.string(c.TargetID)
	c.Process.encode(e)
	e.bool(c.NewCgroupNS)
	e.int(int64(c.RootFD))
	e.bool(c.RootReadonly)
	list(e, c.Mounts, func(e *encoder, m Mount) {
		e.uint(uint64(m.Kind))
		e.string(m.Target)
		e.int(int64(m.FD))
		e.uint(m.Attr)
		pairs(e, m.Data)
		e.bool(m.File)
		e.bool(m.Strict)
		e.bool(m.ReadonlyAfter)
	})
	list(e, c.Devices, func(e *encoder, v Device) {
		e.string(v.Path)
		e.uint(uint64(v.Mode))
		e.uint(uint64(v.Major))
		e.uint(uint64(v.Minor))
		e.uint(uint64(v.UID))
		e.uint(uint64(v.GID))
	})
	pairs(e, c.Links)
	e.int(int64(c.NullFD))
	e.strings(c.Masked)
	e.strings(c.Readonly)
	e.int(int64(c.CgroupFD))
	e.int(int64(c.TasksFD))
	e.uint(uint64(c.Tasks))
	e.int(int64(c.ProcsFD))
	e.int(int64(c.LogFD))
	e.bool(c.Stdin)
	e.bool(c.StdinOnce)
	c.Hooks.encode(e)
	return e.b
}

// DecodeContainer is the inverse of Encode. nfds is how many descriptors came with
// the message: indices beyond them are malformed.
func DecodeContainer(b []byte, nfds int) (*Container, error) {
	d := &decoder{b: b}
	c := &Container{ID: d.string(), PID: PIDMode(d.uint()), TargetID: d.string()}
	c.Process.decode(d)
	c.NewCgroupNS = d.bool()
	c.RootFD = int(d.int())
	c.RootReadonly = d.bool()
	c.Mounts = unlist(d, func(d *decoder) Mount {
		return Mount{
			Kind: MountKind(d.uint()), Target: d.string(), FD: int(d.int()), Attr: d.uint(),
			Data: unpairs(d), File: d.bool(), Strict: d.bool(), ReadonlyAfter: d.bool(),
		}
	})
	c.Devices = unlist(d, func(d *decoder) Device {
		return Device{
			Path: d.string(), Mode: uint32(d.uint()), Major: uint32(d.uint()), Minor: uint32(d.uint()),
			UID: uint32(d.uint()), GID: uint32(d.uint()),
		}
	})
	c.Links = unpairs(d)
	c.NullFD = int(d.int())
	c.Masked = d.strings()
	c.Readonly = d.strings()
	c.CgroupFD, c.TasksFD, c.Tasks, c.ProcsFD = int(d.int()), int(d.int()), int(d.uint()), int(d.int())
	c.LogFD = int(d.int())
	c.Stdin = d.bool()
	c.StdinOnce = d.bool()
	c.Hooks.decode(d)
	if err := d.end(); err != nil {
		return nil, err
	}
	for _, m := range c.Mounts {
		if m.Kind == MountFD && !within(m.FD, 1, nfds) {
			return nil, ErrMalformed
		}
	}
	if len(c.Masked) > 0 && c.NullFD < 0 {
		return nil, ErrMalformed
	}
	if !within(c.RootFD, 1, nfds) || !optional(c.NullFD, nfds) || !optional(c.CgroupFD, nfds) ||
		!optional(c.LogFD, nfds) || !optional(c.ProcsFD, nfds) || c.Tasks > 0 && !within(c.TasksFD, c.Tasks, nfds) {
		return nil, ErrMalformed
	}
	return c, nil
}

// Encode returns the body.
func (x *Exec) Encode() []byte {
	e := &encoder{}
	e.string(x.ContainerID)
	e.string(x.ExecID)
	x.Process.encode(e)
	e.int(int64(x.CgroupFD))
	e.int(int64(x.TasksFD))
	e.uint(uint64(x.Tasks))
	e.int(int64(x.ProcsFD))
	return e.b
}

// DecodeExec is the inverse of Encode; nfds as in DecodeContainer.
func DecodeExec(b []byte, nfds int) (*Exec, error) {
	d := &decoder{b: b}
	x := &Exec{ContainerID: d.string(), ExecID: d.string()}
	x.Process.decode(d)
	x.CgroupFD, x.TasksFD, x.Tasks, x.ProcsFD = int(d.int()), int(d.int()), int(d.uint()), int(d.int())
	if err := d.end(); err != nil {
		return nil, err
	}
	if nfds < 3 || !optional(x.CgroupFD, nfds) || !optional(x.ProcsFD, nfds) || x.Tasks > 0 && !within(x.TasksFD, x.Tasks, nfds) {
		return nil, ErrMalformed
	}
	return x, nil
}

func within(first, n, of int) bool { return first >= 0 && n >= 0 && n <= of && first <= of-n }

func optional(i, of int) bool { return i == -1 || within(i, 1, of) }

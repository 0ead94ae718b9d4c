// Package spawn starts and talks to pods' init processes (crisp-init).
//
// A [Spawner] holds what all pods of this daemon share: the sealed copy of the
// crisp-init binary and the base mount namespace. [Spawner.StartPod] clones a
// pod init into the pod's namespaces; the [Pod] it returns is the daemon's end
// of the control socket. After a restart of the daemon [Spawner.Attach] finds a
// living pod init again by its [Handle].
//
// Containers are children of the pod init: [Pod.Create] hands it everything a
// container needs (mounts as file descriptors, the compiled process
// settings), [Pod.Start] makes it clone the container's init, [Pod.Exec] runs one more
// process in a container.
//
// The package does not know Kubernetes, records or networks; podsandbox does.
package spawn

import (
	"errors"
	"os"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Sentinels.
var (
	// ErrGone is returned when the pod init is not alive any more: by Attach,
	// and by every call on a Pod whose init died.
	ErrGone = errors.New("pod init is gone")
	// ErrNotFound is returned for a container or exec the pod init does not hold.
	ErrNotFound = errors.New("not held by the pod init")
	// ErrState is returned for a container in the wrong state (start of a running one, exec in a stopped one).
	ErrState = errors.New("container is in the wrong state")
	// ErrInvalid is returned for a specification that cannot be compiled.
	ErrInvalid = errors.New("invalid container specification")
	// ErrUnsupported is returned for something this kernel or crisp lacks.
	ErrUnsupported = errors.New("not supported")
)

// A StartError says that a container's (or exec'd) process could not be
// brought to its own first instruction. Nothing of it is left running.
type StartError struct {
	Step string // "mount /proc", "set user 1000", "exec /bin/x", …
	Err  error  // usually a syscall.Errno
}

func (e *StartError) Error() string { return e.Step + ": " + e.Err.Error() }
func (e *StartError) Unwrap() error { return e.Err }

// PodArgs describes a pod's init.
type PodArgs struct {
	ID    string // 64 hex digits
	Title string // "namespace/name", shown by ps

	HostNetwork bool // share the host's network namespace (and its UTS namespace)
	HostIPC     bool
	SharedPID   bool              // pid: POD – start a reaper as PID 1 of a pod-wide PID namespace
	Hostname    string            // ignored with HostNetwork
	Sysctls     map[string]string // validated by the caller: only namespaced ones; written in the pod's namespaces
	ShmSize     int64             // bytes of the pod-wide /dev/shm; 0: 64 MiB
	Label       string            // SELinux label of its files; "": the policy's for a tmpfs

	// Userns makes a user namespace for the pod, which owns all its other namespaces; nil: the host's. Needs Linux 6.3
	// (id-mapped tmpfs), and file systems that can be id-mapped.
	Userns *IDMap

	// Namespaces are those that Prepare has begun to make with these arguments; StartPod ends them. nil: the init is cloned with
	// namespaces of its own.
	Namespaces *Namespaces

	// Cgroup to be born in: DirFD for CLONE_INTO_CGROUP (nil on pure v1) and
	// the v1 hierarchies' tasks files, which the cloning thread enters first. Owned by the caller.
	CgroupDir   *os.File
	CgroupTasks []*os.File

	// RunDir is the pod's per-boot directory (0700, exists): StartPod makes
	// init.sock and exits.journal in it.
	RunDir string
}

// IDMap maps the ids 0 … Size−1 of a user namespace to UID … and GID … of the host, user_namespaces(7).
type IDMap struct {
	UID  uint32 `json:"uid"`
	GID  uint32 `json:"gid"`
	Size uint32 `json:"size"`
}

// Handle finds a pod init again. It is stored in the pod's record.
type Handle struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"startTime"` // field 22 of /proc/PID/stat, clock ticks
	BootID    string `json:"bootID"`
	RunDir    string `json:"runDir"`
	Userns    bool   `json:"userns,omitempty"` // it has a user namespace of its own
}

// RootfsArgs describe a container's root file system: an overlay.
type RootfsArgs struct {
	Lower       []string // topmost first, absolute paths
	Upper, Work string   // directories that exist and are empty at first use; Upper gets the owner and mode of the topmost layer's root
	// UserNS of the pod, nil: the host's. The layers are id-mapped to it; Upper and Work must belong to its root.
	UserNS *os.File
	// Label is the SELinux label of all files in it; "": their own.
	Label string
}

// ImageArgs describe an image that is mounted as a volume.
type ImageArgs struct {
	Lower []string // topmost first, absolute paths
	// SubPath is what of it is mounted, a directory or anything else; resolved inside the image, where links
	// lead nowhere else. "": all.
	SubPath string
	// UserNS, Label: as in RootfsArgs.
	UserNS *os.File
	Label  string
}

// PIDMode says which PID namespace a container gets.
type PIDMode uint8

const (
	PIDPrivate PIDMode = iota // its own (CRI CONTAINER)
	PIDPod                    // the pod's reaper's (CRI POD)
	PIDHost                   // the node's (CRI NODE)
	PIDTarget                 // that of container TargetID (CRI TARGET)
)

// ContainerArgs describe a container to Create.
type ContainerArgs struct {
	ID string // 64 hex digits
	// Spec is the OCI runtime specification: Process, Mounts, Hooks, Hostname unused,
	// Linux.{MaskedPaths,ReadonlyPaths,Devices,MountLabel (of tmpfs, devpts, mqueue),Namespaces (cgroup only)}. Linux.Resources and
	// Linux.Seccomp are not read: the cgroup is made by the caller, the filter comes compiled.
	// Mounts: type "bind" (options bind/rbind, ro/rw/rro, private/rprivate/rslave/rshared, nosuid, nodev,
	// noexec; for all below as well: rro, rnosuid, rnodev, rnoexec), proc, sysfs, tmpfs, devpts, mqueue, cgroup; the special source
	// "crisp:shm" is the pod-wide /dev/shm. A bind mount with UIDMappings is id-mapped to
	// the pod's user namespace (the mappings' values are not read: they are the pod's). In a pod with a user
	// namespace devices are nodes that the daemon makes and binds.
	Spec *specs.Spec
	// Rootfs is the detached overlay mount from Spawner.MountRootfs. Create hands
	// it (a duplicate) to the pod init; the caller closes its own.
	Rootfs *os.File
	// Images are the mounts from Spawner.MountImage, by the source (ImageSource and more) of the
	// bind mount that places each. As with Rootfs, the caller closes its own. One cannot be placed twice.
	Images map[string]*os.File
	// CgroupDir, CgroupTasks: as in PodArgs, of the container's cgroup. The init of a pod with a user namespace may not
	// clone into it: CgroupProcs is cgroup.procs of the cgroup2 hierarchy then, to which the container's init writes itself, and
	// CgroupDir is nil.
	CgroupDir   *os.File
	CgroupTasks []*os.File
	CgroupProcs *os.File
	// CgroupMounts: what appears under /sys/fs/cgroup on v1 and hybrid hosts: name → host path of the container's cgroup. Empty on v2.
	CgroupMounts map[string]string

	PID      PIDMode
	TargetID string

	// Bundle is the directory of the container with its config.json, as hooks are told; BundleRoot, above it, is what
	// they do not get to see otherwise. Absolute and clean. Read only if Spec has hooks.
	Bundle, BundleRoot string

	Seccomp      []byte   // struct sock_filter array; nil: unconfined
	SeccompFlags uint32   // seccomp(2) SECCOMP_FILTER_FLAG_*
	Log          *os.File // nil: output is dropped. Owned by the caller.
	Stdin        bool     // keep a stdin open (for attach); else /dev/null
	StdinOnce    bool
}

// ExecArgs describe a process to run in a running container.
type ExecArgs struct {
	ContainerID  string
	ExecID       string
	Process      *specs.Process
	Seccomp      []byte
	SeccompFlags uint32
	CgroupDir    *os.File // this and the next two: as in ContainerArgs
	CgroupTasks  []*os.File
	CgroupProcs  *os.File
	// Stdin, Stdout, Stderr become fd 0, 1, 2; nil is /dev/null. Owned by the caller.
	Stdin, Stdout, Stderr *os.File
}

// Exit is the end of a container's first process.
type Exit struct {
	ContainerID string
	Code        int // 0–255; 128+n when killed by signal n
	Signal      int // 0 when it exited by itself
	At          time.Time
}

// Package podsandbox is the pod: what it is made of, in which order its parts
// are made and unmade, what is recorded on disk about it, and how all of that is
// found again after a crash or a reboot.
//
// [Manager] is the whole of it for package cri, the only importer: it translates
// the CRI's messages into the types below and back. Nothing here interprets a CRI message: what
// must be echoed is carried as opaque bytes. [Pod] and [Container] are immutable
// snapshots; List and Status read them and take no lock that is held across a
// system call.
//
// A call with an effect is an operation with a life of its own: it runs on
// its own context, and callers only wait for it. A caller whose deadline ends leaves
// it running, and one who asks for the same thing again joins it.
//
// # State machines
//
// They are drawn beside their tables in state.go. A pod or container is changed only by
// the one who holds its turn.
//
// # Steps
//
// A pod, and a container, is a list of steps, each with a do and an undo
// (steps.go). Undo is idempotent and works from the record alone, so one list serves a run that failed, Stop,
// Remove and recovery. The record is written before the first effect; the commit is the last step, and after it
// nothing is rolled back.
//
// # On disk
//
//	<state root>/                           0700, survives a reboot
//	├── pods/<pod id>/
//	│   ├── pod.json                        what was asked for; written once, before the first effect
//	│   ├── state                           what became of it: a line for each change, the last whole one counts
//	│   ├── hosts  hostname  resolv.conf    bind-mounted into the containers, which may write them: not on a tmpfs
//	│   └── containers/<container id>/
//	│       ├── container.json              as pod.json
//	│       ├── state                       as above
//	│       ├── config.json                 the OCI spec it runs with, user resolved
//	│       ├── upper/                      writable layer
//	│       ├── work/                       overlayfs's own
//	│       └── rootfs/                     empty; of containers with hooks only
//	└── damaged/<name>                      records that could not be read, set aside
//
//	<run root>/pods/<pod id>/               0700, a tmpfs, gone after a reboot
//	├── pod.json                            a copy, read when the other is damaged or lost
//	├── init.sock  init.log                 the pod init's
//	└── exits.journal                       its record of exits, kept while we are away
//
// The first line of a state file is the commit: without it the object is one that was being made, and
// recovery unmakes it. Why some writes are synced and others are not is said in store.go.
//
// Names of kernel objects (cgroups, the network namespace's pin) are derived from
// the ids, indexes (by name, by identity) from the records: neither is stored.
package podsandbox

import (
	"errors"
	"net/netip"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/runtime/spawn"
	"github.com/crisp-cri/crisp/runtime/user"
)

// Sentinels. cri/status.go maps them (and those of image, network, spawn,
// cgroup) to gRPC codes.
var (
	// ErrNotFound is returned for an unknown pod or container id.
	ErrNotFound = errors.New("not found")
	// ErrAmbiguous is returned when a short id has several matches.
	ErrAmbiguous = errors.New("ambiguous id")
	// ErrExists is returned when a name is held by another live pod or container.
	ErrExists = errors.New("already exists")
	// ErrInvalid is returned for a request that can never work, before any effect.
	ErrInvalid = errors.New("invalid argument")
	// ErrState is returned for the right object in the wrong state.
	ErrState = errors.New("wrong state")
	// ErrUnavailable is returned while recovery runs, the daemon drains, or the network is not ready.
	ErrUnavailable = errors.New("unavailable")
	// ErrUnsupported is returned for what this kernel or version lacks.
	ErrUnsupported = errors.New("not supported")
	// ErrImageVolume is returned, beside the cause, when an image cannot be mounted as a volume: it is not
	// there, or has not the path that is asked for.
	ErrImageVolume = errors.New("cannot mount image volume")
)

// Identity is what makes two RunPodSandbox calls the same call (CRI
// PodSandboxMetadata). Calls with the same identity join.
type Identity struct {
	Name      string `json:"name"`
	UID       string `json:"uid"`
	Namespace string `json:"namespace"`
	Attempt   uint32 `json:"attempt"`
}

// NamespaceMode is the CRI NamespaceMode in our words.
type NamespaceMode string

const (
	NamespacePod       NamespaceMode = "pod"
	NamespaceContainer NamespaceMode = "container"
	NamespaceNode      NamespaceMode = "node"
	NamespaceTarget    NamespaceMode = "target"
)

// DNSConfig becomes /etc/resolv.conf. All empty: the host's file is copied.
type DNSConfig struct {
	Servers  []string `json:"servers,omitempty"`
	Searches []string `json:"searches,omitempty"`
	Options  []string `json:"options,omitempty"`
}

// PodConfig describes a pod; immutable once given to RunPod. It is stored in the pod's record.
type PodConfig struct {
	Identity
	Hostname       string                `json:"hostname,omitempty"`
	LogDirectory   string                `json:"logDirectory,omitempty"` // absolute, cleaned; "": no logs
	CgroupParent   string                `json:"cgroupParent,omitempty"` // as the kubelet sent it, validated
	RuntimeHandler string                `json:"runtimeHandler,omitempty"`
	Labels         map[string]string     `json:"labels,omitempty"`
	Annotations    map[string]string     `json:"annotations,omitempty"`
	DNS            DNSConfig             `json:"dns"`
	Ports          []network.PortMapping `json:"ports,omitempty"`
	Network        NamespaceMode         `json:"network"` // pod, node
	PID            NamespaceMode         `json:"pid"`     // container, pod, node
	IPC            NamespaceMode         `json:"ipc"`     // pod, node
	// Userns makes a user namespace for the pod, which owns its other namespaces: none of them is the node's then. nil: the node's.
	Userns     *spawn.IDMap      `json:"userns,omitempty"`
	Sysctls    map[string]string `json:"sysctls,omitempty"`
	Privileged bool              `json:"privileged,omitempty"`
	// Label is the SELinux label of the pod's files; "": none. Containers' labels are in their specifications.
	Label string `json:"label,omitempty"`
	// Echo is the CRI config as it came (protobuf wire format), for verbatim replies.
	Echo []byte `json:"echo,omitempty"`
}

// PodState is what CRI shows of a pod's state.
type PodState string

const (
	PodReady    PodState = "ready"
	PodNotReady PodState = "notready"
)

// Pod is an immutable snapshot of one pod. Pods still being made, or whose
// making failed, are never shown.
type Pod struct {
	ID         string // 64 hex digits
	Config     *PodConfig
	State      PodState
	Reason     string // why it is not ready: "Stopped", "Reboot", "InitDied", …
	CreatedAt  time.Time
	IPs        []netip.Addr // primary first; empty with Network node
	NetNSPath  string       // /run/netns/<name>, "" with Network node
	InitPID    int          // 0 when not running
	CgroupPath string
	// Files that the pod's containers bind-mount; "" when there is none.
	ResolvConf, Hosts, HostnameFile string
	// Timings of the making, step by step, for Status(verbose) and the demo.
	Timings []Timing
	// Resources is what NotePodResources was given last, as it came; nil before.
	Resources []byte
}

// Timing is how long one step of an operation took.
type Timing struct {
	Step     string        `json:"step"`
	Duration time.Duration `json:"duration"`
}

// ContainerConfig describes a container to create.
type ContainerConfig struct {
	Name        string            `json:"name"`
	Attempt     uint32            `json:"attempt"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	ImageID     string            `json:"imageID"`           // config digest, resolved by cri
	ImageRef    string            `json:"imageRef"`          // digested reference, or the id
	LogPath     string            `json:"logPath,omitempty"` // relative to the pod's LogDirectory, validated; "": no log
	Stdin       bool              `json:"stdin,omitempty"`
	StdinOnce   bool              `json:"stdinOnce,omitempty"`
	StopSignal  string            `json:"stopSignal"` // "SIGTERM", "SIGRTMIN+3"
	PID         NamespaceMode     `json:"pidMode"`    // container, pod, node, target
	TargetID    string            `json:"targetID,omitempty"`
	// Spec is complete but for Process.User, which User below is resolved into
	// once the root file system can be read (also HOME, unless the env has it),
	// and Linux.CgroupsPath. Groups that Process.User has already are added to the user's; a device without an owner gets
	// the user. Linux.Resources and Linux.Seccomp are applied.
	Spec *specs.Spec `json:"-"` // stored as config.json
	// Volumes are the images that Spec mounts besides the root file system.
	Volumes []ImageVolume `json:"volumes,omitempty"`
	// User to resolve in the container's root file system.
	User user.Request `json:"user"`
	// OpaqueMounts etc. are not interpreted: the CRI config as it came, for verbatim replies.
	Echo []byte `json:"echo,omitempty"`
	// Alike is the same in two configs that ask for the same container; nil: they do if Echo is the same.
	Alike []byte `json:"alike,omitempty"`
}

// ImageVolume is an image, or a part of it, that is mounted in a container, read-only.
type ImageVolume struct {
	Source  string `json:"source"`            // of the Spec's mount: spawn.ImageSource and something that tells it from others
	ImageID string `json:"imageID"`           // whole
	SubPath string `json:"subPath,omitempty"` // relative; resolved inside the image. "": all of it
	Target  string `json:"target"`            // for errors
}

// ContainerState as CRI shows it.
type ContainerState string

const (
	ContainerCreated ContainerState = "created"
	ContainerRunning ContainerState = "running"
	ContainerExited  ContainerState = "exited"
	ContainerUnknown ContainerState = "unknown"
)

// Container is an immutable snapshot of one container.
type Container struct {
	ID, PodID  string
	Config     *ContainerConfig
	Spec       *specs.Spec // as run, User resolved; read-only
	User       user.Identity
	State      ContainerState
	CreatedAt  time.Time
	StartedAt  time.Time // zero before start
	FinishedAt time.Time // zero before exit; never before StartedAt
	ExitCode   int       // valid when exited
	Reason     string    // "Completed", "Error", "OOMKilled", "StartError", "Reboot", "Unknown"
	Message    string    // for StartError: step and cause
	PID        int       // 0 when not running
	LogPath    string    // absolute, "" when no log
	LogLost    uint64    // bytes of output that could not be written to the log; known when exited
	CgroupPath string
	UpperDir   string // writable layer on the host
	Timings    []Timing
}

// ExecResult is the outcome of ExecSync.
type ExecResult struct {
	Stdout, Stderr []byte // at most 16 MiB each; the rest is read and dropped
	ExitCode       int
}

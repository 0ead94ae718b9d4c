package podsandbox

import (
	"context"
	"os"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/cgroup"
	"github.com/crisp-cri/crisp/runtime/spawn"
)

// The interfaces below are the kernel's edge: the real packages behind them, and the tests' fakes.

// Spawner starts and finds pods' inits. FromSpawn makes one of a spawn.Spawner.
type Spawner interface {
	// Prepare begins to make a pod's namespaces; StartPod is given them, or they are closed.
	Prepare(a spawn.PodArgs) *spawn.Namespaces
	// StartPod returns when the pod's namespaces are there; PodInit.Ready waits for the rest. It calls onExit once per container
	// exit, in order, from one goroutine.
	StartPod(ctx context.Context, a spawn.PodArgs, onExit func(spawn.Exit)) (PodInit, error)
	// Attach replays all exits since the pod's start. spawn.ErrGone when the init is dead.
	Attach(ctx context.Context, h spawn.Handle, onExit func(spawn.Exit)) (PodInit, error)
	MountRootfs(ctx context.Context, r spawn.RootfsArgs) (*os.File, error)
	MountImage(ctx context.Context, a spawn.ImageArgs) (*os.File, error)
	ReadJournal(runDir string) ([]spawn.Exit, error)
}

// PodInit is a living pod's init. *spawn.Pod is one, but for Exec's type.
type PodInit interface {
	// Ready waits until the init has set up its namespaces; an error is why it cannot.
	Ready(ctx context.Context) error
	Handle() spawn.Handle
	Done() <-chan struct{}
	NetNS() (*os.File, error)
	// UserNS opens the pod's user namespace; nil, nil if it is the host's.
	UserNS() (*os.File, error)
	Create(ctx context.Context, a spawn.ContainerArgs) error
	// Prepare, before Start, brings a container with hooks to where they run; Abandon ends it there.
	Prepare(ctx context.Context, id string, config []byte) (pid int, err error)
	Abandon(ctx context.Context, id string) error
	Start(ctx context.Context, id string) (pid int, startedAt time.Time, err error)
	Signal(ctx context.Context, id string, sig unix.Signal) error
	Remove(ctx context.Context, id string) error
	ReopenLog(ctx context.Context, id string, log *os.File) error
	Exec(ctx context.Context, a spawn.ExecArgs) (Exec, error)
	Attach(ctx context.Context, id string, stdin bool, stdout, stderr *os.File) (*os.File, error)
	CloseStdin(ctx context.Context, id string) error
	List(ctx context.Context) ([]spawn.ContainerInfo, error)
	Shutdown(ctx context.Context) error
	Close() error
}

// Exec is a process that was started in a container.
type Exec interface {
	Wait(ctx context.Context) (code int, err error)
	PID() int
	// TakeTerminal is the master of its terminal, which the caller closes; nil without one, or when it was taken.
	TakeTerminal() *os.File
}

// FromSpawn adapts a spawn.Spawner, whose methods return concrete types.
func FromSpawn(s *spawn.Spawner) Spawner { return spawner{s} }

type spawner struct{ *spawn.Spawner }

func (s spawner) StartPod(ctx context.Context, a spawn.PodArgs, onExit func(spawn.Exit)) (PodInit, error) {
	p, err := s.Spawner.StartPod(ctx, a, onExit)
	if err != nil {
		return nil, err
	}
	return podInit{p}, nil
}

func (s spawner) Attach(ctx context.Context, h spawn.Handle, onExit func(spawn.Exit)) (PodInit, error) {
	p, err := s.Spawner.Attach(ctx, h, onExit)
	if err != nil {
		return nil, err
	}
	return podInit{p}, nil
}

func (s spawner) ReadJournal(runDir string) ([]spawn.Exit, error) { return spawn.ReadJournal(runDir) }

type podInit struct{ *spawn.Pod }

func (p podInit) Exec(ctx context.Context, a spawn.ExecArgs) (Exec, error) {
	e, err := p.Pod.Exec(ctx, a)
	if err != nil {
		return nil, err
	}
	return e, nil
}

// Cgroups makes the node's cgroups. FromCgroup makes one of a cgroup.Driver.
type Cgroups interface {
	ValidateParent(parent string) error
	PodPath(parent, podID string) string
	InitPath(podPath, podID string) string
	ContainerPath(podPath, containerID string) string
	CreatePod(ctx context.Context, path string) (created bool, err error)
	// Adopt is called once the pod's init lives, and before anything is made below the pod-level cgroup but its leaf.
	Adopt(ctx context.Context, p cgroup.PodInit) error
	RemovePod(ctx context.Context, path string) error
	// Owned says that a pod-level cgroup is the pod's alone, whoever made it.
	Owned(podPath string) bool
	// OwnPods finds the pod-level cgroups of pods without a parent of the kubelet's, by their ids.
	OwnPods() (map[string]string, error)
	ValidPodPath(podPath string) bool
	Children(path string) ([]string, error)
	Open(path string) Cgroup
}

// Cgroup is a handle to one. *cgroup.Cgroup is one, but for Exec's type.
type Cgroup interface {
	Create(ctx context.Context, r *specs.LinuxResources) error
	Join(how cgroup.Entry) (*cgroup.Join, error)
	// Exec makes a child for one exec'd process.
	Exec(name string, how cgroup.Entry) (Cgroup, *cgroup.Join, error)
	Update(ctx context.Context, r *specs.LinuxResources) error
	Applied() (cgroup.Applied, error)
	Stats() (*cgroup.Stats, error)
	OOMKills() (uint64, error)
	Procs() ([]int, error)
	Kill(ctx context.Context) error
	Remove(ctx context.Context) error
	BindSources() map[string]string
}

// FromCgroup adapts a cgroup.Driver, whose methods return concrete types.
func FromCgroup(d *cgroup.Driver) Cgroups { return cgroups{d} }

type cgroups struct{ *cgroup.Driver }

func (c cgroups) Open(path string) Cgroup { return oneCgroup{c.Driver.Open(path)} }

type oneCgroup struct{ *cgroup.Cgroup }

func (c oneCgroup) Exec(name string, how cgroup.Entry) (Cgroup, *cgroup.Join, error) {
	e, j, err := c.Cgroup.Exec(name, how)
	if err != nil {
		return nil, nil, err
	}
	return oneCgroup{e}, j, nil
}

// NetNSDir shows network namespaces as files. *netns.Dir is one.
type NetNSDir interface {
	Path(name string) string
	Pin(name string, ns *os.File) (path string, err error)
	Unpin(name string) error
	Open(name string) (*os.File, error)
	List(prefix string) ([]string, error)
}

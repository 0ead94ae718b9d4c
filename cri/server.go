package cri

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/image"
	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/caps"
	"github.com/crisp-cri/crisp/runtime/cdi"
	"github.com/crisp-cri/crisp/runtime/cgroup"
	"github.com/crisp-cri/crisp/runtime/selinux"
)

// Pods is what this package needs of *podsandbox.Manager, whose documentation
// counts. Tests have a fake.
type Pods interface {
	RunPod(ctx context.Context, config *podsandbox.PodConfig) (id string, err error)
	StopPod(ctx context.Context, id string) error
	RemovePod(ctx context.Context, id string) error
	Pod(id string) (*podsandbox.Pod, error)
	Pods() []*podsandbox.Pod

	CreateContainer(ctx context.Context, podID string, config *podsandbox.ContainerConfig) (id string, err error)
	StartContainer(ctx context.Context, id string) error
	StopContainer(ctx context.Context, id string, grace time.Duration) error
	RemoveContainer(ctx context.Context, id string) error
	Container(id string) (*podsandbox.Container, error)
	Containers() []*podsandbox.Container
	UpdateContainer(ctx context.Context, id string, r *specs.LinuxResources, oomScoreAdj *int) error
	ReopenLog(ctx context.Context, id string) error
	ExecSync(ctx context.Context, id string, argv []string, timeout time.Duration) (*podsandbox.ExecResult, error)
	Exec(ctx context.Context, id string, argv []string, s podsandbox.Streams) (code int, err error)
	Attach(ctx context.Context, id string, s podsandbox.Streams) error
	DialPod(ctx context.Context, id string, port uint16) (net.Conn, error)
	ContainerStats(id string) (*podsandbox.ContainerStats, error)
	ProcessStats(id string) (*podsandbox.ProcessStats, error)
	PodStats(id string) (*podsandbox.PodStats, error)
	PodInterfaces(id string) ([]podsandbox.Interface, error)
	NotePodResources(ctx context.Context, id string, change func(before []byte) ([]byte, error)) error
	Subscribe() (*podsandbox.Subscription, error)
	Resources(id string) (cgroup.Applied, error)

	Operations() []podsandbox.Operation
}

// Config is what a Server works with. All fields but those that say otherwise must be set.
type Config struct {
	Pods    Pods
	Images  image.Images
	Network network.Network
	Host    Host // of ProbeHost

	Version string // of crispd, as git describe has it
	// CgroupDriver is "cgroupfs" or "systemd"; the kubelet follows it.
	CgroupDriver string
	// CheckCgroupParent says what is wrong with a pod's cgroup_parent, which is not empty.
	CheckCgroupParent func(parent string) error
	// Handlers are the names of runtime handlers (RuntimeClass) besides "", the default one. Can be empty.
	Handlers []string
	// DefaultCapabilities of containers; empty: those of package caps.
	DefaultCapabilities []string
	// UnsetSeccompProfile is for containers that name none: "Unconfined" or "RuntimeDefault". Empty: Unconfined,
	// which the kubelet (SeccompDefault) and critest count on.
	UnsetSeccompProfile string
	// DefaultSysctls of pods, each where the pod has the namespace of its own and does not set it. Can be empty.
	DefaultSysctls map[string]string
	// CDI are the devices that CDI_devices can name; nil: none.
	CDI *cdi.Registry
	// CDIAnnotations: containers' annotations (cdi.k8s.io/…) can name them, too.
	CDIAnnotations bool
	// SELinux: pods and containers get labels. The kernel must have it.
	SELinux bool
	// AppArmor is the kernel's policy; nil: it has none. (*apparmor.Policy is one.)
	AppArmor Profiles
	// Streaming serves exec, attach and port-forward. Can be empty.
	Streaming StreamingConfig
	// Settings is shown as JSON by Status (verbose); no secrets. Can be nil.
	Settings any
}

// Profiles is what this package needs of *apparmor.Policy, whose documentation counts.
type Profiles interface {
	Has(name string) (bool, error)
	Ensure(ctx context.Context) error
	Problem() error
}

// maxMessage bounds messages, both ways: the kubelet's own limit (cri-client maxMsgSize).
const maxMessage = 16 << 20

// Limits of one connection.
const (
	maxStreams = 1000     // calls at a time; more wait at the client
	maxHeader  = 64 << 10 // bytes
	handshake  = 20 * time.Second
)

// Server serves CRI. It is made in three steps, so that a kubelet can connect
// while records are still being read: NewServer, Serve, and SetReady.
type Server struct {
	gate     gate
	grpc     *grpc.Server
	streamer *streamer     // nil without
	draining chan struct{} // closed by Drain
	drain    sync.Once
	senders  sync.WaitGroup // of events
}

// NewServer checks cfg and registers both services. Nothing is answered before Serve, and
// nothing but Version before SetReady.
func NewServer(cfg Config) (*Server, error) {
	if cfg.Pods == nil || cfg.Images == nil || cfg.Network == nil || cfg.CheckCgroupParent == nil {
		return nil, errors.New("cannot make CRI server: pods, images, network and the check of cgroup parents must be set")
	}
	drivers := map[string]runtimeapi.CgroupDriver{"cgroupfs": runtimeapi.CgroupDriver_CGROUPFS, "systemd": runtimeapi.CgroupDriver_SYSTEMD}
	driver, ok := drivers[cfg.CgroupDriver]
	if !ok {
		return nil, fmt.Errorf("cannot make CRI server: unknown cgroup driver %q", cfg.CgroupDriver)
	}
	if len(cfg.DefaultCapabilities) == 0 {
		cfg.DefaultCapabilities = caps.Default()
	}
	if _, err := caps.Mask(cfg.DefaultCapabilities); err != nil {
		return nil, fmt.Errorf("cannot make CRI server: default capabilities: %w", err)
	}
	if cfg.UnsetSeccompProfile == "" {
		cfg.UnsetSeccompProfile = runtimeapi.SecurityProfile_Unconfined.String()
	}
	unset, ok := runtimeapi.SecurityProfile_ProfileType_value[cfg.UnsetSeccompProfile]
	if !ok || unset == int32(runtimeapi.SecurityProfile_Localhost) {
		return nil, fmt.Errorf("cannot make CRI server: unset seccomp profile %q is neither Unconfined nor RuntimeDefault", cfg.UnsetSeccompProfile)
	}
	for key := range cfg.DefaultSysctls {
		// Of a pod with all namespaces of its own.
		if why := sysctlForbidden(key, nil); why != "" || !sysctlPattern.MatchString(key) {
			return nil, fmt.Errorf("cannot make CRI server: default sysctl %q is not of a pod's namespaces", key)
		}
	}
	cfg.Version = semantic(cfg.Version)

	s := &Server{draining: make(chan struct{})}
	if cfg.Streaming.Listener != nil {
		s.streamer = newStreamer(cfg.Streaming, cfg.Pods)
	}
	s.grpc = grpc.NewServer(
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxMessage),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
		grpc.WaitForHandlers(true), // Stop returns when nothing of ours runs any more
		// What one connection may cost (CVE-2023-44487 class): the kubelet has two and some hundred calls at most.
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeader),
		grpc.ConnectionTimeout(handshake),
	)
	runtimeapi.RegisterRuntimeServiceServer(s.grpc, &runtimeService{
		cfg: &cfg, streamer: s.streamer, driver: driver, unsetSeccomp: runtimeapi.SecurityProfile_ProfileType(unset), lookUp: hostPaths{cfg.CDI, cfg.CDIAnnotations, &lookUps{}}.lookUp, labels: selinux.Labels,
		draining: s.draining, senders: &s.senders,
	})
	runtimeapi.RegisterImageServiceServer(s.grpc, &imageService{cfg: &cfg})
	return s, nil
}

// semantic makes a version that the kubelet can parse of whatever the build says.
func semantic(v string) string {
	if bare := strings.TrimPrefix(v, "v"); bare != "" && bare[0] >= '0' && bare[0] <= '9' && strings.Count(bare, ".") >= 2 {
		return bare
	}
	suffix := strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' {
			return r
		}
		return '-'
	}, v)
	return strings.TrimSuffix("0.0.0-dev-"+suffix, "-")
}

// Serve answers calls on l until Stop; then it returns nil. It closes l.
func (s *Server) Serve(l net.Listener) error {
	if s.streamer != nil {
		var serving sync.WaitGroup
		serving.Go(s.streamer.run)
		defer serving.Wait()
		defer s.streamer.stop()
	}
	return s.grpc.Serve(l)
}

// SetReady lets calls in: podsandbox has recovered.
func (s *Server) SetReady() { s.gate.to(serving) }

// Drain refuses new calls; those that run go on, but for streams of events, attaches and terminals, which would never end.
func (s *Server) Drain() {
	s.gate.to(draining)
	s.drain.Do(func() {
		close(s.draining)
		if s.streamer != nil {
			s.streamer.drain()
		}
	})
}

// GracefulStop drains, waits until all calls are answered or ctx ends, and then
// cancels what is left. When it returns, no call runs any more.
func (s *Server) GracefulStop(ctx context.Context) {
	s.Drain()
	done := make(chan struct{})
	go func() { // ends with the last call, at the latest after Stop below
		s.grpc.GracefulStop()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
		s.grpc.Stop()
		<-done
	}
	s.senders.Wait() // their calls are over, and so are they
}

// runtimeService implements the RuntimeService; its methods are in the files named after what they are about. The
// embedded one answers what is not there; see notImplemented.
type runtimeService struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	cfg          *Config
	streamer     *streamer // nil without
	driver       runtimeapi.CgroupDriver
	unsetSeccomp runtimeapi.SecurityProfile_ProfileType
	lookUp       func(ctx context.Context, podID string, config *runtimeapi.ContainerConfig, profile *runtimeapi.SecurityProfile) (*found, error)
	labels       func(selinux.Options) (process, mount string, err error)
	draining     <-chan struct{} // closed when streams of events are to end
	senders      *sync.WaitGroup // goroutines that can outlive their call for a moment
	rates        rates
}

// imageService implements the ImageService.
type imageService struct {
	runtimeapi.UnimplementedImageServiceServer
	cfg *Config
}

// seconds converts without overflow.
func seconds(n int64) time.Duration {
	const most = int64(1<<63-1) / int64(time.Second)
	return time.Duration(min(n, most)) * time.Second
}

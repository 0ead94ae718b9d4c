package cri

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/image"
	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/cgroup"
)

// fakePods is the Manager at the edge of this package: it remembers what reached it
// and answers what the test put there. It makes nothing.
type fakePods struct {
	mu         sync.Mutex
	calls      []string // "RunPod", …
	ran        *podsandbox.PodConfig
	created    *podsandbox.ContainerConfig
	grace      time.Duration
	limits     *specs.LinuxResources
	oomScore   *int
	pods       []*podsandbox.Pod
	containers []*podsandbox.Container
	exec       *podsandbox.ExecResult
	applied    cgroup.Applied
	stats      *podsandbox.ContainerStats
	statsErr   map[string]error // by id: cannot be measured
	processes  *podsandbox.ProcessStats
	podStats   map[string]*podsandbox.PodStats
	resources  []byte           // of NotePodResources
	feed       *podsandbox.Feed // nil: no subscriptions
	operations []podsandbox.Operation
	err        error                     // of every changing call
	hook       func(ctx context.Context) // in every changing call
}

func (f *fakePods) call(ctx context.Context, name string) error {
	f.mu.Lock()
	f.calls = append(f.calls, name)
	f.mu.Unlock()
	if f.hook != nil {
		f.hook(ctx)
	}
	return f.err
}

// reached says whether any call that changes something came through.
func (f *fakePods) reached() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.calls) > 0
}

var (
	podID       = strings.Repeat("a1", 32)
	containerID = strings.Repeat("c2", 32)
	imageID     = "sha256:" + strings.Repeat("e3", 32)
	manifest    = "sha256:" + strings.Repeat("f4", 32)
)

func (f *fakePods) RunPod(ctx context.Context, c *podsandbox.PodConfig) (string, error) {
	f.ran = c
	return podID, f.call(ctx, "RunPod")
}
func (f *fakePods) StopPod(ctx context.Context, id string) error   { return f.call(ctx, "StopPod") }
func (f *fakePods) RemovePod(ctx context.Context, id string) error { return f.call(ctx, "RemovePod") }
func (f *fakePods) Pods() []*podsandbox.Pod                        { return f.pods }
func (f *fakePods) Pod(id string) (*podsandbox.Pod, error) {
	for _, p := range f.pods {
		if strings.HasPrefix(p.ID, id) {
			return p, nil
		}
	}
	return nil, fmt.Errorf("pod %q: %w", id, podsandbox.ErrNotFound)
}
func (f *fakePods) CreateContainer(ctx context.Context, pod string, c *podsandbox.ContainerConfig) (string, error) {
	f.created = c
	return containerID, f.call(ctx, "CreateContainer")
}
func (f *fakePods) StartContainer(ctx context.Context, id string) error {
	return f.call(ctx, "StartContainer")
}
func (f *fakePods) StopContainer(ctx context.Context, id string, grace time.Duration) error {
	f.grace = grace
	return f.call(ctx, "StopContainer")
}
func (f *fakePods) RemoveContainer(ctx context.Context, id string) error {
	return f.call(ctx, "RemoveContainer")
}
func (f *fakePods) Containers() []*podsandbox.Container { return f.containers }
func (f *fakePods) Container(id string) (*podsandbox.Container, error) {
	for _, c := range f.containers {
		if strings.HasPrefix(c.ID, id) {
			return c, nil
		}
	}
	return nil, fmt.Errorf("container %q: %w", id, podsandbox.ErrNotFound)
}
func (f *fakePods) UpdateContainer(ctx context.Context, id string, r *specs.LinuxResources, oom *int) error {
	f.limits, f.oomScore = r, oom
	return f.call(ctx, "UpdateContainer")
}
func (f *fakePods) ReopenLog(ctx context.Context, id string) error { return f.call(ctx, "ReopenLog") }
func (f *fakePods) ExecSync(ctx context.Context, id string, argv []string, timeout time.Duration) (*podsandbox.ExecResult, error) {
	f.grace = timeout
	return f.exec, f.call(ctx, "ExecSync")
}
func (f *fakePods) Exec(ctx context.Context, id string, argv []string, s podsandbox.Streams) (int, error) {
	if f.exec == nil {
		return 0, f.call(ctx, "Exec")
	}
	return f.exec.ExitCode, f.call(ctx, "Exec")
}
func (f *fakePods) Attach(ctx context.Context, id string, s podsandbox.Streams) error {
	return f.call(ctx, "Attach")
}
func (f *fakePods) DialPod(ctx context.Context, id string, port uint16) (net.Conn, error) {
	return nil, f.call(ctx, "DialPod")
}
func (f *fakePods) ContainerStats(id string) (*podsandbox.ContainerStats, error) {
	if err := f.statsErr[id]; err != nil {
		return nil, err
	}
	if f.stats == nil {
		return nil, podsandbox.ErrState
	}
	return f.stats, nil
}
func (f *fakePods) ProcessStats(id string) (*podsandbox.ProcessStats, error) {
	if f.processes == nil {
		return nil, podsandbox.ErrState
	}
	return f.processes, nil
}
func (f *fakePods) PodStats(id string) (*podsandbox.PodStats, error) {
	if err := f.statsErr[id]; err != nil {
		return nil, err
	}
	if s, ok := f.podStats[id]; ok {
		return s, nil
	}
	return nil, podsandbox.ErrState
}
func (f *fakePods) PodInterfaces(id string) ([]podsandbox.Interface, error) {
	s, err := f.PodStats(id)
	if err != nil {
		return nil, err
	}
	return s.Interfaces, nil
}
func (f *fakePods) NotePodResources(ctx context.Context, id string, change func([]byte) ([]byte, error)) error {
	var err error
	if f.resources, err = change(f.resources); err != nil {
		return err
	}
	return f.call(ctx, "NotePodResources")
}
func (f *fakePods) Subscribe() (*podsandbox.Subscription, error) {
	if f.feed == nil {
		return nil, podsandbox.ErrUnavailable
	}
	return f.feed.Subscribe()
}
func (f *fakePods) Resources(id string) (cgroup.Applied, error) { return f.applied, nil }
func (f *fakePods) Operations() []podsandbox.Operation          { return f.operations }

// fakeImages has one image, busybox, until it is removed.
type fakeImages struct {
	image.Images // what is not here is not called
	list         []image.Image
	pulled       string
	auth         *image.Auth
	removed      string
	collected    int // how often
	err          error
}

func busybox() image.Image {
	return image.Image{
		ID:          imageID,
		RepoTags:    []string{"docker.io/library/busybox:1", "registry.test/busybox:1"},
		RepoDigests: []string{"docker.io/library/busybox@" + manifest, "registry.test/busybox@" + manifest},
		Size:        12345,
		PulledAt:    time.Unix(1700000000, 0).UTC(),
		Config: imagespec.Image{Config: imagespec.ImageConfig{
			Entrypoint: []string{"/bin/sh"}, Cmd: []string{"-c", "true"}, Env: []string{"PATH=/bin", "LANG=C"},
			WorkingDir: "/work", User: "1000:50", StopSignal: "SIGQUIT",
			Volumes: map[string]struct{}{"/../../etc": {}, "/proc": {}, "/data": {}},
			Labels:  map[string]string{"io.kubernetes.pod.name": "evil", "binary://x": "y"},
		}},
	}
}

func (f *fakeImages) Pull(_ context.Context, ref string, auth *image.Auth) (string, error) {
	f.pulled, f.auth = ref, auth
	return imageID, f.err
}
func (f *fakeImages) List() []image.Image { return f.list }
func (f *fakeImages) Resolve(ref string) (image.Image, error) {
	if f.err != nil {
		return image.Image{}, f.err
	}
	for _, i := range f.list {
		if ref == "busybox" || ref == i.ID {
			return i, nil
		}
	}
	return image.Image{}, fmt.Errorf("%w: %s", image.ErrNotFound, ref)
}
func (f *fakeImages) Remove(_ context.Context, ref string) error { f.removed = ref; return f.err }
func (f *fakeImages) CollectGarbage(context.Context) error       { f.collected++; return nil }
func (f *fakeImages) Usage() (string, uint64, uint64, error)     { return "/var/lib/crisp", 7, 0, f.err }

type fakeNetwork struct {
	network.Network
	condition network.Condition
	cidr      string
}

func (f *fakeNetwork) Name() string              { return "fake" }
func (f *fakeNetwork) Status() network.Condition { return f.condition }
func (f *fakeNetwork) UpdatePodCIDR(c string) error {
	if c == "bad" {
		return fmt.Errorf("%w: no range", network.ErrInvalid)
	}
	f.cidr = c
	return nil
}

// plainHost is a node without LSMs, whatever the one is that the test runs on.
func plainHost() Host {
	return Host{Hostname: "node1", Arch: "amd64", RecursiveReadOnly: true, Masked: []string{"/proc/interrupts", "/proc/kcore"}}
}

// world is a server on a connection in memory, with what it calls.
type world struct {
	server  *Server
	pods    *fakePods
	images  *fakeImages
	network *fakeNetwork
	conn    *grpc.ClientConn
	runtime runtimeapi.RuntimeServiceClient
	image   runtimeapi.ImageServiceClient
}

func newWorld(t testing.TB, change ...func(*Config)) *world {
	t.Helper()
	w := newQuietWorld(t, change...)
	w.server.SetReady()
	return w
}

// newQuietWorld is one whose server is not ready yet.
func newQuietWorld(t testing.TB, change ...func(*Config)) *world {
	t.Helper()
	w := &world{pods: &fakePods{}, images: &fakeImages{list: []image.Image{busybox()}}, network: &fakeNetwork{condition: network.Condition{Ready: true}}}
	w.pods.pods = []*podsandbox.Pod{somePod()}
	cfg := Config{
		Pods: w.pods, Images: w.images, Network: w.network, Host: plainHost(), Version: "1.2.3", CgroupDriver: "cgroupfs",
		CheckCgroupParent: func(p string) error {
			if strings.Contains(p, "..") {
				return errors.New("must not climb")
			}
			return nil
		},
		Handlers:       []string{"other"},
		DefaultSysctls: map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"},
	}
	for _, f := range change {
		f(&cfg)
	}
	var err error
	if w.server, err = NewServer(cfg); err != nil {
		t.Fatal(err)
	}
	l := bufconn.Listen(1 << 20)
	served := make(chan error, 1)
	go func() { served <- w.server.Serve(l) }()
	w.conn, err = grpc.NewClient("passthrough:///cri",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		w.conn.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		w.server.GracefulStop(ctx)
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	w.runtime, w.image = runtimeapi.NewRuntimeServiceClient(w.conn), runtimeapi.NewImageServiceClient(w.conn)
	return w
}

// somePod is a ready pod with namespaces of its own.
func somePod() *podsandbox.Pod {
	echo, err := wire.Marshal(podRequest().GetConfig())
	if err != nil {
		panic(err)
	}
	return &podsandbox.Pod{
		ID: podID, State: podsandbox.PodReady, CreatedAt: time.Unix(1700000001, 5),
		Config: &podsandbox.PodConfig{
			Identity: podsandbox.Identity{Name: "web", UID: "u-1", Namespace: "prod", Attempt: 2},
			Hostname: "web", LogDirectory: "/var/log/pods/prod_web_u-1",
			Labels: map[string]string{"app": "web", "tier": "front"}, Annotations: map[string]string{"a/b": "c\nd"},
			Network: podsandbox.NamespacePod, PID: podsandbox.NamespaceContainer, IPC: podsandbox.NamespacePod,
			RuntimeHandler: "other", Echo: echo,
		},
		NetNSPath: "/run/netns/crisp-a1", InitPID: 4242, CgroupPath: "/kubepods/pod1",
		ResolvConf: "/run/crisp/pods/a1/resolv.conf", Hosts: "/run/crisp/pods/a1/hosts", HostnameFile: "/run/crisp/pods/a1/hostname",
	}
}

// podRequest is a RunPodSandboxRequest that is fine.
func podRequest() *runtimeapi.RunPodSandboxRequest {
	return &runtimeapi.RunPodSandboxRequest{RuntimeHandler: "other", Config: &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: "web", Uid: "u-1", Namespace: "prod", Attempt: 2},
		Hostname:     "web",
		LogDirectory: "/var/log/pods/prod_web_u-1/",
		DnsConfig:    &runtimeapi.DNSConfig{Servers: []string{"10.0.0.10", "fd00::1"}, Searches: []string{"prod.svc.cluster.local"}, Options: []string{"ndots:5"}},
		PortMappings: []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: 8080, HostIp: "127.0.0.1"}, {Protocol: runtimeapi.Protocol_UDP, ContainerPort: 53}},
		Labels:       map[string]string{"app": "web", "tier": "front"},
		Annotations:  map[string]string{"a/b": "c\nd"},
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent: "/kubepods/burstable/pod1",
			Sysctls:      map[string]string{"net.core.somaxconn": "1024", "kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "1024\t65535"},
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER, UsernsOptions: &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_NODE}},
				Seccomp:          &runtimeapi.SecurityProfile{},
				SelinuxOptions:   &runtimeapi.SELinuxOption{Level: "s0:c1,c2"},
			},
			Resources: &runtimeapi.LinuxContainerResources{CpuShares: 102, MemoryLimitInBytes: 1 << 20},
		},
	}}
}

// containerRequest is a CreateContainerRequest that is fine.
func containerRequest() *runtimeapi.CreateContainerRequest {
	return &runtimeapi.CreateContainerRequest{PodSandboxId: podID, Config: &runtimeapi.ContainerConfig{
		Metadata:    &runtimeapi.ContainerMetadata{Name: "main", Attempt: 1},
		Image:       &runtimeapi.ImageSpec{Image: imageID, UserSpecifiedImage: "registry.test/busybox:1"},
		Command:     []string{"/bin/app"},
		Args:        []string{"--flag"},
		Envs:        []*runtimeapi.KeyValue{{Key: "RAW", Value: []byte{0xff, '='}}, {Key: "PATH", Value: []byte("/opt/bin")}},
		Labels:      map[string]string{"app": "web"},
		Annotations: map[string]string{"io.kubernetes.container.hash": "abc"},
		LogPath:     "main/1.log",
		StopSignal:  runtimeapi.Signal_SIGNAL_SIGRTMINPLUS3,
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources: &runtimeapi.LinuxContainerResources{CpuShares: 512, MemoryLimitInBytes: 64 << 20, OomScoreAdj: 900},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				RunAsUser: &runtimeapi.Int64Value{Value: 1001}, RunAsGroup: &runtimeapi.Int64Value{Value: 1002}, SupplementalGroups: []int64{7},
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
				MaskedPaths:      []string{"/proc/kcore", "/proc/keys"}, ReadonlyPaths: []string{"/proc/sys"},
				Capabilities: &runtimeapi.Capability{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"net_bind_service"}},
			},
		},
	}}
}

// wantStatus checks code and a part of the message.
func wantStatus(t testing.TB, err error, code codes.Code, part string) {
	t.Helper()
	s := status.Convert(err)
	if s.Code() != code || !strings.Contains(s.Message(), part) {
		t.Errorf("got %s %q, want %s with %q", s.Code(), s.Message(), code, part)
	}
}

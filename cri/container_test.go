package cri

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/image"
	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/cgroup"
	"github.com/crisp-cri/crisp/runtime/user"
)

func TestContainerConfig(t *testing.T) {
	w := newWorld(t)
	r := containerRequest()
	resp, err := w.runtime.CreateContainer(t.Context(), r)
	if err != nil || resp.ContainerId != containerID {
		t.Fatalf("got %v, %v", resp, err)
	}
	got := *w.pods.created
	var echo runtimeapi.ContainerConfig
	if err := proto.Unmarshal(got.Echo, &echo); err != nil || !proto.Equal(&echo, r.Config) {
		t.Errorf("echo is %v, %v", &echo, err)
	}
	if got.Spec == nil || got.Spec.Process.Args[0] != "/bin/app" {
		t.Errorf("spec is %v", got.Spec)
	}
	want := podsandbox.ContainerConfig{
		Name: "main", Attempt: 1, Labels: r.Config.Labels, Annotations: r.Config.Annotations,
		ImageID: imageID, ImageRef: "registry.test/busybox@" + manifest, LogPath: "main/1.log", StopSignal: "SIGRTMIN+3",
		PID:  podsandbox.NamespaceContainer,
		User: user.Request{UID: ptr(int64(1001)), GID: ptr(int64(1002)), ImageUser: "1000:50", SupplementalGroups: []int64{7}},
		Spec: got.Spec, Echo: got.Echo, Alike: got.Alike,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if string(got.Spec.Process.Env[3]) != "RAW=\xff=" {
		t.Errorf("env is %q: bytes were changed", got.Spec.Process.Env)
	}
}

// Two tries of the kubelet to create one container differ in the termination log's random name, and are alike.
func TestAlike(t *testing.T) {
	base := containerRequest().Config
	base.Mounts = []*runtimeapi.Mount{{ContainerPath: "/dev/termination-log", HostPath: "/kubelet/pods/p/containers/c/0123abcd"}}
	want, err := alike(base)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		edit func(*runtimeapi.ContainerConfig)
		same bool
	}{
		{"nothing", func(*runtimeapi.ContainerConfig) {}, true},
		{"the random name", func(c *runtimeapi.ContainerConfig) { c.Mounts[0].HostPath = "/kubelet/pods/p/containers/c/ffffffff" }, true},
		{"another directory", func(c *runtimeapi.ContainerConfig) { c.Mounts[0].HostPath = "/kubelet/pods/p/containers/d/0123abcd" }, false},
		{"a name that is none of those", func(c *runtimeapi.ContainerConfig) { c.Mounts[0].HostPath += "0" }, false},
		{"another place", func(c *runtimeapi.ContainerConfig) { c.Mounts[0].ContainerPath = "/log" }, false},
		{"arguments", func(c *runtimeapi.ContainerConfig) { c.Args = append(c.Args, "x") }, false},
	} {
		config := proto.Clone(base).(*runtimeapi.ContainerConfig)
		tt.edit(config)
		got, err := alike(config)
		if err != nil || bytes.Equal(got, want) != tt.same {
			t.Errorf("%s differs: alike %v, %v, want %v", tt.name, bytes.Equal(got, want), err, tt.same)
		}
	}
	if base.Mounts[0].HostPath != "/kubelet/pods/p/containers/c/0123abcd" {
		t.Errorf("the config was changed: %v", base.Mounts[0])
	}
}

// A pod that is not ready takes no containers; one without a log directory has no logs.
func TestCreateContainerInPod(t *testing.T) {
	w := newWorld(t)
	p := w.pods.pods[0]
	p.Config.LogDirectory = ""
	if _, err := w.runtime.CreateContainer(t.Context(), containerRequest()); err != nil || w.pods.created.LogPath != "" {
		t.Errorf("without a log directory: log path %q, %v", w.pods.created.LogPath, err)
	}
	w.pods.calls = nil
	p.State, p.Reason = podsandbox.PodNotReady, "Stopped"
	_, err := w.runtime.CreateContainer(t.Context(), containerRequest())
	wantRefusal(t, w, err, codes.FailedPrecondition, `cannot create container "main": wrong state: pod`)
	w.images.err = fmt.Errorf("%w: x", image.ErrInvalidReference)
	p.State = podsandbox.PodReady
	_, err = w.runtime.CreateContainer(t.Context(), containerRequest())
	wantRefusal(t, w, err, codes.InvalidArgument, "registry.test/busybox:1")
}

func TestSeccomp(t *testing.T) {
	profile := filepath.Join(t.TempDir(), "p.json")
	if err := os.WriteFile(profile, []byte(`{"defaultAction":"SCMP_ACT_LOG","architectures":["SCMP_ARCH_X86_64"],"syscalls":[{"names":["getpid"],"action":"SCMP_ACT_ALLOW"}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	of := func(kind runtimeapi.SecurityProfile_ProfileType, ref string) *runtimeapi.SecurityProfile {
		return &runtimeapi.SecurityProfile{ProfileType: kind, LocalhostRef: ref}
	}
	const none, dflt, file = "", "SCMP_ACT_ERRNO", "SCMP_ACT_LOG"
	for _, tt := range []struct {
		name       string
		unset      string
		profile    *runtimeapi.SecurityProfile
		old        string
		privileged bool
		want       string // default action
	}{
		{"nothing said", "", nil, "", false, none},
		{"nothing said, configured", "RuntimeDefault", nil, "", false, dflt},
		{"default", "", of(runtimeapi.SecurityProfile_RuntimeDefault, ""), "", false, dflt},
		{"unconfined", "RuntimeDefault", of(runtimeapi.SecurityProfile_Unconfined, ""), "", false, none},
		{"file", "", of(runtimeapi.SecurityProfile_Localhost, profile), "", false, file},
		{"old form", "", nil, "runtime/default", false, dflt},
		{"old form, file", "", nil, "localhost/" + profile, false, file},
		{"new form counts", "", of(runtimeapi.SecurityProfile_Unconfined, ""), "runtime/default", false, none},
		{"privileged", "RuntimeDefault", of(runtimeapi.SecurityProfile_Localhost, profile), "", true, none},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, func(c *Config) { c.UnsetSeccompProfile = tt.unset })
			w.pods.pods[0].Config.Privileged = true
			r := containerRequest()
			sc := r.Config.Linux.SecurityContext
			sc.Seccomp, sc.SeccompProfilePath, sc.Privileged = tt.profile, tt.old, tt.privileged
			if _, err := w.runtime.CreateContainer(t.Context(), r); err != nil {
				t.Fatal(err)
			}
			got := ""
			if s := w.pods.created.Spec.Linux.Seccomp; s != nil {
				got = string(s.DefaultAction)
			}
			if got != tt.want {
				t.Errorf("default action is %q, want %q", got, tt.want)
			}
		})
	}
	w := newWorld(t)
	r := containerRequest()
	r.Config.Linux.SecurityContext.Seccomp = of(runtimeapi.SecurityProfile_Localhost, profile+".nothere")
	_, err := w.runtime.CreateContainer(t.Context(), r)
	wantRefusal(t, w, err, codes.InvalidArgument, "seccomp.localhost_ref: ")
}

// A source that hangs costs its call, and nothing else.
func TestLookUpHangs(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	hung, over := make(chan struct{}), make(chan struct{})
	go cancelWhen(hung, cancel)
	_, err := bounded(ctx, func() (*found, error) {
		close(hung)
		<-over // as a stat(2) on a dead network mount
		return nil, nil
	})
	close(over)
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "dead network mount") {
		t.Errorf("got %v", err)
	}
}

// The kubelet's next try waits for the one that hangs; other containers do not.
func TestLookUpOneAtATime(t *testing.T) {
	var l lookUps
	c, other := containerKey{"p", "c", 0}, containerKey{"p", "other", 0}
	nothing := func() (*found, error) { return nil, nil }
	hung, over := make(chan struct{}), make(chan struct{})
	gone, cancel := context.WithCancel(t.Context())
	go cancelWhen(hung, cancel)
	_, err := l.do(gone, c, func() (*found, error) { close(hung); <-over; return nil, nil })
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "dead network mount") {
		t.Errorf("got %v", err)
	}
	if _, err := l.do(t.Context(), other, nothing); err != nil {
		t.Errorf("another container: got %v", err)
	}
	if _, err := l.do(gone, c, func() (*found, error) { t.Error("it runs beside the one that hangs"); return nil, nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("the next try: got %v", err)
	}
	close(over)
	if _, err := l.do(t.Context(), c, nothing); err != nil || len(l.underWay) != 0 {
		t.Errorf("in the end: got %v, under way %v", err, l.underWay)
	}
}

func cancelWhen(c <-chan struct{}, cancel context.CancelFunc) {
	<-c
	cancel()
}

func TestLookUpDevices(t *testing.T) {
	f, err := hostPaths{}.lookUpNow(&runtimeapi.ContainerConfig{Devices: []*runtimeapi.Device{
		{HostPath: "/dev/null", ContainerPath: "/dev/nothing", Permissions: "r"},
	}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(f.devices) != 1 || f.devices[0].Path != "/dev/nothing" || f.devices[0].Type != "c" || f.devices[0].Major != 1 || f.devices[0].Minor != 3 {
		t.Errorf("devices are %+v", f.devices)
	}
	if len(f.allowed) != 1 || !f.allowed[0].Allow || *f.allowed[0].Major != 1 || *f.allowed[0].Minor != 3 || f.allowed[0].Access != "r" {
		t.Errorf("rules are %+v", f.allowed)
	}
	if f.all != nil {
		t.Error("a container that is not privileged got the host's devices")
	}
	// A directory is all nodes below it, and a link to one is followed.
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("/dev/zero", link); err != nil {
		t.Fatal(err)
	}
	f, err = hostPaths{}.lookUpNow(&runtimeapi.ContainerConfig{
		Devices: []*runtimeapi.Device{{HostPath: link, ContainerPath: "/x", Permissions: "rwm"}, {HostPath: "/dev", ContainerPath: "/host", Permissions: "m"}},
		Linux:   &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{Privileged: true}},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	paths := map[string]bool{}
	for _, d := range f.devices {
		paths[d.Path] = true
	}
	if !paths["/x"] || !paths["/host/null"] || paths["/host/console"] || paths["/host/pts/ptmx"] {
		t.Errorf("devices are %v", paths)
	}
	if len(f.all) == 0 {
		t.Error("a privileged container got no devices")
	}
}

func someContainer() *podsandbox.Container {
	r := containerRequest()
	r.Config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/dev/termination-log", HostPath: "/var/lib/kubelet/x", Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}}
	echo, err := wire.Marshal(r.Config)
	if err != nil {
		panic(err)
	}
	return &podsandbox.Container{
		ID: containerID, PodID: podID, State: podsandbox.ContainerRunning,
		Config: &podsandbox.ContainerConfig{
			Name: "main", Attempt: 1, Labels: r.Config.Labels, Annotations: r.Config.Annotations,
			ImageID: imageID, ImageRef: "registry.test/busybox@" + manifest, StopSignal: "SIGRTMIN+3", Echo: echo,
		},
		Spec: &specs.Spec{
			Process: &specs.Process{OOMScoreAdj: ptr(900), Args: []string{"/bin/app"}},
			Linux: &specs.Linux{Resources: &specs.LinuxResources{
				CPU:    &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(-1))},
				Memory: &specs.LinuxMemory{Limit: ptr(int64(64 << 20)), Swap: ptr(int64(64 << 20))},
			}},
		},
		User:      user.Identity{UID: 1001, GID: 1002, Groups: []uint32{7, 1002}},
		CreatedAt: time.Unix(100, 1), StartedAt: time.Unix(101, 0), PID: 77, LogPath: "/var/log/pods/x/main/1.log",
		CgroupPath: "/kubepods/pod1/c", UpperDir: "/var/lib/crisp/x/upper",
	}
}

func TestContainerStatus(t *testing.T) {
	w := newWorld(t)
	ctr := someContainer()
	w.pods.containers = []*podsandbox.Container{ctr}
	w.pods.applied = cgroup.Applied{CPUShares: 512, CPUQuota: -1, CPUPeriod: 100000, MemoryLimit: 32 << 20, MemorySwapLimit: -1, PidsLimit: -1}
	got, err := w.runtime.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: containerID[:5], Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	want := &runtimeapi.ContainerStatus{
		Id: containerID, Metadata: &runtimeapi.ContainerMetadata{Name: "main", Attempt: 1}, State: runtimeapi.ContainerState_CONTAINER_RUNNING,
		CreatedAt: 100_000_000_001, StartedAt: 101_000_000_000,
		Image:    &runtimeapi.ImageSpec{Image: "registry.test/busybox:1", UserSpecifiedImage: "registry.test/busybox:1"},
		ImageRef: "registry.test/busybox@" + manifest, ImageId: imageID,
		Labels: ctr.Config.Labels, Annotations: ctr.Config.Annotations,
		Mounts: []*runtimeapi.Mount{{
			ContainerPath: "/dev/termination-log", HostPath: "/var/lib/kubelet/x", Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER,
		}},
		LogPath: "/var/log/pods/x/main/1.log",
		Resources: &runtimeapi.ContainerResources{Linux: &runtimeapi.LinuxContainerResources{
			CpuShares: 512, CpuQuota: -1, CpuPeriod: 100000, MemoryLimitInBytes: 32 << 20, OomScoreAdj: 900,
		}},
		User:       &runtimeapi.ContainerUser{Linux: &runtimeapi.LinuxContainerUser{Uid: 1001, Gid: 1002, SupplementalGroups: []int64{7, 1002}}},
		StopSignal: runtimeapi.Signal_SIGNAL_SIGRTMINPLUS3,
	}
	if d := cmp.Diff(want, got.Status, protocmp.Transform()); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	var info struct {
		PID         int
		SandboxID   string
		RuntimeSpec specs.Spec
		Config      struct{ Command []string }
	}
	if err := json.Unmarshal([]byte(got.Info["info"]), &info); err != nil {
		t.Fatal(err)
	}
	if info.PID != 77 || info.SandboxID != podID || info.RuntimeSpec.Process.Args[0] != "/bin/app" || info.Config.Command[0] != "/bin/app" {
		t.Errorf("info is %s", got.Info["info"])
	}

	// Exited, and the image gone: what is recorded counts.
	ctr.State, ctr.FinishedAt, ctr.ExitCode, ctr.Reason = podsandbox.ContainerExited, time.Unix(102, 0), 137, "OOMKilled"
	w.images.list = nil
	got, err = w.runtime.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: containerID})
	if err != nil {
		t.Fatal(err)
	}
	want.State, want.FinishedAt, want.ExitCode, want.Reason = runtimeapi.ContainerState_CONTAINER_EXITED, 102_000_000_000, 137, "OOMKilled"
	want.Image.Image = imageID
	want.Resources.Linux = &runtimeapi.LinuxContainerResources{CpuShares: 512, CpuQuota: -1, MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: 64 << 20, OomScoreAdj: 900}
	if d := cmp.Diff(want, got.Status, protocmp.Transform()); d != "" {
		t.Errorf("exited: -want +got:\n%s", d)
	}
	if got.Info != nil {
		t.Error("info although not verbose")
	}
}

func TestListContainers(t *testing.T) {
	w := newWorld(t)
	second := someContainer()
	second.ID, second.PodID, second.State = strings.Repeat("d7", 32), strings.Repeat("99", 32), podsandbox.ContainerExited
	w.pods.containers = []*podsandbox.Container{someContainer(), second}
	state := func(s runtimeapi.ContainerState) *runtimeapi.ContainerStateValue {
		return &runtimeapi.ContainerStateValue{State: s}
	}
	for _, tt := range []struct {
		name   string
		filter *runtimeapi.ContainerFilter
		want   string
	}{
		{"no filter", nil, "cd"},
		{"short id", &runtimeapi.ContainerFilter{Id: "d7"}, "d"},
		{"running", &runtimeapi.ContainerFilter{State: state(runtimeapi.ContainerState_CONTAINER_RUNNING)}, "c"},
		{"created", &runtimeapi.ContainerFilter{State: state(runtimeapi.ContainerState_CONTAINER_CREATED)}, ""},
		{"pod", &runtimeapi.ContainerFilter{PodSandboxId: podID}, "c"},
		{"short pod id", &runtimeapi.ContainerFilter{PodSandboxId: "99"}, "d"},
		{"labels", &runtimeapi.ContainerFilter{LabelSelector: map[string]string{"app": "web"}}, "cd"},
		{"other label", &runtimeapi.ContainerFilter{LabelSelector: map[string]string{"app": "x"}}, ""},
		{"pod and id", &runtimeapi.ContainerFilter{PodSandboxId: podID, Id: "d"}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp, err := w.runtime.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{Filter: tt.filter})
			if err != nil {
				t.Fatal(err)
			}
			got := ""
			for _, c := range resp.Containers {
				got += c.Id[:1]
			}
			if got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
	_, err := w.runtime.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{State: state(9)}})
	wantStatus(t, err, codes.InvalidArgument, "filter.state.state: ")

	resp, err := w.runtime.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{Id: "c"}})
	if err != nil {
		t.Fatal(err)
	}
	want := &runtimeapi.Container{
		Id: containerID, PodSandboxId: podID, Metadata: &runtimeapi.ContainerMetadata{Name: "main", Attempt: 1},
		Image: containerRequest().Config.Image, ImageRef: "registry.test/busybox@" + manifest, ImageId: imageID,
		State: runtimeapi.ContainerState_CONTAINER_RUNNING, CreatedAt: 100_000_000_001,
		Labels: containerRequest().Config.Labels, Annotations: containerRequest().Config.Annotations,
	}
	if d := cmp.Diff(want, resp.Containers[0], protocmp.Transform()); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

// What users see as a container's image: the tag they named, or another of it, or what the record says.
func TestShownImage(t *testing.T) {
	digests := busybox().RepoDigests
	for _, tt := range []struct {
		name string
		tags []string
		gone bool
		user string
		want string
	}{
		{"the tag that was named", busybox().RepoTags, false, "registry.test/busybox:1", "registry.test/busybox:1"},
		{"its short form", []string{"a/b:1", "docker.io/library/busybox:latest"}, false, "busybox", "docker.io/library/busybox:latest"},
		{"another tag", []string{"a/b:1"}, false, "busybox", "a/b:1"},
		{"no tag", nil, false, "busybox", "registry.test/busybox@" + manifest},
		{"no image", nil, true, "busybox", imageID},
	} {
		t.Run(tt.name, func(t *testing.T) {
			img := busybox()
			img.RepoTags, img.RepoDigests = tt.tags, digests
			images := &fakeImages{list: []image.Image{img}}
			if tt.gone {
				images.list = nil
			}
			s := &runtimeService{cfg: &Config{Images: images}}
			if got := s.shownImage(someContainer(), &runtimeapi.ImageSpec{Image: imageID, UserSpecifiedImage: tt.user}); got.Image != tt.want {
				t.Errorf("got %q, want %q", got.Image, tt.want)
			}
		})
	}
}

func TestUpdateContainerResources(t *testing.T) {
	w := newWorld(t)
	send := func(r *runtimeapi.UpdateContainerResourcesRequest) error {
		_, err := w.runtime.UpdateContainerResources(t.Context(), r)
		return err
	}
	if err := send(&runtimeapi.UpdateContainerResourcesRequest{ContainerId: "c", Linux: &runtimeapi.LinuxContainerResources{
		CpuQuota: -1, MemoryLimitInBytes: 1 << 20, CpusetCpus: "1", OomScoreAdj: 5,
	}}); err != nil {
		t.Fatal(err)
	}
	want := &specs.LinuxResources{
		CPU:    &specs.LinuxCPU{Quota: ptr(int64(-1)), Cpus: "1"},
		Memory: &specs.LinuxMemory{Limit: ptr(int64(1 << 20)), Swap: ptr(int64(1 << 20))},
	}
	if d := cmp.Diff(want, w.pods.limits); d != "" || *w.pods.oomScore != 5 {
		t.Errorf("oom score %d, -want +got:\n%s", *w.pods.oomScore, d)
	}
	if err := send(&runtimeapi.UpdateContainerResourcesRequest{ContainerId: "c"}); err != nil || w.pods.oomScore != nil {
		t.Errorf("nothing to update: %v, oom score %v", err, w.pods.oomScore)
	}
	w.pods.calls = nil
	wantRefusal(t, w, send(&runtimeapi.UpdateContainerResourcesRequest{ContainerId: "c", Linux: &runtimeapi.LinuxContainerResources{CpuShares: -1}}),
		codes.InvalidArgument, "linux.cpu_shares: ")
	wantRefusal(t, w, send(&runtimeapi.UpdateContainerResourcesRequest{ContainerId: "c", Windows: &runtimeapi.WindowsContainerResources{}}),
		codes.InvalidArgument, "windows: ")
}

func TestApplied(t *testing.T) {
	none := cgroup.Applied{CPUQuota: -1, MemoryLimit: -1, MemorySwapLimit: -1, PidsLimit: -1}
	for _, tt := range []struct {
		name  string
		asked *runtimeapi.LinuxContainerResources
		now   func(a *cgroup.Applied)
		want  *runtimeapi.LinuxContainerResources
	}{
		{"nothing", &runtimeapi.LinuxContainerResources{}, func(*cgroup.Applied) {}, &runtimeapi.LinuxContainerResources{}},
		{"shares that lead to the weight", &runtimeapi.LinuxContainerResources{CpuShares: 1000},
			func(a *cgroup.Applied) { a.CPUWeight = cgroup.Weight(1000); a.CPUShares = cgroup.Shares(a.CPUWeight) },
			&runtimeapi.LinuxContainerResources{CpuShares: 1000}},
		{"another weight", &runtimeapi.LinuxContainerResources{CpuShares: 1000},
			func(a *cgroup.Applied) { a.CPUWeight = 100; a.CPUShares = 1024 },
			&runtimeapi.LinuxContainerResources{CpuShares: 1024}},
		{"v1 shares", &runtimeapi.LinuxContainerResources{CpuShares: 1000},
			func(a *cgroup.Applied) { a.CPUShares = 2 }, &runtimeapi.LinuxContainerResources{CpuShares: 2}},
		{"a limit was lifted", &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 5, CpuQuota: 7, CpuPeriod: 8},
			func(a *cgroup.Applied) { a.CPUPeriod = 100000 }, &runtimeapi.LinuxContainerResources{CpuPeriod: 100000}},
		{"huge pages and unified", &runtimeapi.LinuxContainerResources{
			HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 1}}, Unified: map[string]string{"memory.low": "1", "x.y": "z"},
		}, func(a *cgroup.Applied) {
			a.Hugepages = map[string]uint64{"2MB": 0, "1GB": 5}
			a.Unified = map[string]string{"memory.low": "4096", "memory.min": "0"}
		}, &runtimeapi.LinuxContainerResources{
			HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB"}}, Unified: map[string]string{"memory.low": "4096", "x.y": "z"},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := none
			tt.now(&a)
			if d := cmp.Diff(tt.want, applied(tt.asked, a), protocmp.Transform()); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
		})
	}
}

func TestExecSync(t *testing.T) {
	w := newWorld(t)
	w.pods.exec = &podsandbox.ExecResult{Stdout: []byte("out"), Stderr: []byte{0xff}, ExitCode: 3}
	call := func(r *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
		return w.runtime.ExecSync(t.Context(), r)
	}
	got, err := call(&runtimeapi.ExecSyncRequest{ContainerId: "c", Cmd: []string{"x"}, Timeout: 7})
	if err != nil || string(got.Stdout) != "out" || string(got.Stderr) != "\xff" || got.ExitCode != 3 || w.pods.grace != 7*time.Second {
		t.Errorf("got %v, %v, timeout %v", got, err, w.pods.grace)
	}
	w.pods.err = fmt.Errorf("exec: %w", context.DeadlineExceeded)
	_, err = call(&runtimeapi.ExecSyncRequest{ContainerId: "c", Cmd: []string{"x"}})
	wantStatus(t, err, codes.DeadlineExceeded, "")
	w.pods.calls, w.pods.err = nil, nil
	for _, tt := range []struct {
		name, field string
		req         *runtimeapi.ExecSyncRequest
	}{
		{"no id", "container_id: ", &runtimeapi.ExecSyncRequest{Cmd: []string{"x"}}},
		{"no command", "cmd: ", &runtimeapi.ExecSyncRequest{ContainerId: "c"}},
		{"empty command", "cmd: ", &runtimeapi.ExecSyncRequest{ContainerId: "c", Cmd: []string{""}}},
		{"NUL", "cmd: ", &runtimeapi.ExecSyncRequest{ContainerId: "c", Cmd: []string{"x", "\x00"}}},
		{"timeout", "timeout: ", &runtimeapi.ExecSyncRequest{ContainerId: "c", Cmd: []string{"x"}, Timeout: -1}},
	} {
		_, err := call(tt.req)
		wantRefusal(t, w, err, codes.InvalidArgument, tt.field)
	}
}

// Two full streams are more than a reply can carry: it is cut, and there is a reply.
func TestExecSyncFullStreams(t *testing.T) {
	w := newWorld(t)
	full := bytes.Repeat([]byte{'x'}, 16<<20)
	w.pods.exec = &podsandbox.ExecResult{Stdout: full, Stderr: full}
	got, err := w.runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: "c", Cmd: []string{"x"}})
	if err != nil || len(got.Stdout) != (16<<20-execEnvelope)/2 || len(got.Stderr) != len(got.Stdout) {
		t.Errorf("got %d and %d bytes, %v", len(got.GetStdout()), len(got.GetStderr()), err)
	}
}

func TestFit(t *testing.T) {
	for _, tt := range []struct{ out, errs, most, wantOut, wantErrs int }{
		{3, 3, 10, 3, 3}, {10, 0, 10, 10, 0}, {20, 0, 10, 10, 0}, {20, 2, 10, 8, 2}, {2, 20, 10, 2, 8}, {20, 20, 10, 5, 5}, {6, 6, 10, 5, 5}, {5, 6, 10, 5, 5},
	} {
		a, b := fit(make([]byte, tt.out), make([]byte, tt.errs), tt.most)
		if len(a) != tt.wantOut || len(b) != tt.wantErrs {
			t.Errorf("%+v: got %d and %d", tt, len(a), len(b))
		}
	}
}

func TestStopContainer(t *testing.T) {
	w := newWorld(t)
	for _, tt := range []struct {
		timeout int64
		want    time.Duration
	}{{0, 0}, {30, 30 * time.Second}, {1<<63 - 1, (1<<63 - 1) / time.Second * time.Second}} {
		_, err := w.runtime.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: "c", Timeout: tt.timeout})
		if err != nil || w.pods.grace != tt.want {
			t.Errorf("timeout %d: got %v, %v", tt.timeout, w.pods.grace, err)
		}
	}
	w.pods.calls = nil
	_, err := w.runtime.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: "c", Timeout: -1})
	wantRefusal(t, w, err, codes.InvalidArgument, "timeout: ")
}

func TestContainerStats(t *testing.T) {
	w := newWorld(t)
	exited := someContainer()
	exited.ID, exited.State = strings.Repeat("d7", 32), podsandbox.ContainerExited
	w.pods.containers = []*podsandbox.Container{someContainer(), exited}
	at := time.Unix(200, 0)
	w.pods.stats = &podsandbox.ContainerStats{
		Cgroup: &cgroup.Stats{
			At:     at,
			CPU:    cgroup.CPUStats{Usage: 11, PSI: &cgroup.PSI{Some: cgroup.Pressure{Total: 5, Avg10: 1.5}}},
			Memory: cgroup.MemoryStats{Usage: 30, WorkingSet: 20, RSS: 10, Faults: 4, MajFaults: 1, Limit: 100},
			Swap:   cgroup.SwapStats{Accounted: true, Usage: 3, Limit: cgroup.NoLimit},
		},
		WritableAt: at, WritableBytes: 4096, WritableInodes: 2, Mountpoint: "/var/lib/crisp",
	}
	got, err := w.runtime.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: "c2"})
	if err != nil {
		t.Fatal(err)
	}
	n := at.UnixNano()
	want := &runtimeapi.ContainerStats{
		Attributes: &runtimeapi.ContainerAttributes{
			Id: containerID, Metadata: &runtimeapi.ContainerMetadata{Name: "main", Attempt: 1},
			Labels: containerRequest().Config.Labels, Annotations: containerRequest().Config.Annotations,
		},
		Cpu:    &runtimeapi.CpuUsage{Timestamp: n, UsageCoreNanoSeconds: number(11), Psi: &runtimeapi.PsiStats{Some: &runtimeapi.PsiData{Total: 5, Avg10: 1.5}, Full: &runtimeapi.PsiData{}}},
		Memory: &runtimeapi.MemoryUsage{Timestamp: n, UsageBytes: number(30), WorkingSetBytes: number(20), RssBytes: number(10), PageFaults: number(4), MajorPageFaults: number(1), AvailableBytes: number(80)},
		Swap:   &runtimeapi.SwapUsage{Timestamp: n, SwapUsageBytes: number(3)},
		WritableLayer: &runtimeapi.FilesystemUsage{
			Timestamp: n, FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: "/var/lib/crisp"}, UsedBytes: number(4096), InodesUsed: number(2),
		},
	}
	if d := cmp.Diff(want, got.Stats, protocmp.Transform()); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	list := func(f *runtimeapi.ContainerStatsFilter) int {
		t.Helper()
		resp, err := w.runtime.ListContainerStats(t.Context(), &runtimeapi.ListContainerStatsRequest{Filter: f})
		if err != nil {
			t.Fatal(err)
		}
		return len(resp.Stats)
	}
	if got := list(nil); got != 1 {
		t.Errorf("got %d, want the running one", got)
	}
	if got := list(&runtimeapi.ContainerStatsFilter{Id: "c2c", PodSandboxId: "a1", LabelSelector: map[string]string{"app": "web"}}); got != 1 {
		t.Errorf("by filter: got %d", got)
	}
	if got := list(&runtimeapi.ContainerStatsFilter{PodSandboxId: "ff"}); got != 0 {
		t.Errorf("of another pod: got %d", got)
	}
	// One that cannot be measured does not hide the others, but is not passed over in silence where it alone is asked for.
	sick := *w.pods.containers[len(w.pods.containers)-1]
	sick.ID, sick.State = strings.Repeat("5c", 32), podsandbox.ContainerRunning
	w.pods.containers = append(w.pods.containers, &sick)
	w.pods.statsErr = map[string]error{sick.ID: errors.New("read memory.stat: input/output error")}
	if got := list(nil); got != 1 {
		t.Errorf("beside a sick one: got %d", got)
	}
	if _, err := w.runtime.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: sick.ID}); err == nil || !strings.Contains(err.Error(), "input/output error") {
		t.Errorf("the sick one: got %v", err)
	}
	w.pods.containers = w.pods.containers[:len(w.pods.containers)-1]
	// Not measured yet, and gone meanwhile.
	w.pods.stats = &podsandbox.ContainerStats{}
	got, err = w.runtime.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: "c2"})
	if err != nil || got.Stats.WritableLayer != nil || got.Stats.Cpu != nil {
		t.Errorf("not measured: got %v, %v", got, err)
	}
	w.pods.stats = nil
	if got := list(nil); got != 0 {
		t.Errorf("gone: got %d", got)
	}
}

func FuzzEchoedImage(f *testing.F) {
	echo, err := wire.Marshal(containerRequest().Config)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(echo)
	f.Add([]byte(nil))
	f.Add([]byte{0x12})
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = echoedImage(b) // must not panic
		var whole runtimeapi.ContainerConfig
		if proto.Unmarshal(b, &whole) != nil {
			return // not what wire.Marshal makes
		}
		canonical, err := wire.Marshal(&whole) // repeated fields merged: as it is stored
		if err != nil {
			return
		}
		got, err := echoedImage(canonical)
		if err != nil {
			t.Fatal(err)
		}
		want := whole.GetImage()
		if want == nil {
			want = &runtimeapi.ImageSpec{}
		}
		if !proto.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	})
}

// Both lists of a node with 500 pods and a container in each, over a connection: the
// budget is 5 ms (design.md 8). The kubelet asks every second.
func BenchmarkLists(b *testing.B) {
	w := newWorld(b)
	w.pods.pods, w.pods.containers = nil, nil
	for i := range 500 {
		p, c := somePod(), someContainer()
		p.ID, c.ID, c.PodID = fmt.Sprintf("%064x", i), fmt.Sprintf("%064x", 1000+i), fmt.Sprintf("%064x", i)
		w.pods.pods, w.pods.containers = append(w.pods.pods, p), append(w.pods.containers, c)
	}
	for b.Loop() {
		pods, err := w.runtime.ListPodSandbox(b.Context(), &runtimeapi.ListPodSandboxRequest{})
		if err != nil || len(pods.Items) != 500 {
			b.Fatal(err)
		}
		containers, err := w.runtime.ListContainers(b.Context(), &runtimeapi.ListContainersRequest{})
		if err != nil || len(containers.Containers) != 500 {
			b.Fatal(err)
		}
	}
}

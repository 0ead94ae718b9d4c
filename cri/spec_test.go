package cri

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/caps"
	"github.com/crisp-cri/crisp/runtime/cdi"
	"github.com/crisp-cri/crisp/runtime/spawn"
)

var update = flag.Bool("update", false, "write golden files")

// golden compares v, as JSON, with testdata/NAME.json.
func golden(t *testing.T, name string, v any) {
	t.Helper()
	got, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	file := filepath.Join("testdata", name+".json")
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s (-want +got; -update accepts):\n%s", file, cmp.Diff(string(want), string(got)))
	}
}

// specCase is a container as golden tests make it: each edits one that is fine.
type specCase struct {
	name string
	edit func(in *specInput, c *runtimeapi.ContainerConfig, sc *runtimeapi.LinuxContainerSecurityContext)
}

func newSpecInput() *specInput {
	host := plainHost()
	pod := somePod()
	return &specInput{
		config: containerRequest().GetConfig(), image: busybox().Config.Config, pod: pod, pidMode: podsandbox.NamespaceContainer,
		found: &found{}, host: &host, capabilities: caps.Default(),
	}
}

var specCases = []specCase{
	{"kubelet", func(in *specInput, c *runtimeapi.ContainerConfig, sc *runtimeapi.LinuxContainerSecurityContext) {
		// What the kubelet sends for a small container.
		sc.NoNewPrivs = true
		c.Mounts = []*runtimeapi.Mount{
			{ContainerPath: "/var/run/secrets/kubernetes.io/serviceaccount", HostPath: "/var/lib/kubelet/pods/u-1/volumes/token", Readonly: true},
			{ContainerPath: "/etc/hosts", HostPath: "/var/lib/kubelet/pods/u-1/etc-hosts"},
			{ContainerPath: "/dev/termination-log", HostPath: "/var/lib/kubelet/pods/u-1/containers/main/5f"},
		}
		c.Linux.Resources = &runtimeapi.LinuxContainerResources{
			CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 512, MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: 64 << 20, OomScoreAdj: 936,
			HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB"}, {PageSize: "1GB", Limit: 1 << 30}},
			Unified:        map[string]string{"memory.oom.group": "1"}, CpusetCpus: "0-1", CpusetMems: "0",
		}
	}},
	{"least", func(in *specInput, c *runtimeapi.ContainerConfig, sc *runtimeapi.LinuxContainerSecurityContext) {
		in.config = &runtimeapi.ContainerConfig{Metadata: c.Metadata, Image: &runtimeapi.ImageSpec{Image: "busybox"}}
	}},
	{"privileged", func(in *specInput, c *runtimeapi.ContainerConfig, sc *runtimeapi.LinuxContainerSecurityContext) {
		in.pod.Config.Privileged = true
		sc.Privileged = true
		in.found.all = []specs.LinuxDevice{node("/dev/kvm", 10, 232), {Path: "/dev/null", Type: "c", Major: 1, Minor: 3}}
		c.Mounts = []*runtimeapi.Mount{{ContainerPath: "/sys/fs/cgroup", HostPath: "/sys/fs/cgroup"}}
	}},
	{"node-namespaces", func(in *specInput, c *runtimeapi.ContainerConfig, sc *runtimeapi.LinuxContainerSecurityContext) {
		p := in.pod.Config
		p.Network, p.PID, p.IPC, p.Hostname = podsandbox.NamespaceNode, podsandbox.NamespaceNode, podsandbox.NamespaceNode, ""
		in.pidMode = podsandbox.NamespaceNode
		in.pod.NetNSPath = ""
	}},
	{"terminal", func(in *specInput, c *runtimeapi.ContainerConfig, sc *runtimeapi.LinuxContainerSecurityContext) {
		c.Tty, c.Stdin = true, true
		sc.MaskedPaths = nil
	}},
	{"readonly", func(in *specInput, c *runtimeapi.ContainerConfig, sc *runtimeapi.LinuxContainerSecurityContext) {
		sc.ReadonlyRootfs = true
		sc.ReadonlyPaths = []string{"/proc/sys", "/proc/sys/", "/proc/bus"}
		c.Mounts = []*runtimeapi.Mount{
			{ContainerPath: "/a/b/c", HostPath: "/src/deep", RecursiveReadOnly: true, Readonly: true},
			{ContainerPath: "/a", HostPath: "/src/shallow/", Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER},
			{ContainerPath: "/a/b//", HostPath: "/src/middle", Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL},
		}
	}},
	{"own-dev", func(in *specInput, c *runtimeapi.ContainerConfig, sc *runtimeapi.LinuxContainerSecurityContext) {
		c.Mounts = []*runtimeapi.Mount{{ContainerPath: "/dev", HostPath: "/dev"}, {ContainerPath: "/etc", HostPath: "/src/etc"}}
	}},
	{"userns", func(in *specInput, c *runtimeapi.ContainerConfig, sc *runtimeapi.LinuxContainerSecurityContext) {
		in.pod.Config.Userns = &spawn.IDMap{UID: 65536, GID: 65536, Size: 65536}
		c.Mounts = []*runtimeapi.Mount{
			{ContainerPath: "/data", HostPath: "/src/data", UidMappings: []*runtimeapi.IDMapping{ids(65536)}, GidMappings: []*runtimeapi.IDMapping{ids(65536)}},
			{ContainerPath: "/foreign", HostPath: "/src/foreign"},
		}
		in.found.devices = []specs.LinuxDevice{node("/dev/fuse", 10, 229)}
	}},
	{"userns-privileged", func(in *specInput, c *runtimeapi.ContainerConfig, sc *runtimeapi.LinuxContainerSecurityContext) {
		in.pod.Config.Userns = &spawn.IDMap{UID: 65536, GID: 65536, Size: 65536}
		in.pod.Config.Privileged, sc.Privileged = true, true
		c.Mounts = []*runtimeapi.Mount{{ContainerPath: "/dev/mapper", HostPath: "/src"}}
		in.found.all = []specs.LinuxDevice{node("/dev/kvm", 10, 232), node("/dev/null", 1, 3), node("/dev/mapper/control", 10, 236)}
	}},
	{"devices", func(in *specInput, c *runtimeapi.ContainerConfig, sc *runtimeapi.LinuxContainerSecurityContext) {
		in.found.devices = []specs.LinuxDevice{node("/dev/fuse", 10, 229), node("/dev/tty", 4, 1)}
		in.found.allowed = []specs.LinuxDeviceCgroup{{Allow: true, Type: "c", Major: ptr(int64(10)), Minor: ptr(int64(229)), Access: "rw"}}
	}},
	{"cdi", func(in *specInput, c *runtimeapi.ContainerConfig, sc *runtimeapi.LinuxContainerSecurityContext) {
		c.Envs = append(c.Envs, &runtimeapi.KeyValue{Key: "VISIBLE", Value: []byte("none")})
		c.Mounts = []*runtimeapi.Mount{{ContainerPath: "/lib/a.so", HostPath: "/src/mine"}, {ContainerPath: "/lib", HostPath: "/src/lib"}}
		in.found.cdi = cdi.Edits{
			Env: []string{"VISIBLE=all", "MORE=1"}, GIDs: []uint32{44},
			Devices: []specs.LinuxDevice{{Path: "/dev/gpu0", Type: "c", Major: 195, Minor: 0, FileMode: ptr(worldWritable)}},
			Rules:   []specs.LinuxDeviceCgroup{{Allow: true, Type: "c", Major: ptr(int64(195)), Minor: ptr(int64(0)), Access: "rw"}},
			Mounts: []specs.Mount{
				{Destination: "/lib/x/b.so", Type: "bind", Source: "/lib/b.so.5", Options: []string{"ro", "rbind", "rprivate"}},
				{Destination: "/lib/a.so", Type: "bind", Source: "/lib/a.so.5", Options: []string{"ro"}},
			},
			Hooks: specs.Hooks{CreateContainer: []specs.Hook{{Path: "/usr/bin/hook", Args: []string{"hook", "ldcache"}, Timeout: ptr(5)}}},
		}
	}},
}

// The whole specification, for each kind of container.
func TestSpecGolden(t *testing.T) {
	for _, tt := range specCases {
		t.Run(tt.name, func(t *testing.T) {
			in := newSpecInput()
			tt.edit(in, in.config, in.config.Linux.SecurityContext)
			spec, err := buildSpec(in)
			if err != nil {
				t.Fatal(err)
			}
			if spec.Process.Capabilities != nil && in.config.GetLinux().GetSecurityContext().GetPrivileged() {
				all, err := caps.All() // depends on the kernel
				if err != nil {
					t.Fatal(err)
				}
				for _, set := range []*[]string{&spec.Process.Capabilities.Bounding, &spec.Process.Capabilities.Effective, &spec.Process.Capabilities.Permitted} {
					if !slices.Equal(*set, all) {
						t.Errorf("privileged set is %v, want all of the kernel", *set)
					}
					*set = []string{"(all)"}
				}
			}
			golden(t, "spec-"+tt.name, spec)
		})
	}
}

// Nothing an image says but its config's few fields reaches the specification, and
// its volumes nothing at all.
func TestSpecIgnoresImageMetadata(t *testing.T) {
	in := newSpecInput()
	spec, err := buildSpec(in)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	for _, evil := range []string{"evil", "binary://", "/data", "../.."} {
		if strings.Contains(string(text), evil) {
			t.Errorf("%q of the image is in the specification", evil)
		}
	}
}

func TestArguments(t *testing.T) {
	image := &imagespec.ImageConfig{Entrypoint: []string{"entry"}, Cmd: []string{"cmd"}}
	for _, tt := range []struct {
		name          string
		command, args []string
		image         *imagespec.ImageConfig
		want          []string // nil: an error
	}{
		{"image", nil, nil, image, []string{"entry", "cmd"}},
		{"args replace cmd", nil, []string{"a"}, image, []string{"entry", "a"}},
		{"command replaces both", []string{"c"}, nil, image, []string{"c"}},
		{"command and args", []string{"c"}, []string{"a"}, image, []string{"c", "a"}},
		{"cmd only", nil, nil, &imagespec.ImageConfig{Cmd: []string{"cmd"}}, []string{"cmd"}},
		{"unset entrypoint", nil, nil, &imagespec.ImageConfig{Entrypoint: []string{""}, Cmd: []string{"cmd"}}, []string{"cmd"}},
		{"args only", nil, []string{"a"}, &imagespec.ImageConfig{}, []string{"a"}},
		{"nothing", nil, nil, &imagespec.ImageConfig{}, nil},
		{"empty word", []string{""}, nil, image, nil},
		{"NUL in the image", nil, nil, &imagespec.ImageConfig{Cmd: []string{"a\x00"}}, nil},
		{"later empty words are fine", []string{"c", ""}, nil, image, []string{"c", ""}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := arguments(&runtimeapi.ContainerConfig{Command: tt.command, Args: tt.args}, tt.image)
			if (err == nil) != (tt.want != nil) || !slices.Equal(got, tt.want) {
				t.Errorf("got %q, %v, want %q", got, err, tt.want)
			}
		})
	}
	if image.Entrypoint[0] != "entry" || len(image.Cmd) != 1 {
		t.Error("the image's own slices were changed")
	}
}

func TestEnvironment(t *testing.T) {
	in := newSpecInput()
	in.config.Tty = true
	in.image.Env = []string{"LANG=C", "LANG=D", "broken", "=x", "NUL=\x00", "TERM=vt100"}
	in.config.Envs = []*runtimeapi.KeyValue{
		{Key: "RAW", Value: []byte{0xff, 0xfe}}, {Key: "EMPTY"}, {Key: "LANG", Value: []byte("a=b")}, {Key: "HOSTNAME", Value: []byte("mine")},
	}
	want := []string{defaultPath, "TERM=vt100", "HOSTNAME=mine", "LANG=a=b", "RAW=\xff\xfe", "EMPTY="}
	if got := environment(in); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestWorkingDir(t *testing.T) {
	for _, tt := range []struct{ config, image, want string }{
		{"", "", "/"}, {"/a/", "/b", "/a"}, {"", "/b", "/b"}, {"", "b", "/b"}, {"", "../../b", "/b"}, {"", "a\x00", "/"},
	} {
		if got := workingDir(&runtimeapi.ContainerConfig{WorkingDir: tt.config}, &imagespec.ImageConfig{WorkingDir: tt.image}); got != tt.want {
			t.Errorf("config %q, image %q: got %q, want %q", tt.config, tt.image, got, tt.want)
		}
	}
}

func TestCapabilities(t *testing.T) {
	for _, tt := range []struct {
		name               string
		add, drop, ambient []string
		want, wantAmbient  []string
	}{
		{"default", nil, nil, nil, []string{"CAP_CHOWN", "CAP_KILL"}, nil},
		{"add and drop", []string{"SYS_TIME"}, []string{"KILL"}, nil, []string{"CAP_CHOWN", "CAP_SYS_TIME"}, nil},
		{"a drop by name wins", []string{"KILL"}, []string{"KILL"}, nil, []string{"CAP_CHOWN"}, nil},
		{"drop all but", []string{"net_admin"}, []string{"ALL"}, nil, []string{"CAP_NET_ADMIN"}, nil},
		{"ambient", nil, []string{"ALL"}, []string{"NET_RAW"}, []string{"CAP_NET_RAW"}, []string{"CAP_NET_RAW"}},
		{"ambient dropped", nil, []string{"NET_RAW"}, []string{"NET_RAW"}, []string{"CAP_CHOWN", "CAP_KILL"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := capabilities(&runtimeapi.LinuxContainerSecurityContext{Capabilities: &runtimeapi.Capability{
				AddCapabilities: tt.add, DropCapabilities: tt.drop, AddAmbientCapabilities: tt.ambient,
			}}, []string{"CAP_CHOWN", "CAP_KILL"})
			if err != nil {
				t.Fatal(err)
			}
			want := &specs.LinuxCapabilities{Bounding: tt.want, Effective: tt.want, Permitted: tt.want, Inheritable: tt.wantAmbient, Ambient: tt.wantAmbient}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
		})
	}
}

func TestStopSignal(t *testing.T) {
	for _, tt := range []struct {
		config runtimeapi.Signal
		image  string
		want   string
	}{
		{0, "", "SIGTERM"},
		{0, "SIGQUIT", "SIGQUIT"},
		{0, "quit", "SIGQUIT"},
		{0, "3", "SIGQUIT"},
		{0, "37", "SIGRTMIN+3"},
		{0, "SIGRTMIN+3", "SIGRTMIN+3"},
		{0, "SIGRTMAX-1", "SIGRTMAX-1"},
		{0, "SIGIOT", "SIGABRT"},
		{0, "nonsense", "SIGTERM"},
		{0, "0", "SIGTERM"},
		{0, "65", "SIGTERM"},
		{runtimeapi.Signal_SIGNAL_SIGHUP, "SIGQUIT", "SIGHUP"},
		{runtimeapi.Signal_SIGNAL_SIGRTMAXMINUS14, "", "SIGRTMAX-14"},
		{runtimeapi.Signal_SIGNAL_SIGPOLL, "", "SIGPOLL"},
	} {
		if got := stopSignal(tt.config, tt.image); got != tt.want {
			t.Errorf("config %v, image %q: got %q, want %q", tt.config, tt.image, got, tt.want)
		}
	}
	// Every signal of the CRI has a name that podsandbox understands and status gives back.
	for v := range runtimeapi.Signal_name {
		if v == 0 {
			continue
		}
		name := signalName(runtimeapi.Signal(v))
		if _, err := podsandbox.ParseSignal(name); err != nil {
			t.Errorf("%v: %v", runtimeapi.Signal(v), err)
		}
		if signalsByName[name] != runtimeapi.Signal(v) {
			t.Errorf("%v: status says %v", runtimeapi.Signal(v), signalsByName[name])
		}
	}
}

func TestDigestedRef(t *testing.T) {
	img := busybox()
	for _, tt := range []struct{ user, want string }{
		{"busybox", "docker.io/library/busybox@" + manifest},
		{"registry.test/busybox:1", "registry.test/busybox@" + manifest},
		{"elsewhere/busybox", "docker.io/library/busybox@" + manifest},
		{imageID, "docker.io/library/busybox@" + manifest},
	} {
		if got := digestedRef(&img, &runtimeapi.ImageSpec{Image: imageID, UserSpecifiedImage: tt.user}); got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.user, got, tt.want)
		}
	}
	img.RepoDigests = nil
	if got := digestedRef(&img, &runtimeapi.ImageSpec{Image: "x"}); got != imageID {
		t.Errorf("without digests: got %s, want the id", got)
	}
}

func TestPIDMode(t *testing.T) {
	const pod, ctr, host, target = podsandbox.NamespacePod, podsandbox.NamespaceContainer, podsandbox.NamespaceNode, podsandbox.NamespaceTarget
	option := func(m runtimeapi.NamespaceMode, id string) *runtimeapi.NamespaceOption {
		return &runtimeapi.NamespaceOption{Pid: m, TargetId: id}
	}
	other := strings.Repeat("d4", 32)
	stopped := strings.Repeat("e5", 32)
	pods := &fakePods{containers: []*podsandbox.Container{
		{ID: containerID, PodID: podID, State: podsandbox.ContainerRunning},
		{ID: other, PodID: "another", State: podsandbox.ContainerRunning},
		{ID: stopped, PodID: podID, State: podsandbox.ContainerExited},
	}}
	s := &runtimeService{cfg: &Config{Pods: pods}}
	for _, tt := range []struct {
		name  string
		ofPod podsandbox.NamespaceMode
		asked *runtimeapi.NamespaceOption
		want  podsandbox.NamespaceMode // "": an error
	}{
		{"nothing said, container", ctr, nil, ctr},
		{"nothing said, pod", pod, nil, pod},
		{"nothing said, node", host, nil, host},
		{"pod in pod", pod, option(runtimeapi.NamespaceMode_POD, ""), pod},
		{"container in pod", pod, option(runtimeapi.NamespaceMode_CONTAINER, ""), ctr},
		{"pod in container", ctr, option(runtimeapi.NamespaceMode_POD, ""), ""},
		{"pod in node", host, option(runtimeapi.NamespaceMode_POD, ""), host},
		{"node in node", host, option(runtimeapi.NamespaceMode_NODE, ""), host},
		{"node in pod", pod, option(runtimeapi.NamespaceMode_NODE, ""), ""},
		{"target", ctr, option(runtimeapi.NamespaceMode_TARGET, containerID[:8]), target},
		{"target elsewhere", ctr, option(runtimeapi.NamespaceMode_TARGET, other), ""},
		{"target stopped", ctr, option(runtimeapi.NamespaceMode_TARGET, stopped), ""},
		{"target unknown", ctr, option(runtimeapi.NamespaceMode_TARGET, "0000"), ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := somePod()
			p.Config.PID = tt.ofPod
			got, id, err := s.pidMode(p, tt.asked)
			if got != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("got %q, %v, want %q", got, err, tt.want)
			}
			if got == target && id != containerID {
				t.Errorf("target is %q, want the whole id", id)
			}
		})
	}
}

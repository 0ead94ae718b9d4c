package cri

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/podsandbox"
)

// A pod's config as podsandbox gets it.
func TestPodConfigGolden(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit editPod
	}{
		{"full", func(*runtimeapi.RunPodSandboxRequest, *runtimeapi.PodSandboxConfig) {}},
		{"least", func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) {
			r.Config, r.RuntimeHandler = &runtimeapi.PodSandboxConfig{Metadata: c.Metadata}, ""
		}},
		{"node-network", func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) {
			c.Linux.Sysctls = nil
			c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{
				Network: runtimeapi.NamespaceMode_NODE, Pid: runtimeapi.NamespaceMode_NODE, Ipc: runtimeapi.NamespaceMode_NODE,
			}
			c.Linux.SecurityContext.Privileged = true
		}},
		{"sysctl-of-its-own", podSysctl("net.ipv4.ip_unprivileged_port_start", "1024")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			r := podRequest()
			tt.edit(r, r.Config)
			if _, err := w.runtime.RunPodSandbox(t.Context(), r); err != nil {
				t.Fatal(err)
			}
			got := *w.pods.ran
			var echo runtimeapi.PodSandboxConfig
			if err := proto.Unmarshal(got.Echo, &echo); err != nil || !proto.Equal(&echo, r.Config) {
				t.Errorf("echo is %v, %v", &echo, err)
			}
			got.Echo = nil
			golden(t, "pod-"+tt.name, got)
		})
	}
}

// The same config gives the same bytes: that is how podsandbox knows a repeated call.
func TestEchoIsDeterministic(t *testing.T) {
	w := newWorld(t)
	var first []byte
	for i := range 20 {
		if _, err := w.runtime.RunPodSandbox(t.Context(), podRequest()); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = w.pods.ran.Echo
		} else if string(first) != string(w.pods.ran.Echo) {
			t.Fatal("two encodings of one config differ")
		}
	}
}

func TestPodSandboxStatus(t *testing.T) {
	w := newWorld(t)
	p := w.pods.pods[0]
	p.IPs = []netip.Addr{netip.MustParseAddr("10.1.0.7"), netip.MustParseAddr("fd00::7")}
	p.Timings = []podsandbox.Timing{{Step: "network", Duration: 1500 * time.Microsecond}}
	got, err := w.runtime.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: podID[:6], Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	want := &runtimeapi.PodSandboxStatus{
		Id: podID, Metadata: podRequest().Config.Metadata, State: runtimeapi.PodSandboxState_SANDBOX_READY, CreatedAt: p.CreatedAt.UnixNano(),
		Network: &runtimeapi.PodSandboxNetworkStatus{Ip: "10.1.0.7", AdditionalIps: []*runtimeapi.PodIP{{Ip: "fd00::7"}}},
		Linux: &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{
			Options: podRequest().Config.Linux.SecurityContext.NamespaceOptions,
		}},
		Labels: podRequest().Config.Labels, Annotations: podRequest().Config.Annotations, RuntimeHandler: "other",
	}
	if !proto.Equal(got.Status, want) {
		t.Errorf("got  %v\nwant %v", got.Status, want)
	}
	var info struct {
		PID         int
		SandboxID   string
		Config      struct{ Hostname string }
		Timings     []timing
		RuntimeSpec struct {
			Linux struct {
				Namespaces []struct{ Type, Path string }
			}
		}
	}
	if err := json.Unmarshal([]byte(got.Info["info"]), &info); err != nil {
		t.Fatal(err)
	}
	if info.PID != 4242 || info.SandboxID != podID || info.Config.Hostname != "web" || len(info.Timings) != 1 || info.Timings[0].Took != "1.5ms" {
		t.Errorf("info is %+v", info)
	}
	if n := info.RuntimeSpec.Linux.Namespaces; len(n) != 4 || n[1].Type != "network" || n[1].Path != "/run/netns/crisp-a1" {
		t.Errorf("namespaces are %v", n)
	}

	p.State, p.IPs = podsandbox.PodNotReady, nil
	got, err = w.runtime.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: podID})
	if err != nil || got.Status.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY || got.Status.Network.Ip != "" || got.Info != nil {
		t.Errorf("not ready: got %v, %v", got, err)
	}
	_, err = w.runtime.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: "0"})
	wantStatus(t, err, codes.NotFound, `pod "0"`)
}

// The kubelet makes a new pod when the namespace options are absent.
func TestPodSandboxStatusOfBarePod(t *testing.T) {
	w := newWorld(t)
	w.pods.pods[0].Config.Echo = nil
	got, err := w.runtime.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: podID})
	if err != nil || got.GetStatus().GetLinux().GetNamespaces().GetOptions() == nil {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestListPodSandbox(t *testing.T) {
	w := newWorld(t)
	second := somePod()
	second.ID = strings.Repeat("b7", 32)
	second.State = podsandbox.PodNotReady
	config := *second.Config
	config.Labels = map[string]string{"app": "web"}
	second.Config = &config
	w.pods.pods = append(w.pods.pods, second)
	state := func(s runtimeapi.PodSandboxState) *runtimeapi.PodSandboxStateValue {
		return &runtimeapi.PodSandboxStateValue{State: s}
	}
	for _, tt := range []struct {
		name   string
		filter *runtimeapi.PodSandboxFilter
		want   string // first letters of ids
	}{
		{"no filter", nil, "ab"},
		{"empty filter", &runtimeapi.PodSandboxFilter{}, "ab"},
		{"id", &runtimeapi.PodSandboxFilter{Id: podID}, "a"},
		{"short id", &runtimeapi.PodSandboxFilter{Id: "b7b"}, "b"},
		{"unknown id", &runtimeapi.PodSandboxFilter{Id: "7b"}, ""},
		{"ready", &runtimeapi.PodSandboxFilter{State: state(runtimeapi.PodSandboxState_SANDBOX_READY)}, "a"},
		{"not ready", &runtimeapi.PodSandboxFilter{State: state(runtimeapi.PodSandboxState_SANDBOX_NOTREADY)}, "b"},
		{"label of both", &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"app": "web"}}, "ab"},
		{"labels are ANDed", &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"app": "web", "tier": "front"}}, "a"},
		{"label value", &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"app": "we"}}, ""},
		{"label without value", &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"nothere": ""}}, ""},
		{"all together", &runtimeapi.PodSandboxFilter{Id: "a", State: state(1), LabelSelector: map[string]string{"app": "web"}}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp, err := w.runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{Filter: tt.filter})
			if err != nil {
				t.Fatal(err)
			}
			got := ""
			for _, p := range resp.Items {
				got += p.Id[:1]
			}
			if got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
	_, err := w.runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{State: state(9)}})
	wantStatus(t, err, codes.InvalidArgument, "filter.state.state: ")

	resp, err := w.runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{Id: "a"}})
	if err != nil {
		t.Fatal(err)
	}
	want := &runtimeapi.PodSandbox{
		Id: podID, Metadata: podRequest().Config.Metadata, CreatedAt: somePod().CreatedAt.UnixNano(),
		Labels: podRequest().Config.Labels, Annotations: podRequest().Config.Annotations, RuntimeHandler: "other",
	}
	if !proto.Equal(resp.Items[0], want) {
		t.Errorf("got  %v\nwant %v", resp.Items[0], want)
	}
}

// Calls with nothing but an id: empty is refused, what podsandbox says is passed on.
func TestCallsByID(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	for _, tt := range []struct {
		name, field string
		call        func(id string) error
	}{
		{"StopPod", "pod_sandbox_id", func(id string) error {
			_, err := w.runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id})
			return err
		}},
		{"RemovePod", "pod_sandbox_id", func(id string) error {
			_, err := w.runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id})
			return err
		}},
		{"StartContainer", "container_id", func(id string) error {
			_, err := w.runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
			return err
		}},
		{"StopContainer", "container_id", func(id string) error {
			_, err := w.runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id})
			return err
		}},
		{"RemoveContainer", "container_id", func(id string) error {
			_, err := w.runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
			return err
		}},
		{"UpdateContainer", "container_id", func(id string) error {
			_, err := w.runtime.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: id})
			return err
		}},
		{"ReopenLog", "container_id", func(id string) error {
			_, err := w.runtime.ReopenContainerLog(ctx, &runtimeapi.ReopenContainerLogRequest{ContainerId: id})
			return err
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w.pods.calls, w.pods.err = nil, nil
			wantStatus(t, tt.call(""), codes.InvalidArgument, tt.field+": ")
			if w.pods.reached() {
				t.Error("an empty id reached the manager")
			}
			if err := tt.call("unknown"); err != nil { // podsandbox knows what is idempotent
				t.Error(err)
			}
			if len(w.pods.calls) != 1 || w.pods.calls[0] != tt.name {
				t.Errorf("called %v, want %s", w.pods.calls, tt.name)
			}
			w.pods.err = podsandbox.ErrState
			wantStatus(t, tt.call("x"), codes.FailedPrecondition, "")
		})
	}
	for _, call := range []func(id string) error{
		func(id string) error {
			_, err := w.runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id})
			return err
		},
		func(id string) error {
			_, err := w.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
			return err
		},
		func(id string) error {
			_, err := w.runtime.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id})
			return err
		},
	} {
		wantStatus(t, call(""), codes.InvalidArgument, "id: must not be empty")
		wantStatus(t, call("unknown"), codes.NotFound, "unknown")
	}
}

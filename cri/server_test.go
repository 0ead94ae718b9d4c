package cri

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/podsandbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var services = []grpc.ServiceDesc{runtimeapi.RuntimeService_ServiceDesc, runtimeapi.ImageService_ServiceDesc}

// Each method of both services is either there, or in notImplemented with a sentence.
func TestEveryMethod(t *testing.T) {
	w := newWorld(t)
	w.pods.exec = &podsandbox.ExecResult{}
	seen := map[string]bool{}
	check := func(method string, err error) {
		seen[method] = true
		why, missing := notImplemented[method]
		switch {
		case missing:
			wantStatus(t, err, codes.Unimplemented, why)
			if len(why) < 20 {
				t.Errorf("%s: %q is no sentence", method, why)
			}
		case strings.Contains(fmt.Sprint(err), "not implemented"):
			t.Errorf("%s is neither implemented nor in notImplemented", method)
		}
	}
	for _, desc := range services {
		for _, m := range desc.Methods {
			// An empty request: refused or answered, but never by the embedded server.
			in, out := messagesOf(t, desc, m.MethodName)
			check(m.MethodName, w.conn.Invoke(t.Context(), "/"+desc.ServiceName+"/"+m.MethodName, in, out))
		}
		for _, m := range desc.Streams {
			s, err := w.conn.NewStream(t.Context(), &m, "/"+desc.ServiceName+"/"+m.StreamName)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(s.SendMsg(&runtimeapi.VersionRequest{}), s.CloseSend()); err != nil {
				t.Fatal(err)
			}
			check(m.StreamName, s.RecvMsg(&runtimeapi.VersionResponse{}))
		}
	}
	for method := range notImplemented {
		if !seen[method] {
			t.Errorf("notImplemented has %s, which is no method of CRI", method)
		}
	}
}

// messagesOf makes an empty request and response of a method.
func messagesOf(t *testing.T, desc grpc.ServiceDesc, method string) (in, out proto.Message) {
	t.Helper()
	m, ok := reflect.TypeOf(desc.HandlerType).Elem().MethodByName(method)
	if !ok {
		t.Fatalf("no method %s", method)
	}
	return reflect.New(m.Type.In(1).Elem()).Interface().(proto.Message), reflect.New(m.Type.Out(0).Elem()).Interface().(proto.Message)
}

// Until records are read, and while the daemon drains, only Version is answered.
func TestGate(t *testing.T) {
	w := newQuietWorld(t)
	check := func(phase string, want codes.Code) {
		t.Helper()
		if v, err := w.runtime.Version(t.Context(), &runtimeapi.VersionRequest{}); err != nil || v.GetVersion() != "0.1.0" || v.GetRuntimeApiVersion() != "v1" ||
			v.GetRuntimeName() != "crisp" || v.GetRuntimeVersion() != "1.2.3" {
			t.Errorf("%s: got %v, %v", phase, v, err)
		}
		_, err := w.runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
		wantStatus(t, err, want, "")
		_, err = w.image.ImageFsInfo(t.Context(), &runtimeapi.ImageFsInfoRequest{})
		wantStatus(t, err, want, "")
	}
	check("starting", codes.Unavailable)
	w.server.SetReady()
	check("ready", codes.OK)
	w.server.Drain()
	check("draining", codes.Unavailable)
	w.server.SetReady() // too late
	check("still draining", codes.Unavailable)
}

// GracefulStop waits for calls that run, and cancels them when its own time is over.
func TestGracefulStop(t *testing.T) {
	for _, tt := range []struct {
		name  string
		limit time.Duration
		want  codes.Code
	}{{"in time", time.Minute, codes.OK}, {"out of time", time.Millisecond, codes.Unavailable}} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			entered, leave := make(chan struct{}), make(chan struct{})
			w.pods.hook = func(ctx context.Context) {
				close(entered)
				select {
				case <-leave:
				case <-ctx.Done():
				}
			}
			answer := make(chan error, 1)
			go func() {
				_, err := w.runtime.StopPodSandbox(context.Background(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: podID})
				answer <- err
			}()
			<-entered
			if tt.want == codes.OK {
				close(leave)
			}
			ctx, cancel := context.WithTimeout(t.Context(), tt.limit)
			defer cancel()
			w.server.GracefulStop(ctx)
			wantStatus(t, <-answer, tt.want, "")
		})
	}
}

func TestPanicIsInternal(t *testing.T) {
	w := newWorld(t)
	w.pods.hook = func(context.Context) { panic("secret of the request") }
	_, err := w.runtime.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: podID})
	wantStatus(t, err, codes.Internal, "StopPodSandbox panicked")
	if strings.Contains(err.Error(), "secret") {
		t.Errorf("the panic's value went to the caller: %v", err)
	}
	w.pods.hook = nil
	if _, err := w.runtime.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: podID}); err != nil {
		t.Errorf("after a panic: %v", err)
	}
}

func TestWithDeadline(t *testing.T) {
	for _, tt := range []struct {
		name string
		req  any
		want time.Duration // 0: none
	}{
		{"any", &runtimeapi.RunPodSandboxRequest{}, 4 * time.Minute},
		{"pull", &runtimeapi.PullImageRequest{}, 0},
		{"exec without timeout", &runtimeapi.ExecSyncRequest{}, 0},
		{"exec", &runtimeapi.ExecSyncRequest{Timeout: 10}, 4*time.Minute + 10*time.Second},
		{"stop", &runtimeapi.StopContainerRequest{Timeout: 30}, 4*time.Minute + 30*time.Second},
		{"stop, some day", &runtimeapi.StopContainerRequest{Timeout: 1<<63 - 1}, 1000*time.Hour + 4*time.Minute},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := withDeadline(context.Background(), tt.req)
			defer cancel()
			at, has := ctx.Deadline()
			if has != (tt.want != 0) || has && (time.Until(at) > tt.want || time.Until(at) < tt.want-time.Minute) {
				t.Errorf("got %v, %v, want %v", time.Until(at), has, tt.want)
			}
		})
	}
	// The caller's own counts.
	short, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	ctx, cancel := withDeadline(short, &runtimeapi.VersionRequest{})
	defer cancel()
	if ctx != short {
		t.Error("a caller's deadline was replaced")
	}
}

func TestNewServerRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit func(*Config)
		part string
	}{
		{"no pods", func(c *Config) { c.Pods = nil }, "must be set"},
		{"cgroup driver", func(c *Config) { c.CgroupDriver = "x" }, "cgroup driver"},
		{"capability", func(c *Config) { c.DefaultCapabilities = []string{"CAP_FLY"} }, "CAP_FLY"},
		{"seccomp", func(c *Config) { c.UnsetSeccompProfile = "Localhost" }, "Localhost"},
		{"sysctl", func(c *Config) { c.DefaultSysctls = map[string]string{"vm.swappiness": "1"} }, "vm.swappiness"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := Config{Pods: &fakePods{}, Images: &fakeImages{}, Network: &fakeNetwork{}, CgroupDriver: "systemd", CheckCgroupParent: func(string) error { return nil }}
			if _, err := NewServer(cfg); err != nil {
				t.Fatalf("before the edit: %v", err)
			}
			tt.edit(&cfg)
			if _, err := NewServer(cfg); err == nil || !strings.Contains(err.Error(), tt.part) {
				t.Errorf("got %v, want an error with %q", err, tt.part)
			}
		})
	}
}

func TestSemantic(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"v1.2.3-4-gabc", "1.2.3-4-gabc"}, {"1.2.3", "1.2.3"}, {"", "0.0.0-dev"}, {"unknown", "0.0.0-dev-unknown"}, {"abc 1", "0.0.0-dev-abc-1"}, {"7", "0.0.0-dev-7"},
	} {
		if got := semantic(tt.in); got != tt.want {
			t.Errorf("%q: got %q, want %q", tt.in, got, tt.want)
		}
	}
}

func TestStatusCall(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Settings = map[string]string{"socket": "x"} })
	w.network.condition = network.Condition{Reason: "NoRange", Message: "waiting"}
	w.pods.operations = []podsandbox.Operation{{What: "run pod", Object: "prod/web", Began: time.Now().Add(-time.Second), Step: "network", StepBegan: time.Now()}}
	got, err := w.runtime.Status(t.Context(), &runtimeapi.StatusRequest{Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	want := &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
			{Type: "RuntimeReady", Status: true},
			{Type: "NetworkReady", Reason: "NoRange", Message: "waiting"},
		}},
		RuntimeHandlers: []*runtimeapi.RuntimeHandler{
			{Features: &runtimeapi.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: true, UserNamespaces: true}},
			{Name: "other", Features: &runtimeapi.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: true, UserNamespaces: true}},
		},
		Features: &runtimeapi.RuntimeFeatures{SupplementalGroupsPolicy: true, MountOptions: true},
	}
	info := got.Info
	got.Info = nil
	if !proto.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if info["config"] != `{"socket":"x"}` || !strings.Contains(info["operations"], `"step":"network"`) || !strings.Contains(info["operations"], "prod/web") {
		t.Errorf("info is %v", info)
	}
	if got, err = w.runtime.Status(t.Context(), &runtimeapi.StatusRequest{}); err != nil || got.Info != nil {
		t.Errorf("not verbose: info is %v, %v", got.Info, err)
	}
}

func TestRuntimeConfig(t *testing.T) {
	for name, want := range map[string]runtimeapi.CgroupDriver{"cgroupfs": runtimeapi.CgroupDriver_CGROUPFS, "systemd": runtimeapi.CgroupDriver_SYSTEMD} {
		w := newWorld(t, func(c *Config) { c.CgroupDriver = name })
		got, err := w.runtime.RuntimeConfig(t.Context(), &runtimeapi.RuntimeConfigRequest{})
		if err != nil || got.GetLinux().GetCgroupDriver() != want {
			t.Errorf("%s: got %v, %v", name, got, err)
		}
	}
}

func TestUpdateRuntimeConfig(t *testing.T) {
	w := newWorld(t)
	send := func(cidr string) error {
		_, err := w.runtime.UpdateRuntimeConfig(t.Context(), &runtimeapi.UpdateRuntimeConfigRequest{
			RuntimeConfig: &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: cidr}},
		})
		return err
	}
	if err := send("10.1.0.0/24,fd00::/64"); err != nil || w.network.cidr != "10.1.0.0/24,fd00::/64" {
		t.Errorf("got %v, %q", err, w.network.cidr)
	}
	if err := send(""); err != nil || w.network.cidr == "" {
		t.Errorf("an empty range: %v, %q", err, w.network.cidr)
	}
	wantStatus(t, send("bad"), codes.InvalidArgument, "no range")
	if _, err := w.runtime.UpdateRuntimeConfig(t.Context(), &runtimeapi.UpdateRuntimeConfigRequest{}); err != nil {
		t.Error(err)
	}
}

package cri

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"path"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/image"
	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/caps"
)

// arena is the service without a socket and without a host: nothing that a request names
// is looked up, so that any request can be tried.
type arena struct {
	server Server
	svc    *runtimeService
	pods   *fakePods
}

func newArena() *arena {
	pods := &fakePods{pods: []*podsandbox.Pod{somePod()}, exec: &podsandbox.ExecResult{}, containers: []*podsandbox.Container{someContainer()}}
	pods.pods[0].Config.Privileged = true
	a := &arena{pods: pods, svc: &runtimeService{
		cfg: &Config{
			Pods: pods, Images: &fakeImages{list: []image.Image{busybox()}}, Network: &fakeNetwork{}, Host: plainHost(),
			CheckCgroupParent: func(string) error { return nil }, Handlers: []string{"other"}, DefaultCapabilities: caps.Default(),
		},
		unsetSeccomp: runtimeapi.SecurityProfile_Unconfined,
		lookUp: func(_ context.Context, _ string, c *runtimeapi.ContainerConfig, _ *runtimeapi.SecurityProfile) (*found, error) {
			f := &found{}
			for _, d := range c.GetDevices() {
				f.devices = append(f.devices, specs.LinuxDevice{Path: path.Clean(d.GetContainerPath()), Type: "c", Major: 1, Minor: 3})
			}
			return f, nil
		},
	}}
	a.server.gate.to(serving)
	return a
}

// send makes the call and judges the answer: no panic, no fault of ours, and what
// reached the manager must be sane by rules that are written down a second time, below.
func (a *arena) send(t testing.TB, r proto.Message) error {
	t.Helper()
	a.pods.ran, a.pods.created, a.pods.limits, a.pods.calls = nil, nil, nil, nil
	ctx := context.Background()
	_, err := a.server.call(string(r.ProtoReflect().Descriptor().Name()), func() (any, error) {
		switch r := r.(type) {
		case *runtimeapi.RunPodSandboxRequest:
			return a.svc.RunPodSandbox(ctx, r)
		case *runtimeapi.CreateContainerRequest:
			return a.svc.CreateContainer(ctx, r)
		case *runtimeapi.UpdateContainerResourcesRequest:
			return a.svc.UpdateContainerResources(ctx, r)
		case *runtimeapi.ExecSyncRequest:
			return a.svc.ExecSync(ctx, r)
		case *runtimeapi.StopContainerRequest:
			return a.svc.StopContainer(ctx, r)
		case *runtimeapi.ListContainersRequest:
			return a.svc.ListContainers(ctx, r)
		case *runtimeapi.ListPodSandboxRequest:
			return a.svc.ListPodSandbox(ctx, r)
		}
		panic("no such request in this test")
	})
	if errors.Is(err, errPanic) {
		t.Fatalf("panic: %v", err)
	}
	if err != nil {
		if s := status.Convert(toStatus(err)); s.Code() == codes.Internal || s.Code() == codes.Unknown {
			t.Errorf("a request can make us say %s: %s", s.Code(), s.Message())
		}
		if a.pods.reached() {
			t.Errorf("refused, but the manager was called: %v", err)
		}
		if len(err.Error()) > 2000 {
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
	}
	if p := a.pods.ran; p != nil {
		for _, wrong := range podFaults(p) {
			t.Errorf("reached the manager: %s", wrong)
		}
	}
	if c := a.pods.created; c != nil {
		for _, wrong := range containerFaults(c) {
			t.Errorf("reached the manager: %s", wrong)
		}
	}
	return err
}

// dirty: has what could end a line, a path or a string of C.
func dirty(s string) bool { return strings.ContainsAny(s, "\x00\n\r") }

// podFaults is what must never reach podsandbox.
func podFaults(p *podsandbox.PodConfig) (faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	for _, s := range []string{p.Name, p.UID, p.Namespace} {
		if s == "" || len(s) > 253 || dirty(s) || strings.Contains(s, "/") || strings.Contains(s, "..") {
			fault("identity %q", s)
		}
	}
	if d := p.LogDirectory; d != "" && (!path.IsAbs(d) || path.Clean(d) != d || d == "/" || dirty(d)) {
		fault("log directory %q", d)
	}
	if p.Hostname == "" || len(p.Hostname) > 64 || strings.ContainsAny(p.Hostname, " \n\x00/") {
		fault("hostname %q", p.Hostname)
	}
	for _, s := range slices.Concat(p.DNS.Servers, p.DNS.Searches, p.DNS.Options) {
		if s == "" || strings.ContainsAny(s, " \t\n\r\x00#;") {
			fault("dns %q", s)
		}
	}
	for k, v := range p.Sysctls {
		net, ipc := strings.HasPrefix(k, "net."), strings.HasPrefix(k, "kernel.shm") || strings.HasPrefix(k, "kernel.msg") || k == "kernel.sem" || strings.HasPrefix(k, "fs.mqueue.")
		switch {
		case strings.Contains(k, "/") || strings.Contains(k, "..") || dirty(k+v):
			fault("sysctl %q = %q", k, v)
		case net && p.Network == podsandbox.NamespaceNode, ipc && p.IPC == podsandbox.NamespaceNode, !net && !ipc && k != "kernel.domainname":
			fault("sysctl %q of the node", k)
		}
	}
	for _, m := range p.Ports {
		if m.HostPort == 0 || m.ContainerPort == 0 || m.Protocol == "" || p.Network == podsandbox.NamespaceNode {
			fault("port %+v", m)
		}
	}
	if p.Network != podsandbox.NamespacePod && p.Network != podsandbox.NamespaceNode || p.IPC != podsandbox.NamespacePod && p.IPC != podsandbox.NamespaceNode ||
		p.PID == podsandbox.NamespaceTarget || p.PID == "" {
		fault("namespaces %q %q %q", p.Network, p.IPC, p.PID)
	}
	return faults
}

// containerFaults is what must never reach podsandbox.
func containerFaults(c *podsandbox.ContainerConfig) (faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	if c.Name == "" || len(c.Name) > 253 || dirty(c.Name) || strings.Contains(c.Name, "/") {
		fault("name %q", c.Name)
	}
	if l := c.LogPath; l != "" && (path.IsAbs(l) || path.Clean(l) != l || l == "." || strings.HasPrefix(l, "..") || dirty(l)) {
		fault("log path %q", l)
	}
	if _, err := podsandbox.ParseSignal(c.StopSignal); err != nil || c.StopSignal == "" {
		fault("stop signal %q", c.StopSignal)
	}
	if (c.PID == podsandbox.NamespaceTarget) != (c.TargetID != "") || c.PID == "" {
		fault("pid mode %q of %q", c.PID, c.TargetID)
	}
	p := c.Spec.Process
	if len(p.Args) == 0 || p.Args[0] == "" || strings.ContainsRune(strings.Join(slices.Concat(p.Args, p.Env), ""), 0) {
		fault("command %q, environment %q", p.Args, p.Env)
	}
	seen := map[string]bool{}
	for _, e := range p.Env {
		name, _, ok := strings.Cut(e, "=")
		if !ok || name == "" || seen[name] {
			fault("environment %q", e)
		}
		seen[name] = true
	}
	if !path.IsAbs(p.Cwd) {
		fault("working directory %q", p.Cwd)
	}
	if s := p.OOMScoreAdj; s != nil && (*s < -1000 || *s > 1000) {
		fault("oom score %d", *s)
	}
	for i, m := range c.Spec.Mounts {
		d := m.Destination
		if !path.IsAbs(d) || path.Clean(d) != d || d == "/" || strings.ContainsRune(d+m.Source, 0) {
			fault("mount on %q of %q", d, m.Source)
		}
		if m.Type != "bind" {
			continue
		}
		if strings.HasPrefix(d+"/", "/proc/") && !slices.Contains(procFiles, d) {
			fault("mount on %q", d)
		}
		if strings.HasPrefix(d+"/", "/sys/") && len(c.Spec.Linux.MaskedPaths) > 0 && !strings.HasPrefix(d, "/sys/fs/") && !strings.HasPrefix(d, "/sys/kernel/") && !strings.HasPrefix(d, "/sys/firmware/efi/efivars") {
			fault("mount on %q in a container that is not privileged", d)
		}
		if !path.IsAbs(m.Source) && m.Source != "crisp:shm" || climbs(m.Source) {
			fault("mount source %q", m.Source)
		}
		// No bind mount hides one that comes after it in the list.
		for _, later := range c.Spec.Mounts[i+1:] {
			if d != later.Destination && strings.HasPrefix(d, later.Destination+"/") {
				fault("mount on %q comes before %q", d, later.Destination)
			}
		}
	}
	for _, d := range c.Spec.Linux.Devices {
		if !path.IsAbs(d.Path) || path.Clean(d.Path) != d.Path || strings.HasPrefix(d.Path+"/", "/proc/") || strings.HasPrefix(d.Path+"/", "/sys/") {
			fault("device %q", d.Path)
		}
	}
	for _, l := range slices.Concat(c.Spec.Linux.MaskedPaths, c.Spec.Linux.ReadonlyPaths) {
		if !path.IsAbs(l) || path.Clean(l) != l || strings.ContainsRune(l, 0) {
			fault("masked or read-only path %q", l)
		}
	}
	for k, v := range c.Spec.Linux.Resources.Unified {
		if strings.Contains(k, "/") || strings.HasPrefix(k, ".") || dirty(k+v) {
			fault("cgroup file %q = %q", k, v)
		}
	}
	if u := c.User; u.UID != nil && (*u.UID < 0 || *u.UID > math.MaxInt32) || u.GID != nil && u.UID == nil && u.Username == "" {
		fault("user %+v", u)
	}
	// What a user can write must not become an annotation that others trust.
	if extra := maps.Clone(c.Spec.Annotations); extra != nil {
		for _, own := range []string{annotationType, annotationContainer, annotationImage, annotationSandboxID, annotationSandboxName, annotationNamespace, annotationUID, annotationLogs, annotationHandler} {
			delete(extra, own)
		}
		if len(extra) > 0 {
			fault("annotations %v", extra)
		}
	}
	return faults
}

// hostile are the values that each field is set to in turn (C-76, C-77).
func hostile(fd protoreflect.FieldDescriptor) []protoreflect.Value {
	switch fd.Kind() {
	case protoreflect.StringKind:
		var list []protoreflect.Value
		for _, s := range []string{
			"", ".", "..", "/", "//", "../x", "/../../etc", "/proc/self", "/sys", "a/b", "a\x00b", "/a\x00", "a\nb", "/a\nb", "\u202e", " ", "-", "%s%n", "${x}", "~",
			strings.Repeat("x", 70000), "/" + strings.Repeat("x/", 3000), "localhost/x", "::", "busybox", podID, containerID, "ALL", "all", "CAP_", "+1", "-1", "99999999999999999999",
		} {
			list = append(list, protoreflect.ValueOfString(s))
		}
		return list
	case protoreflect.BytesKind:
		return []protoreflect.Value{protoreflect.ValueOfBytes(nil), protoreflect.ValueOfBytes([]byte{0}), protoreflect.ValueOfBytes([]byte{0xff, '\n'})}
	case protoreflect.BoolKind:
		return []protoreflect.Value{protoreflect.ValueOfBool(true), protoreflect.ValueOfBool(false)}
	case protoreflect.EnumKind:
		var list []protoreflect.Value
		for _, n := range []protoreflect.EnumNumber{-1, 0, 1, 2, 3, 4, 99, math.MaxInt32, math.MinInt32} {
			list = append(list, protoreflect.ValueOfEnum(n))
		}
		return list
	case protoreflect.Int32Kind:
		return []protoreflect.Value{protoreflect.ValueOfInt32(-1), protoreflect.ValueOfInt32(0), protoreflect.ValueOfInt32(math.MaxInt32), protoreflect.ValueOfInt32(math.MinInt32)}
	case protoreflect.Int64Kind:
		return []protoreflect.Value{protoreflect.ValueOfInt64(-1), protoreflect.ValueOfInt64(0), protoreflect.ValueOfInt64(math.MaxInt64), protoreflect.ValueOfInt64(math.MinInt64), protoreflect.ValueOfInt64(1 << 32)}
	case protoreflect.Uint32Kind:
		return []protoreflect.Value{protoreflect.ValueOfUint32(0), protoreflect.ValueOfUint32(math.MaxUint32)}
	case protoreflect.Uint64Kind:
		return []protoreflect.Value{protoreflect.ValueOfUint64(0), protoreflect.ValueOfUint64(math.MaxUint64)}
	}
	return nil
}

// everyField calls try with root changed in one field, for each field of it and of what is in
// it (made if it is nil), and each hostile value; then puts it back.
func everyField(m protoreflect.Message, where string, try func(where string)) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		here := where + "." + string(fd.Name())
		had, was := m.Has(fd), proto.Clone(m.Interface()) // a list's value is the field itself, not what was in it
		switch {
		case fd.IsMap():
			for _, key := range hostileOr(fd.MapKey(), 40) {
				fresh := m.NewField(fd)
				fresh.Map().Set(key.MapKey(), protoreflect.ValueOfString("1"))
				m.Set(fd, fresh)
				try(here)
			}
			for _, v := range hostileOr(fd.MapValue(), 40) {
				fresh := m.NewField(fd)
				for _, key := range []string{"net.core.somaxconn", "memory.high"} {
					fresh.Map().Set(protoreflect.ValueOfString(key).MapKey(), v)
				}
				m.Set(fd, fresh)
				try(here)
			}
		case fd.IsList() && fd.Kind() == protoreflect.MessageKind:
			fresh := m.NewField(fd)
			element := fresh.List().NewElement()
			fresh.List().Append(element)
			m.Set(fd, fresh)
			try(here + "[]")
			everyField(element.Message(), here+"[0]", try)
		case fd.IsList():
			for _, v := range hostileOr(fd, 40) {
				fresh := m.NewField(fd)
				fresh.List().Append(v)
				m.Set(fd, fresh)
				try(here)
			}
		case fd.Kind() == protoreflect.MessageKind:
			m.Clear(fd)
			try(here)
			fresh := m.NewField(fd)
			m.Set(fd, fresh)
			try(here + "{}")
			if had {
				m.Set(fd, was.ProtoReflect().Get(fd))
			}
			everyField(m.Mutable(fd).Message(), here, try)
		default:
			for _, v := range hostile(fd) {
				m.Set(fd, v)
				try(here)
			}
		}
		proto.Reset(m.Interface())
		proto.Merge(m.Interface(), was)
	}
}

func hostileOr(fd protoreflect.FieldDescriptor, most int) []protoreflect.Value {
	l := hostile(fd)
	return l[:min(most, len(l))]
}

// Each field of each request that carries a config, set to each hostile value in turn: no
// panic, no Internal, and nothing unsound reaches the manager.
func TestEveryFieldHostile(t *testing.T) {
	full := containerRequest()
	full.Config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/a", HostPath: "/b"}}
	full.Config.Devices = []*runtimeapi.Device{{ContainerPath: "/dev/a", HostPath: "/dev/null", Permissions: "r"}}
	full.SandboxConfig = podRequest().GetConfig()
	for _, r := range []proto.Message{
		podRequest(), full,
		&runtimeapi.UpdateContainerResourcesRequest{ContainerId: "c", Linux: &runtimeapi.LinuxContainerResources{}},
		&runtimeapi.ExecSyncRequest{ContainerId: "c", Cmd: []string{"x"}},
		&runtimeapi.StopContainerRequest{ContainerId: "c"},
		&runtimeapi.ListContainersRequest{}, &runtimeapi.ListPodSandboxRequest{},
	} {
		name := string(r.ProtoReflect().Descriptor().Name())
		t.Run(name, func(t *testing.T) {
			a := newArena()
			if err := a.send(t, r); err != nil {
				t.Fatalf("unchanged: %v", err)
			}
			before, tried, refused := proto.Clone(r), 0, 0
			everyField(r.ProtoReflect(), name, func(where string) {
				tried++
				err := a.send(t, r)
				if err != nil {
					refused++
				}
				if t.Failed() {
					t.Fatalf("after %s was changed: %.2000s", where, fmt.Sprint(r))
				}
			})
			if !proto.Equal(before, r) {
				t.Error("the walk did not put everything back")
			}
			t.Logf("%d requests, %d refused", tried, refused)
		})
	}
}

func FuzzRunPodSandbox(f *testing.F)   { fuzzRequest(f, podRequest()) }
func FuzzCreateContainer(f *testing.F) { fuzzRequest(f, containerRequest()) }
func FuzzUpdateContainerResources(f *testing.F) {
	fuzzRequest(f, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: "c", Linux: containerRequest().Config.Linux.Resources})
}

// fuzzRequest sends whatever bytes decode as a request of this type.
func fuzzRequest[M proto.Message](f *testing.F, seed M) {
	b, err := wire.Marshal(seed)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(nil))
	a := newArena()
	f.Fuzz(func(t *testing.T, b []byte) {
		r := seed.ProtoReflect().New().Interface()
		if proto.Unmarshal(b, r) != nil {
			return
		}
		_ = a.send(t, r) // judges; an error is an answer
	})
}

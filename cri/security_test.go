package cri

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/apparmor"
	"github.com/crisp-cri/crisp/runtime/selinux"
)

// fakeProfiles is a kernel's AppArmor.
type fakeProfiles struct {
	loaded []string
	broken error // why the default profile cannot be loaded
}

func (f *fakeProfiles) Has(name string) (bool, error) { return slices.Contains(f.loaded, name), nil }
func (f *fakeProfiles) Problem() error                { return f.broken }
func (f *fakeProfiles) Ensure(context.Context) error {
	if !slices.Contains(f.loaded, apparmor.Default) {
		return f.broken
	}
	return nil
}

func TestAppArmorProfileOfAContainer(t *testing.T) {
	of := func(kind runtimeapi.SecurityProfile_ProfileType, ref string) *runtimeapi.SecurityProfile {
		return &runtimeapi.SecurityProfile{ProfileType: kind, LocalhostRef: ref}
	}
	const (
		standard, unconfined, local = runtimeapi.SecurityProfile_RuntimeDefault, runtimeapi.SecurityProfile_Unconfined, runtimeapi.SecurityProfile_Localhost
	)
	ready := &fakeProfiles{loaded: []string{apparmor.Default, "mine"}}
	broken := &fakeProfiles{loaded: []string{"mine"}, broken: errors.New("cannot load: no parser")}
	for _, tt := range []struct {
		name     string
		kernel   Profiles
		edit     func(*runtimeapi.LinuxContainerSecurityContext)
		want     string
		code     codes.Code
		contains string
	}{
		{"none named", ready, func(sc *runtimeapi.LinuxContainerSecurityContext) {}, apparmor.Default, codes.OK, ""},
		{"none named, default broken", broken, func(sc *runtimeapi.LinuxContainerSecurityContext) {}, "", codes.OK, ""},
		{"default", ready, func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.Apparmor = of(standard, "") }, apparmor.Default, codes.OK, ""},
		{"default, broken", broken, func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.Apparmor = of(standard, "") }, "", codes.Internal, "no parser"},
		{"unconfined", ready, func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.Apparmor = of(unconfined, "") }, "", codes.OK, ""},
		{"by name", broken, func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.Apparmor = of(local, "mine") }, "mine", codes.OK, ""},
		{"by name with the old prefix", ready, func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.Apparmor = of(local, "localhost/mine") }, "mine", codes.OK, ""},
		{"not loaded", ready, func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.Apparmor = of(local, "theirs") }, "", codes.InvalidArgument, `security_context.apparmor.localhost_ref: AppArmor profile is not loaded: "theirs"`},
		{"old string", ready, func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.ApparmorProfile = "localhost/mine" }, "mine", codes.OK, ""},
		{"old string, default", ready, func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.ApparmorProfile = "runtime/default" }, apparmor.Default, codes.OK, ""},
		{"old string, unconfined", ready, func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.ApparmorProfile = "unconfined" }, "", codes.OK, ""},
		{"the field before the string", ready, func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.Apparmor, sc.ApparmorProfile = of(unconfined, ""), "localhost/theirs"
		}, "", codes.OK, ""},
		{"privileged", ready, func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.Privileged, sc.Apparmor = true, of(local, "theirs")
		}, "", codes.OK, ""},
		{"no AppArmor", nil, func(sc *runtimeapi.LinuxContainerSecurityContext) {}, "", codes.OK, ""},
		{"no AppArmor, unconfined", nil, func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.Apparmor = of(unconfined, "") }, "", codes.OK, ""},
		{"no AppArmor, default", nil, func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.Apparmor = of(standard, "") }, "", codes.Unimplemented, "this kernel has no AppArmor"},
		{"no AppArmor, by name", nil, func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.ApparmorProfile = "localhost/x" }, "", codes.Unimplemented, "this kernel has no AppArmor"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, func(c *Config) { c.AppArmor = tt.kernel })
			w.pods.pods[0].Config.Privileged = true
			r := containerRequest()
			tt.edit(r.Config.Linux.SecurityContext)
			_, err := w.runtime.CreateContainer(t.Context(), r)
			wantStatus(t, err, tt.code, "")
			if err != nil {
				if !strings.Contains(err.Error(), tt.contains) {
					t.Errorf("got %q, want it to say %q", err, tt.contains)
				}
				return
			}
			if got := w.pods.created.Spec.Process.ApparmorProfile; got != tt.want {
				t.Errorf("got profile %q, want %q", got, tt.want)
			}
		})
	}
}

// fakeLabels makes labels as a policy with container_t does.
func fakeLabels(o selinux.Options) (process, mount string, err error) {
	if o.Type == "nothere_t" {
		return "", "", errors.New("no such type")
	}
	or := func(s, standard string) string {
		if s == "" {
			return standard
		}
		return s
	}
	user := or(o.User, "system_u")
	return strings.Join([]string{user, or(o.Role, "system_r"), or(o.Type, "container_t"), o.Level}, ":"), user + ":object_r:container_file_t:" + o.Level, nil
}

func TestSELinuxLabels(t *testing.T) {
	for _, tt := range []struct {
		name           string
		pod            *runtimeapi.SELinuxOption
		edit           func(*runtimeapi.LinuxContainerSecurityContext)
		process, mount string // LEVEL is the pod's own
		err            string
	}{
		{"none named", nil, func(sc *runtimeapi.LinuxContainerSecurityContext) {}, "system_u:system_r:container_t:LEVEL", "system_u:object_r:container_file_t:LEVEL", ""},
		{"type", nil, func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.SelinuxOptions = &runtimeapi.SELinuxOption{Type: "spc_t"}
		}, "system_u:system_r:spc_t:LEVEL", "system_u:object_r:container_file_t:LEVEL", ""},
		{"level", nil, func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.SelinuxOptions = &runtimeapi.SELinuxOption{Level: "s0:c7,c8"}
		}, "system_u:system_r:container_t:s0:c7,c8", "system_u:object_r:container_file_t:s0:c7,c8", ""},
		{"all", nil, func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.SelinuxOptions = &runtimeapi.SELinuxOption{User: "u", Role: "r", Type: "t", Level: "s1"}
		}, "u:r:t:s1", "u:object_r:container_file_t:s1", ""},
		{"the pod's level", &runtimeapi.SELinuxOption{Level: "s0:c1,c2"}, func(sc *runtimeapi.LinuxContainerSecurityContext) {}, "system_u:system_r:container_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2", ""},
		{"privileged", nil, func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.Privileged = true }, "", "system_u:object_r:container_file_t:LEVEL", ""},
		{"unknown type", nil, func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.SelinuxOptions = &runtimeapi.SELinuxOption{Type: "nothere_t"}
		}, "", "", "selinux_options: no such type"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newArena()
			w.svc.cfg.SELinux, w.svc.cfg.Host.SELinux, w.svc.labels = true, true, fakeLabels
			run := podRequest()
			run.Config.Linux.SecurityContext.SelinuxOptions = tt.pod
			config, err := w.svc.podConfig(run)
			if err != nil {
				t.Fatal(err)
			}
			level := selinux.LevelOf(config.Label)
			if level == "" || !strings.HasPrefix(config.Label, "system_u:object_r:container_file_t:") {
				t.Fatalf("the pod has label %q", config.Label)
			}
			config.Privileged = true
			w.pods.pods[0].Config = config
			r := containerRequest()
			tt.edit(r.Config.Linux.SecurityContext)
			_, err = w.svc.CreateContainer(t.Context(), r)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("got %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			spec := w.pods.created.Spec
			if want := strings.Replace(tt.process, "LEVEL", level, 1); spec.Process.SelinuxLabel != want {
				t.Errorf("process: got %q, want %q", spec.Process.SelinuxLabel, want)
			}
			if want := strings.Replace(tt.mount, "LEVEL", level, 1); spec.Linux.MountLabel != want {
				t.Errorf("files: got %q, want %q", spec.Linux.MountLabel, want)
			}
		})
	}
}

// Two pods have different levels, whatever their names; the same pod has the same, also when it is asked for again.
func TestPodsHaveLevelsOfTheirOwn(t *testing.T) {
	w := newArena()
	w.svc.cfg.SELinux, w.svc.labels = true, fakeLabels
	w.pods.pods = nil
	request := podRequest()
	request.Config.Linux.SecurityContext.SelinuxOptions = nil
	first, err := w.svc.podConfig(request)
	if err != nil {
		t.Fatal(err)
	}
	again, err := w.svc.podConfig(request)
	if err != nil || again.Label != first.Label {
		t.Errorf("asked again: got %q, %v; want %q", again.Label, err, first.Label)
	}
	other := *first
	other.Name = "other"
	w.pods.pods = []*podsandbox.Pod{{ID: podID, Config: &other}} // it has the level that would be the first's
	third, err := w.svc.podConfig(request)
	if err != nil || third.Label == first.Label {
		t.Errorf("got %q, %v, which another pod has", third.Label, err)
	}
}

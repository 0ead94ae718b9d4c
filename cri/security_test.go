package cri

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/runtime/apparmor"
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

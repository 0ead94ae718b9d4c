package cri

import (
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func withAppArmor(kind runtimeapi.SecurityProfile_ProfileType, ref string) editContainer {
	return withSecurity(func(sc *runtimeapi.LinuxContainerSecurityContext) {
		sc.Apparmor = &runtimeapi.SecurityProfile{ProfileType: kind, LocalhostRef: ref}
	})
}

func kernelHasAppArmor() bool {
	enabled, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	return err == nil && strings.HasPrefix(string(enabled), "Y")
}

func TestAppArmorInAUserNamespace(t *testing.T) {
	w := needUserns(t)
	want := "crisp-default (enforce)\n"
	if !kernelHasAppArmor() {
		want = ""
	}
	c := w.usernsPod(t).run([]string{"sleep"})
	if got, err := c.try("cat", "/proc/self/attr/current"); err != nil || string(got.GetStdout()) != want {
		t.Errorf("got %q, %v; want %q", got.GetStdout(), err, want)
	}
}

// A kernel with AppArmor confines; on one without, who asks for that is told.
func TestAppArmor(t *testing.T) {
	w := need(t)
	const (
		standard, unconfined, local = runtimeapi.SecurityProfile_RuntimeDefault, runtimeapi.SecurityProfile_Unconfined, runtimeapi.SecurityProfile_Localhost
	)
	p := w.pod(t, privilegedPod)
	if !kernelHasAppArmor() {
		for name, edit := range map[string]editContainer{"default": withAppArmor(standard, ""), "by name": withAppArmor(local, "x")} {
			_, err := p.tryCreate([]string{"true"}, edit)
			wantCode(t, err, codes.Unimplemented, "apparmor", "this kernel has no AppArmor")
			if t.Failed() {
				t.Log(name)
			}
		}
		p.output([]string{"true"})
		p.output([]string{"true"}, withAppArmor(unconfined, ""))
		return
	}
	admin := func(c *runtimeapi.ContainerConfig) {
		sc := c.Linux.SecurityContext
		sc.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"ALL"}}
	}
	podShare, containerShare := withNamespaces(func(ns *runtimeapi.NamespaceOption) { ns.Pid = runtimeapi.NamespaceMode_POD })
	for _, tt := range []struct {
		name string
		pod  *pod
		edit []editContainer
		want string
	}{
		{"none named", p, nil, "crisp-default (enforce)\n"},
		{"default", p, []editContainer{withAppArmor(standard, "")}, "crisp-default (enforce)\n"},
		{"by name", p, []editContainer{withAppArmor(local, "crisp-default")}, "crisp-default (enforce)\n"},
		{"unconfined", p, []editContainer{withAppArmor(unconfined, "")}, "unconfined\n"},
		{"privileged", p, []editContainer{privilegedContainer}, "unconfined\n"},
		{"shared processes", w.pod(t, podShare), []editContainer{containerShare}, "crisp-default (enforce)\n"},
		{"no new privileges", p, []editContainer{withSeccomp(standard, ""), withSecurity(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.NoNewPrivs = true })}, "crisp-default (enforce)\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := tt.pod.on(t).run([]string{"cat", "/proc/self/attr/current", ",", "sleep"}, tt.edit...)
			c.says(strings.TrimSpace(tt.want))
			if got := c.exec("cat", "/proc/self/attr/current"); got != tt.want {
				t.Errorf("exec'd: got %q, want %q", got, tt.want)
			}
			c.stop(0)
		})
	}
	t.Run("denies", func(t *testing.T) {
		p := p.on(t)
		c := p.run([]string{"sleep"}, admin)
		c.fails("mount-tmpfs", "/tmp")
		c.fails("mkfile", "/proc/sys/kernel/core_pattern", "x")
		free := p.run([]string{"sleep"}, admin, withAppArmor(unconfined, ""))
		free.exec("mkdir", "/tmp/here")
		free.exec("mount-tmpfs", "/tmp/here")
		// It can be stopped, and what it does for itself it may.
		if got := c.exec("mkfile", "/file", "x"); got != "" {
			t.Errorf("got %q", got)
		}
		c.stop(10)
		if st := c.status(); st.ExitCode != 143 {
			t.Errorf("stopped with %d, want 143: the signal did not reach it", st.ExitCode)
		}
	})
	_, err := p.tryCreate([]string{"true"}, withAppArmor(local, "nobody-loaded-this"))
	wantCode(t, err, codes.InvalidArgument, "nobody-loaded-this", "not loaded")
	r, err := w.rt.Status(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	if got := r.Info["apparmor"]; !strings.Contains(got, "crisp-default") || strings.Contains(got, "problem") {
		t.Errorf("verbose Status says of AppArmor %q", got)
	}
}

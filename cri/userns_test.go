package cri

import (
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/runtime/spawn"
)

// A container says of the pod's user namespace what the pod said, or nothing.
func TestContainerOfAUsernsPod(t *testing.T) {
	w := newWorld(t)
	w.pods.pods[0].Config.Userns = &spawn.IDMap{UID: 65536, GID: 65536, Size: 65536}
	mapping := func(host uint32) []*runtimeapi.IDMapping { return []*runtimeapi.IDMapping{ids(host)} }
	for _, tt := range []struct {
		name, field string // "": it is created
		edit        editContainer
	}{
		{"nothing", "", func(*runtimeapi.CreateContainerRequest, *runtimeapi.ContainerConfig) {}},
		{"the same", "", ctrNS(withUserns(&runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}))},
		{"none", scField + "namespace_options.userns_options.mode: ", ctrNS(&runtimeapi.NamespaceOption{
			Pid: runtimeapi.NamespaceMode_CONTAINER, UsernsOptions: &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_NODE},
		})},
		{"another", scField + "namespace_options.userns_options.uids: ", ctrNS(&runtimeapi.NamespaceOption{
			Pid: runtimeapi.NamespaceMode_CONTAINER, UsernsOptions: &runtimeapi.UserNamespace{Uids: mapping(1 << 20), Gids: mapping(1 << 20)},
		})},
		{"a mapped mount", "", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", HostPath: t.TempDir(), UidMappings: mapping(65536), GidMappings: mapping(65536)})},
		{"a mount mapped elsewhere", "config.mounts[0].uidMappings: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b", UidMappings: mapping(1 << 20), GidMappings: mapping(1 << 20)})},
		{"mounts for the node", "config.mounts[0].propagation: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b", Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL})},
		{"mounts of the node", "", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", HostPath: t.TempDir(), Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER})},
		{"a user it has not", scField + "run_as_user: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUser.Value = 65536 })},
		{"a group it has not", scField + "run_as_group: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsGroup.Value = 65536 })},
		{"the last group it has", "", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsGroup.Value = 65535 })},
		{"supplemental groups it has not", scField + "supplemental_groups[1]: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) { s.SupplementalGroups = []int64{1, 70000} })},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := containerRequest()
			tt.edit(r, r.Config)
			_, err := w.runtime.CreateContainer(t.Context(), r)
			if tt.field == "" {
				if err != nil {
					t.Errorf("got %v", err)
				}
				return
			}
			wantStatus(t, err, bad, tt.field)
		})
	}
}

// On a node that cannot, a pod is told why, before anything is made; what is wrong with it is said first.
func TestNodeWithoutUserNamespaces(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Host.NoUserNamespaces = "the file system zfs cannot" })
	r := podRequest()
	r.Config.Linux.SecurityContext.NamespaceOptions = withUserns(&runtimeapi.NamespaceOption{})
	_, err := w.runtime.RunPodSandbox(t.Context(), r)
	wantRefusal(t, w, err, lack, usernsField+".mode: ")
	if !strings.Contains(err.Error(), "zfs") {
		t.Errorf("got %v, want the reason", err)
	}
	r.Config.Linux.SecurityContext.NamespaceOptions.UsernsOptions.Gids = nil
	_, err = w.runtime.RunPodSandbox(t.Context(), r)
	wantRefusal(t, w, err, bad, usernsField+".gids: ")
	st, err := w.runtime.Status(t.Context(), &runtimeapi.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range st.RuntimeHandlers {
		if h.Features.UserNamespaces {
			t.Errorf("handler %q has the feature", h.Name)
		}
	}
}

func TestPodConfigOfAUsernsPod(t *testing.T) {
	w := newWorld(t, func(c *Config) {
		c.DefaultSysctls = map[string]string{pingGroupRange: "0 2147483647", "net.ipv4.ip_unprivileged_port_start": "0"}
	})
	r := podRequest()
	r.Config.Linux.SecurityContext.NamespaceOptions = withUserns(&runtimeapi.NamespaceOption{})
	r.Config.Linux.Sysctls = map[string]string{"user.max_net_namespaces": "7"}
	if _, err := w.runtime.RunPodSandbox(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	got := w.pods.ran
	if want := (spawn.IDMap{UID: 65536, GID: 65536, Size: 65536}); got.Userns == nil || *got.Userns != want {
		t.Errorf("got mapping %v, want %v", got.Userns, want)
	}
	for key, want := range map[string]string{pingGroupRange: "0\t65535", "net.ipv4.ip_unprivileged_port_start": "0", "user.max_net_namespaces": "7"} {
		if got.Sysctls[key] != want {
			t.Errorf("%s: got %q, want %q", key, got.Sysctls[key], want)
		}
	}
}

func TestMappedRange(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"0 2147483647", "0\t65535"},
		{"100\t2147483647", "100\t65535"},
		{"0 65535", "0 65535"},
		{"0 65536", "0\t65535"},
		{"1 0", "1 0"},                 // nobody
		{"70000 80000", "70000 80000"}, // the kernel refuses it, and it is the administrator's
		{"0", "0"},
		{"", ""},
		{"-1 7", "-1 7"},
		{"0 4294967296", "0 4294967296"},
	} {
		if got := mappedRange(tt.in, 65536); got != tt.want {
			t.Errorf("%q: got %q, want %q", tt.in, got, tt.want)
		}
	}
}

package cri

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// cdiWorld is a crispd of the test's own that reads CDI files from dir.
func cdiWorld(t *testing.T, args ...string) (w *world, dir string) {
	t.Helper()
	need(t)
	dir = t.TempDir()
	return own(t, append([]string{"--set", `cdi.spec_dirs=["` + dir + `"]`}, args...)...), dir
}

// describe writes a CDI file for the device v.test/c=NAME; edits are JSON.
func describe(t *testing.T, dir, name, edits string) {
	t.Helper()
	mustWrite(t, filepath.Join(dir, name+".json"), `{"cdiVersion":"0.7.0","kind":"v.test/c","devices":[{"name":"`+name+`","containerEdits":`+edits+`}]}`)
}

func withCDI(names ...string) editContainer {
	return func(c *runtimeapi.ContainerConfig) {
		for _, n := range names {
			c.CDIDevices = append(c.CDIDevices, &runtimeapi.CDIDevice{Name: "v.test/c=" + n})
		}
	}
}

func TestCDIDevices(t *testing.T) {
	w, dir := cdiWorld(t)
	library := filepath.Join(t.TempDir(), "lib.so.1")
	mustWrite(t, library, "library")
	p := w.pod(t)
	// After crispd's start: a driver that comes later.
	describe(t, dir, "gpu", `{"env":["GPU=1","BOTH=device"],
		"deviceNodes":[{"path":"/dev/gpu0","hostPath":"/dev/kmsg","permissions":"r"}],
		"mounts":[{"hostPath":"`+library+`","containerPath":"/lib/deep/lib.so","options":["ro","nosuid","nodev","rbind","rprivate"]}],
		"additionalGids":[44,109]}`)
	c := p.run([]string{"sleep"}, withCDI("gpu"), asUser(1000), func(c *runtimeapi.ContainerConfig) {
		c.Envs = []*runtimeapi.KeyValue{{Key: "BOTH", Value: []byte("config")}}
	})
	look := func(when string) {
		t.Helper()
		for name, want := range map[string]string{"GPU": "1", "BOTH": "device"} {
			if got := c.exec("env", name); !strings.Contains(got, want) {
				t.Errorf("%s: env %s is %q, want %q", when, name, got, want)
			}
		}
		if got := c.exec("cat", "/lib/deep/lib.so"); got != "library" {
			t.Errorf("%s: the mounted library is %q", when, got)
		}
		c.fails("mkfile", "/lib/deep/lib.so", "x") // read-only
		if got := procField(c.pid(), "Groups"); !contains(got, "44") || !contains(got, "109") {
			t.Errorf("%s: groups are %q, want 44 and 109", when, got)
		}
		if got := c.status().GetUser().GetLinux().GetSupplementalGroups(); len(got) < 2 || got[len(got)-2] != 44 || got[len(got)-1] != 109 {
			t.Errorf("%s: ContainerStatus.user has groups %v, want 44 and 109", when, got)
		}
		// Its own node, of the container's user.
		if got := c.exec("stat", "/dev/gpu0"); !strings.Contains(got, "1:11") || !strings.Contains(got, "1000") {
			t.Errorf("%s: /dev/gpu0 is %q, want device 1:11 of user 1000", when, got)
		}
	}
	look("at first")
	// What the file says now is for the containers that come now; what is there runs on, also with another crispd.
	describe(t, dir, "gpu", `{"env":["GPU=2"]}`)
	w.crash(t)
	w.again(t)
	p.w, c.p.w = w, w
	look("after a restart")
	if got := p.output([]string{"env", "GPU"}, withCDI("gpu")); !strings.Contains(got, "2") {
		t.Errorf("a new container has GPU %q, want 2", got)
	}
}

func TestCDIDevicesOfAUserNamespace(t *testing.T) {
	needUserns(t)
	w, dir := cdiWorld(t)
	library := filepath.Join(t.TempDir(), "lib.so.1")
	mustWrite(t, library, "library")
	describe(t, dir, "gpu", `{"deviceNodes":[{"path":"/dev/gpu0","hostPath":"/dev/null","permissions":"rw"}],
		"mounts":[{"hostPath":"`+library+`","containerPath":"/lib/lib.so","options":["ro","rbind"]}],"additionalGids":[44]}`)
	c := w.usernsPod(t).run([]string{"sleep"}, withCDI("gpu"), asUser(1000))
	if got := c.exec("stat", "/dev/gpu0", "/lib/lib.so"); !strings.Contains(got, "rdev=1:3") || !strings.Contains(got, "/dev/gpu0 mode=020666 uid=1000 ") || !strings.Contains(got, "/lib/lib.so mode=0100644 uid=0 ") {
		t.Errorf("got %q, want the device of user 1000 and the library of root", got)
	}
	if got := c.exec("cat", "/lib/lib.so"); got != "library" {
		t.Errorf("the library is %q", got)
	}
	if got := c.exec("id"); !strings.Contains(got, "44") {
		t.Errorf("its groups: %q, want 44 among them", got)
	}
}

func TestCDIDevicesThatAreNotThere(t *testing.T) {
	w, dir := cdiWorld(t)
	describe(t, dir, "half", `{"deviceNodes":[{"path":"/dev/nothere"}]}`)
	describe(t, dir, "rdt", `{"intelRdt":{"closID":"x"}}`)
	mustWrite(t, filepath.Join(dir, "torn.json"), `{"cdiVersion":`)
	p := w.pod(t).used()
	missing := filepath.Join(t.TempDir(), "made-by-nobody")
	w.leavesNothing(t, func() {
		for _, tt := range []struct {
			name string
			code codes.Code
			text string
		}{
			{"unknown", codes.InvalidArgument, "v.test/c=unknown"},
			{"half", codes.InvalidArgument, "/dev/nothere"},
			{"rdt", codes.Unimplemented, "intelRdt"},
			{"", codes.InvalidArgument, "config.CDI_devices[0].name"},
		} {
			_, err := p.tryCreate([]string{"true"}, withCDI(tt.name), withMounts(&runtimeapi.Mount{HostPath: missing, ContainerPath: "/m"}))
			wantCode(t, err, tt.code, tt.text, "CDI_devices")
		}
	})
	if _, err := os.Stat(missing); err == nil {
		t.Error("a mount source was made before the devices were resolved")
	}
	r, err := w.rt.Status(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	if got := r.Info["cdi"]; !strings.Contains(got, "torn.json") || !strings.Contains(got, "v.test/c=half") {
		t.Errorf("verbose Status says of CDI %q; want the bad file and the devices", got)
	}
}

// A user writes pods' annotations; the kubelet writes containers', of old device plugins.
func TestCDIAnnotations(t *testing.T) {
	for _, tt := range []struct {
		name string
		args []string
		want string
	}{
		{"by default", nil, ""},
		{"allowed", []string{"--set", "cdi.annotations=true"}, "1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, dir := cdiWorld(t, tt.args...)
			describe(t, dir, "gpu", `{"env":["GPU=1"]}`)
			describe(t, dir, "pods", `{"env":["PODS=1"]}`)
			p := w.pod(t, func(c *runtimeapi.PodSandboxConfig) {
				c.Annotations = map[string]string{"cdi.k8s.io/x": "v.test/c=pods"}
			})
			got := p.output([]string{"env"}, func(c *runtimeapi.ContainerConfig) { c.Annotations = map[string]string{"cdi.k8s.io/x": "v.test/c=gpu"} })
			if strings.Contains(got, "GPU=1") != (tt.want != "") {
				t.Errorf("environment is %q, want GPU=%q", got, tt.want)
			}
			if strings.Contains(got, "PODS=1") {
				t.Error("a pod's annotation named a device")
			}
		})
	}
}

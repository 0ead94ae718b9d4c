package spawn

import (
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crisp-cri/crisp/runtime/initproto"
)

var update = flag.Bool("update", false, "rewrite the golden files in testdata")

func devNull(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestPlans compares what a specification compiles to, as text, with testdata/NAME.json.
func TestPlans(t *testing.T) {
	f := devNull(t)
	adj, mode := 500, os.FileMode(0o600)
	tests := []struct {
		name   string
		change func(*specs.Spec, *ContainerArgs)
	}{
		{"default", func(*specs.Spec, *ContainerArgs) {}},
		{"volumes", func(s *specs.Spec, a *ContainerArgs) {
			s.Mounts = append(s.Mounts,
				specs.Mount{Destination: "/data//x/", Type: "bind", Source: "/host/data", Options: []string{"rbind", "rprivate", "rw"}},
				specs.Mount{Destination: "/ro", Type: "bind", Source: "/host/ro", Options: []string{"rbind", "rslave", "ro", "nosuid", "nodev", "noexec"}},
				specs.Mount{Destination: "/rro", Type: "bind", Source: "/host/rro", Options: []string{"bind", "private", "rro"}},
				specs.Mount{Destination: "/options", Type: "bind", Source: "/host/options", Options: []string{"rbind", "rslave", "ro", "rnosuid", "rnodev", "rnoexec"}},
				specs.Mount{Destination: "/image", Type: "bind", Source: ImageSource + "0", Options: []string{"bind", "rprivate", "ro", "rnoexec"}},
				specs.Mount{Destination: "/both", Type: "bind", Source: "/host/both", Options: []string{"rbind", "rshared"}})
			a.Images = map[string]*os.File{ImageSource + "0": f}
		}},
		{"cgroup-v1", func(s *specs.Spec, a *ContainerArgs) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}})
			a.CgroupMounts = map[string]string{"memory": "/sys/fs/cgroup/memory/crisp/c", "cpu,cpuacct": "/sys/fs/cgroup/cpu,cpuacct/crisp/c"}
			a.CgroupTasks = []*os.File{f, f}
			a.CgroupDir = f
		}},
		{"labels", func(s *specs.Spec, a *ContainerArgs) {
			s.Process.ApparmorProfile, s.Process.SelinuxLabel = "crisp-default", "system_u:system_r:container_t:s0:c1,c2"
			s.Linux.MountLabel = "system_u:object_r:container_file_t:s0:c1,c2"
		}},
		{"hooks", func(s *specs.Spec, a *ContainerArgs) {
			seconds := 5
			s.Annotations = map[string]string{"k": "v"}
			s.Hooks = &specs.Hooks{
				CreateContainer: []specs.Hook{{Path: "/h", Args: []string{"h", "x"}, Env: []string{"A=1"}, Timeout: &seconds}},
				StartContainer:  []specs.Hook{{Path: "/s"}}, Poststop: []specs.Hook{{Path: "/p"}},
			}
			a.Bundle, a.BundleRoot = "/var/lib/crisp/pods/p/containers/c", "/var/lib/crisp"
		}},
		{"cgroup-v2", func(s *specs.Spec, a *ContainerArgs) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Options: []string{"ro"}})
			a.CgroupDir = f
		}},
		{"everything-of-a-process", func(s *specs.Spec, a *ContainerArgs) {
			s.Process.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{5, 6}}
			s.Process.OOMScoreAdj = &adj
			s.Process.NoNewPrivileges, s.Process.Terminal = true, true
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 4096}}
			s.Root.Readonly = true
			s.Linux.Devices = append(s.Linux.Devices, specs.LinuxDevice{Path: "/dev/sda", Type: "b", Major: 8, FileMode: &mode})
			a.Seccomp, a.SeccompFlags = []byte("filter.."), 2
			a.Log, a.Stdin, a.StdinOnce = f, true, true
			a.PID, a.TargetID = PIDTarget, "other"
		}},
		{"userns", func(s *specs.Spec, a *ContainerArgs) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/data", Type: "bind", Source: "/host/data", Options: []string{"rbind"},
				UIDMappings: []specs.LinuxIDMapping{{Size: 65536}}})
		}},
		{"dev-of-the-host", func(s *specs.Spec, a *ContainerArgs) {
			s.Mounts[1] = specs.Mount{Destination: "/dev", Type: "bind", Source: "/host/dev", Options: []string{"rbind"}}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a := ContainerArgs{ID: "c0ffee", Spec: exampleSpec("payload", "true"), Rootfs: f}
			tt.change(a.Spec, &a)
			c, err := compile(&a, tt.name == "userns")
			if err != nil {
				t.Fatal(err)
			}
			type src struct {
				Path                         string
				Device                       *initproto.Device `json:",omitempty"`
				Mount                        int
				Recursive                    bool
				Attr, AttrBelow, Propagation uint64
				PropagateBelow, IDMap        bool
			}
			var sources []src
			for _, s := range c.sources {
				sources = append(sources, src{s.path, s.device, s.mount, s.recursive, s.attr, s.attrBelow, s.propagation, s.propagateBelow, s.idmap})
			}
			got, err := json.MarshalIndent(map[string]any{"plan": c.plan, "sources": sources, "donated": len(c.donated)}, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, '\n')
			golden := filepath.Join("testdata", tt.name+".json")
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), string(got)); d != "" {
				t.Errorf("plan differs from %s (-want +got):\n%s", golden, d)
			}
		})
	}
}

func TestCompileRefuses(t *testing.T) {
	f := devNull(t)
	tests := []struct {
		name   string
		change func(*specs.Spec, *ContainerArgs)
	}{
		{"no spec", func(_ *specs.Spec, a *ContainerArgs) { a.Spec = nil }},
		{"no rootfs", func(_ *specs.Spec, a *ContainerArgs) { a.Rootfs = nil }},
		{"no command", func(s *specs.Spec, _ *ContainerArgs) { s.Process.Args = nil }},
		{"empty command", func(s *specs.Spec, _ *ContainerArgs) { s.Process.Args = []string{""} }},
		{"NUL in the environment", func(s *specs.Spec, _ *ContainerArgs) { s.Process.Env = []string{"A=\x00"} }},
		{"relative cwd", func(s *specs.Spec, _ *ContainerArgs) { s.Process.Cwd = "x" }},
		{"relative destination", func(s *specs.Spec, _ *ContainerArgs) { s.Mounts[0].Destination = "proc" }},
		{"relative source", func(s *specs.Spec, _ *ContainerArgs) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/x", Type: "bind", Source: "x"})
		}},
		{"bind over the root", func(s *specs.Spec, _ *ContainerArgs) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/../", Type: "bind", Source: "/x"})
		}},
		{"unknown option", func(s *specs.Spec, _ *ContainerArgs) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/x", Type: "bind", Source: "/x", Options: []string{"sudo"}})
		}},
		{"unknown type", func(s *specs.Spec, _ *ContainerArgs) { s.Mounts[0].Type = "ext4" }},
		{"unknown rlimit", func(s *specs.Spec, _ *ContainerArgs) { s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_X"}} }},
		{"unknown capability", func(s *specs.Spec, _ *ContainerArgs) { s.Process.Capabilities.Bounding = []string{"CAP_X"} }},
		{"unknown device type", func(s *specs.Spec, _ *ContainerArgs) { s.Linux.Devices[0].Type = "z" }},
		{"relative device", func(s *specs.Spec, _ *ContainerArgs) { s.Linux.Devices[0].Path = "null" }},
		{"image that was not given", func(s *specs.Spec, _ *ContainerArgs) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/x", Type: "bind", Source: ImageSource + "0"})
		}},
		{"image in two places", func(s *specs.Spec, a *ContainerArgs) {
			a.Images = map[string]*os.File{ImageSource + "0": f}
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/x", Type: "bind", Source: ImageSource + "0"}, specs.Mount{Destination: "/y", Type: "bind", Source: ImageSource + "0"})
		}},
		{"unknown PID mode", func(_ *specs.Spec, a *ContainerArgs) { a.PID = 9 }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a := ContainerArgs{ID: "c", Spec: exampleSpec("payload"), Rootfs: f}
			tt.change(a.Spec, &a)
			if _, err := compile(&a, false); !errors.Is(err, ErrInvalid) {
				t.Errorf("got %v, want ErrInvalid", err)
			}
		})
	}
}

func TestParseStartTime(t *testing.T) {
	const fields = " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20"
	tests := []struct {
		name, in string
		want     uint64
		bad      bool
	}{
		{"plain", "7 (sh)" + fields, 4242, false},
		{"parentheses and blanks in the name", "7 (a) S 9 (b))" + fields, 4242, false},
		{"no name", "7 sh S 1", 0, true},
		{"cut", "7 (sh) S 1 2", 0, true},
		{"empty", "", 0, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseStartTime([]byte(tt.in))
			if got != tt.want || (err != nil) != tt.bad {
				t.Errorf("got %d, %v, want %d, error %v", got, err, tt.want, tt.bad)
			}
		})
	}
}

func FuzzParseStartTime(f *testing.F) {
	f.Add([]byte("7 (sh) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20"))
	f.Add([]byte(")"))
	f.Fuzz(func(t *testing.T, b []byte) { _, _ = parseStartTime(b) })
}

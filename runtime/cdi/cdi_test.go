package cdi

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func ptr[T any](v T) *T { return &v }

// write puts a CDI file of kind v.test/CLASS in place as drivers do: beside it, then renamed.
func write(t *testing.T, dir, name, text string) {
	t.Helper()
	tmp := filepath.Join(dir, name+".tmp")
	if err := os.WriteFile(tmp, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

func registry(t *testing.T, dirs ...string) *Registry {
	t.Helper()
	r, err := New(dirs)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// device is a file with one device, "v.test/c=d", whose edits are given in JSON.
func device(edits string) string {
	return `{"cdiVersion":"1.1.0","kind":"v.test/c","devices":[{"name":"d","containerEdits":` + edits + `}]}`
}

var null = specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(3)), Access: "rwm"}

func mode(m os.FileMode) *os.FileMode { return &m }

func TestResolveCDIEdits(t *testing.T) {
	dir := t.TempDir()
	link, nodes := filepath.Join(dir, "link"), filepath.Join(dir, "nodes")
	if err := errors.Join(os.Symlink("/dev/null", link), os.Mkdir(nodes, 0o755)); err != nil {
		t.Fatal(err)
	}
	null666 := specs.LinuxDevice{Path: "/dev/x", Type: "c", Major: 1, Minor: 3, FileMode: mode(0o666)}
	for _, tt := range []struct {
		name, edits string
		want        Edits
		err         string // a part of it; "": none
		kind        error
	}{
		{"env", `{"env":["A=1","B="]}`, Edits{Env: []string{"A=1", "B="}}, "", nil},
		{"node of the host", `{"deviceNodes":[{"path":"/dev/null"}]}`,
			Edits{Devices: []specs.LinuxDevice{{Path: "/dev/null", Type: "c", Major: 1, Minor: 3, FileMode: mode(0o666)}}, Rules: []specs.LinuxDeviceCgroup{null}}, "", nil},
		{"node elsewhere", `{"deviceNodes":[{"path":"/dev/x","hostPath":"/dev/null"}]}`,
			Edits{Devices: []specs.LinuxDevice{null666}, Rules: []specs.LinuxDeviceCgroup{null}}, "", nil},
		{"link", `{"deviceNodes":[{"path":"/dev/x","hostPath":"` + link + `"}]}`,
			Edits{Devices: []specs.LinuxDevice{null666}, Rules: []specs.LinuxDeviceCgroup{null}}, "", nil},
		{"permissions and owner", `{"deviceNodes":[{"path":"/dev/x","hostPath":"/dev/null","permissions":"r","uid":5,"gid":6,"fileMode":256}]}`,
			Edits{Devices: []specs.LinuxDevice{{Path: "/dev/x", Type: "c", Major: 1, Minor: 3, FileMode: mode(0o400), UID: ptr(uint32(5)), GID: ptr(uint32(6))}},
				Rules: []specs.LinuxDeviceCgroup{{Allow: true, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(3)), Access: "r"}}}, "", nil},
		{"no permissions", `{"deviceNodes":[{"path":"/dev/x","hostPath":"/dev/null","permissions":"none"}]}`, Edits{Devices: []specs.LinuxDevice{null666}}, "", nil},
		{"told whole, not on the host", `{"deviceNodes":[{"path":"/dev/nothere","type":"b","major":7,"minor":9}]}`,
			Edits{Devices: []specs.LinuxDevice{{Path: "/dev/nothere", Type: "b", Major: 7, Minor: 9}},
				Rules: []specs.LinuxDeviceCgroup{{Allow: true, Type: "b", Major: ptr(int64(7)), Minor: ptr(int64(9)), Access: "rwm"}}}, "", nil},
		{"hooks in order", `{"hooks":[{"hookName":"createContainer","path":"/a","args":["a","1"],"env":["K=V"],"timeout":3},{"hookName":"createContainer","path":"/b"},
			{"hookName":"prestart","path":"/c"},{"hookName":"poststop","path":"/d"}]}`,
			Edits{Hooks: specs.Hooks{
				CreateContainer: []specs.Hook{{Path: "/a", Args: []string{"a", "1"}, Env: []string{"K=V"}, Timeout: ptr(3)}, {Path: "/b"}},
				Prestart:        []specs.Hook{{Path: "/c"}}, //nolint:staticcheck // deprecated, and in use
				Poststop:        []specs.Hook{{Path: "/d"}},
			}}, "", nil},
		{"groups", `{"additionalGids":[0,44,44,109]}`, Edits{GIDs: []uint32{44, 109}}, "", nil},
		{"bind mount by default", `{"mounts":[{"hostPath":"/etc","containerPath":"/x/","options":["ro","rbind"]}]}`,
			Edits{Mounts: []specs.Mount{{Destination: "/x", Type: "bind", Source: "/etc", Options: []string{"ro", "rbind"}}}}, "", nil},
		{"tmpfs", `{"mounts":[{"hostPath":"tmpfs","containerPath":"/x","type":"tmpfs"}]}`,
			Edits{Mounts: []specs.Mount{{Destination: "/x", Type: "tmpfs", Source: "tmpfs"}}}, "", nil},

		{"missing node", `{"deviceNodes":[{"path":"/dev/nothere"}]}`, Edits{}, "v.test/c=d", ErrUnresolvable},
		{"no node", `{"deviceNodes":[{"path":"/dev/x","hostPath":"/etc/passwd"}]}`, Edits{}, "is no device node", ErrUnresolvable},
		{"another type", `{"deviceNodes":[{"path":"/dev/null","type":"b"}]}`, Edits{}, `is of type "c", the CDI file says "b"`, ErrUnresolvable},
		{"empty directory", `{"deviceNodes":[{"path":"/dev/x","hostPath":"` + nodes + `"}]}`, Edits{}, "directory without devices", ErrUnresolvable},
		{"node at the root", `{"deviceNodes":[{"path":"/","hostPath":"/dev/null"}]}`, Edits{}, "not /", ErrUnresolvable},
		{"missing source", `{"mounts":[{"hostPath":"/nothere","containerPath":"/x"}]}`, Edits{}, "stat /nothere", ErrUnresolvable},
		{"relative mount", `{"mounts":[{"hostPath":"/etc","containerPath":"x"}]}`, Edits{}, `"x" must be an absolute path`, ErrUnresolvable},
		{"relative hook", `{"hooks":[{"hookName":"poststop","path":"d"}]}`, Edits{}, "its path must be absolute", ErrUnresolvable},
		{"no time", `{"hooks":[{"hookName":"poststop","path":"/d","timeout":0}]}`, Edits{}, "timeout of 0 s", ErrUnresolvable},
		{"rdt", `{"intelRdt":{"closID":"x"}}`, Edits{}, "intelRdt", ErrUnsupported},
		{"network device", `{"netDevices":[{"hostInterfaceName":"eth9","name":"net1"}]}`, Edits{}, "netDevices", ErrUnsupported},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, "v.json", device(tt.edits))
			r := registry(t, dir)
			got, err := r.Resolve([]string{"v.test/c=d"})
			if tt.err != "" {
				if !errors.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.err) || !strings.Contains(err.Error(), "v.test/c=d") {
					t.Errorf("got %v, want %v about v.test/c=d: %s (problems: %q)", err, tt.kind, tt.err, r.Problems())
				}
				return
			}
			if err != nil {
				t.Fatalf("%v (problems: %q)", err, r.Problems())
			}
			if diff := cmp.Diff(&tt.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestResolveCDIDirectoryOfNodes(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "v.json", device(`{"deviceNodes":[{"path":"/dev/all","hostPath":"/dev","permissions":"r"}]}`))
	got, err := registry(t, dir).Resolve([]string{"v.test/c=d"})
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(got.Devices, func(d specs.LinuxDevice) bool { return d.Path == "/dev/all/null" })
	if i < 0 || got.Devices[i].Major != 1 || got.Devices[i].Minor != 3 {
		t.Errorf("got %v, want /dev/all/null among them", got.Devices)
	}
	if len(got.Rules) != len(got.Devices) || got.Rules[0].Access != "r" {
		t.Errorf("got %d rules for %d devices, the first %v", len(got.Rules), len(got.Devices), got.Rules[0])
	}
}

// The edits of a specification count once, before those of its devices; names count in their order and once.
func TestResolveCDIOrder(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "v.yaml", `
cdiVersion: "0.6.0"
kind: v.test/c
containerEdits: {env: ["ALL=1"]}
devices:
- {name: a, containerEdits: {env: ["A=1"]}}
- {name: b, containerEdits: {env: ["B=1"]}}
`)
	got, err := registry(t, dir).Resolve([]string{"v.test/c=b", "v.test/c=a", "v.test/c=b"})
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"ALL=1", "B=1", "A=1"}; !slices.Equal(got.Env, want) {
		t.Errorf("got %q, want %q", got.Env, want)
	}
}

func TestCDIFilesAreLookedAtAnew(t *testing.T) {
	low, high := t.TempDir(), filepath.Join(t.TempDir(), "later")
	r := registry(t, low, high)
	one := []string{"v.test/c=d"}
	resolve := func(want string) {
		t.Helper()
		got, err := r.Resolve(one)
		switch {
		case want == "":
			if !errors.Is(err, ErrUnresolvable) || !strings.Contains(err.Error(), one[0]) || !strings.Contains(err.Error(), low) {
				t.Errorf("got %v, want ErrUnresolvable with name and directory", err)
			}
		case err != nil:
			t.Error(err)
		case !slices.Equal(got.Env, []string{want}):
			t.Errorf("got %q, want %q", got.Env, want)
		}
	}
	resolve("")
	write(t, low, "v.json", device(`{"env":["V=1"]}`))
	resolve("V=1")
	write(t, low, "v.json", device(`{"env":["V=2"]}`)) // of the same length, and perhaps in the same tick
	resolve("V=2")
	if err := os.Mkdir(high, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, high, "other-name.json", device(`{"env":["V=3"]}`))
	resolve("V=3")
	if err := os.Remove(filepath.Join(high, "other-name.json")); err != nil {
		t.Fatal(err)
	}
	resolve("V=2")
	if err := os.Remove(filepath.Join(low, "v.json")); err != nil {
		t.Fatal(err)
	}
	resolve("")
}

// In place, without a rename: os.WriteFile truncates.
func TestCDIFileRewrittenInPlace(t *testing.T) {
	dir := t.TempDir()
	r := registry(t, dir)
	path := filepath.Join(dir, "v.json")
	for i := range 20 {
		want := "V=" + string(rune('a'+i))
		if err := os.WriteFile(path, []byte(device(`{"env":["`+want+`"]}`)), 0o644); err != nil {
			t.Fatal(err)
		}
		got, err := r.Resolve([]string{"v.test/c=d"})
		if err != nil || !slices.Equal(got.Env, []string{want}) {
			t.Fatalf("got %v, %v; want %s", got, err, want)
		}
	}
}

func TestBadCDIFilesAreReportedAndIgnored(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "good.json", device(`{"env":["V=1"]}`))
	write(t, dir, "torn.json", `{"cdiVersion":"0.6.0","kind":"v.te`)
	write(t, dir, "wrong.yaml", "cdiVersion: \"0.6.0\"\nkind: no-slash\ndevices: []\n")
	write(t, dir, "w.test.json", `{"cdiVersion":"9.9.9","kind":"w.test/c","devices":[{"name":"d","containerEdits":{"env":["A=1"]}}]}`)
	r := registry(t, dir)
	got := strings.Join(r.Problems(), "\n")
	for _, name := range []string{"torn.json", "wrong.yaml", "w.test.json"} {
		if !strings.Contains(got, name) {
			t.Errorf("problems do not name %s:\n%s", name, got)
		}
	}
	if _, err := r.Resolve([]string{"v.test/c=d"}); err != nil {
		t.Error(err)
	}
	if _, err := r.Resolve([]string{"w.test/c=d"}); err == nil || !strings.Contains(err.Error(), "9.9.9") {
		t.Errorf("got %v, want it to say why w.test.json is ignored", err)
	}
	// Two of the same precedence for one name: neither.
	write(t, dir, "twin.json", device(`{"env":["V=2"]}`))
	if _, err := r.Resolve([]string{"v.test/c=d"}); !errors.Is(err, ErrUnresolvable) || !strings.Contains(err.Error(), "conflicting") {
		t.Errorf("got %v, want a conflict", err)
	}
}

func TestAnnotatedCDIDevices(t *testing.T) {
	for _, tt := range []struct {
		name string
		in   map[string]string
		want []string
		err  bool
	}{
		{"none", map[string]string{"a": "b"}, nil, false},
		{"by key", map[string]string{"cdi.k8s.io/b": "v.test/c=2", "cdi.k8s.io/a": "v.test/c=1,v.test/c=0", "x": "v.test/c=9"}, []string{"v.test/c=1", "v.test/c=0", "v.test/c=2"}, false},
		{"bad", map[string]string{"cdi.k8s.io/a": "v.test/c"}, nil, true},
		{"empty", map[string]string{"cdi.k8s.io/a": ""}, nil, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Annotated(tt.in)
			if (err != nil) != tt.err || !slices.Equal(got, tt.want) {
				t.Errorf("got %q, %v; want %q, error %v", got, err, tt.want, tt.err)
			}
		})
	}
}

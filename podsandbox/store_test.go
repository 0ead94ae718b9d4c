package podsandbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/runtime/spawn"
	"github.com/crisp-cri/crisp/runtime/user"
)

var aTime = time.Date(2026, 11, 24, 1, 2, 3, 456789, time.UTC)

func exampleRecord() *podRecord {
	return &podRecord{
		ID: strings.Repeat("ab", 32), Config: podConfig("a"), CreatedAt: aTime, BootID: "boot", CgroupPath: "/kubepods/pod1",
		NetNSName: "crisp-ab", Network: &network.Result{Provider: "bridge", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}},
	}
}

// The records as they are on disk: a change that breaks this golden file breaks the pods of a node that is upgraded.
func TestRecordFormat(t *testing.T) {
	pod, err := encodeRecord(exampleRecord())
	if err != nil {
		t.Fatal(err)
	}
	c := containerConfig("c")
	c.Spec = nil
	uid := int64(1000)
	c.User = user.Request{UID: &uid}
	container, err := encodeRecord(&containerRecord{ID: strings.Repeat("cd", 32), PodID: strings.Repeat("ab", 32), Config: c, CreatedAt: aTime})
	if err != nil {
		t.Fatal(err)
	}
	podLine, err := stateLine(&podState{Phase: podReady, At: aTime, Handle: &spawn.Handle{PID: 1, StartTime: 2, BootID: "boot", RunDir: "/run/x"},
		Network: exampleRecord().Network, CgroupOurs: true, Timings: []Timing{{"record", time.Millisecond}}})
	if err != nil {
		t.Fatal(err)
	}
	line, err := stateLine(&containerState{Phase: containerExited, StartedAt: aTime, FinishedAt: aTime, PID: 7, ExitCode: 1, Reason: reasonError,
		KillAt: aTime, User: user.Identity{UID: 1000, GID: 1000, Home: "/home/user"}})
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "records.txt", fmt.Sprintf("-- pod.json --\n%s-- container.json --\n%s-- pod state --%s-- container state --%s", pod, container, podLine, line))
}

// Every string of a container comes back byte for byte, also what JSON would escape or cannot hold.
func TestConfigKeepsEveryByte(t *testing.T) {
	all := make([]byte, 255)
	for i := range all {
		all[i] = byte(i + 1)
	}
	odd := "<&>\u2028\U0010ffff\x7f\\\"\t\u0000"
	tests := []struct {
		name string
		in   *specs.Spec
	}{
		{"nothing", &specs.Spec{}},
		{"text", &specs.Spec{Version: "1.2.0", Process: &specs.Process{Env: []string{"A=b", odd}, Args: []string{odd}, Cwd: "/" + odd}, Annotations: map[string]string{odd: odd}}},
		{"bytes", &specs.Spec{Process: &specs.Process{Env: []string{"A=b", "ALL=" + string(all), "", "LATIN=gr\xfc\xdfe", "CUT=\xe2\x82", odd}}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b, err := encodeConfig(tt.in)
			if err != nil {
				t.Fatal(err)
			}
			got, err := decodeConfig(b)
			if err != nil || !reflect.DeepEqual(got, tt.in) {
				t.Errorf("got %+v, %v, want %+v", got, err, tt.in)
			}
			// It stays a config.json that other tools read.
			if err := json.Unmarshal(b, &specs.Spec{}); err != nil {
				t.Error(err)
			}
		})
	}
	for _, bad := range []string{`{"process":{"env":["A=b"]},"crispEnvBytes":{"1":"AA=="}}`, `{"crispEnvBytes":{"0":"AA=="}}`, `{"process":{"env":["A=b"]},"crispEnvBytes":{"-1":"AA=="}}`, `[`} {
		if _, err := decodeConfig([]byte(bad)); !errors.Is(err, errDamaged) {
			t.Errorf("%s: got %v, want errDamaged", bad, err)
		}
	}
}

func FuzzDecodeConfig(f *testing.F) {
	f.Add([]byte(`{"process":{"env":["A=b"]},"crispEnvBytes":{"0":"QT3/"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		spec, err := decodeConfig(b)
		if err != nil {
			return
		}
		again, err := encodeConfig(spec)
		if err != nil {
			t.Fatal(err)
		}
		got, err := decodeConfig(again)
		if err != nil {
			t.Fatal(err)
		}
		var env, want []string
		if spec.Process != nil {
			want = spec.Process.Env
		}
		if got.Process != nil {
			env = got.Process.Env
		}
		if !slices.Equal(env, want) {
			t.Errorf("got %q, want %q", env, want)
		}
	})
}

func TestRecordRoundTrip(t *testing.T) {
	want := exampleRecord()
	b, err := encodeRecord(want)
	if err != nil {
		t.Fatal(err)
	}
	var got podRecord
	if err := decodeRecord(b, &got); err != nil || !reflect.DeepEqual(&got, want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
}

// Every single bit that flips in a record is noticed, or does not matter.
func TestRecordBitFlips(t *testing.T) {
	want := exampleRecord()
	b, err := encodeRecord(want)
	if err != nil {
		t.Fatal(err)
	}
	for i := range len(b) * 8 {
		bad := bytes.Clone(b)
		bad[i/8] ^= 1 << (i % 8)
		var got podRecord
		if err := decodeRecord(bad, &got); err == nil && !reflect.DeepEqual(&got, want) {
			t.Errorf("bit %d of byte %d: got %+v without an error", i%8, i/8, got)
		}
	}
}

func TestDecodeRecord(t *testing.T) {
	good, err := encodeRecord(exampleRecord())
	if err != nil {
		t.Fatal(err)
	}
	future := bytes.Replace(good, []byte(`"version":1`), []byte(`"version":2`), 1)
	for _, tc := range []struct {
		name string
		in   []byte
		want error
	}{
		{"good", good, nil},
		{"empty", nil, errDamaged},
		{"half", good[:len(good)/2], errDamaged},
		{"zeros", make([]byte, len(good)), errDamaged},
		{"null", []byte("null"), errDamaged},
		{"object", []byte("{}"), errDamaged},
		{"two", append(bytes.Clone(good), good...), errDamaged},
		{"future", future, errVersion},
	} {
		var r podRecord
		if err := decodeRecord(tc.in, &r); !errors.Is(err, tc.want) {
			t.Errorf("%s: got %v, want %v", tc.name, err, tc.want)
		}
	}
}

func TestLastState(t *testing.T) {
	line := func(phase podPhase) string {
		b, err := stateLine(&podState{Phase: phase})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	one, two := line(podReady), line(podStopped)
	for _, tc := range []struct {
		name  string
		in    string
		found bool
		phase podPhase
		err   error
	}{
		{"nothing", "", false, "", nil},
		{"blank", "\n\n", false, "", nil},
		{"one", one, true, podReady, nil},
		{"two", one + two, true, podStopped, nil},
		{"a torn last line", one + two[:len(two)-5], true, podReady, nil},
		{"a torn line in the middle", one + two[:20] + two, true, podStopped, nil},
		{"zeros at the end", one + strings.Repeat("\x00", 100), true, podReady, nil},
		{"only a torn line", one[:10], false, "", errDamaged},
		{"garbage", "hello\nworld\n", false, "", errDamaged},
		{"from the future", strings.Replace(one, "\n1 ", "\n2 ", 1), false, "", errVersion},
	} {
		var s podState
		found, err := lastState([]byte(tc.in), &s)
		if found != tc.found || s.Phase != tc.phase || !errors.Is(err, tc.err) {
			t.Errorf("%s: got %v, %q, %v, want %v, %q, %v", tc.name, found, s.Phase, err, tc.found, tc.phase, tc.err)
		}
	}
}

func FuzzDecodeRecord(f *testing.F) {
	b, err := encodeRecord(exampleRecord())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("{}"))
	f.Add(b[:40])
	f.Fuzz(func(t *testing.T, b []byte) {
		var r podRecord
		if decodeRecord(b, &r) != nil {
			return
		}
		again, err := encodeRecord(&r)
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		var s podRecord
		if err := decodeRecord(again, &s); err != nil {
			t.Fatalf("what was written cannot be read: %v", err)
		}
	})
}

func FuzzLastState(f *testing.F) {
	a, _ := stateLine(&containerState{Phase: containerRunning, StartedAt: aTime})
	b, _ := stateLine(&containerState{Phase: containerExited, FinishedAt: aTime})
	f.Add(a)
	f.Add(append(bytes.Clone(a), b...))
	f.Add(append(bytes.Clone(a), b[:10]...))
	f.Fuzz(func(t *testing.T, in []byte) {
		var s containerState
		found, err := lastState(in, &s)
		if found && err != nil {
			t.Fatal("found, and an error")
		}
		// Whatever was there before: what is appended counts.
		var got containerState
		if found, err := lastState(append(bytes.Clone(in), b...), &got); !found || err != nil || got.Phase != containerExited {
			t.Fatalf("got %v, %+v, %v", found, got, err)
		}
	})
}

// C-30: each file of a pod damaged in each way: the daemon starts, other pods are as they were, and this
// one can be removed or is set aside.
func TestDamagedRecords(t *testing.T) {
	damages := map[string]func(b []byte) []byte{
		"empty":   func([]byte) []byte { return nil },
		"half":    func(b []byte) []byte { return b[:len(b)/2] },
		"bit":     func(b []byte) []byte { b[len(b)/2] ^= 4; return b },
		"garbage": func([]byte) []byte { return []byte("garbage\n") },
		"null":    func([]byte) []byte { return []byte("null\n") },
		"missing": nil,
		"future": func(b []byte) []byte {
			b = bytes.Replace(b, []byte(`"version":1`), []byte(`"version":9`), 1)
			return bytes.ReplaceAll(b, []byte("\n1 "), []byte("\n9 "))
		},
	}
	for _, file := range []string{"pod.json", "state", "container.json", "container state", "config.json", "pod.json and its copy"} {
		for how, damage := range damages {
			t.Run(file+" "+how, func(t *testing.T) {
				d := newDaemon(t)
				bad, good := d.run("bad"), d.run("good")
				c := d.startNew(bad, "c")
				other := d.startNew(good, "c")
				d.close()
				dir := filepath.Join(d.dir, "state/pods", bad)
				paths := map[string][]string{
					"pod.json": {"pod.json"}, "state": {"state"}, "container.json": {"containers/" + c + "/container.json"},
					"container state": {"containers/" + c + "/state"}, "config.json": {"containers/" + c + "/config.json"},
					"pod.json and its copy": {"pod.json", "../../../run/pods/" + bad + "/pod.json"},
				}[file]
				for _, p := range paths {
					p = filepath.Join(dir, p)
					b, err := os.ReadFile(p)
					if err != nil {
						t.Fatal(err)
					}
					if damage == nil {
						err = os.Remove(p)
					} else {
						err = os.WriteFile(p, damage(b), 0o600)
					}
					if err != nil {
						t.Fatal(err)
					}
				}
				d = d.daemon(nil)
				defer func() { d.close() }()
				if p := d.mustPod(good); p.State != PodReady {
					t.Errorf("the other pod: got %+v", p)
				}
				if k := d.mustContainer(other); k.State != ContainerRunning {
					t.Errorf("the other container: got %+v", k)
				}
				what := "none"
				if p, err := d.Pod(bad); err == nil {
					what = string(p.State) + " " + p.Reason
				}
				if k, err := d.Container(c); err == nil {
					what += ", container " + string(k.State)
				}
				t.Log(what)
				if file == "pod.json" && how != "future" && what != "ready , container running" {
					t.Errorf("got %s: there is a copy", what)
				}
				if file == "container state" && how != "missing" && how != "empty" && what != "ready , container running" {
					t.Errorf("got %s: the pod's init knows", what)
				}
				if how == "future" && file != "config.json" && !strings.HasPrefix(file, "container") {
					// Left alone, for the daemon that understands it.
					if _, err := os.Stat(dir); err != nil || d.initOf(bad) == nil {
						t.Errorf("the pod of another version was touched: %v", err)
					}
					return
				}
				d.removeAll()
			})
		}
	}
}

// A pod of another version is left alone also where a pod of ours has the same cgroup_parent, as a pod's sandboxes of two attempts do.
func TestForeignInSharedCgroup(t *testing.T) {
	d := newDaemon(t)
	ids := map[string]string{}
	for _, name := range []string{"foreign", "ours"} {
		cfg := podConfig(name)
		cfg.CgroupParent = "/kubepods/shared"
		id, err := d.RunPod(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		ids[name] = id
	}
	c := d.startNew(ids["foreign"], "c")
	at := d.mustContainer(c).CgroupPath
	d.close()
	record := filepath.Join(d.dir, "state/pods", ids["foreign"], podFile)
	b, err := os.ReadFile(record)
	if err == nil {
		err = os.WriteFile(record, bytes.Replace(b, []byte(`"version":1`), []byte(`"version":9`), 1), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	d = d.daemon(nil)
	defer d.close()
	d.world.mu.Lock()
	defer d.world.mu.Unlock()
	if d.cgroups[at] == nil {
		t.Error("its container was killed")
	}
}

// A daemon that is killed while it writes the first record of an object leaves a part of it. Nobody
// was told the object's id, so nothing of it is kept. (test/cri met it: crash in the middle of a call.)
func TestKilledWhileRecording(t *testing.T) {
	for _, part := range []string{"", "{", `{"version":1,"crc32c":"00000000","record":{}`} {
		t.Run(part, func(t *testing.T) {
			d := newDaemon(t)
			good := d.run("good")
			d.close()
			podDir := filepath.Join(d.dir, "state/pods", strings.Repeat("ab", 32))
			containerDir := filepath.Join(d.dir, "state/pods", good, "containers", strings.Repeat("cd", 32))
			for path, name := range map[string]string{podDir: "pod.json", containerDir: "container.json"} {
				if err := os.MkdirAll(path, 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(path, name), []byte(part), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			d = d.daemon(nil)
			defer func() { d.close() }()
			for _, path := range []string{podDir, containerDir, filepath.Join(d.dir, "state/damaged")} {
				if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("%s is there: %v", path, err)
				}
			}
			if p := d.mustPod(good); p.State != PodReady {
				t.Errorf("the other pod: got %+v", p)
			}
		})
	}
}

// Fields that a record must not have lost or gained without a thought for the version.
func TestRecordFields(t *testing.T) {
	names := func(t reflect.Type) (l []string) {
		for i := range t.NumField() {
			l = append(l, t.Field(i).Name+" "+t.Field(i).Tag.Get("json"))
		}
		return l
	}
	var b strings.Builder
	for _, v := range []any{podRecord{}, podState{}, containerRecord{}, containerState{}, PodConfig{}, ContainerConfig{}} {
		fmt.Fprintf(&b, "%T\n", v)
		for _, n := range names(reflect.TypeOf(v)) {
			fmt.Fprintf(&b, "\t%s\n", n)
		}
	}
	golden(t, "fields.txt", b.String())
}

// The configuration that package cri hands over survives a restart as it is.
func TestConfigSurvives(t *testing.T) {
	d := newDaemon(t)
	pod := d.run("a")
	id := d.create(pod, "c")
	before, beforeC := d.mustPod(pod), d.mustContainer(id)
	d.close()
	d = d.daemon(nil)
	defer d.close()
	after, afterC := d.mustPod(pod), d.mustContainer(id)
	for _, tc := range []struct{ name, got, want string }{
		{"pod", asJSON(after), asJSON(before)},
		{"container", asJSON(afterC), asJSON(beforeC)},
	} {
		if tc.got != tc.want {
			t.Errorf("%s: got\n%s\nwant\n%s", tc.name, tc.got, tc.want)
		}
	}
	d.removeAll()
}

func asJSON(v any) string {
	b, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return err.Error()
	}
	return string(b)
}

package cni

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"
	"golang.org/x/sys/unix"
)

func TestLoadDir(t *testing.T) {
	const good = `{"cniVersion":"1.0.0","name":"%s","plugins":[{"type":"one","x":1}]}`
	list := func(name string) string { return fmt.Sprintf(good, name) }
	for _, tt := range []struct {
		name     string
		files    map[string]string
		want     string   // the network, and its plugins
		problems []string // one in each
	}{
		{"empty", nil, "", nil},
		{"one", map[string]string{"a.conflist": list("a")}, "a: one", nil},
		{"the first counts", map[string]string{"20.conflist": list("b"), "10.conflist": list("a"), "30.conflist": "{"}, "a: one", []string{"30.conflist: "}},
		{"a bad one is passed over", map[string]string{"10.conflist": `{"name":"a","plug`, "20.conflist": list("b")}, "b: one", []string{"10.conflist: "}},
		{"other files do not count", map[string]string{"10.conflist.bak": "{", "README": "x", "20.conflist": list("b")}, "b: one", nil},
		{"one plugin", map[string]string{"10.conf": `{"cniVersion":"0.3.1","name":"a","type":"one"}`}, "a: one", nil},
		{"one plugin, .json", map[string]string{"10.json": `{"name":"a","type":"one"}`}, "a: one", nil},
		{"a list as .conf", map[string]string{"10.conf": list("a")}, "", []string{"missing 'type'"}},
		{"no name", map[string]string{"10.conflist": `{"plugins":[{"type":"one"}]}`}, "", []string{"no name"}},
		{"name with a path", map[string]string{"10.conflist": list("../a")}, "", []string{"invalid characters found in network name"}},
		{"no plugins", map[string]string{"10.conflist": `{"name":"a","plugins":[]}`}, "", []string{"no plugins"}},
		{"plugins are no list", map[string]string{"10.conflist": `{"name":"a"}`}, "", []string{"0 plugins"}},
		{"version of the future", map[string]string{"10.conflist": `{"cniVersion":"2.0.0","name":"a","plugins":[{"type":"one"}]}`}, "", []string{`cniVersion "2.0.0"`}},
		{"versions to choose from", map[string]string{"10.conflist": `{"cniVersion":"0.3.1","cniVersions":["1.0.0","1.1.0","2.0.0"],"name":"a","plugins":[{"type":"one"}]}`}, "a: one", nil},
		{"type with a path", map[string]string{"10.conflist": `{"name":"a","plugins":[{"type":"../../tmp/marker"}]}`}, "", []string{`"../../tmp/marker" is no plain file name`}},
		{"ipam with a path", map[string]string{"10.conflist": `{"name":"a","plugins":[{"type":"one","ipam":{"type":"/bin/sh"}}]}`}, "", []string{`ipam: `}},
		{"too large", map[string]string{"10.conflist": `{"name":"` + strings.Repeat("a", maxConfig)}, "", []string{"more than 262144 bytes"}},
		{"plugins in a folder", map[string]string{"10.conflist": list("a"), "a/2.conf": `{"type":"three"}`, "a/1.conf": `{"type":"two"}`, "a/no": "x"}, "a: one two three", nil},
		{"only those in a folder", map[string]string{"10.conflist": `{"name":"a"}`, "a/1.conf": `{"type":"two"}`}, "a: two", nil},
		{"folder not wanted", map[string]string{"10.conflist": `{"name":"a","loadOnlyInlinedPlugins":true,"plugins":[{"type":"one"}]}`, "a/1.conf": `{"type":"two"}`}, "a: one", nil},
		{"bad in a folder", map[string]string{"10.conflist": list("a"), "a/1.conf": `{"type":`}, "", []string{"10.conflist: a/1.conf: no JSON"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range tt.files {
				path := filepath.Join(dir, name)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			f := loadDir(dir)
			got := ""
			if f.list != nil {
				// From its Bytes, as it will be in the record.
				again, err := parseList(f.list.Bytes)
				if err != nil {
					t.Fatal(err)
				}
				got = again.Name + ":"
				for _, p := range again.Plugins {
					got += " " + p.Network.Type
				}
			}
			if got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			if len(f.problems) != len(tt.problems) {
				t.Fatalf("got problems %v", f.problems)
			}
			for i, want := range tt.problems {
				if !strings.Contains(f.problems[i].Error(), want) {
					t.Errorf("got %q, want %q in it", f.problems[i], want)
				}
			}
		})
	}
}

// Neither a directory nor a pipe nor a dangling link may hold up who reads.
func TestLoadDirOddFiles(t *testing.T) {
	dir := t.TempDir()
	for name, err := range map[string]error{
		"dir":     os.Mkdir(dir+"/1.conflist", 0o700),
		"pipe":    unix.Mkfifo(dir+"/2.conflist", 0o600),
		"dangles": os.Symlink("nowhere", dir+"/3.conflist"),
		"loop":    os.Symlink("4.conflist", dir+"/4.conflist"),
	} {
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	f := loadDir(dir)
	if f.list != nil || len(f.problems) != 4 {
		t.Errorf("got %v", f.problems)
	}
	if f := loadDir(dir + "/none"); f.list != nil || f.problems != nil {
		t.Errorf("a directory that is not there: got %v", f.problems)
	}
	if f := loadDir(dir + "/2.conflist"); len(f.problems) != 1 {
		t.Errorf("a directory that is none: got %v", f.problems)
	}
}

func FuzzList(f *testing.F) {
	for _, s := range []string{
		`{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"one"}]}`, `{"name":"a","type":"one"}`, `{`, `null`, `{"name":"a","plugins":[null]}`,
		`{"name":"a","plugins":[{"type":"one","ipam":{"type":"x"}}],"disableCheck":"TRUE"}`, `{"name":1}`,
	} {
		f.Add(s, true)
		f.Add(s, false)
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text string, list bool) {
		path := filepath.Join(dir, "x.conf")
		if list {
			path += "list"
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := loadFile(path)
		if err != nil {
			return
		}
		again, err := parseList(got.Bytes)
		if err != nil {
			t.Fatalf("what was read cannot be read from the record: %v", err)
		}
		if again.Name != got.Name || len(again.Plugins) != len(got.Plugins) || again.CNIVersion != got.CNIVersion {
			t.Fatalf("got %+v, then %+v", got, again)
		}
		for _, p := range again.Plugins {
			if strings.Contains(p.Network.Type, "/") {
				t.Fatalf("type %q", p.Network.Type)
			}
		}
	})
}

func FuzzResult(f *testing.F) {
	for _, s := range []string{
		`{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"/x"}],"ips":[{"interface":0,"address":"10.1.2.3/24"}]}`,
		`{"cniVersion":"0.4.0","interfaces":[{"name":"eth0","sandbox":"/x"}],"ips":[{"version":"4","interface":0,"address":"10.1.2.3/24"}]}`,
		`{"cniVersion":"0.2.0","ip4":{"ip":"10.1.2.3/24"},"ip6":{"ip":"fd00::1/64"}}`,
		`{"cniVersion":"1.1.0","interfaces":[null],"ips":[null,{"interface":0,"address":"10.1.2.3/24"},{"interface":-1,"address":"::ffff:1.2.3.4/24"}],"routes":[null]}`,
		`{"cniVersion":"0.4.0","interfaces":[null],"ips":[null],"routes":[null]}`,
	} {
		f.Add([]byte(s), "1.0.0")
		f.Add([]byte(s), "0.3.1")
		f.Add([]byte(s), "")
	}
	f.Fuzz(func(t *testing.T, text []byte, version string) {
		if checkResult(text) != nil {
			return
		}
		result, err := create.CreateFromBytes(text)
		if err != nil {
			return
		}
		ips, added, err := resultOf(result, version)
		if err != nil {
			return
		}
		if len(ips) == 0 || added == nil {
			t.Fatalf("got %v, %s", ips, added)
		}
		for _, ip := range ips {
			if !ip.IsValid() || ip.Is4In6() {
				t.Fatalf("got %v", ips)
			}
		}
		if _, err := create.CreateFromBytes(added); err != nil {
			t.Fatalf("the recorded result cannot be read: %v", err)
		}
	})
}

func TestAddressesInterface(t *testing.T) {
	// An address that names no interface is the pod's.
	r, err := types100.NewResult([]byte(`{"cniVersion":"1.0.0","ips":[{"address":"10.1.2.3/24"},{"address":"fd00::3/64"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	if ips, err := addresses(r); err != nil || fmt.Sprint(ips) != "[10.1.2.3 fd00::3]" {
		t.Errorf("got %v, %v", ips, err)
	}
}

// What reading the directory every confPeriod costs.
func BenchmarkLoadDir(b *testing.B) {
	w := newWorld(b)
	for _, name := range []string{"10", "20", "30"} {
		w.write(name+".conflist", w.list("1.0.0", "net", nil, "one", "two"))
	}
	for b.Loop() {
		if f := loadDir(w.conf); f.list == nil {
			b.Fatal(f.problems)
		}
	}
}

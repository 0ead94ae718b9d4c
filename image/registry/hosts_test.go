package registry

import (
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/crisp-cri/crisp/image/imagetest"
)

func writeConfig(t testing.TB, dir, name, text string) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func describeHosts(hosts []host) string {
	var lines []string
	for _, h := range hosts {
		line := fmt.Sprintf("%s://%s%s caps=%d", h.scheme, h.addr, h.prefix, h.caps)
		if h.isRegistry {
			line += " registry"
		}
		if h.tls != nil {
			line += fmt.Sprintf(" tls(skip=%v ca=%v client=%d)", h.tls.InsecureSkipVerify, h.tls.RootCAs != nil, len(h.tls.Certificates))
		}
		for _, key := range []string{"X-A", "X-B"} {
			if h.header[key] != nil {
				line += fmt.Sprintf(" %s=%v", key, h.header[key])
			}
		}
		if h.dialTimeout != 0 {
			line += " dial=" + h.dialTimeout.String()
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

func TestHostsFor(t *testing.T) {
	for _, tt := range []struct {
		name, registry string
		files          map[string]string
		want           string
	}{
		{"nothing", "quay.io", nil, "https://quay.io/v2 caps=3 registry"},
		{"docker.io", "docker.io", nil, "https://registry-1.docker.io/v2 caps=3 registry"},
		{"loopback name", "localhost:5000", nil, "://localhost:5000/v2 caps=3 registry"},
		{"loopback address", "127.9.9.9", nil, "://127.9.9.9/v2 caps=3 registry"},
		{"loopback IPv6", "[::1]:5000", nil, "://[::1]:5000/v2 caps=3 registry"},
		{"private address is no loopback", "10.0.0.1:5000", nil, "https://10.0.0.1:5000/v2 caps=3 registry"},
		{"name that looks like loopback", "localhost.example.com", nil, "https://localhost.example.com/v2 caps=3 registry"},
		{"mirrors in order, and the registry last", "docker.io", map[string]string{"docker.io/hosts.toml": `
server = "https://registry-1.docker.io"
[host."https://z.example"]
  capabilities = ["pull", "resolve"]
[host."http://a.example:5000/some/path"]
  capabilities = ["pull"]
  skip_verify = true
  dial_timeout = "3s"
  [host."http://a.example:5000/some/path".header]
    x-a = "1"
    x-b = ["2", "3"]
[host."m.example/root"]
  override_path = true
`}, `https://z.example/v2 caps=3
http://a.example:5000/some/path/v2 caps=1 tls(skip=true ca=false client=0) X-A=[1] X-B=[2 3] dial=3s
https://m.example/root caps=3
https://registry-1.docker.io/v2 caps=3 registry`},
		{"default for any registry", "quay.io", map[string]string{"_default/hosts.toml": `[host."http://127.0.0.1:5000"]`},
			"http://127.0.0.1:5000/v2 caps=3\nhttps://quay.io/v2 caps=3 registry"},
		{"default's server is not the registry", "quay.io", map[string]string{"_default/hosts.toml": `server = "http://127.0.0.1:5000"`},
			"http://127.0.0.1:5000/v2 caps=3"},
		{"own directory before default", "quay.io", map[string]string{"_default/hosts.toml": `server = "http://127.0.0.1:5000"`, "quay.io/hosts.toml": `server = "https://quay.internal"`},
			"https://quay.internal/v2 caps=3 registry"},
		{"port in the directory's name", "r.example:5000", map[string]string{"r.example_5000_/hosts.toml": `server = "https://a.example"`, "r.example:5000/hosts.toml": `server = "https://b.example"`},
			"https://a.example/v2 caps=3 registry"},
		{"tables without headers", "r.example", map[string]string{"r.example/hosts.toml": "[host]\n\"https://z.example\".capabilities = [\"pull\"]\n\"https://a.example\" = {skip_verify = true}\n"},
			"https://z.example/v2 caps=1\nhttps://a.example/v2 caps=3 tls(skip=true ca=false client=0)\nhttps://r.example/v2 caps=3 registry"},
		{"dotted keys", "r.example", map[string]string{"r.example/hosts.toml": "host.\"https://z.example\".capabilities = [\"pull\"]\nhost.\"https://a.example\".capabilities = [\"pull\"]\n"},
			"https://z.example/v2 caps=1\nhttps://a.example/v2 caps=1\nhttps://r.example/v2 caps=3 registry"},
		{"registry for resolving only", "r.example", map[string]string{"r.example/hosts.toml": `capabilities = ["resolve"]`},
			"https://r.example/v2 caps=2 registry"},
		{"empty file", "r.example", map[string]string{"r.example/hosts.toml": ""}, "https://r.example/v2 caps=3 registry"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range tt.files {
				writeConfig(t, dir, name, text)
			}
			hosts, err := hostsFor(dir, tt.registry)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, describeHosts(hosts)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestHostsErrors(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"unknown key", "sever = \"https://x\"\n", `unknown key "sever" in line 1`},
		{"unknown key of a host", "[host.\"https://x\"]\nskip_verfy = true\n", `unknown key "host.https://x.skip_verfy" in line 2`},
		{"wrong type", "server = 1\n", `line 1: key "server"`},
		{"no TOML", "server = \n", "line 1"},
		{"scheme", `server = "ftp://x"`, `server: "ftp://x" is not of the form`},
		{"password in the URL", "[host.\"https://u:hush@x\"]\n", `is not of the form`},
		{"capability", `capabilities = ["pul"]`, `capabilities: unknown value "pul"`},
		{"ca missing", `ca = "nothing.pem"`, `nothing.pem`},
		{"ca of a wrong type", `ca = 1`, `ca: want a string`},
		{"client of a wrong shape", `client = [["a", "b", "c"]]`, `client: want a file`},
		{"header", "[header]\nx = 1\n", `header.x: want a string`},
		{"dial_timeout", `dial_timeout = "soon"`, `dial_timeout: "soon"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			writeConfig(t, dir, "r.example/hosts.toml", tt.text)
			_, err := hostsFor(dir, "r.example")
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), filepath.Join(dir, "r.example/hosts.toml")) && tt.name != "ca missing" {
				t.Errorf("got %v, want the file and %q", err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), "hush") {
				t.Errorf("the error shows the password: %v", err)
			}
		})
	}
}

func TestCertificates(t *testing.T) {
	reg := imagetest.NewTLSRegistry(t)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: reg.Server.Certificate().Raw})
	dir := t.TempDir()
	writeConfig(t, dir, "a.example/hosts.toml", `ca = ["ca.pem"]`)
	writeConfig(t, dir, "a.example/ca.pem", string(ca))
	writeConfig(t, dir, "b.example/any.crt", string(ca))
	for _, registry := range []string{"a.example", "b.example"} {
		hosts, err := hostsFor(dir, registry)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := describeHosts(hosts), "https://"+registry+"/v2 caps=3 registry tls(skip=false ca=true client=0)"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func FuzzHosts(f *testing.F) {
	for _, text := range []string{
		"", `server = "https://x"`, "[host.\"https://x\"]\ncapabilities=[\"pull\"]\n[host.\"https://x\".header]\na=\"b\"\n", "host.a.b.c = 1", "[[host]]", "ca = [1]", "client = [[\"a\",\"b\"]]",
	} {
		f.Add(text)
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text string) {
		hosts, err := parseHosts([]byte(text), dir, "r.example")
		if err == nil && len(hosts) == 0 {
			t.Error("no host and no error")
		}
		for _, h := range hosts {
			if h.scheme != "https" && h.scheme != "http" || h.addr == "" || !strings.HasPrefix(h.prefix+"/", "/") {
				t.Errorf("got host %+v of %q", h, text)
			}
		}
	})
}

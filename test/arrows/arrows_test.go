// Package arrows proves that the architecture's arrows point down:
//
//	cmd → cri → podsandbox → {runtime/*, network/*, image} → runtime/sys
//
// and that crisp-init, of which every pod runs a copy, stays small: what it links
// and how large it is. (The idea is tailscale's tstest/deptest.)
package arrows

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/crisp-cri/crisp/"

// pkg is what `go list -json` says of a package. Our own paths are written
// "./runtime/sys", so that nobody takes them for Go's "runtime".
type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
	Standard   bool
}

func list(t *testing.T, args ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-e", "-json=ImportPath,Imports,Deps,Standard"}, args...)...)
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var all []pkg
	for dec := json.NewDecoder(out); ; {
		var p pkg
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		p.ImportPath = short(p.ImportPath)
		for i := range p.Imports {
			p.Imports[i] = short(p.Imports[i])
		}
		for i := range p.Deps {
			p.Deps[i] = short(p.Deps[i])
		}
		all = append(all, p)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	return all
}

func short(path string) string {
	if own, ok := strings.CutPrefix(path, module); ok {
		return "./" + own
	}
	return path
}

// under says whether path is one of dirs or below one.
func under(path string, dirs ...string) bool {
	return slices.ContainsFunc(dirs, func(d string) bool { return path == d || strings.HasPrefix(path, d+"/") })
}

var product = []string{"./cmd", "./cri", "./podsandbox", "./runtime", "./network", "./image"}

// forbidden are the imports that may not be: of packages under from (except
// those under but), of packages under to.
var forbidden = []struct {
	from, but, to []string
	why           string
}{
	{product, nil, []string{"./test", "./hack"}, "the product does not link what tests it"},
	{[]string{"./cri"}, nil, []string{"./cmd"}, "arrows point down"},
	{[]string{"./podsandbox"}, nil, []string{"./cmd", "./cri"}, "arrows point down: the pod does not know who asks"},
	{[]string{"./runtime", "./network", "./image"}, nil, []string{"./cmd", "./cri", "./podsandbox"}, "arrows point down: the parts do not know the pod"},
	{[]string{"./runtime"}, nil, []string{"./network", "./image"}, "neighbours: podsandbox brings them together"},
	{[]string{"./network"}, nil, []string{"./image"}, "neighbours: podsandbox brings them together"},
	{[]string{"./image"}, nil, []string{"./network"}, "neighbours: podsandbox brings them together"},
	{[]string{"./network", "./image"}, nil, []string{
		"./runtime/spawn", "./runtime/initproto", "./runtime/cgroup", "./runtime/logs", "./runtime/seccomp", "./runtime/caps", "./runtime/cdi",
	}, "of runtime they may use sys only"},
	{[]string{"./runtime/sys"}, nil, product, "the bottom: it imports nothing of ours"},
	{product, []string{"./cri", "./cmd/crispd"}, []string{"k8s.io/cri-api"}, "only cri interprets CRI messages; cmd/crispd registers its server"},
	{product, []string{"./cri", "./cmd/crispd"}, []string{"google.golang.org/grpc"}, "errors get their gRPC code in cri/status.go, nowhere else"},
	{product, []string{"./runtime/seccomp/internal/gen", "./network/cni", "./runtime/hooks", "./runtime/apparmor"}, []string{"os/exec"}, "nothing of the host is executed but CNI plugins, hooks and apparmor_parser: not nft, ip, mount, tar, and nothing a container could replace"},
	{product, []string{"./image", "./cri", "./cmd/crispd"}, []string{"net/http"}, "only image talks HTTP, and cri serves the streams of exec"},
	{product, nil, []string{"io/ioutil"}, "superseded since Go 1.16"},
	{[]string{"./cmd"}, []string{"./cmd/crispd"}, []string{"github.com/spf13/cobra", "github.com/pelletier/go-toml"}, "crisp-init has neither flags nor files"},
	{product, []string{"./cmd/crispd"}, []string{"github.com/spf13"}, "flags are read in one place"},
	{product, []string{"./cmd/crispd", "./image"}, []string{"github.com/pelletier"}, "the configuration is read in one place, and image reads hosts.toml"},
	{product, []string{"./network", "./cmd/crispd/check"}, []string{"github.com/vishvananda", "github.com/google/nftables"}, "only network talks netlink (and check, which tries whether it could)"},
	{product, []string{"./runtime/cgroup"}, []string{"github.com/opencontainers/cgroups"}, "only runtime/cgroup writes cgroup files"},
	{product, []string{"./network/cni"}, []string{"github.com/containernetworking"}, "only network/cni knows CNI"},
	{product, []string{"./runtime/cdi"}, []string{"tags.cncf.io"}, "only runtime/cdi reads CDI files"},
	{product, []string{"./image"}, []string{"github.com/google/go-containerregistry"}, "only image knows registries"},
}

func TestArrows(t *testing.T) {
	checked := 0
	for _, p := range list(t, "./...") {
		if !under(p.ImportPath, product...) {
			continue
		}
		checked++
		for _, rule := range forbidden {
			if !under(p.ImportPath, rule.from...) || under(p.ImportPath, rule.but...) {
				continue
			}
			for _, imported := range p.Imports {
				if under(imported, rule.to...) {
					t.Errorf("%s imports %s: %s", p.ImportPath, imported, rule.why)
				}
			}
		}
	}
	if checked < 5 {
		t.Errorf("looked at %d packages only: the search is broken", checked)
	}
}

// initMay is everything that crisp-init may link. Each package costs memory in
// every pod, and its init functions run before the pod init's first line. fmt,
// encoding/json, net and their like (reflection, tables of Unicode) are not here
// on purpose. internal/... and vendor/... of the standard library come along.
var initMay = map[string]bool{
	"unsafe": true, "runtime": true, "errors": true, "sync": true, "sync/atomic": true, "io": true, "io/fs": true, "iter": true,
	"unicode": true, "unicode/utf8": true, "bytes": true, "strings": true, "strconv": true, "slices": true, "cmp": true, "sort": true,
	"math": true, "math/bits": true, "encoding/binary": true, "path": true, "time": true, "syscall": true, "os": true, "os/signal": true,
	"reflect":               true, // by encoding/binary and sort; nothing of ours uses it
	"context":               true, // by os/signal
	"golang.org/x/sys/unix": true,
	"runtime/debug":         true, // memory limits
	"./runtime/initproto":   true, "./runtime/sys": true, "./runtime/logs": true, "./runtime/seccomp/bpf": true,
}

const initMaxSize = 3 << 20 // bytes, stripped

func TestInitLinksLittle(t *testing.T) {
	pkgs := list(t, "./cmd/crisp-init")
	if len(pkgs) != 1 || len(pkgs[0].Deps) < 10 {
		t.Fatalf("got %+v, want one package with its dependencies", pkgs)
	}
	for _, dep := range pkgs[0].Deps {
		if initMay[dep] || strings.Contains("/"+dep, "/internal/") || strings.HasPrefix(dep, "vendor/") {
			continue
		}
		t.Errorf("crisp-init links %s: every pod would pay for it; use what initMay lists, or add it there with the reason", dep)
	}
}

func TestInitIsSmall(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "crisp-init")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", binary, "./cmd/crisp-init")
	build.Dir = "../.."
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	info, err := os.Stat(binary)
	if err != nil {
		t.Fatal(err)
	}
	if info.Size() > initMaxSize {
		t.Errorf("crisp-init has %d bytes, want at most %d", info.Size(), initMaxSize)
	}
}

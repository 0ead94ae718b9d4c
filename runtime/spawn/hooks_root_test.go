package spawn

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// hooked makes a container with a createContainer hook, and brings it to it.
func (p *testPod) hooked(spec *specs.Spec, script string) (id string, pid int, log string) {
	p.h.t.Helper()
	bundle := filepath.Join(p.h.dir, "root", "pods", "p", "containers", "c")
	if err := os.MkdirAll(bundle, 0o700); err != nil {
		p.h.t.Fatal(err)
	}
	spec.Hooks = &specs.Hooks{CreateContainer: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", script}, Env: []string{"PATH=/bin:/usr/bin"}}}}
	id, log = p.create(spec, func(a *ContainerArgs) { a.Bundle, a.BundleRoot = bundle, filepath.Join(p.h.dir, "root") })
	pid, err := p.Prepare(p.h.ctx(), id, []byte(`{"ociVersion":"1.3.0"}`))
	if err != nil {
		p.h.t.Fatalf("Prepare: %v", err)
	}
	return id, pid, log
}

func TestPreparedContainerWaitsBeforeItsRoot(t *testing.T) {
	h := newHost(t)
	p := h.pod(nil)
	id, pid, log := p.hooked(exampleSpec("payload", "cat", "/made/by-hook"), "mkdir rootfs/made && cat config.json > rootfs/made/by-hook")
	// Its root is the host's tree, with the rootfs at the bundle.
	root := filepath.Join("/proc", strconv.Itoa(pid), "root")
	for _, file := range []string{filepath.Join(h.dir, "root/pods/p/containers/c/rootfs/bin/payload"), "bin/sh"} {
		if _, err := os.Stat(filepath.Join(root, file)); err != nil {
			t.Errorf("in the prepared container: %v", err)
		}
	}
	infos, err := p.List(h.ctx())
	if err != nil || len(infos) != 1 || infos[0].State != InitPrepared {
		t.Errorf("got %+v, %v; want it prepared", infos, err)
	}
	if _, _, err := p.Start(h.ctx(), id); err != nil {
		t.Fatalf("Start: %v", err)
	}
	if x := <-p.exits; x.Code != 0 {
		t.Errorf("exit %+v", x)
	}
	if b, err := os.ReadFile(log); err != nil || !strings.Contains(string(b), `{"ociVersion":"1.3.0"}`) {
		t.Errorf("the hook's file has %q, %v; want config.json", b, err)
	}
}

func TestAbandonedContainerIsExited(t *testing.T) {
	p := newHost(t).pod(nil)
	id, pid, _ := p.hooked(exampleSpec("payload", "true"), "true")
	for range 2 {
		if err := p.Abandon(p.h.ctx(), id); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Kill(pid, 0); err != unix.ESRCH {
		t.Errorf("its init: %v, want ESRCH", err)
	}
	infos, err := p.List(p.h.ctx())
	if err != nil || len(infos) != 1 || infos[0].State != InitExited {
		t.Errorf("got %+v, %v; want it exited", infos, err)
	}
	if err := p.Remove(p.h.ctx(), id); err != nil {
		t.Error(err)
	}
}

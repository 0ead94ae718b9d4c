package spawn

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/initproto"
	"github.com/crisp-cri/crisp/runtime/sys"
)

// NeedsPrepare says whether a container must be prepared before it is started: it has hooks of a create, which run when its mounts are
// there and nothing of its own has run.
func NeedsPrepare(s *specs.Spec) bool {
	h := s.Hooks
	return h != nil && len(h.Prestart)+len(h.CreateRuntime)+len(h.CreateContainer) > 0 //nolint:staticcheck // Prestart is deprecated, and in use
}

// compileHooks is what the container's init has to do with hooks.
func compileHooks(a *ContainerArgs, userns bool) (*initproto.Hooks, error) {
	out := &initproto.Hooks{}
	h := a.Spec.Hooks
	if h == nil {
		return out, nil
	}
	if !path.IsAbs(a.Bundle) || path.Clean(a.Bundle) != a.Bundle || !strings.HasPrefix(a.Bundle, a.BundleRoot+"/") || len(a.BundleRoot) < 2 {
		return nil, fmt.Errorf("%w: hooks need a bundle, %q is no directory below %q", ErrInvalid, a.Bundle, a.BundleRoot)
	}
	for kind, list := range map[string][]specs.Hook{"createContainer": h.CreateContainer, "startContainer": h.StartContainer} {
		for _, k := range list {
			if !path.IsAbs(k.Path) || strings.ContainsRune(k.Path+strings.Join(k.Args, "")+strings.Join(k.Env, ""), 0) {
				return nil, fmt.Errorf("%w: %s hook %q: its path must be absolute, and nothing may have a NUL byte", ErrInvalid, kind, k.Path)
			}
			if k.Timeout != nil && *k.Timeout <= 0 {
				return nil, fmt.Errorf("%w: %s hook %s: its timeout of %d s must be greater than 0", ErrInvalid, kind, k.Path, *k.Timeout)
			}
		}
	}
	if len(h.StartContainer) > 0 {
		if err := checkStartHooks(a, userns); err != nil {
			return nil, err
		}
	}
	state, err := json.Marshal(State(a.ID, a.Bundle, a.Spec))
	if err != nil {
		return nil, err
	}
	// Status and pid are put before it where the hook runs.
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(state, &fields); err != nil {
		return nil, err
	}
	delete(fields, "status")
	delete(fields, "pid")
	if state, err = json.Marshal(fields); err != nil {
		return nil, err
	}
	out.View = NeedsPrepare(a.Spec)
	out.Bundle, out.Hide, out.State = a.Bundle, a.BundleRoot, string(state[1:])
	out.CreateContainer, out.StartContainer = asHooks(h.CreateContainer), asHooks(h.StartContainer)
	return out, nil
}

// checkStartHooks: a startContainer hook is a program of the container's image, and runs while the container's init still has more rights
// than the container. It must not be able to take it over (crisp-init, successor.go): by CAP_SYS_PTRACE, or because the container's
// processes are others' as well. What has CAP_SYS_ADMIN needs no such way.
func checkStartHooks(a *ContainerArgs, userns bool) error {
	if a.PID == PIDPod || a.PID == PIDTarget {
		return fmt.Errorf("%w: a startContainer hook in a container that shares a PID namespace", ErrUnsupported)
	}
	c := a.Spec.Process.Capabilities
	if !userns && c != nil && slices.Contains(c.Bounding, "CAP_SYS_PTRACE") && !slices.Contains(c.Bounding, "CAP_SYS_ADMIN") {
		return fmt.Errorf("%w: a startContainer hook in a container with CAP_SYS_PTRACE", ErrUnsupported)
	}
	return nil
}

func asHooks(list []specs.Hook) (out []initproto.Hook) {
	for _, h := range list {
		k := initproto.Hook{Path: h.Path, Args: h.Args, Env: h.Env}
		if h.Timeout != nil {
			k.Timeout = int64(*h.Timeout)
		}
		out = append(out, k)
	}
	return out
}

// State is what a container's hooks read from stdin, but for the status and the pid (OCI runtime-spec, runtime.md "State").
func State(id, bundle string, s *specs.Spec) *specs.State {
	return &specs.State{Version: specs.Version, ID: id, Bundle: bundle, Annotations: s.Annotations}
}

// Prepare brings a created container for which NeedsPrepare holds to the point where its namespaces and mounts are there, and
// returns the pid of its init: for hooks of the runtime namespace. Start lets it go on, Abandon ends it. config is the text of its
// config.json. A *StartError says that it is exited now.
//
// It copies the host's mount tree, detached and private: that is what its createContainer hooks see.
//
// Needs: CAP_SYS_ADMIN. Undo: the copy goes when the container's root is entered, or with its init.
func (p *Pod) Prepare(ctx context.Context, id string, config []byte) (pid int, err error) {
	host, err := sys.CloneMount(unix.AT_FDCWD, "/", true)
	if err != nil {
		return 0, fmt.Errorf("copy the host's mount tree for hooks: %w", err)
	}
	defer unix.Close(host)
	if err := sys.SetMountAttr(host, true, unix.MountAttr{Propagation: unix.MS_PRIVATE}); err != nil {
		return 0, fmt.Errorf("copy the host's mount tree for hooks: %w", err)
	}
	text, err := memory("config.json", config)
	if err != nil {
		return 0, err
	}
	defer text.Close()
	r, err := p.target(ctx, initproto.TypePrepare, id, 0, host, int(text.Fd()))
	runtime.KeepAlive(text)
	if err != nil {
		return 0, err
	}
	s, err := initproto.DecodeStarted(r.Body)
	if err != nil {
		return 0, err
	}
	return s.PID, nil
}

// Abandon ends a prepared container. Idempotent.
func (p *Pod) Abandon(ctx context.Context, id string) error {
	_, err := p.target(ctx, initproto.TypeStart, id, 1)
	return err
}

// memory is a file without a name.
func memory(name string, text []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.WriteAt(text, 0); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

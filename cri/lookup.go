package cri

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/cdi"
	"github.com/crisp-cri/crisp/runtime/seccomp"
)

// found is what CreateContainer looked up on the host for one container.
type found struct {
	devices []specs.LinuxDevice       // that the config names, or a directory it names holds
	allowed []specs.LinuxDeviceCgroup // what may be done with them
	all     []specs.LinuxDevice       // of the host; of privileged containers only
	seccomp *specs.LinuxSeccomp       // of a profile of type Localhost
	cdi     cdi.Edits                 // of the CDI devices
}

// hostPaths looks up what containers' configs name of the host.
type hostPaths struct {
	cdi            *cdi.Registry // nil: no CDI devices
	cdiAnnotations bool
	underWay       *lookUps
}

// lookUps are those under way: one at a time for each container that is to be made. A try after one that hangs waits for that one. So a dead
// mount costs a thread for each container, and not for each of the kubelet's tries, of which the ten-thousandth would end the daemon
// (runtime/debug.SetMaxThreads).
type lookUps struct {
	mu       sync.Mutex
	underWay map[containerKey]chan struct{} // closed when it has ended
}

// containerKey is what the kubelet's tries to make one container have in common. (Their configs differ, by the name of the termination log.)
type containerKey struct {
	podID, name string
	attempt     uint32
}

// do runs look once no other for key runs any more. It waits no longer than ctx.
func (l *lookUps) do(ctx context.Context, key containerKey, look func() (*found, error)) (*found, error) {
	ended := make(chan struct{})
	for {
		l.mu.Lock()
		before := l.underWay[key]
		if before == nil {
			if l.underWay == nil {
				l.underWay = map[containerKey]chan struct{}{}
			}
			l.underWay[key] = ended
			l.mu.Unlock()
			break
		}
		l.mu.Unlock()
		select {
		case <-before:
		case <-ctx.Done():
			return nil, hangs(ctx)
		}
	}
	return bounded(ctx, func() (*found, error) {
		defer func() {
			l.mu.Lock()
			delete(l.underWay, key)
			l.mu.Unlock()
			close(ended)
		}()
		return look()
	})
}

// hangs is for who does not wait any longer.
func hangs(ctx context.Context) error {
	return fmt.Errorf("look up host paths (is one on a dead network mount?): %w", context.Cause(ctx))
}

// lookUp does the part of CreateContainer that touches paths a user names: devices,
// a seccomp profile, what CDI devices stand for, and mount sources, which are made when they are
// missing. Any of them can be on a dead network mount and hang in the kernel for good; then this call
// ends with ctx, nothing else waits, and the goroutine ends when the kernel lets it.
//
// Mount sources are not resolved here: package spawn opens each by its name
// once, following links, and what it opened then is what is mounted (CVE-2021-25741). That also is
// why a path that changes between here and there does no harm.
//
// Undo: none; a directory made for a missing source stays, as with other runtimes.
func (h hostPaths) lookUp(ctx context.Context, podID string, config *runtimeapi.ContainerConfig, profile *runtimeapi.SecurityProfile) (*found, error) {
	key := containerKey{podID, config.GetMetadata().GetName(), config.GetMetadata().GetAttempt()}
	return h.underWay.do(ctx, key, func() (*found, error) { return h.lookUpNow(config, profile) })
}

// bounded runs look, but waits no longer than ctx.
func bounded(ctx context.Context, look func() (*found, error)) (*found, error) {
	type result struct {
		*found
		error
	}
	done := make(chan result, 1) // one: the goroutine never waits for us
	go func() {                  // owned by this call, or by the hanging file system; see lookUp
		f, err := look()
		done <- result{f, err}
	}()
	select {
	case r := <-done:
		return r.found, r.error
	case <-ctx.Done():
		return nil, hangs(ctx)
	}
}

func (h hostPaths) lookUpNow(config *runtimeapi.ContainerConfig, profile *runtimeapi.SecurityProfile) (*found, error) {
	f := &found{}
	if err := f.lookUpDevices(config.GetDevices()); err != nil {
		return nil, err
	}
	if config.GetLinux().GetSecurityContext().GetPrivileged() {
		var err error
		if f.all, err = devicesBelow("/dev", "/dev"); err != nil {
			return nil, fmt.Errorf("cannot list the host's devices: %w", err)
		}
	}
	if profile.GetProfileType() == runtimeapi.SecurityProfile_Localhost {
		const field = "config.linux.security_context.seccomp.localhost_ref"
		var err error
		f.seccomp, err = seccomp.LoadFile(profile.GetLocalhostRef())
		switch {
		case errors.Is(err, seccomp.ErrUnsupported):
			return nil, fmt.Errorf("%s: %w", field, err)
		case err != nil: // also when there is no such file
			return nil, invalid(field, "%v", err)
		}
	}
	if err := f.lookUpCDI(h, config); err != nil {
		return nil, err
	}
	// Last, because it is the only step that leaves something.
	for i, m := range config.GetMounts() {
		if m.GetImage() != nil {
			continue
		}
		if err := ensureSource(m.GetHostPath()); err != nil {
			return nil, invalid(fmt.Sprintf("config.mounts[%d].host_path", i), "%v", err)
		}
	}
	return f, nil
}

// lookUpCDI resolves the CDI devices of the field, which is checked, then those of annotations, if they count.
func (f *found) lookUpCDI(h hostPaths, config *runtimeapi.ContainerConfig) error {
	const field = "config.CDI_devices"
	var names []string
	for _, d := range config.GetCDIDevices() {
		names = append(names, d.GetName())
	}
	if h.cdiAnnotations {
		annotated, err := cdi.Annotated(config.GetAnnotations())
		if err != nil {
			return invalid("config.annotations", "%v", err)
		}
		names = append(names, annotated...)
	}
	if len(names) == 0 {
		return nil
	}
	if h.cdi == nil {
		return &fieldError{field, "this crispd knows no CDI devices (cdi.spec_dirs is empty)", podsandbox.ErrUnsupported}
	}
	edits, err := h.cdi.Resolve(names)
	switch {
	case errors.Is(err, cdi.ErrUnsupported):
		return fmt.Errorf("%s: %w", field, err)
	case err != nil:
		return invalid(field, "%v", err)
	}
	f.cdi = *edits
	return nil
}

// ensureSource makes a missing mount source, as a directory.
func ensureSource(p string) error {
	_, err := os.Stat(p)
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// MkdirAll says EEXIST of a link that leads nowhere: it makes nothing through one.
	return os.MkdirAll(p, 0o755)
}

func (f *found) lookUpDevices(list []*runtimeapi.Device) error {
	for i, d := range list {
		field := fmt.Sprintf("config.devices[%d].host_path", i)
		host, inside := path.Clean(d.GetHostPath()), path.Clean(d.GetContainerPath())
		info, err := os.Stat(host)
		if err != nil {
			return invalid(field, "%v", err)
		}
		var devices []specs.LinuxDevice
		if info.IsDir() {
			devices, err = devicesBelow(host, inside)
		} else {
			var one specs.LinuxDevice
			if one, err = deviceAt(host, inside); err == nil {
				devices = append(devices, one)
			}
		}
		if err != nil {
			return invalid(field, "%v", err)
		}
		for _, dev := range devices {
			major, minor := dev.Major, dev.Minor
			f.allowed = append(f.allowed, specs.LinuxDeviceCgroup{Allow: true, Type: dev.Type, Major: &major, Minor: &minor, Access: d.GetPermissions()})
		}
		f.devices = append(f.devices, devices...)
	}
	return nil
}

var errNoDevice = errors.New("is neither a device nor a directory")

// deviceAt describes the node that host leads to, for the path inside.
func deviceAt(host, inside string) (specs.LinuxDevice, error) {
	var st unix.Stat_t
	if err := unix.Stat(host, &st); err != nil {
		return specs.LinuxDevice{}, &os.PathError{Op: "stat", Path: host, Err: err}
	}
	kind := ""
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		kind = "c"
	case unix.S_IFBLK:
		kind = "b"
	default:
		return specs.LinuxDevice{}, fmt.Errorf("%s %w", host, errNoDevice)
	}
	mode := os.FileMode(st.Mode & 0o777)
	uid, gid := st.Uid, st.Gid
	return specs.LinuxDevice{
		Path: inside, Type: kind, Major: int64(unix.Major(st.Rdev)), Minor: int64(unix.Minor(st.Rdev)),
		FileMode: &mode, UID: &uid, GID: &gid,
	}, nil
}

// notHostDevices are directories of /dev that belong to a mount namespace (the container has its own) or to other tools, and
// the console, which is a terminal's; containerd's list (pkg/oci/utils_unix.go), and ptmx, which is a link into the container's own /dev/pts.
var notHostDevices = []string{"pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev", "console", "ptmx"}

// maxDevices bounds a walk: a host has some hundred.
const maxDevices = 16384

// devicesBelow describes the nodes in a directory and below it. Links are left out: what they lead to is in the tree,
// or is none of ours. What vanishes meanwhile is left out, too.
func devicesBelow(host, inside string) ([]specs.LinuxDevice, error) {
	var list []specs.LinuxDevice
	err := filepath.WalkDir(host, func(p string, e fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist) && p != host:
			return nil
		case err != nil:
			return err
		case p != host && path.Dir(p) == host && slices.Contains(notHostDevices, e.Name()):
			if e.IsDir() {
				return fs.SkipDir
			}
			return nil
		case e.Type()&fs.ModeDevice == 0:
			return nil
		}
		d, err := deviceAt(p, path.Join(inside, p[len(host):]))
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, errNoDevice):
			return nil
		case err != nil:
			return err
		}
		if list = append(list, d); len(list) > maxDevices {
			return fmt.Errorf("%s has more than %d devices", host, maxDevices)
		}
		return nil
	})
	return list, err
}

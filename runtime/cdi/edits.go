package cdi

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	cdispec "tags.cncf.io/container-device-interface/specs-go"
)

// Edits are parts of an OCI specification, in the order in which their devices were named. Of two for one
// variable, path or destination the later counts.
type Edits struct {
	Env     []string                  // "NAME=value"
	Devices []specs.LinuxDevice       // UID, GID nil: the container's user's
	Rules   []specs.LinuxDeviceCgroup // what may be done with them
	Mounts  []specs.Mount             // type "bind", or one of the kernel's
	Hooks   specs.Hooks
	GIDs    []uint32 // more groups of the container's user; never 0
}

// Limits of ours: a node has some dozen.
const maxNodes = 1024

// add appends what the edits of a specification or device say.
func (e *Edits) add(from *cdispec.ContainerEdits) error {
	switch {
	case from.IntelRdt != nil:
		return fmt.Errorf("%w: intelRdt (crisp does not manage resctrl groups)", ErrUnsupported)
	case len(from.NetDevices) > 0:
		return fmt.Errorf("%w: netDevices (crisp does not move the host's network interfaces into pods)", ErrUnsupported)
	}
	for _, kv := range from.Env {
		if strings.ContainsRune(kv, 0) {
			return fmt.Errorf("%w: environment variable %q has a NUL", ErrUnresolvable, kv)
		}
	}
	e.Env = append(e.Env, from.Env...)
	for _, n := range from.DeviceNodes {
		if err := e.addNode(n); err != nil {
			return fmt.Errorf("%w: device node %s: %w", ErrUnresolvable, n.Path, err)
		}
	}
	for _, m := range from.Mounts {
		if err := e.addMount(m); err != nil {
			return fmt.Errorf("%w: mount %s: %w", ErrUnresolvable, m.ContainerPath, err)
		}
	}
	for _, h := range from.Hooks {
		if err := e.addHook(h); err != nil {
			return fmt.Errorf("%w: %s hook %q: %w", ErrUnresolvable, h.HookName, h.Path, err)
		}
	}
	for _, gid := range from.AdditionalGIDs {
		if gid != 0 && !slices.Contains(e.GIDs, gid) { // 0 is ignored, SPEC.md
			e.GIDs = append(e.GIDs, gid)
		}
	}
	return nil
}

// addNode describes a node. Unless its file says all (type and number), the host's own is looked at, through links. A
// directory of the host stands for all devices in it.
func (e *Edits) addNode(n *cdispec.DeviceNode) error {
	if err := inside(n.Path); err != nil {
		return err
	}
	host := n.HostPath
	if host == "" {
		host = n.Path
	}
	if !path.IsAbs(host) {
		return fmt.Errorf("host path %q must be absolute", host)
	}
	dev := specs.LinuxDevice{Path: path.Clean(n.Path), Type: n.Type, Major: n.Major, Minor: n.Minor, FileMode: n.FileMode, UID: n.UID, GID: n.GID}
	told := n.Type != "" && (n.Major != 0 || n.Type == "p")
	var st unix.Stat_t
	switch err := unix.Stat(host, &st); {
	case err != nil && !told:
		return &os.PathError{Op: "stat", Path: host, Err: err}
	case err != nil:
	case st.Mode&unix.S_IFMT == unix.S_IFDIR && !told:
		return e.addNodesBelow(n, host)
	default:
		if err := complete(&dev, &st, told); err != nil {
			return fmt.Errorf("%s: %w", host, err)
		}
	}
	if len(e.Devices) >= maxNodes {
		return fmt.Errorf("more than %d device nodes", maxNodes)
	}
	e.Devices = append(e.Devices, dev)
	access := n.Permissions
	switch access {
	case "":
		access = "rwm"
	case "none": // SPEC.md: the node, but no access
		return nil
	}
	if dev.Type != "p" {
		e.Rules = append(e.Rules, specs.LinuxDeviceCgroup{Allow: true, Type: dev.Type, Major: &dev.Major, Minor: &dev.Minor, Access: access})
	}
	return nil
}

var errNoDevice = errors.New("is no device node")

// complete takes over from the host's node what the file does not tell.
func complete(dev *specs.LinuxDevice, st *unix.Stat_t, told bool) error {
	if dev.FileMode == nil {
		mode := os.FileMode(st.Mode & 0o777)
		dev.FileMode = &mode
	}
	if told {
		return nil
	}
	kind := ""
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		kind = "c"
	case unix.S_IFBLK:
		kind = "b"
	case unix.S_IFIFO:
		kind = "p"
	default:
		return errNoDevice
	}
	if dev.Type == "u" { // mknod(1): a character device
		dev.Type = "c"
	}
	if dev.Type != "" && dev.Type != kind {
		return fmt.Errorf("is of type %q, the CDI file says %q", kind, dev.Type)
	}
	dev.Type = kind
	if kind != "p" {
		dev.Major, dev.Minor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	}
	return nil
}

// addNodesBelow adds the devices in a directory of the host, at the same names below n.Path. Links are left out, as they are for
// a directory that CRI names.
func (e *Edits) addNodesBelow(n *cdispec.DeviceNode, host string) error {
	found := 0
	err := filepath.WalkDir(host, func(p string, entry os.DirEntry, err error) error {
		switch {
		case errors.Is(err, os.ErrNotExist) && p != host:
			return nil
		case err != nil:
			return err
		case entry.Type()&os.ModeDevice == 0:
			return nil
		}
		below := *n
		below.HostPath, below.Path = p, path.Join(n.Path, p[len(host):])
		below.Type, below.Major, below.Minor, below.FileMode = "", 0, 0, n.FileMode
		if err := e.addNode(&below); err != nil && !errors.Is(err, errNoDevice) && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		found++
		return nil
	})
	if err == nil && found == 0 {
		return fmt.Errorf("%s is a directory without devices", host)
	}
	return err
}

// inside checks a path in the container.
func inside(p string) error {
	if !path.IsAbs(p) || path.Clean(p) == "/" || strings.ContainsRune(p, 0) {
		return fmt.Errorf("%q must be an absolute path in the container, not /", p)
	}
	return nil
}

// addMount: a mount without a type is a bind mount (SPEC.md); its source must be there, for a missing library
// is found out better now than by the program.
func (e *Edits) addMount(m *cdispec.Mount) error {
	if err := inside(m.ContainerPath); err != nil {
		return err
	}
	mount := specs.Mount{Destination: path.Clean(m.ContainerPath), Type: m.Type, Source: m.HostPath, Options: slices.Clone(m.Options)}
	if mount.Type == "" || mount.Type == "none" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind") {
		mount.Type = "bind"
	}
	if mount.Type == "bind" {
		if !path.IsAbs(m.HostPath) {
			return fmt.Errorf("host path %q must be absolute", m.HostPath)
		}
		if _, err := os.Stat(m.HostPath); err != nil {
			return err
		}
	}
	e.Mounts = append(e.Mounts, mount)
	return nil
}

// addHook takes over a hook; whether its program is there is seen when it runs, for a startContainer hook's is
// in the container.
func (e *Edits) addHook(h *cdispec.Hook) error {
	switch {
	case !path.IsAbs(h.Path):
		return errors.New("its path must be absolute")
	case h.Timeout != nil && *h.Timeout <= 0: // config.md "POSIX-platform Hooks"
		return fmt.Errorf("its timeout of %d s must be greater than 0", *h.Timeout)
	case slices.ContainsFunc(slices.Concat(h.Args, h.Env, []string{h.Path}), func(s string) bool { return strings.ContainsRune(s, 0) }):
		return errors.New("has a NUL in its path, arguments or environment")
	}
	hook := specs.Hook{Path: h.Path, Args: slices.Clone(h.Args), Env: slices.Clone(h.Env), Timeout: h.Timeout}
	to := map[string]*[]specs.Hook{
		"prestart": &e.Hooks.Prestart, "createRuntime": &e.Hooks.CreateRuntime, "createContainer": &e.Hooks.CreateContainer,
		"startContainer": &e.Hooks.StartContainer, "poststart": &e.Hooks.Poststart, "poststop": &e.Hooks.Poststop,
	}[h.HookName]
	if to == nil {
		return errors.New("is no hook of the OCI runtime specification")
	}
	*to = append(*to, hook)
	return nil
}

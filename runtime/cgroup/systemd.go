package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// The systemd driver: systemd is the one writer of its tree (systemd's docs/CGROUP_DELEGATION.md, "Two Key Design Rules"), and
// hands a part of it over where a unit says Delegate=yes. One transient scope per pod does; all below it is made as by the
// cgroupfs driver, and systemd never hears of a container:
//
//	/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid>.slice     the kubelet's, limits and all
//	└── crisp-<pod id>.scope                                                       systemd's, for us
//	    ├── crisp-pod-<pod id>                                                     as in the package's documentation
//	    └── crisp-<container id>
//
// A scope cannot be without processes: systemd refuses one that is started so, and ends one that gets so. Hence the order of
// a pod's start. CreatePod makes the scope's directory, the pod's init is born below it, and Adopt gives both to systemd.
// Before Adopt it is one more directory in a slice, of which systemd takes no notice. It is also the reason why a pod's
// scope ends by itself, with the pod's last process, and why removing it has to put up with its being gone.
//
// Nothing is written to the scope itself but the list of controllers it hands on: its other files are systemd's, which writes them again
// whenever it likes (daemon-reload, daemon-reexec, set-property). What is below is ours for good.

const scopeSuffix = ".scope"

// SystemdRuns says whether this host is systemd's, as sd_booted(3) does.
func SystemdRuns() bool {
	info, err := os.Lstat("/run/systemd/system")
	return err == nil && info.IsDir()
}

// UseSystemd says which driver suits this node: systemd's where systemd runs and all controllers are in cgroup v2, else
// cgroupfs, because the kubelet's systemd driver on v1 is about to go, and ours has never been.
func UseSystemd() (bool, error) {
	mode, err := Detect()
	if err != nil {
		return false, err
	}
	return mode == Unified && SystemdRuns(), nil
}

// scopeName is the unit of a pod.
func scopeName(podID string) string { return LeafPrefix + podID + scopeSuffix }

// isScope reports whether a pod-level cgroup is a scope of ours, by its name: a daemon with another driver may have made it.
func isScope(podPath string) bool {
	_, ok := podOfScope(path.Base(podPath))
	return ok
}

func podOfScope(name string) (podID string, ok bool) {
	id, ok := strings.CutPrefix(name, LeafPrefix)
	if !ok {
		return "", false
	}
	id, ok = strings.CutSuffix(id, scopeSuffix)
	return id, ok && id != ""
}

// parseSlice reads a cgroup_parent: "kubepods-burstable.slice", or what the kubelet makes of it (CgroupName.ToSystemd),
// "/kubepods.slice/kubepods-burstable.slice". The error says what is wrong with it.
func parseSlice(parent string) (slice string, err error) {
	slice = path.Base(parent)
	stem, ok := strings.CutSuffix(slice, ".slice")
	switch {
	case !ok || stem == "":
		return "", errors.New("is not the name of a slice; the systemd driver needs one like kubepods-burstable.slice")
	case len(slice) > unix.NAME_MAX: // UNIT_NAME_MAX is 256 with the final NUL
		return "", errors.New("has a name longer than 255 bytes")
	case strings.ContainsFunc(stem, func(r rune) bool { return !unitNameRune(r) }):
		return "", errors.New(`is not the name of a slice: letters, digits and : - _ . \ only (systemd-escape(1) makes them of others)`)
	case stem != "-" && slices.Contains(strings.Split(stem, "-"), ""):
		// systemd.slice(5): the name is the path, "a-b.slice" lies in "a.slice".
		return "", errors.New("is not the name of a slice: each - parts two names, so none is at an end or beside another")
	}
	if parent != slice && parent != "/"+strings.Join(slicePath(stem, plainName), "/") {
		return "", fmt.Errorf("is not where %s lies: that is /%s", slice, strings.Join(slicePath(stem, plainName), "/"))
	}
	return slice, nil
}

// unitNameRune is VALID_CHARS of systemd's src/basic/unit-name.c.
func unitNameRune(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune(`:-_.\`, r)
}

// slicePath is where a slice lies: a-b is ["a.slice", "a-b.slice"], each as name makes it; "-", the root, is nothing.
func slicePath(stem string, name func(unit string) string) (l []string) {
	if stem == "-" {
		return nil
	}
	for i, r := range stem + "-" {
		if r == '-' {
			l = append(l, name(stem[:i]+".slice"))
		}
	}
	return l
}

func plainName(unit string) string { return unit }

// directoryName is the name of a unit's cgroup: one that could be taken for a file of the kernel gets a "_" in front
// (cg_needs_escape in systemd's src/basic/cgroup-util.c).
func directoryName(unit string) string {
	first, _, _ := strings.Cut(unit, ".")
	switch {
	case unit[0] == '_', unit[0] == '.', first == "cgroup", slices.Contains(escapedControllers, first):
		return "_" + unit
	}
	return unit
}

var escapedControllers = []string{"cpu", "cpuacct", "cpuset", "io", "blkio", "memory", "devices", "pids"}

// rootSlice is the slice of Config.Root: /a/b is a-b.slice.
func rootSlice(root string) string {
	return strings.ReplaceAll(strings.Trim(path.Clean(root), "/"), "/", "-") + ".slice"
}

// scopePath is a pod's scope below a valid cgroup_parent.
func (d *Driver) scopePath(parent, podID string) string {
	if parent == "" {
		parent = rootSlice(d.config.Root)
	}
	slice, err := parseSlice(parent)
	if err != nil {
		slice = rootSlice(d.config.Root) // unreachable: ValidateParent comes first
	}
	above := slicePath(strings.TrimSuffix(slice, ".slice"), directoryName)
	return "/" + path.Join(append(above, scopeName(podID))...)
}

// PodInit is the first process of a pod.
type PodInit struct {
	PodPath, PodID string // its pod-level cgroup and its leaf, as PodPath and InitPath have them
	PID            int    // alive, and ours to wait for: else the number may be somebody else's by the time systemd looks
	Title          string // NAMESPACE/NAME, for people who read systemctl's output
}

// Adopt makes the pod-level cgroup of CreatePod known to systemd, as a scope with the pod's init in it, and enables all
// controllers below it. With the cgroupfs driver there is nothing to do, nor with one that was adopted before.
//
// systemd moves the init to the scope's own cgroup; Adopt moves it back to its leaf, with the children it may have by now.
// A start of systemd's (daemon-reexec) is waited for.
//
// Undo: RemovePod. Needs: root on systemd's bus.
func (d *Driver) Adopt(ctx context.Context, p PodInit) error {
	if d.units == nil || !isScope(p.PodPath) {
		return nil
	}
	op := func(step string, err error) error {
		return &Error{Op: "adopt", Path: p.PodPath, Step: step, Kind: kindOf(err), Err: err}
	}
	scope := scope{name: path.Base(p.PodPath), slice: unitOf(path.Base(path.Dir(p.PodPath))), description: "crisp pod " + p.Title, pid: p.PID}
	began := time.Now()
	if err := d.units.start(ctx, scope); err != nil {
		return op("start "+scope.name+" in "+scope.slice, err)
	}
	started := time.Now()
	if err := d.clearRoot(ctx, p.PodPath, d.InitPath(p.PodPath, p.PodID)); err != nil {
		return op("move the pod's init to its leaf", err)
	}
	if err := d.enableControllers(p.PodPath); err != nil {
		return op("enable controllers", err)
	}
	klog.FromContext(ctx).V(4).Info("Adopted cgroup", "unit", scope.name, "systemd", started.Sub(began), "ours", time.Since(started))
	return nil
}

// unitOf undoes directoryName; "/" is the root slice's.
func unitOf(directory string) string {
	if directory == "/" {
		return "-.slice"
	}
	return strings.TrimPrefix(directory, "_")
}

// clearRoot moves what is in a cgroup itself to one below. A process that is cloned meanwhile is found in the next round, and once
// all are below there is nobody left to clone one.
func (d *Driver) clearRoot(ctx context.Context, from, to string) error {
	for {
		pids, err := d.words(from, "cgroup.procs")
		if err != nil || len(pids) == 0 {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		for _, pid := range pids {
			err := d.kernel.write(0, path.Join(to, "cgroup.procs"), pid)
			if err != nil && !errors.Is(err, unix.ESRCH) { // ESRCH: it has ended
				return err
			}
		}
	}
}

// removeScope kills what is left in a pod's scope and removes it.
//
// The last process of a scope ends it, soon; but rmdir before systemd has read that the scope is empty can hide that from systemd for good: the
// kernel tells at most every 10 ms (CGROUP_FILE_NOTIFY_MIN_INTV), and forgets about it when the cgroup goes. So a scope that is still there
// is stopped by systemd, and one that is gone was.
func (d *Driver) removeScope(ctx context.Context, podPath string) error {
	fail := func(step string, err error) error {
		return &Error{Op: "remove pod", Path: podPath, Step: step, Kind: kindOf(err), Err: err}
	}
	if err := d.Open(podPath).Kill(ctx); err != nil {
		return err
	}
	if _, err := d.kernel.read(0, path.Join(podPath, "cgroup.procs")); d.units != nil && !errors.Is(err, fs.ErrNotExist) {
		if err := d.units.stop(ctx, path.Base(podPath)); err != nil {
			return fail("stop "+path.Base(podPath), err)
		}
	}
	return d.Open(podPath).Remove(ctx)
}

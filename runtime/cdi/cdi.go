// Package cdi resolves devices of the Container Device Interface: names like
// "vendor.com/gpu=0", which files in a few directories of the host describe
// (https://github.com/cncf-tags/container-device-interface, SPEC.md).
//
// A [Registry] is those directories; [Registry.Resolve] turns names into [Edits],
// the parts of an OCI specification that they stand for. Files are parsed, checked and given
// precedence by the CDI project's own library. Edits are translated here, because the library's
// Apply writes what it found of a device node into its cache, unlocked, and so never looks again.
//
// What is not here: who may ask for a device. The names come from the kubelet, which has
// them from device plugins and DRA drivers.
package cdi

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	cdilib "tags.cncf.io/container-device-interface/pkg/cdi"
	"tags.cncf.io/container-device-interface/pkg/parser"
)

// Sentinels.
var (
	// ErrUnresolvable is returned for a name that no valid file describes, and for one whose
	// description does not fit this host: a node or a mount source is missing.
	ErrUnresolvable = errors.New("unresolvable CDI device")
	// ErrUnsupported is returned for a device whose edits ask for what crisp does not do.
	ErrUnsupported = errors.New("CDI device asks for something that is not supported")
)

// DefaultDirs are the specification's, the later one with precedence.
func DefaultDirs() []string { return []string{"/etc/cdi", "/var/run/cdi"} }

// AnnotationPrefix begins the keys of annotations that name devices (deprecated in favour of CRI's CDI_devices).
const AnnotationPrefix = cdilib.AnnotationPrefix

// IsName says whether s is a full name: vendor/class=device.
func IsName(s string) bool { return parser.IsQualifiedName(s) }

// Annotated are the devices that annotations name, in the order of their keys. Each value is a list with commas.
func Annotated(annotations map[string]string) (names []string, err error) {
	for _, key := range slices.Sorted(maps.Keys(annotations)) {
		if !strings.HasPrefix(key, AnnotationPrefix) {
			continue
		}
		for name := range strings.SplitSeq(annotations[key], ",") {
			if !IsName(name) {
				return nil, fmt.Errorf("annotation %s: %q is no CDI device, like vendor.com/class=name", key, name)
			}
			names = append(names, name)
		}
	}
	return names, nil
}

// Registry is what the files of some directories say. Safe for concurrent use.
//
// There is no watcher: a driver writes its file and says so to the kubelet, whose CreateContainer can be
// here before an event of inotify(7) is read. Instead each use looks whether any file has changed, which
// is a stat(2) for each.
type Registry struct {
	dirs []string

	mu    sync.Mutex // held while files are read: they are on a local disk
	cache *cdilib.Cache
	read  []file // what the cache was made of
	sure  bool   // a file that has changed since is seen to be another
}

// file identifies a version of a file.
type file struct {
	path  string
	ino   uint64
	size  int64
	mtime unix.Timespec
	ctime unix.Timespec
}

// New makes a registry of dirs, of which the later ones have precedence. They need not be there.
func New(dirs []string) (*Registry, error) {
	r := &Registry{dirs: slices.Clone(dirs)}
	r.read = r.look()
	r.sure = settled(r.read)
	var err error
	r.cache, err = cdilib.NewCache(cdilib.WithSpecDirs(dirs...), cdilib.WithAutoRefresh(false))
	return r, err
}

// look finds the files as they are now. What cannot be read is the cache's to report.
func (r *Registry) look() []file {
	var found []file
	for _, dir := range r.dirs {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			found = append(found, file{path: dir})
		}
		for _, e := range entries {
			if ext := filepath.Ext(e.Name()); ext != ".json" && ext != ".yaml" {
				continue
			}
			f := file{path: filepath.Join(dir, e.Name())}
			var st unix.Stat_t
			if unix.Stat(f.path, &st) == nil {
				f.ino, f.size, f.mtime, f.ctime = st.Ino, st.Size, st.Mtim, st.Ctim
			}
			found = append(found, f)
		}
	}
	return found
}

// freshLocked brings the cache up to date.
func (r *Registry) freshLocked() {
	// The files are looked at before they are read: a change in between is seen again the next time.
	now := r.look()
	if r.sure && slices.Equal(now, r.read) {
		return
	}
	r.read, r.sure = now, settled(now)
	_ = r.cache.Refresh() // the files' errors, which Problems tells
}

// settled: all files are older than a tick of the clock that stamps them, so that one that changes from now on gets
// another stamp.
func settled(files []file) bool {
	const tick = 20 * time.Millisecond // two of CONFIG_HZ=100
	var now unix.Timespec
	if unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &now) != nil {
		return false
	}
	for _, f := range files {
		if age := now.Nano() - f.ctime.Nano(); age >= 0 && age < int64(tick) {
			return false
		}
	}
	return true
}

// Problems are the files that are ignored, each with the reason; in the order of their paths.
func (r *Registry) Problems() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.freshLocked()
	all := r.cache.GetErrors()
	var list []string
	for _, path := range slices.Sorted(maps.Keys(all)) {
		for _, err := range all[path] {
			text := err.Error()
			if !strings.Contains(text, path) {
				text = path + ": " + text
			}
			list = append(list, text)
		}
	}
	return list
}

// Names are the devices that could be asked for, sorted.
func (r *Registry) Names() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.freshLocked()
	return r.cache.ListDevices()
}

// Resolve turns names into what they stand for on this host, now; a name that is given twice counts once. Nothing
// is changed. The error says of each name what is wrong with it.
//
// It looks at device nodes and mount sources: where those hang, it does.
func (r *Registry) Resolve(names []string) (*Edits, error) {
	if len(names) == 0 {
		return &Edits{}, nil
	}
	found, problems, err := r.find(names)
	if err != nil {
		return nil, err
	}
	e := &Edits{}
	specs := map[*cdilib.Spec]bool{}
	for _, d := range found {
		name := d.GetQualifiedName()
		if s := d.GetSpec(); !specs[s] {
			// "the containerEdits of the spec are applied once, if any device of it is" (SPEC.md)
			specs[s] = true
			if err := e.add(&s.ContainerEdits); err != nil {
				problems = append(problems, fmt.Errorf("%s (%s): %w", name, s.GetPath(), err))
			}
		}
		if err := e.add(&d.ContainerEdits); err != nil {
			problems = append(problems, fmt.Errorf("%s (%s): %w", name, d.GetSpec().GetPath(), err))
		}
	}
	if len(problems) > 0 {
		return nil, errors.Join(problems...)
	}
	return e, nil
}

// find looks names up.
func (r *Registry) find(names []string) (found []*cdilib.Device, problems []error, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.freshLocked()
	seen := map[string]bool{}
	for _, name := range names {
		if seen[name] {
			continue
		}
		seen[name] = true
		if d := r.cache.GetDevice(name); d != nil {
			found = append(found, d)
			continue
		}
		problems = append(problems, fmt.Errorf("%w: %s is not described in %s%s", ErrUnresolvable, name, strings.Join(r.dirs, ", "), r.hintLocked(name)))
	}
	if len(problems) > 0 {
		return nil, nil, errors.Join(problems...)
	}
	return found, nil, nil
}

// hintLocked adds the problem of a file that could have described name: one that names it, or its vendor.
func (r *Registry) hintLocked(name string) string {
	vendor, _, _ := strings.Cut(name, "/")
	all := r.cache.GetErrors()
	for _, path := range slices.Sorted(maps.Keys(all)) {
		for _, err := range all[path] {
			if text := err.Error(); strings.Contains(text, name) || strings.Contains(filepath.Base(path), vendor) {
				return fmt.Sprintf(" (ignored %s: %v)", path, err)
			}
		}
	}
	return ""
}

package spawn

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/runtime/sys"
)

// openSources opens every mount of a plan as a detached mount and returns the plan's encoding.
//
// Needs: CAP_SYS_ADMIN. Undo: closing the descriptors. Trust: the paths come from the kubelet; what they lead to is
// resolved once, here, and never again by name (CVE-2021-25741).
func (p *Pod) openSources(ctx context.Context, c *compiled, userns *os.File) (body []byte, fds []int, err error) {
	type result struct {
		fds []int
		err error
	}
	done := make(chan result, 1)
	ns := -1
	if userns != nil { // a duplicate: the opener may outlive us
		if ns, err = unix.FcntlInt(userns.Fd(), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			return nil, nil, os.NewSyscallError("fcntl", err)
		}
	}
	go func() { // may hang on a dead network mount, in the kernel: then it is left alone
		fds, err := c.open(ns, p.thread)
		if ns >= 0 {
			unix.Close(ns)
		}
		select {
		case <-ctx.Done():
			closeFDs(fds)
			fds = nil
			err = context.Cause(ctx)
		default:
		}
		done <- result{fds, err}
	}()
	select {
	case r := <-done:
		if r.err != nil {
			closeFDs(r.fds)
			return nil, nil, r.err
		}
		return c.plan.Encode(), r.fds, nil
	case <-ctx.Done():
		go func() { closeFDs((<-done).fds) }() // owned by the hanging opener
		return nil, nil, fmt.Errorf("open mount sources (is one on a dead network mount?): %w", context.Cause(ctx))
	}
}

func closeFDs(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

func (c *compiled) open(userns int, base *thread) (fds []int, err error) {
	devices, err := base.makeDevices(c.devices())
	if err != nil {
		return nil, err
	}
	defer func() { closeFDs(devices) }() // those that were not taken
	for i := range c.sources {
		s := &c.sources[i]
		if s.device != nil {
			s.made, devices = devices[0], devices[1:]
		}
		fd, isFile, err := s.open(userns)
		if err != nil {
			closeFDs(fds)
			if s.mount < 0 {
				return nil, fmt.Errorf("open %s for masked paths: %w", s.path, err)
			}
			if s.device != nil {
				return nil, fmt.Errorf("make device %s: %w", s.device.Path, err)
			}
			return nil, fmt.Errorf("mount %s: open source %s: %w", c.plan.Mounts[s.mount].Target, s.path, err)
		}
		fds = append(fds, fd)
		if s.mount >= 0 {
			c.plan.Mounts[s.mount].File = isFile
		}
	}
	return fds, nil
}

// open makes a detached mount of the source, with its attributes and propagation.
func (s *source) open(userns int) (fd int, isFile bool, err error) {
	switch {
	case s.device != nil:
		fd = s.made
	case s.file != nil:
		fd, err = unix.FcntlInt(s.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	default:
		fd, err = sys.CloneMount(unix.AT_FDCWD, s.path, s.recursive)
	}
	if err != nil {
		return -1, false, unwrapErrno(err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
			fd = -1
		}
	}()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fd, false, os.NewSyscallError("fstat", err)
	}
	if s.mount < 0 && (st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(1, 3)) {
		return fd, false, errors.New("is not the null device (character device 1:3)")
	}
	if s.propagation != unix.MS_PRIVATE {
		if err := s.checkPropagation(); err != nil {
			return fd, false, err
		}
	}
	// A clone of a shared mount is in its peer group already; MS_SHARED would make a private one shared with nobody.
	if s.propagation != unix.MS_SHARED {
		if err := sys.SetMountAttr(fd, s.propagateBelow, unix.MountAttr{Propagation: s.propagation}); err != nil {
			return fd, false, unwrapErrno(err)
		}
	}
	if s.idmap {
		if userns < 0 {
			return fd, false, fmt.Errorf("%w: an id-mapped mount needs a pod with a user namespace", ErrInvalid)
		}
		if err := s.idmapTo(fd, userns); err != nil {
			return fd, false, err
		}
	}
	if s.attr != 0 {
		attr := unix.MountAttr{Attr_set: s.attr}
		if s.attr&(unix.MOUNT_ATTR_NOATIME|unix.MOUNT_ATTR_STRICTATIME) != 0 {
			attr.Attr_clr = unix.MOUNT_ATTR__ATIME
		}
		if err := sys.SetMountAttr(fd, false, attr); err != nil {
			return fd, false, unwrapErrno(err)
		}
	}
	if s.attrBelow != 0 {
		err := sys.SetMountAttr(fd, true, unix.MountAttr{Attr_set: s.attrBelow})
		if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) {
			return fd, false, fmt.Errorf("recursive mount options: %w", ErrUnsupported)
		}
		if err != nil {
			return fd, false, unwrapErrno(err)
		}
	}
	return fd, st.Mode&unix.S_IFMT != unix.S_IFDIR, nil
}

// checkPropagation: mounts can travel only through a shared mount (HostToContainer: or one that is
// itself a slave), mount_namespaces(7).
func (s *source) checkPropagation() error {
	id, err := mountIDAt(s.path) // the path may lead through links
	if err != nil {
		return err
	}
	infos, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		found := uint64(i.ID) == id
		return !found, found
	})
	if err != nil {
		return err
	}
	if len(infos) != 1 {
		return errors.New("its mount is not in /proc/self/mountinfo")
	}
	of := infos[0]
	shared := strings.Contains(of.Optional, "shared:")
	slave := strings.Contains(of.Optional, "master:")
	if s.propagation == unix.MS_SHARED && !shared {
		return fmt.Errorf("%w: bidirectional propagation needs a shared mount, but %s is not", ErrInvalid, of.Mountpoint)
	}
	if s.propagation == unix.MS_SLAVE && !shared && !slave {
		return fmt.Errorf("%w: propagation from the host needs a shared or slave mount, but %s is neither", ErrInvalid, of.Mountpoint)
	}
	return nil
}

// unwrapErrno drops the name of the system call and a path that the caller says anyway.
func unwrapErrno(err error) error {
	var e *sys.Error
	if errors.As(err, &e) {
		return os.NewSyscallError(e.Op, e.Err)
	}
	return err
}

// warn logs what a start went on without.
func warn(ctx context.Context, id string, warnings []string) {
	for _, w := range warnings {
		klog.FromContext(ctx).Info("Container started with less than was asked for", "containerID", id, "warning", w)
	}
}

// MountRootfs makes the overlay of a container as a detached mount; it can be mounted once
// only (volatile). Closing the descriptor undoes it.
//
// Lower directories are given by descriptor, not by path: no length limit, and nothing on the way can change. Needs:
// CAP_SYS_ADMIN.
func (s *Spawner) MountRootfs(ctx context.Context, r RootfsArgs) (*os.File, error) {
	if len(r.Lower) == 0 {
		return nil, fmt.Errorf("%w: an overlay needs a lower layer", ErrInvalid)
	}
	o, err := openLayers(r.Lower, r.UserNS)
	defer o.close()
	if err != nil {
		return nil, err
	}
	if err := o.dress(r.Upper); err != nil {
		return nil, err
	}
	o.upper, o.work, o.label = r.Upper, r.Work, r.Label
	fd, err := s.mountOverlay(o, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "rootfs"), nil
}

// MountImage makes a detached, read-only mount of an image, or of a part of it. Closing the descriptor undoes it.
//
// It is an overlay without a writable layer, also for an image of one layer: whiteouts, which a layer
// may have though nothing is below it, are seen by nobody. What SubPath leads to is resolved in that mount as a container
// would whose root it is.
//
// Needs: CAP_SYS_ADMIN. Trust: the image controls every component of SubPath's way.
func (s *Spawner) MountImage(ctx context.Context, a ImageArgs) (*os.File, error) {
	if len(a.Lower) == 0 {
		return nil, fmt.Errorf("%w: an image needs a layer", ErrInvalid)
	}
	o, err := openLayers(a.Lower, a.UserNS)
	defer o.close()
	if err != nil {
		return nil, err
	}
	if len(a.Lower) == 1 { // overlayfs wants two, or one that is written
		if err := o.addEmpty(); err != nil {
			return nil, err
		}
	}
	o.label = a.Label
	fd, err := s.mountOverlay(o, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return nil, err
	}
	if a.SubPath == "" {
		return os.NewFile(uintptr(fd), "image"), nil
	}
	defer unix.Close(fd)
	part, err := s.partOf(fd, a.SubPath)
	if err != nil {
		return nil, fmt.Errorf("path %q in the image: %w", a.SubPath, unwrapErrno(err))
	}
	return os.NewFile(uintptr(part), "image"), nil
}

// partOf is a detached mount of what path leads to inside the detached mount.
func (s *Spawner) partOf(mount int, path string) (int, error) {
	target, err := sys.OpenInRoot(mount, path, unix.O_PATH, sys.FollowInRoot)
	if err != nil {
		return -1, err
	}
	defer unix.Close(target)
	fd, err := sys.CloneMount(target, "", false)
	if errors.Is(err, unix.EINVAL) {
		return s.partOfOld(mount, target)
	}
	return fd, err
}

// partOfOld is the path for kernels that clone attached mounts only (before Linux 6.15): for as long as it takes, the mount
// is attached in a mount namespace aside; it is of no more use then. target is in it.
//
// Undo: closing the descriptor.
func (s *Spawner) partOfOld(mount, target int) (fd int, err error) {
	fd = -1
	err = s.thread.aside(func() (err error) {
		if err = attach(mount, unix.AT_FDCWD, asideRoot); err == nil {
			fd, err = sys.CloneMount(target, "", false)
		}
		return err
	})
	return fd, err
}

// overlay is one that is to be mounted. Lower directories are descriptors.
type overlay struct {
	lower       []lower // topmost first
	upper, work string  // "" both: read-only
	label       string  // SELinux, of all files; "": their own
}

type lower struct {
	fd       int
	detached bool // a mount that is nowhere; else a directory
}

func (o *overlay) close() {
	for _, l := range o.lower {
		unix.Close(l.fd)
	}
}

// openLayers opens lower directories, topmost first; with a user namespace as id-mapped clones. What it returns is to be closed
// also after an error.
func openLayers(paths []string, userns *os.File) (*overlay, error) {
	o := &overlay{}
	for _, path := range paths {
		if userns == nil {
			fd, err := openDir(path)
			if err != nil {
				return o, err
			}
			o.lower = append(o.lower, lower{fd: fd})
			continue
		}
		fd, err := sys.CloneMount(unix.AT_FDCWD, path, false)
		if err != nil {
			return o, err
		}
		o.lower = append(o.lower, lower{fd: fd, detached: true})
		if err := (&source{path: path}).idmapTo(fd, int(userns.Fd())); err != nil {
			return o, fmt.Errorf("layer %s: %w", path, err)
		}
	}
	return o, nil
}

// dress gives the writable layer's root the owner and mode of the topmost lower layer's: overlayfs shows its, not theirs.
func (o *overlay) dress(upper string) error {
	var st unix.Stat_t
	if err := unix.Fstat(o.lower[0].fd, &st); err != nil { // through an id-mapped clone: the mapped owner
		return os.NewSyscallError("fstat", err)
	}
	if err := os.Lchown(upper, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Chmod(upper, st.Mode&0o7777); err != nil { // a directory of ours, no link
		return &os.PathError{Op: "chmod", Path: upper, Err: err}
	}
	return nil
}

func openDir(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// addEmpty adds an empty lower directory.
func (o *overlay) addEmpty() error {
	fd, err := sys.CreateMount("tmpfs", [][2]string{{"size", "0k"}, {"nr_inodes", "2"}}, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return err
	}
	o.lower = append(o.lower, lower{fd: fd, detached: true})
	return nil
}

// mountOverlay makes a detached overlay.
func (s *Spawner) mountOverlay(o *overlay, attr uint64) (int, error) {
	fd, err := -1, error(unix.EINVAL)
	if lowerdirPlus() {
		fd, err = o.mount(attr)
	}
	// EINVAL, too: before Linux 6.15 a detached mount cannot be a layer.
	if errors.Is(err, unix.EINVAL) && (!lowerdirPlus() || o.hasDetached()) {
		fd, err = s.mountOverlayOld(o, attr)
	}
	if err != nil {
		return -1, explainOverlay(err)
	}
	return fd, nil
}

func (o *overlay) hasDetached() bool {
	return slices.ContainsFunc(o.lower, func(l lower) bool { return l.detached })
}

// mount makes the overlay where the kernel takes lower layers one by one.
func (o *overlay) mount(attr uint64) (int, error) {
	var options [][2]string
	for _, l := range o.lower {
		options = append(options, [2]string{"lowerdir+", fdPath(l.fd)})
	}
	if o.upper != "" {
		for _, d := range [][2]string{{"upperdir", o.upper}, {"workdir", o.work}} {
			fd, err := openDir(d[1])
			if err != nil {
				return -1, err
			}
			defer unix.Close(fd)
			options = append(options, [2]string{d[0], fdPath(fd)})
		}
		options = append(options, [2]string{"volatile", ""})
	}
	if o.label != "" {
		options = append(options, [2]string{"context", o.label})
	}
	return sys.CreateMount("overlay", options, attr)
}

func fdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// explainOverlay adds advice where the errno misleads.
func explainOverlay(err error) error {
	switch {
	case errors.Is(err, unix.ELOOP):
		return fmt.Errorf("%w (a layer is itself on an overlay, or two layers overlap)", err)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w (the writable layer is in use by another mount)", err)
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%w (this kernel has no overlay file system)", err)
	}
	return err
}

// lowerdirPlus: the kernel takes lower layers one by one (Linux 6.7). Probed once, by options of a context that is
// thrown away. Before Linux 6.5 overlayfs had no contexts of its own, and the generic ones collect any words
// until the file system is made: one that takes nonsense, too, knows nothing of the other.
var lowerdirPlus = sync.OnceValue(func() bool {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return true // there is no overlayfs: that is for the mount to say
	}
	defer unix.Close(fs)
	return unix.FsconfigSetString(fs, "no-such-option", "/") != nil && unix.FsconfigSetString(fs, "lowerdir+", "/") == nil
})

// mountOverlayOld is the path for kernels without lowerdir+ (before Linux 6.7), or that take no detached mount for a
// layer (before 6.15): mount(2), whose options must fit one page, in a mount namespace aside, then a
// detached clone of it. A layer must be on a mount of that namespace, so a clone of each is attached
// there, one upon the other; the descriptors see through the pile. The clones are private: what is
// mounted on one of them is mounted nowhere else.
//
// Undo: closing the descriptor.
func (s *Spawner) mountOverlayOld(o *overlay, attr uint64) (fd int, err error) {
	var mounts, opened []int
	defer func() { closeFDs(opened) }()
	clone := func(dir int, path string) (int, error) {
		m, err := sys.CloneMount(dir, path, false)
		if err == nil {
			mounts, opened = append(mounts, m), append(opened, m)
		}
		return m, err
	}
	var lowers []string
	for _, l := range o.lower {
		m := l.fd
		if l.detached {
			mounts = append(mounts, m)
		} else if m, err = clone(m, ""); err != nil {
			return -1, err
		}
		lowers = append(lowers, fdPath(m))
	}
	data := "lowerdir=" + strings.Join(lowers, ":")
	if o.upper != "" {
		// Both on one mount, or overlayfs refuses them.
		dir, err := clone(unix.AT_FDCWD, commonDir(o.upper, o.work))
		if err != nil {
			return -1, err
		}
		for _, d := range [][2]string{{"upperdir", o.upper}, {"workdir", o.work}} {
			below, err := filepath.Rel(commonDir(o.upper, o.work), d[1])
			if err != nil {
				return -1, err
			}
			at, err := sys.OpenInRoot(dir, below, unix.O_PATH|unix.O_DIRECTORY, sys.RefuseLinks)
			if err != nil {
				return -1, err
			}
			opened = append(opened, at)
			data += "," + d[0] + "=" + fdPath(at)
		}
		data += ",volatile"
	}
	if o.label != "" {
		data += `,context="` + o.label + `"` // quoted, for it has commas
	}
	if len(data) >= os.Getpagesize() {
		return -1, fmt.Errorf("%w: %d layers do not fit the mount options of this kernel", ErrUnsupported, len(lowers))
	}
	for _, m := range mounts {
		if err := sys.SetMountAttr(m, false, unix.MountAttr{Propagation: unix.MS_PRIVATE}); err != nil {
			return -1, err
		}
	}
	fd = -1
	err = s.thread.aside(func() (err error) {
		for _, m := range mounts {
			if err := attach(m, unix.AT_FDCWD, asideRoot); err != nil {
				return err
			}
		}
		if err := unix.Mount("overlay", asideRoot, "overlay", 0, data); err != nil {
			return &sys.Error{Op: "mount", Path: "overlay", Err: err}
		}
		fd, err = sys.CloneMount(unix.AT_FDCWD, asideRoot, false)
		return err
	})
	if err == nil && attr != 0 {
		if err = sys.SetMountAttr(fd, false, unix.MountAttr{Attr_set: attr}); err != nil {
			unix.Close(fd)
			fd = -1
		}
	}
	return fd, err
}

// commonDir is the innermost directory that a and b, absolute and clean, are both below.
func commonDir(a, b string) string {
	for a = filepath.Dir(a); a != "/" && !strings.HasPrefix(b, a+"/"); {
		a = filepath.Dir(a)
	}
	return a
}

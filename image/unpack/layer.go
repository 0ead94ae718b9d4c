package unpack

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/image/fault"
)

// Result describes an unpacked layer.
type Result struct {
	DiffID     digest.Digest // of the inflated stream
	Bytes      int64         // disk use: files rounded up to blocks, one block per directory
	Inodes     int64
	OpaqueRoot bool // the layer hides all layers below it
	// ImpliedRoot: the archive does not say what the root directory is like; it is as in the layers below.
	ImpliedRoot bool
	Loose       *Loose // nil without any
}

const (
	diskBlock = 4096 // bytes; what the usual file systems allocate at least

	whiteoutPrefix = ".wh."         // OCI image-spec layer.md "Whiteouts"
	aufsPrefix     = ".wh..wh."     // aufs's own files; only the next has a meaning
	opaqueMark     = ".wh..wh..opq" // OCI image-spec layer.md "Opaque Whiteout"

	opaqueXattr = "trusted.overlay.opaque" // overlayfs.rst "whiteouts and opaque directories"
	paxXattr    = "SCHILY.xattr."          // PAX record of an extended attribute
)

// Layer inflates and unpacks a layer into the existing empty directory at
// root, and sets root's own attributes. open starts the compressed stream; the
// context it is given is cancelled before Layer returns. The stream is read to
// its end in any case that is no error, so that its reader can verify it.
//
// The caller compares Result.DiffID, removes root's tree after an error, and
// syncs.
//
// Errors: fault.Corrupt, Limit, Unsupported; the stream's own; the file system's.
//
// Needs: CAP_CHOWN, CAP_FOWNER, CAP_MKNOD, CAP_DAC_OVERRIDE, CAP_SETFCAP, and CAP_SYS_ADMIN (trusted.*) in the
// initial user namespace. Trust: the stream is hostile, root is ours.
func Layer(ctx context.Context, open func(context.Context) io.Reader, root string, limits Limits, budget *Budget) (Result, error) {
	limits = limits.WithDefaults()
	ctx, cancel := context.WithCancel(ctx)
	s := newStream(open(ctx), limits.Window, streamLimit(budget, limits))
	defer s.close()
	defer cancel() // before close: the inflater may wait for the network

	t, err := openTree(root, limits.Depth)
	if err != nil {
		return Result{}, err
	}
	defer t.close()
	a := &applier{ctx: ctx, tree: t, makers: startMakers(), limits: limits, budget: budget}
	t.implied = func(up *dir, base string) error {
		if a.loose.link(up, base) != nil {
			return fmt.Errorf("%w: the parent %q is a hard link, not a directory", fault.Corrupt, clip(base))
		}
		a.countDir()
		return budget.takeEntry()
	}
	t.left = func(d *dir) error { return a.loose.addDir(t, d) }
	err = a.apply(tar.NewReader(s))
	a.makers.close()
	if err != nil {
		if s.failed {
			return Result{}, s.err // the archive's reader only saw it end
		}
		return Result{}, err
	}
	if a.result.DiffID, err = s.finish(); err != nil {
		return Result{}, err
	}
	return a.result, nil
}

// Digest inflates a layer and returns the digest of what came out, without
// unpacking it.
func Digest(ctx context.Context, open func(context.Context) io.Reader, limits Limits, budget *Budget) (digest.Digest, error) {
	limits = limits.WithDefaults()
	ctx, cancel := context.WithCancel(ctx)
	s := newStream(open(ctx), limits.Window, streamLimit(budget, limits))
	defer s.close()
	defer cancel()
	return s.finish()
}

// streamLimit is how many bytes a layer may inflate to: its files, and up to 4
// KiB of headers and padding around each.
func streamLimit(budget *Budget, limits Limits) int64 {
	return budget.maxBytes + limits.Entries*diskBlock
}

// meta is an entry's attributes, checked.
type meta struct {
	name     string // as in the archive, for errors
	uid, gid int
	mode     uint32 // permission and set-id bits
	times    [2]unix.Timespec
	xattrs   []xattr
}

type xattr struct {
	key   string
	value []byte
}

// applier carries an archive into a tree.
type applier struct {
	ctx     context.Context
	tree    *tree
	makers  *makers
	limits  Limits
	budget  *Budget
	entries int64
	buffer  []byte // for large files
	dirs    []dirTimes
	loose   looseEnds
	result  Result
}

// dirTimes are set when nothing more is made in the directory.
type dirTimes struct {
	name  string // cleaned path
	ino   uint64
	times [2]unix.Timespec
}

func (a *applier) apply(archive *tar.Reader) error {
	if err := chmodDir(a.tree.root, 0o755); err != nil { // unless the archive says otherwise
		return fmt.Errorf("root directory: %w", err)
	}
	a.countDir()
	for {
		if err := a.ctx.Err(); err != nil {
			return context.Cause(a.ctx)
		}
		header, err := archive.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("%w: archive after entry %d: %w", fault.Corrupt, a.entries, err)
		}
		if err := a.entry(header, archive); err != nil {
			return fmt.Errorf("entry %q: %w", clip(header.Name), err)
		}
	}
	if err := a.makers.settle(); err != nil {
		return err
	}
	a.result.ImpliedRoot = !a.loose.rootSet
	a.result.Loose = a.loose.settled(a.tree)
	return a.setDirTimes()
}

// entry checks one entry's header and makes what it says.
func (a *applier) entry(header *tar.Header, content io.Reader) error {
	if a.entries++; a.entries > a.limits.Entries {
		return fmt.Errorf("%w: the layer has more than %d entries", fault.Limit, a.limits.Entries)
	}
	if err := a.budget.takeEntry(); err != nil {
		return err
	}
	if header.Typeflag == tar.TypeXGlobalHeader {
		return nil // comments of archivers such as git
	}
	name, err := a.cleanName(header.Name)
	if err != nil {
		return err
	}
	meta, err := a.metaOf(header)
	if err != nil {
		return err
	}
	if name == "" {
		if header.Typeflag != tar.TypeDir {
			return fmt.Errorf("%w: the root directory as %s", fault.Corrupt, typeName(header.Typeflag))
		}
		a.loose.rootSet = true
		return a.setDir(a.tree.root, "", meta)
	}
	if base := path.Base(name); strings.HasPrefix(base, whiteoutPrefix) {
		return a.whiteout(name, base)
	}

	parent, base, err := a.tree.parent(name)
	if err != nil {
		return err
	}
	parent = parent.use() // other look-ups below may close it
	defer parent.done()
	if a.makers.busy(parent, base) {
		if err := a.makers.settle(); err != nil {
			return err
		}
	}
	was := a.loose.link(parent, base)
	delete(a.loose.links, fileKey{parent.ino, base}) // it is replaced
	if header.Typeflag == tar.TypeDir && was != nil {
		return a.directoryOverLink(parent, name, base, meta)
	}
	switch header.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		return a.regular(parent, base, meta, content, header.Size)
	case tar.TypeDir:
		return a.directory(parent, name, base, meta)
	case tar.TypeSymlink:
		return a.symlink(parent, base, header.Linkname, meta)
	case tar.TypeLink:
		return a.hardlink(parent, base, header.Linkname)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return a.node(parent, base, header, meta)
	}
	return fmt.Errorf("%w: archive entry of type %q", fault.Unsupported, header.Typeflag)
}

func typeName(flag byte) string {
	switch flag {
	case tar.TypeSymlink:
		return "a symbolic link"
	case tar.TypeLink:
		return "a hard link"
	}
	return fmt.Sprintf("an entry of type %q", flag)
}

// cleanName makes an entry's name relative to the root. ".." does not lead out
// of it: "/.." is "/".
func (a *applier) cleanName(name string) (string, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return "", fmt.Errorf("%w: NUL in a name", fault.Corrupt)
	}
	name = cleanPath(name)
	if len(name) > a.limits.PathLength {
		return "", fmt.Errorf("%w: name of %d bytes, longer than %d", fault.Limit, len(name), a.limits.PathLength)
	}
	return name, nil
}

// cleanPath makes a path relative to the root, "" for itself, without "." and "..".
func cleanPath(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

func (a *applier) metaOf(header *tar.Header) (meta, error) {
	const maxID = 1<<32 - 2 // 2^32-1 means "unchanged" to chown(2)
	if header.Uid < 0 || header.Uid > maxID || header.Gid < 0 || header.Gid > maxID {
		return meta{}, fmt.Errorf("%w: owner %d:%d", fault.Corrupt, header.Uid, header.Gid)
	}
	m := meta{
		name:  header.Name,
		uid:   header.Uid,
		gid:   header.Gid,
		mode:  uint32(header.Mode & 0o7777),
		times: timesOf(header.ModTime, header.AccessTime),
	}
	count, size := 0, 0
	for key, value := range header.PAXRecords {
		key, found := strings.CutPrefix(key, paxXattr)
		if !found {
			continue
		}
		count, size = count+1, size+len(key)+len(value)
		if count > a.limits.Xattrs || size > a.limits.XattrBytes {
			return meta{}, fmt.Errorf("%w: more than %d extended attributes or %d bytes of them", fault.Limit, a.limits.Xattrs, a.limits.XattrBytes)
		}
		if keepXattr(key) {
			m.xattrs = append(m.xattrs, xattr{key, []byte(value)})
		}
	}
	return m, nil
}

func keepXattr(key string) bool {
	return key == "security.capability" || strings.HasPrefix(key, "user.") && !strings.HasPrefix(key, "user.overlay.")
}

// clear removes what stands at a name that is to become something else. dir
// keeps a directory in its place. It returns what was there.
func (a *applier) clear(parent *dir, base string, keepDir keep) (kind, error) {
	was, err := kindOf(parent, base)
	if err != nil || was == absent || was == isDir && keepDir == keepDirectory {
		return was, err
	}
	if was == isDir {
		if err := a.makers.settle(); err != nil { // makers may be at work below it
			return was, err
		}
		if err := a.loose.remove(a.tree, parent, base); err != nil {
			return was, err
		}
	}
	// Whatever goes may be part of a cached path.
	a.tree.forget()
	return was, removeTree(parent.fd, base)
}

type keep bool

const (
	keepDirectory keep = true
	keepNothing   keep = false
)

func (a *applier) regular(parent *dir, base string, meta meta, content io.Reader, size int64) error {
	if err := a.budget.takeBytes(size); err != nil {
		return err
	}
	a.result.Inodes++
	a.result.Bytes += (size + diskBlock - 1) / diskBlock * diskBlock
	if _, err := a.clear(parent, base, keepNothing); err != nil {
		return err
	}
	if size <= smallFile {
		return asCorrupt(a.makers.add(parent, base, meta, content, size))
	}
	fd, err := createFile(parent, base)
	if err != nil {
		return err
	}
	return asCorrupt(closeFile(fd, meta, a.copyTo(fd, content)))
}

// asCorrupt marks an archive that ends inside a file.
func asCorrupt(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || errors.Is(err, tar.ErrHeader) {
		return fmt.Errorf("%w: %w", fault.Corrupt, err)
	}
	return err
}

func (a *applier) copyTo(fd int, content io.Reader) error {
	if a.buffer == nil {
		a.buffer = make([]byte, blockSize)
	}
	buf := a.buffer
	for {
		if a.ctx.Err() != nil {
			return context.Cause(a.ctx)
		}
		n, err := content.Read(buf)
		for data := buf[:n]; len(data) > 0; {
			m, err := unix.Write(fd, data)
			if err != nil && err != unix.EINTR {
				return err
			}
			data = data[max(m, 0):]
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (a *applier) directory(parent *dir, name, base string, meta meta) error {
	was, err := a.clear(parent, base, keepDirectory)
	if err != nil {
		return err
	}
	if was == isDir {
		d, err := a.tree.lookup(name)
		if err != nil {
			return err
		}
		return a.setDir(d, name, meta)
	}
	d, err := a.tree.mkdir(parent, name, base)
	if err != nil {
		return err
	}
	a.countDir()
	if was != absent {
		// It took the place of a whiteout or of a file of this layer: what the
		// layers below have under this name does not show through.
		if err := setXattr(d, ".", opaqueXattr, []byte("y")); err != nil {
			return err
		}
	}
	return a.setDir(d, name, meta)
}

func (a *applier) countDir() {
	a.result.Inodes++
	a.result.Bytes += diskBlock
}

// directoryOverLink makes a directory in the place of a loose hard link: what the layers below have there does not show through.
func (a *applier) directoryOverLink(parent *dir, name, base string, meta meta) error {
	d, err := a.tree.mkdir(parent, name, base)
	if err != nil {
		return err
	}
	a.countDir()
	if err := setXattr(d, ".", opaqueXattr, []byte("y")); err != nil {
		return err
	}
	return a.setDir(d, name, meta)
}

// setDir sets a directory's attributes, its times later.
func (a *applier) setDir(d *dir, name string, meta meta) error {
	delete(a.loose.dirs, d.ino)
	if err := unix.Fchownat(d.fd, "", meta.uid, meta.gid, unix.AT_EMPTY_PATH); err != nil {
		return err
	}
	if err := chmodDir(d, meta.mode); err != nil {
		return err
	}
	for _, x := range meta.xattrs {
		if err := setXattr(d, ".", x.key, x.value); err != nil {
			return err
		}
	}
	a.dirs = append(a.dirs, dirTimes{name, d.ino, meta.times})
	return nil
}

func (a *applier) setDirTimes() error {
	for _, d := range slices.Backward(a.dirs) {
		now, err := a.tree.lookup(d.name)
		if err != nil || now.ino != d.ino {
			continue // removed or replaced later in the archive
		}
		if err := unix.UtimesNanoAt(now.fd, "", d.times[:], unix.AT_EMPTY_PATH); err != nil {
			return fmt.Errorf("times of %q: %w", clip(d.name), err)
		}
	}
	return nil
}

func (a *applier) symlink(parent *dir, base, target string, meta meta) error {
	if target == "" || strings.IndexByte(target, 0) >= 0 {
		return fmt.Errorf("%w: symbolic link to %q", fault.Corrupt, clip(target))
	}
	if len(target) > 4095 {
		return fmt.Errorf("%w: symbolic link to a name of %d bytes, longer than 4095", fault.Limit, len(target))
	}
	if _, err := a.clear(parent, base, keepNothing); err != nil {
		return err
	}
	if err := unix.Symlinkat(target, parent.fd, base); err != nil {
		return err
	}
	a.result.Inodes++
	return a.setNode(parent, base, meta)
}

func (a *applier) hardlink(parent *dir, base, target string) error {
	target, err := a.cleanName(target)
	if err != nil {
		return err
	}
	if target == "" {
		return fmt.Errorf("%w: hard link to the root directory", fault.Corrupt)
	}
	above, targetBase := path.Split(target)
	from, err := a.tree.lookup(strings.TrimSuffix(above, "/"))
	if err == unix.ENOENT || err == unix.ENOTDIR {
		return a.linkBelow(parent, base, target)
	}
	if err != nil {
		return err
	}
	from = from.use()
	defer from.done()
	if a.makers.busy(from, targetBase) {
		if err := a.makers.settle(); err != nil {
			return err
		}
	}
	if from.ino == parent.ino && targetBase == base {
		return nil // to itself
	}
	if loose := a.loose.link(from, targetBase); loose != nil {
		return a.linkBelow(parent, base, loose.target)
	}
	switch is, err := kindOf(from, targetBase); {
	case err != nil:
		return err
	case is == absent:
		return a.linkBelow(parent, base, target)
	case is == isWhiteout:
		return fmt.Errorf("%w: hard link to %q, which this layer removes", fault.Corrupt, clip(target))
	case is == isDir:
		return fmt.Errorf("%w: hard link to the directory %q", fault.Corrupt, clip(target))
	}
	if _, err := a.clear(parent, base, keepNothing); err != nil {
		return err
	}
	// Flags 0: a symbolic link is linked itself. The attributes are the target
	// entry's, whatever this one's header says (CVE-2021-32760 was a chmod here).
	err = unix.Linkat(from.fd, targetBase, parent.fd, base, 0)
	if err == unix.ENOENT { // clear removed the target: it was below base
		return fmt.Errorf("%w: hard link to %q, in whose place it is", fault.Corrupt, clip(target))
	}
	return err
}

// linkBelow is a hard link to something that is not in this layer; if it is in none below either, Tie will say so.
func (a *applier) linkBelow(parent *dir, base, target string) error {
	if _, err := a.clear(parent, base, keepNothing); err != nil {
		return err
	}
	return a.loose.addLink(a.tree, parent, base, target)
}

func (a *applier) node(parent *dir, base string, header *tar.Header, meta meta) error {
	mode, dev := uint32(unix.S_IFIFO), uint64(0)
	if header.Typeflag != tar.TypeFifo {
		mode = unix.S_IFBLK
		if header.Typeflag == tar.TypeChar {
			mode = unix.S_IFCHR
		}
		// Bounds of the kernel's MAJOR and MINOR (include/linux/kdev_t.h).
		if header.Devmajor < 0 || header.Devmajor >= 1<<12 || header.Devminor < 0 || header.Devminor >= 1<<20 {
			return fmt.Errorf("%w: device %d:%d", fault.Corrupt, header.Devmajor, header.Devminor)
		}
		dev = unix.Mkdev(uint32(header.Devmajor), uint32(header.Devminor))
		if mode == unix.S_IFCHR && dev == 0 {
			return fmt.Errorf("%w: char device 0:0 is overlayfs's whiteout, which only the runtime makes", fault.Corrupt)
		}
	}
	if _, err := a.clear(parent, base, keepNothing); err != nil {
		return err
	}
	if err := unix.Mknodat(parent.fd, base, mode|0o600, int(dev)); err != nil {
		return err
	}
	a.result.Inodes++
	// We made it a moment ago, in a tree of ours: it is no link that chmod could follow.
	return a.setNode(parent, base, meta)
}

// setNode sets the attributes of something that is not opened.
func (a *applier) setNode(parent *dir, base string, meta meta) error {
	if err := unix.Fchownat(parent.fd, base, meta.uid, meta.gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstatat(parent.fd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK { // a link has no mode of its own
		if err := unix.Fchmodat(parent.fd, base, meta.mode, 0); err != nil {
			return err
		}
	}
	for _, x := range meta.xattrs {
		if err := setXattr(parent, base, x.key, x.value); err != nil {
			return err
		}
	}
	return unix.UtimesNanoAt(parent.fd, base, meta.times[:], unix.AT_SYMLINK_NOFOLLOW)
}

func (a *applier) whiteout(name, base string) error {
	above := strings.TrimSuffix(name[:len(name)-len(base)], "/")
	if base == opaqueMark {
		if above == "" {
			a.result.OpaqueRoot = true
			return nil
		}
		d, err := a.tree.ensure(above)
		if err != nil {
			return err
		}
		return setXattr(d, ".", opaqueXattr, []byte("y"))
	}
	if strings.HasPrefix(base, aufsPrefix) {
		return nil
	}
	hidden := strings.TrimPrefix(base, whiteoutPrefix)
	if hidden == "" || hidden == "." || hidden == ".." {
		return fmt.Errorf("%w: whiteout of %q", fault.Corrupt, hidden)
	}
	parent, err := a.tree.ensure(above)
	if err != nil {
		return err
	}
	if a.makers.busy(parent, hidden) || a.loose.link(parent, hidden) != nil {
		return nil // this layer has a file of that name: it hides those below anyway
	}
	switch is, err := kindOf(parent, hidden); {
	case err != nil:
		return err
	case is == isDir:
		parent = parent.use()
		defer parent.done()
		return setXattr(parent, hidden, opaqueXattr, []byte("y"))
	case is != absent:
		return nil
	}
	if err := unix.Mknodat(parent.fd, hidden, unix.S_IFCHR|0o600, 0); err != nil {
		return err
	}
	a.result.Inodes++
	return nil
}

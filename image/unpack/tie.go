package unpack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/image/fault"
)

// Tie makes, in the existing empty directory at root, what has to lie between a layer and those above it so that its loose
// ends look as if its archive had been unpacked onto the layers below it, lowers, topmost first:
//
//   - A directory that the archive leaves out keeps the owner, mode and attributes that it has below.
//   - One that is a link to a directory below stays one, and what the archive has in it is where the link leads: "bin/app" on an image whose /bin is a link to usr/bin.
//   - A hard link to a file below is one.
//
// impliedRoot: the archive does not say what the root directory is like. lowers have their own ties between them. Files are linked, not copied, so all must be
// on one file system.
//
// It returns what the tree takes, or found nothing to do if needed is false.
//
// Errors: fault.Corrupt for a hard link to what is in no layer, fault.Limit; those of the file system.
//
// Needs: as Layer. Trust: layers are ours, their content and the names in loose are hostile.
func Tie(ctx context.Context, layer string, lowers []string, impliedRoot bool, loose *Loose, root string) (result Result, needed bool, err error) {
	if loose == nil {
		loose = &Loose{}
	}
	var opened []int
	defer func() {
		for _, fd := range opened {
			_ = unix.Close(fd) // O_PATH
		}
	}()
	for _, dir := range append([]string{root, layer}, lowers...) {
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return Result{}, false, fmt.Errorf("open %s: %w", dir, err)
		}
		opened = append(opened, fd)
	}
	t := &tier{
		root: opened[0], layer: opened[1],
		below: &merged{ctx: ctx, roots: opened[2:]}, all: &merged{ctx: ctx, roots: opened},
		implied: map[string]bool{"": impliedRoot}, made: map[string]bool{},
	}
	for _, d := range loose.Dirs {
		t.implied[d] = true
	}
	for _, step := range []func(*Loose) error{t.tieRoot, t.tieDirs, t.tieLinks} {
		if err := step(loose); err != nil {
			return Result{}, false, err
		}
	}
	return t.result, len(t.made) > 0, t.setTimes()
}

// tier makes one tie.
type tier struct {
	root, layer int // O_PATH
	below       *merged
	all         *merged         // the tie, the layer, those below
	implied     map[string]bool // directories of the layer that its archive leaves out
	moved       []move
	made        map[string]bool // directories of the tie
	times       []dirTime
	result      Result
}

// move says that a directory of the layer is, in the merged tree, where a link below leads.
type move struct{ from, to string }

type dirTime struct {
	name  string
	times [2]unix.Timespec
}

func (t *tier) tieRoot(*Loose) error {
	below, err := t.below.root()
	if err != nil || below == nil || !t.implied[""] {
		return err
	}
	same, err := t.sameAttributes("", below)
	if err != nil || same {
		return err
	}
	return t.dir("")
}

// tieDirs looks at each directory that the archive leaves out. They come sorted, so that a path's beginning is known from
// the one before.
func (t *tier) tieDirs(loose *Loose) error {
	root, err := t.below.root()
	if err != nil || root == nil {
		return err
	}
	way := []step{{at: root}}
	for _, d := range loose.Dirs {
		if t.isMoved(d) {
			continue // with the directory it is in
		}
		names := strings.Split(d, "/")
		common := 1
		for common < len(way) && common <= len(names) && way[common].name == names[common-1] {
			common++
		}
		way = way[:common]
		for _, n := range names[common-1:] {
			next, err := t.step(&way[len(way)-1], n)
			if err != nil {
				return err
			}
			way = append(way, next)
		}
		if err := t.tieDir(d, way[len(way)-1].at); err != nil {
			return fmt.Errorf("directory %q: %w", clip(d), err)
		}
	}
	return nil
}

// step is a component of a path of the layer with what shows through below it: nil for nothing.
type step struct {
	name string
	at   *place
}

func (t *tier) step(up *step, name string) (step, error) {
	next := step{name: name}
	if up.at == nil || !up.at.isDir() {
		return next, nil
	}
	at, err := t.below.child(up.at, name)
	if err != nil || at == nil {
		return next, err
	}
	opaque, err := isOpaque(t.layer, at.path)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return next, err
	}
	if !opaque {
		next.at = at
	}
	return next, nil
}

// tieDir ties one directory of the layer to what is below it.
func (t *tier) tieDir(d string, below *place) error {
	switch {
	case below == nil:
		return nil // it is this layer's
	case below.isLink():
		to, err := t.below.find(d, follow)
		if err != nil || to == nil || !to.isDir() {
			return err // a link to nothing, or to a file: the directory takes its place
		}
		return t.graft(d, to, below)
	case !below.isDir():
		return nil
	}
	same, err := t.sameAttributes(d, below)
	if err != nil || same {
		return err
	}
	return t.dir(d)
}

// sameAttributes: a directory of the layer looks as it does below.
func (t *tier) sameAttributes(d string, below *place) (bool, error) {
	var st unix.Stat_t
	if err := statDir(t.layer, d, &st); err != nil {
		return false, err
	}
	if st.Mode != below.stat.Mode || st.Uid != below.stat.Uid || st.Gid != below.stat.Gid {
		return false, nil
	}
	have, err := userXattrs(t.layer, d)
	if err != nil {
		return false, err
	}
	want, err := userXattrs(t.below.roots[below.in[0]], below.path)
	return slices.EqualFunc(have, want, func(a, b xattr) bool { return a.key == b.key && bytes.Equal(a.value, b.value) }), err
}

func statDir(root int, name string, st *unix.Stat_t) error {
	if name == "" {
		return unix.Fstat(root, st)
	}
	if err := unix.Fstatat(root, name, st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return atPath("stat", name, err)
	}
	return nil
}

// dir makes a directory in the tie, and those it is in, with the attributes that the merged tree shows.
func (t *tier) dir(name string) error {
	if t.made[name] {
		return nil
	}
	if name != "" {
		if err := t.dir(parentOf(name)); err != nil {
			return err
		}
	}
	source, st, err := t.sourceOf(name)
	if err != nil {
		return err
	}
	return t.mkdir(name, source, name, st)
}

// sourceOf finds the layer whose directory has the attributes to show.
func (t *tier) sourceOf(name string) (root int, st *unix.Stat_t, err error) {
	st = &unix.Stat_t{}
	own := statDir(t.layer, name, st)
	if own == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR && !t.implied[name] {
		return t.layer, st, nil
	}
	below, err := t.below.find(name, noFollow)
	switch {
	case err != nil:
		return -1, nil, err
	case below != nil && below.isDir() && below.path == name:
		return t.below.roots[below.in[0]], &below.stat, nil
	}
	return t.layer, st, own
}

// mkdir makes a directory in the tie that looks like from in source.
func (t *tier) mkdir(name string, source int, from string, st *unix.Stat_t) error {
	if name != "" {
		if err := unix.Mkdirat(t.root, name, 0o700); err != nil {
			return atPath("mkdir", name, err)
		}
	}
	t.made[name] = true
	t.result.Inodes++
	t.result.Bytes += diskBlock
	at := name
	if at == "" {
		at = "."
	}
	if err := unix.Fchownat(t.root, at, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return atPath("chown", name, err)
	}
	if err := unix.Fchmodat(t.root, at, st.Mode&0o7777, 0); err != nil { // it is a directory that we made
		return atPath("chmod", name, err)
	}
	attributes, err := userXattrs(source, from)
	if err != nil {
		return err
	}
	for _, x := range attributes {
		if err := ignoreUserXattr(x.key, unix.Lsetxattr(procPath(t.root, name), x.key, x.value, 0)); err != nil {
			return atPath("setxattr", name, err)
		}
	}
	t.times = append(t.times, dirTime{at, [2]unix.Timespec{st.Atim, st.Mtim}})
	return nil
}

// setTimes sets the directories' times, when nothing more is made in them.
func (t *tier) setTimes() error {
	for _, d := range t.times {
		if err := unix.UtimesNanoAt(t.root, d.name, d.times[:], unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return atPath("utimes", d.name, err)
		}
	}
	return nil
}

func parentOf(name string) string {
	return strings.TrimSuffix(name[:strings.LastIndexByte(name, '/')+1], "/")
}

func (t *tier) isMoved(name string) bool { return t.movedTo(name) != name }

// movedTo is where a path of the layer is in the merged tree.
func (t *tier) movedTo(name string) string {
	// The longest that fits: a directory can be moved out of one that was.
	for _, m := range slices.Backward(t.moved) {
		if name == m.from || strings.HasPrefix(name, m.from+"/") {
			return m.to + name[len(m.from):]
		}
	}
	return name
}

// graft puts what the layer has in the directory d to where the link below leads, and the link in its place.
func (t *tier) graft(d string, to, link *place) error {
	t.moved = append(t.moved, move{d, to.path})
	if err := t.dir(to.path); err != nil {
		return err
	}
	if err := t.graftInto(d, to); err != nil {
		return err
	}
	if link == nil {
		return nil
	}
	if err := t.dir(parentOf(d)); err != nil {
		return err
	}
	return t.link(t.below.roots[link.in[0]], link.path, d)
}

// graftInto puts what the layer has in the directory d into to, a directory of the layers below.
func (t *tier) graftInto(d string, to *place) error {
	names, err := namesIn(t.layer, d)
	if err != nil {
		return err
	}
	for _, n := range names {
		from, at := d+"/"+n, joined(to.path, n)
		var st unix.Stat_t
		if err := statDir(t.layer, from, &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR { // a whiteout, too
			if err := t.link(t.layer, from, at); err != nil {
				return err
			}
			continue
		}
		if err := t.graftDir(from, at, to, n, &st); err != nil {
			return err
		}
	}
	return nil
}

// graftDir puts the layer's directory from to the name at, n in to.
func (t *tier) graftDir(from, at string, to *place, n string, st *unix.Stat_t) error {
	opaque, err := isOpaque(t.layer, from)
	if err != nil {
		return err
	}
	var below *place
	if !opaque && len(to.in) > 0 {
		if below, err = t.below.child(to, n); err != nil {
			return err
		}
	}
	if below != nil && below.isLink() && t.implied[from] {
		target, err := t.below.find(at, follow)
		if err != nil {
			return err
		}
		if target != nil && target.isDir() {
			return t.graft(from, target, nil) // the link itself is still there: nothing of ours hides it
		}
	}
	merges := below != nil && below.isDir()
	switch {
	case t.made[at]:
	case merges && t.implied[from]:
		err = t.mkdir(at, t.below.roots[below.in[0]], below.path, &below.stat)
	default:
		err = t.mkdir(at, t.layer, from, st)
	}
	if err != nil {
		return err
	}
	if opaque {
		if err := unix.Lsetxattr(procPath(t.root, at), opaqueXattr, []byte("y"), 0); err != nil {
			return atPath("setxattr", at, err)
		}
	}
	if !merges {
		below = &place{path: at} // nothing below it shows
	}
	return t.graftInto(from, below)
}

// namesIn lists a directory of a layer.
func namesIn(root int, name string) ([]string, error) {
	fd, err := unix.Openat(root, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, atPath("open", name, err)
	}
	defer unix.Close(fd)
	var names []string
	buf := make([]byte, 8<<10)
	for {
		n, err := unix.ReadDirent(fd, buf)
		if err != nil {
			return nil, atPath("read", name, err)
		}
		if n == 0 {
			return names, nil
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}

// link links a file, link, node or whiteout of a layer into the tie, whose directory for it is there.
func (t *tier) link(source int, from, name string) error {
	err := unix.Linkat(source, from, t.root, name, 0)
	switch err {
	case unix.EEXIST: // of two that lead to one place
		return nil
	case unix.EMLINK:
		return fmt.Errorf("%w: more hard links to %q than its file system has", fault.Limit, clip(from))
	case nil:
		return nil
	}
	return atPath("link", from, err)
}

// tieLinks makes the hard links to files of layers below.
func (t *tier) tieLinks(loose *Loose) error {
	for _, l := range loose.Links {
		if err := t.tieLink(l); err != nil {
			return fmt.Errorf("entry %q: %w", clip(l.Name), err)
		}
	}
	return nil
}

func (t *tier) tieLink(l Link) error {
	at, err := t.all.find(l.Target, noFollow)
	switch {
	case err != nil:
		return err
	case at == nil:
		return fmt.Errorf("%w: hard link to %q, which is neither in this layer nor in one below", fault.Corrupt, clip(l.Target))
	case at.isDir():
		return fmt.Errorf("%w: hard link to the directory %q", fault.Corrupt, clip(l.Target))
	}
	name := t.movedTo(l.Name)
	if parent := parentOf(name); !t.made[parent] {
		if err := t.dir(parent); err != nil {
			return err
		}
	}
	return t.link(t.all.roots[at.in[0]], at.path, name)
}

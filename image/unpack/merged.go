package unpack

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/image/fault"
)

// merged shows unpacked layers as overlayfs would, without mounting them: a name is what the topmost layer that has it
// says, directories are the union of those not hidden.
//
// Nobody changes the layers, and of a path that was resolved all but the last component are directories of each layer it is
// used in: so it is named relative to a layer's root without a link being followed.
type merged struct {
	ctx   context.Context
	roots []int // O_PATH descriptors of the layers' roots, topmost first; the caller's
	steps int   // names looked up so far
}

const (
	// maxSteps bounds the look-ups for one layer's loose ends. A usual layer has some hundred.
	maxSteps = 30_000_000
	// maxFollowed is the kernel's MAXSYMLINKS, path_resolution(7).
	maxFollowed = 40
)

// place is what is at a path of a merged tree.
type place struct {
	path string // without links, "" is the root
	// in are the layers that have it, indices into roots, topmost first: all whose directories are merged, or the one
	// whose file it is.
	in   []int
	stat unix.Stat_t // of the first
}

func (p *place) isDir() bool  { return p.stat.Mode&unix.S_IFMT == unix.S_IFDIR }
func (p *place) isLink() bool { return p.stat.Mode&unix.S_IFMT == unix.S_IFLNK }

// root is the merged root directory; nil without layers.
func (m *merged) root() (*place, error) {
	if len(m.roots) == 0 {
		return nil, nil
	}
	p := &place{}
	for i := range m.roots {
		p.in = append(p.in, i)
	}
	return p, unix.Fstat(m.roots[0], &p.stat)
}

// child is what a directory has under a name, a link as itself; nil if nothing.
func (m *merged) child(dir *place, name string) (*place, error) {
	p := &place{path: joined(dir.path, name)}
	for _, i := range dir.in {
		if m.steps++; m.steps > maxSteps {
			return nil, fmt.Errorf("%w: what the layer leaves out takes more than %d look-ups", fault.Limit, maxSteps)
		}
		if m.steps%1024 == 0 && m.ctx.Err() != nil {
			return nil, context.Cause(m.ctx)
		}
		var st unix.Stat_t
		err := unix.Fstatat(m.roots[i], p.path, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err == unix.ENOENT {
			continue
		}
		if err != nil {
			return nil, atPath("stat", p.path, err)
		}
		isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
		if st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 || !isDir && len(p.in) > 0 {
			break // it hides what is below
		}
		if len(p.in) == 0 {
			p.stat = st
		}
		p.in = append(p.in, i)
		if !isDir {
			break
		}
		opaque, err := isOpaque(m.roots[i], p.path)
		if err != nil {
			return nil, err
		}
		if opaque {
			break
		}
	}
	if len(p.in) == 0 {
		return nil, nil
	}
	return p, nil
}

// followLast says whether a link at the end of a path is followed.
type followLast bool

const (
	follow   followLast = true
	noFollow followLast = false
)

// find resolves a path as a container would whose root the merged tree is; nil if it leads to nothing.
func (m *merged) find(name string, last followLast) (*place, error) {
	root, err := m.root()
	if err != nil || root == nil {
		return nil, err
	}
	way := []*place{root} // the directories down to where we are
	todo := strings.Split(name, "/")
	for followed := 0; len(todo) > 0; {
		name := todo[0]
		todo = todo[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			way = way[:max(1, len(way)-1)]
			continue
		}
		at, err := m.child(way[len(way)-1], name)
		if err != nil || at == nil {
			return nil, err
		}
		ends := !slices.ContainsFunc(todo, func(s string) bool { return s != "" && s != "." })
		switch {
		case at.isDir():
			way = append(way, at)
		case at.isLink() && (!ends || last == follow):
			if followed++; followed > maxFollowed {
				return nil, nil
			}
			target, err := m.readlink(at)
			if err != nil {
				return nil, err
			}
			if path.IsAbs(target) {
				way = way[:1]
			}
			todo = append(strings.Split(target, "/"), todo...)
		case ends:
			return at, nil
		default:
			return nil, nil
		}
	}
	return way[len(way)-1], nil
}

func (m *merged) readlink(p *place) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(m.roots[p.in[0]], p.path, buf)
	if err != nil {
		return "", atPath("readlink", p.path, err)
	}
	return string(buf[:n]), nil
}

func atPath(op, name string, err error) error {
	if err == unix.ENAMETOOLONG {
		return fmt.Errorf("%w: %s %q: a path longer than %d bytes", fault.Limit, op, clip(name), unix.PathMax)
	}
	return fmt.Errorf("%s %q: %w", op, clip(name), err)
}

// isOpaque says whether a directory of a layer hides what layers below have in it.
func isOpaque(root int, name string) (bool, error) {
	value, err := getXattr(root, name, opaqueXattr)
	return string(value) == "y", err
}

// procPath names a file below root for system calls that take no descriptor (xattr(7), before Linux 6.13).
func procPath(root int, name string) string {
	return "/proc/self/fd/" + strconv.Itoa(root) + "/" + name
}

// getXattr returns nil if there is no such attribute.
func getXattr(root int, name, key string) ([]byte, error) {
	for size := 256; ; size *= 4 {
		buf := make([]byte, size)
		n, err := unix.Lgetxattr(procPath(root, name), key, buf)
		switch err {
		case nil:
			return buf[:n], nil
		case unix.ENODATA, unix.ENOTSUP:
			return nil, nil
		case unix.ERANGE:
			continue // 64 KiB is the most (XATTR_SIZE_MAX)
		}
		return nil, atPath("getxattr", name, err)
	}
}

// userXattrs are the attributes of a directory that an archive can give it.
func userXattrs(root int, name string) ([]xattr, error) {
	buf := make([]byte, 64<<10) // XATTR_LIST_MAX
	n, err := unix.Llistxattr(procPath(root, name), buf)
	if err == unix.ENOTSUP {
		return nil, nil
	}
	if err != nil {
		return nil, atPath("listxattr", name, err)
	}
	var l []xattr
	for key := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if !keepXattr(key) {
			continue
		}
		value, err := getXattr(root, name, key)
		if err != nil {
			return nil, err
		}
		l = append(l, xattr{key, value})
	}
	slices.SortFunc(l, func(a, b xattr) int { return strings.Compare(a.key, b.key) })
	return l, nil
}

package unpack

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/crisp-cri/crisp/image/fault"
)

// Loose are the loose ends of a layer: what its archive takes for granted of the layers below it, which
// are not known while it is unpacked, and may be others in another image. [Tie] ties them up.
type Loose struct {
	// Dirs are paths of directories that the archive has something in, but leaves out: they look as in the layers
	// below. Without links on the way; parents come before what is in them.
	Dirs []string
	// Links are hard links to what this layer does not have, in the archive's order.
	Links []Link
}

// Link is a hard link.
type Link struct {
	Name   string // as Dirs are
	Target string // cleaned; may lead through links
}

// maxLoose bounds what is remembered of a layer's loose ends, in bytes of names.
const maxLoose = 16 << 20

func (l *Loose) empty() bool { return len(l.Dirs) == 0 && len(l.Links) == 0 }

// Encode returns the loose ends as bytes, in which names may be any.
func (l *Loose) Encode() []byte {
	var b bytes.Buffer
	put := func(kind byte, names ...string) {
		b.WriteByte(kind)
		for _, n := range names {
			b.WriteString(n)
			b.WriteByte(0)
		}
	}
	for _, d := range l.Dirs {
		put('d', d)
	}
	for _, k := range l.Links {
		put('l', k.Name, k.Target)
	}
	return b.Bytes()
}

var errLoose = errors.New("loose ends are damaged")

// DecodeLoose is the inverse of Encode. Every name it returns is clean and relative.
func DecodeLoose(b []byte) (*Loose, error) {
	l := &Loose{}
	name := func() (string, error) {
		n, rest, ok := bytes.Cut(b, []byte{0})
		s := string(n)
		if !ok || s == "" || s != cleanPath(s) {
			return "", errLoose
		}
		b = rest
		return s, nil
	}
	for len(b) > 0 {
		kind := b[0]
		b = b[1:]
		first, err := name()
		if err != nil {
			return nil, err
		}
		switch kind {
		case 'd':
			l.Dirs = append(l.Dirs, first)
		case 'l':
			target, err := name()
			if err != nil {
				return nil, err
			}
			l.Links = append(l.Links, Link{first, target})
		default:
			return nil, errLoose
		}
	}
	return l, nil
}

// looseEnds collects them while the archive is read. Entries that come later may replace what it has.
type looseEnds struct {
	dirs    map[uint64]looseDir // by inode
	links   map[fileKey]*looseLink
	removed map[string]int // when a directory was last removed with all in it, by its path: an inode may come back
	now     int            // counts what is noted
	bytes   int
	// rootSet: the archive has an entry for the root directory.
	rootSet bool
}

type looseDir struct {
	name string
	at   int // looseEnds.now
}

type looseLink struct {
	parent, target string
	at             int // looseEnds.now
}

func (e *looseEnds) take(names ...string) error {
	for _, n := range names {
		e.bytes += len(n) + 2
	}
	if e.bytes > maxLoose {
		return fmt.Errorf("%w: the layer leaves out more directories and link targets than %d bytes of names", fault.Limit, maxLoose)
	}
	return nil
}

// addDir notes a directory that was made because the archive leaves it out.
func (e *looseEnds) addDir(t *tree, d *dir) error {
	name, err := t.realName(d)
	if err == nil {
		err = e.take(name)
	}
	if err != nil {
		return err
	}
	if e.dirs == nil {
		e.dirs = map[uint64]looseDir{}
	}
	e.now++
	e.dirs[d.ino] = looseDir{name, e.now}
	return nil
}

// remove notes that a directory is removed with all that is in it.
func (e *looseEnds) remove(t *tree, parent *dir, base string) error {
	if len(e.dirs)+len(e.links) == 0 {
		return nil
	}
	name, err := t.realName(parent)
	if err == nil {
		err = e.take(name, base)
	}
	if err != nil {
		return err
	}
	if e.removed == nil {
		e.removed = map[string]int{}
	}
	e.now++
	e.removed[joined(name, base)] = e.now
	return nil
}

// stands says whether what was noted then about a directory is about the one that is there at the archive's end.
func (e *looseEnds) stands(t *tree, name string, ino uint64, at int) bool {
	for above := name; len(e.removed) > 0 && above != ""; above = parentOf(above) {
		if e.removed[above] > at {
			return false
		}
	}
	now, err := t.lookup(name)
	return err == nil && now.ino == ino
}

func joined(dir, base string) string { return strings.TrimPrefix(dir+"/"+base, "/") }

// addLink notes a hard link in parent.
func (e *looseEnds) addLink(t *tree, parent *dir, base, target string) error {
	name, err := t.realName(parent)
	if err == nil {
		err = e.take(name, base, target)
	}
	if err != nil {
		return err
	}
	if e.links == nil {
		e.links = map[fileKey]*looseLink{}
	}
	e.now++
	e.links[fileKey{parent.ino, base}] = &looseLink{name, target, e.now}
	return nil
}

// link is the loose link that stands at a name.
func (e *looseEnds) link(parent *dir, base string) *looseLink {
	return e.links[fileKey{parent.ino, base}]
}

// settled is what is left at the archive's end: directories and links may have been replaced or removed since.
func (e *looseEnds) settled(t *tree) *Loose {
	l := &Loose{}
	for ino, d := range e.dirs {
		if e.stands(t, d.name, ino, d.at) {
			l.Dirs = append(l.Dirs, d.name)
		}
	}
	slices.Sort(l.Dirs) // "a" before "a/b"
	for _, key := range slices.SortedFunc(maps.Keys(e.links), func(a, b fileKey) int { return e.links[a].at - e.links[b].at }) {
		if k := e.links[key]; e.stands(t, k.parent, key.dir, k.at) {
			l.Links = append(l.Links, Link{joined(k.parent, key.base), k.target})
		}
	}
	if l.empty() {
		return nil
	}
	return l
}

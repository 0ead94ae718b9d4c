package unpack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/image/fault"
	it "github.com/crisp-cri/crisp/image/imagetest"
)

// stack unpacks layers, lowest first, with their ties, as the store does. It returns them topmost first.
func stack(t testing.TB, layers ...[]it.Entry) ([]string, error) {
	t.Helper()
	needRoot(t)
	var lowers []string
	for _, entries := range layers {
		root := newRoot(t)
		result, err := layerInto(root, it.Tar(entries...), Limits{})
		if err != nil {
			return nil, err
		}
		if result.OpaqueRoot {
			lowers = nil
		}
		if result.Loose != nil {
			if again, err := DecodeLoose(result.Loose.Encode()); err != nil || !reflect.DeepEqual(again, result.Loose) {
				t.Errorf("loose ends: got %v, %v, want %v", again, err, result.Loose)
			}
		}
		tie := newRoot(t)
		if err := os.Chmod(tie, 0o755); err != nil {
			t.Fatal(err)
		}
		c := newCanary(t, tie)
		_, needed, err := Tie(context.Background(), root, lowers, result.ImpliedRoot, result.Loose, tie)
		c.check(t)
		if err != nil {
			return nil, err
		}
		lowers = slices.Insert(lowers, 0, root)
		if needed {
			lowers = slices.Insert(lowers, 0, tie)
		}
	}
	return lowers, nil
}

// debian is what a distribution's base image is like: links in the place of directories, directories with owners and modes.
var debian = []it.Entry{
	it.Dir("./", 0o751).Owned(0, 3), it.Dir("usr", 0o755), it.Dir("usr/bin", 0o711).Owned(0, 4), it.Dir("usr/lib", 0o755), it.Dir("usr/lib/x86", 0o755), it.File("usr/lib/x86/libc", "c", 0o644), it.File("usr/bin/sh", "sh", 0o755),
	it.Symlink("usr/bin", "bin"), it.Symlink("/usr/lib", "lib"), it.Symlink("lib", "lib64"),
	it.Dir("run", 0o755), it.Dir("run/lock", 0o1777), it.Dir("var", 0o755), it.Symlink("../run", "var/run"), it.Symlink("../../run/lock", "var/lock"),
	it.Dir("tmp", 0o1777), it.Dir("root", 0o700), it.Dir("srv", 0o775).Owned(7, 8), it.Dir("opt", 0o2775).Owned(7, 8).Xattr("user.a", "b"), it.Dir("srv/data", 0o750).Owned(9, 9), it.File("srv/data/f", "f", 0o600).Owned(9, 9),
	it.Symlink("nowhere", "dangling"), it.Symlink("usr/bin/sh", "tofile"), it.File("plain", "plain", 0o644), it.Symlink("self", "self"),
}

// TestTie: two archives, whatever they leave out, are the same as layers as they are one after the other in one directory.
func TestTie(t *testing.T) {
	for name, upper := range map[string][]it.Entry{
		"removed with what was loose":      {it.File("srv/data/x", "", 0o644), it.File("srv", "file", 0o644), it.File("root/a/b", "", 0o600), it.Link("plain", "root/a/c"), it.Symlink("x", "root/a"), it.Dir("root/a", 0o700)},
		"nothing":                          {it.File("new", "", 0o644)},
		"a directory's mode and owner":     {it.File("srv/new", "", 0o644)},
		"a directory's attributes":         {it.File("opt/new", "", 0o644)},
		"two directories":                  {it.File("srv/data/new", "", 0o644), it.File("tmp/x", "", 0o644)},
		"above an explicit directory":      {it.Dir("srv/data", 0o711).Owned(1, 1), it.File("srv/data/new", "", 0o644)},
		"below an explicit directory":      {it.Dir("srv", 0o700), it.File("srv/data/new", "", 0o644)},
		"a directory that is in neither":   {it.File("srv/new/er/file", "", 0o600)},
		"explicit later":                   {it.File("srv/data/new", "", 0o644), it.Dir("srv", 0o500)},
		"the root":                         {it.Dir("a", 0o755)},
		"the root is said":                 {it.Dir("./", 0o700), it.File("srv/x", "", 0o644)},
		"a program in a link":              {it.File("bin/app", "app", 0o755)},
		"over a file in a link":            {it.File("bin/sh", "other", 0o700)},
		"through an absolute link":         {it.File("lib/x86/libnew", "n", 0o644), it.File("lib/libd", "d", 0o644)},
		"through two links":                {it.File("lib64/x86/libnew", "n", 0o644)},
		"through a link that climbs":       {it.File("var/run/pid", "1", 0o644), it.File("var/lock/l", "", 0o644), it.File("var/run/lock/m", "", 0o644)},
		"directories in a link":            {it.File("lib/app/sub/f", "f", 0o644), it.Dir("lib/app/said", 0o700).Owned(5, 5), it.Dir("lib/x86", 0o750)},
		"a directory in a link's place":    {it.Dir("bin", 0o755), it.File("bin/app", "", 0o755)},
		"and below it":                     {it.Dir("lib", 0o755), it.File("lib/x86/new", "", 0o755)},
		"both ways to one directory":       {it.File("usr/lib/a", "", 0o644), it.File("lib/b", "", 0o644), it.File("lib64/c", "", 0o644)},
		"a link in a link":                 {it.Symlink("sh", "bin/bash"), it.Fifo("bin/pipe", 0o600), it.Char("bin/null", 0o666, 1, 3)},
		"a hard link below":                {it.Link("plain", "link")},
		"a hard link in a loose directory": {it.Link("srv/data/f", "srv/data/g")},
		"a hard link to a link":            {it.Link("bin", "bin2")},
		"a hard link through links":        {it.Link("bin/sh", "lib/x86/sh"), it.Link("/var/../bin/../bin/sh", "var/run/sh")},
		"a hard link to a hard link":       {it.Link("plain", "one"), it.Link("one", "two"), it.Link("two", "srv/three")},
		"a hard link that is replaced":     {it.Link("plain", "one"), it.File("one", "mine", 0o600), it.Link("plain", "two"), it.Dir("two", 0o700), it.Link("plain", "three"), it.Symlink("x", "three")},
		"a hard link in a removed place":   {it.Link("plain", "d/one"), it.File("d", "", 0o644), it.Dir("d", 0o755), it.File("d/two", "", 0o644)},
		"a hard link over a directory":     {it.Dir("d", 0o755), it.File("d/f", "", 0o644), it.Link("plain", "d")},
		"a hard link over what is below":   {it.Link("plain", "usr/bin/sh")},
		"a hard link to itself":            {it.Link("plain", "./plain")},
	} {
		t.Run(name, func(t *testing.T) {
			lowers, err := stack(t, debian, upper)
			if err != nil {
				t.Fatal(err)
			}
			got := show(t, overlay(t, lowers...))
			one := newRoot(t)
			if _, err := layerInto(one, it.Tar(with(debian, upper...)...), Limits{}); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(plainly(show(t, one)), plainly(got)); diff != "" {
				t.Errorf("the layers (+) are not what both archives (-) are in one directory:\n%s", diff)
			}
		})
	}
}

var (
	opaqueMarks = regexp.MustCompile(` trusted\.overlay\.opaque="y"`)
	linkMarks   = regexp.MustCompile(` link#\d+`)
	timeMarks   = regexp.MustCompile(`(?m)^(\S+ dir .*) @T$`)
)

// plainly leaves out of a shown tree what two ways of making it need not have in common: overlayfs's own attributes, who is
// linked with whom, and the times of directories in which something was made.
func plainly(tree string) string {
	tree = opaqueMarks.ReplaceAllString(tree, "")
	tree = linkMarks.ReplaceAllString(tree, "")
	return timeMarks.ReplaceAllString(tree, "$1")
}

// TestTieOfThree: what is in between counts, and whiteouts do.
func TestTieOfThree(t *testing.T) {
	for name, tt := range map[string]struct {
		layers [][]it.Entry
		want   []string // lines of the whole
		absent []string // beginnings of lines that must not be
	}{
		"the mode of the layer between": {[][]it.Entry{{it.Dir("d", 0o700)}, {it.Dir("d", 0o711).Owned(2, 2)}, {it.File("d/f", "", 0o644)}},
			[]string{"d dir 0711 2:2", "d/f file 0644 0:0"}, nil},
		"through two that leave it out": {[][]it.Entry{{it.Dir("d", 0o700)}, {it.File("d/e", "", 0o644)}, {it.File("d/f", "", 0o644)}},
			[]string{"d dir 0700 0:0", "d/e file", "d/f file"}, nil},
		"removed between": {[][]it.Entry{{it.Dir("d", 0o700), it.File("d/old", "", 0o644)}, {it.File(".wh.d", "", 0)}, {it.File("d/f", "", 0o644)}},
			[]string{"d dir 0755 0:0", "d/f file"}, []string{"d/old"}},
		"removed and made again": {[][]it.Entry{{it.Dir("d", 0o700), it.File("d/old", "", 0o644)}, {it.File(".wh.d", "", 0), it.File("d/f", "", 0o644)}},
			[]string{"d dir 0755 0:0", "d/f file"}, []string{"d/old"}},
		"opaque": {[][]it.Entry{{it.Dir("d", 0o700), it.Dir("d/e", 0o700), it.File("d/e/old", "", 0o644)}, {it.Dir("d", 0o711), it.File("d/.wh..wh..opq", "", 0), it.File("d/e/f", "", 0o644)}},
			[]string{"d dir 0711 0:0", "d/e dir 0755 0:0", "d/e/f file"}, []string{"d/e/old"}},
		"an opaque root": {[][]it.Entry{{it.Dir("./", 0o700), it.Dir("d", 0o700)}, {it.File(".wh..wh..opq", "", 0), it.File("d/f", "", 0o644)}},
			[]string{". dir 0755 0:0", "d dir 0755 0:0"}, nil},
		"a whiteout in a loose directory": {[][]it.Entry{{it.Dir("d", 0o700), it.File("d/f", "", 0o644), it.File("d/g", "", 0o644)}, {it.File("d/.wh.f", "", 0)}},
			[]string{"d dir 0700 0:0", "d/g file"}, []string{"d/f"}},
		"a whiteout through a link": {[][]it.Entry{debian, {it.File("bin/.wh.sh", "", 0), it.File("bin/x", "", 0o755)}},
			[]string{"bin symlink 0777 0:0 -> usr/bin", "usr/bin/x file", "usr/bin dir 0711 0:4"}, []string{"usr/bin/sh"}},
		"a link that was removed": {[][]it.Entry{debian, {it.File(".wh.bin", "", 0)}, {it.File("bin/x", "", 0o755)}},
			[]string{"bin dir 0755 0:0", "bin/x file", "usr/bin/sh file"}, []string{"usr/bin/x"}},
		"a hard link to what was changed": {[][]it.Entry{{it.File("f", "1", 0o644)}, {it.File("f", "2", 0o600)}, {it.Link("f", "g")}},
			[]string{`g file 0600 0:0 "2"`}, nil},
		"a hard link that is removed": {[][]it.Entry{{it.File("f", "1", 0o644)}, {it.Link("f", "g")}, {it.File(".wh.g", "", 0)}},
			[]string{"f file"}, []string{"g "}},
		"a hard link that is replaced": {[][]it.Entry{{it.File("f", "1", 0o644)}, {it.Link("f", "d/g")}, {it.File("d", "", 0o644)}},
			[]string{"f file", "d file"}, nil},
		"the target goes": {[][]it.Entry{{it.File("f", "1", 0o4711).Owned(3, 4)}, {it.Link("f", "g")}, {it.File(".wh.f", "", 0)}},
			[]string{`g file 4711 3:4 "1"`}, []string{"f "}},
	} {
		t.Run(name, func(t *testing.T) {
			lowers, err := stack(t, tt.layers...)
			if err != nil {
				t.Fatal(err)
			}
			got := "\n" + show(t, overlay(t, lowers...))
			for _, line := range tt.want {
				if !strings.Contains(got, "\n"+line) {
					t.Errorf("got tree%swant a line %q", got, line)
				}
			}
			for _, line := range tt.absent {
				if strings.Contains(got, "\n"+line) {
					t.Errorf("got tree%swant no line %q", got, line)
				}
			}
		})
	}
}

func TestTieRefuses(t *testing.T) {
	for name, layers := range map[string][][]it.Entry{
		"nothing":                       {{it.Link("nothing", "l")}},
		"nothing below":                 {debian, {it.Link("nothing", "l")}},
		"a directory below":             {debian, {it.Link("srv", "l")}},
		"the root, by a link":           {{it.Symlink("/", "r")}, {it.Link("r/", "l"), it.Link("r/.", "m"), it.Link("r/..", "n")}},
		"below a file":                  {debian, {it.Link("plain/x", "l")}},
		"a loop":                        {debian, {it.Link("self/x", "l")}},
		"the host":                      {debian, {it.Link("../../../../../../../../etc/hostname", "l")}},
		"what was removed":              {{it.File("f", "", 0o644)}, {it.File(".wh.f", "", 0)}, {it.Link("f", "l")}},
		"what this layer removes":       {{it.File("f", "", 0o644)}, {it.File(".wh.f", "", 0), it.Link("f", "l")}},
		"what an opaque root hides":     {{it.File("f", "", 0o644)}, {it.File(".wh..wh..opq", "", 0), it.Link("f", "l")}},
		"and something below the link":  {debian, {it.Link("plain", "d"), it.File("d/x", "", 0o644)}},
		"and a whiteout below the link": {debian, {it.Link("plain", "d"), it.File("d/.wh.x", "", 0)}},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "the root, by a link" {
				layers[1] = layers[1][1:] // "r/" is the link itself
			}
			if lowers, err := stack(t, layers...); !errors.Is(err, fault.Corrupt) {
				t.Errorf("got %v, %v, want %v", lowers, err, fault.Corrupt)
			}
		})
	}
}

// TestMergedIsOverlayfs: the merged view finds at every path what overlayfs shows there.
func TestMergedIsOverlayfs(t *testing.T) {
	lowers, err := stack(t, debian,
		[]it.Entry{it.Dir("srv", 0o755), it.File("srv/.wh.data", "", 0), it.Dir("srv/data", 0o700), it.File("srv/data/new", "n", 0o644), it.File("plain", "2", 0o600), it.File("usr/bin/app", "", 0o755)},
		[]it.Entry{it.File(".wh.tmp", "", 0), it.Dir("usr", 0o700), it.File("usr/.wh..wh..opq", "", 0), it.Dir("usr/bin", 0o755), it.File("usr/bin/only", "", 0o755), it.Symlink("/srv", "link"), it.File("root", "no directory", 0o644)},
		[]it.Entry{it.Dir("root", 0o750), it.File("root/f", "", 0o644), it.Dir("tmp", 0o755)})
	if err != nil {
		t.Fatal(err)
	}
	m := &merged{ctx: context.Background()}
	for _, l := range lowers {
		fd, err := unix.Open(l, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		m.roots = append(m.roots, fd)
	}
	real := overlay(t, lowers...)
	var names []string
	err = filepath.WalkDir(real, func(p string, _ fs.DirEntry, err error) error {
		if err == nil {
			name, _ := filepath.Rel(real, p)
			names = append(names, name)
		}
		return nil
	})
	if err != nil || len(names) < 15 {
		t.Fatal(names, err)
	}
	names = append(names, "tmp/x", "srv/data/f", "usr/lib", "usr/bin/sh", "bin/sh", "bin/only", "link/data/new", "link/../link", "var/run/lock", "nothing", "plain/x", "self", "dangling", "..", "../..", "lib/x", "root/f")
	at, err := unix.Open(real, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(at)
	for _, name := range names {
		for _, last := range []followLast{follow, noFollow} {
			got, err := m.find(name, last)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			flags := uint64(unix.O_PATH | unix.O_CLOEXEC)
			if last == noFollow {
				flags |= unix.O_NOFOLLOW
			}
			var want unix.Stat_t
			fd, err := unix.Openat2(at, name, &unix.OpenHow{Flags: flags, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
			if err == nil {
				err = unix.Fstat(fd, &want)
				unix.Close(fd)
			}
			if (err == nil) != (got != nil) {
				t.Errorf("%s (%v): got %v, overlayfs has %v", name, last, got, err)
				continue
			}
			if got != nil && (got.stat.Mode != want.Mode || got.stat.Uid != want.Uid || got.stat.Gid != want.Gid || got.stat.Mtim != want.Mtim) {
				t.Errorf("%s (%v): got %v, overlayfs has %v", name, last, got.stat, want)
			}
		}
	}
}

// TestLooseIsBounded: an archive that leaves out more than can be remembered.
func TestLooseIsBounded(t *testing.T) {
	needRoot(t)
	long := strings.Repeat("x/", 2000)
	var entries []it.Entry
	for i := range maxLoose / len(long) {
		entries = append(entries, it.Link(fmt.Sprint(long, i), fmt.Sprint("l", i)))
	}
	if _, err := layerInto(newRoot(t), it.Tar(entries...), Limits{}); !errors.Is(err, fault.Limit) {
		t.Errorf("got %v, want %v", err, fault.Limit)
	}
}

func FuzzDecodeLoose(f *testing.F) {
	f.Add((&Loose{Dirs: []string{"a", "a/b"}, Links: []Link{{"l", "t/u"}}}).Encode())
	f.Add([]byte("d../x\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := DecodeLoose(b)
		if err != nil {
			return
		}
		for _, name := range l.Dirs {
			if name != cleanPath(name) || name == "" {
				t.Errorf("got directory %q", name)
			}
		}
		if !slices.IsSorted(l.Dirs) {
			return
		}
		if again := l.Encode(); len(again) != len(b) || len(l.Links) == 0 && !bytes.Equal(again, b) {
			t.Errorf("got %q, want %q", again, b)
		}
	})
}

package image

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	it "github.com/crisp-cri/crisp/image/imagetest"
)

// look finds a name in lower directories, topmost first, none of which hides anything.
func look(t testing.TB, lowers []string, name string) (path string, st unix.Stat_t) {
	t.Helper()
	for _, l := range lowers {
		path = filepath.Join(l, name)
		if err := unix.Lstat(path, &st); err == nil {
			return path, st
		}
	}
	t.Fatalf("%s is in none of %v", name, lowers)
	return "", st
}

// TestLooseEnds: one layer on two bases is tied to each for itself, whichever was pulled first: neither image has a say in
// what the other looks like.
func TestLooseEnds(t *testing.T) {
	reg := it.NewRegistry(t)
	baseA := it.NewLayer(it.Gzip, it.Dir("./", 0o751), it.Dir("data", 0o700).Owned(1, 1), it.File("secret", "a", 0o600), it.Symlink("usr/bin", "bin"), it.Dir("usr", 0o755), it.Dir("usr/bin", 0o755))
	baseB := it.NewLayer(it.Gzip, it.Dir("data", 0o1777), it.File("secret", "b", 0o644))
	shared := it.NewLayer(it.Gzip, it.File("data/f", "f", 0o644), it.Link("secret", "link"), it.File("bin/app", "app", 0o755))
	plain := it.NewLayer(it.Gzip, it.Dir("data", 0o711), it.File("data/g", "", 0o644))
	refA, refB := reg.Add("a", "1", it.NewImage(baseA, shared)), reg.Add("b", "1", it.NewImage(baseB, shared))
	s := openStore(t)
	check := func(s *Store, a, b string) {
		t.Helper()
		la, err := s.Acquire(a, "a")
		if err != nil {
			t.Fatal(err)
		}
		lb, err := s.Acquire(b, "b")
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range []struct {
			lowers []string
			name   string
			mode   uint32
			uid    uint32
		}{
			{la.Lower, "", unix.S_IFDIR | 0o751, 0}, {la.Lower, "data", unix.S_IFDIR | 0o700, 1}, {la.Lower, "link", unix.S_IFREG | 0o600, 0},
			{la.Lower, "bin", unix.S_IFLNK | 0o777, 0}, {la.Lower, "usr/bin/app", unix.S_IFREG | 0o755, 0},
			{lb.Lower, "", unix.S_IFDIR | 0o755, 0}, {lb.Lower, "data", unix.S_IFDIR | 0o1777, 0}, {lb.Lower, "link", unix.S_IFREG | 0o644, 0},
			{lb.Lower, "bin", unix.S_IFDIR | 0o755, 0}, {lb.Lower, "bin/app", unix.S_IFREG | 0o755, 0},
		} {
			if path, st := look(t, w.lowers, w.name); st.Mode != w.mode || st.Uid != w.uid {
				t.Errorf("%s: got mode %#o of %d, want %#o of %d", path, st.Mode, st.Uid, w.mode, w.uid)
			}
		}
		for text, l := range map[string][]string{"a": la.Lower, "b": lb.Lower} {
			path, _ := look(t, l, "link")
			if got, err := os.ReadFile(path); err != nil || string(got) != text {
				t.Errorf("image %s: the hard link has %q, %v", text, got, err)
			}
		}
	}
	a, b := mustPull(t, s, refA), mustPull(t, s, refB)
	check(s, a, b)
	// Again, after a restart, and with the images removed and held.
	if mustPull(t, s, refA) != a {
		t.Error("another id")
	}
	if n := len(entriesOf(t, s.dir.layers())); n != 5 {
		t.Errorf("got %d layers, want three of archives and two ties", n)
	}
	s = reopen(t, s)
	if got := s.Problems(); len(got) > 0 {
		t.Errorf("got problems %v", got)
	}
	check(s, a, b)
	if _, _, inodes, err := s.Usage(); err != nil || inodes == 0 {
		t.Errorf("got %d inodes, %v", inodes, err)
	}
	for _, id := range []string{a, b} {
		if err := s.Remove(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	collect(t, s)
	check(s, a, b)

	// The record is lost: the ties are found again by the configuration.
	if err := os.WriteFile(s.dir.image(a), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	check(s, a, b)
	// A tie and its layer's record are lost: the next pull makes them again.
	layers, err := s.Acquire(a, "a")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Dir(layers.Lower[0])); err != nil {
		t.Fatal(err)
	}
	for _, l := range layers.Lower[1:] {
		if err := os.Remove(filepath.Join(filepath.Dir(l), layerFile)); err != nil {
			t.Fatal(err)
		}
	}
	s = reopen(t, s)
	if l, err := s.Acquire(a, "a"); err == nil {
		t.Errorf("an image without its tie: got %v, want an error", l)
	}
	mustPull(t, s, refA)
	check(s, a, b)

	s.Release("a")
	s.Release("b")
	for _, id := range []string{a, b} {
		if err := s.Remove(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	collect(t, s)
	for _, dir := range []string{s.dir.layers(), s.dir.images(), s.dir.tmp(), s.dir.trash()} {
		if left := entriesOf(t, dir); len(left) > 0 {
			t.Errorf("%s: got %v, want nothing", dir, left)
		}
	}

	// A layer that says all needs no tie; neither does one whose surroundings are as it takes them to be.
	id := mustPull(t, s, reg.Add("c", "1", it.NewImage(baseB, plain)))
	if l, err := s.Acquire(id, "c"); err != nil || len(l.Lower) != 2 {
		t.Errorf("got %v, %v, want two lowers", l, err)
	}
	s.Release("c")
}

func TestHardLinkToNothing(t *testing.T) {
	reg := it.NewRegistry(t)
	base := it.NewLayer(it.Gzip, it.File("f", "", 0o644))
	s := openStore(t)
	for name, layers := range map[string][]it.Layer{
		"only":   {it.NewLayer(it.Gzip, it.Link("nothing", "l"))},
		"bottom": {it.NewLayer(it.Gzip, it.Link("f", "l")), base}, // what is above is not below
		"top":    {base, it.NewLayer(it.Gzip, it.Link("../../../etc/passwd", "l"))},
	} {
		_, err := s.Pull(t.Context(), reg.Add("bad", name, it.NewImage(layers...)), nil)
		if err == nil || !strings.Contains(err.Error(), "hard link to") {
			t.Errorf("%s: got %v, want an error about the hard link", name, err)
		}
	}
	collect(t, s)
	if diff := cmp.Diff([]string{}, entriesOf(t, s.dir.layers())); diff != "" {
		t.Errorf("layers are left: %s", diff)
	}
}

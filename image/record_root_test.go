package image

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	it "github.com/crisp-cri/crisp/image/imagetest"
)

// storeWith opens a store with one image that holder "ctr" uses.
func storeWith(t testing.TB) (s *Store, reg *it.Registry, ref string, held Layers) {
	t.Helper()
	reg = it.NewRegistry(t)
	ref = reg.Add("app", "1", it.NewImage(it.NewLayer(it.Gzip, it.File("a", "x", 0o644)), it.NewLayer(it.Gzip, it.File(".wh..wh..opq", "", 0), it.File("b", "x", 0o644))))
	s = openStore(t)
	id := mustPull(t, s, ref)
	held, err := s.Acquire(id, "ctr")
	if err != nil {
		t.Fatal(err)
	}
	return s, reg, ref, held
}

func damage(t testing.TB, path string, how func([]byte) []byte) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, how(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

var damages = map[string]func([]byte) []byte{
	"empty":           func([]byte) []byte { return nil },
	"half":            func(b []byte) []byte { return b[:len(b)/2] },
	"bit flipped":     func(b []byte) []byte { b[len(b)/2] ^= 4; return b },
	"garbage":         func([]byte) []byte { return []byte("\x00\xffgarbage") },
	"empty object":    func([]byte) []byte { return []byte("{}") },
	"null":            func([]byte) []byte { return []byte("null") },
	"future version":  func(b []byte) []byte { return bytes.Replace(b, []byte(`"version":1`), []byte(`"version":2`), 1) },
	"of another name": func([]byte) []byte { b, _ := encodeRecord(imageRecord{ID: "sha256:" + hexDigits}); return b },
	"leads outside": func(b []byte) []byte {
		var r imageRecord
		_ = decodeRecord(b, &r)
		if len(r.Layers) > 0 {
			r.Layers[0].DiffID = "sha256:../../../../etc"
		}
		b, _ = encodeRecord(r)
		return b
	},
}

// TestDamagedRecord: a record that cannot be read costs the image's names, not
// its holder's layers, and not the daemon's start.
func TestDamagedRecord(t *testing.T) {
	for name, how := range damages {
		t.Run(name, func(t *testing.T) {
			s, _, ref, held := storeWith(t)
			other := it.NewRegistry(t)
			fine := other.Add("fine", "1", goodImage())
			mustPull(t, s, fine)
			damage(t, s.dir.image(held.ImageID), how)
			s = reopen(t, s)
			if _, err := s.Resolve(ref); !errors.Is(err, ErrNotFound) {
				t.Errorf("got %v, want %v", err, ErrNotFound)
			}
			if _, err := s.Resolve(fine); err != nil {
				t.Errorf("the other image: %v", err)
			}
			if n := len(s.Problems()); n != 1 {
				t.Errorf("got problems %q, want one", s.Problems())
			}
			if got := entriesOf(t, s.dir.corrupt()); len(got) != 1 || !strings.Contains(got[0], held.ImageID[7:]) {
				t.Errorf("set aside: %v", got)
			}
			again, err := s.Acquire(held.ImageID, "ctr")
			if err != nil || cmp.Diff(held, again) != "" {
				t.Errorf("got %v, %v, want %v", again, err, held)
			}
			s = reopen(t, s) // what was made again is there the next time, too
			if again, err := s.Acquire(held.ImageID, "ctr"); err != nil || len(s.Problems()) != 0 {
				t.Errorf("second time: got %v, %v, problems %q", again, err, s.Problems())
			}
			collect(t, s)
			for _, dir := range held.Lower {
				if _, err := os.Stat(dir); err != nil {
					t.Errorf("a held layer: %v", err)
				}
			}
			if id := mustPull(t, s, ref); id != held.ImageID {
				t.Errorf("pulled again: got %s", id)
			}
			if img, err := s.Resolve(ref); err != nil || img.Size == 0 {
				t.Errorf("pulled again: got %+v, %v", img, err)
			}
		})
	}
}

// TestDamagedConfig: the config blob is broken, the record is not.
func TestDamagedConfig(t *testing.T) {
	s, _, ref, held := storeWith(t)
	damage(t, s.dir.blob(digest.Digest(held.ImageID)), damages["bit flipped"])
	s = reopen(t, s)
	if _, err := s.Resolve(ref); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v, want %v", err, ErrNotFound)
	}
	if again, err := s.Acquire(held.ImageID, "ctr"); err != nil || cmp.Diff(held, again) != "" {
		t.Errorf("got %v, %v, want %v", again, err, held)
	}
	collect(t, s)
	mustPull(t, s, ref)
	s = reopen(t, s)
	if _, err := s.Resolve(ref); err != nil || len(s.Problems()) != 0 {
		t.Errorf("after the pull: %v, problems %q", err, s.Problems())
	}
}

// TestDamagedBoth: nothing tells what a holder's layers are. They stay until
// the image is there again, or the operator removes the set aside record.
func TestDamagedBoth(t *testing.T) {
	s, _, ref, held := storeWith(t)
	damage(t, s.dir.blob(digest.Digest(held.ImageID)), damages["empty"])
	damage(t, s.dir.image(held.ImageID), damages["empty"])
	for range 2 {
		s = reopen(t, s)
		collect(t, s)
		for _, dir := range held.Lower {
			if _, err := os.Stat(dir); err != nil {
				t.Errorf("a held layer: %v", err)
			}
		}
		if len(s.Problems()) == 0 {
			t.Error("no problem is reported")
		}
	}
	mustPull(t, s, ref)
	if err := s.Remove(t.Context(), ref); err != nil {
		t.Error(err)
	}
	collect(t, s)
	for _, name := range entriesOf(t, s.dir.corrupt()) {
		if err := os.Remove(filepath.Join(s.dir.corrupt(), name)); err != nil {
			t.Error(err)
		}
	}
	s = reopen(t, s)
	collect(t, s)
	wantNothing(t, s)
}

// TestDamagedLayerRecord: it is made again from the directory, the opaque root
// included; the blobs have to be proven anew.
func TestDamagedLayerRecord(t *testing.T) {
	for _, name := range []string{"empty", "bit flipped", "future version", "missing"} {
		t.Run(name, func(t *testing.T) {
			s, reg, ref, held := storeWith(t)
			_, bytes, inodes, _ := s.Usage()
			for _, dir := range held.Lower {
				path := filepath.Join(filepath.Dir(dir), layerFile)
				if name == "missing" {
					if err := os.Remove(path); err != nil {
						t.Fatal(err)
					}
				} else {
					damage(t, path, damages[name])
				}
			}
			s = reopen(t, s)
			// The layer below the opaque one is not among the lowers, nor damaged.
			if len(s.Problems()) != 1 {
				t.Errorf("got problems %q, want one", s.Problems())
			}
			again, err := s.Acquire(held.ImageID, "ctr")
			if err != nil || cmp.Diff(held, again) != "" {
				t.Errorf("got %v, %v, want %v", again, err, held)
			}
			if _, b, i, _ := s.Usage(); b != bytes || i != inodes {
				t.Errorf("got usage of %d bytes, %d inodes, want %d, %d", b, i, bytes, inodes)
			}
			reg.Requests()
			mustPull(t, s, ref)
			blobs := 0
			for _, r := range reg.Requests() {
				if strings.Contains(r.Path, "/blobs/") {
					blobs++
				}
			}
			if blobs != 2 { // the config and one layer
				t.Errorf("got %d blobs fetched, want 2", blobs)
			}
		})
	}
}

// TestCrashLeftovers: what a daemon that was killed at any step of a pull or a
// removal leaves, Open removes.
func TestCrashLeftovers(t *testing.T) {
	s, _, ref, held := storeWith(t)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// Unpacking; a layer without its record; one moved to the trash; a blob
	// without a record; a half-written file.
	copyTree := func(to string) {
		if err := os.CopyFS(to, os.DirFS(filepath.Dir(held.Lower[0]))); err != nil {
			t.Fatal(err)
		}
	}
	copyTree(filepath.Join(s.dir.tmp(), "layer-123"))
	copyTree(filepath.Join(s.dir.layers(), strings.Repeat("ab", 32)))
	copyTree(filepath.Join(s.dir.trash(), "1", "x"))
	for _, path := range []string{s.dir.blob("sha256:" + hexDigits), filepath.Join(s.dir.tmp(), "x.json.1")} {
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s = openStore(t, func(c *Config) { c.Root = string(s.dir) })
	if _, err := s.Resolve(ref); err != nil {
		t.Error(err)
	}
	s.sweeps.Wait()
	for dir, want := range map[string]int{s.dir.tmp(): 0, s.dir.layers(): 2, s.dir.trash(): 0, s.dir.blobs(): 2, s.dir.images(): 1} {
		if got := entriesOf(t, dir); len(got) != want {
			t.Errorf("%s: got %v, want %d", dir, got, want)
		}
	}

	// A removal that got as far as its record, then lost a layer to the trash.
	if err := s.Remove(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Dir(held.Lower[0]), filepath.Join(s.dir.trash(), "y")); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	if n := len(s.Problems()); n != 0 {
		t.Errorf("got problems %q", s.Problems())
	}
	if _, err := s.Acquire(held.ImageID, "ctr"); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v, want %v", err, ErrNotFound)
	}
	collect(t, s)
	wantNothing(t, s)
}

// TestMissingLayer: an image whose layer somebody deleted is not offered; a
// pull makes it whole.
func TestMissingLayer(t *testing.T) {
	s, _, ref, held := storeWith(t)
	if err := os.RemoveAll(filepath.Dir(held.Lower[0])); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	if _, err := s.Resolve(ref); !errors.Is(err, ErrNotFound) || len(s.Problems()) != 1 {
		t.Errorf("got %v and problems %q", err, s.Problems())
	}
	mustPull(t, s, ref)
	if again, err := s.Acquire(held.ImageID, "ctr"); err != nil || cmp.Diff(held, again) != "" {
		t.Errorf("got %v, %v, want %v", again, err, held)
	}
}

// TestHolders: holders of several images, and release.
func TestHolders(t *testing.T) {
	s, reg, ref, held := storeWith(t)
	second := mustPull(t, s, reg.Add("second", "1", goodImage()))
	for range 2 { // idempotent
		if _, err := s.Acquire(second, "ctr"); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.Acquire(second, "other"); err != nil {
		t.Error(err)
	}
	for _, ref := range []string{ref, second} {
		if err := s.Remove(t.Context(), ref); err != nil {
			t.Error(err)
		}
	}
	count := func() int { collect(t, s); return len(entriesOf(t, s.dir.layers())) }
	if got := count(); got != 3 {
		t.Errorf("both held: got %d layers, want 3", got)
	}
	_, usedHeld, _, _ := s.Usage()
	s.Release("ctr")
	s.Release("ctr")
	s.Release("nobody")
	if got := count(); got != 1 {
		t.Errorf("one held: got %d layers, want 1", got)
	}
	if _, used, _, _ := s.Usage(); used >= usedHeld || used == 0 {
		t.Errorf("got usage %d, before %d", used, usedHeld)
	}
	s.Release("other")
	if got := count(); got != 0 {
		t.Errorf("none held: got %d layers", got)
	}
	if _, err := s.Acquire(held.ImageID, "late"); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v, want %v", err, ErrNotFound)
	}
}

// What could not be thrown away is the next collection's.
func TestCollectAgain(t *testing.T) {
	s, _, ref, _ := storeWith(t)
	s.Release("ctr")
	if err := s.Remove(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(s.dir.trash()); err != nil {
		t.Fatal(err)
	}
	if err := s.CollectGarbage(t.Context()); err == nil {
		t.Error("without a trash nothing can have been collected")
	}
	if got := len(entriesOf(t, s.dir.layers())); got != 2 {
		t.Errorf("got %d layers, want 2", got)
	}
	if err := os.Mkdir(s.dir.trash(), 0o700); err != nil {
		t.Fatal(err)
	}
	collect(t, s)
	if got := len(entriesOf(t, s.dir.layers())); got != 0 {
		t.Errorf("got %d layers, want none", got)
	}
}

// To collect takes nothing of the disk: it may be full.
func TestCollectMakesNothing(t *testing.T) {
	s, _, ref, _ := storeWith(t)
	s.Release("ctr")
	if err := s.Remove(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	trash := s.dir.trash()
	s.commit.Lock()
	err := s.discardUnused(dropHidden)
	s.commit.Unlock()
	if err != nil {
		t.Error(err)
	}
	for _, name := range entriesOf(t, trash) {
		if _, err := os.Stat(filepath.Join(trash, name, layerFile)); err != nil {
			t.Errorf("a directory was made for a layer: %v", err)
		}
	}
	collect(t, s)
}

func TestRecords(t *testing.T) {
	in := imageRecord{ID: "sha256:" + hexDigits, Refs: []imageRef{{Name: "a:1", Seq: 3}}}
	text, err := encodeRecord(in)
	if err != nil {
		t.Fatal(err)
	}
	var out imageRecord
	if err := decodeRecord(text, &out); err != nil || !slices.Equal(in.Refs, out.Refs) || out.ID != in.ID {
		t.Errorf("got %+v, %v", out, err)
	}
	for i := range text { // any changed byte is noticed, but for spaces that mean nothing
		changed := bytes.Clone(text)
		changed[i] ^= 1
		if err := decodeRecord(changed, &out); err == nil {
			t.Errorf("a change of byte %d was not noticed: %s", i, changed)
		}
	}
}

func FuzzRecord(f *testing.F) {
	for _, r := range []imageRecord{{}, {ID: "sha256:" + hexDigits, Refs: []imageRef{{Name: "a", Seq: 1}}}} {
		text, err := encodeRecord(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		var r imageRecord
		if decodeRecord(text, &r) != nil || r.check("sha256:"+hexDigits) != nil {
			return
		}
		for _, l := range r.Layers {
			if l.DiffID != "" && filepath.Dir(layout("/s").layer(l.DiffID)) != "/s/layers" {
				t.Errorf("layer %q leads to %s", l.DiffID, layout("/s").layer(l.DiffID))
			}
		}
	})
}

func TestOpenTwice(t *testing.T) {
	s := newStore(t)
	if _, err := Open(Config{Root: string(s.dir)}); err == nil || !strings.Contains(err.Error(), "in use by process") {
		t.Errorf("got %v", err)
	}
	if _, err := Open(Config{Root: "relative"}); err == nil {
		t.Error("a relative root was taken")
	}
	if _, err := Open(Config{Root: t.TempDir(), Pinned: []string{"UPPER"}}); !errors.Is(err, ErrInvalidReference) {
		t.Errorf("got %v", err)
	}
}

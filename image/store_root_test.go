package image

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/crisp-cri/crisp/image/imagetest"
)

// openStore opens a store for a test, with changes to its configuration. It
// closes with the test and sees that nothing is left in tmp.
func openStore(t testing.TB, change ...func(*Config)) *Store {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: layers have owners, devices and trusted attributes")
	}
	config := Config{Root: filepath.Join(t.TempDir(), "store"), Backoff: func(int) time.Duration { return 0 }}
	for _, c := range change {
		c(&config)
	}
	s, err := Open(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = s.Close() // a test may have closed it
		left, err := os.ReadDir(s.dir.tmp())
		if err != nil {
			t.Error(err)
		}
		for _, e := range left {
			t.Errorf("left in tmp: %s", e.Name())
		}
	})
	return s
}

func mustPull(t testing.TB, s *Store, ref string) string {
	t.Helper()
	id, err := s.Pull(context.Background(), ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestPullAndUse(t *testing.T) {
	reg := imagetest.NewRegistry(t)
	base := imagetest.NewLayer(imagetest.Gzip, imagetest.Dir("etc", 0o755), imagetest.File("etc/motd", "hi", 0o644), imagetest.File("etc/gone", "x", 0o600))
	top := imagetest.NewLayer(imagetest.Zstd, imagetest.Dir("etc", 0o755), imagetest.File("etc/.wh.gone", "", 0), imagetest.File("etc/new", "new", 0o644))
	plain := imagetest.NewLayer(imagetest.None, imagetest.File("plain", "plain", 0o644))
	img := imagetest.NewImage(base, top, plain)
	img.Config.Config.User = "1000"
	ref := reg.AddIndex("library/app", "1", &imagetest.Index{Images: []*imagetest.Image{img}})

	s := openStore(t)
	id := mustPull(t, s, ref)
	if id != img.ID() {
		t.Errorf("got id %s, want %s", id, img.ID())
	}
	list := s.List()
	if len(list) != 1 {
		t.Fatalf("got %d images, want 1", len(list))
	}
	got := list[0]
	wantSize := int64(len(img.ConfigBlob()) + len(base.Blob) + len(top.Blob) + len(plain.Blob))
	if got.Size != wantSize || got.Config.Config.User != "1000" {
		t.Errorf("got size %d user %q, want %d and 1000", got.Size, got.Config.Config.User, wantSize)
	}
	if diff := cmp.Diff([]string{ref}, got.RepoTags); diff != "" {
		t.Errorf("tags: %s", diff)
	}
	for _, name := range []string{ref, id, id[7:], id[7:17], got.RepoDigests[0]} {
		if r, err := s.Resolve(name); err != nil || r.ID != id {
			t.Errorf("Resolve(%q): got %v, %v", name, r.ID, err)
		}
	}
	layers, err := s.Acquire(id, "ctr")
	if err != nil {
		t.Fatal(err)
	}
	if len(layers.Lower) != 3 {
		t.Fatalf("got lowers %v", layers.Lower)
	}
	if text, err := os.ReadFile(filepath.Join(layers.Lower[0], "plain")); err != nil || string(text) != "plain" {
		t.Errorf("topmost lower: %q, %v", text, err)
	}
	if text, err := os.ReadFile(filepath.Join(layers.Lower[2], "etc/motd")); err != nil || string(text) != "hi" {
		t.Errorf("lowest lower: %q, %v", text, err)
	}

	// A removed image is gone from sight, its layers stay for the holder, also
	// over a restart.
	if err := s.Remove(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if err := s.CollectGarbage(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(layers.Lower[0]); err != nil {
		t.Errorf("held layer: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, func(c *Config) { c.Root = string(s.dir) })
	if n := len(s.List()); n != 0 {
		t.Errorf("after restart: got %d images, want 0", n)
	}
	again, err := s.Acquire(id, "ctr")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(layers, again); diff != "" {
		t.Errorf("after restart: %s", diff)
	}
	if err := s.CollectGarbage(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(layers.Lower[0]); err != nil {
		t.Errorf("held layer after restart: %v", err)
	}
	s.Release("ctr")
	if err := s.CollectGarbage(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{s.dir.layers(), s.dir.images(), s.dir.blobs(), s.dir.trash(), s.dir.corrupt()} {
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("%s: got %v, %v, want nothing", dir, left, err)
		}
	}
	if _, bytes, inodes, err := s.Usage(); bytes != 0 || inodes != 0 || err != nil {
		t.Errorf("usage of nothing: %d bytes, %d inodes, %v", bytes, inodes, err)
	}
}

package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	gcr "github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"

	it "github.com/crisp-cri/crisp/image/imagetest"
	"github.com/crisp-cri/crisp/image/unpack"
)

// openStore opens a store that a test unpacks into. It sees that nothing is
// left in tmp at the end.
func openStore(t testing.TB, change ...func(*Config)) *Store {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: layers have owners, devices and trusted attributes")
	}
	s := newStore(t, change...)
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

// reopen closes a store and opens its directory again.
func reopen(t testing.TB, s *Store, change ...func(*Config)) *Store {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return openStore(t, append(change, func(c *Config) { c.Root = string(s.dir) })...)
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
	reg := it.NewRegistry(t)
	base := it.NewLayer(it.Gzip, it.Dir("etc", 0o755), it.File("etc/motd", "hi", 0o644), it.File("etc/gone", "x", 0o600))
	top := it.NewLayer(it.Zstd, it.Dir("etc", 0o755), it.File("etc/.wh.gone", "", 0), it.File("etc/new", "new", 0o644))
	plain := it.NewLayer(it.None, it.File("plain", "plain", 0o644))
	img := it.NewImage(base, top, plain)
	img.Config.Config.User = "1000"
	ref := reg.AddIndex("library/app", "1", &it.Index{Images: []*it.Image{img}})

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
	s = reopen(t, s)
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

func collect(t testing.TB, s *Store) {
	t.Helper()
	if err := s.CollectGarbage(context.Background()); err != nil {
		t.Error(err)
	}
}

func entriesOf(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	names := []string{}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// TestIdentity: the same content from two registries is one image; tags and
// digests add up; any tag removes all (CRI 0.36).
func TestIdentity(t *testing.T) {
	first, second := it.NewRegistry(t), it.NewRegistry(t)
	layer := it.NewLayer(it.Gzip, it.File("f", "x", 0o644))
	img := it.NewImage(layer)
	a, b := first.Add("app", "1", img), first.Add("app", "2", img)
	// In the other registry it is wrapped for Docker: other manifest, same image.
	docker := *img
	docker.Docker = true
	c := second.Add("other/app", "1", &docker)

	s := openStore(t)
	id := mustPull(t, s, a)
	for _, ref := range []string{b, c} {
		if got := mustPull(t, s, ref); got != id {
			t.Errorf("%s: got %s, want %s", ref, got, id)
		}
	}
	list := s.List()
	if len(list) != 1 {
		t.Fatalf("got %d images, want 1", len(list))
	}
	want := Image{
		RepoTags:    []string{a, b, c},
		RepoDigests: []string{first.Host + "/app@" + string(img.Digest()), second.Host + "/other/app@" + string(docker.Digest())},
	}
	slices.Sort(want.RepoTags)
	slices.Sort(want.RepoDigests)
	if diff := cmp.Diff(want.RepoTags, list[0].RepoTags); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(want.RepoDigests, list[0].RepoDigests); diff != "" {
		t.Error(diff)
	}
	if got := reopen(t, s); cmp.Diff(list, got.List()) != "" {
		t.Errorf("after restart: %s", cmp.Diff(list, got.List()))
	} else {
		s = got
	}
	for range 2 { // the second time there is nothing
		if err := s.Remove(t.Context(), b); err != nil {
			t.Error(err)
		}
	}
	for _, ref := range []string{a, b, c, id} {
		if _, err := s.Resolve(ref); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s after removal: got %v, want %v", ref, err, ErrNotFound)
		}
	}
	// Pulled again before the garbage is collected: all is as it was.
	if got := mustPull(t, s, a); got != id {
		t.Errorf("got %s, want %s", got, id)
	}
	collect(t, s)
	if _, err := s.Acquire(id, "x"); err != nil {
		t.Error(err)
	}
	if err := s.Remove(t.Context(), "not a reference"); !errors.Is(err, ErrInvalidReference) {
		t.Errorf("got %v, want %v", err, ErrInvalidReference)
	}
}

// TestMovedTag: a tag belongs to what was pulled by it last, also if the crash
// came between the two records.
func TestMovedTag(t *testing.T) {
	reg := it.NewRegistry(t)
	old, fresh := it.NewImage(it.NewLayer(it.Gzip, it.File("f", "old", 0o644))), it.NewImage(it.NewLayer(it.Gzip, it.File("f", "new", 0o644)))
	ref := reg.Add("app", "1", old)
	s := openStore(t, func(c *Config) { c.Pinned = []string{ref} })
	oldID := mustPull(t, s, ref)
	oldRecord, err := os.ReadFile(s.dir.image(oldID))
	if err != nil {
		t.Fatal(err)
	}
	reg.Add("app", "1", fresh)
	newID := mustPull(t, s, ref)
	check := func(s *Store) {
		t.Helper()
		img, err := s.Resolve(ref)
		if err != nil || img.ID != newID {
			t.Errorf("got %s, %v, want %s", img.ID, err, newID)
		}
		was, err := s.Resolve(oldID)
		if err != nil || len(was.RepoTags) != 0 || len(was.RepoDigests) != 1 {
			t.Errorf("the old image is %+v, %v, want no tag and its digest", was, err)
		}
	}
	check(s)
	if img, _ := s.Resolve(ref); !img.Pinned {
		t.Error("the image is not pinned")
	}
	if err := os.WriteFile(s.dir.image(oldID), oldRecord, 0o600); err != nil { // as if the second write had not happened
		t.Fatal(err)
	}
	check(reopen(t, s))
}

// TestManyPulls: callers share what they need alike (C-86).
func TestManyPulls(t *testing.T) {
	reg := it.NewRegistry(t)
	var layers []it.Layer
	for i := range 4 {
		layers = append(layers, it.NewLayer(it.Gzip, it.File(fmt.Sprint(i), strings.Repeat("x", 10_000), 0o644)))
	}
	img := it.NewImage(layers...)
	ref := reg.AddIndex("app", "1", &it.Index{Images: []*it.Image{img}})
	s := openStore(t)

	// Hold the first request until all 50 have joined.
	const callers = 50
	arrived := make(chan struct{})
	reg.Intercept(func(http.ResponseWriter, *http.Request) bool { <-arrived; return false })
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			if id, err := s.Pull(t.Context(), ref, nil); err != nil || id != img.ID() {
				t.Errorf("got %s, %v", id, err)
			}
		})
	}
	for waiting := 0; waiting < callers; runtime.Gosched() {
		s.pulls.mu.Lock()
		for _, fl := range s.pulls.byKey {
			waiting = fl.waiters
		}
		s.pulls.mu.Unlock()
	}
	close(arrived)
	wg.Wait()
	if got, most := len(reg.Requests()), len(layers)+3; got > most {
		t.Errorf("got %d requests, want at most %d", got, most)
	}
	// Again: the registry is asked, no layer is fetched.
	mustPull(t, s, ref)
	if got := len(reg.Requests()); got > 3 {
		t.Errorf("second pull: got %d requests, want at most 3", got)
	}
}

// TestSharedLayer: two images that are pulled together fetch their common layer once.
func TestSharedLayer(t *testing.T) {
	reg := it.NewRegistry(t)
	base := it.NewLayer(it.Gzip, it.File("base", "x", 0o644))
	var refs []string
	for i := range 5 {
		refs = append(refs, reg.Add("app", fmt.Sprint(i), it.NewImage(base, it.NewLayer(it.Gzip, it.File("own", fmt.Sprint(i), 0o644)))))
	}
	s := openStore(t)
	var wg sync.WaitGroup
	for _, ref := range refs {
		wg.Go(func() { mustPull(t, s, ref) })
	}
	wg.Wait()
	fetched := 0
	for _, r := range reg.Requests() {
		if strings.HasSuffix(r.Path, string(base.Digest())) {
			fetched++
		}
	}
	if fetched != 1 {
		t.Errorf("the common layer was fetched %d times", fetched)
	}
	if got := len(entriesOf(t, s.dir.layers())); got != 6 {
		t.Errorf("got %d layers, want 6", got)
	}
	_, bytes, inodes, _ := s.Usage()
	// 6 layers of a root directory and a file of one block each; 5 manifests and 5 configs.
	if inodes != 6*2+10 || bytes < 6*2*4096 {
		t.Errorf("got usage of %d bytes, %d inodes", bytes, inodes)
	}
}

// TestCancelPull: the transfer ends when the last waiter is gone, and leaves nothing.
func TestCancelPull(t *testing.T) {
	reg := it.NewRegistry(t)
	img := it.NewImage(it.NewLayer(it.None, it.File("f", strings.Repeat("x", 100_000), 0o644)))
	ref := reg.Add("app", "1", img)
	half := make(chan struct{})
	ended := make(chan struct{})
	reg.Intercept(func(w http.ResponseWriter, req *http.Request) bool {
		if !strings.HasSuffix(req.URL.Path, string(img.Layers[0].Digest())) {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(img.Layers[0].Blob)))
		_, _ = w.Write(img.Layers[0].Blob[:50_000])
		w.(http.Flusher).Flush()
		close(half)
		<-req.Context().Done() // the client hangs up
		close(ended)
		return true
	})
	s := openStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error)
	go func() { _, err := s.Pull(ctx, ref, nil); result <- err }()
	<-half
	for { // until what was sent has been seen
		p := s.Progress()
		if len(p) == 1 && p[0].Done == 50_000 {
			if p[0].Ref != ref || p[0].Stage != StageLayers || p[0].Total != int64(len(img.Layers[0].Blob)) {
				t.Errorf("got progress %+v", p[0])
			}
			break
		}
		runtime.Gosched()
	}
	// Garbage collection meanwhile takes nothing of the pull's.
	collect(t, s)
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	<-ended
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	wantNothing(t, s)
	if p := s.Progress(); len(p) != 0 {
		t.Errorf("got progress %v", p)
	}
	if _, err := s.Pull(t.Context(), ref, nil); !errors.Is(err, errClosed) {
		t.Errorf("after Close: got %v", err)
	}
}

// TestSEC75Store: what a lying registry sent is not kept, and the truth works afterwards.
func TestSEC75Store(t *testing.T) {
	layer := it.NewLayer(it.Gzip, it.File("f", "x", 0o644))
	evil := it.NewLayer(it.Gzip, it.File("evil", "x", 0o644))
	img := it.NewImage(layer)
	for _, tt := range []struct {
		name string
		lie  func(*it.Registry)
	}{
		{"layer one byte off", func(r *it.Registry) {
			blob := bytes.Clone(layer.Blob)
			blob[len(blob)-10] ^= 1
			r.PutBlobAs("app", layer.Digest(), blob)
		}},
		{"layer short", func(r *it.Registry) { r.PutBlobAs("app", layer.Digest(), layer.Blob[:10]) }},
		{"another layer", func(r *it.Registry) { r.PutBlobAs("app", layer.Digest(), evil.Blob) }},
		{"config one byte off", func(r *it.Registry) {
			blob := bytes.Replace(img.ConfigBlob(), []byte("linux"), []byte("linuy"), 1)
			r.PutBlobAs("app", digest.Digest(img.ID()), blob)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			reg := it.NewRegistry(t)
			ref := reg.Add("app", "1", img)
			tt.lie(reg)
			s := openStore(t)
			if _, err := s.Pull(t.Context(), ref, nil); !errors.Is(err, ErrCorrupt) {
				t.Errorf("got %v, want %v", err, ErrCorrupt)
			}
			wantNothing(t, s)
			reg.Add("app", "1", img)
			mustPull(t, s, ref)
		})
	}
}

// TestSEC71DiffID: a layer that does not inflate to what the config says.
func TestSEC71DiffID(t *testing.T) {
	reg := it.NewRegistry(t)
	secret := it.NewLayer(it.Gzip, it.File("secret", "x", 0o600))
	mine := it.NewLayer(it.Gzip, it.File("mine", "x", 0o600))
	s := openStore(t)
	liar := it.NewImage(mine)
	liar.Config.RootFS.DiffIDs[0] = secret.DiffID
	ref := reg.Add("liar", "1", liar)
	if _, err := s.Pull(t.Context(), ref, nil); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "the image says") {
		t.Errorf("got %v, want %v", err, ErrCorrupt)
	}
	wantNothing(t, s)
	// Nor does it help that the store has a layer with that diffID: who names
	// it has to have it.
	mustPull(t, s, reg.Add("private", "1", it.NewImage(secret)))
	if _, err := s.Pull(t.Context(), ref, nil); !errors.Is(err, ErrCorrupt) {
		t.Errorf("with the layer in the store: got %v, want %v", err, ErrCorrupt)
	}
	// Another compression of the same layer is proven by fetching it, once.
	again := it.LayerOf(it.Zstd, it.Tar(it.File("secret", "x", 0o600)))
	zref := reg.Add("private", "zstd", it.NewImage(again))
	reg.Requests()
	for range 2 {
		mustPull(t, s, zref)
	}
	fetched := 0
	for _, r := range reg.Requests() {
		if strings.HasSuffix(r.Path, string(again.Digest())) {
			fetched++
		}
	}
	if fetched != 1 {
		t.Errorf("the other blob was fetched %d times, want once", fetched)
	}
}

// TestSEC70Store: limits of an image, and nothing left of it.
func TestSEC70Store(t *testing.T) {
	reg := it.NewRegistry(t)
	ref := reg.Add("app", "1", it.NewImage(
		it.NewLayer(it.Gzip, it.File("a", strings.Repeat("x", 3000), 0o644)), it.NewLayer(it.Gzip, it.File("b", strings.Repeat("x", 3000), 0o644), it.File("c", "", 0o644))))
	for _, tt := range []struct {
		name   string
		limits Limits
		text   string
	}{
		{"bytes", Limits{ImageBytes: 5000}, "unpacked size is more than 5000 bytes"},
		{"entries", Limits{ImageEntries: 2}, "the image has more than 2 entries"},
		{"entries of a layer", Limits{Layer: unpack.Limits{Entries: 1}}, "the layer has more than 1 entries"},
		{"layers", Limits{Layers: 1}, "2 layers, more than 1"},
		{"document", Limits{DocumentBytes: 100}, "more than 100 bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := openStore(t, func(c *Config) { c.Limits = tt.limits })
			if _, err := s.Pull(t.Context(), ref, nil); !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want %q", err, tt.text)
			}
			collect(t, s) // the layer that was within the limits
			wantNothing(t, s)
		})
	}
}

// TestSEC78ForeignLayer: the URLs of a foreign layer are not followed.
func TestSEC78ForeignLayer(t *testing.T) {
	reg, elsewhere := it.NewRegistry(t), it.NewRegistry(t)
	layer := it.NewLayer(it.Gzip, it.File("f", "x", 0o644))
	layer.MediaType = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
	layer.URLs = []string{elsewhere.Server.URL + "/v2/app/blobs/" + string(layer.Digest())}
	elsewhere.PutBlob("app", layer.Blob)
	s := openStore(t)
	mustPull(t, s, reg.Add("app", "1", it.NewImage(layer)))
	if n := len(elsewhere.Requests()); n != 0 {
		t.Errorf("the other host got %d requests", n)
	}
}

// TestSEC81Secrets: credentials are in no error and in no file.
func TestSEC81Secrets(t *testing.T) {
	const secret = "hunter2-secret"
	reg := it.NewRegistry(t)
	ref := reg.Add("app", "1", goodImage())
	reg.Intercept(it.RequireBasic("user", secret))
	s := openStore(t)
	if _, err := s.Pull(t.Context(), ref, &Auth{Username: "user", Password: secret}); err != nil {
		t.Fatal(err)
	}
	for _, auth := range []*Auth{nil, {Username: "user", Password: secret + "x"}, {Username: "other", Password: secret}, {RegistryToken: secret}, {IdentityToken: secret}, {Auth: "!" + secret}} {
		_, err := s.Pull(t.Context(), ref, auth)
		if err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("got error %v", err)
		}
		if auth != nil && auth.Auth == "" && !errors.Is(err, ErrUnauthorized) {
			t.Errorf("got error %v, want %v", err, ErrUnauthorized)
		}
	}
	err := filepath.WalkDir(string(s.dir), func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		if bytes.Contains(text, []byte(secret)) {
			t.Errorf("%s holds the secret", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// TestSEC82Annotations: what an image says about itself names nothing.
func TestSEC82Annotations(t *testing.T) {
	reg := it.NewRegistry(t)
	img := goodImage()
	img.Annotations = map[string]string{imagespec.AnnotationRefName: "docker.io/library/busybox:latest", "io.containerd.image.name": "docker.io/library/busybox:latest"}
	s := openStore(t)
	ref := reg.Add("app", "1", img)
	mustPull(t, s, ref)
	for _, s := range []*Store{s, reopen(t, s)} {
		if _, err := s.Resolve("busybox"); !errors.Is(err, ErrNotFound) {
			t.Errorf("got %v, want %v", err, ErrNotFound)
		}
		if diff := cmp.Diff([]string{ref}, s.List()[0].RepoTags); diff != "" {
			t.Error(diff)
		}
	}
}

// TestSEC66Access: nobody but root gets at the images' files, whatever the umask
// and the directories were before.
func TestSEC66Access(t *testing.T) {
	reg := it.NewRegistry(t)
	ref := reg.Add("app", "1", it.NewImage(it.NewLayer(it.Gzip, it.File("su", "#!/bin/sh\n", 0o4755))))
	top := t.TempDir()
	for dir := top; dir != "/"; dir = filepath.Dir(dir) { // so that only the store can say no
		if fi, err := os.Stat(dir); err == nil && fi.Mode().Perm()&1 == 0 {
			if !strings.Contains(dir, t.Name()) {
				t.Skipf("needs a temporary directory that others can enter: %s is %s", dir, fi.Mode())
			}
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	root := filepath.Join(top, "store")
	defer syscall.Umask(syscall.Umask(0))
	for _, dir := range []string{"", "layers", "images", "tmp", "oci/blobs/sha256"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o777); err != nil {
			t.Fatal(err)
		}
	}
	s := openStore(t, func(c *Config) { c.Root = root })
	id := mustPull(t, s, ref)
	layers, err := s.Acquire(id, "c")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(layers.Lower[0], "su"), layers.Lower[0], s.dir.layers(), s.dir.image(id), s.dir.blob(digest.Digest(id)), s.dir.lock()} {
		cmd := exec.Command("/bin/cat", path)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), "Permission denied") {
			t.Errorf("nobody reads %s: %q, %v", path, out, err)
		}
	}
	err = filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 && !strings.Contains(path, "/fs") {
			t.Errorf("%s is %s", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// TestSEC62Store: pulls side by side that share a base, above which a directory
// is a link and a link a directory.
func TestSEC62Store(t *testing.T) {
	reg := it.NewRegistry(t)
	base := it.NewLayer(it.Gzip, it.Dir("etc", 0o755), it.File("etc/passwd", "base", 0o644), it.Symlink("/etc", "lnk"), it.Dir("dir", 0o755))
	var refs []string
	for i := range 8 {
		top := it.NewLayer(it.Gzip, it.Dir("lnk", 0o755), it.File("lnk/passwd", fmt.Sprint(i), 0o644), it.Symlink("../../../etc", "dir"))
		over := it.NewLayer(it.Gzip, it.File("dir/passwd", fmt.Sprint(i), 0o644), it.Symlink("/etc", "lnk"))
		refs = append(refs, reg.Add("app", fmt.Sprint(i), it.NewImage(base, top, over)))
	}
	before, err := os.Stat("/etc/passwd")
	if err != nil {
		t.Fatal(err)
	}
	s := openStore(t)
	for range 25 {
		var wg sync.WaitGroup
		for _, ref := range refs {
			wg.Go(func() { mustPull(t, s, ref) })
		}
		wg.Wait()
		for _, ref := range refs {
			wg.Go(func() {
				if err := s.Remove(t.Context(), ref); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Go(func() { collect(t, s) })
		wg.Wait()
	}
	collect(t, s)
	wantNothing(t, s)
	after, err := os.Stat("/etc/passwd")
	if err != nil || !os.SameFile(before, after) || before.ModTime() != after.ModTime() || before.Size() != after.Size() {
		t.Errorf("/etc/passwd changed: %v, %v", after, err)
	}
}

// TestLowers: layers that occur twice, and roots that hide what is below.
func TestLowers(t *testing.T) {
	reg := it.NewRegistry(t)
	a, b := it.NewLayer(it.Gzip, it.File("a", "", 0o644)), it.NewLayer(it.Gzip, it.File("b", "", 0o644))
	opaque := it.NewLayer(it.Gzip, it.File(".wh..wh..opq", "", 0), it.File("o", "", 0o644))
	s := openStore(t)
	for i, tt := range []struct{ layers, want []it.Layer }{
		{[]it.Layer{a, b, a}, []it.Layer{a, b}},
		{[]it.Layer{a, opaque, b}, []it.Layer{b, opaque}},
		{[]it.Layer{a, opaque}, []it.Layer{opaque}},
	} {
		id := mustPull(t, s, reg.Add("app", fmt.Sprint(i), it.NewImage(tt.layers...)))
		got, err := s.Acquire(id, "c")
		if err != nil {
			t.Fatal(err)
		}
		var want []string
		for _, l := range tt.want {
			want = append(want, filepath.Join(s.dir.layer(l.DiffID), "fs"))
		}
		if diff := cmp.Diff(want, got.Lower); diff != "" {
			t.Errorf("%d: %s", i, diff)
		}
	}
}

// TestDefaultMirror: what critest needs: any registry is a local one, names stay.
func TestDefaultMirror(t *testing.T) {
	reg := it.NewRegistry(t)
	img := goodImage()
	reg.Add("e2e-test-images/busybox", "1.29-2", img)
	reg.Add("library/busybox", "latest", img)
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "_default"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "_default/hosts.toml"), []byte("[host.\"http://"+reg.Host+"\"]\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, func(c *Config) { c.RegistryConfigDir = dir })
	for _, ref := range []string{"registry.k8s.io/e2e-test-images/busybox:1.29-2", "busybox"} {
		mustPull(t, s, ref)
	}
	want := []string{"docker.io/library/busybox:latest", "registry.k8s.io/e2e-test-images/busybox:1.29-2"}
	if diff := cmp.Diff(want, s.List()[0].RepoTags); diff != "" {
		t.Error(diff)
	}
}

// TestKeepCompressed: the layout is one that another implementation accepts as whole.
func TestKeepCompressed(t *testing.T) {
	reg := it.NewRegistry(t)
	img := it.NewImage(it.NewLayer(it.Gzip, it.File("f", "x", 0o644)), it.NewLayer(it.Gzip, it.File("g", "x", 0o644)))
	ref := reg.Add("app", "1", img)
	s := openStore(t, func(c *Config) { c.KeepCompressed = true })
	mustPull(t, s, ref)
	index, err := gcr.ImageIndexFromPath(s.dir.oci())
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil {
		t.Error(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil || len(manifest.Manifests) != 2 { // by tag and by digest
		t.Errorf("got %+v, %v, want two entries", manifest, err)
	}
	if err := s.Remove(t.Context(), ref); err != nil {
		t.Error(err)
	}
	collect(t, s)
	wantNothing(t, s)
}

// TestOtherRegistry: an image pushed to go-containerregistry's registry comes back.
func TestOtherRegistry(t *testing.T) {
	server := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	defer server.CloseClientConnections()
	img := goodImage()
	if err := it.PushIndex(t.Context(), server.URL, "team/app", "1", &it.Index{Images: []*it.Image{img}}); err != nil {
		t.Fatal(err)
	}
	http.DefaultClient.CloseIdleConnections()
	s := openStore(t)
	if id := mustPull(t, s, strings.TrimPrefix(server.URL, "http://")+"/team/app:1"); id != img.ID() {
		t.Errorf("got %s, want %s", id, img.ID())
	}
}

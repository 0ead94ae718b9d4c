package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"

	it "github.com/crisp-cri/crisp/image/imagetest"
	"github.com/crisp-cri/crisp/image/registry"
)

// newStore opens a store that no test unpacks into.
func newStore(t testing.TB, change ...func(*Config)) *Store {
	t.Helper()
	config := Config{Root: filepath.Join(t.TempDir(), "store"), Backoff: func(int) time.Duration { return 0 }}
	for _, c := range change {
		c(&config)
	}
	s, err := Open(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() }) // a test may have closed it
	return s
}

// wantNothing fails the test if the store holds anything.
func wantNothing(t testing.TB, s *Store) {
	t.Helper()
	for _, dir := range []string{s.dir.images(), s.dir.layers(), s.dir.blobs(), s.dir.tmp(), s.dir.corrupt()} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Error(err)
		}
		for _, e := range entries {
			t.Errorf("left: %s", filepath.Join(dir, e.Name()))
		}
	}
	if n := len(s.List()); n != 0 {
		t.Errorf("got %d images, want none", n)
	}
}

func goodImage() *it.Image {
	return it.NewImage(it.NewLayer(it.Gzip, it.File("f", "x", 0o644)))
}

// TestDescribe: documents that are refused before anything is unpacked.
func TestDescribe(t *testing.T) {
	good := goodImage()
	manifest := func(change func(*imagespec.Manifest)) []byte {
		m := good.Manifest()
		change(&m)
		return mustJSON(m)
	}
	config := func(text string) func(*it.Registry) string {
		return func(r *it.Registry) string {
			img := goodImage()
			img.ConfigBytes = []byte(text)
			return r.Add("app", "1", img)
		}
	}
	put := func(mediaType string, data []byte) func(*it.Registry) string {
		return func(r *it.Registry) string {
			r.Add("app", "", good)
			return r.PutManifest("app", "1", mediaType, data)
		}
	}
	child := imagespec.Descriptor{MediaType: good.MediaType(), Digest: good.Digest(), Size: int64(len(good.ManifestBlob())), Platform: &good.Config.Platform}
	index := func(change func(*imagespec.Descriptor)) []byte {
		c := child
		change(&c)
		return mustJSON(map[string]any{"schemaVersion": 2, "mediaType": imagespec.MediaTypeImageIndex, "manifests": []imagespec.Descriptor{c}})
	}
	goodDiffID := string(good.Layers[0].DiffID)
	rootfs := func(ids ...string) string {
		return string(mustJSON(map[string]any{"os": "linux", "architecture": good.Config.Architecture, "rootfs": map[string]any{"type": "layers", "diff_ids": ids}}))
	}

	for _, tt := range []struct {
		name string
		put  func(*it.Registry) string
		want error
		text string
	}{
		// SEC-71
		{"SEC-71 too few diff ids", config(rootfs()), ErrCorrupt, "0 diff ids"},
		{"SEC-71 too many diff ids", config(rootfs(goodDiffID, goodDiffID)), ErrCorrupt, "2 diff ids"},
		// SEC-76
		{"SEC-76 diff id as a path", config(rootfs("sha256:../../../../etc/passwd")), ErrCorrupt, "diff id 0"},
		{"SEC-76 layer digest as a path", put(good.MediaType(), manifest(func(m *imagespec.Manifest) { m.Layers[0].Digest = "sha256:../../x" })), ErrCorrupt, "layer 0"},
		{"SEC-76 config digest md5", put(good.MediaType(), manifest(func(m *imagespec.Manifest) { m.Config.Digest = "md5:d41d8cd98f00b204e9800998ecf8427e" })), ErrCorrupt, "config"},
		{"SEC-76 child digest empty", put(imagespec.MediaTypeImageIndex, index(func(d *imagespec.Descriptor) { d.Digest = "" })), ErrCorrupt, "manifest"},
		// SEC-77
		{"SEC-77 manifest with manifests", put(good.MediaType(), []byte(strings.Replace(string(good.ManifestBlob()), "{", `{"manifests":[],`, 1))), ErrCorrupt, "manifest and an index"},
		{"SEC-77 index with layers", put(imagespec.MediaTypeImageIndex, []byte(strings.Replace(string(index(func(*imagespec.Descriptor) {})), "{", `{"layers":[],`, 1))), ErrCorrupt, "manifest and an index"},
		{"SEC-77 media type and header differ", put(imagespec.MediaTypeImageIndex, good.ManifestBlob()), ErrCorrupt, "was sent as"},
		{"SEC-77 index says another type", put(imagespec.MediaTypeImageIndex, index(func(d *imagespec.Descriptor) { d.MediaType = it.DockerManifest })), ErrCorrupt, "its index says"},
		{"SEC-77 index says another size", put(imagespec.MediaTypeImageIndex, index(func(d *imagespec.Descriptor) { d.Size++ })), ErrCorrupt, "its index says"},
		// SEC-79
		{"SEC-79 manifest of 5 MiB", put(good.MediaType(), []byte(`{"x":"`+strings.Repeat("x", 5<<20)+`"}`)), ErrLimit, "manifest size is more than 4194304 bytes"},
		{"SEC-79 config of 5 MiB", put(good.MediaType(), manifest(func(m *imagespec.Manifest) { m.Config.Size = 5 << 20 })), ErrLimit, "config"},
		{"SEC-79 many layers", put(good.MediaType(), manifest(func(m *imagespec.Manifest) {
			for len(m.Layers) < 1000 {
				m.Layers = append(m.Layers, m.Layers[0])
			}
		})), ErrLimit, "1000 layers, more than 250"},
		{"SEC-79 many descriptors", put(imagespec.MediaTypeImageIndex, []byte(`{"schemaVersion":2,"manifests":[`+strings.Repeat("{},", 1_000_000)+`{}]}`)), ErrCorrupt, ""},
		{"SEC-79 JSON depth 10^5", put(good.MediaType(), []byte(strings.Repeat(`{"config":`, 100_000))), ErrCorrupt, ""},
		{"SEC-79 layer of 2^62 bytes", put(good.MediaType(), manifest(func(m *imagespec.Manifest) { m.Layers[0].Size = 1 << 62 })), ErrLimit, "layer 0"},
		{"SEC-79 indexes nested 100 deep", nestedIndexes(child, 100), ErrLimit, "nested more than"},
		// SEC-80
		{"SEC-80 null", put(good.MediaType(), []byte("null")), ErrUnsupported, ""},
		{"SEC-80 empty object", put(good.MediaType(), []byte("{}")), ErrUnsupported, ""},
		{"SEC-80 empty", put(good.MediaType(), nil), ErrCorrupt, ""},
		{"SEC-80 null config", put(good.MediaType(), []byte(`{"schemaVersion":2,"config":null,"layers":[]}`)), ErrCorrupt, "no config"},
		{"SEC-80 no layers", put(good.MediaType(), manifest(func(m *imagespec.Manifest) { m.Layers = nil })), ErrUnsupported, "no layers"},
		{"SEC-80 wrong types", put(good.MediaType(), []byte(`{"schemaVersion":"2","config":[],"layers":{}}`)), ErrCorrupt, ""},
		{"SEC-80 negative size", put(good.MediaType(), manifest(func(m *imagespec.Manifest) { m.Layers[0].Size = -1 })), ErrCorrupt, "-1 bytes"},
		{"SEC-80 config null", config("null"), ErrCorrupt, "diff ids"},
		{"SEC-80 config a list", config("[]"), ErrCorrupt, ""},
		{"SEC-80 config of wrong types", config(`{"rootfs":{"type":"layers","diff_ids":[1]}}`), ErrCorrupt, ""},
		// Others
		{"HTML", put("text/html", []byte("<html>")), ErrUnsupported, "text/html"},
		{"schema 1", put("application/vnd.docker.distribution.manifest.v1+prettyjws", []byte("{}")), ErrUnsupported, "schema 1"},
		{"artifact", put(good.MediaType(), manifest(func(m *imagespec.Manifest) { m.Config.MediaType = "application/vnd.oci.empty.v1+json" })), ErrUnsupported, "no container image"},
		{"encrypted layer", put(good.MediaType(), manifest(func(m *imagespec.Manifest) { m.Layers[0].MediaType += "+encrypted" })), ErrUnsupported, "encrypted"},
		{"other platform only", put(imagespec.MediaTypeImageIndex, index(func(d *imagespec.Descriptor) { d.Platform = &imagespec.Platform{OS: "plan9", Architecture: "mips"} })), ErrUnsupported, "nothing for linux"},
		{"config for another platform", config(strings.Replace(rootfs(goodDiffID), "linux", "windows", 1)), ErrUnsupported, "windows"},
		{"missing child", put(imagespec.MediaTypeImageIndex, index(func(d *imagespec.Descriptor) { d.Digest = digest.FromString("missing") })), ErrNotFound, ""},
		{"missing config", put(good.MediaType(), manifest(func(m *imagespec.Manifest) { m.Config.Digest = digest.FromString("missing") })), ErrNotFound, ""},
		{"missing tag", func(r *it.Registry) string { return r.Host + "/app:none" }, ErrNotFound, ""},
		{"invalid reference", func(*it.Registry) string { return "UPPER" }, ErrInvalidReference, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			reg := it.NewRegistry(t)
			s := newStore(t)
			_, err := s.Pull(t.Context(), tt.put(reg), nil)
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want %v with %q", err, tt.want, tt.text)
			}
			if err != nil && len(err.Error()) > 1500 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
			wantNothing(t, s)
		})
	}
}

func nestedIndexes(child imagespec.Descriptor, depth int) func(*it.Registry) string {
	return func(r *it.Registry) string {
		var ref string
		for range depth {
			data := mustJSON(map[string]any{"schemaVersion": 2, "mediaType": imagespec.MediaTypeImageIndex, "manifests": []imagespec.Descriptor{child}})
			ref = r.PutManifest("app", "1", imagespec.MediaTypeImageIndex, data)
			child = imagespec.Descriptor{MediaType: imagespec.MediaTypeImageIndex, Digest: digest.FromBytes(data), Size: int64(len(data))}
		}
		return ref
	}
}

// TestSEC80Mutations: 2000 random changes of a manifest and a config. Most are
// refused; none crashes. (The layer is refused by its size before it is fetched.)
func TestSEC80Mutations(t *testing.T) {
	s := newStore(t)
	good := goodImage()
	manifest, config := good.ManifestBlob(), good.ConfigBlob()
	rng := rand.New(rand.NewPCG(7, 7))
	mutate := func(text []byte) []byte {
		text = append([]byte{}, text...)
		for range 1 + rng.IntN(4) {
			at := rng.IntN(len(text))
			switch rng.IntN(4) {
			case 0:
				text[at] = byte(rng.IntN(256))
			case 1:
				text = append(text[:at], text[at+1:]...)
			case 2:
				text = append(text[:at:at], append([]byte(`{}[]",:0null`)[rng.IntN(12):], text[at:]...)...)
			case 3:
				to := rng.IntN(len(text))
				text[at], text[to] = text[to], text[at]
			}
		}
		return text
	}
	accepted := 0
	for range 2000 {
		doc := registryDocument(good.MediaType(), mutate(manifest))
		parsed, isIndex, err := parseDocument(doc)
		if err == nil && !isIndex && s.checkLayers(parsed.Layers) == nil {
			_, _, err = s.parseConfig(mutate(config), parsed.Layers)
		}
		if err == nil {
			accepted++
		}
	}
	if accepted == 2000 {
		t.Error("all mutations were accepted")
	}
}

func mustJSON(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprint(err))
	}
	return data
}

func registryDocument(mediaType string, body []byte) registry.Document {
	return registry.Document{MediaType: mediaType, Digest: digest.FromBytes(body), Body: body}
}

package images

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

func TestPushAndPull(t *testing.T) {
	reg, err := Serve("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := reg.Close(); err != nil {
			t.Error(err)
		}
	}()
	for _, c := range []struct {
		name  string
		image Image
	}{
		{"docker behind an index", Image{}},
		{"oci behind an index", Image{OCI: true}},
		{"docker, bare", Image{Bare: true}},
		{"uncompressed", Image{OCI: true, Uncompressed: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			im := c.image
			im.Names = []string{"a/b:1", "a/b:2"}
			im.Config = v1.Config{Cmd: []string{"/x"}}
			im.Layers = [][]File{{{Name: "d", Dir: true}, {Name: "d/x", Text: "hello", Mode: 0o4755}}, {{Name: "d/x", Whiteout: true}}}
			if err := im.Push(reg.Host); err != nil {
				t.Fatal(err)
			}
			var digests []string
			for _, n := range im.Names {
				ref, err := name.ParseReference(reg.Host + "/" + n)
				if err != nil {
					t.Fatal(err)
				}
				img, err := remote.Image(ref, remote.WithPlatform(platform))
				if err != nil {
					t.Fatal(err)
				}
				d, err := img.Digest()
				if err != nil {
					t.Fatal(err)
				}
				digests = append(digests, d.String())
				layers, err := img.Layers()
				if err != nil || len(layers) != 2 {
					t.Fatalf("got %d layers, %v; want 2", len(layers), err)
				}
				if got, want := contents(t, layers[0]), "d/ 755\nd/x 4755\n"; got != want {
					t.Errorf("first layer: got %q, want %q", got, want)
				}
				if got, want := contents(t, layers[1]), "d/.wh.x 644\n"; got != want {
					t.Errorf("second layer: got %q, want %q", got, want)
				}
			}
			if digests[0] != digests[1] {
				t.Errorf("two names, two images: %v", digests)
			}
		})
	}
}

func contents(t *testing.T, l v1.Layer) string {
	t.Helper()
	r, err := l.Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var b bytes.Buffer
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return b.String()
		}
		if err != nil {
			t.Fatal(err)
		}
		b.WriteString(h.Name + " " + octal(h.Mode) + "\n")
	}
}

func octal(n int64) string {
	if n < 8 {
		return string(rune('0' + n))
	}
	return octal(n/8) + octal(n%8)
}

func TestBuildIsReproducible(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "payload")
	if err := os.WriteFile(binary, []byte("x"), 0o755); err != nil {
		t.Fatal(err)
	}
	var digests []string
	for range 2 {
		img, err := Payload(binary).Build()
		if err != nil {
			t.Fatal(err)
		}
		d, err := img.Digest()
		if err != nil {
			t.Fatal(err)
		}
		digests = append(digests, d.String())
	}
	if digests[0] != digests[1] {
		t.Errorf("got %v, want the same digest twice", digests)
	}
}

func TestBusybox(t *testing.T) {
	im, err := Busybox()
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]File{}
	for _, f := range im.Layers[0] {
		names[f.Name] = f
	}
	for _, want := range []string{"bin/sh", "bin/ls", "bin/id", "bin/top"} {
		if names[want].HardLink != "bin/busybox" {
			t.Errorf("%s: got %+v, want a hard link to bin/busybox", want, names[want])
		}
	}
	var libc bool
	for n := range names {
		libc = libc || strings.HasPrefix(n, "lib/libc.so")
	}
	if !libc {
		t.Error("no libc: is this busybox the dynamic one (package busybox, not busybox-static)?")
	}
	if _, err := im.Build(); err != nil {
		t.Error(err)
	}
}

// Package images makes the container images of the demo and the tests, and
// serves them from a registry on loopback: nothing is fetched from anywhere.
//
// An [Image] is a value: layers as lists of [File], a config, and the form in
// which a registry shows it (Docker's or OCI's media types, behind an index or
// bare). [Image.Build] makes the blobs, the same bytes every time, so digests are
// stable; [Registry] serves them. The images there are: [Payload], [Busybox], and
// [Critest], all that critest pulls.
package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// File is one entry of a layer.
type File struct {
	Name     string // "bin/ls", without a leading slash
	Mode     int64  // permission bits with set-id and sticky; 0: 0755 for directories and FromHost, 0644 otherwise
	UID, GID int
	// Exactly one of these says what it is; none is an empty file.
	Dir      bool
	Text     string
	FromHost string // path of a file to copy
	HardLink string // name of an earlier entry
	Symlink  string // target
	Whiteout bool   // Name is removed from the layers below
	// PAX records, such as "SCHILY.xattr.user.x".
	PAX map[string]string
}

// Image describes one image.
type Image struct {
	// Names are repository and tag below the registry: "e2e/busybox:1".
	Names  []string
	Layers [][]File
	Config v1.Config // Entrypoint, Cmd, Env, User, WorkingDir, …

	OCI          bool // OCI's media types instead of Docker's
	Bare         bool // the tag names the manifest, not an index of one
	Uncompressed bool // layers are plain tar
}

var epoch = time.Unix(1_700_000_000, 0).UTC() // of every file and image: builds are reproducible

// tarOf writes files as a tar archive.
func tarOf(files []File) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := tar.Header{Name: f.Name, Mode: f.Mode, Uid: f.UID, Gid: f.GID, ModTime: epoch, PAXRecords: f.PAX, Typeflag: tar.TypeReg}
		mode := int64(0o644)
		data := []byte(f.Text)
		switch {
		case f.Dir:
			h.Typeflag, h.Name, mode = tar.TypeDir, f.Name+"/", 0o755
		case f.FromHost != "":
			var err error
			if data, err = os.ReadFile(f.FromHost); err != nil {
				return nil, err
			}
			mode = 0o755
		case f.HardLink != "":
			h.Typeflag, h.Linkname = tar.TypeLink, f.HardLink
		case f.Symlink != "":
			h.Typeflag, h.Linkname, mode = tar.TypeSymlink, f.Symlink, 0o777
		case f.Whiteout:
			h.Name = whiteout(f.Name)
		}
		if h.Mode == 0 {
			h.Mode = mode
		}
		h.Size = int64(len(data))
		if err := w.WriteHeader(&h); err != nil {
			return nil, fmt.Errorf("layer entry %s: %w", f.Name, err)
		}
		if _, err := w.Write(data); err != nil {
			return nil, fmt.Errorf("layer entry %s: %w", f.Name, err)
		}
	}
	err := w.Close()
	return b.Bytes(), err
}

// whiteout is the name that removes name (OCI image-spec layer.md "Whiteouts").
func whiteout(name string) string {
	for i := len(name) - 1; i >= 0; i-- {
		if name[i] == '/' {
			return name[:i+1] + ".wh." + name[i+1:]
		}
	}
	return ".wh." + name
}

func (im *Image) layer(files []File) (v1.Layer, error) {
	data, err := tarOf(files)
	if err != nil {
		return nil, err
	}
	if im.Uncompressed {
		mediaType := types.DockerUncompressedLayer
		if im.OCI {
			mediaType = types.OCIUncompressedLayer
		}
		return static.NewLayer(data, mediaType), nil
	}
	mediaType := types.DockerLayer
	if im.OCI {
		mediaType = types.OCILayer
	}
	return compressed.layer(data, mediaType)
}

// compressed keeps the layers that were made, by media type and content: most
// of critest's images share one.
var compressed = layerCache{made: map[string]v1.Layer{}}

type layerCache struct {
	mu   sync.Mutex
	made map[string]v1.Layer
}

func (c *layerCache) layer(data []byte, mediaType types.MediaType) (v1.Layer, error) {
	key := fmt.Sprintf("%s %x", mediaType, sha256.Sum256(data))
	c.mu.Lock()
	defer c.mu.Unlock()
	if l := c.made[key]; l != nil {
		return l, nil
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil },
		tarball.WithMediaType(mediaType), tarball.WithCompressionLevel(gzip.BestSpeed), tarball.WithCompressedCaching)
	if err == nil {
		c.made[key] = l
	}
	return l, err
}

// Build makes the image's blobs and manifest.
func (im *Image) Build() (v1.Image, error) {
	img := mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.DockerConfigJSON), types.DockerManifestSchema2)
	if im.OCI {
		img = mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1)
	}
	for _, files := range im.Layers {
		l, err := im.layer(files)
		if err != nil {
			return nil, fmt.Errorf("cannot build image %v: %w", im.Names, err)
		}
		if img, err = mutate.AppendLayers(img, l); err != nil {
			return nil, fmt.Errorf("cannot build image %v: %w", im.Names, err)
		}
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("cannot build image %v: %w", im.Names, err)
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = platform.OS, platform.Architecture
	file.Created = v1.Time{Time: epoch}
	file.Config = im.Config
	if img, err = mutate.ConfigFile(img, file); err != nil {
		return nil, fmt.Errorf("cannot build image %v: %w", im.Names, err)
	}
	return img, nil
}

// Push builds the image and puts it into the registry at host ("127.0.0.1:5000")
// under each of its names.
func (im *Image) Push(host string) error {
	img, err := im.Build()
	if err != nil {
		return err
	}
	for _, n := range im.Names {
		ref, err := name.ParseReference(host + "/" + n)
		if err == nil {
			err = im.write(ref, img)
		}
		if err != nil {
			return fmt.Errorf("cannot push image %s: %w", n, err)
		}
	}
	return nil
}

func (im *Image) write(ref name.Reference, img v1.Image) error {
	if im.Bare {
		return remote.Write(ref, img)
	}
	return remote.WriteIndex(ref, im.index(img))
}

// index is the index of one image that a tag names.
func (im *Image) index(img v1.Image) v1.ImageIndex {
	index := mutate.IndexMediaType(empty.Index, types.DockerManifestList)
	if im.OCI {
		index = mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	}
	return mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &platform}})
}

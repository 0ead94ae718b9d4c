// Package imagetest forges images and serves them, for tests: layers from lists
// of archive entries (also ones no archiver would write), configurations,
// manifests and indexes, and a registry that can be made to lie.
//
//	layer := imagetest.NewLayer(imagetest.Gzip, imagetest.Dir("etc", 0o755), imagetest.File("etc/motd", "hi", 0o644))
//	img := imagetest.NewImage(layer)
//	reg := imagetest.NewRegistry(t)
//	reg.Add("library/app", "1", img)          // pull reg.Host + "/library/app:1"
//	imagetest.Push(ctx, "http://127.0.0.1:5000", "library/app", "1", img) // to another registry
package imagetest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Docker's media types; OCI's are in image-spec.
const (
	DockerManifest     = "application/vnd.docker.distribution.manifest.v2+json"
	DockerManifestList = "application/vnd.docker.distribution.manifest.list.v2+json"
	DockerConfig       = "application/vnd.docker.container.image.v1+json"
	DockerLayer        = "application/vnd.docker.image.rootfs.diff.tar.gzip"
)

// Entry is one entry of a layer. If Raw is set it is written as it is, in place
// of a header and body.
type Entry struct {
	tar.Header
	Body []byte
	Raw  []byte
}

// With returns a changed copy.
func (e Entry) With(change func(*Entry)) Entry {
	change(&e)
	return e
}

// Owned returns a copy that belongs to uid and gid.
func (e Entry) Owned(uid, gid int) Entry { e.Uid, e.Gid = uid, gid; return e }

// Xattr returns a copy with an extended attribute.
func (e Entry) Xattr(key, value string) Entry { return e.PAX("SCHILY.xattr."+key, value) }

// PAX returns a copy with a PAX record.
func (e Entry) PAX(key, value string) Entry {
	records := map[string]string{key: value}
	for k, v := range e.PAXRecords {
		records[k] = v
	}
	e.PAXRecords, e.Format = records, tar.FormatPAX
	return e
}

// Time is what all entries have unless they say otherwise.
var Time = time.Unix(1_700_000_000, 0)

func entry(kind byte, name string, mode int64) Entry {
	return Entry{Header: tar.Header{Typeflag: kind, Name: name, Mode: mode, ModTime: Time}}
}

// Dir is a directory.
func Dir(name string, mode int64) Entry { return entry(tar.TypeDir, name, mode) }

// File is a regular file.
func File(name, body string, mode int64) Entry {
	e := entry(tar.TypeReg, name, mode)
	e.Size, e.Body = int64(len(body)), []byte(body)
	return e
}

// Symlink is a symbolic link called name.
func Symlink(target, name string) Entry {
	e := entry(tar.TypeSymlink, name, 0o777)
	e.Linkname = target
	return e
}

// Link is a hard link called name.
func Link(target, name string) Entry {
	e := entry(tar.TypeLink, name, 0o644)
	e.Linkname = target
	return e
}

// Fifo is a named pipe.
func Fifo(name string, mode int64) Entry { return entry(tar.TypeFifo, name, mode) }

// Char is a character device.
func Char(name string, mode, major, minor int64) Entry {
	e := entry(tar.TypeChar, name, mode)
	e.Devmajor, e.Devminor = major, minor
	return e
}

// Block is a block device.
func Block(name string, mode, major, minor int64) Entry {
	e := Char(name, mode, major, minor)
	e.Typeflag = tar.TypeBlock
	return e
}

// Raw is a piece of the archive as it is.
func Raw(data []byte) Entry { return Entry{Raw: data} }

// Tar writes the archive. It panics where archive/tar refuses an entry: use Raw.
func Tar(entries ...Entry) []byte {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range entries {
		if e.Raw != nil {
			must(w.Flush())
			out.Write(e.Raw)
			continue
		}
		must(w.WriteHeader(&e.Header))
		_, err := w.Write(e.Body)
		must(err)
	}
	must(w.Close())
	return out.Bytes()
}

// Compression of a layer.
type Compression int

// What layers come as.
const (
	None Compression = iota
	Gzip
	Zstd
)

// Compress compresses data.
func Compress(how Compression, data []byte) []byte {
	var out bytes.Buffer
	var w io.WriteCloser
	switch how {
	case Gzip:
		w = gzip.NewWriter(&out)
	case Zstd:
		enc, err := zstd.NewWriter(&out, zstd.WithEncoderConcurrency(1))
		must(err)
		w = enc
	default:
		return data
	}
	_, err := w.Write(data)
	must(err)
	must(w.Close())
	return out.Bytes()
}

// Layer is a layer as stored in a registry.
type Layer struct {
	MediaType string
	Blob      []byte
	DiffID    digest.Digest
	// URLs go into the descriptor (foreign layers).
	URLs []string
}

// Digest of the blob.
func (l Layer) Digest() digest.Digest { return digest.FromBytes(l.Blob) }

// NewLayer makes a layer of archive entries.
func NewLayer(how Compression, entries ...Entry) Layer { return LayerOf(how, Tar(entries...)) }

// LayerOf makes a layer of archive bytes, good or not.
func LayerOf(how Compression, archive []byte) Layer {
	mediaType := map[Compression]string{
		None: imagespec.MediaTypeImageLayer, Gzip: imagespec.MediaTypeImageLayerGzip, Zstd: imagespec.MediaTypeImageLayerZstd,
	}[how]
	return Layer{MediaType: mediaType, Blob: Compress(how, archive), DiffID: digest.FromBytes(archive)}
}

// Image is one platform's image. Change its fields before it is added anywhere;
// ConfigBytes and ManifestBytes, if set, are used in place of what follows from
// the other fields.
type Image struct {
	Config      imagespec.Image
	Layers      []Layer
	Docker      bool // Docker media types in place of OCI's
	Annotations map[string]string

	ConfigBytes, ManifestBytes []byte
}

// NewImage returns an OCI image of this machine's platform.
func NewImage(layers ...Layer) *Image {
	img := &Image{Layers: layers}
	img.Config.OS, img.Config.Architecture = "linux", runtime.GOARCH
	img.Config.RootFS.Type = "layers"
	for _, l := range layers {
		img.Config.RootFS.DiffIDs = append(img.Config.RootFS.DiffIDs, l.DiffID)
	}
	return img
}

// ConfigBlob returns the configuration's bytes.
func (i *Image) ConfigBlob() []byte {
	if i.ConfigBytes != nil {
		return i.ConfigBytes
	}
	return marshal(i.Config)
}

// ID is the image id: the digest of the configuration.
func (i *Image) ID() string { return string(digest.FromBytes(i.ConfigBlob())) }

// MediaType of the manifest.
func (i *Image) MediaType() string {
	if i.Docker {
		return DockerManifest
	}
	return imagespec.MediaTypeImageManifest
}

// Manifest returns the manifest as a value, to be changed and marshalled into ManifestBytes.
func (i *Image) Manifest() imagespec.Manifest {
	m := imagespec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: i.MediaType(), Annotations: i.Annotations}
	config := i.ConfigBlob()
	m.Config = imagespec.Descriptor{MediaType: imagespec.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))}
	if i.Docker {
		m.Config.MediaType = DockerConfig
	}
	for _, l := range i.Layers {
		d := imagespec.Descriptor{MediaType: l.MediaType, Digest: l.Digest(), Size: int64(len(l.Blob)), URLs: l.URLs}
		if i.Docker {
			d.MediaType = DockerLayer
		}
		m.Layers = append(m.Layers, d)
	}
	return m
}

// ManifestBlob returns the manifest's bytes.
func (i *Image) ManifestBlob() []byte {
	if i.ManifestBytes != nil {
		return i.ManifestBytes
	}
	return marshal(i.Manifest())
}

// Digest of the manifest.
func (i *Image) Digest() digest.Digest { return digest.FromBytes(i.ManifestBlob()) }

// Index lists images of several platforms.
type Index struct {
	Images []*Image
	Docker bool
	// Bytes, if set, are used in place of what follows from the images.
	Bytes []byte
}

// MediaType of the index.
func (x *Index) MediaType() string {
	if x.Docker {
		return DockerManifestList
	}
	return imagespec.MediaTypeImageIndex
}

// Blob returns the index's bytes.
func (x *Index) Blob() []byte {
	if x.Bytes != nil {
		return x.Bytes
	}
	index := imagespec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: x.MediaType()}
	for _, i := range x.Images {
		m := i.ManifestBlob()
		index.Manifests = append(index.Manifests, imagespec.Descriptor{
			MediaType: i.MediaType(), Digest: digest.FromBytes(m), Size: int64(len(m)),
			Platform: &imagespec.Platform{OS: i.Config.OS, Architecture: i.Config.Architecture, Variant: i.Config.Variant},
		})
	}
	return marshal(index)
}

// Digest of the index.
func (x *Index) Digest() digest.Digest { return digest.FromBytes(x.Blob()) }

func marshal(v any) []byte {
	data, err := json.Marshal(v)
	must(err)
	return data
}

func must(err error) {
	if err != nil {
		panic(fmt.Sprintf("imagetest: %v", err))
	}
}

package image

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/crisp-cri/crisp/image/registry"
)

// maxIndexDepth is how many indexes may lead to a manifest. One is usual.
const maxIndexDepth = 4

// Media types of Docker that image-spec does not name.
const (
	dockerSchema1       = "application/vnd.docker.distribution.manifest.v1"
	dockerConfig        = "application/vnd.docker.container.image.v1+json"
	dockerLayer         = "application/vnd.docker.image.rootfs.diff.tar"
	dockerForeignLayer  = "application/vnd.docker.image.rootfs.foreign.diff.tar"
	ociLayer            = "application/vnd.oci.image.layer.v1.tar"
	ociNondistributable = "application/vnd.oci.image.layer.nondistributable.v1.tar"
)

// found is an image as described by its registry, verified and checked.
type found struct {
	top      digest.Digest // of the manifest or index that the reference names
	manifest imagespec.Descriptor
	config   imagespec.Descriptor
	image    imagespec.Image // the config
	layers   []layerDesc     // lowest first

	manifestBytes, configBytes []byte
}

// layerDesc is one layer of a manifest: the blob, and what it inflates to.
type layerDesc struct {
	Blob   imagespec.Descriptor
	DiffID digest.Digest
}

// document is a manifest or an index; which one it is we are told by a header,
// so all fields of both are decoded and those of the other must be absent
// (CVE-2021-41190).
type document struct {
	SchemaVersion int                    `json:"schemaVersion"`
	MediaType     string                 `json:"mediaType"`
	Manifests     []imagespec.Descriptor `json:"manifests"`
	Config        *imagespec.Descriptor  `json:"config"`
	Layers        []imagespec.Descriptor `json:"layers"`
	FSLayers      json.RawMessage        `json:"fsLayers"` // schema 1
}

// describe finds the manifest for this machine and its configuration.
func (s *Store) describe(ctx context.Context, src *registry.Source, ref pullRef) (*found, error) {
	f := &found{}
	next, expect := ref.tagOrDigest(), imagespec.Descriptor{}
	for depth := 0; ; depth++ {
		if depth > maxIndexDepth {
			return nil, fmt.Errorf("%w: indexes are nested more than %d deep", ErrLimit, maxIndexDepth)
		}
		doc, err := src.Manifest(ctx, next, s.config.Limits.DocumentBytes)
		if err != nil {
			return nil, err
		}
		if depth == 0 {
			f.top = doc.Digest
		} else if doc.MediaType != expect.MediaType || int64(len(doc.Body)) != expect.Size {
			return nil, fmt.Errorf("%w: manifest %s is %q of %d bytes, its index says %q of %d bytes",
				ErrCorrupt, doc.Digest, clip(doc.MediaType), len(doc.Body), clip(expect.MediaType), expect.Size)
		}
		parsed, isIndex, err := parseDocument(doc)
		if err != nil {
			return nil, fmt.Errorf("manifest %s: %w", doc.Digest, err)
		}
		if isIndex {
			expect, err = s.choose(parsed.Manifests)
			if err != nil {
				return nil, fmt.Errorf("index %s: %w", doc.Digest, err)
			}
			next = string(expect.Digest)
			continue
		}
		f.manifest = imagespec.Descriptor{MediaType: doc.MediaType, Digest: doc.Digest, Size: int64(len(doc.Body))}
		f.manifestBytes = doc.Body
		f.config = *parsed.Config
		if err := s.checkLayers(parsed.Layers); err != nil {
			return nil, fmt.Errorf("manifest %s: %w", doc.Digest, err)
		}
		f.configBytes, err = s.fetchConfig(ctx, src, f.config)
		if err != nil {
			return nil, err
		}
		f.image, f.layers, err = s.parseConfig(f.configBytes, parsed.Layers)
		if err != nil {
			return nil, fmt.Errorf("config %s: %w", f.config.Digest, err)
		}
		return f, nil
	}
}

// parseDocument decodes a manifest or an index and sees that it is one of them
// only, and the one that the registry said.
func parseDocument(doc registry.Document) (_ document, isIndex bool, _ error) {
	switch doc.MediaType {
	case imagespec.MediaTypeImageIndex, registry.DockerManifestList:
		isIndex = true
	case imagespec.MediaTypeImageManifest, registry.DockerManifest:
	default:
		if strings.HasPrefix(doc.MediaType, dockerSchema1) {
			return document{}, false, fmt.Errorf("%w: Docker schema 1", ErrUnsupported)
		}
		return document{}, false, fmt.Errorf("%w: the registry sent media type %q", ErrUnsupported, clip(doc.MediaType))
	}
	var d document
	if err := json.Unmarshal(doc.Body, &d); err != nil {
		return document{}, false, fmt.Errorf("%w: %v", ErrCorrupt, err)
	}
	switch {
	case d.MediaType != "" && d.MediaType != doc.MediaType:
		return document{}, false, fmt.Errorf("%w: media type %q was sent as %q", ErrCorrupt, clip(d.MediaType), doc.MediaType)
	case d.SchemaVersion != 2:
		return document{}, false, fmt.Errorf("%w: schema version %d", ErrUnsupported, d.SchemaVersion)
	case d.FSLayers != nil, isIndex && (d.Config != nil || d.Layers != nil), !isIndex && d.Manifests != nil:
		return document{}, false, fmt.Errorf("%w: it is a manifest and an index in one", ErrCorrupt)
	case !isIndex && d.Config == nil:
		return document{}, false, fmt.Errorf("%w: it has no config", ErrCorrupt)
	}
	return d, isIndex, nil
}

// choose returns the entry of an index that suits this machine best.
func (s *Store) choose(manifests []imagespec.Descriptor) (imagespec.Descriptor, error) {
	best, bestRank := imagespec.Descriptor{}, -1
	for _, m := range manifests {
		var platform imagespec.Platform
		if m.Platform != nil {
			platform = *m.Platform
		}
		if r := rank(s.config.Platforms, platform); r >= 0 && (bestRank < 0 || r < bestRank) {
			best, bestRank = m, r
		}
	}
	if bestRank < 0 {
		return best, fmt.Errorf("%w: it has nothing for %s/%s", ErrUnsupported, s.config.Platforms[0].OS, s.config.Platforms[0].Architecture)
	}
	return best, s.checkDescriptor(best, s.config.Limits.DocumentBytes, "manifest")
}

// checkDescriptor sees that a descriptor can be trusted with a file name and an
// amount of bytes.
func (s *Store) checkDescriptor(d imagespec.Descriptor, limit int64, what string) error {
	if _, err := parseDigest(string(d.Digest)); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrCorrupt, what, err)
	}
	if d.Size < 0 {
		return fmt.Errorf("%w: %s %s of %d bytes", ErrCorrupt, what, d.Digest, d.Size)
	}
	if d.Size > limit {
		return fmt.Errorf("%w: %s %s has %d bytes, more than %d", ErrLimit, what, d.Digest, d.Size, limit)
	}
	return nil
}

func (s *Store) checkLayers(layers []imagespec.Descriptor) error {
	if len(layers) == 0 {
		return fmt.Errorf("%w: it has no layers", ErrUnsupported)
	}
	if len(layers) > s.config.Limits.Layers {
		return fmt.Errorf("%w: it has %d layers, more than %d", ErrLimit, len(layers), s.config.Limits.Layers)
	}
	for i, l := range layers {
		// A compressed layer larger than all unpacked ones may be is refused before it is fetched.
		if err := s.checkDescriptor(l, s.config.Limits.ImageBytes, fmt.Sprintf("layer %d", i)); err != nil {
			return err
		}
		if !knownLayer(l.MediaType) {
			return fmt.Errorf("%w: layer %d has media type %q", ErrUnsupported, i, clip(l.MediaType))
		}
	}
	return nil
}

// knownLayer accepts the tar layers of Docker and OCI. Which compression it is,
// unpacking finds out; URLs of foreign layers are never followed.
func knownLayer(mediaType string) bool {
	for _, base := range []string{ociLayer, ociNondistributable, dockerLayer, dockerForeignLayer} {
		if rest, ok := strings.CutPrefix(mediaType, base); ok {
			return slices.Contains([]string{"", "+gzip", ".gzip", "+zstd", ".zstd"}, rest)
		}
	}
	return false
}

func (s *Store) fetchConfig(ctx context.Context, src *registry.Source, d imagespec.Descriptor) ([]byte, error) {
	if d.MediaType != imagespec.MediaTypeImageConfig && d.MediaType != dockerConfig {
		return nil, fmt.Errorf("%w: config of media type %q: it is no container image", ErrUnsupported, clip(d.MediaType))
	}
	if err := s.checkDescriptor(d, s.config.Limits.DocumentBytes, "config"); err != nil {
		return nil, err
	}
	blob := src.Blob(ctx, d.Digest, d.Size)
	defer blob.Close()
	return io.ReadAll(blob) // the blob ends with the descriptor's size
}

// parseConfig checks a configuration against its manifest.
func (s *Store) parseConfig(text []byte, layers []imagespec.Descriptor) (imagespec.Image, []layerDesc, error) {
	var config imagespec.Image
	if err := json.Unmarshal(text, &config); err != nil {
		return config, nil, fmt.Errorf("%w: %v", ErrCorrupt, err)
	}
	if config.RootFS.Type != "layers" || len(config.RootFS.DiffIDs) != len(layers) {
		return config, nil, fmt.Errorf("%w: it lists %d diff ids of type %q, the manifest %d layers",
			ErrCorrupt, len(config.RootFS.DiffIDs), clip(config.RootFS.Type), len(layers))
	}
	if rank(s.config.Platforms, config.Platform) < 0 {
		return config, nil, fmt.Errorf("%w: it is for %s/%s %s", ErrUnsupported, clip(config.OS), clip(config.Architecture), clip(config.Variant))
	}
	descs := make([]layerDesc, len(layers))
	for i, l := range layers {
		diffID, err := parseDigest(string(config.RootFS.DiffIDs[i]))
		if err != nil {
			return config, nil, fmt.Errorf("%w: diff id %d: %w", ErrCorrupt, i, err)
		}
		descs[i] = layerDesc{
			Blob:   imagespec.Descriptor{MediaType: l.MediaType, Digest: l.Digest, Size: l.Size},
			DiffID: diffID,
		}
	}
	return config, descs, nil
}

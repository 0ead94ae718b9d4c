package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/crisp-cri/crisp/image/registry"
	"github.com/crisp-cri/crisp/image/unpack"
)

// Pull implements Images. Calls with the same reference and the same
// credentials that come while one is under way share its result; others share
// its layers. The registry is always asked, with the credentials of the call:
// that an image is here already does not say that this caller may have it.
func (s *Store) Pull(ctx context.Context, ref string, auth *Auth) (id string, err error) {
	parsed, err := parseRef(ref)
	if err != nil {
		return "", err
	}
	_, id, err = s.pulls.do(ctx, parsed.String()+" "+auth.key(), func(ctx context.Context) (string, error) {
		return s.pull(ctx, parsed, auth)
	})
	if err != nil {
		return "", fmt.Errorf("cannot pull image %q: %w", parsed, err)
	}
	return id, nil
}

// key tells credentials apart without showing them.
func (a *Auth) key() string {
	if a == nil {
		return ""
	}
	text, err := json.Marshal(a)
	if err != nil {
		return "" // strings only: cannot happen
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

func (a *Auth) credentials() *registry.Credentials {
	if a == nil || *a == (Auth{}) || *a == (Auth{ServerAddress: a.ServerAddress}) {
		return nil
	}
	return &registry.Credentials{
		Username: a.Username, Password: a.Password, Auth: a.Auth, ServerAddress: a.ServerAddress,
		IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken,
	}
}

func (s *Store) pull(ctx context.Context, ref pullRef, auth *Auth) (id string, err error) {
	progress := s.startProgress(ref.String())
	defer s.endProgress(progress)

	src, err := s.registry.Open(ref.repo, auth.credentials())
	if err != nil {
		return "", err
	}
	defer src.Close()
	image, err := s.describe(ctx, src, ref)
	if err != nil {
		return "", err
	}

	// From here no garbage collection takes what we find or place.
	release := s.keepBusy(image)
	defer release()
	progress.start(image.layers)
	if err := s.fetchLayers(ctx, src, image.layers); err != nil {
		return "", err
	}
	progress.stage.Store(int32(StageCommit))
	if err := s.tieLayers(ctx, image.layers); err != nil {
		return "", err
	}
	return string(image.config.Digest), s.commitImage(ref, image)
}

func (s *Store) fetchLayers(ctx context.Context, src *registry.Source, layers []layerDesc) error {
	budget := unpack.NewBudget(s.config.Limits.ImageBytes, s.config.Limits.ImageEntries)
	group, ctx := errgroup.WithContext(ctx)
	for i, l := range layers {
		if slices.ContainsFunc(layers[:i], func(before layerDesc) bool { return before.DiffID == l.DiffID && before.Blob.Digest == l.Blob.Digest }) {
			continue
		}
		group.Go(func() error { return s.ensureLayer(ctx, src, l, budget) })
	}
	return group.Wait()
}

// keepBusy protects an image's layers and blobs from garbage collection until
// the returned function is called.
func (s *Store) keepBusy(image *found) (release func()) {
	needed := []digest.Digest{image.manifest.Digest, image.config.Digest}
	for _, l := range image.layers {
		needed = append(needed, l.DiffID, l.Blob.Digest)
	}
	needed = append(needed, tieIDs(image.layers)...)
	add := func(n int) {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, d := range needed {
			if s.busy[d] += n; s.busy[d] == 0 {
				delete(s.busy, d)
			}
		}
	}
	add(1)
	return func() { add(-1) }
}

// commitImage makes a fetched image durable and visible under its reference.
func (s *Store) commitImage(ref pullRef, image *found) error {
	for _, blob := range []struct {
		digest digest.Digest
		bytes  []byte
	}{{image.manifest.Digest, image.manifestBytes}, {image.config.Digest, image.configBytes}} {
		if err := s.placeBlob(blob.digest, blob.bytes); err != nil {
			return fmt.Errorf("cannot store blob %s: %w", blob.digest, err)
		}
	}
	if err := s.flush(); err != nil {
		return err
	}

	s.commit.Lock()
	defer s.commit.Unlock()
	record, changed := s.recordWith(ref, image)
	if !changed {
		return nil
	}
	if err := s.saveRecord(record); err != nil {
		return fmt.Errorf("cannot record image %s: %w", record.ID, err)
	}
	losers := s.losersOf(record)
	s.publish(record)
	// The image is committed. What follows tidies up; if it fails, the next
	// Open does it from the Seq numbers.
	var errs []error
	for _, loser := range losers {
		errs = append(errs, s.saveRecord(loser))
		s.publish(loser)
	}
	errs = append(errs, s.writeIndex())
	return errors.Join(errs...)
}

// placeBlob puts a small blob into the layout. Durable with the next flush.
func (s *Store) placeBlob(d digest.Digest, bytes []byte) error {
	s.commit.Lock()
	defer s.commit.Unlock()
	if have, err := readFile(s.dir.blob(d), s.config.Limits.DocumentBytes); err == nil && digest.FromBytes(have) == d {
		return nil
	}
	return s.writeFile(s.dir.blob(d), bytes, unsynced)
}

// recordWith returns the record of an image that was pulled by ref, and whether
// it says anything new. s.commit is held.
func (s *Store) recordWith(ref pullRef, image *found) (_ *imageRecord, changed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := string(image.config.Digest)
	r := &imageRecord{ID: id}
	old := s.images[id]
	if old != nil && len(old.Manifests) > 0 {
		*r = *old
		r.Refs, r.Manifests = slices.Clone(old.Refs), slices.Clone(old.Manifests)
	} else {
		changed = true
	}
	if layers := s.withTiesLocked(image.layers); !slices.Equal(diffIDs(layers), diffIDs(r.Layers)) {
		r.Layers, changed = layers, true
	}
	if old == nil || old.Hidden {
		r.Hidden, changed = false, true
		r.PulledAt = time.Now().UTC()
	}
	r.Config = image.config
	r.view.Config = image.image
	if !slices.ContainsFunc(r.Manifests, func(m imagespec.Descriptor) bool { return m.Digest == image.manifest.Digest }) {
		r.Manifests, changed = append(r.Manifests, image.manifest), true
	}
	names := []string{ref.withDigest(image.top)}
	if ref.tag != "" {
		names = append(names, ref.String())
	}
	for _, name := range names {
		if s.names[name] == id {
			continue
		}
		s.lastSeq++
		r.Refs, changed = append(r.Refs, imageRef{Name: name, Manifest: image.manifest.Digest, Seq: s.lastSeq}), true
	}
	return r, changed
}

// losersOf returns the records of other images without the names that r has now.
func (s *Store) losersOf(r *imageRecord) []*imageRecord {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var losers []*imageRecord
	for id, other := range s.images {
		if id == r.ID {
			continue
		}
		kept := slices.DeleteFunc(slices.Clone(other.Refs), func(ref imageRef) bool {
			return slices.ContainsFunc(r.Refs, func(mine imageRef) bool { return mine.Name == ref.Name })
		})
		if len(kept) != len(other.Refs) {
			loser := *other
			loser.Refs = kept
			losers = append(losers, &loser)
		}
	}
	return losers
}

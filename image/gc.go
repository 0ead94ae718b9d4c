package image

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	"k8s.io/klog/v2"
)

// Acquire implements Images. A holder may hold several images (its root file
// system's and those of image volumes). The image may have been removed: that
// is how podsandbox tells us after a restart what containers still use.
//
// Errors: ErrNotFound.
func (s *Store) Acquire(imageID, holder string) (Layers, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.images[imageID]
	if r == nil || s.missingLayer(r) != "" || len(r.Layers) == 0 {
		return Layers{}, fmt.Errorf("%w: %s", ErrNotFound, clip(imageID))
	}
	if s.holders[holder] == nil {
		s.holders[holder] = map[string]bool{}
	}
	s.holders[holder][imageID] = true
	return Layers{ImageID: imageID, Lower: s.lowersLocked(r)}, nil
}

// Release implements Images.
func (s *Store) Release(holder string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.holders, holder)
}

// CollectGarbage implements Images. Removed images that nobody holds lose their
// record first, then layers and blobs that no record names go: a crash in
// between leaves layers that no record names, which Open removes.
func (s *Store) CollectGarbage(ctx context.Context) error {
	s.commit.Lock()
	err := s.discardUnused(dropHidden)
	s.commit.Unlock()
	return errors.Join(err, s.emptyTrash(ctx))
}

// hiddenImages says what becomes of removed images that nobody holds.
type hiddenImages bool

const (
	keepHidden hiddenImages = false
	dropHidden hiddenImages = true
)

// discardUnused takes everything unused out of its place, quickly: layers are
// moved to the trash. s.commit is held, or nobody else is there yet.
func (s *Store) discardUnused(hidden hiddenImages) error {
	// Forget first, then take away: nobody is handed what is about to go. s.commit
	// keeps pulls from placing the same anew in between.
	s.mu.Lock()
	held := s.heldLocked()
	used := map[digest.Digest]bool{}
	for d := range s.busy {
		used[d] = true
	}
	for d := range s.orphans {
		used[d] = true
	}
	var records []string
	for id, r := range s.images {
		if r.Hidden && hidden == dropHidden && !held[id] && s.busy[digest.Digest(id)] == 0 {
			records = append(records, id)
			delete(s.images, id)
			continue
		}
		used[r.Config.Digest] = true
		for _, m := range r.Manifests {
			used[m.Digest] = true
		}
		for _, l := range r.Layers {
			used[l.DiffID], used[l.Blob.Digest] = true, true
		}
	}
	layers := map[digest.Digest]*layerRecord{}
	for d, r := range s.layers {
		if !used[d] {
			layers[d] = r
			delete(s.layers, d)
		}
	}
	s.mu.Unlock()

	var errs []error
	for _, id := range records {
		if err := os.Remove(s.dir.image(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	for d, r := range layers {
		if err := s.toTrash(s.dir.layer(d)); err != nil {
			errs = append(errs, err)
			s.mu.Lock()
			s.layers[d] = r // it is in its place, and the next collection's
			s.mu.Unlock()
		}
	}
	return errors.Join(append(errs, s.removeBlobs(used))...)
}

// removeBlobs removes the blobs that are not used.
func (s *Store) removeBlobs(used map[digest.Digest]bool) error {
	entries, err := os.ReadDir(s.dir.blobs())
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if !used[digest.NewDigestFromEncoded(digest.SHA256, e.Name())] {
			errs = append(errs, os.Remove(filepath.Join(s.dir.blobs(), e.Name())))
		}
	}
	return errors.Join(errs...)
}

// toTrash moves a directory out of the way in one step, under a new name. It makes nothing there: the disk may be full.
func (s *Store) toTrash(path string) error {
	return os.Rename(path, filepath.Join(s.dir.trash(), filepath.Base(path)+"-"+rand.Text()))
}

// emptyTrash deletes what was thrown away. Calls may overlap: RemoveAll does
// not mind what is gone already.
func (s *Store) emptyTrash(ctx context.Context) error {
	entries, err := os.ReadDir(s.dir.trash())
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if ctx.Err() != nil {
			return errors.Join(append(errs, context.Cause(ctx))...)
		}
		errs = append(errs, os.RemoveAll(filepath.Join(s.dir.trash(), e.Name())))
	}
	return errors.Join(errs...)
}

// sweepTrash empties the trash that a crash left, without making Open wait.
func (s *Store) sweepTrash() {
	s.sweeps.Add(1) // this sweep; Close cancels it and waits
	go func() {
		defer s.sweeps.Done()
		if err := s.emptyTrash(s.ctx); err != nil && s.ctx.Err() == nil {
			klog.Background().Error(err, "Could not empty the image store's trash, ignoring until the next garbage collection")
		}
	}()
}

// findOrphans keeps layers that no record names from being collected while the
// record of some image is set aside and cannot be made again: containers that
// run may use them. It ends when the image is pulled anew or the operator
// removes the file.
func (s *Store) findOrphans() error {
	entries, err := os.ReadDir(s.dir.corrupt())
	if err != nil {
		return err
	}
	for _, e := range entries {
		_, name, isImage := strings.Cut(e.Name(), "-images-")
		id := "sha256:" + strings.TrimSuffix(name, ".json")
		if !isImage || s.images[id] != nil {
			continue
		}
		s.problem("the layers of image %s are not known: none that no other image uses is removed while corrupt/%s is there", id, e.Name())
		s.orphans = map[digest.Digest]bool{}
		for d := range s.layers {
			s.orphans[d] = true
		}
	}
	return nil
}

package image

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/image/registry"
	"github.com/crisp-cri/crisp/image/unpack"
)

// This file is the seam "a layer is whatever yields a lower for the overlay".
// Today that is a directory, layers/<diffID>/fs, unpacked by package unpack. Who
// wants an EROFS file in its place changes makeLayer and lowers.

const (
	layerFile = "layer.json" // in a layer's directory: its record
	layerFS   = "fs"         // in a layer's directory: the overlay's lower
)

// lowers returns the overlay's lower directories for an image, topmost first.
//
// A layer that occurs twice is given once, at its upper place: what is between
// cannot change what the upper one shows, and overlayfs refuses the same
// directory twice (ELOOP). Below a layer with an opaque root nothing shows.
// s.mu is held.
func (s *Store) lowersLocked(r *imageRecord) []string {
	var dirs []string
	for _, l := range slices.Backward(r.Layers) {
		dir := filepath.Join(s.dir.layer(l.DiffID), layerFS)
		if slices.Contains(dirs, dir) {
			continue
		}
		dirs = append(dirs, dir)
		if s.layers[l.DiffID].OpaqueRoot {
			break
		}
	}
	return dirs
}

// ensureLayer sees to it that a layer is in the store, and that the blob that
// the manifest names for it does inflate to it. Pulls that need the same layer
// share one transfer; if it fails, each tries with its own source, as another
// registry or other credentials may have it.
func (s *Store) ensureLayer(ctx context.Context, src *registry.Source, l layerDesc, budget *unpack.Budget) error {
	for {
		if s.hasLayer(l) {
			return nil
		}
		led, _, err := s.fetch.do(ctx, string(l.DiffID), func(ctx context.Context) (string, error) {
			select {
			case s.slots <- struct{}{}:
				defer func() { <-s.slots }()
			case <-ctx.Done():
				return "", context.Cause(ctx)
			}
			return "", s.fetchLayer(ctx, src, l, budget)
		})
		if err != nil && (led || ctx.Err() != nil) {
			return fmt.Errorf("layer %s: %w", l.Blob.Digest, err)
		}
	}
}

func (s *Store) hasLayer(l layerDesc) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r := s.layers[l.DiffID]
	return r != nil && slices.Contains(r.Blobs, l.Blob.Digest)
}

// fetchLayer downloads a layer and unpacks it, or, if the store has a layer
// with that diffID, sees whether the blob inflates to it.
func (s *Store) fetchLayer(ctx context.Context, src *registry.Source, l layerDesc, budget *unpack.Budget) error {
	s.mu.RLock()
	have := s.layers[l.DiffID]
	s.mu.RUnlock()

	work, err := os.MkdirTemp(s.dir.tmp(), "layer-") // mode 0700
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(work) }() // after a success there is nothing left; after a failure Open sweeps what stays

	transfer := &transfer{store: s, source: src, layer: l, keepAs: ""}
	if s.config.KeepCompressed {
		transfer.keepAs = filepath.Join(work, "blob")
	}
	defer transfer.close()
	record := layerRecord{DiffID: l.DiffID}
	var got digest.Digest
	if have != nil {
		record = *have
		got, err = unpack.Digest(ctx, transfer.open, s.config.Limits.Layer, budget)
	} else {
		got, err = s.makeLayer(ctx, transfer.open, work, &record, budget)
	}
	if err != nil {
		return err
	}
	if got != l.DiffID {
		return fmt.Errorf("%w: it inflates to %s, the image says %s", ErrCorrupt, got, l.DiffID)
	}
	return s.placeLayer(work, &record, transfer)
}

// makeLayer unpacks into work/fs.
func (s *Store) makeLayer(ctx context.Context, open func(context.Context) io.Reader, work string, record *layerRecord, budget *unpack.Budget) (digest.Digest, error) {
	root := filepath.Join(work, layerFS)
	if err := os.Mkdir(root, 0o755); err != nil {
		return "", err
	}
	result, err := unpack.Layer(ctx, open, root, s.config.Limits.Layer, budget)
	if err != nil {
		return "", err
	}
	if result.OpaqueRoot {
		// Overlayfs does not look at a root's, but remeasureLayer does.
		if err := unix.Setxattr(root, opaqueXattr, []byte("y"), 0); err != nil {
			return "", fmt.Errorf("setxattr %s: %w", opaqueXattr, err)
		}
	}
	record.Bytes, record.Inodes, record.OpaqueRoot, record.ImpliedRoot = result.Bytes, result.Inodes, result.OpaqueRoot, result.ImpliedRoot
	if result.Loose != nil {
		text := result.Loose.Encode()
		if err := os.WriteFile(filepath.Join(work, looseFile), text, 0o600); err != nil {
			return "", err
		}
		record.Loose = digest.FromBytes(text)
	}
	return result.DiffID, nil
}

const opaqueXattr = "trusted.overlay.opaque"

// placeLayer puts a verified layer in its place, or, if there is one, notes
// that this blob inflates to it, too. Durable with the next flush.
func (s *Store) placeLayer(work string, record *layerRecord, t *transfer) error {
	s.commit.Lock()
	defer s.commit.Unlock()
	// Looked up anew: a transfer that was given up may have come to its end meanwhile.
	s.mu.RLock()
	have := s.layers[record.DiffID]
	s.mu.RUnlock()
	placed := *record
	if have != nil {
		placed = *have
	}
	placed.Blobs = append(slices.Clone(placed.Blobs), t.layer.Blob.Digest)
	text, err := encodeRecord(placed)
	if err != nil {
		return err
	}

	if t.keepAs != "" {
		if err := t.file.Close(); err != nil {
			return err
		}
		t.file = nil
		if err := os.Rename(t.keepAs, s.dir.blob(t.layer.Blob.Digest)); err != nil {
			return err
		}
	}
	place := s.dir.layer(record.DiffID)
	if have != nil {
		err = s.writeFile(filepath.Join(place, layerFile), text, unsynced)
	} else if err = s.writeFile(filepath.Join(work, layerFile), text, unsynced); err == nil {
		err = os.Rename(work, place)
		s.placed.Add(1)
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.layers[record.DiffID] = &placed
	s.mu.Unlock()
	return nil
}

// transfer is the download of one layer.
type transfer struct {
	store  *Store
	source *registry.Source
	layer  layerDesc
	keepAs string // file to keep the compressed bytes in; "" for none

	blob *registry.Blob
	file *os.File
}

// open starts the download; the reader counts what comes and keeps it if asked.
func (t *transfer) open(ctx context.Context) io.Reader {
	t.blob = t.source.Blob(ctx, t.layer.Blob.Digest, t.layer.Blob.Size)
	counter := &atomic.Int64{}
	t.store.setReceived(t.layer.Blob.Digest, counter)
	var r io.Reader = readerFunc(func(p []byte) (int, error) {
		n, err := t.blob.Read(p)
		counter.Add(int64(n))
		return n, err
	})
	if t.keepAs == "" {
		return r
	}
	var err error
	if t.file, err = os.OpenFile(t.keepAs, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return readerFunc(func([]byte) (int, error) { return 0, err })
	}
	return io.TeeReader(r, t.file)
}

func (t *transfer) close() {
	if t.blob != nil {
		_ = t.blob.Close() // ends the transfer; all that counts was read
		t.store.setReceived(t.layer.Blob.Digest, nil)
	}
	if t.file != nil {
		_ = t.file.Close() // it goes with the working directory
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// remeasureLayer makes a layer's record again from its directory. Which blobs
// inflate to it is not known any more: the next pull will see.
func (s *Store) remeasureLayer(id digest.Digest) (*layerRecord, error) {
	root := filepath.Join(s.dir.layer(id), layerFS)
	r := &layerRecord{DiffID: id}
	err := filepath.WalkDir(root, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		r.Inodes++
		switch {
		case info.IsDir():
			r.Bytes += 4096
		case info.Mode().IsRegular():
			r.Bytes += (info.Size() + 4095) / 4096 * 4096
		}
		return nil
	})
	if err != nil {
		s.problem("layer %s: %v", id, err)
	}
	var value [1]byte
	if n, err := unix.Getxattr(root, opaqueXattr, value[:]); err == nil && n == 1 {
		r.OpaqueRoot = true
	}
	// Whether its archive has an entry for the root is not known any more: if it looks as it does without one, it had none.
	var st unix.Stat_t
	if err := unix.Lstat(root, &st); err == nil && st.Mode&0o7777 == 0o755 && st.Uid == 0 && st.Gid == 0 {
		r.ImpliedRoot = true
	}
	if text, err := readFile(filepath.Join(s.dir.layer(id), looseFile), maxLooseFile); err == nil {
		r.Loose = digest.FromBytes(text)
	}
	text, err := encodeRecord(r)
	if err != nil {
		return nil, err
	}
	return r, s.writeFile(filepath.Join(s.dir.layer(id), layerFile), text, unsynced)
}

package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/crisp-cri/crisp/image/unpack"
)

// Layers are unpacked apart from each other, and one may belong to several images. What its archive takes for granted of the layers below
// it (unpack.Loose) is therefore looked up when an image is put together, and becomes a layer of its own right above: a tie.
// It belongs to the layer with all that is below it (image-spec's ChainID), so that no other image's layers can have a say in it.

// looseFile is in the directory of a layer with loose ends: what they are.
const looseFile = "loose"

// maxLooseFile bounds it: unpack limits the names in it.
const maxLooseFile = 64 << 20

func diffIDs(layers []layerDesc) []digest.Digest {
	ids := make([]digest.Digest, len(layers))
	for i, l := range layers {
		ids[i] = l.DiffID
	}
	return ids
}

// tieIDs are the digests by which the ties are known that an image's layers, lowest first, may need: one for each. No archive has
// one for its diffID.
func tieIDs(layers []layerDesc) []digest.Digest {
	ties := identity.ChainIDs(diffIDs(layers))
	for i, chain := range ties {
		ties[i] = digest.FromString("tie of the layers up to " + string(chain))
	}
	return ties
}

// withTiesLocked is a list of an image's layers, lowest first, with the ties that the store has. s.mu is held, or nobody else is there yet.
func (s *Store) withTiesLocked(layers []layerDesc) []layerDesc {
	var all []layerDesc
	for i, tie := range tieIDs(layers) {
		all = append(all, layers[i])
		if s.layers[tie] != nil {
			all = append(all, layerDesc{DiffID: tie})
		}
	}
	return all
}

// tieLayers makes the ties that an image needs, whose layers are all there. Its ties are kept busy by the caller.
func (s *Store) tieLayers(ctx context.Context, layers []layerDesc) error {
	var lowers []string // topmost first
	for i, tie := range tieIDs(layers) {
		s.mu.RLock()
		record, have := s.layers[layers[i].DiffID], s.layers[tie] != nil
		s.mu.RUnlock()
		if record.OpaqueRoot {
			lowers = nil
		}
		dir := s.dir.layer(record.DiffID)
		if !have {
			if err := s.tieLayer(ctx, tie, record, lowers); err != nil {
				return fmt.Errorf("layer %s: %w", layers[i].Blob.Digest, err)
			}
			s.mu.RLock()
			have = s.layers[tie] != nil
			s.mu.RUnlock()
		}
		lowers = slices.Insert(lowers, 0, filepath.Join(dir, layerFS))
		if have {
			lowers = slices.Insert(lowers, 0, filepath.Join(s.dir.layer(tie), layerFS))
		}
	}
	return nil
}

// tieLayer makes one tie, if it is needed.
func (s *Store) tieLayer(ctx context.Context, tie digest.Digest, record *layerRecord, lowers []string) (err error) {
	loose, err := s.readLoose(record)
	if err != nil {
		return err
	}
	if loose == nil && (!record.ImpliedRoot || len(lowers) == 0) {
		return nil
	}
	work, err := os.MkdirTemp(s.dir.tmp(), "tie-") // mode 0700
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	root := filepath.Join(work, layerFS)
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	result, needed, err := unpack.Tie(ctx, filepath.Join(s.dir.layer(record.DiffID), layerFS), lowers, record.ImpliedRoot, loose, root)
	if err != nil || !needed {
		return err
	}
	return s.placeTie(work, &layerRecord{DiffID: tie, Bytes: result.Bytes, Inodes: result.Inodes})
}

// placeTie puts a tie in its place, unless another pull has. Durable with the next flush.
func (s *Store) placeTie(work string, record *layerRecord) error {
	s.commit.Lock()
	defer s.commit.Unlock()
	s.mu.RLock()
	have := s.layers[record.DiffID] != nil
	s.mu.RUnlock()
	if have {
		return nil
	}
	text, err := encodeRecord(record)
	if err != nil {
		return err
	}
	if err := s.writeFile(filepath.Join(work, layerFile), text, unsynced); err != nil {
		return err
	}
	if err := os.Rename(work, s.dir.layer(record.DiffID)); err != nil {
		return err
	}
	s.placed.Add(1)
	s.mu.Lock()
	s.layers[record.DiffID] = record
	s.mu.Unlock()
	return nil
}

// readLoose reads a layer's loose ends; nil without any.
func (s *Store) readLoose(record *layerRecord) (*unpack.Loose, error) {
	if record.Loose == "" {
		return nil, nil
	}
	text, err := readFile(filepath.Join(s.dir.layer(record.DiffID), looseFile), maxLooseFile)
	if err != nil {
		return nil, err
	}
	if digest.FromBytes(text) != record.Loose {
		return nil, fmt.Errorf("%s of layer %s has another checksum than its record says", looseFile, record.DiffID)
	}
	return unpack.DecodeLoose(text)
}

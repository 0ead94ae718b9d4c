package image

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// recordVersion is written into every record. A reader that does not know the
// version sets the record aside.
const recordVersion = 1

// maxRecord bounds a record's file, in bytes.
const maxRecord = 8 << 20

// envelope is a record's file: the sum is the SHA-256 of Data as it stands.
type envelope struct {
	Version int             `json:"version"`
	Sum     string          `json:"sha256"`
	Data    json.RawMessage `json:"data"`
}

// imageRecord is images/<hex>.json: an image, and what makes it up. Immutable
// once published.
type imageRecord struct {
	ID        string                 `json:"id"`
	Manifests []imagespec.Descriptor `json:"manifests"` // as pulled; several if registries have the same image in different wrappings
	Config    imagespec.Descriptor   `json:"config"`
	Layers    []layerDesc            `json:"layers"` // lowest first
	Refs      []imageRef             `json:"refs,omitempty"`
	PulledAt  time.Time              `json:"pulledAt"`
	// Hidden images are in no list: they were removed, or lost their names with
	// a broken record, and stay only for those who hold them.
	Hidden bool `json:"hidden,omitempty"`

	view Image // what callers see; from the fields above and the config blob
}

// imageRef is a name of an image. When a tag moves, the new image's record is
// written first; until the old one's is, both have it, and the higher Seq counts.
type imageRef struct {
	Name     string        `json:"name"`               // repo:tag or repo@digest
	Manifest digest.Digest `json:"manifest,omitempty"` // of the entry in Manifests it led to
	Seq      uint64        `json:"seq"`
}

// layerRecord is layers/<hex>/layer.json. Immutable once published.
type layerRecord struct {
	DiffID     digest.Digest `json:"diffID"`
	Bytes      int64         `json:"bytes"` // on disk, as unpacked
	Inodes     int64         `json:"inodes"`
	OpaqueRoot bool          `json:"opaqueRoot,omitempty"`
	// ImpliedRoot: its archive does not say what the root directory is like. Loose is the digest of the file with
	// its other loose ends, "" without any. See tie.go.
	ImpliedRoot bool          `json:"impliedRoot,omitempty"`
	Loose       digest.Digest `json:"loose,omitempty"`
	// Blobs are the digests of compressed layers that were seen to inflate to
	// DiffID. A manifest that pairs another blob with it has to prove it first.
	Blobs []digest.Digest `json:"blobs"`
}

// layout builds the names in the store's directory; the only place that does.
type layout string

func (l layout) at(elem ...string) string {
	return filepath.Join(append([]string{string(l)}, elem...)...)
}

func (l layout) lock() string    { return l.at("lock") }
func (l layout) tmp() string     { return l.at("tmp") }
func (l layout) trash() string   { return l.at("trash") }
func (l layout) corrupt() string { return l.at("corrupt") }
func (l layout) images() string  { return l.at("images") }
func (l layout) layers() string  { return l.at("layers") }
func (l layout) oci() string     { return l.at("oci") }
func (l layout) blobs() string   { return l.at("oci", "blobs", "sha256") }

func (l layout) image(id string) string {
	return l.at("images", strings.TrimPrefix(id, "sha256:")+".json")
}
func (l layout) blob(d digest.Digest) string  { return l.at("oci", "blobs", "sha256", d.Encoded()) }
func (l layout) layer(d digest.Digest) string { return l.at("layers", d.Encoded()) }

// make makes the directories, all 0700 whatever the umask and whatever they
// were: below are set-uid files of images (CVE-2021-41103).
func (l layout) make() error {
	if err := os.MkdirAll(string(l), 0o700); err != nil {
		return err
	}
	for _, dir := range []string{string(l), l.tmp(), l.trash(), l.corrupt(), l.images(), l.layers(), l.oci(), l.at("oci", "blobs"), l.blobs()} {
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := os.Chmod(dir, 0o700); err != nil {
			return err
		}
	}
	return nil
}

// encodeRecord makes a record's file.
func encodeRecord(record any) ([]byte, error) {
	data, err := json.Marshal(record)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(data)
	return json.Marshal(envelope{Version: recordVersion, Sum: hex.EncodeToString(sum[:]), Data: data})
}

// decodeRecord reads a record's file into record.
func decodeRecord(text []byte, record any) error {
	var e envelope
	if err := json.Unmarshal(text, &e); err != nil {
		return fmt.Errorf("it is no record: %w", err)
	}
	if e.Version != recordVersion {
		return fmt.Errorf("it has version %d, known is %d", e.Version, recordVersion)
	}
	if sum := sha256.Sum256(e.Data); hex.EncodeToString(sum[:]) != e.Sum {
		return errors.New("its checksum is wrong")
	}
	return json.Unmarshal(e.Data, record)
}

func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(text)) > limit {
		err = fmt.Errorf("%s is larger than %d bytes", path, limit)
	}
	return text, err
}

// durability of a file that is written.
type durability bool

const (
	synced   durability = true  // on the disk when the writer returns
	unsynced durability = false // with the next syncfs
)

// writeFile replaces the file at path in one step: readers and crashes see the
// old or the new one.
func (s *Store) writeFile(path string, text []byte, how durability) error {
	f, err := os.CreateTemp(s.dir.tmp(), filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err == nil && how == synced {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	s.placed.Add(1)
	if how == synced {
		return syncDir(filepath.Dir(path))
	}
	return nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// flush puts everything placed so far on the disk, unless somebody else has.
func (s *Store) flush() error {
	s.sync.Lock()
	defer s.sync.Unlock()
	placed := s.placed.Load()
	if s.synced >= placed {
		return nil
	}
	d, err := os.Open(s.config.Root)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("syncfs %s: %w", s.config.Root, err)
	}
	s.synced = placed
	return nil
}

// saveRecord writes an image's record: the commit point of pulls and removals.
// s.commit is held.
func (s *Store) saveRecord(r *imageRecord) error {
	text, err := encodeRecord(r)
	if err != nil {
		return err
	}
	return s.writeFile(s.dir.image(r.ID), text, synced)
}

// publish makes a saved record the current one. Its names are taken from others
// that have them with a lower Seq.
func (s *Store) publish(r *imageRecord) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.view = s.viewOf(r)
	s.images[r.ID] = r
	for name, id := range s.names {
		if id == r.ID {
			delete(s.names, name)
		}
	}
	if r.Hidden {
		return
	}
	for _, ref := range r.Refs {
		s.names[ref.Name] = r.ID
	}
}

// viewOf computes what callers see. r.view.Config is set already.
func (s *Store) viewOf(r *imageRecord) Image {
	v := Image{ID: r.ID, PulledAt: r.PulledAt, Config: r.view.Config, Size: r.Config.Size}
	for _, l := range r.Layers {
		v.Size += l.Blob.Size
	}
	for _, ref := range r.Refs {
		if strings.Contains(ref.Name, "@") {
			v.RepoDigests = append(v.RepoDigests, ref.Name)
		} else {
			v.RepoTags = append(v.RepoTags, ref.Name)
		}
		v.Pinned = v.Pinned || slices.Contains(s.config.Pinned, ref.Name)
	}
	slices.Sort(v.RepoTags)
	slices.Sort(v.RepoDigests)
	return v
}

// writeIndex rewrites the OCI layout's index.json (image-spec image-layout.md)
// so that other tools can read the layout. It only repeats the records: losing
// it is no loss. s.commit is held, or nobody else is there yet.
func (s *Store) writeIndex() error {
	index := imagespec.Index{MediaType: imagespec.MediaTypeImageIndex, Manifests: []imagespec.Descriptor{}}
	index.SchemaVersion = 2
	s.mu.RLock()
	for _, r := range s.images {
		for _, ref := range r.Refs {
			for _, m := range r.Manifests {
				if m.Digest == ref.Manifest {
					m.Annotations = map[string]string{imagespec.AnnotationRefName: ref.Name}
					index.Manifests = append(index.Manifests, m)
				}
			}
		}
	}
	s.mu.RUnlock()
	slices.SortFunc(index.Manifests, func(a, b imagespec.Descriptor) int {
		return strings.Compare(a.Annotations[imagespec.AnnotationRefName], b.Annotations[imagespec.AnnotationRefName])
	})
	text, err := json.Marshal(index)
	if err != nil {
		return err
	}
	return s.writeFile(s.dir.at("oci", imagespec.ImageIndexFile), text, unsynced)
}

// load reads the directory into memory and mends it. Nobody else is there yet.
func (s *Store) load() error {
	if err := emptyDir(s.dir.tmp()); err != nil {
		return err
	}
	layoutFile := s.dir.at("oci", imagespec.ImageLayoutFile)
	if err := s.writeFile(layoutFile, []byte(`{"imageLayoutVersion":"`+imagespec.ImageLayoutVersion+`"}`), unsynced); err != nil {
		return err
	}
	if err := s.findLayers(); err != nil {
		return err
	}
	if err := s.loadImages(); err != nil {
		return err
	}
	s.settleNames()
	if err := s.findOrphans(); err != nil {
		return err
	}
	// What no record names was placed by a pull that did not get to its commit
	// point, and may not be whole on the disk. Hidden images stay: who holds
	// them is not known yet.
	if err := s.discardUnused(keepHidden); err != nil {
		return err
	}
	if err := s.loadLayers(); err != nil {
		return err
	}
	s.sweepTrash()
	return s.writeIndex()
}

func emptyDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// setAside moves a broken file out of the way, for the operator to look at.
func (s *Store) setAside(path string, why error) error {
	name := time.Now().UTC().Format("20060102T150405.000000000-") + filepath.Base(filepath.Dir(path)) + "-" + filepath.Base(path)
	if err := os.Rename(path, filepath.Join(s.dir.corrupt(), name)); err != nil {
		return err
	}
	s.problem("%s: %v; moved to corrupt/%s", path, why, name)
	return nil
}

// findLayers notes which layers are there. Their records are read when it is
// known which of them count.
func (s *Store) findLayers() error {
	entries, err := os.ReadDir(s.dir.layers())
	if err != nil {
		return err
	}
	for _, e := range entries {
		id := digest.NewDigestFromEncoded(digest.SHA256, e.Name())
		if _, err := parseDigest(string(id)); err != nil || !e.IsDir() {
			s.problem("%s is no layer", filepath.Join(s.dir.layers(), e.Name()))
			continue
		}
		s.layers[id] = &layerRecord{DiffID: id}
	}
	return nil
}

func (s *Store) loadLayers() error {
	for id := range s.layers {
		r, err := s.loadLayer(id)
		if err != nil {
			return err
		}
		s.layers[id] = r
	}
	return nil
}

// loadLayer reads a layer's record. The directory is only there because its
// content was verified, so a lost record is made again from it.
func (s *Store) loadLayer(id digest.Digest) (*layerRecord, error) {
	path := filepath.Join(s.dir.layer(id), layerFile)
	text, err := readFile(path, maxRecord)
	r := &layerRecord{}
	if err == nil {
		err = decodeRecord(text, r)
	}
	if err == nil && r.DiffID != id {
		err = fmt.Errorf("it is of layer %s", clip(string(r.DiffID)))
	}
	if err == nil {
		return r, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		if err := s.setAside(path, err); err != nil {
			return nil, err
		}
	} else {
		s.problem("%s is missing", path)
	}
	return s.remeasureLayer(id)
}

// loadImages reads the image records.
func (s *Store) loadImages() error {
	entries, err := os.ReadDir(s.dir.images())
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(s.dir.images(), e.Name())
		id := "sha256:" + strings.TrimSuffix(e.Name(), ".json")
		if _, err := parseDigest(id); err != nil {
			s.problem("%s is no image record", path)
			continue
		}
		r, whyNot := s.readRecord(path, id)
		if whyNot != nil {
			if err := s.setAside(path, whyNot); err != nil {
				return err
			}
			r = &imageRecord{ID: id, Hidden: true}
		}
		config, err := s.readConfig(id)
		switch {
		case err == nil && whyNot != nil:
			// The names are lost, but the configuration lists the layers: running
			// containers can still be told theirs, and none is collected under them.
			for _, d := range config.RootFS.DiffIDs {
				r.Layers = append(r.Layers, layerDesc{DiffID: d})
			}
			r.Layers = s.withTiesLocked(r.Layers)
			r.Config = imagespec.Descriptor{MediaType: imagespec.MediaTypeImageConfig, Digest: digest.Digest(id)}
			if err := s.saveRecord(r); err != nil {
				return err
			}
		case err != nil && whyNot != nil:
			continue // findOrphans will see
		case err != nil:
			s.problem("image %s is hidden until it is pulled again: %v", id, err)
			r.Hidden, r.Refs = true, nil
		}
		r.view.Config = config
		if missing := s.missingLayer(r); missing != "" {
			if !r.Hidden {
				s.problem("image %s is hidden until it is pulled again: layer %s is missing", id, missing)
			}
			r.Hidden, r.Refs = true, nil
		}
		s.images[id] = r
	}
	return nil
}

func (s *Store) readRecord(path, id string) (*imageRecord, error) {
	text, err := readFile(path, maxRecord)
	if err != nil {
		return nil, err
	}
	r := &imageRecord{}
	if err := decodeRecord(text, r); err != nil {
		return nil, err
	}
	return r, r.check(id)
}

// check sees that a record, whoever wrote it, leads nowhere outside.
func (r *imageRecord) check(id string) error {
	if r.ID != id || string(r.Config.Digest) != id {
		return fmt.Errorf("it is of image %s", clip(r.ID))
	}
	for _, l := range r.Layers {
		for _, d := range []digest.Digest{l.DiffID, l.Blob.Digest} {
			if d == "" {
				continue // of a record made again from a configuration
			}
			if _, err := parseDigest(string(d)); err != nil {
				return err
			}
		}
	}
	for _, m := range r.Manifests {
		if _, err := parseDigest(string(m.Digest)); err != nil {
			return err
		}
	}
	return nil
}

// readConfig reads an image's configuration from its blob and verifies it.
func (s *Store) readConfig(id string) (imagespec.Image, error) {
	var config imagespec.Image
	text, err := readFile(s.dir.blob(digest.Digest(id)), s.config.Limits.DocumentBytes)
	if err != nil {
		return config, err
	}
	if got := digest.FromBytes(text); string(got) != id {
		return config, fmt.Errorf("its config blob has digest %s", got)
	}
	if err := json.NewDecoder(bytes.NewReader(text)).Decode(&config); err != nil {
		return config, err
	}
	for _, d := range config.RootFS.DiffIDs {
		if _, err := parseDigest(string(d)); err != nil {
			return config, err
		}
	}
	return config, nil
}

func (s *Store) missingLayer(r *imageRecord) digest.Digest {
	for _, l := range r.Layers {
		if s.layers[l.DiffID] == nil {
			return l.DiffID
		}
	}
	return ""
}

// settleNames gives each name to the record that got it last.
func (s *Store) settleNames() {
	newest := map[string]imageRef{}
	owner := map[string]string{}
	for id, r := range s.images {
		for _, ref := range r.Refs {
			s.lastSeq = max(s.lastSeq, ref.Seq)
			if now, taken := newest[ref.Name]; !taken || now.Seq < ref.Seq {
				newest[ref.Name], owner[ref.Name] = ref, id
			}
		}
	}
	for id, r := range s.images {
		r.Refs = slices.DeleteFunc(r.Refs, func(ref imageRef) bool { return owner[ref.Name] != id })
	}
	for _, r := range s.images {
		s.publish(r)
	}
}

package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/image/registry"
	"github.com/crisp-cri/crisp/image/unpack"
	"github.com/crisp-cri/crisp/runtime/sys"
)

// Config of a Store. A zero field has the default said there.
type Config struct {
	// Root is the store's directory, on a file system that overlayfs can use as
	// lower (ext4, xfs, btrfs, tmpfs). Required.
	Root string
	// RegistryConfigDir is a containerd-style certs.d directory. "": none.
	RegistryConfigDir string
	// KeepCompressed keeps the compressed layers in the OCI layout. Otherwise
	// only their descriptors are kept.
	KeepCompressed bool
	// StallTimeout is how long a download may wait for its next byte. Default 5 minutes.
	StallTimeout time.Duration
	// ParallelLayers is how many layers are fetched and unpacked at a time, over
	// all pulls. Default 4.
	ParallelLayers int
	// Pinned are references whose images the kubelet must not collect.
	Pinned []string
	// RealmHosts: see registry.Options.
	RealmHosts map[string][]string
	// UserAgent of requests to registries. Default "crisp".
	UserAgent string
	// Backoff between tries: see registry.Options.
	Backoff func(try int) time.Duration
	// Platforms to choose from an index, best first. Default: this machine's.
	Platforms []imagespec.Platform
	Limits    Limits
}

// Limits of what an image may be. A zero field has the default said there.
type Limits struct {
	DocumentBytes int64         // of a manifest, an index or a config; default 4 MiB
	Layers        int           // of an image; default 250 (overlayfs takes 500 lowers)
	ImageBytes    int64         // of all files unpacked; default 256 GiB
	ImageEntries  int64         // of all layers' archives; default 4 000 000
	Layer         unpack.Limits // of each layer
}

func (c Config) withDefaults() (Config, error) {
	if c.Root == "" || !strings.HasPrefix(c.Root, "/") {
		return c, fmt.Errorf("image store: root %q is no absolute path", c.Root)
	}
	setDefault(&c.StallTimeout, 5*time.Minute)
	setDefault(&c.ParallelLayers, 4)
	setDefault(&c.Limits.DocumentBytes, 4<<20)
	setDefault(&c.Limits.Layers, 250)
	setDefault(&c.Limits.ImageBytes, 256<<30)
	setDefault(&c.Limits.ImageEntries, 4_000_000)
	c.Limits.Layer = c.Limits.Layer.WithDefaults()
	if len(c.Platforms) == 0 {
		c.Platforms = hostPlatforms()
	}
	pinned := make([]string, 0, len(c.Pinned))
	for _, ref := range c.Pinned {
		parsed, err := parseRef(ref)
		if err != nil {
			return c, fmt.Errorf("image store: pinned: %w", err)
		}
		pinned = append(pinned, parsed.String())
	}
	c.Pinned = pinned
	return c, nil
}

func setDefault[T int | int64 | time.Duration](field *T, value T) {
	if *field <= 0 {
		*field = value
	}
}

// Store is the node's images. It implements Images. One process at a time has a
// store open; the layout of its directory is drawn in doc.go.
type Store struct {
	config   Config
	registry *registry.Client
	dir      layout
	lock     *os.File // flock(2): held while open

	ctx    context.Context // ends with Close; bounds everything below, no request
	cancel context.CancelFunc
	pulls  flights       // by reference and credentials
	fetch  flights       // by diffID
	slots  chan struct{} // one per layer being fetched; capacity ParallelLayers
	sweeps sync.WaitGroup

	placed atomic.Int64 // files and directories put in their places so far
	sync   sync.Mutex   // guards synced; held across syncfs
	synced int64        // the part of placed that is known to be on the disk

	// commit serialises what changes the directory: placing layers and blobs,
	// writing records, collecting garbage. Held across disk operations, so List
	// and its like never take it. Order: commit, then mu.
	commit sync.Mutex

	// mu guards what follows; never held across a system call.
	mu       sync.RWMutex
	images   map[string]*imageRecord // by id; records are immutable, and replaced
	names    map[string]string       // repo:tag and repo@digest to id, of the images that are not hidden
	layers   map[digest.Digest]*layerRecord
	holders  map[string]map[string]bool // holder to image ids
	busy     map[digest.Digest]int      // layers and blobs of pulls under way
	orphans  map[digest.Digest]bool     // layers of records that cannot be read: see findOrphans
	progress map[*pullProgress]bool
	received map[digest.Digest]*atomic.Int64 // bytes so far of the blobs being fetched
	problems []string
	lastSeq  uint64
}

var _ Images = (*Store)(nil)

// Open opens the store at config.Root, or makes it, and mends what a crash may have left:
// temporary files go, records that cannot be read are set aside (Problems), and
// layers that no record names are removed.
//
// Errors: the configuration's, another process that has it open, and those of
// the file system.
func Open(config Config) (*Store, error) {
	config, err := config.withDefaults()
	if err != nil {
		return nil, err
	}
	s := &Store{
		config: config,
		registry: registry.New(registry.Options{
			ConfigDir: config.RegistryConfigDir, UserAgent: config.UserAgent, StallTimeout: config.StallTimeout,
			Backoff: config.Backoff, RealmHosts: config.RealmHosts,
		}),
		dir:      layout(config.Root),
		slots:    make(chan struct{}, config.ParallelLayers),
		images:   map[string]*imageRecord{},
		names:    map[string]string{},
		layers:   map[digest.Digest]*layerRecord{},
		holders:  map[string]map[string]bool{},
		busy:     map[digest.Digest]int{},
		progress: map[*pullProgress]bool{},
		received: map[digest.Digest]*atomic.Int64{},
	}
	s.fetch.settle = true // a pull that failed has left nothing when it returns
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if err := s.dir.make(); err != nil {
		return nil, fmt.Errorf("cannot open image store %s: %w", config.Root, err)
	}
	if s.lock, err = sys.LockFile(s.dir.lock()); err != nil {
		return nil, fmt.Errorf("cannot open image store %s: %w", config.Root, err)
	}
	if err := s.load(); err != nil {
		_ = s.Close() // the error that counts is the first
		return nil, fmt.Errorf("cannot open image store %s: %w", config.Root, err)
	}
	return s, nil
}

// Close ends the pulls under way, waits for them, and gives the directory back.
func (s *Store) Close() error {
	s.cancel()
	s.pulls.close()
	s.fetch.close()
	s.sweeps.Wait()
	return s.lock.Close()
}

// Problems lists what Open set aside, for `crispd check` and the operator.
func (s *Store) Problems() []string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.Clone(s.problems)
}

// problem records something that was found broken and set aside.
func (s *Store) problem(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	klog.Background().Error(nil, "Found a broken part of the image store, going on without it", "problem", text)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.problems = append(s.problems, text)
}

// List implements Images.
func (s *Store) List() []Image {
	s.mu.RLock()
	list := make([]Image, 0, len(s.images))
	for _, r := range s.images {
		if !r.Hidden {
			list = append(list, r.view)
		}
	}
	s.mu.RUnlock()
	slices.SortFunc(list, func(a, b Image) int {
		if c := b.PulledAt.Compare(a.PulledAt); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	return list
}

// Resolve implements Images.
func (s *Store) Resolve(ref string) (Image, error) {
	parsed, parseErr := parseRef(ref)
	hex, isID := cutID(ref)
	s.mu.RLock()
	defer s.mu.RUnlock()
	if parseErr == nil {
		if id, ok := s.names[parsed.String()]; ok {
			return s.images[id].view, nil
		}
	}
	if isID {
		return s.byPrefixLocked("sha256:" + hex)
	}
	if parseErr != nil {
		return Image{}, parseErr
	}
	return Image{}, fmt.Errorf("%w: %s", ErrNotFound, parsed)
}

func (s *Store) byPrefixLocked(prefix string) (Image, error) {
	var match *imageRecord
	for id, r := range s.images {
		if r.Hidden || !strings.HasPrefix(id, prefix) {
			continue
		}
		if match != nil {
			return Image{}, fmt.Errorf("%w: %s is the beginning of several ids", ErrInvalidReference, prefix)
		}
		match = r
	}
	if match == nil {
		return Image{}, fmt.Errorf("%w: %s", ErrNotFound, prefix)
	}
	return match.view, nil
}

// Remove implements Images. It is durable when it returns; the space is freed
// by CollectGarbage.
func (s *Store) Remove(_ context.Context, ref string) error {
	s.commit.Lock()
	defer s.commit.Unlock()
	img, err := s.Resolve(ref)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	s.mu.RLock()
	gone := *s.images[img.ID]
	s.mu.RUnlock()
	// Kept on disk without names: a container may be using the layers, and after
	// a restart only this record tells which they are.
	gone.Refs, gone.Hidden = nil, true
	if err := s.saveRecord(&gone); err != nil {
		return fmt.Errorf("cannot remove image %s: %w", img.ID, err)
	}
	s.publish(&gone)
	return s.writeIndex()
}

// Usage implements Images. It counts what images that are listed or held need,
// from what was noted when they were unpacked: the disk is not looked at.
func (s *Store) Usage() (mountpoint string, bytes, inodes uint64, err error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	seen := map[digest.Digest]bool{}
	blob := func(d imagespec.Descriptor) {
		if !seen[d.Digest] {
			seen[d.Digest] = true
			bytes += uint64(d.Size)
			inodes++
		}
	}
	held := s.heldLocked()
	for id, r := range s.images {
		if r.Hidden && !held[id] {
			continue
		}
		for _, d := range append(slices.Clone(r.Manifests), r.Config) {
			blob(d)
		}
		for _, l := range r.Layers {
			if s.config.KeepCompressed && l.Blob.Digest != "" {
				blob(l.Blob)
			}
			if layer := s.layers[l.DiffID]; layer != nil && !seen[l.DiffID] {
				seen[l.DiffID] = true
				bytes += uint64(layer.Bytes)
				inodes += uint64(layer.Inodes)
			}
		}
	}
	return s.config.Root, bytes, inodes, nil
}

// heldLocked returns the ids of the images that have a holder.
func (s *Store) heldLocked() map[string]bool {
	held := map[string]bool{}
	for _, ids := range s.holders {
		for id := range ids {
			held[id] = true
		}
	}
	return held
}

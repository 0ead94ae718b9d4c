// Package image pulls, unpacks, stores and removes container images.
//
// (The full package documentation, with the layout on disk, is in doc.go.)
package image

import (
	"context"
	"time"

	"github.com/crisp-cri/crisp/image/fault"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Sentinels; every error of this package wraps one of them or is the host's
// (or our) fault. Their texts and precise meanings are in package fault, which
// the sub-packages share.
var (
	// ErrNotFound is returned when no image of the store matches, or the registry has no such manifest.
	ErrNotFound = fault.NotFound
	// ErrInvalidReference is returned for a reference, digest or user that cannot be parsed.
	ErrInvalidReference = fault.InvalidReference
	// ErrUnauthorized is returned when the registry refuses the credentials.
	ErrUnauthorized = fault.Unauthorized
	// ErrRegistryUnavailable is returned when no registry host could be reached or all answered 5xx/429.
	ErrRegistryUnavailable = fault.Unavailable
	// ErrCorrupt is returned when content does not match its digest, size, diffID or media type.
	ErrCorrupt = fault.Corrupt
	// ErrLimit is returned when an image exceeds a configured limit; the text names limit and value.
	ErrLimit = fault.Limit
	// ErrUnsupported is returned for a platform, media type or compression we do not know.
	ErrUnsupported = fault.Unsupported
)

// Auth are the credentials of one pull (CRI AuthConfig). They are sent only to
// the registry of the reference, to the token realm it names if that is https
// and in the registry's own domain, and, if ServerAddress is set, to that host in place of the
// registry's. Mirrors get none. Package registry has the details. Never logged,
// never stored.
type Auth struct {
	Username, Password string
	// Auth is base64("user:password"), used when Username is empty.
	Auth          string
	ServerAddress string // if set, the credentials are for this host only
	IdentityToken string // OAuth2 refresh token
	RegistryToken string // bearer token sent as is
}

// Image is one image of the store. Values handed out are snapshots; never
// modify the slices.
type Image struct {
	ID          string   // "sha256:<64 hex>": the config digest, the same everywhere CRI shows it
	RepoTags    []string // normalised: "docker.io/library/busybox:1", sorted
	RepoDigests []string // "docker.io/library/busybox@sha256:…", sorted
	Size        int64    // bytes: config and layers as pulled (compressed sizes); never 0
	Pinned      bool
	PulledAt    time.Time
	// Config is the OCI image config. Entrypoint, Cmd, Env, User, WorkingDir,
	// StopSignal, Volumes are in Config.Config.
	Config imagespec.Image
}

// Layers is what a container needs of an image: the lowers of its overlay,
// topmost first (the order overlayfs wants), as absolute paths. The root directory of the topmost
// has the owner and mode of the image's.
type Layers struct {
	ImageID string
	Lower   []string
}

// Images is the store's interface to podsandbox and cri. *Store implements it;
// podsandbox's tests use a fake.
type Images interface {
	// Pull makes ref available and returns the image id. Concurrent pulls of
	// the same content share downloads. ctx cancels the waiting; the transfer
	// itself stops when its last waiter is gone.
	Pull(ctx context.Context, ref string, auth *Auth) (id string, err error)
	// List returns all images from memory, newest first.
	List() []Image
	// Resolve finds an image by id (also truncated, unambiguous, with or
	// without "sha256:"), name, name:tag or name@digest. ErrNotFound if absent.
	Resolve(ref string) (Image, error)
	// Remove removes the image that ref resolves to with all its tags; unknown
	// is not an error. Layers that a container uses stay until it is removed.
	Remove(ctx context.Context, ref string) error
	// Usage of the image file system: the path, bytes and inodes used.
	Usage() (mountpoint string, bytes, inodes uint64, err error)
	// Acquire pins an image's layers for holder (a container id) until Release.
	// imageID is a whole id ("sha256:…"). Idempotent; a holder may pin several
	// images (root file system and image volumes). The pin is not persistent:
	// holders are told again at start by podsandbox before any garbage
	// collection runs, also those of images that were removed meanwhile.
	// ErrNotFound if there is no such image, or no holder kept a removed one.
	Acquire(imageID, holder string) (Layers, error)
	// Release is idempotent.
	Release(holder string)
	// CollectGarbage deletes layers and blobs that no image and no holder
	// uses. Called once after recovery and after each Remove.
	CollectGarbage(ctx context.Context) error
}

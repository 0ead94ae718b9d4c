// Package fault holds the sentinel errors that package image and its
// sub-packages (registry, unpack) share. Package image re-exports them; callers
// outside image use those names.
package fault

import "errors"

var (
	// NotFound is wrapped when a store or a registry has no such thing.
	NotFound = errors.New("image not found")
	// InvalidReference is wrapped when a reference, digest or user cannot be parsed.
	InvalidReference = errors.New("invalid image reference")
	// Unauthorized is wrapped when a registry refuses the credentials, or asks for some that we do not have or may not send.
	Unauthorized = errors.New("registry refused the credentials")
	// Unavailable is wrapped when no host could be reached, or all answered 5xx or 429.
	Unavailable = errors.New("registry unavailable")
	// Corrupt is wrapped when content does not match its digest, size, diffID or media type, or is no valid archive.
	Corrupt = errors.New("image content is corrupt")
	// Limit is wrapped when a configured limit is exceeded; the text names limit and value.
	Limit = errors.New("image exceeds a limit")
	// Unsupported is wrapped for a platform, media type, compression or archive entry that we do not know.
	Unsupported = errors.New("unsupported image")
)

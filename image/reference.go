package image

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// idPattern is an image id, whole or truncated, without "sha256:".
var idPattern = regexp.MustCompile(`^[0-9a-f]{3,64}$`)

// pullRef is a reference to pull: a repository, and a tag or a digest.
type pullRef struct {
	repo   reference.Named // "docker.io/library/busybox"
	tag    string          // "" if by digest
	digest digest.Digest   // "" if by tag
}

// parseRef normalises a reference as Kubernetes users know it: "busybox" is
// "docker.io/library/busybox:latest". With tag and digest the digest counts and
// the tag is dropped: nothing says that it still points there.
//
// Errors: ErrInvalidReference, ErrUnsupported for digests other than sha256.
func parseRef(ref string) (pullRef, error) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return pullRef{}, fmt.Errorf("%w %q: %v", ErrInvalidReference, clip(ref), err)
	}
	r := pullRef{repo: reference.TrimNamed(named)}
	if digested, ok := named.(reference.Digested); ok {
		r.digest, err = parseDigest(string(digested.Digest()))
		return r, err
	}
	r.tag = reference.TagNameOnly(named).(reference.Tagged).Tag()
	return r, nil
}

// parseDigest accepts "sha256:" and 64 lower-case hexadecimal digits and
// nothing else: digests become file names.
func parseDigest(s string) (digest.Digest, error) {
	d := digest.Digest(s)
	if err := d.Validate(); err != nil {
		return "", fmt.Errorf("%w: digest %q: %v", ErrInvalidReference, clip(s), err)
	}
	if d.Algorithm() != digest.SHA256 {
		return "", fmt.Errorf("%w: digest algorithm %q", ErrUnsupported, d.Algorithm())
	}
	return d, nil
}

// String returns "repo:tag" or "repo@digest".
func (r pullRef) String() string {
	if r.digest != "" {
		return r.withDigest(r.digest)
	}
	return r.repo.Name() + ":" + r.tag
}

func (r pullRef) withDigest(d digest.Digest) string { return r.repo.Name() + "@" + string(d) }

// tagOrDigest is what the registry is asked for.
func (r pullRef) tagOrDigest() string {
	if r.digest != "" {
		return string(r.digest)
	}
	return r.tag
}

// cutID returns the hexadecimal part of an image id, whole or truncated.
func cutID(ref string) (hex string, ok bool) {
	hex = strings.TrimPrefix(ref, "sha256:")
	return hex, idPattern.MatchString(hex)
}

// clip shortens foreign text for an error.
func clip(s string) string {
	if len(s) > 300 {
		return s[:300] + "..."
	}
	return s
}

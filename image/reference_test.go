package image

import (
	"errors"
	"strings"
	"testing"

	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
)

const hexDigits = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestParseRef(t *testing.T) {
	for _, tt := range []struct {
		in, want string
		err      error
	}{
		{"busybox", "docker.io/library/busybox:latest", nil},
		{"busybox:1", "docker.io/library/busybox:1", nil},
		{"user/app", "docker.io/user/app:latest", nil},
		{"index.docker.io/library/busybox", "docker.io/library/busybox:latest", nil},
		{"quay.io/a/b/c:tag", "quay.io/a/b/c:tag", nil},
		{"localhost:5000/app", "localhost:5000/app:latest", nil},
		{"localhost/app", "localhost/app:latest", nil},
		{"[::1]:5000/app:1", "[::1]:5000/app:1", nil},
		{"busybox@sha256:" + hexDigits, "docker.io/library/busybox@sha256:" + hexDigits, nil},
		{"busybox:1@sha256:" + hexDigits, "docker.io/library/busybox@sha256:" + hexDigits, nil},
		{"", "", ErrInvalidReference},
		{"Busybox", "", ErrInvalidReference},
		{"busybox:", "", ErrInvalidReference},
		{"busybox:" + strings.Repeat("t", 129), "", ErrInvalidReference},
		{"a b", "", ErrInvalidReference},
		{"../../etc/passwd", "", ErrInvalidReference},
		{"http://x/y", "", ErrInvalidReference},
		{hexDigits, "", ErrInvalidReference},
		{"app\x00", "", ErrInvalidReference},
	} {
		got, err := parseRef(tt.in)
		if !errors.Is(err, tt.err) {
			t.Errorf("%q: got error %v, want %v", tt.in, err, tt.err)
		} else if err == nil && got.String() != tt.want {
			t.Errorf("%q: got %s, want %s", tt.in, got, tt.want)
		}
	}
}

// TestSEC76Digests: what is no digest never becomes a file name.
func TestSEC76Digests(t *testing.T) {
	if _, err := parseDigest("sha256:" + hexDigits); err != nil {
		t.Error(err)
	}
	for _, in := range []string{
		"", "sha256", "sha256:", "sha256:../../x", "sha256:" + hexDigits[1:], "sha256:" + hexDigits + "0", "sha256:" + strings.ToUpper(hexDigits),
		"md5:d41d8cd98f00b204e9800998ecf8427e", "SHA256:" + hexDigits, "sha256:" + hexDigits + "\n", "sha512:" + hexDigits + hexDigits, "sha256+x:" + hexDigits,
	} {
		if _, err := parseDigest(in); !errors.Is(err, ErrInvalidReference) && !errors.Is(err, ErrUnsupported) {
			t.Errorf("%q: got %v, want an error", in, err)
		}
		for _, ref := range []string{"app@" + in, "app:1@" + in} {
			if _, err := parseRef(ref); err == nil {
				t.Errorf("%q: got no error", ref)
			}
		}
	}
}

func FuzzParseRef(f *testing.F) {
	for _, in := range []string{"busybox", "a/b:c@sha256:" + hexDigits, "[::1]:5/a", "localhost:5000/x", "..", "a//b", "sha256:" + hexDigits} {
		f.Add(in)
	}
	f.Fuzz(func(t *testing.T, in string) {
		ref, err := parseRef(in)
		if err != nil {
			return
		}
		again, err := parseRef(ref.String())
		if err != nil || again.String() != ref.String() {
			t.Errorf("%q is %q, and that is %q, %v", in, ref, again, err)
		}
		if strings.Contains(ref.String(), "..") && strings.Contains(ref.repo.Name(), "/../") {
			t.Errorf("%q leads up: %s", in, ref)
		}
	})
}

func TestRank(t *testing.T) {
	platforms := []imagespec.Platform{{OS: "linux", Architecture: "arm64"}, {OS: "linux", Architecture: "arm64", Variant: "v8"}, {OS: "linux", Architecture: "arm", Variant: "v7"}}
	for _, tt := range []struct {
		os, arch, variant string
		want              int
	}{
		{"linux", "arm64", "", 0}, {"linux", "arm64", "v8", 1}, {"linux", "arm", "v7", 2}, {"linux", "arm", "v6", -1},
		{"windows", "arm64", "", -1}, {"linux", "amd64", "", -1}, {"", "", "", 0}, {"unknown", "unknown", "", -1},
	} {
		if got := rank(platforms, imagespec.Platform{OS: tt.os, Architecture: tt.arch, Variant: tt.variant}); got != tt.want {
			t.Errorf("%s/%s/%s: got %d, want %d", tt.os, tt.arch, tt.variant, got, tt.want)
		}
	}
	if len(hostPlatforms()) == 0 {
		t.Error("this machine has no platform")
	}
}

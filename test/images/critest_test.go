package images

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// configs serves critest's images, made of this machine's busybox, and returns
// the config digest, which is the image id, of each name.
func configs(t *testing.T) (host string, ids map[string]string) {
	t.Helper()
	standin := filepath.Join(t.TempDir(), "standin")
	if err := os.WriteFile(standin, []byte("x"), 0o755); err != nil {
		t.Fatal(err)
	}
	all, err := Critest(standin, "/")
	if err != nil {
		t.Fatal(err)
	}
	reg, err := Serve("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := reg.Close(); err != nil {
			t.Error(err)
		}
	})
	ids = map[string]string{}
	for _, im := range all {
		if err := im.Push(reg.Host); err != nil {
			t.Fatal(err)
		}
		img, err := im.Build()
		if err != nil {
			t.Fatal(err)
		}
		id, err := img.ConfigName()
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range im.Names {
			if ids[n] != "" {
				t.Errorf("two images are called %s", n)
			}
			ids[n] = id.String()
		}
	}
	return reg.Host, ids
}

func TestCritest(t *testing.T) {
	host, ids := configs(t)

	// Which references critest expects to be one image, and which to be different ones.
	classes := [][]string{
		{e2e + "busybox:1.29-2", "docker/library/busybox:1"},
		{"docker/library/busybox:1-glibc"}, {"docker/library/busybox:1-musl"}, {"docker/library/busybox:1-uclibc"}, {"docker/library/busybox:1.35.0-glibc"},
		{tools + "test-image-1:latest"}, {tools + "test-image-2:latest"}, {tools + "test-image-3:latest"},
		{tools + "test-image-latest:latest"}, {tools + "test-image-tag:test"}, {tools + "test-image-tag:all"},
		{tools + "test-image-tags:1", tools + "test-image-tags:2", tools + "test-image-tags:3"},
		{tools + "test-image-digest:latest"}, {"pause:3.9"},
	}
	owner := map[string]string{}
	for _, class := range classes {
		id := ids[class[0]]
		if id == "" || owner[id] != "" {
			t.Errorf("%s: got id %q, also that of %q; want one of its own", class[0], id, owner[id])
		}
		owner[id] = class[0]
		for _, n := range class[1:] {
			if ids[n] != id {
				t.Errorf("%s: got id %s, want that of %s, %s", n, ids[n], class[0], id)
			}
		}
	}

	digest, err := CritestDigest()
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(host + "/" + tools + "test-image-digest@" + digest)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := remote.Index(ref); err != nil {
		t.Errorf("by digest: %v", err)
	}
}

func TestScriptsOnlyWhereAppletsLack(t *testing.T) {
	files, err := busyboxLayer("/")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, f := range files {
		if seen[f.Name] {
			t.Errorf("two entries %s", f.Name)
		}
		seen[f.Name] = true
	}
	for _, want := range []string{"sh", "top", "ls", "id", "ping", "brctl", "ipcs", "pgrep", "pidof", "netstat", "mount", "dd", "touch", "chmod", "hostname", "grep", "cat"} {
		if !seen["bin/"+want] {
			t.Errorf("no %s, which critest runs", want)
		}
	}
}

func TestParseURIs(t *testing.T) {
	sum := strings.Repeat("0a", 32)
	for _, c := range []struct {
		name, in string
		want     []deb
		ok       bool
	}{
		{"two", "'http://h/a_1%3a2.deb' a_1%3a2_amd64.deb 10 SHA256:" + sum + "\n'http://h/b.deb' b_2_amd64.deb 9 SHA256:" + sum + "\n",
			[]deb{{"a", "a_1%3a2_amd64.deb", sum}, {"b", "b_2_amd64.deb", sum}}, true},
		{"a warning", "W: something\n", nil, true},
		{"nothing", "", nil, true},
		{"another digest", "'u' a_1.deb 10 MD5Sum:0a\n", nil, false},
		{"no digest", "'u' a_1.deb 10\n", nil, false},
		{"short digest", "'u' a_1.deb 10 SHA256:0a0a\n", nil, false},
		{"a path", "'u' ../a_1.deb 10 SHA256:" + sum + "\n", nil, false},
	} {
		got, err := parseURIs(c.in)
		if (err == nil) != c.ok || !slices.Equal(got, c.want) {
			t.Errorf("%s: got %v, %v; want %v, ok %v", c.name, got, err, c.want, c.ok)
		}
	}
}

func TestFindFollowsNoAbsoluteLink(t *testing.T) {
	dir := t.TempDir()
	for _, err := range []error{
		os.WriteFile(dir+"/real", nil, 0o644),
		os.Symlink("real", dir+"/relative"),
		os.Symlink("/bin/sh", dir+"/absolute"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"real", "relative"} {
		if got, err := find(name, dir+"/no", dir); err != nil || got != dir+"/"+name {
			t.Errorf("%s: got %q, %v", name, got, err)
		}
	}
	for _, name := range []string{"absolute", "missing"} {
		if got, err := find(name, dir); err == nil {
			t.Errorf("%s: got %q, want an error", name, got)
		}
	}
}

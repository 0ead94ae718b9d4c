package images

import (
	"fmt"
	"runtime"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// critest's images are below two repositories' names, whatever the registry.
const (
	e2e   = "e2e-test-images/"
	tools = "k8s-staging-cri-tools/"
)

// Critest are the images that critest 1.36 pulls, under the names it has built
// in, without their registries' ([WriteDefaultHosts]). What it asks of each is
// said beside it. standin is the binary that [BuildStandin] makes; root holds
// Debian's packages [BusyboxPackages].
func Critest(standin, root string) ([]*Image, error) {
	base, err := busyboxLayer(root)
	if err != nil {
		return nil, fmt.Errorf("cannot make critest's images: %w", err)
	}
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	shell := v1.Config{Cmd: []string{"sh"}, Env: env}
	program := func(argv ...string) v1.Config { return v1.Config{Entrypoint: argv, Env: env} }
	user := func(u string) v1.Config { c := shell; c.User = u; return c }
	layer := func(f ...File) []File { return f }
	note := func(text string) []File {
		return layer(File{Name: "etc", Dir: true}, File{Name: "etc/image", Text: text + "\n"})
	}

	return []*Image{
		// Run by nearly every spec, with its shell and tools.
		{Names: []string{e2e + "busybox:1.29-2", "docker/library/busybox:1"}, Layers: [][]File{base}, Config: shell},
		// Listed by the benchmark of images: different ones.
		{Names: []string{"docker/library/busybox:1-glibc"}, Layers: [][]File{base, note("glibc")}, Config: shell},
		{Names: []string{"docker/library/busybox:1-musl"}, Layers: [][]File{base, note("musl")}, Config: shell},
		{Names: []string{"docker/library/busybox:1-uclibc"}, Layers: [][]File{base, note("uclibc")}, Config: shell, OCI: true},
		{Names: []string{"docker/library/busybox:1.35.0-glibc"}, Layers: [][]File{base, note("1.35.0-glibc")}, Config: shell},

		// Network, host PID and shared PID specs: port 80, a shell, a process named nginx.
		{Names: []string{e2e + "nginx:1.14-2"}, Config: program("/usr/sbin/nginx"), Layers: [][]File{base, layer(
			File{Name: "usr/sbin", Dir: true}, File{Name: "usr/sbin/nginx", FromHost: standin}, File{Name: "var/run", Dir: true})}},
		// In the host's network. A bare manifest, unlike all others.
		{Names: []string{tools + "hostnet-nginx-" + runtime.GOARCH + ":latest"}, Bare: true, Config: program("/usr/sbin/nginx", "12003"), Layers: [][]File{base, layer(
			File{Name: "usr/sbin", Dir: true}, File{Name: "usr/sbin/nginx", FromHost: standin}, File{Name: "var/run", Dir: true})}},
		// Port 80, its name in the log, echo.
		{Names: []string{e2e + "httpd:2.4.39-4"}, Config: program("/usr/local/bin/httpd"), Layers: [][]File{base, layer(
			File{Name: "usr/local", Dir: true}, File{Name: "usr/local/bin", Dir: true}, File{Name: "usr/local/bin/httpd", FromHost: standin})}},
		// no_new_privs: a set-user-ID program.
		{Names: []string{e2e + "nonewprivs:1.3"}, Config: program("/nnp"), Layers: [][]File{layer(
			File{Name: "nnp", FromHost: standin, Mode: 0o4755})}},

		// User of the image, as ImageStatus tells it.
		{Names: []string{tools + "test-image-user-uid:latest"}, Layers: [][]File{base}, Config: user("1002")},
		{Names: []string{tools + "test-image-user-username:latest"}, Layers: [][]File{base}, Config: user("www-data")},
		{Names: []string{tools + "test-image-user-uid-group:latest"}, Layers: [][]File{base}, Config: user("1003:1004")},
		{Names: []string{tools + "test-image-user-username-group:latest"}, Layers: [][]File{base}, Config: user("www-data:1004")},
		// A user who is in a group of the image's /etc/group, by a second layer.
		{Names: []string{tools + "test-image-predefined-group:latest"}, Config: user("1000"), Layers: [][]File{base, layer(
			File{Name: "etc", Dir: true},
			File{Name: "etc/passwd", Text: passwd + "default-user:x:1000:1000::/home/default-user:/bin/sh\n"},
			File{Name: "etc/group", Text: group + "default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n"})}},

		// Pulled, listed and removed; tag:test is also run and mounted as a volume.
		{Names: []string{tools + "test-image-1:latest"}, Layers: [][]File{base, note("1")}, Config: shell},
		{Names: []string{tools + "test-image-2:latest"}, Layers: [][]File{base, note("2")}, Config: shell},
		{Names: []string{tools + "test-image-3:latest"}, Layers: [][]File{base, note("3")}, Config: shell, OCI: true},
		{Names: []string{tools + "test-image-latest:latest"}, Layers: [][]File{base, note("latest")}, Config: shell},
		{Names: []string{tools + "test-image-tag:test"}, Layers: [][]File{base, note("test")}, Config: shell},
		{Names: []string{tools + "test-image-tag:all"}, Layers: [][]File{base, note("all")}, Config: shell},
		// One image, three tags.
		{Names: []string{tools + "test-image-tags:1", tools + "test-image-tags:2", tools + "test-image-tags:3"},
			Layers: [][]File{base, note("tags")}, Config: shell},
		critestDigest(),
		// Pulled under two registries' names: one image. Also run.
		{Names: []string{"pause:3.9"}, Config: program("/pause"), Layers: [][]File{layer(
			File{Name: "pause", FromHost: standin})}},
	}, nil
}

// critestDigest is pulled by digest and never run. Its layers are of texts and not
// compressed, so the digest depends neither on Debian's packages nor on a compressor.
func critestDigest() *Image {
	return &Image{
		Names:        []string{tools + "test-image-digest:latest"},
		Uncompressed: true,
		Layers:       [][]File{slices.Clone(accounts), {{Name: "etc/image", Text: "digest\n"}}},
		Config:       v1.Config{Cmd: []string{"/bin/sh"}},
	}
}

// CritestDigest is the digest by which critest pulls the image test-image-digest
// here, "sha256:…". The one it has built in is of an image that cannot be made again.
func CritestDigest() (string, error) {
	im := critestDigest()
	img, err := im.Build()
	if err != nil {
		return "", err
	}
	d, err := im.index(img).Digest()
	return d.String(), err
}

package images

import (
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

var platform = v1.Platform{OS: "linux", Architecture: runtime.GOARCH}

// The users that tests run as. Names and ids are Debian's.
const (
	passwd = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"
	group  = "root:x:0:\nusers:x:100:nobody\nwww-data:x:33:\nnogroup:x:65534:\n"
)

// accounts is the beginning of an image's root: users, and where they may write.
var accounts = []File{
	{Name: "etc", Dir: true},
	{Name: "etc/passwd", Text: passwd},
	{Name: "etc/group", Text: group},
	{Name: "root", Dir: true, Mode: 0o700},
	{Name: "tmp", Dir: true, Mode: 0o1777},
}

// BuildPayload builds test/payload, static, into dir and returns its path.
func BuildPayload(dir string) (string, error) { return build(dir, "payload", "test/payload") }

// BuildStandin builds test/images/standin, static, into dir and returns its path.
func BuildStandin(dir string) (string, error) { return build(dir, "standin", "test/images/standin") }

func build(dir, name, folder string) (string, error) {
	out := filepath.Join(dir, name)
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", out, "github.com/crisp-cri/crisp/"+folder)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("cannot build %s: %w\n%s", name, err, msg)
	}
	return out, nil
}

// Payload is the image of the project's own static binary, which is at
// binary: two layers, the second with the binary, OCI media types.
func Payload(binary string) *Image {
	return &Image{
		Names:  []string{"crisp/payload:1"},
		OCI:    true,
		Layers: [][]File{accounts, {{Name: "payload", FromHost: binary}}},
		Config: v1.Config{Entrypoint: []string{"/payload"}, Cmd: []string{"sleep"}, Env: []string{"PATH=/"}, WorkingDir: "/"},
	}
}

// Busybox is Debian's dynamic busybox with its libraries, found on this machine
// (package busybox); every applet is a hard link to it.
func Busybox() (*Image, error) {
	files, err := busyboxLayer("/")
	if err != nil {
		return nil, fmt.Errorf("cannot make the busybox image: %w (install Debian's package busybox)", err)
	}
	return &Image{
		Names:  []string{"e2e-test-images/busybox:1.29-2", "docker/library/busybox:1"},
		Layers: [][]File{files},
		Config: v1.Config{Cmd: []string{"sh"}, Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}},
	}, nil
}

// BusyboxPackages are the Debian packages of which [Critest] takes its busybox, for [Debian].
func BusyboxPackages() []string { return []string{"busybox", "libc6"} }

// busyboxLayer is the root filesystem of images with a shell, made of the busybox
// and libraries below root. Applets are hard links, as in the upstream image, where tests mask
// one; the static flavour would run them inside the shell all the same. What
// Debian's lacks of the applets that critest runs is a script.
func busyboxLayer(root string) ([]File, error) {
	binary, err := find("busybox", filepath.Join(root, "usr/bin"), filepath.Join(root, "bin"))
	if err != nil {
		return nil, err
	}
	libs, err := libraries(root, binary)
	if err != nil {
		return nil, err
	}
	if len(libs) == 0 {
		return nil, fmt.Errorf("%s is static: want Debian's package busybox, not busybox-static", binary)
	}
	list, err := applets(binary, libs)
	if err != nil {
		return nil, err
	}
	files := slices.Clone(accounts)
	for _, dir := range []string{"bin", "lib", "lib64", "var", "var/www", "usr", "usr/bin"} {
		files = append(files, File{Name: dir, Dir: true})
	}
	files = append(files, File{Name: "bin/busybox", FromHost: binary})
	for _, applet := range list {
		if applet != "busybox" {
			files = append(files, File{Name: "bin/" + applet, HardLink: "bin/busybox"})
		}
	}
	for _, script := range []File{
		{Name: "bin/ipcs", Text: "#!/bin/sh\nexec cat /proc/sysvipc/shm\n", Mode: 0o755}, // ipcs -m
		{Name: "bin/pgrep", Text: "#!/bin/sh\nexec pidof \"$1\"\n", Mode: 0o755},
	} {
		if !slices.Contains(list, filepath.Base(script.Name)) {
			files = append(files, script)
		}
	}
	return append(files, libs...), nil
}

// applets asks the busybox at binary for its applets. It is run by its own
// interpreter and libraries, the first of libs: this machine's may be older.
func applets(binary string, libs []File) ([]string, error) {
	args := []string{binary, "--list"}
	var dirs []string
	for _, l := range libs[1:] {
		dirs = append(dirs, filepath.Dir(l.FromHost))
	}
	args = append([]string{"--library-path", strings.Join(dirs, ":")}, args...)
	list, err := exec.Command(libs[0].FromHost, args...).Output()
	if err != nil {
		return nil, fmt.Errorf("%s --list: %w", binary, err)
	}
	return strings.Fields(string(list)), nil
}

// find looks for a regular file of this name in dirs. An absolute link would lead out
// of a tree that is not this machine's own, so it is not followed.
func find(name string, dirs ...string) (string, error) {
	for _, d := range dirs {
		path := filepath.Join(d, name)
		if to, err := os.Readlink(path); err == nil && filepath.IsAbs(to) {
			continue
		}
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			return path, nil
		}
	}
	return "", fmt.Errorf("no %s in %v", name, dirs)
}

// libraries are the ELF interpreter of binary, first, and the shared objects it
// needs, theirs too, found below root and put where the interpreter looks for
// them. A static binary has none.
func libraries(root, binary string) ([]File, error) {
	dirs, err := filepath.Glob(filepath.Join(root, "lib/*-linux-gnu"))
	if err != nil {
		return nil, err
	}
	dirs = append(dirs, filepath.Join(root, "lib64"), filepath.Join(root, "lib"), filepath.Join(root, "usr/lib"))
	var files []File
	seen := map[string]bool{}
	queue := []string{binary}
	for len(queue) > 0 {
		path := queue[0]
		queue = queue[1:]
		f, err := elf.Open(path)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		needed, err := f.ImportedLibraries()
		interp := interpreter(f)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		want := []File{}
		if interp != "" {
			want = append(want, File{Name: strings.TrimPrefix(interp, "/")})
		}
		for _, lib := range needed {
			want = append(want, File{Name: "lib/" + lib})
		}
		for _, lib := range want {
			base := filepath.Base(lib.Name)
			if seen[base] {
				continue
			}
			seen[base] = true
			if lib.FromHost, err = find(base, dirs...); err != nil {
				return nil, fmt.Errorf("%s needs %s: %w", path, base, err)
			}
			files = append(files, lib)
			queue = append(queue, lib.FromHost)
		}
	}
	return files, nil
}

// interpreter is the PT_INTERP of f, "" when it is static.
func interpreter(f *elf.File) string {
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			text := make([]byte, min(p.Filesz, 256))
			if _, err := p.ReadAt(text, 0); err == nil {
				return strings.TrimRight(string(text), "\x00")
			}
		}
	}
	return ""
}

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

// accounts are the users that tests run as. Names and ids are Debian's.
var accounts = []File{
	{Name: "etc", Dir: true},
	{Name: "etc/passwd", Text: "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"},
	{Name: "etc/group", Text: "root:x:0:\nusers:x:100:nobody\nwww-data:x:33:\nnogroup:x:65534:\n"},
	{Name: "root", Dir: true, Mode: 0o700},
	{Name: "tmp", Dir: true, Mode: 0o1777},
}

// BuildPayload builds test/payload, static, into dir and returns its path.
func BuildPayload(dir string) (string, error) {
	out := filepath.Join(dir, "payload")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, "github.com/crisp-cri/crisp/test/payload")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("cannot build payload: %w\n%s", err, msg)
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
	binary, err := exec.LookPath("busybox")
	if err != nil {
		return nil, fmt.Errorf("cannot make the busybox image: %w (install Debian's package busybox)", err)
	}
	list, err := exec.Command(binary, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("cannot make the busybox image: busybox --list: %w", err)
	}
	files := slices.Clone(accounts)
	for _, dir := range []string{"bin", "lib", "lib64", "var", "var/www", "usr", "usr/bin"} {
		files = append(files, File{Name: dir, Dir: true})
	}
	files = append(files, File{Name: "bin/busybox", FromHost: binary})
	for _, applet := range strings.Fields(string(list)) {
		if applet != "busybox" {
			files = append(files, File{Name: "bin/" + applet, HardLink: "bin/busybox"})
		}
	}
	libs, err := libraries(binary)
	if err != nil {
		return nil, fmt.Errorf("cannot make the busybox image: %w", err)
	}
	files = append(files, libs...)
	return &Image{
		Names:  []string{"e2e-test-images/busybox:1.29-2", "docker/library/busybox:1"},
		Layers: [][]File{files},
		Config: v1.Config{Cmd: []string{"sh"}, Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}},
	}, nil
}

// libraries are the ELF interpreter of binary and the shared objects it needs,
// theirs too, at places where the interpreter looks for them.
func libraries(binary string) ([]File, error) {
	dirs, err := filepath.Glob("/lib/*-linux-gnu")
	if err != nil {
		return nil, err
	}
	dirs = append(dirs, "/lib64", "/lib", "/usr/lib")
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
		if interp != "" && !seen[filepath.Base(interp)] {
			seen[filepath.Base(interp)] = true
			files = append(files, File{Name: strings.TrimPrefix(interp, "/"), FromHost: interp})
		}
		for _, lib := range needed {
			if seen[lib] {
				continue
			}
			seen[lib] = true
			i := slices.IndexFunc(dirs, func(d string) bool { _, err := os.Stat(filepath.Join(d, lib)); return err == nil })
			if i < 0 {
				return nil, fmt.Errorf("%s needs %s, which is nowhere in %v", path, lib, dirs)
			}
			from := filepath.Join(dirs[i], lib)
			files = append(files, File{Name: "lib/" + lib, FromHost: from})
			queue = append(queue, from)
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

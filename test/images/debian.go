package images

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Debian fetches Debian packages of this machine's release, without those they
// depend on, and unpacks them into one directory of the user's cache, which it
// returns; what a package does when it is installed is not done. The directory
// is named by the packages' digests: the same packages are fetched once. It may be
// called by several processes at a time.
//
// Where CRISP_TEST_DEBIAN is set, it is the root of a system that has them all
// installed, and nothing is fetched: in the guest nothing can be.
func Debian(packages ...string) (root string, err error) {
	if root := os.Getenv("CRISP_TEST_DEBIAN"); root != "" {
		return root, nil
	}
	debs, err := describe(packages)
	if err != nil {
		return "", fmt.Errorf("cannot fetch Debian packages: %w", err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("cannot fetch Debian packages: %w", err)
	}
	cache = filepath.Join(cache, "crisp-test")
	key := sha256.New()
	for _, d := range debs {
		key.Write([]byte(d.sha256))
	}
	root = filepath.Join(cache, "debian-"+hex.EncodeToString(key.Sum(nil))[:32])
	if _, err := os.Stat(root); err == nil {
		return root, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", fmt.Errorf("cannot fetch Debian packages: %w", err)
	}
	// Unpacked beside its final place; whoever renames first has made it.
	temp, err := os.MkdirTemp(cache, "unpack-")
	if err != nil {
		return "", fmt.Errorf("cannot fetch Debian packages: %w", err)
	}
	defer os.RemoveAll(temp)
	tree := filepath.Join(temp, "root")
	if err := fetch(debs, temp, tree); err != nil {
		return "", fmt.Errorf("cannot fetch Debian packages: %w", err)
	}
	if err := os.Rename(tree, root); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("cannot fetch Debian packages: %w", err)
	}
	return root, nil
}

// deb is a package as apt would fetch it.
type deb struct {
	name, file string
	sha256     string // hexadecimal
}

// describe asks apt what it would fetch; that needs no network.
func describe(packages []string) ([]deb, error) {
	text, err := command("", "apt-get", append([]string{"download", "--print-uris"}, packages...)...)
	if err != nil {
		if os.Geteuid() != 0 {
			return nil, fmt.Errorf("%w\n(without package lists? run apt-get update as root)", err)
		}
		if _, err := command("", "apt-get", "update", "-qq"); err != nil {
			return nil, err
		}
		if text, err = command("", "apt-get", append([]string{"download", "--print-uris"}, packages...)...); err != nil {
			return nil, err
		}
	}
	debs, err := parseURIs(text)
	if err == nil && len(debs) != len(packages) {
		err = fmt.Errorf("apt-get knows %d of the %d packages %v", len(debs), len(packages), packages)
	}
	return debs, err
}

// parseURIs reads apt-get --print-uris (apt-get(8)): 'URI' FILE SIZE SHA256:HEX.
func parseURIs(text string) (debs []deb, err error) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 0 || !strings.HasPrefix(f[0], "'") {
			continue // a warning
		}
		digest, ok := "", false
		if len(f) == 4 {
			digest, ok = strings.CutPrefix(f[3], "SHA256:")
		}
		if sum, err := hex.DecodeString(digest); !ok || err != nil || len(sum) != sha256.Size || filepath.Base(f[1]) != f[1] {
			return nil, fmt.Errorf("apt-get --print-uris: want 'URI' FILE SIZE SHA256:HEX, got %q", strings.TrimSpace(line))
		}
		name, _, _ := strings.Cut(f[1], "_")
		debs = append(debs, deb{name: name, file: f[1], sha256: digest})
	}
	return debs, nil
}

// fetch downloads debs into dir and unpacks them into tree.
func fetch(debs []deb, dir, tree string) error {
	for _, d := range debs {
		if _, err := command(dir, "apt-get", "download", "-qq", d.name); err != nil {
			return err
		}
		file := filepath.Join(dir, d.file)
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != d.sha256 {
			return fmt.Errorf("%s: got sha256 %x, want %s", d.file, sum, d.sha256)
		}
		if _, err := command("", "dpkg-deb", "--extract", file, tree); err != nil {
			return err
		}
	}
	return nil
}

// command runs a program in dir and returns its stdout; what it said is in the error.
func command(dir, name string, args ...string) (string, error) {
	var out, said bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &out, &said
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, strings.TrimSpace(said.String()))
	}
	return out.String(), nil
}

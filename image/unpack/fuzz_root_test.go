package unpack

import (
	"os"
	"path/filepath"
	"testing"

	it "github.com/crisp-cri/crisp/image/imagetest"
)

// FuzzLayer unpacks any bytes: nothing outside changes, and what was unpacked can
// be removed.
func FuzzLayer(f *testing.F) {
	if os.Geteuid() != 0 {
		f.Skip("needs root: entries have owners, devices and trusted attributes")
	}
	for _, b := range breakouts {
		archive := it.Tar(with(b.before, b.layer...)...)
		f.Add(archive)
	}
	f.Add(it.Compress(it.Gzip, it.Tar(it.File("f", "x", 0o644))))
	f.Add(it.Compress(it.Zstd, it.Tar(it.Char("c", 0o600, 1, 3), it.File(".wh.x", "", 0), it.Dir("x", 0o755).Xattr("user.a", "b"))))
	f.Fuzz(func(t *testing.T, archive []byte) {
		root := filepath.Join(t.TempDir(), "layer", "fs")
		if err := os.MkdirAll(root, 0o700); err != nil {
			t.Fatal(err)
		}
		c := newCanary(t, root)
		_, _ = unpackInto(root, archive, Limits{Entries: 1000})
		c.check(t)
		if err := os.RemoveAll(root); err != nil {
			t.Error(err)
		}
	})
}

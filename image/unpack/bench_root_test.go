package unpack

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/crisp-cri/crisp/image/imagetest"
)

// benchLayer is like a distribution's: 5 000 small files in 250 directories, 4 large ones.
func benchLayer() []byte {
	rng := rand.New(rand.NewPCG(1, 2))
	text := make([]byte, 8<<20)
	for i := range text {
		text[i] = byte("etaoin shrdlu\n"[rng.IntN(14)])
	}
	var entries []imagetest.Entry
	for d := range 250 {
		entries = append(entries, imagetest.Dir(fmt.Sprintf("usr/share/d%d", d), 0o755))
		for f := range 20 {
			at := rng.IntN(len(text) - 32<<10)
			entries = append(entries, imagetest.File(fmt.Sprintf("usr/share/d%d/file%d", d, f), string(text[at:at+rng.IntN(16<<10)]), 0o644))
		}
	}
	for f := range 4 {
		entries = append(entries, imagetest.File(fmt.Sprintf("usr/lib/big%d", f), string(text), 0o755))
	}
	return imagetest.Tar(entries...)
}

func BenchmarkLayer(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root: unpacking sets owners")
	}
	archive := benchLayer()
	for _, how := range []struct {
		name string
		as   imagetest.Compression
	}{{"tar", imagetest.None}, {"gzip", imagetest.Gzip}, {"zstd", imagetest.Zstd}} {
		blob := imagetest.Compress(how.as, archive)
		b.Run(how.name, func(b *testing.B) {
			b.SetBytes(int64(len(archive)))
			top := b.TempDir()
			for i := range b.N {
				root := filepath.Join(top, fmt.Sprint(i))
				if err := os.Mkdir(root, 0o700); err != nil {
					b.Fatal(err)
				}
				open := func(context.Context) io.Reader { return bytes.NewReader(blob) }
				if _, err := Layer(b.Context(), open, root, Limits{}, NewBudget(1<<40, 1<<30)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

package unpack

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"

	"github.com/crisp-cri/crisp/image/fault"
	it "github.com/crisp-cri/crisp/image/imagetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestDigest(t *testing.T) {
	text := make([]byte, 3*blockSize+17)
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range text {
		text[i] = byte(rng.IntN(8))
	}
	errSource := errors.New("the network broke")
	gz, z := it.Compress(it.Gzip, text), it.Compress(it.Zstd, text)
	skippable := append([]byte{0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4}, z...) // as zstd:chunked has
	for _, tt := range []struct {
		name string
		in   io.Reader
		want error
	}{
		{"plain", bytes.NewReader(text), nil},
		{"gzip", bytes.NewReader(gz), nil},
		{"zstd", bytes.NewReader(z), nil},
		{"zstd after a skippable frame", bytes.NewReader(skippable), nil},
		{"gzip in two members", io.MultiReader(bytes.NewReader(it.Compress(it.Gzip, text[:1000])), bytes.NewReader(it.Compress(it.Gzip, text[1000:]))), nil},
		{"byte by byte", iotest.OneByteReader(bytes.NewReader(gz)), nil},
		{"truncated gzip", bytes.NewReader(gz[:len(gz)-10]), fault.Corrupt},
		{"truncated zstd", bytes.NewReader(z[:len(z)-10]), fault.Corrupt},
		{"gzip with garbage after", io.MultiReader(bytes.NewReader(gz), strings.NewReader("garbage")), fault.Corrupt},
		{"gzip with a wrong checksum", bytes.NewReader(append(bytes.Clone(gz[:len(gz)-8]), make([]byte, 8)...)), fault.Corrupt},
		{"zstd with garbage in it", bytes.NewReader(append(bytes.Clone(z[:200]), make([]byte, 5000)...)), fault.Corrupt},
		{"broken source", io.MultiReader(bytes.NewReader(gz[:2000]), iotest.ErrReader(errSource)), errSource},
		{"broken source at once", iotest.ErrReader(errSource), errSource},
		{"source that fails at its end", io.MultiReader(bytes.NewReader(gz), iotest.ErrReader(errSource)), errSource},
		{"more than the limit", io.LimitReader(zeros{}, 8<<30), fault.Limit},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Digest(t.Context(), func(context.Context) io.Reader { return tt.in }, Limits{Entries: 10}, NewBudget(4<<20, 1))
			if !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
			if err == nil && got != digest.FromBytes(text) {
				t.Errorf("got %s", got)
			}
		})
	}
}

package unpack

import (
	"fmt"
	"sync/atomic"

	"github.com/crisp-cri/crisp/image/fault"
)

// Limits of one layer. A zero field has the default said there.
type Limits struct {
	Entries    int64 // archive entries; default 2 000 000
	PathLength int   // bytes of a cleaned entry name; default 4095 (PATH_MAX)
	Depth      int   // nested directories; default 2048
	Xattrs     int   // extended attributes of one entry; default 128
	XattrBytes int   // names and values of one entry together; default 256 KiB
	Window     int64 // zstd window, bytes; default 128 MiB (zstd --long=27)
}

// WithDefaults fills in zero fields.
func (l Limits) WithDefaults() Limits {
	setDefault(&l.Entries, 2_000_000)
	setDefault(&l.PathLength, 4095)
	setDefault(&l.Depth, 2048)
	setDefault(&l.Xattrs, 128)
	setDefault(&l.XattrBytes, 256<<10)
	setDefault(&l.Window, 128<<20)
	return l
}

func setDefault[T int | int64](field *T, value T) {
	if *field <= 0 {
		*field = value
	}
}

// Budget is what all layers of one image may use together. Safe for concurrent use.
type Budget struct {
	maxBytes, maxEntries int64
	bytes, entries       atomic.Int64
}

// NewBudget returns a budget of unpacked bytes and of entries.
func NewBudget(maxBytes, maxEntries int64) *Budget {
	return &Budget{maxBytes: maxBytes, maxEntries: maxEntries}
}

func (b *Budget) takeBytes(n int64) error {
	if n < 0 || n > b.maxBytes || b.bytes.Add(n) > b.maxBytes {
		return fmt.Errorf("%w: unpacked size is more than %d bytes", fault.Limit, b.maxBytes)
	}
	return nil
}

func (b *Budget) takeEntry() error {
	if b.entries.Add(1) > b.maxEntries {
		return fmt.Errorf("%w: the image has more than %d entries", fault.Limit, b.maxEntries)
	}
	return nil
}

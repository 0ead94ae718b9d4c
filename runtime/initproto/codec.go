package initproto

import (
	"encoding/binary"
	"errors"
)

// ErrMalformed is returned when a body does not decode: it is cut short, too
// long, or says it has more elements than bytes.
var ErrMalformed = errors.New("malformed message")

// encoder appends values to a body: integers as varints, strings and lists
// with their length in front.
type encoder struct{ b []byte }

func (e *encoder) uint(v uint64) { e.b = binary.AppendUvarint(e.b, v) }
func (e *encoder) int(v int64)   { e.b = binary.AppendVarint(e.b, v) }
func (e *encoder) bool(v bool) {
	if v {
		e.uint(1)
	} else {
		e.uint(0)
	}
}
func (e *encoder) string(s string) {
	e.uint(uint64(len(s)))
	e.b = append(e.b, s...)
}
func (e *encoder) bytes(s []byte) {
	e.uint(uint64(len(s)))
	e.b = append(e.b, s...)
}
func (e *encoder) strings(l []string) { list(e, l, (*encoder).string) }

func list[T any](e *encoder, l []T, one func(*encoder, T)) {
	e.uint(uint64(len(l)))
	for _, v := range l {
		one(e, v)
	}
}

// decoder takes values from a body; after the first error everything is zero
// and err says so.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) fail() { d.b, d.err = nil, ErrMalformed }

func (d *decoder) uint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.fail()
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) int() int64 {
	v, n := binary.Varint(d.b)
	if n <= 0 {
		d.fail()
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) bool() bool { return d.uint() != 0 }

func (d *decoder) bytes() []byte {
	n := d.uint()
	if n > uint64(len(d.b)) {
		d.fail()
		return nil
	}
	s := d.b[:n:n]
	d.b = d.b[n:]
	return s
}

func (d *decoder) string() string { return string(d.bytes()) }

func (d *decoder) strings() []string { return unlist(d, (*decoder).string) }

// unlist reads a list. An element takes at least one byte, so a length beyond the
// rest of the body is a lie and nothing is allocated for it.
func unlist[T any](d *decoder, one func(*decoder) T) []T {
	n := d.uint()
	if n > uint64(len(d.b)) {
		d.fail()
		return nil
	}
	if n == 0 {
		return nil
	}
	l := make([]T, 0, min(n, 1024))
	for range n {
		v := one(d)
		if d.err != nil {
			return nil
		}
		l = append(l, v)
	}
	return l
}

// end reports whether the whole body was read without an error.
func (d *decoder) end() error {
	if d.err == nil && len(d.b) != 0 {
		d.fail()
	}
	return d.err
}

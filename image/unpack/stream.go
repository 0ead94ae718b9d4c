package unpack

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/crisp-cri/crisp/image/fault"
)

const (
	blockSize = 256 << 10 // bytes handed from the inflating goroutine to the archive's reader
	blocks    = 8         // of these in flight: the two stages may drift apart by 2 MiB
)

// stream inflates and hashes in a goroutine of its own, ahead of its reader.
type stream struct {
	full    chan []byte   // inflater to reader; closed by the inflater when it is done
	free    chan []byte   // reader to inflater; never closed
	quit    chan struct{} // closed by close
	stopped chan struct{} // closed when the inflater has returned

	current []byte // rest of the block being read
	block   []byte // whole block that current is part of
	failed  bool   // Read returned err

	// Written by the inflater before it closes full.
	err    error
	hash   hash.Hash
	length int64
}

// newStream starts reading src. maxBytes bounds what comes out.
func newStream(src io.Reader, window, maxBytes int64) *stream {
	s := &stream{
		full:    make(chan []byte, blocks),
		free:    make(chan []byte, blocks),
		quit:    make(chan struct{}),
		stopped: make(chan struct{}),
		hash:    sha256.New(),
	}
	for range blocks {
		s.free <- make([]byte, blockSize)
	}
	go func() { // ends with src or with close, which waits
		defer close(s.stopped)
		defer close(s.full)
		s.err = s.inflate(src, window, maxBytes)
	}()
	return s
}

// inflate passes on blocks until the source is at its end, which is where its
// reader verifies it.
func (s *stream) inflate(from io.Reader, window, maxBytes int64) error {
	src := &source{Reader: from}
	compressed := bufio.NewReaderSize(src, blockSize)
	r, done, err := decompress(compressed, window)
	if err != nil {
		return src.explain(err)
	}
	defer done()
	for {
		var block []byte
		select {
		case <-s.quit:
			return context.Canceled
		case block = <-s.free:
		}
		n, err := fill(r, block[:blockSize])
		if n > 0 {
			_, _ = s.hash.Write(block[:n]) // a hash never fails
			if s.length += int64(n); s.length > maxBytes {
				return fmt.Errorf("%w: the layer inflates to more than %d bytes", fault.Limit, maxBytes)
			}
			select {
			case <-s.quit:
				return context.Canceled
			case s.full <- block[:n]:
			}
		}
		if err == io.EOF {
			// Nothing may follow, but the source wants to say so itself.
			if _, err := io.Copy(io.Discard, compressed); err != nil {
				return err
			}
			return nil
		}
		if err != nil {
			return src.explain(err)
		}
	}
}

// fill reads until block is full or an error ends it. Unlike io.ReadFull it
// leaves the error as it is: an inflater's io.ErrUnexpectedEOF means a truncated layer.
func fill(r io.Reader, block []byte) (n int, err error) {
	for n < len(block) && err == nil {
		var m int
		m, err = r.Read(block[n:])
		n += m
	}
	return n, err
}

// decompress recognises the compression by its magic number: media types are
// wrong often enough, and the diffID is verified in any case.
func decompress(r *bufio.Reader, window int64) (_ io.Reader, done func(), _ error) {
	magic, err := r.Peek(4)
	if err != nil && err != io.EOF {
		return nil, nil, err
	}
	switch {
	case len(magic) >= 2 && magic[0] == 0x1f && magic[1] == 0x8b: // RFC 1952 2.3.1
		gz, err := gzip.NewReader(r)
		return gz, func() {}, err
	case len(magic) == 4 && isZstd(magic):
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(uint64(window)))
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	}
	return r, func() {}, nil
}

// isZstd knows the magic numbers of a frame and of a skippable frame (RFC 8878 3.1).
func isZstd(magic []byte) bool {
	tail := magic[1] == 0xb5 && magic[2] == 0x2f && magic[3] == 0xfd && magic[0] == 0x28
	skip := magic[0]&0xf0 == 0x50 && magic[1] == 0x2a && magic[2] == 0x4d && magic[3] == 0x18
	return tail || skip
}

// source remembers the error of the reader below the inflater, which the
// inflater's error hides.
type source struct {
	io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// explain returns the source's own error if it had one, else the inflater's as
// one of corrupt content.
func (s *source) explain(err error) error {
	switch {
	case s.err != nil:
		return s.err
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return fmt.Errorf("%w: zstd window: %w", fault.Limit, err)
	}
	return fmt.Errorf("%w: cannot inflate the layer: %w", fault.Corrupt, err)
}

// Read implements io.Reader for the archive's parser.
func (s *stream) Read(p []byte) (int, error) {
	for len(s.current) == 0 {
		if s.block != nil {
			s.free <- s.block // never blocks: it has room for all blocks
			s.block = nil
		}
		block, ok := <-s.full
		if !ok {
			if s.err != nil {
				s.failed = true
				return 0, s.err
			}
			return 0, io.EOF
		}
		s.current, s.block = block, block[:blockSize]
	}
	n := copy(p, s.current)
	s.current = s.current[n:]
	return n, nil
}

// finish reads to the end (what follows the archive counts for the digest) and
// returns the digest of everything.
func (s *stream) finish() (digest.Digest, error) {
	if _, err := io.Copy(io.Discard, s); err != nil {
		return "", err
	}
	return digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(s.hash.Sum(nil))), nil
}

// close ends the inflater and waits for it. Its source must not block for ever:
// the caller cancels that first.
func (s *stream) close() {
	close(s.quit)
	<-s.stopped
}

package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/crisp-cri/crisp/image/fault"
)

// errStalled is the cause of a connection that was cut for sending nothing.
var errStalled = errors.New("no data")

// Blob is the content of one blob as it comes in. A broken connection is taken
// up again where it broke (Range), at another endpoint if need be. Read returns
// io.EOF only after exactly the blob's size of bytes with the blob's digest.
//
// Not safe for concurrent use. The owner closes it.
type Blob struct {
	ctx    context.Context // of the pull; a Blob lives within one
	source *Source
	digest digest.Digest
	size   int64

	verifier digest.Verifier
	offset   int64 // bytes delivered
	body     *watched
	ep       *endpoint
	first    int   // index of the endpoint to try first
	failed   int   // tries since progress was last made
	mark     int64 // offset at which failed was last reset
	err      error // sticky
}

// progressStep is how many bytes count as progress: a server that drops the
// connection after each few bytes is given up, not humoured for ever.
const progressStep = 64 << 10

// Blob opens a blob of known digest (sha256) and size in bytes. Nothing is sent
// before the first Read.
func (s *Source) Blob(ctx context.Context, dgst digest.Digest, size int64) *Blob {
	return &Blob{ctx: ctx, source: s, digest: dgst, size: size, verifier: dgst.Verifier()}
}

// Read implements io.Reader. Errors: as Manifest.
func (b *Blob) Read(p []byte) (int, error) {
	if b.err != nil || len(p) == 0 {
		return 0, b.err
	}
	deadline := time.Now().Add(b.source.client.opts.StallTimeout)
	for {
		n, err := b.readOnce(p, deadline)
		if n > 0 {
			b.offset += int64(n)
			_, _ = b.verifier.Write(p[:n]) // a hash never fails
			if b.offset-b.mark >= progressStep {
				b.failed, b.mark = 0, b.offset
			}
			if b.offset > b.size {
				b.err = b.source.failure(fault.Corrupt, nil, "%s sent more than the %d bytes of blob %s", b.ep.addr, b.size, b.digest)
				return 0, b.err
			}
			return n, nil
		}
		if err == io.EOF && b.offset == b.size {
			b.err = io.EOF
			if !b.verifier.Verified() {
				b.err = b.source.failure(fault.Corrupt, nil, "%s sent %d bytes that are not blob %s", b.ep.addr, b.size, b.digest)
			}
			return 0, b.err
		}
		if err == nil {
			continue
		}
		if b.err = b.recover(err, deadline); b.err != nil {
			return 0, b.err
		}
	}
}

// readOnce reads from the current connection, making one first if there is none.
func (b *Blob) readOnce(p []byte, deadline time.Time) (int, error) {
	if b.body == nil {
		if b.size == b.offset && b.offset > 0 {
			return 0, io.EOF // the connection broke after the last byte
		}
		if err := b.open(); err != nil {
			return 0, err
		}
	}
	// Half the time for each connection: one that died silently is replaced
	// once before the pull fails.
	half := b.source.client.opts.StallTimeout / 2
	return b.body.read(p, min(half, time.Until(deadline)))
}

// open requests the rest of the blob.
func (b *Blob) open() error {
	s := b.source
	header := http.Header{}
	if b.offset > 0 {
		header.Set("Range", fmt.Sprintf("bytes=%d-", b.offset))
	}
	// Where the connection broke comes first, then the others in their order.
	endpoints := slices.Concat(s.endpoints[b.first:], s.endpoints[:b.first])
	return s.each(endpoints, canPull, func(ep *endpoint) error {
		ctx, cancel := context.WithCancelCause(b.ctx)
		resp, err := ep.get(ctx, "blobs/"+string(b.digest), header)
		if err != nil {
			cancel(nil)
			return err
		}
		body := &watched{ctx: ctx, cancel: cancel, body: resp.Body}
		if err := b.checkResponse(ep, resp, body); err != nil {
			body.close()
			return err
		}
		b.ep, b.body = ep, body
		return nil
	})
}

// checkResponse sees that what follows is the rest of the blob, and skips what
// a server that ignores Range sends again.
func (b *Blob) checkResponse(ep *endpoint, resp *http.Response, body *watched) error {
	s := b.source
	if resp.StatusCode == http.StatusPartialContent {
		start, _, _ := strings.Cut(strings.TrimPrefix(resp.Header.Get("Content-Range"), "bytes "), "-")
		if at, err := strconv.ParseInt(start, 10, 64); err != nil || at != b.offset {
			return s.failure(fault.Unavailable, nil, "%s sent range %q of blob %s, asked for the one from %d", ep.addr, clip(resp.Header.Get("Content-Range")), b.digest, b.offset)
		}
		return nil
	}
	if resp.ContentLength >= 0 && resp.ContentLength != b.size {
		return s.failure(fault.Corrupt, nil, "%s has %d bytes for blob %s, the manifest says %d", ep.addr, resp.ContentLength, b.digest, b.size)
	}
	buf := make([]byte, 32<<10)
	for skip := b.offset; skip > 0; {
		n, err := body.read(buf[:min(skip, int64(len(buf)))], s.client.opts.StallTimeout)
		skip -= int64(n)
		if err != nil && skip > 0 {
			return s.failure(fault.Unavailable, err, "%s ended blob %s before byte %d", ep.addr, b.digest, b.offset)
		}
	}
	return nil
}

// recover decides after an error whether to try again; nil means yes.
func (b *Blob) recover(err error, deadline time.Time) error {
	opened := b.body != nil
	b.closeBody()
	if b.ctx.Err() != nil {
		return context.Cause(b.ctx)
	}
	if !opened {
		return err // all endpoints were tried, each with its retries
	}
	got := fmt.Sprintf("after %d of %d bytes of blob %s", b.offset, b.size, b.digest)
	sentinel := fault.Unavailable
	if err == io.EOF {
		// The server says that this is all: a shorter blob, or something in
		// between was cut off. If it says so every time, it is the former.
		sentinel, err = fault.Corrupt, io.ErrUnexpectedEOF
	}
	if b.failed++; b.failed >= tries {
		return b.source.failure(sentinel, err, "%s broke off %s, %d times", b.ep.addr, got, b.failed)
	}
	if time.Until(deadline) <= 0 {
		return b.source.failure(fault.Unavailable, nil, "%s sent no data for %s, %s", b.ep.addr, b.source.client.opts.StallTimeout, got)
	}
	b.first = slices.Index(b.source.endpoints, b.ep)
	return b.source.client.pause(b.ctx, b.failed, "")
}

func (b *Blob) closeBody() {
	if b.body != nil {
		b.body.close()
		b.body = nil
	}
}

// Close ends the transfer. A Read after it fails.
func (b *Blob) Close() error {
	b.closeBody()
	if b.err == nil {
		b.err = io.ErrClosedPipe
	}
	return nil
}

// watched is a response body whose reads have a deadline: the request's context
// is cancelled when nothing came for too long. The time in which nobody reads
// does not count.
type watched struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	body   io.ReadCloser
}

func (w *watched) read(p []byte, patience time.Duration) (int, error) {
	timer := time.AfterFunc(max(patience, 0), func() { w.cancel(errStalled) })
	n, err := w.body.Read(p)
	timer.Stop()
	if err != nil && err != io.EOF && context.Cause(w.ctx) == errStalled {
		err = errStalled
	}
	return n, err
}

func (w *watched) close() {
	w.cancel(nil)
	_ = w.body.Close() // the transfer is over or abandoned; nothing is lost
}

// watch gives a small document's body the client's patience.
func (c *Client) watch(ctx context.Context, resp *http.Response) io.Reader {
	return readerFunc(func(p []byte) (int, error) {
		timer := time.AfterFunc(c.opts.StallTimeout, func() { _ = resp.Body.Close() }) // ends the Read below
		defer timer.Stop()
		n, err := resp.Body.Read(p)
		if err != nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return n, err
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

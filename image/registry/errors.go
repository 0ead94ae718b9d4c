package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"time"
	"unicode"

	"github.com/crisp-cri/crisp/image/fault"
)

// failure is an error of this package: a text without secrets, its sentinel,
// and the cause for errors.Is (ECONNREFUSED, x509 errors ...). The cause's text
// is in the failure's already, cleaned.
type failure struct {
	text     string
	sentinel error
	cause    error
}

func (f *failure) Error() string { return f.text }

func (f *failure) Unwrap() []error {
	if f.cause == nil {
		return []error{f.sentinel}
	}
	return []error{f.sentinel, f.cause}
}

// failure builds an error. The text is built from what servers say and from
// URLs (which may be signed), so all secrets are taken out of it.
func (s *Source) failure(sentinel, cause error, format string, args ...any) error {
	text := fmt.Sprintf(format, args...)
	if cause = withoutURL(cause); cause != nil {
		text += ": " + clip(cause.Error())
	}
	return &failure{text: sentinel.Error() + ": " + s.secrets.scrub(text), sentinel: sentinel, cause: cause}
}

// wrap adds the step to an error that has its sentinel already, or else makes
// it one of the connection.
func (s *Source) wrap(ep *endpoint, step string, err error) error {
	for _, sentinel := range []error{fault.Limit, fault.Corrupt, fault.Unauthorized, fault.NotFound, fault.Unavailable} {
		if errors.Is(err, sentinel) {
			return fmt.Errorf("cannot %s of %s from %s: %w", step, s.repo, ep.addr, err)
		}
	}
	if contextError(err) != nil {
		return err
	}
	return s.failure(fault.Unavailable, err, "cannot %s of %s from %s", step, s.repo, ep.addr)
}

// withoutURL drops the URL that http.Client puts around its errors: redirects
// lead to signed URLs, whose query is a secret.
func withoutURL(err error) error {
	var u *url.Error
	for errors.As(err, &u) {
		err = u.Err
	}
	return err
}

func (s secrets) scrub(text string) string {
	for _, secret := range s {
		text = strings.ReplaceAll(text, secret, "[redacted]")
	}
	return text
}

// clip makes foreign text fit for an error: printable, in one line, short.
func clip(text string) string {
	const most = 256
	cut := len(text) > most
	if cut {
		text = text[:most]
	}
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
	if cut {
		text += " ..."
	}
	return text
}

// errorBody returns what the registry says about its refusal, as ": text" or
// "" (OCI distribution-spec "Error Codes"). HTML and the like is left out.
func errorBody(resp *http.Response) string {
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	if err != nil {
		return ""
	}
	var said struct {
		Errors []struct{ Code, Message string }
	}
	if json.Unmarshal(body, &said) != nil || len(said.Errors) == 0 {
		return ""
	}
	return ": " + clip(said.Errors[0].Code+": "+said.Errors[0].Message)
}

// contextError returns the context's error in err, if there is one: the caller
// gave up, which is nobody's fault.
func contextError(err error) error {
	for _, sentinel := range []error{context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, sentinel) {
			var f *failure
			if errors.As(err, &f) {
				return nil // a timeout of the connection, not of the caller
			}
			return sentinel
		}
	}
	return nil
}

// mayRecover reports whether the same request may succeed a moment later.
// Certificates, refused redirects and refused connections stay as they are.
func mayRecover(err error) bool {
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), isReset(err):
		return true
	case errors.As(err, &timeout):
		return timeout.Timeout()
	}
	return false
}

func defaultBackoff(try int) time.Duration {
	wait := 200 * time.Millisecond << min(try-1, 5)
	wait = min(wait, 5*time.Second)
	return wait/2 + rand.N(wait/2)
}

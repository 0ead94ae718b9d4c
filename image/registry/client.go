package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/crisp-cri/crisp/image/fault"
)

const (
	maxRedirects      = 10
	maxResponseHeader = 64 << 10 // bytes; Go's default of 1 MiB lets a server make us hold that per connection
	maxErrorBody      = 4 << 10  // bytes read of an error's body
	tries             = 5        // of one request against one endpoint, or of one blob without progress
	maxRetryAfter     = 60 * time.Second
)

// Manifest media types we understand; the Docker ones are not in image-spec.
const (
	DockerManifest     = "application/vnd.docker.distribution.manifest.v2+json"
	DockerManifestList = "application/vnd.docker.distribution.manifest.list.v2+json"
)

var acceptManifests = strings.Join([]string{
	imagespec.MediaTypeImageIndex, DockerManifestList, imagespec.MediaTypeImageManifest, DockerManifest,
}, ", ")

// Options of a Client. The zero value of each field has the default said there.
type Options struct {
	// ConfigDir is a containerd-style certs.d directory. "": no configuration.
	ConfigDir string
	// UserAgent is sent with every request. Default "crisp".
	UserAgent string
	// StallTimeout is how long a read may wait for the next byte, over all
	// reconnections, before the pull fails. Default 5 minutes.
	StallTimeout time.Duration
	// Backoff is the pause before try n (1 = first retry). Default: 200 ms
	// doubling up to 5 s, with jitter.
	Backoff func(try int) time.Duration
	// RealmHosts lists, by registry host[:port], further hosts whose token
	// realms may get that registry's credentials. See the package documentation.
	RealmHosts map[string][]string
}

// Client fetches from registries. Safe for concurrent use.
type Client struct{ opts Options }

// New returns a Client.
func New(opts Options) *Client {
	if opts.UserAgent == "" {
		opts.UserAgent = "crisp"
	}
	if opts.StallTimeout <= 0 {
		opts.StallTimeout = 5 * time.Minute
	}
	if opts.Backoff == nil {
		opts.Backoff = defaultBackoff
	}
	return &Client{opts: opts}
}

// Source is one repository seen through its endpoints with one set of
// credentials. Safe for concurrent use until Close.
type Source struct {
	client    *Client
	repo      string // path below the registry: "library/busybox"
	registry  string // domain of the reference: "docker.io"
	endpoints []*endpoint
	secrets   secrets
}

// Open prepares to fetch from name's repository. creds may be nil. Nothing is
// sent yet. Errors: a faulty hosts.toml, naming file and key.
func (c *Client) Open(name reference.Named, creds *Credentials) (*Source, error) {
	s := &Source{client: c, repo: reference.Path(name), registry: reference.Domain(name)}
	hosts, err := hostsFor(c.opts.ConfigDir, s.registry)
	if err != nil {
		return nil, err
	}
	if creds != nil {
		decoded, err := creds.decode()
		if err != nil {
			return nil, err
		}
		creds, s.secrets = &decoded, decoded.secrets()
	}
	for _, h := range hosts {
		ep := &endpoint{host: h, source: s}
		if creds != nil && creds.mayGoTo(h) {
			ep.creds = creds
		}
		ep.connect()
		s.endpoints = append(s.endpoints, ep)
	}
	return s, nil
}

// Close ends the idle connections. Readers of blobs are closed by their owners before.
func (s *Source) Close() {
	for _, ep := range s.endpoints {
		ep.base.CloseIdleConnections()
	}
}

// String names the repository, without secrets.
func (s *Source) String() string { return s.registry + "/" + s.repo }

// Document is a manifest or an index as the registry sent it.
type Document struct {
	MediaType string // the response's Content-Type, without parameters
	Digest    digest.Digest
	Body      []byte
}

// Manifest fetches a manifest or an index by tag or digest; limit is its
// largest size in bytes. The body is verified against the digest asked for and
// against the Docker-Content-Digest header, if there is one.
//
// Errors: fault.NotFound, Unauthorized, Unavailable, Corrupt, Limit.
func (s *Source) Manifest(ctx context.Context, tagOrDigest string, limit int64) (Document, error) {
	want, byDigest := digest.Digest(tagOrDigest), strings.Contains(tagOrDigest, ":")
	needs := canResolve
	if byDigest {
		needs = canPull
	}
	var doc Document
	err := s.each(s.endpoints, needs, func(ep *endpoint) error {
		resp, err := ep.get(ctx, "manifests/"+tagOrDigest, http.Header{"Accept": {acceptManifests}})
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		doc.Body, err = readLimited(s.client.watch(ctx, resp), limit, "manifest size")
		if err != nil {
			return s.wrap(ep, "read the manifest", err)
		}
		doc.MediaType, _, _ = strings.Cut(resp.Header.Get("Content-Type"), ";")
		doc.MediaType = strings.TrimSpace(doc.MediaType)
		doc.Digest = digest.FromBytes(doc.Body)
		if byDigest && doc.Digest != want {
			return s.failure(fault.Corrupt, nil, "%s sent a manifest with digest %s, asked for %s", ep.addr, doc.Digest, want)
		}
		if said := resp.Header.Get("Docker-Content-Digest"); said != "" && said != string(doc.Digest) {
			return s.failure(fault.Corrupt, nil, "%s sent a manifest with digest %s and said it was %q", ep.addr, doc.Digest, clip(said))
		}
		return nil
	})
	return doc, err
}

// each calls f for the endpoints that can do what is needed, in order, until
// one succeeds. The last one's error is returned, with the others' texts: the
// last is the registry itself, whose word counts.
func (s *Source) each(endpoints []*endpoint, needs capability, f func(*endpoint) error) error {
	var before []string
	for i, ep := range endpoints {
		if ep.caps&needs == 0 {
			continue
		}
		err := f(ep)
		if err == nil {
			return nil
		}
		if contextError(err) != nil {
			return err
		}
		if hasCapable(endpoints[i+1:], needs) {
			before = append(before, err.Error())
			continue
		}
		if len(before) > 0 {
			return fmt.Errorf("%w (tried before: %s)", err, strings.Join(before, "; "))
		}
		return err
	}
	return s.failure(fault.Unavailable, nil, "no configured host of %s has the capability needed", s.registry)
}

func hasCapable(endpoints []*endpoint, needs capability) bool {
	for _, ep := range endpoints {
		if ep.caps&needs != 0 {
			return true
		}
	}
	return false
}

// endpoint is a host together with the connections to it and what it was
// authenticated with.
type endpoint struct {
	host
	source *Source
	creds  *Credentials // nil: this endpoint gets none
	base   *http.Transport
	client *http.Client // follows redirects; authorizes same-origin requests only

	mu            sync.Mutex // guards what follows; held across the token exchange, so that one is made
	authorization string     // value of the Authorization header; "" for none
	plain         bool       // a loopback registry that turned out not to speak TLS
}

func (ep *endpoint) connect() {
	dialer := &net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}
	if ep.dialTimeout > 0 {
		dialer.Timeout = ep.dialTimeout
	}
	config := ep.tls.Clone()
	if config == nil {
		config = &tls.Config{}
	}
	config.MinVersion = tls.VersionTLS12
	ep.base = &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            dialer.DialContext,
		TLSClientConfig:        config,
		TLSHandshakeTimeout:    30 * time.Second,
		ForceAttemptHTTP2:      true,
		DisableCompression:     true, // digests are of the bytes as stored
		MaxResponseHeaderBytes: maxResponseHeader,
		ResponseHeaderTimeout:  ep.source.client.opts.StallTimeout / tries, // all tries together wait no longer than a stall may last
		IdleConnTimeout:        30 * time.Second,
		MaxIdleConnsPerHost:    8,
	}
	ep.client = &http.Client{Transport: originGuard{ep}, CheckRedirect: checkRedirect}
	if ep.creds != nil && ep.creds.RegistryToken != "" {
		ep.authorization = "Bearer " + ep.creds.RegistryToken
	}
}

// origin is the scheme and address that authorization and configured headers are for.
func (ep *endpoint) origin() (scheme, addr string) {
	scheme = ep.scheme
	if scheme == "" {
		scheme = "https"
		ep.mu.Lock()
		if ep.plain {
			scheme = "http"
		}
		ep.mu.Unlock()
	}
	return scheme, ep.addr
}

// originGuard adds authorization and configured headers to requests for the
// endpoint's own scheme, host and port, and sees to it that no other request
// carries any. (http.Client compares neither port nor scheme when it forwards
// Authorization over a redirect.)
type originGuard struct{ ep *endpoint }

func (g originGuard) RoundTrip(req *http.Request) (*http.Response, error) {
	out := req.Clone(req.Context())
	out.Header.Del("Authorization")
	out.Header.Del("Cookie")
	out.Header.Set("User-Agent", g.ep.source.client.opts.UserAgent)
	if scheme, addr := g.ep.origin(); sameOrigin(req.URL, scheme, addr) {
		for key, values := range g.ep.header {
			out.Header[key] = values
		}
		g.ep.mu.Lock()
		if g.ep.authorization != "" {
			out.Header.Set("Authorization", g.ep.authorization)
		}
		g.ep.mu.Unlock()
	}
	return g.ep.base.RoundTrip(out)
}

// sameOrigin compares scheme, host and port (RFC 6454), the port's default filled in.
func sameOrigin(u *url.URL, scheme, addr string) bool {
	return u.Scheme == scheme && strings.EqualFold(withPort(u.Host, scheme), withPort(addr, scheme))
}

func withPort(addr, scheme string) string {
	if _, _, found := cutPort(addr); found {
		return addr
	}
	if scheme == "http" {
		return addr + ":80"
	}
	return addr + ":443"
}

// checkRedirect bounds the hops, refuses to leave TLS, and refuses to be sent
// to addresses that only this machine or its cloud can mean (metadata services).
func checkRedirect(req *http.Request, via []*http.Request) error {
	from := via[len(via)-1].URL
	switch {
	case len(via) > maxRedirects:
		return fmt.Errorf("more than %d redirects", maxRedirects)
	case req.URL.Scheme != "https" && req.URL.Scheme != "http":
		return fmt.Errorf("redirect to scheme %q refused", clip(req.URL.Scheme))
	case from.Scheme == "https" && req.URL.Scheme != "https":
		return fmt.Errorf("redirect from https to %s refused", req.URL.Scheme)
	case isLocalIP(req.URL.Hostname()) && !isLocalIP(via[0].URL.Hostname()) && via[0].URL.Hostname() != "localhost":
		return fmt.Errorf("redirect to local address %s refused", req.URL.Hostname())
	}
	return nil
}

func isLocalIP(name string) bool {
	ip, err := netip.ParseAddr(name)
	if err != nil {
		return false
	}
	ip = ip.Unmap()
	return ip.IsLoopback() || ip.IsLinkLocalUnicast() || ip.IsUnspecified()
}

// get requests path below the repository and returns a response of status 200
// or 206. It authenticates when challenged and retries what a retry can mend.
func (ep *endpoint) get(ctx context.Context, path string, header http.Header) (*http.Response, error) {
	s := ep.source
	authenticated := false
	for try := 1; ; try++ {
		used := ep.currentAuthorization()
		resp, err := ep.send(ctx, path, header)
		if err != nil {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			if try >= tries || !mayRecover(err) {
				return nil, s.failure(fault.Unavailable, err, "cannot reach %s", ep.addr)
			}
			if err := s.client.pause(ctx, try, ""); err != nil {
				return nil, err
			}
			continue
		}
		if resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusPartialContent {
			return resp, nil
		}
		said := errorBody(resp)
		resp.Body.Close()
		switch status := resp.StatusCode; {
		case status == http.StatusUnauthorized && !authenticated && sameOriginResponse(resp, ep):
			authenticated = true
			try--
			if err := ep.authenticate(ctx, used); err != nil {
				return nil, err
			}
		case status == http.StatusUnauthorized || status == http.StatusForbidden:
			return nil, s.failure(fault.Unauthorized, nil, "%s answered %s%s%s", ep.addr, resp.Status, said, ep.credentialsHint())
		case status == http.StatusNotFound:
			return nil, s.failure(fault.NotFound, nil, "%s has no %s/%s%s", ep.addr, s.repo, path, said)
		case status == http.StatusTooManyRequests || status >= 500:
			if try >= tries {
				return nil, s.failure(fault.Unavailable, nil, "%s answered %s, %d times%s", ep.addr, resp.Status, try, said)
			}
			if err := s.client.pause(ctx, try, resp.Header.Get("Retry-After")); err != nil {
				return nil, err
			}
		default:
			return nil, s.failure(fault.Unavailable, nil, "%s answered %s to GET %s/%s%s", ep.addr, resp.Status, s.repo, path, said)
		}
	}
}

func (ep *endpoint) currentAuthorization() string {
	ep.mu.Lock()
	defer ep.mu.Unlock()
	return ep.authorization
}

// sameOriginResponse: only a challenge by the endpoint itself is answered, not
// one by a host it redirected us to.
func sameOriginResponse(resp *http.Response, ep *endpoint) bool {
	scheme, addr := ep.origin()
	return sameOrigin(resp.Request.URL, scheme, addr)
}

// send makes one request, on a loopback registry without TLS a second one in plain text.
func (ep *endpoint) send(ctx context.Context, path string, header http.Header) (*http.Response, error) {
	for {
		scheme, addr := ep.origin()
		u := url.URL{Scheme: scheme, Host: addr, Path: ep.prefix + "/" + ep.source.repo + "/" + path}
		if !ep.isRegistry {
			u.RawQuery = url.Values{"ns": {ep.source.registry}}.Encode() // tells a mirror of several registries which one is meant
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
		if err != nil {
			return nil, err
		}
		for key, values := range header {
			req.Header[key] = values
		}
		resp, err := ep.client.Do(req)
		if errors.Is(err, http.ErrSchemeMismatch) && ep.scheme == "" && scheme == "https" {
			ep.mu.Lock()
			ep.plain = true
			ep.mu.Unlock()
			continue
		}
		return resp, err
	}
}

// pause waits before try+1, for as long as the server said if it did.
func (c *Client) pause(ctx context.Context, try int, retryAfter string) error {
	wait := c.opts.Backoff(try)
	if seconds, err := strconv.Atoi(retryAfter); err == nil && seconds >= 0 {
		wait = min(time.Duration(seconds)*time.Second, maxRetryAfter)
	} else if at, err := http.ParseTime(retryAfter); err == nil {
		wait = min(max(time.Until(at), 0), maxRetryAfter)
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

// readLimited reads all of r, at most limit bytes.
func readLimited(r io.Reader, limit int64, what string) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(body)) > limit {
		return nil, fmt.Errorf("%w: %s is more than %d bytes", fault.Limit, what, limit)
	}
	return body, nil
}

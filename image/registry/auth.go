package registry

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"golang.org/x/net/publicsuffix"

	"github.com/crisp-cri/crisp/image/fault"
)

// Credentials of one pull, as the kubelet hands them over (CRI AuthConfig).
type Credentials struct {
	Username, Password string
	Auth               string // base64("user:password"); used when Username is empty
	ServerAddress      string // "host[:port]" or a URL; if set, for this host only
	IdentityToken      string // OAuth2 refresh token, exchanged at the token realm
	RegistryToken      string // bearer token, sent as it is
}

// decode returns the credentials with Auth unpacked into Username and Password.
func (c Credentials) decode() (Credentials, error) {
	if c.Username != "" || c.Auth == "" {
		return c, nil
	}
	text := strings.TrimRight(strings.TrimSpace(c.Auth), "=")
	plain, err := base64.RawStdEncoding.DecodeString(text)
	user, password, found := strings.Cut(strings.TrimRight(string(plain), "\x00"), ":")
	if err != nil || !found {
		return Credentials{}, fmt.Errorf("%w: auth is not base64 of user:password", fault.InvalidReference)
	}
	c.Username, c.Password = user, password
	return c, nil
}

// mayGoTo reports whether h may see the credentials: see the package documentation.
func (c *Credentials) mayGoTo(h host) bool {
	if c.ServerAddress == "" {
		return h.isRegistry
	}
	want := c.ServerAddress
	if u, err := url.Parse(want); err == nil && u.Host != "" {
		want = u.Host // docker's config.json has "https://index.docker.io/v1/"
	} else {
		want, _, _ = strings.Cut(want, "/")
	}
	if want == "docker.io" || want == "index.docker.io" {
		want = registryAddr("docker.io")
	}
	return strings.EqualFold(withPort(want, "https"), withPort(h.addr, "https"))
}

// secrets are the strings that must not be in any error text.
type secrets []string

func (c Credentials) secrets() secrets {
	var s secrets
	for _, secret := range []string{
		c.Password, c.Auth, strings.TrimRight(c.Auth, "="), c.IdentityToken, c.RegistryToken,
		base64.StdEncoding.EncodeToString([]byte(c.Username + ":" + c.Password)),
	} {
		if secret != "" && !slices.Contains(s, secret) {
			s = append(s, secret)
			if escaped := url.QueryEscape(secret); escaped != secret {
				s = append(s, escaped)
			}
		}
	}
	// Longest first: a secret that is part of another must not spoil the match of the longer.
	slices.SortFunc(s, func(a, b string) int { return len(b) - len(a) })
	return s
}

// authenticate answers a challenge of this endpoint. used is the Authorization
// that was refused; if another goroutine has got a new one since, nothing is done.
//
// Errors: fault.Unauthorized, Unavailable.
func (ep *endpoint) authenticate(ctx context.Context, used string) error {
	scheme, addr := ep.origin()
	s := ep.source
	ep.mu.Lock()
	defer ep.mu.Unlock()
	if ep.authorization != used {
		return nil
	}
	if ep.creds != nil && ep.creds.RegistryToken != "" {
		return s.failure(fault.Unauthorized, nil, "%s refused the registry token", ep.addr)
	}

	opts := []name.Option{name.StrictValidation}
	if scheme == "http" {
		opts = append(opts, name.Insecure)
	}
	reg, err := name.NewRegistry(addr, opts...)
	if err != nil {
		return fmt.Errorf("registry %q: %w", addr, err)
	}
	challenge, err := transport.Ping(ctx, reg, pinger{ep: ep, scheme: scheme})
	if err != nil {
		return s.authFailure(ctx, err, "ask %s how to authenticate", ep.addr)
	}
	switch strings.ToLower(challenge.Scheme) {
	case "basic":
		if ep.creds == nil || ep.creds.Username == "" {
			return s.failure(fault.Unauthorized, nil, "%s wants user and password%s", ep.addr, ep.credentialsHint())
		}
		ep.authorization = "Basic " + base64.StdEncoding.EncodeToString([]byte(ep.creds.Username+":"+ep.creds.Password))
	case "bearer":
		token, err := ep.exchange(ctx, reg, challenge)
		if err != nil {
			return err
		}
		ep.authorization = "Bearer " + token
	default:
		return s.failure(fault.Unauthorized, nil, "%s wants authentication of the unknown kind %q%s", ep.addr, clip(challenge.Scheme), ep.credentialsHint())
	}
	if ep.authorization == used {
		return s.failure(fault.Unauthorized, nil, "%s refused the credentials", ep.addr)
	}
	return nil
}

// exchange gets a bearer token to pull this repository.
func (ep *endpoint) exchange(ctx context.Context, reg name.Registry, challenge *transport.Challenge) (string, error) {
	s := ep.source
	realm, err := url.Parse(challenge.Parameters["realm"])
	if err != nil || realm.Host == "" || realm.User != nil {
		return "", s.failure(fault.Unauthorized, nil, "%s names no usable token realm", ep.addr)
	}
	auth, hint := authn.Anonymous, ep.credentialsHint()
	if ep.creds != nil {
		if reason := ep.realmRefusal(realm, challenge.Insecure); reason == "" {
			auth = authn.FromConfig(authn.AuthConfig{
				Username: ep.creds.Username, Password: ep.creds.Password, IdentityToken: ep.creds.IdentityToken,
			})
		} else {
			hint = "; the credentials were not sent: " + reason
		}
	}
	scope := "repository:" + s.repo + ":pull"
	token, err := transport.Exchange(ctx, reg, auth, realmGuard{ep: ep, realm: realm}, []string{scope}, challenge)
	if err != nil {
		return "", s.authFailure(ctx, err, "get a token from %s%s", clip(realm.Host), hint)
	}
	got := token.Token
	if got == "" {
		got = token.AccessToken
	}
	return got, nil
}

// realmRefusal says why realm may not get the endpoint's credentials, or "".
func (ep *endpoint) realmRefusal(realm *url.URL, insecure bool) string {
	scheme := "https"
	if insecure {
		scheme = "http"
	}
	if sameOrigin(realm, scheme, ep.addr) {
		return ""
	}
	if realm.Scheme != "https" {
		return fmt.Sprintf("token realm %q is not https", clip(realm.Scheme+"://"+realm.Host))
	}
	for _, allowed := range ep.source.client.opts.RealmHosts[ep.addr] {
		if strings.EqualFold(withPort(allowed, "https"), withPort(realm.Host, "https")) {
			return ""
		}
	}
	registry := (&url.URL{Host: ep.addr}).Hostname()
	if sameSite(registry, realm.Hostname()) {
		return ""
	}
	return fmt.Sprintf("token realm %q is not in the domain of %s", clip(realm.Host), registry)
}

// sameSite reports whether two host names have the same registrable domain
// (example.co.uk). Addresses and single-label names are only in their own.
func sameSite(a, b string) bool {
	a, b = strings.ToLower(a), strings.ToLower(b)
	if net.ParseIP(a) != nil || net.ParseIP(b) != nil {
		return false
	}
	if a == b {
		return true
	}
	siteA, errA := publicsuffix.EffectiveTLDPlusOne(a)
	siteB, errB := publicsuffix.EffectiveTLDPlusOne(b)
	return errA == nil && errB == nil && siteA == siteB
}

// pinger lets transport.Ping try only the scheme we already speak with the
// endpoint (it would race https and http), and below the configured API root.
type pinger struct {
	ep     *endpoint
	scheme string
}

func (p pinger) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != p.scheme {
		return nil, fmt.Errorf("%s is spoken to by %s", p.ep.addr, p.scheme)
	}
	out := req.Clone(req.Context())
	if sameOrigin(req.URL, p.scheme, p.ep.addr) {
		out.URL.Path = p.ep.prefix + "/"
		for key, values := range p.ep.header {
			out.Header[key] = values
		}
	}
	out.Header.Set("User-Agent", p.ep.source.client.opts.UserAgent)
	return p.ep.base.RoundTrip(out)
}

// realmGuard sends the requests of a token exchange to the realm's own origin
// only: a redirect elsewhere would carry the refresh token in its body.
type realmGuard struct {
	ep    *endpoint
	realm *url.URL
}

func (g realmGuard) RoundTrip(req *http.Request) (*http.Response, error) {
	if !sameOrigin(req.URL, g.realm.Scheme, g.realm.Host) {
		return nil, errors.New("the token realm redirects to another host")
	}
	out := req.Clone(req.Context())
	out.Header.Set("User-Agent", g.ep.source.client.opts.UserAgent)
	return g.ep.base.RoundTrip(out)
}

// credentialsHint explains why a refused request carried no credentials.
func (ep *endpoint) credentialsHint() string {
	switch {
	case ep.creds != nil:
		return ""
	case len(ep.source.secrets) > 0:
		return "; the credentials are for another host and were not sent"
	}
	return "; no credentials were given"
}

// authFailure classifies an error of go-containerregistry's transport.
func (s *Source) authFailure(ctx context.Context, err error, format string, args ...any) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var answer *transport.Error
	if errors.As(err, &answer) && answer.StatusCode < 500 && answer.StatusCode != http.StatusTooManyRequests {
		return s.failure(fault.Unauthorized, nil, "cannot %s: %d %s", fmt.Sprintf(format, args...), answer.StatusCode, http.StatusText(answer.StatusCode))
	}
	return s.failure(fault.Unavailable, err, "cannot %s", fmt.Sprintf(format, args...))
}

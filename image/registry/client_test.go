package registry

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/distribution/reference"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"

	"github.com/crisp-cri/crisp/image/fault"
	"github.com/crisp-cri/crisp/image/imagetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The secrets of these tests; no error may contain one.
const (
	password      = "hunter2-secret"
	identityToken = "identity-secret"
	registryToken = "registry-secret"
)

func open(t testing.TB, repo string, opts Options, creds *Credentials) *Source {
	t.Helper()
	named, err := reference.ParseNormalizedNamed(repo)
	if err != nil {
		t.Fatal(err)
	}
	if opts.Backoff == nil {
		opts.Backoff = func(int) time.Duration { return 0 }
	}
	s, err := New(opts).Open(named, creds)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func wantError(t testing.TB, err, want error, texts ...string) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got error %v, want %v", err, want)
		return
	}
	if err == nil {
		return
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("got error %q, want %q in it", err, text)
		}
	}
	for _, secret := range []string{password, identityToken, registryToken, base64.StdEncoding.EncodeToString([]byte("user:" + password))} {
		if strings.Contains(err.Error(), secret) {
			t.Errorf("the error shows the secret %q: %v", secret, err)
		}
	}
}

func manifestOf(reg *imagetest.Registry) (*imagetest.Image, string) {
	img := imagetest.NewImage(imagetest.NewLayer(imagetest.Gzip, imagetest.File("f", "x", 0o644)))
	reg.Add("app", "1", img)
	return img, reg.Host + "/app"
}

func TestManifest(t *testing.T) {
	reg := imagetest.NewRegistry(t)
	img, repo := manifestOf(reg)
	s := open(t, repo, Options{}, nil)
	for _, ref := range []string{"1", string(img.Digest())} {
		doc, err := s.Manifest(t.Context(), ref, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if doc.Digest != img.Digest() || doc.MediaType != img.MediaType() || string(doc.Body) != string(img.ManifestBlob()) {
			t.Errorf("%s: got %+v", ref, doc)
		}
	}
	_, err := s.Manifest(t.Context(), "2", 1<<20)
	wantError(t, err, fault.NotFound, "MANIFEST_UNKNOWN: not here")
	_, err = s.Manifest(t.Context(), "1", 10)
	wantError(t, err, fault.Limit, "more than 10 bytes")
}

// TestSEC75Manifest: a registry that lies about manifests.
func TestSEC75Manifest(t *testing.T) {
	reg := imagetest.NewRegistry(t)
	img, repo := manifestOf(reg)
	s := open(t, repo, Options{}, nil)
	other := digest.FromString("other")
	reg.PutManifestAs("app", other, img.MediaType(), img.ManifestBlob())
	_, err := s.Manifest(t.Context(), string(other), 1<<20)
	wantError(t, err, fault.Corrupt, string(img.Digest()), string(other))

	reg.Intercept(func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Docker-Content-Digest", string(other))
		_, _ = w.Write(img.ManifestBlob())
		return true
	})
	_, err = s.Manifest(t.Context(), "1", 1<<20)
	wantError(t, err, fault.Corrupt, "said it was")
	reg.Intercept(nil)
	if _, err := s.Manifest(t.Context(), "1", 1<<20); err != nil {
		t.Errorf("after the lie: %v", err)
	}
}

func TestBasic(t *testing.T) {
	reg := imagetest.NewRegistry(t)
	_, repo := manifestOf(reg)
	reg.Intercept(imagetest.RequireBasic("user", password))
	encoded := base64.StdEncoding.EncodeToString([]byte("user:" + password))
	for _, tt := range []struct {
		name  string
		creds *Credentials
		want  error
	}{
		{"user and password", &Credentials{Username: "user", Password: password}, nil},
		{"auth", &Credentials{Auth: encoded}, nil},
		{"auth without padding", &Credentials{Auth: strings.TrimRight(encoded, "=")}, nil},
		{"for this address", &Credentials{Username: "user", Password: password, ServerAddress: "http://" + reg.Host + "/v1/"}, nil},
		{"for another address", &Credentials{Username: "user", Password: password, ServerAddress: "quay.io"}, fault.Unauthorized},
		{"wrong", &Credentials{Username: "user", Password: password + "x"}, fault.Unauthorized},
		{"none", nil, fault.Unauthorized},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := open(t, repo, Options{}, tt.creds).Manifest(t.Context(), "1", 1<<20)
			wantError(t, err, tt.want)
		})
	}
	named, _ := reference.ParseNormalizedNamed(repo)
	_, err := New(Options{}).Open(named, &Credentials{Auth: "?"})
	wantError(t, err, fault.InvalidReference, "auth is not base64")
}

// realm is a token server.
type realm struct {
	*httptest.Server
	requests []string // method, query or form, authorization
	tokens   atomic.Int64
	handler  http.HandlerFunc // if set, answers
}

func newRealm(t testing.TB) *realm {
	r := &realm{}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		_ = req.ParseForm()
		r.requests = append(r.requests, fmt.Sprintf("%s scope=%s refresh=%s authorization=%s", req.Method, req.Form.Get("scope"), req.Form.Get("refresh_token"), req.Header.Get("Authorization")))
		if r.handler != nil {
			r.handler(w, req)
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]string{"token": fmt.Sprintf("token%d", r.tokens.Add(1))})
	}))
	t.Cleanup(func() { r.CloseClientConnections(); r.Close() })
	return r
}

// bearerRegistry is a registry whose realm is its own /token, as plain HTTP demands.
func bearerRegistry(t testing.TB) (*imagetest.Registry, *realm) {
	reg := imagetest.NewRegistry(t)
	r := newRealm(t)
	require := imagetest.RequireBearer("http://"+reg.Host+"/token", func() []string { return []string{fmt.Sprintf("token%d", r.tokens.Load())} })
	reg.Intercept(func(w http.ResponseWriter, req *http.Request) bool {
		if req.URL.Path == "/token" {
			r.Config.Handler.ServeHTTP(w, req)
			return true
		}
		return require(w, req)
	})
	return reg, r
}

func TestBearer(t *testing.T) {
	for _, tt := range []struct {
		name  string
		creds *Credentials
		want  []string
	}{
		{"anonymous", nil, []string{"GET scope=repository:app:pull refresh= authorization="}},
		{"password", &Credentials{Username: "user", Password: password},
			[]string{"GET scope=repository:app:pull refresh= authorization=Basic " + base64.StdEncoding.EncodeToString([]byte("user:"+password))}},
		{"identity token", &Credentials{IdentityToken: identityToken}, []string{"POST scope=repository:app:pull refresh=" + identityToken + " authorization="}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			reg, realm := bearerRegistry(t)
			_, repo := manifestOf(reg)
			s := open(t, repo, Options{}, tt.creds)
			if _, err := s.Manifest(t.Context(), "1", 1<<20); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, realm.requests); diff != "" {
				t.Errorf("token requests (-want +got):\n%s", diff)
			}
			realm.tokens.Add(1) // the token expires: one more is got
			if _, err := s.Manifest(t.Context(), "1", 1<<20); err != nil {
				t.Error(err)
			}
			if got := len(realm.requests); got != 2 {
				t.Errorf("got %d token requests, want 2", got)
			}
		})
	}
	t.Run("registry token", func(t *testing.T) {
		reg := imagetest.NewRegistry(t)
		_, repo := manifestOf(reg)
		reg.Intercept(imagetest.RequireBearer("http://"+reg.Host+"/token", func() []string { return []string{registryToken} }))
		_, err := open(t, repo, Options{}, &Credentials{RegistryToken: registryToken}).Manifest(t.Context(), "1", 1<<20)
		wantError(t, err, nil)
		_, err = open(t, repo, Options{}, &Credentials{RegistryToken: registryToken + "x"}).Manifest(t.Context(), "1", 1<<20)
		wantError(t, err, fault.Unauthorized, "refused the registry token")
	})
	t.Run("refused", func(t *testing.T) {
		reg, realm := bearerRegistry(t)
		_, repo := manifestOf(reg)
		realm.handler = func(w http.ResponseWriter, req *http.Request) {
			http.Error(w, "denied: "+req.Header.Get("Authorization")+" "+password, http.StatusUnauthorized) // SEC-81: it echoes
		}
		_, err := open(t, repo, Options{}, &Credentials{Username: "user", Password: password}).Manifest(t.Context(), "1", 1<<20)
		wantError(t, err, fault.Unauthorized, "get a token")
	})
}

// TestSEC78Realm: token realms that must not get the credentials.
func TestSEC78Realm(t *testing.T) {
	creds := &Credentials{Username: "user", Password: password, IdentityToken: identityToken}
	t.Run("another host, plain HTTP", func(t *testing.T) {
		reg, elsewhere := imagetest.NewRegistry(t), newRealm(t)
		_, repo := manifestOf(reg)
		reg.Intercept(imagetest.RequireBearer(elsewhere.URL, func() []string { return nil }))
		_, err := open(t, repo, Options{}, creds).Manifest(t.Context(), "1", 1<<20)
		wantError(t, err, fault.Unavailable, "is not https") // go-containerregistry refuses even to ask it
		for _, r := range elsewhere.requests {
			if strings.Contains(r, identityToken) || strings.Contains(r, "Basic") {
				t.Errorf("the realm elsewhere got %s", r)
			}
		}
	})
	t.Run("file", func(t *testing.T) {
		reg := imagetest.NewRegistry(t)
		_, repo := manifestOf(reg)
		reg.Intercept(imagetest.RequireBearer("file:///etc/passwd", func() []string { return nil }))
		_, err := open(t, repo, Options{}, creds).Manifest(t.Context(), "1", 1<<20)
		wantError(t, err, fault.Unauthorized, "no usable token realm")
	})
	t.Run("redirect of the realm", func(t *testing.T) {
		reg, realm := bearerRegistry(t)
		_, repo := manifestOf(reg)
		elsewhere := newRealm(t)
		realm.handler = func(w http.ResponseWriter, req *http.Request) {
			http.Redirect(w, req, elsewhere.URL, http.StatusTemporaryRedirect) // 307 repeats the body
		}
		_, err := open(t, repo, Options{}, creds).Manifest(t.Context(), "1", 1<<20)
		wantError(t, err, fault.Unavailable)
		if len(elsewhere.requests) > 0 {
			t.Errorf("the host redirected to got %v", elsewhere.requests)
		}
	})
	for _, tt := range []struct {
		registry, realm string
		insecure        bool
		allowed         map[string][]string
		want            string
	}{
		{"registry-1.docker.io", "https://auth.docker.io/token", false, nil, ""},
		{"quay.io", "https://quay.io/v2/auth", false, nil, ""},
		{"registry.gitlab.com", "https://gitlab.com/jwt/auth", false, nil, ""},
		{"r.example.co.uk:5000", "https://r.example.co.uk:5001/auth", false, nil, ""},
		{"r.example.co.uk", "https://evil.co.uk/auth", false, nil, "is not in the domain"},
		{"quay.io", "https://quay.io.evil.com/auth", false, nil, "is not in the domain"},
		{"quay.io", "http://quay.io/auth", false, nil, "is not https"},
		{"quay.io", "https://10.0.0.1/auth", false, nil, "is not in the domain"},
		{"10.0.0.1:5000", "https://10.0.0.1:5000/auth", false, nil, ""},
		{"10.0.0.1:5000", "https://10.0.0.1:5001/auth", false, nil, "is not in the domain"},
		{"registry", "https://auth/token", false, nil, "is not in the domain"},
		{"a.github.io", "https://b.github.io/token", false, nil, "is not in the domain"},
		{"127.0.0.1:5000", "http://127.0.0.1:5000/token", true, nil, ""},
		{"127.0.0.1:5000", "http://127.0.0.1:5001/token", true, nil, "is not https"},
		{"quay.io", "https://sso.example.com/token", false, map[string][]string{"quay.io": {"sso.example.com"}}, ""},
	} {
		s := &Source{client: New(Options{RealmHosts: tt.allowed})}
		ep := &endpoint{host: host{addr: tt.registry}, source: s}
		got := ep.realmRefusal(mustParse(t, tt.realm), tt.insecure)
		if tt.want == "" && got != "" || !strings.Contains(got, tt.want) {
			t.Errorf("realm %s of %s: got %q, want %q", tt.realm, tt.registry, got, tt.want)
		}
	}
}

// TestSEC78Redirect: what a redirect must not take along, and where it must not lead.
func TestSEC78Redirect(t *testing.T) {
	reg, elsewhere := imagetest.NewRegistry(t), imagetest.NewRegistry(t)
	img, repo := manifestOf(reg)
	elsewhere.Add("app", "1", img)
	var target string
	basic := imagetest.RequireBasic("user", password)
	reg.Intercept(func(w http.ResponseWriter, req *http.Request) bool {
		if basic(w, req) {
			return true
		}
		if strings.Contains(req.URL.Path, "/blobs/") {
			http.Redirect(w, req, strings.ReplaceAll(target, "PATH", req.URL.Path), http.StatusTemporaryRedirect)
			return true
		}
		return false
	})
	s := open(t, repo, Options{}, &Credentials{Username: "user", Password: password})
	if _, err := s.Manifest(t.Context(), "1", 1<<20); err != nil {
		t.Fatal(err)
	}
	fetch := func() ([]byte, error) {
		blob := s.Blob(t.Context(), img.Layers[0].Digest(), int64(len(img.Layers[0].Blob)))
		defer blob.Close()
		return io.ReadAll(blob)
	}

	target = "http://" + elsewhere.Host + "PATH?X-Signature=signature-secret"
	got, err := fetch()
	if err != nil || string(got) != string(img.Layers[0].Blob) {
		t.Errorf("redirect to another port: %v", err)
	}
	for _, r := range elsewhere.Requests() {
		if r.Authorization != "" {
			t.Errorf("the host redirected to got Authorization %q", r.Authorization)
		}
	}

	for _, tt := range []struct{ name, target, want string }{
		{"loop", "http://" + reg.Host + "PATH", "redirects"},
		{"scheme", "file:///etc/passwd", "scheme"},
		{"nobody there", "http://127.0.0.1:1/PATH?X-Signature=signature-secret", "refused"},
	} {
		target = tt.target
		_, err := fetch()
		wantError(t, err, fault.Unavailable, tt.want)
		if strings.Contains(err.Error(), "signature-secret") {
			t.Errorf("%s: the error shows a signed URL: %v", tt.name, err)
		}
	}

	for _, tt := range []struct {
		from, to string
		hops     int
		ok       bool
	}{
		{"https://r.example/v2/x", "https://cdn.example/x", 1, true},
		{"https://r.example/v2/x", "http://r.example/x", 1, false},
		{"http://localhost:5000/x", "http://127.0.0.1/x", 1, true},
		{"https://r.example/x", "https://169.254.169.254/latest", 1, false},
		{"https://r.example/x", "https://[::1]/x", 1, false},
		{"https://r.example/x", "https://[::ffff:127.0.0.1]/x", 1, false},
		{"https://r.example/x", "https://10.0.0.1/x", 1, true}, // many registries keep blobs on a private address
		{"https://r.example/v2/x", "https://cdn.example/x", 10, true},
		{"https://r.example/v2/x", "https://cdn.example/x", 11, false},
	} {
		via := make([]*http.Request, tt.hops)
		for i := range via {
			via[i] = &http.Request{URL: mustParse(t, tt.from)}
		}
		if err := checkRedirect(&http.Request{URL: mustParse(t, tt.to)}, via); (err == nil) != tt.ok {
			t.Errorf("%s to %s after %d hops: got %v, want ok %v", tt.from, tt.to, tt.hops, err, tt.ok)
		}
	}
}

// TestSEC78Mirror: a mirror gets the pull, not the credentials; the registry's
// own configured address gets both; configured headers go where they belong.
func TestSEC78Mirror(t *testing.T) {
	mirror, reg := imagetest.NewRegistry(t), imagetest.NewRegistry(t)
	img, _ := manifestOf(reg)
	basic := imagetest.RequireBasic("user", password)
	reg.Intercept(basic)
	mirror.Intercept(basic) // asks for them, too
	dir := t.TempDir()
	writeConfig(t, dir, "r.example/hosts.toml", fmt.Sprintf(`
server = "http://%s"
[host."http://%s"]
[host."http://%s".header]
X-Mirror = "mine"
`, reg.Host, mirror.Host, mirror.Host))
	s := open(t, "r.example/app", Options{ConfigDir: dir}, &Credentials{Username: "user", Password: password})
	doc, err := s.Manifest(t.Context(), "1", 1<<20)
	if err != nil || doc.Digest != img.Digest() {
		t.Fatalf("got %v, %v", doc.Digest, err)
	}
	for _, r := range mirror.Requests() {
		if r.Authorization != "" {
			t.Errorf("the mirror got Authorization %q", r.Authorization)
		}
		if r.Header.Get("X-Mirror") != "mine" {
			t.Errorf("the mirror got no configured header in %s", r.Path)
		}
		if r.Path != "/v2/" && r.Query != "ns=r.example" {
			t.Errorf("the mirror got query %q, want ns=r.example", r.Query)
		}
	}
	for _, r := range reg.Requests() {
		if r.Header.Get("X-Mirror") != "" {
			t.Error("the registry got the mirror's header")
		}
	}
	// With a server address, they are the mirror's if that is the one.
	s = open(t, "r.example/app", Options{ConfigDir: dir}, &Credentials{Username: "user", Password: password, ServerAddress: mirror.Host})
	mirror.Add("app", "1", img)
	if _, err := s.Manifest(t.Context(), "1", 1<<20); err != nil {
		t.Error(err)
	}
}

// TestMirrors: order, fallback, capabilities, the default directory, and that
// an edited file counts at once.
func TestMirrors(t *testing.T) {
	first, second := imagetest.NewRegistry(t), imagetest.NewRegistry(t)
	img, _ := manifestOf(second)
	dir := t.TempDir()
	config := `
[host."http://127.0.0.1:1"]
[host."http://%s"]
capabilities = ["pull"]
[host."http://%s"]
`
	writeConfig(t, dir, "_default/hosts.toml", fmt.Sprintf(config, first.Host, second.Host))
	s := open(t, "any.example:1234/app", Options{ConfigDir: dir}, nil)
	if _, err := s.Manifest(t.Context(), "1", 1<<20); err != nil {
		t.Fatal(err)
	}
	if n := len(first.Requests()); n != 0 {
		t.Errorf("a mirror that cannot resolve was asked for a tag")
	}
	if _, err := s.Manifest(t.Context(), string(img.Digest()), 1<<20); err != nil {
		t.Fatal(err)
	}
	if n := len(first.Requests()); n != 1 {
		t.Errorf("got %d requests at the first mirror, want 1", n)
	}
	blob := s.Blob(t.Context(), img.Layers[0].Digest(), int64(len(img.Layers[0].Blob)))
	if got, err := io.ReadAll(blob); err != nil || string(got) != string(img.Layers[0].Blob) {
		t.Errorf("blob: %v", err)
	}
	_ = blob.Close()

	writeConfig(t, dir, "_default/hosts.toml", fmt.Sprintf("server = \"http://%s\"\n", first.Host))
	s = open(t, "any.example:1234/app", Options{ConfigDir: dir}, nil)
	_, err := s.Manifest(t.Context(), "1", 1<<20)
	wantError(t, err, fault.NotFound, first.Host)

	writeConfig(t, dir, "_default/hosts.toml", "[host.\"http://127.0.0.1:1\"]\ncapabilities = [\"pull\"]\n")
	writeConfig(t, dir, "_default/hosts.toml", "server = \"http://127.0.0.1:1\"\ncapabilities = [\"pull\"]\n")
	s = open(t, "any.example:1234/app", Options{ConfigDir: dir}, nil)
	_, err = s.Manifest(t.Context(), "1", 1<<20)
	wantError(t, err, fault.Unavailable, "capability")
}

func TestTLS(t *testing.T) {
	reg := imagetest.NewTLSRegistry(t)
	img, repo := manifestOf(reg)
	_, err := open(t, repo, Options{}, nil).Manifest(t.Context(), "1", 1<<20)
	wantError(t, err, fault.Unavailable, "certificate") // and no fallback to plain HTTP
	dir := t.TempDir()
	name := strings.Replace(reg.Host, ":", "_", 1) + "_"
	for _, config := range []string{"skip_verify = true", `ca = "ca.pem"`} {
		writeConfig(t, dir, name+"/hosts.toml", config)
		writeConfig(t, dir, name+"/ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: reg.Server.Certificate().Raw})))
		doc, err := open(t, repo, Options{ConfigDir: dir}, nil).Manifest(t.Context(), "1", 1<<20)
		if err != nil || doc.Digest != img.Digest() {
			t.Errorf("%s: %v", config, err)
		}
	}
}

func TestRetries(t *testing.T) {
	reg := imagetest.NewRegistry(t)
	_, repo := manifestOf(reg)
	var paused []time.Duration
	s := open(t, repo, Options{Backoff: func(try int) time.Duration { paused = append(paused, time.Duration(try)); return 0 }}, nil)
	for _, tt := range []struct {
		name     string
		status   int
		failures int
		want     error
		requests int
	}{
		{"503 twice", 503, 2, nil, 3},
		{"500 for ever", 500, 100, fault.Unavailable, tries},
		{"429 for ever", 429, 100, fault.Unavailable, tries},
		{"403", 403, 100, fault.Unauthorized, 1},
		{"404", 404, 100, fault.NotFound, 1},
		{"418", 418, 100, fault.Unavailable, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			paused = nil
			left := tt.failures
			reg.Intercept(func(w http.ResponseWriter, _ *http.Request) bool {
				if left == 0 {
					return false
				}
				left--
				w.Header().Set("Retry-After", "0")
				http.Error(w, "<html>"+password, tt.status)
				return true
			})
			_, err := s.Manifest(t.Context(), "1", 1<<20)
			wantError(t, err, tt.want)
			if got := len(reg.Requests()); got != tt.requests {
				t.Errorf("got %d requests, want %d", got, tt.requests)
			}
			if len(paused) != tt.requests-1 {
				t.Errorf("got pauses %v, want %d", paused, tt.requests-1)
			}
		})
	}
	t.Run("nobody there", func(t *testing.T) {
		_, err := open(t, "127.0.0.1:1/app", Options{}, nil).Manifest(t.Context(), "1", 1<<20)
		wantError(t, err, fault.Unavailable, "connection refused")
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("got %v, want ECONNREFUSED in it", err)
		}
	})
	t.Run("response header of 10 MiB", func(t *testing.T) {
		reg.Intercept(func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("X-Large", strings.Repeat("x", 10<<20))
			return false
		})
		_, err := s.Manifest(t.Context(), "1", 1<<20)
		wantError(t, err, fault.Unavailable)
	})
}

func TestRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(Options{Backoff: func(int) time.Duration { return time.Second }})
		for in, want := range map[string]time.Duration{"": time.Second, "7": 7 * time.Second, "100000": maxRetryAfter, "-1": time.Second, "x": time.Second,
			time.Now().UTC().Add(20 * time.Second).Format(http.TimeFormat): 20 * time.Second} {
			start := time.Now()
			if err := c.pause(t.Context(), 1, in); err != nil {
				t.Error(err)
			}
			got := time.Since(start)
			if strings.HasSuffix(in, "GMT") {
				continue // the clock has moved by the others
			}
			if got != want {
				t.Errorf("%q: paused %s, want %s", in, got, want)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := c.pause(ctx, 1, "10"); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want %v", err, context.Canceled)
		}
	})
}

func randomBlob(t testing.TB, size int) []byte {
	t.Helper()
	data := make([]byte, size)
	if _, err := rand.Read(data); err != nil {
		t.Fatal(err)
	}
	return data
}

func readBlob(t testing.TB, s *Source, dgst digest.Digest, size int64) ([]byte, error) {
	t.Helper()
	blob := s.Blob(t.Context(), dgst, size)
	defer blob.Close()
	return io.ReadAll(blob)
}

// TestResume: a connection that breaks is taken up where it broke.
func TestResume(t *testing.T) {
	reg := imagetest.NewRegistry(t)
	data := randomBlob(t, 1<<20)
	reg.PutBlob("app", data)
	dgst := digest.FromBytes(data)
	s := open(t, reg.Host+"/app", Options{}, nil)
	cut := func(after int, ranges bool) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, req *http.Request) bool {
			var start int
			if ranges {
				_, _ = fmt.Sscanf(req.Header.Get("Range"), "bytes=%d-", &start)
			}
			rest := data[start:]
			w.Header().Set("Content-Length", fmt.Sprint(len(rest)))
			if start > 0 {
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", start, len(data)-1, len(data)))
				w.WriteHeader(http.StatusPartialContent)
			}
			n := min(after, len(rest))
			_, _ = w.Write(rest[:n])
			if n < len(rest) {
				w.(http.Flusher).Flush()
				panic(http.ErrAbortHandler)
			}
			return true
		}
	}
	t.Run("every 100 000 bytes", func(t *testing.T) {
		reg.Intercept(cut(100_000, true))
		got, err := readBlob(t, s, dgst, int64(len(data)))
		if err != nil || string(got) != string(data) {
			t.Fatalf("got %d bytes, %v", len(got), err)
		}
		if n := len(reg.Requests()); n != 11 {
			t.Errorf("got %d requests, want 11", n)
		}
	})
	t.Run("without ranges", func(t *testing.T) {
		once := true
		reg.Intercept(func(w http.ResponseWriter, req *http.Request) bool {
			if once {
				once = false
				return cut(300_000, false)(w, req)
			}
			return cut(len(data), false)(w, req)
		})
		got, err := readBlob(t, s, dgst, int64(len(data)))
		if err != nil || string(got) != string(data) {
			t.Fatalf("got %d bytes, %v", len(got), err)
		}
	})
	t.Run("every 10 bytes is given up", func(t *testing.T) {
		reg.Intercept(cut(10, true))
		reg.Requests()
		_, err := readBlob(t, s, dgst, int64(len(data)))
		wantError(t, err, fault.Unavailable, "broke off after", string(dgst))
		if n := len(reg.Requests()); n != tries {
			t.Errorf("got %d requests, want %d", n, tries)
		}
	})
	t.Run("a range that was not asked for", func(t *testing.T) {
		reg.Intercept(func(w http.ResponseWriter, req *http.Request) bool {
			if req.Header.Get("Range") == "" {
				return cut(1000, true)(w, req)
			}
			w.Header().Set("Content-Range", "bytes 5-9/10")
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write([]byte("xxxxx"))
			return true
		})
		_, err := readBlob(t, s, dgst, int64(len(data)))
		wantError(t, err, fault.Unavailable, "sent range")
	})
	t.Run("at another mirror", func(t *testing.T) {
		other := imagetest.NewRegistry(t)
		other.PutBlob("app", data)
		reg.Intercept(cut(500_000, true))
		dir := t.TempDir()
		writeConfig(t, dir, "r.example/hosts.toml", fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\n", other.Host, reg.Host))
		s := open(t, "r.example/app", Options{ConfigDir: dir}, nil)
		blob := s.Blob(t.Context(), dgst, int64(len(data)))
		defer blob.Close()
		start := make([]byte, 100_000)
		if _, err := io.ReadFull(blob, start); err != nil {
			t.Fatal(err)
		}
		reg.Intercept(func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) })
		rest, err := io.ReadAll(blob)
		if err != nil || string(start)+string(rest) != string(data) {
			t.Errorf("got %v", err)
		}
	})
}

// TestSEC75Blob: blobs that are not what the manifest says.
func TestSEC75Blob(t *testing.T) {
	data := randomBlob(t, 100_000)
	dgst := digest.FromBytes(data)
	flipped := append([]byte{data[0] ^ 1}, data[1:]...)
	chunked := func(body []byte) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, _ *http.Request) bool {
			w.(http.Flusher).Flush() // no Content-Length
			_, _ = w.Write(body)
			return true
		}
	}
	for _, tt := range []struct {
		name      string
		body      []byte
		intercept func(http.ResponseWriter, *http.Request) bool
	}{
		{"one byte off", flipped, nil},
		{"short", data[:len(data)-1], nil},
		{"long", append(data[:len(data):len(data)], 'x'), nil},
		{"one byte off, no length", nil, chunked(flipped)},
		{"short, no length", nil, chunked(data[:len(data)-1])},
		{"long, no length", nil, chunked(append(data[:len(data):len(data)], 'x'))},
		{"empty", []byte{}, nil},
		{"page of HTML", nil, chunked([]byte("<html>sign in</html>"))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			reg := imagetest.NewRegistry(t)
			reg.PutBlobAs("app", dgst, tt.body)
			reg.Intercept(tt.intercept)
			s := open(t, reg.Host+"/app", Options{}, nil)
			_, err := readBlob(t, s, dgst, int64(len(data)))
			wantError(t, err, fault.Corrupt, string(dgst))
			reg.Intercept(nil)
			reg.PutBlob("app", data)
			if _, err := readBlob(t, s, dgst, int64(len(data))); err != nil {
				t.Errorf("after the lie: %v", err)
			}
		})
	}
}

// TestStall: no byte for too long ends the pull; slowness does not, nor does a
// reader that takes its time.
func TestStall(t *testing.T) {
	reg := imagetest.NewRegistry(t)
	data := randomBlob(t, 1000)
	dgst := digest.FromBytes(data)
	release := make(chan struct{})
	defer close(release)
	reg.Intercept(func(w http.ResponseWriter, req *http.Request) bool {
		w.Header().Set("Content-Length", "1000")
		_, _ = w.Write(data[:500])
		w.(http.Flusher).Flush()
		select {
		case <-release:
		case <-req.Context().Done():
		}
		return true
	})
	s := open(t, reg.Host+"/app", Options{StallTimeout: 300 * time.Millisecond}, nil)
	start := time.Now()
	_, err := readBlob(t, s, dgst, 1000)
	took := time.Since(start)
	wantError(t, err, fault.Unavailable, "500 of 1000 bytes")
	if took < 250*time.Millisecond || took > 20*time.Second {
		t.Errorf("took %s, want about 300 ms", took)
	}

	reg.Intercept(func(w http.ResponseWriter, _ *http.Request) bool { // slow: 20 pieces, 60 ms apart
		w.Header().Set("Content-Length", "1000")
		tick := time.NewTicker(60 * time.Millisecond)
		defer tick.Stop()
		for i := range 20 {
			_, _ = w.Write(data[i*50 : i*50+50])
			w.(http.Flusher).Flush()
			<-tick.C
		}
		return true
	})
	// In all that is longer than a stall may last.
	s = open(t, reg.Host+"/app", Options{StallTimeout: time.Second}, nil)
	if _, err := readBlob(t, s, dgst, 1000); err != nil {
		t.Errorf("slow: %v", err)
	}
}

// TestCancel: a pull that nobody waits for ends at once.
func TestCancel(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0") // accepts, by its backlog, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("the caller has gone")
	time.AfterFunc(50*time.Millisecond, func() { cancel(gone) })
	start := time.Now()
	_, err = open(t, listener.Addr().String()+"/app", Options{}, nil).Manifest(ctx, "1", 1<<20)
	if !errors.Is(err, gone) || time.Since(start) > time.Second {
		t.Errorf("got %v after %s", err, time.Since(start))
	}
}

func mustParse(t testing.TB, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

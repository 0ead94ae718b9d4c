package imagetest

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Registry is an in-memory registry on a loopback address, for one test. It
// serves what the OCI distribution-spec calls pull, and records every request.
type Registry struct {
	Host   string // host:port
	Server *httptest.Server

	mu        sync.Mutex
	manifests map[string]content // by "repo:tag" and "repo@digest"
	blobs     map[string]content // by "repo@digest"
	requests  []Request
	// intercept, if set, sees each request first; it returns true if it answered.
	intercept func(http.ResponseWriter, *http.Request) bool
}

type content struct {
	mediaType string
	data      []byte
}

// Request is one request as received.
type Request struct {
	Method, Path, Query, Authorization, Range string
	Header                                    http.Header
}

// NewRegistry starts a registry that speaks plain HTTP, and stops it with the test.
func NewRegistry(t testing.TB) *Registry { return start(t, false) }

// NewTLSRegistry starts one that speaks HTTPS; its certificate is Server.Certificate().
func NewTLSRegistry(t testing.TB) *Registry { return start(t, true) }

func start(t testing.TB, tls bool) *Registry {
	r := &Registry{manifests: map[string]content{}, blobs: map[string]content{}}
	r.Server = httptest.NewUnstartedServer(r)
	if tls {
		r.Server.StartTLS()
	} else {
		r.Server.Start()
	}
	u, err := url.Parse(r.Server.URL)
	if err != nil {
		t.Fatal(err)
	}
	r.Host = u.Host
	t.Cleanup(func() {
		r.Server.CloseClientConnections()
		r.Server.Close()
	})
	return r
}

// Intercept lets f answer requests (return true) before the registry does. nil ends that.
func (r *Registry) Intercept(f func(http.ResponseWriter, *http.Request) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.intercept = f
}

// Requests returns what was received so far, and forgets it.
func (r *Registry) Requests() []Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	requests := r.requests
	r.requests = nil
	return requests
}

// Add stores an image under a tag ("" for none) and its digest. It returns "host/repo:tag".
func (r *Registry) Add(repo, tag string, img *Image) string {
	r.PutBlob(repo, img.ConfigBlob())
	for _, l := range img.Layers {
		r.PutBlob(repo, l.Blob)
	}
	return r.PutManifest(repo, tag, img.MediaType(), img.ManifestBlob())
}

// AddIndex stores an index and its images.
func (r *Registry) AddIndex(repo, tag string, index *Index) string {
	for _, img := range index.Images {
		r.Add(repo, "", img)
	}
	return r.PutManifest(repo, tag, index.MediaType(), index.Blob())
}

// PutBlob stores bytes under their digest.
func (r *Registry) PutBlob(repo string, data []byte) {
	r.PutBlobAs(repo, digest.FromBytes(data), data)
}

// PutBlobAs stores bytes under a digest that need not be theirs.
func (r *Registry) PutBlobAs(repo string, dgst digest.Digest, data []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.blobs[repo+"@"+string(dgst)] = content{"application/octet-stream", data}
}

// PutManifest stores a manifest under its digest and a tag.
func (r *Registry) PutManifest(repo, tag, mediaType string, data []byte) string {
	r.PutManifestAs(repo, digest.FromBytes(data), mediaType, data)
	if tag == "" {
		return r.Host + "/" + repo + "@" + string(digest.FromBytes(data))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.manifests[repo+":"+tag] = content{mediaType, data}
	return r.Host + "/" + repo + ":" + tag
}

// PutManifestAs stores a manifest under a digest that need not be its own.
func (r *Registry) PutManifestAs(repo string, dgst digest.Digest, mediaType string, data []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.manifests[repo+"@"+string(dgst)] = content{mediaType, data}
}

// ServeHTTP implements http.Handler.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	r.requests = append(r.requests, Request{
		Method: req.Method, Path: req.URL.Path, Query: req.URL.RawQuery,
		Authorization: req.Header.Get("Authorization"), Range: req.Header.Get("Range"), Header: req.Header.Clone(),
	})
	intercept := r.intercept
	r.mu.Unlock()
	if intercept != nil && intercept(w, req) {
		return
	}
	if req.URL.Path == "/v2/" {
		w.WriteHeader(http.StatusOK)
		return
	}
	found, ok := r.find(req.URL.Path)
	if !ok {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusNotFound)
		_, _ = io.WriteString(w, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"not here"}]}`)
		return
	}
	w.Header().Set("Content-Type", found.mediaType)
	if strings.Contains(req.URL.Path, "/manifests/") {
		w.Header().Set("Docker-Content-Digest", string(digest.FromBytes(found.data)))
	}
	http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(found.data)) // knows Range
}

func (r *Registry) find(path string) (content, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	path = strings.TrimPrefix(path, "/v2/")
	if repo, dgst, ok := strings.Cut(path, "/blobs/"); ok {
		found, ok := r.blobs[repo+"@"+dgst]
		return found, ok
	}
	repo, ref, ok := strings.Cut(path, "/manifests/")
	if !ok {
		return content{}, false
	}
	separator := ":"
	if strings.Contains(ref, ":") {
		separator = "@"
	}
	found, ok := r.manifests[repo+separator+ref]
	return found, ok
}

// RequireBasic returns an interceptor that wants this user and password.
func RequireBasic(user, password string) func(http.ResponseWriter, *http.Request) bool {
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
	return func(w http.ResponseWriter, req *http.Request) bool {
		if req.Header.Get("Authorization") == want {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
}

// RequireBearer returns an interceptor that wants one of the tokens and sends
// those without to realm. tokens is asked anew for each request.
func RequireBearer(realm string, tokens func() []string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, req *http.Request) bool {
		token, ok := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer ")
		if ok && slices.Contains(tokens(), token) {
			return false
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm=%q,service="test"`, realm))
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
}

// Push uploads an image to a registry at base ("http://127.0.0.1:5000") with
// monolithic uploads (OCI distribution-spec "Pushing blobs").
func Push(ctx context.Context, base, repo, tag string, img *Image) error {
	blobs := [][]byte{img.ConfigBlob()}
	for _, l := range img.Layers {
		blobs = append(blobs, l.Blob)
	}
	for _, blob := range blobs {
		if err := pushBlob(ctx, base, repo, blob); err != nil {
			return err
		}
	}
	return pushManifest(ctx, base, repo, tag, img.MediaType(), img.ManifestBlob())
}

// PushIndex uploads an index and its images.
func PushIndex(ctx context.Context, base, repo, tag string, index *Index) error {
	for _, img := range index.Images {
		if err := Push(ctx, base, repo, string(img.Digest()), img); err != nil {
			return err
		}
	}
	return pushManifest(ctx, base, repo, tag, index.MediaType(), index.Blob())
}

func pushManifest(ctx context.Context, base, repo, ref, mediaType string, data []byte) error {
	resp, err := send(ctx, http.MethodPut, base+"/v2/"+repo+"/manifests/"+ref, mediaType, data)
	if err == nil && resp.StatusCode != http.StatusCreated {
		err = fmt.Errorf("%s", resp.Status)
	}
	if err != nil {
		return fmt.Errorf("cannot push the manifest of %s:%s: %w", repo, ref, err)
	}
	return nil
}

func pushBlob(ctx context.Context, base, repo string, data []byte) error {
	dgst := digest.FromBytes(data)
	resp, err := send(ctx, http.MethodPost, base+"/v2/"+repo+"/blobs/uploads/", "", nil)
	if err != nil {
		return fmt.Errorf("cannot push blob %s: %w", dgst, err)
	}
	location, err := resp.Location()
	if err != nil {
		return fmt.Errorf("cannot push blob %s: %s: %w", dgst, resp.Status, err)
	}
	query := location.Query()
	query.Set("digest", string(dgst))
	location.RawQuery = query.Encode()
	resp, err = send(ctx, http.MethodPut, location.String(), "application/octet-stream", data)
	if err == nil && resp.StatusCode != http.StatusCreated {
		err = fmt.Errorf("%s", resp.Status)
	}
	if err != nil {
		return fmt.Errorf("cannot push blob %s: %w", dgst, err)
	}
	return nil
}

func send(ctx context.Context, method, url, mediaType string, data []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	if mediaType != "" {
		req.Header.Set("Content-Type", mediaType)
	}
	req.Header.Set("Content-Length", strconv.Itoa(len(data)))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp, resp.Body.Close()
}

// Descriptor describes bytes.
func Descriptor(mediaType string, data []byte) imagespec.Descriptor {
	return imagespec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
}

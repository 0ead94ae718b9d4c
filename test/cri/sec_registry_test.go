package cri

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/test/images"
)

// liar is a registry of the test's own. It is honest but for what intercept does; then the answer is true.
type liar struct {
	*httptest.Server
	name      string // a host name that leads to it
	intercept func(http.ResponseWriter, *http.Request) bool
}

func (w *world) liar(t *testing.T, name string) *liar {
	t.Helper()
	l := &liar{name: name}
	honest := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	l.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if l.intercept == nil || !l.intercept(w, r) {
			honest.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(l.Server.Close)
	mustWrite(t, filepath.Join(w.certs, name, "hosts.toml"), fmt.Sprintf("server = %q\n", l.URL))
	return l
}

func (l *liar) host() string { return strings.TrimPrefix(l.URL, "http://") }

func digestOf(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }

func compressGzip(b []byte) []byte {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, _ = w.Write(b) // into memory
	_ = w.Close()
	return out.Bytes()
}

// parts is an image as blobs, for the test to forge.
type parts struct {
	layer, config   []byte
	manifest, index map[string]any
}

const (
	ociManifest = "application/vnd.oci.image.manifest.v1+json"
	ociIndex    = "application/vnd.oci.image.index.v1+json"
)

// newParts is a good image of one empty layer.
func newParts() *parts {
	tar := make([]byte, 1024) // the end of an archive
	p := &parts{layer: compressGzip(tar)}
	p.config = asJSON(map[string]any{"architecture": "amd64", "os": "linux", "config": map[string]any{}, "rootfs": map[string]any{"type": "layers", "diff_ids": []string{digestOf(tar)}}})
	p.manifest = map[string]any{
		"schemaVersion": 2, "mediaType": ociManifest,
		"config": descriptor("application/vnd.oci.image.config.v1+json", p.config),
		"layers": []any{descriptor("application/vnd.oci.image.layer.v1.tar+gzip", p.layer)},
	}
	return p
}

func descriptor(mediaType string, b []byte) map[string]any {
	return map[string]any{"mediaType": mediaType, "digest": digestOf(b), "size": len(b)}
}

func asJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // a literal of this file
	}
	return b
}

// serve answers like a registry that has just this image.
func (p *parts) serve(manifest []byte, mediaType string, more map[string][]byte) func(http.ResponseWriter, *http.Request) bool {
	blobs := map[string][]byte{digestOf(p.layer): p.layer, digestOf(p.config): p.config}
	return func(w http.ResponseWriter, r *http.Request) bool {
		_, last, _ := strings.Cut(r.URL.Path, "/v2/forged/x/")
		kind, what, ok := strings.Cut(last, "/")
		switch {
		case more[last] != nil:
			if strings.HasPrefix(kind, "manifests") {
				w.Header().Set("Content-Type", ociIndex)
			}
			_, _ = w.Write(more[last])
		case !ok:
			w.WriteHeader(http.StatusOK)
		case kind == "blobs" && blobs[what] != nil:
			_, _ = w.Write(blobs[what])
		case kind == "manifests" && (what == "1" || what == digestOf(manifest)):
			w.Header().Set("Content-Type", mediaType)
			_, _ = w.Write(manifest)
		default:
			http.NotFound(w, r)
		}
		return true
	}
}

func TestSEC71_75_76_77_79_80_LyingRegistriesAreRefused(t *testing.T) {
	w := need(t)
	l := w.liar(t, "liar.example")
	pid := w.PID
	good := newParts()
	honest := good.serve(asJSON(good.manifest), ociManifest, nil)
	with := func(change func(p *parts)) func(http.ResponseWriter, *http.Request) bool {
		p := newParts()
		change(p)
		return p.serve(asJSON(p.manifest), ociManifest, nil)
	}
	layer := func(key string, value any) func(http.ResponseWriter, *http.Request) bool {
		return with(func(p *parts) { p.manifest["layers"].([]any)[0].(map[string]any)[key] = value })
	}
	config := func(v any) func(http.ResponseWriter, *http.Request) bool {
		return with(func(p *parts) {
			p.config = asJSON(v)
			p.manifest["config"] = descriptor("application/vnd.oci.image.config.v1+json", p.config)
		})
	}
	blob := func(b []byte) func(http.ResponseWriter, *http.Request) bool {
		return good.serve(asJSON(good.manifest), ociManifest, map[string][]byte{"blobs/" + digestOf(good.layer): b})
	}
	raw := func(b []byte, mediaType string) func(http.ResponseWriter, *http.Request) bool {
		return good.serve(b, mediaType, nil)
	}
	off := slices.Clone(good.layer)
	off[len(off)-1] ^= 1
	other := asJSON(map[string]any{"schemaVersion": 2, "manifests": []any{}})
	for name, lie := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"SEC-71 another diff id": config(map[string]any{"architecture": "amd64", "os": "linux", "rootfs": map[string]any{"type": "layers", "diff_ids": []string{digestOf(nil)}}}),
		"SEC-71 no diff id":      config(map[string]any{"architecture": "amd64", "os": "linux", "rootfs": map[string]any{"type": "layers", "diff_ids": []string{}}}),
		"SEC-75 a byte off":      blob(off),
		"SEC-75 short":           blob(good.layer[:len(good.layer)-1]),
		"SEC-75 long":            blob(append(slices.Clone(good.layer), 0)),
		"SEC-75 wrong size":      layer("size", len(good.layer)+1),
		"SEC-75 manifest by digest with other bytes": func(rw http.ResponseWriter, r *http.Request) bool {
			rw.Header().Set("Content-Type", ociManifest)
			if strings.Contains(r.URL.Path, "/manifests/sha256:") {
				_, _ = rw.Write(append(asJSON(good.manifest), ' '))
				return true
			}
			rw.Header().Set("Docker-Content-Digest", digestOf(other))
			return honest(rw, r)
		},
		"SEC-76 digest with ..":         layer("digest", "sha256:../../../../etc/passwd"),
		"SEC-76 digest too short":       layer("digest", "sha256:abc"),
		"SEC-76 digest in capitals":     layer("digest", strings.ToUpper(digestOf(good.layer))),
		"SEC-76 md5":                    layer("digest", "md5:d41d8cd98f00b204e9800998ecf8427e"),
		"SEC-76 no digest":              layer("digest", ""),
		"SEC-77 manifests and layers":   with(func(p *parts) { p.manifest["manifests"] = []any{} }),
		"SEC-77 sent as something else": raw(asJSON(good.manifest), ociIndex),
		"SEC-79 5 MiB":                  raw(asJSON(map[string]any{"schemaVersion": 2, "x": strings.Repeat("x", 5<<20)}), ociManifest),
		"SEC-79 a million descriptors":  raw([]byte(`{"schemaVersion":2,"manifests":[`+strings.Repeat("{},", 1_000_000)+`{}]}`), ociIndex),
		"SEC-79 deep":                   raw([]byte(strings.Repeat(`{"config":`, 100_000)), ociManifest),
		"SEC-79 config of 5 MiB":        with(func(p *parts) { p.manifest["config"].(map[string]any)["size"] = 5 << 20 }),
		"SEC-80 null":                   raw([]byte("null"), ociManifest),
		"SEC-80 nothing":                raw(nil, ociManifest),
		"SEC-80 no config":              with(func(p *parts) { p.manifest["config"] = nil }),
		"SEC-80 wrong types":            raw([]byte(`{"schemaVersion":"2","config":[],"layers":{}}`), ociManifest),
		"SEC-80 negative size":          layer("size", -1),
		"SEC-80 config a list":          config([]int{1}),
	} {
		t.Run(name, func(t *testing.T) {
			ref := l.name + "/forged/x:1"
			w.leavesNothing(t, func() {
				l.intercept = lie
				if strings.Contains(name, "by digest") {
					ref = l.name + "/forged/x@" + digestOf(asJSON(good.manifest))
				}
				if id, err := w.im.PullImage(t.Context(), &runtimeapi.ImageSpec{Image: ref}, nil, nil); err == nil {
					t.Error("the lie was believed")
					w.rmi(t, id)
				}
				l.intercept = honest
				id, err := w.im.PullImage(t.Context(), &runtimeapi.ImageSpec{Image: ref}, nil, nil)
				if err != nil {
					t.Fatalf("the truth was not, after the lie: %v", err)
				}
				w.rmi(t, id)
			})
		})
	}
	if w.PID != pid {
		t.Errorf("crispd was %d and is %d", pid, w.PID)
	}
}

// Credentials go to the registry that they are for and nowhere else, and into no text.
func TestSEC78_81_CredentialsStayWhereTheyBelong(t *testing.T) {
	w := need(t)
	l := w.liar(t, "liar.example")
	const user, password = "alice", "s3cr3t-of-the-test"
	var leaked []string
	thief := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if a := r.Header.Get("Authorization"); a != "" {
			leaked = append(leaked, r.URL.Path+": "+a)
		}
		http.Error(rw, "no", http.StatusUnauthorized)
	}))
	defer thief.Close()
	good := newParts()
	honest := good.serve(asJSON(good.manifest), ociManifest, nil)
	for name, lie := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"blobs redirected": func(rw http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/blobs/") {
				http.Redirect(rw, r, thief.URL+"/blob", http.StatusTemporaryRedirect)
				return true
			}
			return honest(rw, r)
		},
		"manifest redirected": func(rw http.ResponseWriter, r *http.Request) bool {
			http.Redirect(rw, r, thief.URL+"/manifest", http.StatusFound)
			return true
		},
		"foreign layer": func(rw http.ResponseWriter, r *http.Request) bool {
			p := newParts()
			d := p.manifest["layers"].([]any)[0].(map[string]any)
			d["mediaType"], d["urls"] = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", []string{thief.URL + "/layer"}
			return p.serve(asJSON(p.manifest), ociManifest, nil)(rw, r)
		},
		"token from elsewhere": func(rw http.ResponseWriter, r *http.Request) bool {
			rw.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="x"`, thief.URL))
			http.Error(rw, "denied "+r.Header.Get("Authorization"), http.StatusUnauthorized)
			return true
		},
		"endless redirects": func(rw http.ResponseWriter, r *http.Request) bool {
			http.Redirect(rw, r, l.URL+r.URL.Path+"x", http.StatusFound)
			return true
		},
		"an answer that echoes": func(rw http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Authorization") == "" {
				rw.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			}
			http.Error(rw, user+" "+password+" "+r.Header.Get("Authorization"), http.StatusUnauthorized)
			return true
		},
	} {
		t.Run(name, func(t *testing.T) {
			l.intercept, leaked = lie, nil
			id, err := w.im.PullImage(t.Context(), &runtimeapi.ImageSpec{Image: l.name + "/forged/x:1"}, &runtimeapi.AuthConfig{Username: user, Password: password}, nil)
			if err == nil {
				w.rmi(t, id)
				if name != "foreign layer" {
					t.Error("the image was pulled")
				}
			}
			if len(leaked) > 0 {
				t.Errorf("the other server was told %q", leaked)
			}
			for _, text := range []string{fmt.Sprint(err), w.LastLog()} {
				if strings.Contains(text, password) || strings.Contains(text, "YWxpY2U6czNjcjN0") {
					t.Errorf("the password is in %q", text)
				}
			}
		})
	}
}

// What an image says of itself makes no name, no label of a container, no log, no process, no checkpoint.
func TestSEC53_82_102_WhatAnImageSaysOfItselfIsOnlyText(t *testing.T) {
	w := need(t)
	l := w.liar(t, "liar.example")
	p := newParts()
	tar := make([]byte, 1024)
	labels := map[string]string{
		"containerd.io/restart.loguri": "binary:///bin/sh?-c=touch%20/tmp/x", "io.kubernetes.cri-o.LogPath": "/etc/passwd",
		"io.cri-containerd.kind": "sandbox", "io.kubernetes.container.name": "forged",
	}
	for i := range 500 {
		labels[fmt.Sprintf("label-%d", i)] = strings.Repeat("x", 100)
	}
	p.config = asJSON(map[string]any{"architecture": "amd64", "os": "linux", "config": map[string]any{"Labels": labels}, "rootfs": map[string]any{"type": "layers", "diff_ids": []string{digestOf(tar)}}})
	p.manifest["config"] = descriptor("application/vnd.oci.image.config.v1+json", p.config)
	p.manifest["annotations"] = map[string]string{
		"org.opencontainers.image.ref.name": "registry.example/crisp/stolen:1", "io.containerd.image.name": "registry.example/crisp/stolen:2",
		"org.criu.checkpoint.container.name": "x", "io.kubernetes.cri-o.annotations.checkpoint.name": "x", "org.criu.checkpoint.engine.name": "CRI-O",
	}
	l.intercept = p.serve(asJSON(p.manifest), ociManifest, nil)
	id, err := w.im.PullImage(t.Context(), &runtimeapi.ImageSpec{Image: l.name + "/forged/x:1"}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.rmi(t, id)
	if got := w.imageStatus(t, id).RepoTags; !slices.Equal(got, []string{l.name + "/forged/x:1"}) {
		t.Errorf("got the names %q", got)
	}
	for _, ref := range []string{"registry.example/crisp/stolen:1", "registry.example/crisp/stolen:2"} {
		if im := w.imageStatus(t, ref); im != nil {
			t.Errorf("%s leads to %s", ref, im.Id)
		}
	}
	c := w.pod(t).create([]string{"sleep"}, withImage(id), func(c *runtimeapi.ContainerConfig) { c.Labels = map[string]string{"mine": "1"} })
	if got := c.status().Labels; len(got) != 1 || got["mine"] != "1" {
		t.Errorf("the container has %d labels: %q", len(got), got)
	}
}

// An image is unpacked within limits, whatever its archive promises; one that is refused leaves nothing and nobody else waits for it.
func TestSEC67_68_70_ArchivesThatWouldFillOrStopTheNode(t *testing.T) {
	w := need(t)
	before := rss(t, w.PID)
	deep := strings.Repeat("d/", 3000)
	for name, files := range map[string][]images.File{
		"a name of 4097 bytes":  {{Name: strings.Repeat("n", 4097), Text: "x"}},
		"3000 directories deep": {{Name: deep + "f", Text: "x"}},
		"a PAX record of a MiB": {{Name: "f", Text: "x", PAX: map[string]string{"SCHILY.xattr.user.x": strings.Repeat("x", 1<<20-100)}}},
		"many attributes":       {{Name: "f", Text: "x", PAX: manyAttributes(5000)}},
	} {
		t.Run(name, func(t *testing.T) {
			ref := w.push(t, "bomb", images.Image{Layers: append(w.layers(t), files)})
			w.leavesNothing(t, func() {
				id, err := w.im.PullImage(t.Context(), &runtimeapi.ImageSpec{Image: ref}, nil, nil)
				if err == nil {
					w.rmi(t, id)
				}
				if err == nil || !strings.Contains(err.Error(), "limit") {
					t.Errorf("got %v, want an error that names a limit", err)
				}
			})
		})
	}
	if after := rss(t, w.PID); after > before+64<<20 {
		t.Errorf("crispd has %d bytes, had %d", after, before)
	}
}

func manyAttributes(n int) map[string]string {
	m := map[string]string{}
	for i := range n {
		m[fmt.Sprintf("SCHILY.xattr.user.%d", i)] = "x"
	}
	return m
}

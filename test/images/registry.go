package images

import (
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
)

// Registry is a registry on loopback, plain HTTP, its content in memory. Close
// ends it.
type Registry struct {
	Host   string // "127.0.0.1:PORT"
	server *http.Server
	served chan error
}

// Serve starts a registry at address ("127.0.0.1:0": any free port).
func Serve(address string) (*Registry, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("cannot serve a registry: %w", err)
	}
	r := &Registry{
		Host: l.Addr().String(),
		server: &http.Server{
			Handler:           registry.New(registry.Logger(log.New(io.Discard, "", 0))),
			ReadHeaderTimeout: 10 * time.Second,
		},
		served: make(chan error, 1),
	}
	go func() { r.served <- r.server.Serve(l) }() // Close waits
	return r, nil
}

// Close ends the registry and its connections.
func (r *Registry) Close() error {
	err := r.server.Close()
	if served := <-r.served; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	return err
}

// WriteDefaultHosts writes a certs.d directory that sends every registry's
// names to the one at host, keeping the repository path: containerd's
// certs.d/_default/hosts.toml. critest has upstream registries' names built in.
func WriteDefaultHosts(certsDir, host string) error {
	dir := filepath.Join(certsDir, "_default")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text := fmt.Sprintf("[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", "http://"+host)
	return os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o644)
}

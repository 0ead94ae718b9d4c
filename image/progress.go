package image

import (
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
)

// Stage of a pull.
type Stage int32

// The stages, in their order.
const (
	StageResolve Stage = iota // asking the registry for manifest and config
	StageLayers               // fetching and unpacking layers
	StageCommit               // syncing and recording
)

// String returns the stage's name.
func (s Stage) String() string {
	switch s {
	case StageResolve:
		return "resolving"
	case StageLayers:
		return "fetching"
	case StageCommit:
		return "committing"
	}
	return "unknown"
}

// PullProgress tells how far a pull under way is.
type PullProgress struct {
	Ref         string
	Stage       Stage
	Done, Total int64 // bytes of compressed layers; those already here count as done. Total is 0 while resolving
	Started     time.Time
}

// pullProgress is the state of one pull.
type pullProgress struct {
	ref     string
	started time.Time
	stage   atomic.Int32
	layers  atomic.Pointer[[]layerDesc]
}

// Progress returns the pulls under way, by reference.
func (s *Store) Progress() []PullProgress {
	s.mu.RLock()
	defer s.mu.RUnlock()
	list := make([]PullProgress, 0, len(s.progress))
	for p := range s.progress {
		line := PullProgress{Ref: p.ref, Stage: Stage(p.stage.Load()), Started: p.started}
		if layers := p.layers.Load(); layers != nil {
			for _, l := range *layers {
				line.Total += l.Blob.Size
				if r := s.layers[l.DiffID]; r != nil && slices.Contains(r.Blobs, l.Blob.Digest) {
					line.Done += l.Blob.Size
				} else if n := s.received[l.Blob.Digest]; n != nil {
					line.Done += n.Load()
				}
			}
		}
		list = append(list, line)
	}
	slices.SortFunc(list, func(a, b PullProgress) int { return strings.Compare(a.Ref, b.Ref) })
	return list
}

func (s *Store) startProgress(ref string) *pullProgress {
	p := &pullProgress{ref: ref, started: time.Now()}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.progress[p] = true
	return p
}

func (s *Store) endProgress(p *pullProgress) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.progress, p)
}

func (p *pullProgress) start(layers []layerDesc) {
	p.layers.Store(&layers)
	p.stage.Store(int32(StageLayers))
}

// setReceived announces the counter of a blob being fetched; nil: it has ended.
func (s *Store) setReceived(blob digest.Digest, n *atomic.Int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n == nil {
		delete(s.received, blob)
	} else {
		s.received[blob] = n
	}
}

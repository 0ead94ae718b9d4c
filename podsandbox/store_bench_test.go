package podsandbox

import (
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// BenchmarkStore is what the disk costs on the way of a pod with one container: no sync is among it (store.go says why).
func BenchmarkStore(b *testing.B) {
	dir := b.TempDir()
	s, err := openStore(dir+"/state", dir+"/run")
	if err != nil {
		b.Fatal(err)
	}
	defer s.flush.close()
	parts := map[string]time.Duration{}
	measure := func(name string, f func() error) {
		began := time.Now()
		if err := f(); err != nil {
			b.Fatal(name, err)
		}
		parts[name] += time.Since(began)
	}
	config := podConfig("a")
	config.Echo = []byte(strings.Repeat("x", 1000))
	spec := &specs.Spec{Process: &specs.Process{Args: []string{strings.Repeat("x", 10_000)}}}
	for b.Loop() {
		r := &podRecord{ID: newID(), Config: config}
		c := &containerRecord{ID: newID(), PodID: r.ID, Config: containerConfig("c")}
		measure("createPod", func() error { return s.createPod(r) })
		measure("files", func() error { return writeFiles(s.runDir(r.ID), dir, config, nil) })
		measure("commitPod", func() error { return s.appendState(s.podDir(r.ID), &podState{Phase: podReady}) })
		measure("createContainer", func() error { return s.createContainer(c) })
		measure("writeConfig", func() error { return s.writeConfig(r.ID, c.ID, spec) })
		measure("commitContainer", func() error {
			return s.appendState(s.containerDir(r.ID, c.ID), &containerState{Phase: containerCreated})
		})
		measure("started", func() error {
			return s.appendState(s.containerDir(r.ID, c.ID), &containerState{Phase: containerRunning})
		})
		measure("removeContainer", func() error { return s.removeContainer(r.ID, c.ID) })
		measure("removePod", func() error { return s.removePod(r.ID) })
	}
	for name, d := range parts {
		b.ReportMetric(float64(d.Microseconds())/float64(b.N), name+"-µs")
	}
}

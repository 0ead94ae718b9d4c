package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/crisp-cri/crisp/test/images"
)

// The floor must really run the container and leave nothing, or every ratio is wrong.
func TestFloor(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes namespaces, mounts and cgroups")
	}
	dir := t.TempDir()
	payload, err := images.BuildPayload(dir)
	if err != nil {
		t.Fatal(err)
	}
	binaries := map[string]string{}
	for _, name := range []string{"floor", "trivial"} {
		binaries[name] = filepath.Join(dir, name)
		build := exec.Command("go", "build", "-o", binaries[name], "./"+name)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	f, err := newFloor(options{floor: binaries["floor"], trivial: binaries["trivial"], payload: payload})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := f.close(); err != nil {
			t.Error(err)
		}
	}()
	for i := range 5 {
		var laps []string
		last := time.Now()
		err := f.cycle(t.Context(), i, func(op string) {
			laps = append(laps, op)
			t.Logf("%-7s %.2f ms", op, ms(time.Since(last)))
			last = time.Now()
		})
		if err != nil {
			t.Fatal(err)
		}
		if len(laps) != len(operations) {
			t.Errorf("got laps %v, want %v", laps, operations)
		}
	}
}

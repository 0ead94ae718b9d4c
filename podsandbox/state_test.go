package podsandbox

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files")

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: got\n%s\nwant\n%s", path, got, want)
	}
}

var (
	podPhases  = []podPhase{podMaking, podUndoing, podReady, podDead, podStopping, podStopped, podRemoving, podGone}
	podEvents  = []podEvent{podCommit, podFail, podDie, podStop, podIsDown, podRemove, podIsGone}
	contPhases = []containerPhase{containerMaking, containerUndoing, containerCreated, containerRunning, containerExited, containerRemoving, containerGone}
	contEvents = []containerEvent{containerCommit, containerFail, containerStarted, containerExit, containerRemove, containerIsGone}
)

// The golden file is the whole state × event table: every cell is either a phase or a refusal.
func TestPodTable(t *testing.T) {
	var b strings.Builder
	fmt.Fprintf(&b, "%-10s", "")
	for _, e := range podEvents {
		fmt.Fprintf(&b, " %-10s", e)
	}
	b.WriteString(" shown\n")
	for _, p := range podPhases {
		fmt.Fprintf(&b, "%-10s", p)
		for _, e := range podEvents {
			next, err := p.next(e)
			cell := string(next)
			if err != nil {
				cell = "-"
				if !errors.Is(err, ErrState) || next != p {
					t.Errorf("%s × %s: got %q, %v, want the same phase and ErrState", p, e, next, err)
				}
			}
			fmt.Fprintf(&b, " %-10s", cell)
		}
		fmt.Fprintf(&b, " %v\n", p.shown())
	}
	golden(t, "pod-table.txt", b.String())
}

func TestContainerTable(t *testing.T) {
	var b strings.Builder
	fmt.Fprintf(&b, "%-10s", "")
	for _, e := range contEvents {
		fmt.Fprintf(&b, " %-10s", e)
	}
	b.WriteString(" shown\n")
	for _, p := range contPhases {
		fmt.Fprintf(&b, "%-10s", p)
		for _, e := range contEvents {
			next, err := p.next(e)
			cell := string(next)
			if err != nil {
				cell = "-"
				if !errors.Is(err, ErrState) || next != p {
					t.Errorf("%s × %s: got %q, %v, want the same phase and ErrState", p, e, next, err)
				}
			}
			fmt.Fprintf(&b, " %-10s", cell)
		}
		fmt.Fprintf(&b, " %s\n", p.shown())
	}
	golden(t, "container-table.txt", b.String())
}

package node

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

// Leftovers must see each kind of thing, and Remove must take all of them away:
// a leak check that sees nothing is worse than none.
func TestLeftovers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a link and a cgroup")
	}
	n, err := New(Options{Crispd: "/nonexistent"})
	if err != nil {
		t.Fatal(err)
	}
	removed := false
	defer func() {
		if !removed {
			_ = n.Remove() // the test failed already
		}
	}()
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: n.Bridge}}); err != nil {
		t.Fatal(err)
	}
	parent := cgroupRoot
	if _, err := os.Stat(parent + "/cgroup.procs"); err != nil {
		parent += "/memory"
	}
	if err := os.MkdirAll(parent+n.Cgroups+"/pod", 0o755); err != nil {
		t.Fatal(err)
	}
	left, err := n.Leftovers()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"link " + n.Bridge, "cgroup " + parent + n.Cgroups + "/pod", "file " + n.StateDir, "file " + n.RunDir} {
		if !slices.Contains(left, want) {
			t.Errorf("Leftovers does not see %s; got:\n%s", want, strings.Join(left, "\n"))
		}
	}
	removed = true
	if err := n.Remove(); err != nil {
		t.Error(err)
	}
	if left, err = n.Leftovers(); err != nil || len(left) > 0 {
		t.Errorf("after Remove: %v, %v", left, err)
	}
}

func TestStartReportsWhyNot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes directories in /run")
	}
	n, err := New(Options{Crispd: "/bin/false"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := n.Remove(); err != nil {
			t.Error(err)
		}
	}()
	if err := n.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "it ended at once: exit status 1") {
		t.Errorf("got %v, want that it ended at once", err)
	}
}

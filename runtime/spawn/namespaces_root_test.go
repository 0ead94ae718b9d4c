package spawn

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A pod in prepared namespaces has the same as one that was cloned into its own: not the host's, with lo up. What was prepared in vain
// leaves no thread, and what is prepared for a pod with a user namespace is nothing.
func TestPrepare(t *testing.T) {
	h := newHost(t)
	ns := func(pid, name string) string {
		target, err := os.Readlink(filepath.Join("/proc", pid, "ns", name))
		if err != nil {
			t.Fatal(err)
		}
		return target
	}
	for _, c := range []struct {
		name  string
		args  PodArgs
		owned string // namespaces that are the pod's own
	}{
		{"all", PodArgs{}, "net uts ipc mnt"},
		{"host network", PodArgs{HostNetwork: true}, "ipc mnt"},
		{"host IPC", PodArgs{HostIPC: true}, "net uts mnt"},
		{"nothing to prepare", PodArgs{HostNetwork: true, HostIPC: true}, "mnt"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := h.Prepare(c.args)
			if nothing := c.owned == "mnt"; (n == nil) != nothing {
				t.Fatalf("prepared %v", n)
			}
			p := h.pod(func(a *PodArgs) {
				a.HostNetwork, a.HostIPC, a.Namespaces = c.args.HostNetwork, c.args.HostIPC, n
			})
			for _, name := range []string{"net", "uts", "ipc", "mnt"} {
				own := ns(number(p.PID()), name) != ns("self", name)
				if want := strings.Contains(c.owned, name); own != want {
					t.Errorf("%s namespace of its own: %v, want %v", name, own, want)
				}
			}
			if !c.args.HostNetwork {
				routes, err := os.ReadFile(filepath.Join("/proc", number(p.PID()), "net/fib_trie"))
				if err != nil || !strings.Contains(string(routes), "127.0.0.1") {
					t.Errorf("lo is not up: routes %q, %v", routes, err)
				}
			}
		})
	}
	threads := func() int {
		l, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		return len(l)
	}
	before := threads()
	for range 20 {
		n := h.Prepare(PodArgs{})
		n.Close()
		n.Close()
	}
	if after := threads(); after > before+5 {
		t.Errorf("%d threads, %d before", after, before)
	}
	if n := h.Prepare(PodArgs{Userns: &IDMap{UID: 100000, GID: 100000, Size: 65536}}); n != nil {
		t.Error("prepared something for a pod with a user namespace")
	}
}

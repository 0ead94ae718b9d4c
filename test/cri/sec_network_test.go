package cri

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// CVE-2021-20206: a type of a CNI configuration is a name in the plugins' directories, not a path.
func TestSEC114_PluginsAreFoundByNameOnly(t *testing.T) {
	n := newCNI(t)
	marker := filepath.Join(t.TempDir(), "ran")
	evil := filepath.Join(t.TempDir(), "evil")
	if err := os.WriteFile(evil, []byte("#!/bin/sh\ntouch "+marker+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{evil, strings.Repeat("../", 12) + evil[1:]} {
		n.configure(`{"type":"` + path + `"}`)
		eventually(t, "Status tells", func() bool { return !n.networkReady(t).Status })
		if id, err := n.rt.RunPodSandbox(t.Context(), n.podConfig("p"), ""); err == nil {
			t.Errorf("a pod with plugin %s runs", path)
			n.adopt(t, id, n.podConfig("p")).remove()
		}
		if _, err := os.Lstat(marker); err == nil {
			t.Errorf("%s was run", path)
		}
	}
}

// CVE-2024-32473: a pod of a node with IPv4 only has no other address, and its resolver is what it was told.
func TestSEC116_NoIPv6UnlessConfigured(t *testing.T) {
	need(t)
	w := own(t, "--set", `network.subnets=["10.63.254.0/24"]`)
	c := w.pod(t).run([]string{"sleep"})
	for line := range strings.Lines(c.exec("cat", "/proc/net/if_inet6")) {
		if f := strings.Fields(line); len(f) > 5 && f[5] != "lo" {
			t.Errorf("got %q", line)
		}
	}
	if got := strings.TrimSpace(c.exec("cat", "/proc/sys/net/ipv6/conf/eth0/disable_ipv6")); got != "1" {
		t.Errorf("disable_ipv6 of eth0: got %s, want 1: a link-local address is one, too", got)
	}
}

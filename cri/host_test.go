package cri

import (
	"os"
	"path"
	"runtime"
	"slices"
	"testing"
)

func TestProbeHost(t *testing.T) {
	got, err := ProbeHost()
	if err != nil {
		t.Fatal(err)
	}
	if name, err := os.Hostname(); err != nil || got.Hostname != name || got.Arch != runtime.GOARCH {
		t.Errorf("got %q on %s, want %q, %v", got.Hostname, got.Arch, name, err)
	}
	for _, p := range got.Masked {
		if !path.IsAbs(p) || path.Clean(p) != p {
			t.Errorf("masked path %q", p)
		}
	}
	if !slices.Contains(got.Masked, "/proc/kcore") {
		t.Errorf("masked paths are %v", got.Masked)
	}
	// What is said of security modules is what the kernel says of them.
	if _, err := os.Stat("/sys/fs/selinux/enforce"); (err == nil) != got.SELinux {
		t.Errorf("SELinux enabled is %v, but /sys/fs/selinux/enforce says %v", got.SELinux, err)
	}
}

//go:build amd64

package seccomp

import (
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// Without a filter the answers are different: the probes of TestDefaultInKernel are able to tell.
func TestProbesCanTell(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: without privilege many probes get EPERM from the kernel itself")
	}
	got := runChild(t, "none")
	if got["filter"] != "false" {
		t.Error("there is a filter")
	}
	for _, p := range probes {
		if p.want == unix.EPERM && got[p.name] == fmt.Sprint(int(unix.EPERM)) {
			t.Errorf("%s: got EPERM without a filter too", p.name)
		}
	}
}

package check

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// As root every probe of a required feature can tell: on a machine that runs
// these tests all of them are there.
func TestRequiredFeatures(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes namespaces, cgroups and detached mounts")
	}
	// In a mount namespace of its own: what others mount meanwhile is no leftover. (Go makes it private.)
	const alone = "CRISP_CHECK_TEST_ALONE"
	if os.Getenv(alone) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestRequiredFeatures$")
		cmd.Env = append(os.Environ(), alone+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	dir := t.TempDir()
	initPath := filepath.Join(dir, "crisp-init")
	build := exec.Command("go", "build", "-o", initPath, "github.com/crisp-cri/crisp/test/payload")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("cannot build a static binary: %v\n%s", err, out)
	}
	before := leftovers(t)
	findings, err := Run(Paths{StateRoot: dir, RunRoot: "/run", InitPath: initPath})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range findings {
		if f.Need == Required && f.Verdict != Yes {
			t.Errorf("%s: got %s (%s), want yes", f.Name, f.Verdict, f.Detail)
		}
	}
	if after := leftovers(t); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}
}

// leftovers are mounts and our cgroups of this moment.
func leftovers(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	groups, err := filepath.Glob("/sys/fs/cgroup/*crisp-check-*")
	if err != nil {
		t.Fatal(err)
	}
	deeper, err := filepath.Glob("/sys/fs/cgroup/*/crisp-check-*")
	if err != nil {
		t.Fatal(err)
	}
	return string(mounts) + strings.Join(append(groups, deeper...), "\n")
}

package node

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Build builds crispd and crisp-init, static, into dir and returns crispd's
// path: for tests that are run without make.
func Build(dir string) (crispd string, err error) {
	for _, name := range []string{"crispd", "crisp-init"} {
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(dir, name), "github.com/crisp-cri/crisp/cmd/"+name)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if msg, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("cannot build %s: %w\n%s", name, err, msg)
		}
	}
	return filepath.Join(dir, "crispd"), nil
}

package main

import (
	"fmt"
	"runtime"
)

// Set by the linker (hack/build.sh).
var (
	version = "unknown" // git describe
	commit  = "unknown" // full hash
)

func versionText() string {
	return fmt.Sprintf("crispd %s (commit %s, %s %s/%s)", version, commit, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

//go:build tools

// Package critools has no code: it names what critest is built of, which is a
// test binary (cmd/critest has nothing but a test file) and so can't be a tool of go.mod.
package critools

import (
	_ "github.com/onsi/ginkgo/v2"
	_ "github.com/onsi/gomega"
	_ "sigs.k8s.io/cri-tools/pkg/benchmark"
	_ "sigs.k8s.io/cri-tools/pkg/validate"
)

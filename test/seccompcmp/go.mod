// The comparison of crisp's seccomp compiler with libseccomp: a module of its own, because it needs
// cgo and libseccomp-dev, and nothing else of the project shall.
module github.com/crisp-cri/crisp/test/seccompcmp

go 1.26.5

replace github.com/crisp-cri/crisp => ../..

require (
	github.com/crisp-cri/crisp v0.0.0
	github.com/opencontainers/runtime-spec v1.3.0
	github.com/seccomp/libseccomp-golang v0.12.0
	golang.org/x/sys v0.50.0
)

require github.com/moby/profiles/seccomp v0.3.0 // indirect

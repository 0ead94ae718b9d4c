// Package seccomp makes the system call filters of containers: the default profile
// ([Default]), profiles from files ([LoadFile]), and from either the program that
// the kernel runs ([Compile]), without cgo and libseccomp.
//
//	Default(caps, arch) ─┐                         ┌─▶ bytes of struct sock_filter
//	                     ├─▶ specs.LinuxSeccomp ─▶ Compile
//	LoadFile(path) ──────┘                         └─▶ flags of seccomp(2)
//
// The daemon compiles; the container's init hands the bytes to seccomp(2).
//
// # What a profile means
//
// The OCI specification leaves much open. This package does what runc and libseccomp do, and
// test/seccompcmp compares the two call by call:
//
//   - Several conditions on different arguments of one rule must all hold; two on the same argument make
//     each condition a rule of its own (runc).
//   - A rule without conditions decides for its call, the first such rule of several. Rules
//     with conditions are tried in their order.
//   - A rule whose action is the default action says nothing (runc).
//   - The native architecture is always part of the filter. A call by an architecture that is not kills the thread.
//   - On 32-bit architectures, x32 among them, the lower half of an argument is compared.
//   - On x86, a rule for a socket or System V IPC call holds for the same call through socketcall(2) and ipc(2), as far as
//     a filter can see. Unlike libseccomp, a profile that names socketcall or ipc itself has the last word about it.
//   - If the default action refuses, calls newer than the newest one that the profile names get
//     ENOSYS and not the default action, so that libc falls back to older ones (runc, "patchbpf").
//
// Not supported: SCMP_ACT_NOTIFY and what belongs to it; architectures other than
// amd64 and arm64 with their 32-bit companions.
package seccomp

import "errors"

//go:generate go run ./internal/gen

var (
	// ErrInvalid is returned for a profile that makes no sense: unknown action, call, operator, architecture,
	// no file, no JSON.
	ErrInvalid = errors.New("invalid seccomp profile")
	// ErrUnsupported is returned for a valid profile, or a machine, that this package cannot do.
	ErrUnsupported = errors.New("unsupported by seccomp support")
)

// Package cri serves CRI v1, the Container Runtime Interface of Kubernetes
// (k8s.io/cri-api): [Server] answers the RuntimeService and the ImageService on
// a socket that the caller opened.
//
// A call passes, in this order:
//
//	interceptor.go   log, deadline, readiness, panics
//	validate.go      is the request one that can work at all? No side effects before
//	sandbox.go …     one file per family of calls: translate, call package podsandbox or image
//	spec.go          ContainerConfig + image + pod → OCI runtime specification, a pure function;
//	                 what of the host it needs is looked up before, in lookup.go
//	status.go        errors → gRPC codes: the only place that knows codes
//
// This is the only package that interprets CRI messages. Below it nobody does;
// what must be echoed back byte for byte travels as opaque bytes (Echo).
//
// Where the CRI leaves a choice, or others answer differently:
//
//   - VOLUMEs that an image declares are not mounted: such a directory is
//     part of the container's writable layer and is removed with it. Nothing of an
//     image's volume list reaches a path of the host (CVE-2022-23648,
//     CVE-2019-16884).
//   - Labels of an image are never read (CVE-2026-53488).
//   - A host_path that does not exist is made, as a directory of mode 0755, as
//     containerd and CRI-O do and Kubernetes' users rely on, although the
//     proto asks for an error.
//   - SELinux options are without effect on a host without SELinux, as the
//     Kubernetes documentation has it ("Assign SELinux labels to a
//     Container"), and as charts that must run anywhere rely on; on a host with SELinux they are refused, unless
//     labels are switched on (Config.SELinux).
//   - A container that names no AppArmor profile has the default one, as
//     with the other runtimes, if there is AppArmor and the profile could be loaded; who names one, the default one too, has it
//     or is refused.
//   - Annotations never change what is run.
//   - namespace_options of a container decide its PID namespace only; network and
//     IPC namespace are the pod's, by birth.
package cri

// Package cgroup makes, fills, limits, measures, kills and removes the cgroups
// of pods and containers, on cgroup v2 (the design centre), on the hybrid
// layout (v1 controllers, and a cgroup2 tree that only groups processes) and
// on pure v1.
//
// A [Driver] knows the node's hierarchies and names things: the pod-level
// cgroup is what the kubelet sent as cgroup_parent, and below it lie one leaf
// for the pod's init and one cgroup per container:
//
//	/kubepods/burstable/pod<uid>                 made by the kubelet, or by CreatePod
//	├── crisp-pod-<pod id>                       the pod's init
//	└── crisp-<container id>                     one container
//	    └── exec-<exec id>                       one exec'd tree, in the tracking hierarchy only
//
// With the systemd driver the pod-level cgroup is a scope, made and ended by systemd (systemd.go, units.go); what is in it is the same.
//
// A [Cgroup] is a handle: a path and nothing else. It holds no descriptor and
// no state, is safe for concurrent use, and can be opened again after a restart
// of the daemon; the facts live in the kernel.
//
// The hierarchy that says which processes belong to a cgroup is the tracking
// hierarchy: cgroup2 where there is one, else the v1 freezer.
//
// Limits are compiled to a list of file writes first (resources.go, a pure
// function, golden-tested), then applied. [Cgroup.Update] is all or nothing.
//
// What a node cannot limit although the kubelet asks for it on every container
// (swap without swap accounting, huge pages without the controller) is left
// out, and [Driver.Missing] says so.
//
// # Going around github.com/opencontainers/cgroups
//
// Its device code (the allow-list emulator, v1 files, the v2 eBPF program; but see setDevices) and
// its unit conversions are used. Its managers are not, by measurement (hybrid,
// 8 v1 hierarchies + systemd + cgroup2, Linux 6.18, 2 cores, p50 of 300, quota, memory, swap
// and 12 device rules; strace -c for the count; BenchmarkContainer):
//
//	                 create    set      remove   system calls
//	managers         0.50 ms   0.22 ms  0.17 ms  about 246
//	bare calls       0.20 ms   0.14 ms  0.17 ms  about 107
//	this package     0.38 ms together   0.15 ms  99, of which 29 are Join's
//
// They look up each hierarchy again for each container (1700 of 3900 calls in
// that run are stat and statfs), and they cannot do what this package promises:
// Set stops half-way and leaves what it wrote, a period without a quota lifts the
// quota on v2, a memory limit of -1 lifts an unnamed swap limit, and removal
// sleeps between attempts. What would reverse the decision: a Set that can be
// undone, and paths resolved once.
package cgroup

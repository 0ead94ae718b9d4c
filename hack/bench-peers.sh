#!/usr/bin/env bash
# Usage: hack/bench-peers.sh build|run [ARGUMENTS OF test/bench]
# build  builds containerd, its shim, runc and CNI's bridge from their Go modules (hack/peers/go.mod) into bin/peers
# run    starts that containerd with places of its own and runs hack/bench.sh against it, too, then removes it all
# The peer gets what crispd gets: the same image, cgroupfs, a bridge with an address, no other plugin.

set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
usage "[1-9]*" "$@"

what=$1; shift
peers=$root/bin/peers
case $what in
build)
	mkdir -p "$peers"
	# runc needs C for its first stage and libseccomp for its filters.
	hack/deps.sh
	if [ ! -e /usr/include/seccomp.h ]; then
		need_root "apt-get install libseccomp-dev pkg-config"
		say "installing libseccomp-dev and pkg-config (runc's filters)"
		apt-get install -qq -y --no-install-recommends libseccomp-dev pkg-config >/dev/null 2>&1
	fi
	GOBIN=$peers CGO_ENABLED=1 go -C hack/peers install -trimpath -tags "seccomp,no_btrfs,no_devmapper,no_zfs" -ldflags "-s -w" tool
	exit 0
	;;
run) ;;
*) die "want build or run" ;;
esac
need_root "the benchmark makes pods"
[ -x "$peers/containerd" ] || die "no $peers/containerd: run make bench-peers"

tag=$(od -An -N3 -tx1 /dev/urandom | tr -d ' \n')
work=/var/tmp/crisp-peer-$tag
run=/run/crisp-peer-$tag
mkdir -p "$work/cni" "$run"
containerd_pid="" registry_pid=""
finish() {
	local status=$?
	set +e
	[ -z "$containerd_pid" ] || { kill -TERM "$containerd_pid" && wait "$containerd_pid"; } 2>/dev/null
	[ -z "$registry_pid" ] || { kill -TERM "$registry_pid" && wait "$registry_pid"; } 2>/dev/null
	[ $status = 0 ] || tail -n 15 "$work/containerd.log" >&2
	ip link del "peer-$tag" 2>/dev/null
	find /sys/fs/cgroup -depth -type d -path "*/crisp-bench-containerd*" -exec rmdir {} + 2>/dev/null
	grep -F "$tag" /proc/self/mountinfo | cut -d' ' -f5 | tac | xargs -r umount
	rm -rf "$work" "$run"
	exit $status
}
trap finish EXIT

cat >"$work/cni/10-bench.conflist" <<EOF
{"cniVersion": "1.0.0", "name": "bench-$tag", "plugins": [{"type": "bridge", "bridge": "peer-$tag", "isGateway": true,
 "ipam": {"type": "host-local", "dataDir": "$run/ipam", "ranges": [[{"subnet": "10.254.$((16#${tag:0:2})).0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
EOF
cat >"$work/config.toml" <<EOF
version = 3
root = "$work/root"
state = "$run/state"
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.internal.v1.tracing", "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.erofs", "io.containerd.differ.v1.erofs"]
[grpc]
  address = "$run/containerd.sock"
[ttrpc]
  address = "$run/containerd.sock.ttrpc"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "PAUSE"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["$peers"]
  conf_dir = "$work/cni"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
  BinaryName = "$peers/runc"
EOF

# The pause image is the payload, served by a registry of its own: containerd cannot make a sandbox without one.
mkdir -p out
go build -o out/registry ./test/registry
CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o out/payload ./test/payload
mkfifo "$work/ready"
out/registry -payload out/payload >"$work/ready" 2>&1 &
registry_pid=$!
pause=""
while read -r line; do
	case $line in */crisp/payload:1) pause=$line ;; ready) break ;; esac
done <"$work/ready"
[ -n "$pause" ] || die "the registry did not start"
sed -i "s|PAUSE|$pause|" "$work/config.toml"

PATH=$peers:$PATH "$peers/containerd" --config "$work/config.toml" >"$work/containerd.log" 2>&1 &
containerd_pid=$!
for _ in $(seq 200); do
	grep -q "containerd successfully booted" "$work/containerd.log" && break
	kill -0 $containerd_pid 2>/dev/null || die "containerd did not start"
	sleep 0.1
done
hack/bench.sh -peer "containerd=unix://$run/containerd.sock" "$@"

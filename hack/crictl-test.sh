#!/usr/bin/env bash
# Usage: hack/crictl-test.sh
# Drives a crispd of its own with crictl as a user would (every sub-command that works so far), then looks for leaks.
# Needs root, bin/crispd, bin/crisp-init and bin/tools/crictl (make build tools).

set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
usage 0 "$@"
need_root "pods are made"

tag=$(od -An -N3 -tx1 /dev/urandom | tr -d ' \n')
work=/var/tmp/crisp-crictl-$tag
run=/run/crisp-crictl-$tag
mkdir -p "$work/logs" "$run" out
passed=0 failed=0
crispd_pid="" registry_pid=""

finish() {
	local status=$?
	set +e
	[ -z "$crispd_pid" ] || crictl rmp -f -a >/dev/null 2>&1 # after a failure; else there is none
	[ -z "$crispd_pid" ] || { kill -TERM "$crispd_pid" && wait "$crispd_pid"; } 2>/dev/null
	[ -z "$registry_pid" ] || { kill -TERM "$registry_pid" && wait "$registry_pid"; } 2>/dev/null
	# By design the bridge and the table outlive crispd, for the pods that may run; none does here.
	ip link del "crisp-$tag" 2>/dev/null
	for family in inet bridge; do nft delete table $family "crisp_$tag" 2>/dev/null; done
	find /sys/fs/cgroup -depth -type d -path "*crisp-$tag*" -exec rmdir {} + 2>/dev/null
	if [ $status != 0 ] || [ $failed != 0 ]; then
		say "the end of crispd's log:"
		tail -n 30 "$work/crispd.log" >&2
	fi
	umount "$run/netns" 2>/dev/null # a mount point of its own, see package netns
	cp "$work/crispd.log" out/crictl-test.log # all of it, for whoever wants to read it
	rm -rf "$work" "$run"
	exit $status
}
trap finish EXIT

# expect NAME PATTERN COMMAND...: the command succeeds and says PATTERN (a grep -E pattern, "" anything).
expect() {
	local name=$1 pattern=$2 said
	shift 2
	if said=$("$@" 2>"$work/stderr") && grep -qE -- "$pattern" <<<"$said"; then
		printf 'ok    %s\n' "$name"
		passed=$((passed + 1))
	else
		printf 'FAIL  %s: want %s, got:\n%s\n' "$name" "$pattern" "$said"
		cat "$work/stderr"
		failed=$((failed + 1))
	fi
	last=$said
}
# refuse NAME PATTERN COMMAND...: the command fails and says PATTERN.
refuse() {
	local name=$1 pattern=$2 said
	shift 2
	if ! said=$("$@" 2>&1) && grep -qE -- "$pattern" <<<"$said"; then
		printf 'ok    %s\n' "$name"
		passed=$((passed + 1))
	else
		printf 'FAIL  %s: want a failure with %s, got:\n%s\n' "$name" "$pattern" "$said"
		failed=$((failed + 1))
	fi
}
crictl() { timeout 60 bin/tools/crictl --config /dev/null -t 30s -r "unix://$run/crisp.sock" -i "unix://$run/crisp.sock" "$@"; }

# A registry with the images, and crispd.
go build -o out/registry ./test/registry
CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o out/payload ./test/payload
mkfifo "$work/ready"
out/registry -payload out/payload -certs-d "$work/certs.d" >"$work/ready" 2>"$work/registry.log" &
registry_pid=$!
while read -r line; do [ "$line" != ready ] || break; done <"$work/ready"
[ "$line" = ready ] || die "the registry did not start: $(cat "$work/registry.log")"

b=$((16#${tag:0:2} % 64 + 192)) c=$((16#${tag:2:2}))
serve=(serve --config /dev/null --state-root "$work/state" --run-root "$run/run" --socket "$run/crisp.sock"
	--set network.mode=bridge --set "network.bridge=crisp-$tag" --set "network.table=crisp_$tag" --set "network.netns_dir=$run/netns"
	--set "network.subnets=[\"10.$b.$c.0/24\", \"fd63:7269:${tag:0:4}::/64\"]"
	--set cgroup.driver=cgroupfs --set "cgroup.root=/crisp-$tag" --set "image.certs_dir=$work/certs.d")
start_crispd() {
	bin/crispd "${serve[@]}" >>"$work/crispd.log" 2>&1 &
	crispd_pid=$!
	for _ in $(seq 100); do
		[ -S "$run/crisp.sock" ] && crictl pods -q >/dev/null 2>&1 && return
		kill -0 $crispd_pid 2>/dev/null || die "crispd did not start: $(tail -n 5 "$work/crispd.log")"
		sleep 0.1
	done
	die "crispd was not ready after 10 s"
}
start_crispd

image=registry.example/crisp/payload:1 # any registry is the one on loopback: certs.d/_default/hosts.toml
pod_json() {
	jq -n --arg name "$1" --arg tag "$tag" --argjson pid "${pid_mode:-1}" --arg uid "$tag-$1" --arg logs "$work/logs" '{metadata: {name: $name, namespace: "crisp-test", uid: $uid, attempt: 0},
		hostname: $name, log_directory: $logs, labels: {app: $name}, annotations: {"a/b": "c d"},
		linux: {cgroup_parent: ("/crisp-" + $tag + "/" + $name), security_context: {namespace_options: {pid: $pid}}}}' >"$work/$1.pod.json"
}
container_json() { # POD NAME ARGUMENT...
	local file=$work/$2.json name=$2
	shift 2
	jq -n --arg name "$name" --arg image "$image" --argjson pid "${pid_mode:-1}" '{metadata: {name: $name}, image: {image: $image}, log_path: ($name + ".log"),
		labels: {c: $name},
		linux: {resources: {memory_limit_in_bytes: 67108864, cpu_shares: 512}, security_context: {namespace_options: {pid: $pid}}}, args: $ARGS.positional}' --args -- "$@" >"$file"
}

expect version 'RuntimeApiVersion: +v1' crictl version
expect info '"NetworkReady"' crictl info
expect 'info: ready' '^true true$' bash -c "$(declare -f crictl); run=$run; crictl info | jq -r '[.status.conditions[] | select(.type == \"RuntimeReady\" or .type == \"NetworkReady\") | .status | tostring] | join(\" \")'"
refuse 'second crispd' "in use by another crispd, pid $crispd_pid" timeout 20 bin/crispd "${serve[@]}"

expect pull 'sha256:|up to date' crictl pull $image
expect images 'registry.example/crisp/payload' crictl images
expect 'images -q' '^sha256:|^[0-9a-f]{64}$' crictl images -q
expect inspecti '"repoTags"' crictl inspecti $image
expect imagefsinfo '"usedBytes"' crictl imagefsinfo
refuse 'pull: absent' 'not found|MANIFEST_UNKNOWN|NotFound' crictl pull registry.example/no/such:1

pod_json a
expect runp '^[0-9a-f]{64}$' crictl runp "$work/a.pod.json"
pod=$last
expect pods "Ready +a +crisp-test" crictl pods
expect 'pods --label' "^$pod\$" crictl pods -q --no-trunc --label app=a
expect inspectp '"state": "SANDBOX_READY"' crictl inspectp "$pod"
expect 'inspectp: address' '"ip": "10\.' crictl inspectp "$pod"
expect 'inspectp: short id' "\"id\": \"$pod\"" crictl inspectp "${pod:0:13}"
refuse 'inspectp: unknown' 'NotFound|not found' crictl inspectp 0123456789abcdef

container_json a one trap
expect create '^[0-9a-f]{64}$' crictl create "$pod" "$work/one.json" "$work/a.pod.json"
one=$last
expect 'ps -a: created' "Created +one" crictl ps -a
expect start "^$one\$" crictl start "$one"
expect 'ps: running' "Running +one" crictl ps
expect inspect '"state": "CONTAINER_RUNNING"' crictl inspect "$one"
expect 'inspect: memory limit' '67108864' crictl inspect "$one"
expect 'exec -s' '^uid=0' crictl exec -s "$one" /payload id
expect 'exec -s: pid 1' '^1 0 /payload trap' crictl exec -s "$one" /payload ps
refuse 'exec -s: status' 'exit.*7|7' crictl exec -s "$one" /payload exit 7
refuse 'exec -s: timeout' 'DeadlineExceeded|timed out|deadline' crictl exec -s --timeout 1 "$one" /payload sleep
expect exec '^hi$' crictl exec "$one" /payload echo hi
expect 'exec -i' '^what I say$' crictl exec -i "$one" /payload stdin <<<"what I say"
refuse 'exec: status' '7' crictl exec "$one" /payload exit 7
expect 'exec -r websocket -i' '^what I say$' crictl exec -r websocket -i "$one" /payload stdin <<<"what I say"
refuse 'exec -r websocket: status' '7' crictl exec -r websocket "$one" /payload exit 7
expect logs '^ready$' crictl logs "$one"
expect stats 'one|[0-9a-f]{13}' crictl stats
expect 'stats ID' "${one:0:13}" crictl stats --id "$one"
expect update "^$one\$" crictl update --memory 33554432 "$one"
expect 'update: applied' '33554432' crictl inspect "$one"

# crispd ends and comes again: the pod does not notice.
kill -TERM $crispd_pid
wait $crispd_pid || die "crispd ended with status $?"
crispd_pid=""
start_crispd
expect 'after a restart: ps' "Running +one" crictl ps
expect 'after a restart: exec -s' '^hi$' crictl exec -s "$one" /payload echo hi
kill -KILL $crispd_pid
{ wait $crispd_pid || true; } 2>/dev/null
crispd_pid=""
start_crispd
expect 'after kill -9: ps' "Running +one" crictl ps
expect 'after kill -9: exec -s' '^hi$' crictl exec -s "$one" /payload echo hi

expect stop "^$one\$" crictl stop --timeout 5 "$one"
expect 'logs: the signal' '^signal 15 SIGTERM$' crictl logs "$one"
expect 'ps -a: exited' "Exited +one" crictl ps -a
expect 'inspect: exit code' '"exitCode": 0' crictl inspect "$one"
expect rm "$one" crictl rm "$one"
container_json a two exit 3
expect 'create two' '^[0-9a-f]{64}$' crictl create "$pod" "$work/two.json" "$work/a.pod.json"
two=$last
expect 'start two' "^$two\$" crictl start "$two"
expect 'stop two' "^$two\$" crictl stop "$two"
expect 'inspect two: exit code' '"exitCode": 3' crictl inspect "$two"

expect stopp "$pod" crictl stopp "$pod"
expect 'pods: not ready' "NotReady +a" crictl pods
expect rmp "$pod" crictl rmp "$pod"
expect 'pods: none' '^$' crictl pods -q
expect 'ps: none' '^$' crictl ps -a -q

pid_mode=0 # POD: one PID namespace for all
pod_json b
container_json b three sleep
expect run '^[0-9a-f]{64}$' crictl run "$work/three.json" "$work/b.pod.json"
expect 'run: ps' "Running +three" crictl ps
expect 'run: PIDs of the pod' '^1 0 crisp-init: reaper' crictl exec -s "$(crictl ps -q)" /payload ps
image=registry.example/e2e-test-images/busybox:1.29-2
expect 'pull busybox' 'sha256:|up to date' crictl pull $image
podb=$(crictl pods -q)
jq -n --arg image "$image" '{metadata: {name: "sh"}, image: {image: $image}, log_path: "sh.log", command: ["sh", "-c", "echo out; echo err >&2; sleep 1000"], linux: {}}' >"$work/sh.json"
expect 'create busybox' '^[0-9a-f]{64}$' crictl create "$podb" "$work/sh.json" "$work/b.pod.json"
sh=$last
expect 'start busybox' "^$sh\$" crictl start "$sh"
expect 'exec -s busybox' '^b$' crictl exec -s "$sh" hostname
expect 'rmp -f' "$podb" crictl rmp -f "$podb"
expect rmi 'registry.example/crisp/payload' crictl rmi registry.example/crisp/payload:1
expect 'rmi busybox' 'busybox' crictl rmi "$image"
expect 'images: none' '^$' crictl images -q

# Nothing may be left but what outlives crispd by design: its bridge, its table, its cgroup root.
kill -TERM $crispd_pid
wait $crispd_pid || die "crispd ended with status $?"
crispd_pid=""
kill -TERM $registry_pid
wait $registry_pid || die "the registry ended with status $?"
registry_pid=""
leaks=$(hack/leaks.sh "$tag" || true) # all of it first: the filter's own command line has the tag in it
leaks=$(grep -vxE "mount $run/netns .*|link crisp-$tag|nft table (inet|bridge) crisp_$tag|cgroup /sys/fs/cgroup(/[a-z_,]+)?/crisp-$tag" <<<"$leaks" || true)
leaks+=$(find "$work/state" -xdev -type f ! -name lock -path '*pod*' -printf 'file %p\n'; find "$run/netns" -mindepth 1 -printf 'netns %f\n')
if [ -n "$leaks" ]; then
	printf 'FAIL  leaks:\n%s\n' "$leaks"
	failed=$((failed + 1))
else
	echo "ok    nothing is left"
	passed=$((passed + 1))
fi
printf '%d passed, %d failed\n' "$passed" "$failed"
[ $failed = 0 ]

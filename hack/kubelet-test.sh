#!/usr/bin/env bash
# Usage: hack/kubelet-test.sh
# Runs a real kubelet (of Kubernetes' own module, built into bin/peers) without an API server on a crispd of its own: pods
# from files, with probes, an init container, a volume and restarts; statistics; crispd and kubelet ended and started under them.
# Both run in a mount namespace of their own, in which the sysctls that a kubelet sets for the whole machine are files.
# Needs root, bin/crispd, bin/crisp-init and bin/tools/crictl. Building the kubelet takes some minutes the first time.

set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
inside=${CRISP_KUBELET_TEST_INSIDE-}
usage 0 "$@"
need_root "pods are made"

if [ -z "$inside" ]; then
	command -v curl >/dev/null || { say "installing curl (asks the kubelet)"; apt-get install -qq -y --no-install-recommends curl >/dev/null 2>&1; }
	mkdir -p bin/peers out
	say "building the kubelet"
	GOBIN=$root/bin/peers CGO_ENABLED=0 go -C hack/kubelet install -trimpath -ldflags "-s -w" tool
	CRISP_KUBELET_TEST_INSIDE=1 exec unshare --mount --propagation private "$0"
fi
mount --make-rshared / # as systemd has it: what the kubelet mounts for a pod, crispd sees

tag=$(od -An -N3 -tx1 /dev/urandom | tr -d ' \n')
work=/var/tmp/crisp-kubelet-$tag
run=/run/crisp-kubelet-$tag
cgroups=/crisp-kubelet-$tag
node=node-$tag
mkdir -p "$work"/{logs,manifests,kubelet,sysctl} "$run" out
# What it insists on is as it wants it, for its eyes only.
for set in kernel/panic=10 kernel/panic_on_oops=1 vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
	echo "${set#*=}" >"$work/sysctl/${set//[\/=]/-}"
	mount --bind "$work/sysctl/${set//[\/=]/-}" "/proc/sys/${set%=*}"
done
passed=0 failed=0
crispd_pid="" registry_pid="" kubelet_pid=""

finish() {
	local status=$?
	set +e
	stop "$kubelet_pid"
	[ -z "$crispd_pid" ] || crictl rmp -f -a >/dev/null 2>&1
	stop "$crispd_pid"
	stop "$registry_pid"
	ip link del "crisp-$tag" 2>/dev/null
	for family in inet bridge; do nft delete table $family "crisp_$tag" 2>/dev/null; done
	find /sys/fs/cgroup -depth -type d -path "*$cgroups*" -exec rmdir {} + 2>/dev/null
	cp "$work/crispd.log" out/kubelet-test-crispd.log
	cp "$work/kubelet.log" out/kubelet-test-kubelet.log
	grep -F "$tag" /proc/self/mountinfo | cut -d' ' -f5 | tac | xargs -r umount
	rm -rf "$work" "$run"
	[ $status = 0 ] && [ $failed = 0 ] || say "logs: out/kubelet-test-*.log"
	exit $status
}
stop() { [ -z "$1" ] || { kill -TERM "$1" && wait "$1"; } 2>/dev/null; }
trap finish EXIT

crictl() { timeout 60 bin/tools/crictl --config /dev/null -t 30s -r "unix://$run/crisp.sock" -i "unix://$run/crisp.sock" "$@"; }

# await SECONDS NAME PATTERN COMMAND...: the command says PATTERN (grep -E) before long.
await() {
	local seconds=$1 name=$2 pattern=$3 said="" end=$((SECONDS + $1))
	shift 3
	while [ $SECONDS -le $end ]; do
		if said=$("$@" 2>&1) && grep -qE -- "$pattern" <<<"$said"; then
			printf 'ok    %s\n' "$name"
			passed=$((passed + 1))
			return
		fi
		sleep 0.2 # between two looks
	done
	printf 'FAIL  %s: want %s within %d s, got:\n%s\n' "$name" "$pattern" "$seconds" "${said:0:1500}"
	failed=$((failed + 1))
}

go build -o out/registry ./test/registry
CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o out/payload ./test/payload
mkfifo "$work/ready"
out/registry -payload out/payload -certs-d "$work/certs.d" >"$work/ready" 2>"$work/registry.log" &
registry_pid=$!
while read -r line; do [ "$line" != ready ] || break; done <"$work/ready"
[ "$line" = ready ] || die "the registry did not start: $(cat "$work/registry.log")"

b=$((16#${tag:0:2} % 64 + 192)) c=$((16#${tag:2:2}))
start_crispd() {
	bin/crispd serve --config /dev/null --state-root "$work/state" --run-root "$run/run" --socket "$run/crisp.sock" \
		--set network.mode=bridge --set "network.bridge=crisp-$tag" --set "network.table=crisp_$tag" --set "network.netns_dir=$run/netns" \
		--set "network.subnets=[\"10.$b.$c.0/24\", \"fd63:7269:${tag:0:4}::/64\"]" \
		--set cgroup.driver=cgroupfs --set "cgroup.root=$cgroups" --set "image.certs_dir=$work/certs.d" >>"$work/crispd.log" 2>&1 &
	crispd_pid=$!
	await 20 "crispd serves" '^$' crictl pods -q --name nobody
}
# A port that is free now, for the kubelet's server on loopback.
port=$((10000 + 16#${tag:2:4} % 20000))
cat >"$work/kubelet.yaml" <<YAML
kind: KubeletConfiguration
apiVersion: kubelet.config.k8s.io/v1beta1
containerRuntimeEndpoint: unix://$run/crisp.sock
staticPodPath: $work/manifests
fileCheckFrequency: 1s
syncFrequency: 1s
podLogsDir: $work/logs
volumePluginDir: $work/plugins
address: 127.0.0.1
port: $port
healthzPort: 0
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupRoot: $cgroups
enforceNodeAllocatable: []
failCgroupV1: false
failSwapOn: false
makeIPTablesUtilChains: false
registerNode: false
evictionHard: {nodefs.available: 0%, imagefs.available: 0%, nodefs.inodesFree: 0%}
featureGates: {KubeletInUserNamespace: true, PodAndContainerStatsFromCRI: true}
shutdownGracePeriod: 0s
logging: {verbosity: 2}
YAML
start_kubelet() {
	bin/peers/kubelet --config "$work/kubelet.yaml" --root-dir "$work/kubelet" --cert-dir "$work/kubelet/pki" --hostname-override "$node" >>"$work/kubelet.log" 2>&1 &
	kubelet_pid=$!
}
kubelet() { curl -sS --max-time 20 -k "https://127.0.0.1:$port$1" "${@:2}"; }
# run_in POD CONTAINER COMMAND...: an exec through the kubelet.
run_in() { kubelet "/run/default/$1-$node/$2" -X POST --url-query "cmd=${*:3}"; }
# pod NAME JQ: something of a pod's status as the kubelet has it.
pod() { kubelet /pods | jq -r --arg name "$1-$node" ".items[] | select(.metadata.name == \$name) | $2"; }

# A pod from a file, and where its cgroups are below in each hierarchy.
for tree in /sys/fs/cgroup /sys/fs/cgroup/*/; do
	[ ! -w "$tree/cgroup.procs" ] || [ -L "${tree%/}" ] || mkdir -p "$tree$cgroups"
done
for f in /sys/fs/cgroup/cpuset/; do # a new cpuset is empty
	[ ! -d "$f$cgroups" ] || for k in cpus mems; do cat "${f}cpuset.$k" >"$f$cgroups/cpuset.$k"; done
done

start_crispd
start_kubelet
await 60 "the kubelet is healthy" '^ok$' kubelet /healthz

image=registry.example/crisp/payload:1
cat >"$work/manifests/web.yaml" <<YAML
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: default, labels: {app: web}}
spec:
  hostname: web
  volumes: [{name: shared, emptyDir: {}}, {name: fast, emptyDir: {medium: Memory, sizeLimit: 16Mi}}]
  initContainers:
  - {name: prepare, image: $image, args: [mkfile, /shared/prepared, by init], volumeMounts: [{name: shared, mountPath: /shared}]}
  containers:
  - name: server
    image: $image
    args: [http, ":8080"]
    env: [{name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]
    ports: [{containerPort: 8080}]
    readinessProbe: {httpGet: {path: /hostname, port: 8080}, periodSeconds: 1}
    livenessProbe: {exec: {command: [/payload, "true"]}, periodSeconds: 1}
    startupProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
    resources: {requests: {cpu: 10m, memory: 32Mi}, limits: {memory: 64Mi}}
    volumeMounts: [{name: shared, mountPath: /shared, readOnly: true}, {name: fast, mountPath: /fast}]
    securityContext: {runAsUser: 1000, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}, seccompProfile: {type: RuntimeDefault}}
    lifecycle: {postStart: {exec: {command: [/payload, mkfile, /fast/post-start, ran]}}}
  - {name: side, image: $image, args: [trap], resources: {requests: {cpu: 10m}}}
YAML
cat >"$work/manifests/crash.yaml" <<YAML
apiVersion: v1
kind: Pod
metadata: {name: crash, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: c, image: $image, args: [echo, here, ",", exit, "3"], terminationMessagePolicy: FallbackToLogsOnError}]
YAML
cat >"$work/manifests/once.yaml" <<YAML
apiVersion: v1
kind: Pod
metadata: {name: once, namespace: default}
spec:
  restartPolicy: Never
  containers: [{name: c, image: $image, args: [mkfile, /dev/termination-log, all done]}]
YAML
cat >"$work/manifests/sick.yaml" <<YAML
apiVersion: v1
kind: Pod
metadata: {name: sick, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: c, image: $image, args: [sleep], livenessProbe: {exec: {command: [/payload, exit, "1"]}, periodSeconds: 1, failureThreshold: 2}}
YAML
cat >"$work/manifests/host.yaml" <<YAML
apiVersion: v1
kind: Pod
metadata: {name: host, namespace: default}
spec:
  hostNetwork: true
  hostPID: true
  shareProcessNamespace: false
  containers: [{name: c, image: $image, args: [sleep]}]
YAML
cat >"$work/manifests/shared.yaml" <<YAML
apiVersion: v1
kind: Pod
metadata: {name: shared, namespace: default}
spec:
  shareProcessNamespace: true
  containers: [{name: a, image: $image, args: [sleep]}, {name: b, image: $image, args: [sleep]}]
YAML

cat >"$work/manifests/userns.yaml" <<YAML
apiVersion: v1
kind: Pod
metadata: {name: userns, namespace: default}
spec:
  hostUsers: false
  volumes: [{name: data, emptyDir: {}}, {name: files, image: {reference: $image, pullPolicy: IfNotPresent}}]
  containers:
  - name: c
    image: $image
    args: [mkfile, /data/f, mine, ",", sleep]
    volumeMounts: [{name: data, mountPath: /data}, {name: files, mountPath: /files}]
YAML

ready='[.status.conditions[]? | select(.type == "Ready") | .status] | join("")'
await 60 "web: probes pass, the pod is ready" '^True$' pod web "$ready"
ip=$(pod web .status.podIP)
await 5 "web: has an address of each family" '^2$' pod web '.status.podIPs | length'
await 5 "web: init container exited 0" '^0$' pod web '.status.initContainerStatuses[0].state.terminated.exitCode'
await 5 "web: answers on the pod's address" '^web$' curl -sS --max-time 5 "http://$ip:8080/hostname"
await 5 "web: no restarts" '^0 0$' pod web '[.status.containerStatuses[].restartCount | tostring] | join(" ")'
await 5 "web: image id" 'sha256:' pod web '.status.containerStatuses[0].imageID'
await 5 "exec through the kubelet" '^by init$' run_in web server /payload cat /shared/prepared
await 5 "a user, as the pod says" 'uid=1000' run_in web server /payload id
await 5 "the downward API" "^$ip$" run_in web server /payload env POD_IP
await 5 "a post-start hook ran" '^ran$' run_in web server /payload cat /fast/post-start
await 5 "a memory volume" 'type=0x1021994 size=16777216' run_in web server /payload statfs /fast
await 5 "logs through the kubelet" '^listening' kubelet "/containerLogs/default/web-$node/server"
await 60 "crash: is restarted" '^[1-9]' pod crash '.status.containerStatuses[0].restartCount'
await 5 "crash: exit code and message" '^3 here' pod crash '.status.containerStatuses[0].lastState.terminated | "\(.exitCode) \(.message)"'
await 30 "once: succeeded" '^Succeeded$' pod once .status.phase
await 5 "once: its termination message" '^all done' pod once '.status.containerStatuses[0].state.terminated.message'
await 60 "sick: is restarted by its liveness probe" '^[1-9]' pod sick '.status.containerStatuses[0].restartCount'
await 30 "host: runs in the host's network" '^True$' pod host "$ready"
await 30 "shared: ready" '^True$' pod shared "$ready"
both() { run_in shared a /payload ps | tr '\n' ' '; }
await 10 "shared: sees the other container" '(sleep.*){2}' both

# summary JQ: something of the statistics of web.
summary() { kubelet /stats/summary | jq -r --arg name "web-$node" ".pods[] | select(.podRef.name == \$name) | $1"; }
await 60 "userns: ready" '^True$' pod userns "$ready"
await 5 "userns: root inside is nobody outside" '^ +0 +[1-9][0-9]+ +65536' run_in userns c /payload cat /proc/self/uid_map
await 5 "userns: what it writes into a volume is root's" '^0$' bash -c "stat -c %u $work/kubelet/pods/*/volumes/kubernetes.io~empty-dir/data/f"
await 5 "an image as a volume" 'payload' run_in userns c /payload ls /files

await 30 "statistics: the pod's containers" '^server side$' summary '[.containers[] | select(.memory.workingSetBytes > 0 and .cpu.usageCoreNanoSeconds > 0) | .name] | sort | join(" ")'
await 30 "statistics: network and process count" '^true$' summary '.network.rxBytes > 0 and .process_stats.process_count > 0'
await 30 "metrics: container_memory_working_set_bytes" "container_memory_working_set_bytes.*server.*web-$node" kubelet /metrics/cadvisor

# crispd is killed and comes again: no container is restarted, and the pods stay ready.
kill -KILL $crispd_pid
{ wait $crispd_pid || true; } 2>/dev/null
start_crispd
await 30 "after kill -9 of crispd: ready" '^True$' pod web "$ready"
await 5 "after kill -9 of crispd: exec" '^by init$' run_in web server /payload cat /shared/prepared
await 5 "after kill -9 of crispd: no restarts" '^0 0$' pod web '[.status.containerStatuses[].restartCount | tostring] | join(" ")'
# The kubelet too.
stop $kubelet_pid
start_kubelet
await 60 "after a restart of the kubelet: ready" '^True$' pod web "$ready"
await 5 "after a restart of the kubelet: no restarts" '^0 0$' pod web '[.status.containerStatuses[].restartCount | tostring] | join(" ")'

rm "$work"/manifests/*.yaml
await 90 "without the files: no pods" '^$' crictl pods -q
await 10 "and no containers" '^$' crictl ps -a -q
pod_cgroups() { find /sys/fs/cgroup -type d -path "*$cgroups*/pod*" | wc -l; }
await 30 "and no cgroups" '^0$' pod_cgroups

printf '%d passed, %d failed\n' $passed $failed
[ $failed = 0 ]

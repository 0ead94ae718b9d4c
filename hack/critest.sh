#!/usr/bin/env bash
# Usage: hack/critest.sh [ARGUMENTS OF test/critest]
# Builds critest from hack/cri-tools and runs it whole against a crispd of its own, with images of our own; then looks
# for leaks. Without arguments the streaming specs then run again over WebSocket, which critest does by SPDY otherwise.
# Needs root, bin/crispd and bin/crisp-init. -focus REGEXP runs some specs only, -v shows critest's output,
# -benchmark runs critest's own benchmarks instead and keeps their JSON in out/critest-benchmark.
# A failure, or a skip that test/critest/expected-skips.txt does not list, fails the run. Logs and report are in out/.

set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
usage "*" "$@"

need_root "pods are made"
mkdir -p out
cri=$(go -C hack/cri-tools list -m -f '{{.Version}}' sigs.k8s.io/cri-tools)
CGO_ENABLED=0 go -C hack/cri-tools test -c -trimpath -ldflags "-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=${cri#v}" \
	-o "$root/out/critest" sigs.k8s.io/cri-tools/cmd/critest
go build -o out/critest-run ./test/critest
# Its AppArmor specs load their profiles with "sudo apparmor_parser".
if ! command -v sudo >/dev/null; then
	mkdir -p out/critest-path
	printf '#!/bin/sh\nexec "$@"\n' >out/critest-path/sudo
	chmod +x out/critest-path/sudo
	PATH=$root/out/critest-path:$PATH
fi
[ $# = 0 ] || exec out/critest-run "$@"
out/critest-run
mkdir -p out/critest-websocket
say "and streaming over WebSocket:"
exec out/critest-run -out out/critest-websocket -focus Streaming -- --websocket-exec --websocket-attach --websocket-portforward

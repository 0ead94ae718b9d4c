#!/usr/bin/env bash
# Usage: hack/bench.sh [ARGUMENTS OF test/bench]
# Measures pods of crispd against the floor (the bare system calls for the same pod) in one run, and prints tables in
# Markdown with the date, the commit and the machine. Needs root, bin/crispd and bin/crisp-init. -h of out/bench lists
# the arguments: -quick takes less than a minute, -budgets fails when a ratio exceeds its limit, -peer NAME=ENDPOINT adds
# another runtime.

set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
usage "*" "$@"

need_root "the benchmark makes pods"
mkdir -p out
CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o out/payload ./test/payload
CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o out/floor ./test/bench/floor
CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o out/trivial ./test/bench/trivial
go build -o out/bench ./test/bench
go -C test/cri build -o "$root/out/spdyexec" ./spdyexec
printf '%s, commit %s, Linux %s, %s cores, load %s\n\n' "$(date -u +%F)" "$(git rev-parse --short HEAD)" "$(uname -r)" "$(nproc)" "$(cut -d' ' -f1 /proc/loadavg)"
out/bench -crispd bin/crispd -payload out/payload -floor out/floor -trivial out/trivial -spdy out/spdyexec "$@"

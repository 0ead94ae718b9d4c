#!/usr/bin/env bash
# Usage: hack/demo.sh [-v]
# Shows a pod running, end to end, through the CRI socket of a crispd of its own, and cleans up (hack/demo).
# Needs root and bin/crispd, bin/crisp-init (make build). -v shows crispd's log.

set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
usage "[01]" "$@"

need_root "the demo makes namespaces, mounts and cgroups; try: sudo make demo"
hack/deps.sh
mkdir -p out
CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o out/payload ./test/payload
go build -o out/demo ./hack/demo
exec out/demo -crispd bin/crispd -payload out/payload "$@"

#!/usr/bin/env bash
# Usage: hack/tools.sh
# Builds the pinned linters (hack/tools/go.mod) and crictl (hack/cri-tools/go.mod) into bin/tools.
# Quick when nothing changed: it is then only a look into Go's build cache.

set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
usage 0 "$@"

export CGO_ENABLED=0
mkdir -p bin/tools
GOBIN="$root/bin/tools" go -C hack/tools install tool
cri=$(go -C hack/cri-tools list -m -f '{{.Version}}' sigs.k8s.io/cri-tools)
go -C hack/cri-tools build -trimpath -ldflags "-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=${cri#v}" \
	-o "$root/bin/tools/crictl" sigs.k8s.io/cri-tools/cmd/crictl

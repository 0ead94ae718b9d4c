#!/usr/bin/env bash
# Usage: hack/build.sh [OUTDIR]
# Builds crispd and crisp-init, static and stripped, into OUTDIR (default bin), stamped with git's version.
# VERSION overrides the stamp (for source archives without .git).

set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
usage "[01]" "$@"

out=${1:-bin}
version=${VERSION:-$(git describe --tags --always --dirty 2>/dev/null || echo unknown)}
commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)

mkdir -p "$out"
export CGO_ENABLED=0
flags=(-trimpath -buildvcs=false)
go build "${flags[@]}" -ldflags "-s -w -X main.version=$version -X main.commit=$commit" -o "$out/crispd" ./cmd/crispd
[ ! -d cmd/crisp-init ] || go build "${flags[@]}" -ldflags "-s -w -X main.version=$version" -o "$out/crisp-init" ./cmd/crisp-init

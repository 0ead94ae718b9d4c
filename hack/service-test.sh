#!/usr/bin/env bash
# Usage: hack/service-test.sh
# Builds two versions of the Debian package and takes them through a life on a host with systemd: hack/guest, where
# hack/packaging/test installs, restarts, upgrades, removes and purges them under running pods. A few minutes.

set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
usage 0 "$@"

made=hack/packaging/built # not ignored by git, so hack/guest/run takes it along
trap 'rm -rf "$made"' EXIT
rm -rf "$made"
mkdir -p "$made"
CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o $made/registry ./test/registry
CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o $made/payload ./test/payload
for version in 1.0.0 1.1.0; do VERSION=$version hack/packaging/deb $made >/dev/null; done
DESTDIR=$PWD/$made/root hack/packaging/install
hack/guest/run --timeout 1200 -- hack/packaging/test

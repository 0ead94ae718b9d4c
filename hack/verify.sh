#!/usr/bin/env bash
# Usage: hack/verify.sh
# Checks that what is generated is what is checked in: go generate, go.sum, the mode bits of scripts.
# Works on the index of a clean checkout; refuses a tree with changes, which it could not tell from its own.

set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
usage 0 "$@"

[ -z "$(git status --porcelain)" ] || { git status --short >&2; die "the tree has changes: commit them first"; }
go generate ./...
go mod verify >/dev/null
for m in $(git ls-files '*go.mod'); do
	go -C "${m%go.mod}." mod tidy -diff || die "$m is not tidy: run go mod tidy there"
done
[ -z "$(git status --porcelain)" ] || { git diff >&2; git status --short >&2; die "generated files differ: run make generate and commit"; }
for s in hack/*.sh; do
	[ "$s" = hack/lib.sh ] || [ -x "$s" ] || die "$s is not executable"
	bash -n "$s"
done

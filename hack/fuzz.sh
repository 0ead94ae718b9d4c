#!/usr/bin/env bash
# Usage: hack/fuzz.sh [TIME]
# Runs every fuzz target of the module for TIME each (default 20s; go test -fuzz runs one at a time).

set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
usage "[01]" "$@"

time=${1:-20s}
found=0
while read -r file; do
	for target in $(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$file"); do
		found=$((found + 1))
		say "${file%/*} $target for $time"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "./${file%/*}"
	done
done < <(git ls-files --cached --others --exclude-standard '*_test.go' | xargs -r grep -l '^func Fuzz' | sort)
[ "$found" -gt 0 ] || die "no fuzz target found: the search is broken"
say "$found targets"

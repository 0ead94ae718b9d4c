#!/usr/bin/env bash
# Usage: hack/test.sh unit|root|all [GO TEST ARGUMENTS]
# unit  everything but the tests of *_root_test.go, with the race detector
# root  only the tests of *_root_test.go, as root, packages one after another: they share one kernel
# all   both, the second only when you are root
# A skip that test/expected-skips.txt does not list is a failure.

set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
usage "[1-9]*" "$@"

what=$1; shift
mkdir -p out
go build -o out/gotest ./hack/gotest

# The root tests, known by their file's name.
mapfile -t root_files < <(git ls-files --cached --others --exclude-standard '*_root_test.go')
names=""
packages=()
if [ ${#root_files[@]} -gt 0 ]; then
	names=$(sed -n 's/^func \(Test[A-Za-z0-9_]*\)(.*/\1/p' "${root_files[@]}" | sort -u | paste -sd'|')
	mapfile -t packages < <(printf './%s\n' "${root_files[@]%/*}" | sort -u)
fi

unit() {
	out/gotest -expect test/expected-skips.txt -- -race -count=1 ${names:+-skip "^($names)\$"} "$@" ./...
}

root() {
	need_root "the tests of *_root_test.go make namespaces, mounts and cgroups"
	[ -n "$names" ] || die "there is no root test: the search is broken"
	out/gotest -expect test/expected-skips.txt -- -count=1 -p 1 -run "^($names)\$" "$@" "${packages[@]}"
}

case $what in
unit) unit "$@" ;;
root) root "$@" ;;
all)
	unit "$@"
	if [ "$(id -u)" = 0 ]; then root "$@"; else say "not root: the tests of *_root_test.go were not run"; fi
	;;
*) die "unknown kind of tests $what; see test.sh --help" ;;
esac

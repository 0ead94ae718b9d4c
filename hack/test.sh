#!/usr/bin/env bash
# Usage: hack/test.sh unit|root|cri|seccomp|all [GO TEST ARGUMENTS]
# unit  everything but the tests of *_root_test.go, with the race detector
# root  only the tests of *_root_test.go, as root, packages one after another: they share one kernel. Those that are
#       named (./runtime/spawn), or all
# cri   the suite of test/cri, as root: a real crispd, driven through the kubelet's client
# seccomp  compares our seccomp compiler with libseccomp, call by call (needs cgo and libseccomp-dev)
# all   all of these, then crictl and the whole of critest against a real crispd; all but unit only when you are root
# A skip that test/expected-skips.txt does not list is a failure.

set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
usage "[1-9]*" "$@"

what=$1; shift
mkdir -p out
go build -o out/gotest ./hack/gotest

# The root tests, known by their file's name, and the packages that have some.
mapfile -t root_files < <(find . -name '*_root_test.go' ! -path './test/cri/*' ! -path './out/*' | sed 's|^\./||' | sort)
[ ${#root_files[@]} -gt 0 ] || die "there is no root test: the search is broken"
tests_of() { sed -n 's/^func \(Test[A-Za-z0-9_]*\)(.*/\1/p' "$@" | grep -vx TestMain | sort -u; }
names=$(tests_of "${root_files[@]}" | paste -sd'|')
mapfile -t with_root < <(printf './%s\n' "${root_files[@]%/*}" | sort -u)

# -run and -skip know no packages: a unit test that is called like a root test of another package would be left out.
for dir in "${with_root[@]}"; do
	mapfile -t unit_files < <(find "$dir" -maxdepth 1 -name '*_test.go' ! -name '*_root_test.go')
	[ ${#unit_files[@]} -gt 0 ] || continue
	clash=$(tests_of "${unit_files[@]}" | grep -xE "$names" || true)
	[ -z "$clash" ] || die "$dir: $clash is also the name of a root test elsewhere: rename one"
done

unit() {
	local without_root
	mapfile -t without_root < <(go list -f '{{.Dir}}' ./... | sed "s|^$root|.|" | grep -vxF "$(printf '%s\n' "${with_root[@]}")")
	out/gotest -expect test/expected-skips.txt -- -race -count=1 "$@" "${without_root[@]}"
	out/gotest -expect test/expected-skips.txt -- -race -count=1 -skip "^($names)\$" "$@" "${with_root[@]}"
}

root() {
	need_root "the tests of *_root_test.go make namespaces, mounts and cgroups"
	local flags=() packages=() a
	for a; do case $a in ./*) packages+=("$a") ;; *) flags+=("$a") ;; esac; done
	[ ${#packages[@]} -gt 0 ] || packages=("${with_root[@]}")
	out/gotest -expect test/expected-skips.txt -- -count=1 -p 1 -run "^($names)\$" "${flags[@]}" "${packages[@]}"
}

cri() {
	need_root "the suite makes pods"
	out/gotest -C test/cri -expect test/expected-skips.txt -- -count=1 -timeout 20m "$@" ./...
}

seccomp() {
	CGO_ENABLED=1 out/gotest -C test/seccompcmp -expect test/expected-skips.txt -- -count=1 "$@" ./...
}

case $what in
cri) cri "$@" ;;
unit) unit "$@" ;;
root) root "$@" ;;
seccomp) seccomp "$@" ;;
all)
	unit "$@"
	seccomp "$@"
	if [ "$(id -u)" = 0 ]; then
		root "$@"
		cri "$@"
		hack/crictl-test.sh
		hack/critest.sh
	else
		say "not root: the tests of *_root_test.go, of test/cri, crictl and critest were not run"
	fi
	;;
*) die "unknown kind of tests $what; see test.sh --help" ;;
esac

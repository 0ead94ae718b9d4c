#!/usr/bin/env bash
# Usage: hack/lint.sh
# Runs the linters. Few, each for a reason:
#   gofmt        one layout, so that diffs show what changed
#   go vet       copies of locks, wrong Printf verbs, unreachable code, lost cancels
#   staticcheck  real bugs and dead code; what is switched off and why: staticcheck.conf
#   errcheck     a runtime that drops an error leaks a mount; (product only) what may be dropped: hack/errcheck.txt
#   misspell     errors and docs are what users read
#   forbidden    calls that this project decided against: the list below
# Import arrows are a test: test/arrows.

set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
usage 0 "$@"

tools=$root/bin/tools
[ -x "$tools/staticcheck" ] || hack/tools.sh
bad=0
fail() { say "$*"; bad=1; }

product=()
for dir in cmd cri podsandbox runtime network image; do
	[ ! -d $dir ] || product+=("./$dir/...")
done

unformatted=$(git ls-files --cached --others --exclude-standard '*.go' | xargs gofmt -l)
[ -z "$unformatted" ] || fail "not gofmt'd: $unformatted (run make fmt)"

go vet ./... || fail "go vet found something"
"$tools/staticcheck" ./... || fail "staticcheck found something"
"$tools/errcheck" -exclude hack/errcheck.txt -ignoretests "${product[@]}" || fail "errcheck found something"
git ls-files '*.go' '*.md' '*.sh' Makefile | xargs "$tools/misspell" -error || fail "misspell found something"

# forbidden PATTERN WHY [EXCEPT]: in product code (not tests, hack, test, generators, …test packages) of files that do
# not match EXCEPT. An exception says why, in a comment on its line.
forbidden() {
	local hits
	hits=$(git ls-files --cached --others --exclude-standard 'cmd/*.go' 'cri/*.go' 'podsandbox/*.go' 'runtime/*.go' 'network/*.go' 'image/*.go' |
		grep -vE '_test\.go$|/gen/|test/' | grep -vE "${3:-^$}" | xargs -r grep -nP "$1" | grep -vE '// .{10,}$|^[^:]+:[0-9]+:\s*//' || true)
	[ -z "$hits" ] || fail "forbidden: $2"$'\n'"$hits"
}
forbidden '\btime\.Sleep\(' 'time.Sleep: wait for the event (style.md 8)'
forbidden '"unsafe"' 'unsafe outside *_unsafe.go: keep it findable (style.md 7)' '_unsafe\.go$'
forbidden '\b(syscall|unix)\.Kill\(' 'kill by bare pid: pids are reused, use a pidfd' '^cmd/crisp-init/'
forbidden '\bhttp\.(Get|Post|DefaultClient)\b' 'http.DefaultClient has no timeout'
forbidden '\bio\.ReadAll\((?!io\.LimitReader)' 'io.ReadAll of what others write has no bound: wrap in io.LimitReader'

exit $bad

# shellcheck shell=bash
# Sourced by the scripts of this folder: where the tree is, and how they speak. Not to be run.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

# usage WANTED "$@": prints the script's heading comment for -h, and refuses a wrong number of arguments.
# WANTED is a bash pattern of allowed counts: "0", "[01]".
usage() {
	local wanted=$1; shift
	case ${1-} in -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
	# shellcheck disable=SC2053 # a pattern is meant
	[[ $# == $wanted ]] || die "wrong arguments; see ${0##*/} --help"
}

need_root() { [ "$(id -u)" = 0 ] || die "needs root: $*"; }

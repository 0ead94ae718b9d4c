#!/usr/bin/env bash
# Usage: hack/leaks.sh TAG [DIR...]
# Prints everything on this machine whose name carries TAG (mounts, links, network namespaces, nft tables, cgroups,
# processes) and every file below the DIRs, one a line; exit status 1 when there is any.
# It only looks: what others run on this machine is none of its business, so each test uses a tag of its own.

set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
usage "[1-9]*" "$@"

tag=$1; shift
[ ${#tag} -ge 4 ] || die "a tag of at least 4 characters, or it would match anything"

found=$({
	grep -F "$tag" /proc/self/mountinfo | cut -d' ' -f5,9- | sed 's/^/mount /'
	ip -o link show | awk -F': ' '{print $2}' | grep -F "$tag" | sed 's/^/link /'
	ip -o link show | grep -F "master " | grep -F "$tag" | awk -F': ' '{print "link " $2}'
	find /run/netns -mindepth 1 -name "*$tag*" -printf "netns %f\n" 2>/dev/null
	nft list tables 2>/dev/null | grep -F "$tag" | sed 's/^/nft /'
	find /sys/fs/cgroup -type d -name "*$tag*" 2>/dev/null | sed 's/^/cgroup /'
	# Not this script and who called it.
	for p in /proc/[0-9]*; do
		[ "${p#/proc/}" = $$ ] || [ "${p#/proc/}" = "$PPID" ] && continue
		{ tr '\0' ' ' <"$p/cmdline" | grep -F "$tag" | grep -vF "hack/leaks.sh" | sed "s|^|process ${p#/proc/} |"; } 2>/dev/null
	done
	for dir in "$@"; do
		[ ! -e "$dir" ] || find "$dir" -xdev -mindepth 1 -printf 'file %p\n'
	done
} | sort -u || true)
[ -z "$found" ] || { printf '%s\n' "$found"; exit 1; }

#!/usr/bin/env bash
# Usage: hack/deps.sh [guest]
# Installs the Debian packages that building, testing and the demo need and that are missing, saying which. With
# "guest" also those of the guest (hack/guest): an emulator, a hundred megabytes that nothing else needs.
# Needs root only when something is missing. Go itself is not installed: Debian's is too old.

set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
usage "[01]" "$@"

# command or file → package → what for
wanted=(
	"git     git       version stamp"
	"gcc     gcc       the race detector (go test -race; the binaries need no C)"
	"/usr/include/stdio.h libc6-dev the same, and the comparison with libseccomp"
	"/usr/include/seccomp.h libseccomp-dev test/seccompcmp compares our seccomp compiler with libseccomp"
	"pkg-config pkg-config finds libseccomp for it"
	"busybox busybox   the second image of tests and demo"
	"nft     nftables  tests and the demo compare with what nft shows"
	"ip      iproute2  tests and the demo compare with what ip and tc show"
	"ps      procps    leak check"
	"jq      jq        leak check, crictl test"
	"lsns    util-linux leak check"
	"/usr/lib/cni/bridge containernetworking-plugins tests of CNI with real plugins"
)
case ${1-} in
"") ;;
guest)
	wanted+=(
		"qemu-system-x86_64 qemu-system-x86 the guest"
		"qemu-img   qemu-utils the disks of the guest"
		"mmdebstrap mmdebstrap the guest's image"
		"mke2fs     e2fsprogs  the disks of the guest"
	)
	;;
*) die "unknown kind of packages $1; see deps.sh --help" ;;
esac

command -v go >/dev/null || die "go not found: install Go $(awk '/^go /{print $2}' go.mod) or newer from go.dev (Debian 12's is too old)"

missing=()
for w in "${wanted[@]}"; do
	read -r cmd pkg why <<<"$w"
	command -v "$cmd" >/dev/null || [ -e "$cmd" ] || { say "$cmd is missing: installing $pkg ($why)"; missing+=("$pkg"); }
done
[ ${#missing[@]} -gt 0 ] || exit 0
command -v apt-get >/dev/null || die "no apt-get here: install ${missing[*]} yourself"
need_root "apt-get install ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1 || {
	apt-get update -qq
	apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
}

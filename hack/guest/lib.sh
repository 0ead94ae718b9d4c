# shellcheck shell=bash
# Sourced by the scripts of this folder, after which they are at the tree's root. Not to be run.

# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

# Where images and what is known about this machine are kept.
cache_dir() { printf '%s\n' "${XDG_CACHE_HOME:-/var/cache}/crisp/guest"; }

#!/bin/sh
# Rules of the tree that no compiler checks. Run from its top.
set -u
bad=0
no() { echo "check-tree: $1"; bad=1; }

found=$(git grep -l -w 'unsafe' -- '*.rs' | grep -v -E '^xen-locus/locus-xen/|:#!\[forbid')
[ -z "$found" ] || no "the word unsafe stands outside xen-locus/locus-xen/: $found"

found=$(git grep -n -E '(release|version)[^"]*(starts_with|==|>=|<=|>|<) *"?[5-7]\.[0-9]' -- 'xen-locus/*.rs' | grep -v -E '^[^:]*:[0-9]+: *(//|assert)')
[ -z "$found" ] || no "a branch on a kernel version: $found"

found=$(git ls-files '*.rs' | xargs wc -l | awk '$2 != "total" && $1 > 500 {print $2}' |
	xargs -r grep -L '^// Over 500 lines because ')
[ -z "$found" ] || no "over 500 lines, without a line that says why (// Over 500 lines because …): $found"

sh deploy/check-rooms.sh || no "a room uses one that is not below it: see deploy/rooms"

# That check finds an arrow when there is one.
planted=$(mktemp -d)
mkdir "$planted/plan"
echo 'use crate::cli::out;' >"$planted/plan/mod.rs"
sh deploy/check-rooms.sh "$planted" >/dev/null && no "deploy/check-rooms.sh does not see an arrow from plan to cli"
rm -r "$planted"

exit $bad

#!/bin/sh
# Rules of the tree that no compiler checks. Run from its top.
set -u
bad=0
no() { echo "check-tree: $1"; bad=1; }

# Outside a repository `git grep` fails, which looks like having found nothing.
git rev-parse --is-inside-work-tree >/dev/null || exit 1

found=$(git grep -l -w 'unsafe' -- '*.rs' | grep -v -E '^xen-locus/locus-xen/|:#!\[forbid')
[ -z "$found" ] || no "the word unsafe stands outside xen-locus/locus-xen/: $found"

# A kernel's version in a comparison: as text, with or without the quotes, or as a call's argument.
branch='(release|version)[^"]*(starts_with|ends_with|contains|find|strip_prefix|split_once|cmp|==|!=|>=|<=|>|<)[ (&]*("[4-9]\.|[4-9]\.[0-9])'
found=$(git grep -n -E "$branch" -- 'xen-locus/*.rs' | grep -v -E '^[^:]*:[0-9]+: *(//|assert)')
[ -z "$found" ] || no "a branch on a kernel version: $found"

# That rule finds such branches when there are any.
while IFS= read -r line; do
	printf '%s\n' "$line" | grep -q -E "$branch" || no "the rule against branches on a kernel version does not see: $line"
done <<'END'
if kernel.release.starts_with("6.1") {
if kernel.release.contains( "6.12." ) {
if release == "5.10.0" {
if version >= 6.4 {
let new = kernel.release.as_str() != "6.";
if let Some(rest) = release.strip_prefix("7.2") {
END

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

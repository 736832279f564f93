#!/bin/sh
# In the guest: are /proc/version and /proc/loadavg as they should be before, or after,
# locus_proc_pair?
# Exit: 0 as expected, 1 not as expected, 64 wrong usage.

case "$1" in
before | after) ;;
*)
	echo "usage: $0 before|after" >&2
	exit 64
	;;
esac

version=$(cat /proc/version) || exit 1
loadavg=$(cat /proc/loadavg) || exit 1
echo "/proc/version: $version"
echo "/proc/loadavg: $loadavg"

newline='
'
case "$version" in
"Linux version "*"${newline}locus=live") version_phase=after ;;
"Linux version "*locus*) version_phase=elsewhere ;;
"Linux version "*) version_phase=before ;;
*) version_phase=broken ;;
esac

# Three averages, running/threads, the last pid, and perhaps the marker.
is_average='[0-9][0-9]*\.[0-9][0-9]'
fields="$is_average $is_average $is_average [0-9][0-9]*/[0-9][0-9]* [0-9][0-9]*"
if echo "$loadavg" | grep -qx "$fields"; then
	loadavg_phase=before
elif echo "$loadavg" | grep -qx "$fields locus=live"; then
	loadavg_phase=after
else
	loadavg_phase=broken
fi

echo "expected $1, found version $version_phase, loadavg $loadavg_phase"
[ "$version_phase" = "$1" ] && [ "$loadavg_phase" = "$1" ]

#!/bin/sh
# In the guest: is /proc/cmdline as it should be before, or after, locus_cmdline?
# Exit: 0 as expected, 1 not as expected, 64 wrong usage.

case "$1" in
before | after) ;;
*)
	echo "usage: $0 before|after" >&2
	exit 64
	;;
esac

seen=$(cat /proc/cmdline) || exit 1
echo "/proc/cmdline: $seen"

# Exactly one line, and the marker at its end exactly once.
lines=$(wc -l < /proc/cmdline)
if [ "$lines" -ne 1 ]; then
	echo "expected 1 line, found $lines"
	exit 1
fi
case "$seen" in
*" locus=live"*" locus=live"*) phase=twice ;;
*" locus=live") phase=after ;;
*"locus=live"*) phase=elsewhere ;;
*) phase=before ;;
esac
echo "expected $1, found $phase"
[ "$phase" = "$1" ]

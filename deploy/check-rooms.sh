#!/bin/sh
# Every `crate::ROOM` in a room of xen-locus/src must name a room below it: check-rooms.sh [FOLDER]. The order is in
# the file `rooms` beside this script. Prints the arrows that lead up, and ends with 1 if there are any.
set -u
here=$(dirname "$0")
top=${1:-$here/../xen-locus/src}
find "$top" -name '*.rs' | sort | xargs awk -v top="$top/" '
	BEGIN {
		while ((getline line < "'"$here"'/rooms") > 0) {
			if (line ~ /^#/ || line == "") continue
			level++
			n = split(line, names, " ")
			for (i = 1; i <= n; i++) { place[names[i]] = level; known[names[i]] = 1 }
		}
	}
	FNR == 1 {
		room = substr(FILENAME, length(top) + 1)
		sub(/[\/.].*/, "", room)
		tests = FILENAME ~ /(^|\/)(tests|[a-z_]*_tests)(\.rs|\/)/
		is_crate = room == "lib" || room == "main" || room == "bin"
		if (!is_crate && !(room in known)) { print FILENAME ": the room " room " is not in deploy/rooms"; bad = 1 }
	}
	is_crate || tests || /^[ \t]*\/\// { next }
	/^#\[cfg\(test\)\]/ { tests = 1; next }
	{
		text = held $0
		held = ""
		# A group of imports may go over several lines.
		if (text ~ /crate::\{[^}]*$/) { held = text; next }
		while (match(text, /crate::\{[^}]*\}/)) {
			group = substr(text, RSTART + 8, RLENGTH - 9)
			text = substr(text, 1, RSTART - 1) substr(text, RSTART + RLENGTH)
			n = split(group, names, ",")
			for (i = 1; i <= n; i++) { gsub(/[ \t]/, "", names[i]); sub(/::.*/, "", names[i]); check(names[i]) }
		}
		while (match(text, /crate::[a-z_0-9]+/)) {
			check(substr(text, RSTART + 7, RLENGTH - 7))
			text = substr(text, RSTART + RLENGTH)
		}
	}
	function check(other) {
		if (other == room || !(other in known)) return
		if (place[other] >= place[room]) {
			print FILENAME ":" FNR ": " room " uses " other ", which is not below it"
			bad = 1
		}
	}
	END { exit bad }
'

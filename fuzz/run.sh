#!/bin/sh
# Runs every target of the fuzzer for some seconds: run.sh [SECONDS] [TARGET…]. What it finds stands in
# fuzz/artifacts/TARGET/; `cargo fuzz run TARGET FILE` shows it again.
set -eu
cd "$(dirname "$0")/.."
seconds=${1:-20}
[ $# -eq 0 ] || shift

target=${CARGO_TARGET_DIR:-$PWD/target}
PATH=$target/tools/bin:$PATH
cargo fuzz --version >/dev/null 2>&1 ||
	cargo install --quiet --locked --version 0.13.2 --root "$target/tools" cargo-fuzz

cargo run --quiet --release -p locus-fuzz --example fuzz_seeds -- "$target/fuzz/seeds"

# cargo-fuzz gives the compiler flags for libFuzzer that it takes from nightly compilers only, unless
# this is set. No sanitizer is used: the code that is run has no unsafe parts, and memory is limited
# below.
export RUSTC_BOOTSTRAP=1
build="--fuzz-dir fuzz --target-dir $target/fuzz/build --sanitizer none"
# shellcheck disable=SC2086
cargo fuzz build $build

for name in ${*:-$(cargo fuzz list --fuzz-dir fuzz)}; do
	corpus=$target/fuzz/corpus/$name
	mkdir -p "$corpus"
	log=$target/fuzz/$name.log
	# libFuzzer itself and its corpus take 50 MiB: some more, and 64 MiB for one input. A full arena is an input of 95 to
	# 97 pages, and libFuzzer keeps some hundred of these in memory.
	case $name in
	arena) limits="-timeout=1 -rss_limit_mb=512 -max_len=401408" ;;
	*) limits="-timeout=1 -rss_limit_mb=128 -max_len=262144" ;;
	esac
	# shellcheck disable=SC2086
	if cargo fuzz run $build "$name" "$corpus" "$target/fuzz/seeds/$name" -- \
		-max_total_time="$seconds" $limits >"$log" 2>&1; then
		echo "fuzz: $name: $(sed -n 's/^Done //p' "$log")"
	else
		tail -n 40 "$log"
		echo "fuzz: $name failed; the log is $log"
		exit 1
	fi
done

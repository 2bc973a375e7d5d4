#!/usr/bin/env bash
# Runs the micro benchmarks of build/release/bench one after the other:  scripts/bench.sh [REGEX]
set -euo pipefail
cd "$(dirname "$0")/.."
mapfile -t programs < <(find build/release/bench -type f -executable -name '*_bench' | grep -E "${1:-.}" | sort)
[[ ${#programs[@]} -gt 0 ]] || {
    echo "No benchmark in build/release/bench matches '${1:-.}'." >&2
    exit 1
}
for program in "${programs[@]}"; do
    printf '\n== %s\n' "$(basename "$program")"
    "$program"
done

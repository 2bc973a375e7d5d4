#!/usr/bin/env bash
# Configures and builds one preset of CMakePresets.json:  scripts/build.sh dev
# Tests whose label matches the regular expression in SKIP_LABELS are left out.
# A build that has nothing to do says nothing. Where CI=true, `dev` compiles a few sources at a time
# as one, which takes half as long; that each stands alone is what clang-tidy finds.
set -euo pipefail
cd "$(dirname "$0")/.."
preset=$1

options=(-D STELLARIUM_SKIP_LABELS="${SKIP_LABELS:-}")
if [[ ${CI:-} == true && $preset == dev ]]; then
    options+=(-D CMAKE_UNITY_BUILD=ON -D CMAKE_UNITY_BUILD_BATCH_SIZE=6)
fi
if ! output=$(cmake --preset "$preset" "${options[@]}" 2>&1); then
    printf '%s\n' "$output" >&2
    exit 1
fi
cmake --build --preset "$preset" --parallel "${JOBS:-$(nproc)}"

#!/usr/bin/env bash
# Configures and builds one preset of CMakePresets.json:  scripts/build.sh dev
# A build that has nothing to do says nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
preset=$1

if ! output=$(cmake --preset "$preset" 2>&1); then
    printf '%s\n' "$output" >&2
    exit 1
fi
cmake --build --preset "$preset" --parallel "${JOBS:-$(nproc)}"

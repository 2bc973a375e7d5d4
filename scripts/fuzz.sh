#!/usr/bin/env bash
# Runs each fuzz target of build/fuzz on its kept corpus, test/fuzz/corpus/TARGET.
#
#     FUZZ_SECONDS=60 scripts/fuzz.sh [TARGET...]
#
# New inputs that reach new code are added to build/fuzz/corpus/TARGET; an input that fails is kept
# in build/fuzz/crashes and named. Exit 1 if any target failed.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${FUZZ_SECONDS:-60}

mapfile -t targets < <(find build/fuzz -type f -executable -name '*_fuzz' | sort)
[[ ${#targets[@]} -gt 0 ]] || {
    echo "No fuzz targets (executables named *_fuzz) in build/fuzz." >&2
    exit 1
}

failed=()
mkdir -p build/fuzz/crashes
for target in "${targets[@]}"; do
    name=$(basename "$target")
    if [[ $# -gt 0 && " $* " != *" $name "* ]]; then
        continue
    fi
    found=build/fuzz/corpus/$name
    kept=test/fuzz/corpus/$name
    mkdir -p "$found"
    corpora=("$found")
    [[ -d $kept ]] && corpora+=("$kept")
    log=build/fuzz/$name.log
    if "$target" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 \
        -artifact_prefix="build/fuzz/crashes/$name-" "${corpora[@]}" >"$log" 2>&1; then
        printf '%-40s %s\n' "$name" "$(grep -oE 'Done [0-9]+ runs in [0-9]+ second' "$log" || true)s"
    else
        tail -n 40 "$log"
        failed+=("$name")
    fi
done

if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'fuzz target failed: %s (input in build/fuzz/crashes)\n' "${failed[@]}" >&2
    exit 1
fi

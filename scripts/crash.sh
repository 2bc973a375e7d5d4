#!/usr/bin/env bash
# Runs the crash and model tests again and again with fresh seeds:  scripts/crash.sh HOURS
#
# A seed that fails is printed by its test; the same seed reproduces the failure:
#     STELLARIUM_TEST_SEED=<seed> build/dev/<test>
set -euo pipefail
cd "$(dirname "$0")/.."
hours=$1
[[ $hours =~ ^[0-9]+([.][0-9]+)?$ ]] || {
    echo "HOURS must be a number such as 2 or 0.5, not '$hours'" >&2
    exit 2
}

end=$(awk -v now="$(date +%s)" -v hours="$hours" 'BEGIN {printf "%d", now + hours * 3600}')
log=$(mktemp)
trap 'rm -f "$log"' EXIT
rounds=0
while [[ $(date +%s) -lt $end ]]; do
    seed=$(od -An -N8 -tu8 /dev/urandom | tr -d ' ')
    if ! STELLARIUM_TEST_SEED=$seed STELLARIUM_TEST_SCALE=${STELLARIUM_TEST_SCALE:-10} \
        ctest --test-dir build/dev --output-on-failure --parallel "${JOBS:-$(nproc)}" \
        --label-regex 'crash|model' --timeout 7200 --no-tests=error >"$log" 2>&1; then
        cat "$log"
        echo "Crash test failed after $rounds good rounds; reproduce with STELLARIUM_TEST_SEED=$seed" >&2
        exit 1
    fi
    rounds=$((rounds + 1))
done
echo "$rounds rounds of the crash and model tests passed"

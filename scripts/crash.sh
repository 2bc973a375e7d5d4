#!/usr/bin/env bash
# Runs the crash, fault and model tests again and again with fresh seeds:  scripts/crash.sh HOURS
#
# A seed that fails is printed by its test; the same seed reproduces the failure:
#     STELLARIUM_TEST_SEED=<seed> build/dev/<test>
# No round begins after HOURS; the one that runs is finished. STELLARIUM_TEST_SCALE (10) is how much
# a round does, in units of `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."
hours=$1
[[ $hours =~ ^[0-9]+([.][0-9]+)?$ ]] || {
    echo "HOURS must be a number such as 2 or 0.5, not '$hours'" >&2
    exit 2
}

end=$(awk -v now="$(date +%s)" -v hours="$hours" 'BEGIN {printf "%d", now + hours * 3600}')
log=$(mktemp)
counts=$(mktemp)
trap 'rm -f "$log" "$counts"' EXIT
rounds=0

# The tests print lines such as "count crash_points 8000 in 27 programs".
print_counts() {
    awk '{for (i = 1; i < NF; ++i) if ($i == "count") {sum[$(i + 1)] += $(i + 2)}}
         END {for (what in sum) {printf "  %s: %d\n", what, sum[what]}}' "$counts"
}

while [[ $(date +%s) -lt $end ]]; do
    seed=$(od -An -N8 -tu8 /dev/urandom | tr -d ' ')
    if ! STELLARIUM_TEST_SEED=$seed STELLARIUM_TEST_SCALE=${STELLARIUM_TEST_SCALE:-10} \
        ctest --test-dir build/dev --verbose --parallel "${JOBS:-$(nproc)}" \
        --label-regex 'crash|model' --timeout 7200 --no-tests=error >"$log" 2>&1; then
        cat "$log"
        echo "Crash test failed after $rounds good rounds; reproduce with STELLARIUM_TEST_SEED=$seed" >&2
        exit 1
    fi
    grep -E '(^|[ :])count [a-z_]+ [0-9]+' "$log" >>"$counts" || true
    rounds=$((rounds + 1))
done
echo "$rounds rounds of the crash, fault and model tests passed"
print_counts

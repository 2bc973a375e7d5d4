#!/usr/bin/env bash
# Runs the tests of one preset and looks at what was skipped.
#
#     scripts/run-tests.sh PRESET [ctest arguments]
#
# Where CI=true a test may be skipped only if test/expected-skips.txt says which device it needs and
# that device is really missing. Elsewhere the skipped tests are listed, with their reasons.
set -euo pipefail
cd "$(dirname "$0")/.."
preset=$1
shift

build_dir=build/$preset
[[ -f $build_dir/CTestTestfile.cmake ]] || {
    echo "$build_dir is not built yet: run 'make build', or scripts/build.sh $preset" >&2
    exit 1
}

# Sanitizers stop at the first fault; a leak is a fault.
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_stack_use_after_return=1:strict_string_checks=1}"
export UBSAN_OPTIONS="${UBSAN_OPTIONS:-print_stacktrace=1}"
export TSAN_OPTIONS="${TSAN_OPTIONS:-halt_on_error=1:second_deadlock_stack=1}"
if [[ $preset == asan || $preset == tsan ]]; then
    # Tests that repeat a random program lower their counts when they see this.
    export STELLARIUM_TEST_SANITIZER=$preset
fi

launcher=()
if [[ $preset == tsan ]] && setarch -R true 2>/dev/null; then
    # GCC 12's ThreadSanitizer cannot start where the kernel randomises addresses widely.
    launcher=(setarch -R)
fi

junit=$PWD/$build_dir/test-results.xml
rm -f "$junit"
status=0
"${launcher[@]}" ctest --test-dir "$build_dir" --output-on-failure --parallel "${JOBS:-$(nproc)}" \
    --test-output-size-passed 65536 --output-junit "$junit" --no-tests=error "$@" || status=$?
python3 scripts/check-skips.py "$junit" test/expected-skips.txt || status=1
exit "$status"

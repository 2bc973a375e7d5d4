#!/usr/bin/env bash
# What `make lint` runs: clang-format and clang-tidy over the C++ sources, shellcheck over the
# scripts. `--fix-format` rewrites the sources instead. Prints findings only.
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=${JOBS:-$(nproc)}

mapfile -t cxx_files < <(find src test bench include -type f \( -name '*.cc' -o -name '*.h' \) \
    -not -path '*/golden/*' 2>/dev/null | sort)

if [[ ${1:-} == --fix-format ]]; then
    printf '%s\n' "${cxx_files[@]}" | xargs -r clang-format-19 -i
    exit 0
fi

failed=()

printf '%s\n' "${cxx_files[@]}" | xargs -r -P "$jobs" -n 20 clang-format-19 --dry-run -Werror \
    || failed+=("clang-format (make format repairs it)")

mapfile -t shell_files < <(grep -rlE --include='*' '^#!.*\b(ba)?sh$' scripts test .ci packaging \
    2>/dev/null | sort)
shellcheck --severity=style "${shell_files[@]}" || failed+=("shellcheck")

# clang-tidy needs the compile commands and nothing built. Test sources are held to the compiler's
# warnings; GoogleTest's macros make them slow here and noisy.
if ! output=$(cmake --preset lint 2>&1); then
    printf '%s\n' "$output" >&2
    exit 1
fi
options=()
if [[ ${CI:-} == true ]]; then
    # The path-sensitive analyzer takes as long as all other checks together. Without it clang-tidy
    # heeds the compile commands' -Werror for clang's own warnings, which are not asked for.
    options=(-checks='-clang-analyzer-*' -extra-arg=-w)
fi
tidy_log=$(mktemp)
trap 'rm -f "$tidy_log"' EXIT
if ! run-clang-tidy-19 -quiet -p build/lint -j "$jobs" "${options[@]}" \
    "$PWD/src/((?!_test\.cc)[^:])*(?<!_test)\.cc\$" >"$tidy_log" 2>&1; then
    # Per-file progress and the count of suppressed warnings are not findings.
    grep -vE '^(\[ *[0-9]+/[0-9]+\]|[0-9]+ warnings? |Enabled checks|clang-tidy-19 )' "$tidy_log" \
        || cat "$tidy_log"
    failed+=("clang-tidy")
fi

if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'lint failed: %s\n' "${failed[@]}" >&2
    exit 1
fi

#!/usr/bin/env bash
# Installs what a build, test, lint, demo or benchmark run needs and the machine lacks.
#
#     scripts/install-deps.sh build test        # the sets to install
#     scripts/install-deps.sh --list build      # print the packages of a set, install nothing
#
# Every Debian package that the project uses is named here and nowhere else. Only missing packages
# are installed, so a second run does nothing and needs neither root nor the network.
set -euo pipefail

declare -A SETS

# What the binaries need to compile and link.
SETS[build]="
    build-essential cmake ninja-build ccache pkg-config
    librust-blake3-dev libxxhash-dev libzstd-dev liburing-dev libfmt-dev libspdlog-dev
    libcli11-dev nlohmann-json3-dev libboost-dev prometheus-cpp-dev libabsl-dev
    libseccomp-dev libnbd-dev libfuse3-dev libsystemd-dev
    libgtest-dev libgmock-dev libbenchmark-dev python3"

# What the tests run: image tools, and real guests (User-mode Linux and QEMU).
SETS[test]="
    qemu-utils qemu-system-common qemu-system-x86 user-mode-linux
    mmdebstrap uidmap fakeroot e2fsprogs busybox-static cpio kmod zstd xz-utils python3 python3-yaml
    b3sum procps util-linux dpkg-dev jq curl libnbd-bin fio"

SETS[lint]="clang-19 clang-tidy-19 clang-format-19 shellcheck python3"

SETS[fuzz]="clang-19 llvm-19 libclang-rt-19-dev"

SETS[demo]="
    qemu-utils qemu-system-x86 mmdebstrap uidmap fakeroot e2fsprogs busybox-static cpio kmod zstd xz-utils
    python3"

SETS[bench]="
    qemu-utils qemu-system-common qemu-system-x86 fio libnbd-bin xfsprogs casync borgbackup restic python3
    python3-matplotlib"

SETS[package]="dpkg-dev fakeroot file mmdebstrap"

usage() {
    echo "usage: $0 [--list] SET...   (sets: ${!SETS[*]})" >&2
    exit 2
}

list_only=no
if [[ ${1:-} == --list ]]; then
    list_only=yes
    shift
fi
[[ $# -gt 0 ]] || usage

packages=()
for set_name in "$@"; do
    [[ -n ${SETS[$set_name]:-} ]] || usage
    # The sets are plain words, split on purpose.
    # shellcheck disable=SC2206
    packages+=(${SETS[$set_name]})
done

if [[ $list_only == yes ]]; then
    printf '%s\n' "${packages[@]}" | sort -u
    exit 0
fi

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    cat >&2 <<MESSAGE
Stellarium's Makefile installs its needs from Debian's packages, and this machine has no apt-get.
On another system install the equivalents of these yourself, then use CMake directly
(cmake -S . -B build && cmake --build build && ctest --test-dir build):
$(printf '%s\n' "${packages[@]}" | sort -u | paste -sd' ' | fold -s -w 96)
MESSAGE
    exit 1
fi

missing_packages() {
    local package status
    for package in $(printf '%s\n' "${packages[@]}" | sort -u); do
        status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
        [[ $status == installed ]] || echo "$package"
    done
}

mapfile -t missing < <(missing_packages)
[[ ${#missing[@]} -gt 0 ]] || exit 0

as_root=()
if [[ $(id -u) -ne 0 ]]; then
    if ! command -v sudo >/dev/null; then
        echo "These packages are missing, and installing them needs root (there is no sudo here)." >&2
        echo "Run as root:  apt-get install --no-install-recommends ${missing[*]}" >&2
        exit 1
    fi
    as_root=(sudo)
fi

echo "Installing ${#missing[@]} missing packages: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt_get() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 \
        -o Acquire::Retries=3 "$@" </dev/null
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { apt_get -q update && apt_get -q -y --no-install-recommends install "${missing[@]}"; } \
    >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    echo "Installing from Debian's packages failed; apt-get's last lines are above." >&2
    if [[ -r /etc/os-release ]] && ! grep -q '^VERSION_ID="12"' /etc/os-release; then
        echo "Stellarium is built and tested on Debian 12; this is $(
            # shellcheck source=/dev/null
            . /etc/os-release && echo "${PRETTY_NAME:-another system}")." >&2
    fi
    exit 1
fi

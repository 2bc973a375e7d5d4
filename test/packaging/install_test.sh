#!/usr/bin/env bash
# Installs a build into an empty folder, runs what is there, and builds programs against it.
#
#     install_test.sh BUILD-FOLDER C-COMPILER DISK.C C++-COMPILER MAP_IMAGE.CC
set -euo pipefail
build=$1
cc=$2
disk=$3
cxx=$4
map_image=$5

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cmake --install "$build" --prefix "$work/usr" >"$work/log" || {
    cat "$work/log" >&2
    exit 1
}

for file in bin/stellarctl bin/stellariumd libexec/stellarium/stellarium-mount-holder \
    share/bash-completion/completions/stellarctl share/zsh/vendor-completions/_stellarctl share/fish/vendor_completions.d/stellarctl.fish \
    lib/systemd/system/stellariumd.service lib/sysusers.d/stellarium.conf \
    share/doc/stellarium/LICENSE include/stellarium.h; do
    [[ -s $work/usr/$file ]] || {
        echo "not installed: $file" >&2
        exit 1
    }
done
grep -q "^ExecStart=$work/usr/bin/stellariumd " "$work/usr/lib/systemd/system/stellariumd.service" || {
    echo "the unit does not start the installed daemon" >&2
    exit 1
}
bash -n "$work/usr/share/bash-completion/completions/stellarctl"
"$work/usr/bin/stellarctl" --version >/dev/null
"$work/usr/bin/stellariumd" --version >/dev/null
"$work/usr/libexec/stellarium/stellarium-mount-holder" --help >/dev/null

pkgconfig=$(dirname "$(find "$work/usr" -name stellarium.pc)")
libraries=$(dirname "$pkgconfig")
export PKG_CONFIG_PATH=$pkgconfig LD_LIBRARY_PATH=$libraries
# The words of pkg-config are split on purpose.
# shellcheck disable=SC2046
"$cc" -std=c11 -O1 -o "$work/disk" "$disk" $(pkg-config --cflags --libs stellarium)
# shellcheck disable=SC2046
"$cxx" -std=c++17 -O1 -o "$work/map_image" "$map_image" $(pkg-config --cflags --libs stellarium)
"$work/disk" "$work/store" >"$work/said"
grep -q '^example-vm, 1048576 bytes, of example$' "$work/said"
head -c 1048576 /dev/urandom >"$work/image.raw"
"$work/usr/bin/stellarctl" --store "$work/store" image import image "$work/image.raw" >/dev/null
"$work/map_image" "$work/store" image >"$work/said"
grep -q ' 1048576 bytes, 1048576 of them shared, 0 gathered$' "$work/said"

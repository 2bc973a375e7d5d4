#!/usr/bin/env bash
# Installs a build into an empty folder, runs what is there, and builds a program against it.
#
#     install_test.sh BUILD-FOLDER COMPILER EMBED.CC
set -euo pipefail
build=$1
compiler=$2
source=$3

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cmake --install "$build" --prefix "$work/usr" >"$work/log" || {
    cat "$work/log" >&2
    exit 1
}

for file in bin/stellarctl bin/stellariumd libexec/stellarium/stellarium-mount-holder \
    share/bash-completion/completions/stellarctl share/zsh/vendor-completions/_stellarctl share/fish/vendor_completions.d/stellarctl.fish \
    lib/systemd/system/stellariumd.service lib/sysusers.d/stellarium.conf \
    share/doc/stellarium/LICENSE; do
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
"$compiler" -std=c++23 -O1 -o "$work/embed" "$source" $(pkg-config --cflags --libs stellarium)
"$work/embed" "$work/store"

#!/usr/bin/env bash
# Finds a Linux kernel for guests and prints "KERNEL MODULES-FOLDER VERSION".
#
#     scripts/guests/find-kernel.sh qemu    # Debian's cloud kernel: installed, cached, or downloaded
#     scripts/guests/find-kernel.sh uml     # User-mode Linux: the user-mode-linux package's
#
# A kernel that is not installed is unpacked into the cache folder ($STELLARIUM_CACHE, by default
# ~/.cache/stellarium) instead of being installed, so this machine's boot loader is left alone.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
cache=${STELLARIUM_CACHE:-$HOME/.cache/stellarium}

# The newest of the version-named folders in $1; nothing where there is none.
newest_in() { find "$1" -mindepth 1 -maxdepth 1 -type d -printf '%f\n' 2>/dev/null | sort -V | tail -n 1 || true; }

case ${1:-} in
uml)
    kernel=$(command -v linux.uml || command -v linux || true)
    version=$(newest_in /usr/lib/uml/modules)
    if [[ -z $kernel || -z $version ]]; then
        echo "$0: install the package user-mode-linux" >&2
        exit 1
    fi
    echo "$kernel /usr/lib/uml/modules/$version $version"
    ;;
qemu)
    # Readable by everybody only on some systems; root always can.
    for kernel in $(printf '%s\n' /boot/vmlinuz-*-cloud-amd64 | sort -rV); do
        version=${kernel#/boot/vmlinuz-}
        if [[ -r $kernel && -d /lib/modules/$version/kernel ]]; then
            echo "$kernel /lib/modules/$version $version"
            exit 0
        fi
    done
    mkdir -p "$cache/kernel"
    exec 9>"$cache/kernel/lock"
    flock 9
    version=$(newest_in "$cache/kernel/lib/modules")
    if [[ -z $version ]]; then
        package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null \
            | awk '$1 == "Depends:" && $2 ~ /^linux-image-.*-cloud-amd64$/ {print $2; exit}')
        if [[ -z $package ]]; then
            echo "$0: apt knows no linux-image-cloud-amd64; run apt-get update" >&2
            exit 1
        fi
        work=$(mktemp -d "$cache/kernel/work.XXXXXX")
        trap 'rm -rf "$work"' EXIT
        # apt drops to a user that may not read a private cache folder; that warning is harmless.
        (cd "$work" && apt-get -q -o APT::Sandbox::User=root download "$package" >/dev/null)
        dpkg-deb -x "$work"/*.deb "$work/root"
        version=$(newest_in "$work/root/lib/modules")
        depmod -b "$work/root" "$version"
        mv "$work/root/boot/vmlinuz-$version" "$cache/kernel/"
        mv "$work/root/lib" "$cache/kernel/lib"
    fi
    echo "$cache/kernel/vmlinuz-$version $cache/kernel/lib/modules/$version $version"
    ;;
*)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
    ;;
esac

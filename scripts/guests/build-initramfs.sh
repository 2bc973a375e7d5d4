#!/usr/bin/env bash
# Builds the initramfs of a guest: a static busybox, the virtio modules, and an init of 60 lines.
#
#     scripts/guests/build-initramfs.sh qemu|uml OUT
#
# It mounts the disk that `root=` names on the kernel command line and starts its init. Instead,
# `stellarium.probe` prints a line and stops the machine (does this accelerator run Linux?), and
# `stellarium.init=` runs a shell script here (gzip, base64), without a root disk. A file that was
# built from the same parts is kept.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
here=$(dirname "$(realpath "$0")")

if [[ $# -ne 2 ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
fi
kind=$1
out=$2

read -r _ modules version < <("$here/find-kernel.sh" "$kind")
[[ -n ${version:-} ]] || exit 1
busybox=$(command -v busybox || true)
if [[ -z $busybox ]] || readelf -l "$busybox" 2>/dev/null | grep -q INTERP; then
    echo "$0: needs a static busybox: install the package busybox-static" >&2
    exit 1
fi

mkdir -p "$(dirname "$out")"
exec 9>"$out.lock"
flock 9
recipe=$(cat "$0" "$busybox" <(echo "$kind $version") | sha256sum | cut -c1-32)
if [[ -s $out && $(cat "$out.recipe" 2>/dev/null) == "$recipe" ]]; then
    exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir -p "$root"/{bin,dev,proc,sys,run,mnt,modules}
cp "$busybox" "$root/bin/busybox"

mkdir -p "$work/base/lib/modules"
ln -s "$modules" "$work/base/lib/modules/$version"

# The modules and what they need, numbered in the order of loading. Built-in ones print nothing.
number=100
for module in virtio_pci virtio_mmio virtio_blk virtio_console virtio-rng ext4; do
    while read -r _ path _; do
        target=$(basename "$path")
        if ! compgen -G "$root/modules/*-${target%.xz}" >/dev/null; then
            number=$((number + 1))
            case $path in
                *.xz) xz -dc "$path" >"$root/modules/$number-${target%.xz}" ;;
                *) cp "$path" "$root/modules/$number-$target" ;;
            esac
        fi
    done < <(modprobe --show-depends --set-version "$version" --dirname "$work/base" "$module" \
        2>/dev/null | grep ^insmod || true)
done

cat >"$root/init" <<'FILE'
#!/bin/busybox sh
# First program of the guest; see scripts/guests/build-initramfs.sh.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
mount -t tmpfs none /run

stop() {
    poweroff -f
}

for module in /modules/*; do
    [ -e "$module" ] && insmod "$module"
done

root= probe= script=
for word in $(cat /proc/cmdline); do
    case $word in
        root=*) root=${word#root=} ;;
        stellarium.probe) probe=yes ;;
        stellarium.init=*) script=${word#stellarium.init=} ;;
    esac
done

if [ -n "$probe" ]; then
    echo "@@stellarium probe"
    stop
fi

if [ -n "$script" ]; then
    printf '%s' "$script" | base64 -d | gzip -d >/run/script
    printf '\n@@stellarium begin\n'
    sh /run/script
    printf '\n@@stellarium end %d\n' $?
    sync
    stop
fi

# A disk on a PCI bus that is still being scanned appears a little later.
tries=0
while [ ! -b "$root" ]; do
    tries=$((tries + 1))
    if [ $tries -gt 100 ]; then
        echo "@@stellarium no root disk: '$root'"
        stop
    fi
    usleep 50000
done
if ! mount -t ext4 "$root" /mnt; then
    echo "@@stellarium cannot mount root disk: '$root'"
    stop
fi
umount /proc /sys /run
mount --move /dev /mnt/dev
exec switch_root /mnt /sbin/init
FILE
chmod 755 "$root/init"

find "$root" -exec touch -h -d @0 {} +
(cd "$root" && find . | LC_ALL=C sort | cpio -o -H newc --owner 0:0 --reproducible --quiet) \
    | gzip -9n >"$work/initramfs"
mv "$work/initramfs" "$out"
echo "$recipe" >"$out.recipe"

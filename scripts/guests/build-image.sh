#!/usr/bin/env bash
# Builds a Debian root image (raw ext4, no partition table) of real packages, ready to boot.
#
#     scripts/guests/build-image.sh NAME OUT [PACKAGE...]
#
# OUT is the file to write, or '-' for NAME.raw in the cache folder ($STELLARIUM_CACHE, by default
# ~/.cache/stellarium). The path is printed. An image that was built by the same recipe is kept as
# it is, so a second call takes no time; STELLARIUM_REBUILD=1 builds it anew.
#
# What boots: systemd to multi-user, root logged in on the serial console. With `stellarium.run=` (a
# base64 shell script) or `stellarium.script=/dev/vdb` (a disk that holds one) on the kernel command
# line, the guest runs that script after boot, writes `@@stellarium begin` and `@@stellarium end
# STATUS` around its output on the console, and powers off.
#
# Runs as root or, through user namespaces and fakeroot, as anybody. Nothing is mounted. The same
# packages on the same file system give the same bytes: times come from SOURCE_DATE_EPOCH, and
# nothing random (keys, machine id, UUID, hash seed) is left in the image.
set -euo pipefail

SUITE=bookworm
PACKAGES="systemd-sysv,udev,dbus,kmod,iproute2,procps,e2fsprogs,openssh-server,ca-certificates,curl,git,python3,less,vim-tiny,bash-completion,locales"
SIZE=${STELLARIUM_IMAGE_SIZE:-1G}
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-1735689600}

if [[ $# -lt 2 ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
fi
name=$1
out=$2
shift 2
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] || {
    echo "$0: NAME becomes the host name: lower case letters, digits and '-', not '$name'" >&2
    exit 2
}
cache=${STELLARIUM_CACHE:-$HOME/.cache/stellarium}
if [[ $out == - ]]; then
    mkdir -p "$cache"
    out=$cache/$name.raw
fi
mkdir -p "$(dirname "$out")"
out=$(realpath -m "$out")

packages=$PACKAGES
for package in "$@"; do
    packages+=",$package"
done

# mkfs.ext4 and friends are in sbin, which is not in everybody's PATH.
PATH=$PATH:/usr/sbin:/sbin

exec 9>"$out.lock"
flock 9
recipe=$({ echo "$name $packages $SIZE $SUITE $SOURCE_DATE_EPOCH"; cat "$0"; } | sha256sum | cut -c1-32)
if [[ -z ${STELLARIUM_REBUILD:-} && -s $out && $(cat "$out.recipe" 2>/dev/null) == "$recipe" ]]; then
    echo "$out"
    exit 0
fi

work=$(mktemp -d "$out.work.XXXXXX")
log=$work/log
# Without root, hooks run as another user, who cannot look into a private home.
hooks=$(mktemp -d)
chmod 755 "$hooks"
finish() {
    local status=$?
    if [[ $status -ne 0 ]]; then
        tail -n 30 "$log" >&2 || true
        echo "$0: building $out failed; the last lines of the log are above" >&2
    fi
    chmod -R u+rwX "$work" 2>/dev/null || true
    rm -rf "$work" "$hooks"
}
trap finish EXIT

# The machine's own Debian sources, so that a local mirror or a proxy is used where one is set up.
# shellcheck disable=SC2016  # apt-get expands these.
sources=$(apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' \
    'Created-By: Packages' 'Origin: Debian' 2>/dev/null | grep -E " $SUITE(-updates|-security)? " \
    | sort -u || true)

mkdir "$hooks/overlay"
overlay() {  # overlay PATH MODE < content
    mkdir -p "$hooks/overlay/$(dirname "$1")"
    cat >"$hooks/overlay/$1"
    chmod "$2" "$hooks/overlay/$1"
}

echo "$name" | overlay etc/hostname 644
printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$name" | overlay etc/hosts 644
: | overlay etc/resolv.conf 644
: | overlay etc/machine-id 644
echo 'LANG=C.UTF-8' | overlay etc/default/locale 644
overlay etc/fstab 644 <<'FILE'
# The kernel command line names the root; everything else is memory.
tmpfs /tmp tmpfs mode=1777,nosuid,nodev 0 0
FILE
overlay etc/systemd/system/serial-getty@.service.d/autologin.conf 644 <<'FILE'
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200,57600,38400,9600 %I $TERM
FILE
overlay etc/systemd/system/stellarium-run.service 644 <<'FILE'
[Unit]
Description=Run the script given on the kernel command line, then power off
ConditionKernelCommandLine=|stellarium.run
ConditionKernelCommandLine=|stellarium.script
After=multi-user.target

[Service]
Type=oneshot
ExecStart=/usr/local/sbin/stellarium-run

[Install]
WantedBy=multi-user.target
FILE
overlay usr/local/sbin/stellarium-run 755 <<'FILE'
#!/bin/sh
# Runs the script that the kernel command line carries or points to, on the console.
exec </dev/null >/dev/console 2>&1
for word in $(cat /proc/cmdline); do
    case $word in
        stellarium.run=*) printf '%s' "${word#stellarium.run=}" | base64 -d >/run/stellarium-script ;;
        stellarium.script=*) tr -d '\000' <"${word#stellarium.script=}" >/run/stellarium-script ;;
    esac
done
printf '\n@@stellarium begin\n'
cd /root || exit
sh /run/stellarium-script
printf '\n@@stellarium end %d\n' $?
systemctl --no-block poweroff
FILE

cat >"$hooks/customize" <<'FILE'
#!/bin/sh
# Run by mmdebstrap with the new root as its argument.
set -eu
root=$1
chroot "$root" passwd -q -d root
chroot "$root" systemctl -q enable stellarium-run.service
# Work that a guest of a few seconds' life does not need, and units that would wait or write.
chroot "$root" systemctl -q mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
    e2scrub_all.timer e2scrub_reap.service fstrim.timer getty@tty1.service systemd-pcrphase.service \
    systemd-random-seed.service
chroot "$root" systemctl -q disable ssh.service
# Random or taken from the machine that built the image.
rm -f "$root"/etc/ssh/ssh_host_* "$root"/var/lib/systemd/random-seed "$root"/var/lib/dbus/machine-id
rm -f "$root"/var/cache/ldconfig/aux-cache "$root"/var/log/*.log "$root"/var/log/apt/*
rm -rf "$root"/var/lib/apt/lists/* "$root"/run/*
FILE
chmod +x "$hooks/customize"
tar -C "$hooks/overlay" --owner=0 --group=0 --numeric-owner --sort=name -cf "$hooks/overlay.tar" .

echo "Building the Debian image $name (about half a minute and 400 MB in $(dirname "$out"))" >&2
mmdebstrap_arguments=(--variant=minbase --format=tar "--include=$packages"
    "--customize-hook=tar-in '$hooks/overlay.tar' /"
    "--customize-hook='$hooks/customize' \"\$1\"")
if [[ -n $sources ]]; then
    printf '%s\n' "$sources" | mmdebstrap "${mmdebstrap_arguments[@]}" "$SUITE" "$work/root.tar" - \
        >"$log" 2>&1
else
    mmdebstrap "${mmdebstrap_arguments[@]}" "$SUITE" "$work/root.tar" >"$log" 2>&1 </dev/null
fi

# Fills the image from the tar file without mounting it. Run under fakeroot where not root.
cat >"$work/fill" <<'FILE'
#!/bin/bash
set -euo pipefail
work=$1 name=$2 size=$3
mkdir "$work/root"
tar -C "$work/root" --numeric-owner -xpf "$work/root.tar"
rm "$work/root.tar"
uuid=$(echo "stellarium $name" | sha256sum | sed -E 's/^(.{8})(.{4}).(.{3}).(.{3})(.{12}).*/\1-\2-4\3-8\4-\5/')
truncate -s "$size" "$work/image"
export E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH
# Inode tables are zeroed here, else each guest would write them all during its first minutes.
mkfs.ext4 -q -F -L "$name" -U "$uuid" -m 1 \
    -E "hash_seed=$uuid,lazy_itable_init=0,lazy_journal_init=0,nodiscard" \
    -d "$work/root" "$work/image"
# mkfs took change and access times from the folder, which was made just now.
find "$work/root" -printf '%P\n' | sed 's/"/""/g' | while IFS= read -r path; do
    printf 'sif "/%s" ctime @%s\nsif "/%s" atime @%s\n' \
        "$path" "$SOURCE_DATE_EPOCH" "$path" "$SOURCE_DATE_EPOCH"
done >"$work/times"
debugfs -w -f "$work/times" "$work/image" >/dev/null 2>"$work/debugfs.err"
FILE
if [[ $(id -u) -eq 0 ]]; then
    bash "$work/fill" "$work" "$name" "$SIZE" >>"$log" 2>&1
else
    fakeroot -- bash "$work/fill" "$work" "$name" "$SIZE" >>"$log" 2>&1
fi

# mkfs writes zeros here and there; as holes they cost nothing.
fallocate --dig-holes "$work/image" 2>/dev/null || true
mv "$work/image" "$out"
echo "$recipe" >"$out.recipe"
echo "$out"

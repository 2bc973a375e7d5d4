#!/usr/bin/env bash
# Installs the Debian package into a clean Debian and uses it there:  scripts/package-test.sh FOLDER
#
# FOLDER holds the .deb. The clean system is made by mmdebstrap and gone afterwards. There the
# package's dependencies come from Debian; the programs make a store, import, clone and export; the
# daemon runs as its own user; the unit is checked by systemd-analyze; removal keeps the store.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
folder=$1
deb=$(find "$folder" -maxdepth 1 -name 'stellarium-engine_*.deb' -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2-)
[[ -n $deb ]] || {
    echo "$0: no stellarium-engine_*.deb in $folder; run 'make package'" >&2
    exit 1
}

hooks=$(mktemp -d)
log=$hooks/log
trap 'rm -rf "$hooks"' EXIT
chmod 755 "$hooks"
cp "$deb" "$hooks/stellarium.deb"
cat >"$hooks/inside" <<'FILE'
#!/bin/bash
# Runs in the clean system.
set -euxo pipefail
export DEBIAN_FRONTEND=noninteractive
apt-get -q -y --no-install-recommends install /root/stellarium.deb
getent passwd stellarium
stellarctl --version
stellariumd --version
for file in /usr/share/bash-completion/completions/stellarctl /usr/lib/systemd/system/stellariumd.service \
    /usr/share/man/man1/stellarctl.1* /usr/share/man/man8/stellariumd.8* \
    /usr/lib/libstellarium.so /usr/include/stellarium.h; do
    test -s "$file"
done
systemd-analyze verify --man=no stellariumd.service
bash -n /usr/share/bash-completion/completions/stellarctl

# A store of root's, without a daemon.
export STELLARIUM_STORE=/var/tmp/store
stellarctl init
head -c 5000001 /dev/urandom >/var/tmp/disk.raw
truncate -s 50000001 /var/tmp/disk.raw
stellarctl image import disk /var/tmp/disk.raw
stellarctl volume clone disk 'vm-{n}' --count 3
stellarctl image export disk /var/tmp/back.raw
cmp /var/tmp/disk.raw /var/tmp/back.raw
stellarctl volume export vm-3 /var/tmp/vm.raw
cmp -n 50000001 /var/tmp/disk.raw /var/tmp/vm.raw
unset STELLARIUM_STORE

# The daemon as its unit starts it, but for systemd.
install -d -o stellarium -g stellarium -m 700 /var/lib/stellarium
install -d -o stellarium -g stellarium -m 750 /run/stellarium
as_daemon() { setpriv --reuid stellarium --regid stellarium --clear-groups \
    env STELLARIUM_STORE=/var/lib/stellarium STELLARIUM_RUNTIME_DIR=/run/stellarium "$@"; }
as_daemon stellarctl init
coproc READY { python3 -c '
import socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind("\0stellarium-ready")
print("bound", flush=True)
s.settimeout(60)
while b"READY=1" not in s.recv(4096):
    pass
print("ready", flush=True)'; }
read -r line <&"${READY[0]}" && test "$line" = bound
NOTIFY_SOCKET=@stellarium-ready as_daemon stellariumd --store /var/lib/stellarium &
daemon=$!
read -r line <&"${READY[0]}" && test "$line" = ready
stellarctl volume create data --size 64MiB
test "$(stellarctl stats --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["volumes"])')" = 1
kill "$daemon"
wait "$daemon"

# Removal takes the programs and keeps people's disks.
apt-get -q -y purge stellarium-engine
test ! -e /usr/bin/stellarctl
test -d /var/lib/stellarium
: "package test passed"
FILE
chmod +x "$hooks/inside"

# shellcheck disable=SC2016  # The hook's shell expands $1.
if ! mmdebstrap --variant=minbase --format=null --include=python3-minimal,systemd \
    "--customize-hook=copy-in '$hooks/stellarium.deb' /root" \
    "--customize-hook=copy-in '$hooks/inside' /root" \
    '--customize-hook=chroot "$1" /root/inside' \
    bookworm /dev/null >"$log" 2>&1 </dev/null; then
    tail -n 40 "$log" >&2
    echo "$0: the package does not work in a clean Debian; the log ends above" >&2
    exit 1
fi
echo "$(basename "$deb") installs and works in a clean Debian 12"

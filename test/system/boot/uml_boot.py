#!/usr/bin/env python3
"""Debian boots as User-mode Linux from a clone, and finds its writes again after a daemon restart.

    uml_boot.py BUILD-FOLDER

Import, clone, daemon, attach; systemd up to multi-user; a file written and synced in the guest. Then
the daemon is stopped and started: the attachment is there again, a second guest reads the file, a
clone made before sees nothing of it, and the exported disk is a clean ext4.
"""
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guests"))
import guests  # noqa: E402
from engine import Engine  # noqa: E402

WRITE = """
grep -q ' / ext4' /proc/mounts || exit 3
head -c 3000000 /dev/urandom > /root/noise
sha256sum < /root/noise > /root/noise.sum
sync
cat /root/noise.sum
systemctl is-active multi-user.target
"""
READ = """
mount -t ext4 -o ro /dev/vda /mnt || exit 3
sha256sum < /mnt/root/noise
umount /mnt
"""
ABSENT = """
mount -t ext4 -o ro /dev/vda /mnt || exit 3
test ! -e /mnt/root/noise && test -x /mnt/bin/bash && echo @@untouched
umount /mnt
"""


def check(condition, text):
    if not condition:
        sys.exit(f"uml_boot: {text}")


def main(build):
    image = guests.image("debian")
    with Engine(build) as engine:
        engine.run("init")
        engine.ctl("image", "import", "debian", image)
        engine.ctl("volume", "clone", "debian", "vm-{n}", "--count", "2")
        engine.start_daemon()
        disk = engine.attach("vm-1")
        with guests.UmlGuest("writer", disk=disk, script=WRITE, memory_mib=256) as guest:
            status, output = guest.run_to_end(300)
        check(status == 0, f"the guest's script failed with {status}:\n{output}")
        lines = output.split("\n")
        check(len(lines) >= 2 and lines[1] == "active", f"systemd did not reach its target:\n{output}")
        checksum = lines[0]

        engine.stop_daemon()
        engine.start_daemon()
        attached = engine.ctl("attachments")
        check([each["source"] for each in attached] == ["vm-1"],
              f"the attachment did not outlive the daemon: {attached}")
        with guests.UmlGuest("reader", disk=disk, script=READ, in_initramfs=True) as guest:
            status, output = guest.run_to_end(120)
        check(status == 0 and output.strip() == checksum,
              f"the file was {checksum} and is now:\n{output}")
        with guests.UmlGuest("other", disk=engine.attach("vm-2"), script=ABSENT,
                             in_initramfs=True) as guest:
            status, output = guest.run_to_end(120)
        check(status == 0 and "@@untouched" in output, f"the other clone is not as made:\n{output}")

        engine.ctl("detach", "vm-1")
        engine.ctl("detach", "vm-2")
        engine.stop_daemon()
        exported = engine.work / "exported.raw"
        engine.ctl("volume", "export", "vm-1", exported)
        fsck = subprocess.run(["/sbin/e2fsck", "-fn", str(exported)], capture_output=True, text=True,
                              check=False)
        check(fsck.returncode == 0, f"e2fsck of the exported disk:\n{fsck.stdout}{fsck.stderr}")


if __name__ == "__main__":
    main(sys.argv[1])

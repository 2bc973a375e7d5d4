#!/usr/bin/env python3
"""The disk as a QEMU guest sees it: size, serial, queues, direct I/O, discard, growth, read-only.

    qemu_disk.py BUILD-FOLDER

A kernel with nothing but an initramfs works on a volume of two queues with O_DIRECT, while the host
grows the volume under it; what it wrote is then compared outside, in an export.
"""
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guests"))
import guests  # noqa: E402
from engine import Engine  # noqa: E402

MIB = 1 << 20
SIZE = 256 * MIB
GROWN = 320 * MIB

# The pattern file is made in memory and written twice; the middle of the second copy is discarded.
WORK = """
cd /run
sector_count() { cat /sys/block/vda/size; }
echo "size $(sector_count)"
echo "serial $(cat /sys/block/vda/serial)"
echo "queues $(ls /sys/block/vda/mq | wc -l)"
i=0
while [ $i -lt 64 ]; do seq $((i * 9000)) $((i * 9000 + 8999)); i=$((i + 1)); done | head -c 2097152 > pattern
dd if=pattern of=/dev/vda bs=64k oflag=direct conv=fsync 2>/dev/null || exit 3
dd if=pattern of=/dev/vda bs=64k seek=128 oflag=direct 2>/dev/null || exit 3
blkdiscard -o $((8 << 20)) -l 1048576 /dev/vda || exit 4
sync
echo 3 > /proc/sys/vm/drop_caches
echo "first $(dd if=/dev/vda bs=64k count=32 iflag=direct 2>/dev/null | sha256sum)"
echo "pattern $(sha256sum < pattern)"
echo "discarded $(dd if=/dev/vda bs=64k skip=128 count=16 iflag=direct 2>/dev/null | tr -d '\\000' | wc -c)"
echo "kept $(dd if=/dev/vda bs=64k skip=144 count=16 iflag=direct 2>/dev/null | sha256sum)"
echo @@grow
tries=0
while [ $(sector_count) = 524288 ] && [ $tries -lt 1000 ]; do usleep 10000; tries=$((tries + 1)); done
echo "grown $(sector_count)"
dd if=pattern of=/dev/vda bs=1M seek=318 oflag=direct conv=fsync 2>/dev/null || exit 5
"""
READ_ONLY = """
echo "read-only $(cat /sys/block/vda/ro)"
dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync 2>/dev/null && exit 3
dd if=/dev/vda bs=64k count=32 2>/dev/null | sha256sum
"""


def pattern():
    text = "".join(f"{number}\n" for number in range(64 * 9000))
    return text.encode()[:2 * MIB]


def check(condition, text):
    if not condition:
        sys.exit(f"qemu_disk: {text}")


def main(build):
    accelerator = guests.accelerator()
    expected = pattern()
    with Engine(build) as engine:
        engine.run("init")
        engine.ctl("volume", "create", "data", "--size", f"{SIZE}")
        engine.start_daemon()
        disk = engine.attach("data", "--serial", "star-0042", queues=2)
        with guests.QemuGuest("work", disk=disk, script=WORK, in_initramfs=True, cpus=2,
                              accel=accelerator) as guest:
            guest.wait_for("@@grow", 120)
            engine.ctl("volume", "resize", "data", f"{GROWN}")
            status, output = guest.run_to_end(120)
        check(status == 0, f"the guest's script failed with {status}:\n{output}")
        seen = {line.split(" ", 1)[0]: line.split(" ", 1)[1].split()[0]
                for line in output.splitlines() if " " in line}
        for key, value in {
                "size": str(SIZE // 512), "serial": "star-0042", "queues": "2",
                "pattern": hashlib.sha256(expected).hexdigest(),
                "first": hashlib.sha256(expected).hexdigest(), "discarded": "0",
                "kept": hashlib.sha256(expected[MIB:]).hexdigest(),
                "grown": str(GROWN // 512)}.items():
            check(seen.get(key) == value, f"{key}: the guest saw {seen.get(key)}, not {value}")

        engine.ctl("detach", "data")
        with guests.QemuGuest("reader", disk=engine.attach("data", "--read-only"), script=READ_ONLY,
                              in_initramfs=True, accel=accelerator) as guest:
            status, output = guest.run_to_end(120)
        check(status == 0 and "read-only 1" in output
              and hashlib.sha256(expected).hexdigest() in output,
              f"the read-only disk, script status {status}:\n{output}")
        engine.ctl("detach", "data")
        engine.stop_daemon()

        exported = engine.work / "exported.raw"
        engine.ctl("volume", "export", "data", exported)
        content = exported.read_bytes()
        wanted = bytearray(GROWN)
        wanted[0:2 * MIB] = expected
        wanted[9 * MIB:10 * MIB] = expected[MIB:]
        wanted[318 * MIB:320 * MIB] = expected
        check(content == wanted, "the exported disk is not what the guest wrote")


if __name__ == "__main__":
    main(sys.argv[1])

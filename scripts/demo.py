#!/usr/bin/env python3
"""Stellarium's main job on real input, start to finish, with every number measured in this run.

    make demo                   # installs and builds what is missing, then runs this
    scripts/demo.py [--clones N] [--keep] [--build FOLDER]

Builds a Debian image (kept for the next run), imports it into a new store, clones it 1,000 times,
starts the daemon, boots two guests from two clones at the same time, lets each write and look for
the other's file, shuts them down, then snapshots one, changes it and rolls it back. Prints a table.
Everything but the image is removed at the end; --keep leaves the store, and says where.
"""
import argparse
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "test" / "system" / "guests"))
import guests  # noqa: E402  (found by the line above)
from engine import Engine, EngineError  # noqa: E402

BOOT_TIMEOUT_S = 300
NOISE_MIB = 16

# What each of the two guests runs. It writes, waits until both have written, then reads from disk.
GUEST_SCRIPT = """
echo "written by {me}" > /root/from-{me}
head -c {noise_bytes} /dev/urandom > /root/noise
sync
echo @@wrote
read go < /dev/ttyS0
echo 3 > /proc/sys/vm/drop_caches
cat /root/from-{me}
if [ -e /root/from-{other} ]; then echo @@sees-the-other; else echo @@other-absent; fi
"""
CHANGE_SCRIPT = """
mount -t ext4 /dev/vda /mnt
rm /mnt/root/from-one
echo "a change to be undone" > /mnt/root/change
umount /mnt
"""
CHECK_SCRIPT = """
mount -t ext4 -o ro /dev/vda /mnt
cat /mnt/root/from-one
if [ -e /mnt/root/change ]; then echo @@change-is-there; else echo @@change-is-gone; fi
umount /mnt
"""


class DemoError(Exception):
    """Something did not work; the text says what, for the person who ran the demo."""


def human_bytes(count):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def human_seconds(seconds):
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def disk_usage(folder):
    """What `du` counts: allocated bytes of the files in `folder`."""
    total = 0
    for path in [folder, *folder.rglob("*")]:
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:
            pass  # Removed while we looked.
    return total


def allocated_data(path):
    """Bytes of `path` that are not holes."""
    total, offset = 0, 0
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while offset < size:
            try:
                start = os.lseek(file.fileno(), offset, os.SEEK_DATA)
            except OSError:
                break
            offset = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            total += offset - start
    return total


class Reporter:
    """Prints each step as it runs, and the table at the end."""

    def __init__(self):
        self.rows = []
        self.limits = []
        self.terminal = sys.stdout.isatty()

    def step(self, text):
        print(f"  {text}", flush=True)

    def row(self, what, value, note=""):
        self.rows.append((what, value, note))

    def cannot(self, text):
        self.limits.append(text)

    def table(self, title):
        widths = [max(len(row[column]) for row in self.rows) for column in range(3)]
        bold, plain = ("\033[1m", "\033[0m") if self.terminal else ("", "")
        line = "─" * (sum(widths) + 6)
        print(f"\n {bold}{title}{plain}\n {line}")
        for what, value, note in self.rows:
            print(f"  {what:<{widths[0]}}  {bold}{value:>{widths[1]}}{plain}  {note}")
        print(f" {line}")
        for text in self.limits:
            print(textwrap.fill(f"Not on this machine: {text}", width=max(60, len(line)),
                                initial_indent="  ", subsequent_indent="  "))
        print()


class Demo:
    def __init__(self, arguments, engine):
        self.arguments = arguments
        self.engine = engine
        self.report = Reporter()

    def ctl(self, *words):
        """Runs stellarctl; (its JSON answer, seconds)."""
        begin = time.monotonic()
        answer = self.engine.ctl(*words)
        return answer, time.monotonic() - begin

    def stats(self):
        return self.engine.ctl("stats")

    # --- The steps --------------------------------------------------------------------------------

    def import_image(self, image):
        self.report.step(f"import {image.name}")
        self.ctl("init")
        with open(image, "rb") as file:  # From the page cache, so that the store's own rate shows.
            while file.read(1 << 24):
                pass
        data = allocated_data(image)
        answer, seconds = self.ctl("image", "import", "debian", image)
        stats = self.stats()
        self.report.row("Import of a Debian image", f"{data / 1e6 / seconds:.0f} MB/s",
                        f"{human_bytes(data)} of data in {human_seconds(seconds)}, "
                        f"{stats['chunks']:,} unique chunks")
        if answer and answer.get("size_bytes") != image.stat().st_size:
            raise DemoError(f"the image is {image.stat().st_size} bytes long and "
                            f"{answer.get('size_bytes')} were imported")

    def export_image(self, image):
        self.report.step("export it and compare")
        exported = self.engine.work / "exported.raw"
        _, seconds = self.ctl("image", "export", "debian", exported)
        if subprocess.run(["cmp", "--silent", str(image), str(exported)], check=False).returncode:
            raise DemoError("the exported image differs from the imported one")
        exported.unlink()
        self.report.row("Export, byte-identical", human_seconds(seconds), "compared with cmp")

    def clone(self):
        count = self.arguments.clones
        self.report.step(f"make {count:,} clones")
        before, used_before = self.stats(), disk_usage(self.engine.store)
        _, seconds = self.ctl("volume", "clone", "debian", "vm-{n}", "--count", count)
        after, used_after = self.stats(), disk_usage(self.engine.store)
        if after["volumes"] - before["volumes"] != count:
            raise DemoError(f"{after['volumes'] - before['volumes']} clones were made, not {count}")
        appended = after["appended_bytes"] - before["appended_bytes"]
        self.report.row(f"{count:,} clones, durable", human_seconds(seconds),
                        f"{seconds / count * 1e6:.0f} µs each, the command's start included")
        self.report.row("Bytes that they added", human_bytes(appended),
                        f"{appended / count:.0f} bytes each; du: {used_after - used_before:+,} bytes")

    def boot_two(self):
        accelerator = guests.accelerator()
        if accelerator == "tcg":
            why = ("/dev/kvm is there, but does not run a Linux guest" if Path("/dev/kvm").exists()
                   else "there is no /dev/kvm")
            self.report.cannot(f"hardware virtualisation ({why}). The guests ran under emulation "
                               f"(TCG), which makes their boots many times slower.")
        self.report.step(f"start the daemon, boot two guests at the same time ({accelerator.upper()})")
        self.engine.start_daemon()
        before = self.stats()
        names = {"one": "vm-1", "two": "vm-2"}
        with ExitStack() as stack:
            running = {}
            for me, volume in names.items():
                other = next(each for each in names if each != me)
                script = GUEST_SCRIPT.format(me=me, other=other, noise_bytes=NOISE_MIB << 20)
                # Without the login prompt, the script alone reads the console.
                running[me] = stack.enter_context(guests.QemuGuest(
                    me, disk=self.engine.attach(volume), script=script, accel=accelerator,
                    kernel_words=["systemd.mask=serial-getty@ttyS0.service"],
                    log_path=self.engine.work / f"console-{me}.log"))
            boots = {}
            for me, guest in running.items():
                guest.wait_for(guests.BEGIN, BOOT_TIMEOUT_S)
                boots[me] = guest.seconds()
            for guest in running.values():
                guest.wait_for("@@wrote", BOOT_TIMEOUT_S)
            for guest in running.values():
                guest.send("go")
            for me, guest in running.items():
                status, output = guest.run_to_end(BOOT_TIMEOUT_S)
                if status != 0 or f"written by {me}" not in output or "@@other-absent" not in output:
                    raise DemoError(f"guest {me} did not find its own file alone:\n{output}")
        for volume in names.values():
            self.ctl("detach", volume)
        after = self.stats()
        self.report.row("Two guests, systemd to multi-user",
                        " and ".join(human_seconds(seconds) for seconds in boots.values()),
                        "booted at the same time, from power-on to the first script")
        written = after["written_bytes"] - before["written_bytes"]
        appended = after["appended_bytes"] - before["appended_bytes"]
        self.report.row("What the guests wrote", human_bytes(written),
                        f"{2 * NOISE_MIB} MiB random, their logs and journals")
        self.report.row("What it cost in the store", human_bytes(appended),
                        f"{appended / max(written, 1):.2f} bytes for each byte written")

    def small_guest(self, name, script):
        """A real kernel on vm-1's disk, without starting the whole system."""
        with guests.QemuGuest(name, disk=self.engine.attach("vm-1"), script=script, in_initramfs=True,
                              accel=guests.accelerator(),
                              log_path=self.engine.work / f"console-{name}.log") as guest:
            status, output = guest.run_to_end(BOOT_TIMEOUT_S)
        self.ctl("detach", "vm-1")
        if status != 0:
            raise DemoError(f"the guest '{name}' failed with status {status}:\n{output}")
        return output

    def changed_bytes(self):
        ranges = self.ctl("volume", "diff", "vm-1@before", "vm-1")[0]["ranges"]
        return sum(each["length_bytes"] for each in ranges)

    def roll_back(self):
        self.report.step("snapshot one, change it in a guest, roll it back")
        before = self.stats()["appended_bytes"]
        _, snapshot_s = self.ctl("snapshot", "create", "vm-1", "before")
        snapshot_bytes = self.stats()["appended_bytes"] - before
        self.small_guest("change", CHANGE_SCRIPT)
        changed = self.changed_bytes()
        if changed == 0:
            raise DemoError("a guest changed vm-1, and its snapshot shows no difference")
        _, rollback_s = self.ctl("snapshot", "rollback", "vm-1", "before")
        left = self.changed_bytes()
        output = self.small_guest("check", CHECK_SCRIPT)
        if left or "written by one" not in output or "@@change-is-gone" not in output:
            raise DemoError(f"the rolled-back volume still differs ({left} bytes):\n{output}")
        self.report.row("Snapshot", human_seconds(snapshot_s), f"{human_bytes(snapshot_bytes)} added")
        self.report.row("Rollback", human_seconds(rollback_s),
                        f"{human_bytes(changed)} of changes undone; a guest sees the old file again")

    def final_rows(self):
        stats = self.stats()
        unique, stored = stats["unique_bytes"], stats["stored_bytes"]
        self.report.row("Dedup ratio", f"{stats['dedup_ratio']:.2f}",
                        "bytes given to the store for each unique byte it keeps")
        self.report.row("Disks that guests see", human_bytes(stats["logical_bytes"]),
                        f"{stats['volumes']:,} volumes and {stats['images']} image, in "
                        f"{human_bytes(stored)} ({human_bytes(unique)} unique)")
        begin = time.monotonic()
        self.engine.stop_daemon()
        self.report.row("Clean stop of the daemon", human_seconds(time.monotonic() - begin),
                        "drained and checkpointed")

    def run(self):
        print("Stellarium demo: one image, 1,000 clones, two guests\n".replace(
            "1,000", f"{self.arguments.clones:,}"), flush=True)
        self.report.step("build the Debian image (kept for the next run)")
        image = guests.image("debian")
        self.import_image(image)
        self.export_image(image)
        self.clone()
        self.boot_two()
        self.roll_back()
        self.final_rows()
        self.report.table("Measured in this run")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clones", type=int, default=1000, help="how many clones (default 1,000)")
    parser.add_argument("--keep", action="store_true", help="keep the store and the logs")
    parser.add_argument("--build", default=str(ROOT / "build" / "release"),
                        help="folder with the built programs")
    arguments = parser.parse_args()
    if arguments.clones < 2:
        parser.error("--clones: two guests need two clones")
    # Ctrl-C and a kill clean up as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with Engine(arguments.build, keep=arguments.keep) as engine:
            try:
                Demo(arguments, engine).run()
            except (DemoError, EngineError, guests.GuestError):
                log = engine.log_tail()
                if log:
                    print(f"\nThe daemon's log ends:\n{log}", file=sys.stderr)
                raise
            finally:
                if arguments.keep:
                    print(f"The store is kept in {engine.store}; look around with\n"
                          f"    {engine.ctl_program} --store {engine.store} volume ls")
    except (DemoError, EngineError, guests.GuestError) as error:
        print(f"\nDemo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

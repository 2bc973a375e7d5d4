#!/usr/bin/env python3
"""The daemon is killed under QEMU guests, again and again, and replaced as an upgrade replaces it.

    daemon_kill_test.py BUILD-FOLDER [--report]

Two guests with three disks write and read them through O_DIRECT, flush and discard, and check every
sector against what they know to be completed (disk_verifier.cc). The daemon dies by SIGKILL at
random moments (while it serves, while it recovers, again and again), and is stopped by SIGTERM as
for an upgrade. The guests must see a pause and nothing else: no error of an operation, no line of
their kernels about one, and every completed operation, flushed or not. At the end the daemon is
killed once more, and what the next one exports is compared with the guests' journals.

STELLARIUM_TEST_SEED picks the moments, STELLARIUM_TEST_SCALE multiplies their number. Nothing depends
on how fast the machine is: moments are counted in operations, and waiting ends after minutes only.
--report prints the pauses, also written to daemon-kill.json in the build folder.
"""
import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guests"))
import guests  # noqa: E402
from engine import Engine  # noqa: E402

MIB = 1 << 20
DISK_BYTES = 24 * MIB
KILLS = 24
RESTARTS = 6
# Disks of each guest.
GUESTS = {1: ("data-1", "data-2"), 2: ("data-3",)}
BOOT_TIMEOUT_S = 300
ANSWER_TIMEOUT_S = 300
# The guest's kernel must not have noticed anything.
SCRIPT = """
disk-verifier run {seed} {guest} /dev/{journal} {disks}
status=$?
dmesg | grep -iE 'I/O error|critical|timed? ?out|blk_update_request|call trace' && exit 9
exit $status
"""


def check(condition, text):
    if not condition:
        sys.exit(f"daemon_kill: {text}")


class VerifiedGuest:
    """A guest that runs disk-verifier, and the conversation with it."""

    def __init__(self, stack, engine, number, volumes, seed, initrd):
        self.number = number
        self.volumes = volumes
        self.journal = engine.work / f"journal-{number}"
        self.journal.write_bytes(bytes(4 * len(volumes) * (DISK_BYTES // 512)))
        disks = [engine.attach(volume, queues=1 + number % 2) for volume in volumes]
        names = [f"/dev/vd{chr(ord('a') + index)}" for index in range(len(volumes))]
        script = SCRIPT.format(seed=seed, guest=number, disks=" ".join(names),
                               journal=f"vd{chr(ord('a') + len(volumes))}")
        self.guest = stack.enter_context(guests.QemuGuest(
            f"verified-{number}", disk=disks[0],
            more_disks=[*disks[1:], guests.FileDisk(str(self.journal))], script=script,
            in_initramfs=True, initrd=initrd, cpus=len(volumes), accel=guests.accelerator(),
            log_path=engine.work / f"console-{number}.log"))

    def wait(self, pattern, timeout_s=ANSWER_TIMEOUT_S):
        match = self.guest.wait_for(rf"@@(?:fault .*\n|stellarium end|{pattern})", timeout_s)
        check(re.match("@@" + pattern, match.group(0)),
              f"guest {self.number}, which was to say '{pattern}': {self.guest.tail()}")
        return match

    def ask(self, command):
        self.guest.send(command)

    def pause_ms(self):
        """The longest operation since the last question. To be asked for before."""
        return int(self.wait(r"report \d+ (?P<us>\d+)\n").group("us")) / 1000


class Run:
    def __init__(self, build, engine, seed):
        self.engine = engine
        self.random = random.Random(seed)
        self.seed = seed
        self.verifier = next(Path(build).rglob("disk-verifier"))
        self.guests = []
        self.killed = 0
        self.figures = {"kill_pause_ms": [], "kill_ready_ms": [], "restart_pause_ms": [],
                        "restart_stop_ms": [], "restart_ready_ms": []}

    def start_daemon(self):
        # Little memory, much collecting, and write-back that is sometimes early.
        self.engine.start_daemon(
            "--memory", "16MiB", "--gc-dead-percent", "5", "--gc-min-dead", "1MiB",
            "--writeback-age-ms", str(self.random.choice([20, 300, 5000])),
            "--threads", str(self.random.choice([1, 2])))

    def kill(self):
        self.engine.kill_daemon()
        self.killed += 1

    def some_operations(self):
        """Returns at a random moment: after some operations of some guest, which may be none."""
        operations = self.random.choice([0, 1, 10, 100, 400])
        guest = self.random.choice(self.guests)
        guest.ask(f"run {self.random.randint(0, operations)}")
        guest.wait(r"ran \d+\n")

    def after(self, figure):
        """The guests go on, and say how long they stood still."""
        for guest in self.guests:
            guest.ask("report")
        self.figures[figure].append(max(guest.pause_ms() for guest in self.guests))

    def one_kill(self):
        self.some_operations()
        self.kill()
        # Whether they stand still, so that nothing is written over before it is checked.
        still = self.random.random() < 0.6
        if still:
            for guest in self.guests:
                guest.ask("verify")
        # The next one may die too: while it starts, or before the guests have come back.
        while self.random.random() < 0.25:
            if self.random.random() < 0.5:
                self.engine.spawn_daemon()
                time.sleep(self.random.random() * 0.1)  # Any moment will do.
            else:
                self.start_daemon()
            self.kill()
        begin = time.monotonic()
        self.start_daemon()
        self.figures["kill_ready_ms"].append((time.monotonic() - begin) * 1000)
        if still:
            for guest in self.guests:
                guest.wait(r"verified \d+\n")
        self.after("kill_pause_ms")

    def one_restart(self):
        self.some_operations()
        begin = time.monotonic()
        self.engine.stop_daemon()
        stopped = time.monotonic()
        self.start_daemon()
        self.figures["restart_stop_ms"].append((stopped - begin) * 1000)
        self.figures["restart_ready_ms"].append((time.monotonic() - begin) * 1000)
        self.after("restart_pause_ms")

    def finish(self, scale):
        """The guests end, the daemon dies once more; the volumes are what the journals say."""
        totals = {"kills": 0, "restarts": RESTARTS * scale}
        for guest in self.guests:
            guest.ask("verify")
        for guest in self.guests:
            guest.wait(r"verified \d+\n")
            guest.ask("finish")
        for guest in self.guests:
            counts = json.loads(guest.wait(r"finished (?P<counts>\{.*\})\n").group("counts"))
            for name, count in counts.items():
                totals[name] = totals.get(name, 0) + count
        self.kill()
        self.start_daemon()
        for guest in self.guests:
            status, output = guest.guest.run_to_end(ANSWER_TIMEOUT_S)
            check(status == 0, f"guest {guest.number} ended with status {status}:\n{output}")
            for volume in guest.volumes:
                self.engine.ctl("detach", volume)
        self.kill()
        self.start_daemon()
        state = self.engine.ctl("status")
        check(state["read_only"] is False and state["warnings"] == [],
              f"the store is not as it should be: {state}")
        self.engine.stop_daemon()
        self.engine.ctl("fsck", "--data")  # Fails for anything that is damaged.
        for guest in self.guests:
            files = []
            for volume in guest.volumes:
                files.append(self.engine.work / f"{volume}.raw")
                self.engine.ctl("volume", "export", volume, files[-1])
            self.check_files(guest, files)
        errors = [line for line in self.engine.log.read_text().splitlines() if "level=error" in line]
        check(not errors, "the daemon's log has errors:\n" + "\n".join(errors[:10]))
        totals["kills"] = self.killed
        return totals

    def check_files(self, guest, files):
        done = subprocess.run(
            [str(self.verifier), "check", str(guest.number), str(guest.journal),
             *map(str, files)], capture_output=True, text=True, check=False)
        check(done.returncode == 0 and int(done.stdout) > 0,
              f"the export differs from the guest's journal:{done.stdout}{done.stderr}")

    def run(self, scale):
        self.engine.run("init")
        for volumes in GUESTS.values():
            for volume in volumes:
                self.engine.ctl("volume", "create", volume, "--size", DISK_BYTES)
        self.start_daemon()
        initrd = guests.with_files(guests.initramfs("qemu"), {"bin/disk-verifier": self.verifier},
                                   self.engine.work / "initramfs")
        with ExitStack() as stack:
            self.guests = [VerifiedGuest(stack, self.engine, number, volumes, self.seed, initrd)
                           for number, volumes in GUESTS.items()]
            for guest in self.guests:
                guest.wait(r"ready\n", BOOT_TIMEOUT_S)
                guest.ask("run 50")
            for guest in self.guests:
                guest.wait(r"ran \d+\n")
            for guest in self.guests:
                guest.ask("report")
                guest.pause_ms()
            events = [self.one_kill] * (KILLS * scale) + [self.one_restart] * (RESTARTS * scale)
            self.random.shuffle(events)
            for event in events:
                event()
            return self.finish(scale)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build")
    parser.add_argument("--report", action="store_true", help="print counts and pauses")
    arguments = parser.parse_args()
    seed = int(os.environ.get("STELLARIUM_TEST_SEED", "1"))
    scale = int(os.environ.get("STELLARIUM_TEST_SCALE", "1"))
    with Engine(arguments.build) as engine:
        run = Run(arguments.build, engine, seed)
        try:
            totals = run.run(scale)
        except BaseException:
            print(f"STELLARIUM_TEST_SEED={seed}; after {run.killed} kills; the daemon's log ends:\n"
                  f"{engine.log_tail()}", file=sys.stderr)
            raise
    for name, values in run.figures.items():
        totals[name] = {"median": round(statistics.median(values)), "max": round(max(values))}
    Path(arguments.build, "daemon-kill.json").write_text(json.dumps(totals, indent=2) + "\n")
    if arguments.report:
        print(json.dumps(totals, indent=2))


if __name__ == "__main__":
    main()

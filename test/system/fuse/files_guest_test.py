#!/usr/bin/env python3
"""A QEMU guest whose disks are files of a mounted store, and the daemon killed under it.

    files_guest_test.py BUILD-FOLDER [--report]

One disk with cache=none (O_DIRECT), one through the host's page cache. The guest writes, reads,
flushes and discards both, and checks every sector (../daemon/disk_verifier.cc). It must see a pause
and nothing else, and at the end what is stored is what its journal says.
"""
import random
import subprocess
import sys
from pathlib import Path

from mounted import MIB, check, json_of, run_with_seed

import guests

DISK_BYTES = 24 * MIB
KILLS = 8
RESTARTS = 2
BOOT_TIMEOUT_S = 300
ANSWER_TIMEOUT_S = 300
SCRIPT = """
disk-verifier run {seed} 1 /dev/vdc /dev/vda /dev/vdb
status=$?
dmesg | grep -iE 'I/O error|critical|timed? ?out|blk_update_request|call trace' && exit 9
exit $status
"""


def run(engine, seed, scale):
    chooser = random.Random(seed)
    verifier = next(Path(sys.argv[1]).rglob("disk-verifier"))
    engine.run("init")
    for name in ("direct", "cached"):
        engine.run("volume", "create", name, "--size", DISK_BYTES)
    journal = engine.work / "journal"
    journal.write_bytes(bytes(4 * 2 * (DISK_BYTES // 512)))
    engine.start("--memory", "16MiB")
    initrd = guests.with_files(guests.initramfs("qemu"), {"bin/disk-verifier": verifier},
                               engine.work / "initramfs")
    disks = [guests.FileDisk(str(engine.volume("direct")), options="cache=none,discard=unmap"),
             guests.FileDisk(str(engine.volume("cached")), options="discard=unmap"),
             guests.FileDisk(str(journal))]
    figures = {"kills": 0, "restarts": 0}
    with guests.QemuGuest("on-files", disk=disks[0], more_disks=disks[1:],
                          script=SCRIPT.format(seed=seed), in_initramfs=True, initrd=initrd, cpus=2,
                          accel=guests.accelerator(), log_path=engine.work / "console.log") as guest:
        def wait(pattern, timeout_s=ANSWER_TIMEOUT_S):
            match = guest.wait_for(rf"@@(?:fault .*\n|stellarium end|{pattern})", timeout_s)
            check(match.group(0).startswith("@@" + pattern.split("\\")[0].strip()),
                  f"the guest, which was to say '{pattern}': {guest.tail()}")
            return match
        wait("ready", BOOT_TIMEOUT_S)
        events = ["kill"] * (KILLS * scale) + ["restart"] * (RESTARTS * scale)
        chooser.shuffle(events)
        for event in events:
            guest.send(f"run {chooser.randint(0, chooser.choice([1, 50, 300]))}")
            wait(r"ran \d+\n")
            if event == "kill":
                engine.kill_daemon()
            else:
                engine.stop_daemon()
            figures[event + "s"] += 1
            engine.start("--memory", "16MiB")
            guest.send("report")
            wait(r"report \d+ \d+\n")
        guest.send("verify")
        wait(r"verified \d+\n")
        engine.kill_daemon()
        figures["kills"] += 1
        engine.start("--memory", "16MiB")
        guest.send("finish")
        counts = wait(r"finished \{.*\}\n")
        figures |= json_of(counts.group(0))
        status, output = guest.run_to_end(ANSWER_TIMEOUT_S)
        check(status == 0, f"the guest ended with status {status}:\n{output}")
    engine.stop_daemon()
    check(not engine.mounted(), "the directory is still mounted")
    engine.run("fsck", "--data")
    files = []
    for name in ("direct", "cached"):
        files.append(engine.work / f"{name}.raw")
        engine.run("volume", "export", name, files[-1])
    done = subprocess.run([str(verifier), "check", "1", str(journal), *map(str, files)],
                          capture_output=True, text=True, check=False)
    check(done.returncode == 0 and int(done.stdout) > 0,
          f"the export differs from the guest's journal: {done.stdout}{done.stderr}")
    errors = [line for line in engine.log.read_text().splitlines() if "level=error" in line]
    check(not errors, "the daemon's log has errors:\n" + "\n".join(errors[:10]))
    return figures


if __name__ == "__main__":
    run_with_seed("files-guest", run)

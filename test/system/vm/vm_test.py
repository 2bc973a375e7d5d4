#!/usr/bin/env python3
"""`stellarctl vm` with real guests: snapshots of a running one, clones of them, what goes wrong.

    vm_test.py BUILD-FOLDER [--report]

The guest counts on its console and on its disk. Every clone must go on from the count of the
snapshot, with a disk and private RAM of its own.
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from machines import MIB, Machines, check

import mounted

CLONES = 3
MEMORY_MIB = 128
EXIT_USAGE, EXIT_NOT_FOUND, EXIT_EXISTS, EXIT_BUSY, EXIT_CORRUPT, EXIT_UNAVAILABLE = 2, 3, 4, 5, 6, 13


def goes_on_from(engine, names, least, most):
    """Each clone's first count is the next one after the snapshot, and it counts on."""
    for name in names:
        engine.wait_for_count(name, most + 2)
        counts = engine.counts(name)
        check(least <= counts[0] <= most + 1,
              f"{name} begins with {counts[0]}, and the snapshot is of {least} to {most}")
        check(counts == list(range(counts[0], counts[-1] + 1)), f"{name} counts {counts[:50]}")


def stored_bytes(engine):
    return engine.ctl("stats")["unique_bytes"]


def take_snapshot(engine, name, snapshot):
    """(the answer, the counts between which it lies)"""
    before = engine.counts(name)[-1]
    answer = engine.ctl("vm", "snapshot", name, snapshot)
    after = engine.counts(name)[-1]
    return answer, before, after


def first_snapshot(engine, figures):
    engine.make_disk_image("disk")
    engine.run_counter("first", "disk", MEMORY_MIB)
    engine.wait_for_count("first", 5)
    engine.run("vm", "run", "second", status=EXIT_NOT_FOUND)
    engine.run("vm", "run", "first", "--image", "disk", status=EXIT_BUSY)
    engine.run("vm", "rm", "first", status=EXIT_BUSY)
    before = stored_bytes(engine)
    answer, least, most = take_snapshot(engine, "first", "warm")
    figures["first"] = answer
    figures["first_stored_bytes"] = stored_bytes(engine) - before
    check(answer["pause_ms"] > 0, f"the guest did not stand: {answer}")
    check(answer["changed_bytes"] > MIB, f"RAM of a running guest: {answer}")
    engine.run("vm", "snapshot", "first", "warm", status=EXIT_EXISTS)
    engine.wait_for_count("first", most + 2)
    check([each["name"] for each in engine.ctl("vm", "ls")["snapshots"]] == ["first@warm"],
          "vm ls does not list the snapshot")
    return least, most


def clones(engine, figures, least, most):
    names = [f"clone-{number}" for number in range(1, CLONES + 1)]
    engine.names.update(names)
    answer = engine.ctl("vm", "restore", "first@warm", "clone-{n}", "--count", CLONES)
    figures["restore"] = {key: answer[key] for key in ("checked_bytes", "start_ms")}
    check([each["name"] for each in answer["machines"]] == names, f"restored {answer}")
    goes_on_from(engine, names, least, most)
    figures["private_bytes"] = [engine.private_ram_bytes(name) for name in names]
    check(max(figures["private_bytes"]) > 0, "no clone has a page of its own: the wrong mapping")
    shared = [engine.shared_ram_bytes(name) for name in names]
    figures["rss_and_pss_bytes"] = shared
    # Disks are apart: each holds its own guest's count, and the snapshot's stays.
    engine.run("vm", "stop", names[0], "--force")
    stopped = engine.count_on_disk(f"{names[0]}-disk")
    engine.wait_for_count(names[1], stopped + 5)
    check(engine.count_on_disk(f"{names[0]}-disk") == stopped, "a stopped clone's disk changes")
    check(engine.machine(names[0])["state"] == "stopped", "vm ls shows a stopped machine as running")
    with open(engine.files / "snapshots" / "first-disk@warm", "rb") as file:
        kept = int(file.read(512).split()[1])
    check(least <= kept <= most + 1, f"the disk's snapshot has {kept}, the RAM's {least} to {most}")
    engine.run("vm", "restore", "first@warm", names[1], "other", status=EXIT_EXISTS)
    engine.run("vm", "restore", "first@cold", "other", status=EXIT_NOT_FOUND)
    check(not (engine.files / "volumes" / "other-disk").exists(), "a failed restore left a disk")
    return names


def later_snapshots(engine, figures, names):
    before = stored_bytes(engine)
    answer, least, most = take_snapshot(engine, "first", "later")
    figures["second"] = answer
    figures["second_stored_bytes"] = stored_bytes(engine) - before
    check(figures["second_stored_bytes"] <= 0.15 * figures["first_stored_bytes"],
          f"the second snapshot stored {figures['second_stored_bytes']} bytes, the first "
          f"{figures['first_stored_bytes']}")
    engine.restore("first@later", "late")
    goes_on_from(engine, ["late"], least, most)
    # Of a clone: only what is its own.
    answer, least, most = take_snapshot(engine, names[1], "own")
    figures["of_a_clone"] = answer
    check(answer["changed_bytes"] <= 0.15 * figures["first"]["changed_bytes"],
          f"a clone's snapshot wrote {answer}")
    engine.restore(f"{names[1]}@own", "grandchild")
    goes_on_from(engine, ["grandchild"], least, most)


def after_a_restart(engine, names):
    """The daemon is restarted, and then killed, under machines."""
    count = engine.counts(names[1])[-1]
    engine.stop_daemon()
    engine.start()
    engine.wait_for_count(names[1], count + 3)
    engine.restart_by_kill()
    engine.restore("first@warm", "restarted")
    engine.wait_for_count("restarted", 5)
    engine.wait_for_count(names[1], engine.counts(names[1])[-1] + 3)


def broken_off(engine):
    """The command is killed at many moments of a snapshot: the guest goes on, nothing is left."""
    for attempt in range(6):
        process = subprocess.Popen(
            [str(engine.ctl_program), "vm", "snapshot", "first", f"broken{attempt}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=engine.environment)
        try:
            process.wait(0.05 * (attempt + 1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        count = engine.counts("first")[-1]
        listed = engine.ctl("vm", "ls")
        engine.wait_for_count("first", count + 2)
        complete = any(each["name"] == f"first@broken{attempt}" for each in listed["snapshots"])
        left = [each["name"] for each in engine.ctl("snapshot", "ls")
                if each["name"].endswith(f"@broken{attempt}")]
        check(len(left) == (3 if complete else 0), f"snapshots after a broken off one: {left}")


def died_while_it_stood(engine):
    """A command that dies between the last of the RAM and the guest's going on, made to measure."""
    record = engine.vm_root() / "first" / "machine.json"
    machine = json.loads(record.read_text())
    engine.qmp("first", "stop")
    engine.run("snapshot", "create", "first-disk", "half")
    record.write_text(json.dumps(machine | {"pending": "half", "resume": True}))
    count = engine.counts("first")[-1]
    done = subprocess.run([str(engine.ctl_program), "vm", "ls"], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, env=engine.environment, check=True)
    check("'half'" in done.stderr, f"nothing is said of a broken off snapshot: {done.stderr}")
    engine.wait_for_count("first", count + 2)
    check(not [each for each in engine.ctl("snapshot", "ls") if "@half" in each["name"]],
          "a part of a snapshot is left")
    check(json.loads(record.read_text())["pending"] == "", "the snapshot is still on record")


def starts_again(engine, names):
    """A stopped machine starts on the disk that it has, with the memory that it had."""
    check(engine.machine(names[0])["state"] == "stopped", f"{names[0]} runs already")
    engine.run("vm", "run", names[0], "--image", "disk", status=EXIT_EXISTS)
    answer = engine.ctl("vm", "run", names[0])
    check(answer["memory_bytes"] == MEMORY_MIB * MIB and answer["restored_from"] == "",
          f"started again: {answer}")
    engine.wait_for_count(names[0], 2)
    check(engine.counts(names[0])[0] == 1, "it was started, and not restored")
    # Another process may not be taken for it, nor its end be missed.
    os.kill(answer["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while engine.machine(names[0])["state"] != "died":
        check(time.monotonic() < deadline, "a killed QEMU is not seen")
        time.sleep(0.05)
    engine.run("vm", "snapshot", names[0], "dead", status=EXIT_UNAVAILABLE)
    engine.run("vm", "stop", names[0])
    check(engine.machine(names[0])["state"] == "stopped", "stop of one that died")


def cannot_start(engine):
    """QEMU's own words, and nothing left."""
    done = subprocess.run([str(engine.ctl_program), "vm", "run", "bad", "--image", "disk", "--kernel",
                           "/nowhere/vmlinuz"], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, env=engine.environment, check=False)
    check(done.returncode == EXIT_UNAVAILABLE and "/nowhere/vmlinuz" in done.stderr,
          f"a kernel that is not there: {done}")
    engine.run("vm", "run", "bad", "--image", "disk", "--memory", "1.5KiB", status=EXIT_USAGE)
    engine.run("vm", "run", "bad", "--image", "nothing", status=EXIT_NOT_FOUND)
    engine.run("vm", "run", "b@d", "--image", "disk", status=EXIT_USAGE)
    check(not (engine.vm_root() / "bad").exists(), "a folder is left of a machine that never was")
    check(not [each for each in engine.ctl("volume", "ls") if each["name"].startswith("bad")],
          "a volume is left of a machine that never was")


def damaged(engine):
    """One byte of a page of the RAM rots in the store: no clone starts, and the chunk is named."""
    engine.run("vm", "stop", "first", "--force")
    for machine in engine.ctl("vm", "ls")["machines"]:
        if machine["state"] == "running":
            engine.run("vm", "stop", machine["name"], "--force")
    ram = engine.files / "snapshots" / "first-ram@warm"
    with open(ram, "rb") as file:
        offset = os.lseek(file.fileno(), 8 * MIB, os.SEEK_DATA)
        page = os.pread(file.fileno(), 4096, offset)
    # Text of the page, long enough to be nowhere else.
    engine.stop_daemon()
    rotten = None
    for segment in sorted((engine.store / "segments").glob("*.seg")):
        content = segment.read_bytes()
        at = content.find(page)
        if at >= 0:
            rotten = segment
            with open(segment, "r+b") as file:
                file.seek(at + 100)
                byte = file.read(1)[0]
                file.seek(at + 100)
                file.write(bytes([byte ^ 0x40]))
                file.flush()
                os.fsync(file.fileno())
            break
    check(rotten is not None, "the page is in no segment")
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("1")
    engine.start()
    done = subprocess.run([str(engine.ctl_program), "vm", "restore", "first@warm", "ruined-1",
                           "ruined-2", "--json"], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, env=engine.environment, check=False)
    check(done.returncode == EXIT_CORRUPT, f"a restore from a rotten page: {done}")
    known = json.loads(engine.run("scrub", "--status", "--json", status=EXIT_CORRUPT))
    named = [each["id"] for each in known["damage"]["damaged"]]
    check(named and any(each in done.stderr for each in named),
          f"the error names no damaged chunk of {named}: {done.stderr}")
    check(not [each for each in engine.ctl("vm", "ls")["machines"]
               if each["name"].startswith("ruined")], "a machine is left of a failed restore")
    check(not [each for each in engine.ctl("volume", "ls") if "ruined" in each["name"]],
          "a volume is left of a failed restore")


def removed(engine, names):
    engine.run("vm", "rm", "first@later")
    engine.run("vm", "rm", "first@later", status=EXIT_NOT_FOUND)
    for machine in engine.ctl("vm", "ls")["machines"]:
        engine.run("vm", "rm", machine["name"], "--force")
    check(engine.ctl("vm", "ls") == {"machines": [], "snapshots": []}, "vm ls after vm rm of all")
    check(engine.ctl("volume", "ls") == [], f"volumes are left: {engine.ctl('volume', 'ls')}")


def run(engine):
    figures = {}
    engine.run("init")
    engine.run("vm", "ls", status=EXIT_UNAVAILABLE)
    engine.start()
    phases = figures["seconds"] = {}

    def phase(function, *arguments):
        begin = time.monotonic()
        result = function(engine, *arguments)
        phases[function.__name__] = round(time.monotonic() - begin, 2)
        return result

    least, most = phase(first_snapshot, figures)
    names = phase(clones, figures, least, most)
    phase(later_snapshots, figures, names)
    phase(after_a_restart, names)
    phase(broken_off)
    phase(died_while_it_stood)
    phase(starts_again, names)
    phase(cannot_start)
    phase(damaged)
    phase(removed, names)
    return figures


if __name__ == "__main__":
    mounted.skip_without_fuse()
    with Machines(sys.argv[1]) as machines:
        try:
            result = run(machines)
        except BaseException:
            print(f"the daemon's log ends:\n{machines.log_tail()}", file=sys.stderr)
            raise
    text = json.dumps(result, indent=2)
    Path(sys.argv[1], "vm.json").write_text(text + "\n")
    if "--report" in sys.argv:
        print(text)

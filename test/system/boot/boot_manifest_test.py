#!/usr/bin/env python3
"""A boot of a real guest is recorded; clones of clones inherit what it read, and it is staged for them.

    boot_manifest_test.py BUILD-FOLDER

Debian boots as User-mode Linux while its reads are recorded; a second boot is merged. The manifest is
compared with what the device's counters say that the guests read; it outlives the daemon's death and
the removal of the image; another daemon stages it, in the sandbox, before a clone of a clone boots,
whose reads then find almost all of it checked and in memory.
"""
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guests"))
import guests  # noqa: E402
from engine import Engine, EngineError  # noqa: E402

MIB = 1 << 20


def check(condition, text):
    if not condition:
        sys.exit(f"boot_manifest_test: {text}")


def boot(engine, disk, name):
    """Boots a guest to its target; bytes that it read of its disk."""
    volume = Path(disk.socket).stem
    sample = f'stellarium_device_bytes_total{{volume="{volume}",request="read"}}'
    before = engine.metric(sample)
    with guests.UmlGuest(name, disk=disk, script="systemctl is-active multi-user.target",
                         memory_mib=256) as guest:
        status, output = guest.run_to_end(300)
    check(status == 0 and "active" in output, f"{name} did not boot ({status}):\n{output}")
    return engine.metric(sample) - before


def pages(runs):
    found = set()
    for run in runs:
        check(run["offset_bytes"] % 4096 == 0 and run["length_bytes"] % 4096 == 0, f"{run}")
        first = run["offset_bytes"] // 4096
        new = set(range(first, first + run["length_bytes"] // 4096))
        check(not new & found, f"a page of {run} is listed twice")
        found |= new
    return found


def main(build):
    image = guests.image("debian")
    with Engine(build) as engine:
        engine.run("init")
        engine.ctl("image", "import", "debian", image)
        engine.ctl("volume", "clone", "debian", "vm-{n}", "--count", "3")
        # Without a daemon there is nobody to record; to look is possible.
        engine.run("boot", "record", "vm-1", status=13)
        engine.run("boot", "show", "vm-1", status=3)
        engine.start_daemon()

        recorded = []
        for number in (1, 2):
            volume = f"vm-{number}"
            disk = engine.attach(volume)
            engine.ctl("boot", "record", volume)
            engine.run("boot", "record", volume, status=5)
            read = boot(engine, disk, volume)
            listed = engine.ctl("boot", "ls")
            check([each["source"] for each in listed["recordings"]] == [volume], f"{listed}")
            recorded.append(engine.ctl("boot", "stop", volume))
            check(MIB < recorded[-1]["bytes"] <= read + 4096 * recorded[-1]["runs"],
                  f"{recorded[-1]} were recorded, and the guest read {read} bytes")
            check(not recorded[-1]["cut"], f"a limit ended the recording: {recorded[-1]}")
            engine.ctl("detach", volume)
        engine.run("boot", "stop", "vm-1", status=3)

        manifest = engine.ctl("boot", "show", "debian")
        total = len(pages(manifest["runs"])) * 4096
        check(manifest["prefetch_bytes"] == total, "the runs add up")
        check(manifest["merged_traces"] == 2 and len(manifest["traces"]) == 2, "two boots")
        check(manifest["images"] == ["debian"], f"{manifest['images']}")
        check(max(each["bytes"] for each in recorded) <= total <=
              sum(each["bytes"] for each in recorded), f"{recorded} came to {total}")
        check(total > 8 * MIB, f"a boot reads more than {total} bytes")
        check(len(manifest["runs"]) < total / 4096 / 4, "runs are merged")
        check("prefetch" in engine.run("boot", "show", "vm-3"), "people can read it")

        # A clone of a clone, and the image gone.
        engine.ctl("volume", "clone", "vm-3", "child")
        engine.ctl("volume", "clone", "child", "grandchild")
        engine.ctl("image", "rm", "debian")
        engine.ctl("volume", "rm", "vm-1", "vm-2", "vm-3", "child")
        engine.kill_daemon()
        inherited = engine.ctl("boot", "show", "grandchild")
        check(inherited["runs"] == manifest["runs"] and inherited["images"] == [],
              "a clone of a clone inherits it, through a kill and without its ancestors")

        # Staged beside the attachment: without anybody asking.
        engine.start_daemon()
        disk = engine.attach("grandchild")
        deadline = time.monotonic() + 120
        while engine.metric("stellarium_prefetches_total") == 0:
            check(time.monotonic() < deadline, "nothing was staged when it was attached")
            time.sleep(0.05)
        staged = engine.metric("stellarium_prefetch_bytes_total")
        check(total / 2 < staged <= total, f"{staged} of {total} bytes were staged")
        verified = engine.metric("stellarium_store_chunks_verified_total")
        boot(engine, disk, "grandchild")
        more = engine.metric("stellarium_store_chunks_verified_total") - verified
        check(more < verified / 2,
              f"the guest's own reads had to check {more} chunks, the prefetch {verified}")

        # Switched off, and asked for.
        engine.stop_daemon()
        engine.start_daemon("--no-boot-prefetch")
        report = engine.ctl("prefetch", "grandchild")
        check(total / 2 < report["staged_bytes"] <= total and report["damaged_bytes"] == 0,
              f"{report}")
        check(report["reads"] <= report["staged_bytes"] / 4096 / 4, f"reads are merged: {report}")
        everything = engine.ctl("prefetch", "grandchild", "--all")
        check(everything["staged_bytes"] > report["staged_bytes"], f"{everything}")
        engine.ctl("detach", "grandchild")
        engine.ctl("boot", "rm", "grandchild")
        engine.run("prefetch", "grandchild", status=3)
        check(engine.ctl("boot", "ls")["boots"] == [], "it is gone")
        engine.stop_daemon()
        done = subprocess.run([str(engine.ctl_program), "fsck"], env=engine.environment,
                              capture_output=True, text=True, check=False)
        check(done.returncode == 0, f"fsck: {done.stdout}{done.stderr}")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except EngineError as error:
        sys.exit(f"boot_manifest_test: {error}")

#!/usr/bin/env python3
"""The daemon is killed under files that are open, mapped, read and written, and replaced.

    files_kill_test.py BUILD-FOLDER [--report]
    files_kill_test.py --reader FILE KNOWN SEED | --mapper FILE BYTES SEED     # parts of it

Three programs go on meanwhile: disk-verifier (../daemon/disk_verifier.cc) with O_DIRECT, durable and
other writes, discards and reads on one volume; a reader that maps an image and compares it with what
was imported; a writer through a shared mapping of another volume. None of them may see an error, a
wrong byte or a lost write. At the end the volumes are exported and compared with what their writers
know. STELLARIUM_TEST_SEED picks the moments, STELLARIUM_TEST_SCALE multiplies their number.
"""
import json
import mmap
import os
import random
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from mounted import MIB, answer_of, check, json_of, run_with_seed

DISK_BYTES = 24 * MIB
IMAGE_BYTES = 24 * MIB
MAPPED_BYTES = 4 * MIB
PAGE = 4096
KILLS = 14
RESTARTS = 4
TIMEOUT_S = 300


# --- Parts -------------------------------------------------------------------------------------------

def listen():
    """Commands on standard input: "finish"."""
    asked = threading.Event()

    def read():
        sys.stdin.readline()
        asked.set()
    threading.Thread(target=read, daemon=True).start()
    return asked


def say(text):
    print(text, flush=True)


def reader(path, known_path, seed):
    """Compares pages of a mapped image; has the kernel forget them now and then."""
    known = Path(known_path).read_bytes()
    chooser = random.Random(seed)
    fd = os.open(path, os.O_RDONLY)
    kinds = [(mmap.MAP_SHARED, mmap.PROT_READ),
             (mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)]
    maps = [mmap.mmap(fd, len(known), flags=flags, prot=prot) for flags, prot in kinds]
    finish = listen()
    compared = 0
    say("@@ready")
    while not finish.is_set():
        for each in maps:
            each.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for _ in range(64):
            at = chooser.randrange(len(known) // PAGE) * PAGE
            length = min(chooser.choice([1, 4, 32]) * PAGE, len(known) - at)
            if chooser.choice(maps)[at:at + length] != known[at:at + length]:
                say(f"@@fault: image differs at {at}")
                return 1
            compared += length
        if os.pread(fd, PAGE, at) != known[at:at + PAGE]:
            say(f"@@fault: image reads differently at {at}")
            return 1
        say(f"@@step {compared}")
    say(f"@@finished {json.dumps({'compared_bytes': compared})}")
    return 0


def mapper(path, size, seed):
    """Writes pages through a shared mapping, syncs, and reads them again, also from the store."""
    size = int(size)
    chooser = random.Random(seed)
    shadow = bytearray(size)
    fd = os.open(path, os.O_RDWR)
    mapped = mmap.mmap(fd, size)
    finish = listen()
    written = 0
    say("@@ready")
    while True:
        last = finish.is_set()
        for _ in range(32):
            at = chooser.randrange(size)
            data = chooser.randbytes(min(chooser.choice([1, 700, PAGE, 5 * PAGE]), size - at))
            mapped[at:at + len(data)] = data
            shadow[at:at + len(data)] = data
            written += len(data)
        if chooser.random() < 0.3 or last:
            mapped.flush()
            mapped.madvise(mmap.MADV_DONTNEED)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if mapped[:] != shadow:
            say("@@fault: the mapping has lost a write")
            return 1
        if last:
            break
        say(f"@@step {written}")
    os.fsync(fd)
    with open(os.environ["STELLARIUM_SHADOW"], "wb") as file:
        file.write(shadow)
    say(f"@@finished {json.dumps({'mapped_bytes': written})}")
    return 0


# --- The test ----------------------------------------------------------------------------------------

class Part:
    """A running program: its lines, and how far it is."""

    def __init__(self, stack, words, environment=None):
        self.process = subprocess.Popen([str(word) for word in words], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, **(environment or {})})
        stack.callback(self.end)

    def end(self):
        self.process.kill()
        self.process.wait()

    def ask(self, text):
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def wait(self, prefix):
        # A program that hangs is ended by the test's own limit, with the log.
        return answer_of(self.process.stdout, prefix)


class Stepper(Part):
    """Says "@@step N" as it goes on; the newest is kept by a thread."""

    def __init__(self, stack, words, environment=None):
        super().__init__(stack, words, environment)
        self.changed = threading.Condition()
        self.steps = 0
        self.fault = None
        self.result = None
        self.wait("@@ready")
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            with self.changed:
                if line.startswith("@@step"):
                    self.steps += 1
                elif line.startswith("@@finished"):
                    self.result = json_of(line)
                else:
                    self.fault = line
                self.changed.notify_all()
        with self.changed:
            if self.result is None:
                self.fault = self.fault or "it ended"
            self.changed.notify_all()

    def _until(self, condition, what):
        with self.changed:
            check(self.changed.wait_for(lambda: self.fault or condition(), TIMEOUT_S),
                  f"in vain waited for {what}")
            check(not self.fault, f"{what}: {self.fault}")

    def goes_on(self):
        """Returns when it has begun and ended a step from now on."""
        steps = self.steps
        self._until(lambda: self.steps >= steps + 2 or self.result is not None, "a step")

    def finish(self):
        self.ask("finish")
        self._until(lambda: self.result is not None, "the end")
        return self.result


def run(engine, seed, scale):
    chooser = random.Random(seed)
    verifier = next(Path(sys.argv[1]).rglob("disk-verifier"))
    engine.run("init")
    engine.run("volume", "create", "data", "--size", DISK_BYTES)
    engine.run("volume", "create", "mapped", "--size", MAPPED_BYTES)
    options = ("--memory", "16MiB", "--gc-dead-percent", "5", "--gc-min-dead", "1MiB")

    def start():
        engine.start(*options, "--writeback-age-ms", str(chooser.choice([20, 300, 5000])))
    start()
    known = engine.make_image("known", random.Random(seed).randbytes(IMAGE_BYTES))
    journal = engine.work / "journal"
    journal.write_bytes(bytes(4 * (DISK_BYTES // 512)))
    shadow = engine.work / "mapped.shadow"
    figures = {"kills": 0, "restarts": 0, "pause_ms": []}
    with ExitStack() as stack:
        disk = Part(stack, [verifier, "run", seed, 1, journal, engine.volume("data")])
        disk.wait("@@ready")
        others = [Stepper(stack, [sys.executable, __file__, "--reader", engine.image("known"), known,
                                  seed]),
                  Stepper(stack, [sys.executable, __file__, "--mapper", engine.volume("mapped"),
                                  MAPPED_BYTES, seed], {"STELLARIUM_SHADOW": str(shadow)})]
        # Who opens while no daemon runs waits for the next one.
        events = ["kill"] * (KILLS * scale) + ["restart"] * (RESTARTS * scale)
        chooser.shuffle(events)
        for event in events:
            disk.ask(f"run {chooser.randint(0, chooser.choice([0, 1, 10, 100, 400]))}")
            disk.wait("@@ran")
            begin = time.monotonic()
            if event == "kill":
                engine.kill_daemon()
                figures["kills"] += 1
                while chooser.random() < 0.2:  # The next one dies as well.
                    engine.spawn_daemon("--mount", engine.files, *options)
                    time.sleep(chooser.random() * 0.2)  # Any moment will do.
                    engine.kill_daemon()
                    figures["kills"] += 1
            else:
                engine.stop_daemon()
                check(engine.mounted(), "the directory was unmounted with open files")
                figures["restarts"] += 1
            late = subprocess.Popen(["cmp", str(known), str(engine.image("known"))])
            start()
            check(late.wait(TIMEOUT_S) == 0, "who came while no daemon ran saw something else")
            disk.ask("report")
            disk.wait("@@report")
            figures["pause_ms"].append(round((time.monotonic() - begin) * 1000))
            for other in others:
                other.goes_on()
        disk.ask("verify")
        disk.wait("@@verified")
        for other in others:
            figures |= other.finish()
        disk.ask("finish")
        figures |= json_of(disk.wait("@@finished"))
        # Dead once more, with files open and what was written last not flushed.
        engine.kill_daemon()
        start()
        for other in others:
            check(other.process.wait(TIMEOUT_S) == 0, "a part failed")
    engine.stop_daemon()
    check(not engine.mounted() and engine.holders() == [], "something is left of the mount")
    engine.run("fsck", "--data")
    for volume in ("data", "mapped"):
        engine.run("volume", "export", volume, engine.work / f"{volume}.raw")
    check((engine.work / "mapped.raw").read_bytes() == shadow.read_bytes(),
          "what was written through the mapping is not what is stored")
    done = subprocess.run([str(verifier), "check", "1", str(journal), str(engine.work / "data.raw")],
                          capture_output=True, text=True, check=False)
    check(done.returncode == 0 and int(done.stdout) > 0,
          f"the export differs from the journal: {done.stdout}{done.stderr}")
    errors = [line for line in engine.log.read_text().splitlines() if "level=error" in line]
    check(not errors, "the daemon's log has errors:\n" + "\n".join(errors[:10]))
    figures["pause_ms"] = {"median": sorted(figures["pause_ms"])[len(figures["pause_ms"]) // 2],
                           "max": max(figures["pause_ms"])}
    return figures


def main():
    if sys.argv[1] == "--reader":
        return reader(*sys.argv[2:])
    if sys.argv[1] == "--mapper":
        return mapper(*sys.argv[2:])
    run_with_seed("files-kill", run)
    return 0


if __name__ == "__main__":
    sys.exit(main())

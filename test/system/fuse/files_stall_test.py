#!/usr/bin/env python3
"""One volume's writes wait for a disk that answers nothing, and everybody else's files go on.

    files_stall_test.py BUILD-FOLDER

The store lies on a small ext4 that is frozen (fsfreeze): nothing is written to it any more, so that
the buffer of a volume fills, and its writes wait. More of them than the daemon has threads for
files. Others read, list and open meanwhile; with the disk back, every write is done.
"""
import mmap
import os
import random
import subprocess
import sys
import threading

from mounted import MIB, Mounted, check, skip_without_fuse, wait_until

SEED = int(os.environ.get("STELLARIUM_TEST_SEED", "1"))
DISK_BYTES = 512 * MIB
WRITERS = 40
WORKERS = 16         # Threads that the daemon has for files,
WAITING_THREADS = 4  # and so many of them it gives to the waiting writes of one.
PIECE = 64 * 1024
PIECES_OF_WRITER = 24  # Together more than a volume's share of the buffer.
TIMEOUT_S = 300


def run(*words):
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)


class Writer(threading.Thread):
    """Writes its part of the volume past the cache."""

    def __init__(self, path, number):
        super().__init__(daemon=True)
        self.path, self.number = path, number
        self.data = random.Random(SEED + number).randbytes(PIECE * PIECES_OF_WRITER)
        self.done = 0
        self.error = None

    def run(self):
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_DIRECT)
            buffer = mmap.mmap(-1, PIECE)
            for piece in range(PIECES_OF_WRITER):
                buffer[:] = self.data[piece * PIECE:(piece + 1) * PIECE]
                at = self.number * len(self.data) + piece * PIECE
                if os.pwritev(fd, [buffer], at) != PIECE:
                    raise OSError("a short write")
                self.done += 1
            os.close(fd)
        except OSError as error:
            self.error = error


def others_go_on(engine, data):
    """What other users of the directory do; each of it is answered."""
    for _ in range(20):
        fd = os.open(engine.image("image"), os.O_RDONLY | os.O_DIRECT)
        buffer = mmap.mmap(-1, MIB)
        check(os.preadv(fd, [buffer], 0) == MIB and buffer[:] == data[:MIB], "an image reads")
        os.close(fd)
        check(sorted(os.listdir(engine.files / "volumes")) == ["other", "stalled"], "a listing")
        check(engine.volume("other").stat().st_size == MIB, "attributes")
    fd = os.open(engine.volume("other"), os.O_RDWR)
    check(os.pread(fd, 10, 0) == bytes(10), "another volume reads")
    os.close(fd)


def scenario(engine):
    engine.run("init")
    data = random.Random(SEED).randbytes(2 * MIB)
    engine.make_image("image", data)
    engine.run("volume", "create", "stalled", "--size", WRITERS * PIECE * PIECES_OF_WRITER)
    engine.run("volume", "create", "other", "--size", MIB)
    engine.start("--memory", "32MiB", "--writeback-age-ms", "50")
    others_go_on(engine, data)
    writers = [Writer(engine.volume("stalled"), number) for number in range(WRITERS)]
    frozen = run("fsfreeze", "-f", engine.store.parent)
    check(frozen.returncode == 0, f"fsfreeze: {frozen.stderr}")
    try:
        for writer in writers:
            writer.start()
        # The first ones find room for all of theirs. Of the others few have a thread to wait with,
        # and the rest is kept.
        looked_at = []

        def all_wait():
            left = sum(writer.is_alive() for writer in writers)
            looked_at.append((left, sum(writer.done for writer in writers)))
            return (looked_at[-50:].count(looked_at[-1]) == 50  # A second without any progress.
                    and engine.metric("stellarium_files_kept") == left - WAITING_THREADS)
        wait_until(all_wait, "all writers that are left wait")
        waiting = looked_at[-1][0]
        check(waiting > WORKERS, f"only {waiting} writers are left")
        # Were all threads waiting for the disk, this would hang until it is back.
        finished = threading.Event()
        failed = []

        def others():
            try:
                others_go_on(engine, data)
            except (AssertionError, OSError) as error:
                failed.append(error)
            finished.set()
        threading.Thread(target=others, daemon=True).start()
        in_time = finished.wait(TIMEOUT_S / 5)
        still = sum(writer.is_alive() for writer in writers)
    finally:
        thawed = run("fsfreeze", "-u", engine.store.parent)
    check(thawed.returncode == 0, f"fsfreeze: {thawed.stderr}")
    check(in_time, "others wait for the volume that is stalled")
    check(not failed, f"others failed: {failed}")
    check(still == waiting, "the writers did not wait all the time: the test shows nothing")
    for writer in writers:
        writer.join(TIMEOUT_S)
        check(not writer.is_alive() and writer.error is None, f"a writer: {writer.error}")
    content = engine.volume("stalled").read_bytes()
    for writer in writers:
        at = writer.number * len(writer.data)
        check(content[at:at + len(writer.data)] == writer.data, f"what writer {writer.number} wrote")
    engine.stop_daemon()
    check(not engine.mounted(), "it is still mounted")


def main():
    skip_without_fuse()
    with Mounted(sys.argv[1]) as engine:
        disk, place = engine.work / "disk.ext4", engine.work / "disk"
        place.mkdir()
        with open(disk, "wb") as file:
            file.truncate(DISK_BYTES)
        made = run("mkfs.ext4", "-q", "-F", disk)
        check(made.returncode == 0, made.stderr)
        mounted = run("mount", "-o", "loop", disk, place)
        if mounted.returncode != 0:
            print(f"skipped: this system mounts no file system from a file: {mounted.stderr}")
            sys.exit(77)
        try:
            engine.store = place / "store"
            engine.environment["STELLARIUM_STORE"] = str(engine.store)
            scenario(engine)
        except BaseException:
            print(f"STELLARIUM_TEST_SEED={SEED}; the daemon's log ends:\n{engine.log_tail()}",
                  file=sys.stderr)
            raise
        finally:
            engine.kill_daemon()
            run("umount", "-f", "-l", engine.files)
            run("umount", "-l", place)


if __name__ == "__main__":
    main()

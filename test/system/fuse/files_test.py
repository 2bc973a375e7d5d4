#!/usr/bin/env python3
"""Files of a mounted store, as programs use them: read, written, listed, refused, cached.

    files_test.py BUILD-FOLDER [NAME...]     all tests, or those named

One real daemon, in its strictest sandbox. STELLARIUM_TEST_SEED picks the random programs.
"""
import ctypes
import errno
import fcntl
import json
import mmap
import os
import pwd
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mounted import MIB, EngineError, Mounted, check, skip_without_fuse, wait_until

SEED = int(os.environ.get("STELLARIUM_TEST_SEED", "1"))
SEEK_DATA, SEEK_HOLE = 3, 4
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 1, 2, 16
RWF_DONTCACHE = 0x80
PAGE = 4096
LIBC = ctypes.CDLL(None, use_errno=True)


def run(*words, status=0):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False,
                          stdin=subprocess.DEVNULL)
    check(done.returncode == status, f"{' '.join(map(str, words))} ended with status "
                                     f"{done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def fails_with(number, action, *arguments):
    try:
        result = action(*arguments)
    except OSError as error:
        check(error.errno == number, f"{action} {arguments}: {error}, where "
                                     f"{errno.errorcode[number]} is expected")
        return
    raise AssertionError(f"{action} {arguments} gave {result}, where {errno.errorcode[number]} is "
                         "expected")


def fallocate(fd, mode, offset, length):
    if LIBC.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def image_bytes(seed, size):
    """Data and holes, with a length that is no multiple of anything."""
    chooser = random.Random(seed)
    out = bytearray(size)
    at = 0
    while at < size:
        length = min(size - at, chooser.choice([1, 3, 16, 40]) * PAGE)
        if chooser.random() < 0.6:
            out[at:at + length] = chooser.randbytes(length)
        at += length
    return bytes(out)


def data_ranges(path):
    """(start, end) of the data, by lseek()."""
    fd = os.open(path, os.O_RDONLY)
    try:
        ranges = []
        at = 0
        while True:
            try:
                start = os.lseek(fd, at, SEEK_DATA)
            except OSError as error:
                check(error.errno == errno.ENXIO, f"lseek: {error}")
                return ranges
            at = os.lseek(fd, start, SEEK_HOLE)
            check(at > start, "a hole begins where data does")
            ranges.append((start, at))
    finally:
        os.close(fd)


def mapped_ranges(data):
    """Pages that are not zeros, merged, cut at the size."""
    ranges = []
    for at in range(0, len(data), PAGE):
        piece = data[at:at + PAGE]
        if piece.strip(b"\0"):
            end = at + len(piece)
            if ranges and ranges[-1][1] == at:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((at, end))
    return ranges


def test_images_are_what_was_imported(engine):
    for name, size in (("odd", 3 * MIB + 777), ("even", 2 * MIB), ("tiny", 5)):
        data = image_bytes(SEED, size)
        if name == "tiny":
            data = b"hello"
        engine.make_image(name, data)
        path = engine.image(name)
        check(path.read_bytes() == data, f"image {name} reads differently")
        status = path.stat()
        check(status.st_size == size, f"{name}: size {status.st_size}")
        check(status.st_mode & 0o777 == 0o400, f"{name}: mode {oct(status.st_mode)}")
        ranges = mapped_ranges(data)
        pages = sum((end - start + PAGE - 1) // PAGE for start, end in ranges)
        check(status.st_blocks * 512 == pages * PAGE,
              f"{name}: {status.st_blocks} blocks for {pages} pages")
        check(data_ranges(path) == ranges, f"{name}: data lies elsewhere")
        created = engine.ctl("image", "info", name)["created"]
        check(str(created).startswith(
            str(__import__("datetime").datetime.fromtimestamp(
                int(status.st_mtime), __import__("datetime").timezone.utc).date())),
              f"{name}: time {status.st_mtime} for {created}")
        # Any offset and length.
        fd = os.open(path, os.O_RDONLY)
        chooser = random.Random(SEED)
        for _ in range(200):
            at = chooser.randrange(size + 10)
            length = chooser.choice([1, 100, 5000, 200000])
            check(os.pread(fd, length, at) == data[at:at + length], f"{name}: read at {at}")
        os.close(fd)
        direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
        buffer = mmap.mmap(-1, MIB)
        got = os.preadv(direct, [buffer], 0)
        check(buffer[:got] == data[:got] and got == min(size, MIB), f"{name}: direct read")
        os.close(direct)
    run("cmp", engine.work / "odd.raw", engine.image("odd"))


def test_a_volume_is_a_disk(engine):
    engine.run("volume", "create", "disk", "--size", 64 * MIB)
    path = engine.volume("disk")
    run("mkfs.ext4", "-q", "-F", "-E", "root_owner=0:0", path)
    run("e2fsck", "-f", "-n", path)
    check(path.stat().st_size == 64 * MIB, "mkfs changed the size")
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    # Programs that truncate, as for block devices.
    data = image_bytes(SEED + 1, 4 * MIB)
    source = engine.work / "source.raw"
    source.write_bytes(data)
    run("dd", f"if={source}", f"of={path}", "bs=1M", "conv=fsync", "status=none")
    run("cmp", "-n", len(data), source, path)
    run("cp", "--sparse=never", source, path)
    run("cmp", "-n", len(data), source, path)
    # And from one file of the store to another.
    engine.make_image("origin", data)
    run("dd", f"if={engine.image('origin')}", f"of={path}", "bs=64k", "seek=64", "status=none",
        "conv=notrunc")
    fd = os.open(path, os.O_RDONLY)
    check(os.pread(fd, len(data), 4 * MIB) == data, "the copy differs")
    os.close(fd)
    # What is there after it was given back.
    engine.run("volume", "export", "disk", engine.work / "disk.raw")
    run("cmp", engine.work / "disk.raw", path)


def test_blocks_of_a_volume(engine):
    engine.run("volume", "create", "sparse", "--size", 32 * MIB)
    path = engine.volume("sparse")
    check(path.stat().st_blocks == 0, "an empty volume has blocks")
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, random.Random(SEED).randbytes(3 * PAGE), 5 * MIB)
    os.fsync(fd)
    check(os.fstat(fd).st_blocks * 512 == 3 * PAGE, f"{os.fstat(fd).st_blocks} blocks")
    fallocate(fd, FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE, 5 * MIB, PAGE)
    os.fsync(fd)
    check(os.pread(fd, PAGE, 5 * MIB) == bytes(PAGE), "what was punched is still there")
    os.close(fd)
    wait_until(lambda: path.stat().st_blocks * 512 == 2 * PAGE, "two pages are left")
    # A clone that nobody has written to is its origin.
    engine.run("volume", "clone", "sparse", "sparse-2")
    check(engine.volume("sparse-2").stat().st_blocks * 512 == 2 * PAGE, "blocks of a clone")


def test_random_writes_of_any_alignment(engine):
    size = 2 * MIB
    engine.run("volume", "create", "scratch", "--size", size)
    path = engine.volume("scratch")
    shadow = bytearray(size)
    chooser = random.Random(SEED)
    cached = os.open(path, os.O_RDWR)
    direct = os.open(path, os.O_RDWR | os.O_DIRECT)
    mapping = mmap.mmap(cached, size)
    buffer = mmap.mmap(-1, MIB)
    for step in range(1500):
        kind = chooser.choice(["write", "write", "odd", "direct", "map", "punch", "zero", "read",
                               "read direct", "sync"])
        at = chooser.randrange(size)
        length = min(size - at, chooser.choice([1, 511, 512, 4096, 10000, 100000]))
        if kind in ("direct", "read direct"):
            at, length = at // 512 * 512, max(512, length // 512 * 512)
            length = min(length, size - at)
        if kind == "write":
            at, length = at // 4096 * 4096, max(4096, length // 4096 * 4096)
            length = min(length, size - at)
        if kind in ("write", "odd"):
            data = chooser.randbytes(length)
            check(os.pwrite(cached, data, at) == length, "a short write")
            shadow[at:at + length] = data
        elif kind == "direct":
            mapping.flush()
            buffer[:length] = chooser.randbytes(length)
            check(os.pwritev(direct, [memoryview(buffer)[:length]], at) == length, "a short write")
            shadow[at:at + length] = buffer[:length]
        elif kind == "map":
            data = chooser.randbytes(length)
            mapping[at:at + length] = data
            shadow[at:at + length] = data
        elif kind in ("punch", "zero"):
            fallocate(cached, FALLOC_KEEP_SIZE |
                      (FALLOC_PUNCH_HOLE if kind == "punch" else FALLOC_ZERO_RANGE), at, length)
            shadow[at:at + length] = bytes(length)
        elif kind == "read":
            check(os.pread(cached, length, at) == shadow[at:at + length],
                  f"seed {SEED}, step {step}: a read at {at} of {length} differs")
        elif kind == "read direct":
            mapping.flush()
            got = os.preadv(direct, [memoryview(buffer)[:length]], at)
            check(got == length and buffer[:got] == shadow[at:at + length],
                  f"seed {SEED}, step {step}: a direct read at {at} of {length} differs")
        else:
            os.fsync(cached)
    mapping.flush()
    mapping.close()
    os.close(direct)
    os.close(cached)
    engine.run("volume", "export", "scratch", engine.work / "scratch.raw")
    check((engine.work / "scratch.raw").read_bytes() == shadow, "the export differs")
    check(path.read_bytes() == shadow, "the file differs, read again")


def test_errors(engine):
    engine.run("volume", "create", "small", "--size", MIB)
    engine.make_image("fixed", b"x" * 10000)
    engine.run("snapshot", "create", "small", "first")
    path = engine.volume("small")
    for folder in ("", "volumes", "images", "snapshots"):
        target = engine.files / folder / "new"
        fails_with(errno.EPERM, os.open, target, os.O_CREAT | os.O_RDWR)
        fails_with(errno.EPERM, os.mkdir, target)
        fails_with(errno.EPERM, os.symlink, "x", target)
    fails_with(errno.EPERM, os.unlink, path)
    fails_with(errno.EPERM, os.rename, path, engine.volume("other"))
    fails_with(errno.EPERM, os.chmod, path, 0o644)
    fails_with(errno.EPERM, os.rmdir, engine.files / "volumes")
    fails_with(errno.ENOENT, os.stat, engine.volume("fixed"))
    fails_with(errno.ENOENT, os.stat, engine.image("small"))
    fails_with(errno.ENOENT, os.stat, engine.volume("no such name!"))
    fails_with(errno.EROFS, os.open, engine.image("fixed"), os.O_RDWR)
    fails_with(errno.EROFS, os.open, engine.files / "snapshots" / "small@first", os.O_WRONLY)
    fails_with(errno.EINVAL, os.truncate, path, 2 * MIB)
    fails_with(errno.EINVAL, os.truncate, path, MIB // 2)
    os.truncate(path, MIB)
    os.truncate(path, 0)
    check(path.stat().st_size == MIB, "truncated")
    fd = os.open(path, os.O_RDWR)
    fails_with(errno.ENOSPC, os.pwrite, fd, b"x", MIB)
    check(os.pwrite(fd, b"y" * 8192, MIB - 4096) == 4096, "a write over the end is cut")
    check(os.fstat(fd).st_size == MIB, "the file has grown")
    fallocate(fd, 0, 0, MIB)
    fails_with(errno.ENOSPC, fallocate, fd, 0, 0, MIB + 1)
    fails_with(errno.ENOSPC, fallocate, fd, FALLOC_ZERO_RANGE, MIB - 10, 20)
    fails_with(errno.EOPNOTSUPP, os.setxattr, path, "user.x", b"1")
    fails_with(errno.EOPNOTSUPP, os.listxattr, path)
    # What is open is not removed.
    engine.run("volume", "rm", "small", status=5)
    os.close(fd)
    image = os.open(engine.image("fixed"), os.O_RDONLY)
    engine.run("image", "rm", "fixed", status=5)
    os.close(image)
    engine.run("image", "rm", "fixed")
    engine.run("volume", "rm", "small")
    wait_until(lambda: not path.exists(), "the name is gone")
    fails_with(errno.ENOENT, os.stat, path)
    space = os.statvfs(engine.files)
    check(space.f_blocks > space.f_bavail > 0, "no space")


def test_one_writer_at_a_time(engine):
    for name in ("mine", "theirs"):
        engine.run("volume", "create", name, "--size", MIB)
    engine.attach("theirs")
    fails_with(errno.EBUSY, os.open, engine.volume("theirs"), os.O_RDWR)
    check("theirs" in [line for line in engine.log.read_text().splitlines()
                       if "not opened for writing" in line][-1], "the log does not say it")
    reader = os.open(engine.volume("theirs"), os.O_RDONLY)
    check(os.pread(reader, 10, 0) == bytes(10), "what others write can be read")
    os.close(reader)
    fd = os.open(engine.volume("mine"), os.O_RDWR)
    engine.run("attach", "mine", "--vhost-user", engine.socket_path("mine"), status=5)
    # A hold lasts as long as its pages can be seen.
    other = os.open(engine.volume("mine"), os.O_RDONLY)
    os.close(fd)
    engine.run("attach", "mine", "--vhost-user", engine.socket_path("mine"), status=5)
    os.close(other)
    # At once: close() returns before the daemon hears of it.
    engine.attach("mine")
    engine.run("detach", "mine")
    engine.run("detach", "theirs")
    for round_number in range(30):
        path = engine.volume("theirs")
        data = bytes([round_number]) * PAGE
        with open(path, "r+b") as file:
            file.write(data)
        engine.attach("theirs")
        engine.run("detach", "theirs")
        with open(path, "rb") as file:
            check(file.read(PAGE) == data, "what was written is gone")


def test_what_another_frontend_wrote_is_seen(engine):
    """Pages of an earlier hold are dropped when the volume may have changed since."""
    engine.run("volume", "create", "shared", "--size", MIB)
    path = engine.volume("shared")
    with open(path, "r+b") as file:
        file.write(b"a" * PAGE)
    check(path.read_bytes()[:PAGE] == b"a" * PAGE, "written")
    engine.run("snapshot", "create", "shared", "a")
    with open(path, "r+b") as file:
        file.write(b"b" * PAGE)
        file.flush()
        check(os.pread(file.fileno(), PAGE, 0) == b"b" * PAGE, "cached")
    # Changed by the daemon itself, with nothing open.
    engine.run("snapshot", "rollback", "shared", "a")
    with open(path, "rb") as file:
        check(file.read(PAGE) == b"a" * PAGE, "uncached: pages of before the rollback")
    with open(path, "r+b") as file:
        check(file.read(PAGE) == b"a" * PAGE, "cached: pages of before the rollback")
    snapshot = engine.files / "snapshots" / "shared@a"
    check(snapshot.read_bytes() == path.read_bytes(), "the snapshot differs")


def test_snapshots_of_an_open_volume(engine):
    engine.run("volume", "create", "live", "--size", MIB)
    fd = os.open(engine.volume("live"), os.O_RDWR)
    for number in range(5):
        os.pwrite(fd, bytes([number + 1]) * 10000, number * 20000 + 3)
        engine.run("snapshot", "create", "live", f"s{number}")
        expected = os.pread(fd, MIB, 0)
        taken = (engine.files / "snapshots" / f"live@s{number}").read_bytes()
        check(taken == expected, f"snapshot {number} is not what was written")
    engine.run("volume", "clone", "live", "live-clone")
    check(engine.volume("live-clone").read_bytes() == os.pread(fd, MIB, 0), "the clone differs")
    # Grown while it is open.
    engine.run("volume", "resize", "live", 2 * MIB)
    wait_until(lambda: os.fstat(fd).st_size == 2 * MIB, "the new size is seen")
    check(os.pwrite(fd, b"z" * 4096, 2 * MIB - 4096) == 4096, "the new end is written")
    os.close(fd)


def test_mappings(engine):
    data = image_bytes(SEED + 2, 4 * MIB)
    engine.make_image("mapped", data)
    fd = os.open(engine.image("mapped"), os.O_RDONLY)
    shared = mmap.mmap(fd, len(data), flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    private = mmap.mmap(fd, len(data), flags=mmap.MAP_PRIVATE,
                        prot=mmap.PROT_READ | mmap.PROT_WRITE)
    os.close(fd)
    check(shared[:] == data and private[:] == data, "a mapping differs")
    private[1000:2000] = b"!" * 1000
    check(shared[:] == data, "a private change is seen by others")
    engine.run("image", "rm", "mapped", status=5)
    shared.close()
    private.close()
    engine.run("image", "rm", "mapped")
    # A loop device, where there are any.
    engine.run("volume", "create", "looped", "--size", 16 * MIB)
    made = subprocess.run(["losetup", "--find", "--show", str(engine.volume("looped"))],
                          capture_output=True, text=True, check=False)
    if made.returncode == 0:
        device = made.stdout.strip()
        try:
            run("mkfs.ext4", "-q", "-F", device)
            run("e2fsck", "-f", "-n", device)
        finally:
            run("losetup", "-d", device)
        wait_until(lambda: not Path(f"/sys/block/{Path(device).name}/loop").exists(), "losetup -d")
        run("e2fsck", "-f", "-n", engine.volume("looped"))


def test_thousands_of_names_over_a_restart(engine):
    engine.run("volume", "create", "base", "--size", MIB)

    for start in range(3):
        engine.run("volume", "clone", "base", f"c-{start}-{{n}}", "--count", 1000)
    names = {entry.name for entry in os.scandir(engine.files / "volumes")}
    check(len(names) >= 3000, f"{len(names)} names")
    seen = []
    with os.scandir(engine.files / "volumes") as entries:
        for number, entry in enumerate(entries):
            seen.append(entry.name)
            if number == 100:
                engine.restart_by_kill()
    check(len(seen) == len(set(seen)) and set(seen) == names,
          f"{len(seen)} names of {len(names)} over a restart")
    run("ls", "-l", engine.files / "volumes")


class Residency:
    """How many bytes of files are in the page cache, by mincore(2)."""

    def __init__(self):
        LIBC.mmap.restype = ctypes.c_void_p
        LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int,
                              ctypes.c_int, ctypes.c_long]

    def of(self, path):
        fd = os.open(path, os.O_RDONLY)
        size = os.fstat(fd).st_size
        if size == 0:
            os.close(fd)
            return 0
        place = LIBC.mmap(None, size, 1, 1, fd, 0)
        os.close(fd)
        pages = (size + PAGE - 1) // PAGE
        vector = (ctypes.c_ubyte * pages)()
        check(LIBC.mincore(ctypes.c_void_p(place), ctypes.c_size_t(size), vector) == 0, "mincore")
        LIBC.munmap(ctypes.c_void_p(place), ctypes.c_size_t(size))
        return sum(each & 1 for each in vector) * PAGE


def segments_of(engine):
    return [path for path in (engine.store / "segments").iterdir() if path.is_file()]


def test_bytes_are_cached_once(engine):
    size = 48 * MIB
    engine.make_image("cached", random.Random(SEED + 3).randbytes(size))
    residency = Residency()
    engine.restart_by_kill()  # Nothing is verified yet: whole chunks are read.

    def drop():
        os.sync()
        for path in segments_of(engine):
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def in_segments():
        return sum(residency.of(path) for path in segments_of(engine))

    drop()
    fd = os.open(segments_of(engine)[0], os.O_RDONLY)
    try:
        os.preadv(fd, [bytearray(PAGE)], 0, RWF_DONTCACHE)
        once = True
    except OSError as error:
        check(error.errno == errno.EOPNOTSUPP, str(error))
        once = False
    os.close(fd)
    for kind in ("unverified", "verified"):
        drop()
        before = in_segments()
        with open(engine.image("cached"), "rb") as file:
            if kind == "verified":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(MIB):
                pass
        of_file = residency.of(engine.image("cached"))
        grown = in_segments() - before
        engine.figures[f"{kind}_cached_share"] = round((of_file + max(grown, 0)) / size, 3)
        check(of_file == size, f"{of_file} of {size} bytes of the file are cached")
        if once:
            check(grown <= size // 20, f"{kind}: {grown} bytes of segments were cached too")
    # The next reader finds the pages: nothing is asked of the store.
    with open(engine.image("cached"), "rb") as file:
        check(residency.of(engine.image("cached")) == size, "the pages are gone at the next opening")
        check(len(file.read()) == size, "short")
    # Past the cache, the segments' pages are kept, for all.
    drop()
    direct = os.open(engine.image("cached"), os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, MIB)
    for at in range(0, size, MIB):
        os.preadv(direct, [buffer], at)
    os.close(direct)
    check(in_segments() >= size * 0.9, "direct reads leave nothing in the cache")


def test_fio_verifies(engine):
    engine.run("volume", "create", "bench", "--size", 96 * MIB)
    engine.run("volume", "create", "mapped-bench", "--size", 8 * MIB)
    path = engine.volume("bench")
    mapped_path = engine.volume("mapped-bench")
    common = ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
              "--randrepeat=1", f"--randseed={SEED}", "--group_reporting", "--output-format=json",
              "--thread"]
    jobs = [
        ["--name=direct", "--ioengine=libaio", "--iodepth=32", "--direct=1", "--rw=randwrite",
         "--bsrange=4k-128k", "--bs_unaligned=0", "--blockalign=4k", "--offset=0", "--size=16m"],
        ["--name=buffered", "--ioengine=libaio", "--iodepth=32", "--direct=0", "--rw=randwrite",
         "--bsrange=1k-64k", "--offset=16m", "--size=16m"],
        ["--name=threads", "--ioengine=psync", "--numjobs=4", "--direct=1", "--rw=randwrite",
         "--bs=4k", "--offset=32m", "--size=4m", "--offset_increment=4m"],
        # On a volume of its own: this engine does not map from an offset on.
        ["--name=mapped", "--ioengine=mmap", "--rw=randwrite", "--bs=4k", "--size=8m"],
        ["--name=synced", "--ioengine=libaio", "--iodepth=8", "--direct=1", "--rw=write",
         "--bs=64k", "--offset=64m", "--size=16m", "--fdatasync=8"],
    ]
    running = []
    for job in jobs:
        name = job[0].split("=")[1]
        file = mapped_path if name == "mapped" else path
        running.append((name, subprocess.Popen(
            ["fio", *common, f"--filename={file}", *job], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=engine.work)))
    for name, process in running:
        output, _ = process.communicate(timeout=600)
        check(process.returncode == 0, f"fio {name}: status {process.returncode}\n{output[:3000]}")
        report = json.loads(output[output.index("{"):output.rindex("}") + 1])
        done = report["jobs"][0]
        check(done["error"] == 0 and done["read"]["io_bytes"] > 0 and done["write"]["io_bytes"] > 0,
              f"fio {name}: {done['error']}")
        engine.figures.setdefault("fio_verified_bytes", 0)
        engine.figures["fio_verified_bytes"] += done["read"]["io_bytes"]


def test_locks_and_flags(engine):
    """A VMM locks its disk; a second one is told."""
    engine.run("volume", "create", "locked", "--size", MIB)
    first = os.open(engine.volume("locked"), os.O_RDWR)
    second = os.open(engine.volume("locked"), os.O_RDWR)
    fcntl.flock(first, fcntl.LOCK_EX)
    fails_with(errno.EWOULDBLOCK, fcntl.flock, second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    synced = os.open(engine.volume("locked"), os.O_RDWR | os.O_DSYNC)
    check(os.pwrite(synced, b"s" * PAGE, 0) == PAGE, "a durable write")
    check(os.pread(first, PAGE, 0) == b"s" * PAGE, "seen")
    for fd in (first, second, synced):
        os.close(fd)


def test_a_stop_unmounts_what_nobody_uses(engine):
    engine.stop_daemon()
    check(not engine.mounted(), "the directory is still mounted")
    wait_until(lambda: engine.holders() == [], "the holder has ended")
    engine.start()
    check(engine.mounted() and len(engine.holders()) == 1, "mounted again")
    # What is left of a holder that was killed is taken away.
    engine.kill_daemon()
    os.kill(engine.holders()[0], 9)
    wait_until(lambda: engine.holders() == [], "the holder is killed")
    fails_with(errno.ENOTCONN, os.stat, engine.files)
    engine.start()
    check((engine.files / "volumes").is_dir(), "mounted anew")
    # Another directory in the same runtime directory, while files are kept for this one.
    engine.kill_daemon()
    other = engine.work / "other"
    other.mkdir()
    try:
        engine.start_daemon("--mount", other)
        raise AssertionError("a second directory is not refused")
    except EngineError as error:
        check(str(engine.files) in str(error), f"the message does not name it: {error}")
    engine.start()


def test_mounted_by_root_for_another_user(_engine):
    """The daemon is that user; the holder stays root's, and listens to that user."""
    user = pwd.getpwnam("nobody")
    with Mounted(sys.argv[1]) as engine:
        place = Path(tempfile.mkdtemp(prefix="stellarium-files-", dir="/var/tmp"))
        try:
            engine.store, engine.files = place / "store", place / "files"
            engine.environment["STELLARIUM_STORE"] = str(engine.store)
            engine.files.mkdir()
            place.chmod(0o755)
            engine.run("init")
            engine.run("volume", "create", "disk", "--size", MIB)
            for path in [engine.store, *engine.store.rglob("*")]:
                os.chown(path, user.pw_uid, user.pw_gid)
            Path(engine.runtime).chmod(0o711)
            for _ in range(2):
                engine.start("--user", user.pw_name)
                path = engine.volume("disk")
                status = path.stat()
                check(status.st_uid == user.pw_uid and status.st_mode & 0o777 == 0o600,
                      f"the file is {status}")
                write = ["sh", "-c", f"printf mine | dd of={path} conv=notrunc status=none"]
                for name, expected in (("nobody", 0), ("daemon", 1)):
                    done = subprocess.run(write, user=name, group=name.replace("nobody", "nogroup"),
                                          extra_groups=[], capture_output=True, text=True,
                                          check=False, cwd="/")
                    check(done.returncode == expected, f"{name}: {done.stderr}")
                check(path.read_bytes()[:4] == b"mine", "what was written")
                sockets = list(Path(engine.runtime).rglob("mount.sock"))
                check(len(sockets) == 1 and sockets[0].stat().st_uid == user.pw_uid
                      and sockets[0].stat().st_mode & 0o777 == 0o600, f"the sockets are {sockets}")
                check(Path(f"/proc/{engine.holders()[0]}").stat().st_uid == 0, "the holder's user")
                engine.kill_daemon()
            engine.start("--user", user.pw_name)
            engine.stop_daemon()
            check(not engine.mounted(), "the directory is still mounted")
        except BaseException:
            print(engine.log_tail(), file=sys.stderr)
            raise
        finally:
            engine.kill_daemon()
            subprocess.run(["umount", "-l", str(engine.files)], capture_output=True, check=False)
            shutil.rmtree(place, ignore_errors=True)


def main():
    skip_without_fuse()
    names = sys.argv[2:]
    tests = {name[5:]: value for name, value in globals().items() if name.startswith("test_")}
    with Mounted(sys.argv[1]) as engine:
        engine.figures = {}
        engine.run("init")
        engine.start()
        for name, test in tests.items():
            if names and name not in names:
                continue
            try:
                test(engine)
            except BaseException:
                print(f"{name}, STELLARIUM_TEST_SEED={SEED}; the daemon's log ends:\n"
                      f"{engine.log_tail()}", file=sys.stderr)
                raise
        engine.stop_daemon()
        check(not engine.mounted(), "the directory is still mounted")
        engine.run("fsck")
        errors = [line for line in engine.log.read_text().splitlines() if "level=error" in line
                  and "--mount is" not in line]
        check(not errors, "the daemon's log has errors:\n" + "\n".join(errors[:10]))
        Path(sys.argv[1], "files.json").write_text(json.dumps(engine.figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

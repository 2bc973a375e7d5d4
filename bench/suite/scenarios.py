"""What is measured: each function makes one scenario of docs/benchmarks.md out of a Bench.

The sizes come from `Bench.small`: a smoke run uses little data, to show that everything still
works. What a function needs and the machine may lack is looked for when a variant runs, so that
only this variant is left out (measure.Unavailable).
"""
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import guests
import machines
import peers
import served
from engine import Engine
from measure import Scenario, Target, Together, Unavailable

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
PAGE = 4096
P99 = ", 99th percentile"


class Bench:
    """Programs, work folder and images of one scenario. Whoever made `work` removes it."""

    def __init__(self, build, work, small):
        self.build = build
        self.work = work
        self.small = small
        self.blkbench = build / "bench/stellarium-blkbench"
        self.stack = ExitStack()
        self.made = {}

    def __enter__(self):
        return self

    def __exit__(self, *details):
        return self.stack.__exit__(*details)

    def once(self, name, make):
        """Something that is made at the first use and kept for the run."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def image(self, name="debian"):
        """A real Debian image; in a smoke run, its first part."""
        def make():
            image = guests.image(name, *guests.IMAGES[name])
            if not self.small:
                return image
            part = self.work / f"{name}-part.raw"
            with open(image, "rb") as source:
                part.write_bytes(source.read(64 * MIB))
            return part
        return self.once(f"image {name}", make)

    def whole_image(self):
        """Not cut short in a smoke run either: it boots."""
        return guests.image("debian", *guests.IMAGES["debian"])

    def random_file(self, size_bytes):
        """A file of random bytes: the disk of the block scenarios."""
        def make():
            path = self.work / f"random-{size_bytes}.raw"
            with open(path, "wb") as file:
                for _ in range(size_bytes // MIB):
                    file.write(os.urandom(MIB))
            return path
        return self.once(f"random file of {size_bytes}", make)

    def archives(self):
        return self.once("archives", lambda: {
            "stellarium": peers.Stellarium(self.work, "stellarium", self.build),
            "cp": peers.Cp(self.work, "cp"),
            "casync": peers.Casync(self.work, "casync"),
            "borg": peers.Borg(self.work, "borg"),
            "borg fixed": peers.Borg(self.work, "borg-fixed", fixed=True),
            "restic": peers.Restic(self.work, "restic"),
        })

    def stored(self, name, image):
        """The archive `name`, which holds `image` as `first`."""
        def make():
            archive = self.archives()[name]
            archive.clear()
            archive.put("first", image)
            return archive
        return self.once(f"stored in {name}", make)

    def daemon(self):
        """A daemon on a store that holds the random disk as the image `base`. It collects garbage
        when it is told to: what a run left is neither collected during the next one nor missing
        where that one writes the same again."""
        def make():
            engine = self.stack.enter_context(Engine(self.build))
            engine.run("init")
            engine.run("image", "import", "base", self.random_file(self.disk_bytes()))
            return self.stack.enter_context(served.Ours(engine, "--no-gc"))
        return self.once("daemon", make)

    def disk_bytes(self):
        return 64 * MIB if self.small else GIB

    def seconds(self):
        return 0.5 if self.small else 4


CONTENT_CUT = ("casync", "borg", "restic")


def fastest_content_cut(medians):
    """Of those that are installed here; KeyError without any."""
    return min([medians[name] for name in CONTENT_CUT if name in medians] or [medians["casync"]])


def numbered(prefix):
    """A function that gives another name at each call."""
    turn = iter(range(1 << 30))
    return lambda: f"{prefix}{next(turn)}"


# --- Storing whole images -------------------------------------------------------------------------


def import_new(bench):
    image = bench.image()

    def run(archive):
        def once():
            archive.clear()
            return archive.timed_put("new", image)
        return once
    return Scenario(
        "import-new", "Import of a new raw image", "s",
        {name: run(archive) for name, archive in bench.archives().items()},
        [Target("at least 8 x the fastest that cuts by content", 8,
                lambda m: fastest_content_cut(m) / m["stellarium"], smoke_bound=4),
         Target("at least 0.6 x the rate of cp --sparse=always", 0.6,
                lambda m: m["cp"] / m["stellarium"])],
        note="Into an empty store each time; the image is in the page cache; synced.")


def import_again(bench):
    image = bench.image()
    again = numbered("again-")

    def run(name):
        return lambda: bench.stored(name, image).timed_put(again(), image)
    return Scenario(
        "import-again", "Import of an image that is already stored", "s",
        {name: run(name) for name in bench.archives()},
        [Target("at least 10 x the fastest that cuts by content", 10,
                lambda m: fastest_content_cut(m) / m["stellarium"], smoke_bound=5),
         Target("at least 4 x borg's fixed mode", 4, lambda m: m["borg fixed"] / m["stellarium"]),
         Target("at least 1.0 x cp", 1.0, lambda m: m["cp"] / m["stellarium"])],
        note="All bytes are read and hashed again; cp writes a second file.")


def export(bench):
    image = bench.image()

    def run(name):
        return lambda: bench.stored(name, image).timed_get("first", image)
    return Scenario(
        "export", "Export of an image to a sparse file", "s",
        {name: run(name) for name in bench.archives()},
        [Target("at least 5 x the fastest that cuts by content", 5,
                lambda m: fastest_content_cut(m) / m["stellarium"], smoke_bound=1),
         Target("at least 0.5 x cp", 0.5, lambda m: m["cp"] / m["stellarium"])],
        note="restic 0.14 writes zeros where the image has holes; the others leave holes.")


def related_images(bench):
    images = [bench.image("debian"), bench.image("debian-rebuilt")]

    def bare():
        pages, zero = set(), bytes(PAGE)
        for image in images:
            with open(image, "rb") as file:
                while page := file.read(PAGE):
                    if page != zero[:len(page)]:
                        pages.add(hashlib.blake2b(page, digest_size=16).digest())
        return len(pages) * PAGE

    def ours():
        archive = peers.Stellarium(bench.work, "related", bench.build)
        archive.clear()
        for number, image in enumerate(images):
            archive.put(f"image-{number}", image)
        store = archive.folder / "store"
        return peers.allocated_bytes(store) - peers.allocated_bytes(store / "reserve")
    return Scenario(
        "related-images", "Bytes on disk for two related images", "bytes",
        {"stellarium": ours, "bare 4 KiB pages": bare},
        [Target("at most 1.08 x the bare bytes of fixed 4 KiB dedup", 1.08,
                lambda m: m["stellarium"] / m["bare 4 KiB pages"], at_most=True)],
        note="Everything in the store's folder counts, but for the reserve that a full disk needs, "
             "whose size does not depend on what is stored; of the peer only the pages.")


# --- Clones and snapshots -------------------------------------------------------------------------


def clones(bench):
    count = 1000
    processes = 20 if bench.small else count  # Of qemu-img, which takes as long for each of them.
    base = bench.random_file(bench.disk_bytes())
    prefix = numbered("c")

    def store():
        archive = peers.Stellarium(bench.work, "clones", bench.build)
        archive.clear()
        archive.put("base", base)
        return archive

    def ours():
        archive = bench.once("store for clones", store)
        return peers.timed(archive.folder, lambda: archive.run(
            "volume", "clone", "base", prefix() + "-{n}", "--count", count)) / count

    def qemu_img():
        folder = peers.fresh(bench.work / "overlays")
        return peers.timed(folder, lambda: [
            peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base,
                      folder / f"{number}.qcow2") for number in range(processes)]) / processes

    def volume():
        xfs = bench.stack.enter_context(peers.XfsVolume(bench.work, 2 * GIB + bench.disk_bytes()))
        shutil.copyfile(base, xfs / "base")
        return xfs

    def ficlone():
        xfs = bench.once("xfs", volume)
        out = peers.fresh(xfs / "clones")
        return peers.timed(xfs, lambda: peers.ficlone_many(xfs / "base", out, count)) / count
    return Scenario(
        "clones", "Clones of one image", "s",
        {"stellarium": ours, "qemu-img create -b": qemu_img, "FICLONE on XFS": ficlone},
        [Target("at least 50 x qemu-img create -b", 50,
                lambda m: m["qemu-img create -b"] / m["stellarium"]),
         Target("at least 3 x FICLONE on XFS", 3, lambda m: m["FICLONE on XFS"] / m["stellarium"])],
        note=f"{count:,} clones, durable; seconds for each. Ours by one command, FICLONE by one "
             f"process and one syncfs, {processes:,} by a qemu-img each.")


def clone_bytes(bench):
    count = 1000
    ours = bench.daemon()
    prefix = numbered("b")

    def appended(names):
        before = ours.stats()["appended_bytes"]
        ours.clone("base", *names)
        return (ours.stats()["appended_bytes"] - before) / len(names)

    def many():
        name = prefix()
        return appended([f"{name}-{number}" for number in range(count)])
    return Scenario(
        "clone-bytes", "Bytes of log for a clone", "bytes",
        {f"one of {count:,}": many, "single": lambda: appended([prefix()])},
        [Target("at most 256 bytes each", 256, lambda m: m[f"one of {count:,}"], at_most=True),
         Target("at most 8 KiB of log for a single one", 8 * KIB, lambda m: m["single"],
                at_most=True)])


def single_clone(bench):
    ours = bench.daemon()
    name = numbered("s")
    count = 20 if bench.small else 200

    def clone():
        nothing = statistics.median(ours.api.call("GET", "/v1/version")[1] for _ in range(count))
        return statistics.median(ours.clone("base", name()) for _ in range(count)) - nothing

    def fdatasync():
        path = ours.engine.work / "sync-probe"
        times = []
        with open(path, "wb", buffering=0) as file:
            for _ in range(count):
                file.write(os.urandom(PAGE))
                begin = time.monotonic()
                os.fdatasync(file.fileno())
                times.append(time.monotonic() - begin)
        path.unlink()
        return statistics.median(times)
    return Scenario(
        "single-clone", "One durable clone in a running daemon", "s",
        {"stellarium": clone, "fdatasync of 4 KiB appended": fdatasync},
        [Target("at most 2 x one fdatasync", 2,
                lambda m: m["stellarium"] / m["fdatasync of 4 KiB appended"], at_most=True)],
        note="Less the time of a request that does nothing.")


def clone_scale(bench):
    ours = bench.daemon()
    name = numbered("t")
    depth = 50 if bench.small else 10000
    count = 20 if bench.small else 200
    for volume, size_bytes in (("one-gib", GIB), ("ten-tib", 10 * TIB), ("deep", GIB)):
        ours.api.call("POST", "/v1/volumes", {"name": volume, "size_bytes": size_bytes})
    for number in range(depth):
        ours.api.call("POST", "/v1/volumes/deep/snapshots", {"name": f"d{number}"})
    ours.clone("base", "written")
    socket = ours.attach("written")

    def both(volume):
        """Seconds of a snapshot and a clone of a volume, which are then removed."""
        snapshots = f"/v1/volumes/{volume}/snapshots"
        taken = name()
        seconds = ours.api.call("POST", snapshots, {"name": taken})[1] + ours.clone(volume, taken)
        ours.remove(taken)
        ours.api.call("DELETE", f"{snapshots}/{taken}")
        return seconds

    def many_of(volume):
        return lambda: statistics.median(both(volume) for _ in range(count))

    def after_writes():
        """And of an idle volume at the same moments: the disk may still be busy."""
        times = {"written": [], "one-gib": []}
        for turn in range(6 if bench.small else 2):
            served.load(bench.blkbench, [socket], "--pattern", "sequential", "--block-size", "1MiB",
                        "--read-percent", 0, "--depth", 4, "--requests", mib + 1,
                        "--flush-every", mib)
            for volume in list(times)[::-1 if turn % 2 else 1]:
                times[volume].append(both(volume))
        return {written: statistics.median(times["written"]),
                beside: statistics.median(times["one-gib"])}
    mib = 16 if bench.small else 1024
    written = f"after {mib:,} MiB of writes"
    beside = "of an idle volume beside that"
    together = Together(after_writes)
    deep = f"behind {depth:,} snapshots"
    return Scenario(
        "clone-scale", "A snapshot and a clone of a small, a large, a deep and a busy volume", "s",
        {"1 GiB": many_of("one-gib"), "10 TiB": many_of("ten-tib"), deep: many_of("deep"),
         written: together.variant(written), beside: together.variant(beside)},
        [Target("10 TiB within noise of 1 GiB", 1.25, lambda m: m["10 TiB"] / m["1 GiB"],
                at_most=True),
         Target(f"depth {depth:,} within noise of depth 1", 1.25, lambda m: m[deep] / m["1 GiB"],
                at_most=True),
         Target("after writes within noise of an idle volume's", 1.25,
                lambda m: m[written] / m[beside], at_most=True)],
        note=f"Both together, median of {count} in a row, each removed again; after flushed "
             f"writes, the first ones, in turn with those of an idle volume.")


# --- Serving guests -------------------------------------------------------------------------------


def pass_over(bench, socket, *options):
    """The whole disk once, in order."""
    served.load(bench.blkbench, [socket], "--pattern", "sequential", "--block-size", "1MiB",
                "--depth", 4, "--requests", bench.disk_bytes() // MIB, *options)


class BlockLoad:
    """One load on each back-end's disk: a clone of ours, a raw file, a qcow2 file over a raw one.

    `figures` are functions of the load's report, by what their variants' names end with; all of
    them are taken from one run. `prepare(socket)` comes before the load, for all alike; with `aged`
    our store has had the disk written twice over, and collected, before.
    """

    def __init__(self, bench, figures, *options, prepare=None, aged=False):
        self.bench = bench
        self.figures = figures
        self.options = options
        self.prepare = prepare
        self.aged = aged
        self.base = bench.random_file(bench.disk_bytes())
        self.folder = bench.work / "served"
        self.folder.mkdir(exist_ok=True)
        self.name = numbered("load-")

    def variants(self):
        runs = {"stellarium": Together(self.ours), "raw": Together(self.raw),
                "qcow2 with backing file": Together(self.qcow2)}
        return {name + suffix: run.variant(suffix)
                for suffix in self.figures for name, run in runs.items()}

    def report(self, socket):
        if self.prepare is not None:
            self.prepare(socket)
        peers.sync_file_system(self.bench.work)
        report = served.load(self.bench.blkbench, [socket], *self.options)
        return {suffix: figure(report) for suffix, figure in self.figures.items()}

    def ours(self):
        daemon = self.bench.daemon()
        name = self.name()
        daemon.clone("base", name)
        try:
            socket = daemon.attach(name)
            if self.aged:  # The second pass makes dead space of the first.
                for _ in range(2):
                    pass_over(self.bench, socket, "--read-percent", 0, "--flush-every", 64)
                daemon.engine.run("gc")
            return self.report(socket)
        finally:
            daemon.drop(name)

    def raw(self):
        disk = self.bench.once(
            "raw disk", lambda: Path(shutil.copyfile(self.base, self.folder / "disk.raw")))
        peers.read_whole(disk)
        with served.QemuStorageDaemon.one(self.folder / "raw.sock", disk, "raw") as server:
            return self.report(server.sockets[0])

    def qcow2(self):
        overlay = self.folder / "overlay.qcow2"
        overlay.unlink(missing_ok=True)
        peers.read_whole(self.base)
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", self.base, overlay)
        with served.QemuStorageDaemon.one(self.folder / "q.sock", overlay, "qcow2") as server:
            return self.report(server.sockets[0])


def random_read(bench, depth):
    load = BlockLoad(bench, {"": lambda report: report["read"]["requests_per_second"],
                             P99: lambda report: report["read"]["latency_us"]["p99"]},
                     "--depth", depth, "--seconds", bench.seconds(),
                     prepare=lambda socket: pass_over(bench, socket))
    variants = load.variants()
    return Scenario(
        f"random-read-{depth}", f"4 KiB random read, warm, depth {depth}", "IOPS", variants,
        [Target("at least 1.5 x raw", 1.5, lambda m: m["stellarium"] / m["raw"]),
         Target("at least 1.5 x qcow2 with a backing file", 1.5,
                lambda m: m["stellarium"] / m["qcow2 with backing file"]),
         Target("99th percentile at most 1 x raw's", 1,
                lambda m: m["stellarium" + P99] / m["raw" + P99], at_most=True)],
        units={name: "us" for name in variants if name.endswith(P99)},
        note="The whole disk has been read once before.")


def random_write(bench, aged):
    where = "aged" if aged else "fresh"
    bound = 1.0 if aged else 0.7
    load = BlockLoad(bench, {"": lambda report: report["write"]["requests_per_second"]},
                     "--depth", 32, "--read-percent", 0, "--flush-every", 32, "--seconds",
                     bench.seconds(), aged=aged)
    return Scenario(
        f"random-write-{where}", f"4 KiB random write, depth 32, a flush each 32, {where} store",
        "IOPS", load.variants(),
        [Target(f"at least {bound} x raw", bound, lambda m: m["stellarium"] / m["raw"]),
         Target("at least 2 x qcow2 with a backing file", 2,
                lambda m: m["stellarium"] / m["qcow2 with backing file"])],
        note="Every page written is unlike any other.")


def sequential(bench, what):
    requests = bench.disk_bytes() // MIB
    options = {
        "read": ("--read-percent", 100),
        "write-unique": ("--read-percent", 0, "--flush-every", requests),
        "write-duplicate": ("--read-percent", 0, "--flush-every", requests,
                            "--content", "repeated"),
    }[what]
    bound = 1.5 if what == "write-duplicate" else 0.9
    reads = what == "read"
    key = "read" if reads else "write"
    load = BlockLoad(bench, {"": lambda report: report[key]["bytes"] / report["seconds"] / 1e6},
                     "--pattern", "sequential", "--block-size", "1MiB", "--depth", 4,
                     "--requests", requests + (not reads), *options,
                     prepare=(lambda socket: pass_over(bench, socket)) if reads else None)
    return Scenario(
        f"sequential-{what}", f"Sequential 1 MiB, depth 4, {what.replace('-', ' ')}", "MB/s",
        load.variants(),
        [Target(f"at least {bound} x raw", bound, lambda m: m["stellarium"] / m["raw"],
                smoke_bound={"write-unique": 0.3, "write-duplicate": 0.6}.get(what))],
        note="The whole disk once, warm." if reads else "The whole disk once, then a flush.")


def overwrite_bytes(bench):
    data = (1 if bench.small else 10) * MIB
    base = bench.random_file(bench.disk_bytes())
    folder = bench.work / "served"
    folder.mkdir(exist_ok=True)
    options = ("--read-percent", 0, "--depth", 32, "--requests", data // PAGE + 1,
               "--flush-every", data // PAGE)

    def ours():
        daemon = bench.daemon()
        name = f"over-{os.urandom(4).hex()}"
        daemon.clone("base", name)
        socket = daemon.attach(name)
        before = daemon.stats()["appended_bytes"]
        served.load(bench.blkbench, [socket], *options)
        after = daemon.stats()["appended_bytes"]
        daemon.drop(name)
        return (after - before) / data

    def qcow2(extended):
        def once():
            overlay = folder / "over.qcow2"
            layout = "extended_l2=on,cluster_size=128k" if extended else "cluster_size=64k"
            peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base,
                      "-o", layout, overlay)
            empty = peers.allocated_bytes(overlay)
            with served.QemuStorageDaemon.one(folder / "over.sock", overlay, "qcow2") as server:
                served.load(bench.blkbench, server.sockets, *options)
            peers.sync_file_system(folder)
            bytes_on_disk = peers.allocated_bytes(overlay) - empty
            overlay.unlink()
            return bytes_on_disk / data
        return once
    return Scenario(
        "overwrite-bytes",
        f"Bytes on disk for {data // MIB} MiB of random 4 KiB writes into a clone",
        "ratio", {"stellarium": ours, "qcow2": qcow2(False), "qcow2 with extended L2": qcow2(True)},
        [Target("at most 1.10 x the data", 1.10, lambda m: m["stellarium"], at_most=True)],
        note="Bytes for each byte written; one flush at the end.")


def device_bytes(bench):
    data = (8 if bench.small else 256) * MIB
    name = numbered("device-")
    unaligned = 5 * PAGE

    def write(block, *options):
        """A new clone, overwritten with a flush after each block; device bytes for each byte."""
        daemon = bench.daemon()
        clone = name()
        daemon.clone("base", clone)
        socket = daemon.attach(clone)
        daemon.api.call("POST", "/v1/checkpoint")
        before = served.process_figure(daemon.pid, "io", "write_bytes")
        served.load(bench.blkbench, [socket], "--read-percent", 0, "--pattern", "sequential",
                    "--block-size", block, "--depth", 1, "--requests", 2 * (data // block),
                    "--flush-every", 1, *options)
        daemon.api.call("POST", "/v1/checkpoint")
        written = served.process_figure(daemon.pid, "io", "write_bytes") - before
        daemon.drop(clone)
        return written / data

    def duplicate(block, *options):
        """The same content was written before, by another clone, from the start of its disk."""
        def run():
            write(block, "--seed", block)
            return write(block, "--seed", block, *options)
        return run
    mib, kib = "a flush each 1 MiB", "a flush each 64 KiB"
    return Scenario(
        "device-bytes", "Bytes given to the device for each byte that a guest wrote", "ratio",
        {"unique, " + mib: lambda: write(MIB), "unique, " + kib: lambda: write(64 * KIB),
         "duplicate, " + mib: duplicate(MIB),
         "duplicate, aligned to nothing, " + kib: duplicate(64 * KIB, "--offset", unaligned)},
        [Target("unique, each 1 MiB: at most 1.10", 1.10, lambda m: m["unique, " + mib],
                at_most=True),
         Target("unique, each 64 KiB: at most 1.25", 1.25, lambda m: m["unique, " + kib],
                at_most=True),
         Target("duplicate, each 1 MiB: at most 0.05", 0.05, lambda m: m["duplicate, " + mib],
                at_most=True),
         Target("duplicate, each 64 KiB: at most 0.35", 0.35,
                lambda m: m["duplicate, aligned to nothing, " + kib], at_most=True)],
        note="write_bytes of the daemon's process, a checkpoint included.")


def group_commit(bench):
    count = 20 if bench.small else 1000
    daemon = bench.daemon()
    names = [f"group-{number}" for number in range(count)]
    daemon.clone("base", *names)
    sockets = [daemon.attach(name) for name in names]

    def slowest_flush(number):
        report = served.load(bench.blkbench, sockets[:number], "--read-percent", 0, "--depth", 1,
                             "--requests", 2, "--flush-every", 1)
        return report["flush"]["latency_us"]["max"]

    def run(number):
        return lambda: statistics.median(slowest_flush(number) for _ in range(5))
    return Scenario(
        "group-commit", f"One flush with one dirty page on each of {count:,} volumes", "us",
        {f"{count:,} volumes": run(count), "one volume": run(1)},
        [Target("at most 8 x the time of one", 8,
                lambda m: m[f"{count:,} volumes"] / m["one volume"], at_most=True)],
        note="The slowest of the flushes, median of 5 runs. One thread of the load for each "
             "volume.")


def noisy_neighbour(bench):
    """Guests that read a little, beside one that writes as much as it may."""
    count, limit = 4, 16 * MIB
    alone, unlimited, limited = "alone", "beside a noisy guest", "beside the same one, limited"
    noise = ", bytes of the noisy one"
    limits = {"bandwidth_bytes": limit, "bandwidth_burst_bytes": limit // 10}
    daemon = bench.daemon()
    names = [f"quiet-{number}" for number in range(count)]
    noisy = numbered("noisy-")
    daemon.clone("base", *names)
    sockets = [daemon.attach(name) for name in names]
    pass_over(bench, sockets[0])

    def quiet():
        report = served.load(bench.blkbench, sockets, "--depth", 1, "--seconds", bench.seconds())
        return {"": report["read"]["requests_per_second"],
                P99: report["read"]["latency_us"]["p99"]}

    def beside(**options):
        def run():
            name = noisy()
            daemon.clone("base", name)
            socket = daemon.attach(name, **options)
            with served.Connected(bench.blkbench, daemon, [socket], "--read-percent", 0,
                                  "--block-size", "64KiB", "--depth", 32):
                before, begin = daemon.device_bytes(name, "write"), time.monotonic()
                figures = quiet()
                written = daemon.device_bytes(name, "write") - before
                figures[noise] = written / (time.monotonic() - begin) / 1e6
            daemon.drop(name)
            return figures
        return run
    variants, units = {}, {}
    for who, run in {alone: quiet, unlimited: beside(), limited: beside(limits=limits)}.items():
        together = Together(run)
        for what in ("", P99) if who == alone else ("", P99, noise):
            variants[who + what] = together.variant(what)
        units[who + P99] = "us"
        units[who + noise] = "MB/s"
    return Scenario(
        "noisy-neighbour", f"4 KiB random read, depth 1, by {count} guests beside a noisy one",
        "IOPS", variants,
        [Target("beside a limited one, at least 0.8 x alone", 0.8, lambda m: m[limited] / m[alone],
                smoke_bound=0.5),
         Target("beside a limited one, 99th percentile at most 2 x alone", 2,
                lambda m: m[limited + P99] / m[alone + P99], at_most=True, smoke_bound=4),
         Target("the limited one has at most 1.1 x its limit", 1.1,
                lambda m: m[limited + noise] * 1e6 / limit, at_most=True, smoke_bound=1.5)],
        units=units,
        note=f"The noisy guest writes 64 KiB at random, 32 in flight, no two alike; its limit is "
             f"{limit // MIB} MiB a second. What its load generator takes of the processors, which "
             f"is less when it is limited, is part of the figures.")


def boot_reads(bench, image):
    """A file that lists what a guest reads of `image` as it boots; recorded once, then kept."""
    kept = guests.cache_folder() / "bench" / f"{image.stem}-{image.stat().st_mtime_ns}.reads"
    if kept.exists():
        return kept
    overlay, log = bench.work / "boot.qcow2", bench.work / "boot.log"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", image, overlay)
    with served.QemuStorageDaemon.one(bench.work / "boot.sock", overlay, "qcow2", "--trace",
                                      f"enable=blk_co_preadv,file={log}") as server, \
            guests.UmlGuest("boot-trace", guests.VhostUserDisk(server.sockets[0]),
                            script="true") as guest:
        guest.run_to_end(timeout_s=600)
    reads = re.findall(r"blk_co_preadv .* offset (\d+) bytes (\d+)", log.read_text())
    if not reads:
        raise Unavailable("qemu-storage-daemon here does not trace what a guest reads")
    new = kept.with_suffix(".new")
    new.write_text("".join(f"{offset} {length}\n" for offset, length in reads))
    new.rename(kept)
    return kept


def boot_replay(bench):
    count = 10 if bench.small else 100
    image = bench.whole_image()
    name = numbered("boot-")

    def replay(server, sockets, cold_files):
        """Figures of all at once, with nothing of the files in memory, and then once more."""
        peers.sync_file_system(bench.work)
        for path in cold_files:
            peers.forget(path)
        reads = bench.once("reads", lambda: boot_reads(bench, image))
        before = served.process_figure(server.pid, "io", "read_bytes")
        options = ("--replay", reads, "--depth", 4)
        cold = served.load(bench.blkbench, sockets, *options)["seconds"]
        device = served.process_figure(server.pid, "io", "read_bytes") - before
        return {"cold": cold, "device bytes": device,
                "warm": served.load(bench.blkbench, sockets, *options)["seconds"]}

    def ours(number):
        def run():
            engine = bench.once("engine", lambda: bench.stack.enter_context(Engine(bench.build)))
            bench.once("store", lambda: (engine.run("init"),
                                         engine.run("image", "import", "base", image)))
            clones = [name() for _ in range(number)]
            with served.Ours(engine) as daemon:
                daemon.clone("base", *clones)
                sockets = [daemon.attach(clone) for clone in clones]
            # Another process, so that nothing is in the daemon's own memory either.
            with served.Ours(engine) as daemon:
                figures = replay(daemon, sockets, engine.store.rglob("*"))
                daemon.drop(*clones)
            return figures
        return run

    def qcow2(number):
        def run():
            folder = peers.fresh(bench.work / "overlays")
            paths = [folder / f"{each}.qcow2" for each in range(number)]
            for path in paths:
                peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", image, path)
            with served.QemuStorageDaemon.overlays([path.with_suffix(".sock") for path in paths],
                                                   image, paths) as server:
                return replay(server, server.sockets, [image])
        return run
    figures = {f"stellarium, {count} clones": ours(count), "stellarium, one clone": ours(1),
               f"{count} qcow2 overlays": qcow2(count), "one qcow2 overlay": qcow2(1)}
    variants, units = {}, {}
    for who, run in figures.items():
        together = Together(run)
        for what in ("cold", "warm", "device bytes"):
            variants[f"{who}, {what}"] = together.variant(what)
        units[f"{who}, device bytes"] = "bytes"
    many = f"stellarium, {count} clones"
    return Scenario(
        "boot-replay", "What a guest reads as it boots, by many guests at once", "s", variants,
        [Target("cold, no slower than qcow2 overlays of one base", 1,
                lambda m: m[many + ", cold"] / m[f"{count} qcow2 overlays, cold"], at_most=True),
         Target("device reads as those of one guest", 1.05,
                lambda m: m[many + ", device bytes"] / m["stellarium, one clone, device bytes"],
                at_most=True)],
        units=units,
        note="The reads of a User-mode Linux guest that boots from the image, recorded, in their "
             "order, 4 in flight for each guest. Cold: nothing of the store's or the images' files "
             "is in the page cache, and the server has just been started; warm: once more.")


def boot_prefetch(bench):
    count = 10 if bench.small else 100
    image = bench.whole_image()
    name = numbered("staged-")

    def reads():
        return bench.once("reads", lambda: boot_reads(bench, image))

    def store():
        """A store with the image and the manifest of one boot of it."""
        engine = bench.stack.enter_context(Engine(bench.build))
        engine.run("init")
        engine.run("image", "import", "base", image)
        with served.Ours(engine) as daemon:
            daemon.clone("base", "recorded")
            socket = daemon.attach("recorded")
            daemon.api.call("POST", "/v1/boots/recorded/recording", {})
            served.load(bench.blkbench, [socket], "--replay", reads(), "--depth", 4)
            daemon.api.call("DELETE", "/v1/boots/recorded/recording")
            daemon.drop("recorded")
        return engine

    def ours(number, staged):
        def run():
            engine = bench.once("staged store", store)
            clones = [name() for _ in range(number)]
            with served.Ours(engine, "--no-boot-prefetch") as daemon:
                daemon.clone("base", *clones)
                sockets = [daemon.attach(clone) for clone in clones]
            with served.Ours(engine, "--no-boot-prefetch") as daemon:
                peers.sync_file_system(bench.work)
                for path in engine.store.rglob("*"):
                    peers.forget(path)
                figures = {}
                if staged:
                    report, figures["prefetch"] = daemon.api.call("POST", "/v1/prefetch",
                                                                  {"source": clones[0]})
                    figures["staged bytes"] = report["staged_bytes"]
                options = ("--replay", reads(), "--depth", 4)
                figures["cold"] = served.load(bench.blkbench, sockets, *options)["seconds"]
                figures["warm"] = served.load(bench.blkbench, sockets, *options)["seconds"]
                daemon.drop(*clones)
            return figures
        return run

    def qcow2():
        folder = peers.fresh(bench.work / "overlays")
        paths = [folder / f"{each}.qcow2" for each in range(count)]
        for path in paths:
            peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", image, path)
        with served.QemuStorageDaemon.overlays([path.with_suffix(".sock") for path in paths], image,
                                               paths) as server:
            peers.sync_file_system(bench.work)
            peers.forget(image)
            return served.load(bench.blkbench, server.sockets, "--replay", reads(), "--depth",
                               4)["seconds"]

    def disk():
        """Reads as many bytes as a boot does, in sequence, of a file that is not in memory."""
        size_bytes = sum(int(line.split()[1]) for line in reads().read_text().splitlines())
        path = bench.random_file(max(MIB, size_bytes // MIB * MIB))
        peers.sync_file_system(bench.work)
        peers.forget(path)
        begin = time.monotonic()
        with open(path, "rb", buffering=0) as file:
            while file.read(MIB):
                pass
        return time.monotonic() - begin

    variants = {"the disk's own sequential read": disk, f"{count} qcow2 overlays, cold": qcow2}
    units = {}
    for number in (1, count):
        who = "one clone" if number == 1 else f"{count} clones"
        staged, plain = Together(ours(number, True)), Together(ours(number, False))
        variants[f"{who}, staged before"] = staged.variant("cold")
        variants[f"{who}, staged before, warm"] = staged.variant("warm")
        variants[f"{who}, not staged"] = plain.variant("cold")
        if number == 1:
            variants["prefetch"] = staged.variant("prefetch")
            variants["staged bytes"] = staged.variant("staged bytes")
            units["staged bytes"] = "bytes"
    return Scenario(
        "boot-prefetch", "What a guest reads as it boots, staged from its boot manifest", "s",
        variants,
        [Target("staged before it starts, no slower than warm", 1.15,
                lambda m: m["one clone, staged before"] / m["one clone, staged before, warm"],
                at_most=True),
         Target("many clones, beside qcow2 overlays of one base", 0.5,
                lambda m: m[f"{count} clones, staged before"] / m[f"{count} qcow2 overlays, cold"],
                at_most=True)],
        units=units,
        note="The reads of boot-replay, 4 in flight for each guest; nothing of the store's or the "
             "images' files is in the page cache at first, and the server has just been started. "
             "Staged before: `stellarctl prefetch` of one clone has returned when the guests "
             "start; what that took is the row 'prefetch', beside a sequential read of as many "
             "bytes as the guest asked for.")


def boot_guest(bench):
    """The whole of a boot, not only its reads: from the start of QEMU to the guest's multi-user."""
    image = bench.whole_image()
    name = numbered("guest-")

    def boot(engine, staged, record=False):
        """Seconds of one boot with nothing of the store in the page cache."""
        clone = name()
        with served.Ours(engine, "--no-boot-prefetch") as daemon:
            daemon.clone("base", clone)
            disk = guests.VhostUserDisk(daemon.attach(clone))
            if record:
                daemon.api.call("POST", f"/v1/boots/{clone}/recording", {})
            peers.sync_file_system(bench.work)
            for path in engine.store.rglob("*"):
                peers.forget(path)
            if staged:
                daemon.api.call("POST", "/v1/prefetch", {"source": clone})
            with guests.QemuGuest(clone, disk=disk, script="true",
                                  accel=guests.accelerator()) as guest:
                guest.wait_for(guests.BEGIN, timeout_s=600)
                seconds = guest.seconds()
                guest.run_to_end(timeout_s=600)
            daemon.api.close()  # The daemon has hung up if the boot took long; a call connects again.
            if record:
                daemon.api.call("DELETE", f"/v1/boots/{clone}/recording")
            daemon.drop(clone)
        return seconds

    def store():
        engine = bench.stack.enter_context(Engine(bench.build))
        engine.run("init")
        engine.run("image", "import", "base", image)
        boot(engine, staged=False, record=True)
        return engine

    def ours(staged):
        return lambda: boot(bench.once("guest's store", store), staged)

    def qcow2():
        overlay = bench.work / "guest.qcow2"
        overlay.unlink(missing_ok=True)
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", image, overlay)
        with served.QemuStorageDaemon.one(bench.work / "guest.sock", overlay, "qcow2") as server:
            peers.sync_file_system(bench.work)
            peers.forget(image)
            with guests.QemuGuest("peer", disk=guests.VhostUserDisk(server.sockets[0]),
                                  script="true", accel=guests.accelerator()) as guest:
                guest.wait_for(guests.BEGIN, timeout_s=600)
                seconds = guest.seconds()
                guest.run_to_end(timeout_s=600)
        return seconds
    return Scenario(
        "boot-guest", "Cold boot of a QEMU guest, from its start to multi-user", "s",
        {"staged before": ours(True), "not staged": ours(False), "qcow2 overlay": qcow2},
        [Target("staged before it starts, no slower than not staged", 1.05,
                lambda m: m["staged before"] / m["not staged"], at_most=True),
         Target("not staged, no slower than a qcow2 overlay", 1.05,
                lambda m: m["not staged"] / m["qcow2 overlay"], at_most=True)],
        note="Without hardware virtualisation most of a boot is the processor's time, and little of it "
             "waits for storage. Nothing of the store's or the image's files is in the page cache when "
             "the guest, or the prefetch before it, starts; the prefetch is not part of the time.")


def nbd(bench):
    """Ours beside qemu-nbd on a raw file, by fio's own NBD client."""
    disk_bytes = bench.disk_bytes()
    loads = {
        "4 KiB random read, depth 32": ("IOPS", "iops", ["--rw=randread", "--bs=4k",
                                                         "--iodepth=32"]),
        "1 MiB sequential read": ("MB/s", "bw_bytes", ["--rw=read", "--bs=1m", "--iodepth=4"]),
    }
    seconds = max(1, round(bench.seconds()))

    def fio(uri, key, options):
        text = peers.run("fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", "--readonly",
                         f"--size={disk_bytes}", "--time_based", f"--runtime={seconds}",
                         "--output-format=json", *options)
        value = json.loads(text[text.index("{"):])["jobs"][0]["read"][key]
        return value / 1e6 if key == "bw_bytes" else value

    def copied(uri):
        out = bench.work / "copied.raw"
        out.unlink(missing_ok=True)
        begin = time.monotonic()
        peers.run("nbdcopy", uri, out)
        return time.monotonic() - begin

    def both(uri):
        copied(uri)  # All of it is read, checked, and in memory.
        figures = {what: fio(uri, key, options) for what, (_unit, key, options) in loads.items()}
        figures["nbdcopy of all"] = copied(uri)
        return figures

    def ours():
        engine = bench.once("engine", lambda: bench.stack.enter_context(Engine(bench.build)))
        bench.once("store", lambda: (engine.run("init"), engine.run(
            "image", "import", "base", bench.random_file(disk_bytes))))
        with served.Ours(engine, "--nbd"):
            return both(f"nbd+unix:///base?socket={next(engine.runtime.glob('**/nbd.sock'))}")

    def qemu_nbd():
        socket = bench.work / "qemu-nbd.sock"
        socket.unlink(missing_ok=True)
        path = bench.random_file(disk_bytes)
        peers.run("qemu-nbd", "--version")
        peers.read_whole(path)
        with subprocess.Popen(["qemu-nbd", "-r", "-t", "-e", "8", "-f", "raw", "-x", "base", "-k",
                               str(socket), str(path)]) as server:
            try:
                deadline = time.monotonic() + 60
                while not socket.exists():
                    if server.poll() is not None or time.monotonic() > deadline:
                        raise peers.PeerError("qemu-nbd makes no socket")
                    time.sleep(0.01)
                return both(f"nbd+unix:///base?socket={socket}")
            finally:
                server.terminate()
    runs = {"stellarium": Together(ours), "qemu-nbd": Together(qemu_nbd)}
    units = {what: unit for what, (unit, _key, _options) in loads.items()} | {"nbdcopy of all": "s"}
    variants = {f"{who}, {what}": run.variant(what) for what in units for who, run in runs.items()}
    random_read_name, sequential_name = loads
    return Scenario(
        "nbd", "Reads by NBD, warm, beside qemu-nbd on a raw file", "IOPS", variants,
        [Target("random reads at least 1 x qemu-nbd", 1,
                lambda m: (m[f"stellarium, {random_read_name}"] / m[f"qemu-nbd, {random_read_name}"])),
         Target("sequential reads at least 1 x qemu-nbd", 1,
                lambda m: (m[f"stellarium, {sequential_name}"] / m[f"qemu-nbd, {sequential_name}"]))],
        units={f"{who}, {what}": unit for what, unit in units.items() for who in runs},
        note=f"fio's nbd engine, one connection, {seconds} s each; nbdcopy to a file, as it comes. "
             "Everything has been read once before.")


def vm_restore(bench):
    """Machines of `stellarctl vm` that count on their consoles; see test/system/vm/machines.py."""
    count = 3 if bench.small else 20
    memory_mib = 128
    pauses_mib = (256,) if bench.small else (256, 1024, 4096)
    plain, first, last = "plain start", f"{count} clones, median", f"{count} clones{P99}"

    def store():
        if os.geteuid() != 0 or not os.access("/dev/fuse", os.W_OK):
            raise Unavailable("files of a store are mounted by root, with /dev/fuse")
        engine = bench.stack.enter_context(machines.Machines(bench.build))
        engine.run("init")
        engine.start()
        engine.make_disk_image("disk")
        engine.run_counter("counter", "disk", memory_mib)
        engine.wait_for_count("counter", 20)
        before = engine.ctl("stats")["unique_bytes"]
        engine.ctl("vm", "snapshot", "counter", "first")
        between = engine.ctl("stats")["unique_bytes"]
        engine.wait_for_count("counter", engine.counts("counter")[-1] + 100)
        engine.ctl("vm", "snapshot", "counter", "second")
        engine.snapshot_bytes = (between - before, engine.ctl("stats")["unique_bytes"] - between)
        engine.run("vm", "stop", "counter", "--force")
        return engine

    def machines_store():
        return bench.once("machines", store)

    def outputs(folders, begin):
        """Seconds from `begin` to the first line of each console."""
        logs = {name: Path(folder, "console.log") for name, folder in folders.items()}
        seconds = {}
        while len(seconds) < len(logs):
            for name, log in logs.items():
                if name not in seconds and log.exists() and b"count" in log.read_bytes():
                    seconds[name] = time.monotonic() - begin
            if time.monotonic() - begin > machines.TIMEOUT_S:
                raise AssertionError(f"of {len(logs)} machines {len(seconds)} have said something")
            time.sleep(0.001)
        return sorted(seconds.values())

    name = numbered("machine-")

    def start():
        engine = machines_store()
        machine = name()
        root = engine.vm_root()
        begin = time.monotonic()
        process = engine.spawn("vm", "run", machine, "--image", "disk", "--memory",
                               f"{memory_mib}MiB", *engine.kernel_options(machines.COUNTER))
        seconds = outputs({machine: root / machine}, begin)[0]
        process.wait()
        engine.run("vm", "rm", machine, "--force")
        return seconds

    def restore():
        engine = machines_store()
        clones = [name() for _ in range(count)]
        root = engine.vm_root()
        begin = time.monotonic()
        process = engine.spawn("vm", "restore", "counter@second", *clones)
        seconds = outputs({each: root / each for each in clones}, begin)
        process.wait()
        time.sleep(1)  # The guests are idle for a second: what they write then is their own.
        private = [engine.private_ram_bytes(each) for each in clones]
        for each in clones:
            engine.run("vm", "rm", each, "--force")
        return {"median": statistics.median(seconds), "p99": seconds[math.ceil(0.99 * count) - 1],
                "private": max(private)}

    def pause(size_mib):
        def take():
            engine = machines_store()
            machine = name()
            engine.run_counter(machine, "disk", size_mib)
            engine.wait_for_count(machine, 20)
            engine.ctl("vm", "snapshot", machine, "first")
            engine.wait_for_count(machine, engine.counts(machine)[-1] + 20)
            answer = engine.ctl("vm", "snapshot", machine, "second")
            engine.run("vm", "rm", machine, "--force")
            return {"pause": answer["pause_ms"] * 1000, "total": answer["total_ms"] / 1000}
        return take

    restored = Together(restore)
    variants = {plain: start, first: restored.variant("median"), last: restored.variant("p99"),
                "private RAM of a clone, largest": restored.variant("private"),
                "first snapshot": lambda: machines_store().snapshot_bytes[0],
                "second snapshot": lambda: machines_store().snapshot_bytes[1]}
    units = {"private RAM of a clone, largest": "bytes", "first snapshot": "bytes",
             "second snapshot": "bytes"}
    for size_mib in pauses_mib:
        taken = Together(pause(size_mib))
        variants[f"pause, {size_mib} MiB"] = taken.variant("pause")
        variants[f"snapshot, {size_mib} MiB"] = taken.variant("total")
        units[f"pause, {size_mib} MiB"] = "us"
    return Scenario(
        "vm-restore", f"Machines that go on from a snapshot, {memory_mib} MiB of RAM", "s", variants,
        [Target("private RAM of an idle clone after a second, MiB", 2,
                lambda m: m["private RAM of a clone, largest"] / MIB, at_most=True),
         Target("bytes of a second snapshot, beside the first", 0.15,
                lambda m: m["second snapshot"] / m["first snapshot"], at_most=True),
         Target("pause with the largest RAM, beside the smallest", 3,
                lambda m: m[f"pause, {pauses_mib[-1]} MiB"] / m[f"pause, {pauses_mib[0]} MiB"],
                at_most=True)],
        units=units,
        note="From the command to the guest's next line on its console; the guest prints ten a second. "
             f"{count} clones are started by one command. Pauses and snapshots are those of a second "
             "snapshot two seconds after the first.")


def density(bench):
    wanted = 100 if bench.small else 10000
    image = bench.random_file(16 * MIB)
    each = "each clone, a fifth of them connected"
    attached, rate = "attached", "attached a second"
    threads, idle = "threads, beside those with one clone", "a processor while nothing is asked"
    idle_s = 2 if bench.small else 20

    def attach_all(daemon, names):
        """Sockets, as many as the daemon has descriptors for."""
        sockets = []
        for name in names:
            try:
                sockets.append(daemon.attach(name))
            except peers.LimitError:
                break
        return sockets

    def run():
        with Engine(bench.build) as engine:
            engine.run("init")
            engine.run("image", "import", "base", image)
            with served.Ours(engine) as daemon:
                names = [f"v{number}" for number in range(wanted)]
                daemon.clone("base", *names)
                sockets = [daemon.attach(names[0])]
                with served.Connected(bench.blkbench, daemon, sockets):
                    memory = served.process_figure(daemon.pid, "status", "RssAnon")
                    threads_before = served.process_figure(daemon.pid, "status", "Threads")
                begin = time.monotonic()
                sockets += attach_all(daemon, names[1:])
                seconds = time.monotonic() - begin
                with served.Connected(bench.blkbench, daemon, sockets[:len(sockets) // 5]):
                    grown = served.process_figure(daemon.pid, "status", "RssAnon") - memory
                    threads_now = served.process_figure(daemon.pid, "status", "Threads")
                begin = served.processor_seconds(daemon.pid)
                time.sleep(idle_s)
                used = served.processor_seconds(daemon.pid) - begin
                more = len(sockets) - 1
                return {each: grown / more, attached: len(sockets), rate: more / seconds,
                        threads: threads_now / threads_before, idle: 100 * used / idle_s}
    together = Together(run)
    return Scenario(
        "density", "Memory of the daemon for clones of one image, attached and listening", "bytes",
        {name: together.variant(name) for name in (each, attached, rate, threads, idle)},
        [Target("at most 8 KiB each beyond the first", 8 * KIB, lambda m: m[each], at_most=True,
                smoke_bound=16 * KIB),
         Target("no more threads than with one", 1, lambda m: m[threads], at_most=True),
         Target("idle, at most 1 % of a processor", 1, lambda m: m[idle], at_most=True)],
        units={attached: "volumes", threads: "ratio", rate: "/s", idle: "%"},
        note=f"RssAnon of the daemon, so without guests' memory, while the load generator keeps a "
             f"read in flight on each that is connected. Up to {wanted:,} are attached, as many as "
             f"the daemon may have descriptors for.")


# --- The engine's layers --------------------------------------------------------------------------


def layers(bench):
    """Rates of the inner loops."""
    names = {"memcpy": "memcpy", "cut": "Cut/block",
             "BLAKE3, single pages across lanes": "Hash/across_lanes/pages:1",
             "BLAKE3, 64 KiB across lanes": "Hash/across_lanes/pages:16"}

    def rates():
        text = peers.run(bench.build / "bench/nebula_micro_bench", "--benchmark_format=json",
                         f"--benchmark_filter=^({'|'.join(names.values())})$",
                         f"--benchmark_min_time={0.05 if bench.small else 0.5}")
        measured = {each["name"]: each for each in json.loads(text)["benchmarks"]}
        return {name: measured[benchmark]["bytes_per_second"] / 1e6
                for name, benchmark in names.items()}
    together = Together(rates)
    return Scenario(
        "layers", "Cutting and hashing beside copying, one core", "MB/s",
        {name: together.variant(name) for name in names})


def index(bench):
    """Probes of the index alone; of whole stores of several sizes, confirmed hits and memory."""
    counts = (100_000, 400_000) if bench.small else (1_000_000, 5_000_000, 20_000_000)
    probes, hits, memory = "batched probes", "confirmed hits, footers cached", "memory a chunk"

    def probe():
        text = peers.run(bench.build / "bench/nebula_micro_bench", "--benchmark_format=json",
                         "--benchmark_filter=Index/probe_batched/4096",
                         f"--benchmark_min_time={0.05 if bench.small else 0.5}")
        return json.loads(text)["benchmarks"][0]["items_per_second"] / 1e6

    def store(count):
        def run():
            folder = bench.work / "scale"
            report = json.loads(peers.run(bench.build / "bench/stellarium-store-scale", folder,
                                          count))
            shutil.rmtree(folder)
            return {hits: report["hits_per_second"] / 1e6, memory: report["index_bytes_per_chunk"]}
        return Together(run)
    variants, units = {probes: probe}, {}
    for count in counts:
        together = store(count)
        for what in (hits, memory):
            variants[f"{what}, {count:,} chunks"] = together.variant(what)
        units[f"{memory}, {count:,} chunks"] = "bytes"
    return Scenario(
        "index", "The index of chunks, one core", "M/s", variants,
        [Target("at least 20 M batched probes a second", 20, lambda m: m[probes], smoke_bound=10),
         Target("at least 3 M confirmed hits a second", 3,
                lambda m: min(m[f"{hits}, {count:,} chunks"] for count in counts),
                smoke_bound=2),
         Target("at most 12 bytes a chunk at every size", 12,
                lambda m: max(m[f"{memory}, {count:,} chunks"] for count in counts), at_most=True)],
        units=units)


SCENARIOS = {
    "import-new": import_new,
    "import-again": import_again,
    "export": export,
    "related-images": related_images,
    "clones": clones,
    "clone-bytes": clone_bytes,
    "single-clone": single_clone,
    "clone-scale": clone_scale,
    "random-read-1": lambda bench: random_read(bench, 1),
    "random-read-32": lambda bench: random_read(bench, 32),
    "random-write-fresh": lambda bench: random_write(bench, aged=False),
    "random-write-aged": lambda bench: random_write(bench, aged=True),
    "sequential-read": lambda bench: sequential(bench, "read"),
    "sequential-write-unique": lambda bench: sequential(bench, "write-unique"),
    "sequential-write-duplicate": lambda bench: sequential(bench, "write-duplicate"),
    "overwrite-bytes": overwrite_bytes,
    "device-bytes": device_bytes,
    "group-commit": group_commit,
    "noisy-neighbour": noisy_neighbour,
    "boot-replay": boot_replay,
    "boot-prefetch": boot_prefetch,
    "boot-guest": boot_guest,
    "nbd": nbd,
    "vm-restore": vm_restore,
    "density": density,
    "layers": layers,
    "index": index,
}

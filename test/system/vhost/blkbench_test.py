#!/usr/bin/env python3
"""Drives vhost_memdisk with stellarium-blkbench: every request is answered and what is read is what
was written; and what goes wrong is reported.

    blkbench_test.py STELLARIUM-BLKBENCH VHOST-MEMDISK
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

BENCH, MEMDISK = sys.argv[1:]


def check(condition, what):
    if not condition:
        sys.exit(f"failed: {what}")


def bench(*arguments):
    done = subprocess.run([BENCH, *map(str, arguments), "--json"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, timeout=100, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


with tempfile.TemporaryDirectory() as folder:
    disk = Path(folder) / "disk"
    sockets = [Path(folder) / name for name in ("one", "two")]
    with open(disk, "wb") as file:
        file.truncate(32 << 20)
    servers = []
    try:
        for socket, backing in zip(sockets, (["--file", disk], ["--size", "32MiB"])):
            servers.append(subprocess.Popen([MEMDISK, "--socket", socket, "--queues", "2", *backing],
                                            stdout=subprocess.PIPE))
            check(servers[-1].stdout.readline() == b"ready\n", "vhost_memdisk starts")

        code, report, errors = bench(*sockets, "--queues", 2, "--depth", 16, "--read-percent", 50,
                                     "--flush-every", 16, "--discard-every", 10, "--span", "4MiB",
                                     "--requests", 5000, "--verify", "--seed", 7)
        check(code == 0, f"the verified run passes: {errors}")
        check(report["errors"] == 0 and report["mismatches"] == 0, "nothing went wrong")
        total = sum(report[kind]["requests"] for kind in ("read", "write", "flush", "discard"))
        # Both sockets' requests, and the reads of the last check.
        check(total > 10000, f"{total} requests were counted")
        for kind in ("read", "write", "flush", "discard"):
            latency = report[kind]["latency_us"]
            check(report[kind]["requests"] > 0, f"there were {kind} requests")
            check(latency["p50"] <= latency["p99"] <= latency["max"], f"{kind} percentiles rise")
        check(report["write"]["bytes"] == 4096 * report["write"]["requests"], "bytes add up")

        for driven in (["--threads", 1], ["--threads", 1, "--spin"]):
            code, report, errors = bench(*sockets, *driven, "--queues", 2, "--depth", 4, "--span",
                                         "1MiB", "--read-percent", 50, "--requests", 1000,
                                         "--verify")
            check(code == 0, f"one thread drives both disks, {driven}: {errors}")
            check(report["read"]["requests"] + report["write"]["requests"] > 2000,
                  f"and makes the requests of both: {report}")

        code, report, errors = bench(sockets[0], "--pattern", "sequential", "--block-size", "64KiB",
                                     "--depth", 4, "--requests", 500)
        check(code == 0 and report["read"]["requests"] == 500, f"sequential reads: {errors}")

        def pages_after_writing(*options):
            code, _, errors = bench(sockets[0], "--pattern", "sequential", "--block-size", "64KiB",
                                    "--depth", 1, "--read-percent", 0, "--requests", 16, *options)
            check(code == 0, f"sequential writes: {errors}")
            written = disk.read_bytes()[:1 << 20]
            return {written[at:at + 4096] for at in range(0, len(written), 4096)}

        unique = pages_after_writing()
        check(len(unique) == 256, f"{len(unique)} of 256 pages are unlike any other")
        check(not unique & pages_after_writing(), "another run writes others")
        seeded = pages_after_writing("--seed", 5)
        check(seeded == pages_after_writing("--seed", 5), "and with the same seed the same")
        repeated = pages_after_writing("--content", "repeated")
        check(len(repeated) == 16, f"one block again and again has {len(repeated)} pages, not 16")

        reads = Path(folder) / "reads"
        reads.write_text("0 4096\n1048576 65536\n512 512\n")
        code, report, errors = bench(*sockets, "--replay", reads, "--depth", 2)
        check(code == 0, f"the list is read: {errors}")
        check(report["read"]["requests"] == 6 and report["read"]["bytes"] == 2 * 70144,
              f"all of it once from each disk: {report['read']}")
        reads.write_text("0 4096\n4096 100\n")
        code, _, errors = bench(sockets[0], "--replay", reads)
        check(code != 0 and "request 2" in errors, f"a length of no whole sectors: {errors}")
        reads.write_text(f"0 4096\n{32 << 20} 512\n")
        code, _, errors = bench(sockets[0], "--replay", reads)
        check(code != 0 and "ends before" in errors, f"a read beyond the disk: {errors}")

        code, _, errors = bench(sockets[0], "--span", "1GiB")
        check(code != 0 and "do not hold" in errors, "a span beyond the disk is refused")
        code, _, errors = bench(Path(folder) / "none")
        check(code != 0 and "none" in errors, "a missing socket is named")

        # A server that refuses writes.
        read_only = Path(folder) / "ro"
        servers.append(subprocess.Popen([MEMDISK, "--socket", read_only, "--file", disk,
                                         "--read-only"], stdout=subprocess.PIPE))
        check(servers[-1].stdout.readline() == b"ready\n", "vhost_memdisk starts")
        code, report, errors = bench(read_only, "--read-percent", 0, "--requests", 100)
        check(code == 1 and report["errors"] == 100, "refused writes are errors")
        check("ended with status 1" in errors, f"and the first is described: {errors}")
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait()

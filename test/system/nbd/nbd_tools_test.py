#!/usr/bin/env python3
"""NBD as its users see it: nbdinfo, nbdcopy, qemu-img, fio and a QEMU guest on the real daemon.

    nbd_tools_test.py BUILD-FOLDER

Everything runs in a daemon whose first forbidden system call would end it (--sandbox strict). What is
copied out is what was copied in, fio verifies what it wrote at depth 32 over several connections, and
whoever finds a volume in use is told by whom.
"""
import json
import os
import random
import socket
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guests"))
import guests  # noqa: E402
from engine import Engine  # noqa: E402

MIB = 1 << 20
CLONES = 10_000
TOOL_TIMEOUT_S = 600

GUEST_WORK = """
echo "size $(cat /sys/block/vda/size)"
echo "first $(dd if=/dev/vda bs=64k count=64 iflag=direct 2>/dev/null | sha256sum)"
dd if=/dev/vda of=/dev/vda bs=64k count=64 seek=512 iflag=direct oflag=direct conv=fsync 2>/dev/null || exit 3
blkdiscard -o 0 -l 1048576 /dev/vda || exit 4
sync
"""


def check(condition, text):
    if not condition:
        sys.exit(f"nbd_tools: {text}")


def run(*words, status=0):
    """Runs a tool; what it printed."""
    done = subprocess.run([str(word) for word in words], text=True, stdin=subprocess.DEVNULL,
                          capture_output=True, timeout=TOOL_TIMEOUT_S, check=False)
    failed = done.returncode != 0
    check(failed == (status != 0), f"{' '.join(map(str, words))} ended with {done.returncode}:\n"
                                   f"{done.stdout[-2000:]}{done.stderr}")
    return done.stdout + (done.stderr if failed else "")


class RawClient:
    """The few messages that no tool sends when it is told to."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(TOOL_TIMEOUT_S)
        self.socket.connect(str(path))
        check(self.take(18)[:8] == b"NBDMAGIC", "the greeting has its magic number")
        self.socket.sendall(struct.pack(">I", 3))

    def take(self, count):
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            check(more, "the server hung up")
            data += more
        return data

    def ask(self, option, payload=b""):
        """The answers to an option, as (type, payload)."""
        self.socket.sendall(b"IHAVEOPT" + struct.pack(">II", option, len(payload)) + payload)
        answers = []
        while not answers or answers[-1][0] not in (1,) and not answers[-1][0] >> 31:
            _magic, _option, kind, length = struct.unpack(">QIII", self.take(20))
            answers.append((kind, self.take(length)))
        return answers

    def names(self):
        return [payload[4:].decode() for kind, payload in self.ask(3) if kind == 2]

    def go(self, name):
        kind, text = self.ask(7, struct.pack(">I", len(name)) + name.encode() + b"\0\0")[-1]
        return "" if kind == 1 else text.decode()


def image_bytes():
    """Data, a hole, data, a hole, and an end that is no whole sector."""
    source = random.Random(7)
    return source.randbytes(24 * MIB) + bytes(40 * MIB) + source.randbytes(8 * MIB) + bytes(8 * MIB - 300)


def tools(engine, uri, nbd_socket):
    """What an image, a clone and a snapshot are to nbdinfo, nbdcopy and qemu-img."""
    content = image_bytes()
    size = (len(content) + 511) // 512 * 512
    padded = content + bytes(size - len(content))
    raw = engine.work / "image.raw"
    raw.write_bytes(content)
    engine.ctl("image", "import", "image", raw)
    engine.ctl("volume", "clone", "image", "vm-1")
    engine.ctl("snapshot", "create", "vm-1", "first")
    check(stat.S_IMODE(os.stat(nbd_socket).st_mode) == 0o600, "the socket is for its user alone")

    listed = json.loads(run("nbdinfo", "--list", "--json", uri("")))["exports"]
    check({each["export-name"]: each["is_read_only"] for each in listed} ==
          {"image": True, "vm-1": False, "vm-1@first": True}, f"nbdinfo --list says {listed}")
    for each in listed:
        check(each["export-size"] == size and each["can_multi_conn"] and
              each["contexts"] == ["base:allocation"], f"nbdinfo says {each}")
    check("--list" in RawClient(nbd_socket).go(""), "no name is answered with how to find names")
    check("nothing" in run("nbdinfo", uri("nothing"), status=1), "an unknown name is repeated")

    wanted = [(0, 24 * MIB, 0), (24 * MIB, 40 * MIB, 3), (64 * MIB, 8 * MIB, 0), (72 * MIB, size - 72 * MIB, 3)]
    for name in ("image", "vm-1", "vm-1@first"):
        found = [(each["offset"], each["length"], each["type"])
                 for each in json.loads(run("nbdinfo", "--map", "--json", uri(name)))]
        check(found == wanted, f"the map of {name} is {found}")

    out = engine.work / "out.raw"
    for name in ("image", "vm-1@first"):
        run("nbdcopy", "--connections=4", "--requests=32", uri(name), out)
        check(out.read_bytes() == padded, f"what nbdcopy got of {name} differs")
        out.unlink()
    engine.ctl("volume", "create", "copy", "--size", size)
    run("nbdcopy", "--connections=4", "--requests=32", "--flush", raw_of(engine, padded), uri("copy"))
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri("copy"), uri("image"))
    run("qemu-img", "convert", "-O", "qcow2", uri("copy"), engine.work / "out.qcow2")
    run("qemu-img", "compare", "-F", "raw", engine.work / "out.qcow2", uri("vm-1"))
    engine.ctl("volume", "create", "again", "--size", size)
    run("qemu-img", "convert", "-n", "-W", "-m", "8", "-O", "raw", engine.work / "out.qcow2", uri("again"))
    info = json.loads(run("qemu-img", "info", "--output=json", uri("again")))
    check(info["virtual-size"] == size, f"qemu-img info says {info}")
    for name in ("copy", "again"):
        engine.ctl("volume", "export", name, out)
        check(out.read_bytes() == padded, f"the export of {name} differs from what was copied in")
        data = engine.ctl("volume", "info", name)
        check(data["data_bytes"] <= 33 * MIB, f"the holes of {name} were written: {data}")
        out.unlink()


def raw_of(engine, padded):
    path = engine.work / "padded.raw"
    path.write_bytes(padded)
    return path


def verified(engine, uri):
    """fio writes and verifies at depth 32, with blocks of many sizes, by several connections."""
    engine.ctl("volume", "create", "fio", "--size", 96 * MIB)
    jobs = []
    for number, (mode, sizes) in enumerate((("randwrite", "4k"), ("randrw", "512-128k"), ("write", "1m"))):
        jobs += [f"--name=job{number}", f"--rw={mode}", f"--bsrange={sizes}-{sizes}" if "-" not in sizes
                 else f"--bsrange={sizes}", f"--offset={number * 32 * MIB}",
                 f"--size={32 * MIB}", f"--io_size={24 * MIB}"]
    text = run("fio", "--ioengine=nbd", f"--uri={uri('fio')}", "--iodepth=32", "--verify=crc32c",
               "--verify_fatal=1", "--verify_state_save=0", "--randseed=11", "--fsync=64", "--output-format=json", *jobs)
    for job in json.loads(text[text.index("{"):])["jobs"]:
        check(job["error"] == 0 and job["write"]["io_bytes"] >= 4 * MIB and job["read"]["io_bytes"] > 0,
              f"{job['jobname']} ended with error {job['error']}")


def in_use(engine, uri, nbd_socket):
    """Who has a volume is said to whoever else wants it."""
    attach = ["attach", "vm-1", "--vhost-user", str(engine.socket_path("vm-1"))]
    holder = RawClient(nbd_socket)
    check(holder.go("vm-1") == "", "a volume can be chosen")
    other = RawClient(nbd_socket)
    check(other.go("vm-1") == "", "and by another connection")
    for words in (attach, ["volume", "rm", "vm-1"], ["volume", "resize", "vm-1", "1MiB", "--shrink"],
                  ["snapshot", "rollback", "vm-1", "first"]):
        done = subprocess.run([str(engine.ctl_program), *words], text=True, capture_output=True,
                              stdin=subprocess.DEVNULL, env=engine.environment, check=False)
        check(done.returncode != 0 and "NBD" in done.stderr,
              f"{words} while it is in use said: {done.stdout}{done.stderr}")
    volume = next(each for each in engine.ctl("volume", "ls") if each["name"] == "vm-1")
    check("NBD" in json.dumps(volume), f"who has it is not shown: {volume}")
    holder.socket.close()
    other.socket.close()
    # The last one to leave takes it along, soon.
    deadline = time.monotonic() + TOOL_TIMEOUT_S
    while True:
        done = subprocess.run([str(engine.ctl_program), *attach], capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, env=engine.environment, check=False)
        if done.returncode == 0 or time.monotonic() > deadline:
            break
    check(done.returncode == 0, f"it stays attached: {done.stderr}")
    refused = run("nbdinfo", uri("vm-1"), status=1)
    check("vhost-user" in refused or "vhost-user" in RawClient(nbd_socket).go("vm-1"),
          f"who has it is not said: {refused}")
    engine.ctl("detach", "vm-1")
    check(RawClient(nbd_socket).go("vm-1") == "", "afterwards it can be chosen again")


def in_a_guest(engine, nbd_socket):
    """A guest's disk by NBD: size, direct I/O, flush, discard."""
    with guests.QemuGuest("nbd", disk=guests.NbdDisk(str(nbd_socket), "again"), script=GUEST_WORK,
                          in_initramfs=True) as guest:
        status, output = guest.run_to_end(TOOL_TIMEOUT_S)
    check(status == 0, f"the guest's script failed with {status}:\n{output}")
    out = engine.work / "guest.raw"
    engine.ctl("volume", "export", "again", out)
    content = out.read_bytes()
    out.unlink()
    wanted = image_bytes()
    check(f"size {len(content) // 512}" in output, f"the guest saw another size:\n{output}")
    check(content[:MIB] == bytes(MIB), "what the guest discarded is there")
    check(content[MIB:24 * MIB] == wanted[MIB:24 * MIB], "what the guest left alone has changed")
    check(content[32 * MIB:36 * MIB] == wanted[:4 * MIB], "what the guest wrote is not there")


def many(engine, nbd_socket):
    """A list of ten thousand."""
    engine.ctl("volume", "clone", "image", "clone-{n}", "--count", CLONES)
    names = RawClient(nbd_socket).names()
    check(len([name for name in names if name.startswith("clone-")]) == CLONES and "image" in names and
          "vm-1@first" in names and len(names) == len(set(names)), f"{len(names)} names were listed")
    check(RawClient(nbd_socket).go(f"clone-{CLONES // 2}") == "", "one of them can be chosen")


def metrics(engine):
    text = run("curl", "--silent", "--fail", "--unix-socket", control_socket(engine), "http://localhost/metrics")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("stellarium_nbd_"))
    for request in ("read", "write", "flush", "block_status"):
        check(float(values[f'stellarium_nbd_requests_total{{request="{request}"}}']) > 0,
              f"no {request} was counted: {values}")
    check(float(values['stellarium_nbd_bytes_total{request="read"}']) > 100 * MIB, f"bytes read: {values}")
    check(float(values["stellarium_nbd_connections_total"]) > 10, f"connections: {values}")


def control_socket(engine):
    return next(engine.runtime.rglob("control.sock"))


def main(build):
    with Engine(build) as engine:
        engine.run("init")
        nbd_socket = engine.work / "nbd.sock"
        engine.start_daemon("--nbd-socket", str(nbd_socket))

        def uri(name):
            return f"nbd+unix:///{name}?socket={nbd_socket}"

        tools(engine, uri, nbd_socket)
        verified(engine, uri)
        in_use(engine, uri, nbd_socket)
        in_a_guest(engine, nbd_socket)
        many(engine, nbd_socket)
        metrics(engine)
        # A client that just sits there does not hold a stop up.
        idle = RawClient(nbd_socket)
        check(idle.go("vm-1") == "", "a volume can be chosen")
        engine.stop_daemon()
        check(idle.socket.recv(1) == b"", "the connection is closed")
        check(not nbd_socket.exists(), "the socket is removed")
        # In the runtime directory, where only the switch is given.
        engine.start_daemon("--nbd")
        check(RawClient(next(engine.runtime.rglob("nbd.sock"))).go("image") == "", "--nbd serves")
        engine.stop_daemon()


if __name__ == "__main__":
    main(sys.argv[1])

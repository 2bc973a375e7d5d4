"""Machines of `stellarctl vm` that count on their consoles: for tests and the bench.

    with Machines(build_folder) as engine:                  # a mounted store, see mounted.py
        engine.start()
        engine.make_disk_image("disk")
        engine.run_counter("first", "disk", memory_mib=128)
        count = engine.wait_for_count("first", 3)

The guest is a kernel with an initramfs that prints "count N" ten times a second, N ever larger, and keeps
N in the first sector of its disk. One thread.
"""
import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuse"))
from mounted import MIB, Mounted, check  # noqa: E402,F401

import guests  # noqa: E402

TIMEOUT_S = 300
COUNT = re.compile(r"count (\d+)\s")

# /dev/vda keeps what the guest last counted, in one sector, written past the guest's cache.
COUNTER = r"""
i=0
while true; do
    i=$((i + 1))
    printf 'count %d\n' $i >/run/sector
    dd if=/run/sector of=/dev/vda bs=512 count=1 conv=sync oflag=direct 2>/dev/null
    echo "count $i "
    usleep 100000
done
"""


@contextmanager
def pinned(folder):
    """A short name of a folder: the address of a socket has room for 107 bytes."""
    descriptor = os.open(folder, os.O_PATH)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


class Machines(Mounted):
    def __init__(self, build):
        super().__init__(build)
        self.names = set()

    def make_disk_image(self, name, size_bytes=16 * MIB, content=b""):
        self.make_image(name, content + bytes(size_bytes - len(content)))

    def kernel_options(self, script):
        kernel, _version = guests.kernel("qemu")
        words = ["console=ttyS0", "panic=-1", "quiet", *guests.script_words(script, True)]
        return ["--kernel", kernel, "--initrd", guests.initramfs("qemu"), "--append", " ".join(words),
                "--accel", guests.accelerator()]

    def run_machine(self, name, image, script, memory_mib=128):
        self.names.add(name)
        return self.ctl("vm", "run", name, "--image", image, "--memory", f"{memory_mib}MiB",
                        *self.kernel_options(script))

    def run_counter(self, name, image, memory_mib=128):
        return self.run_machine(name, image, COUNTER, memory_mib)

    def restore(self, source, *names):
        self.names.update(names)
        return self.ctl("vm", "restore", source, *names)

    def vm_root(self):
        """Where the folders of machines are."""
        return next(self.runtime.glob("*/control.sock")).parent / "vm"

    def spawn(self, *words):
        """Starts stellarctl and does not wait."""
        return subprocess.Popen([str(self.ctl_program), *map(str, words)], env=self.environment,
                                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def qmp(self, name, *commands):
        """Gives a machine's QEMU commands without arguments, as another program might."""
        with socket.socket(socket.AF_UNIX) as client, \
                pinned(self.vm_root() / name) as folder:
            client.settimeout(TIMEOUT_S)
            client.connect(f"{folder}/qmp.sock")
            stream = client.makefile("rw")
            stream.readline()
            for command in ("qmp_capabilities", *commands):
                stream.write(json.dumps({"execute": command}) + "\n")
                stream.flush()
                while "return" not in json.loads(stream.readline()):
                    pass

    def machine(self, name):
        for each in self.ctl("vm", "ls")["machines"]:
            if each["name"] == name:
                return each
        raise AssertionError(f"stellarctl vm ls does not list {name}")

    def console(self, name):
        return self.run("vm", "logs", name).replace("\r", "")

    def counts(self, name):
        """All that the guest has printed so far, as numbers."""
        return [int(match) for match in COUNT.findall(self.console(name))]

    def wait_for_count(self, name, at_least, timeout_s=TIMEOUT_S):
        deadline = time.monotonic() + timeout_s
        while True:
            counts = self.counts(name)
            if counts and counts[-1] >= at_least:
                return counts[-1]
            if time.monotonic() > deadline:
                raise AssertionError(f"{name} has not counted to {at_least}; its console ends:\n"
                                     f"{self.console(name)[-2000:]}")
            time.sleep(0.1)

    def count_on_disk(self, volume):
        with open(self.files / "volumes" / volume, "rb") as file:
            match = COUNT.match(file.read(512).decode("ascii", "replace"))
        return int(match[1]) if match else 0

    def private_ram_bytes(self, name):
        """What this machine has of its RAM for itself: pages of the mapping that it has written."""
        machine = self.machine(name)
        size_kib = machine["memory_bytes"] // 1024
        total = 0
        mine = False
        for line in Path(f"/proc/{machine['pid']}/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                mine = "/volumes/" in line and "-base." in line
            elif mine and line.startswith(("Private_Dirty:", "Swap:")):
                total += int(line.split()[1]) * 1024
            elif mine and line.startswith("Size:"):
                check(int(line.split()[1]) <= size_kib, f"a mapping larger than the RAM: {line}")
        return total

    def shared_ram_bytes(self, name):
        """(Rss, Pss) of the mapping of its RAM."""
        rss = pss = 0
        mine = False
        for line in Path(f"/proc/{self.machine(name)['pid']}/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                mine = "-base." in line
            elif mine and line.startswith("Rss:"):
                rss += int(line.split()[1]) * 1024
            elif mine and line.startswith("Pss:"):
                pss += int(line.split()[1]) * 1024
        return rss, pss

    def __exit__(self, *details):
        for name in sorted(self.names):
            try:
                self.run("vm", "rm", name, "--force")
            except Exception:  # noqa: BLE001: it is gone, or the test has failed already.
                pass
        super().__exit__(*details)

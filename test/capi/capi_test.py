#!/usr/bin/env python3
"""The C interface with the real daemon: what a C program does through it, what it maps, and what stays
mapped when daemons and collections come and go under it; the library's symbols; the examples.

BUILD, DRIVER, LIBRARY, EXAMPLE_DISK and EXAMPLE_MAP_IMAGE say where the programs are.
"""
import os
import random
import subprocess
import sys
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[0] / "system" / "guests"))
from engine import Engine  # noqa: E402

MIB = 1 << 20
TIMEOUT_S = 240


def checksum(data):
    """FNV-1a of a few distinct pages would do for whole images; this is all of it."""
    total = 0xcbf29ce484222325
    for byte in data:
        total = (total ^ byte) * 0x100000001b3 & 0xffffffffffffffff
    return f"{total:016x}"


def run(*words):
    return subprocess.run([str(word) for word in words], text=True, capture_output=True,
                          stdin=subprocess.DEVNULL, timeout=TIMEOUT_S, check=False)


class Driver:
    """A process that embeds the library (driver.c)."""

    def __init__(self):
        self.process = subprocess.Popen([os.environ["DRIVER"]], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)

    def ask(self, *words):
        """Its answer, without the "ok"."""
        answer = self.say(*words)
        if not answer.startswith("ok"):
            raise AssertionError(f"{words}: {answer}")
        return answer[3:]

    def refused(self, *words):
        """The name of the error and its message."""
        answer = self.say(*words)
        if not answer.startswith("error "):
            raise AssertionError(f"{words} was not refused: {answer}")
        return answer.split(" ", 2)[1:]

    def say(self, *words):
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().rstrip("\n")
        if not answer:
            raise AssertionError(f"the driver died of {words} ({self.process.poll()})")
        return answer

    def kill(self):
        self.process.kill()
        self.process.communicate()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


class CInterface(unittest.TestCase):
    def setUp(self):
        self.engine = Engine(os.environ["BUILD"])
        self.addCleanup(self.engine.__exit__)
        # The library finds the daemon as commands do.
        self.enterContext_environment(self.engine.environment)
        self.engine.run("init")
        self.seed = int(os.environ.get("STELLARIUM_TEST_SEED", "1"))

    def enterContext_environment(self, environment):
        old = dict(os.environ)
        os.environ.update({key: environment[key]
                           for key in ("STELLARIUM_STORE", "STELLARIUM_RUNTIME_DIR")})
        self.addCleanup(lambda: (os.environ.clear(), os.environ.update(old)))

    @property
    def store(self):
        return self.engine.store

    def make_image(self, name, data):
        path = self.engine.work / f"{name}.raw"
        path.write_bytes(data)
        self.engine.run("image", "import", name, path)
        return path

    def stored_bytes(self):
        return self.engine.ctl("stats")["stored_bytes"]

    def test_volumes_through_the_daemon(self):
        self.make_image("image", random.Random(self.seed).randbytes(2 * MIB))
        self.engine.start_daemon("--nbd")
        with Driver() as driver:
            name, message = driver.refused("open", self.store)
            self.assertEqual(name, "busy")
            self.assertIn("held by a daemon: use stellarium_connect()", message)
            driver.ask("connect", self.store)
            driver.ask("create", "a", MIB)
            driver.ask("clone", "image", "b")
            driver.ask("disk", "a", 0)
            driver.ask("write", 4096, 8192, 7)
            driver.ask("discard", 8192, 4096)
            driver.ask("flush")
            driver.ask("prefetch")
            expected = bytearray(MIB)
            expected[4096:8192] = bytes([7]) * 4096
            self.assertEqual(driver.ask("sum", 0, MIB), checksum(expected))
            self.assertEqual(driver.ask("threads", 4), checksum(expected))
            self.assertEqual(driver.refused("sum", 0, MIB + 512)[0], "invalid_argument")
            with Driver() as other:
                other.ask("connect", self.store)
                self.engine.ctl("attach", "b", "--vhost-user", self.engine.socket_path("b"))
                name, message = other.refused("disk", "b", 0)
                self.assertEqual(name, "busy", message)
                self.assertEqual(other.refused("disk", "nothing", 0)[0], "not_found")
                self.engine.run("detach", "b")
            driver.ask("snapshot", "a", "s")
            self.assertEqual(driver.ask("list", 7), "image a b a@s")
            driver.ask("end")
            driver.ask("disk", "image", 0)
            self.assertEqual(driver.refused("write", 0, 512, 1)[0], "read_only")
            driver.ask("end")
            driver.ask("remove", "a@s")
            driver.ask("remove", "a")
            driver.ask("remove", "b")
            self.assertEqual(driver.ask("list", 7), "image")
            driver.ask("close")
        self.engine.stop_daemon()
        with Driver() as driver:
            self.assertEqual(driver.refused("connect", self.store)[0], "unavailable")
            driver.ask("open", self.store)
            driver.ask("close")

    def test_without_nbd_the_daemon_says_what_is_missing(self):
        self.engine.start_daemon()
        with Driver() as driver:
            driver.ask("connect", self.store)
            driver.ask("create", "a", MIB)
            name, message = driver.refused("disk", "a", 0)
            self.assertEqual(name, "unavailable")
            self.assertIn("--nbd", message)

    def test_a_mapping_survives_everything_but_its_owner(self):
        """Removal, collections, kill -9 of the daemon and its restart; then space comes back."""
        data = random.Random(self.seed).randbytes(2 * MIB)
        kept = random.Random(self.seed + 1).randbytes(12 * MIB)
        self.make_image("image", data)
        kept_file = self.make_image("kept", kept)
        self.engine.start_daemon()
        with Driver() as driver, Driver() as second:
            driver.ask("connect", self.store)
            name, message = driver.refused("map", "image", 0)
            self.assertEqual(name, "permission_denied")
            self.assertIn("stellarctl image set", message)
            self.engine.run("image", "set", "image", "--shareable", "yes")
            self.assertTrue(self.engine.ctl("image", "info", "image")["shareable"])
            first = driver.ask("map", "image", 0)
            self.assertEqual(first.split()[0], checksum(data))
            self.assertEqual(first.split()[1:4], [str(len(data)), str(len(data)), "0"])
            second.ask("connect", self.store)
            self.assertEqual(second.ask("map", "image", 0), first)

            self.engine.run("image", "rm", "image")
            self.engine.run("gc")
            self.assertEqual(driver.ask("mapped"), first)
            self.engine.kill_daemon()
            self.engine.start_daemon()
            self.engine.run("gc")
            self.assertEqual(driver.ask("mapped"), first)
            # Space is missed until the last one has unmapped it, or died.
            self.assertGreater(self.stored_bytes(), len(data) + len(kept))
            second.kill()
            self.engine.run("gc")
            self.assertEqual(driver.ask("mapped"), first)
            driver.ask("unmap")
            self.assertEqual(driver.refused("map", "image", 0)[0], "unavailable")
            self.assertEqual(driver.refused("map", "image", 0)[0], "not_found")
            self.engine.run("gc")
            self.assertLess(self.stored_bytes(), len(data) + len(kept))
        self.engine.stop_daemon()
        self.engine.run("fsck", "--data")
        back = self.engine.work / "back.raw"
        self.engine.run("image", "export", "kept", back)
        self.assertEqual(back.read_bytes(), kept_file.read_bytes())

    def test_what_all_map_is_in_memory_once(self):
        """The pages of a mapping are shared by those who map it: Pss, summed, stays what it was."""
        data = random.Random(self.seed).randbytes(8 * MIB)
        self.make_image("image", data)
        self.engine.start_daemon()
        self.engine.run("image", "set", "image", "--shareable", "yes")
        drivers = [Driver() for _ in range(3)]
        try:
            sums = []
            for count, driver in enumerate(drivers, 1):
                driver.ask("connect", self.store)
                driver.ask("map", "image", 0)
                sums.append(sum(self.pss_of_segments(each) for each in drivers[:count]))
        finally:
            for driver in drivers:
                driver.kill()
        self.assertGreaterEqual(sums[0], len(data))
        for more in sums[1:]:
            self.assertLessEqual(more, sums[0] * 1.05, sums)

    @staticmethod
    def pss_of_segments(driver):
        total = 0
        counting = False
        for line in Path(f"/proc/{driver.process.pid}/smaps").read_text().splitlines():
            if "-" in line.split(" ")[0] and ":" not in line.split(" ")[0]:
                counting = line.endswith(".seg")
            elif counting and line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
        return total

    def test_sharing_statistics(self):
        """What is in memory is found, and who shares it; what memory has let go is not."""
        size = 16 * MIB
        self.make_image("image", random.Random(self.seed).randbytes(size))
        self.engine.run("volume", "clone", "image", "clone")
        with Driver() as driver:
            driver.ask("open", self.store)
            driver.ask("create", "own", MIB)
            driver.ask("disk", "own", 0)
            driver.ask("write", 0, 4096, 9)
            driver.ask("end")
            driver.ask("close")
        self.engine.start_daemon("--nbd")
        for path in (self.store / "segments").iterdir():
            with open(path, "rb") as segment:
                os.fsync(segment.fileno())
                os.posix_fadvise(segment.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        # Nodes are read for it, and read-ahead brings their neighbours.
        self.assertLess(self.sharing()[1]["image"][1], size // 2)
        with Driver() as driver:
            driver.ask("connect", self.store)
            for name in ("clone", "own"):
                driver.ask("disk", name, 1)
                driver.ask("prefetch")
                driver.ask("end")
            driver.ask("close")
        total, counts = self.sharing()
        self.assertEqual(counts, {"image": (size, size, size, 0), "clone": (size, size, size, 0),
                                  "own": (4096, 4096, 0, 4096)})
        self.assertEqual(total, size + 4096)
        self.assertIn("PRIVATE", self.engine.run("stats", "--sharing"))

    def sharing(self):
        """Resident bytes of all; by name: stored, resident, shared and private bytes."""
        report = self.engine.ctl("stats", "--sharing")
        self.assertTrue(report["complete"])
        keys = ("stored_bytes", "resident_bytes", "shared_bytes", "private_bytes")
        return report["resident_bytes"], {each["name"]: tuple(each[key] for key in keys)
                                          for each in report["entities"]}

    def test_symbols(self):
        """Exactly the functions of the list are exported, and each is declared in the header."""
        listed = (HERE / "symbols.txt").read_text().split()
        done = run("nm", "-D", "--defined-only", "--format=posix", os.environ["LIBRARY"])
        self.assertEqual(done.returncode, 0, done.stderr)
        exported = sorted(line.split()[0].split("@")[0] for line in done.stdout.splitlines()
                          if line.split()[1] != "A")
        self.assertEqual(exported, sorted(listed))
        header = (HERE.parents[1] / "include" / "stellarium.h").read_text()
        for name in listed:
            self.assertIn(f"{name}(", header)

    def test_examples(self):
        data = random.Random(self.seed).randbytes(MIB)
        self.make_image("image", data)
        for served in (False, True):
            if served:
                self.engine.start_daemon("--nbd")
                self.engine.run("image", "set", "image", "--shareable", "yes")
            done = run(os.environ["EXAMPLE_DISK"], self.store)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertIn("example-vm, 1048576 bytes, of example", done.stdout)
            done = run(os.environ["EXAMPLE_MAP_IMAGE"], self.store, "image")
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertEqual(done.stdout, f"{checksum(data)} 1048576 bytes, 1048576 of them shared, "
                                          "0 gathered\n")
        done = run(os.environ["EXAMPLE_MAP_IMAGE"], self.store, "nothing")
        self.assertEqual(done.returncode, 1)
        self.assertIn("nothing", done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=1)

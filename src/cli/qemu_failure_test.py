#!/usr/bin/env python3
"""What an import does when qemu's tools fail: they print nonsense, die, hang or lie. Each time there
is an error that says what happened, no image, and no tool left behind."""
import os
import signal
import stat
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "testing"))
from harness import TIMEOUT_S, TestCase, main  # noqa: E402

FAKE_NBD = Path(__file__).parent / "testing" / "fake_nbd.py"
# What a file must begin with to be taken for qcow2.
QCOW2 = b"QFI\xfb" + struct.pack(">I", 3) + bytes(1000)
GOOD_INFO = """echo '{"format": "qcow2", "virtual-size": 4194304}'"""


class QemuFailures(TestCase):
    def setUp(self):
        super().setUp()
        self.made = self.store()
        self.tools = self.made.folder / "tools"
        self.tools.mkdir()
        self.image = self.made.folder / "x.qcow2"
        self.image.write_bytes(QCOW2)
        self.made.environment["PATH"] = f"{self.tools}:{os.environ['PATH']}"
        self.tool("qemu-nbd", f"exec {sys.executable} {FAKE_NBD}")

    def tool(self, name, script):
        path = self.tools / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def qemu_img(self, info=GOOD_INFO, check="true"):
        self.tool("qemu-img", f'case "$1" in\ninfo) {info} ;;\ncheck) {check} ;;\nesac')

    def start(self, mode="well"):
        self.made.environment["FAKE_NBD"] = mode
        return self.made.start("image", "import", "x", self.image)

    def run_import(self, mode="well"):
        process = self.start(mode)
        _, stderr = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, stderr.decode(errors="replace")

    def assert_refused(self, what, *texts, mode="well"):
        code, said = self.run_import(mode)
        self.assertNotEqual(code, 0, what)
        self.assertGreater(code, 0, f"{what}: {said}")
        self.assertTrue(said.strip(), f"{what}: says nothing")
        self.assertLess(len(said), 4000, f"{what}: says too much")
        for text in texts:
            self.assertIn(text, said, what)
        self.assertEqual(self.made.json("image", "ls"), [], what)

    def test_the_fakes_are_good_when_they_are_told_to_be(self):
        self.qemu_img()
        self.assertEqual(self.run_import()[0], 0)
        exported = self.made.folder / "out"
        self.made.ok("image", "export", "x", exported)
        expected = b"".join(struct.pack("<Q", page + 1) * 512 for page in range(1024))
        self.assertEqual(exported.read_bytes(), expected)

    def test_information_that_is_none(self):
        for what, info in {
                "nothing": "true",
                "no JSON": "echo hello",
                "half of it": """echo '{"format": "qc'""",
                "a list": "echo '[]'",
                "binary": "head -c 100000 /dev/urandom",
                "nested without end": "head -c 200000 /dev/zero | tr '\\0' '['",
                "output without end": "yes x",
                "a failure": "echo 'no such thing' >&2; exit 1",
                "a failure without a word": "exit 3",
                "a long complaint": "head -c 1000000 /dev/zero | tr '\\0' 'x' >&2; exit 1",
                "a death": "kill -9 $$",
        }.items():
            self.qemu_img(info=info)
            self.assert_refused(what)
        self.qemu_img(info="echo 'no such thing' >&2; exit 1")
        self.assert_refused("its words are passed on", "no such thing")

    def test_a_check_that_fails(self):
        for what, check in {
                "errors": "echo 'ERROR cluster 5' >&2; exit 2",
                "leaks and errors": "exit 2",
                "it cannot be done": "exit 1",
                "a death": "kill -9 $$",
        }.items():
            self.qemu_img(check=check)
            self.assert_refused(what, "damaged or cut off")

    def test_a_server_that_fails(self):
        self.qemu_img()
        for mode in ("eio", "close", "garbage", "handle", "refuse", "nothing"):
            self.assert_refused(mode, mode=mode)
        self.assert_refused("die", "the image is on fire", mode="die")
        self.tool("qemu-nbd", "exit 0")
        self.assert_refused("it is gone at once")
        self.tool("qemu-nbd", "kill -9 $$")
        self.assert_refused("it is killed at once")

    def test_extents_behind_the_end_are_cut(self):
        self.qemu_img()
        self.assertEqual(self.run_import("beyond")[0], 0)
        self.assertEqual(self.made.json("image", "ls")[0]["size_bytes"], 4 << 20)

    def test_what_hangs_can_be_interrupted(self):
        mark = self.made.folder / "hangs"
        hang = f"echo $$ > {mark}; exec sleep 1000"
        for what, img, nbd, mode in (
                ("information", {"info": hang}, None, "well"),
                ("a check", {"check": hang}, None, "well"),
                ("a server that never answers", {}, f"echo $$ > {mark}; exec {sys.executable} "
                                                    f"{FAKE_NBD}", "silent"),
                ("a server that stops within an answer", {},
                 f"echo $$ > {mark}; exec {sys.executable} {FAKE_NBD}", "short")):
            mark.unlink(missing_ok=True)
            self.qemu_img(**img)
            if nbd:
                self.tool("qemu-nbd", nbd)
            process = self.start(mode)
            end = time.monotonic() + TIMEOUT_S
            while not (mark.exists() and mark.read_text().strip()):
                self.assertIsNone(process.poll(), what)
                self.assertLess(time.monotonic(), end, what)
                os.sched_yield()
            tool = int(mark.read_text())
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=TIMEOUT_S)
            self.assertNotEqual(process.returncode, 0, what)
            self.assertIn(b"interrupted", said, what)
            # It was killed, or sees that nobody listens any more.
            while os.path.exists(f"/proc/{tool}"):
                self.assertLess(time.monotonic(), end, f"{what}: the tool is still there")
                os.sched_yield()
            self.assertEqual(self.made.json("image", "ls"), [], what)


if __name__ == "__main__":
    main()

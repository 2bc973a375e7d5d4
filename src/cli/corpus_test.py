#!/usr/bin/env python3
"""What goes in comes out: import and export of raw and qcow2 images, byte for byte, holes as holes,
directly and through a daemon; what is refused, and how."""
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "testing"))
from harness import EXIT, TestCase, data_extents, first_difference, main  # noqa: E402

TIB = 1 << 40
MIB = 1 << 20


def need_qemu(test):
    for tool in ("qemu-img", "qemu-nbd", "qemu-io"):
        if shutil.which(tool) is None:
            test.skipTest(f"{tool} is not installed")


def tool(*words):
    subprocess.run([*map(str, words)], check=True, capture_output=True, text=True)


def write_sparse(path, size, pieces):
    with open(path, "wb") as file:
        file.truncate(size)
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)


def corpus(folder, rng):
    """Raw images by name."""
    made = {}
    def add(name, size, pieces=()):
        path = folder / f"{name}.raw"
        write_sparse(path, size, pieces)
        made[name] = path
    for size in (0, 1, 511, 512, 513, 4095, 4096, 4097, 65536, MIB + 1):
        add(f"random-{size}", size, [(0, rng.randbytes(size))])
    add("only-hole", 64 * MIB + 77)
    add("written-zeros", 8 * MIB, [(0, bytes(8 * MIB))])
    add("sparse", 1 << 30, [(0, rng.randbytes(5000)), (123_456_789, rng.randbytes(300_000)),
                            ((1 << 30) - 1, b"x")])
    add("mixed", 20 * MIB + 3, [(MIB, rng.randbytes(3 * MIB)), (5 * MIB, bytes(2 * MIB)),
                                (8 * MIB + 100, rng.randbytes(MIB)), (20 * MIB, b"end")])
    return made


class RoundTrip(TestCase):
    def check(self, store, name, source, expected=None, **options):
        """Imports `source` and compares what is exported with `expected`."""
        expected = expected or source
        exported = store.folder / f"{name}.out"
        store.ok("image", "import", name, source, **options)
        answer = store.json("image", "export", name, exported)
        self.assertIsNone(first_difference(expected, exported), name)
        self.assertEqual(answer["size_bytes"], os.path.getsize(expected))
        # Holes stay holes: what is written is what was data, in whole pages.
        wanted = sum(end - start for start, end in data_extents(expected))
        self.assertLessEqual(answer["data_bytes"], wanted + 8192 * 4)
        exported.unlink()

    def test_raw(self):
        for daemon in (False, True):
            s = self.store(daemon=daemon)
            for name, path in corpus(s.folder, random.Random(17)).items():
                with self.subTest(name=name, daemon=daemon):
                    self.check(s, name, path)

    def test_raw_15_tib(self):
        for daemon in (False, True):
            s = self.store(daemon=daemon)
            rng = random.Random(19)
            source = s.folder / "huge.raw"
            try:
                write_sparse(source, 15 * TIB, [(0, rng.randbytes(MIB)),
                                                (7 * TIB + 12345, rng.randbytes(100_000)),
                                                (15 * TIB - 4097, rng.randbytes(4097))])
            except OSError as error:
                self.skipTest(f"this file system cannot hold a file of 15 TiB: {error}")
            self.check(s, "huge", source)

    def test_standard_input_and_output(self):
        for daemon in (False, True):
            s = self.store(daemon=daemon)
            content = random.Random(23).randbytes(3 * MIB + 77) + bytes(5 * MIB) + b"tail"
            s.ok("image", "import", "piped", "-", data=content)
            self.assertEqual(s.ok("image", "export", "piped", "-").raw, content)
            # A redirected file keeps its holes.
            write_sparse(s.folder / "x.raw", 1 << 38, [(1 << 37, b"middle")])
            with open(s.folder / "x.raw", "rb") as file:
                s.ok("image", "import", "redirected", "-", stdin=file)
            s.ok("image", "export", "redirected", "y.raw")
            self.assertIsNone(first_difference(s.folder / "x.raw", s.folder / "y.raw"))
            s.ok("image", "import", "nothing", "-", "--allow-empty", data=b"")
            self.assertEqual(s.ok("image", "export", "nothing", "-").raw, b"")

    def test_volumes_and_snapshots(self):
        s = self.store()
        source = s.folder / "x.raw"
        write_sparse(source, 10 * MIB, [(4096, random.Random(5).randbytes(MIB))])
        s.ok("image", "import", "x", source)
        s.ok("volume", "clone", "x", "v")
        s.ok("snapshot", "create", "v", "s")
        s.ok("volume", "export", "v", "v.raw")
        s.ok("volume", "export", "v@s", "s.raw")
        self.assertIsNone(first_difference(source, s.folder / "v.raw"))
        self.assertIsNone(first_difference(source, s.folder / "s.raw"))

    def test_other_formats(self):
        need_qemu(self)
        for daemon in (False, True):
            s = self.store(daemon=daemon)
            rng = random.Random(29)
            raw = s.folder / "disk.raw"
            write_sparse(raw, 64 * MIB, [(0, rng.randbytes(70_000)), (MIB, bytes(MIB)),
                                         (40 * MIB + 512, rng.randbytes(2 * MIB)),
                                         (64 * MIB - 512, rng.randbytes(512))])
            for number, (form, options) in enumerate([
                    ("qcow2", ""), ("qcow2", "compat=0.10"), ("qcow2", "cluster_size=2M"),
                    ("qcow2", "extended_l2=on,cluster_size=128k"), ("vmdk", ""), ("vhdx", ""),
                    ("vdi", "")]):
                with self.subTest(format=form, options=options, daemon=daemon):
                    # The name says something else than the content.
                    image = s.folder / f"image-{number}.img"
                    tool("qemu-img", "convert", "-O", form, *(["-o", options] if options else []),
                         raw, image)
                    self.check(s, f"{form}-{number}", image, raw)
                    self.assertEqual(s.json("image", "import", f"again-{number}", image)["format"],
                                     form)
            compressed = s.folder / "compressed.img"
            tool("qemu-img", "convert", "-c", "-O", "qcow2", raw, compressed)
            self.check(s, "compressed", compressed, raw)

    def test_corpus_as_qcow2(self):
        need_qemu(self)
        for daemon in (False, True):
            s = self.store(daemon=daemon)
            for name, path in corpus(s.folder, random.Random(31)).items():
                if os.path.getsize(path) % 512 != 0:
                    continue  # qcow2 has whole sectors; what is longer is another disk.
                with self.subTest(name=name, daemon=daemon):
                    image = s.folder / f"{name}.qcow2"
                    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", path, image)
                    self.check(s, name, image, path)

    def test_qcow2_64_tib(self):
        need_qemu(self)
        for daemon in (False, True):
            s = self.store(daemon=daemon)
            size = 64 * TIB
            for name, last in (("one", 0x22), ("same", 0x22), ("other", 0x33)):
                image = s.folder / f"{name}.qcow2"
                tool("qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=2M", image, size)
                tool("qemu-io", "-f", "qcow2", "-c", "write -P 0x11 0 1M",
                     "-c", f"write -P {last} {size - MIB} 1M", image)
                imported = s.json("image", "import", name, image)
                self.assertEqual(imported["size_bytes"], size)
                # A cluster holds more than was written, and zeros cost nothing.
                self.assertEqual(s.json("image", "info", name)["data_bytes"], 2 * MIB)
            self.assertEqual(s.json("volume", "diff", "one", "same")["ranges"], [])
            self.assertEqual(s.json("volume", "diff", "one", "other")["ranges"],
                             [{"offset_bytes": size - MIB, "length_bytes": MIB}])
            s.ok("volume", "create", "empty", "--size", "64TiB")
            self.assertEqual(s.json("volume", "diff", "empty", "one")["ranges"],
                             [{"offset_bytes": 0, "length_bytes": MIB},
                              {"offset_bytes": size - MIB, "length_bytes": MIB}])
            # More than a file of this file system can hold is told at once.
            done = s.limited("image", "export", "one", "huge.raw", file_bytes=1 << 40)
            self.assert_fails(done, "limit_exceeded", "cannot hold a file of 64.0 TiB")
            self.assertEqual([p.name for p in s.folder.iterdir() if "huge" in p.name], [])

    def test_references_to_other_files(self):
        need_qemu(self)
        s = self.store()
        rng = random.Random(37)
        write_sparse(s.folder / "base.raw", 4 * MIB, [(0, rng.randbytes(MIB))])
        tool("qemu-img", "create", "-f", "qcow2", "-b", s.folder / "base.raw", "-F", "raw",
             s.folder / "overlay.qcow2")
        tool("qemu-io", "-f", "qcow2", "-c", "write -P 0x44 2M 4k", s.folder / "overlay.qcow2")
        self.assert_fails(s.run("image", "import", "x", "overlay.qcow2"), "invalid_argument",
                          "base.raw", "--allow-backing")
        tool("qemu-img", "convert", "-O", "raw", s.folder / "overlay.qcow2", s.folder / "flat.raw")
        s.ok("image", "import", "x", "overlay.qcow2", "--allow-backing")
        s.ok("image", "export", "x", "x.raw")
        self.assertIsNone(first_difference(s.folder / "flat.raw", s.folder / "x.raw"))
        # A file of data elsewhere.
        tool("qemu-img", "create", "-f", "qcow2", "-o",
             f"data_file={s.folder / 'data.bin'},data_file_raw=on", s.folder / "external.qcow2", "1M")
        self.assert_fails(s.run("image", "import", "y", "external.qcow2"), "invalid_argument",
                          "data.bin", "--allow-backing")
        # A split vmdk.
        tool("qemu-img", "convert", "-O", "vmdk", "-o", "subformat=monolithicFlat",
             s.folder / "base.raw", s.folder / "flat.vmdk")
        self.assert_fails(s.run("image", "import", "z", "flat.vmdk"), "invalid_argument",
                          "flat-flat.vmdk", "--allow-backing")
        s.ok("image", "import", "z", "flat.vmdk", "--allow-backing")
        s.ok("image", "export", "z", "z.raw")
        self.assertIsNone(first_difference(s.folder / "base.raw", s.folder / "z.raw"))
        # Somebody else's raw disk that looks like a qcow2.
        shutil.copy(s.folder / "overlay.qcow2", s.folder / "guest.raw")
        s.ok("image", "import", "as-is", "guest.raw", "--format", "raw")
        s.ok("image", "export", "as-is", "as-is.raw")
        self.assertIsNone(first_difference(s.folder / "guest.raw", s.folder / "as-is.raw"))
        # qemu would take these names for something else than files.
        for odd in ("nbd:x", "json:{}", "a,b.qcow2"):
            shutil.copy(s.folder / "flat.raw", s.folder / "plain.raw")
            tool("qemu-img", "convert", "-O", "qcow2", s.folder / "plain.raw", s.folder / "tmp.qcow2")
            os.rename(s.folder / "tmp.qcow2", s.folder / odd)
            s.ok("image", "import", f"odd-{len(odd)}", odd)

    def test_damaged_images(self):
        need_qemu(self)
        s = self.store()
        write_sparse(s.folder / "x.raw", 4 * MIB, [(0, random.Random(2).randbytes(2 * MIB))])
        tool("qemu-img", "convert", "-O", "qcow2", s.folder / "x.raw", s.folder / "x.qcow2")
        whole = (s.folder / "x.qcow2").read_bytes()
        # qemu alone would read what was cut off as zeros.
        for length in (60, 5000, 300_000, len(whole) - 100_000):
            (s.folder / "cut.qcow2").write_bytes(whole[:length])
            self.assert_fails(s.run("image", "import", f"cut-{length}", "cut.qcow2"),
                              "invalid_argument", "cut.qcow2")
        # A pointer to data is wrong; the check's own words are passed on.
        broken = bytearray(whole)
        table = int.from_bytes(whole[40:48], "big")
        broken[table:table + 8] = (0x8000_0000_0000_0000 | 7 << 40).to_bytes(8, "big")
        (s.folder / "broken.qcow2").write_bytes(broken)
        self.assert_fails(s.run("image", "import", "b", "broken.qcow2"), "invalid_argument",
                          "broken.qcow2 is damaged or cut off", "qemu-img check")
        self.assertEqual(s.json("image", "ls"), [])
        # Clusters that nobody uses, as after a crash of a VMM, harm nothing.
        (s.folder / "whole.qcow2").write_bytes(whole)
        s.ok("image", "import", "whole", "whole.qcow2")

    def test_missing_tools(self):
        s = self.store()
        (s.folder / "x.qcow2").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(1000))
        environment = {**s.environment, "PATH": "/nonexistent"}
        self.assert_fails(s.run("image", "import", "x", "x.qcow2", env=environment), "unavailable",
                          "qemu-utils")


class ExportTargets(TestCase):
    def setUp(self):
        self.s = self.store()
        write_sparse(self.s.folder / "x.raw", 10 * MIB, [(0, random.Random(1).randbytes(5 * MIB))])
        self.s.ok("image", "import", "x", "x.raw")

    def left_over(self):
        return [path.name for path in self.s.folder.iterdir() if ".stellarium-" in path.name]

    def test_an_existing_file_is_kept(self):
        out = self.s.folder / "out.raw"
        out.write_text("precious")
        self.assert_fails(self.s.run("image", "export", "x", "out.raw"), "already_exists", "--force")
        self.assertEqual(out.read_text(), "precious")
        self.s.ok("image", "export", "x", "out.raw", "--force")
        self.assertIsNone(first_difference(self.s.folder / "x.raw", out))
        self.assertEqual(self.left_over(), [])

    def test_a_link_is_followed(self):
        (self.s.folder / "real.raw").write_text("old")
        os.symlink("real.raw", self.s.folder / "link.raw")
        self.s.ok("image", "export", "x", "link.raw", "--force")
        self.assertTrue((self.s.folder / "link.raw").is_symlink())
        self.assertIsNone(first_difference(self.s.folder / "x.raw", self.s.folder / "real.raw"))

    def test_places_that_cannot_hold_it(self):
        self.assert_fails(self.s.run("image", "export", "x", "."), "invalid_argument", "directory")
        self.assert_fails(self.s.limited("image", "export", "x", "out.raw", file_bytes=MIB),
                          "limit_exceeded", "cannot hold")
        self.assertEqual(self.left_over(), [])
        self.assertFalse((self.s.folder / "out.raw").exists())

    def test_no_space_is_told_at_once(self):
        if os.geteuid() != 0:
            self.skipTest("a small file system needs root to mount it")
        small = self.s.folder / "small"
        small.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)],
                          capture_output=True, check=False).returncode != 0:
            self.skipTest("this system lets nobody mount a tmpfs")
        try:
            done = self.s.run("image", "export", "x", "small/out.raw")
            self.assert_fails(done, "no_space", "needs 5.00 MiB", "are free")
            self.assertEqual(os.listdir(small), [])
        finally:
            subprocess.run(["umount", str(small)], check=True)

    def test_an_interrupted_export_leaves_nothing(self):
        # Large enough to be caught while it is being written.
        write_sparse(self.s.folder / "y.raw", 64 * MIB, [(0, random.Random(2).randbytes(48 * MIB))])
        self.s.ok("image", "import", "y", "y.raw")
        (self.s.folder / "old.raw").write_text("precious")
        for name, force in (("new.raw", ()), ("old.raw", ("--force",))):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
                code = self.interrupt_export(name, force, number)
                self.assertEqual(code, -number if number == signal.SIGKILL else EXIT["cancelled"])
                self.assertEqual(self.left_over(), [])
                self.assertFalse((self.s.folder / "new.raw").exists())
                self.assertEqual((self.s.folder / "old.raw").read_text(), "precious")

    def interrupt_export(self, name, force, number):
        """Sends a signal while the export has written some of the file; its exit code."""
        for _ in range(100):
            process = self.s.start("image", "export", "y", name, *force)
            while process.poll() is None and not self.is_writing(process.pid):
                pass
            process.send_signal(number)
            process.communicate()
            if process.returncode != 0:
                return process.returncode
            # It was quicker.
            (self.s.folder / name).unlink()
            if force:
                (self.s.folder / name).write_text("precious")
        raise AssertionError("no export could be interrupted")

    def is_writing(self, pid):
        try:
            for entry in os.scandir(f"/proc/{pid}/fd"):
                target = os.readlink(entry.path)
                if target.startswith(str(self.s.folder)) and "store" not in target \
                        and os.stat(entry.path).st_blocks > 0:
                    return True
        except OSError:
            pass  # It ended, or closed the file, meanwhile.
        return False

    def test_a_closed_pipe_is_an_error(self):
        process = self.s.start("image", "export", "x", "-", stdout=subprocess.PIPE)
        process.stdout.read(10)
        process.stdout.close()
        process.stdout = None
        _, stderr = process.communicate()
        self.assertEqual(process.returncode, EXIT["unavailable"], stderr)  # EPIPE
        self.assertEqual(self.left_over(), [])


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""How stellarctl and stellariumd behave towards people and programs: answers, errors, exit codes,
the same answers with and without a daemon, what survives a kill."""
import json
import os
import random
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "testing"))
from harness import CTL, DAEMON, EXIT, TIMEOUT_S, Store, TestCase, main  # noqa: E402

SOURCE_ROOT = Path(__file__).resolve().parents[2]


def commands():
    """Every command's words, from the program's own help."""
    def below(words):
        text = subprocess.run([CTL, *words, "--help"], capture_output=True, text=True,
                              check=True).stdout
        section = re.search(r"^Subcommands:\n((?:  .*\n?)+)", text, re.MULTILINE)
        if not section:
            yield words
            return
        for line in section.group(1).splitlines():
            if re.match(r"^  \S", line):
                yield from below([*words, line.split()[0]])
    return list(below([]))


def catches(process, signal_number):
    """Whether the process has a handler for the signal by now."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(re.search(r"SigCgt:\s*(\w+)", status).group(1), 16)
    return bool(caught >> (signal_number - 1) & 1)


class SameInBothModes(TestCase):
    """The same words give the same bytes, whether a daemon holds the store or not."""

    SCRIPT = [
        ["image", "ls"], ["volume", "ls", "--json"], ["image", "import", "a", "FILE"],
        ["image", "import", "a", "FILE"], ["image", "import", "b", "FILE", "--json"],
        ["image", "ls"], ["image", "ls", "--json"], ["image", "ls", "--bytes"],
        ["image", "info", "a"], ["image", "info", "a", "--json"], ["image", "info", "c"],
        ["volume", "create", "v", "--size", "10MiB"], ["volume", "create", "v", "--size", "10MiB"],
        ["volume", "create", "w", "--size", "10MiB", "--json"],
        ["volume", "create", "x", "--size", "1"], ["volume", "create", "bad name", "--size", "4K"],
        ["volume", "clone", "a", "c-{n}", "--count", "12"],
        ["volume", "clone", "a", "d", "--json"], ["volume", "clone", "nope", "e"],
        ["volume", "clone", "a", "c-{n}", "--count", "3"], ["volume", "clone", "a", "e", "--count", "2"],
        ["volume", "ls"], ["volume", "ls", "--json"], ["volume", "info", "c-7"],
        ["volume", "info", "c7"], ["volume", "info", "a"], ["volume", "info", "c-7", "--json"],
        ["snapshot", "create", "c-7", "s1"], ["snapshot", "create", "c-7", "s1"],
        ["snapshot", "create", "a", "s1"], ["snapshot", "create", "c-7", "s2", "--json"],
        ["snapshot", "ls"], ["snapshot", "ls", "c-7", "--json"], ["snapshot", "ls", "nope"],
        ["snapshot", "info", "c-7", "s1"], ["snapshot", "info", "c-7", "s9", "--json"],
        ["volume", "clone", "c-7@s1", "from-snapshot"], ["volume", "clone", "c-7@s9", "f"],
        ["volume", "resize", "c-7", "20MiB"], ["volume", "resize", "c-7", "much"],
        ["volume", "diff", "c-7@s1", "c-7"], ["volume", "diff", "c-7", "v", "--json"],
        ["volume", "diff", "a", "c-1"], ["volume", "diff", "a", "nope"],
        ["snapshot", "rollback", "c-7", "s1"], ["snapshot", "rollback", "c-7", "s9"],
        ["snapshot", "rm", "c-7", "s2"], ["snapshot", "rm", "c-7", "s2", "--json"],
        ["volume", "rename", "c-1", "web-1"], ["volume", "rename", "c-1", "web-1"],
        ["volume", "rename", "a", "b"], ["image", "rename", "b", "bb"],
        ["volume", "rm", "c-2", "c-3"], ["volume", "rm", "c-2", "c-4"], ["volume", "rm", "c-4", "c-4"],
        ["volume", "rm", "a"], ["image", "rm", "bb", "--json"], ["image", "rm", "d"],
        ["image", "export", "a", "OUT/a.raw"], ["image", "export", "a", "OUT/a.raw"],
        ["image", "export", "a", "OUT/a.raw", "--force", "--json"],
        ["volume", "export", "c-7@s1", "OUT/s.raw"], ["volume", "export", "nope", "OUT/n.raw"],
        ["attachments"], ["attachments", "--json"], ["detach", "c-7"], ["stats"],
        ["gc", "--rate", "none"], ["gc", "--rate", "0"],
        ["volume", "ls"], ["snapshot", "ls"], ["image", "ls"],
    ]

    def play(self, store):
        rng = random.Random(7)
        source = store.folder / "source.raw"
        with open(source, "wb") as file:
            file.write(rng.randbytes(1_500_000))
            file.truncate(10 << 20)
        (store.folder / "out").mkdir()
        played = []
        for words in self.SCRIPT:
            words = [word.replace("FILE", str(source)).replace("OUT", str(store.folder / "out"))
                     for word in words]
            done = store.run(*words)
            played.append({"words": store.normalised(" ".join(words)), "code": done.code,
                           "out": store.normalised(done.out), "err": store.normalised(done.err)})
        return played

    def test_same_output(self):
        direct = self.play(self.store())
        served = self.play(self.store(daemon=True))
        for one, other in zip(direct, served):
            if one["words"] == "stats":  # What is in memory differs between processes.
                one["out"], other["out"] = (
                    "\n".join(line for line in each["out"].splitlines()
                              if not re.match("index_bytes|node_cache|.*sequence|chunks_verified|"
                                              "appended|stored|reclaimable|file_system", line))
                    for each in (one, other))
            self.assertEqual(one, other)
        self.assertEqual({each["code"] for each in direct},
                         {0, EXIT["invalid_argument"], EXIT["not_found"], EXIT["already_exists"]})


class Words(TestCase):
    """What is wrong on the command line is told, with what to do."""

    def setUp(self):
        self.s = self.store()

    def test_usage_errors(self):
        cases = [
            (["volum", "ls"], "did you mean 'volume'?"),
            (["volume", "lss"], "did you mean 'ls'?"),
            (["volume"], "subcommand"),
            (["volume", "create", "x"], "--size"),
            (["volume", "create", "--size", "1GiB"], "NAME"),
            (["volume", "create", "x", "--size", "1GiB", "--size", "2GiB"], "--size"),
            (["volume", "create", "x", "y", "--size", "1GiB"], "y"),
            (["volume", "create", "x", "--size", ""], "size"),
            (["volume", "create", "x", "--size", "-5"], "size"),
            (["volume", "create", "x", "--size", "99999999999999999999"], "too large"),
            (["volume", "create", "x", "--size", "16EiB"], "size"),
            (["volume", "create", "x", "--size", "2PiB"], ""),
            (["volume", "create", "", "--size", "4K"], ""),
            (["volume", "create", "x" * 10000, "--size", "4K"], "128"),
            (["volume", "create", "../x", "--size", "4K"], ""),
            (["volume", "create", "x\n", "--size", "4K"], ""),
            (["volume", "create", "é", "--size", "4K"], ""),
            (["volume", "clone", "a", "b", "--count", "0"], "--count"),
            (["volume", "clone", "a", "b{n}", "--count", "100001"], "100000"),
            (["volume", "clone", "a", "b", "--count", "2"], "{n}"),
            (["volume", "clone", "a", "b", "--count", "-1"], "from 1 to 100000"),
            (["volume", "clone", "a", "b", "--count", "x"], "from 1 to 100000"),
            (["volume", "clone", "a", "b", "--count", ""], "from 1 to 100000"),
            (["attach", "a", "--vhost-user", "s", "--queues", "65"], "from 1 to 64"),
            (["attach", "a", "--vhost-user", "s", "--iops", "0"], "from 1 to 100000000"),
            (["attach", "a", "--vhost-user", "s", "--iops", "-5"], "from 1 to 100000000"),
            (["attach", "a", "--vhost-user", "s", "--bandwidth", "0"], "more than 0"),
            (["attach", "a", "--vhost-user", "s", "--bandwidth", "-1M"], "--bandwidth"),
            (["attach", "a", "--vhost-user", "s", "--bandwidth", "2TiB"], "1.00 TiB"),
            (["attach", "a", "--vhost-user", "s", "--iops-burst", "5"], "needs a limit"),
            (["attach", "a", "--vhost-user", "s", "--bandwidth", "1M", "--bandwidth-burst", "1K"],
             "10.2 KiB to 3.52 GiB"),
            (["limit", "a"], "--none"),
            (["limit", "a", "--none", "--iops", "5"], "excludes"),
            (["limit", "a", "--iops", "100000001"], "from 1 to 100000000"),
            (["stats", "--lock-timeout", "-1"], "from 0 to 86400"),
            (["--store", "", "stats"], "--store: it is empty"),
            (["stats", "--store", ""], "--store: it is empty"),
            (["stats", "--socket", ""], "--socket: it is empty"),
            (["image", "import", "x", ""], "empty name"),
            (["image", "import", "x", "-"], "--allow-empty"),
            (["volume", "create", "..", "--size", "4K"], "not '.' or '..'"),
            (["snapshot", "create", "x"], "VOLUME@NAME"),
            (["snapshot", "info", "x@"], "VOLUME@NAME"),
            (["help", "volum"], "did you mean 'volume'?"),
            (["volume", "rm"], "NAME"),
            (["volume", "ls", "--frob"], "--frob"),
            (["image", "import", "x", "/"], "directory"),
            (["image", "import", "x", "-", "--format", "qcow2"], "raw"),
            (["image", "import", "x", "y", "--format", "floppy"], "known: raw, qcow2"),
            (["completion", "tcsh"], "bash, zsh, fish"),
            (["attach", "x"], "--vhost-user"),
        ]
        for words, text in cases:
            with self.subTest(words=[word[:40] for word in words]):
                self.assert_fails(self.s.run(*words), "invalid_argument", text)
                done = self.s.run(*words, "--json")
                self.assert_fails(done, "invalid_argument")
                self.assertEqual(json.loads(done.err)["code"], "invalid_argument")
        self.assertEqual(self.s.run().code, 2)
        self.assertIn("Examples:", self.s.ok("volume", "create", "--help").out)
        # What says what to do itself is not followed by advice for everything of its kind.
        self.assertNotIn("advice", self.s.run("volume", "info", "nope").err)

    def test_other_errors(self):
        self.s.ok("volume", "create", "web", "--size", "1MiB")
        for words, kind, text in [
            (["volume", "info", "wbe"], "not_found", "did you mean 'web'?"),
            (["image", "import", "x", "/nonexistent/disk"], "not_found", "/nonexistent/disk"),
            (["volume", "export", "web", "/nonexistent/out"], "not_found", "/nonexistent"),
            (["volume", "create", "web", "--size", "1MiB"], "already_exists", "web"),
            (["init"], "already_exists", "store"),
            (["attach", "web", "--vhost-user", "web.sock", "--lock-timeout", "0"], "unavailable",
             "stellariumd --store"),
            (["detach", "web"], "not_found", "not attached"),
            (["--store", "/nonexistent/store", "stats"], "not_found", "init"),
            (["stats", "--socket", "/nonexistent/sock"], "unavailable", "no daemon"),
            (["dump", "/nonexistent/file"], "not_found", ""),
        ]:
            with self.subTest(words=words):
                self.assert_fails(self.s.run(*words), kind, text)
                done = self.s.run(*words, "--json")
                self.assertEqual(json.loads(done.err)["code"], kind)

    def test_every_command_has_help_with_examples_and_a_manual(self):
        manual = (SOURCE_ROOT / "docs/man/stellarctl.1").read_text().replace("\\-", "-")
        found = commands()
        self.assertGreaterEqual(len(found), 28)
        for words in [[], ["image"], ["volume"], ["snapshot"]]:
            text = self.s.ok(*words, "--help").out
            self.assertIn("Examples", text)
            self.assertEqual(text, self.s.ok("help", *words).out)
        for words in found:
            text = subprocess.run([CTL, *words, "--help"], capture_output=True, text=True,
                                  check=True).stdout
            with self.subTest(command=" ".join(words)):
                self.assertIn("Examples:", text)
                self.assertIn(" ".join(words), manual)
                for option in set(re.findall(r"--[a-z][a-z-]+", text.split("Examples:")[0])):
                    self.assertIn(option, manual, f"the manual lacks {option}")

    def test_help_and_manual_name_the_same_exit_codes(self):
        manual = (SOURCE_ROOT / "docs/man/stellarctl.1").read_text()
        in_manual = re.findall(r"^ ?(\d+)  ", manual.split(".SH EXIT STATUS")[1], re.MULTILINE)
        in_help = re.findall(r"(\d+) [a-zI]", self.s.ok("--help").out.split("Exit codes:")[1])
        self.assertEqual(in_manual, [str(code) for code in range(19)])
        self.assertEqual(in_help, in_manual)

    def test_listing_some(self):
        s = self.s
        for name in ("ci-1", "ci-2", "web"):
            s.ok("volume", "create", name, "--size", "4K")
        self.assertEqual(s.ok("volume", "ls", "-q", "ci-*").out, "ci-1\nci-2\n")
        self.assertEqual(s.json("volume", "ls", "-q", "web", "ci-[2-9]"), ["ci-2", "web"])
        self.assertEqual([v["name"] for v in s.json("volume", "ls", "web")], ["web"])
        self.assertEqual(s.ok("volume", "ls", "-q", "none-*").out, "")
        self.assert_fails(s.run("volume", "ls", "web", "none"), "not_found", "'none'")
        self.assertEqual(s.ok("image", "ls", "-q").out, "")
        s.ok("snapshot", "create", "web@s1")
        self.assertEqual(s.ok("snapshot", "ls", "-q").out, "web@s1\n")

    def test_snapshots_are_named_either_way(self):
        s = self.s
        s.ok("volume", "create", "v", "--size", "1MiB")
        self.assertEqual(s.ok("snapshot", "create", "v@s1").out, "made snapshot 'v@s1'\n")
        self.assertEqual(s.json("snapshot", "info", "v@s1"), s.json("snapshot", "info", "v", "s1"))
        self.assertEqual(s.json("volume", "info", "v@s1"), s.json("snapshot", "info", "v", "s1"))
        s.ok("snapshot", "rollback", "v@s1")
        s.ok("snapshot", "rm", "v@s1")
        self.assertEqual(s.json("snapshot", "ls"), [])

    def test_sizes_change_only_as_told(self):
        s = self.s
        s.ok("volume", "create", "v", "--size", "1MiB")
        s.ok("volume", "resize", "v", "+1MiB")
        self.assertEqual(s.json("volume", "info", "v")["size_bytes"], 2 << 20)
        self.assert_fails(s.run("volume", "resize", "v", "1MiB"), "invalid_argument", "--shrink")
        self.assertEqual(s.json("volume", "info", "v")["size_bytes"], 2 << 20)
        s.ok("volume", "resize", "v", "1MiB", "--shrink")
        self.assertEqual(s.json("volume", "info", "v")["size_bytes"], 1 << 20)
        s.ok("volume", "create", "w", "--size", "3MiB")
        self.assertIn("'v' has 1.00 MiB, 'w' has 3.00 MiB", s.ok("volume", "diff", "v", "w").out)
        diff = s.json("volume", "diff", "v", "w")
        self.assertEqual((diff["a_size_bytes"], diff["b_size_bytes"]), (1 << 20, 3 << 20))
        self.assertEqual(s.ok("volume", "rename", "v", "v").code, 0)

    def test_names_may_begin_with_a_hyphen(self):
        self.s.ok("volume", "create", "--size", "4K", "--", "-x")
        self.s.ok("volume", "rm", "--", "-x")

    def test_warnings_are_said_once(self):
        memory = "/dev/shm"
        if not os.access(memory, os.W_OK):
            self.skipTest("no tmpfs to put a store on")
        with tempfile.TemporaryDirectory(prefix="stl-", dir=memory) as folder:
            store = f"{folder}/store"
            self.assertIn("tmpfs", self.s.ok("--store", store, "init").err)
            self.assertEqual(self.s.ok("--store", store, "volume", "ls").err, "")
            done = self.s.ok("--store", store, "status")
            self.assertEqual((done.out.count("tmpfs"), done.err), (1, ""))
            self.assert_fails(self.s.run("--store", store, "init"), "already_exists",
                              "already holds a store")

    def test_version(self):
        self.assertEqual(self.s.json("--version"), self.s.json("version"))
        self.assertEqual(self.s.json("completion", "bash")["script"],
                         self.s.ok("completion", "bash").out)
        self.assertRegex(self.s.ok("--version").out, r"^stellarctl \d+\.\d+\.\d+\n$")
        self.assertEqual(self.s.ok("version").out, self.s.ok("--version").out)
        self.assertIn("version", self.s.json("version"))

    def test_full_standard_output_is_an_error(self):
        if not os.path.exists("/dev/full"):
            self.skipTest("no /dev/full")
        with open("/dev/full", "w") as full:
            done = self.s.run("image", "ls", stdout=full)
        self.assertEqual(done.code, EXIT["no_space"])
        self.assertIn("standard output", done.err)

    def test_json_of_every_reporting_command(self):
        s = self.s
        source = s.folder / "x.raw"
        source.write_bytes(b"x" * 10000)
        self.assertEqual(s.json("image", "import", "i", source)["size_bytes"], 10000)
        self.assertEqual(s.json("volume", "clone", "i", "v")["clones"], 1)
        self.assertEqual(s.json("snapshot", "create", "v", "s")["name"], "v@s")
        self.assertEqual(s.json("volume", "info", "v")["parent"], "i")
        stats = s.json("stats")
        for key in ("logical_bytes", "unique_bytes", "stored_bytes", "appended_bytes", "dedup_ratio",
                    "chunks", "index_bytes", "volumes", "images", "snapshots"):
            self.assertIn(key, stats)
        self.assertEqual((stats["volumes"], stats["images"], stats["snapshots"]), (1, 1, 1))
        status = s.json("status")
        self.assertEqual((status["daemon"], status["read_only"]), (False, False))
        self.assertEqual(s.json("image", "export", "i", "out.raw")["size_bytes"], 10000)
        self.assertEqual(s.json("attachments"), [])
        self.assertEqual(s.json("volume", "diff", "i", "v")["differing_bytes"], 0)
        self.assertEqual(s.json("volume", "rm", "v"), {"removed": ["v"]})
        self.assertEqual(s.json("image", "rm", "i"), {"removed": ["i"]})

    def test_dump_prints_each_file_and_says_what_is_damaged(self):
        source = self.s.folder / "x.raw"
        source.write_bytes(random.Random(3).randbytes(100_000))
        self.s.ok("image", "import", "i", source)
        self.assertIn("superblock", self.s.ok("dump", self.s.path / "superblock").out.lower())
        segment = sorted((self.s.path / "segments").iterdir())[0]
        whole = self.s.ok("dump", segment).out
        self.assertIn("batch", whole)
        answer = self.s.json("dump", segment)
        self.assertEqual(answer["damages"], 0)
        self.assertEqual(answer["lines"], whole.splitlines())
        damaged = self.s.folder / "damaged.seg"
        content = bytearray(segment.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
        done = self.s.run("dump", damaged)
        self.assertEqual(done.code, EXIT["corrupt"])
        self.assertIn("batch", done.out)
        self.assertIn("damaged", done.err)
        self.assertEqual(self.s.run("dump", source).code, EXIT["unsupported"])


class Imports(TestCase):
    """What is no disk image is told, instead of becoming an image of nonsense."""

    MAGIC = {"gzip": b"\x1f\x8b\x08", "xz": b"\xfd7zXZ\0", "zstd": b"\x28\xb5\x2f\xfd",
             "bzip2": b"BZh91AY&SY", "lz4": b"\x04\x22\x4d\x18", "zip": b"PK\x03\x04",
             "7-Zip": b"7z\xbc\xaf\x27\x1c", "tar": bytes(257) + b"ustar"}

    def test_compressed_files_and_archives(self):
        s = self.store()
        for name, magic in self.MAGIC.items():
            content = magic + bytes(5000)
            file = s.folder / name
            file.write_bytes(content)
            with self.subTest(name=name):
                self.assert_fails(s.run("image", "import", "x", file), "invalid_argument", name,
                                  f"{file} | stellarctl image import NAME -", "--format raw")
                self.assert_fails(s.run("image", "import", "x", "-", data=content),
                                  "invalid_argument", f"standard input is", name)
                with open(file, "rb") as redirected:
                    self.assert_fails(s.run("image", "import", "x", "-", stdin=redirected),
                                      "invalid_argument", name)
        self.assertEqual(s.json("image", "ls"), [])
        s.ok("image", "import", "x", s.folder / "zstd", "--format", "raw")
        s.ok("image", "import", "y", "-", "--format", "raw", data=self.MAGIC["xz"])
        self.assertEqual(s.ok("image", "export", "y", "-").raw, self.MAGIC["xz"])

    def test_other_formats_in_a_pipe(self):
        s = self.store()
        for name, magic in {"qcow2": b"QFI\xfb\0\0\0\3", "vmdk": b"KDMV\1", "vhdx": b"vhdxfile"}.items():
            self.assert_fails(s.run("image", "import", "x", "-", data=magic + bytes(5000)),
                              "invalid_argument", name, "save it")
        self.assertEqual(s.json("image", "ls"), [])

    def test_nothing_in_a_pipe(self):
        s = self.store()
        for options in ({"data": b""}, {"stdin": subprocess.DEVNULL}):
            self.assert_fails(s.run("image", "import", "x", "-", **options), "invalid_argument",
                              "empty", "--allow-empty")
        self.assert_fails(s.run("image", "import", "x", "/dev/null"), "invalid_argument", "empty")
        self.assertEqual(s.json("image", "ls"), [])
        (s.folder / "empty").touch()
        s.ok("image", "import", "a", "empty")
        s.ok("image", "import", "b", "-", "--allow-empty", data=b"")
        self.assertEqual([i["size_bytes"] for i in s.json("image", "ls")], [0, 0])

    def test_a_pipe_that_nobody_writes_to(self):
        s = self.store()
        os.mkfifo(s.folder / "fifo")
        importer = s.start("image", "import", "x", "fifo")
        while not catches(importer, signal.SIGTERM):
            self.assertIsNone(importer.poll())
            os.sched_yield()
        importer.send_signal(signal.SIGTERM)
        _, stderr = importer.communicate(timeout=TIMEOUT_S)
        self.assertEqual((importer.returncode, stderr), (EXIT["cancelled"], b"stellarctl: interrupted\n"))


class Completion(TestCase):
    def test_scripts_are_the_committed_ones_and_parse(self):
        for shell, name in (("bash", "stellarctl.bash"), ("zsh", "_stellarctl"),
                            ("fish", "stellarctl.fish")):
            script = subprocess.run([CTL, "completion", shell], capture_output=True, text=True,
                                    check=True).stdout
            committed = SOURCE_ROOT / "packaging/completions" / name
            self.assertEqual(script, committed.read_text(),
                             f"run: stellarctl completion {shell} > packaging/completions/{name}")
            try:
                subprocess.run([shell, "-n", str(committed)], check=True, capture_output=True)
            except FileNotFoundError:
                continue  # The shell is not installed.

    def test_candidates(self):
        s = self.store()
        s.ok("volume", "create", "web-1", "--size", "4K")
        s.ok("volume", "create", "web-2", "--size", "4K")
        s.ok("snapshot", "create", "web-1", "before")
        for words, expected in [
            (["vol"], ["volume"]), (["volume", "c"], ["clone", "create"]),
            (["volume", "info", "web-"], ["web-1", "web-2"]),
            (["snapshot", "rollback", "web-1", ""], ["before"]),
            (["volume", "clone", "web-1@"], ["web-1@before"]),
            (["volume", "create", "--si"], ["--size"]), (["completion", "z"], ["zsh"]),
            (["limit", "x", "--no"], ["--no-progress", "--none"]),
            (["image", "import", "x", ""], [":files"]), (["nonsense", "x", ""], []),
            (["--store", str(s.path), "volume", "rm", "web-2"], ["web-2"]),
        ]:
            with self.subTest(words=words):
                self.assertEqual(s.ok("__complete", *words).out.splitlines(), expected)
        self.assertIn("snapshot", s.ok("__complete", "").out.splitlines())
        # No store, no names, no error.
        self.assertEqual(s.run("__complete", "--store", "/nonexistent", "volume", "rm", "").out, "")

    def test_in_bash(self):
        s = self.store()
        s.ok("volume", "create", "web-1", "--size", "4K")
        script = (f'PATH={Path(CTL).parent}:$PATH; source <(stellarctl completion bash); '
                  'COMP_WORDS=(stellarctl volume info we); COMP_CWORD=3; _stellarctl; '
                  'echo "${COMPREPLY[@]}"')
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True,
                              env=s.environment)
        self.assertEqual(done.stdout, "web-1\n", done.stderr)


class Holding(TestCase):
    """Who may have the store when."""

    def test_held_by_another_command(self):
        s = self.store()
        holder = s.start("image", "import", "x", "-", stdin=subprocess.PIPE)
        self.addCleanup(holder.wait)
        self.addCleanup(holder.kill)
        holder.stdin.write(b"some bytes")
        holder.stdin.flush()
        s.wait_until_held_by(holder)
        self.assert_fails(s.run("stats", "--lock-timeout", "0"), "busy",
                          f"held by process {holder.pid} (stellarctl), another command",
                          "--lock-timeout")
        self.assert_fails(s.run("volume", "ls", "--lock-timeout", "1"), "busy", str(holder.pid),
                          "waited 1 s")
        self.assertEqual(s.run("__complete", "image", "rm", "").out, "")
        waiting = s.start("image", "ls", "--lock-timeout", str(TIMEOUT_S))
        _, stderr = holder.communicate(timeout=TIMEOUT_S)
        self.assertEqual(holder.returncode, 0, stderr)
        stdout, stderr = waiting.communicate(timeout=TIMEOUT_S)
        self.assertEqual(waiting.returncode, 0, stderr)
        self.assertEqual(s.json("image", "info", "x")["size_bytes"], 10)

    def test_commands_take_turns(self):
        s = self.store()
        s.ok("volume", "create", "base", "--size", "1MiB")
        clones = [s.start("volume", "clone", "base", f"c-{n}", "--lock-timeout", str(TIMEOUT_S))
                  for n in range(20)]
        for clone in clones:
            _, stderr = clone.communicate(timeout=TIMEOUT_S)
            self.assertEqual(clone.returncode, 0, stderr)
        self.assertEqual(len(s.json("volume", "ls")), 21)

    def test_a_wait_can_be_interrupted(self):
        s = self.store()
        holder = s.start("image", "import", "x", "-", stdin=subprocess.PIPE)
        self.addCleanup(holder.wait)
        self.addCleanup(holder.kill)
        s.wait_until_held_by(holder)
        waiting = s.start("image", "ls", "--lock-timeout", str(TIMEOUT_S))
        # Before the handler is there, the signal ends the command as well.
        waiting.send_signal(signal.SIGTERM)
        waiting.communicate(timeout=TIMEOUT_S)
        self.assertIn(waiting.returncode, (EXIT["cancelled"], -signal.SIGTERM))
        holder.communicate(b"x", timeout=TIMEOUT_S)

    def test_a_daemon_that_starts_is_waited_for(self):
        s = self.store()
        s.ok("volume", "create", "v", "--size", "1MiB")
        # As a script does it: the daemon in the background, and at once a command that needs it.
        attach = s.start("attach", "v", "--vhost-user", "v.sock")
        s.begin_daemon()
        _, stderr = attach.communicate(timeout=TIMEOUT_S)
        self.assertEqual(attach.returncode, 0, stderr)

    def test_a_daemon_waits_for_a_command(self):
        s = self.store()
        holder = s.start("image", "import", "x", "-", stdin=subprocess.PIPE)
        self.addCleanup(holder.wait)
        self.addCleanup(holder.kill)
        s.wait_until_held_by(holder)
        daemon = s.begin_daemon()
        while "event=waiting" not in s.log.read_text():
            self.assertIsNone(daemon.poll(), s.log_tail())
            os.sched_yield()
        _, stderr = holder.communicate(b"some bytes", timeout=TIMEOUT_S)
        self.assertEqual(holder.returncode, 0, stderr)
        # It is waited for in turn.
        s.ok("volume", "create", "v", "--size", "1MiB")
        s.ok("attach", "v", "--vhost-user", "v.sock", "--lock-timeout", str(TIMEOUT_S))
        s.stop_daemon()

    def test_a_second_daemon_is_refused(self):
        s = self.store(daemon=True)
        second = subprocess.run([DAEMON, "--runtime-dir", str(s.runtime / "other")],
                                capture_output=True, text=True, env=s.environment,
                                timeout=TIMEOUT_S, check=False)
        self.assertEqual(second.returncode, EXIT["busy"], second.stderr)
        self.assertIn(str(s.daemon.pid), second.stderr)
        s.ok("stats")

    def test_found_wherever_its_socket_is(self):
        s = self.store()
        elsewhere = s.runtime / "my.sock"
        s.start_daemon("--socket", elsewhere, "--runtime-dir", s.runtime / "elsewhere")
        self.assertEqual(s.control_socket(), str(elsewhere))
        self.assertEqual(stat.S_IMODE(os.stat(elsewhere).st_mode), 0o600)
        # By the socket alone, from an environment that knows no store.
        environment = {key: value for key, value in s.environment.items()
                       if key != "STELLARIUM_STORE"} | {"STELLARIUM_SOCKET": str(elsewhere)}
        self.assertTrue(s.json("status", env=environment)["daemon"])
        self.assertTrue(s.json("status", "--socket", elsewhere)["daemon"])
        self.assert_fails(s.run("stats", "--socket", elsewhere, "--store", s.folder),
                          "invalid_argument", "serves")
        s.stop_daemon()
        self.assertFalse(elsewhere.exists())
        self.assertFalse(s.json("status")["daemon"])

    def test_a_killed_daemon_leaves_the_store_usable(self):
        s = self.store(daemon=True)
        s.ok("volume", "create", "a", "--size", "1MiB")
        s.kill_daemon()
        self.assertEqual([v["name"] for v in s.json("volume", "ls")], ["a"])
        s.start_daemon()
        self.assertEqual([v["name"] for v in s.json("volume", "ls")], ["a"])

    def mounted_store(self, options):
        """A store on a file system of its own, which needs root."""
        if os.geteuid() != 0:
            self.skipTest("not root: a file system is mounted")
        s = self.store(make=False)
        s.path.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(s.path)],
                              capture_output=True, check=False)
        if done.returncode != 0:
            self.skipTest("this system lets nobody mount a tmpfs")
        self.addCleanup(subprocess.run, ["umount", str(s.path)], check=True)
        s.ok("init")
        s.ok("image", "import", "x", "-", data=b"precious" * 50_000)
        return s

    def test_a_full_disk_can_be_read(self):
        s = self.mounted_store("size=4m")
        try:
            with open(s.path / "filler", "wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(65536))
        except OSError:
            pass
        self.assertEqual([image["name"] for image in s.json("image", "ls")], ["x"])
        s.ok("image", "export", "x", "out.raw")
        self.assertEqual((s.folder / "out.raw").read_bytes(), b"precious" * 50_000)
        self.assert_fails(s.run("image", "import", "y", "-", data=random.Random(1).randbytes(1 << 20)),
                          "no_space")
        # What frees room works without any.
        s.ok("image", "rm", "x")
        s.ok("gc")
        (s.path / "filler").unlink()
        s.ok("image", "import", "y", "-", data=random.Random(1).randbytes(1 << 20))

    def test_a_read_only_file_system_can_be_read(self):
        s = self.mounted_store("size=8m")
        subprocess.run(["mount", "-o", "remount,ro", str(s.path)], check=True)
        self.assertEqual([image["name"] for image in s.json("image", "ls")], ["x"])
        s.ok("image", "export", "x", "out.raw")
        self.assertEqual((s.folder / "out.raw").read_bytes(), b"precious" * 50_000)
        self.assert_fails(s.run("volume", "create", "v", "--size", "1MiB"), "read_only")
        self.assertIn("all is well", s.ok("fsck").out)
        refused = s.run("fsck", "--repair")
        self.assert_fails(refused, "read_only", str(s.path))
        self.assertIn("cannot be repaired", refused.err)
        self.assertIn("copy", refused.err)

    def test_rot_is_not_taken_for_a_torn_end(self):
        s = self.store()
        s.ok("image", "import", "x", "-", data=random.Random(1).randbytes(300_000))
        segment = s.path / "segments" / "0000001.seg"
        size = segment.stat().st_size
        for offset in (5000, 100_000):
            with open(segment, "r+b") as file:
                file.seek(offset)
                byte = file.read(1)
                file.seek(offset)
                file.write(bytes([byte[0] ^ 1]))
            s.ok("status")
            self.assertIn("damaged", s.run("volume", "create", "v", "--size", "1MiB").err)
            self.assertEqual(segment.stat().st_size, size)

    def test_an_older_version_is_exported_only_when_asked_for(self):
        s = self.store()
        s.ok("volume", "create", "v", "--size", "1MiB")
        segment = s.path / "segments" / "0000001.seg"
        lost = segment.stat().st_size  # Where the next record goes.
        s.ok("volume", "resize", "v", "2MiB")
        s.ok("snapshot", "create", "v", "later")
        with open(segment, "r+b") as file:
            file.seek(lost + 100)
            file.write(b"rot")
        refused = s.run("volume", "export", "v", "out.raw")
        self.assert_fails(refused, "corrupt")
        self.assertIn("--allow-stale", refused.err)
        self.assertIn("damaged", s.ok("volume", "ls").out)
        self.assertIn("damaged", s.ok("volume", "info", "v").out)
        self.assertNotEqual(s.json("volume", "info", "v")["damage"], "")
        s.ok("volume", "export", "v", "out.raw", "--allow-stale")
        self.assertEqual((s.folder / "out.raw").stat().st_size, 1 << 20)

    def test_without_root(self):
        if os.geteuid() != 0:
            self.skipTest("not root, so all the other tests run without root")
        with tempfile.TemporaryDirectory(prefix="stl-user-") as home:
            os.chown(home, 65534, 65534)
            environment = {"HOME": home, "PATH": os.environ["PATH"],
                           "STELLARIUM_RUNTIME_DIR": f"{home}/run"}
            def ctl(*words):
                return subprocess.run([CTL, *words], env=environment, user=65534, group=65534,
                                      extra_groups=[], capture_output=True, text=True, cwd=home,
                                      timeout=TIMEOUT_S, check=False)
            done = ctl("init")
            if done.returncode == 126 or "Permission denied" in done.stderr and CTL in done.stderr:
                self.skipTest("the programs are in a folder that other users may not enter")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(ctl("volume", "create", "v", "--size", "1MiB").returncode, 0)
            self.assertTrue(Path(home, ".local/share/stellarium/superblock").exists())
            # Root does not spoil another user's store.
            done = subprocess.run([CTL, "--store", f"{home}/.local/share/stellarium", "volume", "ls"],
                                  env=environment, capture_output=True, text=True, check=False)
            self.assertEqual(done.returncode, EXIT["permission_denied"], done.stderr)

    def test_a_stranger_in_the_daemons_place_is_not_trusted(self):
        if os.geteuid() != 0:
            self.skipTest("not root: two users are needed")
        s = self.store()
        # A store of nobody, and a listener of somebody else where its daemon would be.
        code = ("import os, socket, sys; os.setuid(12345); l = socket.socket(socket.AF_UNIX); "
                "l.bind(sys.argv[1]); l.listen(); print('ready', flush=True); sys.stdin.read()")
        place = s.runtime / "control.sock"
        os.chmod(s.runtime, 0o777)
        listener = subprocess.Popen([sys.executable, "-c", code, str(place)], stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE)
        self.assertEqual(listener.stdout.readline(), b"ready\n")
        (s.path / "daemon.json").write_text(json.dumps(
            {"pid": 1, "socket": str(place), "runtime_directory": str(s.runtime)}))
        self.assertFalse(s.json("status")["daemon"])
        listener.communicate()

    def test_garbage_goes_back_to_the_file_system(self):
        for daemon in (False, True):
            with self.subTest(daemon=daemon):
                s = self.store(daemon=daemon)
                rng = random.Random(11)
                for name in ("kept", "gone"):
                    (s.folder / name).write_bytes(rng.randbytes(6 << 20))
                    s.ok("image", "import", name, s.folder / name)
                s.ok("volume", "clone", "gone", "vm")
                s.ok("image", "rm", "gone")
                s.ok("gc")  # A clone needs it.
                s.ok("volume", "export", "vm", "vm.raw")
                self.assertEqual((s.folder / "gone").read_bytes(), (s.folder / "vm.raw").read_bytes())
                s.ok("volume", "rm", "vm")
                used = s.disk_bytes()
                would = s.json("gc", "--dry-run")
                self.assertTrue(would["dry_run"])
                self.assertGreaterEqual(would["freed_bytes"], 6 * 1000 * 1000)
                self.assertIn("would free", s.ok("gc", "--dry-run").out)
                self.assertGreater(s.disk_bytes(), used - (1 << 20))
                did = s.json("gc", "--rate", "1GiB")
                self.assertGreaterEqual(did["dead_bytes"], 6 << 20)
                self.assertLess(s.disk_bytes(), used - 6 * 1000 * 1000)
                self.assertRegex(s.ok("gc").out, r"^freed .*; .* copied, in \d+ ms\n$")
                s.ok("image", "export", "kept", "kept.raw")
                self.assertEqual((s.folder / "kept").read_bytes(),
                                 (s.folder / "kept.raw").read_bytes())
                stats = s.json("stats")
                for key in ("reclaimable_bytes", "file_system_free_bytes", "collections"):
                    self.assertIn(key, stats)
                if daemon:
                    self.assertEqual(stats["collections"], 3)

    def test_clones_are_durable_and_small(self):
        s = self.store()
        with open(s.folder / "x.raw", "wb") as file:
            file.write(random.Random(5).randbytes(4 << 20))
            file.truncate(1 << 30)
        s.ok("image", "import", "base", s.folder / "x.raw")
        s.start_daemon()
        before, used_before = s.json("stats"), s.disk_bytes()
        s.ok("volume", "clone", "base", "vm-{n}", "--count", "1000")
        s.kill_daemon()
        self.assertEqual({v["name"] for v in s.json("volume", "ls")},
                         {f"vm-{n}" for n in range(1, 1001)})
        used_after = s.disk_bytes()
        after = s.json("stats")
        self.assertLessEqual(after["appended_bytes"] - before["appended_bytes"], 256 << 10)
        self.assertLessEqual(used_after - used_before, 256 << 10)
        # The same directly, and all or none.
        s.ok("volume", "clone", "base", "dm-{n}", "--count", "1000")
        self.assertLessEqual(s.disk_bytes() - used_after, 256 << 10)
        s.ok("volume", "create", "e-500", "--size", "4K")
        self.assert_fails(s.run("volume", "clone", "base", "e-{n}", "--count", "1000"),
                          "already_exists", "e-500")
        self.assertEqual(s.json("stats")["volumes"], 2001)


class Scrub(TestCase):
    def damage(self, store, content):
        """Flips a bit of these bytes where they are stored."""
        segment = store.path / "segments" / "0000001.seg"
        at = segment.read_bytes().find(content)
        self.assertGreater(at, 0)
        with open(segment, "r+b") as file:
            file.seek(at + 10)
            byte = file.read(1)
            file.seek(at + 10)
            file.write(bytes([byte[0] ^ 1]))
        return segment

    def test_damage_is_named_and_heals(self):
        content = random.Random(3).randbytes(1_000_000)
        for daemon in (False, True):
            with self.subTest(daemon=daemon):
                s = self.store(daemon=daemon)
                (s.folder / "x.raw").write_bytes(content)
                s.ok("image", "import", "x", s.folder / "x.raw")
                s.ok("volume", "clone", "x", "vm")
                s.ok("snapshot", "create", "vm", "before")
                s.ok("gc")  # A checkpoint: damage behind the last one makes a store read-only.
                clean = s.json("scrub")
                self.assertEqual((clean["damaged"], clean["damage"]["damaged"]), (0, []))
                self.assertGreaterEqual(clean["bytes"], len(content))
                self.assertRegex(s.ok("scrub").out, r"^checked 9\d\d KiB in \d+ chunks, 0 damaged\n$")

                segment = self.damage(s, content[600_000:600_064])
                found = s.run("scrub")
                self.assertEqual(found.code, EXIT["corrupt"])
                self.assertIn("1 chunk is damaged", found.err)
                self.assertIn(f"damaged: {segment} at offset ", found.out)
                for user in ("image 'x': ", "volume 'vm': ", "snapshot 'vm@before': "):
                    self.assertIn(user, found.out)
                self.assertIn("1 chunk is damaged", s.ok("status").out)
                self.assertEqual(s.json("stats")["damaged_chunks"], 1)
                self.assert_fails(s.run("image", "export", "x", "bad.raw"), "corrupt")
                # It is known without another look, also after a restart.
                if daemon:
                    s.stop_daemon()
                    s.start_daemon()
                known = s.run("scrub", "--status", "--json")
                self.assertEqual(known.code, EXIT["corrupt"])
                damage = known.json()["damage"]
                self.assertTrue(damage["complete"])
                self.assertEqual(len(damage["damaged"]), 1)
                chunk = damage["damaged"][0]
                self.assertEqual(chunk["file"], str(segment))
                users = chunk["users"]
                self.assertEqual([user["name"] for user in users], ["x", "vm", "vm@before"])
                for user in users:
                    self.assertEqual(len(user["ranges"]), 1)
                    start = user["ranges"][0]["offset_bytes"]
                    self.assertTrue(start <= 600_010 < start + user["bytes"])

                s.ok("image", "import", "again", s.folder / "x.raw")
                self.assertEqual(s.json("scrub", "--restart")["damage"]["damaged_chunks"], 0)
                s.ok("scrub", "--status")
                self.assertNotIn("damaged", s.ok("status").out)
                for source in ("x", "again"):
                    s.ok("image", "export", source, f"{source}.out")
                    self.assertEqual((s.folder / f"{source}.out").read_bytes(), content)

    def test_goes_on_where_it_was_stopped(self):
        s = self.store(daemon=True)
        (s.folder / "x.raw").write_bytes(random.Random(4).randbytes(12 << 20))
        s.ok("image", "import", "x", s.folder / "x.raw")
        def stop_one():
            began = s.json("scrub", "--status")["present"]
            began = began["bytes"] if began else 0
            process = s.start("scrub", "--rate", "1MiB")
            self.addCleanup(process.kill)
            while True:
                state = s.json("scrub", "--status")
                if (state["running"] and state["present"]["bytes"] > began
                        and catches(process, signal.SIGINT)):
                    break
                self.assertIsNone(process.poll())
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=TIMEOUT_S)
            self.assertEqual(process.returncode, EXIT["cancelled"])
            return s.json("scrub", "--status")["present"]["bytes"]
        first = stop_one()
        s.stop_daemon()
        self.assertEqual(s.json("scrub", "--status")["present"]["bytes"], first)
        s.start_daemon("--scrub-every", "0")  # Else it goes on by itself, at its own rate.
        self.assertGreater(stop_one(), first)
        self.assertIn("stopped", s.ok("scrub", "--status").out)
        whole = s.json("scrub", "--rate", "0")
        self.assertGreaterEqual(whole["bytes"], 12 << 20)
        state = s.json("scrub", "--status")
        self.assertIsNone(state["present"])
        self.assertEqual(state["last"]["bytes"], whole["bytes"])
        self.assertIsNone(state["next_due"])
        s.stop_daemon()
        s.start_daemon()
        self.assertIsNotNone(s.json("scrub", "--status")["next_due"])

    def test_words(self):
        s = self.store()
        for rate in ("fast", ""):  # An empty one is a variable that was not set, not no limit.
            for command in ("scrub", "gc"):
                self.assert_fails(s.run(command, "--rate", rate), "invalid_argument", "size")
        s.ok("scrub", "--rate", "0MiB")  # No limit, in whatever unit.
        self.assert_fails(s.run("gc", "--rate", "0MiB"), "invalid_argument", "more than 0")
        for rate in ("1KiB", "1048575"):  # It would not end.
            for command in ("scrub", "gc"):
                self.assert_fails(s.run(command, "--rate", rate), "invalid_argument", "at least")
        for words in (["--restart"], ["--rate", "10MiB"]):
            self.assertEqual(s.run("scrub", "--status", *words).code, EXIT["invalid_argument"])


class Fsck(TestCase):
    """A damaged store: what is wrong, whom it concerns, and what a repair leaves."""

    def flip(self, path, offset):
        with open(path, "r+b") as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 1]))

    def fsck(self, s, *words):
        """The exit code and the report."""
        done = s.run("fsck", *words, "--json")
        return done.code, json.loads(done.out)

    def filled(self):
        s = self.store()
        content = random.Random(5).randbytes(300_000)
        s.ok("image", "import", "i", "-", data=content)
        s.ok("volume", "clone", "i", "v")
        s.ok("snapshot", "create", "v", "s")
        return s, content

    def everything(self, s):
        return {path: (path.read_bytes(), path.stat().st_mtime_ns)
                for path in s.path.rglob("*") if path.is_file()}

    def test_a_whole_store_is_well_and_left_alone(self):
        s, _ = self.filled()
        before = self.everything(s)
        self.assertIn("all is well", s.ok("fsck").out)
        self.assertIn("1 image, 1 volume, 1 snapshot", s.ok("fsck", "--data").out)
        code, report = self.fsck(s, "--data")
        self.assertEqual(code, 0)
        self.assertEqual((report["damaged"], report["findings"], report["lost"]), (False, [], []))
        self.assertGreater(report["data_bytes"], 300_000)
        self.assertEqual(self.everything(s), before)
        self.assertIn("all is well", s.ok("fsck", "--repair").out)

    def test_wrong_words(self):
        s = self.store()
        for words in (["fsck", "now"], ["fsck", "--fix"], ["fsck", "--socket", "/tmp/x"]):
            self.assertEqual(s.run(*words).code, 2, words)
        self.assert_fails(s.run("fsck", "--store", "/nonexistent/store"), "not_found", "init")

    def test_a_store_in_use_is_left_alone(self):
        s = self.store(daemon=True)
        for words in ([], ["--repair"]):
            self.assert_fails(s.run("fsck", *words), "busy", "stop its daemon")
        s.stop_daemon()
        s.ok("fsck")

    def test_rotten_content_is_named_and_healed(self):
        s, content = self.filled()
        self.flip(s.path / "segments" / "0000001.seg", 100_000)
        code, report = self.fsck(s, "--data")
        self.assertEqual(code, EXIT["corrupt"])
        lost = {(r["source"], r["kind"]) for r in report["lost"]}
        self.assertEqual(lost, {("i", "image"), ("v", "volume"), ("v@s", "snapshot")})
        [finding] = [f for f in report["findings"] if f["kind"] == "chunk" and not f["harmless"]]
        self.assertTrue(finding["file"].endswith("0000001.seg"))
        self.assertLessEqual(finding["offset_bytes"], 100_000)
        self.assertEqual(len(finding["id"]), 64)
        self.assertIn("image 'i' bytes", finding["consequence"])
        text = s.run("fsck", "--data").out
        self.assertIn("lost: image 'i', bytes", text)

        # A repair cannot bring it back, and what is lost stays an error.
        done = s.run("fsck", "--data", "--repair")
        self.assertEqual(done.code, EXIT["corrupt"])
        self.assertIn("lost: volume 'v', bytes", done.out)
        self.assertEqual(self.fsck(s)[0], EXIT["corrupt"])
        self.assertEqual(s.run("volume", "export", "v", "v.raw").code, EXIT["corrupt"])
        # The same content does.
        s.ok("image", "import", "again", "-", data=content)
        self.assertEqual(self.fsck(s, "--data")[0], 0)
        s.ok("volume", "export", "v", "v.raw")
        self.assertEqual((s.folder / "v.raw").read_bytes()[:len(content)], content)

    def test_what_made_the_store_read_only_is_repaired_and_then_healed(self):
        s, content = self.filled()
        # Behind the last checkpoint, and known to have been durable.
        self.flip(s.path / "segments" / "0000001.seg", 100_000)
        refused = s.run("image", "import", "again", "-", data=content)
        self.assert_fails(refused, "read_only", "fsck --repair")
        self.assertIn("fsck --repair", s.ok("status").out)
        self.assertIn("--repair repairs what can be", s.run("fsck").err)
        repaired = s.run("fsck", "--repair")
        self.assertEqual(repaired.code, EXIT["corrupt"])
        self.assertIn("lost: image 'i'", repaired.out)
        self.assertIn("no repair ends", repaired.err)
        # Nothing but lost content is left: there is nothing to repair, and nothing is written.
        before = self.everything(s)
        for words in ([], ["--repair"]):
            again = s.run("fsck", *words)
            self.assertEqual(again.code, EXIT["corrupt"])
            self.assertIn("no repair ends", again.err)
            self.assertNotIn("repairs what can be", again.err)
        self.assertEqual({path: data for path, (data, _) in self.everything(s).items()
                          if path.name != "lock"},
                         {path: data for path, (data, _) in before.items()
                          if path.name != "lock"})
        s.ok("image", "import", "again", "-", data=content)
        self.assertIn("all is well", s.ok("fsck", "--data").out)
        s.ok("volume", "export", "v", "v.raw")
        self.assertEqual((s.folder / "v.raw").read_bytes()[:len(content)], content)

    def test_what_is_missing_is_damage(self):
        s, _ = self.filled()
        segment = s.path / "segments" / "0000001.seg"
        aside = s.folder / "aside.seg"
        segment.rename(aside)
        code, report = self.fsck(s)
        self.assertEqual((code, report["damaged"]), (EXIT["corrupt"], True))
        segment.touch()  # As what a file system check leaves.
        code, report = self.fsck(s)
        self.assertEqual(code, EXIT["corrupt"])
        self.assertFalse(any(f["consequence"].startswith("none") for f in report["findings"]
                             if f["file"] == str(segment)), report["findings"])
        segment.unlink()
        segment.parent.rmdir()
        for words in ([], ["--repair"]):
            code, report = self.fsck(s, *words)
            self.assertEqual((code, report["usable"]), (EXIT["corrupt"], False))
            self.assertIn("segments", s.run("fsck", *words).out)
        self.assert_fails(s.run("image", "ls"), "corrupt", "segments")
        segment.parent.mkdir()
        aside.rename(segment)
        self.assertIn("all is well", s.ok("fsck", "--data").out)

    def test_lost_changes_make_volumes_unknown_until_they_are_gone(self):
        s, content = self.filled()
        segment = s.path / "segments" / "0000001.seg"
        lost = segment.stat().st_size  # Where the next record goes.
        s.ok("volume", "resize", "v", "2MiB")
        s.ok("volume", "clone", "i", "later")
        self.flip(segment, lost + 100)
        code, report = self.fsck(s)
        self.assertEqual(code, EXIT["corrupt"])
        self.assertEqual(report["unknown"], ["v"])
        self.assert_fails(s.run("volume", "create", "x", "--size", "1MiB"), "read_only")
        done = s.run("fsck", "--repair")
        self.assertEqual(done.code, EXIT["corrupt"])
        self.assertIn("unknown: the content of 'v'", done.out)
        self.assertIn("repaired:", done.out)
        # The store can be written again; what was made later is there, and so is the snapshot.
        s.ok("volume", "create", "x", "--size", "1MiB")
        s.ok("volume", "export", "later", "later.raw")
        self.assertEqual((s.folder / "later.raw").read_bytes()[:len(content)], content)
        self.assert_fails(s.run("volume", "export", "v", "v.raw"), "corrupt")
        s.ok("snapshot", "rollback", "v", "s")
        self.assertEqual(self.fsck(s)[0], 0)
        s.ok("volume", "export", "v", "v.raw")
        self.assertEqual((s.folder / "v.raw").read_bytes()[:len(content)], content)

    def test_derived_files_are_made_anew(self):
        s, content = self.filled()
        for index in s.path.glob("index-*.ckpt"):
            index.unlink()
        self.flip(s.path / "superblock", 5000)
        self.flip(s.path / "segments" / "0000001.seg", 20)
        code, report = self.fsck(s)
        self.assertEqual(code, EXIT["corrupt"])
        self.assertLessEqual({"superblock", "segment-header"},
                             {f["kind"] for f in report["findings"]})
        self.assertEqual(report["lost"], [])
        self.assertIn("all is well", s.ok("fsck", "--repair").out)
        s.ok("fsck", "--data")
        s.ok("image", "export", "i", "i.raw")
        self.assertEqual((s.folder / "i.raw").read_bytes(), content)

    def test_a_segment_that_was_moved_aside_can_be_put_back(self):
        s = self.store()
        content = random.Random(11).randbytes(136 << 20)  # Two segments that are full, and more.
        (s.folder / "source.raw").write_bytes(content)
        s.ok("image", "import", "i", str(s.folder / "source.raw"))
        first, second = (s.path / "segments" / f"000000{number}.seg" for number in (1, 2))
        self.assertTrue((s.path / "segments" / "0000003.seg").exists())

        def swap(one, other):
            one.rename(s.folder / "aside")
            other.rename(one)
            (s.folder / "aside").rename(other)

        swap(first, second)
        code, report = self.fsck(s, "--repair")
        self.assertEqual(code, EXIT["corrupt"])
        self.assertGreater(sum(each["length_bytes"] for each in report["lost"]), 100 << 20)
        # What was found under the name of the first is the second.
        Path(f"{first}.foreign").rename(second)
        Path(f"{second}.foreign").rename(first)
        self.assertIn("all is well", s.ok("fsck", "--repair").out)
        s.ok("fsck", "--data")
        s.ok("image", "export", "i", "i.raw")
        self.assertEqual((s.folder / "i.raw").read_bytes(), content)

    def test_a_superblock_is_made_anew_where_the_log_is_whole(self):
        s, content = self.filled()
        (s.path / "superblock").unlink()
        code, report = self.fsck(s)
        self.assertEqual((code, report["usable"], report["lost"]), (EXIT["corrupt"], True, []))
        self.assertIn("all is well", s.ok("fsck", "--data", "--repair").out)
        s.ok("volume", "export", "v", "v.raw")
        self.assertEqual((s.folder / "v.raw").read_bytes()[:len(content)], content)
        s.ok("volume", "create", "new", "--size", "1MiB")

    def test_without_a_superblock_and_the_first_changes_nothing_can_be_repaired(self):
        s, _ = self.filled()
        s.ok("snapshot", "rm", "v@s")
        s.ok("volume", "rm", "v")
        s.ok("image", "rm", "i")
        s.ok("volume", "create", "new", "--size", "1MiB")
        s.ok("gc")
        (s.path / "superblock").unlink()
        for words in ([], ["--repair"]):
            code, report = self.fsck(s, *words)
            self.assertEqual(code, EXIT["corrupt"])
            self.assertFalse(report["usable"])
        text = s.run("fsck").out
        self.assertIn("backup", text)
        self.assertIn("every batch", text)


class Attach(TestCase):
    def test_sockets_links_and_restarts(self):
        s = self.store(daemon=True)
        s.ok("volume", "create", "v", "--size", "1MiB")
        s.ok("volume", "create", "w", "--size", "1MiB")
        link = s.folder / "v.sock"
        attached = s.json("attach", "v", "--vhost-user", "v.sock", "--queues", "4", "--serial", "S-1",
                          "--block-size", "4096")
        self.assertEqual(attached["link"], str(link))
        self.assertEqual(os.readlink(link), attached["socket"])
        self.assertTrue(stat.S_ISSOCK(os.stat(link).st_mode))
        with socket.socket(socket.AF_UNIX) as guest:
            guest.connect(str(link))
        self.assert_fails(s.run("attach", "v", "--vhost-user", "other.sock"), "busy", "attached")
        self.assert_fails(s.run("attach", "w", "--vhost-user", "v.sock"), "already_exists", "v.sock")
        self.assert_fails(s.run("attach", "w", "--vhost-user", "no/such/folder/w.sock"), "not_found")
        self.assertEqual([a["source"] for a in s.json("attachments")], ["v"])
        self.assert_fails(s.run("attach", "w", "--vhost-user", "x" * 200), "invalid_argument", "107")
        self.assert_fails(s.run("attach", "w", "--vhost-user", "w.sock", "--queues", "65"),
                          "invalid_argument", "queues")
        self.assert_fails(s.run("attach", "w", "--vhost-user", "w.sock", "--block-size", "1024"),
                          "invalid_argument", "block_size")
        self.assert_fails(s.run("volume", "rm", "v"), "busy", "attached")
        self.assert_fails(s.run("volume", "rm", "w", "v"), "busy", "attached")
        self.assertEqual(len(s.json("volume", "ls")), 2)
        # A rename does not disturb it; a restart, clean or not, brings it back.
        s.ok("volume", "rename", "v", "renamed")
        for stop in (s.stop_daemon, s.kill_daemon):
            stop()
            offline = s.json("attachments")
            self.assertEqual([(a["source"], a["state"]) for a in offline], [("renamed", "offline")])
            s.start_daemon()
            back = s.json("attachments")[0]
            self.assertEqual((back["source"], back["state"], back["queues"], back["serial"],
                              back["block_size"], back["socket"]),
                             ("renamed", "listening", 4, "S-1", 4096, attached["socket"]))
            with socket.socket(socket.AF_UNIX) as guest:
                guest.connect(str(link))
        s.ok("detach", "renamed")
        self.assertFalse(os.path.lexists(link))
        self.assertFalse(os.path.exists(attached["socket"]))
        s.ok("volume", "rm", "renamed")

    def test_limits(self):
        s = self.store(daemon=True)
        s.ok("volume", "create", "v", "--size", "1MiB")
        self.assert_fails(s.run("limit", "v", "--iops", "5"), "not_found", "not attached")
        self.assertEqual(s.json("attach", "v", "--vhost-user", "v.sock", "--iops", "500",
                                "--bandwidth", "20MiB", "--bandwidth-burst", "1GiB")["limits"],
                         {"iops": 500, "iops_burst": 500, "bandwidth_bytes": 20 << 20,
                          "bandwidth_burst_bytes": 1 << 30})
        self.assertIn("500 requests/s (burst 500), 20.0 MiB/s (burst 1.00 GiB)",
                      s.ok("attachments").out)
        self.assertEqual(s.ok("limit", "v", "--iops", "100", "--iops-burst", "1000").out,
                         "limited 'v' to 100 requests/s (burst 1000)\n")
        # A restart, clean or not, and a time without a daemon keep the limits.
        limits = {"iops": 100, "iops_burst": 1000}
        for stop in (s.stop_daemon, s.kill_daemon):
            stop()
            self.assertEqual(s.json("attachments")[0]["limits"], limits)
            s.start_daemon()
            self.assertEqual(s.json("attachments")[0]["limits"], limits)
        s.stop_daemon()
        limits = s.json("limit", "v", "--bandwidth", "1MiB")["limits"]
        self.assertEqual(limits, {"bandwidth_bytes": 1 << 20, "bandwidth_burst_bytes": 1 << 20})
        s.start_daemon()
        self.assertEqual(s.json("attachments")[0]["limits"], limits)
        self.assertEqual(s.ok("limit", "v", "--none").out, "took the limits of 'v' away\n")
        self.assertEqual(s.json("attachments")[0]["limits"], {})
        s.ok("detach", "v")

    def test_images_and_snapshots_read_only(self):
        s = self.store(daemon=True)
        source = s.folder / "x.raw"
        source.write_bytes(b"x" * 10000)
        s.ok("image", "import", "i", source)
        s.ok("volume", "clone", "i", "v")
        s.ok("snapshot", "create", "v", "s")
        for name in ("i", "v@s"):
            self.assert_fails(s.run("attach", name, "--vhost-user", "x.sock"), "read_only", "clone")
            self.assertTrue(s.json("attach", name, "--vhost-user", "x.sock", "--read-only")["read_only"])
            s.ok("detach", name)

    def test_without_a_daemon_it_can_be_removed(self):
        s = self.store(daemon=True)
        s.ok("volume", "create", "v", "--size", "1MiB")
        s.ok("attach", "v", "--vhost-user", "v.sock")
        s.stop_daemon()
        self.assertTrue(os.path.islink(s.folder / "v.sock"))
        s.ok("detach", "v")
        self.assertFalse(os.path.lexists(s.folder / "v.sock"))
        self.assertEqual(s.json("attachments"), [])
        s.ok("volume", "rm", "v")

    def test_a_link_to_another_runtime_directory_is_told(self):
        s = self.store(daemon=True)
        s.ok("volume", "create", "v", "--size", "1MiB")
        s.ok("attach", "v", "--vhost-user", "v.sock")
        s.stop_daemon()
        s.start_daemon("--runtime-dir", s.runtime / "elsewhere")
        place = s.json("attachments")[0]["socket"]
        self.assertTrue(place.startswith(str(s.runtime / "elsewhere")))
        self.assertIn(f"ln -sfn {place} {s.folder / 'v.sock'}", s.ok("attachments").out)
        subprocess.run(["ln", "-sfn", place, str(s.folder / "v.sock")], check=True)
        self.assertNotIn("ln -sfn", s.ok("attachments").out)
        s.ok("detach", "v")
        self.assertFalse(os.path.lexists(s.folder / "v.sock"))

    def test_a_block_that_does_not_fit_names_the_volume(self):
        s = self.store(daemon=True)
        s.ok("volume", "create", "v512", "--size", "512")
        self.assert_fails(s.run("attach", "v512", "--vhost-user", "v.sock", "--block-size", "4096"),
                          "invalid_argument", "'v512' has 512 bytes")

    def test_a_link_of_somebody_else_stays(self):
        s = self.store(daemon=True)
        s.ok("volume", "create", "v", "--size", "1MiB")
        s.ok("attach", "v", "--vhost-user", "v.sock")
        os.unlink(s.folder / "v.sock")
        (s.folder / "v.sock").write_text("mine")
        s.ok("detach", "v")
        self.assertEqual((s.folder / "v.sock").read_text(), "mine")


class Boots(TestCase):
    def test_manifests_without_and_with_a_daemon(self):
        s = self.store()
        s.ok("image", "import", "i", "-", data=os.urandom(300_000))
        s.ok("image", "import", "k", "-", data=os.urandom(5_000))
        s.ok("volume", "clone", "i", "v")
        s.ok("volume", "create", "plain", "--size", "1MiB")
        self.assert_fails(s.run("boot", "record", "v", "--lock-timeout", "0"), "unavailable",
                          "stellariumd --store")
        self.assert_fails(s.run("boot", "show", "v"), "not_found", "boot record")
        self.assert_fails(s.run("boot", "show", "w"), "not_found", "did you mean")
        self.assert_fails(s.run("boot", "show", "plain"), "not_found", "descends from no image")
        self.assert_fails(s.run("boot", "set", "v"), "invalid_argument", "--kernel")
        self.assert_fails(s.run("boot", "set", "v", "--kernel", "v"), "invalid_argument", "no image")
        self.assert_fails(s.run("prefetch", "v"), "not_found", "--all")
        self.assertEqual(s.json("prefetch", "v", "--all")["staged_bytes"], 303_104)
        s.ok("boot", "set", "v", "--kernel", "k", "--hints", "console=ttyS0")
        s.start_daemon()
        shown = s.json("boot", "show", "i")
        self.assertEqual((shown["kernel"]["image"], shown["initrd"], shown["hints"]),
                         ("k", None, "console=ttyS0"))
        self.assertEqual(s.json("boot", "show", "v"), shown)
        self.assert_fails(s.run("boot", "record", "v"), "invalid_argument", "not attached")
        s.ok("attach", "v", "--vhost-user", "v.sock")
        self.assertEqual(s.json("boot", "record", "v")["source"], "v")
        self.assert_fails(s.run("boot", "record", "v"), "busy", "boot stop v")
        self.assertIn("recording 'v'", s.ok("boot", "ls").out)
        self.assertEqual(s.json("boot", "stop", "v", "--discard")["bytes"], 0)
        self.assert_fails(s.run("boot", "stop", "v"), "not_found", "boot record v")
        s.ok("boot", "record", "v")
        self.assert_fails(s.run("boot", "stop", "v"), "invalid_argument", "nothing was read")
        s.ok("detach", "v")
        s.stop_daemon()
        self.assertEqual(len(s.json("boot", "ls")["boots"]), 1)
        s.ok("boot", "set", "i", "--kernel", "")
        self.assertIsNone(s.json("boot", "show", "v")["kernel"])
        s.ok("boot", "rm", "v")
        self.assertEqual(s.json("boot", "ls"), {"boots": [], "recordings": []})


class BootExtract(TestCase):
    """Kernel and initrd come out of an image's file system, wherever on the disk it begins."""

    KERNEL, INITRD = random.Random(1).randbytes(70_001), random.Random(2).randbytes(30_000)

    def disk(self, s, files, offset=0):
        """A disk with an ext4 of these files, in a partition when it does not begin at 0."""
        tree, disk = s.folder / "tree", s.folder / "disk.raw"
        for path, content in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes(content)
        tree.mkdir(exist_ok=True)
        with open(disk, "wb") as file:
            file.truncate(offset + (16 << 20))
            if offset:
                # One entry of a partition table as DOS made it: type 0x83, first sector, sectors.
                entry = struct.pack("<B3sB3sII", 0, b"", 0x83, b"", offset // 512, 32768)
                file.seek(446)
                file.write(entry)
                file.seek(510)
                file.write(b"\x55\xaa")
        subprocess.run(["/sbin/mke2fs", "-q", "-t", "ext4", "-d", tree, "-E", f"offset={offset}",
                        disk, "16M"], check=True, stdin=subprocess.DEVNULL,
                       env={**os.environ, "MKE2FS_SYNC": "0"})
        s.ok("image", "import", "i", disk)

    def content(self, s, image):
        out = s.folder / "out"
        s.ok("image", "export", image, out, "--force")
        return out.read_bytes()

    def test_the_newest_kernel_with_its_initrd(self):
        for offset in (0, 1 << 20):
            with self.subTest(offset=offset):
                s = self.store()
                self.disk(s, {"boot/vmlinuz-6.1.0-9-amd64": b"old", "boot/initrd.img-6.1.0-9-amd64": b"x",
                              "boot/vmlinuz-6.1.0-10-amd64": self.KERNEL,
                              "boot/initrd.img-6.1.0-10-amd64": self.INITRD,
                              "boot/vmlinuz-9; quit": b"no", "etc/fstab": b"none"}, offset)
                temporary = s.folder / "tmp"
                temporary.mkdir()
                s.environment["TMPDIR"] = str(temporary)
                shown = s.json("boot", "extract", "i")
                self.assertEqual((shown["kernel"]["image"], shown["initrd"]["image"]),
                                 ("i.vmlinuz", "i.initrd"))
                self.assertEqual(self.content(s, "i.vmlinuz"), self.KERNEL)
                self.assertEqual(self.content(s, "i.initrd"), self.INITRD)
                self.assertEqual(list(temporary.iterdir()), [])
                self.assert_fails(s.run("boot", "extract", "i"), "already_exists", "image rm i.vmlinuz")

    def test_a_partition_for_boot_and_no_initrd(self):
        s = self.store()
        self.disk(s, {"vmlinuz-5.10": self.KERNEL, "initrd.img-5.9": b"of another"}, 1 << 20)
        shown = s.json("boot", "extract", "i")
        self.assertEqual((shown["kernel"]["size_bytes"], shown["initrd"]), (len(self.KERNEL), None))

    def test_an_image_without_one(self):
        s = self.store()
        self.disk(s, {"etc/fstab": b"none"})
        self.assert_fails(s.run("boot", "extract", "i"), "not_found", "boot set i")
        self.assertEqual([image["name"] for image in s.json("image", "ls")], ["i"])
        s.ok("image", "import", "noise", "-", data=os.urandom(100_000))
        self.assert_fails(s.run("boot", "extract", "noise"), "not_found", "boot set noise")


class Daemon(TestCase):
    def daemon(self, s, *words):
        return subprocess.run([DAEMON, *map(str, words)], capture_output=True, text=True,
                              env=s.environment, timeout=TIMEOUT_S, check=False)

    def test_all_faults_of_a_config_at_once(self):
        s = self.store(make=False)
        config = s.folder / "config.json"
        config.write_text(json.dumps({"memory": "1KiB", "log_level": "loud", "metrics_lisen": "x",
                                      "threads": -1, "store": 7}))
        done = self.daemon(s, "--config", config, "--metrics-listen", "nowhere", "--socket", "x" * 200)
        self.assertEqual(done.returncode, 2)
        for text in ("'memory' is 1.00 KiB", "'log_level' is 'loud'",
                     "'metrics_lisen' is not a known key; did you mean 'metrics_listen'?",
                     "'threads' must be", "'store' must be text", "'nowhere' is not an address",
                     "'socket' is"):
            self.assertIn(text, done.stderr)
        self.assertFalse(s.path.exists())
        config.write_text("{")
        self.assertEqual(self.daemon(s, "--config", config).returncode, 2)
        self.assertEqual(self.daemon(s, "--config", s.folder / "none").returncode, 2)
        self.assertEqual(self.daemon(s, "--frob").returncode, 2)
        for words, text in [(["--threads", "-1"], "'threads' must be a whole number from 0 to 256"),
                            (["--writeback-age-ms", "-5"], "from 10 to 3600000"),
                            (["--config", s.folder], "is a directory"),
                            (["--config", "/dev/null"], "is empty")]:
            done = self.daemon(s, *words, "--check-config")
            self.assertEqual(done.returncode, 2)
            self.assertIn(text, done.stderr)
        config.write_text(json.dumps({"memory": "1GiB", "log_format": "json"}))
        missing = self.daemon(s, "--config", config, "--check-config")
        self.assertEqual(missing.returncode, 2)
        self.assertIn("there is no store", missing.stderr)
        for text, why in (('{"memory": "1GiB", "memory": "2GiB"}', "'memory' more than once"),
                          ('{"runtime_dir": "/"}', "directory of the whole system"),
                          ('{"metrics_listen": "nosuchhost:1"}', "is not an address")):
            config.write_text(text)
            done = self.daemon(s, "--config", config, "--check-config")
            self.assertEqual(done.returncode, 2)
            self.assertIn(why, done.stderr)
        made = self.store()
        config.write_text(json.dumps({"memory": "1GiB"}))
        self.assertEqual(self.daemon(made, "--config", config, "--check-config").returncode, 0)

    def test_manual_knows_all_options(self):
        manual = (SOURCE_ROOT / "docs/man/stellariumd.8").read_text().replace("\\-", "-")
        text = self.daemon(self.store(make=False), "--help").stdout
        for option in set(re.findall(r"^  (?:-h,)?(--[a-z-]+)", text, re.MULTILINE)):
            self.assertIn(option, manual)

    def test_no_store(self):
        s = self.store(make=False)
        done = self.daemon(s)
        self.assertEqual(done.returncode, EXIT["not_found"], done.stderr)
        self.assertIn("init", done.stderr)

    def test_log_is_structured(self):
        s = self.store()
        s.start_daemon("--log-format", "json", "--log-level", "debug")
        s.ok("volume", "create", "v", "--size", "1MiB")
        s.run("volume", "info", 'a" level=error event="x')
        s.stop_daemon()
        lines = [json.loads(line) for line in s.log.read_text().splitlines()]
        self.assertEqual([line["event"] for line in lines][-1], "stopped")
        self.assertIn("ready", [line["event"] for line in lines])
        for line in lines:
            self.assertRegex(line["ts"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
            self.assertIn(line["level"], ("debug", "info", "warning"))

    def test_metrics_on_both_sockets(self):
        s = self.store()
        s.start_daemon("--metrics-listen", "127.0.0.1:0")
        port = int(re.search(r"event=metrics .*port=(\d+)", s.log.read_text()).group(1))
        s.ok("volume", "create", "v", "--size", "1MiB")
        s.ok("attach", "v", "--vhost-user", "v.sock")
        def get(connection, target):
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
            return answer.decode()
        def on_tcp(target):
            with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
                return get(connection, target)
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(s.control_socket())
            unix_page = get(control, "/metrics")
        for page in (on_tcp("/metrics"), unix_page):
            self.assertTrue(page.startswith("HTTP/1.1 200"), page[:100])
            self.assertIn("text/plain; version=0.0.4", page)
            for line in ("stellarium_volumes 1", "stellarium_attachments 1",
                         "stellarium_damaged_chunks 0", "stellarium_scrub_passes_total 0",
                         "stellarium_disk_full 0", "stellarium_full_appends_total 0",
                         'stellarium_device_connected{volume="v"} 0',
                         'stellarium_device_request_seconds_count{volume="v",request="write"} 0'):
                self.assertIn(line, page)
        # The TCP port tells nothing else and changes nothing.
        self.assertTrue(on_tcp("/v1/volumes").startswith("HTTP/1.1 404"))

    def test_long_imports_delay_nobody_and_end_with_the_daemon(self):
        s = self.store(daemon=True)
        importers = [s.start("image", "import", f"slow-{i}", "-", stdin=subprocess.PIPE)
                     for i in range(6)]
        for importer in importers:
            importer.stdin.write(random.Random(1).randbytes(2 << 20))
            importer.stdin.flush()
        with socket.socket(socket.AF_UNIX):
            for _ in range(TIMEOUT_S * 10):
                if s.ok("volume", "ls") and self.running_imports(s) == 6:
                    break
        self.assertEqual(self.running_imports(s), 6)
        s.ok("volume", "create", "v", "--size", "1MiB")
        self.assert_fails(s.run("image", "import", "slow-1", "-", data=b"x"), "busy", "slow-1")
        s.stop_daemon()
        for importer in importers:
            _, stderr = importer.communicate(timeout=TIMEOUT_S)
            self.assertEqual(importer.returncode, EXIT["unavailable"], stderr)
            self.assertIn(b"the daemon stopped in the middle of the upload, so nothing was taken over", stderr)
        self.assertEqual(s.json("image", "ls"), [])
        self.assertEqual(len(s.json("volume", "ls")), 1)

    @staticmethod
    def running_imports(s):
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(s.control_socket())
            control.sendall(b"GET /v1/imports HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            answer = b""
            while piece := control.recv(65536):
                answer += piece
        return len(json.loads(answer.split(b"\r\n\r\n", 1)[1]))

    def test_an_interrupted_import_leaves_nothing(self):
        for daemon in (False, True):
            s = self.store(daemon=daemon)
            importer = s.start("image", "import", "x", "-", stdin=subprocess.PIPE)
            importer.stdin.write(random.Random(1).randbytes(3 << 20))
            importer.stdin.flush()
            if daemon:
                for _ in range(TIMEOUT_S * 10):
                    if self.running_imports(s) == 1:
                        break
                else:
                    self.fail("the import did not start")
            else:
                s.wait_until_held_by(importer)
            importer.send_signal(signal.SIGINT)
            importer.stdin.close()
            importer.stdin = None
            _, stderr = importer.communicate(timeout=TIMEOUT_S)
            self.assertEqual(importer.returncode, EXIT["cancelled"], stderr)
            self.assertEqual(s.json("image", "ls"), [])
            s.ok("image", "import", "x", "-", data=b"y" * 5000)

    def test_hostile_requests_harm_nobody(self):
        s = self.store(daemon=True)
        path = s.control_socket()
        def send(data, wait=True):
            with socket.socket(socket.AF_UNIX) as control:
                control.settimeout(TIMEOUT_S)
                control.connect(path)
                answer = b""
                try:
                    try:
                        control.sendall(data)
                        control.shutdown(socket.SHUT_WR)
                    except BrokenPipeError:
                        pass  # The answer came before the end of the request.
                    if wait:
                        while piece := control.recv(65536):
                            answer += piece
                except ConnectionResetError:
                    pass
                return answer
        head = b"Host: x\r\n"
        self.assertIn(b" 400 ", send(b"nonsense\r\n\r\n"))
        self.assertIn(b" 413 ", send(b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n"))
        self.assertIn(b" 413 ", send(b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100_000))
        self.assertIn(b" 413 ", send(b"POST /v1/volumes HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n"))
        self.assertIn(b" 400 ", send(b"POST /v1/volumes HTTP/1.1\r\nContent-Length: -1\r\n\r\n"))
        self.assertIn(b" 400 ", send(b"POST /v1/volumes HTTP/1.1\r\n" + head +
                                     b"Content-Length: 4\r\n\r\n{{{{"))
        self.assertIn(b" 400 ", send(b"PUT /v1/images/x HTTP/1.1\r\n" + head +
                                     b"Content-Length: 5\r\n\r\nhello"))
        self.assertIn(b" 400 ", send(b"PUT /v1/images/x HTTP/1.1\r\n" + head +
                                     b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"))
        self.assertIn(b" 404 ", send(b"GET /../../etc/passwd HTTP/1.1\r\n" + head + b"\r\n"))
        rng = random.Random(11)
        for _ in range(200):
            send(rng.randbytes(rng.randrange(1, 2000)), wait=rng.random() < 0.5)
        # Many that connect and say nothing.
        silent = [socket.socket(socket.AF_UNIX) for _ in range(100)]
        for each in silent:
            each.connect(path)
        s.ok("stats")
        for each in silent:
            each.close()
        self.assertEqual(s.json("image", "ls"), [])
        s.stop_daemon()

    def test_methods_and_parameters_of_the_interface(self):
        s = self.store(daemon=True)
        s.ok("volume", "create", "v", "--size", "1MiB")
        def ask(method, target, body=b""):
            with socket.socket(socket.AF_UNIX) as control:
                control.connect(s.control_socket())
                control.sendall(f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                                f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
                answer = b""
                while piece := control.recv(65536):
                    answer += piece
            head, body = answer.decode().split("\r\n\r\n", 1)
            return head, body
        head, body = ask("GET", "/v1/volumes")
        self.assertIn('"name":"v"', body)
        self.assertEqual(ask("HEAD", "/v1/volumes"), (head, ""))
        head, body = ask("HEAD", "/v1/content?source=v")
        self.assertTrue(head.startswith("HTTP/1.1 200 "), head)
        self.assertNotIn("Content-Length", head)
        self.assertEqual(body, "")
        self.assertEqual(ask("HEAD", "/metrics")[1], "")
        for method, target, allowed in [("PATCH", "/v1/volumes", "GET, POST, HEAD"),
                                        ("DELETE", "/metrics", "GET, HEAD"),
                                        ("GET", "/v1/volumes/v/resize", "POST")]:
            head, body = ask(method, target)
            self.assertTrue(head.startswith("HTTP/1.1 405 "), head)
            self.assertIn(f"Allow: {allowed}\r\n", head + "\r\n")
            self.assertIn("not possible", json.loads(body)["message"])
        for method, target, body, text in [
                ("GET", "/v1/snapshots?volme=v", b"", "did you mean 'volume'?"),
                ("POST", "/v1/volumes", b'{"name": "a", "name": "b", "size_bytes": 4096}',
                 "'name' more than once")]:
            head, body = ask(method, target, body)
            self.assertTrue(head.startswith("HTTP/1.1 400 "), head)
            self.assertIn(text, json.loads(body)["message"])
        self.assertEqual([v["name"] for v in s.json("volume", "ls")], ["v"])

    def test_many_at_once(self):
        s = self.store(daemon=True)
        failures = []
        def work(n):
            for i in range(5):
                done = s.run("volume", "create", f"v-{n}-{i}", "--size", "1MiB")
                if done.code != 0:
                    failures.append(done.err)
        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(failures, [])
        self.assertEqual(len(s.json("volume", "ls")), 40)


if __name__ == "__main__":
    main()

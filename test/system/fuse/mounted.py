"""An engine whose daemon shows its store below a directory; see engine.py.

    with Mounted(build_folder) as engine:
        engine.run("init")
        engine.start()
        (engine.files / "volumes" / "vm-1").read_bytes()

The directory, and the holder that keeps it, are gone at the end of the block. One thread.
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guests"))
from engine import Engine, EngineError  # noqa: E402,F401

MIB = 1 << 20


def check(condition, text):
    if not condition:
        raise AssertionError(text)


def skip_without_fuse():
    """A machine without FUSE, or on which we may not mount, is no failure."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        print(f"skipped: /dev/fuse: {error.strerror}")
        sys.exit(77)
    if os.geteuid() != 0:
        print("skipped: only root mounts without fusermount3")
        sys.exit(77)


class Mounted(Engine):
    def __init__(self, build):
        super().__init__(build)
        self.files = self.work / "files"
        self.files.mkdir()

    def start(self, *options):
        self.start_daemon("--mount", self.files, *options)

    def volume(self, name):
        return self.files / "volumes" / name

    def image(self, name):
        return self.files / "images" / name

    def restart_by_kill(self, *options):
        self.kill_daemon()
        self.start(*options)

    def mounted(self):
        return any(line.split()[4] == str(self.files)
                   for line in Path("/proc/self/mountinfo").read_text().splitlines())

    def holders(self):
        """Processes that keep this directory."""
        found = []
        for each in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = each.read_bytes().split(b"\0")
            except OSError:
                continue
            if (words[0].endswith(b"stellarium-mount-holder")
                    and f"--directory={self.files}".encode() in words):
                found.append(int(each.parent.name))
        return found

    def make_image(self, name, data):
        """An image with this content, from a file; the file."""
        source = self.work / f"{name}.raw"
        source.write_bytes(data)
        self.run("image", "import", name, source)
        return source

    def __exit__(self, *_):
        self.kill_daemon()
        subprocess.run(["umount", "-f", "-l", str(self.files)], capture_output=True, check=False)
        for pid in self.holders():
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while self.mounted() and time.monotonic() < deadline:
            time.sleep(0.05)
        super().__exit__(*_)


def wait_until(condition, text, timeout_s=300):
    end = time.monotonic() + timeout_s
    while not condition():
        check(time.monotonic() < end, f"in vain waited for: {text}")
        time.sleep(0.02)


def answer_of(stream, prefix, timeout_s=300):
    """The next line of a program that begins with `prefix`; faults end the test."""
    while True:
        line = stream.readline()
        if not line:
            raise AssertionError(f"a program ended before it said '{prefix}'")
        if line.startswith("@@fault"):
            raise AssertionError(line)
        if line.startswith(prefix):
            return line


def run_with_seed(name, run):
    """Calls run(engine, seed, scale) and leaves its figures in the build folder; --report prints
    them. When it fails, the seed and the end of the daemon's log are printed."""
    skip_without_fuse()
    seed = int(os.environ.get("STELLARIUM_TEST_SEED", "1"))
    scale = int(os.environ.get("STELLARIUM_TEST_SCALE", "1"))
    with Mounted(sys.argv[1]) as engine:
        try:
            figures = run(engine, seed, scale)
        except BaseException:
            print(f"STELLARIUM_TEST_SEED={seed}; the daemon's log ends:\n{engine.log_tail()}",
                  file=sys.stderr)
            raise
    text = json.dumps(figures, indent=2)
    Path(sys.argv[1], f"{name}.json").write_text(text + "\n")
    if "--report" in sys.argv:
        print(text)


def json_of(line):
    return json.loads(line[line.index("{"):])

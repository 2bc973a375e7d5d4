"""The tools that people use today, each at its best settings, and ours: one function for one job.

Every function does its job once, with what it needs prepared before and removed after the clock,
and returns seconds. What a tool wrote is synced before the clock stops, for all alike: whoever is
durable on return has little left to sync, whoever is not pays here.
"""
import ctypes
import fcntl
import filecmp
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

from measure import Unavailable

FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)

LIBC = ctypes.CDLL(None, use_errno=True)


class PeerError(Exception):
    """A tool failed; the text says which and what it said."""


class LimitError(PeerError):
    """Our daemon has no room for more, by a limit of its own or of this machine."""


class Commands:
    """What was run, for the report: of commands that differ in numbers only, the first."""

    def __init__(self):
        self.lines = {}

    def note(self, words):
        line = shlex.join(map(str, words))
        if len(line) > 2000:
            line = line[:1000] + " ... " + line[-500:]
        self.lines.setdefault(re.sub(r"\d+", "N", line), line)

    def take(self):
        lines, self.lines = list(self.lines.values()), {}
        return lines


COMMANDS = Commands()


def run(*words, cwd=None, environment=None):
    """Runs a program to its end; what it printed. Unavailable when it is not installed."""
    COMMANDS.note(words)
    try:
        done = subprocess.run([str(word) for word in words], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
                              check=False, env={**os.environ, **(environment or {})})
    except FileNotFoundError:
        raise Unavailable(f"{words[0]} is not installed") from None
    if done.returncode != 0:
        raise PeerError(f"{shlex.join(map(str, words))[:1000]} ended with status "
                        f"{done.returncode}:\n{(done.stderr + done.stdout)[-2000:]}")
    return done.stdout


def sync_file_system(path):
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if LIBC.syncfs(fd) != 0:
            raise PeerError(f"syncfs of {path}: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(fd)


def timed(folder, work):
    """Seconds of `work()` and of the sync of everything that it wrote to the file system."""
    sync_file_system(folder)
    begin = time.monotonic()
    work()
    sync_file_system(folder)
    return time.monotonic() - begin


def read_whole(path):
    """Brings a file into the page cache, as it is for everybody in turn."""
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 22):
            pass


def forget(path):
    """Takes a file out of the page cache, as far as it is clean and not mapped."""
    if path.is_file():
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def allocated_bytes(path):
    """What `du` counts, of a file or of everything in a folder."""
    paths = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(each.lstat().st_blocks * 512 for each in paths)


def fresh(folder):
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


class Archive:
    """A place where one tool keeps images.

    put() stores one under a name, get() writes it to a file; both leave syncing to who asked.
    clear() makes it empty, and is needed before the first use.
    """

    def __init__(self, work, name):
        self.folder = work / name

    def clear(self):
        fresh(self.folder)
        self.prepare()

    def prepare(self):
        pass

    def timed_put(self, name, image):
        read_whole(image)
        return timed(self.folder, lambda: self.put(name, image))

    def timed_get(self, name, expected):
        """`expected` is the image that was stored: what comes out is compared with it."""
        folder = fresh(self.folder.parent / "out")
        seconds = timed(self.folder, lambda: self.get(name, folder / expected.name))
        if not filecmp.cmp(expected, folder / expected.name, shallow=False):
            raise PeerError(f"{type(self).__name__} gave back another image than it was given")
        shutil.rmtree(folder)
        return seconds


class Cp(Archive):
    def put(self, name, image):
        run("cp", "--sparse=always", "--reflink=never", image, self.folder / name)

    def get(self, name, out):
        run("cp", "--sparse=always", "--reflink=never", self.folder / name, out)


class Casync(Archive):
    def put(self, name, image):
        run("casync", "make", "--compression=zstd", f"--store={self.folder}/chunks",
            f"{self.folder}/{name}.caibx", image)

    def get(self, name, out):
        run("casync", "extract", f"--store={self.folder}/chunks", f"{self.folder}/{name}.caibx",
            out)


class Borg(Archive):
    """Cut by content as is borg's default, or, `fixed`, at 4 KiB, which suits disks."""

    def __init__(self, work, name, fixed=False):
        self.chunker = "fixed,4096" if fixed else "buzhash,19,23,21,4095"
        super().__init__(work, name)

    def prepare(self):
        self.environment = {"BORG_BASE_DIR": str(self.folder / "home"),
                            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes"}
        run("borg", "init", "--encryption=none", self.folder / "repo", environment=self.environment)

    def put(self, name, image):
        run("borg", "create", "--compression=none", "--files-cache=disabled", "--sparse",
            f"--chunker-params={self.chunker}", f"{self.folder}/repo::{name}", image.name,
            cwd=image.parent, environment=self.environment)

    def get(self, name, out):
        run("borg", "extract", "--sparse", f"{self.folder}/repo::{name}", cwd=out.parent,
            environment=self.environment)


class Restic(Archive):
    """Debian 12's restic 0.14 cannot restore holes; it writes zeros."""

    def prepare(self):
        self.environment = {"RESTIC_PASSWORD": "x", "RESTIC_CACHE_DIR": str(self.folder / "cache"),
                            "RESTIC_REPOSITORY": str(self.folder / "repo")}
        run("restic", "init", "--repository-version=2", environment=self.environment)

    def put(self, name, image):
        run("restic", "backup", "--quiet", "--force", "--compression=off", "--host=h",
            f"--tag={name}", image.name, cwd=image.parent, environment=self.environment)

    def get(self, name, out):
        run("restic", "restore", "latest", f"--tag={name}", "--host=h",
            f"--target={out.parent}", environment=self.environment)


class Stellarium(Archive):
    def __init__(self, work, name, build):
        self.ctl = build / "src/cli/stellarctl"
        super().__init__(work, name)

    def prepare(self):
        self.environment = {"STELLARIUM_STORE": str(self.folder / "store"),
                            "STELLARIUM_RUNTIME_DIR": str(self.folder)}
        self.run("init")

    def run(self, *words):
        return run(self.ctl, *words, environment=self.environment)

    def put(self, name, image):
        self.run("image", "import", name, image)

    def get(self, name, out):
        self.run("image", "export", name, out)


def ficlone_many(base, folder, count):
    """`count` reflinks of one file by one process."""
    with open(base, "rb") as source:
        for number in range(count):
            with open(folder / f"clone-{number}", "wb") as target:
                fcntl.ioctl(target.fileno(), FICLONE, source.fileno())


class XfsVolume:
    """A new XFS in a file, mounted below `folder` while the block runs.

    Unavailable where that is not allowed: it needs root and a loop device.
    """

    def __init__(self, folder, size_bytes):
        self.file = Path(folder) / "xfs.img"
        self.mount = Path(folder) / "xfs"
        self.size_bytes = size_bytes

    def __enter__(self):
        if os.geteuid() != 0:
            raise Unavailable("mounting XFS needs root")
        self.mount.mkdir(parents=True, exist_ok=True)
        with open(self.file, "wb") as file:
            file.truncate(self.size_bytes)
        try:
            run("mkfs.xfs", "-q", "-f", "-m", "reflink=1", self.file)
            try:
                run("mount", "-o", "loop", self.file, self.mount)
            except PeerError as error:
                raise Unavailable("XFS cannot be mounted: "
                                  + str(error).splitlines()[-1].strip()) from None
        except BaseException:
            self.file.unlink()
            raise
        return self.mount

    def __exit__(self, *_):
        run("umount", self.mount)
        self.file.unlink()

"""Drives the real stellarctl and stellariumd in folders of their own; for the tests beside this."""
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import unittest
from pathlib import Path

CTL = os.environ.get("STELLARCTL", "stellarctl")
DAEMON = os.environ.get("STELLARIUMD", "stellariumd")
SANITIZER = os.environ.get("STELLARIUM_TEST_SANITIZER", "")
TIMEOUT_S = 300

EXIT = {"ok": 0, "invalid_argument": 2, "not_found": 3, "already_exists": 4, "busy": 5,
        "corrupt": 6, "unsupported": 7, "io_error": 8, "no_space": 9, "read_only": 10,
        "permission_denied": 11, "limit_exceeded": 12, "unavailable": 13, "cancelled": 16,
        "protocol_error": 17}


class Done:
    """What a command did."""

    def __init__(self, process, stdout, stderr):
        self.code = process.returncode
        self.out = stdout.decode(errors="replace") if isinstance(stdout, bytes) else stdout
        self.err = stderr.decode(errors="replace") if isinstance(stderr, bytes) else stderr
        self.raw = stdout

    def json(self):
        return json.loads(self.out)


class Store:
    """A store in a folder of its own, used directly or through a daemon."""

    def __init__(self, make=True):
        self.folder = Path(tempfile.mkdtemp(prefix="stl-"))
        self.path = self.folder / "store"
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.runtime = Path(tempfile.mkdtemp(prefix="stl-run-", dir=memory))
        self.environment = {key: value for key, value in os.environ.items()
                            if key not in ("STELLARIUM_SOCKET", "NOTIFY_SOCKET")}
        self.environment |= {"STELLARIUM_STORE": str(self.path),
                             "STELLARIUM_RUNTIME_DIR": str(self.runtime)}
        self.daemon = None
        self.log = self.folder / "daemon.log"
        if make:
            self.ok("init")

    def close(self):
        self.kill_daemon()
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.runtime, ignore_errors=True)

    # --- Commands ---------------------------------------------------------------------------------

    def start(self, *words, **options):
        """A command that goes on by itself."""
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE,
                   "stderr": subprocess.PIPE, "env": self.environment, "cwd": self.folder} | options
        return subprocess.Popen([CTL, *map(str, words)], **options)

    def run(self, *words, data=None, **options):
        if data is not None:
            options["stdin"] = subprocess.PIPE
        process = self.start(*words, **options)
        stdout, stderr = process.communicate(data, timeout=TIMEOUT_S)
        return Done(process, stdout or b"", stderr or b"")

    def ok(self, *words, **options):
        done = self.run(*words, **options)
        if done.code != 0:
            raise AssertionError(f"stellarctl {' '.join(map(str, words))} exited with {done.code}:\n"
                                 f"{done.err}{self.log_tail()}")
        return done

    def json(self, *words, **options):
        return self.ok(*words, "--json", **options).json()

    def limited(self, *words, file_bytes, **options):
        """With a limit on the size of files (as a file system with small files has)."""
        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        return self.run(*words, preexec_fn=limit, **options)

    def wait_until_held_by(self, process):
        """Waits until a command has the store; its lock names who holds it."""
        lock = self.path / "lock"
        while lock.read_text().strip() != str(process.pid):
            if process.poll() is not None:
                raise AssertionError(f"the command ended with {process.returncode}")
            os.sched_yield()

    # --- The daemon -------------------------------------------------------------------------------

    def begin_daemon(self, *words, environment=None):
        """Without waiting until it answers."""
        with open(self.log, "ab") as log:
            self.daemon = subprocess.Popen(
                [DAEMON, *map(str, words)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**self.environment, **(environment or {})})
        return self.daemon

    def start_daemon(self, *words):
        with tempfile.TemporaryDirectory(prefix="stl-ready-") as folder, \
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.bind(f"{folder}/ready")
            ready.settimeout(1)
            self.begin_daemon(*words, environment={"NOTIFY_SOCKET": f"{folder}/ready"})
            for _ in range(TIMEOUT_S):
                if self.daemon.poll() is not None:
                    break
                try:
                    if b"READY=1" in ready.recv(4096):
                        return
                except TimeoutError:
                    continue
        raise AssertionError(f"the daemon did not become ready{self.log_tail()}")

    def stop_daemon(self):
        self.daemon.send_signal(signal.SIGTERM)
        code = self.daemon.wait(TIMEOUT_S)
        self.daemon = None
        if code != 0:
            raise AssertionError(f"the daemon stopped with {code}{self.log_tail()}")

    def kill_daemon(self):
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait()
            self.daemon = None

    def control_socket(self):
        return self.json("status")["socket"]

    def log_tail(self):
        if not self.log.exists():
            return ""
        return "\nthe daemon's log ends:\n" + "\n".join(
            self.log.read_text(errors="replace").splitlines()[-20:])

    # --- Looking ----------------------------------------------------------------------------------

    def disk_bytes(self):
        """As du counts."""
        return sum(path.lstat().st_blocks * 512 for path in self.path.rglob("*"))

    def normalised(self, text):
        """Without what differs between two stores that were told the same."""
        text = text.replace(str(self.folder), "FOLDER").replace(str(self.runtime), "RUNTIME")
        text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME", text)
        return re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "UUID", text)


class TestCase(unittest.TestCase):
    maxDiff = None

    def store(self, daemon=False, make=True):
        store = Store(make)
        self.addCleanup(store.close)
        if daemon:
            store.start_daemon()
        return store

    def assert_fails(self, done, kind, *texts):
        self.assertEqual(done.code, EXIT[kind], f"stdout: {done.out}\nstderr: {done.err}")
        self.assertEqual(done.out, "")
        for text in texts:
            self.assertIn(text, done.err)


class Result(unittest.TextTestResult):
    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        # As GoogleTest says it, for scripts/check-skips.py.
        print(f"{test.id()}: Skipped\n{reason}", flush=True)


def main():
    unittest.main(verbosity=0, warnings="ignore",
                  testRunner=unittest.TextTestRunner(verbosity=0, warnings="ignore",
                                                     resultclass=Result))


# --- Sparse files ---------------------------------------------------------------------------------

def data_extents(path):
    """(offset, end) of the ranges of a file that are no holes."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        offset = 0
        while offset < size:
            try:
                start = os.lseek(file.fileno(), offset, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, min(end, size)
            offset = end


def first_difference(path_a, path_b):
    """The first byte that differs, None when equal; holes are compared as zeros without reading
    them."""
    size_a, size_b = os.path.getsize(path_a), os.path.getsize(path_b)
    if size_a != size_b:
        return min(size_a, size_b)
    with open(path_a, "rb") as a, open(path_b, "rb") as b:
        for start, end in sorted([*data_extents(path_a), *data_extents(path_b)]):
            offset = start
            while offset < end:
                length = min(1 << 20, end - offset)
                a.seek(offset)
                b.seek(offset)
                bytes_a, bytes_b = a.read(length), b.read(length)
                if bytes_a != bytes_b:
                    return offset + next(i for i in range(length) if bytes_a[i] != bytes_b[i])
                offset += length
    return None

"""The built programs on a store of their own: stellarctl's answers as JSON, and the daemon.

    with Engine(build_folder) as engine:
        engine.ctl("init")
        engine.start_daemon()
        engine.ctl("attach", "vm-1", "--vhost-user", engine.socket_path("vm-1"))

Everything (store, runtime directory, logs, a daemon that still runs) is removed at the end of the
block. The store lies below the cache folder, on a disk; the runtime directory in memory. One thread.
"""
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import guests


LANDLOCK_CREATE_RULESET = 444  # The same number on every architecture.


def sandbox_words():
    """The strictest sandbox that this kernel has: a forbidden system call ends the daemon."""
    version = ctypes.CDLL(None).syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
    return ["--sandbox", "strict"] if version > 0 else []


class EngineError(Exception):
    """A program of ours did not do what was asked; the text says what it said."""


class Engine:
    READY_TIMEOUT_S = 300
    STOP_TIMEOUT_S = 300

    def __init__(self, build, keep=False):
        self.keep = keep
        self.daemon = None
        self.ctl_program = self._find_program(build, "stellarctl")
        self.daemon_program = self._find_program(build, "stellariumd")
        folder = guests.cache_folder() / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        # Acknowledged writes wait for their flush in memory that outlives the daemon's process.
        memory = next((each for each in ("/dev/shm", os.environ.get("XDG_RUNTIME_DIR"), "/run")
                       if each and os.access(each, os.W_OK)), None)
        if memory is None:
            raise EngineError("no memory file system for the runtime directory (/dev/shm) is writable")
        self.work = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
        self.runtime = Path(tempfile.mkdtemp(prefix="stellarium-run-", dir=memory))
        self.store = self.work / "store"
        self.log = self.work / "stellariumd.log"
        self.environment = {**os.environ, "STELLARIUM_STORE": str(self.store),
                            "STELLARIUM_RUNTIME_DIR": str(self.runtime)}

    @staticmethod
    def _find_program(build, name):
        found = [path for path in Path(build).rglob(name)
                 if path.is_file() and os.access(path, os.X_OK)]
        if not found:
            raise EngineError(f"{name} is not built in {build}; run scripts/build.sh")
        return found[0]

    # --- The command ------------------------------------------------------------------------------

    def run(self, *words, status=0):
        """Runs stellarctl as given; its output. The exit status must be `status`."""
        done = subprocess.run([str(self.ctl_program), *map(str, words)], text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, env=self.environment,
                              check=False)
        if done.returncode != status:
            raise EngineError(f"stellarctl {' '.join(map(str, words))} ended with status "
                              f"{done.returncode}, not {status}:\n{done.stderr.strip()}")
        return done.stdout

    def ctl(self, *words):
        """Runs a command that reports; its answer, from --json."""
        text = self.run(*words, "--json")
        try:
            return json.loads(text) if text.strip() else None
        except json.JSONDecodeError:
            raise EngineError(f"stellarctl {' '.join(map(str, words))} --json printed no JSON:\n"
                              f"{text[:500]}") from None

    def socket_path(self, volume):
        return self.runtime / f"{volume}.sock"

    def attach(self, volume, *options, queues=1, reconnect=True):
        """Attaches a volume; the disk to give to a guest."""
        path = self.socket_path(volume)
        self.ctl("attach", volume, "--vhost-user", path, "--queues", queues, *options)
        return guests.VhostUserDisk(str(path), queues=queues, reconnect=reconnect)

    # --- The daemon -------------------------------------------------------------------------------

    def spawn_daemon(self, *options, environment=None):
        """Starts it and does not wait. In the sandbox, unless the options say otherwise."""
        sandbox = [] if "--sandbox" in options else sandbox_words()
        with open(self.log, "ab") as log:
            self.daemon = subprocess.Popen(
                [str(self.daemon_program), "--store", str(self.store), *sandbox, *options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**self.environment, **(environment or {})})

    def start_daemon(self, *options):
        """Returns when the daemon says that it is ready."""
        # It reports readiness as it does to systemd: by a datagram to NOTIFY_SOCKET.
        with tempfile.TemporaryDirectory(prefix="stellarium-notify-") as folder, \
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(f"{folder}/socket")
            # As systemd's, it hears whoever the daemon has become.
            os.chmod(folder, 0o711)
            os.chmod(f"{folder}/socket", 0o777)
            notify.settimeout(1)
            self.spawn_daemon(*options, environment={"NOTIFY_SOCKET": f"{folder}/socket"})
            deadline = time.monotonic() + self.READY_TIMEOUT_S
            while time.monotonic() < deadline and self.daemon.poll() is None:
                try:
                    if b"READY=1" in notify.recv(4096):
                        return
                except TimeoutError:
                    continue
        raise EngineError(f"the daemon did not become ready; its log ends:\n{self.log_tail()}")

    def stop_daemon(self):
        """SIGTERM, and waits: the daemon drains and checkpoints."""
        if self.daemon is None or self.daemon.poll() is not None:
            raise EngineError(f"the daemon is not running; its log ends:\n{self.log_tail()}")
        self.daemon.send_signal(signal.SIGTERM)
        try:
            status = self.daemon.wait(self.STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise EngineError(f"the daemon did not stop within {self.STOP_TIMEOUT_S} s of "
                              f"SIGTERM") from None
        if status != 0:
            raise EngineError(f"the daemon ended with status {status}; its log ends:\n"
                              f"{self.log_tail()}")

    def kill_daemon(self):
        """SIGKILL: what a crash of the daemon is to everybody else."""
        if self.daemon is not None and self.daemon.poll() is None:
            self.daemon.kill()
            self.daemon.wait()

    def metric(self, name):
        """A number of the daemon's metrics."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
            control.connect(str(next(self.runtime.glob("**/control.sock"))))
            control.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            with control.makefile("r", encoding="utf-8") as answer:
                for line in answer:
                    if line.startswith(name + " "):
                        return int(float(line.split()[1]))
        raise EngineError(f"the metrics have no {name}")

    def log_tail(self):
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    # --- Life -------------------------------------------------------------------------------------

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill_daemon()
        shutil.rmtree(self.runtime, ignore_errors=True)
        if not self.keep:
            shutil.rmtree(self.work, ignore_errors=True)

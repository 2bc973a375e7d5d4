"""Back-ends that serve disks on vhost-user-blk sockets, ours and QEMU's, and the load on them."""
import http.client
import json
import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import peers
from measure import Unavailable


def process_figure(pid, file, key):
    """A number of /proc/PID/`file`; bytes where it is a size."""
    try:
        with open(f"/proc/{pid}/{file}", encoding="ascii") as lines:
            for line in lines:
                if line.startswith(key + ":"):
                    words = line.split()
                    return int(words[1]) * (1024 if words[-1] == "kB" else 1)
    except PermissionError:
        raise Unavailable(f"/proc/PID/{file} of a server cannot be read") from None
    raise Unavailable(f"/proc/PID/{file} has no {key} here")


def processor_seconds(pid):
    """Time that the threads of a process, those that there are now, have been on a processor."""
    total_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            total_ns += int((task / "schedstat").read_text(encoding="ascii").split()[0])
        except (FileNotFoundError, ProcessLookupError):
            if task.exists():  # Else the thread has just ended.
                raise Unavailable("no time of threads here (CONFIG_SCHED_INFO)") from None
    return total_ns / 1e9


class UnixConnection(http.client.HTTPConnection):
    """HTTP to the daemon's control socket, kept open between requests."""

    def __init__(self, path):
        super().__init__("stellarium")
        self.path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self.path)

    def call(self, method, target, body=None):
        """(answer, seconds)."""
        begin = time.monotonic()
        self.request(method, target, None if body is None else json.dumps(body),
                     {"Content-Type": "application/json"})
        answer = self.getresponse()
        text = answer.read()
        seconds = time.monotonic() - begin
        if answer.status >= 300:
            error = peers.LimitError if answer.status == 413 else peers.PeerError
            raise error(f"{method} {target}: {answer.status} {text.decode()}")
        return (json.loads(text) if text else None), seconds

    def text(self, target):
        self.request("GET", target)
        answer = self.getresponse()
        text = answer.read().decode()
        if answer.status != 200:
            raise peers.PeerError(f"GET {target}: {answer.status} {text}")
        return text


class Ours:
    """stellariumd on a store of its own, for as long as the block runs."""

    def __init__(self, engine, *options):
        self.engine = engine
        self.options = options

    def __enter__(self):
        self.engine.start_daemon(*self.options)
        self.api = UnixConnection(next(self.engine.runtime.glob("**/control.sock")))
        return self

    def __exit__(self, *_):
        self.api.close()
        self.engine.stop_daemon()

    @property
    def pid(self):
        return self.engine.daemon.pid

    def stats(self):
        return self.api.call("GET", "/v1/stats")[0]

    def clone(self, source, *names):
        return self.api.call("POST", "/v1/clones", {"source": source, "names": names})[1]

    def attach(self, name, **options):
        return self.api.call("PUT", f"/v1/attachments/{name}", options)[0]["socket"]

    def device_bytes(self, name, request):
        """Bytes that the guest of a volume has read, or written, since it was attached."""
        sample = f'stellarium_device_bytes_total{{volume="{name}",request="{request}"}} '
        for line in self.api.text("/metrics").splitlines():
            if line.startswith(sample):
                return int(float(line.removeprefix(sample)))
        raise peers.PeerError(f"the daemon's metrics have no {sample}")

    def drop(self, *names):
        """Detaches and removes."""
        for name in names:
            self.api.call("DELETE", f"/v1/attachments/{name}")
        self.remove(*names)

    def remove(self, *names):
        self.api.call("POST", "/v1/removals", {"kind": "volume", "names": names})


class QemuStorageDaemon:
    """qemu-storage-daemon: I/O threads that poll, io_uring, the cache on. Serves `sockets`."""

    TIMEOUT_S = 120

    def __init__(self, sockets, blockdevs, *words):
        """`blockdevs` as on its command line; the node `disk-N` is served on the Nth socket."""
        self.sockets = [str(path) for path in sockets]
        threads = min(os.cpu_count(), len(sockets))
        self.words = ["qemu-storage-daemon", *words]
        for number in range(threads):
            self.words += ["--object", f"iothread,id=io-{number},poll-max-ns=32768"]
        for blockdev in blockdevs:
            self.words += ["--blockdev", blockdev]
        for number, path in enumerate(self.sockets):
            self.words += ["--export", f"type=vhost-user-blk,id=export-{number},"
                                       f"node-name=disk-{number},writable=on,"
                                       f"iothread=io-{number % threads},"
                                       f"addr.type=unix,addr.path={path}"]

    @staticmethod
    def file(path):
        return f"file.driver=file,file.filename={path},file.aio=io_uring,file.cache.direct=off"

    @classmethod
    def one(cls, socket, path, image_format, *words):
        """One disk in a file; a qcow2 file's backing file is opened as well."""
        return cls([socket], [f"driver={image_format},node-name=disk-0,{cls.file(path)}"], *words)

    @classmethod
    def overlays(cls, sockets, base, paths):
        """qcow2 files over one raw file, which is opened once."""
        return cls(sockets, [f"driver=raw,node-name=base,read-only=on,{cls.file(base)}"] + [
            f"driver=qcow2,node-name=disk-{number},backing=base,{cls.file(path)}"
            for number, path in enumerate(paths)])

    @property
    def pid(self):
        return self.process.pid

    def __enter__(self):
        peers.COMMANDS.note(self.words)
        self.errors = tempfile.TemporaryFile()
        try:
            self.process = subprocess.Popen(self.words, stdin=subprocess.DEVNULL,
                                            stderr=self.errors)
        except FileNotFoundError:
            raise Unavailable(f"{self.words[0]} is not installed") from None
        deadline = time.monotonic() + self.TIMEOUT_S
        while not all(os.path.exists(path) for path in self.sockets):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise peers.PeerError("qemu-storage-daemon does not serve: "
                                      + os.pread(self.errors.fileno(), 2000, 0).decode())
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        # Now and then it does not end at SIGTERM. What was flushed is in its files.
        self.process.kill()
        self.process.wait()
        for path in self.sockets:
            if os.path.exists(path):
                os.unlink(path)


class Connected:
    """While the block runs, the load generator is at work on `sockets`: without options it keeps
    one read in flight on each. It begins when no guest is connected."""

    TIMEOUT_S = 600

    def __init__(self, blkbench, daemon, sockets, *options):
        self.daemon = daemon
        self.count = len(sockets)
        self.words = [blkbench, *sockets, *map(str, options or ("--depth", 1)),
                      "--seconds", str(2 * self.TIMEOUT_S)]

    def __enter__(self):
        peers.COMMANDS.note(self.words)
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(self.words, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=self.errors)
        deadline = time.monotonic() + self.TIMEOUT_S
        while self.connected() < self.count:
            if self.process.poll() is not None or time.monotonic() > deadline:
                connected = self.connected()
                self.__exit__()
                raise peers.PeerError(f"the load generator connected {connected} of {self.count} "
                                      f"volumes: {self.said()}")
            time.sleep(0.2)
        return self

    def connected(self):
        attachments = self.daemon.api.call("GET", "/v1/attachments")[0]
        return sum(each["state"] == "connected" for each in attachments)

    def said(self):
        return os.pread(self.errors.fileno(), 2000, 0).decode("utf-8", "replace")

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def load(blkbench, sockets, *options):
    """Runs stellarium-blkbench; its report. Any error or mismatch is a PeerError."""
    text = peers.run(blkbench, *sockets, "--json", *options)
    return json.loads(text)

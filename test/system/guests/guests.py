#!/usr/bin/env python3
"""Boots real Linux guests, in QEMU or as User-mode Linux, and talks to their consoles.

    with QemuGuest("one", disk=VhostUserDisk("/run/x/one.sock"), script="echo hello") as guest:
        match = guest.wait_for(END, timeout_s=120)      # the script's exit status is group 1
        guest.wait_exit(timeout_s=60)

A guest's disk holds an image of scripts/guests/build-image.sh; kernel and initramfs are found or
built by its siblings. A `script` runs in the guest after boot (or in the initramfs, before any disk
is mounted, with `in_initramfs=True`), between the console lines BEGIN and END, and then the guest
powers off. Without one, root is logged in on the console: use send().

Nothing here sleeps: every wait is for console output or for the end of a process, with a timeout,
and a timeout is a GuestError that carries the end of the console. Leaving the `with` block kills a
guest that still runs. Not thread-safe: one thread drives one guest; any number may run at once.

As a program:
    guests.py accelerator                                    # prints kvm or tcg, as really works here
    guests.py boot qemu|uml SOCKET [--script TEXT] [...]     # boots from a vhost-user-blk socket
    guests.py prepare                                        # builds all that the tests boot from
    guests.py with-images COMMAND [ARGUMENT...]              # runs it with STELLARIUM_IMAGE_A and _B
"""
import argparse
import base64
import gzip
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ROOT / "scripts" / "guests"

BEGIN = r"@@stellarium begin\s"
END = r"@@stellarium end (\d+)\s"

# x86 Linux keeps 2,047 characters of command line; longer scripts go on a disk.
MAX_COMMAND_LINE_SCRIPT = 1300


class GuestError(Exception):
    """A guest did not do what was waited for; the text ends with the last lines of its console."""


def cache_folder():
    return Path(os.environ.get("STELLARIUM_CACHE") or Path.home() / ".cache" / "stellarium")


def run_script(*arguments):
    done = subprocess.run([str(SCRIPTS / arguments[0]), *map(str, arguments[1:])],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise GuestError(f"{arguments[0]} failed (exit status {done.returncode})")
    return done.stdout.strip()


def kernel(kind):
    """(kernel, version) for `kind`, qemu or uml."""
    path, _modules, version = run_script("find-kernel.sh", kind).split(" ")
    return path, version


def initramfs(kind):
    out = cache_folder() / f"initramfs-{kind}"
    run_script("build-initramfs.sh", kind, out)
    return out


def image(name, *packages):
    """The Debian image `name`, built at the first call and kept in the cache folder."""
    return Path(run_script("build-image.sh", name, "-", *packages))


# The image that tests and demo boot, and a rebuilt one with a few more packages.
IMAGES = {"debian": (), "debian-rebuilt": ("nginx-light", "sqlite3", "tmux", "rsync")}


def prepare():
    """Builds what is booted, so that no test pays for it."""
    for name, packages in IMAGES.items():
        image(name, *packages)
    for kind in ("qemu", "uml"):
        initramfs(kind)
    accelerator()


@dataclass
class VhostUserDisk:
    """A disk served on a vhost-user-blk socket. `reconnect` lets QEMU outlive a restarted server."""
    socket: str
    queues: int = 1
    reconnect: bool = False
    serial: str = ""  # User-mode Linux only prints it; QEMU takes the server's.


@dataclass
class FileDisk:
    """A raw image file, opened by QEMU itself."""
    path: str
    read_only: bool = False
    options: str = ""  # Of QEMU's -drive: "cache=none,discard=unmap".


@dataclass
class NbdDisk:
    """An export of an NBD server on a unix socket."""
    socket: str
    export: str


class Guest:
    """A running guest: its process, and its console as text. Made by QemuGuest and UmlGuest."""

    def __init__(self, name, command, log_path=None, environment=None, errors_apart=False):
        self.name = name
        self.command = [str(word) for word in command]
        self.text = ""
        self.seen = 0  # wait_for() looks at the console from here on.
        self.changed = threading.Condition()
        self.ended = False
        self.log = open(log_path, "wb") if log_path else None
        self.started_at = time.monotonic()
        # What the VMM itself says would come in the middle of the console's lines.
        self.errors = tempfile.TemporaryFile() if errors_apart else None
        # A group of its own, so that nothing of it is left when it is killed.
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors or subprocess.STDOUT,
                                        start_new_session=True,
                                        env={**os.environ, **(environment or {})})
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        while True:
            data = os.read(self.process.stdout.fileno(), 65536)
            if self.log:
                self.log.write(data)
                self.log.flush()
            with self.changed:
                self.text += data.decode("utf-8", "replace").replace("\r", "")
                self.ended = not data
                self.changed.notify_all()
            if not data:
                return

    def wait_for(self, pattern, timeout_s):
        """Waits until the console shows `pattern` after what earlier calls matched; the match."""
        compiled = re.compile(pattern)
        deadline = time.monotonic() + timeout_s
        with self.changed:
            while True:
                match = compiled.search(self.text, self.seen)
                if match:
                    self.seen = match.end()
                    return match
                left = deadline - time.monotonic()
                if self.ended or left <= 0:
                    why = "ended" if self.ended else f"was silent about it for {timeout_s} s"
                    raise GuestError(f"guest {self.name} {why} while '{pattern}' was waited for; "
                                     f"its console ends:\n{self.tail()}")
                self.changed.wait(left)

    def send(self, line):
        """Types a line on the console."""
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def output(self):
        """What the script printed, once END was seen."""
        match = re.search(BEGIN + r"(.*?)\n?" + END, self.text, re.DOTALL)
        return match.group(1) if match else ""

    def tail(self, lines=25):
        said = []
        if self.errors:
            said = os.pread(self.errors.fileno(), 1 << 20, 0).decode("utf-8", "replace").splitlines()
        return "\n".join(said[-lines:] + self.text.splitlines()[-lines:])

    def seconds(self):
        """Since the guest was started."""
        return time.monotonic() - self.started_at

    def wait_exit(self, timeout_s):
        """Waits for the guest to power off; its exit status."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise GuestError(f"guest {self.name} did not power off within {timeout_s} s; its console "
                             f"ends:\n{self.tail()}") from None
        self.reader.join(10)
        return status

    def run_to_end(self, timeout_s):
        """Boots, runs the script, powers off. (exit status of the script, its output)"""
        match = self.wait_for(END, timeout_s)
        self.wait_exit(60)
        return int(match.group(1)), self.output()

    def kill(self):
        if self.process.poll() is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait()
        self.reader.join(10)
        if self.log:
            self.log.close()
            self.log = None
        if self.errors:
            self.errors.close()
            self.errors = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


def script_words(script, in_initramfs=False):
    if script is None:
        return []
    content = script.encode()
    if in_initramfs:
        content = gzip.compress(content, mtime=0)
    encoded = base64.b64encode(content).decode()
    if len(encoded) > MAX_COMMAND_LINE_SCRIPT:
        raise GuestError(f"a script of {len(script)} bytes does not fit on the kernel command line; "
                         f"give it on a disk (stellarium.script=/dev/vdX)")
    return [f"stellarium.{'init' if in_initramfs else 'run'}={encoded}"]


def with_files(base, files, out):
    """Writes to `out` the initramfs `base` and further `files`, {path in the guest: file here}."""
    with tempfile.TemporaryDirectory(prefix="stellarium-initramfs-") as folder:
        for inside, path in files.items():
            target = Path(folder) / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        names = [str(path.relative_to(folder)) for path in sorted(Path(folder).rglob("*"))]
        packed = subprocess.run(["cpio", "-o", "-H", "newc", "--owner", "0:0", "--quiet"],
                                cwd=folder, input="\n".join(names).encode(), capture_output=True,
                                check=True).stdout
    # The kernel unpacks archives that follow one another; a plain one begins at a multiple of four.
    content = Path(base).read_bytes()
    Path(out).write_bytes(content + b"\0" * (-len(content) % 4) + packed)
    return out


def machine_id(name):
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def qemu_command(accelerator, memory_mib, cpus=1):
    command = ["qemu-system-x86_64", "-M", "q35,memory-backend=ram", "-smp", str(cpus),
               "-m", f"{memory_mib}M",
               "-object", f"memory-backend-memfd,id=ram,size={memory_mib}M,share=on",
               "-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none",
               "-serial", "stdio", "-no-reboot"]
    if accelerator == "kvm":
        return command + ["-accel", "kvm", "-cpu", "host"]
    return command + ["-accel", "tcg,thread=multi", "-cpu", "max"]


def accelerator():
    """'kvm' if a Linux guest really boots under it, else 'tcg'. Tried once per boot of this host."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    path, version = kernel("qemu")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    known = cache_folder() / f"accelerator-{boot}-{version}"
    if known.exists():
        return known.read_text().strip()
    command = qemu_command("kvm", 256) + ["-kernel", path, "-initrd", str(initramfs("qemu")),
                                          "-append", "console=ttyS0 panic=-1 stellarium.probe"]
    with Guest("kvm-probe", command) as guest:
        try:
            guest.wait_for("@@stellarium probe", timeout_s=8)
            answer = "kvm"
        except GuestError:
            answer = "tcg"
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(answer + "\n")
    return answer


class QemuGuest(Guest):
    """A guest in QEMU. `disk` is its root, /dev/vda; `more_disks` are /dev/vdb and on. `initrd` is
    another initramfs than the usual one, see with_files()."""

    def __init__(self, name, disk=None, more_disks=(), script=None, in_initramfs=False,
                 memory_mib=256, cpus=1, accel=None, log_path=None, kernel_words=(), arguments=(),
                 initrd=None):
        path, _version = kernel("qemu")
        self.accel = accel or accelerator()
        command = qemu_command(self.accel, memory_mib, cpus)
        disks = ([disk] if disk else []) + list(more_disks)
        for index, each in enumerate(disks):
            if isinstance(each, VhostUserDisk):
                reconnect = ",reconnect=1" if each.reconnect else ""
                command += ["-chardev", f"socket,id=disk{index},path={each.socket}{reconnect}",
                            "-device", f"vhost-user-blk-pci,chardev=disk{index},"
                                       f"num-queues={each.queues}"]
            elif isinstance(each, NbdDisk):
                command += ["-drive", f"if=none,id=disk{index},format=raw,discard=unmap,file.driver=nbd,"
                                      f"file.server.type=unix,file.server.path={each.socket},"
                                      f"file.export={each.export}",
                            "-device", f"virtio-blk-pci,drive=disk{index}"]
            else:
                options = ",read-only=on" if each.read_only else ""
                options += f",{each.options}" if each.options else ""
                command += ["-drive", f"if=none,id=disk{index},format=raw,file={each.path}{options}",
                            "-device", f"virtio-blk-pci,drive=disk{index}"]
        words = ["console=ttyS0", "panic=-1", "quiet", "systemd.show_status=no"]
        if disk and not in_initramfs:
            words += ["root=/dev/vda", "rw", f"systemd.machine_id={machine_id(name)}"]
        words += [*script_words(script, in_initramfs), *kernel_words]
        command += ["-kernel", path, "-initrd", str(initrd or initramfs("qemu")),
                    "-append", " ".join(words)]
        super().__init__(name, command + list(arguments), log_path, errors_apart=True)


class UmlGuest(Guest):
    """A guest in User-mode Linux; its disks are vhost-user sockets. Needs no virtualisation."""

    def __init__(self, name, disk=None, more_disks=(), script=None, in_initramfs=False,
                 memory_mib=128, log_path=None, kernel_words=()):
        path, _version = kernel("uml")
        # UML keeps its management socket below HOME and its memory file in TMPDIR.
        self.home = tempfile.TemporaryDirectory(prefix="stellarium-uml-")
        words = [f"mem={memory_mib}M", f"initrd={initramfs('uml')}", f"umid={name}",
                 "con=null", "con0=fd:0,fd:1", "panic=-1", "quiet", "systemd.show_status=no"]
        for each in ([disk] if disk else []) + list(more_disks):
            words.append(f"virtio_uml.device={each.socket}:2")  # 2 is a block device.
        if disk and not in_initramfs:
            words += ["root=/dev/vda", "rw", f"systemd.machine_id={machine_id(name)}"]
        words += [*script_words(script, in_initramfs), *kernel_words]
        # UML's address space layout needs a machine without randomised addresses.
        super().__init__(name, ["setarch", "-R", path, *words], log_path, {"HOME": self.home.name})

    def kill(self):
        super().kill()
        self.home.cleanup()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("accelerator")
    commands.add_parser("prepare")
    with_images = commands.add_parser("with-images")
    with_images.add_argument("words", nargs=argparse.REMAINDER)
    boot = commands.add_parser("boot")
    boot.add_argument("kind", choices=["qemu", "uml"])
    boot.add_argument("socket")
    boot.add_argument("--script", default="uname -a; df -h /")
    boot.add_argument("--in-initramfs", action="store_true")
    boot.add_argument("--memory-mib", type=int, default=256)
    boot.add_argument("--queues", type=int, default=1)
    boot.add_argument("--reconnect", action="store_true")
    boot.add_argument("--timeout-s", type=float, default=180)
    boot.add_argument("--log", help="file for the whole console")
    boot.add_argument("--kernel-words", default="")
    arguments = parser.parse_args()
    if arguments.command == "accelerator":
        print(accelerator())
        return 0
    if arguments.command == "prepare":
        prepare()
        return 0
    if arguments.command == "with-images":
        paths = [str(image(name, *packages)) for name, packages in IMAGES.items()]
        os.execvpe(arguments.words[0], arguments.words,
                   {**os.environ, "STELLARIUM_IMAGE_A": paths[0], "STELLARIUM_IMAGE_B": paths[1]})
    disk = VhostUserDisk(arguments.socket, arguments.queues, arguments.reconnect)
    make = QemuGuest if arguments.kind == "qemu" else UmlGuest
    with make("guest", disk=disk, script=arguments.script, in_initramfs=arguments.in_initramfs,
              memory_mib=arguments.memory_mib, log_path=arguments.log,
              kernel_words=arguments.kernel_words.split()) as guest:
        guest.wait_for(BEGIN, arguments.timeout_s)
        booted_s = guest.seconds()
        status, output = guest.run_to_end(arguments.timeout_s)
    print(output)
    print(f"script ended with {status}; booted in {booted_s:.2f} s", file=sys.stderr)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GuestError as error:
        sys.exit(str(error))

#!/usr/bin/env python3
"""Directories of files by command, and what commands know of open files when no daemon runs.

    files_commands_test.py BUILD-FOLDER [TEST...]

The daemon runs in its strictest sandbox, in which a forbidden system call would end it: a directory
that is mounted later is taken from within.
"""
import contextlib
import mmap
import os
import random
import subprocess
import sys

from mounted import MIB, Mounted, check, skip_without_fuse, wait_until

PAGE = 4096
SEED = int(os.environ.get("STELLARIUM_TEST_SEED", "1"))
TIMEOUT_S = 300


def refused(engine, *words, status, text):
    """A command must fail, and say `text`."""
    done = subprocess.run([str(engine.ctl_program), *map(str, words)], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, env=engine.environment, check=False)
    check(done.returncode == status and text in done.stderr,
          f"stellarctl {' '.join(map(str, words))} ended with {done.returncode} and not {status}, or "
          f"did not say '{text}': {done.stderr}")
    return done.stderr


@contextlib.contextmanager
def opened(path, flags):
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def test_mounted_and_unmounted_by_command(engine):
    engine.run("volume", "create", "disk", "--size", MIB)
    refused(engine, "mount", engine.files, status=13, text="stellariumd --store")
    refused(engine, "unmount", status=13, text="stellariumd --store")
    engine.start_daemon()
    check(engine.ctl("status")["files"] is None, "a directory that nobody has mounted")
    refused(engine, "mount", engine.work / "nothing", status=3, text="mkdir -p")
    refused(engine, "mount", engine.log, status=2, text="is not a directory")
    refused(engine, "mount", engine.work, status=2, text="is not empty")
    refused(engine, "mount", "/proc", status=5, text="something is mounted on /proc")
    refused(engine, "unmount", status=3, text="no directory is mounted")
    check(not engine.mounted() and engine.holders() == [], "an error has left something")

    engine.run("mount", engine.files)
    check(engine.mounted() and len(engine.holders()) == 1, "it is not mounted")
    other = engine.work / "other"
    other.mkdir()
    refused(engine, "mount", other, status=4, text=str(engine.files))
    with opened(engine.volume("disk"), os.O_RDWR) as fd:
        check(os.pwrite(fd, b"m" * PAGE, 0) == PAGE, "a short write")
        os.fsync(fd)
        message = refused(engine, "unmount", status=5, text="volumes/disk")
        check("fuser -vm" in message, f"it does not say how to find out: {message}")
        check(engine.ctl("status")["files"]["open"] == ["volumes/disk"], "status")
        check(f"below {engine.files}, 1 open" in engine.run("status"), "status for people")
        stats = engine.ctl("stats")
        check(stats["files_open"] == 1 and stats["files_write_bytes"] == PAGE, f"{stats}")
        check(engine.metric("stellarium_files_mounted") == 1
              and engine.metric("stellarium_files_open") == 1
              and engine.metric("stellarium_files_adopted") == 0
              and engine.metric('stellarium_files_bytes_total{request="write"}') == PAGE
              and engine.metric('stellarium_files_requests_total{request="flush"}') >= 1
              and engine.metric('stellarium_files_requests_total{request="open"}') == 1
              and engine.metric('stellarium_files_errors_total{request="write"}') == 0, "metrics")
        # A daemon that was not told of it takes it over: files that are open go on.
        engine.kill_daemon()
        engine.start_daemon()
        check(os.pread(fd, PAGE, 0) == b"m" * PAGE, "it reads differently")
        check(os.pwrite(fd, b"n" * PAGE, PAGE) == PAGE, "a short write")
        check(engine.metric("stellarium_files_adopted") == 1, "it was adopted")
    with opened(engine.files / "volumes", os.O_RDONLY | os.O_DIRECTORY):
        refused(engine, "unmount", status=5, text="cannot be unmounted")
    engine.run("unmount")
    check(not engine.mounted(), "it is still mounted")
    wait_until(lambda: engine.holders() == [], "the holder has ended")
    check(engine.metric("stellarium_files_mounted") == 0, "metrics")
    # At once again, and below another directory.
    for directory in (engine.files, other, engine.files):
        engine.run("mount", directory)
        check((directory / "volumes" / "disk").read_bytes()[:PAGE] == b"m" * PAGE, "the content")
        engine.run("unmount")
    # Taken away by somebody else, and mounted again.
    engine.run("mount", engine.files)
    subprocess.run(["umount", str(engine.files)], check=True)
    wait_until(lambda: engine.holders() == [], "the holder has ended")
    engine.run("mount", engine.files)
    check(engine.volume("disk").stat().st_size == MIB, "mounted again")
    # The stop of a daemon takes it along when nobody uses it.
    engine.stop_daemon()
    check(not engine.mounted(), "a stop leaves it")


def test_what_is_open_is_safe_without_a_daemon(engine):
    data = random.Random(SEED).randbytes(MIB)
    engine.make_image("mapped", data)
    engine.run("volume", "clone", "mapped", "open")
    engine.run("volume", "clone", "mapped", "closed")
    for name in ("first", "second"):
        engine.run("snapshot", "create", "open", name)
    engine.start()
    with contextlib.ExitStack() as stack:
        fd = stack.enter_context(opened(engine.volume("open"), os.O_RDWR))
        os.pwrite(fd, b"w" * PAGE, 0)
        with opened(engine.image("mapped"), os.O_RDONLY) as image:
            mapping = mmap.mmap(image, MIB, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        stack.callback(mapping.close)
        snapshot = stack.enter_context(
            opened(engine.files / "snapshots" / "open@first", os.O_RDONLY))
        for stop in (engine.kill_daemon, engine.stop_daemon):
            stop()
            advice = "start stellariumd, close the file, and try again"
            refused(engine, "volume", "rm", "open", status=5, text=advice)
            refused(engine, "volume", "rm", "closed", "open", status=5, text=advice)
            refused(engine, "volume", "resize", "open", MIB // 2, "--shrink", status=5, text=advice)
            refused(engine, "snapshot", "rollback", "open", "second", status=5, text=advice)
            refused(engine, "snapshot", "rm", "open", "first", status=5, text="snapshots/open@first")
            refused(engine, "image", "rm", "mapped", status=5, text="images/mapped")
            refused(engine, "image", "import", "mapped", engine.log, status=4, text="mapped")
            # Whatever does not touch them goes on.
            engine.run("snapshot", "create", "open", f"by-{stop.__name__}")
            engine.run("volume", "rename", "open", "renamed")
            engine.run("volume", "rename", "renamed", "open")
            engine.run("volume", "create", "more", "--size", MIB)
            engine.run("volume", "rm", "more")
            engine.start()
            check(os.pread(fd, PAGE, 0) == b"w" * PAGE, "what was written")
            check(os.pread(fd, PAGE, PAGE) == data[PAGE:2 * PAGE], "what was there")
            check(os.pread(snapshot, MIB, 0) == data, "the snapshot")
            mapping.madvise(mmap.MADV_DONTNEED)
            check(mapping[:] == data, "the mapped image")
        engine.kill_daemon()
    # Closed while nobody is there to hear of it: the next daemon does.
    refused(engine, "volume", "rm", "open", status=5, text="start stellariumd")
    engine.run("volume", "rm", "closed")
    engine.start()
    engine.run("volume", "rm", "open")
    engine.run("image", "rm", "mapped")
    engine.stop_daemon()
    check(not engine.mounted(), "it is still mounted")


def test_boots_from_files_and_nbd(engine):
    """What is read through either is recorded, and staged when a clone is attached."""
    engine.make_image("debian", random.Random(SEED + 1).randbytes(4 * MIB))
    engine.run("volume", "clone", "debian", "vm-{n}", "--count", 4)
    engine.start("--nbd")
    nbd = next(engine.runtime.glob("**/nbd.sock"))
    with opened(engine.volume("vm-1"), os.O_RDWR | os.O_DIRECT) as fd:
        engine.run("boot", "record", "vm-1")
        os.preadv(fd, [mmap.mmap(-1, MIB)], MIB)
        recorded = engine.ctl("boot", "stop", "vm-1")
    check(recorded["bytes"] == MIB, f"of a file: {recorded}")
    check(engine.metric("stellarium_prefetches_total") == 0, "nothing was to be staged")

    def staged(attach):
        """In a daemon that has staged nothing yet."""
        engine.restart_by_kill("--nbd")
        attach()
        wait_until(lambda: engine.metric("stellarium_prefetches_total") == 1, "it is staged")
        check(engine.metric("stellarium_prefetch_bytes_total") == MIB, "what is staged")
    staged(lambda: engine.volume("vm-2").read_bytes()[:1])
    staged(lambda: subprocess.run(["nbdinfo", "--size", f"nbd+unix:///vm-3?socket={nbd}"],
                                  check=True, capture_output=True))
    # By NBD as well: a client has it for as long as it is recorded.
    with subprocess.Popen(["qemu-io", "-f", "raw", f"nbd+unix:///vm-4?socket={nbd}"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        wait_until(lambda: engine.ctl("volume", "info", "vm-4")["attached"], "it is connected")
        engine.run("boot", "record", "vm-4")
        client.stdin.write("read 1M 2M\n")
        client.stdin.flush()
        check("read 2097152/2097152 bytes" in client.stdout.readline(), "qemu-io reads")
        recorded = engine.ctl("boot", "stop", "vm-4")
        client.stdin.close()
        check(client.wait(TIMEOUT_S) == 0, "qemu-io")
    check(recorded["bytes"] == 2 * MIB, f"of NBD: {recorded}")
    engine.stop_daemon()


def test_kernels_are_files(engine):
    chooser = random.Random(SEED + 2)
    engine.make_image("disk", chooser.randbytes(MIB))
    files = {"vmlinuz": chooser.randbytes(3 * MIB + 17), "initrd": chooser.randbytes(2 * MIB + 1)}
    for name, data in files.items():
        engine.make_image(f"disk.{name}", data)
    engine.run("volume", "clone", "disk", "vm-{n}", "--count", 2)
    engine.start()
    boot = engine.files / "boot"
    check(list(boot.iterdir()) == [] and not (boot / "disk").exists(), "there is no manifest yet")
    engine.run("boot", "set", "disk", "--kernel", "disk.vmlinuz", "--initrd", "disk.initrd")
    wait_until((boot / "vm-1").is_dir, "a folder of the clone")
    check(sorted(path.name for path in boot.iterdir()) == ["disk", "vm-1", "vm-2"], "listed")
    for source in ("disk", "vm-1", "vm-2"):
        check(sorted(path.name for path in (boot / source).iterdir()) == ["initrd", "vmlinuz"],
              f"the files of {source}")
        for name, data in files.items():
            path = boot / source / name
            check(path.read_bytes() == data, f"{path} is not what was imported")
            check(path.stat().st_ino == engine.image(f"disk.{name}").stat().st_ino,
                  "clones share a file, and its pages")
            check(path.stat().st_mode & 0o777 == 0o400, "its mode")
            try:
                os.open(path, os.O_RDWR)
                raise AssertionError("a kernel can be written to")
            except OSError:
                pass
    with opened(boot / "vm-2" / "vmlinuz", os.O_RDONLY) as fd:
        engine.restart_by_kill()
        check(os.pread(fd, 4 * MIB, 0) == files["vmlinuz"], "after the daemon's death")
        refused(engine, "image", "rm", "disk.vmlinuz", status=5, text="images/disk.vmlinuz")
    engine.run("volume", "rm", "vm-2")
    engine.run("boot", "set", "disk", "--initrd", "")
    wait_until(lambda: not (boot / "vm-2").exists(), "the folder of a removed volume")
    wait_until(lambda: not (boot / "vm-1" / "initrd").exists(), "an initrd that was taken away")
    check((boot / "vm-1" / "vmlinuz").exists(), "the kernel stays")
    engine.run("boot", "rm", "disk")
    wait_until(lambda: not (boot / "vm-1").exists(), "the folder of a removed manifest")
    engine.stop_daemon()


def main():
    skip_without_fuse()
    names = sys.argv[2:]
    tests = {name[5:]: value for name, value in globals().items() if name.startswith("test_")}
    for name, test in tests.items():
        if names and name not in names:
            continue
        with Mounted(sys.argv[1]) as engine:
            try:
                engine.run("init")
                test(engine)
                check(not engine.mounted(), "something is still mounted")
                wait_until(lambda: engine.holders() == [], "the holder has ended")
                engine.run("fsck")
                errors = [line for line in engine.log.read_text().splitlines()
                          if "level=error" in line]
                check(not errors, "the daemon's log has errors:\n" + "\n".join(errors[:10]))
            except BaseException:
                print(f"{name}, STELLARIUM_TEST_SEED={SEED}; the daemon's log ends:\n"
                      f"{engine.log_tail()}", file=sys.stderr)
                raise


if __name__ == "__main__":
    main()

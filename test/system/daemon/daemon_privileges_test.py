#!/usr/bin/env python3
"""What the running daemon may do: its sandbox, its user, and who reaches its sockets.

    daemon_privileges_test.py BUILD-FOLDER

Every kind of operation is done in a daemon whose first forbidden system call would end it
(--sandbox strict); /proc says that every thread is confined; sockets and folders have the modes that
they should have, for the daemon's user alone and for a group; what somebody else could have put in
place is refused. Started by root with --user, the daemon is that user.
"""
import grp
import os
import pwd
import shutil
import socket
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guests"))
from engine import Engine, sandbox_words  # noqa: E402

MIB = 1 << 20
SKIPPED = 77


def check(condition, text):
    if not condition:
        sys.exit(f"daemon_privileges: {text}")


def status_fields(path):
    return dict(line.split(":\t", 1) for line in Path(path).read_text().splitlines() if ":\t" in line)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_mode(path, mode, uid=None, gid=None):
    status = os.stat(path)
    found = stat.S_IMODE(status.st_mode)
    check(found == mode, f"{path} has mode {found:o}, not {mode:o}")
    check(uid is None or status.st_uid == uid, f"{path} belongs to user {status.st_uid}, not {uid}")
    check(gid is None or status.st_gid == gid, f"{path} has group {status.st_gid}, not {gid}")


def runtime_of(engine):
    return next(path for path in engine.runtime.iterdir() if (path / "vhost").is_dir())


def use_everything(engine):
    """Operations of every kind; the daemon's own threads do the rest of theirs meanwhile."""
    image = engine.work / "image.raw"
    image.write_bytes(os.urandom(3 * MIB) + bytes(5 * MIB))
    engine.ctl("image", "import", "image", image)
    engine.ctl("volume", "clone", "image", "vm-{n}", "--count", "3")
    engine.ctl("volume", "create", "data", "--size", 64 * MIB)
    engine.attach("data")
    engine.attach("vm-1")
    engine.ctl("volume", "resize", "data", 65 * MIB)
    engine.ctl("snapshot", "create", "vm-2", "before")
    engine.ctl("snapshot", "rollback", "vm-2", "before")
    engine.ctl("volume", "export", "vm-3", engine.work / "exported.raw")
    check((engine.work / "exported.raw").read_bytes() == image.read_bytes(),
          "the export differs from the import")
    engine.ctl("volume", "rm", "vm-3")
    engine.ctl("image", "rm", "image")
    engine.ctl("gc")
    engine.ctl("attachments")
    engine.ctl("detach", "vm-1")
    engine.ctl("stats")


def confined(build):
    """Nothing that the daemon does for anybody is a forbidden call."""
    port = free_port()
    with Engine(build) as engine:
        engine.run("init")
        engine.start_daemon("--sandbox", "strict", "--metrics-listen", f"127.0.0.1:{port}",
                            "--memory", "16MiB", "--writeback-age-ms", "10")
        tasks = list(Path(f"/proc/{engine.daemon.pid}/task").iterdir())
        check(len(tasks) > 3, "the daemon has hardly any threads")
        for task in tasks:
            fields = status_fields(task / "status")
            check(fields["Seccomp"] == "2" and fields["NoNewPrivs"] == "1",
                  f"thread {fields['Name']} is not confined: Seccomp {fields['Seccomp']}, "
                  f"NoNewPrivs {fields['NoNewPrivs']}")
        use_everything(engine)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page:
            check(b"stellarium_" in page.read(), "there are no metrics on TCP")
        runtime = runtime_of(engine)
        check_mode(runtime, 0o700, os.geteuid())
        check_mode(runtime / "vhost", 0o700, os.geteuid())
        check_mode(runtime / "control.sock", 0o600, os.geteuid())
        sockets = list((runtime / "vhost").glob("*.sock"))
        check(len(sockets) == 1, f"there are {len(sockets)} sockets of volumes, not one")
        check_mode(sockets[0], 0o600, os.geteuid())
        for path in runtime.iterdir():
            if path.is_file():
                check_mode(path, 0o600, os.geteuid())
        engine.stop_daemon()
        # Restored attachments, a socket elsewhere, and a stop that removes it.
        control = engine.work / "control"
        control.mkdir(mode=0o700)
        engine.start_daemon("--sandbox", "strict", "--socket", control / "c.sock")
        check_mode(control / "c.sock", 0o600)
        check(engine.ctl("attachments")[0]["source"] == "data", "the attachment is not restored")
        engine.ctl("detach", "data")
        engine.stop_daemon()
        check(not (control / "c.sock").exists(), "the control socket is left behind")
        # Off is off.
        engine.start_daemon("--sandbox", "off")
        fields = status_fields(f"/proc/{engine.daemon.pid}/status")
        check(fields["Seccomp"] == status_fields("/proc/self/status")["Seccomp"],
              "off does not mean off")
        engine.stop_daemon()


def grouped(build):
    """Members of the group reach the sockets, and others do not."""
    group = grp.getgrgid(os.getegid())
    with Engine(build) as engine:
        engine.run("init")
        engine.ctl("volume", "create", "data", "--size", MIB)
        engine.start_daemon("--socket-group", group.gr_name)
        engine.attach("data")
        runtime = runtime_of(engine)
        for folder in (runtime, runtime / "vhost"):
            check_mode(folder, 0o710, gid=group.gr_gid)
        check_mode(runtime / "control.sock", 0o660, gid=group.gr_gid)
        for path in (runtime / "vhost").glob("*.sock"):
            check_mode(path, 0o660, gid=group.gr_gid)
        engine.stop_daemon()


def refused(build):
    """A runtime directory that others could have made, or may write to, is none."""
    with Engine(build) as engine:
        engine.run("init")

        def start(runtime):
            done = subprocess.run(
                [str(engine.daemon_program), "--store", str(engine.store), "--runtime-dir", runtime],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, env=engine.environment,
                check=False, timeout=300)
            check(done.returncode == 2 and "'runtime_dir' cannot be used" in done.stderr,
                  f"a daemon with --runtime-dir {runtime} ended with {done.returncode}: {done.stderr}")

        loose = engine.runtime / "loose"
        loose.mkdir()
        loose.chmod(0o777)
        start(loose)
        start(loose / "below")
        if os.geteuid() == 0:
            link = engine.runtime / "link"
            link.symlink_to(engine.runtime / "target")
            os.lchown(link, 65534, 65534)
            start(link / "below")
            foreign = engine.runtime / "foreign"
            foreign.mkdir()
            os.chown(foreign, 65534, 65534)
            start(foreign)


def as_user(build):
    """Root starts it, and it is somebody else, who owns all that it makes."""
    if os.geteuid() != 0:
        return
    user = pwd.getpwnam("nobody")
    with Engine(build) as engine:
        # Where that user may go.
        engine.store = Path("/var/tmp", f"stellarium-user-{os.getpid()}")
        engine.environment["STELLARIUM_STORE"] = str(engine.store)
        try:
            engine.run("init")
            engine.runtime.chmod(0o711)
            done = subprocess.run(
                [str(engine.daemon_program), "--store", str(engine.store), "--user", user.pw_name],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, env=engine.environment,
                check=False, timeout=300)
            check(done.returncode != 0 and f"chown -R {user.pw_name}" in done.stderr,
                  f"a store of root's: {done.returncode}, {done.stderr}")
            left = [str(path) for path in engine.runtime.rglob("*")
                    if path.stat().st_uid == user.pw_uid]
            check(not left, f"what it did not start for is that user's: {left}")
            for path in [engine.store, *engine.store.rglob("*")]:
                os.chown(path, user.pw_uid, user.pw_gid)
            engine.start_daemon("--user", user.pw_name, "--sandbox", "strict")
            fields = status_fields(f"/proc/{engine.daemon.pid}/status")
            check(fields["Uid"].split() == [str(user.pw_uid)] * 4, f"its users are {fields['Uid']}")
            check(fields["Gid"].split() == [str(user.pw_gid)] * 4, f"its groups are {fields['Gid']}")
            for name in ("CapPrm", "CapEff", "CapInh", "CapAmb"):
                check(int(fields[name], 16) == 0, f"it has capabilities: {name} {fields[name]}")
            use_everything(engine)
            runtime = runtime_of(engine)
            check_mode(runtime, 0o700, user.pw_uid)
            check_mode(runtime / "control.sock", 0o600, user.pw_uid)
            for path in (runtime / "vhost").glob("*.sock"):
                check_mode(path, 0o600, user.pw_uid)
            for path in engine.store.rglob("*"):
                check(path.stat().st_uid == user.pw_uid, f"{path} is not the user's")
            engine.stop_daemon()
        finally:
            engine.kill_daemon()
            shutil.rmtree(engine.store, ignore_errors=True)


def main(build):
    if not sandbox_words():
        print("this kernel has no Landlock")
        return SKIPPED
    confined(build)
    grouped(build)
    refused(build)
    as_user(build)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

#!/usr/bin/env python3
"""Runs the commands of a page of docs/guides as they stand there.

    guide_test.py BUILD-FOLDER PAGE          # qemu, user-mode-linux

A block of the page takes part when a comment before it says so: `<!-- run -->` is run to its end, and
`<!-- console -->` starts a guest, on whose console somebody then looks around and powers it off. All
blocks are one shell's, in one folder, where the page's files lie: debian.raw, vmlinuz, initrd.img. Any
command that fails ends the test. In front of QEMU stands a program of that name that changes `-accel kvm`
where the hardware has none.
"""
import os
import re
import shlex
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "test" / "system" / "fuse"))
sys.path.insert(0, str(ROOT / "test" / "system" / "guests"))
import guests  # noqa: E402
from mounted import Mounted, check, skip_without_fuse  # noqa: E402

BLOCK = re.compile(r"^<!-- (run|console) -->\n```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KINDS = {"qemu": "qemu", "user-mode-linux": "uml"}
COMMAND_TIMEOUT_S = 300
BOOT_TIMEOUT_S = 300
PROMPT = r"root@[\w-]+:[^\n]*# "
ACCELERATED = """#!/bin/bash
arguments=()
for word in "$@"; do
    [[ $word == kvm ]] && word=%s
    arguments+=("$word")
done
exec %s "${arguments[@]}"
"""


def program(folder, name, text):
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


def prepare(engine, kind):
    """The folder in which the page's reader stands; the environment of the shell."""
    engine.files.rmdir()
    engine.files = engine.work / "disks"
    kernel, _version = guests.kernel(kind)
    (engine.work / "debian.raw").symlink_to(guests.image("debian"))
    (engine.work / "initrd.img").symlink_to(guests.initramfs(kind))
    programs = engine.work / "bin"
    programs.mkdir()
    if kind == "qemu":
        (engine.work / "vmlinuz").symlink_to(kernel)
        qemu = guests.shutil.which("qemu-system-x86_64")
        program(programs, "qemu-system-x86_64",
                ACCELERATED % ({"kvm": "kvm", "tcg": "tcg,thread=multi"}[guests.accelerator()],
                               shlex.quote(qemu)))
    else:
        (programs / "linux.uml").symlink_to(kernel)
    for each in (engine.ctl_program, engine.daemon_program):
        (programs / each.name).symlink_to(each.resolve())
    home = engine.work / "home"
    home.mkdir()
    return {**engine.environment, "PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(home)}


def read_page(shell, kinds):
    """Waits for each block of the page, and is at the console of each guest."""
    for number, what in enumerate(kinds):
        shell.wait_for(f"@@block {number}\n", COMMAND_TIMEOUT_S)
        if what == "console":
            shell.wait_for(PROMPT, BOOT_TIMEOUT_S)
            shell.send("echo @@size $(blockdev --getsize64 $(findmnt -no SOURCE /)); "
                       "date > /written; sync; poweroff")
            shell.wait_for(r"@@size [1-9]\d+\n", COMMAND_TIMEOUT_S)
    shell.wait_for("@@done\n", COMMAND_TIMEOUT_S)


def end_all_in(folder):
    """A guest that is a program of many processes leaves its shell's group."""
    for each in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if Path(os.readlink(each)).is_relative_to(folder):
                os.kill(int(each.parent.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            pass


def main(build, page):
    skip_without_fuse()
    kind = KINDS[page]
    blocks = BLOCK.findall((ROOT / "docs" / "guides" / f"{page}.md").read_text())
    check(len(blocks) >= 4, f"{page}.md has {len(blocks)} blocks to run")
    script = ["set -euo pipefail", "exec 2>&1"]
    for number, (_what, text) in enumerate(blocks):
        script += [f"echo '@@block {number}'", text]
    script += ["echo '@@done'"]
    with Mounted(build) as engine:
        environment = prepare(engine, kind)
        path = engine.work / "page.sh"
        path.write_text("\n".join(script) + "\n")
        with guests.Guest(page, ["env", "-C", engine.work, "bash", path],
                          log_path=engine.log, environment=environment) as shell:
            try:
                read_page(shell, [what for what, _text in blocks])
            finally:
                end_all_in(engine.work)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

#!/usr/bin/env python3
"""QEMU guests that map files of a mounted store as persistent memory (virtio-pmem), with DAX.

    dax_test.py BUILD-FOLDER [--report]

Each guest has two of them, both ext4, mounted with dax=always:

  * an image, read-only (share=on,readonly=on). All guests read all of it. The Pss of its mapping,
    summed over the guests, may grow by 5 % of what is resident for each further guest.
  * one clone for all of them, mapped privately (share=off). Each writes to it, and sees its own
    writes alone; the clone's file never sees any.

Then the first guest tries to overwrite the image through its device, and nobody sees that either.
"""
import hashlib
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "fuse"), str(HERE.parent / "guests")]
from mounted import MIB, check, run_with_seed  # noqa: E402

import guests  # noqa: E402

GUESTS = 3
FILES = 12
BOOT_TIMEOUT_S = 300
ANSWER_TIMEOUT_S = 300
GROWTH = 0.05
SHARED_MIB = 64
PRIVATE_MIB = 32
# What the usual initramfs lacks; what these need comes with them.
MODULES = ("virtio_pmem", "nd_pmem")

# Devices are told apart by their sizes, which the kernel gives in sectors.
SCRIPT = """
for try in $(seq 200); do
    [ -b /dev/pmem0 ] && [ -b /dev/pmem1 ] && break
    usleep 50000
done
for each in pmem0 pmem1; do
    case $(cat /sys/block/$each/size) in
        {shared_sectors}) shared=/dev/$each ;;
        {private_sectors}) private=/dev/$each ;;
    esac
done
mkdir -p /shared /private
mount -t ext4 -o ro,noload,dax=always $shared /shared || exit 3
mount -t ext4 -o dax=always $private /private || exit 4
grep -c 'dax=always' /proc/mounts
echo "@@ready"
while read verb word; do
    case $verb in
        read) echo "@@read $(cat /shared/data-* | md5sum | cut -d' ' -f1)" ;;
        write)
            echo "$word" >/private/mine && dd if=/dev/urandom of=/private/noise bs=64k count=16 2>/dev/null
            sync
            echo "@@wrote $?" ;;
        look) echo "@@look $(cat /private/mine) $(cat /private/given) $(ls /private | wc -l)" ;;
        attack)
            dd if=/dev/zero of=$shared bs=1M count={shared_mib} conv=notrunc 2>/dev/null
            sync
            echo "@@attacked" ;;
        end) exit 0 ;;
    esac
done
"""


def pmem_modules(folder):
    """{path in the initramfs: file}, in the order of loading."""
    _kernel, modules, version = guests.run_script("find-kernel.sh", "qemu").split(" ")
    base = folder / "base"
    (base / "lib" / "modules").mkdir(parents=True)
    (base / "lib" / "modules" / version).symlink_to(modules)
    files = {}
    for module in MODULES:
        shown = subprocess.run(["/sbin/modprobe", "--show-depends", "--set-version", version,
                                "--dirname", str(base), module], capture_output=True, text=True,
                               check=True).stdout
        for line in shown.splitlines():
            verb, path = line.split()[:2]
            if verb != "insmod":
                continue
            name = Path(path).name.removesuffix(".xz")
            if any(inside.endswith(f"-{name}") for inside in files):
                continue
            target = folder / name
            if path.endswith(".xz"):
                target.write_bytes(subprocess.run(["xz", "-dc", path], capture_output=True,
                                                  check=True).stdout)
            else:
                target.write_bytes(Path(path).read_bytes())
            # After those of the usual initramfs, which begin with digits.
            files[f"modules/p{len(files):02}-{name}"] = target
    return files


def make_ext4(path, size_mib, files):
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        # DAX needs blocks as large as pages.
        subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-d", folder, str(path),
                        f"{size_mib}M"], capture_output=True, check=True)


def pmem(name, path, size_mib, options):
    return ["-object", f"memory-backend-file,id={name},mem-path={path},size={size_mib}M,{options}",
            "-device", f"virtio-pmem-pci,memdev={name},id=pmem-{name}"]


def memory_of(guest, path):
    """(Rss, Pss) in bytes of the guest's mappings of this file."""
    rss = pss = 0
    inside = False
    for line in Path(f"/proc/{guest.process.pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(f" {path}")
        elif inside and line.startswith("Rss:"):
            rss += int(line.split()[1]) * 1024
        elif inside and line.startswith("Pss:"):
            pss += int(line.split()[1]) * 1024
    return rss, pss


def run(engine, seed, scale):
    del scale
    chooser = random.Random(seed)
    content = {f"data-{number:02}": chooser.randbytes(MIB) for number in range(FILES)}
    expected = hashlib.md5(b"".join(content[name] for name in sorted(content))).hexdigest()
    engine.run("init")
    raw = {}
    for name, size_mib, files in (("shared", SHARED_MIB, content),
                                  ("base", PRIVATE_MIB, {"given": b"given\n"})):
        raw[name] = engine.work / f"{name}.raw"
        make_ext4(raw[name], size_mib, files)
        engine.run("image", "import", name, raw[name])
    engine.run("volume", "clone", "base", "private")
    engine.start()

    folder = engine.work / "modules"
    folder.mkdir()
    initrd = guests.with_files(guests.initramfs("qemu"), pmem_modules(folder),
                               engine.work / "initramfs")
    script = SCRIPT.format(shared_sectors=SHARED_MIB * 2048, private_sectors=PRIVATE_MIB * 2048,
                           shared_mib=SHARED_MIB)
    image = engine.image("shared")
    running = []

    def wait(guest, pattern, timeout_s=ANSWER_TIMEOUT_S):
        match = guest.wait_for(rf"@@(?:stellarium end|{pattern})", timeout_s)
        check(not match.group(0).startswith("@@stellarium end"),
              f"guest {guest.name} ended while '{pattern}' was waited for:\n{guest.tail()}")
        return match

    try:
        for number in range(GUESTS):
            running.append(guests.QemuGuest(
                f"dax-{number}", script=script, in_initramfs=True, initrd=initrd, memory_mib=256,
                accel=guests.accelerator(), log_path=engine.work / f"console-{number}.log",
                arguments=["-m", "256M,maxmem=1G",
                           *pmem("shared", image, SHARED_MIB, "share=on,readonly=on"),
                           *pmem("private", engine.volume("private"), PRIVATE_MIB, "share=off")]))
        for guest in running:
            wait(guest, "ready", BOOT_TIMEOUT_S)
        sums = []
        for guest in running:
            guest.send("read")
            got = wait(guest, r"read (\w+)\n").group(1)
            check(got == expected, f"guest {guest.name} read {got}, not {expected}")
            sums.append(sum(memory_of(each, image)[1] for each in running))
        resident = memory_of(running[0], image)[0]
        check(resident >= FILES * MIB, f"only {resident} bytes of the image are mapped")
        for count, (before, after) in enumerate(zip(sums, sums[1:]), 2):
            check(after - before <= GROWTH * resident,
                  f"with guest {count} the mappings' Pss grew from {before} to {after}, and "
                  f"{resident} bytes are resident")

        report = engine.ctl("stats", "--sharing", "--files", engine.files)
        in_file = {each["name"]: each["file_bytes"] for each in report["entities"]}
        check(in_file["shared"] >= resident, f"the statistics say {in_file} and not {resident}")

        for number, guest in enumerate(running):
            guest.send(f"write guest-{number}")
            check(wait(guest, r"wrote (\d+)\n").group(1) == "0", "a guest could not write")
        for number, guest in enumerate(running):
            guest.send("look")
            # lost+found, given, mine, noise.
            match = wait(guest, r"look ([^\n]*)\n")
            check(match.group(1) == f"guest-{number} given 4",
                  f"guest {guest.name} sees '{match.group(1)}'")
        running[0].send("attack")
        wait(running[0], r"attacked\n")
        for guest in running[1:]:
            guest.send("read")
            check(wait(guest, r"read (\w+)\n").group(1) == expected, "an image was changed by a guest")
        for guest in running:
            guest.send("end")
            status, output = guest.run_to_end(ANSWER_TIMEOUT_S)
            check(status == 0, f"guest {guest.name} ended with status {status}:\n{output}")
            check(output.splitlines()[0] == "2", f"not both are mounted with DAX:\n{output}")
    finally:
        for guest in running:
            guest.kill()
    check(image.read_bytes() == raw["shared"].read_bytes(), "the image's file has changed")
    check(engine.volume("private").read_bytes() == raw["base"].read_bytes(),
          "the clone's file has what a guest wrote to its private copy")
    engine.stop_daemon()
    engine.run("fsck", "--data")
    return {"guests": GUESTS, "resident_bytes": resident, "pss_sums": sums,
            "growth_per_guest": max(after - before for before, after in zip(sums, sums[1:])) / resident}


if __name__ == "__main__":
    run_with_seed("dax", run)

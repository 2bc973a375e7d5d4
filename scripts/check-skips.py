#!/usr/bin/env python3
"""Reports the tests that were skipped, and fails in CI if one of them should have run.

    check-skips.py RESULTS.xml EXPECTED-SKIPS.txt

RESULTS.xml is what `ctest --output-junit` writes. A test counts as skipped when ctest says so (it
returned 77), when it is disabled, or when one of its GoogleTest or unittest cases was skipped. Each line of EXPECTED-SKIPS.txt allows some
skips on machines that lack something:

    TEST-NAME-REGEX  NEED  # why

NEED is one of the probes below, for example `kvm`; where the probe succeeds, the skip is an error.
"""
import ctypes
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def can_open(path):
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        return True
    except OSError:
        return False


PROBES = {
    "kvm": lambda: can_open("/dev/kvm"),
    # A KVM device that is there and still runs no Linux guest is found by the test's own probe.
    "working-kvm": lambda: False,
    "fuse": lambda: can_open("/dev/fuse"),
    # landlock_create_ruleset, asked for its version.
    "landlock": lambda: ctypes.CDLL(None).syscall(444, None, 0, 1) > 0,
    "root": lambda: os.geteuid() == 0,
    "loop-mount": lambda: os.geteuid() == 0 and can_open("/dev/loop-control"),
    # Tests that become another user must be able to start what was built.
    "open-folder": lambda: all(folder.stat().st_mode & 0o001
                               for folder in Path(__file__).resolve().parents),
    "huge-pages": lambda: int(re.search(r"HugePages_Free:\s+(\d+)",
                                        Path("/proc/meminfo").read_text())[1]) >= 4,
}

GTEST_SKIP = re.compile(r"^(.*): Skipped\s*$\n(.*)$", re.MULTILINE)


def skipped_tests(results):
    """Yields (name, reason) of every ctest entry with something skipped in it."""
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        output = case.findtext("system-out") or ""
        if case.get("status") in ("notrun", "disabled") or case.find("skipped") is not None:
            lines = [line for line in output.strip().splitlines() if line.strip()]
            yield case.get("name"), lines[-1] if lines else "no reason printed"
        else:
            for match in GTEST_SKIP.finditer(output):
                yield case.get("name"), match.group(2).strip() or "no reason printed"


def allowances(path):
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in PROBES:
            sys.exit(f"{path}:{number}: expected 'TEST-NAME-REGEX NEED', NEED one of {', '.join(PROBES)}")
        yield re.compile(words[0]), words[1]


def main(results, expected):
    if not Path(results).exists():
        sys.exit(f"{results}: ctest wrote no results")
    allowed = list(allowances(expected))
    wrong = 0
    for name, reason in skipped_tests(results):
        fine = any(rule.fullmatch(name) and not PROBES[need]() for rule, need in allowed)
        print(f"skipped: {name}: {reason}" + ("" if fine else "   (this machine should run it)"))
        wrong += not fine
    if wrong and os.environ.get("CI") == "true":
        sys.exit(f"{wrong} skipped that test/expected-skips.txt does not allow here")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])

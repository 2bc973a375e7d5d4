#!/usr/bin/python3
"""Stellarium side by side with what people use today, interleaved, in one run.

    make bench                                     # all of it; report in build/bench
    bench/suite/run.py --only 'random|export'      # some scenarios
    bench/suite/run.py --only export --update      # the same, in the report that is there
    bench/suite/run.py --smoke                     # small and short, fails far beyond a target
    bench/suite/run.py --list

Writes report.json, report.md and a plot for each scenario. What the machine cannot offer is left
out and named. Exit status 1 if a scenario failed, or, with --smoke, if a figure is more than three
times beyond its target, and still is as the median of three rounds.
"""
import argparse
import json
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for each in ("guests", "vm"):
    sys.path.insert(0, str(ROOT / "test" / "system" / each))
import guests  # noqa: E402  (found by the lines above)
import report  # noqa: E402
from engine import EngineError  # noqa: E402
from measure import Progress, Unavailable  # noqa: E402
from peers import COMMANDS, PeerError  # noqa: E402
from scenarios import SCENARIOS, Bench  # noqa: E402

SMOKE_FACTOR = 3
SMOKE_ROUNDS = 3  # That a figure must be too far from its target in, to count.
DESCRIPTORS = 1 << 18  # For thousands of volumes that are attached at once.


def raise_descriptors():
    """As far as this user may; the programs that are started inherit it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for limit in ((DESCRIPTORS, max(hard, DESCRIPTORS)), (hard, hard)):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            return
        except (ValueError, OSError):
            continue


def measure_one(name, arguments, work, say):
    """The Result of a scenario, which has a store of its own: none depends on what ran before."""
    folder = work / name
    folder.mkdir()
    try:
        with Bench(arguments.build, folder, arguments.smoke) as bench:
            say(f"{name}: prepare")
            result = SCENARIOS[name](bench).measure(arguments.rounds, say)
            # One round of a busy machine says little; three that agree do.
            if arguments.smoke and result.furthest_beyond() > SMOKE_FACTOR:
                say(f"{name}: far beyond a target, so it is measured again")
                result.measure_more(SMOKE_ROUNDS - arguments.rounds, say)
            return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(arguments, names):
    """(what report.write() takes of each scenario, results)."""
    say = Progress()
    cache = guests.cache_folder() / "bench"
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="run-", dir=cache))
    # What is reported names no folder of this machine.
    hidden = [(work, "WORK"), (arguments.build, "BUILD"), (ROOT, "."),
              (guests.cache_folder(), "CACHE"), (Path.home(), "~")]

    def general(text):
        for path, word in hidden:
            text = text.replace(str(path), word)
        return re.sub(r"/dev/shm/stellarium-run-\w+(/[0-9a-f]{16})?", "RUNTIME", text)

    entries, results = [], []
    try:
        for name in names:
            begin = time.monotonic()
            entry = {"name": name, "measured": report.moment(ROOT)}
            entries.append(entry)
            try:
                result = measure_one(name, arguments, work, say)
                results.append(result)
                entry.update(result.as_json())
                entry["left_out"] = {variant: general(why)
                                     for variant, why in entry["left_out"].items()}
            except Unavailable as error:
                entry["skipped"] = general(str(error))
            except (PeerError, EngineError, guests.GuestError, OSError, ValueError,
                    LookupError) as error:
                entry["failed"] = general(f"{type(error).__name__}: {error}")
            entry["seconds"] = time.monotonic() - begin
            entry["commands"] = [general(line) for line in COMMANDS.take()]
            for word in ("skipped", "failed"):
                if word in entry:
                    say.done()
                    print(f"{name} {word}: {entry[word]}", file=sys.stderr, flush=True)
    finally:
        say.done()
        shutil.rmtree(work, ignore_errors=True)
    return entries, results


def with_earlier(entries, folder):
    """The scenarios of the report in `folder`, those of `entries` in place of what they were."""
    path = folder / "report.json"
    if not path.exists():
        return entries
    measured = {entry["name"]: entry for entry in entries}
    earlier = {entry["name"]: entry for entry in json.loads(path.read_text("utf-8"))["results"]}
    return [measured.get(name, earlier.get(name)) for name in SCENARIOS
            if name in measured or name in earlier]


def command_line(arguments):
    words = ["bench/suite/run.py", "--rounds", str(arguments.rounds)]
    words += ["--smoke"] if arguments.smoke else []
    words += ["--update"] if arguments.update else []
    words += ["--only", arguments.only] if arguments.only else []
    return shlex.join(words)


def print_verdicts(results, smoke):
    """One line for each target; how many are too far from it for a smoke run."""
    far = 0
    for result in results:
        for target, verdict in result.verdicts():
            where = f"{result.scenario.name}: {target.text}"
            if verdict is None:
                print(f"no peer  {where}")
                continue
            print(f"{'met     ' if verdict.met else 'NOT MET '} {where}: "
                  f"{report.ratio_text(verdict.ratio)}")
            if smoke and verdict.beyond > SMOKE_FACTOR:
                far += 1
                print(f"  more than {SMOKE_FACTOR} times beyond the target", flush=True)
    return far


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", help="scenarios whose name matches")
    parser.add_argument("--rounds", type=int, help="runs of each variant (default 5; smoke 1)")
    parser.add_argument("--smoke", action="store_true", help="small data, one round")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "release",
                        help="folder with the built programs (default build/release)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench",
                        help="folder for the report (default build/bench)")
    parser.add_argument("--update", action="store_true",
                        help="keep what the report in that folder says of other scenarios")
    parser.add_argument("--list", action="store_true", help="print the names of the scenarios")
    arguments = parser.parse_args()
    arguments.build = arguments.build.resolve()
    if arguments.list:
        print("\n".join(SCENARIOS))
        return 0
    if arguments.rounds is None:
        arguments.rounds = 1 if arguments.smoke else 5
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1")
    try:
        names = [name for name in SCENARIOS if re.search(arguments.only or "", name)]
    except re.error as error:
        parser.error(f"--only: {error}")
    if not (arguments.build / "bench" / "stellarium-blkbench").exists():
        parser.error(f"nothing is built in {arguments.build}; run scripts/build.sh release")
    if not names:
        parser.error(f"--only: no scenario matches '{arguments.only}'; --list prints them")
    # Ctrl-C and a kill clean up as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    raise_descriptors()

    begin = time.monotonic()
    entries, results = measure(arguments, names)
    run = {"command": command_line(arguments), "rounds": arguments.rounds, "smoke": arguments.smoke,
           "seconds": time.monotonic() - begin, "machine": report.machine(),
           "versions": report.versions(),
           "results": with_earlier(entries, arguments.out) if arguments.update else entries}
    report.write(run, arguments.out)

    far = print_verdicts(results, arguments.smoke)
    failed = [entry["name"] for entry in entries if "failed" in entry]
    for entry in entries:
        if "skipped" in entry:
            print(f"skipped  {entry['name']}: {entry['skipped']}")
        for variant, why in entry.get("left_out", {}).items():
            print(f"left out {entry['name']}: {variant}: {why}")
    for name in failed:
        print(f"FAILED   {name}")
    print(f"Measured {len(results)} of {len(entries)} in {run['seconds']:.0f} s. "
          f"Report: {arguments.out}/report.md")
    return 1 if failed or far else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

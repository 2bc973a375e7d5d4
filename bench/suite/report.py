"""The report of a run: report.json, report.md, and a plot (SVG) for each scenario."""
import datetime
import json
import os
import platform
import re
import subprocess
import sys

try:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
except ImportError:
    Figure = None

TOOLS = {
    "qemu-storage-daemon": ["qemu-storage-daemon", "--version"],
    "qemu-img": ["qemu-img", "--version"],
    "casync": ["casync", "--version"],
    "borg": ["borg", "--version"],
    "restic": ["restic", "version"],
    "cp": ["cp", "--version"],
    "mkfs.xfs": ["mkfs.xfs", "-V"],
}

MOST_OF_A_COMMAND = 400  # Characters that the report shows.
CANNOT = """\
No figure is of a guest's own speed: the load comes from `stellarium-blkbench`, which shares memory
and rings with a back-end as a VMM does, without a VM. Load and back-end share the processors. What
is not measured yet is listed in `bench/README.md`.
"""


def first_line(words):
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return f"{words[0]}: not installed"
    return ((done.stdout + done.stderr).splitlines() or [words[0]])[0].strip()


def machine():
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    with open("/proc/meminfo", encoding="utf-8") as lines:
        memory_kib = int(next(line for line in lines if line.startswith("MemTotal")).split()[1])
    return {"processor": models[0] if models else platform.machine(), "processors": os.cpu_count(),
            "memory_gib": round(memory_kib / (1 << 20), 1), "kernel": platform.release()}


def moment(root):
    """Today, and the commit that is checked out at `root`, where git knows it."""
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    try:
        commit = subprocess.run(["git", "-C", root, "rev-parse", "--short=12", "HEAD"],
                                capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return today
    return f"{today}, commit {commit}"


def versions():
    return {name: first_line(words) for name, words in TOOLS.items()}


def human(value, unit):
    if unit == "s":
        for factor, name in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
            if value * factor >= 1 or name == "µs":
                return f"{value * factor:.3g} {name}"
    if unit == "bytes":
        for name in ("B", "KiB", "MiB", "GiB"):
            if abs(value) < 1024 or name == "GiB":
                return f"{value:.4g} {name}"
            value /= 1024
    if unit == "ratio":
        return f"{value:.3g}"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def ratio_text(ratio):
    return f"{ratio:,.0f}" if ratio >= 1000 else f"{ratio:.3g}"


def verdict(target):
    if target["met"] is None:
        return "not measured here"
    return "met" if target["met"] else "**not met**"


def section(result):
    """What is said of one scenario."""
    lines = [f"### {result.get('title', result['name'])}", ""]
    for word, text in (("skipped", "Not measured here"), ("failed", "Could not be measured")):
        if word in result:
            lines += [f"{text}: {result[word]}", ""]
    if "figures" not in result:
        return lines
    if result["note"]:
        lines += [result["note"], ""]
    if "measured" in result:
        lines += [f"Measured on {result['measured']}.", ""]
    lines += ["| | median | smallest … largest |", "| --- | --- | --- |"]
    for name, figures in result["figures"].items():
        unit = figures["unit"]
        lines.append(f"| {name} | {human(figures['median'], unit)} | "
                     f"{human(figures['min'], unit)} … {human(figures['max'], unit)} |")
    for name, why in result["left_out"].items():
        lines.append(f"| {name} | left out: {why} | |")
    lines.append("")
    if result["commands"]:
        lines += ["```", *shown_commands(result["commands"]), "```", ""]
    return lines


def shown_commands(commands):
    """Of those that differ in numbers only the first, and of long ones the beginning."""
    first = {re.sub(r"\d+", "0", line): line for line in reversed(commands)}
    kept = set(first.values())
    return [line if len(line) <= MOST_OF_A_COMMAND else line[:MOST_OF_A_COMMAND] + " ..."
            for line in dict.fromkeys(commands) if line in kept]


def markdown(run):
    versions = "; ".join(run["versions"].values())
    lines = ["# Benchmarks", "",
             f"Made by `{run['command']}` in {run['seconds']:.0f} s: {run['rounds']} interleaved "
             f"rounds, medians, and the smallest and the largest figure. Each scenario names the "
             f"commit that it was measured with; those of other commits are of earlier runs.", ""]
    if run["smoke"]:
        lines += ["**A smoke run: little data and few rounds, so its figures say little.**", ""]
    lines += [f"Machine: {run['machine']['processors']} × {run['machine']['processor']}, "
              f"{run['machine']['memory_gib']} GiB, Linux {run['machine']['kernel']}. "
              f"Peers: {versions}.", "", CANNOT,
              "## Targets", "", "| scenario | target | measured | |", "| --- | --- | --- | --- |"]
    for result in run["results"]:
        for target in result.get("targets", ()):
            ratio = "" if target["ratio"] is None else ratio_text(target["ratio"])
            lines.append(f"| {result['title']} | {target['text']} | {ratio} | {verdict(target)} |")
    lines += ["", "## Figures", "",
              "Of commands that differ in numbers only, the first is shown.", ""]
    for result in run["results"]:
        lines += section(result)
    return "\n".join(lines).rstrip() + "\n"


def plot(result, path):
    """Bars for the medians, lines from the smallest to the largest figure, of one unit."""
    shown = {name: each for name, each in result["figures"].items()
             if each["unit"] == result["unit"]}
    if not shown:
        return
    names, figures = list(shown), list(shown.values())
    medians = [each["median"] for each in figures]
    spread = [[each["median"] - each["min"] for each in figures],
              [each["max"] - each["median"] for each in figures]]
    figure = Figure(figsize=(7, 0.5 * len(names) + 1.2))
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.barh(names, medians, xerr=spread, capsize=3,
              color=["#2a6f97" if name == "stellarium" else "#a9b4c2" for name in names])
    axes.invert_yaxis()
    axes.set_title(result["title"], fontsize=10)
    axes.set_xlabel(result["unit"])
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def write(run, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(run), encoding="utf-8")
    if Figure is None:
        print("python3-matplotlib is not installed, so there are no plots", file=sys.stderr)
        return
    for result in run["results"]:
        if "figures" in result:
            plot(result, folder / f"{result['name']}.svg")

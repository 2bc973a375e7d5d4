"""Interleaved measurements, and targets as ratios of medians.

    scenario = Scenario("export", "Export an image", "s", {"stellarium": run_a, "cp": run_b},
                        [Target("at least 0.5 x cp", 0.5, lambda m: m["cp"] / m["stellarium"])])
    result = scenario.measure(rounds=5, say=print)

A variant is a function that does the work once and returns its figure. Each round runs every
variant once, in an order that rotates, so that whatever else the machine does falls on all of them
alike. What is compared is the median of each variant's figures; the spread is shown beside it. A
variant that raises Unavailable is left out with its reason, and a target that needs it is not
judged; any other exception ends the measurement. One thread.
"""
import statistics
import sys
import time
from dataclasses import dataclass, field


class Unavailable(Exception):
    """This machine lacks what the work needs; the text says what, in one line."""


@dataclass
class Target:
    """What is asked of a scenario: a ratio of medians, and the bound that it must keep."""
    text: str
    bound: float
    ratio: object  # A function of {variant: median}; KeyError when it needs one that is not there.
    at_most: bool = False  # Else the ratio must be at least the bound.
    # What a smoke run's distance is counted from, where little data says less than the target asks,
    # or the engine is known to be far from it.
    smoke_bound: float = None

    def judge(self, medians):
        """The verdict, or None when a variant that it needs could not be measured."""
        try:
            ratio = self.ratio(medians)
        except KeyError:
            return None
        bound = self.bound if self.smoke_bound is None else self.smoke_bound
        if self.at_most:
            return Verdict(ratio, ratio <= self.bound, ratio / bound)
        return Verdict(ratio, ratio >= self.bound, bound / ratio if ratio > 0 else float("inf"))


@dataclass
class Verdict:
    ratio: float
    met: bool
    beyond: float  # How far beyond the bound, for a smoke run: 1 is just at it, 3 is three times.


@dataclass
class Scenario:
    name: str
    title: str
    unit: str  # s, IOPS, MB/s, M/s, bytes, us, ratio
    variants: dict  # name -> function that returns the figure of one run
    targets: list = field(default_factory=list)
    note: str = ""
    units: dict = field(default_factory=dict)  # Of those variants that have another one.

    def unit_of(self, variant):
        return self.units.get(variant, self.unit)

    def measure(self, rounds, say):
        result = Result(self, {name: [] for name in self.variants})
        result.measure_more(rounds, say)
        return result


class Together:
    """Several figures of one run: each variant takes one, and who asks first makes the run."""

    def __init__(self, run):
        self.run = run  # Returns {key: figure}.
        self.figures = {}

    def variant(self, key):
        def take():
            if key not in self.figures:
                self.figures = self.run()
            return self.figures.pop(key)
        return take


@dataclass
class Result:
    scenario: Scenario
    figures: dict  # variant -> list, one for each round
    left_out: dict = field(default_factory=dict)  # variant -> why

    def measure_more(self, rounds, say):
        names = list(self.figures)
        for turn in range(rounds):
            for step in range(len(names)):
                name = names[(turn + step) % len(names)]
                if name not in self.left_out:
                    self._measure_once(name, say)

    def _measure_once(self, name, say):
        begin = time.monotonic()
        try:
            figure = self.scenario.variants[name]()
        except Unavailable as error:
            self.left_out[name] = str(error)
            self.figures[name].clear()
            say(f"{self.scenario.name}: {name} left out: {error}")
            return
        self.figures[name].append(figure)
        say(f"{self.scenario.name} {len(self.figures[name])} {name}: {figure:.6g} "
            f"{self.scenario.unit_of(name)} ({time.monotonic() - begin:.1f} s)")

    def medians(self):
        return {name: statistics.median(values) for name, values in self.figures.items() if values}

    def verdicts(self):
        """[(target, verdict or None)]."""
        medians = self.medians()
        return [(target, target.judge(medians)) for target in self.scenario.targets]

    def furthest_beyond(self):
        """How far the worst figure is beyond its target; 0 without any that could be judged."""
        return max((verdict.beyond for _, verdict in self.verdicts() if verdict), default=0)

    def as_json(self):
        figures = {name: {"unit": self.scenario.unit_of(name), "median": statistics.median(values),
                          "min": min(values), "max": max(values), "all": values}
                   for name, values in self.figures.items() if values}
        targets = []
        for target, verdict in self.verdicts():
            targets.append({"text": target.text, "bound": target.bound, "at_most": target.at_most,
                            "ratio": verdict.ratio if verdict else None,
                            "met": verdict.met if verdict else None})
        return {
            "name": self.scenario.name, "title": self.scenario.title, "unit": self.scenario.unit,
            "note": self.scenario.note, "figures": figures,
            "left_out": self.left_out, "targets": targets,
        }


class Progress:
    """One line that is written over on a terminal; a line for each step elsewhere."""

    def __init__(self):
        self.terminal = sys.stderr.isatty()

    def __call__(self, text):
        print(f"\r\033[K{text}" if self.terminal else text, end="" if self.terminal else "\n",
              file=sys.stderr, flush=True)

    def done(self):
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

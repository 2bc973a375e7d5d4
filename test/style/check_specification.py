#!/usr/bin/env python3
"""Checks that each promise of docs/SPECIFICATION.md has a test that exists.

    check_specification.py ROOT         prints each violation, exit 1 if any
    check_specification.py --self-test  prove on small made-up trees that each violation is found

A promise is a row `| id | promise | tests |`. Its id is there once; its tests are `Suite.Name` of a
GoogleTest case or `test_name` of a Python test below src/ or test/, or `script.sh` of one of those.
"""
import re
from pathlib import Path

from checker import count_wrong, run

PAGE = "docs/SPECIFICATION.md"
ROW = re.compile(r"\| *([A-Z]\d+) *\|(.*)\|(.*)\|$")
CASE = re.compile(r"^(?:TEST|TEST_F|TEST_P)\(\s*(\w+),\s*(\w+)\s*\)", re.M)
METHOD = re.compile(r"^\s*def (test_\w+)\(", re.M)


def tests_of(root):
    names = set()
    for folder in ("src", "test"):
        for path in sorted((root / folder).rglob("*_test.*")):
            text = path.read_text()
            if path.suffix == ".cc":
                names.update(f"{suite}.{name}" for suite, name in CASE.findall(text))
            elif path.suffix == ".py":
                names.update(METHOD.findall(text))
            names.add(path.name)
    return names


def check(root):
    root = Path(root).resolve()
    known = tests_of(root)
    problems = []
    ids = set()
    for number, line in enumerate((root / PAGE).read_text().splitlines(), 1):
        where = f"{PAGE}:{number}"
        row = ROW.match(line)
        if row is None:
            if line.startswith("|") and not re.match(r"\| *(---|id) *\|", line):
                problems.append(f"{where}: is no row '| id | promise | tests |'")
            continue
        identity, promise, tests = row.groups()
        if identity in ids:
            problems.append(f"{where}: {identity} is there twice")
        ids.add(identity)
        if not promise.strip():
            problems.append(f"{where}: {identity} promises nothing")
        named = re.findall(r"`([^`]+)`", tests)
        if not named:
            problems.append(f"{where}: {identity} names no test")
        problems += [f"{where}: {identity} names {name}, which is no test" for name in named if name not in known]
    if not ids:
        problems.append(f"{PAGE}: promises nothing")
    return problems


def self_test():
    good = {PAGE: "| id | promise | enforced by |\n| --- | --- | --- |\n| A1 | It is. | `S.N`, `test_x` |\n",
            "src/a/a_test.cc": "TEST_F(S, N) {\n", "test/b_test.py": "    def test_x(self):\n"}
    head = good[PAGE]
    cases = [
        ("a good page", {}, ""),
        ("a test that is gone", {"src/a/a_test.cc": "// TEST_F(S, N)\n"}, "A1 names S.N, which is no test"),
        ("no test", {PAGE: head + "| A2 | It is. | see above |\n"}, "A2 names no test"),
        ("the same id", {PAGE: head + "| A1 | It is. | `S.N` |\n"}, "A1 is there twice"),
        ("no promise", {PAGE: head + "| A2 | | `S.N` |\n"}, "A2 promises nothing"),
        ("half a row", {PAGE: head + "| A2 | It is. |\n"}, "is no row"),
        ("an empty page", {PAGE: "# Nothing\n"}, "promises nothing"),
    ]
    return count_wrong(check, good, cases)


if __name__ == "__main__":
    run(__doc__, check, self_test)

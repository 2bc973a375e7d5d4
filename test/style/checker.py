"""What the checks of the tree share: their command line, and trees made up for their self-tests."""
import sys
import tempfile
from pathlib import Path


def count_wrong(check, good, cases):
    """How many of `cases` `check` got wrong; prints each.

    `good` is a tree, as {path: text}, without a fault. A case is (title, files to add or replace,
    text that a problem must hold, or "" where there must be none).
    """
    wrong = 0
    for title, changes, expected in cases:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in {**good, **changes}.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            problems = check(folder)
        found = not problems if expected == "" else any(expected in line for line in problems)
        if not found:
            wrong += 1
            print(f"self-test: {title}: expected '{expected}', got {problems}")
    return wrong


def run(usage, check, self_test):
    """The program: ROOT or --self-test. Prints each problem; exit 1 if there is any."""
    if len(sys.argv) != 2:
        sys.exit(usage)
    if sys.argv[1] == "--self-test":
        sys.exit(1 if self_test() else 0)
    problems = check(sys.argv[1])
    print("\n".join(problems), end="\n" if problems else "")
    sys.exit(1 if problems else 0)

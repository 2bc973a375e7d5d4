#!/usr/bin/env python3
"""Checks what every file and folder of the tree must have.

    check_tree.py ROOT         check the tree at ROOT; prints each violation, exit 1 if any
    check_tree.py --self-test  prove on small made-up trees that each violation is found

  * Each component (a folder below src/ with a CMakeLists.txt of its own) has a README.md.
  * Each public header opens with its contract: the first line is a comment, before any code.
  * No line names a path that exists only on somebody's machine.
  * docs/internals/ names only functions and files that are there.
  * No two headers define a type of the same name in the same namespace: of what a template makes of
    the two, the linker keeps one (a collection moved 8-byte runs as if they had 24).
"""
import re
from pathlib import Path

from checker import count_wrong, run

# Written in pieces, so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.$}~-])/(?:wo" + r"rk|ho" + r"me|Use" + r"rs|ro" + r"ot/[\w.])(?:/[\w.@-]+)+")
# Where a guest's or a package's own file system is meant, and not this machine's.
ALLOWED_PREFIXES = ("/home/stellarium",)
SKIPPED_FOLDERS = {".git", "build", ".cache", "golden", "corpus"}
# In the internals' pages: `Class::function`, `function()`, and `folder/file.cc` or `file.h`.
FUNCTION = re.compile(r"`(?:[\w:]*::)?(\w+)(?:\([^`)]*\))?`")
QUALIFIED = re.compile(r"`[\w:]*::\w+(?:\([^`)]*\))?`|`\w+\([^`)]*\)`")
FILE = re.compile(r"`((?:[\w-]+/)*[\w-]+\.(?:cc|h))`")
NAMESPACE = re.compile(r"^namespace (stellarium[\w:]*) \{", re.M)
TYPE = re.compile(r"^(?:struct|class|enum class) (\w+)\b(?!::)[^;:{]*(?::[^;{]*)?\{", re.M)
TEXT_SUFFIXES = {".cc", ".h", ".c", ".py", ".sh", ".md", ".txt", ".cmake", ".json", ".yaml", ".yml",
                 ".in", ".service", ".conf", ""}


def tree_files(root):
    for path in sorted(root.iterdir()):
        if path.name in SKIPPED_FOLDERS or path.is_symlink():
            continue
        if path.is_dir():
            yield from tree_files(path)
        elif path.suffix in TEXT_SUFFIXES:
            yield path


def stale_names(root):
    """Names in docs/internals that the sources do not have."""
    sources = [path for path in sorted((root / "src").rglob("*")) if path.suffix in (".cc", ".h")]
    known = set(re.findall(r"\b(\w+)\s*\(", "\n".join(path.read_text() for path in sources)))
    for page in sorted((root / "docs/internals").glob("*.md")):
        for number, line in enumerate(page.read_text().splitlines(), 1):
            where = f"{page.relative_to(root)}:{number}"
            for match in QUALIFIED.finditer(line):
                if FUNCTION.fullmatch(match.group())[1] not in known:
                    yield f"{where}: names {match.group()}, which the sources do not have"
            for match in FILE.finditer(line):
                if not any(("/" + path.as_posix()).endswith("/" + match[1]) for path in sources):
                    yield f"{where}: names {match.group()}, which is not there"


def types_defined_twice(root):
    """Types that two headers define under one name."""
    homes = {}
    for path in sorted((root / "src").rglob("*.h")):
        text = path.read_text()
        namespace = NAMESPACE.search(text)
        for name in TYPE.findall(text) if namespace else ():
            first = homes.setdefault((namespace[1], name), path)
            if first != path:
                yield (f"{path.relative_to(root)}: defines {namespace[1]}::{name}, as "
                       f"{first.relative_to(root)} does")


def check(root):
    root = Path(root).resolve()
    problems = list(stale_names(root)) + list(types_defined_twice(root))
    for list_file in sorted((root / "src").rglob("CMakeLists.txt")):
        if list_file.parent != root / "src" and not (list_file.parent / "README.md").exists():
            problems.append(f"{list_file.parent.relative_to(root)}: has no README.md")
    for path in tree_files(root):
        where = path.relative_to(root)
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        if path.suffix == ".h" and where.parts[0] in ("src", "include"):
            first = text.split("\n", 1)[0]
            if not re.match(r"(//|/\*).*\w", first):
                problems.append(f"{where}:1: opens without its contract (a comment that says what it is)")
        for number, line in enumerate(text.splitlines(), 1):
            for match in MACHINE_PATH.finditer(line):
                if not match.group().startswith(ALLOWED_PREFIXES):
                    problems.append(f"{where}:{number}: names a path of one machine: {match.group()}")
    return problems


def self_test():
    good = {"src/a/CMakeLists.txt": "", "src/a/README.md": "A.\n",
            "src/a/a.h": "// What a is.\nvoid A::go(int x);\n",
            "docs/internals/a.md": "`a/a.h` has `A::go`, that is `go(1)`; `a.h` too.\n"}
    private = "/ho" + "me/alice/src"
    cases = [
        ("a good tree", {}, ""),
        ("a component without README", {"src/b/CMakeLists.txt": ""}, "src/b: has no README.md"),
        ("a header without contract", {"src/a/b.h": "#pragma once\n// Too late.\n"}, "src/a/b.h:1: opens without"),
        ("an empty comment", {"src/a/b.h": "//\n#pragma once\n"}, "src/a/b.h:1: opens without"),
        ("a private path", {"docs/x.md": f"one\ncd {private}\n"}, "docs/x.md:2: names a path of one machine"),
        ("a function that is gone", {"docs/internals/a.md": "One.\n`A::gone` does it.\n"},
         "docs/internals/a.md:2: names `A::gone`"),
        ("a call that is gone", {"docs/internals/a.md": "`gone(kNow)`\n"}, "a.md:1: names `gone(kNow)`"),
        ("a file that is gone", {"docs/internals/a.md": "See `a/b.h`.\n"}, "a.md:1: names `a/b.h`"),
        ("a type of two headers",
         {"src/a/x.h": "// X.\nnamespace stellarium::a {\nstruct Run {\n};\n}\n",
          "src/a/y.h": "// Y.\nnamespace stellarium::a {\nclass Run final : public X {\n};\n}\n"},
         "src/a/y.h: defines stellarium::a::Run, as src/a/x.h does"),
        ("types of two namespaces, and one that is declared",
         {"src/a/x.h": "// X.\nnamespace stellarium::a {\nstruct Run {\n};\n}\n",
          "src/a/y.h": "// Y.\nnamespace stellarium::b {\nstruct Run {\n};\n}\n",
          "src/a/z.h": "// Z.\nnamespace stellarium::a {\nstruct Run;\n}\n"}, ""),
        ("a variable's path", {"docs/x.md": "cd $HOME" + private + " ~" + private + "\n"}, ""),
    ]
    return count_wrong(check, good, cases)


if __name__ == "__main__":
    run(__doc__, check, self_test)

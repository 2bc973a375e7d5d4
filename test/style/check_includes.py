#!/usr/bin/env python3
"""Compares the #include lines of the sources with the dependencies that CMake declares.

    check_includes.py ROOT         check the tree at ROOT; prints each violation, exit 1 if any
    check_includes.py --self-test  prove on small made-up trees that each violation is found

A component is one stellarium_component() call. It may include the headers of the components in its
DEPS, of itself, and nothing else of ours. What this finds:

  * an include of a component that DEPS does not name (a shortcut between layers);
  * a dependency on a component that src/CMakeLists.txt adds later (the link order is the layering);
  * an include that is not written relative to src/, or names no file there;
  * an include of a .cc file (a test that reaches into an implementation);
  * a source file that no target compiles, or a target that names a missing one.

A test may also include what its stellarium_test() call names in DEPS, and a fuzz target what its
stellarium_add_fuzz_target() call does.
"""
import re
from pathlib import Path

from checker import count_wrong, run

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)
KEYWORDS = {"NAME", "SOURCES", "DEPS", "LIBS", "LABELS", "TIMEOUT", "RUNS"}
TESTS = ("stellarium_test", "stellarium_add_fuzz_target")
SOURCE_SUFFIXES = {".cc", ".cpp", ".c", ".h", ".hpp"}


class Target:
    """One stellarium_component(), stellarium_test() or stellarium_add_fuzz_target() call."""

    def __init__(self, kind, arguments, list_file):
        self.kind = kind
        self.list_file = list_file
        self.folder = list_file.parent
        fields = {keyword: [] for keyword in KEYWORDS}
        current = None
        for word in arguments:
            if word in KEYWORDS:
                current = fields[word]
            elif current is not None:
                current.append(word)
        self.name = fields["NAME"][0] if fields["NAME"] else "?"
        self.deps = fields["DEPS"]
        self.sources = [(self.folder / source).resolve() for source in fields["SOURCES"]
                        if "${" not in source]


def cmake_calls(text, function):
    """Yields the argument words of each call of `function`; comments are removed first."""
    text = re.sub(r"#[^\n]*", "", text)
    for match in re.finditer(rf"\b{function}\s*\(([^()]*)\)", text):
        yield match.group(1).replace('"', " ").split()


def link_order(src):
    """Component folders in the order in which src/CMakeLists.txt adds them."""
    text = re.sub(r"#[^\n]*", "", (src / "CMakeLists.txt").read_text())
    order = []
    for match in re.finditer(r"add_subdirectory\s*\(([^()]*)\)|foreach\s*\(\s*component\s+([^()]*)\)",
                             text):
        order += [word for word in (match.group(1) or match.group(2)).split() if "$" not in word]
    return order


def check(root):
    """Returns the violations of the tree at `root` as printable lines, in file order."""
    root = Path(root).resolve()
    src = root / "src"
    problems = []

    components, tests = {}, []
    list_files = sorted(src.rglob("CMakeLists.txt"))
    if (root / "test").is_dir():
        list_files += sorted((root / "test").rglob("CMakeLists.txt"))
    for list_file in list_files:
        text = list_file.read_text()
        for arguments in cmake_calls(text, "stellarium_component"):
            target = Target("component", arguments, list_file)
            components[target.name] = target
        for function in TESTS:
            for arguments in cmake_calls(text, function):
                tests.append(Target("test", arguments, list_file))

    # Layering: folders in link order; a component is as high as the folder that declares it.
    order = link_order(src)

    def height(name):
        folder = components[name].folder.relative_to(src).as_posix()
        return order.index(folder) if folder in order else len(order)

    for name, target in components.items():
        where = target.list_file.relative_to(root)
        for dep in target.deps:
            if dep not in components:
                problems.append(f"{where}: {name} depends on {dep}, which is no component")
            elif dep == name or height(dep) > height(name):
                problems.append(f"{where}: {name} depends on {dep}, which is not below it in "
                                f"src/CMakeLists.txt")

    # Which targets compile a file.
    users = {}
    for target in list(components.values()) + tests:
        for source in target.sources:
            users.setdefault(source, []).append(target)
            if not source.exists():
                problems.append(f"{target.list_file.relative_to(root)}: {target.name} lists "
                                f"{source.name}, which does not exist")

    def component_of(path):
        """The component that a path below src/ belongs to: the longest name that contains it."""
        parts = path.relative_to(src).parts[:-1]
        for length in range(len(parts), 0, -1):
            name = "/".join(parts[:length])
            if name in components:
                return name
        return None

    files = [path for path in sorted(src.rglob("*")) if path.suffix in SOURCE_SUFFIXES]
    test_sources = {source for test in tests for source in test.sources}
    files += sorted(path for path in test_sources if src not in path.parents and path.exists())
    for path in files:
        where = path.relative_to(root)
        owner = component_of(path) if src in path.parents else None
        if owner is None and src in path.parents and path.resolve() not in users \
                and not compiled_elsewhere(path):
            problems.append(f"{where}: belongs to no component and no target")
            continue
        allowed = set()
        if owner:
            allowed |= {owner, *components[owner].deps}
        for target in users.get(path.resolve(), []):
            allowed |= {target.name, *target.deps}
        if path.suffix == ".cc" and owner and path.resolve() not in users \
                and not compiled_elsewhere(path):
            problems.append(f"{where}: no target compiles this file")

        text = path.read_text(errors="replace")
        for match in INCLUDE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            included = match.group(1)
            if included.endswith((".cc", ".cpp", ".c")):
                problems.append(f"{where}:{line}: includes {included}, an implementation file")
                continue
            if not (src / included).exists():
                if (root / included).exists() and src not in path.parents:
                    continue  # A helper of the tests, beside them.
                # C headers of other packages are sometimes included in quotes.
                if (path.parent / included).exists() or "/" in included:
                    problems.append(f"{where}:{line}: includes \"{included}\", which is not a file "
                                    f"below src/ (write it relative to src/)")
                continue
            target = component_of(src / included)
            if target is None:
                problems.append(f"{where}:{line}: includes {included}, which is in no component")
            elif target not in allowed:
                problems.append(f"{where}:{line}: includes {included}, but {owner or where} does "
                                f"not name {target} in its DEPS")
    return problems


def compiled_elsewhere(path):
    """True if the nearest CMakeLists.txt names the file outside of our own functions (a program)."""
    for folder in path.parents:
        list_file = folder / "CMakeLists.txt"
        if list_file.exists():
            return re.search(rf"(?<![\w.-]){re.escape(path.name)}(?![\w.-])", list_file.read_text())
    return None


def self_test():
    """Each case is a small tree and the one fault it holds ('' for none)."""
    top = "add_subdirectory(low)\nforeach(component mid high)\n  add_subdirectory(${component})\nendforeach()\n"
    good = {
        "src/CMakeLists.txt": top,
        "src/low/CMakeLists.txt": "stellarium_component(NAME low SOURCES low.cc)\n"
                                  "stellarium_test(NAME low SOURCES low_test.cc DEPS low)\n",
        "src/low/low.h": "// Low.\n", "src/low/low.cc": '#include "low/low.h"\n#include <vector>\n',
        "src/low/low_test.cc": '#include "low/low.h"\n',
        "src/mid/CMakeLists.txt": "stellarium_component(NAME mid  # a comment (with parentheses)\n"
                                  "  SOURCES mid.cc DEPS low LIBS fmt::fmt)\n",
        "src/mid/mid.h": '#include "low/low.h"\n', "src/mid/mid.cc": '#include "mid/mid.h"\n',
        "src/high/CMakeLists.txt": "stellarium_component(NAME high SOURCES high.cc DEPS mid)\n",
        "src/high/high.h": "// High.\n", "src/high/high.cc": '#include "mid/mid.h"\n',
    }
    cases = [
        ("a good tree", {}, ""),
        ("a shortcut between layers", {"src/high/high.cc": '#include "low/low.h"\n'},
         "high.cc:1: includes low/low.h, but high does not name low"),
        ("an include against the order", {"src/low/low.cc": '\n#include "high/high.h"\n'},
         "low.cc:2: includes high/high.h, but low does not name high"),
        ("a dependency against the order",
         {"src/low/CMakeLists.txt": good["src/low/CMakeLists.txt"].replace("low.cc)", "low.cc DEPS high)")},
         "low depends on high, which is not below it"),
        ("an unknown dependency",
         {"src/high/CMakeLists.txt": "stellarium_component(NAME high SOURCES high.cc DEPS mid moon)\n"},
         "high depends on moon, which is no component"),
        ("a test that includes an implementation", {"src/low/low_test.cc": '#include "low/low.cc"\n'},
         "low_test.cc:1: includes low/low.cc, an implementation file"),
        ("a test that reaches past its DEPS", {"src/low/low_test.cc": '#include "mid/mid.h"\n'},
         "low_test.cc:1: includes mid/mid.h, but low does not name mid"),
        ("a fuzz target that reaches past its DEPS",
         {"test/CMakeLists.txt": "stellarium_add_fuzz_target(NAME f SOURCES f.cc DEPS low RUNS 5)\n",
          "test/f.cc": '#include "mid/mid.h"\n'},
         "f.cc:1: includes mid/mid.h, but test/f.cc does not name mid"),
        ("an include beside the file", {"src/mid/mid.cc": '#include "mid.h"\n'},
         'mid.cc:1: includes "mid.h", which is not a file below src/'),
        ("an include of nothing", {"src/mid/mid.cc": '#include "mid/gone.h"\n'},
         'mid.cc:1: includes "mid/gone.h", which is not a file below src/'),
        ("a source that nothing compiles", {"src/mid/more.cc": "int x;\n"},
         "more.cc: no target compiles this file"),
        ("a header of no component", {"src/lost/lost.h": "// Lost.\n"},
         "lost.h: belongs to no component"),
        ("a source that is not there",
         {"src/high/CMakeLists.txt": "stellarium_component(NAME high SOURCES high.cc no.cc DEPS mid)\n"},
         "high lists no.cc, which does not exist"),
    ]
    return count_wrong(check, good, cases)


if __name__ == "__main__":
    run(__doc__, check, self_test)

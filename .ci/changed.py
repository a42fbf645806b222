"""Which tests a change needs, first those that are likeliest to fail: python .ci/changed.py [BASE]

BASE is a commit; without it, what is not in the branch that this one follows (or the last commit, if it follows none). What is not committed yet counts.
Prints the arguments of pytest, a line each; `.ci/run changed` runs them for five minutes. Chosen are

    tests that are new or changed, or import what changed in tests/support
    for each file of the program        the PLACES best modules of tests: those of its name, those that import it or what imports it, those of its room, and
                                        those that have the rarer words of the functions, classes and constants that changed
    what RULES says of other files
    the spine (.ci/spine)               always, after the FIRST
"""

import ast
import math
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# what a path begins with, the longest first that fits -> the tests that it needs besides the spine
RULES = {
    "chatlm/worker/kernels/": ["tests/core", "tests/worker/test_bits.py", "tests/worker/test_doctor.py"],
    "chatlm/worker/ops/": ["tests/worker/model", "tests/worker/engine/test_states.py", "tests/worker/engine/test_same_bits.py"],
    "csrc/": ["tests/core", "tests/worker/test_bits.py", "tests/worker/engine/test_same_bits.py"],
    "setup.py": ["tests/core/test_build.py", "tests/test_install.py", "tests/common/test_bundle.py"],
    "release.py": ["tests/core/test_build.py", "tests/test_install.py"],
    "pyproject.toml": ["tests/core/test_build.py", "tests/test_install.py", "tests/test_types.py"],
    "requirements.txt": ["tests/core/test_build.py", "tests/test_install.py"],
    "static/": ["tests/page", "tests/common/test_bundle.py"],
    "Containerfile": ["tests/test_container.py"], "MANIFEST.in": ["tests/core/test_build.py"], ".ci/": ["tests/test_checks.py"],
    "tests/core/": ["tests/core"], "tests/fixtures/": ["tests/worker/weights", "tests/export", "tests/common"],
    "tests/conftest.py": ["tests/common", "tests/front/api"], "bench/": ["bench"], "bench/RESULTS.md": ["bench/test_bench_tables.py"], "bench/history/": [],
}
PLACES = 40     # modules of tests for what changed of one file: more than five minutes have time for
FIRST = 6       # modules before the spine
WORD = 5        # characters of a name or a text that tells something from others
# What it is worth that a module of tests imports the file, what imports it, what imports that (or is named after such a file); is named after the file;
# is in its room; has the most of its words, each as often as OFTEN
NEAR, OWN_NAME, OWN_ROOM, SAID, OFTEN = (10.0, 5.0, 2.0), 20.0, 5.0, 20.0, 3


def module_of(path: str) -> str:
    """The name by which a file is imported."""
    name = path.removesuffix(".py").removesuffix("/__init__")
    return name.replace("/", ".") if name.startswith("chatlm") else Path(name).name


def stem_of(path: str) -> str:
    """The name of a file, as the tests' names begin: test_drafts.py and test_draft_model.py are both of drafts.py."""
    return Path(path).stem.removesuffix("s")


def is_test(path: str) -> bool:
    return Path(path).name.startswith("test_") and path.endswith(".py")


def imported_names(text: str) -> set[str]:
    """The names of modules, and of what may be one, that a text imports, patches or has in a table."""
    names = set(re.findall(r"\bchatlm(?:\.\w+)+", text)) | set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))
    for package, block, line in re.findall(r"^\s*from (chatlm[\w.]*) import (?:\(([^)]*)\)|(.*))", text, re.MULTILINE):
        names |= {f"{package}.{name}" for name in re.findall(r"\w+", block or line)}
    return names


def pieces_of(text: str) -> dict[str, list[str]]:
    """What a module's text defines, without docstrings and comments: name -> its statements; methods as "Class.method"."""
    pieces: dict[str, list[str]] = defaultdict(list)

    def read(body: list[ast.stmt], outer: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                read(node.body, f"{outer}{node.name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                node.body = node.body[ast.get_docstring(node) is not None:] or node.body
                pieces[outer + node.name] += [ast.unparse(node.args), *map(ast.unparse, chain(node.decorator_list, node.body))]
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                name = next((each.id for each in ast.walk(node) if isinstance(each, ast.Name)), "")
                pieces[outer + name].append(ast.unparse(node))

    try:
        read(ast.parse(text).body, "")
    except SyntaxError:
        return {}
    return pieces


def words_of(text: str) -> list[str]:
    """Each as often as it is there."""
    return [word for each in re.findall(r"\w+", text) if len(word := each.strip("_")) >= WORD]


class Change:
    """What differs between BASE and the working tree, and the tests that may see it."""

    def __init__(self, base: str | None = None, root: Path = ROOT) -> None:
        self.root = root
        self.base = base or self.default_base()
        self.always = [line for line in (root / ".ci/spine").read_text().splitlines() if line and not line.startswith("#")]

    def git(self, *words: str) -> str:
        return subprocess.run(["git", *words], cwd=self.root, check=True, capture_output=True, text=True).stdout

    def default_base(self) -> str:
        words = ["git", "merge-base", "HEAD", "@{upstream}"]
        base = subprocess.run(words, cwd=self.root, capture_output=True, text=True).stdout.strip()
        nothing_new = base == self.git("rev-parse", "HEAD").strip() and not self.git("status", "--porcelain")
        return base if base and not nothing_new else "HEAD~1"

    def changed_files(self) -> list[str]:
        others = self.git("ls-files", "--others", "--exclude-standard", "-z")
        return sorted({*self.git("diff", "--name-only", "--no-renames", "-z", self.base).split("\0"), *others.split("\0")} - {""})

    @cached_property
    def texts(self) -> dict[str, str]:
        """Of all that may be imported, and of the tests."""
        paths = self.git("ls-files", "--cached", "--others", "--exclude-standard", "chatlm", "chat_server.py", "tests", "bench").splitlines()
        return {path: (self.root / path).read_text() for path in paths if path.endswith(".py") and (self.root / path).is_file()}

    @cached_property
    def tests(self) -> dict[str, Counter]:
        """module of tests -> its words."""
        return {path: Counter(words_of(text)) for path, text in self.texts.items() if is_test(path)}

    @cached_property
    def rarity(self) -> dict[str, float]:
        """word -> what it is worth that a module of tests has it."""
        count = Counter(chain.from_iterable(self.tests.values()))
        return {word: math.log(len(self.tests) / each) for word, each in count.items()}

    @cached_property
    def importers(self) -> dict[str, set[str]]:
        """module -> the files that import it."""
        found = defaultdict(set)
        for path, text in self.texts.items():
            for name in imported_names(text):
                found[name].add(path)
        return found

    def nearness(self, path: str) -> dict[str, float]:
        """file -> what it is worth that it imports this one, itself or by others."""
        worth: dict[str, float] = {}
        layer = {path}
        for each in NEAR:
            layer = set().union(*(self.importers[module_of(file)] for file in layer)) - worth.keys()
            worth |= dict.fromkeys(layer, each)
        return worth

    def choose(self) -> list[str]:
        lists: list[list[str]] = []
        for path in self.changed_files():
            rule = max((start for start in RULES if path.startswith(start)), key=len, default="")
            if is_test(path):
                lists.append([path] if path in self.texts else [])
            elif path.startswith("tests/support/"):
                near = self.nearness(path)
                lists.append(sorted(filter(is_test, near), key=lambda test: -near[test]))
            elif path.startswith("chatlm/") or path == "chat_server.py":
                lists.append(self.best_tests(path))
            if not is_test(path):
                lists += [[test for test in sorted(self.tests) if test.startswith(place)] for place in RULES.get(rule, ())]
        # of each file the best, then of each the second
        chosen = [*dict.fromkeys(test for tests in zip_longest(*lists) for test in tests if test)]
        spine = [each for each in self.always if each.partition("::")[0] not in chosen]
        return [*chosen[:FIRST], *spine, *chosen[FIRST:]]

    def best_tests(self, path: str) -> list[str]:
        """For what changed of a file of the program."""
        shown = subprocess.run(["git", "show", f"{self.base}:{path}"], cwd=self.root, capture_output=True, text=True)
        before, after = pieces_of(shown.stdout), pieces_of(self.texts.get(path, ""))
        words: Counter = Counter()
        for name in {name for name in {*before, *after} if before.get(name) != after.get(name)}:
            old, new = before.get(name, []), after.get(name, [])
            words |= Counter(dict.fromkeys(words_of(" ".join([name.replace(".", " "), *old, *new])), 1))
            words |= Counter(dict.fromkeys(words_of(f"{name} {' '.join({*old} ^ {*new})}"), 3))
        if not words:
            return []
        near, room = self.nearness(path), self.room_of(path)
        stems = {stem_of(file): worth for file, worth in near.items() if not is_test(file)}
        said = {test: sum(weight * self.rarity[word] * min(has[word], OFTEN) for word, weight in words.items() if word in has)
                for test, has in self.tests.items()}
        most = max(said.values()) or 1

        def worth(test: str) -> float:
            name = Path(test).stem.removeprefix("test_")
            named = max((each for stem, each in stems.items() if name.startswith(stem)), default=0.0)
            return (OWN_NAME if name.startswith(stem_of(path)) else named) + near.get(test, 0.0) + OWN_ROOM * (str(Path(test).parent) == room) + SAID * said[test] / most
        return sorted(self.tests, key=lambda test: -worth(test))[:PLACES]

    def room_of(self, path: str) -> str:
        """The nearest folder of tests with the name of a file's room."""
        place = Path("tests", *Path(path).parent.parts[1:])
        while not (self.root / place).is_dir():
            place = place.parent
        return str(place)


if __name__ == "__main__":
    print("\n".join(Change(*sys.argv[1:2]).choose()))

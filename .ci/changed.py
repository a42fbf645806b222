"""Which tests a change needs, first those that fail soonest: python .ci/changed.py [BASE]

BASE is a commit; without it, what is not in the branch that this one follows (or the last commit, if it follows none). What is not committed yet counts.
Prints the arguments of pytest, a line each; `.ci/run changed` runs them. Chosen are

    for each function that changed                  up to CALLERS modules that call it, by the record (.ci/executed): some that have the words of
                                                    what changed in it, then its own name and texts, then those that have its file's name or
                                                    import it, those of its room, and those that call little else and are short (.ci/cover.py)
    for each that a changed line calls              up to CALLED modules that call that one too
    for each that mentions a changed name           one such module, within MENTION_SECONDS; a name is a constant, a table, a field of a class, or a class
    what calls anything of its file                 for a function that nobody has recorded, unless it is new; of its room, if nothing does
    tests that are new or changed, or import what changed in tests/support
    what RULES says of all other files; for tests/conftest.py modules that call most of the program, within BROAD_SECONDS
    the spine (.ci/spine)                           always

Tests of functions come first, then those with processes, then the page's; of each kind the shortest first.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from cover import CALLED, CALLERS, MENTION_SECONDS, WITH_WORDS, Cover, Function, room_of_tests       # noqa: E402
from executed import ROOT, read_record, spine      # noqa: E402

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
    "docs/": [], "README.md": [], "CONTRIBUTING.md": [], "SECURITY.md": ["tests/test_security_md.py"],
    "Containerfile": ["tests/test_container.py"], ".importlinter": ["tests/test_walls.py"],
    "LICENSE": [], "MANIFEST.in": ["tests/core/test_build.py"], ".gitignore": [],
    ".ci/": ["tests/test_night.py"],
    "tests/core/": ["tests/core"],
    "tests/fixtures/": ["tests/worker/weights", "tests/export", "tests/common"],
    "bench/": ["bench"], "bench/RESULTS.md": ["bench/test_bench_tables.py"], "bench/history/": [],
}
PROGRAM = ("chatlm/", "chat_server.py")
WORD = 7        # characters of a name or a text that tells a function from others
CHANGED_WORDS = 4.0     # how much the words of changed lines say, to those of the whole function
FEW = 3         # functions of one name, at most, for that to say which one a changed line calls


@dataclass
class Pieces:
    """A module's functions and names: each with what it is, as nodes or words. A name is what a statement of the module binds ("" for nothing).
    A class's name has its bases, and what its body does without a name; "Class.field" is a name too, and its methods are functions."""

    functions: dict[str, list[ast.AST | str]] = field(default_factory=dict)
    names: dict[str, list[ast.AST | str]] = field(default_factory=dict)
    mentioned: dict[str, set[str]] = field(default_factory=dict)        # by a function or a name -> identifiers
    imported: set[str] = field(default_factory=set)                     # dotted names: modules, and what is taken from them
    bases: dict[str, set[str]] = field(default_factory=dict)            # of each class: last words

    def add(self, name: str, nodes: list[ast.AST], functions: bool) -> None:
        (self.functions if functions else self.names).setdefault(name, []).extend(nodes)
        for node in (inner for each in nodes for inner in ast.walk(each)):
            if isinstance(node, ast.Name):
                self.mentioned.setdefault(name, set()).add(node.id)
            elif isinstance(node, ast.Attribute):
                self.mentioned.setdefault(name, set()).add(node.attr)

    def read(self, body: list[ast.stmt], outer: str = "") -> "Pieces":
        for node in body:
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    self.add(outer + node.name, [node], functions=True)
                case ast.ClassDef():
                    self.add(outer + node.name, [*node.bases, *node.keywords, *node.decorator_list], functions=False)
                    self.bases[outer + node.name] = {base.attr if isinstance(base, ast.Attribute) else base.id
                                                     for base in node.bases if isinstance(base, ast.Attribute | ast.Name)}
                    self.read(node.body, f"{outer}{node.name}.")
                case ast.Import() | ast.ImportFrom() if not outer:
                    self.read_import(node)
                case ast.Expr(value=ast.Constant()):
                    self.add(f"{outer}__doc__", [node], functions=False)
                case _:
                    for name in bound_names(node) or [""]:
                        self.add(f"{outer}{name}".removesuffix("."), [node], functions=False)
        return self

    def read_import(self, node: ast.Import | ast.ImportFrom) -> None:
        """What a name is bound to; another name from the same module changes nothing."""
        module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names:
            name = alias.asname or alias.name.partition(".")[0]
            self.names.setdefault(name, []).append(module + alias.name)


def bound_names(node: ast.AST) -> list[str]:
    return [inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)]


def differing(before: dict[str, list[ast.AST | str]], after: dict[str, list[ast.AST | str]]) -> set[str]:
    """The pieces of which one is more, or other, than before."""
    return {name for name in {*before, *after} if list(map(dump, before.get(name, []))) != list(map(dump, after.get(name, [])))}


def dump(node: ast.AST | str) -> str:
    """What a piece is, without where it stands, its comments and its docstring."""
    if isinstance(node, str):
        return node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is not None:
        node.body = node.body[1:]
    return ast.dump(node)


class Lines(NamedTuple):
    """What changed in a function: its simple statements, and the conditions and heads of others with all that they guard."""

    changed: list[ast.AST]

    @classmethod
    def between(cls, before: list[ast.AST | str], after: list[ast.AST | str]) -> "Lines":
        old, new = ([(ast.dump(head), whole) for head, whole in heads(nodes)] for nodes in (before, after))
        return cls([whole for own, others in ((old, dict(new)), (new, dict(old))) for head, whole in own if head not in others])

    def names(self) -> set[str]:
        """Of what they mention."""
        nodes = [inner for node in self.changed for inner in ast.walk(node)]
        return {node.id for node in nodes if isinstance(node, ast.Name)} | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def heads(nodes: list[ast.AST | str]) -> list[tuple[ast.AST, ast.AST]]:
    """The statements of a function: what each does itself, without those in it, and the whole."""
    found = []
    for node in (inner for each in nodes if isinstance(each, ast.AST) for inner in ast.walk(each)):
        if not isinstance(node, ast.stmt | ast.match_case) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        own = {name: value for name, value in ast.iter_fields(node) if name not in ("body", "orelse", "finalbody", "handlers", "cases")}
        found.append((type(node)(**own), node))
    return found


def texts_of(nodes: Iterable[ast.AST | str]) -> set[str]:
    return {inner.value.strip(" ;:,.()'\"\n") for node in nodes if isinstance(node, ast.AST) for inner in ast.walk(node)
            if isinstance(inner, ast.Constant) and isinstance(inner.value, str)}


def words_of(name: str, before: list[ast.AST | str], after: list[ast.AST | str], lines: Lines) -> dict[str, float]:
    """What a test has that is about a function, and how much that says: what its changed lines mention, its name and its texts, if they are not
    too short to say anything."""
    words = dict.fromkeys({name.rpartition(".")[2], *texts_of([*before, *after])}, 1.0)
    words |= dict.fromkeys({*lines.names(), *texts_of(lines.changed)}, CHANGED_WORDS)
    return {word.strip("_"): weight for word, weight in words.items() if len(word.strip("_")) >= WORD and not word.startswith("__")}


def pieces_of(text: str) -> Pieces:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return Pieces()
    pieces = Pieces()
    for node in ast.walk(tree):                                         # functions import too
        if isinstance(node, ast.Import):
            pieces.imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            pieces.imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    return pieces.read(tree.body)


class Change:
    """What differs between BASE and the working tree, and the tests that see it."""

    def __init__(self, base: str | None = None, root: Path = ROOT) -> None:
        self.root = root
        self.files = self.changed_files(base or self.default_base())
        self.record = read_record(root)
        self.cover = Cover(root, self.record)
        self.changed: set[Function] = set()
        self.mention: set[Function] = set()         # a changed name
        self.called: set[Function] = set()          # by changed lines
        self.chosen: set[str] = set()

    def git(self, *words: str) -> str:
        return subprocess.run(["git", *words], cwd=self.root, check=True, capture_output=True, text=True).stdout

    def default_base(self) -> str:
        words = ["git", "merge-base", "HEAD", "@{upstream}"]
        base = subprocess.run(words, cwd=self.root, capture_output=True, text=True).stdout.strip()
        nothing_new = base == self.git("rev-parse", "HEAD").strip() and not self.git("status", "--porcelain")
        return base if base and not nothing_new else "HEAD~1"

    def changed_files(self, base: str) -> dict[str, str]:
        """path -> its text at BASE, "" where it is new or no Python; files that nobody added are new too."""
        words = self.git("diff", "--name-status", "--no-renames", "-z", base).split("\0")
        files = {path: self.git("show", f"{base}:{path}") if status != "A" and path.endswith(".py") else ""
                 for status, path in zip(words[::2], words[1::2])}
        return files | {path: "" for path in self.git("ls-files", "--others", "--exclude-standard", "-z").split("\0") if path}

    def python_files(self, *places: str) -> dict[str, Path]:
        paths = self.git("ls-files", "--cached", "--others", "--exclude-standard", *places).splitlines()
        return {path: self.root / path for path in paths if path.endswith(".py") and (self.root / path).exists()}

    @cached_property
    def program(self) -> dict[str, Pieces]:
        return {path: pieces_of(file.read_text()) for path, file in self.python_files(*PROGRAM).items()}

    def choose(self) -> list[str]:
        for path, before in sorted(self.files.items()):
            if path.startswith(PROGRAM) and path.endswith(".py"):
                self.choose_for_program(path, pieces_of(before))
            elif path.startswith("tests/") and path.endswith(".py"):
                self.choose_for_tests(path)
            if not path.startswith((*PROGRAM, "tests/", ".ci/executed/")) or path.startswith(tuple(rule for rule in RULES if rule.startswith(PROGRAM))):
                self.choose_by_rule(path)
            elif path.startswith(("tests/core/", "tests/fixtures/")) and not is_test(path):
                self.choose_by_rule(path)
        self.chosen |= set(self.cover.choose(dict.fromkeys(self.changed, WITH_WORDS), (), worth=self.cover.worth_by_words))
        self.chosen |= set(self.cover.choose(dict.fromkeys(self.called, CALLED), self.chosen))
        self.chosen |= set(self.cover.choose(dict.fromkeys(self.changed, CALLERS), self.chosen))
        self.chosen |= set(self.cover.choose(dict.fromkeys(self.mention, 1), self.chosen, MENTION_SECONDS))
        return self.in_order()

    def choose_by_rule(self, path: str) -> None:
        rule = max((start for start in RULES if path.startswith(start)), key=len, default=None)
        self.add(RULES[rule] if rule is not None else ["tests"])

    def add(self, places: list[str]) -> None:
        for place in places:
            self.chosen |= {str(file.relative_to(self.root)) for file in (self.root / place).rglob("test_*.py")} or {place}

    def choose_for_program(self, path: str, before: Pieces) -> None:
        after = self.program.get(path, Pieces())
        functions, names = differing(before.functions, after.functions), differing(before.names, after.names)
        names |= {name.rpartition(".")[0] for name in functions if self.overrides(name, before, after)}
        changed = {(path, name) for name in functions}
        users = self.users(path, names)
        if "" in names:                                                 # a statement that binds nothing: whoever runs anything of this file
            users |= {(path, name) for name in after.functions}
        self.changed |= changed
        self.mention |= users
        for name in functions:
            nodes = before.functions.get(name, []), after.functions.get(name, [])
            lines = Lines.between(*nodes) if all(nodes) else Lines([])
            self.cover.words[path, name] = words_of(name, *nodes, lines)
            self.called |= self.called_by(lines, path) - {(path, name)}
        new = {(path, name) for name in functions - set(before.functions)}
        if not self.cover.callers.keys() & (changed | users) and (changed | users) - new:
            neighbours = {function for function in self.cover.callers if function[0] == path}
            self.changed |= neighbours
            if not neighbours:
                self.add([room_of_tests(self.root, path)])

    def called_by(self, lines: Lines, path: str) -> set[Function]:
        """The functions of a file, and of those that it imports from, that changed lines of it call, where their names say which."""
        named: dict[str, set[Function]] = {word: set() for word in lines.names()}
        imported = self.program[path].imported if path in self.program else set()
        for function in self.cover.callers:
            word = function[1].rpartition(".")[2]
            if word in named:
                module = module_of(function[0])
                if function[0] == path or any(name == module or name.startswith(f"{module}.") for name in imported):
                    named[word].add(function)
        return {function for functions in named.values() if len(functions) <= FEW for function in functions}

    def overrides(self, method: str, before: Pieces, after: Pieces) -> bool:
        """Whether it is new, or gone, and one of its class's bases has it: then who calls it never did, or does no more."""
        owner, _, name = method.rpartition(".")
        bases = after.bases.get(owner, set()) | before.bases.get(owner, set())
        return (method in before.functions) != (method in after.functions) and any(
            f"{base}.{name}" in pieces.functions for base in bases for pieces in self.program.values())

    def users(self, path: str, names: set[str]) -> set[Function]:
        """The functions that mention one of these names of the file, or a name that does. Who has an object need not import its class, so any
        function that mentions a field's word counts; of a field that none mentions, those that mention the class."""
        found: set[Function] = set()
        todo = [(path, name) for name in names if name]
        done = set(todo)
        while todo:
            home, name = todo.pop()
            pieces = self.that_mention(home, name)
            for user, piece in pieces:
                if piece in self.program[user].functions:
                    found.add((user, piece))
                elif piece and (user, piece) not in done and user in self.files_that_see(home, name):
                    done.add((user, piece))
                    todo.append((user, piece))
            owner = name.rpartition(".")[0]
            if not pieces and owner and not name.endswith(".__doc__") and (home, owner) not in done:
                done.add((home, owner))
                todo.append((home, owner))
            found |= {(home, method) for method in self.program.get(home, Pieces()).functions if method.startswith(f"{name}.")}
        return found

    def that_mention(self, home: str, name: str) -> list[tuple[str, str]]:
        """The functions and names, each with its file, that mention a name of a file."""
        owner, _, word = name.rpartition(".")
        files = list(self.program) if owner and word != "__doc__" else self.files_that_see(home, name)
        return [(file, piece) for file in files for piece, mentioned in self.program[file].mentioned.items()
                if word in mentioned or owner in mentioned and file == home]

    def files_that_see(self, home: str, name: str) -> list[str]:
        """The file itself, and those that import the name, or the module to take it from."""
        module = module_of(home)
        wanted = {module, f"{module}.{name.partition('.')[0]}"}
        return [path for path, pieces in self.program.items() if path == home or pieces.imported & wanted]

    def choose_for_tests(self, path: str) -> None:
        if is_test(path):
            self.chosen.add(path)
            return
        if path == "tests/conftest.py":
            self.add(self.cover.broad())
            return
        if path.endswith("conftest.py"):
            self.add([str(Path(path).parent)])
            return
        changed = {Path(path).stem}
        imports = {each: imported_by(file) for each, file in self.python_files("tests", "bench").items()}
        while True:
            more = {Path(each).stem for each, names in imports.items() if names & changed and not is_test(each)} - changed
            if not more:
                break
            changed |= more
        self.chosen |= {each for each, names in imports.items() if is_test(each) and names & changed}

    def in_order(self) -> list[str]:
        chosen = {module for module in self.chosen if (self.root / module).is_file()}
        always = [each for each in spine(self.root) if each.partition("::")[0] not in chosen]

        def rank(place: str) -> tuple[int, float]:
            executed = self.record.get(place.partition("::")[0])
            return 2 if place.startswith("tests/page") else 1 if executed and executed.processes else 0, executed.seconds if executed else 0.0
        return sorted([*always, *chosen], key=rank)


def module_of(path: str) -> str:
    """The dotted name of a file of the program."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def is_test(path: str) -> bool:
    return Path(path).name.startswith("test_") and path.endswith(".py")


def imported_by(file: Path) -> set[str]:
    """The first words of the modules that a file imports, anywhere in it."""
    return set(re.findall(r"^\s*(?:from|import) (\w+)", file.read_text(), re.MULTILINE))


if __name__ == "__main__":
    print("\n".join(Change(*sys.argv[1:2]).choose()))

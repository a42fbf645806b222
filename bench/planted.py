"""Plants faults in the program, one each, and says which tests notice them: those of `.ci/run changed`, those of `pytest --quick`, or only the whole day.

    python bench/planted.py --faults 50 --seed 1 --out planted.jsonl [--by changed quick day]       goes on with what FILE has
    python bench/planted.py --faults 50 --seed 1 --list                                             shows the faults
    python bench/planted.py --out planted.jsonl --report                                            the table

A fault is one changed operator, constant, condition, or order of two statements, or a call that is missing, in a function of chatlm. Functions are drawn by their
length, so that all rooms have their share; what only words a message or a log line is not touched, nor what compiles to the same code. All of it
follows from the seed: fault number 7 of seed 1 is the same one as long as the program is.

    changed     what .ci/changed.py chooses, with -x and as long as `.ci/run changed` gives it, in a copy of the commit
    quick       if the test that noticed it for `changed` is one of --quick, the same; else --quick with the modules that .ci/changed.py chooses; what these
                miss is planted TOGETHER at a time for a run of all of --quick
    day         what both others miss is planted TOGETHER at a time for a run of all tests; the day notices whatever they notice

What fails with several faults is run again with one after the other, so a fault that hides others, by breaking all that they would, may cost these their verdict.
A test that fails counts if it fails again alone, and passes without the fault. Verdicts are appended to FILE as they come. Its columns: where, what, and for each
way "noticed" or "missed", the seconds that it took, and the first test that failed.
"""

import argparse
import ast
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

WAYS = "changed", "quick", "day"
CHANGED_S = 300         # of .ci/run changed
DAY_S = 5000
TOGETHER = 10
OPERATORS = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="),
             ast.Is: (" is ", " is not "), ast.IsNot: (" is not ", " is "), ast.In: (" in ", " not in "), ast.NotIn: (" not in ", " in "),
             ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.FloorDiv: ("//", "*"), ast.And: (" and ", " or "), ast.Or: (" or ", " and ")}
WORDS_ONLY = "Error", "log", "logger", "print", "warn", "warning", "info", "debug"         # calls whose arguments are words for people
MOST_OTHERS = 6         # failures of a chosen test that have nothing to do with the fault
SIMPLE = ast.Assign, ast.AugAssign, ast.Expr


@dataclass(frozen=True)
class Fault:
    """A change of one place: the text between two offsets of a file (in bytes)."""

    path: str
    function: str
    line: int
    kind: str
    start: int
    end: int
    new: str

    def plant(self, root: Path) -> None:
        file = root / self.path
        text = file.read_bytes()
        file.write_bytes(text[:self.start] + self.new.encode() + text[self.end:])


class Places:
    """The faults that a file's functions can have."""

    def __init__(self, path: str, text: str) -> None:
        self.path, self.bytes = path, text.encode()
        self.lines = [0]
        for line in text.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line.encode()))
        self.found: dict[str, list[Fault]] = defaultdict(list)
        self.read(ast.parse(text).body, "")

    def at(self, line: int, column: int) -> int:
        return self.lines[line - 1] + column

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def text(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.bytes[start:end].decode()

    def read(self, body: list[ast.stmt], outer: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                self.read(node.body, f"{outer}{node.name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self.function = outer + node.name
                for statement in node.body[ast.get_docstring(node) is not None:]:
                    self.visit(statement)
                self.orders(node.body[ast.get_docstring(node) is not None:])

    def add(self, node: ast.AST, kind: str, start: int, end: int, new: str) -> None:
        self.found[self.function].append(Fault(self.path, self.function, node.lineno, kind, start, end, new))

    def visit(self, node: ast.AST) -> None:
        match node:
            case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
                return
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if any(word in name for word in WORDS_ONLY):
                return
            case ast.Compare(left=left, ops=[operator], comparators=[right]):
                self.operator(node, operator, left, right)
            case ast.BinOp(left=left, op=operator, right=right):
                self.operator(node, operator, left, right)
            case ast.BoolOp(op=operator, values=[left, right, *_]):
                self.operator(node, operator, left, right)
            case ast.Constant(value=bool() as value):
                self.add(node, "constant", *self.span(node), str(not value))
            case ast.Constant(value=int() as value):
                self.add(node, "constant", *self.span(node), str(value + 1))
            case ast.Expr(value=ast.Call() | ast.Await(value=ast.Call())) if not self.is_for_people(node.value):
                self.add(node, "missing call", *self.span(node), "pass")
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            self.add(node, "condition", *self.span(node.test), f"(not ({self.text(node.test)}))")
        for _, value in ast.iter_fields(node):
            inner = value if isinstance(value, list) else [value]
            if len(inner) > 1 and isinstance(inner[0], ast.stmt):
                self.orders(inner)
            for each in inner:
                if isinstance(each, ast.AST) and not (isinstance(node, ast.arguments | ast.arg) or (isinstance(node, ast.AnnAssign) and each is node.annotation)):
                    self.visit(each)

    def is_for_people(self, call: ast.expr) -> bool:
        call = call.value if isinstance(call, ast.Await) else call
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        return any(word in name for word in WORDS_ONLY)

    def operator(self, node: ast.AST, operator: ast.AST, left: ast.AST, right: ast.AST) -> None:
        old, new = OPERATORS.get(type(operator), ("", ""))
        start, end = self.span(left)[1], self.span(right)[0]
        between = self.bytes[start:end].decode()
        if old and between.count(old) == 1:
            self.add(node, "operator", start, end, between.replace(old, new))

    def orders(self, body: list[ast.stmt]) -> None:
        for first, second in zip(body, body[1:]):
            if isinstance(first, SIMPLE) and isinstance(second, SIMPLE) and (written(first) & read(second) or written(second) & read(first)):
                start, end = self.span(first)[0], self.span(second)[1]
                between = self.bytes[self.span(first)[1]:self.span(second)[0]].decode()
                self.add(first, "order", start, end, self.text(second) + between + self.text(first))


def written(node: ast.Assign | ast.AugAssign | ast.Expr) -> set[str]:
    """What a statement gives a value, and what it calls a method of."""
    if isinstance(node, ast.Expr):
        call = node.value.value if isinstance(node.value, ast.Await) else node.value
        return {ast.unparse(call.func.value)} if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) else set()
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {ast.unparse(each) for target in targets for each in (target.elts if isinstance(target, ast.Tuple) else [target])}


def read(node: ast.stmt) -> set[str]:
    return {ast.unparse(each) for each in ast.walk(node) if isinstance(each, ast.Name | ast.Attribute) and isinstance(each.ctx, ast.Load)}


def draw_faults(root: Path, count: int, seed: int) -> list[Fault]:
    """As many different faults, in different functions."""
    functions: dict[tuple[str, str], list[Fault]] = {}
    sizes, texts = [], {}
    for file in sorted((root / "chatlm").rglob("*.py")):
        path = str(file.relative_to(root))
        texts[path] = file.read_text()
        for function, faults in Places(path, texts[path]).found.items():
            functions[path, function] = faults
            sizes.append(1 + max(fault.line for fault in faults) - min(fault.line for fault in faults))
    random_numbers, faults = random.Random(seed), []
    keys = list(functions)
    taken = set()
    while len(faults) < min(count, len(keys)):
        key = random_numbers.choices(keys, sizes)[0]
        fault = random_numbers.choice(functions[key])
        if key not in taken and changes_code(texts[fault.path], fault):
            taken.add(key)
            faults.append(fault)
    return faults


def changes_code(text: str, fault: Fault) -> bool:
    """Whether what Python runs is another one, and can be compiled."""
    before = text.encode()
    after = before[:fault.start] + fault.new.encode() + before[fault.end:]
    try:
        return ast.dump(ast.parse(before)) != ast.dump(ast.parse(after)) and bool(compile(after, "x", "exec", dont_inherit=True))
    except SyntaxError:
        return False


class Bed:
    """Copies of a commit: in one faults are planted, the other has none."""

    def __init__(self, folder: Path, commit: str, jobs: int) -> None:
        self.jobs = jobs
        self.planted, self.clean = folder / "planted", folder / "clean"
        for copy in (self.planted, self.clean):
            subprocess.run(["git", "clone", "-q", "--shared", str(ROOT), str(copy)], check=True)
            subprocess.run(["git", "checkout", "-q", commit], cwd=copy, check=True)
            (copy / ".venv").symlink_to(ROOT / ".venv")

    @cached_property
    def quick(self) -> set[str]:
        """The tests of `pytest --quick`."""
        words = [self.clean / ".venv/bin/python", "-m", "pytest", "--quick", "--collect-only", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run([str(word) for word in words], cwd=self.clean, check=True, capture_output=True, text=True, timeout=300)
        return {line for line in done.stdout.splitlines() if "::" in line}

    def plant(self, faults: list[Fault]) -> None:
        """These, and no others."""
        subprocess.run(["git", "checkout", "-q", "--", "."], cwd=self.planted, check=True)
        for fault in sorted(faults, key=lambda fault: (fault.path, -fault.start)):
            fault.plant(self.planted)

    def noticed(self, fault: Fault, places: list[str], limit_s: float, *words: str) -> tuple[str, float]:
        """(the first test that fails twice with this fault and passes without, or "", seconds). words: for pytest."""
        self.plant([fault])
        without: list[str] = []             # what failed on a busy machine: -x must not end with it
        seconds = 0.0
        while len(without) < MOST_OTHERS:
            began = time.monotonic()
            failed = self.run(self.planted, places, limit_s - seconds, *words, "-x", *(f"--deselect={test}" for test in without))
            seconds += time.monotonic() - began
            counting = (test for test in failed if self.run(self.planted, [test]) and not self.run(self.clean, [test]))
            if found := next(counting, ""):
                return found, seconds
            if not failed:
                break
            without += failed
        return "", seconds

    def run(self, copy: Path, places: list[str], limit_s: float = CHANGED_S, *words: str) -> list[str]:
        """The names of the tests that failed; of the module where it could not be collected. Without places all run; what is cut off has not failed."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        several = ["-n", str(self.jobs), "--dist", "loadfile"] if len(places) != 1 else []
        command = ["timeout", "--signal=INT", "--kill-after=30", max(1, round(limit_s)), copy / ".venv/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider",
                   "--no-summary", "--timeout=170", *several, *words, *places]
        done = subprocess.run([str(word) for word in command], cwd=copy, env=environment, capture_output=True, text=True)
        # conftest.py shows a failure as it comes
        failed = re.findall(r"^(\S+?\.py(?:::.*)?) failed in (?:setup|call|teardown):$", done.stdout, re.MULTILINE)
        failed += re.findall(r"^ERROR collecting (\S+)", re.sub(r"^_+ ", "", done.stdout, flags=re.MULTILINE), re.MULTILINE)
        was_cut = done.returncode in (124, 137) and len(places) != 1        # a single test that does not end has noticed something
        return failed or (places[:1] if done.returncode not in (0, 5) and not was_cut else [])

    def chosen(self, fault: Fault) -> list[str]:
        self.plant([fault])
        words = [sys.executable, ".ci/changed.py", "HEAD"]
        return subprocess.run(words, cwd=self.planted, check=True, capture_output=True, text=True).stdout.splitlines()


class Verdicts:
    """What is known of each fault, in a file that is only appended to."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[tuple[str, int, str], dict] = {}
        for line in file.read_text().splitlines() if file.exists() else []:
            self.keep(json.loads(line))

    def keep(self, row: dict) -> None:
        self.known[row["fault"], row["seed"], row["way"]] = row

    def add(self, fault: Fault, number: int, seed: int, way: str, failed: str, seconds: float) -> None:
        row = {"fault": f"{number}", "seed": seed, "way": way, "where": f"{fault.path}:{fault.line} {fault.function}", "what": fault.kind,
               "verdict": "noticed" if failed else "missed", "seconds": round(seconds), "test": failed}
        self.keep(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{number:4} {way:8} {row['verdict']:8} {row['seconds']:5} s  {fault.kind:12} {row['where']}  {failed}", flush=True)

    def of(self, number: int, seed: int, way: str) -> dict | None:
        return self.known.get((f"{number}", seed, way))


def plant_all(options: argparse.Namespace) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    verdicts, seed = Verdicts(options.out), options.seed
    with tempfile.TemporaryDirectory(prefix="planted") as folder:
        bed = Bed(Path(folder), commit, options.jobs)
        faults = dict(enumerate(draw_faults(bed.clean, options.faults, seed)))
        for number, fault in faults.items() if "changed" in options.by else ():
            if not verdicts.of(number, seed, "changed"):
                verdicts.add(fault, number, seed, "changed", *bed.noticed(fault, bed.chosen(fault), CHANGED_S))
        for number, fault in faults.items() if "quick" in options.by else ():
            earlier = verdicts.of(number, seed, "changed")
            if verdicts.of(number, seed, "quick"):
                continue
            found = (earlier["test"], 0.0) if earlier and earlier["test"] in bed.quick else bed.noticed(fault, bed.chosen(fault), DAY_S, "--quick")
            if found[0]:
                verdicts.add(fault, number, seed, "quick", *found)
        for way, words in ("quick", ["--quick"]), ("day", []):
            left = [number for number in faults if not any((verdicts.of(number, seed, each) or {}).get("test") for each in {way, "quick"})
                    and not verdicts.of(number, seed, way) and not (way == "day" and (verdicts.of(number, seed, "changed") or {}).get("test"))]
            for start in range(0, len(left) if way in options.by else 0, TOGETHER):
                run_together(bed, verdicts, seed, way, words, {number: faults[number] for number in left[start:start + TOGETHER]})


def run_together(bed: Bed, verdicts: Verdicts, seed: int, way: str, words: list[str], faults: dict[int, Fault]) -> None:
    """All tests of this way with all of these faults planted at once, then what failed with one fault after the other."""
    chosen = {number: bed.chosen(fault) for number, fault in faults.items()}
    bed.plant([*faults.values()])
    began = time.monotonic()
    modules: dict[str, list[str]] = defaultdict(list)
    for test in bed.run(bed.planted, [], DAY_S, *words):
        modules[test.partition("::")[0]].append(test)
    seconds = time.monotonic() - began
    for module, tests in modules.items():
        unexplained = {test for test in tests if not bed.run(bed.clean, [test])}
        left = [number for number in faults if not verdicts.of(number, seed, way)]
        for number in sorted(left, key=lambda number: module not in chosen[number]):
            if not unexplained:
                break
            bed.plant([faults[number]])
            if failed := bed.run(bed.planted, sorted(unexplained)):
                verdicts.add(faults[number], number, seed, way, failed[0], seconds)
                unexplained -= {*failed}
    for number, fault in faults.items():
        if not verdicts.of(number, seed, way):
            verdicts.add(fault, number, seed, way, "", seconds)


def report(verdicts: Verdicts) -> None:
    """A table: of each room and of all, how many faults each way noticed. The day notices what the others notice."""
    noticed: dict[str, Counter] = defaultdict(Counter)
    seen: set[tuple[str, int]] = set()
    for (number, seed, way), row in verdicts.known.items():
        for room in (row["where"].rpartition("/")[0], "all"):
            noticed[room][way] += way != "day" and row["verdict"] == "noticed"
            noticed[room][f"all {way}"] += 1
            noticed[room]["day"] += row["verdict"] == "noticed" and (number, seed) not in seen
        if row["verdict"] == "noticed":
            seen.add((number, seed))
    print("| room | " + " | ".join(WAYS) + " |\n|---|" + "---|" * len(WAYS))
    for room, counts in sorted(noticed.items(), key=lambda item: (item[0] == "all", item[0])):
        print(f"| {room} | {counts['changed']} of {counts['all changed']} | {counts['quick']} of {counts['all quick']} | {counts['day']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("planted.jsonl"))
    parser.add_argument("--by", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--jobs", type=int, default=2, help="processes of pytest")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if options.list:
        for number, fault in enumerate(draw_faults(ROOT, options.faults, options.seed)):
            old = (ROOT / fault.path).read_bytes()[fault.start:fault.end].decode()
            print(f"{number:4} {fault.kind:12} {fault.path}:{fault.line} {fault.function}: {old!r} -> {fault.new!r}")
    elif options.report:
        report(Verdicts(options.out))
    else:
        plant_all(options)


if __name__ == "__main__":
    main()

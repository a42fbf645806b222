"""The record of what tests execute: .ci/executed/tests/FOLDER/test_x.txt for tests/FOLDER/test_x.py. `.ci/run record` makes it.

Its first line says how many seconds the module's tests took, and whether they started processes. The second, which begins with `cases`, says how long a case
takes of those functions of tests where it is CASE_SECONDS or more. Each other line has a file of the program and the functions of it that they called,
in whatever process (tests/support/call_recorder.py).

    python .ci/executed.py FOLDER       from what the processes of a recorded run have left in FOLDER; only modules that ran get new files
"""

import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path(".ci/executed")           # in the repository
CASE_SECONDS = 0.02     # shorter cases have no time of their own in the record


@dataclass(frozen=True)
class Executed:
    """What the tests of a module execute. functions: (file, qualified name); seconds: of one process, setup included. cases: seconds of a case, without
    what several tests share, of the module's functions where that is CASE_SECONDS or more."""

    seconds: float
    processes: bool
    functions: frozenset[tuple[str, str]]
    cases: dict[str, float] = field(default_factory=dict)


def recorded(root: Path) -> dict[str, Path]:
    """module of tests -> its file of the record."""
    record = root / RECORD
    return {f"{file.relative_to(record).with_suffix('.py')}": file for file in sorted(record.rglob("*.txt"))}


def read_record(root: Path) -> dict[str, Executed]:
    """module of tests -> what it executes; without modules that are gone."""
    record = {}
    for module, file in recorded(root).items():
        if not (root / module).exists():
            continue
        first, *lines = file.read_text().splitlines()
        cases = cases_of(lines[0]) if lines else {}
        functions = frozenset((path, name) for path, *names in map(str.split, lines[1 if cases else 0:]) for name in names)
        record[module] = Executed(float(first.split()[0]), "processes" in first, functions, cases)
    return record


def cases_of(line: str) -> dict[str, float]:
    """function of tests -> seconds of a case, from a module's second line."""
    words = line.split()
    return dict(zip(words[1::2], map(float, words[2::2]))) if words[:1] == ["cases"] else {}


def read_run(folder: Path) -> dict[str, Executed]:
    """What the processes of a recorded run of pytest have left."""
    called, pids = defaultdict(set), defaultdict(set)
    for file in folder.glob("*.calls"):
        for line in file.read_text().splitlines():
            place, pid, path, name = line.split("\t")
            pids[place].add(pid)
            if path:
                called[place].add((path, name))
    run = {}
    for file in folder.glob("*.modules"):
        for line in file.read_text().splitlines():
            module, seconds, fixtures = line.split("\t")
            places = [module, *(f"fixture {name}" for name in fixtures.split())]
            processes = any(len(pids[place]) > 1 for place in places)
            run[module] = Executed(float(seconds), processes, frozenset().union(*(called[place] for place in places)))
    for file in folder.glob("*.cases"):
        for line in file.read_text().splitlines():
            module, function, seconds = line.split("\t")
            if float(seconds) >= CASE_SECONDS:
                run[module].cases[function] = float(seconds)
    return run


def recorded_seconds(root: Path) -> dict[str, float]:
    """module of tests -> how long its tests took."""
    return {module: float(file.open().readline().split()[0]) for module, file in recorded(root).items()}


def recorded_cases(root: Path) -> dict[str, float]:
    """module::function of tests -> seconds of a case; nothing of short ones, and of those that are not recorded yet."""
    seconds = {}
    for module, file in recorded(root).items():
        with file.open() as lines:
            next(lines)
            cases = cases_of(next(lines, ""))
        seconds |= {f"{module}::{function}": each for function, each in cases.items()}
    return seconds


def spine(root: Path) -> list[str]:
    """What runs whatever changed."""
    return [line for line in (root / ".ci/spine").read_text().splitlines() if line and not line.startswith("#")]


def write_record(run: dict[str, Executed], root: Path) -> None:
    """Write the files of these modules, and remove those of modules that are gone."""
    for module, executed in run.items():
        files = defaultdict(set)
        for path, name in executed.functions:
            files[path].add(name)
        lines = [f"{executed.seconds:.2g} seconds{', processes' if executed.processes else ''}"]
        if executed.cases:
            lines.append(" ".join(["cases", *(f"{name} {seconds:.2g}" for name, seconds in sorted(executed.cases.items()))]))
        lines += [" ".join([path, *sorted(names)]) for path, names in sorted(files.items())]
        file = (root / RECORD / module).with_suffix(".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n")
    for module, file in recorded(root).items():
        if not (root / module).exists():
            file.unlink()


def silent(run: dict[str, Executed], root: Path) -> list[str]:
    """The modules that import several files of the program and call nothing in any: what recorded them has ended too early."""
    found = []
    program = {str(file.relative_to(root)) for file in (root / "chatlm").rglob("*.py")}
    for module, executed in run.items():
        names = set(re.findall(r"^from (chatlm[\w.]*) import", (root / module).read_text(), re.MULTILINE))
        files = {f"{name.replace('.', '/')}.py" for name in names} & program
        if len(files) > 2 and not files & {path for path, _ in executed.functions}:
            found.append(module)
    return found


if __name__ == "__main__":
    run = read_run(Path(sys.argv[1]))
    write_record(run, ROOT)
    for module in silent(run, ROOT):
        print(f"{module} calls nothing of what it imports: is its record whole?")

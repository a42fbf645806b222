"""Tasks on disk: a bundle as nanochat's CORE has it, or one file of rows."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from chatlm.common.errors import ConfigError, named, require_library, shown
from chatlm.common.files import read_small
from chatlm.common.hub.find import nanochat_base

MULTIPLE_CHOICE = "multiple_choice"
SCHEMA = "schema"
LANGUAGE_MODELING = "language_modeling"
KINDS = MULTIPLE_CHOICE, SCHEMA, LANGUAGE_MODELING
# the names of files in a bundle
TASKS = "core.yaml"
BASELINES = "eval_meta_data.csv"
ROWS = "eval_data"
FETCHES = "python -m scripts.base_eval --eval core"  # what upstream fetches the bundle with


class Task(NamedTuple):
    """A task: rows of one kind, and how they become prompts."""

    label: str
    kind: str
    path: Path        # of its rows, one JSON object a line
    shots: int        # examples before each item
    delimiter: str    # between a question and its answer
    baseline: float   # the accuracy of chance, from 0 to 1

    def centered(self, accuracy: float) -> float:
        """0 for chance, 1 for all right."""
        return (accuracy - self.baseline) / (1.0 - self.baseline)


class Suite(NamedTuple):
    name: str
    tasks: tuple[Task, ...]
    digest: str       # of all its files
    mean: str = ""    # what the mean of its tasks' centered accuracies is called, if it has a meaning
    left_out: tuple[str, ...] = ()  # in words: tasks that are not run, and why


def core_folder() -> Path:
    """nanochat's own bundle. ConfigError if it is not on this machine."""
    folder = nanochat_base() / "eval_bundle"
    if not folder.is_dir():
        raise ConfigError(f"--suite core: there is no {folder}; in nanochat's checkout, `{FETCHES}` fetches "
                          "it, or --suite FOLDER names a bundle elsewhere")
    return folder


def read_suite(word: str, flag: str = "--suite") -> Suite:
    """What --suite names: core, a folder or a .jsonl file. ConfigError if it is not there or not usable."""
    path = core_folder() if word == "core" else Path(word).expanduser()
    if path.is_dir():
        return read_bundle(path, "core" if word == "core" else path.resolve().name)
    if path.suffix == ".jsonl":
        return read_rows_file(path)
    raise ConfigError(f"{flag} {word}: it must be core, chat,{' bpb, sample,' * (flag == '--suite')} a "
                      f"folder with a {TASKS}, or a .jsonl file of rows")


def read_bundle(folder: Path, name: str) -> Suite:
    listed = read_small(folder / TASKS)
    table = read_small(folder / BASELINES)
    digest = hashlib.sha256(listed + table)
    baselines = read_baselines(folder / BASELINES, table)
    tasks = []
    for number, entry in enumerate(read_tasks(folder / TASKS, listed), 1):
        task = read_task(folder, number, entry, baselines)
        digest.update(read_small(task.path))
        tasks.append(task)
    if len({task.label for task in tasks}) < len(tasks):
        raise ConfigError(f"{folder / TASKS}: two tasks have the same label")
    return Suite(name, tuple(tasks), digest.hexdigest(), "CORE")


def read_tasks(path: Path, data: bytes) -> list[Mapping]:
    yaml = require_library("yaml", f"reading {path.name}")
    try:
        entries = yaml.safe_load(data)["icl_tasks"]
    except (yaml.YAMLError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{path} is not a list of tasks below icl_tasks: {named(error)}") from None
    if not (isinstance(entries, list) and entries and all(isinstance(entry, Mapping) for entry in entries)):
        raise ConfigError(f"{path}: icl_tasks is not a list of tasks")
    return entries


def read_baselines(path: Path, data: bytes) -> dict[str, float]:
    """Label -> the accuracy of chance, from 0 to 1."""
    try:
        rows = [*csv.DictReader(io.StringIO(data.decode()))]
        return {row["Eval Task"]: 0.01 * float(row["Random baseline"]) for row in rows}
    except (UnicodeDecodeError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise ConfigError(f"{path} has no usable columns `Eval Task` and `Random baseline`: "
                          f"{named(error)}") from None


def read_task(folder: Path, number: int, entry: Mapping, baselines: Mapping[str, float]) -> Task:
    where = f"{folder / TASKS}: task {number}"
    label = entry.get("label")
    if not isinstance(label, str):
        raise ConfigError(f"{where} has no label")
    kind = entry.get("icl_task_type")
    shots = entry.get("num_fewshot")
    where = f"{folder / TASKS}: {shown(label)}"
    if kind not in KINDS:
        raise ConfigError(f"{where}: icl_task_type is {shown(kind)}; known are {', '.join(KINDS)}")
    if not (isinstance(shots, list) and shots and type(shots[0]) is int and shots[0] >= 0):
        raise ConfigError(f"{where}: num_fewshot is {shown(shots)}; it must be a list whose first number "
                          "counts")
    uri = entry.get("dataset_uri")
    delimiter = entry.get("continuation_delimiter", " ")
    if not isinstance(uri, str) or not isinstance(delimiter, str):
        raise ConfigError(f"{where}: dataset_uri and continuation_delimiter must be texts")
    path = folder / ROWS / uri
    if not path.resolve().is_relative_to((folder / ROWS).resolve()):
        raise ConfigError(f"{where}: dataset_uri {shown(uri)} leads out of {ROWS}")
    if label not in baselines:
        raise ConfigError(f"{folder / BASELINES} has no row of the task {shown(label)}")
    if not 0 <= baselines[label] < 1:
        raise ConfigError(f"{folder / BASELINES}: the baseline of {shown(label)} must be from 0 to below 100 "
                          "percent")
    return Task(label, kind, path, shots[0], delimiter, baselines[label])


def read_rows_file(path: Path) -> Suite:
    """One file of rows as a task without examples; its first row says of which kind they are."""
    data = read_small(path)
    try:
        first = json.loads(data.split(b"\n", 1)[0])
    except (ValueError, RecursionError):
        first = None
    kind = next((kind for kind, row in FIELDS.items()
                 if isinstance(first, dict) and row.keys() <= first.keys()), None)
    if kind is None:
        known = "; ".join(f"{', '.join(row)} ({kind})" for kind, row in FIELDS.items())
        raise ConfigError(f"{path}: its first line is not a row with the fields of a kind: {known}")
    task = Task(path.stem, kind, path, 0, " ", 0.0)
    counts = {len(row[OPTIONS[kind]]) for row in read_rows(task)} if kind in OPTIONS else set()
    baseline = 1 / counts.pop() if len(counts) == 1 and counts != {1} else 0.0
    return Suite(path.name, (task._replace(baseline=baseline),), hashlib.sha256(data).hexdigest())


def is_text(value) -> bool:
    """What a template writes as it is."""
    return type(value) in (str, int, float)


def is_options(value) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_text, value))


def is_index(value) -> bool:
    return type(value) is int


FIELDS: dict[str, dict[str, Callable[[object], bool]]] = {  # of each kind of row
    MULTIPLE_CHOICE: {"query": is_text, "choices": is_options, "gold": is_index},
    SCHEMA: {"context_options": is_options, "continuation": is_text, "gold": is_index},
    LANGUAGE_MODELING: {"context": is_text, "continuation": is_text}}
OPTIONS = {MULTIPLE_CHOICE: "choices", SCHEMA: "context_options"}  # the field of a kind that lists them


def read_rows(task: Task) -> list[dict]:
    """The rows of a task in the order of its file. ConfigError names the first broken one."""
    lines = read_small(task.path).split(b"\n")
    if lines and not lines[-1].strip():
        lines.pop()
    return [read_row(task, number, line) for number, line in enumerate(lines, 1)]


def read_row(task: Task, number: int, line: bytes) -> dict:
    where = f"{task.path}: line {number}"
    row = None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {named(error)}") from None
    wrong = [name for name, fits in FIELDS[task.kind].items()
             if not (isinstance(row, dict) and fits(row.get(name)))]
    if wrong:
        raise ConfigError(f"{where} is not a row of {task.kind}: {wrong[0]} is missing or not usable")
    if task.kind in OPTIONS and not 0 <= row["gold"] < (count := len(row[OPTIONS[task.kind]])):
        raise ConfigError(f"{where}: gold is {row['gold']}, but there are {count} options")
    return row


def drawn_rows(task: Task, most: int | None) -> list[dict]:
    """A task's rows as upstream draws them: shuffled, then cut to `most`. ConfigError if too few are left to
    draw the examples of an item from."""
    rows = read_rows(task)
    random.Random(1337).shuffle(rows)
    rows = rows[:most]
    if not rows:
        raise ConfigError(f"{task.path} has no rows")
    if task.shots > len(rows) - 1:
        raise ConfigError(f"{task.label} needs {task.shots} examples before each item, but only "
                          f"{len(rows) - 1} other items are left{' by --max-per-task' if most else ''}")
    return rows

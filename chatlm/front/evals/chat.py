"""nanochat's tasks for chat models: which letter is likeliest, and answers that are read for a number or run.

As upstream's chat_eval.py and tasks/ at 92d63d4."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ConfigError, shown
from chatlm.common.files import read_small
from chatlm.front.evals.bundle import Suite, Task
from chatlm.front.evals.data import data_files, read_table
from chatlm.front.evals.items import BadItem
from chatlm.front.evals.permuted import permutation

if TYPE_CHECKING:
    from pathlib import Path
    from chatlm.front.evals.scores import Scorer

LETTERS = "letters"
NUMBER = "number"
PROGRAM = "program"
PUBLISHED = "published program"  # of the suite in published.py
CHAT_KINDS = LETTERS, NUMBER, PROGRAM, PUBLISHED
FETCHES = "python -m scripts.chat_eval -i sft -a"  # and the task: what upstream fetches its data with
ANSWER_TOKENS = 512
SEED = 42                 # of the order of the rows
NUMBER_MARK = re.compile(r"#### (-?[0-9.,]+)")
FENCED = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)
Runs = Callable[[str], Awaitable[bool]]  # runs a program; does it come to its end without an error?
# Verdicts about programs that were kept before they had to come to their end are not these
RULE = b"a program is right if its tests ran to their end"


class RowSource(NamedTuple):
    """Where the rows of a task come from."""

    label: str
    kind: str
    baseline: float
    data_set: str
    subset: str
    columns: tuple[str, ...]

    @property
    def files(self) -> list[Path]:
        return data_files(self.data_set, self.subset, "test")


SOURCES = {source.label: source for source in (
    RowSource("ARC-Easy", LETTERS, 0.25, "allenai/ai2_arc", "ARC-Easy", ("question", "choices", "answerKey")),
    RowSource("ARC-Challenge", LETTERS, 0.25, "allenai/ai2_arc", "ARC-Challenge",
           ("question", "choices", "answerKey")),
    RowSource("MMLU", LETTERS, 0.25, "cais/mmlu", "all", ("question", "choices", "answer")),
    RowSource("GSM8K", NUMBER, 0.0, "openai/gsm8k", "main", ("question", "answer")),
    RowSource("HumanEval", PROGRAM, 0.0, "openai/openai_humaneval", "openai_humaneval",
           ("prompt", "test", "entry_point")))}


class Problem(NamedTuple):
    """An item: what is asked, and what the answer is judged by."""

    text: str
    right: str                     # the letter, the number, or what follows the program
    letters: tuple[str, ...] = ()
    prompt: str = ""               # the beginning of the program, where that is not the text


def chat_suite(runs_code: bool) -> Suite:
    """The tasks whose data are here; ChatCORE needs all. ConfigError if none are."""
    tasks = []
    left_out = []
    digest = hashlib.sha256()
    for source in SOURCES.values():
        if source.kind == PROGRAM and not runs_code:
            left_out.append(f"{source.label}: it runs programs that the model writes, only with "
                            "--confirm-run-unsafe-code")
        elif files := source.files:
            for path in files:
                digest.update(read_small(path))
            if source.kind == PROGRAM:
                digest.update(RULE)
            tasks.append(Task(source.label, source.kind, files[0].parent, 0, "", source.baseline))
        else:
            left_out.append(f"{source.label}: its data are not on this machine; in nanochat's checkout, "
                            f"`{FETCHES} {source.label}` fetches them")
    if not tasks:
        raise ConfigError(f"--suite chat: no data are on this machine; in nanochat's checkout, `{FETCHES} "
                          f"'{'|'.join(SOURCES)}'` fetches them")
    return Suite("chat", tuple(tasks), digest.hexdigest(), "" if left_out else "ChatCORE", tuple(left_out))


def drawn_problems(task: Task, most: int | None) -> list[Problem]:
    """A task's items in upstream's order. ConfigError names the first broken row."""
    source = SOURCES[task.label]
    rows = read_table(source.files, source.columns)
    problems = []
    if not rows:
        raise ConfigError(f"{task.path} has no rows")
    for number in permutation(SEED, len(rows))[:most]:
        try:
            problems.append(READ[task.label](rows[number]))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ConfigError(f"{task.path}: row {number + 1} is not one of {task.label}: "
                              f"{type(error).__name__} {shown(str(error))}") from None
    return problems


def choices(question: str, letters: tuple[str, ...], options: list[str], right: str) -> Problem:
    """The letter comes after its option, without a space, since that is the token which is asked for."""
    if not (letters and len(letters) == len(options) and right in letters):
        raise ValueError(f"{right} is not one of {', '.join(letters)}")
    lines = [f"- {option}={letter}\n" for option, letter in zip(options, letters)]
    return Problem(f"Multiple Choice question: {question}\n{''.join(lines)}\n"
                   "Respond only with the letter of the correct answer.", right, letters)


def arc(row: Mapping) -> Problem:
    letters = tuple(row["choices"]["label"])  # some have digits
    return choices(row["question"], letters, row["choices"]["text"], row["answerKey"])


def mmlu(row: Mapping) -> Problem:
    return choices(row["question"], tuple("ABCD"), row["choices"], "ABCD"[row["answer"]])


def gsm8k(row: Mapping) -> Problem:
    right = number_in(re.split(r"<<[^>]+>>", row["answer"])[-1])  # what follows the last calculation
    if right is None:
        raise ValueError("no #### and number in the answer")
    return Problem(row["question"] + "", right)


def humaneval(row: Mapping) -> Problem:
    return Problem(row["prompt"] + "", f"\n\n{row['test'] + ''}\ncheck({row['entry_point']})")


READ: dict[str, Callable[[Mapping], Problem]] = {
    "ARC-Easy": arc, "ARC-Challenge": arc, "MMLU": mmlu, "GSM8K": gsm8k, "HumanEval": humaneval}


def number_in(text: str) -> str | None:
    """The number after the first ####, without commas."""
    found = NUMBER_MARK.search(text)
    return found and found[1].replace(",", "")


def imports_of(prompt: str) -> str:
    """The imports with which a program begins."""
    found = []
    for line in map(str.strip, prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            found.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(found)


def program_of(problem: Problem, answer: str) -> str:
    """The first fenced block of an answer, or all of it, between the imports of what was asked and its
    tests."""
    block = FENCED.search(answer)
    imports = imports_of(problem.prompt or problem.text)
    return f"{imports}\n\n{(block[1] if block else answer).strip()}{problem.right}"


class ChatJudge:
    """Judges the items of a task. runs: runs programs; without it there may be none of them."""

    def __init__(self, scorer: Scorer, runs: Runs | None = None, answer_tokens: int | None = None):
        self.answer_tokens = answer_tokens or ANSWER_TOKENS  # the most that an answer may have
        self.scorer = scorer
        self.runs = runs
        self.tokens: dict[str, int] = {}  # of letters

    async def judged(self, task: Task, problem: Problem) -> Mapping[str, Any]:
        """What is kept of an item beside its number."""
        whole = await self.scorer.chat(problem.text)
        prompt = whole[-max(self.scorer.room - 1, 1):]  # its beginning goes if it does not fit
        cut = {"cut": True} if len(prompt) < len(whole) else {}
        if task.kind == LETTERS:
            return await self._by_letter(problem, prompt) | cut
        answer = await self.scorer.answer(prompt, self.answer_tokens)
        if task.kind == NUMBER:
            return {"correct": number_in(answer) == problem.right, "margin": None} | cut
        assert self.runs
        program = program_of(problem, answer)
        return {"correct": await self.runs(program), "margin": None, "program": program} | cut

    async def _by_letter(self, problem: Problem, prompt: list[int]) -> dict[str, Any]:
        await self._learn(problem.letters)
        ids = [self.tokens[letter] for letter in problem.letters]
        found = await self.scorer.likelihoods(prompt, ids)
        chosen = found.index(max(found))
        others = [value for place, value in enumerate(found) if place != chosen]
        margin = found[chosen] - max(others) if others else math.inf
        return {"correct": problem.letters[chosen] == problem.right, "chosen": chosen,
                "margin": margin if math.isfinite(margin) else None}

    async def _learn(self, letters: tuple[str, ...]):
        if new := [letter for letter in letters if letter not in self.tokens]:
            begin, *encoded = await self.scorer.encode(["", *new])
            for letter, ids in zip(new, encoded):
                if len(ids) != len(begin) + 1:
                    raise BadItem(f"the letter {shown(letter)} is not one token")
                self.tokens[letter] = ids[-1]

"""Runs a task from its first item to its last, without those that are judged already, and adds them up."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.front.aio import all_of
from chatlm.front.evals.bundle import KINDS, LANGUAGE_MODELING, Suite, Task, drawn_rows
from chatlm.front.evals import published
from chatlm.front.evals.chat import CHAT_KINDS, PUBLISHED, ChatJudge, drawn_problems
from chatlm.front.evals.items import NEAR_TIE, BadItem, examples_of, fitted, prompts_of, spans_of, verdict_of

if TYPE_CHECKING:
    from chatlm.front.evals.chat import Runs
    from chatlm.front.evals.answers_file import AnswersFile
    from chatlm.front.evals.scores import Scorer


AT_ONCE = 8  # items


class TaskResult(NamedTuple):
    """What the items of a task add up to."""

    task: Task
    items: int
    right: int
    near: int        # decided by no more than NEAR_TIE nats
    cut: int         # that lost their beginning, since the context is shorter
    seconds: float
    verdicts: str = ""  # of each item, 1: right, 0: wrong

    @property
    def accuracy(self) -> float:
        return self.right / self.items

    @property
    def centered(self) -> float:
        return self.task.centered(self.accuracy)

    @property
    def standard_error(self) -> float:
        """Of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.items)


def mean_of(results: list[TaskResult]) -> tuple[float, float]:
    """(the mean of the centered accuracies, its standard error): CORE, or ChatCORE."""
    errors = [result.standard_error / (1 - result.task.baseline) for result in results]
    return (math.fsum(result.centered for result in results) / len(results),
            math.sqrt(math.fsum(error**2 for error in errors)) / len(results))


def as_json(suite: Suite, results: list[TaskResult]) -> dict[str, Any]:
    """The results with upstream's names where it has some."""
    body: dict[str, Any] = {
        "results": {result.task.label: round(result.accuracy, 6) for result in results},
        "centered_results": {result.task.label: round(result.centered, 6) for result in results}}
    if suite.mean:
        mean, error = mean_of(results)
        name = suite.mean.lower()
        body |= {f"{name}_metric": round(mean, 6), f"{name}_standard_error": round(error, 6)}
    return body | {
        "standard_errors": {result.task.label: round(result.standard_error, 6) for result in results},
        "items": {result.task.label: result.items for result in results},
        "near_ties": sum(result.near for result in results),
        "cut_items": sum(result.cut for result in results),
        "seconds": round(sum(result.seconds for result in results), 1)}


def drawn_items(task: Task, most: int | None) -> list:
    """The items of a task as upstream draws them. ConfigError if they are not usable."""
    if task.kind == PUBLISHED:
        return published.published_problems(task, most)
    return drawn_problems(task, most) if task.kind in CHAT_KINDS else drawn_rows(task, most)


async def run_task(scorer: Scorer, task: Task, most: int | None, kept: AnswersFile,
                   progress: Callable[[str, float], None], at_once: int = AT_ONCE,
                   runs: Runs | None = None) -> TaskResult:
    """Judge the items of a task that are not among `kept`. runs: runs programs, for a task that needs it.
    ConfigError if an item cannot be judged."""
    began_s = time.monotonic()
    rows = await asyncio.to_thread(drawn_items, task, most)
    judge = ChatJudge(scorer, runs, published.ANSWER_TOKENS if task.kind == PUBLISHED else None)
    left = iter([index for index in range(len(rows)) if kept.find(task.label, index) is None])
    words = f"{task.label} ({task.shots}-shot)" if task.kind in KINDS else task.label
    done = sum(kept.find(task.label, index) is not None for index in range(len(rows)))
    progress(words, done / len(rows))

    async def judge_some():
        nonlocal done
        for index in left:
            try:
                found = await (judge.judged(task, rows[index]) if task.kind in CHAT_KINDS else
                               judged(scorer, task, rows, index))
            except BadItem as error:
                raise ConfigError(f"{task.label}: item {index} cannot be judged: {error}") from None
            kept.add({"task": task.label, "item": index, **found})
            done += 1
            progress(words, done / len(rows))

    await all_of(*(judge_some() for _ in range(at_once)))
    found = [kept.find(task.label, index) for index in range(len(rows))]
    items = [item for item in found if item is not None]
    near = sum(item["margin"] is not None and item["margin"] <= NEAR_TIE for item in items)
    return TaskResult(task, len(items), sum(item["correct"] for item in items), near,
                      sum(bool(item.get("cut")) for item in items), time.monotonic() - began_s,
                      "".join(str(int(item["correct"])) for item in items))


async def judged(scorer: Scorer, task: Task, rows: list[dict], index: int) -> Mapping[str, Any]:
    """What is kept of an item beside its number. BadItem where upstream ends its run."""
    item = rows[index]
    tokens = await scorer.encode(prompts_of(task, item, examples_of(rows, index, task.shots)))
    whole = spans_of(task.kind, tokens)
    spans = [fitted(span, scorer.longest) for span in whole]
    asked = [place for place, span in enumerate(spans) if not span.empty]
    top = 2 if task.kind == LANGUAGE_MODELING else 0
    ids = [spans[place].ids for place in asked]
    starts = [spans[place].start for place in asked]
    by_place = dict(zip(asked, await scorer.score(ids, starts, top) if asked else ()))
    verdict = verdict_of(task.kind, item, [by_place.get(place, []) for place in range(len(spans))])
    cut = any(len(span.ids) < len(one.ids) for span, one in zip(spans, whole))
    margin = verdict.margin if math.isfinite(verdict.margin) else None
    body = {"correct": verdict.correct, "chosen": verdict.chosen, "margin": margin}
    if cut:
        body["cut"] = True
    return body

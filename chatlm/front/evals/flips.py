"""Which items of a suite two models judge differently, and what these are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.front.evals.bundle import LANGUAGE_MODELING
from chatlm.front.evals.chat import Problem
from chatlm.front.evals.items import examples_of, prompts_of
from chatlm.front.evals.run import drawn_items

if TYPE_CHECKING:
    from chatlm.front.evals.bundle import Suite, Task

MOST_SHOWN = 50  # items in a response


class Verdicts(NamedTuple):
    """How a model did on each item of a suite."""

    suite: Suite
    most: int | None           # --max-per-task
    right: Mapping[str, str]   # of each task, for each item 1 or 0


def flips(before: Verdicts, after: Verdicts) -> dict[str, Any]:
    """The items that only one of two models of the same suite got right; at most MOST_SHOWN with their texts.
    Reads the tasks' files: ConfigError if these are broken by now."""
    gained = 0
    lost = 0
    shown: list[dict[str, Any]] = []
    for task in after.suite.tasks:
        pairs = enumerate(zip(before.right.get(task.label, ""), after.right.get(task.label, "")))
        differ = [(index, now == "1") for index, (was, now) in pairs if was != now]
        gained += sum(now for _, now in differ)
        lost += sum(not now for _, now in differ)
        rows = drawn_items(task, after.most) if differ and len(shown) < MOST_SHOWN else []
        shown += [{"task": task.label, "item": index, "correct": now, **texts_of(task, rows, index)}
                  for index, now in differ[:MOST_SHOWN - len(shown)] if index < len(rows)]
    return {"gained": gained, "lost": lost, "items": shown}


def texts_of(task: Task, rows: list, index: int) -> dict[str, Any]:
    """What a model reads of an item: the texts whose ends are compared, or a question in a chat."""
    item = rows[index]
    if isinstance(item, Problem):
        return {"chat": True, "texts": [item.text], "gold": item.right}
    texts = prompts_of(task, item, examples_of(rows, index, task.shots))
    if task.kind == LANGUAGE_MODELING:
        return {"chat": False, "texts": texts[1:], "gold": str(item["continuation"])}
    return {"chat": False, "texts": texts, "gold": item["gold"]}

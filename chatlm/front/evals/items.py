"""Items of tasks: the prompts, which of their tokens are scored, and which option wins.

As upstream's core_eval.py at 92d63d4, which renders with jinja: a value is written as it is."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence as Seq
from typing import NamedTuple

from chatlm.common.messages.requests import TokenLogprob
from chatlm.front.evals.bundle import LANGUAGE_MODELING, MULTIPLE_CHOICE, SCHEMA, Task

NEAR_TIE = 1e-3  # nats: where the margin is no larger, other arithmetic may decide otherwise


class BadItem(ValueError):
    """Upstream ends its run at this item."""


class ScoredSpan(NamedTuple):
    """The tokens of an option. Those from `start` on are scored."""

    ids: tuple[int, ...]
    start: int

    @property
    def empty(self) -> bool:
        return self.start >= len(self.ids)


class Verdict(NamedTuple):
    """What came of an item. margin: nats by which it was decided."""

    correct: bool
    chosen: int | None   # the option; None: it had none
    margin: float


def examples_of(rows: Seq[dict], index: int, shots: int) -> list[dict]:
    """The examples before item `index`: it draws its own from all others, so they depend on the cut."""
    if not shots:
        return []
    others = [other for other in range(len(rows)) if other != index]
    return [rows[other] for other in random.Random(1234 + index).sample(others, shots)]


def prompts_of(task: Task, item: dict, examples: Seq[dict]) -> list[str]:
    """The texts whose tokens are compared: one for each option or, of language modeling, without and with the
    continuation."""
    delimiter = task.delimiter
    if task.kind == MULTIPLE_CHOICE:
        shots = [f"{row['query']}{delimiter}{row['choices'][row['gold']]}\n\n" for row in examples]
        return ["".join(shots) + f"{item['query']}{delimiter}{choice}" for choice in item["choices"]]
    if task.kind == SCHEMA:
        shots = [f"{row['context_options'][row['gold']]}{delimiter}{row['continuation']}\n\n"
                 for row in examples]
        return ["".join(shots) + f"{context}{delimiter}{item['continuation']}"
                for context in item["context_options"]]
    shots = [f"{str(row['context']).strip()}{delimiter}{row['continuation']}\n\n" for row in examples]
    before = "".join(shots) + f"{str(item['context']).strip()}{delimiter}"
    return [before.strip(), f"{before}{item['continuation']}"]


def shared(sequences: Seq[Seq[int]]) -> int:
    """How many tokens all begin with."""
    for place, tokens in enumerate(zip(*sequences)):
        if len({*tokens}) > 1:
            return place
    return min(map(len, sequences))


def spans_of(kind: str, tokens: Seq[Seq[int]]) -> list[ScoredSpan]:
    """What is scored of each option, from the tokens of `prompts_of`. BadItem where upstream asserts."""
    if kind == MULTIPLE_CHOICE:
        start = shared(tokens)
        return [ScoredSpan(tuple(ids), start) for ids in tokens]
    if kind == SCHEMA:
        count = shared([ids[::-1] for ids in tokens])
        return [ScoredSpan(tuple(ids), len(ids) - count) for ids in tokens]
    without, whole = tokens
    if len(without) >= len(whole) or list(whole[:len(without)]) != list(without):
        raise BadItem("the tokens of the prompt without its continuation are not the beginning of those "
                      "with it")
    return [ScoredSpan(tuple(whole), len(without))]


def fitted(span: ScoredSpan, longest: int) -> ScoredSpan:
    """The span in a context of `longest` tokens: what is too long loses its beginning. BadItem if that would
    be scored."""
    surplus = max(len(span.ids) - longest, 0)
    if surplus and span.start - surplus < 1:
        raise BadItem(f"{len(span.ids) - span.start:,} tokens are scored, but the context holds {longest:,}")
    return ScoredSpan(span.ids[surplus:], span.start - surplus)


def verdict_of(kind: str, item: dict, scores: Seq[Seq[TokenLogprob]]) -> Verdict:
    """scores: of the scored tokens of each option; with language modeling the two likeliest tokens too."""
    if kind == LANGUAGE_MODELING:
        return followed(scores[0])
    # an empty range has no mean; among NaNs, min and index do as upstream's do
    means = [-math.fsum(one.logprob or 0.0 for one in option) / len(option) if option else math.nan
             for option in scores]
    chosen = means.index(min(means))
    others = [mean for option, mean in enumerate(means) if option != chosen and not math.isnan(mean)]
    decided = math.isnan(means[chosen]) or not others
    return Verdict(chosen == item["gold"], chosen, math.inf if decided else min(others) - means[chosen])


def followed(scores: Seq[TokenLogprob]) -> Verdict:
    """Is each token the likeliest one? A first token is none: nothing precedes it."""
    scores = [one for one in scores if one.logprob is not None]
    surplus = [one.top[0][1] - (one.logprob or 0.0) for one in scores if one.top[0][0] != one.token]
    leads = [one.top[0][1] - one.top[1][1] for one in scores if len(one.top) > 1]
    return Verdict(not surplus, None, max(surplus) if surplus else min(leads, default=math.inf))

"""Bits per byte: how well a model predicts a text."""

from __future__ import annotations

import array
import asyncio
import math
from collections.abc import Callable, Iterator, Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import Overloaded
from chatlm.front.evals.scores import prompt_scores

if TYPE_CHECKING:
    from chatlm.front.pool.pool import WorkerPool


WINDOWS = 16  # in a request


class Score(NamedTuple):
    """How well a model predicts a text."""

    bits: float
    bytes: int   # of the text, in UTF-8
    tokens: int  # scored

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.bytes

    def as_json(self) -> dict:
        return {"bits_per_byte": round(self.bits_per_byte, 6), "bits": round(self.bits, 3),
                "bytes": self.bytes, "tokens": self.tokens}


class Window(NamedTuple):
    """A part of a text that fits the context. Its tokens from `first` on are scored."""

    ids: tuple[int, ...]
    first: int


def windows_of(ids: Seq[int], context: int) -> Iterator[Window]:
    """Windows that begin half a context apart. The very first token is not scored, since nothing precedes it.
    Every other token is scored once, in the first window that contains it; from the second window on, at
    least half a context precedes it."""
    stride, scored = max(context // 2, 1), 1
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        if end > scored:
            yield Window(tuple(ids[begin:end]), scored - begin)
            scored = end


async def score_text(pool: WorkerPool, text: str, *, yields: Callable[[], None] | None = None,
                     windows: int = WINDOWS) -> Score:
    """Score a text with a model. The model's begin-of-text token precedes the text, so that the text's first
    token is scored too. A model without such a token skips that first token, and its bytes are not counted.

    yields: if given, other requests come first; it is called before each request, and may raise to end the
    work. windows: how many are computed at a time."""
    tokenizer, context = pool.tokenizer, pool.context_length
    assert tokenizer
    ids, spec = await asyncio.to_thread(tokenizer.encode, text), tokenizer.spec
    start = spec.bos_token if spec.bos_token is not None else spec.eos_token
    size, logprobs = len(text.encode()), array.array("d")
    if start is None:
        size -= len(tokenizer.token_bytes(ids[0]))
    ids = ids if start is None else [start, *ids]
    waiting = [*windows_of(ids, context)]
    while waiting:
        part, waiting = waiting[:windows], waiting[windows:]
        if yields:
            yields()
        try:
            logprobs.extend(await _scored(pool, part, low_priority=yields is not None))
        except Overloaded as error:
            if not yields or pool.draining:
                raise
            waiting = part + waiting
            await asyncio.sleep(error.retry_after_s)
    # fsum is exact: the order in which windows end does not matter
    return Score(-math.fsum(logprobs) / math.log(2), max(size, 1), len(logprobs))


async def _scored(pool: WorkerPool, windows: Seq[Window], low_priority: bool) -> list[float]:
    """The log-probabilities of the tokens that these windows score."""
    ids, starts = [window.ids for window in windows], [window.first for window in windows]
    found = await prompt_scores(pool, ids, starts, low_priority=low_priority)
    return [scored.logprob or 0.0 for window in found for scored in window]

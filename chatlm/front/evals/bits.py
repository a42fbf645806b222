"""Bits per byte: how well a model predicts a text."""

from __future__ import annotations

import array
import asyncio
import math
from collections.abc import Iterator, Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

if TYPE_CHECKING:
    from chatlm.front.evals.scores import PoolScorer


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
    stride = max(context // 2, 1)
    scored = 1
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        if end > scored:
            yield Window(tuple(ids[begin:end]), scored - begin)
            scored = end


async def score_text(scorer: PoolScorer, text: str, windows: int = WINDOWS) -> Score:
    """Score a text with a model. The model's begin-of-text token precedes the text, so that the text's first
    token is scored too. A model without such a token skips that first token, and its bytes are not counted.

    windows: how many are computed at a time."""
    ids = await asyncio.to_thread(scorer.tokenizer.encode, text)
    size = len(text.encode())
    logprobs = array.array("d")
    if not scorer.begin:
        size -= len(scorer.tokenizer.token_bytes(ids[0]))
    waiting = [*windows_of([*scorer.begin, *ids], scorer.room)]
    for begin in range(0, len(waiting), windows):
        part = waiting[begin:begin + windows]
        found = await scorer.score([window.ids for window in part], [window.first for window in part], 0)
        for window in found:
            logprobs.extend(scored.logprob or 0.0 for scored in window)
    # fsum is exact, so the order in which windows end does not matter
    return Score(-math.fsum(logprobs) / math.log(2), max(size, 1), len(logprobs))

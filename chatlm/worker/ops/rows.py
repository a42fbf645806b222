"""`SampleRow`: what a draw needs to know about a row."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

from chatlm.common.messages.requests import SamplingParams


class SampleRow(NamedTuple):
    """A row to draw a token from. The token depends only on the row's logits and these fields."""

    params: SamplingParams
    position: int           # absolute index of the token being drawn
    tokens: Seq[int] = ()   # prompt and answer so far, for penalties
    prompt_tokens: int = 0  # how many of them are the prompt's
    kept: Any = None        # what a draw on the host has computed of these tokens, to save time

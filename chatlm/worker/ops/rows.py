"""What a draw needs to know about a row."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

from chatlm.common.messages.requests import SamplingParams


class SampleRow(NamedTuple):
    """One row to draw a token from; the token depends only on the row's logits and these fields."""

    params: SamplingParams
    position: int           # absolute index of the token being drawn
    tokens: Seq[int] = ()   # prompt and answer so far, for the penalties
    prompt_tokens: int = 0  # how many of them are the prompt
    kept: Any = None        # what a draw on the host made of the tokens so far, so that it takes less time

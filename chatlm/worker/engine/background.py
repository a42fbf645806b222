"""The background lane: how much of a step work that nobody waits for may take beside interactive answers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatlm.common.answering import AnswerLease
    from chatlm.worker.engine.sequence import Sequence
    from chatlm.worker.engine.times import StepTimes, Times


class BackgroundLane:
    """How many tokens of background sequences a step may compute beside interactive ones: so many that it
    takes at most SHARE longer, by the measured times of steps. Without interactive sequences there is no
    limit.

    A number of rows that was measured while the machine was busy would look slow and never be tried again. So
    every TRIAL-th step beside interactive answers has one row more than the times allow."""

    SHARE = 0.05
    TRIAL = 256    # steps: too few for a hundredth of the gaps between tokens
    STEP_S = 0.15  # about how long a step with background prompts takes: an interactive request waits for it
    PAUSE_S = 0.005  # between two looks at whether other workers still write answers
    LEAST = 64     # tokens of prompts in such a step: fewer would waste most of the speed of matrix products

    def __init__(self, ahead: bool = False, recorded: bool = False):
        """ahead: do interactive steps begin before the last one's tokens are known? recorded: are steps
        recorded by their rows, so that prompts among them make them slow?"""
        self.ahead = ahead
        self.recorded = recorded
        self.room = 1   # what the last step beside interactive answers had
        self.steps = 0  # beside interactive answers
        self.lease: AnswerLease | None = None  # of workers that compute on the same processors

    def give_way_to(self, lease: AnswerLease):
        """Wait from now on while other workers on the same processors write interactive answers."""
        self.lease = lease

    def must_wait(self) -> bool:
        """Is another worker on the same processors writing an interactive answer, or was it a moment ago?
        Nobody measures how much work here would lengthen its steps."""
        return self.lease is not None and self.lease.others_write

    def room_beside(self, times: StepTimes, tokens: int, most: int) -> int:
        """How many tokens, at most `most`, may join a step with so many `tokens` of interactive sequences. A
        token of a prompt counts as a row of logits, and takes no longer."""
        self.steps += 1
        alone, *longer = times.expected(tokens, tokens + most)
        room = bisect_right(longer, (1 + self.SHARE) * alone)
        if self.steps % self.TRIAL == 0 and room < most:
            room += 1
        self.room = room
        return room

    def prompt_tokens(self, times: Times, rows: int, most: int) -> int:
        """How many tokens of prompts, at most `most`, a step may have beside so many rows of answers while
        nobody waits for any of them."""
        if not times.token_s:
            return most
        rows_s = times.rows.expected(rows, rows)[0] if rows else 0.0
        return min(most, max(self.LEAST, int((self.STEP_S - rows_s) / times.token_s)))

    def joins(self, sequence: Sequence) -> bool:
        """May it be computed beside interactive answers? Not if the whole step would then be drawn on the
        host, wait for a token, or have a shape that is not recorded."""
        if not sequence.output.ready or sequence.pooling or sequence.scoring or sequence.needs_logits:
            return False
        if self.recorded and sequence.prefilling:
            return False
        return not (self.ahead and sequence.work.needs_tokens)


def in_background(sequences: Iterable[Sequence]) -> list[Sequence]:
    return [sequence for sequence in sequences if sequence.work.background]


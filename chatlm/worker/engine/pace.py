"""How many tokens of prompts a step has beside answers: so few that these come at a readable pace."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from chatlm.common.config import PAGE_SIZE

if TYPE_CHECKING:
    from chatlm.worker.engine.times import Times


class PromptPace:
    """A step takes as long as its prompts, and the answers beside them wait for it. So it takes about STEP_S
    while answers are written, by the measured times of steps. Nobody is stalled by a whole chunk then.

    Each step also has a part that does not depend on its prompts: it reads all weights, and computes the
    rows of the answers. Many small chunks pay for it more often than few large ones, so a chunk is at least
    so large that its prompt is at most LATENESS later than with whole chunks. Of the two the prompt's
    lateness weighs more: on a slow model a step takes longer than STEP_S.

    Kernels multiply ROWS rows together, whether they are there or not: 33 take nearly as long as 64. So the
    step's rows are a multiple of it, the answers' among them.

    What is computed does not depend on chunks, so the bits of an answer do not depend on times. With several
    ranks only the first one plans."""

    STEP_S = 0.2     # about how long a step with prompts takes beside answers
    LATENESS = 0.14  # how much longer a prompt may take, as measured; the answers' own time comes on top
    ROWS = 32        # two panels of csrc/cpu/tiles

    def tokens(self, times: Times, most: int, beside: int) -> int:
        """How many tokens of prompts, at most `most`, a step may have beside so many rows of answers and
        their drafts. All of `most` until a prompt has been measured."""
        token_s = times.prompts.token_s
        if not token_s:
            return most
        row_s = times.row_s
        in_time = (self.STEP_S - row_s) / token_s
        # row_s / tokens + token_s <= (1 + LATENESS) * (row_s / most + token_s)
        efficient = row_s / (self.LATENESS * token_s + (1 + self.LATENESS) * row_s / most)
        blocks = max(round((beside + in_time) / self.ROWS), math.ceil((beside + efficient) / self.ROWS))
        tokens = blocks * self.ROWS - beside
        return min(most, tokens if tokens >= PAGE_SIZE else tokens + self.ROWS)

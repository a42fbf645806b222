"""How long steps take on this machine, as measured. All that plan by time read one `Times`."""

from __future__ import annotations

import statistics
import time
from collections import deque


class StepTimes:
    """How long a step takes by its number of rows. Numbers that were never measured are estimated from those
    that were."""

    SLOPE = 0.05   # of a row, in steps of one row, until two numbers of rows were measured
    FASTER = 0.3   # weight of a measurement below the mean,
    SLOWER = 0.05  # and above it: others use the machine too
    MEMORY = 50    # measurements after which a number of rows counts no more than now
    RENEWED = 16   # measurements after which the estimates are made again

    def __init__(self):
        self.measured: dict[int, tuple[float, int]] = {}  # rows -> (seconds, how often it was measured)
        self.estimates: list[float] = []                  # by rows, from 0
        self.count = 0

    def note(self, rows: int, seconds: float):
        known, count = self.measured.get(rows, (seconds, 0))
        weight = self.FASTER if seconds < known else self.SLOWER
        self.measured[rows] = known + weight * (min(seconds, 2 * known) - known), min(count + 1, self.MEMORY)
        self.count += 1
        if not count or self.count % self.RENEWED == 0:
            self.estimates = []

    def expected(self, first: int, last: int) -> list[float]:
        """Seconds of steps of first, first + 1, ... last rows; none is shorter than the one before."""
        if len(self.estimates) <= last:
            self.estimates = self._estimates(max(last, 64))
        return self.estimates[first:last + 1]

    def _estimates(self, last: int) -> list[float]:
        """Seconds by rows, from 0 to `last`: on straight lines between the measured ones, and beyond them."""
        known = self._never_falling() or [(1.0, 1.0)]
        low, low_s = known[0]
        high, high_s = known[-1]
        slope = self.SLOPE * low_s / low
        if high > low:
            slope = max((high_s - low_s) / (high - low), 0.01 * low_s)
        points = [(0, max(low_s - slope * low, 0.1 * low_s)), *known,
                  (last + 1, high_s + slope * max(last + 1 - high, 0))]
        estimates = []
        place = 0
        for rows in range(last + 1):
            while points[place + 1][0] <= rows:
                place += 1
            (low, low_s), (high, high_s) = points[place:place + 2]
            estimates.append(low_s + (high_s - low_s) * (rows - low) / (high - low))
        return estimates

    def _never_falling(self) -> list[tuple[float, float]]:
        """(rows, seconds), in rising order of both. Neighbours whose seconds fall are averaged, by how often
        they were measured, so that one slow step does not make all larger ones look slow."""
        pools: list[tuple[float, float, int]] = []
        for rows, (seconds, count) in sorted(self.measured.items()):
            pools.append((float(rows), seconds, count))
            while len(pools) > 1 and pools[-2][1] > pools[-1][1]:
                (rows, seconds, count), (other, other_s, others) = pools.pop(), pools.pop()
                both = count + others
                pools.append(((rows * count + other * others) / both,
                              (seconds * count + other_s * others) / both, both))
        return [(rows, seconds) for rows, seconds, _ in pools]


class PromptTimes:
    """How long a token of a prompt takes now: it takes the longer, the more tokens stand before it."""

    RECENT = 5  # steps whose median counts, so that a step that others have disturbed does not
    LEAST = 16  # tokens of prompts: a step with fewer says little
    FLOOR = 0.1  # of a step's time that its prompts take at least, whatever one without them takes

    def __init__(self):
        self.recent: deque[float] = deque(maxlen=self.RECENT)
        self.token_s = 0.0  # 0.0: not measured yet

    def note(self, tokens: int, seconds: float, row_s: float):
        """A step with so many tokens of prompts took so long; without them it would have taken row_s."""
        if tokens < self.LEAST:
            return
        self.recent.append(max(seconds - row_s, self.FLOOR * seconds) / tokens)
        self.token_s = statistics.median(self.recent)


class Times:
    """Measured times of an engine's steps. The engine notes each step; planners, drafts and the keeper read
    them."""

    MOST_GAP_S = 0.002  # between two steps of which the second waited for nothing

    def __init__(self, timed_tokens: int = 64):
        """timed_tokens: a step of fewer says little about the speed of prompts."""
        self.timed_tokens = timed_tokens
        self.rows = StepTimes()       # of answers and drafts
        self.host_rows = StepTimes()  # likewise, where the host needs the logits
        self.prompts = PromptTimes()
        self.alone: deque[float] = deque(maxlen=9)  # seconds of the last steps without prompts
        self.token_s = 0.0            # to compute a token of a prompt; 0.0: not measured yet
        self.step_s = 0.0             # how long the last step took
        self.ended_s = 0.0            # when it ended

    def of(self, on_host: bool) -> StepTimes:
        """The times of steps of answers and drafts, by their rows."""
        return self.host_rows if on_host else self.rows

    @property
    def row_s(self) -> float:
        """Seconds of a step without prompts, as lately measured: it reads all weights, as any step does. 0.0:
        not measured yet. A median, since one disturbed step would otherwise say much where few are known."""
        return statistics.median(self.alone) if self.alone else 0.0

    def note_step(self, planned_s: float, rows: int, tokens: int, on_host: bool, prompt_tokens: int = 0):
        """A step that was planned at `planned_s` has ended now. rows: of answers and drafts. tokens: all that
        it computed, without drafts; prompt_tokens: those of them that belong to prompts.

        The host's time between it and the step before counts for its rows, unless the host had nothing to do
        then."""
        before_s = self.ended_s
        self.ended_s = time.monotonic()
        began_s = max(planned_s, before_s)
        gap_s = began_s - before_s
        self.step_s = self.ended_s - began_s
        if prompt_tokens:
            self.prompts.note(prompt_tokens, self.step_s, self.row_s)
        elif rows:
            self.alone.append(self.step_s)
            self.of(on_host).note(rows, self.step_s + (gap_s if gap_s < self.MOST_GAP_S else 0.0))
        if tokens >= self.timed_tokens:
            weight = 0.2 if self.token_s else 1.0
            self.token_s += weight * (self.step_s / tokens - self.token_s)

    def skip(self):
        """The time until now is no part of the next step's."""
        self.ended_s = time.monotonic()

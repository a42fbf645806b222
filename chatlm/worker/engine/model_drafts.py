"""A source of drafts that computes them. It decides how many, by what they cost and how often they are
right."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence as Seq
from typing import Protocol, TYPE_CHECKING

from chatlm.worker.engine.drafts import NO_DRAFT, Draft
from chatlm.worker.engine.part import EnginePart
from chatlm.worker.engine.times import StepTimes

if TYPE_CHECKING:
    import numpy
    from chatlm.worker.engine.draft_model import Followers
    from chatlm.worker.engine.sequence import Sequence
    from chatlm.worker.kernels.kernels import StepRunner
    from chatlm.worker.model.transformer import Transformer


class Drafter(Protocol):
    """What computes drafts: a second model, or a model's own draft head."""

    name: str           # of the source, a field of DraftCounts
    reads_hidden: bool  # does it need the model's hidden states after each step?
    transformer: Transformer
    followers: Followers
    computed: int       # tokens in the first step of the last draft
    longest: int        # tokens of a sequence that it can follow
    runner: StepRunner

    def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]: ...
    def end(self, sequence: Sequence): ...
    def read_hidden(self, sequence: Sequence, first: int, count: int, rows: numpy.ndarray): ...
    def line(self) -> str: ...


class Rate:
    """How often a drafted token of a sequence is right if all before it are; older drafts count less."""

    MEMORY = 0.9  # weight of what was known, with each draft
    RIGHT = 1.4   # tokens assumed to be right before anything is known,
    OF = 2.0      # of so many

    def __init__(self):
        self.right = 0.0
        self.judged = 0.0

    @property
    def share(self) -> float:
        return (self.right + self.RIGHT) / (self.judged + self.OF)

    def judge(self, verified: int, accepted: int):
        self.right = self.MEMORY * self.right + accepted
        self.judged = self.MEMORY * self.judged + min(accepted + 1, verified)


def best_length(share: float, draft_s: float, step_s: Seq[float], most: int) -> int:
    """How many tokens to draft for the most tokens a second, 0 if drafts do not pay.

    share: the probability that a token is right if those before it are. draft_s: to draft a token, one after
    the other. step_s: of a step that verifies k tokens, by k."""
    best = 0
    best_speed = 1 / step_s[0]
    tokens = 1.0
    for length in range(1, most + 1):
        tokens += share ** length
        speed = tokens / (step_s[length] + length * draft_s)
        if speed > best_speed:
            best = length
            best_speed = speed
    return best


class ModelDrafts(EnginePart):
    """The source. Where no draft pays, it rests: it drafts one token after REST tokens, then after twice as
    many, and so on, to see whether drafts pay now. Answers that begin meanwhile rest as long, since a second
    model would have to compute their prompts too."""

    FIRST = 4              # tokens of a draft before anything is measured,
    LONGEST = 7            # and at most
    REST = 64              # tokens of the first rest,
    LONGEST_REST = 4096    # and of the longest
    LONGEST_WATCHED = 256  # the longest rest during which hidden states are read all the time
    MOST_COMPUTED = 8      # tokens for each sequence in a first step that is timed; with more it has prompts

    rests = False

    def __init__(self, drafter: Drafter):
        self.drafter = drafter
        self.name = drafter.name
        self.times = StepTimes()       # of the model's steps
        self.draft_rows = 1            # in a step of the model, at most
        self.draft_times = StepTimes()  # of a draft's steps, by how many draft
        self.rates: dict[Sequence, Rate] = {}
        self.resting: dict[Sequence, int] = {}  # sequences without drafts until they have so many tokens
        self.rest = 0                  # tokens without drafts, since none paid last time

    def plan_by(self, times: StepTimes, draft_rows: int):
        """Choose lengths by these times of the engine's steps, and by the rows that these may have."""
        self.times = times
        self.draft_rows = draft_rows

    def prepare_steps(self):
        """Record the model's steps, where they can be recorded before they run."""
        self.drafter.runner.prepare(lambda fraction: None)

    def begin(self, sequence: Sequence):
        self.rates[sequence] = Rate()
        if sequence.placeholders:
            self.resting[sequence] = sys.maxsize  # it sees no pictures, and drafts nothing after them
        else:
            self.resting[sequence] = len(sequence.tokens) + self.rest if self.rest else 0

    def end(self, sequence: Sequence):
        self.drafter.end(sequence)
        del self.rates[sequence], self.resting[sequence]

    def forget(self):
        self.drafter.followers.forget()

    def judge(self, sequence: Sequence, draft: Draft, verified: int, accepted: int):
        self.rates[sequence].judge(verified, accepted)

    def awaits(self, sequence: Sequence) -> bool:
        """Will it soon draft for this sequence, so that steps must not begin ahead?"""
        return sequence.drafts and (
            self.resting[sequence] <= len(sequence.tokens) + 3 <= self.drafter.longest)

    def wants_hidden(self, sequence: Sequence) -> bool:
        """Not while drafts have not paid for long."""
        if not sequence.drafts or not self.drafter.reads_hidden or sequence.placeholders:
            return False
        return (self.rest <= self.LONGEST_WATCHED
                or len(sequence.tokens) + self.REST >= self.resting[sequence])

    def read_hidden(self, sequence: Sequence, first: int, count: int, rows: numpy.ndarray):
        if sequence.drafts:
            self.drafter.read_hidden(sequence, first, count, rows)

    def propose(self, sequences: Seq[Sequence]) -> list[Draft]:
        lengths = {sequence: self._length(sequence, len(sequences)) for sequence in sequences}
        lengths = {sequence: length for sequence, length in lengths.items() if length}
        began_s = time.monotonic()
        drawn = self.drafter.draft(lengths)
        steps = max(map(len, drawn.values()), default=0)
        if steps and self.drafter.computed <= self.MOST_COMPUTED * len(drawn):
            self.draft_times.note(len(drawn), (time.monotonic() - began_s) / steps)
        return [self._draft_of(sequence, drawn.get(sequence, ())) for sequence in sequences]

    def _length(self, sequence: Sequence, beside: int) -> int:
        """How many tokens to draft for a sequence, one of `beside`; 0 if another source has already drafted
        more tokens that are likely right than this one would."""
        most = min(self.LONGEST, self.draft_rows // beside - 1)
        share = self.rates[sequence].share
        if most < 1 or len(sequence.tokens) < self.resting[sequence]:
            return 0
        best = min(most, self.FIRST)
        if self.draft_times.measured and self.times.measured:
            [draft_s] = self.draft_times.expected(beside, beside)
            step_s = self.times.expected(beside, beside * (most + 1))[::beside]
            best = best_length(share, draft_s, step_s, most)
        if sequence.draft.worth >= sum(share ** (i + 1) for i in range(best or 1)):
            return 0
        self.rest = 0 if best else min(max(2 * self.rest, self.REST), self.LONGEST_REST)
        if not best:
            self.resting[sequence] = len(sequence.tokens) + self.rest
        return max(best, 1)

    def _draft_of(self, sequence: Sequence, tokens: Seq[int]) -> Draft:
        if not tokens:
            return NO_DRAFT
        share = self.rates[sequence].share
        return Draft(self.name, tuple(tokens), tuple(share ** (i + 1) for i in range(len(tokens))),
                     len(sequence.tokens))

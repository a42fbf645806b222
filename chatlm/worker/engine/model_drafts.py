"""A source of drafts that computes them: how many, by what they cost and how often they are right."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence as Seq
from typing import NamedTuple, Protocol, TYPE_CHECKING

from chatlm.worker.engine.drafts import NO_DRAFT, Draft
from chatlm.worker.engine.times import StepTimes

if TYPE_CHECKING:
    import numpy
    from chatlm.worker.engine.draft_model import Followers
    from chatlm.worker.engine.sequence import Chunk, Sequence
    from chatlm.worker.model.kernels import Steps
    from chatlm.worker.model.transformer import Transformer


class Drafter(Protocol):
    """What computes drafts: a second model, or a model's own draft head."""

    name: str          # of the source, a field of DraftCounts
    sees_states: bool  # does it need the model's hidden states after each step?
    transformer: Transformer
    followers: Followers
    computed: int      # tokens in the first step of the last draft
    longest: int       # tokens of a sequence that it can follow
    steps: Steps

    def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]: ...
    def end(self, sequence: Sequence): ...
    def see(self, sequence: Sequence, first: int, count: int, rows: numpy.ndarray): ...
    def line(self) -> str: ...


class Rate:
    """How often a drafted token of a sequence is right if all before it are; older drafts count less."""

    MEMORY = 0.9           # weight of what was known, with each draft
    # what is assumed before anything is known
    RIGHT = 1.4
    OF = 2.0

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
    """How many tokens to draft, one after the other in `draft_s` each, if each is right with this probability
    and a step that verifies k takes step_s[k]: what gives the most tokens in a second; 0 if that is none."""
    best = 0
    best_speed = 1 / step_s[0]
    tokens = 1.0
    for length in range(1, most + 1):
        tokens += share ** length
        if (speed := tokens / (step_s[length] + length * draft_s)) > best_speed:
            best = length
            best_speed = speed
    return best


class ModelDrafts:
    """The source. Where no draft pays, one token is drafted after REST tokens all the same, then after twice
    as many, to see whether that is still so. Answers that begin meanwhile wait as long: a second model would
    have to compute their prompts too."""

    # tokens of a draft before anything is measured, and at most
    FIRST = 4
    LONGEST = 7
    REST = 64
    LONGEST_SEEN = 256
    LONGEST_REST = 4096
    MOST_COMPUTED = 8      # tokens for each that drafts, in a first step that is measured: else with prompts

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
        self.drafter.steps.prepare(lambda fraction: None)

    def begin(self, sequence: Sequence):
        self.rates[sequence] = Rate()
        # it does not see: of a prompt with pictures it drafts nothing
        self.resting[sequence] = sys.maxsize if sequence.sight else (
            len(sequence.tokens) + self.rest if self.rest else 0)

    def end(self, sequence: Sequence):
        self.drafter.end(sequence)
        del self.rates[sequence], self.resting[sequence]

    def forget(self):
        self.drafter.followers.forget()

    def judge(self, sequence: Sequence, draft: Draft, verified: int, accepted: int):
        self.rates[sequence].judge(verified, accepted)

    def awaits(self, sequence: Sequence) -> bool:
        """Will it soon draft for this sequence, so that steps must not begin ahead?"""
        return self.resting[sequence] <= len(sequence.tokens) + 3 <= self.drafter.longest

    def sees(self, sequence: Sequence) -> bool:
        """Are its hidden states needed after each step? Not while drafts have not paid for long."""
        return self.drafter.sees_states and not sequence.sight and (
            self.rest <= self.LONGEST_SEEN or len(sequence.tokens) + self.REST >= self.resting[sequence])

    def propose(self, sequences: Seq[Sequence]) -> list[Draft]:
        lengths = {sequence: length for sequence in sequences
                   if (length := self._length(sequence, len(sequences)))}
        began_s = time.monotonic()
        drawn = self.drafter.draft(lengths)
        steps = max(map(len, drawn.values()), default=0)
        if steps and self.drafter.computed <= self.MOST_COMPUTED * len(drawn):
            self.draft_times.note(len(drawn), (time.monotonic() - began_s) / steps)
        return [self._draft_of(sequence, drawn.get(sequence, ())) for sequence in sequences]

    def _length(self, sequence: Sequence, beside: int) -> int:
        """How many tokens to draft for a sequence, one of so many; 0 if another source has drafted more that
        is likely right than this one would."""
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


class ShownRows(NamedTuple):
    """Where the hidden states of a sequence are after a step."""

    sequence: Sequence
    first: int   # position
    count: int   # tokens; the rows after these are of a draft
    rows: range  # of the step


def mark_shown(plan: Seq[Chunk], models: Seq[ModelDrafts]):
    """Note in a plan's sequences whether their hidden states will be needed after its step."""
    for chunk in plan if models else ():
        chunk.sequence.shown = chunk.sequence.drafts and any(model.sees(chunk.sequence) for model in models)


def shown_by(chunks: Seq[Chunk]) -> list[ShownRows]:
    """Whose hidden states a step shows that starts now."""
    found = []
    row = 0
    for chunk in chunks:
        end = row + chunk.count + len(chunk.draft)
        if chunk.sequence.shown:
            found.append(ShownRows(chunk.sequence, chunk.sequence.computed, chunk.count, range(row, end)))
        row = end
    return found


def show(shown: Seq[ShownRows], models: Seq[ModelDrafts], transformer: Transformer):
    """Give the hidden states of a step that has ended to what drafts, before the next one overwrites them."""
    for sequence, first, count, rows in shown:
        for model in models if sequence.drafts else ():
            model.drafter.see(sequence, first, count, transformer.hidden_states(rows.start, rows.stop))

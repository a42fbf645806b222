"""A source of drafts that computes them. It decides how many, by what they cost and how often they are
right."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TYPE_CHECKING

from chatlm.common.log import log
from chatlm.worker.engine.drafts import NO_DRAFT, Draft
from chatlm.worker.engine.part import EnginePart
from chatlm.worker.engine.times import PromptTimes, StepTimes, Times

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

    @property
    def title(self) -> str: ...  # in the log
    def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]: ...
    def behind(self, sequence: Sequence) -> int: ...
    def end(self, sequence: Sequence): ...
    def read_hidden(self, sequence: Sequence, first: int, count: int, rows: numpy.ndarray): ...
    def line(self) -> str: ...


class Rate:
    """How often a drafted token is right if all before it are; older drafts count less."""

    ASSUMED = 0.7   # before anything is known,
    OF = 2.0        # as if so many tokens had been judged

    def __init__(self, memory: float, assumed: float = ASSUMED):
        """memory: the weight of what was known, with each draft."""
        self.memory = memory
        self.assumed = assumed
        self.right = 0.0
        self.judged = 0.0

    @property
    def share(self) -> float:
        return (self.right + self.OF * self.assumed) / (self.judged + self.OF)

    def judge(self, verified: int, accepted: int):
        self.right = self.memory * self.right + accepted
        self.judged = self.memory * self.judged + min(accepted + 1, verified)


class Length(NamedTuple):
    """How many tokens to draft, and how many tokens that gives more than the same time does without."""

    tokens: int
    gain: float


def chances_of(share: float, count: int) -> tuple[float, ...]:
    """That each of so many tokens and all before it are right; share: that one is if those before it are."""
    return tuple(share ** length for length in range(1, count + 1))


def best_cut(chances: Seq[float], seconds: Seq[float], speed: float = 0.0) -> Length:
    """How much of a draft gives the most tokens a second, none of it if it does not pay.

    chances: that each of its tokens and all before it are right. seconds: what k of them take, with the step
    that verifies them, by k. speed: tokens a second that the sequence has now, with all its sources: what the
    time is worth."""
    speed = max(speed, 1 / seconds[0])
    best = Length(0, 0.0)
    right = 0.0
    for length, (chance, taken_s) in enumerate(zip(chances, seconds[1:]), 1):
        right += chance
        gain = right - speed * (taken_s - seconds[0])
        if gain > best.gain:
            best = Length(length, gain)
    return best


def with_drafting(step_s: Seq[float], draft_s: float) -> list[float]:
    """step_s, and the drafting of k tokens one after the other."""
    return [seconds + count * draft_s for count, seconds in enumerate(step_s)]


def best_speed(chances: Seq[float], seconds: Seq[float]) -> float:
    """The most tokens a second with drafts of one length, or without."""
    return max((1 + sum(chances[:length])) / taken_s for length, taken_s in enumerate(seconds))


class Savings:
    """Seconds that drafts have saved, less what they cost, as measured.

    A small share of the time of all steps may be spent on trying. Where drafts never pay, they so cost no
    more than that."""

    TRIES = 0.02    # of the time of steps
    MOST_S = 1.0    # saved or lost seconds that count, and what may be lost at first

    def __init__(self):
        self.balance_s = self.MOST_S

    def earn(self, step_s: float):
        """Steps have taken so long."""
        self.add(self.TRIES * step_s)

    def add(self, seconds: float):
        self.balance_s = max(min(self.balance_s + seconds, self.MOST_S), -self.MOST_S)


@dataclass
class Watched:
    """What is known of a sequence's drafts."""

    MEMORY = 0.9  # of how fast tokens came

    rate: Rate
    resting: int  # there are none until it has so many tokens
    seen: int     # tokens that it had when drafts were last thought of
    rest: int = 0  # tokens of the last rest
    alone: int = 0     # tokens for which no other source had a draft
    tokens: float = 0.0    # that came lately; the newest count most
    seconds: float = 0.0   # in which they came
    at_s: float = 0.0      # when drafts were last thought of
    guess: Seq[int] = ()   # what was drafted then

    def note(self, length: int, now_s: float):
        """It has so many tokens now."""
        if self.at_s:
            self.tokens = self.MEMORY * self.tokens + length - self.seen
            self.seconds = self.MEMORY * self.seconds + now_s - self.at_s
        self.seen = length
        self.at_s = now_s

    @property
    def speed(self) -> float:
        """Tokens a second; 0.0: not known."""
        return self.tokens / self.seconds if self.seconds else 0.0


class ModelDrafts(EnginePart):
    """The source.

    A sequence whose drafts do not pay rests: one token is drafted after REST more tokens, then after twice as
    many, and so on. Before a second model drafts for a sequence, it has to compute the sequence's tokens. It
    does so if they are few, or if its drafts will save more: in an answer that is as long as the mean of the
    last ones, or that goes on for as long as it already is."""

    LONGEST = 7            # tokens of a draft
    REST = 64              # tokens of the first rest,
    LONGEST_REST = 4096    # and of the longest
    WAIT = 16              # tokens until it is looked again whether computing a sequence is paid for
    LONGEST_WATCHED = 256  # the longest rest during which hidden states are read all the time
    MOST_COMPUTED = 8      # tokens for each sequence in a first step of a draft; with more it has prompts
    MEAN = 64.0            # tokens of an answer for which nothing else drafts, before any has ended,
    MEAN_CHANGE = 0.2      # and the weight of the newest answer in that mean
    MEMORY = 0.9           # of how often drafts of a sequence were right,
    LONG_MEMORY = 0.97     # and those of all
    TOLD_AFTER = 50        # judged drafts before the log says whether they pay, and after each change

    rests = False

    def __init__(self, drafter: Drafter):
        self.drafter = drafter
        self.name = drafter.name
        self.times = Times()            # of the model's steps
        self.size = 1.0                 # of its weights, in those of the model
        self.draft_rows = 1             # in a step of the model, at most
        self.draft_times = StepTimes()  # of a draft's steps, by how many draft
        self.prompt_times = PromptTimes()   # of tokens that it has to compute before it can draft
        self.savings = Savings()
        self.rate = Rate(self.LONG_MEMORY)  # of all sequences
        self.watched: dict[Sequence, Watched] = {}
        self.mean = self.MEAN           # tokens of an answer for which nothing else drafts
        self.beside = 1                 # sequences that were to have drafts last
        self.untold = self.TOLD_AFTER   # drafts until the log says whether they pay
        self.pays: bool | None = None   # what it said last

    def plan_by(self, times: Times, draft_rows: int, weights_bytes: int):
        """Choose lengths by these times of the engine's steps, and by the rows that these may have.
        weights_bytes: of the engine's model."""
        self.times = times
        self.draft_rows = draft_rows
        self.size = self.drafter.transformer.weights_bytes / weights_bytes

    def prepare_steps(self):
        """Record the model's steps, where they can be recorded before they run."""
        self.drafter.runner.prepare(lambda fraction: None)

    def begin(self, sequence: Sequence):
        # it sees no pictures, and drafts nothing after them
        resting = sys.maxsize if sequence.placeholders else 0
        self.watched[sequence] = Watched(Rate(self.MEMORY, self.rate.share), resting, len(sequence.tokens))

    def end(self, sequence: Sequence):
        self.drafter.end(sequence)
        alone = self.watched.pop(sequence).alone
        if alone:
            self.mean += self.MEAN_CHANGE * (alone - self.mean)

    def forget(self):
        self.drafter.followers.forget()

    def judge(self, sequence: Sequence, draft: Draft, verified: int, accepted: int):
        if self.times.rows.measured:
            alone_s, with_s = self.times.rows.expected(self.beside, self.beside + verified)[::verified]
            self.savings.add(accepted * alone_s / self.beside - (with_s - alone_s))

    def _learn(self, watched: Watched, tokens: Seq[int]):
        """Note which of the tokens that were drafted last were right: also of those that were not verified,
        as far as the tokens that came show it."""
        guess = watched.guess
        came = tokens[watched.seen:watched.seen + len(guess)]
        watched.guess = ()
        if guess and came:
            right = next((i for i, pair in enumerate(zip(guess, came)) if pair[0] != pair[1]), len(came))
            for rate in (watched.rate, self.rate):
                rate.judge(len(came), right)
            if right == len(came):
                watched.resting = 0  # it may pay now
            self.untold -= 1
            if self.untold <= 0 and self.times.rows.measured:
                self._tell()

    def _tell(self):
        """Say in the log whether drafts pay, when that has changed."""
        draft_s, step_s = self.times_of(1, self.LONGEST)
        share = self.rate.share
        speed = best_speed(chances_of(share, self.LONGEST), with_drafting(step_s, draft_s)) * step_s[0]
        if (speed > 1) == self.pays:
            return
        self.pays = speed > 1
        self.untold = self.TOLD_AFTER
        known = (f"{self.drafter.title} is right about {share:.0%} of the tokens, and takes "
                 f"{draft_s / step_s[0]:.2f} of the model's time")
        if self.pays:
            log.info("%s: one answer alone is %.2f times as fast with it", known, speed)
        else:
            log.info("%s: too seldom for what it costs, so it is only tried now and then", known)

    def awaits(self, sequence: Sequence) -> bool:
        """Will it soon draft for this sequence, so that steps must not begin ahead?"""
        return sequence.drafts and (
            self.watched[sequence].resting <= len(sequence.tokens) + 3 <= self.drafter.longest)

    def wants_hidden(self, sequence: Sequence) -> bool:
        """Not while drafts have not paid for long."""
        if not sequence.drafts or not self.drafter.reads_hidden or sequence.placeholders:
            return False
        watched = self.watched[sequence]
        return (watched.rest <= self.LONGEST_WATCHED
                or len(sequence.tokens) + self.REST >= watched.resting)

    def read_hidden(self, sequence: Sequence, first: int, count: int, rows: numpy.ndarray):
        if sequence.drafts:
            self.drafter.read_hidden(sequence, first, count, rows)

    def propose(self, sequences: Seq[Sequence]) -> list[Draft]:
        self.beside = max(len(sequences), 1)
        lengths = {sequence: self._length(sequence) for sequence in sequences}
        lengths = {sequence: length for sequence, length in lengths.items() if length}
        began_s = time.monotonic()
        drawn = self.drafter.draft(lengths)
        steps = max(map(len, drawn.values()), default=0)
        if lengths:
            self._note(len(drawn), steps, time.monotonic() - began_s)
        return [self._draft_of(sequence, drawn.get(sequence, ())) for sequence in sequences]

    def _note(self, count: int, steps: int, seconds: float):
        """Drafts of `count` sequences took so long, in so many steps."""
        self.savings.add(-seconds)
        computed = self.drafter.computed
        if steps and computed <= self.MOST_COMPUTED * count:
            self.draft_times.note(count, seconds / steps)
        elif computed > self.MOST_COMPUTED * count:
            known = count and self.draft_times.measured
            draft_s = self.draft_times.expected(count, count)[0] if known else 0.0
            self.prompt_times.note(computed, seconds, steps * draft_s)

    def times_of(self, beside: int, most: int) -> tuple[float, list[float]]:
        """Seconds to draft a token, and those of a step that verifies k tokens, by k up to `most`."""
        step_s = self.times.rows.expected(beside, beside * (most + 1))[::beside]
        measured = self.draft_times.measured
        return self.draft_times.expected(beside, beside)[0] if measured else self.size * step_s[0], step_s

    @property
    def _prompt_token_s(self) -> float:
        return self.prompt_times.token_s or self.size * self.times.token_s

    def _look(self, sequence: Sequence, watched: Watched):
        """Take note of the tokens that came since drafts were last thought of."""
        length = len(sequence.tokens)
        if self.times.rows.measured:
            step_s = self.times.rows.expected(self.beside, self.beside)[0]
            self.savings.earn((length - watched.seen) * step_s / self.beside)
        self._learn(watched, sequence.tokens)
        if not sequence.draft.tokens:
            watched.alone += length - watched.seen
        watched.note(length, time.monotonic())

    def _length(self, sequence: Sequence) -> int:
        """How many tokens to draft for a sequence; 0 if it rests, or if another source has already drafted
        what gives more tokens a second."""
        beside = self.beside
        watched = self.watched[sequence]
        length = len(sequence.tokens)
        rows = self.draft_rows // beside - 1
        most = min(self.LONGEST, rows)
        self._look(sequence, watched)
        if most < 1 or length < watched.resting or not self.times.rows.measured:
            return 0
        there = len(sequence.draft.tokens)
        draft_s, step_s = self.times_of(beside, max(most, min(there, rows)))
        best = best_cut(chances_of(watched.rate.share, most), with_drafting(step_s, draft_s), watched.speed)
        other = best_cut(sequence.draft.chances, step_s, watched.speed)
        if other.gain and other.gain >= best.gain:
            return 0
        behind = self.drafter.behind(sequence)
        cost_s = behind * self._prompt_token_s if behind > self.MOST_COMPUTED else 0.0
        saved_s = 0.0
        if best.tokens:
            saved_s = max(self.mean, watched.alone) * best.gain / (1 + best.gain) * step_s[0]
        else:
            cost_s += draft_s + step_s[1] - step_s[0]
        if cost_s > max(saved_s, self.savings.balance_s, 0.0):
            watched.resting = length + self.WAIT
            return 0
        if not best.tokens:
            watched.rest = min(max(2 * watched.rest, self.REST), self.LONGEST_REST)
            watched.resting = length + watched.rest
            return 1
        watched.rest = 0
        return best.tokens

    def _draft_of(self, sequence: Sequence, tokens: Seq[int]) -> Draft:
        if not tokens:
            return NO_DRAFT
        watched = self.watched[sequence]
        watched.guess = tokens
        return Draft(self.name, tuple(tokens), chances_of(watched.rate.share, len(tokens)),
                     len(sequence.tokens))

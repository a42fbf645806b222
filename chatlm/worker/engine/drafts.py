"""Drafts: tokens that may come next, guessed by several sources, verified in the step that draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence as Seq
from dataclasses import replace
from typing import NamedTuple, Protocol, TYPE_CHECKING

from chatlm.common.messages.requests import DRAFT_SOURCES, DraftCounts, Usage
from chatlm.worker.engine.times import StepTimes, Times

if TYPE_CHECKING:
    from chatlm.worker.engine.limits import StepLimits
    from chatlm.worker.engine.sequence import Sequence


class Draft(NamedTuple):
    """Tokens that may follow a sequence's known ones, by one source."""

    source: str = ""                 # a field of DraftCounts
    tokens: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()  # of each token: the source's estimate that it and all before are right
    at: int = 0                      # the length of the sequence that it continues
    forced: int = 0                  # how many of its first tokens a grammar forces, whoever proposed more

    def first(self, count: int) -> Draft:
        return self._replace(tokens=self.tokens[:count], chances=self.chances[:count])


NO_DRAFT = Draft()


class DraftSource(Protocol):
    """What proposes drafts. A draft is verified by the model's own draws, so no source changes a token.

    `name` is a field of DraftCounts. One that `rests` is asked less often while its drafts do not pay.
    `begin` hears of a sequence when it is queued, `end` once it has ended, failed or been cancelled, `forget`
    that another model needs the memory. `propose` is called between steps with sequences whose tokens are
    all known and of which one is not computed; it returns a draft, or NO_DRAFT, for each. `judge` hears
    afterwards how many of a draft's tokens were verified, and how many of these were right."""

    name: str
    rests: bool

    def begin(self, sequence: Sequence): ...
    def propose(self, sequences: Seq[Sequence]) -> list[Draft]: ...
    def judge(self, sequence: Sequence, draft: Draft, verified: int, accepted: int): ...
    def end(self, sequence: Sequence): ...
    def forget(self): ...


class Acceptance:
    """How often a drafted token was right if all before it were: by its source, by the chance that the source
    gave it, and by its place in the draft."""

    # TRUST: tokens that the source's own estimate counts as
    TRUST = 4.0
    MEMORY = 200.0
    # small chances of being wrong are told apart by their order of magnitude
    BUCKETS = [min(int(-2 * math.log2(1.001 - i / 128)), 14) for i in range(129)]
    PLACES = [0, 1, 2, 3, 3, 3, 3, 3]  # later ones: 4
    LEAST = 0.02                # chance below which a token is not considered

    def __init__(self):
        self.counts: dict[tuple[str, int, int], list[float]] = {}  # [tokens, right ones]; new ones weigh most

    def measured(self, draft: Draft) -> tuple[list[float], list[list[float]]]:
        """The chances of a draft's tokens as measured, and the counts of each; tokens with tiny chances are
        left out."""
        before = 1.0
        chance = 1.0
        chances = []
        found = []
        for i, own in enumerate(draft.chances):
            share = min(own / before, 1.0)
            before = own
            source = draft.source if i >= draft.forced else Forced.name
            key = source, self.BUCKETS[int(share * 128)], self.PLACES[i] if i < 8 else 4
            if (counts := self.counts.get(key)) is None:
                counts = self.counts[key] = [0.0, 0.0]
            chance *= (counts[1] + self.TRUST * share) / (counts[0] + self.TRUST)
            if chance < self.LEAST and chances:
                break
            chances.append(chance)
            found.append(counts)
        return chances, found

    def note(self, found: list[list[float]], right: int, known: int):
        """The first `right` of a draft's first `known` tokens were right; at most one was not."""
        for i, counts in enumerate(found[:known]):
            if counts[0] >= self.MEMORY:
                counts[:] = counts[0] * 0.75, counts[1] * 0.75
            counts[0] += 1
            counts[1] += i < right


class DraftRecord:
    """What drafts gave one sequence, against what was expected of them."""

    MEMORY = 0.9
    PRIOR = 2.0

    def __init__(self):
        self.proposed = NO_DRAFT               # the newest draft, before it was cut
        self.chances: list[float] = []         # of its tokens, as measured for all sequences
        self.counts: list[list[float]] = []    # see Acceptance.measured
        self.pause = 0       # tokens for which sources that rest are not asked after the last miss
        self.asked_again = 0  # the length of the sequence from which on they are asked
        self.expected = 0.0  # tokens that were expected to be right; the newest count most
        self.right = 0.0     # tokens that were

    @property
    def factor(self) -> float:
        return min((self.PRIOR + self.right) / (self.PRIOR + self.expected), 1.25)

    def rest(self, length: int, longest: int):
        """No draft of a sequence of this length paid: rest twice as long as the last time, at most `longest`
        tokens."""
        self.pause = min(2 * self.pause + 1, longest)
        self.asked_again = length + 1 + self.pause

    def note(self, expected: float, right: int):
        self.expected = self.MEMORY * self.expected + expected
        self.right = self.MEMORY * self.right + right


def can_draft(sequence: Sequence) -> bool:
    """Can its next tokens be drafted? The sources must know it, only its newest token may be pending, and its
    text and grammar must be ready."""
    return sequence.drafts and not sequence.finished and sequence.pending == 1 and sequence.output.ready


def joined(forced: Draft, draft: Draft) -> Draft:
    """The forced tokens, followed by the rest of another draft of the same sequence if it begins with
    them."""
    count = len(forced.tokens)
    if draft.tokens[:count] != forced.tokens or len(draft.tokens) == count:
        return forced
    factor = forced.chances[-1] / draft.chances[count - 1]
    return draft._replace(chances=(*forced.chances, *(chance * factor for chance in draft.chances[count:])),
                          forced=count)


class Forced:
    """What a grammar leaves no choice about."""

    name = "forced"
    rests = False
    CHANCE = 0.99

    def begin(self, sequence: Sequence): ...
    def judge(self, sequence: Sequence, draft: Draft, verified: int, accepted: int): ...
    def end(self, sequence: Sequence): ...
    def forget(self): ...

    def propose(self, sequences: Seq[Sequence]) -> list[Draft]:
        return [self._draft(sequence) for sequence in sequences]

    def _draft(self, sequence: Sequence) -> Draft:
        grammar = sequence.output.grammar
        tokens = grammar.forced() if grammar else []
        chances = tuple(self.CHANCE ** (i + 1) for i in range(len(tokens)))
        return Draft(self.name, tuple(tokens), chances, len(sequence.tokens)) if tokens else NO_DRAFT


def fitting(sequence: Sequence, draft: Draft) -> Draft:
    """As much of a draft as the sequence's grammar allows."""
    grammar = sequence.output.grammar
    return draft.first(grammar.fitting(draft.tokens)) if grammar and draft.tokens else draft


def tokens_of(draft: Draft, vocab_end: int | None) -> Draft:
    """The draft up to its first id that is no token: texts may contain ids of rows of pictures."""
    if vocab_end is None or not draft.tokens or max(draft.tokens) < vocab_end:
        return draft
    return draft.first(next(i for i, token in enumerate(draft.tokens) if token >= vocab_end))


def by_source(draft: Draft, count: int) -> DraftCounts:
    """The first `count` tokens of a draft, by who proposed them."""
    counts = DraftCounts(forced=min(count, draft.forced))
    rest = count - counts.forced
    return counts + replace(DraftCounts(), **{draft.source: rest}) if rest else counts


class Drafting:
    """Asks the sources, keeps the best draft of each sequence, cuts it to what pays, and counts what was
    drafted and accepted.

    A drafted token pays if a step that also verifies it gives more tokens a second: if the chance that it and
    all before it are right outweighs the time of one more row. Both are measured. So is a draft that was not
    verified: the tokens that come show whether it was right."""

    LONGEST_PAUSE = 31  # tokens; and at most twice as many as a step has other rows

    def __init__(self, sources: Iterable[DraftSource], times: Times | None = None,
                 vocab_end: int | None = None):
        """vocab_end: ids from here on stand for rows of pictures; None: there are none."""
        self.sources = {source.name: source for source in sources}
        self.drafted = DraftCounts()
        self.accepted = DraftCounts()
        self.acceptance = Acceptance()
        self.times = times or Times()
        self.records: dict[Sequence, DraftRecord] = {}
        self.vocab_end = vocab_end

    def gauges(self) -> dict[str, float]:
        """Tokens that were drafted and accepted, in all and by source."""
        gauges: dict[str, float] = {}
        for name, counts in (("drafted", self.drafted), ("accepted", self.accepted)):
            gauges[f"{name}_tokens"] = counts.total
            for source in DRAFT_SOURCES:
                gauges[f"{name}_{source}"] = getattr(counts, source)
        return gauges

    def begin(self, sequence: Sequence):
        sequence.drafts = True
        self.records[sequence] = DraftRecord()
        for source in self.sources.values():
            source.begin(sequence)

    def end(self, sequence: Sequence):
        """The sequence has ended, however it did; it may have had no drafts."""
        if sequence.drafts:
            sequence.drafts = False
            del self.records[sequence]
            for source in self.sources.values():
                source.end(sequence)

    def forget(self):
        """Forget what ended sequences have said."""
        for source in self.sources.values():
            source.forget()

    def draft(self, sequences: Iterable[Sequence], running: Seq[Sequence], limits: StepLimits):
        """Set the drafts of those of these sequences that can have one, for the next step of what runs. Those
        in the background have drafts only while nothing else runs."""
        interactive = [sequence for sequence in running if not sequence.work.background]
        able = [sequence for sequence in sequences
                if can_draft(sequence) and not (interactive and sequence.work.background)]
        if not able:
            return
        answers = [sequence for sequence in interactive or running if not sequence.pooling]
        rows = -(-len(answers) // limits.stages)
        on_host = any(sequence.needs_logits for sequence in answers)
        self.propose(able, rows, limits.draft_rows, on_host)

    def propose(self, sequences: Seq[Sequence], rows: int, most: int, on_host: bool = False):
        """Set the drafts of these sequences: the one that is worth most, cut to what pays by itself. The time
        of prompts in the same step does not count: their answers would wait for rows that seem to be cheap
        beside it.

        rows: of the step without drafts; it may have at most `most` with them. on_host: does the host need
        its logits?"""
        for sequence in sequences:
            sequence.draft = NO_DRAFT
        forced: dict[Sequence, Draft] = {}
        awake = [sequence for sequence in sequences
                 if len(sequence.tokens) >= self.records[sequence].asked_again]
        for source in self.sources.values() if sequences else ():
            asked = awake if source.rests else sequences
            for sequence, draft in zip(asked, source.propose(asked)):
                if source.name == Forced.name:
                    forced[sequence] = draft
                elif forced.get(sequence, NO_DRAFT).tokens:
                    draft = joined(forced[sequence], draft)
                self._consider(sequence, fitting(sequence, tokens_of(draft, self.vocab_end)))
        drafts = [sequence.draft for sequence in sequences]
        counts = self._counts(drafts, self.times.of(on_host), rows, most)
        for sequence, draft, count in zip(sequences, drafts, counts):
            sequence.draft = draft.first(count)
        self._rest(awake, rows)

    def _rest(self, asked: Seq[Sequence], rows: int):
        """Ask less often for drafts of those of these sequences that have got none. Asking takes time from a
        step, the more so the more sequences there are, while fewer of their drafts pay."""
        for sequence in asked:
            record = self.records[sequence]
            if sequence.draft.tokens:
                record.pause = 0
            else:
                record.rest(len(sequence.tokens), min(2 * (rows - 1), self.LONGEST_PAUSE))

    def _consider(self, sequence: Sequence, draft: Draft):
        """Make it the sequence's draft if its tokens are likelier than as many of that one's, as measured: a
        row costs the same, whoever drafted it. Later sources see it."""
        if not draft.tokens:
            return
        record = self.records[sequence]
        chances, counts = self.acceptance.measured(draft)
        factor = record.factor
        measured = draft._replace(tokens=draft.tokens[:len(chances)],
                                  chances=tuple(min(factor * chance, 0.99) for chance in chances))
        if sum(measured.chances) > sum(sequence.draft.chances[:len(measured.tokens)]):
            record.proposed = draft
            record.chances = chances
            record.counts = counts
            sequence.draft = measured

    def _counts(self, drafts: list[Draft], step_times: StepTimes, rows: int, most: int) -> list[int]:
        """How many tokens of each draft to verify, so that the step gives the most tokens a second."""
        ranked = []  # the likeliest tokens first: (chance, -place in its draft, draft)
        for j, draft in enumerate(drafts):
            for i, chance in enumerate(draft.chances):
                ranked.append((chance, -i, j))
        ranked = sorted(ranked, reverse=True)[:max(most - rows, 0)]
        counts = [0] * len(drafts)
        if not ranked:
            return counts
        times = step_times.expected(rows, rows + len(ranked))
        tokens = float(rows)
        best = rows / times[0]
        chosen = 0
        for count, (chance, _, _) in enumerate(ranked, 1):
            tokens += chance
            rate = tokens / times[count]
            if rate > best:
                best = rate
                chosen = count
        for _, _, j in ranked[:chosen]:
            counts[j] += 1
        return counts

    def judge(self, sequence: Sequence, verified: int, accepted: int, came: Seq[int]):
        """So many tokens of the sequence's draft were verified, and so many of these were right. came: the
        tokens that the sequence got, which also show whether the rest of a cut draft was right."""
        record = self.records[sequence]
        proposed = record.proposed
        if proposed.tokens and proposed.at + len(came) == len(sequence.tokens):
            self._measure(record, came)
        record.proposed = NO_DRAFT
        if not verified:
            return
        draft = sequence.draft
        self.sources[draft.source].judge(sequence, draft, verified, accepted)
        drafted = by_source(draft, verified)
        right = by_source(draft, accepted)
        self.drafted = self.drafted + drafted
        self.accepted = self.accepted + right
        sequence.output.usage += Usage(drafted=drafted, accepted=right)

    def _measure(self, record: DraftRecord, came: Seq[int]):
        """Note which of a draft's first tokens were right, as far as the tokens that came show it."""
        known = 0
        right = 0
        for token, guess in zip(came, record.proposed.tokens[:len(record.chances)]):
            known += 1
            if token != guess:
                break
            right += 1
        self.acceptance.note(record.counts, right, known)
        record.note(sum(record.chances[:known]), right)

"""Drafts: tokens that may come next, guessed by several sources, verified in the step that draws them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Seq
from dataclasses import replace
from typing import NamedTuple, Protocol, TYPE_CHECKING

from chatlm.common.messages.requests import DraftCounts, Usage

if TYPE_CHECKING:
    from chatlm.worker.engine.sequence import Sequence


class Draft(NamedTuple):
    """Tokens that may follow a sequence's known ones, by one source."""

    source: str = ""                 # a field of DraftCounts
    tokens: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()  # of each token: the source's estimate that it and all before are right
    at: int = 0                      # the length of the sequence that it continues

    @property
    def worth(self) -> float:
        """How many of its tokens are right, on average, by its own estimate."""
        return sum(self.chances)

    def first(self, count: int) -> Draft:
        return self._replace(tokens=self.tokens[:count], chances=self.chances[:count])


NO_DRAFT = Draft()


class Source(Protocol):
    """What proposes drafts. A draft is verified by the model's own draws, so no source changes a token.

    `name` is a field of DraftCounts. `begin` hears of a sequence when it is queued, `end` once it has ended,
    failed or been cancelled. `propose` is called between steps with sequences whose tokens are all known and
    of which one is not computed; it returns a draft, or NO_DRAFT, for each. `judge` hears afterwards how many
    of a draft's tokens were verified, and how many of these were right."""

    name: str

    def begin(self, sequence: Sequence): ...
    def propose(self, sequences: Seq[Sequence]) -> list[Draft]: ...
    def judge(self, sequence: Sequence, draft: Draft, verified: int, accepted: int): ...
    def end(self, sequence: Sequence): ...


class Repeats:
    """What followed the last tokens of one text when they last occurred; pauses if often wrong.

    (Saxena, "Prompt Lookup Decoding", 2023.) Costs one dictionary entry per token; no model."""

    LENGTH, LONGEST = 3, 7  # tokens that must recur; tokens proposed
    PATIENCE = 64           # tokens without a proposal after too many wrong proposals

    def __init__(self, tokens: list[int]):
        self.tokens = tokens                        # the sequence's own list
        self.ends: dict[tuple[int, ...], int] = {}  # LENGTH tokens -> where they last ended
        self.seen = self.LENGTH                     # tokens already in `ends`
        self.right, self.silent_until = 0.5, 0  # right: share of proposals with a right first token

    def propose(self) -> list[int]:
        """Tokens that may come next; call it after every token."""
        tokens, n = self.tokens, self.LENGTH
        for end in range(self.seen, len(tokens)):
            self.ends[tuple(tokens[end - n:end])] = end
        self.seen = max(self.seen, len(tokens))
        last = self.ends.get(tuple(tokens[-n:]))
        return tokens[last:last + self.LONGEST] if last and len(tokens) >= self.silent_until else []

    def judge(self, accepted: int):
        self.right += 0.2 * ((accepted > 0) - self.right)
        if self.right < 0.25:
            self.right, self.silent_until = 0.4, len(self.tokens) + self.PATIENCE


class Lookup:
    """Looks up what followed the last tokens before, in the text of the sequence itself."""

    name = "lookup"

    def __init__(self):
        self.repeats: dict[Sequence, Repeats] = {}

    def begin(self, sequence: Sequence):
        self.repeats[sequence] = Repeats(sequence.tokens)

    def propose(self, sequences: Seq[Sequence]) -> list[Draft]:
        return [self._draft(sequence) for sequence in sequences]

    def _draft(self, sequence: Sequence) -> Draft:
        repeats = self.repeats[sequence]
        tokens = tuple(repeats.propose())
        chances = tuple(repeats.right ** (i + 1) for i in range(len(tokens)))
        return Draft(self.name, tokens, chances, len(sequence.tokens)) if tokens else NO_DRAFT

    def judge(self, sequence: Sequence, draft: Draft, verified: int, accepted: int):
        self.repeats[sequence].judge(accepted)

    def end(self, sequence: Sequence):
        self.repeats.pop(sequence, None)


def can_draft(sequence: Sequence) -> bool:
    """Can its next tokens be drafted: is it known to the sources, is only its newest token not computed, and
    does nothing need the logits or the text of each token in turn?"""
    return (sequence.drafts and not sequence.finished and sequence.pending == 1 and sequence.output.ready
            and not sequence.needs_logits)


class Drafting:
    """Asks the sources, keeps the best draft of each sequence, and counts what was drafted and accepted."""

    def __init__(self, sources: Iterable[Source]):
        self.sources = {source.name: source for source in sources}
        self.drafted, self.accepted = DraftCounts(), DraftCounts()

    def begin(self, sequence: Sequence):
        sequence.drafts = True
        for source in self.sources.values():
            source.begin(sequence)

    def end(self, sequence: Sequence):
        """The sequence has ended, however it did; it may have had no drafts."""
        if sequence.drafts:
            sequence.drafts = False
            for source in self.sources.values():
                source.end(sequence)

    def propose(self, sequences: Seq[Sequence]):
        """Set the draft of each: the one that its source thinks worth most."""
        for sequence in sequences:
            sequence.draft = NO_DRAFT
        for source in self.sources.values() if sequences else ():
            for sequence, draft in zip(sequences, source.propose(sequences)):
                sequence.draft = max(sequence.draft, draft, key=lambda each: each.worth)

    def judge(self, sequence: Sequence, verified: int, accepted: int):
        """Of the sequence's draft so many tokens were verified, and so many of these were right."""
        draft = sequence.draft
        self.sources[draft.source].judge(sequence, draft, verified, accepted)
        drafted, right = (replace(DraftCounts(), **{draft.source: count}) for count in (verified, accepted))
        self.drafted, self.accepted = self.drafted + drafted, self.accepted + right
        sequence.output.usage += Usage(drafted=drafted, accepted=right)

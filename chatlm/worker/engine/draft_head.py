"""The draft head that a model ships with (MTP), as a drafter: it reads the model's hidden states.

Its entry p is of (h_{p-1}, token p), h being the model's state after its final norm, h_{-1} = 0: a first step
computes the entries of all tokens that are known, with the true states, and drafts the next token; each
further one is drafted from the head's own state h' in place of h. Those entries are computed again later.

After a step the states are read before the next one starts. Where they are missing (the model found a prefix
in its cache, of which the head has no entries) they count as zeros: drafts are then a little less often
right, and such pages are shared with nobody."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

import numpy

from chatlm.worker.engine.batch import sample_row
from chatlm.worker.engine.draft_model import Followers
from chatlm.worker.model.batch import Batch

if TYPE_CHECKING:
    from chatlm.worker.engine.sequence import Sequence
    from chatlm.worker.model.transformer import Transformer
    from chatlm.worker.ops.rows import SampleRow


class Shown(NamedTuple):
    """A sequence's hidden states (n, C) float32 at the positions from `first` on."""

    first: int
    rows: numpy.ndarray

    def then(self, first: int, rows: numpy.ndarray) -> Shown:
        """With later ones, which replace those of wrong drafts; alone if they do not follow these."""
        if not self.first <= first <= self.first + len(self.rows):
            return Shown(first, rows)
        return Shown(self.first, numpy.concatenate([self.rows[:first - self.first], rows]))

    def span(self, begin: int, end: int) -> numpy.ndarray:
        """Those at positions [begin, end), zeros where they are missing."""
        found = numpy.zeros((end - begin, self.rows.shape[1]), numpy.float32)
        low = max(begin, self.first)
        high = min(end, self.first + len(self.rows))
        if low < high:
            found[low - begin:high - begin] = self.rows[low - self.first:high - self.first]
        return found


class Part(NamedTuple):
    """Entries [begin, end) of a sequence, to be computed in a step of the head."""

    own: Sequence
    begin: int
    end: int
    states: numpy.ndarray  # (end - begin, C): h of the position before each
    token_ids: list[int]
    draws: bool = False


class DraftHead:
    """Drafts with a model's own head, for several sequences together in a batch."""

    name = "mtp"
    sees_states = True
    MOST_SHOWN = 16  # states that wait for the next draft; a step of the head computes more at once

    def __init__(self, transformer: Transformer, *, num_pages: int, max_batch: int, prefill_chunk: int,
                 stop_tokens: frozenset[int]):
        self.transformer = transformer
        self.followers = Followers(num_pages)
        self.stop_tokens = stop_tokens
        self.prefill_chunk = prefill_chunk
        self.max_rows = len(transformer.buffers["logits"])
        self.longest = min(transformer.model.max_positions, num_pages * self.followers.pool.page_size)
        self.steps = transformer.kernels.backend.make_steps(transformer, max_batch, self.longest)
        self.shown: dict[Sequence, Shown] = {}
        self.computed = 0
        self.gaps = itertools.count()

    def line(self) -> str:
        """What a start says of it."""
        pool = self.followers.pool
        transformer = self.transformer
        cache_bytes = pool.num_pages * transformer.layout.page_bytes
        return f"Draft head: one layer; KV cache: {pool.num_pages:,} pages ({cache_bytes / 2**20:,.0f} MiB)"

    def end(self, sequence: Sequence):
        self.followers.release(sequence)
        self.shown.pop(sequence, None)

    def see(self, sequence: Sequence, first: int, count: int, rows: numpy.ndarray):
        """The model's states (n, C) at the positions from `first` on, of `count` tokens and of a draft, whose
        last ones may be wrong."""
        rows = rows.astype(numpy.float32)
        shown = self.shown.get(sequence)
        self.shown[sequence] = shown = shown.then(first, rows) if shown else Shown(first, rows)
        if len(shown.rows) <= self.MOST_SHOWN:
            return
        own = self._own(sequence)
        while own.computed < first + count and (part := self._part(sequence, own, first + count)):
            self._compute([part], [])
            self.followers.tables.advance(own, part.end - part.begin)
        needed = max(first + count, own.computed) - 1  # without pages the others are lost
        self.shown[sequence] = Shown(needed, shown.rows[needed - shown.first:])

    def _own(self, sequence: Sequence) -> Sequence:
        """The sequence with pages of the head's pool; states differ with its adapter, and so do entries."""
        return self.followers.follow(sequence, sequence.work, of_adapter=True).own

    def _part(self, sequence: Sequence, own: Sequence, known: int) -> Part | None:
        """The next entries of a sequence, up to `known` tokens; None if they cannot be computed."""
        begin = own.computed
        end = min(known, own.computed + self.prefill_chunk)
        if begin >= end or end > self.longest or not self.followers.grow(own, end):
            return None
        shown = self.shown[sequence]
        if shown.first > max(begin, 1):  # the prefix of nobody else
            own.serial = f"\0gap {next(self.gaps)}"
        return Part(own, begin, end, shown.span(begin - 1, end - 1), own.tokens[begin:end])

    def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Draft up to so many tokens for each of these sequences, whose tokens must all be known, and whose
        states up to the last token but one have been seen."""
        self.followers.release_waiting()
        found = {}
        left = self.prefill_chunk
        drafting: list[tuple[Sequence, Part, int]] = []
        for sequence, length in wanted.items():
            if follower := self.followers.guessed(sequence):
                found[sequence] = self._useful(follower.guess)
                continue
            known = len(sequence.tokens)
            length = min(length, sequence.limit - known - 1, self.longest - known)
            shown = self.shown.get(sequence)
            if length < 1 or len(drafting) == self.max_rows or shown is None or (
                    shown.first + len(shown.rows) < known - 1):
                continue
            part = self._part(sequence, self._own(sequence), known)
            if part and part.end == known and (size := known - part.begin) <= left and self.followers.grow(
                    part.own, known + length - 1):
                left -= size
                drafting.append((sequence, part._replace(draws=True), length))
        drafting.sort(key=lambda planned: len(planned[1].token_ids) > 1)
        drawn = self._draw([part for _, part, _ in drafting], [length for *_, length in drafting])
        for (sequence, part, _), tokens in zip(drafting, drawn):
            follower = self.followers.of[sequence]
            follower.begin = part.end
            follower.guess = tokens
            found[sequence] = self._useful(tokens)
        return found

    def _useful(self, tokens: list[int]) -> list[int]:
        """The draft up to its first stop token."""
        stop = next((i for i, token in enumerate(tokens) if token in self.stop_tokens), len(tokens))
        return tokens[:stop + 1]

    def _draw(self, parts: list[Part], lengths: Seq[int]) -> list[list[int]]:
        """Compute the parts, each of which draws a token, and then, from the head's own states, a token at a
        time of those that are longer; returns what each drew."""
        drawn: list[list[int]] = [[] for _ in parts]
        self.computed = sum(len(part.token_ids) for part in parts)
        members = [*range(len(parts))]
        for ahead in range(max(lengths, default=0)):
            rows = [sample_row(parts[i].own, self.stop_tokens, ahead) for i in members]
            tokens = self._compute([parts[i] for i in members], rows)
            states = self.transformer.hidden_states(0, len(members), "last").astype(numpy.float32)
            for place, (i, token) in enumerate(zip(members, tokens)):
                if not ahead:
                    self.followers.tables.advance(parts[i].own, parts[i].end - parts[i].begin)
                drawn[i].append(token)
                parts[i] = parts[i]._replace(begin=parts[i].end, end=parts[i].end + 1, token_ids=[token],
                                             states=states[place:place + 1])
            members = [i for i in members if lengths[i] > ahead + 1]
        return drawn

    def _compute(self, parts: Seq[Part], rows: Seq[SampleRow]) -> list[int]:
        """A step of the head; returns what it drew: a token for each part that draws, as `rows` say."""
        batch = Batch([], [], [0], [], [], [])
        transformer = self.transformer
        for part in parts:
            batch.token_ids.extend(part.token_ids)
            batch.previous_token_ids.extend([-1, *part.token_ids[:-1]])
            batch.starts.append(len(batch.token_ids))
            batch.lengths.append(part.end)
            batch.tables.append(part.own.pages)
            if part.draws:
                batch.logit_rows.append(len(batch.token_ids) - 1)
        given = transformer.arrays.numpy(transformer.buffers["x"][:len(batch.token_ids)])
        states = numpy.concatenate([part.states for part in parts])
        given[:, :states.shape[1]] = states
        given[:, states.shape[1]:] = 0.0
        return self.steps.finish(self.steps.start(batch, rows))

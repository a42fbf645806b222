"""The draft head that a model ships with (MTP), as a drafter: it reads the model's hidden states.

It computes an entry for each token: that of token p is of (h_{p-1}, token p), h being the model's hidden
state after its final norm, and h_{-1} = 0. A first step computes the entries of all known tokens, with the
true states, and drafts the next token. Each further token is drafted from the head's own state h' in place of
h; those entries are computed again later.

After a step of the model its hidden states are read before the next one starts. Where they are missing (the
model found a prefix in its cache, of which the head has no entries) they count as zeros: drafts are then a
little less often right, and such pages are shared with nobody."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

import numpy

from chatlm.worker.engine.batching import sample_row
from chatlm.worker.engine.draft_model import Followers
from chatlm.worker.model.batch import Batch

if TYPE_CHECKING:
    from chatlm.worker.engine.sequence import Sequence
    from chatlm.worker.model.transformer import Transformer
    from chatlm.worker.ops.rows import SampleRow


class KnownRows(NamedTuple):
    """A sequence's hidden states (n, C) float32 at the positions from `first` on."""

    first: int
    rows: numpy.ndarray

    def then(self, first: int, rows: numpy.ndarray) -> KnownRows:
        """With later ones, which replace those of wrong drafts; alone if they do not follow these."""
        if not self.first <= first <= self.first + len(self.rows):
            return KnownRows(first, rows)
        return KnownRows(self.first, numpy.concatenate([self.rows[:first - self.first], rows]))

    def span(self, begin: int, end: int) -> numpy.ndarray:
        """Those at positions [begin, end), zeros where they are missing."""
        found = numpy.zeros((end - begin, self.rows.shape[1]), numpy.float32)
        low = max(begin, self.first)
        high = min(end, self.first + len(self.rows))
        if low < high:
            found[low - begin:high - begin] = self.rows[low - self.first:high - self.first]
        return found


class Entries(NamedTuple):
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
    title = "the draft head"
    reads_hidden = True
    MOST_WAITING = 16  # states that wait for the next draft; a step of the head computes more at once

    def __init__(self, transformer: Transformer, *, num_pages: int, max_batch: int, prefill_chunk: int,
                 stop_tokens: frozenset[int]):
        self.transformer = transformer
        self.followers = Followers(num_pages)
        self.stop_tokens = stop_tokens
        self.prefill_chunk = prefill_chunk
        self.max_rows = len(transformer.buffers["logits"])
        self.longest = min(transformer.model.max_positions, num_pages * self.followers.pool.page_size)
        self.runner = transformer.kernels.backend.make_runner(transformer, max_batch, self.longest)
        self.hidden: dict[Sequence, KnownRows] = {}
        self.computed = 0
        self.gaps = itertools.count()

    def line(self) -> str:
        """What a start says of it."""
        pool = self.followers.pool
        transformer = self.transformer
        cache_bytes = pool.num_pages * transformer.layout.page_bytes
        return f"Draft head: one layer; KV cache: {pool.num_pages:,} pages ({cache_bytes / 2**20:,.0f} MiB)"

    def behind(self, sequence: Sequence) -> int:
        """It computes its entries as hidden states come."""
        return 0

    def end(self, sequence: Sequence):
        self.followers.release(sequence)
        self.hidden.pop(sequence, None)

    def read_hidden(self, sequence: Sequence, first: int, count: int, rows: numpy.ndarray):
        """The model's states (n, C) at the positions from `first` on: of `count` tokens and of a draft, whose
        last ones may be wrong."""
        rows = rows.astype(numpy.float32)
        before = self.hidden.get(sequence)
        known = before.then(first, rows) if before else KnownRows(first, rows)
        self.hidden[sequence] = known
        if len(known.rows) <= self.MOST_WAITING:
            return
        own = self._own(sequence)
        while own.computed < first + count and (part := self._part(sequence, own, first + count)):
            self._compute([part], [])
            self.followers.tables.advance(own, part.end - part.begin)
        needed = max(first + count, own.computed) - 1  # without pages the others are lost
        self.hidden[sequence] = KnownRows(needed, known.rows[needed - known.first:])

    def _own(self, sequence: Sequence) -> Sequence:
        """The sequence with pages of the head's pool; states differ with its adapter, and so do entries."""
        return self.followers.follow(sequence, sequence.work, of_adapter=True).own

    def _part(self, sequence: Sequence, own: Sequence, known: int) -> Entries | None:
        """The next entries of a sequence, up to `known` tokens; None if they cannot be computed."""
        begin = own.computed
        end = min(known, own.computed + self.prefill_chunk)
        if begin >= end or end > self.longest or not self.followers.grow(own, end):
            return None
        known_rows = self.hidden[sequence]
        if known_rows.first > max(begin, 1):  # nobody may share a prefix whose states were missing
            own.serial = f"\0gap {next(self.gaps)}"
        return Entries(own, begin, end, known_rows.span(begin - 1, end - 1), own.tokens[begin:end])

    def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Draft up to so many tokens for each of these sequences, whose tokens must all be known, and whose
        states up to the last token but one have been read."""
        self.followers.release_waiting()
        drafts: dict[Sequence, list[int]] = {}
        drafting: list[tuple[Sequence, Entries, int]] = []
        left = self.prefill_chunk
        for sequence, length in wanted.items():
            follower = self.followers.with_guess(sequence)
            if follower:
                drafts[sequence] = self._useful(follower.guess)
                continue
            known = len(sequence.tokens)
            length = min(length, sequence.limit - known - 1, self.longest - known)
            if length < 1 or len(drafting) == self.max_rows:
                continue
            part = self._last_entries(sequence, length, left)
            if part:
                left -= len(part.token_ids)
                drafting.append((sequence, part, length))
        drafting.sort(key=lambda planned: len(planned[1].token_ids) > 1)
        drawn = self._draw([part for _, part, _ in drafting], [length for *_, length in drafting])
        for (sequence, part, _), tokens in zip(drafting, drawn):
            follower = self.followers.of[sequence]
            follower.begin = part.end
            follower.guess = tokens
            drafts[sequence] = self._useful(tokens)
        return drafts

    def _last_entries(self, sequence: Sequence, length: int, most: int) -> Entries | None:
        """The entries up to a sequence's last token, from which `length` tokens can be drafted; None if its
        states are not known, or if there are more than `most` entries or no pages for them."""
        known = len(sequence.tokens)
        rows = self.hidden.get(sequence)
        if rows is None or rows.first + len(rows.rows) < known - 1:
            return None
        part = self._part(sequence, self._own(sequence), known)
        if part is None or part.end != known or known - part.begin > most:
            return None
        return part._replace(draws=True) if self.followers.grow(part.own, known + length - 1) else None

    def _useful(self, tokens: list[int]) -> list[int]:
        """The draft up to its first stop token."""
        stop = next((i for i, token in enumerate(tokens) if token in self.stop_tokens), len(tokens))
        return tokens[:stop + 1]

    def _draw(self, parts: list[Entries], lengths: Seq[int]) -> list[list[int]]:
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

    def _compute(self, parts: Seq[Entries], rows: Seq[SampleRow]) -> list[int]:
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
        return self.runner.finish(self.runner.start(batch, rows))

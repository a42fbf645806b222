"""A second, smaller model that drafts for the first: its tables of pages, and the steps that draft.

It draws with the request's own parameters and noise, which depends on seed, position and token id. So at any
temperature a draft is right wherever the noisy logits of both models have the same maximum: with a
probability of at least (1 - TV) / (1 + TV), TV being the distance of the two distributions (Daliri, Musco,
Suresh, "Coupling without communication and drafter-invariant speculative decoding", 2024).

Its pages are its own. They follow a sequence: its prompt is computed in chunks once the sequence decodes.
Where the sequence got other tokens than were drafted, the keys and values of these are overwritten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from chatlm.worker.engine.batching import make_batch, sample_row
from chatlm.worker.engine.kvcache import PagePool, PageTables
from chatlm.worker.engine.sequence import Chunk, Sequence
from chatlm.worker.model.batch import Batch

if TYPE_CHECKING:
    import numpy
    from collections.abc import Sequence as Seq
    from chatlm.worker.engine.sequence import Assignment
    from chatlm.worker.model.transformer import Transformer


@dataclass(eq=False)
class Follower:
    """A sequence as a drafting model sees it. `own` has the same tokens, and pages of that model's pool."""

    own: Sequence
    guess: list[int] = field(default_factory=list)  # the tokens that were drafted last,
    begin: int = 0                                  # from this position on


class Followers:
    """Which pages of a drafting model's pool have the keys and values of which sequence."""

    def __init__(self, num_pages: int):
        self.pool = PagePool(num_pages)
        self.tables = PageTables(self.pool)
        self.of: dict[Sequence, Follower] = {}

    def follow(self, sequence: Sequence, work: Assignment, of_adapter: bool = False) -> Follower:
        """The follower of a sequence. A new one begins with the longest prefix that has pages here.

        of_adapter: do pages depend on the sequence's adapter?"""
        follower = self.of.get(sequence)
        if follower:
            return follower
        own = Sequence(work, sequence.tokens, sequence.limit)
        if of_adapter:
            own.adapter = sequence.adapter
            own.adapter_digest = sequence.adapter_digest
        own.pages, own.serial = self.pool.match_prefix(own.tokens, own.root)
        own.filled = len(own.pages)
        own.computed = own.filled * self.pool.page_size
        follower = Follower(own)
        self.of[sequence] = follower
        return follower

    def with_guess(self, sequence: Sequence) -> Follower | None:
        """The follower of a sequence if it has already drafted the tokens that come next."""
        follower = self.of.get(sequence)
        if follower and follower.guess and follower.begin == len(sequence.tokens):
            return follower
        return None

    def settle(self, follower: Follower):
        """Count drafted tokens that turned out right as computed. The last one drafted never was; the last
        token of the sequence is computed again, since its logits are needed."""
        own = follower.own
        guess = follower.guess[:-1]
        known = own.tokens[follower.begin:len(own.tokens) - 1]
        right = next((i for i, (token, guessed) in enumerate(zip(known, guess)) if token != guessed),
                     min(len(known), len(guess)))
        follower.guess = []
        if right:
            self.tables.advance(own, right)

    def grow(self, own: Sequence, length: int) -> bool:
        """Give it pages for so many tokens; False if they are not free."""
        rows = -(-length // self.pool.page_size)
        missing = self.tables.missing(own, rows, rows)
        if not missing:
            return True
        pages = self.pool.allocate(len(missing))
        if pages is None:
            return False
        self.tables.fill(own, missing, pages, rows)
        return True

    def release(self, sequence: Sequence):
        """Give back the pages of a sequence, if it has any here."""
        if follower := self.of.pop(sequence, None):
            self.tables.release(follower.own)

    def release_waiting(self):
        """Give back the pages of sequences that were preempted."""
        for sequence in [sequence for sequence in self.of if not sequence.pages]:
            self.release(sequence)

    def forget(self):
        """Forget everything computed: a step has failed, or its memory was given back."""
        for follower in self.of.values():
            self.tables.release(follower.own)
        self.of.clear()
        self.pool.forget_cached()


class DraftModel:
    """Drafts with a model of its own, for several sequences in a batch: k tokens in k small steps."""

    name = "model"
    reads_hidden = False

    def __init__(self, transformer: Transformer, *, num_pages: int, max_batch: int, prefill_chunk: int,
                 vocab_size: int, stop_tokens: frozenset[int], called: str = ""):
        """vocab_size, stop_tokens: of the model that it drafts for."""
        self.called = called
        self.transformer = transformer
        self.followers = Followers(num_pages)
        self.vocab_size = vocab_size
        self.stop_tokens = stop_tokens
        self.prefill_chunk = prefill_chunk
        self.max_rows = len(transformer.buffers["logits"])
        self.longest = min(transformer.model.max_positions, num_pages * self.followers.pool.page_size)
        self.runner = transformer.kernels.backend.make_runner(transformer, max_batch, self.longest)
        self.computed = 0  # tokens in the first step of the last draft

    def line(self) -> str:
        """What a start says of it."""
        pool = self.followers.pool
        transformer = self.transformer
        cache_bytes = pool.num_pages * transformer.layout.page_bytes
        model = transformer.model
        return (f"Draft model {self.called}: width {model.width}, {len(model.layers)} layers, weights in "
                f"{transformer.weight_types}; KV cache: {pool.num_pages:,} pages "
                f"({cache_bytes / 2**20:,.0f} MiB)")

    @property
    def title(self) -> str:
        return f"the draft model {self.called}"

    def behind(self, sequence: Sequence) -> int:
        """How many tokens of a sequence it has to compute before it can draft."""
        return len(sequence.tokens) - self._follower(sequence).own.computed

    def _follower(self, sequence: Sequence) -> Follower:
        work = of_vocabulary(sequence.work, self.transformer.model.vocab_size)
        return self.followers.follow(sequence, work)

    def end(self, sequence: Sequence):
        self.followers.release(sequence)

    def read_hidden(self, sequence: Sequence, first: int, count: int, rows: numpy.ndarray):
        """It needs no hidden states of the model."""

    def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Draft up to so many tokens for each of these sequences, whose tokens must all be known. A prompt
        that is not computed here yet is computed further; its sequence gets no draft now. No step that needs
        these threads may be under way."""
        self.followers.release_waiting()
        drafts: dict[Sequence, list[int]] = {}
        for sequence in wanted:
            follower = self.followers.with_guess(sequence)
            if follower:  # the sequence was left out of a step
                drafts[sequence] = self._useful(follower.guess)
        plan, drafting = self._plan({s: length for s, length in wanted.items() if s not in drafts})
        self.computed = sum(chunk.count for chunk in plan)
        if not plan:
            return drafts
        drawn = self._draw(plan, [(follower.own, length) for _, follower, length in drafting])
        for (sequence, follower, _), tokens in zip(drafting, drawn):
            follower.begin = len(follower.own.tokens)
            follower.guess = tokens
            drafts[sequence] = self._useful(tokens)
        return drafts

    def _useful(self, tokens: list[int]) -> list[int]:
        """The draft up to its first stop token, and without what only this model's vocabulary has."""
        for i, token in enumerate(tokens):
            if token >= self.vocab_size:
                return tokens[:i]
            if token in self.stop_tokens:
                return tokens[:i + 1]
        return tokens

    def _plan(self, wanted: Mapping[Sequence, int]
              ) -> tuple[list[Chunk], list[tuple[Sequence, Follower, int]]]:
        """The chunks of the first step, those of one token first, and the sequences among them that draft."""
        left = self.prefill_chunk
        size = self.followers.pool.page_size
        own_size = self.transformer.model.vocab_size
        plan: list[tuple[Chunk, Sequence, Follower, int]] = []
        for sequence, length in wanted.items():
            tokens = sequence.tokens
            length = min(length, sequence.limit - len(tokens) - 1, self.longest - len(tokens))
            if length < 1 or len(plan) == self.max_rows:
                continue
            follower = self._follower(sequence)
            own = follower.own
            self.followers.settle(follower)
            fresh = tokens[own.computed:]
            if not left or max(fresh) >= own_size or not self.followers.grow(own, len(tokens) + length - 1):
                continue
            count = min(len(fresh), left)
            if count < len(fresh):
                count -= (own.computed + count) % size  # fill pages, so that others can share them
            if count > 0:
                left -= count
                plan.append((Chunk(own, count, int(count == len(fresh))), sequence, follower, length))
        plan.sort(key=lambda planned: planned[0].count > 1)
        return ([chunk for chunk, *_ in plan],
                [(sequence, follower, length) for chunk, sequence, follower, length in plan if chunk.draws])

    def _draw(self, plan: Seq[Chunk], drafting: Seq[tuple[Sequence, int]]) -> list[list[int]]:
        """Compute the chunks, then a token at a time of those that draft; returns what each of these drew.

        A step starts before the one before it is finished, where the kernels can do that."""
        runner = self.runner
        drawn = [[] for _ in drafting]
        waiting: list[tuple[list[int], object]] = []  # (who draws in it, its ticket) of steps under way

        def finish(most: int):
            while len(waiting) > most:
                members, ticket = waiting.pop(0)
                for member, token in zip(members, runner.finish(ticket)):
                    drawn[member].append(token)

        members = [*range(len(drafting))]
        rows = [sample_row(own, self.stop_tokens) for own, _ in drafting]
        waiting.append((members, runner.start(make_batch(plan), rows)))
        for chunk in plan:
            self.followers.tables.advance(chunk.sequence, chunk.count)
        for ahead in range(1, max((length for _, length in drafting), default=0)):
            before = members
            members = [i for i in members if drafting[i][1] > ahead]
            finish(1)
            batch = Batch([], [], [0], [], [], [])
            for i in members:
                own = drafting[i][0]
                known = drawn[i]
                batch.token_ids.append(~before.index(i))
                batch.previous_token_ids.append(known[-1] if known else own.tokens[-1])
                batch.starts.append(len(batch.token_ids))
                batch.lengths.append(len(own.tokens) + ahead)
                batch.tables.append(own.pages)
                batch.logit_rows.append(len(batch.logit_rows))
            rows = [sample_row(drafting[i][0], self.stop_tokens, ahead) for i in members]
            waiting.append((members, runner.start(batch, rows)))
        finish(0)
        return drawn


def of_vocabulary(work: Assignment, vocab_size: int) -> Assignment:
    """The same assignment without biases of tokens that a vocabulary of this size lacks."""
    sampling = work.params.sampling
    biases = tuple(pair for pair in sampling.logit_bias if pair[0] < vocab_size)
    if len(biases) == len(sampling.logit_bias):
        return work
    return replace(work, params=replace(work.params, sampling=replace(sampling, logit_bias=biases)))

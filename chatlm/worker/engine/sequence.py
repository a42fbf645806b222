"""An answer while it is computed: its tokens and pages, its states, and what its client gets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.messages.requests import Usage
from chatlm.worker.engine.drafts import NO_DRAFT, Draft
from chatlm.worker.engine.kvcache import PagePool
from chatlm.worker.engine.states import HeldStates
from chatlm.worker.ops.sampling import drawn_on_host

if TYPE_CHECKING:
    from concurrent.futures import Future
    from chatlm.common.messages.requests import AnswerParams, Picture, SamplingParams, TokenLogprob
    from chatlm.worker.engine.answer import Answer
    from chatlm.worker.engine.grammar import Grammar
    from chatlm.worker.engine.keeper import Restoration
    from chatlm.worker.engine.encoded_pictures import Placeholders


@dataclass(frozen=True)
class Assignment:
    """One answer to compute, as sent to a worker. It may already have tokens (`resumed_ids`): a worker that
    died had generated them, or its client chose them."""

    id: str
    prompt_ids: tuple[int, ...]
    params: AnswerParams  # of its request
    max_tokens: int
    choice: int = 0
    resumed_ids: tuple[int, ...] = ()
    scored: int = 0       # prompt tokens whose log-probabilities were already sent, or are not wanted
    thinking_ends: int | None = None  # see Answer.thinking_ends
    resumed_sent: bool = True  # was the text of `resumed_ids` sent?
    background: bool = False   # does nobody wait for it?
    pictures: tuple[Picture, ...] = ()  # that the prompt shows, in order

    @cached_property
    def sampling(self) -> SamplingParams:
        return replace(self.params.sampling, choice=self.choice)

    @cached_property
    def needs_logits(self) -> bool:
        """Does the host need its logits?"""
        params = self.params
        return (params.logprobs is not None or params.prompt_logprobs is not None or bool(params.grammar)
                or drawn_on_host(params.sampling))

    @cached_property
    def may_draft(self) -> bool:
        """Can one step verify several of its tokens? Only if tokens affect its draws through the logits and a
        grammar alone."""
        return (self.params.prompt_logprobs is None and not self.sampling.counts_tokens
                and not drawn_on_host(self.params.sampling))

    @cached_property
    def needs_tokens(self) -> bool:
        """Must a token be known before the step that draws the next one can start?"""
        return self.needs_logits or self.sampling.counts_tokens or any(self.params.call_grammars)


def without_tokens(work: Assignment, tokens: frozenset[int]) -> Assignment:
    """The same assignment, whose answer never has one of these tokens."""
    sampling = work.params.sampling
    banned = tuple((token, -math.inf) for token in sorted(tokens))
    sampling = replace(sampling, logit_bias=sampling.logit_bias + banned)
    return replace(work, params=replace(work.params, sampling=sampling))


@dataclass(eq=False)
class SequenceOutput:
    """What the client of a sequence gets besides tokens: text, figures, log-probabilities, an embedding."""

    answer: Answer | None = None         # turns the tokens into text, and says where it ends
    preparing: Future | None = None      # work of a thread that the sequence must wait for
    kept: Any = None                     # see SampleRow.kept
    usage: Usage = Usage()               # in this worker: tokens cached at first admission, drafted ones
    compute_s: float = 0.0               # its shares of the time of steps in this worker
    added_s: float = 0.0                 # when it was queued in this worker
    queued_s: float | None = None        # how long it then waited before it first ran
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of the last step's tokens, if requested
    scored: int = 0                      # prompt tokens whose log-probabilities are not wanted, or were sent,
                                         # by any worker
    pooled: Any = 0.0                    # float64 (C,): the sum of its hidden states, or one of them

    @property
    def ready(self) -> bool:
        return self.preparing is None or self.preparing.done()

    @property
    def grammar(self) -> Grammar | None:
        """What its next token must follow."""
        return self.answer.grammar if self.answer else None


@dataclass(eq=False)
class Sequence:
    """The tokens of an answer while it is computed. The first `computed` have keys and values in its pages;
    the rest are pending."""

    work: Assignment
    tokens: list[int]                    # prompt and everything generated; ~row for one still being drawn
    limit: int                           # the most tokens it may have
    adapter: int = 0                     # the slot of its adapter; 0: it has none
    adapter_digest: str = ""             # of the adapter's files
    finished: bool = False               # it ended or was cancelled
    suspect: bool = False                # it was in a failed step: it runs alone until it has a new token
    drafts: bool = False                 # do the sources of drafts know it?
    draft: Draft = NO_DRAFT              # guessed next tokens, verified in the same step
    needs_hidden: bool = False           # does a drafter need its hidden states after each step?
    computed: int = 0
    pages: list[int] = field(default_factory=list)  # its table: in each row, one page of each group
    filled: int = 0                      # table rows in which layers with a window have been given pages
    serial: int | str = PagePool.ROOT    # content serial of its last full page, as in the prefix index
    states: HeldStates = field(default_factory=HeldStates)
    placeholders: Placeholders | None = None           # of the pictures of its prompt
    restoration: Restoration | None = None  # of kept pages of its prompt, once they were looked up
    output: SequenceOutput = field(default_factory=SequenceOutput)

    def end_restoration(self):
        """Nobody waits any more for the pages that are being restored for it."""
        if self.restoration:
            self.restoration.over = True
            self.restoration = None

    @property
    def root(self) -> str:
        """Who may share its KV pages, in this worker or a later one: its owner, with the same adapter."""
        owner = self.work.params.owner
        return f"{owner}\0{self.adapter_digest}" if self.adapter else owner

    @property
    def shares_pages(self) -> bool:
        """May its pages enter the prefix index? Those of a temporary chat are free as soon as it ends."""
        return not self.work.params.temporary

    @property
    def needs_logits(self) -> bool:
        """Does the host need the logits of its next token?"""
        return self.work.needs_logits or self.output.grammar is not None

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.work.prompt_ids)

    @property
    def scoring(self) -> bool:
        """Are log-probabilities of its prompt needed?"""
        return self.work.params.prompt_logprobs is not None and not self.generated

    @property
    def unscored(self) -> int:
        """How many of the first tokens of a prompt that is being scored need no logits, since the score of
        the token after each was sent before, or is not wanted."""
        return max(self.output.scored - 1, 0)

    @property
    def cacheable(self) -> int:
        """How many of its tokens, but for the last, need not be computed here if their pages are cached."""
        if self.pooling == "mean":
            return 0
        return self.output.scored if self.scoring else len(self.tokens)

    @property
    def uncached(self) -> bool:
        """Must some of its tokens be computed here even if they are cached, for scores or a mean?"""
        return self.cacheable < len(self.tokens)

    @property
    def pooling(self) -> str:
        return self.work.params.pooling

    @property
    def counted(self) -> tuple[list[int], int]:
        """The tokens that penalties count, and how many of them are of the prompt. Rows of pictures do not
        count: they are no tokens that could be drawn."""
        prompt = len(self.work.prompt_ids)
        if not self.placeholders or not self.work.needs_tokens:
            return self.tokens, prompt
        return self.placeholders.without_rows(self.tokens), prompt - len(self.placeholders.places)

    @property
    def encoded(self) -> int:
        """How many of its pending tokens come before the first row of a picture that is not encoded yet."""
        return self.placeholders.known(self.computed, self.pending) if self.placeholders else self.pending

    def spans(self, first: int, end: int) -> list[tuple[int, int]]:
        """(begin, end) of each two-sided picture with rows among the tokens [first, end). The rows of such a
        picture see each other, so that one step must compute them all."""
        placeholders = self.placeholders
        return placeholders.spans(first, end) if placeholders and placeholders.two_sided else []

    def uncut(self, count: int, most: int) -> int:
        """Shrink `count` so that no two-sided picture is split. A chunk that starts inside one, since cached
        pages have its first rows, takes all of the rest if `most` allows, else nothing."""
        if not self.placeholders:
            return count
        end = self.computed + count
        for begin, last in self.spans(self.computed, end):
            if last <= end:
                continue
            if begin > self.computed:
                end = begin
            else:
                end = last if last - self.computed <= most else self.computed
        return end - self.computed

    @property
    def decodes(self) -> bool:
        """Is one token left to compute, and can it be computed now?"""
        return self.pending == 1 and self.encoded == 1

    @property
    def prefilling(self) -> bool:
        """Are tokens of its prompt pending, besides the one that draws?"""
        return self.pending > (0 if self.pooling else 1)


class Chunk(NamedTuple):
    """Compute `count` pending tokens of `sequence`; if these are the last ones, draw the next token.

    The tokens of a draft are computed too, as if all were right, and the token after each is drawn."""

    sequence: Sequence
    count: int
    draws: int = 0  # tokens to draw: 0 before the prompt's end, then 1 + len(draft)
    draft: tuple[int, ...] = ()
    reads: int = 0  # the slot of its state, if layers keep one
    writes: tuple[tuple[int, int], ...] = ()  # (token of the chunk, slot for the state after it)

    @property
    def ids(self) -> list[int]:
        """The token before (-1 at the beginning) and those that are computed; all rows of pictures have the
        same id."""
        first = self.sequence.computed
        tokens = self.sequence.tokens
        ids = [tokens[first - 1] if first else -1, *tokens[first:first + self.count], *self.draft]
        return self.sequence.placeholders.as_one_id(ids) if self.sequence.placeholders else ids

    @property
    def rows(self) -> int:
        """How many tokens, from the end, need logits: `draws`, or more if the prompt is being scored."""
        sequence = self.sequence
        if not sequence.scoring:
            return self.draws
        wanted = sequence.computed + self.count - sequence.unscored
        return max(self.draws, min(self.count, wanted))

    @property
    def on_host(self) -> bool:
        """Does the host need the logits or the hidden states?"""
        return bool(self.sequence.pooling) or self.sequence.needs_logits and self.rows > 0

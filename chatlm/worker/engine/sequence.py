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

if TYPE_CHECKING:
    from concurrent.futures import Future
    from chatlm.common.messages.requests import AnswerParams, Picture, SamplingParams, TokenLogprob
    from chatlm.worker.engine.answer import Answer
    from chatlm.worker.engine.grammar import Grammar
    from chatlm.worker.engine.keeper import Restoration
    from chatlm.worker.engine.sight import Sight


@dataclass(frozen=True)
class Assignment:
    """One answer to compute, as sent to a worker. `resumed_ids` are the tokens it already has: a worker that
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
        from chatlm.worker.ops.sampling import drawn_on_host  # imports numpy, which scheduling does not need
        params = self.params
        return (params.logprobs is not None or params.prompt_logprobs is not None or bool(params.grammar)
                or drawn_on_host(params.sampling))

    @cached_property
    def may_draft(self) -> bool:
        """Can a step verify several of its tokens: do its draws depend on no token but through the logits and
        a grammar?"""
        from chatlm.worker.ops.sampling import drawn_on_host
        return (self.params.prompt_logprobs is None and not self.sampling.counts_tokens
                and not drawn_on_host(self.params.sampling))

    @cached_property
    def needs_tokens(self) -> bool:
        """Must its last token be known before the step for the next one can start?"""
        return self.needs_logits or self.sampling.counts_tokens or any(self.params.call_grammars)


def without_tokens(work: Assignment, tokens: frozenset[int]) -> Assignment:
    """The same assignment, whose answer never has one of these tokens."""
    sampling = work.params.sampling
    banned = tuple((token, -math.inf) for token in sorted(tokens))
    sampling = replace(sampling, logit_bias=sampling.logit_bias + banned)
    return replace(work, params=replace(work.params, sampling=sampling))


@dataclass(eq=False)
class Output:
    """What the client of a sequence gets besides tokens: text, figures, log-probabilities, an embedding."""

    answer: Answer | None = None         # turns the tokens into text, and says where it ends
    preparing: Future | None = None      # work of a thread that the sequence must wait for
    kept: Any = None                     # see SampleRow.kept
    usage: Usage = Usage()               # here so far: tokens cached at first admission, drafted ones
    compute_s: float = 0.0               # its shares of the time of steps here
    added_s: float = 0.0                 # when it was queued here
    queued_s: float | None = None        # seconds it waited here before it first ran
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of the last step's tokens, if requested
    scored: int = 0                      # prompt tokens whose log-probabilities were sent, by any worker, or
                                         # are not wanted
    pooled: Any = 0.0                    # float64 (C,): sum of its hidden states, or only the last one

    @property
    def ready(self) -> bool:
        return self.preparing is None or self.preparing.done()

    @property
    def grammar(self) -> Grammar | None:
        """What its next token must follow."""
        return self.answer.grammar if self.answer else None


@dataclass(eq=False)
class Sequence:
    """Tokens being decoded: the first `computed` have keys and values in its pages; the rest are pending."""

    work: Assignment
    tokens: list[int]                    # prompt and everything generated; ~row for one still being drawn
    limit: int                           # maximum length of `tokens`
    adapter: int = 0                     # the slot of its adapter; 0: it has none
    adapter_digest: str = ""             # of the adapter's files
    finished: bool = False               # it ended or was cancelled
    suspect: bool = False                # was in a failed step: runs alone until it produces a token
    drafts: bool = False                 # do the sources of drafts know it?
    draft: Draft = NO_DRAFT              # guessed next tokens, verified in the same step
    shown: bool = False                  # are its hidden states needed after each step, to draft?
    computed: int = 0
    pages: list[int] = field(default_factory=list)  # its table: in each row, one page of each group
    filled: int = 0                      # table rows in which layers with a window have been given pages
    serial: int | str = PagePool.ROOT    # content serial of its last full page, as in the prefix index
    states: HeldStates = field(default_factory=HeldStates)
    sight: Sight | None = None           # of the pictures of its prompt
    restoration: Restoration | None = None  # of kept pages of its prompt, once they were looked up
    output: Output = field(default_factory=Output)

    @property
    def root(self) -> str:
        """Who may share its KV pages, in this worker or a later one: only those with the same weights."""
        owner = self.work.params.owner
        return f"{owner}\0{self.adapter_digest}" if self.adapter else owner

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
        """How many tokens from the beginning of a prompt that is being scored need no logits: those whose
        next token was scored before, or is not wanted."""
        return max(self.output.scored - 1, 0)

    @property
    def cacheable(self) -> int:
        """How many of its tokens need not be computed here if their pages are cached, but for the last."""
        if self.pooling == "mean":
            return 0
        return self.output.scored if self.scoring else len(self.tokens)

    @property
    def uncached(self) -> bool:
        """Must some of its tokens be computed here, because scores or a mean need them?"""
        return self.cacheable < len(self.tokens)

    @property
    def pooling(self) -> str:
        return self.work.params.pooling

    @property
    def counted(self) -> tuple[list[int], int]:
        """The tokens that penalties count, and how many of them are of the prompt. Rows of pictures are no
        tokens that could be drawn."""
        prompt = len(self.work.prompt_ids)
        if not self.sight or not self.work.needs_tokens:
            return self.tokens, prompt
        return self.sight.without_rows(self.tokens), prompt - len(self.sight.places)

    @property
    def seen(self) -> int:
        """How many of its pending tokens may be computed before a row of a picture that is not encoded."""
        return self.sight.known(self.computed, self.pending) if self.sight else self.pending

    def spans(self, first: int, end: int) -> list[tuple[int, int]]:
        """The pictures, (begin, end) of each one's rows, whose rows see each other and are among these
        tokens."""
        return self.sight.spans(first, end) if self.sight and self.sight.two_sided else []

    def uncut(self, count: int, most: int) -> int:
        """So many of the next `count` tokens that no picture whose rows see each other is cut: at its begin,
        or, if the tokens begin in it, all of it, where `most` allow that. What precedes them may have cut
        it: pages of its rows were computed with all of them."""
        if not self.sight:
            return count
        end = self.computed + count
        for begin, last in self.spans(self.computed, end):
            if last > end and begin > self.computed:
                end = begin
            elif last > end:
                end = last if last - self.computed <= most else self.computed
        return end - self.computed

    @property
    def decodes(self) -> bool:
        """Is one token left to compute, and can it be?"""
        return self.pending == 1 and self.seen == 1

    @property
    def prefilling(self) -> bool:
        return self.pending > (0 if self.pooling else 1)


class Chunk(NamedTuple):
    """Compute `count` pending tokens of `sequence`; if none are left after these, draw the next token.

    The draft's tokens are computed too, as if all were right, and the token after each is drawn."""

    sequence: Sequence
    count: int
    draws: int = 0  # tokens to draw: 0 before the prompt's end, then 1 + len(draft)
    draft: tuple[int, ...] = ()
    reads: int = 0  # the slot of its state, if layers keep one
    writes: tuple[tuple[int, int], ...] = ()  # (token of the chunk, slot for the state after it)

    @property
    def ids(self) -> list[int]:
        """The token before, -1 at the beginning, and those that are computed; of rows of pictures one id."""
        first = self.sequence.computed
        tokens = self.sequence.tokens
        ids = [tokens[first - 1] if first else -1, *tokens[first:first + self.count], *self.draft]
        return self.sequence.sight.as_one_id(ids) if self.sequence.sight else ids

    @property
    def rows(self) -> int:
        """How many tokens, from the end, need logits: if the prompt is being scored, all those whose next
        token is wanted; else `draws`."""
        sequence = self.sequence
        if not sequence.scoring:
            return self.draws
        wanted = sequence.computed + self.count - sequence.unscored
        return max(self.draws, min(self.count, wanted))

    @property
    def on_host(self) -> bool:
        """Does the host need the logits or the hidden states?"""
        return bool(self.sequence.pooling) or self.sequence.needs_logits and self.rows > 0

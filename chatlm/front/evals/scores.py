"""What a model makes of prompts: log-probabilities of chosen tokens, and continuations."""

from __future__ import annotations

import asyncio
import secrets
import typing
from collections.abc import Sequence as Seq
from contextlib import aclosing
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import ConfigError, Overloaded
from chatlm.common.messages.requests import (
    AnswerParams, Message, Piece, PromptScores, Request, SamplingParams, TokenLogprob)
from chatlm.front.aio import first_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.front.pool.pool import WorkerPool


class Scorer(typing.Protocol):
    """A model to judge: loaded here (`PoolScorer`), or behind a URL."""

    digest: str      # of its weights
    arithmetic: str  # see --arithmetic
    longest: int     # most tokens of a prompt that is only scored
    room: int        # most tokens of a prompt and its answer

    async def encode(self, texts: Seq[str]) -> list[list[int]]:
        """The tokens of each text as ordinary text, after the token that begins a text."""
        ...

    async def score(self, prompts: Seq[Seq[int]], starts: Seq[int], top: int) -> list[list[TokenLogprob]]:
        """Log-probabilities of each prompt's tokens from its start on, with the `top` likeliest tokens."""
        ...

    async def complete(self, prompt: str, max_tokens: int) -> str:
        """The likeliest continuation of a text."""
        ...

    async def samples(self, count: int, max_tokens: int) -> list[str]:
        """Texts as the model writes them without a prompt, at temperature 1; the same each time. None of a
        model without a token that begins a text."""
        ...

    async def chat(self, text: str) -> list[int]:
        """The tokens of a conversation in which the user wrote a text, up to the assistant's turn.
        ConfigError for a model without a chat template."""
        ...

    async def likelihoods(self, prompt: Seq[int], ids: Seq[int]) -> list[float]:
        """The log-probability of each of some tokens after a prompt."""
        ...

    async def answer(self, prompt: Seq[int], max_tokens: int) -> str:
        """The likeliest continuation of tokens, up to one that ends it; special tokens appear by name."""
        ...

    async def sizes(self, ids: Seq[int]) -> list[int]:
        """The bytes of each token; 0 for special ones."""
        ...


GREEDY = SamplingParams(temperature=0.0)
FREE = SamplingParams(temperature=1.0, top_k=0, seed=42)
MOST_CHAT_TOKENS = 2048  # upstream cuts conversations here
NO_CHAT = "chat tasks need a model with a chat template, and this one has none"


def cut_as_upstream(prompt: Seq[int]) -> list[int]:
    """A conversation of nanochat's; the token that begins the assistant's turn stays."""
    return [*prompt[:-1][:MOST_CHAT_TOKENS], prompt[-1]]


async def prompt_scores(pool: WorkerPool, prompts: Seq[Seq[int]], starts: Seq[int], top: int = 0,
                        low_priority: bool = False) -> list[list[TokenLogprob]]:
    """Log-probabilities of each prompt's tokens from its start on, which must be one of its tokens. What
    prompts of one call have in common is computed once."""
    params = AnswerParams(sampling=GREEDY, prompt_logprobs=top)
    request = Request(id=secrets.token_hex(16), prompts=tuple(map(tuple, prompts)), params=params,
                      max_tokens=0, score_from=tuple(starts), low_priority=low_priority)
    found: list[list[TokenLogprob]] = [[] for _ in prompts]
    async with aclosing(pool.answer(request)) as events:
        async for event in events:
            if isinstance(event, PromptScores):
                found[event.choice] += event.logprobs
    return found


class PoolScorer:
    """A model of this process's pool. yields: if given, other requests come first; it is called before each
    request, and may raise to end the work."""

    LOOK_S = 0.01  # how often it looks for other requests

    def __init__(self, pool: WorkerPool, yields: Callable[[], None] | None = None):
        self.pool = pool
        self.yields = yields
        card = pool.supervisor.card
        self.digest = card.facts.digest
        self.arithmetic = card.facts.arithmetic
        self.longest = card.longest
        self.room = card.context_length

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.pool.tokenizer
        return self.pool.tokenizer

    @property
    def begin(self) -> list[int]:
        """The token before a text, if the model has one."""
        spec = self.tokenizer.spec
        token = spec.bos_token if spec.bos_token is not None else spec.eos_token
        return [] if token is None else [token]

    async def encode(self, texts: Seq[str]) -> list[list[int]]:
        tokenizer = self.tokenizer
        begin = self.begin
        return await asyncio.to_thread(lambda: [begin + tokenizer.encode(text) for text in texts])

    async def score(self, prompts: Seq[Seq[int]], starts: Seq[int], top: int) -> list[list[TokenLogprob]]:
        return await self._in_turn(
            lambda: prompt_scores(self.pool, prompts, starts, top, self.yields is not None))

    async def complete(self, prompt: str, max_tokens: int) -> str:
        return "".join([piece.text for piece in await self._pieces(prompt, max_tokens)])

    async def samples(self, count: int, max_tokens: int) -> list[str]:
        if not self.begin:
            return []
        pieces = await self._pieces(self.begin, max_tokens, AnswerParams(sampling=FREE), count)
        return ["".join([piece.text for piece in pieces if piece.choice == choice])
                for choice in range(count)]

    async def chat(self, text: str) -> list[int]:
        prompts = self.pool.admission.prompts
        assert prompts
        if not self.tokenizer.has_chat_template:
            raise ConfigError(NO_CHAT)
        ids = await prompts.render((Message("user", text),), (), "")
        return cut_as_upstream(ids) if self.tokenizer.spec.kind == "nanochat" else [*ids]

    async def likelihoods(self, prompt: Seq[int], ids: Seq[int]) -> list[float]:
        params = AnswerParams(sampling=GREEDY, logprobs=0, logprob_ids=tuple(ids), ignore_eos=True)
        pieces = await self._pieces(prompt, 1, params)
        found = {}
        for piece in pieces:
            for logprob in piece.logprobs:
                found |= dict(logprob.top)
        return [found[token] for token in ids]

    async def answer(self, prompt: Seq[int], max_tokens: int) -> str:
        tokens = []
        for piece in await self._pieces(prompt, max_tokens):
            tokens += piece.tokens
        ends = tokens and tokens[-1] in self.tokenizer.stop_tokens
        return self.tokenizer.show(tokens[:-1] if ends else tokens)

    async def sizes(self, ids: Seq[int]) -> list[int]:
        return [len(self.tokenizer.token_bytes(token)) for token in ids]

    async def _pieces(self, prompt: str | Seq[int], max_tokens: int,
                      params: AnswerParams = AnswerParams(sampling=GREEDY), count: int = 1) -> list[Piece]:
        request = Request(id=secrets.token_hex(16), params=params, max_tokens=max_tokens, n=count,
                          prompts=(prompt if isinstance(prompt, str) else tuple(prompt),),
                          low_priority=self.yields is not None)

        async def answered() -> list[Piece]:
            async with aclosing(self.pool.answer(request)) as events:
                return [event async for event in events if isinstance(event, Piece)]

        return await self._in_turn(answered)

    async def _in_turn(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """The result of work. If other requests come first, it waits while there are any, and starts over if
        one arrives meanwhile: even one prompt of low priority would make each step of a chat longer."""
        if not self.yields:
            return await work()
        results = []

        async def worked():
            results.append(await work())

        while not results:
            while self._others():
                await asyncio.sleep(self.LOOK_S)
            self.yields()
            try:
                await first_of(worked(), self._interrupted())
            except Overloaded as error:
                if self.pool.draining:
                    raise
                await asyncio.sleep(error.retry_after_s)
        return results[0]

    def _others(self) -> bool:
        return any(dispatcher.busy for dispatcher in self.pool.dispatcher.all_models)

    async def _interrupted(self):
        while not self._others():
            await asyncio.sleep(self.LOOK_S)

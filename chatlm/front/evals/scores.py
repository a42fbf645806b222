"""What a model makes of prompts: log-probabilities of chosen tokens, and continuations."""

from __future__ import annotations

import asyncio
import secrets
import typing
from collections.abc import Sequence as Seq
from contextlib import aclosing
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import Overloaded
from chatlm.common.messages.requests import (
    AnswerParams, Piece, PromptScores, Request, SamplingParams, TokenLogprob)
from chatlm.front.aio import first_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from chatlm.front.pool.pool import WorkerPool


class Scorer(typing.Protocol):
    """A model to judge: loaded here (`PoolScorer`), or behind a URL."""

    digest: str      # of its weights
    arithmetic: str  # see --arithmetic
    longest: int     # most tokens of a prompt

    async def encode(self, texts: Seq[str]) -> list[list[int]]:
        """The tokens of each text as ordinary text, after the token that begins a text."""
        ...

    async def score(self, prompts: Seq[Seq[int]], starts: Seq[int], top: int) -> list[list[TokenLogprob]]:
        """Log-probabilities of each prompt's tokens from its start on, with the `top` likeliest tokens."""
        ...

    async def complete(self, prompt: str, max_tokens: int) -> str:
        """The likeliest continuation of a text."""
        ...


GREEDY = SamplingParams(temperature=0.0)


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
        self.pool, self.yields = pool, yields
        facts = pool.supervisor.card.facts
        self.digest, self.arithmetic, self.longest = facts.digest, facts.arithmetic, pool.context_length

    async def encode(self, texts: Seq[str]) -> list[list[int]]:
        tokenizer = self.pool.tokenizer
        assert tokenizer
        spec = tokenizer.spec
        begin = spec.bos_token if spec.bos_token is not None else spec.eos_token
        first = [] if begin is None else [begin]
        return await asyncio.to_thread(lambda: [first + tokenizer.encode(text) for text in texts])

    async def score(self, prompts: Seq[Seq[int]], starts: Seq[int], top: int) -> list[list[TokenLogprob]]:
        return await self._in_turn(
            lambda: prompt_scores(self.pool, prompts, starts, top, self.yields is not None))

    async def complete(self, prompt: str, max_tokens: int) -> str:
        request = Request(id=secrets.token_hex(16), prompts=(prompt,), params=AnswerParams(sampling=GREEDY),
                          max_tokens=max_tokens, low_priority=self.yields is not None)

        async def completed() -> str:
            async with aclosing(self.pool.answer(request)) as events:
                return "".join([event.text async for event in events if isinstance(event, Piece)])

        return await self._in_turn(completed)

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

"""The same question to several models, side by side: where does each leave the first one's answer?"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence as Seq
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ChatServerError, EngineFailure, RequestError, lack_of_memory, named
from chatlm.common.messages.requests import Finished, Piece
from chatlm.front.aio import end_tasks, supervised
from chatlm.front.api.encode import NativeEncoder, error_body, timings_body, usage_body
from chatlm.front.server.bodies import tokenizer_of
from chatlm.front.server.responses import bound_of

if TYPE_CHECKING:
    from aiohttp import web
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.messages.requests import Accepted, Event, Request
    from chatlm.front.pool.models import Served
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.server.bodies import Bodies
    from chatlm.front.server.streams import Holding

Finder = Callable[[str], "Awaitable[Served]"]  # a name -> what it names
# Who gives some of the answers, the numbers of these, and the seed of those that have none of their own
# -> what each is asked
VariantReader = Callable[["Served", "Seq[int]", int], "Awaitable[Seq[ParsedBody]]"]
Answering = Callable[["WorkerPool", "Request"],
                     "AbstractAsyncContextManager[tuple[Accepted, AsyncGenerator[Event, None]]]"]


class Asked(NamedTuple):
    """One of the answers that are compared."""

    model: str
    pool: WorkerPool
    request: Request


async def asked_of(find: Finder, base: Served, text: bytes, read: VariantReader) -> list[Asked]:
    """Who answers what, where `read_compare` has made `text` of a body whose own `model` is `base`. `read`
    reads the body for each of the models, once. RequestError if one of them is not there, or refuses the
    question."""
    wanted = json.loads(text)  # small: the names of at most LIMITS.compared answers
    names = [name_of(variant, base) for variant in wanted["variants"]]
    all_served = [await find(name) if name else base for name in names]
    indices: dict[WorkerPool, list[int]] = {}
    for index, served in enumerate(all_served):
        tokenizer_of(served.pool)
        indices.setdefault(served.pool, []).append(index)
    requests: dict[int, Request] = {}
    for same in indices.values():
        bodies = await read(all_served[same[0]], same, wanted["seed"])
        requests |= {index: parsed.request for index, parsed in zip(same, bodies)}
    return [Asked(served.name, served.pool, served.asked(requests[index]))
            for index, served in enumerate(all_served)]


async def read_asked(bodies: Bodies, http: web.Request, holding: Holding) -> list[Asked]:
    """Who answers what a client asks. `holding` then holds what stays of a large body."""
    with bodies.holding() as reading:
        body, bound = await bodies.receive(http, reading), bound_of(http)
        base, text = await bodies.text_of(body, bound, holding)
        return await asked_of(lambda name: bodies.resolve(name, bound, holding), base, text,
                              partial(bodies.read_variants, body, holding))


def name_of(variant: Mapping, base: Served) -> str:
    """The model that a variant names; "" if it names none."""
    if (step := variant.get("step")) is not None:
        tag, at, _ = base.name.rpartition("@")
        if not at:
            raise RequestError(f"steps are those of a training run, and the model {base.name!r} is of none: "
                               "name one that --watch serves as `model`, or use `models`",
                               code="no_run", param="steps")
        return f"{tag}@{step}"
    name, adapter = variant.get("model") or "", variant.get("adapter")
    return f"{name or base.model.name}@{adapter}" if adapter else name


@asynccontextmanager
async def plain_answering(pool: WorkerPool, request: Request) -> AsyncIterator[
        tuple[Accepted, AsyncGenerator[Event, None]]]:
    """An answer's first event and the others, without a server around them."""
    async with aclosing(pool.answer(request)) as events:
        accepted = await anext(events)
        yield accepted, events  # pyright: ignore[reportReturnType]  the first event of every answer


class Progress:
    """How far one of the answers has come."""

    def __init__(self, index: int, asked: Asked):
        self.index, self.asked, self.tokenizer = index, asked, tokenizer_of(asked.pool)
        self.tokens = list[tuple[bytes, float]]()  # of each its spelling and its probability
        self.end: dict | None = None               # its last event
        self.stopped = self.differs = False        # did it end by itself? Has it left the first answer?
        self.equal = 0                             # tokens from its start on that the first answer has too

    def message(self, **members) -> dict:
        return {"index": self.index, "model": self.asked.model, **members}

    def take(self, event: Event | ChatServerError) -> list[dict]:
        """The messages that a client gets for an event."""
        if isinstance(event, Piece):
            self.tokens += [(self.tokenizer.shown_bytes(scored.token), math.exp(scored.logprob or 0.0))
                            for scored in event.logprobs]
            members = NativeEncoder.MEMBERS
            return [self.message(**{members[delta.kind]: delta.text})
                    for delta in event.deltas if delta.kind in members]
        if isinstance(event, Finished):
            self.stopped = event.reason != "length"
            self.end = self.message(
                finish_reason=event.reason, stop_reason=event.stop_reason, usage=usage_body(event.usage),
                timings=timings_body(event), seed=self.asked.request.params.sampling.seed)
        elif isinstance(event, ChatServerError):
            self.end = self.message(finish_reason="error", **error_body(event))
        else:
            return []
        return [self.end]

    def at(self, position: int) -> tuple[bytes, float] | None:
        """The token there and its probability; None if the answer ended before it, or has none yet."""
        return self.tokens[position] if position < len(self.tokens) else None

    def leaves(self, first: Progress) -> dict | None:
        """Where it leaves the first answer, once both have come so far."""
        if self.differs:
            return None
        while ((mine := self.at(self.equal)) and (theirs := first.at(self.equal))
               and mine[0] == theirs[0]):
            self.equal += 1
        mine, theirs = self.at(self.equal), first.at(self.equal)
        ended = mine is None and self.stopped or theirs is None and first.stopped
        if (mine is None or theirs is None) and not (ended and (mine or theirs)):
            return None
        self.differs = True
        return {"differs": self.message(position=self.equal,
                                     probabilities=[token and token[1] for token in (theirs, mine)])}


class Comparison:
    """Several answers at the same time, as events for one reader. Where memory does not hold all of their
    models, some wait until others have ended."""

    def __init__(self, asked: Seq[Asked], answering: Answering = plain_answering):
        self.answers = [Progress(index, one) for index, one in enumerate(asked)]
        self.answering, self.news = answering, asyncio.Queue()
        self.early: list[tuple[Progress, Event | ChatServerError]] = []

    async def __aenter__(self) -> Comparison:
        """Once every answer is accepted. RequestError, Overloaded: one is refused, and none is given."""
        self.tasks = [asyncio.create_task(supervised("comparing", partial(self._follow, answer)))
                      for answer in self.answers]
        try:
            waiting = set(self.answers)
            while waiting:
                answer, event = await self.news.get()
                if answer in waiting and isinstance(event, ChatServerError):
                    raise event
                waiting.discard(answer)
                self.early.append((answer, event))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *error):
        await end_tasks(self.tasks)

    async def _follow(self, answer: Progress):
        try:
            async with self.answering(answer.asked.pool, answer.asked.request) as (accepted, events):
                self.news.put_nowait((answer, accepted))
                async for event in events:
                    self.news.put_nowait((answer, event))
        except Exception as error:
            error = lack_of_memory(error) or error
            known = isinstance(error, ChatServerError)
            self.news.put_nowait((answer, error if known else EngineFailure(named(error))))

    async def events(self) -> AsyncIterator[dict]:
        """{"index", "model", "token"} as each answer comes, {"differs"} where one leaves the first, the end
        of each, and at last {"done"} with all of their ends."""
        first, *others = self.answers
        while any(answer.end is None for answer in self.answers):
            answer, event = self.early.pop(0) if self.early else await self.news.get()
            for body in answer.take(event):
                yield body
            for other in others if answer is first else [answer]:
                if other is not first and (body := other.leaves(first)):
                    yield body
        yield {"done": True, "answers": [answer.end for answer in self.answers]}


def with_ids(asked: Seq[Asked], identified: Callable[[Request], Request]) -> list[Asked]:
    """Each with an id of its own: that of the request, and after it the number of the answer."""
    requests = [identified(one.request) for one in asked]
    return [one._replace(request=replace(request, id=f"{requests[0].id}-{index}"))
            for index, (one, request) in enumerate(zip(asked, requests))]

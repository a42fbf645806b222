"""The same question to several models, side by side: where does each answer diverge from the first?"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence as Seq
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.errors import ChatServerError, RequestError
from chatlm.common.messages.requests import Finished, Piece
from chatlm.common.text.answer_decoder import CallCounter
from chatlm.front.aio import end_tasks, supervised
from chatlm.front.api.encode import NativeEncoder, timings_body, usage_body
from chatlm.front.api.errors import openai_error, public_error
from chatlm.front.intake.intake import tokenizer_of
from chatlm.front.server.bodies import note_ignored

if TYPE_CHECKING:
    from aiohttp import web
    from chatlm.common.messages.requests import Accepted, Event, Request
    from chatlm.front.intake.arrival import Arrival
    from chatlm.front.intake.budget import Holding
    from chatlm.front.intake.intake import Intake
    from chatlm.front.pool.models import Served
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.server.bodies import Bodies

Identified = Callable[["Seq[tuple[WorkerPool, Request]]"], "Seq[Request]"]
Answering = Callable[..., "AbstractAsyncContextManager[tuple[Accepted, AsyncGenerator[Event, None]]]"]


class Asked(NamedTuple):
    """One of the answers to compare."""

    model: str
    pool: WorkerPool
    request: Request

    @property
    def work(self) -> tuple[WorkerPool, Request, str]:
        return self.pool, self.request, self.model


async def asked_of(intake: Intake, arrival: Arrival, holding: Holding) -> tuple[list[Asked], str]:
    """The answers to compute, from a body of /v1/compare, which is read once for each of its models; and the
    fields without effect. `holding` then accounts for what is kept of a large body. RequestError if a model
    does not exist or refuses the question."""
    base, ignored, text = await intake.text(arrival, holding, sees=False)
    wanted = json.loads(text)  # small: the names of at most LIMITS.compared answers
    names = [name_of(variant, base) for variant in wanted["variants"]]
    bound = arrival.caller.bound
    all_served = [await intake.resolve(name, bound, holding) if name else base for name in names]
    indices: dict[WorkerPool, list[int]] = {}
    for index, served in enumerate(all_served):
        tokenizer_of(served.pool)
        indices.setdefault(served.pool, []).append(index)
    requests: dict[int, Request] = {}
    for same in indices.values():
        read = await intake.variants(arrival, holding, all_served[same[0]], same, wanted["seed"])
        requests |= {index: parsed.request for index, parsed in zip(same, read)}
    return [Asked(served.name, served.pool, served.with_versions(requests[index]))
            for index, served in enumerate(all_served)], ignored


async def read_asked(bodies: Bodies, http: web.Request, holding: Holding) -> list[Asked]:
    """The answers that a client wants compared."""
    with bodies.holding() as reading:
        async with bodies.opened(http, reading, times=LIMITS.compared) as arrival:
            asked, ignored = await asked_of(bodies.intake, arrival, holding)
        note_ignored(ignored)
        return asked


def name_of(variant: Mapping, base: Served) -> str:
    """The name of a variant's model; "" if it has none."""
    if (step := variant.get("step")) is not None:
        tag, at, _ = base.name.rpartition("@")
        if not at:
            raise RequestError(f"`steps` needs a training run, and the model {base.name!r} belongs to none: "
                               "choose one that --watch serves as `model`, or use `models`",
                               code="no_run", param="steps")
        return f"{tag}@{step}"
    name = variant.get("model") or ""
    adapter = variant.get("adapter")
    return f"{name or base.model.name}@{adapter}" if adapter else name


@asynccontextmanager
async def plain_answering(pool: WorkerPool, request: Request, name: str) -> AsyncIterator[
        tuple[Accepted, AsyncGenerator[Event, None]]]:
    """An answer's first event, and the stream of the others, without a server."""
    async with aclosing(pool.answer(request)) as events:
        accepted = await anext(events)
        yield accepted, events  # pyright: ignore[reportReturnType]  the first event of every answer


class Progress:
    """The state of one of the answers."""

    def __init__(self, index: int, asked: Asked):
        self.index, self.asked, self.tokenizer = index, asked, tokenizer_of(asked.pool)
        self.tokens = list[tuple[bytes, float]]()  # spelling and probability of each
        self.end: dict | None = None               # its last event
        # did it end by itself? Does it differ from the first?
        self.stopped = False
        self.differs = False
        self.counter = CallCounter()               # of the calculator's calls
        self.equal = 0                             # length of the prefix that it shares with the first

    def message(self, **members) -> dict:
        return {"index": self.index, "model": self.asked.model, **members}

    def take(self, event: Event | ChatServerError) -> list[dict]:
        """The messages to the client for an event."""
        if isinstance(event, Piece):
            self.tokens += [(self.tokenizer.shown_bytes(scored.token), math.exp(scored.logprob or 0.0))
                            for scored in event.logprobs]
            return [self.message(**members) for delta in event.deltas
                    if (members := NativeEncoder.members(delta, self.counter))]
        if isinstance(event, Finished):
            self.stopped = event.reason != "length"
            self.end = self.message(
                finish_reason=event.reason, stop_reason=event.stop_reason, usage=usage_body(event.usage),
                timings=timings_body(event), seed=self.asked.request.params.sampling.seed)
        elif isinstance(event, ChatServerError):
            self.end = self.message(finish_reason="error", **openai_error(event))
        else:
            return []
        return [self.end]

    def at(self, position: int) -> tuple[bytes, float] | None:
        """The token at a position and its probability; None if the answer has none there, or not yet."""
        return self.tokens[position] if position < len(self.tokens) else None

    def leaves(self, first: Progress) -> dict | None:
        """Where it diverges from the first answer, once both are long enough to tell."""
        if self.differs:
            return None
        while ((mine := self.at(self.equal)) and (theirs := first.at(self.equal))
               and mine[0] == theirs[0]):
            self.equal += 1
        mine = self.at(self.equal)
        theirs = first.at(self.equal)
        ended = mine is None and self.stopped or theirs is None and first.stopped
        if (mine is None or theirs is None) and not (ended and (mine or theirs)):
            return None
        self.differs = True
        return {"differs": self.message(position=self.equal,
                                     probabilities=[token and token[1] for token in (theirs, mine)])}


class Comparison:
    """Several answers at once, as one stream of events. If memory does not hold all of their models, some
    wait until others have ended."""

    def __init__(self, asked: Seq[Asked], answering: Answering = plain_answering):
        self.answers = [Progress(index, one) for index, one in enumerate(asked)]
        self.answering = answering
        self.news = asyncio.Queue()
        self.accepted = asyncio.Event()  # are all of them? Before that nothing of any is read, nor charged
        self.early: list[tuple[Progress, Event | ChatServerError]] = []

    async def __aenter__(self) -> Comparison:
        """Wait until every answer is accepted. RequestError or Overloaded if one is refused: then none is
        computed."""
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
            self.accepted.set()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *error):
        await end_tasks(self.tasks)

    async def _follow(self, answer: Progress):
        try:
            async with self.answering(*answer.asked.work) as (accepted, events):
                self.news.put_nowait((answer, accepted))
                await self.accepted.wait()
                async for event in events:
                    self.news.put_nowait((answer, event))
        except Exception as error:
            self.news.put_nowait((answer, public_error(error)))

    async def events(self) -> AsyncIterator[dict]:
        """{"index", "model", "token"} as answers grow, {"differs"} where one diverges from the first, the end
        of each, and finally {"done"} with all ends."""
        first, *others = self.answers
        while any(answer.end is None for answer in self.answers):
            answer, event = self.early.pop(0) if self.early else await self.news.get()
            for body in answer.take(event):
                yield body
            for other in others if answer is first else [answer]:
                if other is not first and (body := other.leaves(first)):
                    yield body
        yield {"done": True, "answers": [answer.end for answer in self.answers]}


def with_ids(asked: Seq[Asked], identified: Identified) -> list[Asked]:
    """The answers with ids: that of the request, followed by the number of the answer."""
    requests = identified([(one.pool, one.request) for one in asked])
    return [one._replace(request=replace(request, id=f"{requests[0].id}-{index}"))
            for index, (one, request) in enumerate(zip(asked, requests))]

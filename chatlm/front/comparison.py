"""Asks several models the same question, and finds where each answer diverges from the first."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence as Seq
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ChatServerError, RequestError
from chatlm.common.messages.requests import Finished, Piece
from chatlm.common.request_ids import id_of_part
from chatlm.front.aio import end_tasks, supervised
from chatlm.front.api.answer_state import AnswerState
from chatlm.front.api.dialects.native import NativeEncoder
from chatlm.front.api.encode import timings_body, usage_body
from chatlm.front.api.errors import openai_error, public_error
from chatlm.front.intake.intake import loaded_tokenizer
from chatlm.front.server.watching import watched

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Accepted, Event, Request
    from chatlm.front.intake.budget import Holding
    from chatlm.front.intake.intake import Intake
    from chatlm.front.intake.opened_body import OpenedBody
    from chatlm.front.pool.models import ModelOrAdapter
    from chatlm.front.pool.pool import WorkerPool

Identified = Callable[["Seq[tuple[WorkerPool, Request]]"], "Seq[Request]"]
Answering = Callable[..., "AbstractAsyncContextManager[tuple[Accepted, AsyncGenerator[Event, None]]]"]


class ComparedModel(NamedTuple):
    """One of the answers to compare."""

    model: str
    pool: WorkerPool
    request: Request

    @property
    def work(self) -> tuple[WorkerPool, Request, str]:
        return self.pool, self.request, self.model


async def compared_models_of(intake: Intake, opened_body: OpenedBody,
                             holding: Holding) -> tuple[list[ComparedModel], str]:
    """Read a body of /v1/compare, once for each of its models. Returns the answers to compute, and the names
    of fields without effect. `holding` then accounts for what is kept of a large body.

    Raises RequestError if a model does not exist or refuses the question."""
    base, ignored, text = await intake.text(opened_body, holding, sees=False)
    wanted = json.loads(text)  # small: the names of at most LIMITS.compared answers
    names = [name_of(variant, base) for variant in wanted["variants"]]
    bound = opened_body.caller.bound
    all_served = [await intake.resolve(name, bound, holding) if name else base for name in names]
    indices: dict[WorkerPool, list[int]] = {}
    for index, served in enumerate(all_served):
        loaded_tokenizer(served.pool)
        indices.setdefault(served.pool, []).append(index)
    requests: dict[int, Request] = {}
    for same in indices.values():
        read = await intake.variants(opened_body, holding, all_served[same[0]], same, wanted["seed"])
        requests |= {index: parsed.request for index, parsed in zip(same, read)}
    return [ComparedModel(served.name, served.pool, served.with_revisions(requests[index]))
            for index, served in enumerate(all_served)], ignored


def name_of(variant: Mapping, base: ModelOrAdapter) -> str:
    """The name of a variant's model; "" if it has none."""
    step = variant.get("step")
    if step is not None:
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
async def plain_answering(pool: WorkerPool, request: Request, name: str, state: AnswerState) -> AsyncIterator[
        tuple[Accepted, AsyncGenerator[Event, None]]]:
    """An answer's first event, and the stream of the others, without a server."""
    async with aclosing(watched(pool.answer(request), state)) as events:
        accepted = await anext(events)
        yield accepted, events  # pyright: ignore[reportReturnType]  the first event of every answer


class ComparedAnswer:
    """One of the compared answers, as far as its events were taken; its state may be ahead of them."""

    def __init__(self, index: int, compared: ComparedModel):
        self.index = index
        self.compared = compared
        self.tokenizer = loaded_tokenizer(compared.pool)
        self.tokens = list[tuple[bytes, float]]()  # spelling and probability of each token
        self.end: dict | None = None               # the last message to the client
        self.stopped = False                       # it ended by itself
        self.differs = False                       # it differs from the first answer
        self.state = AnswerState(compared.request)
        self.calculations = iter(self.state.choices[0].calculations)
        self.equal = 0                             # tokens at its beginning that the first answer has too

    def message(self, **members) -> dict:
        return {"index": self.index, "model": self.compared.model, **members}

    def take(self, event: Event | ChatServerError) -> list[dict]:
        """The messages to the client for an event."""
        if isinstance(event, Piece):
            self.tokens += [(self.tokenizer.shown_bytes(scored.token), math.exp(scored.logprob or 0.0))
                            for scored in event.logprobs]
            bodies = [NativeEncoder.members(delta, self.calculations) for delta in event.deltas]
            return [self.message(**members) for members in bodies if members]
        if isinstance(event, Finished):
            self.stopped = event.reason != "length"
            self.end = self.message(
                finish_reason=event.reason, stop_reason=event.stop_reason, usage=usage_body(event.usage),
                timings=timings_body(event), seed=self.compared.request.params.sampling.seed)
        elif isinstance(event, ChatServerError):
            self.end = self.message(finish_reason="error", **openai_error(event))
        else:
            return []
        return [self.end]

    def at(self, position: int) -> tuple[bytes, float] | None:
        """The token at a position and its probability; None if the answer has none there, or not yet."""
        return self.tokens[position] if position < len(self.tokens) else None

    def leaves(self, first: ComparedAnswer) -> dict | None:
        """The message that says where it diverges from the first answer, once both are long enough to
        tell."""
        if self.differs:
            return None
        mine = self.at(self.equal)
        theirs = first.at(self.equal)
        while mine and theirs and mine[0] == theirs[0]:
            self.equal += 1
            mine = self.at(self.equal)
            theirs = first.at(self.equal)
        if not mine and not theirs:
            return None
        if not mine and not self.stopped or not theirs and not first.stopped:  # more of it may come
            return None
        self.differs = True
        return {"differs": self.message(position=self.equal,
                                     probabilities=[token and token[1] for token in (theirs, mine)])}


class Comparison:
    """Computes several answers at once, and makes one stream of their events. If memory does not hold all of
    their models, some wait until others have ended."""

    def __init__(self, compared: Seq[ComparedModel], answering: Answering = plain_answering):
        self.answers = [ComparedAnswer(index, one) for index, one in enumerate(compared)]
        self.answering = answering
        self.news = asyncio.Queue()
        self.accepted = asyncio.Event()  # all are accepted; before that nothing of any is read or charged
        self.early: list[tuple[ComparedAnswer, Event | ChatServerError]] = []

    async def __aenter__(self) -> Comparison:
        """Wait until every answer is accepted. Raises RequestError or Overloaded if one is refused; then none
        is computed."""
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

    async def _follow(self, answer: ComparedAnswer):
        try:
            async with self.answering(*answer.compared.work, state=answer.state) as (accepted, events):
                self.news.put_nowait((answer, accepted))
                await self.accepted.wait()
                async for event in events:
                    self.news.put_nowait((answer, event))
        except Exception as error:
            self.news.put_nowait((answer, public_error(error)))

    async def events(self) -> AsyncIterator[dict]:
        """The messages to the client: {"index", "model", "token"} as answers grow, {"differs"} where one
        diverges from the first, the end of each, and finally {"done"} with all ends."""
        first, *others = self.answers
        while any(answer.end is None for answer in self.answers):
            answer, event = self.early.pop(0) if self.early else await self.news.get()
            for body in answer.take(event):
                yield body
            changed = others if answer is first else [answer]
            for other in changed:
                body = other.leaves(first)
                if body:
                    yield body
        yield {"done": True, "answers": [answer.end for answer in self.answers]}


def with_ids(compared: Seq[ComparedModel], identified: Identified) -> list[ComparedModel]:
    """The answers with their ids: each is a part of the request."""
    requests = identified([(one.pool, one.request) for one in compared])
    return [one._replace(request=replace(request, id=id_of_part(request.id, index)))
            for index, (one, request) in enumerate(zip(compared, requests))]

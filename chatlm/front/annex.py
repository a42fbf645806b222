"""What a row of the table of annexes is: what a server has beside its core (see chatlm/front/annexes/).

A row is data, and the names of rooms. Nothing of a room is imported before a flag or a request asks for it.
The rows of its routes are there, so that the router, the rules of access, 404 and 405, and /openapi.json know
all routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, Generic, TYPE_CHECKING, TypeVar

from chatlm.common.commands import Command
from chatlm.front.api.additions import AddedField, Addition, ServerTool
from chatlm.front.server.routes import Route

if TYPE_CHECKING:
    from aiohttp import web
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.messages.requests import Request
    from chatlm.front.api.answer_state import AnswerState
    from chatlm.front.api.encode import Encoder
    from chatlm.front.front import Front
    from chatlm.front.intake.budget import Holding
    from chatlm.front.intake.envelope import Envelope
    from chatlm.front.intake.intake import KeptBefore
    from chatlm.front.intake.opened_body import Caller, OpenedBody
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.server.answering import Answering, Ask, Begin
    from chatlm.front.server.recordings import Recording
    from chatlm.front.server.watching import Watcher
    from chatlm.front.store.schema import Step


T = TypeVar("T")
Make = Callable[["Front"], T]


async def nothing(room: Any):
    pass


@dataclass(frozen=True)
class Annex(Generic[T]):
    """What the core can do without. T: its room, the object that has the handlers of its routes."""

    name: str
    load: Callable[[], Make[T]]     # imports its modules, in a thread if a request asks; makes the room
    routes: tuple[Route[T], ...] = ()
    wanted: Callable[[Front], bool] = lambda front: False   # opened at the start, because of a flag
    start: Callable[[T], Awaitable[None]] = nothing  # its tasks
    close: Callable[[T], Awaitable[None]] = nothing  # at the server's end
    # What it adds to the bodies of answers; `needs` is the flag that an error names where it is not wanted
    fields: tuple[AddedField, ...] = ()
    tools: tuple[ServerTool[T], ...] = ()  # of Responses and Messages, whose answers may be in rounds
    needs: str = ""
    # The part of the worker's engine (chatlm/worker/parts.py) that gets the values of these fields, by their
    # names. What it says of the answer, `watch` gets
    part: str = ""
    # The hooks of those that are wanted. `prompt` may change what a body asks the model (of a pool), before
    # that is rendered, and what its answer has `beside`: of bodies with one of its fields or tools; of all,
    # if it has neither
    prompt: Callable[[T, ParsedBody, Caller, WorkerPool], Awaitable[ParsedBody]] | None = None
    # Has it to do with the answer to a body? Then `prepare` may change how the body is answered, before its
    # encoder is made, and `around` begins the answer: it gets what begins the one within
    joins: Callable[[ParsedBody], bool] = lambda parsed: False
    prepare: Callable[[T, ParsedBody], ParsedBody] | None = None
    around: Callable[[T, Begin, Ask], Answering] | None = None
    # what sees the events of each answer
    watch: Callable[[T, Request, AnswerState], Watcher] | None = None
    # the tools that may be run for a body that names tool servers, each as JSON
    offers: Callable[[T, web.Request, Envelope], Awaitable[list[bytes]]] | None = None
    # the items that a body continues or refers to
    earlier: Callable[[T, OpenedBody, Holding], Awaitable[KeptBefore]] | None = None
    # the response to a body whose answer goes on in the background, where it is recorded
    in_background: Callable[[T, Encoder, Recording], bytes] | None = None
    # Of all: its tables in the database, as steps from none to the current ones (see store/schema.py); a
    # command; what it counts, in the classes of prometheus_client.metrics_core
    tables: Callable[[], Seq[Step]] | None = None
    command: Command | None = None
    metrics: Callable[[T, Any], Iterator[Any]] | None = None


def additions_of(annexes: Seq[Annex[Any]], wanted: Seq[Annex[Any]] = ()) -> list[Addition]:
    """What annexes add to bodies. wanted: those that this server runs with."""
    names = {annex.name for annex in wanted}
    return [Addition(annex.name, annex.name in names, annex.needs, annex.fields, annex.tools,
                     annex.prompt is not None) for annex in annexes]


def with_parts(parsed: ParsedBody, annexes: Seq[Annex[Any]]) -> ParsedBody:
    """A body that asks parts of the worker's engine for what its fields say. annexes: those that are
    wanted."""
    asked = {annex.part: {added.field.name: parsed.added[added.field.name] for added in annex.fields
                          if added.field.name in parsed.added} for annex in annexes if annex.part}
    parts = {part: values for part, values in asked.items() if values}
    if not parts:
        return parsed
    params = replace(parsed.request.params, parts=parts)
    return replace(parsed, request=replace(parsed.request, params=params))


def with_database(front: Front) -> bool:
    return front.store is not None

"""The core of the front: what every answer needs. All else is an annex (chatlm/front/annexes/)."""

from __future__ import annotations

import asyncio
import math
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence as Seq
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TYPE_CHECKING, TypeVar

from aiohttp import web

from chatlm.common.errors import RequestError, bad_value
from chatlm.common.messages.requests import PromptProgress
from chatlm.common.program import imported_later, page_files
from chatlm.front.annex import Annex, additions_of, with_parts
from chatlm.front.annexes import ANNEXES
from chatlm.front.api.additions import Additions
from chatlm.front.api.dialect import TextForm
from chatlm.front.api.encode import usage_body
from chatlm.front.api.errors import NANOCHAT, OLLAMA, OPENAI, public_error
from chatlm.front.api.field_types import INTEGER, SWITCH
from chatlm.front.api.fields import Field
from chatlm.front.api.spoken import all_places, answer_encoder, form_of
from chatlm.front.intake.intake import Intake, loaded_tokenizer
from chatlm.front.server.access import Access, AccessLog, Owners
from chatlm.front.server.answering import Answers, Ask, Begin
from chatlm.front.server.bodies import DOCUMENT_ROUTES, Bodies
from chatlm.front.server.budgets import Budgets
from chatlm.front.server.describe import (
    MODEL_ROUTES, ModelRoutes, alive_body, bare_id, ollama_version, openapi_document, stats_body)
from chatlm.front.server.discovery import DISCOVERY_ROUTES
from chatlm.front.server.history import History
from chatlm.front.server.ledger import Ledger
from chatlm.front.server.metrics import Metrics
from chatlm.front.server.page import PAGE_ROUTES, PageFiles
from chatlm.front.server.readiness import Readiness
from chatlm.front.server.recordings import GRACE_S, Recording, Recordings
from chatlm.front.server.responses import (
    REQUEST_LOG, errors_to_responses, json_response, send_whole, shows)
from chatlm.front.server.routes import Route, RouteTable
from chatlm.front.server.streams import EventStream
from chatlm.front.server.sweeper import Sweeper
from chatlm.front.server.usage_writer import UsageWriter
from chatlm.front.store.owners import rename_owners

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.messages.requests import Accepted, Event, Request
    from chatlm.front.api.encode import Encoder
    from chatlm.front.intake.budget import Holding
    from chatlm.front.pool.catalogue import Catalogue
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.server.answering import Answering
    from chatlm.front.store.store import Store
    from chatlm.front.tools.toolbox import Toolbox


T = TypeVar("T")


class Front:
    """The HTTP side of the server: the core's rooms, whose methods handle routes, the rooms of the annexes
    that are open, and the handlers of answers.

    Handlers raise errors; the middleware `errors_to_responses` turns them into responses."""

    def __init__(self, catalogue: Catalogue, settings: Settings, store: Store | None = None,
                 toolbox: Toolbox | None = None, annexes: Seq[Annex] = ANNEXES):
        self.catalogue = catalogue
        self.settings = settings
        self.store = store
        self.access = Access(settings)
        self.owners = Owners(settings)
        limited = any(key.tokens_per_day is not None for key in settings.keys)
        self.ledger = Ledger(settings, Budgets(settings.keys) if limited else None,
                             UsageWriter(store) if store else None)
        self.toolbox = toolbox
        self.annexes = annexes
        self.routes = routes_with(annexes)
        self.wanted = [annex for annex in annexes if annex.wanted(self)]
        self.rooms: dict[str, Any] = {}  # of the annexes that are open, by their names
        additions = Additions(additions_of(annexes, self.wanted))
        intake = Intake(catalogue, self.hook(lambda annex: annex.earlier), additions)
        self.bodies = Bodies(intake, self.owners, self.hook(lambda annex: annex.offers))
        self.models = ModelRoutes(catalogue, self.bodies)
        self.page = PageFiles(page_files())
        self.readiness = Readiness(catalogue)
        self.recordings = Recordings()
        self.metrics = Metrics(catalogue, self.ledger, intake.budget)
        self.answers = Answers(self.owners, self.ledger, self.metrics, self.hooks(lambda annex: annex.watch))
        self.history = History(catalogue, self.metrics)
        self.sweeper = Sweeper(store, catalogue) if store else None
        for annex in self.wanted:
            self.room(annex)

    def removed(self):
        """Something was deleted from the store: its content is removed later."""
        if self.sweeper:
            self.sweeper.wake.set()

    # annexes

    def room(self, annex: Annex[T]) -> T:
        """The room of an annex. Its first use opens it."""
        if annex.name not in self.rooms:
            self._check_known(annex)
            self.rooms[annex.name] = annex.load()(self)
        return self.rooms[annex.name]

    async def opened(self, annex: Annex[T]) -> T:
        """The room of an annex that a request asks for. The first such request opens it, and imports its
        modules in a thread. Raises Overloaded if they may be newer than what runs."""
        if annex.name not in self.rooms:
            self._check_known(annex)
            make = await asyncio.to_thread(imported_later, annex.load)
            if annex.name not in self.rooms:  # no other request was faster
                room = self.rooms[annex.name] = make(self)
                await annex.start(room)
        return self.rooms[annex.name]

    def _check_known(self, annex: Annex):
        """Raise ValueError for an annex that is not in the table: nothing would close it."""
        names = [each.name for each in self.annexes]
        if annex.name not in names:
            raise ValueError(f"the annex {annex.name} is not among those of this server: {', '.join(names)}")

    def hooks(self, hook_of: Callable[[Annex], Callable | None]) -> list[Callable]:
        """The hooks of the wanted annexes that have it, as functions that are given no room."""
        def of_room(annex: Annex, hook: Callable) -> Callable:
            return lambda *arguments: hook(self.room(annex), *arguments)

        found = [(annex, hook_of(annex)) for annex in self.wanted]
        return [of_room(annex, hook) for annex, hook in found if hook]

    def hook(self, hook_of: Callable[[Annex], Callable | None]) -> Callable | None:
        """The hook of the first wanted annex that has it."""
        return next(iter(self.hooks(hook_of)), None)

    async def start(self, app: web.Application):
        await self.ledger.open()
        await self.history.open()
        renamed = self.owners.renamed
        if self.store and renamed:
            await self.store.run(partial(rename_owners, renamed=renamed))
        if self.sweeper:
            self.sweeper.start()
        for annex in self.wanted:
            await annex.start(self.room(annex))

    async def close(self, app: web.Application):
        await self.history.close()
        await self.recordings.close()
        for annex in self.annexes:
            if annex.name in self.rooms:
                await annex.close(self.rooms[annex.name])
        await self.ledger.close()
        if self.sweeper:
            await self.sweeper.close()
        if self.store:
            await self.store.close()

    # answers

    def joining(self, parsed: ParsedBody) -> list[Annex]:
        """The annexes that have to do with the answer to a body."""
        return [annex for annex in self.wanted if annex.joins(parsed)]

    def begin(self, ask: Ask) -> Answering:
        """The answer, within what annexes do around such answers."""
        begin: Begin = self.answers.begin_asked
        for annex in self.joining(ask.parsed):
            if annex.around:
                begin = partial(annex.around, self.room(annex), begin)
        return begin(ask)

    def is_id_in_use(self, request_id: str) -> bool:
        in_use = (self.answers.running, self.recordings, self.answers.groups)
        return any(request_id in ids for ids in in_use)

    def identified(self, works: Seq[tuple[WorkerPool, Request]], is_kept: bool = False) -> list[Request]:
        """Requests with their id, client and owner, ready to be answered.

        They run in the background if the client's key is over its budget. They get a new id if their answer
        is kept, or if another request has taken their id while the body arrived."""
        record = REQUEST_LOG.get()
        if is_kept or self.is_id_in_use(record.id):
            record.sent_id = record.id
            record.id = secrets.token_hex(16)
        owner = self.owners.of_pages(record.client)
        is_over_budget = self.ledger.budgets is not None and self.ledger.budgets.checked(
            record.client, [(request, pool.context_length) for pool, request in works])
        identified = []
        for _, request in works:
            params = replace(request.params, client=record.client, owner=owner)
            identified.append(replace(request, id=record.id, params=params,
                                      low_priority=is_over_budget or request.low_priority))
        return identified

    async def handle_answer(self, http: web.Request) -> web.StreamResponse:
        with self.bodies.holding() as holding:
            served, parsed = await self.bodies.answer(http, holding)
            pool = served.pool
            for annex in self.wanted:
                if annex.prompt and annex.name in parsed.changed_by:
                    parsed = await annex.prompt(self.room(annex), parsed, self.bodies.caller(), pool)
            [request] = self.identified([(pool, parsed.request)], parsed.is_kept)
            parsed = replace(parsed, request=request)
            parsed = with_parts(parsed, self.wanted)
            for annex in self.joining(parsed):
                if annex.prepare:
                    parsed = annex.prepare(self.room(annex), parsed)
            del request  # from here on only what an answer needs is kept, not all messages and tools
            encoder = answer_encoder(parsed, served.name, loaded_tokenizer(pool))
            answering = self.begin(Ask(pool, parsed, served.name, encoder))
            parsed = encoder.parsed
            if nothing := encoder.without_work():
                served.model.load()
                return web.Response(body=nothing, content_type="application/json")
            if parsed.in_background:
                recording = await self.record(answering, encoder, holding)
                show = self.hook(lambda annex: annex.in_background)
                assert show  # without --database such a body is refused
                begun = show(encoder, recording)
                if parsed.stream:
                    return await self.follow(http, recording, 0)
                return web.Response(body=begun, content_type="application/json")
            if parsed.stream:
                return await self.stream(http, answering, encoder, holding)
            async with answering as (_, events):
                body = await encoder.collect_all(events, holding.grow)
                self.note_end(encoder)
                return await send_whole(http, body)

    async def handle_body(self, http: web.Request) -> web.StreamResponse:
        """Answer a body as its dialect says."""
        path = REQUEST_LOG.get().route.pattern
        if isinstance(form_of(path), TextForm):
            return await self.handle_text(http)
        return await self.handle_answer(http)

    async def handle_text(self, http: web.Request) -> web.Response:
        with self.bodies.holding() as holding:
            _, text = await self.bodies.text(http, holding)
            return await send_whole(http, text)

    async def stream(self, http: web.Request, answering: AbstractAsyncContextManager, encoder: Encoder,
                     holding: Holding) -> web.StreamResponse:
        """Send an answer as it is made. A resumable one is recorded, and this client is its first
        follower."""
        if encoder.request.resumable:
            return await self.follow(http, await self.record(answering, encoder, holding), 0)
        async with self.begun(answering, encoder, holding) as (frames, _):
            async with EventStream(http, encoder.request.id, encoder) as stream:
                async for part in frames:
                    await stream.send(part)
        return stream.response

    async def record(self, answering: AbstractAsyncContextManager, encoder: Encoder,
                     holding: Holding) -> Recording:
        """Begin an answer in a task of its own, which records it."""
        request = encoder.request
        async with self.begun(answering, encoder, holding) as (frames, work):
            owner = self.owners.of_answer(request.id, request.client)
            recording = Recording(request.id, owner, request.client, type(encoder),
                                  encoder.parsed.needs_reader)
            return self.recordings.start(recording, frames, work.pop_all())

    @asynccontextmanager
    async def begun(self, answering: AbstractAsyncContextManager, encoder: Encoder,
                    holding: Holding) -> AsyncIterator[tuple[AsyncGenerator[bytes, None], AsyncExitStack]]:
        """Yield the frames of an answer once it is accepted, and what ends its work.

        holding: the memory that the request is accounted for; a recording keeps it after the client has
        left."""
        async with AsyncExitStack() as work:
            work.enter_context(holding.hand_over())
            accepted, events = await work.enter_async_context(answering)
            frames = self.frames(accepted, events, encoder)
            await work.enter_async_context(aclosing(frames))
            yield frames, work

    async def frames(self, accepted: Accepted, events: AsyncIterator[Event],
                     encoder: Encoder) -> AsyncGenerator[bytes, None]:
        """Encode an answer as frames. A failure after the headers is one error frame, not a normal end."""
        try:
            yield encoder.start(accepted)
            async for event in events:
                if isinstance(event, PromptProgress):
                    yield encoder.progress(event)
                else:
                    yield encoder.encode(event)
            self.note_end(encoder)
        except Exception as error:
            REQUEST_LOG.get().note = f"failed: {error}"
            yield encoder.failed(public_error(error))

    async def follow(self, http: web.Request, recording: Recording, start: int) -> web.StreamResponse:
        """Send a recording as it grows. If the answer needs a reader, and is still running GRACE_S after its
        last one has left, cancel it."""
        recording.followers += 1
        try:
            async with (EventStream(http, recording.id, recording.form, patient=True) as stream,
                        aclosing(recording.follow(start)) as parts):
                async for part in parts:
                    await stream.send(part)
            return stream.response
        finally:
            recording.followers -= 1
            if not recording.ended:
                asyncio.get_running_loop().call_later(GRACE_S, self.cancel_unread, recording)

    def cancel_unread(self, recording: Recording):
        if recording.needs_reader and not recording.followers and not recording.ended:
            self.cancel(recording.id)

    async def handle_stream(self, http: web.Request) -> web.StreamResponse:
        """GET /v1/streams/{id}: send a recording from event ?from=N on, or from the event after
        Last-Event-ID, which an EventSource sends when it reconnects."""
        request_id = bare_id(http.match_info["id"])
        last = http.headers.get("Last-Event-ID", "")
        wanted = http.query.get("from", "0")
        if not re.fullmatch("[0-9]{1,15}", last or wanted):
            raise bad_value("Last-Event-ID" if last else "from", last or wanted, "the number of an event")
        owner = self.owners.of_answer(request_id, REQUEST_LOG.get().client)
        recording = self.recordings.find(request_id, owner)
        start = int(last) + 1 if last else int(wanted)
        recording.check_kept(start)
        if recording.ended and start >= recording.length:
            return web.Response(status=204)  # tells an EventSource to stop reconnecting
        return await self.follow(http, recording, start)

    def note_end(self, encoder: Encoder):
        """Note for the access log how many tokens all choices had and why they ended."""
        counts = usage_body(encoder.usage())
        reasons = ",".join(sorted({choice.done.reason for choice in encoder.state.choices if choice.done}))
        record = REQUEST_LOG.get()
        record.note = f"{counts['prompt_tokens']}+{counts['completion_tokens']} tokens {reasons}"
        record.counts = counts | {"reason": reasons}

    async def handle_description(self, http: web.Request) -> web.Response:
        """GET /openapi.json."""
        return json_response(openapi_document(self.routes, self.settings))

    async def handle_cancel(self, http: web.Request) -> web.Response:
        """POST /v1/cancel/{id}: stop an answer, or all answers of a comparison.

        The id is in the header X-Request-Id and in an answer's chunks; with -1 and so on behind it, it is
        that of one answer of a comparison. With ?reasoning=true the answers only stop thinking."""
        request_id = bare_id(http.match_info["id"])
        client = REQUEST_LOG.get().client
        only_thinking = ONLY_THINKING.read(http.query.get("reasoning", "false"))
        found = {one: self.answers.running[one] for one in self.answers.meant_by(request_id)
                 if one in self.answers.running}
        ids = [one for one, running in found.items() if running.owner == self.owners.of_answer(one, client)]
        not_running = RequestError("no answer with this id is running", status=404, code="not_running",
                                   param="id")
        if not ids:
            raise not_running
        if only_thinking:
            ended = [await self.catalogue.end_thinking(found[one].pool_id()) for one in ids]
            if not any(ended):
                raise RequestError("the answer is not thinking now", status=409, code="not_thinking",
                                   param="id")
            return json_response({"id": request_id, "cancelled": "reasoning"})
        cancelled = [self.cancel(one) for one in ids]
        if not any(cancelled):
            raise not_running
        return json_response({"id": request_id, "cancelled": True})

    def cancel(self, request_id: str) -> bool:
        """Stop an answer, and the calls of tools that it waits for. False if it does not run."""
        running = self.answers.running.get(request_id)
        if running is None:
            return self.catalogue.cancel(request_id)
        pool_id = running.pool_id()
        is_stopped = running.stop()
        return self.catalogue.cancel(pool_id) or is_stopped

    async def handle_bare_prefix(self, http: web.Request) -> web.Response:
        """Redirect /chat to /chat/, so that the page's relative URLs work."""
        return web.Response(status=308, headers={"Location": self.settings.prefix + "/"})


ONLY_THINKING = Field("reasoning", SWITCH, "true: end the reasoning of the answer, which goes on with its "
                                           "content; 409 if it is not thinking now")
FIRST_EVENT = Field("from", INTEGER, "the number of the first event", 0, math.inf)
STREAM_ROUTES: tuple[Route[Front], ...] = (
    Route("POST", "/v1/cancel/{id}", OPENAI, Front.handle_cancel,
          "stop an answer by the X-Request-Id of its response", query=(ONLY_THINKING,)),
    Route("GET", "/v1/streams/{id}", OPENAI, Front.handle_stream,
          "a resumable stream, from event ?from=N or after Last-Event-ID", query=(FIRST_EVENT,)),
)
STATE_ROUTES: tuple[Route[Front], ...] = (
    Route("GET", "/api/version", OLLAMA, shows(lambda front, bound: ollama_version()),
          "the version of Ollama whose routes this server has, and its own"),
    Route("GET", "/health", NANOCHAT, lambda front, http: front.readiness.handle_health(http),
          "200 when ready, else 503 with the stage", open=True, polled=True),
    Route("GET", "/livez", NANOCHAT, shows(lambda front, bound: alive_body()),
          "200 as long as the event loop runs", open=True, polled=True),
    Route("GET", "/readyz", NANOCHAT, lambda front, http: front.readiness.handle_ready(http),
          "200 when any request would be served now, else 503 with the reason", open=True, polled=True),
    Route("GET", "/stats", NANOCHAT,
          shows(lambda front, bound: stats_body(front.catalogue, front.models.visible(bound))
                | {"annexes": [annex.name for annex in front.wanted]}),
          "models, workers, KV pages, speed, kernels, queue", polled=True),
    Route("GET", "/stats/history", NANOCHAT,
          shows(lambda front, bound: front.history.body(front.models.visible(bound))),
          "samples of these since the server started"),
    Route("GET", "/openapi.json", NANOCHAT, Front.handle_description, "this description"),
)


@dataclass(frozen=True)
class RoomRoutes(Generic[T]):
    """The routes of one room of the core, and how to find it: the object whose methods handle them. The type
    checker refuses handlers that are methods of another class."""

    of: Callable[[Front], T]
    rows: tuple[Route[T], ...]

    def handlers(self, front: Front) -> Iterator[tuple[Route[T], Callable]]:
        """Each route, and the function that aiohttp calls for it."""
        room = self.of(front)
        for row in self.rows:
            yield row, partial(row.handler, room)


def handlers_of_annex(annex: Annex[T], front: Front) -> Iterator[tuple[Route[T], Callable]]:
    """The same of an annex. The first request opens it."""
    async def handle(row: Route[T], http: web.Request) -> web.StreamResponse:
        return await row.handler(await front.opened(annex), http)

    for row in annex.routes:
        yield row, partial(handle, row)


def dialect_routes() -> tuple[Route[Front], ...]:
    """The routes of dialects, but for those with a handler of their own."""
    return tuple(Route("POST", path, place.api, Front.handle_body, place.doc)
                 for path, place in all_places() if place.doc)


ROOMS = (
    RoomRoutes(lambda front: front.page, PAGE_ROUTES),
    RoomRoutes(lambda front: front, STREAM_ROUTES),
    RoomRoutes(lambda front: front.models, MODEL_ROUTES),
    RoomRoutes(lambda front: front.models, DISCOVERY_ROUTES),
    RoomRoutes(lambda front: front.bodies, DOCUMENT_ROUTES),
    RoomRoutes(lambda front: front, STATE_ROUTES),
)


def rooms() -> tuple[RoomRoutes, ...]:
    return (RoomRoutes(lambda front: front, dialect_routes()), *ROOMS)


def routes_with(annexes: Seq[Annex]) -> tuple[Route, ...]:
    """The routes of dialects, the core and annexes, with the fields that annexes add to bodies. Raises
    ValueError for annexes or routes with the same name."""
    check_once("two annexes are called", [annex.name for annex in annexes])
    parts: list[Seq[Route]] = [*(room.rows for room in rooms()), *(annex.routes for annex in annexes)]
    rows = [row for part in parts for row in part]
    check_once("two rows are the route", [f"{row.method} {row.pattern}" for row in rows])
    additions = Additions(additions_of(annexes))
    return tuple(row.with_added(additions.of_route) for row in rows)


def check_once(problem: str, names: Seq[str]):
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ValueError(f"{problem} {name}")


ROUTES = routes_with(ANNEXES)


def create_app(catalogue: Catalogue, settings: Settings, store: Store | None = None,
               toolbox: Toolbox | None = None, annexes: Seq[Annex] = ANNEXES) -> web.Application:
    front = Front(catalogue, settings, store, toolbox, annexes)
    access_log = AccessLog(RouteTable(front.routes, settings.prefix), front.is_id_in_use, front.metrics)
    errors = partial(errors_to_responses, home=settings.prefix + "/")
    middlewares: list[Any] = [partial(access_log.log), errors, partial(front.access.guard)]
    app = web.Application(middlewares=list(map(web.middleware, middlewares)))
    app.on_response_prepare.append(front.access.set_headers)
    app.on_startup.append(front.start)
    app.on_cleanup.append(front.close)
    parts = (*(room.handlers(front) for room in rooms()),
             *(handlers_of_annex(annex, front) for annex in annexes))
    for part in parts:
        for route, handler in part:
            paths = [route.path]
            if not route.path.endswith(("/", ":.+}")):
                paths.append(route.path + "/")
            for path in paths:
                if route.method == "GET":
                    app.router.add_get(settings.prefix + path, handler)  # adds HEAD too
                else:
                    app.router.add_route(route.method, settings.prefix + path, handler)
    if settings.prefix:
        app.router.add_get(settings.prefix, front.handle_bare_prefix)
    return app

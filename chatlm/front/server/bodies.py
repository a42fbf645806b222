"""The bodies of HTTP requests: received within a memory budget, read by the intake."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from email.message import Message
from typing import TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError
from chatlm.common.jsontext import dump
from chatlm.common.log import log
from chatlm.front.api.errors import NANOCHAT
from chatlm.front.api.field_types import TEXT
from chatlm.front.api.fields import A_TEXT, Field, header_words, json_object, parse_fields
from chatlm.front.api.ignored import unread
from chatlm.front.api.spoken import path_of_form, place_of
from chatlm.front.intake.opened_body import Caller, OpenedBody
from chatlm.front.intake.budget import Holding
from chatlm.front.server.responses import REQUEST_LOG, json_response
from chatlm.front.server.routes import Route
from chatlm.front.server.streams import read_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp import web
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.front.intake.envelope import Envelope
    from chatlm.front.intake.intake import Intake
    from chatlm.front.pool.models import ModelOrAdapter
    from chatlm.front.server.access import Owners


# (a request, its open body) -> the tools of tool servers that may be run for it, each as JSON
OfferedTools = Callable[["web.Request", "Envelope"], Awaitable[list[bytes]]]


class Bodies:
    """What the handlers of routes ask of the intake. Headers of the response say what had no effect."""

    def __init__(self, intake: Intake, owners: Owners, tools: OfferedTools | None = None):
        self.intake = intake
        self.owners = owners
        self.tools = tools  # None: there are no tool servers

    def holding(self) -> Holding:
        """The share of the budget that the request of this task holds."""
        return Holding(self.intake.budget, REQUEST_LOG.get().client)

    @property
    def owner(self) -> str:
        """Who owns what the request of this task leaves in the store."""
        record = REQUEST_LOG.get()
        return self.owners.of_texts(record.client, record.space)

    def caller(self) -> Caller:
        """Who sent the request of this task."""
        record = REQUEST_LOG.get()
        return Caller(record.route.pattern, record.client, self.owners.of_pages(record.client), record.bound,
                      self.owner)

    @asynccontextmanager
    async def opened(self, http: web.Request, reading: Holding, times: int = 1) -> AsyncIterator[OpenedBody]:
        """Receive a body, whose bytes `reading` then holds, and parse it. times: how often it may be read."""
        most = LIMITS.body_bytes
        if not is_small(http) and self.intake.may_see:
            most = LIMITS.pictured_bytes
        raw = await read_bytes(http, reading, most)
        async with self.intake.opened(self.caller(), raw, times=times) as opened_body:
            record = REQUEST_LOG.get()
            read_as = path_of_form(record.route.pattern, opened_body.envelope.names_model)
            record.api = place_of(read_as).api
            yield opened_body

    async def answer(self, http: web.Request, holding: Holding) -> tuple[ModelOrAdapter, ParsedBody]:
        """The body of a route that answers. `holding` then accounts for what is kept of a large one."""
        with self.holding() as reading:
            async with self.opened(http, reading) as opened_body:
                offered = await self._offered(http, opened_body)
                served, parsed = await self.intake.answer(opened_body, reading, holding, offered)
        record = REQUEST_LOG.get()
        if parsed.ignored_tools:
            names = ", ".join(parsed.ignored_tools)[:1000]
            record.headers["X-Ignored-Tools"] = names
            log.info("%s: the model has no tools of type %s", record.id, names)
        note_ignored(", ".join(parsed.ignored_fields))
        return served, parsed

    async def text(self, http: web.Request, holding: Holding) -> tuple[ModelOrAdapter, bytes]:
        """The text that answers any other body."""
        async with self.opened(http, holding) as opened_body:
            offered = await self._offered(http, opened_body)
            served, ignored, text = await self.intake.text(opened_body, holding, offered=offered)
        note_ignored(ignored)
        return served, text

    async def _offered(self, http: web.Request, opened_body: OpenedBody) -> bytes:
        """The tools that the server may run for a body, as JSON; null: it asks for none."""
        own = [dump(tool) for tool in opened_body.added.offered]
        names_servers = self.tools is not None and bool(opened_body.envelope.servers)
        if not names_servers and not own:
            return b"null"
        if names_servers and self.tools:
            own += await self.tools(http, opened_body.envelope)
        return b"[%s]" % b", ".join(own)

    async def small(self, http: web.Request) -> dict:
        """The checked fields of a small body; of none, no fields."""
        with self.holding() as holding:
            return await self.fields(http, holding, LIMITS.inline_bytes)

    async def fields(self, http: web.Request, holding: Holding, most: int) -> dict:
        """The checked fields of a body of at most `most` bytes, which `holding` then holds. It is parsed
        here, in the event loop."""
        fields = REQUEST_LOG.get().route.fields
        raw = await read_bytes(http, holding, most)
        body = json_object(raw or b"{}")
        values = parse_fields(body, fields)
        note_ignored(", ".join(header_words(unread(body, fields))))
        return values

    async def handle_extract(self, http: web.Request) -> web.Response:
        """The text of a document: the body, or the first file of a form."""
        with self.holding() as holding:
            body = await read_bytes(http, holding, LIMITS.document_bytes)
            if not body:
                raise RequestError("the body is empty: it must be a document, or a form with one")
            boundary = ""
            if http.content_type == "multipart/form-data":
                boundary = boundary_in(http.headers["Content-Type"])
            name = DOCUMENT_NAME.read(http.query.get("name", ""))
            text, pages, cut = await self.intake.extract(self.caller(), name, boundary, body)
        return json_response({"text": text, "pages": pages, "cut": cut})


def boundary_in(content_type: str) -> str:
    """The boundary of a form; "" if it names none."""
    kind = Message()
    kind["Content-Type"] = content_type
    return kind.get_boundary("")


def is_small(http: web.Request) -> bool:
    """Does a body say that it is so small that it may be read here, with whatever it has in it?"""
    return (http.content_length or math.inf) <= LIMITS.inline_bytes and "Content-Encoding" not in http.headers


def note_ignored(names: str):
    """Name fields without effect in a header of the response."""
    if names:
        REQUEST_LOG.get().headers["X-Ignored-Fields"] = names[:1000]


DOCUMENT_NAME = Field("name", TEXT, "the document's file name")
DOCUMENT_ROUTES: tuple[Route[Bodies], ...] = (
    Route("POST", "/extract", NANOCHAT, Bodies.handle_extract,
          "the text of a document, which is the body or the file of a form", query=(DOCUMENT_NAME,),
          returns={"type": "object", "properties": {
              "text": A_TEXT,
              "pages": {"type": ["integer", "null"],
                        "description": "pages, slides, sheets or chapters; null if the format has none"},
              "cut": {"type": ["string", "null"], "description": "what of the document the text lacks"}}}),
)

"""The JSON bodies of requests: read here or, if large, in a sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence as Seq
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.errors import Overloaded, RequestError, shown
from chatlm.common.log import log
from chatlm.front.api.fields import json_object
from chatlm.front.api.picture_parts import (
    Lifted, fill_in, lift_pictures, unpacked_lift, with_files, with_pixels)
from chatlm.front.api.readers import read_answer, read_text, read_variants
from chatlm.front.intake.budget import Budget, Holding
from chatlm.front.server.responses import REQUEST_LOG, json_response
from chatlm.front.server.routes import DOCUMENT_NAME, Api
from chatlm.front.server.streams import read_bytes

if TYPE_CHECKING:
    from aiohttp import web
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.messages.requests import Picture
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.front.pool.catalogue import Catalogue
    from chatlm.front.pool.models import Served
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.server.access import Owners


# (a body, the route whose reader reads it) of a body of a client
Completing = Callable[[bytearray, Holding], Awaitable[tuple[bytes | bytearray, str]]]


def tokenizer_of(pool: WorkerPool) -> Tokenizer:
    if pool.tokenizer is None:
        raise Overloaded("the model is still loading", retry_after_s=2)
    return pool.tokenizer


class Body(NamedTuple):
    """The body of a request, read as far as it says which model it is for."""

    served: Served
    raw: bytes | bytearray
    fields: dict | None          # None: a sandbox must read them, because it is large
    pictures: tuple[Picture, ...] = ()  # that were lifted out of it
    files: Mapping[bytes, bytes] = MappingProxyType({})  # of these, as they were sent, by digest


class Bodies:
    """Reads the bodies of requests within a memory budget, each with its route's reader."""

    def __init__(self, catalogue: Catalogue, owners: Owners):
        self.catalogue, self.owners = catalogue, owners
        self.budget, self.pixels = Budget(LIMITS.held_bytes), Budget(LIMITS.held_pixel_bytes, share=2)
        self.complete: Completing | None = None  # adds to a body what was said before

    def holding(self) -> Holding:
        """The share of the budget that the request of this task holds."""
        return Holding(self.budget, REQUEST_LOG.get().client)

    async def receive(self, http: web.Request, holding: Holding) -> bytearray:
        most = LIMITS.pictured_bytes if self.seeing() else LIMITS.body_bytes
        body, record = await read_bytes(http, holding, most), REQUEST_LOG.get()
        # An OpenAI client whose base URL lacks /v1 (see read_native_body). In JSON, a quote within a string
        # follows a backslash, so this is a key.
        if record.api is Api.NANOCHAT and b'"model"' in body:
            record.api = Api.OPENAI
        return body

    async def resolve(self, name: str, bound: Seq[str], holding: Holding) -> Served:
        """The model or adapter that a request asks for, with the version of its files. `holding` keeps the
        version of the adapter. RequestError if there is none, or if it has failed."""
        served = self.catalogue.find(name, bound)
        pool = served.pool
        if served.adapter:
            holding.others.enter_context(pool.adapters.holding(served.adapter.id))
        await pool.version.current()
        return served._replace(version=pool.version.number)

    def seeing(self) -> list[str]:
        """The names of the models that can see pictures."""
        return [model.name for model in self.catalogue.registry.models
                if model.pool and model.pool.tokenizer and model.pool.tokenizer.spec.vision]

    async def _read(self, body: bytes | bytearray, bound: Seq[str], holding: Holding) -> Body:
        if len(body) <= LIMITS.inline_bytes:
            fields = json_object(body)
            older = fields.get("name") if REQUEST_LOG.get().route.pattern == "/api/show" else None
            name = fields.get("model") or older
            return Body(await self.resolve(name if isinstance(name, str) else "", bound, holding), body,
                        fields)
        name = ""
        if b'"model"' in body:  # any model's sandbox will do
            admission = self.catalogue.find("", bound).pool.admission
            name = await admission.named_model(body, REQUEST_LOG.get().client)
        return Body(await self.resolve(name, bound, holding), body, None)

    def blind(self, pool: WorkerPool) -> str:
        """Why a model is shown no pictures; "" if it can see, or is still loading."""
        if pool.tokenizer is None or pool.tokenizer.spec.vision:
            return ""
        others = ", ".join(map(shown, self.seeing()[:10]))
        return "this model cannot see images" + (
            f"; of the models here, these can: {others}" if others else "")

    async def seen(self, body: Body, holding: Holding, client: str) -> Body:
        """A body whose pictures were lifted out and decoded. Their pixels are held as long as `holding`."""
        pool, fields, found = body.served.pool, body.fields, list[Lifted]()
        refusal = self.blind(pool)
        if fields is not None:
            found = lift_pictures(fields, refusal)
        elif b"image" in body.raw and pool.tokenizer:
            raw, found = unpacked_lift(await pool.admission.told("lift_pictures", client, body.raw, refusal))
            fields = json_object(raw) if len(raw) <= LIMITS.inline_bytes else None
            body = body._replace(raw=raw, fields=fields)
        if not found:
            return body
        tokenizer_of(pool)      # while it loads, nobody knows whether it sees
        pictures, kept = [], holding.others.enter_context(Holding(self.pixels, client))
        for name, data in found:
            try:
                pictures.append(await pool.admission.decode_picture(data, client))
            except RequestError as error:
                raise RequestError(f"{name}: {error}", status=error.status, code=error.code,
                                   param=name) from None
            kept.keep(len(pictures[-1].pixels), "requests with images")
        if fields is not None:
            fill_in(fields, pictures)
        files = {picture.digest: data for picture, (_, data) in zip(pictures, found)}
        return body._replace(pictures=tuple(pictures), files=files)

    async def parse(self, http: web.Request, holding: Holding) -> tuple[Served, ParsedBody]:
        """Read a body with one of ANSWER_READERS. `holding` then accounts for what is kept of a large one."""
        record = REQUEST_LOG.get()
        with self.holding() as reading:
            raw, route = await self.receive(http, reading), record.route.pattern
            if self.complete:
                raw, route = await self.complete(raw, reading)
            body = await self._read(raw, REQUEST_LOG.get().bound, holding)
            body = await self.seen(body, holding, record.client)
            served = body.served
            if body.fields is not None:
                parsed = read_answer(route, body.fields, served.known)
            else:
                tokenizer_of(served.pool)
                parsed = await served.pool.admission.read_large(
                    route, body.raw, record.client, self.owners.of_pages(record.client), body.pictures)
        parsed = replace(parsed, request=with_pixels(served.asked(parsed.request), body.pictures))
        if parsed.kept and body.files:
            parsed = replace(parsed, kept=await asyncio.to_thread(with_files, parsed.kept, body.files))
            holding.keep(sum(len(item.body) for item in parsed.kept))
        if parsed.request.prompt_ids is not None:
            holding.keep(parsed.size)
        if parsed.ignored_tools:
            record.headers["X-Ignored-Tools"] = names = ", ".join(parsed.ignored_tools)[:1000]
            log.info("%s: the model has no tools of type %s", record.id, names)
        if parsed.ignored_fields:
            record.headers["X-Ignored-Fields"] = ", ".join(parsed.ignored_fields)[:1000]
        return served, parsed

    async def read_text(self, http: web.Request, holding: Holding) -> tuple[Served, bytes]:
        """The result of one of TEXT_READERS for a body."""
        return await self.text_of(await self.receive(http, holding), REQUEST_LOG.get().bound, holding)

    async def text_of(self, raw: bytes | bytearray, bound: Seq[str], holding: Holding,
                      seen: bool = True) -> tuple[Served, bytes]:
        """seen: False: whether the model can see the body's pictures does not matter."""
        record, body = REQUEST_LOG.get(), await self._read(raw, bound, holding)
        body = await self.seen(body, holding, record.client) if seen else body
        served, admission = body.served, body.served.pool.admission
        if admission.prompts and body.fields is not None:
            text = await read_text(record.route.pattern, body.fields, admission.prompts, record.client)
        else:
            text = await admission.answer_text(record.route.pattern, body.raw, record.client, body.pictures)
        ignored, _, text = text.partition(b"\n")
        if ignored:
            record.headers["X-Ignored-Fields"] = ignored.decode()[:1000]
        return served, text

    async def handle_extract(self, http: web.Request) -> web.Response:
        """The text of a document: the body, or the first file of a form."""
        from email.message import Message  # 16 modules that no start should wait for
        with self.holding() as holding:
            body = await read_bytes(http, holding, LIMITS.document_bytes)
            if not body:
                raise RequestError("the body is empty: it must be a document, or a form with one")
            kind = Message()
            kind["Content-Type"] = http.headers.get("Content-Type", "")
            boundary = kind.get_boundary("") if http.content_type == "multipart/form-data" else ""
            text, pages, cut = await self.catalogue.find("", REQUEST_LOG.get().bound).pool.admission.extract(
                REQUEST_LOG.get().client, DOCUMENT_NAME.read(http.query.get("name", "")), boundary, body)
        return json_response({"text": text, "pages": pages, "cut": cut})

    async def read_variants(self, body: bytes | bytearray, holding: Holding, served: Served,
                            indices: Seq[int], seed: int) -> list[ParsedBody]:
        """Read what a body of /v1/compare asks of one model, with or without adapters. indices: the numbers
        of its answers. `holding` then accounts for what is kept of a large body."""
        client, found = REQUEST_LOG.get().client, Body(served, body, None)
        if len(body) * LIMITS.compared <= LIMITS.inline_bytes:  # it is read once for each of its models
            found = await self.seen(found._replace(fields=json_object(body)), holding, client)
            read = read_variants(found.fields or {}, indices, seed, served.known)
        else:
            found = await self.seen(found, holding, client)
            read = await served.pool.admission.read_variants(
                found.raw, client, self.owners.of_pages(client), indices, seed, found.pictures)
            holding.keep(sum(parsed.size for parsed in read))
        return [replace(parsed, request=with_pixels(parsed.request, found.pictures)) for parsed in read]

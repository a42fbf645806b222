"""The JSON bodies of requests: read here or, where large, in a sandbox."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING

from chatlm.common.config import LIMITS, with_own_sampling
from chatlm.common.errors import Overloaded
from chatlm.common.log import log
from chatlm.common.messages.protocol import Known
from chatlm.front.api.fields import json_object
from chatlm.front.api.readers import read_answer, read_text, read_variants
from chatlm.front.server.responses import REQUEST_LOG
from chatlm.front.server.routes import Api
from chatlm.front.server.streams import Budget, Holding, read_bytes

if TYPE_CHECKING:
    from aiohttp import web
    from chatlm.common.config import Settings
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.messages.requests import Request
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.front.pool.many import ManyModels
    from chatlm.front.pool.models import Model, OneModel
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.server.access import Owners


def known_of(model: Model) -> Known:
    pool, tokenizer = model.serving(), model.serving().tokenizer
    tool_format, template = (tokenizer.tool_format, tokenizer.spec.chat_template) if tokenizer else (None, "")
    return Known(with_own_sampling(model.settings, pool), pool.model_name, tool_format, pool.ready,
                 template or "", tokenizer is None or tokenizer.has_chat_template, model.adapter_names,
                 tokenizer.never_written if tokenizer else frozenset())


def computed_by(model: Model, request: Request) -> Request:
    """The request, for the model's adapter if it has one."""
    if not model.adapter:
        return request
    return replace(request, params=replace(request.params, adapter=model.adapter.id))


def tokenizer_of(pool: WorkerPool) -> Tokenizer:
    if pool.tokenizer is None:
        raise Overloaded("the model is still loading", retry_after_s=2)
    return pool.tokenizer


class Bodies:
    """Reads the bodies of requests, within a budget of memory. Each has the reader of its route."""

    def __init__(self, models: OneModel | ManyModels, owners: Owners):
        self.models, self.owners = models, owners
        self.budget = Budget(LIMITS.held_bytes)

    def holding(self) -> Holding:
        """What the request of this task holds of the budget."""
        return Holding(self.budget, REQUEST_LOG.get().client)

    async def _receive(self, http: web.Request, holding: Holding) -> bytearray:
        body, record = await read_bytes(http, holding), REQUEST_LOG.get()
        # A client of OpenAI whose base URL lacks /v1, see read_native_body. In JSON, a quote within a text
        # has a backslash before it.
        if record.api is Api.NANOCHAT and b'"model"' in body:
            record.api = Api.OPENAI
        return body

    async def model_of(self, body: bytes | bytearray, holding: Holding) -> Model:
        """The model that a body asks for, of which `holding` then has the version of the adapter.
        RequestError if there is none, or it has failed."""
        record, name = REQUEST_LOG.get(), ""
        if self.models.several and (b'"model"' in body or b'"name"' in body):
            if len(body) <= LIMITS.inline_bytes:
                fields = json_object(body)
                older = fields.get("name") if record.route.pattern == "/api/show" else None
                name = fields.get("model") or older
            else:  # any model's will do
                admission = self.models.find("", record.models).serving().admission
                name = await admission.named_model(body, record.client)
        model = self.models.find(name if isinstance(name, str) else "", record.models)
        await self.hold(model, holding)
        return model

    async def hold(self, model: Model, holding: Holding):
        """Have `holding` keep the version of a model's adapter; then wait until its files are known."""
        pool = model.serving()
        if model.adapter:
            holding.others.enter_context(pool.adapters.holding(model.adapter.id))
        await pool.version.current()

    async def parse(self, http: web.Request, holding: Holding) -> tuple[Model, ParsedBody]:
        """Read a body with one of ANSWER_READERS. `holding` then holds what stays of a large one."""
        record = REQUEST_LOG.get()
        with self.holding() as reading:
            body = await self._receive(http, reading)
            model = await self.model_of(body, holding)
            pool, version = model.serving(), model.serving().version.number
            if len(body) <= LIMITS.inline_bytes:
                parsed = read_answer(record.route.pattern, body, known_of(model))
            else:
                tokenizer_of(pool)
                parsed = await pool.admission.read_large(
                    record.route.pattern, body, record.client, self.owners.of_pages(record.client),
                    model.adapter_names)
        parsed = replace(parsed, request=replace(computed_by(model, parsed.request), version=version))
        if parsed.request.prompt_ids is not None:
            holding.keep(parsed.size)
        if parsed.ignored_tools:
            record.headers["X-Ignored-Tools"] = names = ", ".join(parsed.ignored_tools)[:1000]
            log.info("%s: the model has no tools of type %s", record.id, names)
        if parsed.ignored_fields:
            record.headers["X-Ignored-Fields"] = ", ".join(parsed.ignored_fields)[:1000]
        return model, parsed

    async def read_text(self, http: web.Request, holding: Holding) -> tuple[Model, bytes]:
        """What one of TEXT_READERS makes of a body."""
        return await self.text_of(await self.receive(http, holding), holding)

    async def receive(self, http: web.Request, holding: Holding) -> bytearray:
        """A body for one of TEXT_READERS; Overloaded before there is a tokenizer."""
        if not self.models.several:
            tokenizer_of(self.models.find("", REQUEST_LOG.get().models).serving())
        return await self._receive(http, holding)

    async def text_of(self, body: bytes | bytearray, holding: Holding) -> tuple[Model, bytes]:
        record = REQUEST_LOG.get()
        model = await self.model_of(body, holding)
        pool, admission = model.serving(), model.serving().admission
        if admission.prompts and len(body) <= LIMITS.inline_bytes:
            text = await read_text(record.route.pattern, body, admission.prompts,
                                   known_of(model), record.client)
        else:
            text = await admission.answer_text(record.route.pattern, body, record.client, model.adapter_names)
        ignored, _, text = text.partition(b"\n")
        if ignored:
            record.headers["X-Ignored-Fields"] = ignored.decode()[:1000]
        return model, text

    async def read_variants(self, body: bytes | bytearray, holding: Holding, models: Seq[Model],
                            indices: Seq[int], seed: int) -> list[ParsedBody]:
        """What a body of /v1/compare asks of one model, or of its adapters; `indices` are the numbers of
        their answers. `holding` then holds what stays of a large body."""
        for model in models:
            await self.hold(model, holding)
        pool, client = models[0].serving(), REQUEST_LOG.get().client
        version = pool.version.number
        if len(body) * LIMITS.compared <= LIMITS.inline_bytes:  # each of its models reads it
            read = read_variants(json_object(body), indices, seed, known_of(models[0]))
        else:
            read = await pool.admission.read_variants(
                body, client, self.owners.of_pages(client), indices, seed)
            holding.keep(sum(parsed.size for parsed in read))
        return [replace(parsed, request=replace(parsed.request, version=version)) for parsed in read]

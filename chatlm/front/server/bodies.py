"""The JSON bodies of requests: read here or, where large, in a sandbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.config import LIMITS, with_own_sampling
from chatlm.common.errors import Overloaded
from chatlm.common.log import log
from chatlm.common.messages.protocol import Known
from chatlm.front.api.readers import read_answer, read_text
from chatlm.front.server.responses import REQUEST_LOG
from chatlm.front.server.routes import Api
from chatlm.front.server.streams import Budget, Holding, read_bytes

if TYPE_CHECKING:
    from aiohttp import web
    from chatlm.common.config import Settings
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.server.access import Owners


def known_of(pool: WorkerPool, settings: Settings) -> Known:
    tokenizer = pool.tokenizer
    return Known(with_own_sampling(settings, pool), pool.model_name, tokenizer and tokenizer.tool_format,
                 pool.ready, tokenizer and tokenizer.spec.chat_template or "",
                 tokenizer is None or tokenizer.has_chat_template)


def tokenizer_of(pool: WorkerPool) -> Tokenizer:
    if pool.tokenizer is None:
        raise Overloaded("the model is still loading", retry_after_s=2)
    return pool.tokenizer


class Bodies:
    """Reads the bodies of a pool's requests, within a budget of memory. Each has the reader of its route."""

    def __init__(self, pool: WorkerPool, settings: Settings, owners: Owners):
        self.pool, self.settings, self.owners = pool, settings, owners
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

    async def parse(self, http: web.Request, holding: Holding) -> ParsedBody:
        """Read a body with one of ANSWER_READERS. `holding` then holds what stays of a large one."""
        record, admission = REQUEST_LOG.get(), self.pool.admission
        with self.holding() as reading:
            body = await self._receive(http, reading)
            if len(body) <= LIMITS.inline_bytes:
                parsed = read_answer(record.route.pattern, body, known_of(self.pool, self.settings))
            else:
                tokenizer_of(self.pool)
                parsed = await admission.read_large(
                    record.route.pattern, body, record.client, self.owners.of_pages(record.client))
        if parsed.request.prompt_ids is not None:
            holding.keep(parsed.size)
        if parsed.ignored_tools:
            record.headers["X-Ignored-Tools"] = names = ", ".join(parsed.ignored_tools)[:1000]
            log.info("%s: the model has no tools of type %s", record.id, names)
        if parsed.ignored_fields:
            record.headers["X-Ignored-Fields"] = ", ".join(parsed.ignored_fields)[:1000]
        return parsed

    async def read_text(self, http: web.Request, holding: Holding) -> bytes:
        """What one of TEXT_READERS makes of a body."""
        record, admission = REQUEST_LOG.get(), self.pool.admission
        tokenizer_of(self.pool)
        body = await self._receive(http, holding)
        if admission.prompts and len(body) <= LIMITS.inline_bytes:
            text = await read_text(record.route.pattern, body, admission.prompts,
                                   known_of(self.pool, self.settings), record.client)
        else:
            text = await admission.answer_text(record.route.pattern, body, record.client)
        ignored, _, text = text.partition(b"\n")
        if ignored:
            record.headers["X-Ignored-Fields"] = ignored.decode()[:1000]
        return text

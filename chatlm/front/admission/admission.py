"""Admission: a request becomes token ids that fit, or a refusal.

Work that a client can make slow runs in sandboxes, processes with limits on time and memory: chat templates,
JSON schemas, documents, pictures, and every body above LIMITS.inline_bytes (`chatlm/front/intake/`)."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TYPE_CHECKING

from chatlm.common.config import Settings
from chatlm.common.errors import RequestError, printable
from chatlm.common.log import log
from chatlm.common.memory import trim_heap
from chatlm.common.messages.protocol import Known, NewPicture, SandboxConfig
from chatlm.common.messages.requests import Message, TextSpec
from chatlm.common.processes.start import PROCESS_COMMAND
from chatlm.common.text.history_forms import differences
from chatlm.common.text.load import open_tokenizer
from chatlm.common.vision.pictures import picture_of
from chatlm.front.admission.known import known_with
from chatlm.front.admission.prompts import PromptMaker, run_in_thread_if_long
from chatlm.front.admission.sandbox import Sandbox

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import ModelCard
    from chatlm.common.messages.requests import AnswerParams, Forms, Picture, Request
    from chatlm.common.text.tokenizer import Tokenizer


class SharedSandbox:
    """A sandbox as one of several models uses it."""

    config: SandboxConfig

    def __init__(self, sandbox: Sandbox):
        self.sandbox = sandbox
        self.start = sandbox.start

    async def perform(self, client: str, name: str, *arguments, bodies: Seq[bytes | bytearray] = (),
                      ticket: int = 0):
        return await self.sandbox.perform(client, name, *arguments, bodies=bodies, ticket=ticket,
                                          config=self.config)

    async def forget(self, ticket: int):
        """For the model whose task was the last: any would do."""
        await self.sandbox.forget(ticket, self.config)

    async def close(self):
        """The server closes it."""


class Desk:
    """Where all requests of a server are read, whichever model they are for."""

    def __init__(self):
        self.sandboxes = {name: Sandbox(PROCESS_COMMAND) for name in ("templates", "schemas", "bodies")}
        self.sandboxes["documents"] = Sandbox(PROCESS_COMMAND, single_use=True)
        self.sandboxes["pictures"] = Sandbox(PROCESS_COMMAND)    # sees nothing but pictures
        self.preparing: dict[str, str] = {}      # request being read or rendered -> its client
        self.valid_grammars: OrderedDict[tuple[str, str], None] = OrderedDict()  # (owner, source)
        self.numbers = itertools.count(1)        # of models

    async def close(self):
        await asyncio.gather(*(sandbox.close() for sandbox in self.sandboxes.values()))


class Admission:
    """Prepares requests for the queue: checks schemas, makes prompts.

    Meanwhile they count as waiting, and `check_capacity` refuses those that do not fit."""

    TEMPLATE_S = 0.5      # processor seconds for filling in a chat template,
    SCHEMA_S = 1.0        # for checking a JSON schema,
    BODY_S = 5.0          # for reading a large body
    DOCUMENT_S = 12.0     # for the text of a document
    PICTURE_S = 6.0       # and for decoding a picture
    VALID_GRAMMARS = 256  # remember this many valid grammars, to check none of them twice

    def __init__(self, check_capacity: Callable[[str, str, bool], None], shared: Desk | None = None):
        """shared: the desk that a server's models share, if it has several."""
        desk = shared or Desk()
        self.check_capacity = check_capacity
        self.number = next(desk.numbers)
        self.prompts: PromptMaker | None = None  # set once there is a tokenizer
        self.expected: tuple[TextSpec, asyncio.Future] | None = None  # what a worker is reading
        self.sandboxes: dict[str, Sandbox | SharedSandbox] = {
            name: SharedSandbox(sandbox) if shared else sandbox for name, sandbox in desk.sandboxes.items()}
        self.preparing = desk.preparing
        self.valid_grammars = desk.valid_grammars
        for name in ("documents", "pictures"):
            self._configure(name, Known(Settings(), None), TextSpec("", b""))  # whatever the model

    async def expect(self, text: TextSpec, settings: Settings):
        """Get ready for a card to come, which will have this text. Errors as in `open`."""
        self.expected = text, (opening := asyncio.ensure_future(self._open_text(text, settings)))
        await opening

    async def open(self, card: ModelCard, settings: Settings):
        """Get ready for a model's requests; ConfigError if its tokenizer or chat template is broken."""
        text, opening = self.expected or (None, None)
        self.expected = None
        tokenizer = await (opening if opening and text == card.text else self._open_text(card.text, settings))
        known = known_with(replace(settings, keys=(), api_key=()), tokenizer, card.facts)
        self._configure("bodies", known, card.text, card.context_length, card.scored_length, tokenizer.forms)
        self.prompts = self._prompts_of(tokenizer, card.context_length, card.scored_length)

    async def _open_text(self, text: TextSpec, settings: Settings) -> Tokenizer:
        """The model's tokenizer, opened in a thread. Sandboxes learn the chat template, which is tried."""
        known = Known(replace(settings, keys=(), api_key=()), None)
        for name in ("templates", "schemas"):
            self._configure(name, known, replace(text, payload=b""))
        # not before now: its imports would take a processor from those of front and worker
        if text.chat_template:
            await self.sandboxes["templates"].start()
        tokenizer = await asyncio.to_thread(open_tokenizer, text)
        await asyncio.to_thread(trim_heap)  # of what it was built from
        if tokenizer.templated:
            prompts = self._prompts_of(tokenizer)
            try:
                await prompts.render([Message("user", "hello")], (), "")
            except RequestError as error:  # the template may accept other chats
                log.warning("chats may be refused, as the message \"hello\" was: %s", printable(str(error)))
            if tokenizer.native_tools:
                tokenizer.forms = await prompts.filled(tokenizer.find_forms(), "")
                for difference in differences(tokenizer.forms):
                    log.warning("the model's chat template: %s", difference)
        return tokenizer

    def _configure(self, name: str, known: Known, text: TextSpec, context_length: int = 0,
                   scored_length: int = 0, forms: Forms = ()):
        cpu_s, memory, nice = {"templates": (self.TEMPLATE_S, 256 << 20, 0),
                               "schemas": (self.SCHEMA_S, 256 << 20, 10),
                               "bodies": (self.BODY_S, 1 << 30, 5),
                               "documents": (self.DOCUMENT_S, 1 << 30, 10),
                               "pictures": (self.PICTURE_S, 1 << 30, 5)}[name]
        self.sandboxes[name].config = SandboxConfig(known, text, context_length, cpu_s, memory, nice,
                                                    self.number, scored_length, forms)

    def _prompts_of(self, tokenizer: Tokenizer, context_length: int = 0,
                    scored_length: int = 0) -> PromptMaker:
        return PromptMaker(
            tokenizer, context_length, scored_length=scored_length, run=run_in_thread_if_long,
            fill=lambda arguments, client: self.sandboxes["templates"].perform(
                client, "fill_template", arguments))

    @contextmanager
    def prepare(self, client: str, request_id: str = "", low: bool = False) -> Iterator[None]:
        """Reserve room for a request while it is read and rendered: it counts as waiting. Overloaded while
        there is no tokenizer, and so no `prompts`.

        The id in a large body is not known yet, so another request may take it."""
        request_id = request_id or secrets.token_hex(16)
        self.check_capacity(request_id, client, low)
        self.preparing[request_id] = client
        try:
            yield
        finally:
            del self.preparing[request_id]

    async def admit(self, request: Request) -> Request:
        with self.prepare(request.client, request.id, request.low_priority):
            await self.check_grammar(request.params, request.client, request.params.owner)
            return await self.prompts.admit(request)  # pyright: ignore[reportOptionalMemberAccess]  as `prepare` says

    async def check_grammar(self, params: AnswerParams, client: str, owner: str):
        """Raise RequestError for a grammar that cannot be enforced or costs too much to check.

        Results are remembered per owner, so that a check's duration does not reveal what others asked."""
        for source in filter(None, (params.grammar, *params.call_grammars)):
            if (owner, source) not in self.valid_grammars:
                await self.sandboxes["schemas"].perform(client, "check_grammar", source, params.grammar_param)
                self.valid_grammars[owner, source] = None
        while len(self.valid_grammars) > self.VALID_GRAMMARS:
            self.valid_grammars.popitem(last=False)

    async def decode_picture(self, data: bytes, client: str) -> Picture:
        """The picture in a file. RequestError for one that cannot be read."""
        pixels: Any = await self.sandboxes["pictures"].perform(client, "decode_picture", bodies=[data])
        return picture_of(NewPicture(pixels))

    async def extract(self, client: str, name: str, boundary: str, body: bytes | bytearray) -> Seq:
        """(text, pages, cut) of a document, as in `chatlm.front.api.documents.Extracted`. boundary: of the
        form that the body is; "": the body is the file."""
        found: Any = await self.sandboxes["documents"].perform(
            client, "extract", name, boundary, bodies=[body])
        return found

    async def close(self):
        await asyncio.gather(*(sandbox.close() for sandbox in self.sandboxes.values()))

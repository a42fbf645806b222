"""Admission: a request becomes token ids that fit, or is refused.

Work that a client can make slow runs in sandboxes, processes with limits on time and memory: chat templates,
JSON schemas, documents, pictures, and every body above LIMITS.inline_bytes (`chatlm/front/intake/`)."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence as Seq
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.config import Settings
from chatlm.common.errors import ChatServerError, RequestError, printable
from chatlm.common.log import log
from chatlm.common.memory import trim_heap
from chatlm.common.messages.protocol import Known, NewPicture, SandboxConfig
from chatlm.common.messages.requests import Message, TextSpec
from chatlm.common.processes.start import PROCESS_COMMAND
from chatlm.common.request_ids import duplicate_id
from chatlm.common.text.history_forms import differences
from chatlm.common.text.load import open_tokenizer
from chatlm.common.vision.pictures import picture_of
from chatlm.front.admission.known import known_with
from chatlm.front.admission.prompts import PromptMaker, run_in_thread_if_long
from chatlm.front.admission.sandbox import Sandbox, Sandboxes

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import ModelCard
    from chatlm.common.messages.requests import AnswerParams, Forms, Picture, Request
    from chatlm.common.text.tokenizer import Tokenizer


class SharedAdmission:
    """What the admissions of all models of a server share: the sandboxes, and what is known of requests while
    they are prepared."""

    DOCUMENTS = 3  # that are read at once, one of each client; each may take 1 GiB

    def __init__(self):
        self.sandboxes = {name: Sandbox(PROCESS_COMMAND) for name in ("templates", "schemas", "bodies")}
        self.documents = Sandboxes(PROCESS_COMMAND, self.DOCUMENTS)
        self.sandboxes["pictures"] = Sandbox(PROCESS_COMMAND)  # sees nothing but pictures
        self.preparing: dict[str, str] = {}  # id of a request that is being read or rendered -> its client
        self.valid_grammars: OrderedDict[tuple[str, str], None] = OrderedDict()  # (owner, source)
        self.numbers = itertools.count(1)    # for the models
        self.filled = set[int]()             # the numbers of those that have a chat template

    async def keep_templates(self, number: int, is_filled: bool):
        """Have a process that fills in chat templates, as long as a model needs it. is_filled: does the model
        with this number have one?"""
        templates = self.sandboxes["templates"]
        if is_filled:
            self.filled.add(number)
            await templates.start()
            return
        self.filled.discard(number)
        if not self.filled:
            await templates.stop_idle()

    async def close(self):
        await asyncio.gather(*(each.close() for each in (self.documents, *self.sandboxes.values())))


class SandboxLimits(NamedTuple):
    """What a task in a sandbox may take."""

    cpu_s: float
    memory_bytes: int
    nice: int


class Admission:
    """Prepares requests for the queue: checks schemas and makes prompts.

    While a request is prepared it counts as waiting, and `check_capacity` refuses those that do not fit."""

    # processor seconds
    TEMPLATE_S = 0.5   # to fill in a chat template
    SCHEMA_S = 1.0     # to check a JSON schema
    BODY_S = 5.0       # to read a large body
    DOCUMENT_S = 12.0  # to extract the text of a document
    PICTURE_S = 6.0    # to decode a picture
    AHEAD_S = 0.03        # before a sandbox starts ahead: first the page, for whoever waits for it
    VALID_GRAMMARS = 256  # remember this many valid grammars, so that none is checked twice

    def __init__(self, check_capacity: Callable[[str, str, bool, bool], None], shared: SharedAdmission):
        self.shared = shared
        self.check_capacity = check_capacity
        self.number = next(shared.numbers)
        self.prompts: PromptMaker | None = None  # set once there is a tokenizer
        self.expected: tuple[TextSpec, asyncio.Future] | None = None  # a text that `expect` is opening
        self.sandboxes = shared.sandboxes
        self.configs: dict[str, SandboxConfig] = {}  # this model's, by the name of the sandbox
        self.preparing = shared.preparing
        self.valid_grammars = shared.valid_grammars
        for name in ("documents", "pictures"):
            self._configure(name, Known(Settings(), None), TextSpec("", b""))  # the same for every model

    async def start_ahead(self):
        """Start the process that fills in chat templates, unless a text has come, and have it fill in an
        empty one, for which it imports what it needs."""
        await asyncio.sleep(self.AHEAD_S)
        if self.expected or self.prompts:
            return
        config = self._config("templates", Known(Settings(), None), TextSpec("", b""))
        with suppress(ChatServerError):  # the model's own template will show what is wrong
            await self.sandboxes["templates"].perform(config, "", "fill_template", {})

    async def perform(self, sandbox: str, client: str, name: str, *arguments,
                      bodies: Seq[bytes | bytearray] = (), ticket: int = 0):
        """Run a task for this model in one of the sandboxes, as `Sandbox.perform` does."""
        return await self.sandboxes[sandbox].perform(self.configs[sandbox], client, name, *arguments,
                                                     bodies=bodies, ticket=ticket)

    async def expect(self, text: TextSpec, settings: Settings):
        """Open the text of a card before the card comes. Raises the same errors as `open`."""
        opening = asyncio.ensure_future(self._open_text(text, settings))
        self.expected = text, opening
        await opening

    async def open(self, card: ModelCard, settings: Settings):
        """Get ready for a model's requests. ConfigError if its tokenizer or chat template is broken."""
        text, opening = self.expected or (None, None)
        self.expected = None
        tokenizer = await (opening if opening and text == card.text else self._open_text(card.text, settings))
        known = known_with(replace(settings, keys=(), api_key=()), tokenizer, card.facts)
        self._configure("bodies", known, card.text, card.context_length, card.scored_length, tokenizer.forms)
        self.prompts = self._prompt_maker(tokenizer, card.context_length, card.scored_length)

    async def _open_text(self, text: TextSpec, settings: Settings) -> Tokenizer:
        """Open the model's tokenizer, in a thread. Gives the chat template to the sandboxes and tries it."""
        known = Known(replace(settings, keys=(), api_key=()), None)
        for name in ("templates", "schemas"):
            self._configure(name, known, replace(text, payload=b""))
        await self.shared.keep_templates(self.number, bool(text.chat_template))
        tokenizer = await asyncio.to_thread(open_tokenizer, text)
        await asyncio.to_thread(trim_heap)  # give back what the tokenizer was built from
        if tokenizer.templated:
            prompts = self._prompt_maker(tokenizer)
            try:
                await prompts.render([Message("user", "hello")], (), "")
            except RequestError as error:  # the template may accept other chats
                log.warning("chats may be refused, as the message \"hello\" was: %s", printable(str(error)))
            tokenizer.forms = await prompts.run_filling(tokenizer.find_forms(), "")
            for difference in differences(tokenizer.forms):
                log.warning("the model's chat template: %s", difference)
        return tokenizer

    def _configure(self, name: str, known: Known, text: TextSpec, context_length: int = 0,
                   scored_length: int = 0, forms: Forms = ()):
        self.configs[name] = self._config(name, known, text, context_length, scored_length, forms)

    def _config(self, name: str, known: Known, text: TextSpec, context_length: int = 0,
                scored_length: int = 0, forms: Forms = ()) -> SandboxConfig:
        limits = {
            "templates": SandboxLimits(self.TEMPLATE_S, 256 << 20, nice=0),
            "schemas": SandboxLimits(self.SCHEMA_S, 256 << 20, nice=10),
            "bodies": SandboxLimits(self.BODY_S, 1 << 30, nice=5),
            "documents": SandboxLimits(self.DOCUMENT_S, 1 << 30, nice=10),
            "pictures": SandboxLimits(self.PICTURE_S, 1 << 30, nice=5)}[name]
        return SandboxConfig(
            known, text, context_length, limits.cpu_s, limits.memory_bytes, limits.nice, self.number,
            scored_length, forms)

    def _prompt_maker(self, tokenizer: Tokenizer, context_length: int = 0,
                    scored_length: int = 0) -> PromptMaker:
        return PromptMaker(
            tokenizer, context_length, scored_length=scored_length, run=run_in_thread_if_long,
            fill=lambda arguments, client: self.perform("templates", client, "fill_template", arguments))

    @contextmanager
    def prepare(self, client: str, request_id: str = "", low: bool = False,
                goes_on: bool = False) -> Iterator[None]:
        """Count a request as waiting while it is read and rendered. Raises Overloaded while there is no
        tokenizer, and so no `prompts`. goes_on: it is a round of an answer that holds a place.

        The id in a large body is not known yet. So another request may take it meanwhile."""
        request_id = request_id or secrets.token_hex(16)
        self.check_capacity(request_id, client, low, goes_on)
        if request_id in self.preparing:
            raise duplicate_id(request_id)
        if goes_on:  # counted already
            yield
            return
        self.preparing[request_id] = client
        try:
            yield
        finally:
            del self.preparing[request_id]

    async def admit(self, request: Request) -> Request:
        with self.prepare(request.client, request.id, request.low_priority, request.round > 0):
            await self.check_grammar(request.params, request.client, request.params.owner)
            return await self.prompts.admit(request)  # pyright: ignore[reportOptionalMemberAccess]  as `prepare` says

    async def check_grammar(self, params: AnswerParams, client: str, owner: str):
        """Raise RequestError for a grammar that cannot be enforced, or that costs too much to check.

        Results are remembered for each owner separately. So the duration of a check does not reveal what
        others asked for."""
        for source in filter(None, (params.grammar, *params.call_grammars)):
            if (owner, source) not in self.valid_grammars:
                await self.perform("schemas", client, "check_grammar", source, params.grammar_param)
                self.valid_grammars[owner, source] = None
        while len(self.valid_grammars) > self.VALID_GRAMMARS:
            self.valid_grammars.popitem(last=False)

    async def decode_picture(self, data: bytes, client: str) -> Picture:
        """Decode a picture file. Raises RequestError if it cannot be read."""
        pixels: Any = await self.perform("pictures", client, "decode_picture", bodies=[data])
        return picture_of(NewPicture(pixels))

    async def extract(self, client: str, name: str, boundary: str, body: bytes | bytearray) -> Seq:
        """(text, pages, cut) of a document, as in `chatlm.front.documents.extract.Extracted`. boundary: the
        boundary of the form that the body is; "": the body is the file itself."""
        extracted: Any = await self.shared.documents.perform(
            self.configs["documents"], client, "extract", name, boundary, bodies=[body])
        return extracted

    def close(self):
        """The model is served no longer."""
        self.shared.filled.discard(self.number)

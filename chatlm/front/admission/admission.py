"""Admission: a request becomes token ids that fit, or a refusal.

Small bodies are read here, in the event loop. Work that a client can make slow runs in sandboxes, processes
with limits on time and memory: chat templates, JSON schemas, and every body above LIMITS.inline_bytes."""

from __future__ import annotations

import asyncio
import base64
import functools
import itertools
import os
import secrets
import signal
import subprocess
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence as Seq
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, TYPE_CHECKING

from chatlm.common.client_words import shutting_down
from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError, EngineFailure, RequestError, printable
from chatlm.common.jsontext import is_text
from chatlm.common.lanes import Lanes
from chatlm.common.log import log
from chatlm.common.memory import trim_heap
from chatlm.common.messages.protocol import (
    SANDBOX_MODELS, SANDBOX_OUT_OF_MEMORY, SANDBOX_PIPE, Begun, Body, Known, NewPicture, ParsedBody,
    Refused, Result, SandboxConfig, Task)
from chatlm.common.messages.requests import Message, TextSpec
from chatlm.common.messages.wire import HEADER, BadMessage, object_restorer, unpacked
from chatlm.common.processes.start import PROCESS_COMMAND, exit_in_words, patient, start_child
from chatlm.common.text.history_forms import differences
from chatlm.common.text.load import open_tokenizer
from chatlm.common.vision.pictures import picture_of
from chatlm.front.admission.prompts import PromptMaker, run_in_thread_if_long

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import ModelCard
    from chatlm.common.messages.requests import AnswerParams, Forms, ModelFacts, Picture, Request
    from chatlm.common.messages.wire import Pipe
    from chatlm.common.text.tokenizer import Tokenizer


WRITE_BYTES = 1 << 18  # large data is written in pieces of this size, so that others get a turn


class Turns:
    """A lock that clients hold in turn."""

    def __init__(self):
        self.held, self.lanes = False, Lanes()

    async def take(self, client: str):
        if not self.held:
            self.held = True
            return
        self.lanes.append(client, turn := asyncio.get_running_loop().create_future())
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it got the lock at the moment it was cancelled
                self.give_back()
            raise

    def give_back(self):
        while len(self.lanes):
            if not (turn := self.lanes.pop()).done():
                return turn.set_result(None)
        self.held = False


async def next_message(reader: asyncio.StreamReader, pipe: Pipe):
    """The next message from a pipe. Read in parts: readexactly would copy 20 MB twice in one go.

    A large one is decoded in a thread, so that others get a turn."""
    kind, size = pipe.kind_and_size(await reader.readexactly(HEADER.size))
    parts = []
    while size:
        if not (part := await reader.read(min(size, WRITE_BYTES))):
            raise asyncio.IncompleteReadError(b"", size)
        parts.append(part)
        size -= len(part)
    body = b"".join(parts)
    return unpacked(kind, body) if len(body) <= WRITE_BYTES else await asyncio.to_thread(unpacked, kind, body)


class Sandbox:
    """A process for tasks that a client can make slow. It runs one at a time, with clients taking turns.

    A task that exceeds its processor time or memory is refused. It ends the process, and the next task gets
    a new one. If a process ends before it has begun a task, another one runs that task."""

    PATIENCE_S = 60.0  # longest wait for a reply: a busy machine may give the task no processor
    EXIT_S = 2.0       # longest wait for a process that has closed its pipe to exit
    PROCESSES = 3      # that may end before they have begun a task, until the server gives it up
    # Exit statuses of a process that exceeded a limit.
    EXCESS = (-signal.SIGPROF, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGKILL)

    config: SandboxConfig  # set before the first task

    def __init__(self, command: Seq[str], config: SandboxConfig | None = None, single_use: bool = False):
        """single_use: each task gets a process of its own; what breaks its libraries reaches no other."""
        self.command, self.turns, self.single_use = command, Turns(), single_use
        if config:
            self.config = config
        self.process: subprocess.Popen | None = None
        self.configs: list[SandboxConfig] = []  # that the process has, the last used last
        self.closed = self.begun = False

    async def perform(self, client: str, task: str, *arguments, body: bytes | bytearray | None = None,
                      config: SandboxConfig | None = None):
        """Run a task, by default for the usual model, and return its value. RequestError if it refuses or
        exceeds a limit."""
        await self.turns.take(client)
        config = config or self.config
        messages = [Task(task, list(arguments), config.number), *([] if body is None else [Body(body)])]
        exchange = asyncio.ensure_future(self._exchange(config, messages))  # continues if its client leaves
        exchange.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # else it is logged
        exchange.add_done_callback(lambda ended: self.turns.give_back())
        try:
            return await asyncio.shield(exchange)
        finally:
            del exchange  # it holds its exception, whose traceback holds this frame, and so the body

    async def start(self):
        """Start the process unless it is running. Its configuration follows with the first task."""
        if self.process is None:
            self.configs = []
            environment = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
            self.process, ours = start_child(self.command, "sandbox", os.environ | environment)
            self.reader, self.writer = await asyncio.open_connection(sock=ours)

    async def _exchange(self, config: SandboxConfig, messages: Seq[Any]):
        for process in range(1, self.PROCESSES + 1):
            if self.closed:
                raise shutting_down()
            await self.start()
            try:
                reply = await asyncio.wait_for(self._ask(config, messages), patient(self.PATIENCE_S))
                break
            except (asyncio.IncompleteReadError, ConnectionError, asyncio.TimeoutError, BadMessage) as error:
                code = await self.stop(0.0 if isinstance(error, asyncio.TimeoutError) else self.EXIT_S)
                if self.closed:  # which ended the process
                    raise shutting_down() from None
                if code == SANDBOX_OUT_OF_MEMORY or self.begun and code in self.EXCESS:
                    raise RequestError(
                        f"too complex: this takes more than {config.cpu_s:g} s of processor time "
                        f"or {config.memory >> 20} MiB", code="too_complex") from None
                if self.begun or process == self.PROCESSES:
                    when = "" if self.begun else f" before it began, as {process - 1} before it"
                    raise EngineFailure(
                        f"the process that reads requests ended{when} (exit status {code})") from error
                log.warning("a sandbox ended before it began its task, which another one runs (%s)",
                            exit_in_words(code))
        if self.single_use:
            await self.stop()
        match reply:
            case Result(value):
                return value
            case Body(data):
                return data
            case Refused(message, _, ConfigError.type):
                raise ConfigError(message)
            case Refused(message, status, code, param, words):
                raise RequestError(message, status=status, code=code, param=param, words=words)
        raise BadMessage(f"unexpected message from a sandbox: {type(reply).__name__}")

    async def _ask(self, config: SandboxConfig, messages: Seq[Any]):
        """Send a task; returns the reply."""
        self.begun = False
        messages = messages if config in self.configs else [config, *messages]
        self.configs = [*(known for known in self.configs if known.number != config.number),
                        config][-SANDBOX_MODELS:]
        for message in messages:
            packed = memoryview(SANDBOX_PIPE.packed(message))
            for begin in range(0, len(packed), WRITE_BYTES):
                self.writer.write(packed[begin:begin + WRITE_BYTES])
                await self.writer.drain()
        if not isinstance(message := await next_message(self.reader, SANDBOX_PIPE), Begun):
            raise BadMessage(f"a sandbox said {type(message).__name__} before it had begun a task")
        self.begun = True
        return await next_message(self.reader, SANDBOX_PIPE)

    async def stop(self, patience_s: float = 0.0) -> int | None:
        """Kill the process, if any, unless it exits within patience_s; returns its exit status."""
        process, self.process = self.process, None
        if process is None:
            return None
        if writer := getattr(self, "writer", None):  # one that is being started has none yet
            writer.close()
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, patience_s)
        process.kill()
        return await asyncio.to_thread(process.wait)

    async def close(self):
        self.closed = True
        await self.stop()


class SharedSandbox:
    """A sandbox as one of several models uses it."""

    config: SandboxConfig

    def __init__(self, sandbox: Sandbox):
        self.sandbox, self.start = sandbox, sandbox.start

    async def perform(self, client: str, task: str, *arguments, body: bytes | bytearray | None = None):
        return await self.sandbox.perform(client, task, *arguments, body=body, config=self.config)

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


def known_with(settings: Settings, tokenizer: Tokenizer | None, facts: ModelFacts) -> Known:
    """What is known of a model with this tokenizer; None: it is still loading. settings: with the sampling of
    the model's own files."""
    if tokenizer is None:
        return Known(settings, None)
    return Known(settings, tokenizer.tool_format, template=tokenizer.spec.chat_template or "",
                 chats=not tokenizer.continues_texts, never_written=tokenizer.never_written,
                 infill=tokenizer.infill_tokens, embedder=tokenizer.spec.embedder, width=facts.width)


class Admission:
    """Prepares requests for the queue: reads large bodies, checks schemas, makes prompts.

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
        self.check_capacity, self.number = check_capacity, next(desk.numbers)
        self.prompts: PromptMaker | None = None  # set once there is a tokenizer
        self.expected: tuple[TextSpec, asyncio.Future] | None = None  # what a worker is reading
        self.sandboxes: dict[str, Sandbox | SharedSandbox] = {
            name: SharedSandbox(sandbox) if shared else sandbox for name, sandbox in desk.sandboxes.items()}
        self.preparing, self.valid_grammars = desk.preparing, desk.valid_grammars
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
    def _prepare(self, client: str, request_id: str = "", low: bool = False) -> Iterator[None]:
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
        with self._prepare(request.client, request.id, request.low_priority):
            await self._check_grammar(request.params, request.client, request.params.owner)
            return await self.prompts.admit(request)  # pyright: ignore[reportOptionalMemberAccess]  as _prepare says

    async def _check_grammar(self, params: AnswerParams, client: str, owner: str):
        """Raise RequestError for a grammar that cannot be enforced or costs too much to check.

        Results are remembered per owner, so that a check's duration does not reveal what others asked."""
        for source in filter(None, (params.grammar, *params.call_grammars)):
            if (owner, source) not in self.valid_grammars:
                await self.sandboxes["schemas"].perform(client, "check_grammar", source, params.grammar_param)
                self.valid_grammars[owner, source] = None
        while len(self.valid_grammars) > self.VALID_GRAMMARS:
            self.valid_grammars.popitem(last=False)

    async def read_large(self, reader: str, body: bytes | bytearray, client: str, owner: str,
                         pictures: Seq[Picture] = ()) -> ParsedBody:
        """Read a large body of a route that answers, and check its grammar. pictures: what was lifted out."""
        [parsed] = await self._read(client, owner, body, "read_body", reader, listed(pictures))
        return parsed

    async def read_line(self, number: int, identity: str, line: bytes, client: str, owner: str,
                        pictures: Seq[Picture] = ()) -> ParsedBody:
        """Read the body in a large line of a batch; identity: as in batch_lines.read_line."""
        [parsed] = await self._read(client, owner, line, "read_line", number, identity, listed(pictures))
        return parsed

    async def read_variants(self, body: bytes | bytearray, client: str, owner: str, indices: Seq[int],
                            seed: int, pictures: Seq[Picture] = ()) -> list[ParsedBody]:
        """Read the questions of some of the answers from a large body of /v1/compare."""
        return await self._read(client, owner, body, "read_variants", list(indices), seed,
                                listed(pictures))

    async def told(self, task: str, client: str, body: bytes | bytearray, *arguments) -> Any:
        """What a task of chatlm/front/api/body_tasks.py finds in a large body: chained, check_lines and
        lift_pictures are such."""
        with self._prepare(client):
            return await self.sandboxes["bodies"].perform(client, task, *arguments, body=body)

    async def decode_picture(self, data: bytes, client: str) -> Picture:
        """The picture in a file. RequestError for one that cannot be read."""
        pixels: Any = await self.sandboxes["pictures"].perform(client, "decode_picture", body=data)
        return picture_of(NewPicture(pixels))

    async def _read(self, client: str, owner: str, body: bytes | bytearray, task: str,
                    *arguments) -> list[ParsedBody]:
        with self._prepare(client):
            packed: Any = await self.sandboxes["bodies"].perform(client, task, *arguments, body=body)
            vocab_size = self.prompts.tokenizer.vocab_size  # pyright: ignore[reportOptionalMemberAccess]  as _prepare says
            read = [await asyncio.to_thread(unpacked_body, values, vocab_size) for values in packed]
            del packed
            for parsed in read:
                await self._check_grammar(parsed.request.params, client, owner)
            return read

    async def answer_text(self, route: str, body: bytes | bytearray, client: str,
                          pictures: Seq[Picture] = ()) -> bytes:
        with self._prepare(client):
            text: Any = await self.sandboxes["bodies"].perform(
                client, "answer_text", route, listed(pictures), body=body)
            return text

    async def named_model(self, body: bytes | bytearray, client: str) -> str:
        """The name of the model in a large body; "" if it has none."""
        with self._prepare(client):
            name: Any = await self.sandboxes["bodies"].perform(client, "named_model", body=body)
            return name

    async def extract(self, client: str, name: str, boundary: str, body: bytes | bytearray) -> Seq:
        """(text, pages, cut) of a document, as in `chatlm.front.api.documents.Extracted`. boundary: of the
        form that the body is; "": the body is the file."""
        return await self.sandboxes["documents"].perform(client, "extract", name, boundary, body=body)

    async def close(self):
        await asyncio.gather(*(sandbox.close() for sandbox in self.sandboxes.values()))


def listed(pictures: Seq[Picture]) -> list:
    """All of pictures but their pixels, for a sandbox."""
    return [[each.width, each.height, base64.b64encode(each.digest).decode()] for each in pictures]


def packed_body(parsed: ParsedBody, prompt_ids: Seq[Seq[int]]) -> list:
    """For the front: millions of ids as JSON numbers would stop its event loop while they are read.

    Prompts that are ids are sent once."""
    both = zip(parsed.request.prompts, prompt_ids)
    prompts = tuple(() if prompt == ids else prompt for prompt, ids in both)
    return [replace(parsed, request=replace(parsed.request, prompts=prompts, prompt_ids=None)),
            [array("I", ids).tobytes() for ids in prompt_ids]]


def unpacked_body(values: Seq, vocab_size: int) -> ParsedBody:
    """What packed_body packed. Equal ids are one object, so that each takes 8 bytes; where there are
    pictures, whose rows have ids beyond the vocabulary, each is its own. Made piece by piece: other threads
    get no turn within one call of C."""
    parsed, prompts = object_restorer(ParsedBody)(values[0]), []
    object_of = int if parsed.request.pictures else integers(vocab_size).__getitem__
    for data in map(base64.b64decode, values[1]):
        prompts.append(prompt := [])
        for begin in range(0, len(data), WRITE_BYTES):
            prompt.extend(map(object_of, array("I", data[begin:begin + WRITE_BYTES])))
    ids = tuple(map(tuple, prompts))
    prompts = tuple(own if prompt == () else prompt for prompt, own in zip(parsed.request.prompts, ids))
    return replace(parsed, request=replace(parsed.request, prompts=prompts, prompt_ids=ids))


@functools.cache
def integers(end: int) -> list[int]:
    return list(range(end))

"""A pool without a model, for tests of the HTTP side: the test says what it answers, and when."""

import asyncio
import contextlib
import copy
import json
from types import SimpleNamespace

from chatlm.common.config import Settings
from chatlm.common.errors import Overloaded, RequestError
from chatlm.common.messages.protocol import SANDBOX_PIPE, Body, Known, SandboxConfig
from chatlm.common.messages.requests import Accepted, Finished, InfillTokens, ModelFacts, Piece, PromptProgress, TextSpec, Usage
from chatlm.common.messages.wire import HEADER, unpacked
from chatlm.common.text.grammar import check_grammar
from chatlm.common.text.reader import answer_reader
from chatlm.common.text.tokenizer import Tokenizer
from chatlm.front.admission.prompts import PromptMaker, run_in_thread_if_long
from chatlm.front.front import ROUTES, create_app
from chatlm.front.intake.sandboxed import OpenBodyCache, Tasks
from chatlm.front.pool.catalogue import Catalogue
from chatlm.front.pool.memory import OwnMemory
from chatlm.front.server import access, connections
from chatlm.front.server.routes import RouteTable
from answers import said


def finished(pieces, reason="stop", stop_reason="eos", choice=0):
    return Finished(reason, stop_reason, Usage(prompt_tokens=7, completion_tokens=len(pieces), cached_tokens=3), queue_ms=0.25,
                    ttft_ms=8.125, tokens_per_second=212.34, gpu=0, choice=choice)


class Letters(Tokenizer):
    """Every byte is a token, and 256 is special."""

    vocab_size = 257

    def __init__(self):
        bytes_of_no_text = InfillTokens(0xf8, 0xf9, 0xfa)
        super().__init__(TextSpec("letters", b"", stop_tokens=frozenset({256}), eos_token=256, infill=bytes_of_no_text))
        self.specials = {"<|end|>": 256}

    def encode(self, text, begins=True):
        return list(text.encode())

    encode_with_specials = encode

    def render(self, messages, tools=(), options=None):
        return self.encode("".join(f"{message.role}: {message.content}\n" for message in messages))

    def piece(self, token):
        return bytes([token]) if token < 256 else b""


class SandboxHere:
    """The sandbox of bodies, in a thread of this process. `tasks` are those that it was given: (client, name, arguments). If `refusal` is an exception,
    each raises it."""

    def __init__(self, pool):
        self.pool, self.tasks, self.refusal = pool, [], None

    async def forget(self, ticket):
        """It keeps none: each task gets its body."""

    async def perform(self, client, name, *arguments, bodies=(), ticket=0):
        self.tasks.append((client, name, *arguments))
        if self.refusal:
            raise self.refusal
        known = Known(Settings(), self.pool.tokenizer.tool_format, infill=self.pool.tokenizer.infill_tokens)
        tasks = Tasks(SandboxConfig(known, None, 0, 5.0, 0), OpenBodyCache())
        tasks.bodies.prompts = PromptMaker(self.pool.tokenizer, self.pool.context_length)
        reply = await asyncio.to_thread(tasks.task(name), *arguments, *map(bytes, bodies))
        came = unpacked(type(reply), SANDBOX_PIPE.packed(reply)[HEADER.size:])
        return came.data if isinstance(came, Body) else came.value


class FakePool:
    """Answers every request with `pieces`, one choice after another. An exception among the pieces is raised;
    one may be another event. With tools, the calls in them are read as a worker reads them.

    If `gate` is an asyncio.Event, every piece waits for it. `requests` are those that arrived, `open` is the
    number being answered, and `until_open(n)` waits for a number without polling.
    """

    admission = property(lambda self: self)
    model_name, created, context_length, tokenizer = "fake-model", 1_700_000_000, 4096, Letters()
    source = None       # where its files are
    beside = ()         # and what it reads with them
    own_sampling, continues, ends_thinking, chats, continues_texts = ({}, ""), True, True, True, False
    checkpoint = {}
    sees = False
    in_rounds = 0
    supervisor = SimpleNamespace(ready_workers=(), unloaded=False, load_for_request=lambda: None, card=SimpleNamespace(facts=ModelFacts("llama", "gguf", 134_515_008, "q4_1", 98_000_000, 576, 30), longest=4096))
    adapters = SimpleNamespace(serving={}, removed=set(), nbytes=0)
    dispatcher = SimpleNamespace(wanted=SimpleNamespace(is_set=lambda: True))

    def __init__(self, pieces=("Hello", ", ", "world!"), *, reason="stop", stop_reason="eos", refuse=None, gate=None):
        self.pieces, self.reason, self.stop_reason, self.refuse, self.gate = pieces, reason, stop_reason, refuse, gate
        self.tokenizer = copy.copy(self.tokenizer)      # its own: tests change what it says of its template
        self.prompts = PromptMaker(self.tokenizer, self.context_length, run=run_in_thread_if_long)
        self.ready, self.draining, self.open, self.requests = True, False, 0, []
        self.cancelled, self.closed = {}, False
        self.cuts = {}      # (id, choice) of answers that were ended -> why
        self.thinking, self.hurried = True, []      # what `end_thinking` finds, and the ids it was asked for
        self.changed = asyncio.Condition()
        self.sandboxes = {"bodies": SandboxHere(self)}
        # an asyncio.Event that start-up waits for; then comes `failure`, or it is ready
        self.loading = None
        self.failure = None
        self.memory = OwnMemory(self)
        self.on_progress = lambda stage, fraction: None

    def get_ahead(self):
        """It has nothing to begin while a model loads."""

    async def _current():
        """Its files do not change."""

    revision = SimpleNamespace(number=0, current=_current)

    async def perform(self, sandbox, client, name, *arguments, **bodies):
        return await self.sandboxes[sandbox].perform(client, name, *arguments, **bodies)

    def prepare(self, client):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def place_for(self, request):
        self.in_rounds += 1
        try:
            yield
        finally:
            self.in_rounds -= 1

    async def admit(self, request):
        return await self.prompts.admit(request)

    async def check_grammar(self, params, client, owner):
        """Its answers check them."""

    async def answer(self, request):
        for source in filter(None, (request.params.grammar, *request.params.call_grammars)):
            check_grammar(source, request.params.grammar_param)
        if self.draining or not self.ready:
            raise Overloaded("the model is still loading", retry_after_s=2)
        if self.refuse:
            raise self.refuse
        self.requests.append(request)
        self.cancelled[request.id] = asyncio.Event()
        await self._count(+1)
        try:
            prompts = len(request.prompts) or 1
            yield Accepted(7 * prompts, (7,) * prompts)
            for choice in range((len(request.prompts) or 1) * request.n):
                reader = answer_reader(self.tokenizer, request.params, ())
                for number, piece in enumerate(self.pieces, 1):
                    if self.gate:
                        await self._gate_or_cancel(request)
                    if isinstance(piece, Exception):
                        raise piece
                    if isinstance(piece, PromptProgress):
                        if request.params.progress:
                            yield piece
                        continue
                    piece = said(piece, tokens=(1,)) if isinstance(piece, str) else piece
                    if reader and isinstance(piece, Piece):
                        reader.push(piece.text)
                        if number == len(self.pieces):
                            reader.finish(self.reason == "length")
                        piece = piece._replace(deltas=tuple(reader.take()))
                    yield piece._replace(choice=choice)
                    if (request.id, choice) in self.cuts:
                        break
                if cause := self.cuts.get((request.id, choice)):
                    yield finished(self.pieces[:number], "length", cause, choice)
                else:
                    yield finished(self.pieces, self.reason, self.stop_reason, choice)
        finally:
            del self.cancelled[request.id]
            await asyncio.shield(self._count(-1))

    async def _gate_or_cancel(self, request):
        waits = [asyncio.ensure_future(event.wait()) for event in (self.gate, self.cancelled[request.id])]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self.cancelled[request.id].is_set():
            raise RequestError("the request was cancelled", status=499, code="cancelled")

    async def _count(self, change):
        async with self.changed:
            self.open += change
            self.changed.notify_all()

    async def until_open(self, count):
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(lambda: self.open == count), 20)

    def cancel(self, request_id):
        if request_id in self.cancelled:
            self.cancelled[request_id].set()
        return request_id in self.cancelled

    def cut(self, request_id, choice, cause):
        self.cuts[request_id, choice] = cause

    async def end_thinking(self, request_id):
        self.hurried.append(request_id)
        return self.thinking

    def health(self):
        body = {"status": "ok" if self.ready else "loading", "ready": self.ready, "num_gpus": 1, "available_workers": 1}
        if not self.ready:
            body["loading"] = {"stage": "loading weights", "fraction": 0.5}
        return (200 if self.ready else 503), body

    def stats(self):
        return {"total_workers": 1, "available_workers": 1, "busy_workers": 0, "workers": [], "queue_depth": 0, "delayed_answers": 0,
                "model": self.model_name}

    def describe(self):
        return ["Model: fake-model"]

    async def start(self):
        self.ready = self.loading is None

    async def wait_ready(self):
        if self.loading:
            await self.loading.wait()
        if self.failure:
            raise self.failure
        self.ready = True

    async def drain(self, timeout_s):
        self.draining, self.ready = True, False
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.until_open(0), timeout_s)
        return not self.open

    async def close(self):
        self.closed = True
        for request_id in self.cancelled:
            self.cancel(request_id)


def catalogue_of(pool, settings):
    return pool if isinstance(pool, Catalogue) else Catalogue(settings, pool)


@contextlib.asynccontextmanager
async def serving(pool, settings=None, store=None, **limits):
    """`pool` behind the real routes on a port of 127.0.0.1, run as `serve_forever` runs them; yields the base URL."""
    with access.listen_on("127.0.0.1", 0) as listener:
        settings = settings or Settings()
        is_polled = RouteTable(ROUTES, settings.prefix).is_polled
        async with connections.serving(create_app(catalogue_of(pool, settings), settings, store), listener, is_polled=is_polled, **limits):
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def frames(body: bytes) -> list:
    """The `data:` objects of a whole event stream, `[DONE]` as that string."""
    lines = [block.removeprefix("data: ") for block in body.decode().split("\n\n") if block.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def conversation(text="Hi"):
    return {"messages": [{"role": "user", "content": text}]}

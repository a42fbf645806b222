"""A server at --url, with the interface of a local pool."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, TYPE_CHECKING
from urllib.parse import quote

import aiohttp

from chatlm.common.config import PING_S
from chatlm.common.errors import ChatServerError, ConfigError, EngineFailure, Overloaded, did_you_mean
from chatlm.common.hub.nanochat_checkpoints import checkpoint_flags
from chatlm.common.jsontext import as_json
from chatlm.common.log import ProgressDisplay
from chatlm.common.messages.requests import SAMPLING_DEFAULTS, SAMPLING_FLAGS, Accepted, Message
from chatlm.common.text.calculations import calculations_of
from chatlm.front.api.encode import calculator_member
from chatlm.front.pool.pool import WorkerPool, make_pool
from chatlm.terminal.remote_streams import (
    RemoteAnswerReader, RemoteStream, broken, connection_errors, object_in, reason_of)

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import Event, Request


NATIVE_ROUTE = "chat/completions"


class RemotePool:
    """A running server (--url) with the same `answer` as WorkerPool.

    Requests go to /v1, or to nanochat's /chat/completions if the server has only that. A broken stream is
    resumed if the server kept it; an answer without a reader is cancelled on the server."""

    CONTINUING = "vllm", "sglang", "llamacpp"  # can continue a last message, but do not list it
    ready = True

    def __init__(self, settings: Settings):
        if flags := checkpoint_flags(settings) or " ".join(f"--lora {folder}" for folder in settings.lora):
            raise ConfigError(f"{flags}: only for a model that is loaded here, but --url names a server")
        self.own_sampling: tuple[dict, str] = {}, ""
        url = (settings.url or "").rstrip("/").removesuffix("/v1")
        self.wanted = settings.model  # one of the server's
        self.url = url if "://" in url else f"http://{url}"
        self.headers = {"Authorization": f"Bearer {key}" for key in settings.api_key[:1]}
        self.on_progress: Callable[[str, float], None] = lambda stage, fraction: None
        self.client: Any = None
        self.model: dict = {}  # its entry in /v1/models
        # has it only nanochat's route? has it answered yet?
        self.native = False
        self.reached = False
        self.knowledge: dict = {}        # what requests of chats have besides: which collections they ask
        self.passages: dict | None = None  # what the last answer was given of them

    async def start(self):
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=6 * PING_S)
        self.client = aiohttp.ClientSession(timeout=timeout, headers=self.headers)

    async def wait_ready(self):
        """Wait until the server is ready. ConfigError if there is no server."""
        while not (health := await self.get("health", 503)).get("ready", True):
            if "loading" not in health:
                reason = health.get("status", "no reason given")
                raise Overloaded(f"the server at {self.url} is not ready ({reason})")
            loading = health["loading"]
            self.on_progress(f"server: {loading.get('stage')}", float(loading.get("fraction") or 0))
            await asyncio.sleep(0.5)
        listed = (await self.get("v1/models")).get("data")
        if not listed and "ready" not in health:
            raise ConfigError(f"{self.url} is not a chat server: "
                              "neither /health nor /v1/models answers like one")
        models = [model for model in listed if isinstance(model, dict)] if isinstance(listed, list) else []
        self.model = await self._choose(models)
        defaults = object_in(self.model, "defaults")
        numbers = {name: defaults[name] for name in SAMPLING_DEFAULTS
                   if type(defaults.get(name)) in (int, float)}
        self.own_sampling = numbers, "the server"

    async def _choose(self, models: list[dict]) -> dict:
        """The server's first model, or the one that MODEL names; ConfigError if it has none."""
        name = self.wanted
        ids = [str(model.get("id")) for model in models]
        if name is None:
            return models[0] if models else {}
        if name in ids:
            return models[ids.index(name)]
        model = await self.get(f"v1/models/{quote(name)}")  # it may be an alias
        if model.get("id"):
            return model
        has = f"it has {', '.join(ids)}{did_you_mean(name, ids)}" if ids else "it does not list its models"
        raise ConfigError(f"MODEL {name}: the server at {self.url} has no such model; {has}")

    async def ask(self, method: str, path: str, **options):
        """Send a request. ConfigError if no server answers, EngineFailure if it stops responding."""
        try:
            response = await self.client.request(method, f"{self.url}/{path}", **options)
            self.reached = True
            return response
        except connection_errors() as error:
            if self.reached and not isinstance(error, (aiohttp.ClientConnectorError, aiohttp.InvalidURL)):
                raise broken(self.url, error) from None
            raise ConfigError(f"no server answers at {self.url}: {reason_of(error)}") from None

    async def get(self, path: str, *statuses: int) -> dict:
        """The JSON object of a route's response with status 200 or one of these; {} for anything else."""
        body: Any = None
        async with await self.ask("GET", path) as response:
            with suppress(ValueError, RecursionError, *connection_errors()):
                body = await response.json(content_type=None) if response.status in (200, *statuses) else None
        return body if isinstance(body, dict) else {}

    @property
    def model_name(self) -> str:
        return str(self.model.get("id", ""))

    @property
    def checkpoint(self) -> dict[str, str | int]:
        """As of WorkerPool, if the server says it."""
        kinds = {"tag": str, "stage": str, "step": int}
        return {name: self.model[name] for name, kind in kinds.items() if type(self.model.get(name)) is kind}

    @property
    def context_length(self) -> int | None:
        return self.model.get("context_length") or self.model.get("max_model_len")

    @property
    def continues(self) -> bool:
        able = object_in(self.model, "capabilities")
        return not self.native and (self.model.get("owned_by") in self.CONTINUING or
                                    able.get("continue_final_message") is True)

    @property
    def forgets(self) -> bool:
        """Is it a chat_server, of which a chat may ask that nothing of it is kept?"""
        return self.model.get("owned_by") == "chat_server"

    @property
    def chats(self) -> bool:
        return object_in(self.model, "capabilities").get("chat") is not False

    @property
    def continues_texts(self) -> bool:
        return self.model.get("type") == "text" or not self.chats

    @property
    def sees(self) -> bool:
        """May it see pictures? Servers of others do not say."""
        return object_in(self.model, "capabilities").get("vision") is not False

    @property
    def ends_thinking(self) -> bool:
        return object_in(self.model, "capabilities").get("reasoning_budget") is True

    async def end_thinking(self, request_id: str) -> bool:
        """End the reasoning of a request, if supported: other servers would end the whole answer."""
        if not self.ends_thinking:
            return False
        with suppress(ChatServerError):
            async with await self.ask("POST", f"v1/cancel/{request_id}?reasoning=true") as response:
                return response.status == 200
        return False

    def describe(self) -> list[str]:
        return [f"Server: {self.url}", *([f"Model: {self.model_name}"] if self.model_name else [])]

    async def answer(self, request: Request) -> AsyncGenerator[Event, None]:
        """The server's stream as events. Raises what WorkerPool would; ConfigError if no server answers."""
        reader = RemoteAnswerReader()
        stream = RemoteStream(self, reader.end_of, request.id)
        self.native = await stream.post(*self._routes(request)) == NATIVE_ROUTE
        self.passages = None
        try:
            yield Accepted(0)
            async with aclosing(stream.events()) as bodies:
                async for body in bodies:
                    self.passages = object_in(body, "knowledge") or self.passages
                    if event := reader.read(body):
                        yield event
            yield reader.finished()
        except ValueError as error:
            raise EngineFailure(f"{self.url} does not answer like a chat server: {error}") from None
        finally:
            await stream.close()

    def _routes(self, request: Request) -> list[tuple[str, dict]]:
        """The routes to try, the preferred one first, each with its body."""
        native = NATIVE_ROUTE, native_body(request) | self.knowledge
        route = "v1/completions" if request.messages is None else "v1/chat/completions"
        return [native] if self.native else [(route, self._body(request)), native]

    def _body(self, request: Request) -> dict:
        body = native_body(request) | {"stream": True, "stream_options": {"include_usage": True}}
        if request.messages is None:
            body["prompt"] = body.pop("messages")[0]["content"]
        else:
            body |= self.knowledge
        ours = self.model.get("owned_by") == "chat_server"  # it has only one model
        if name := self.wanted or not ours and self.model_name:
            body["model"] = name
        return body

    async def close(self):
        if self.client:
            await self.client.close()


def content_of(message: Message) -> str | list[dict]:
    """A message's text; with the pictures of its `more`, a list of parts."""
    pictures = (message.more or {}).get("pictures")
    if not pictures:
        return message.content
    shown = [{"type": "image_url", "image_url": {"url": uri}} for uri in pictures]
    return [*shown, {"type": "text", "text": message.content}] if message.content else shown


def calls_of(message: Message) -> dict[str, Any]:
    """A message's calls of functions, or whose result it is, as OpenAI's API has them."""
    more = message.more or {}
    members: dict[str, Any] = {}
    if more.get("tool_calls"):
        members["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": as_json(call["function"]["arguments"])}}
            for call in more["tool_calls"]]
    if message.role == "tool":
        members["tool_call_id"] = more.get("tool_call_id", "")
    return members


def native_body(request: Request) -> dict:
    params = request.params
    sampling = request.params.sampling
    messages = request.messages or (Message("user", str(request.prompts[0])),)
    tools = {"tools": [*request.tools]} if request.tools else {}
    return {**tools, "messages": [{"role": message.role, "content": content_of(message), **calls_of(message),
                                   **calculator_member(calculations_of(message))} for message in messages],
            "truncate": "oldest", "resumable": not params.temporary, "stop": list(params.stop),
            **({"prompt_cache_retention": "in_memory"} if params.temporary else {}),
            "ignore_eos": params.ignore_eos, "stop_on_repetition": params.stop_on_repetition,
            "progress": params.progress, **request.template_options,
            **({} if request.max_tokens is None else {"max_tokens": request.max_tokens}),
            **{name: getattr(sampling, name) for name in SAMPLING_FLAGS if name not in request.unset}}


Pool = WorkerPool | RemotePool


def identified(name: str, checkpoint: Mapping[str, str | int]) -> str:
    """The name of a model for people, with what checkpoint it is: base (d20, sft, step 650)."""
    words = [f"step {value}" if key == "step" else str(value) for key, value in checkpoint.items()]
    return f"{name} ({', '.join(words)})" if words else name


@asynccontextmanager
async def open_pool(settings: Settings) -> AsyncIterator[Pool]:
    pool = RemotePool(settings) if settings.url else make_pool(settings)
    pool.on_progress = progress = ProgressDisplay()
    try:
        await pool.start()
        await pool.wait_ready()
        progress.close()
        yield pool
    finally:
        progress.close()
        await pool.close()

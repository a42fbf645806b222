"""A server at --url behind the same interface as a pool here."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TYPE_CHECKING
from urllib.parse import quote

from chatlm.common.config import PING_S, SAMPLING_DEFAULTS
from chatlm.common.errors import (
    ChatServerError, ConfigError, EngineFailure, Overloaded, RequestError, did_you_mean)
from chatlm.common.hub.local import explicit_choice
from chatlm.common.log import ProgressDisplay
from chatlm.common.messages.requests import (
    Accepted, Delta, Finished, Message, Piece, PromptProgress, Usage)
from chatlm.front.api.encode import PROGRESS_FIELDS
from chatlm.front.lazy import aiohttp
from chatlm.front.pool.pool import WorkerPool, pool_of

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import Event, Request


class RemotePool:
    """A running server (--url) behind the same `answer` as WorkerPool.

    Requests go to /v1, or to nanochat's /chat/completions if the server has only that. A broken stream is
    resumed if the server kept it; an answer that nobody reads any more is cancelled on the server."""

    RESUME_S = (0.2, 0.5, 1, 2, 5, 5, 5, 5)    # pauses before each attempt to resume; GRACE_S is longer
    CONTINUING = "vllm", "sglang", "llamacpp"  # continue a last message, but their models do not say so
    ready = True

    def __init__(self, settings: Settings):
        if choice := explicit_choice(settings) or " ".join(f"--lora {folder}" for folder in settings.lora):
            raise ConfigError(f"{choice}: only for a model that is loaded here, and --url names a server")
        self.own_sampling: tuple[dict, str] = {}, ""
        url = (settings.url or "").rstrip("/").removesuffix("/v1")
        self.wanted = settings.model  # a model there
        self.url = url if "://" in url else f"http://{url}"
        self.headers = {"Authorization": f"Bearer {key}" for key in settings.api_key[:1]}
        self.on_progress: Callable[[str, float], None] = lambda stage, fraction: None
        self.client: Any = None
        self.model: dict = {}  # its entry in /v1/models
        self.native = self.reached = False  # does it have only nanochat's route? has it answered yet?

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
        """The first of the server's models, or the one that MODEL names; ConfigError if it has no such."""
        name, ids = self.wanted, [str(model.get("id")) for model in models]
        if name is None or name in ids:
            return models[ids.index(name) if name else 0] if models else {}
        if (model := await self.get(f"v1/models/{quote(name)}")).get("id"):  # another of its names
            return model
        has = f"it has {', '.join(ids)}{did_you_mean(name, ids)}" if ids else "it does not say what it has"
        raise ConfigError(f"MODEL {name}: the server at {self.url} has no such model; {has}")

    async def ask(self, method: str, path: str, **options):
        """A response. ConfigError if no server answers, EngineFailure if one that did breaks off."""
        try:
            response = await self.client.request(method, f"{self.url}/{path}", **options)
            self.reached = True
            return response
        except connection_errors() as error:
            if self.reached and not isinstance(error, (aiohttp.ClientConnectorError, aiohttp.InvalidURL)):
                raise self.broken(error) from None
            raise ConfigError(f"no server answers at {self.url}: {reason_of(error)}") from None

    async def get(self, path: str, *statuses: int) -> dict:
        """The JSON object that a route returns with status 200 or one of these; {} for anything else."""
        body: Any = None
        async with await self.ask("GET", path) as response:
            with suppress(ValueError, *connection_errors()):
                body = await response.json(content_type=None) if response.status in (200, *statuses) else None
        return body if isinstance(body, dict) else {}

    @property
    def model_name(self) -> str:
        return str(self.model.get("id", ""))

    @property
    def context_length(self) -> int | None:
        return self.model.get("context_length") or self.model.get("max_model_len")

    @property
    def continues(self) -> bool:
        able = object_in(self.model, "capabilities")
        return not self.native and (self.model.get("owned_by") in self.CONTINUING or
                                    able.get("continue_final_message") is True)

    @property
    def chats(self) -> bool:
        return object_in(self.model, "capabilities").get("chat") is not False

    @property
    def ends_thinking(self) -> bool:
        return object_in(self.model, "capabilities").get("reasoning_budget") is True

    async def end_thinking(self, request_id: str) -> bool:
        """End the reasoning of a running request, if the server can: another would end the whole answer."""
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
        response, reader = await self._post(request), RemoteStream()
        try:
            yield Accepted(0)
            while reader.done is None:
                try:
                    async for event in reader.read(response.content):
                        yield event
                    if reader.done is None:
                        raise aiohttp.ClientPayloadError("it ended early")
                except connection_errors() as error:
                    response.close()
                    response = await self._take_up(request.id, reader, error)
            yield reader.finished()
        except ValueError as error:
            raise EngineFailure(f"{self.url} does not answer like a chat server: {error}") from None
        finally:
            response.close()
            if reader.done is None:
                await self._cancel(request.id)

    async def _post(self, request: Request):
        post = partial(self.ask, "POST", headers={"X-Request-Id": request.id})
        if not self.native:
            route = "completions" if request.messages is None else "chat/completions"
            response = await post(f"v1/{route}", json=self._body(request))
            if response.status == 200:
                return response
            error = await refusal(response)
            if response.status not in (404, 405) or error.code == "model_not_found":
                raise error
            self.native = True
        response = await post("chat/completions", json=native_body(request))
        if response.status != 200:
            raise await refusal(response)
        return response

    def broken(self, error: Exception) -> EngineFailure:
        return EngineFailure(f"the connection to {self.url} broke: {reason_of(error)}")

    def _body(self, request: Request) -> dict:
        body = native_body(request) | {"stream": True, "stream_options": {"include_usage": True}}
        if request.messages is None:
            body["prompt"] = body.pop("messages")[0]["content"]
        ours = self.model.get("owned_by") == "chat_server"  # it has only one model
        if name := self.wanted or not ours and self.model_name:
            body["model"] = name
        return body

    async def _take_up(self, request_id: str, reader: RemoteStream, error: Exception):
        """The response with the rest of a broken stream. EngineFailure if it cannot be resumed."""
        for pause_s in self.RESUME_S if reader.next is not None else ():
            await asyncio.sleep(pause_s)
            with suppress(ChatServerError):
                response = await self.ask("GET", f"v1/streams/{request_id}?from={reader.next}")
                if response.status == 200:
                    return response
                response.close()
                if response.status < 500:
                    break
        raise self.broken(error) from None

    async def _cancel(self, request_id: str):
        with suppress(ChatServerError):
            timeout = aiohttp.ClientTimeout(total=5)
            (await self.ask("POST", f"v1/cancel/{request_id}", timeout=timeout)).close()

    async def close(self):
        if self.client:
            await self.client.close()


def object_in(body: dict, name: str) -> dict:
    """The JSON object in a member of `body`; {} if there is none."""
    return member if isinstance(member := body.get(name), dict) else {}


def connection_errors() -> tuple[type[Exception], ...]:
    return aiohttp.ClientError, asyncio.TimeoutError, OSError


def reason_of(error: Exception) -> str:
    """Why a connection failed, without aiohttp's internals."""
    cause = getattr(error, "os_error", error)
    code = getattr(cause, "errno", None) or 0
    if code > 0:
        return os.strerror(code)
    return getattr(cause, "strerror", None) or str(cause) or "timed out"


class RemoteStream:
    """Reads the events of /v1 or of the native API, over several connections if necessary."""

    def __init__(self):
        self.next: int | None = None  # number of the next event, if the server numbers them
        self.done: dict | None = None  # finish_reason, usage, timings ... once the answer ends
        self.pieces, self.begin_s, self.first_s = 0, time.monotonic(), 0.0

    async def read(self, lines) -> AsyncIterator[Piece | PromptProgress]:
        """The events in a connection's lines. ValueError for a malformed one; re-raises server errors."""
        ending: dict = {}
        async for line in lines:
            name, _, value = line.partition(b":")
            value = value.strip()
            if name == b"id" and value.isdigit():
                self.next = int(value) + 1
            elif name == b"data" and value == b"[DONE]":
                break
            elif name == b"data":
                body = json.loads(value)
                if event := self._event(body):
                    yield event
                ending |= ending_of(body)
                if body.get("done"):
                    break
        if "finish_reason" in ending:
            self.done = ending

    def _event(self, body) -> Piece | PromptProgress | None:
        if not isinstance(body, dict):
            raise ValueError("an event is not a JSON object")
        if "error" in body:
            raise remote_error(body, 500)
        if progress := object_in(body, "progress"):
            counts: Any = {name: progress[name] if type(progress.get(name)) is int else 0
                           for name in PROGRESS_FIELDS}
            fraction = object_in(progress, "loading").get("fraction")
            return PromptProgress(**counts, loading=fraction if type(fraction) in (int, float) else None)
        choice = (body.get("choices") or [{}])[0]
        delta = choice.get("delta") or choice
        reasoning = body.get("reasoning") or delta.get("reasoning_content") or delta.get("reasoning")
        text = body.get("token") or delta.get("content") or delta.get("text")
        deltas = tuple(Delta(kind, str(new))
                       for kind, new in (("reasoning", reasoning), ("text", text)) if new)
        if not deltas:
            return None
        self.first_s = self.first_s or time.monotonic()
        self.pieces += 1
        return Piece(deltas=deltas, gpu=body.get("gpu", 0))

    def finished(self) -> Finished:
        """The server's final figures; those it left out are measured here, counting a piece as a token."""
        done = self.done or {}
        usage, timings = done.get("usage") or {}, done.get("timings") or {}
        prompt, completion = (usage.get(f"{name}_tokens_details") or {} for name in ("prompt", "completion"))
        since_first_s = time.monotonic() - self.first_s
        speed = (self.pieces - 1) / since_first_s if self.pieces > 1 and since_first_s > 0.1 else None
        ttft_ms = (self.first_s - self.begin_s) * 1e3 if self.first_s else 0.0
        count = Usage(
            usage.get("prompt_tokens", 0), usage.get("completion_tokens", self.pieces),
            usage.get("cached_tokens") or prompt.get("cached_tokens") or 0,
            usage.get("reasoning_tokens") or completion.get("reasoning_tokens") or 0,
            timings.get("drafted_tokens", 0), timings.get("accepted_tokens", 0))
        return Finished(
            done["finish_reason"], done.get("stop_reason"), count, timings.get("queue_ms", 0.0),
            timings.get("ttft_ms", ttft_ms), timings.get("tokens_per_second", speed),
            done.get("gpu", timings.get("gpu", 0)), dropped_messages=timings.get("dropped_messages", 0))


def ending_of(body: dict) -> dict:
    """What an event of either API tells about the end of the answer."""
    choice = (body.get("choices") or [{}])[0]
    ending = {name: body[name] for name in ("usage", "timings", "gpu") if body.get(name) is not None}
    reason = body.get("finish_reason") or choice.get("finish_reason") or ("stop" if body.get("done") else "")
    if reason:
        ending |= {"finish_reason": reason, "stop_reason": body.get("stop_reason", choice.get("stop_reason"))}
    return ending


def native_body(request: Request) -> dict:
    params, sampling = request.params, request.params.sampling
    messages = request.messages or (Message("user", str(request.prompts[0])),)
    return {"messages": [{"role": message.role, "content": message.content} for message in messages],
            "truncate": "oldest", "resumable": True, "stop": list(params.stop),
            "ignore_eos": params.ignore_eos, "progress": params.progress, **request.template_options,
            **({} if request.max_tokens is None else {"max_tokens": request.max_tokens}),
            **{name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")
               if name not in request.unset}}


async def compared_at(pool: RemotePool, body: dict) -> AsyncGenerator[dict, None]:
    """The events of the server's /v1/compare."""
    async with await pool.ask("POST", "v1/compare", json=body) as response:
        if response.status != 200:
            raise await refusal(response)
        try:
            async for line in response.content:
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])
        except connection_errors() as error:
            raise pool.broken(error) from None


async def refusal(response) -> ChatServerError:
    body = None
    with suppress(ValueError):
        body = await response.json(content_type=None)
    response.close()
    retry = response.headers.get("Retry-After", "")
    return remote_error(body, response.status, int(retry) if retry.isdigit() else 1)


def remote_error(body, status: int, retry_after_s: int = 1) -> ChatServerError:
    """The server's error, from a body or a stream event, as the exception it was on the server."""
    body = body if isinstance(body, dict) else {}
    error = object_in(body, "error")
    message = str(error.get("message") or body.get("detail") or body.get("error")
                  or f"the server answered with {status}")
    if status in (429, 503) or error.get("type") == Overloaded.type:
        return Overloaded(message, retry_after_s=retry_after_s, status=429 if status == 429 else 503)
    if status < 500 or error.get("type") == RequestError.type:
        return RequestError(
            message, status=min(status, 499), code=error.get("code"), param=error.get("param"))
    return EngineFailure(message)


Pool = WorkerPool | RemotePool


@asynccontextmanager
async def open_pool(settings: Settings) -> AsyncIterator[Pool]:
    pool = RemotePool(settings) if settings.url else pool_of(settings)
    pool.on_progress = progress = ProgressDisplay()
    try:
        await pool.start()
        await pool.wait_ready()
        progress.close()
        yield pool
    finally:
        progress.close()
        await pool.close()

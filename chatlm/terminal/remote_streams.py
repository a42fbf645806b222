"""The event streams of a server at --url: one reader for all routes, which resumes broken streams."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

import aiohttp

from chatlm.common.errors import ChatServerError, EngineFailure, Overloaded, RequestError
from chatlm.common.messages.requests import (
    DRAFT_SOURCES, Delta, DraftCounts, Finished, Piece, PromptProgress, Usage)
from chatlm.front.api.encode import PROGRESS_FIELDS
from chatlm.terminal.calculator import calls_of_event, split_at_calls

if TYPE_CHECKING:
    from chatlm.terminal.remote import RemotePool


async def server_events(content) -> AsyncGenerator[tuple[int | None, dict], None]:
    """(number, if the server numbers them, JSON object) of each event up to [DONE].

    An event is complete at the empty line after it. ValueError if one is not a JSON object."""
    number = None
    data = []
    rest = b""
    async for chunk in content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            name, _, value = line.removesuffix(b"\r").partition(b":")
            value = value.removeprefix(b" ")
            if name == b"id" and value.isdigit():
                number = int(value)
            elif name == b"data":
                data.append(value)
            elif not (name or value):
                if data == [b"[DONE]"]:
                    return
                if data:
                    if not isinstance(event := json.loads(b"\n".join(data)), dict):
                        raise ValueError("an event is not a JSON object")
                    yield number, event
                number = None
                data = []


class RemoteStream:
    """A server's answer to one POST: its events, resumed if the connection breaks and the server supports it.

    `ends` recognizes the last event of an answer. Closing earlier cancels the answer on the server."""

    RESUME_S = (0.2, 0.5, 1, 2, 5, 5, 5, 5)  # pauses before each attempt to resume; GRACE_S is longer

    def __init__(self, pool: RemotePool, ends: Callable[[dict], Any], request_id: str = ""):
        self.pool = pool
        self.ends = ends
        self.request_id = request_id
        self.response: Any = None
        self.next: int | None = None  # number of the next event, if the server numbers them
        self.whole = False            # whether the last event has arrived
        self.pauses_s = iter(self.RESUME_S)  # those left; each new event restores them

    async def post(self, *routes: tuple[str, dict]) -> str:
        """Post to the first of these routes that the server has; returns its path. Raises its error."""
        headers = {"X-Request-Id": self.request_id} if self.request_id else {}
        last = routes[-1][0]
        for path, body in routes:
            self.response = await self.pool.ask("POST", path, json=body, headers=headers)
            if self.response.status != 200:
                error = await refusal(self.response)
                if path == last or self.response.status not in (404, 405) or error.code == "model_not_found":
                    raise error
                continue
            break
        return path

    async def events(self) -> AsyncGenerator[dict, None]:
        while True:
            try:
                async with aclosing(server_events(self.response.content)) as events:
                    async for number, event in events:
                        if number is not None:
                            self.next = number + 1
                            self.pauses_s = iter(self.RESUME_S)
                        self.whole = self.whole or bool(self.ends(event))
                        yield event
                        if event.get("done"):
                            return
                if self.whole:
                    return
                raise aiohttp.ClientPayloadError("it ended early")
            except connection_errors() as error:
                self.response.close()
                if not await self._resume():
                    if self.whole:  # only statistics are missing
                        return
                    raise broken(self.pool.url, error) from None

    async def _resume(self) -> bool:
        """Request the rest; False if the server does not have it."""
        for pause_s in self.pauses_s if self.next is not None else ():
            await asyncio.sleep(pause_s)
            with suppress(ChatServerError):
                self.response = await self.pool.ask("GET", f"v1/streams/{self.request_id}?from={self.next}")
                if self.response.status == 200:
                    return True
                self.response.close()
                if self.response.status < 500:
                    break
        return False

    async def close(self):
        self.response.close()
        if self.request_id and not self.whole:
            with suppress(ChatServerError):
                timeout = aiohttp.ClientTimeout(total=5)
                (await self.pool.ask("POST", f"v1/cancel/{self.request_id}", timeout=timeout)).close()


class RemoteAnswerReader:
    """Reads the events of an answer from /v1 or the native API."""

    def __init__(self):
        self.ending: dict = {}  # finish_reason, usage, timings ... as they arrive
        self.pieces = 0
        self.begin_s = time.monotonic()
        self.first_s = 0.0
        self.characters = 0  # of its text so far

    @staticmethod
    def end_of(body: dict) -> dict:
        """The finish_reason and stop_reason in an event; {} before the answer has ended."""
        choice = (body.get("choices") or [{}])[0]
        reason = body.get("finish_reason") or choice.get("finish_reason")
        reason = reason or ("stop" if body.get("done") else "")
        return {"finish_reason": reason,
                "stop_reason": body.get("stop_reason", choice.get("stop_reason"))} if reason else {}

    def read(self, body: dict) -> Piece | PromptProgress | None:
        """The new part in an event; None if it has none. Raises if it is the server's error."""
        if "error" in body:
            raise remote_error(body, 500)
        self.ending |= self.end_of(body)
        self.ending |= {name: body[name] for name in ("usage", "timings", "gpu")
                        if body.get(name) is not None}
        if progress := object_in(body, "progress"):
            counts: Any = {name: progress[name] if type(progress.get(name)) is int else 0
                           for name in PROGRESS_FIELDS}
            fraction = object_in(progress, "loading").get("fraction")
            return PromptProgress(**counts, loading=fraction if type(fraction) in (int, float) else None)
        choice = (body.get("choices") or [{}])[0]
        delta = choice.get("delta") or choice
        reasoning = body.get("reasoning") or delta.get("reasoning_content") or delta.get("reasoning")
        text = body.get("token") or delta.get("content") or delta.get("text")
        deltas = (Delta("reasoning", str(reasoning)),) if reasoning else ()
        text = str(text or "")
        calls = calls_of_event(body.get("calculator") or delta.get("calculator"))
        deltas = (*deltas, *split_at_calls(text, calls, self.characters))
        self.characters += len(text)
        deltas = (*deltas, *call_deltas(delta.get("tool_calls")))
        if not deltas:
            return None
        self.first_s = self.first_s or time.monotonic()
        self.pieces += 1
        return Piece(deltas=deltas, gpu=body.get("gpu", 0))

    def finished(self) -> Finished:
        """The server's final statistics; missing ones are measured here, counting a piece as a token."""
        done = self.ending
        usage = done.get("usage") or {}
        timings = done.get("timings") or {}
        prompt, completion = (usage.get(f"{name}_tokens_details") or {} for name in ("prompt", "completion"))
        since_first_s = time.monotonic() - self.first_s
        speed = (self.pieces - 1) / since_first_s if self.pieces > 1 and since_first_s > 0.1 else None
        ttft_ms = (self.first_s - self.begin_s) * 1e3 if self.first_s else 0.0
        drafted, accepted = drafts_of(timings)
        count = Usage(
            usage.get("prompt_tokens", 0), usage.get("completion_tokens", self.pieces),
            usage.get("cached_tokens") or prompt.get("cached_tokens") or 0,
            usage.get("reasoning_tokens") or completion.get("reasoning_tokens") or 0,
            drafted, accepted)
        return Finished(
            done["finish_reason"], done.get("stop_reason"), count, timings.get("queue_ms", 0.0),
            timings.get("ttft_ms", ttft_ms), timings.get("tokens_per_second", speed),
            done.get("gpu", timings.get("gpu", 0)), dropped_messages=timings.get("dropped_messages", 0))


def call_deltas(calls: Any) -> Iterator[Delta]:
    """The parts of calls in an event of OpenAI's API. Each call comes as a whole before the next begins."""
    for call in calls if isinstance(calls, list) else ():
        function = object_in(call, "function") if isinstance(call, dict) else {}
        name = function.get("name")
        text = function.get("arguments")
        yield Delta("call", text if isinstance(text, str) else "", name if isinstance(name, str) else "")


def drafts_of(timings: dict) -> list[DraftCounts]:
    """(drafted, accepted) tokens by source, of the sources that are known here."""
    by_source = {source: counts for source, counts in object_in(timings, "drafts").items()
                 if source in DRAFT_SOURCES and isinstance(counts, dict)}
    return [DraftCounts(**{source: whole(counts.get(name)) for source, counts in by_source.items()})
            for name in ("drafted", "accepted")]


def whole(value) -> int:
    return value if type(value) is int else 0


async def compared_at(pool: RemotePool, body: dict) -> AsyncGenerator[dict, None]:
    """The events of the server's /v1/compare."""
    stream = RemoteStream(pool, lambda event: "done" in event)
    try:
        await stream.post(("v1/compare", body))
        async with aclosing(stream.events()) as events:
            async for event in events:
                if "error" in event and "index" not in event:  # the whole comparison failed
                    raise remote_error(event, 500)
                yield event
    finally:
        if stream.response is not None:
            await stream.close()


def object_in(body: dict, name: str) -> dict:
    """The JSON object in a member of `body`; {} if there is none."""
    member = body.get(name)
    return member if isinstance(member, dict) else {}


def connection_errors() -> tuple[type[Exception], ...]:
    return aiohttp.ClientError, asyncio.TimeoutError, OSError


def reason_of(error: Exception) -> str:
    """Why a connection failed, without aiohttp's internals."""
    cause = getattr(error, "os_error", error)
    code = getattr(cause, "errno", None) or 0
    if code > 0:
        return os.strerror(code)
    return getattr(cause, "strerror", None) or str(cause) or "timed out"


def broken(url: str, error: Exception) -> EngineFailure:
    return EngineFailure(f"the connection to {url} broke: {reason_of(error)}")


async def whole_body(url: str, response) -> bytes:
    """The body of a response. EngineFailure if the connection breaks."""
    try:
        return await response.read()
    except connection_errors() as error:
        raise broken(url, error) from None


def strict_object(text: bytes) -> dict | None:
    """The object that a text is, in JSON as its standard has it: without NaN and infinities."""
    def refuse(constant: str):
        raise ValueError(constant)

    try:
        found = json.loads(text, parse_constant=refuse)
        json.dumps(found, allow_nan=False)  # numbers such as 1e999 are read as infinities, too
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


async def refusal(response) -> ChatServerError:
    body = None
    with suppress(ValueError, RecursionError, *connection_errors()):
        body = await response.json(content_type=None)
    response.close()
    retry = response.headers.get("Retry-After", "")
    return remote_error(body, response.status, int(retry) if retry.isdecimal() else 1)


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

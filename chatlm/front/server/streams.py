"""The bytes of bodies in, streams out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing, suppress

from aiohttp import web

from chatlm.common.client_words import too_large
from chatlm.common.config import LIMITS, PING_S
from chatlm.common.errors import RequestError
from chatlm.front.aio import supervised
from chatlm.front.api.encode import Encoder
from chatlm.front.intake.budget import BODY_S, Holding
from chatlm.front.server.inflate import encoding_of, inflated


BODY_BYTES_PER_S = 32_768  # a body may not be slower than this for longer than BODY_S


async def arriving(http: web.Request) -> AsyncGenerator[bytes, None]:
    """The parts of a body. RequestError 408 if it pauses for BODY_S or is too slow, 400 if its chunks are
    broken."""
    began_s = time.monotonic()
    size = 0
    while True:
        try:
            part = await asyncio.wait_for(http.content.readany(), BODY_S)
        except asyncio.TimeoutError:
            raise RequestError(f"no part of the body arrived for {BODY_S:g} s",
                               status=408, code="body_timeout") from None
        except web.RequestPayloadError:
            raise RequestError("the body cannot be read: it broke off, or its parts are not HTTP") from None
        if not part:
            return
        yield part
        size += len(part)
        if time.monotonic() - began_s > BODY_S + size / BODY_BYTES_PER_S:
            raise RequestError(f"the body arrives at less than {BODY_BYTES_PER_S:,} bytes per second",
                               status=408, code="body_timeout")


def check_size(size: int, most: int):
    if size > most:
        raise too_large(most)


async def read_bytes(http: web.Request, holding: Holding, most: int = 0) -> bytearray:
    """The body, inflated if it is compressed. RequestError 413 above `most` bytes (0: LIMITS.body_bytes), 415
    if it is compressed otherwise than with gzip or deflate, and as `arriving` and `inflated` say."""
    encoding = encoding_of(http)
    most = most or LIMITS.body_bytes
    body = bytearray()
    length = http.content_length or 0
    check_size(length, most)
    # how large a compressed body becomes is not known before
    expected = length if length and not encoding else most
    if length > LIMITS.inline_bytes:
        await holding.wait_for(expected)
    async with AsyncExitStack() as reading:
        parts = await reading.enter_async_context(aclosing(arriving(http)))
        if encoding:
            parts = await reading.enter_async_context(aclosing(inflated(parts, encoding)))
        async for part in parts:
            body += part
            check_size(len(body), most)
            if len(body) > LIMITS.inline_bytes and not holding.size:
                await holding.wait_for(expected)
    holding.give_back_beyond(len(body))
    return body


STREAM_HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}


class EventStream:
    """One Server-Sent-Events response: frames, and pings while silent.

    Raises ConnectionError if the reader has left or does not read."""

    def __init__(self, http: web.Request, request_id: str, form: type[Encoder] | Encoder = Encoder,
                 patient: bool = False):
        # patient: sending may wait for the reader
        self.http = http
        self.form = form
        self.patient = patient
        self.response = web.StreamResponse(
            headers={**STREAM_HEADERS, "Content-Type": form.content_type, "X-Request-Id": request_id})
        self.most_unsent = LIMITS.outbox_bytes + 2 * form.repeated_bytes  # a stream begins with two of them
        self.last_s = time.monotonic()

    async def __aenter__(self) -> EventStream:
        if self.http.version < (1, 1):
            self.response.force_close()         # HTTP/1.0 has no chunks: closing ends the stream
        await self.response.prepare(self.http)  # sends the headers now, before any prefill
        # Never wait for a slow reader: events would pile up.
        if self.http.transport is not None and not self.patient:
            self.http.transport.set_write_buffer_limits(high=2 * self.most_unsent)
        self.pings = asyncio.create_task(supervised("sending pings", self._ping))
        return self

    async def __aexit__(self, *error):
        self.pings.cancel()
        del self.pings  # breaks a cycle that would keep the connection until the next collection

    async def send(self, frames: bytes):
        if not frames:
            return
        transport = self.http.transport
        if transport is None:
            raise ConnectionResetError("the client has left")
        self.last_s = time.monotonic()
        try:
            if not self.patient and transport.get_write_buffer_size() > self.most_unsent:
                raise asyncio.TimeoutError
            write = self.response.write(frames)
            await (asyncio.wait_for(write, BODY_S) if self.patient else write)
        except asyncio.TimeoutError:
            transport.abort()
            raise ConnectionAbortedError("the client has stopped reading") from None

    async def _ping(self):
        with suppress(ConnectionError):
            while True:
                silent_s = time.monotonic() - self.last_s
                if silent_s >= PING_S:
                    await self.send(self.form.ping)
                    silent_s = 0.0
                await asyncio.sleep(PING_S - silent_s)

"""A tool server behind a URL (streamable HTTP): each message is a POST, answered by JSON or events.

The URL and the headers may hold a token, so nothing that is said of a failure has the URL or the text of a
library's exception in it (`words_for`)."""

from __future__ import annotations

import asyncio
import base64
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

import aiohttp

from chatlm.front.tools.config import ServerConfig
from chatlm.front.tools.foreign import Unreadable
from chatlm.front.tools.reading import (
    EVENT_LINE_ENDS, SLICE_BYTES, LineSplitter, LineTooLong, LoopShare, MessageReader)
from chatlm.front.tools.transport import (
    MESSAGE_BYTES, Hear, JsonRpcError, Message, ServerGone, ToolError, packed, result_of)

CONNECT_S = 10.0
STREAM_BYTES = 64 << 20  # of one answer's events together
SOCKET_BYTES = 1 << 15   # that are read of a connection at once
REDIRECTS = 3            # of one message, all on the same origin
REFUSAL_BYTES = 1 << 16  # that are read of the body of a refusal
# the shortest, the usual and the longest pause before the rest of a stream is asked for
RESUME_S = (0.1, 1.0, 30.0)
ACCEPT = "application/json, text/event-stream"
KEEPS_METHOD = (307, 308)    # redirects after which the same message is posted again


class SessionLost(ToolError):
    """A legacy server does not know our session any more."""


class HttpRefusal(ToolError):
    """A status that is no success, without a JSON-RPC error."""

    def __init__(self, status: int):
        super().__init__(f"it answered with status {status}")
        self.status = status


@dataclass
class ResumePoint:
    """What is known of the events of one answer, for asking for the rest of them."""

    last_id: str = ""
    pause_s: float = RESUME_S[1]  # before that
    received: int = 0             # bytes, over all connections


class HttpTransport:
    """Posts messages to a URL. It uses no proxy of the environment, and follows only redirects to the same
    origin that keep the message: no other host than that of the config is ever asked."""

    def __init__(self, config: ServerConfig, hear: Hear, reader: MessageReader):
        self.url = config.url
        self.label = config.label
        self.hear = hear
        self.reader = reader
        self.loop_share = LoopShare()
        self.headers = dict(config.headers)
        self.version = ""
        self.is_modern = False
        self.session_id = ""
        self.reason: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        # what is compressed could be a thousand times larger than what was sent, so nothing may be
        self.client = aiohttp.ClientSession(timeout=timeout, trust_env=False, auto_decompress=False,
                                            connector=aiohttp.TCPConnector(limit=64))

    @property
    def leaving_cancels(self) -> bool:
        return self.is_modern

    def speak(self, version: str, is_modern: bool):
        self.version = version
        self.is_modern = is_modern

    async def request(self, message: Message, headers: Mapping[str, str]) -> Any:
        methods = {message["id"]: message["method"]}
        stream = ResumePoint()
        async with aclosing(self._post(message, headers, methods, stream)) as answers:
            async for answer in answers:
                if self._is_response(answer, message["id"]):
                    return result_of(answer)
        while stream.last_id and not self.is_modern:
            await asyncio.sleep(stream.pause_s)
            async with aclosing(self._resume(methods, stream)) as answers:
                async for answer in answers:
                    if self._is_response(answer, message["id"]):
                        return result_of(answer)
        raise ServerGone("its answer ended without a response", unknown_outcome=True)

    def _is_response(self, answer: Message, number: int) -> bool:
        """Whether an answer is the response to a request; what is a notification or a request is heard."""
        if "method" in answer:
            self.hear(answer)
            return False
        return answer["id"] == number

    async def send(self, message: Message):
        async with aclosing(self._post(message, {}, {}, ResumePoint())) as answers:
            async for answer in answers:
                if "method" in answer:
                    self.hear(answer)

    async def ended(self) -> str:
        return await asyncio.shield(self.reason)

    def _end(self, why: str):
        if not self.reason.done():
            self.reason.set_result(why)

    async def close(self):
        self._end("it was closed")
        if self.session_id:
            with suppress(aiohttp.ClientError, asyncio.TimeoutError, OSError):  # it forgets it by itself
                async with self.client.delete(self.url, headers=self._headers({}), allow_redirects=False,
                                              timeout=aiohttp.ClientTimeout(total=2)):
                    pass
        await self.client.close()

    def _headers(self, message: Mapping[str, Any]) -> dict[str, str]:
        headers = self.headers | {"Accept": ACCEPT, "Accept-Encoding": "identity",
                                  "Content-Type": "application/json"}
        if self.version:
            headers["MCP-Protocol-Version"] = self.version
        if self.session_id:
            headers["Mcp-Session-Id"] = self.session_id
        if self.is_modern and "method" in message:
            headers["Mcp-Method"] = message["method"]
            name = message.get("params", {}).get("name")
            if message["method"] == "tools/call":
                headers["Mcp-Name"] = header_value(name)
        return headers

    async def _post(self, message: Message, headers: Mapping[str, str], methods: Mapping[int, str],
                    stream: ResumePoint) -> AsyncGenerator[Message, None]:
        """Send a message; yields the messages of the answer."""
        had_session = bool(self.session_id)
        data = packed(message)
        for _ in range(REDIRECTS + 1):
            async with self._answer("POST", stream, data=data,
                                    headers=self._headers(message) | dict(headers)) as response:
                if response.status in KEEPS_METHOD:
                    self.url = redirected(self.url, response)
                    continue
                if message.get("method") == "initialize":
                    self.session_id = response.headers.get("Mcp-Session-Id", "")
                if response.status >= 300:
                    raise await self._refusal(response, had_session)
                if response.status != 202:
                    async with aclosing(self._messages(response, methods, stream)) as answers:
                        async for answer in answers:
                            yield answer
            return  # also if the connection broke in a stream that can be resumed
        raise ToolError(f"it redirects a message more than {REDIRECTS} times")

    async def _resume(self, methods: Mapping[int, str],
                      stream: ResumePoint) -> AsyncGenerator[Message, None]:
        """Ask for the events after the last one. A server may close a stream early, for the client to come
        back (revision 2025-11-25)."""
        headers = self._headers({}) | {"Accept": "text/event-stream", "Last-Event-ID": stream.last_id}
        async with self._answer("GET", stream, headers=headers) as response:
            if response.status != 200 or response.content_type != "text/event-stream":
                raise ServerGone("its answer ended without a response", unknown_outcome=True)
            async with aclosing(self._messages(response, methods, stream)) as answers:
                async for answer in answers:
                    yield answer

    @asynccontextmanager
    async def _answer(self, method: str, stream: ResumePoint,
                      **options) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to one HTTP request. What breaks off in a stream of events that can be resumed just
        ends it."""
        try:
            async with self.client.request(method, self.url, allow_redirects=False, **options) as response:
                if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                    raise ToolError("its answer is compressed, which it was not asked for",
                                    unknown_outcome=True)
                limit_reads(response)
                yield response
        except aiohttp.ClientConnectorError as error:
            self._end(words_for(error))
            raise ServerGone(words_for(error), unknown_outcome=bool(stream.last_id)) from None
        except (aiohttp.ClientError, OSError) as error:
            if not stream.last_id or self.is_modern:
                raise ServerGone(words_for(error), unknown_outcome=True) from None

    async def _messages(self, response: aiohttp.ClientResponse, methods: Mapping[int, str],
                        stream: ResumePoint) -> AsyncGenerator[Message, None]:
        if response.content_type == "text/event-stream":
            bodies = self._events(response.content, stream)
        else:
            bodies = self._whole(response.content)
        try:
            async with aclosing(bodies) as texts:
                async for text in texts:
                    for message in await self.reader.read(self.label, text, methods, self.loop_share):
                        yield message
        except Unreadable as error:
            raise ToolError(str(error), unknown_outcome=True) from None

    async def _whole(self, content: aiohttp.StreamReader) -> AsyncGenerator[bytes, None]:
        """The body of an answer, once, if it is not too large."""
        data = bytearray()
        while piece := await content.read(SLICE_BYTES):
            await self.loop_share.spend(len(piece))
            data += piece
            if len(data) > MESSAGE_BYTES:
                raise ToolError(f"its answer has more than {MESSAGE_BYTES:,} bytes", unknown_outcome=True)
        yield bytes(data)

    async def _events(self, content: aiohttp.StreamReader,
                      stream: ResumePoint) -> AsyncGenerator[bytes, None]:
        """The data of events. Those without data, as servers send at the start, are no messages."""
        lines = LineSplitter(MESSAGE_BYTES, EVENT_LINE_ENDS)
        data = bytearray()
        while piece := await content.read(SLICE_BYTES):
            await self.loop_share.spend(2 * len(piece))
            stream.received += len(piece)
            if stream.received > STREAM_BYTES:
                raise ToolError(f"its events have more than {STREAM_BYTES:,} bytes", unknown_outcome=True)
            try:
                complete = lines.take(piece)
            except LineTooLong:
                raise event_too_large() from None
            for line in complete:
                if line:
                    take_field(line, data, stream)
                elif data:
                    yield bytes(data)
                    data.clear()
        if lines.rest:
            take_field(lines.rest, data, stream)
        if data:  # some servers leave out the empty line after the last event
            yield bytes(data)

    async def _refusal(self, response: aiohttp.ClientResponse, had_session: bool) -> ToolError:
        """The error of a response whose status is not a success."""
        if response.status < 400:
            target = place_of(response.headers.get("Location", ""), self.url)
            return ToolError(f"it answered {response.status}, a redirect to {target}, which is not followed")
        if response.status == 401:
            return ToolError("it answered 401: it wants a token, in headers of the config")
        if response.status == 404 and had_session:
            return self._lost()
        body = await first_bytes(response.content)
        messages = await self.reader.read(self.label, body, {}, self.loop_share)
        errors = [message for message in messages if "error" in message]
        is_about_session = b"session" in body.lower() and all(one["id"] is None for one in errors)
        if response.status == 400 and had_session and (is_about_session or not body.strip()):
            return self._lost(unknown_outcome=not is_about_session)
        for message in errors:
            error = message["error"]
            return JsonRpcError(error["code"], error["message"], error["supported"])
        return HttpRefusal(response.status)

    def _lost(self, unknown_outcome: bool = False) -> SessionLost:
        """The server has refused a message for its session, so it has not begun what the message asks for.

        unknown_outcome: it has only refused it, and does not say why."""
        self._end("it does not know the session any more")
        return SessionLost(self.reason.result(), unknown_outcome=unknown_outcome)


def take_field(line: bytes, data: bytearray, stream: ResumePoint):
    """Read a line of an event."""
    name, _, value = line.partition(b":")
    value = value.removeprefix(b" ")
    if name == b"data":
        data += b"\n" + value if data else value
        if len(data) > MESSAGE_BYTES:
            raise event_too_large()
    elif name == b"id" and len(value) < 1000 and not re.search(rb"[^ -~]", value):
        stream.last_id = value.decode()
    elif name == b"retry" and value.isdigit() and len(value) < 10:
        least, _, most = RESUME_S
        stream.pause_s = min(max(int(value) / 1000, least), most)


def event_too_large() -> ToolError:
    return ToolError(f"an event has more than {MESSAGE_BYTES:,} bytes", unknown_outcome=True)


async def first_bytes(content: aiohttp.StreamReader) -> bytes:
    """Of the body of a refusal."""
    data = bytearray()
    while len(data) < REFUSAL_BYTES and (piece := await content.read(SLICE_BYTES)):
        data += piece
    return bytes(data[:REFUSAL_BYTES])


def header_value(text: str) -> str:
    """A text as the value of a header; what no header can hold is in base64."""
    if re.fullmatch(r"[!-~]([ -~]*[!-~])?", text) and not text.startswith("=?"):
        return text
    return f"=?base64?{base64.b64encode(text.encode('utf-8', 'replace')).decode()}?="


def limit_reads(response: aiohttp.ClientResponse):
    """Have the connection read less at once: 256 KiB in chunks of a byte hold the event loop for 50 ms."""
    transport = response.connection and response.connection.transport
    if transport and hasattr(transport, "max_size"):
        setattr(transport, "max_size", SOCKET_BYTES)


# redirects

def origin(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def redirected(url: str, response: aiohttp.ClientResponse) -> str:
    """The URL that a redirect leads to. Raises ToolError unless it is on the same origin."""
    target = response.headers.get("Location", "")
    try:
        joined = urljoin(url, target)
        is_same = bool(target) and origin(urlsplit(joined)) == origin(urlsplit(url))
    except ValueError:
        is_same = False
    if not is_same:
        raise ToolError(f"it answered {response.status}, a redirect to {place_of(target, url)}, which is not "
                        "followed: it is another origin")
    parts = urlsplit(joined)
    return parts._replace(netloc=urlsplit(url).netloc, fragment="").geturl()


def place_of(target: str, url: str) -> str:
    """The target of a redirect in words. A path or a query may have a token in it, so only the origin is
    named."""
    try:
        scheme, host, port = origin(urlsplit(urljoin(url, target)))
        if target and origin(urlsplit(url)) == (scheme, host, port):
            return "another path of the same origin"
    except ValueError:
        host = None
    if not target or not host or scheme not in ("http", "https"):
        return "what is no URL"
    return f"{scheme}://{host}:{port}"[:300]


# failures

def words_for(error: Exception) -> str:
    """A failure of a connection in words. aiohttp's texts have the URL in them, and parts of what was
    received."""
    system = getattr(error, "os_error", error)
    for kind, words in (
            (aiohttp.ClientConnectorCertificateError, "its certificate is not valid"),
            (aiohttp.ClientSSLError, "no TLS connection can be made to it"),
            (aiohttp.ClientConnectorDNSError, "its host name is not known"),
            (aiohttp.ServerTimeoutError, "it can't be reached: the time is up"),
            (aiohttp.ServerDisconnectedError, "it closed the connection without an answer"),
            (aiohttp.ClientPayloadError, "its answer broke off"),
            (aiohttp.ClientResponseError, "its answer is not HTTP"),
            (aiohttp.InvalidURL, "its URL can't be used")):
        if isinstance(error, kind):
            return words
    if isinstance(system, OSError) and isinstance(system.errno, int) and system.errno > 0:
        return f"it can't be reached: {os.strerror(system.errno)}"
    return "the connection to it failed"

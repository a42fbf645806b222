"""A tool server behind a URL (streamable HTTP): each message is a POST, answered by JSON or events."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, suppress
from typing import Any

from chatlm.common.jsontext import dump
from chatlm.front.lazy import aiohttp
from chatlm.front.tools.config import ServerConfig
from chatlm.front.tools.transport import (
    MESSAGE_BYTES, Hear, Message, Refusal, ServerGone, ToolError, messages_in, result_of)

CONNECT_S = 10.0
STREAM_BYTES = 64 << 20  # of one answer's events together
ACCEPT = "application/json, text/event-stream"


class SessionLost(ToolError):
    """A legacy server does not know our session any more."""


class HttpTransport:
    """Posts messages to a URL. It follows no redirect and uses no proxy of the environment: only the URL of
    the config is ever asked."""

    def __init__(self, config: ServerConfig, hear: Hear):
        self.url = config.url
        self.label = config.label
        self.hear = hear
        self.headers = dict(config.headers)
        self.version = ""
        self.is_modern = False
        self.session_id = ""
        self.reason: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        self.client = aiohttp.ClientSession(timeout=timeout, trust_env=False,
                                            connector=aiohttp.TCPConnector(limit=32))

    def speak(self, version: str, is_modern: bool):
        self.version = version
        self.is_modern = is_modern

    async def request(self, message: Message, headers: Mapping[str, str]) -> Any:
        async with aclosing(self._post(message, headers)) as answers:
            async for answer in answers:
                if "method" in answer:
                    self.hear(answer)
                elif answer.get("id") == message["id"]:
                    return result_of(answer)
        raise ServerGone("its answer ended without a response", unknown_outcome=True)

    async def send(self, message: Message):
        async with aclosing(self._post(message, {})) as answers:
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
        headers = self.headers | {"Accept": ACCEPT, "Content-Type": "application/json"}
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

    async def _post(self, message: Message, headers: Mapping[str, str]) -> AsyncGenerator[Message, None]:
        """Send a message; yields the messages of the answer."""
        had_session = bool(self.session_id)
        try:
            async with self.client.post(self.url, data=dump(message), allow_redirects=False,
                                        headers=self._headers(message) | dict(headers)) as response:
                if message.get("method") == "initialize":
                    self.session_id = response.headers.get("Mcp-Session-Id", "")
                if response.status == 404 and had_session:
                    self._end("it does not know the session any more")
                    raise SessionLost(self.reason.result())
                if response.status >= 300:
                    raise await refusal_of(response)
                if response.status == 202:
                    return
                if response.content_type == "text/event-stream":
                    async for answer in messages_of_events(response.content):
                        yield answer
                else:
                    for answer in messages_in(await read_bounded(response.content)):
                        yield answer
        except aiohttp.ClientConnectorError as error:
            self._end(str(error))
            raise ServerGone(str(error)) from None
        except (aiohttp.ClientError, OSError) as error:
            raise ServerGone(f"{error or type(error).__name__}", unknown_outcome=True) from None


def header_value(text: str) -> str:
    """A text as the value of a header; what no header can hold is in base64."""
    if re.fullmatch(r"[!-~]([ -~]*[!-~])?", text) and not text.startswith("=?"):
        return text
    return f"=?base64?{base64.b64encode(text.encode()).decode()}?="


async def refusal_of(response: aiohttp.ClientResponse) -> ToolError:
    """The error of a response whose status is not a success."""
    if 300 <= response.status < 400:
        return ToolError(f"it answered {response.status}, a redirect, which is not followed")
    if response.status == 401:
        return ToolError("it answered 401: it wants a token, in headers of the config")
    for message in messages_in(await read_bounded(response.content)):
        if isinstance(message.get("error"), dict):
            return Refusal.of(message["error"])
    return HttpRefusal(response.status)


class HttpRefusal(ToolError):
    """A status that is no success, without a JSON-RPC error."""

    def __init__(self, status: int):
        super().__init__(f"it answered with status {status}")
        self.status = status


async def read_bounded(content: aiohttp.StreamReader) -> bytes:
    data = bytearray()
    async for part in content.iter_any():
        data += part
        if len(data) > MESSAGE_BYTES:
            raise ToolError(f"its answer has more than {MESSAGE_BYTES:,} bytes", unknown_outcome=True)
    return bytes(data)


async def messages_of_events(content: aiohttp.StreamReader) -> AsyncIterator[Message]:
    """The messages of a stream of server-sent events. Events without data, as servers send at the start, are
    no messages."""
    lines = bytearray()
    data: list[bytes] = []
    data_bytes = 0
    total = 0
    async for part in content.iter_any():
        total += len(part)
        if total > STREAM_BYTES:
            raise ToolError(f"its events have more than {STREAM_BYTES:,} bytes", unknown_outcome=True)
        lines += part
        *complete, rest = re.split(rb"\r\n|\n|\r(?!$)", bytes(lines))
        lines = bytearray(rest)
        if len(lines) + data_bytes > MESSAGE_BYTES:
            raise ToolError(f"an event has more than {MESSAGE_BYTES:,} bytes", unknown_outcome=True)
        for line in complete:
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
                data_bytes += len(data[-1])
            elif not line:
                for message in messages_in(b"\n".join(data)):
                    yield message
                data = []
                data_bytes = 0

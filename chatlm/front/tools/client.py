"""The Model Context Protocol over a transport: finding the revision, listing tools, calling them.

Revision 2026-07-28 has neither sessions nor a handshake; each request carries the revision in `_meta`. Older
revisions, here called legacy, begin with `initialize`."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from chatlm import __version__
from chatlm.front.aio import supervised
from chatlm.front.tools.foreign import header_properties
from chatlm.front.tools.http import HttpRefusal, SessionLost, header_value
from chatlm.front.tools.reading import LoopShare
from chatlm.front.tools.results import ToolResult
from chatlm.front.tools.transport import CallArguments, JsonRpcError, Message, ToolError, Transport

MODERN = "2026-07-28"
LEGACY = "2025-11-25"  # the newest with a handshake; a server names an older one if it has only that
UNSUPPORTED_VERSION = -32022
ERRORS_OF_MODERN = (-32020, -32021, UNSUPPORTED_VERSION)
METHOD_NOT_FOUND = -32601
PREFIX = "io.modelcontextprotocol/"
ABOUT_US = {"name": "chat_server", "version": __version__}
PROBE_S = 5.0   # a program that knows only legacy may answer nothing at all
NOTIFY_S = 10.0  # for a notification to be taken; the answer to one is empty
PAGES = 100     # of tools/list
TOOLS = 1_000   # of one server
LIST_BYTES = 1 << 20  # of all its tools, as JSON
TOO_MANY = f"its list has more than {TOOLS:,} tools, or {LIST_BYTES:,} bytes"
# A progress report: how far, of how much (None: unknown), and a text
Report = Callable[[float, "float | None", str], None]


@dataclass(frozen=True)
class Tool:
    """A tool as its server describes it."""

    name: str
    title: str = ""
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    annotations: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, packed: Seq[Any]) -> Tool:
        """A tool as `foreign.read_tool` packs it."""
        name, title, description, schema, annotations = packed
        return cls(name, title, description, json.loads(schema), annotations)

    def hint(self, name: str, default: bool) -> bool:
        """An annotation, with the default that the protocol gives it."""
        value = self.annotations.get(name)
        return value if type(value) is bool else default

    @property
    def only_reads(self) -> bool:
        return self.hint("readOnlyHint", False)

    @property
    def may_repeat(self) -> bool:
        """Whether it does no harm to call it again if nobody knows whether the first call was carried out."""
        return self.only_reads or self.hint("idempotentHint", False)


@dataclass(frozen=True)
class ToolList:
    """What a server has answered to tools/list."""

    packed: Seq[Seq[Any]]      # its tools, as `Tool.of` reads them
    valid_s: float = 0.0       # how long the list stays valid (0: the server does not say)
    left_out: Mapping[str, str] = field(default_factory=dict)  # why, by the names of tools that can't be used
    note: str = ""             # what is odd about the list as a whole


class ToolClient:
    """One open connection to a tool server."""

    def __init__(self):
        self.transport: Transport | None = None
        self.is_modern = False
        self.ids = itertools.count(1)
        self.reports: dict[int, Report] = {}  # by progress token, which is the id of the request
        self.listed_again = asyncio.Event()   # set when the server says that its tools have changed
        self.answers: set[asyncio.Task] = set()

    async def open(self, transport: Transport, timeout_s: float, try_modern: bool = True):
        """Find out which revision the server speaks, and greet it if that is a legacy one.

        try_modern: False if it is known to be a legacy one, which may not even answer the question."""
        self.transport = transport
        has_answered = try_modern and await self._discover(min(PROBE_S, timeout_s))
        if self.is_modern:
            return
        transport.speak("", False)
        try:
            await self._greet(timeout_s)
        except JsonRpcError:
            if has_answered or not try_modern:
                raise
            await self._discover(timeout_s)  # a modern one may have started too slowly to answer at first
            if not self.is_modern:
                raise

    async def _discover(self, timeout_s: float) -> bool:
        """Ask whether the server speaks the modern revision. Any error but the modern ones means no. Returns
        whether there was an answer."""
        assert self.transport
        self.transport.speak(MODERN, True)
        try:
            found = await self._request("server/discover", {}, timeout_s, modern=True)
            self.is_modern = MODERN in found["supportedVersions"]
        except JsonRpcError as error:
            if error.code == UNSUPPORTED_VERSION:
                self.is_modern = MODERN in error.supported
            elif error.code in ERRORS_OF_MODERN:
                raise
        except HttpRefusal as error:
            if error.status >= 500:
                raise
        except (asyncio.TimeoutError, SessionLost):
            return False
        return True

    async def _greet(self, timeout_s: float):
        """The handshake of legacy revisions."""
        assert self.transport
        greeting = {"protocolVersion": LEGACY, "capabilities": {}, "clientInfo": ABOUT_US}
        found = await self._request("initialize", greeting, timeout_s)
        version = found["protocolVersion"]
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", version):
            raise ToolError("its answer to initialize names no revision of the protocol")
        self.transport.speak(version, False)
        await self._notify({"jsonrpc": "2.0", "method": "notifications/initialized"})

    async def list_tools(self, timeout_s: float) -> ToolList:
        """All tools, within `timeout_s` for all pages. Of two tools with one name the first counts.

        Raises ToolError for lists that don't end, and asyncio.TimeoutError."""
        self.listed_again.clear()
        return await asyncio.wait_for(self._all_pages(timeout_s), timeout_s)

    async def _all_pages(self, timeout_s: float) -> ToolList:
        packed: dict[str, Seq[Any]] = {}
        left_out: dict[str, str] = {}
        size = 0
        loop_share = LoopShare()
        cursor: str | int | None = None
        cursors: set[str | int] = set()
        for _ in range(PAGES):
            page = await self._request("tools/list", {} if cursor is None else {"cursor": cursor}, timeout_s)
            for tool in page["tools"]:
                bytes_of_tool = sum(len(text) for text in tool[:4])
                await loop_share.spend(bytes_of_tool)
                if len(packed) < TOOLS and size + bytes_of_tool <= LIST_BYTES:
                    packed.setdefault(tool[0], tool)
                    size += bytes_of_tool
                elif tool[0] not in packed and len(left_out) < TOOLS:
                    left_out.setdefault(tool[0], TOO_MANY)
            for name, why in page["left_out"]:
                if len(left_out) < TOOLS:
                    left_out.setdefault(name, why)
            cursor = page["nextCursor"]
            valid_s = page["ttlMs"] / 1000
            if cursor is None:
                return ToolList([*packed.values()], valid_s, left_out)
            if cursor in cursors:
                return ToolList([*packed.values()], valid_s, left_out,
                                "its list of tools has no end: a cursor came twice")
            cursors.add(cursor)
        raise ToolError(f"its list of tools has more than {PAGES} pages")

    async def call(self, tool: Tool, arguments: CallArguments, timeout_s: float,
                   report: Report | None = None) -> ToolResult:
        """Call a tool. An error that the server reports is a result too: the model reads it.

        Raises ToolError if there is no result, also after `timeout_s`, which progress does not extend. If the
        caller is cancelled, the server is told so."""
        headers = parameter_headers(tool.parameters, arguments.scalars) if self.is_modern else {}
        params = {"name": tool.name, "arguments": arguments}
        try:
            found = await self._request("tools/call", params, timeout_s, report, headers=headers)
        except JsonRpcError as error:
            return ToolResult(str(error), is_error=True)
        except asyncio.TimeoutError:
            raise ToolError(f"no answer within {timeout_s:g} s", unknown_outcome=True) from None
        return ToolResult.unpacked(found)

    async def _request(self, method: str, params: Mapping[str, Any], timeout_s: float,
                       report: Report | None = None, modern: bool | None = None,
                       headers: Mapping[str, str] | None = None) -> Any:
        """The result of a request. modern: whether it has this revision's _meta; None: as found out."""
        assert self.transport
        number = next(self.ids)
        meta: dict[str, Any] = {}
        if self.is_modern if modern is None else modern:
            meta = {f"{PREFIX}protocolVersion": MODERN, f"{PREFIX}clientInfo": ABOUT_US,
                    f"{PREFIX}clientCapabilities": {}}
        if report:
            meta["progressToken"] = number
            self.reports[number] = report
        params = {**params, **({"_meta": meta} if meta else {})}
        message = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
        try:
            return await asyncio.wait_for(self.transport.request(message, headers or {}), timeout_s)
        except (asyncio.TimeoutError, asyncio.CancelledError):
            if method == "tools/call" and not self.transport.leaving_cancels:
                self._later({"jsonrpc": "2.0", "method": "notifications/cancelled",
                             "params": {"requestId": number}})
            raise
        finally:
            self.reports.pop(number, None)

    def hear(self, message: Message):
        """A message of the server that is not a response, as `foreign.heard` makes one."""
        method = message["method"]
        params = message["params"]
        number = message["id"]
        if number is not None:  # a request: we have declared no capability, so only ping is answered
            answer: Message = {"jsonrpc": "2.0", "id": number}
            if method == "ping":
                answer["result"] = {}
            else:
                answer["error"] = {"code": METHOD_NOT_FOUND, "message": "this client offers nothing"}
            self._later(answer)
        elif method == "notifications/progress":
            self._report(params)
        elif method == "notifications/tools/list_changed":
            self.listed_again.set()

    def _report(self, params: Mapping[str, Any]):
        report = self.reports.get(params.get("progressToken", 0))
        if report and "progress" in params:
            report(params["progress"], params.get("total"), params.get("message", ""))

    def _later(self, message: Message):
        """Send without waiting; a server that has gone needs no answer. Too many waiting answers are
        dropped: a server may flood us with requests."""
        if len(self.answers) >= 100:
            return
        task = asyncio.ensure_future(supervised("answering a tool server",
                                                partial(self._send_if_open, message)))
        self.answers.add(task)
        task.add_done_callback(self.answers.discard)

    async def _send_if_open(self, message: Message):
        with suppress(ToolError, asyncio.TimeoutError):
            await self._notify(message)

    async def _notify(self, message: Message):
        """Send a message without an answer. A server that does not take it does not hold its connection."""
        if self.transport:
            await asyncio.wait_for(self.transport.send(message), NOTIFY_S)

    async def close(self):
        if self.transport:
            await self.transport.close()
        for task in self.answers:
            task.cancel()


def parameter_headers(parameters: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, str]:
    headers = {}
    for name, header in header_properties(parameters).items():
        value = arguments.get(name)
        if isinstance(value, bool):
            value = str(value).lower()
        if isinstance(value, (str, int, float)):
            headers[f"Mcp-Param-{header}"] = header_value(str(value))
    return headers

"""All tools of all servers: their names for a model, who may use them, and calling them."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TYPE_CHECKING

from chatlm.common.jsontext import as_json
from chatlm.common.lanes import Lanes
from chatlm.common.log import log
from chatlm.common.records import record
from chatlm.front.tools.client import Report, Tool
from chatlm.front.tools.config import ServerConfig, read_mcp_config
from chatlm.front.tools.results import ToolResult
from chatlm.front.tools.rules import model_name
from chatlm.front.tools.server import State, ToolServer
from chatlm.front.tools.transport import ToolError

if TYPE_CHECKING:
    from chatlm.common.config import Settings

MOST_TOOLS = 128
MOST_BYTES = 256 << 10  # of their names, descriptions and schemas, as JSON
CALLS_OF_A_CLIENT = 8
CALLS = 32
FIRST_LIST_S = 10.0  # a list waits so long for servers that are starting


@record
class OfferedTool:
    """A tool as a model and a page see it."""

    name: str  # for the model
    server: ToolServer
    tool: Tool
    ask: bool  # whether a person must approve each call

    @property
    def label(self) -> str:
        return self.server.config.label

    @property
    def digest(self) -> str:
        """Of what a person approves: another description is another tool."""
        tool = self.tool
        said = as_json([self.label, tool.name, tool.title, tool.description, tool.parameters,
                        tool.annotations])
        return hashlib.sha256(said.encode("utf-8", "replace")).hexdigest()[:16]

    @property
    def function(self) -> dict[str, Any]:
        """The function as in `tools` of a request."""
        description = self.tool.description or self.tool.title
        return {"name": self.name, "description": description, "parameters": self.tool.parameters}


def asks(config: ServerConfig, tool: Tool) -> bool:
    """Whether a person must approve a call. What a tool says of itself counts only if the operator trusts the
    server."""
    if {"*", tool.name} & config.allowed:
        return False
    return not (config.trusts_read_only and tool.only_reads)


class CallLimits:
    """How many calls run at once, of each client and together; others wait, and clients take turns."""

    def __init__(self):
        self.running: Counter[str] = Counter()
        self.waiting = Lanes()  # futures of calls, by client

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        ready = asyncio.get_running_loop().create_future()
        self.waiting.append(client, ready)
        self._admit()
        try:
            await ready
        except asyncio.CancelledError:
            if ready.done() and not ready.cancelled():  # its turn came at the moment it was cancelled
                self._end(client)
            raise
        try:
            yield
        finally:
            self._end(client)

    def _admit(self):
        """Let calls run while the limits allow it, one of each client at a time."""
        admitted = True
        while admitted:
            admitted = False
            for client in [*self.waiting.by_client]:
                if self.running.total() < CALLS and self.running[client] < CALLS_OF_A_CLIENT:
                    admitted = True
                    ready = self.waiting.take(client)
                    if not ready.done():  # its client has not left meanwhile
                        self.running[client] += 1
                        ready.set_result(None)

    def _end(self, client: str):
        self.running[client] -= 1
        if not self.running[client]:
            del self.running[client]
        self._admit()


class Toolbox:
    """The tools of all servers of --mcp-config. Without the flag there are none."""

    def __init__(self, configs: Iterable[ServerConfig], timeout_s: float, result_characters: int):
        self.servers = [ToolServer(config) for config in configs]
        self.timeout_s = timeout_s
        self.result_characters = result_characters
        self.limits = CallLimits()
        self.outcomes: Counter[tuple[str, str]] = Counter()  # calls by server and outcome
        self.seconds: dict[str, float] = {}                  # that calls have taken, by server

    @classmethod
    def of(cls, settings: Settings) -> Toolbox:
        """The tools of --mcp-config. Raises ConfigError for a file that can't be used."""
        configs = read_mcp_config(settings.mcp_config) if settings.mcp_config else ()
        return cls(configs, settings.tool_timeout, settings.tool_result)

    def server(self, label: str) -> ToolServer | None:
        """The server that has this label in the config; None: there is none."""
        return next((server for server in self.servers if server.config.label == label), None)

    def start(self):
        for server in self.servers:
            if server.config.warning:
                log.warning("tool server %s: %s", server.config.label, server.config.warning)
            server.start()

    async def close(self):
        await asyncio.gather(*(server.close() for server in self.servers))

    async def refresh(self):
        """Wait a while for servers that are starting, and renew lists that are no longer valid."""
        await asyncio.gather(*(server.settled(FIRST_LIST_S) for server in self.servers))
        await asyncio.gather(*(server.refresh() for server in self.servers))

    def offered(self) -> dict[str, OfferedTool]:
        """The tools of running servers by their names for a model, sorted: prompts then begin alike.

        At most MOST_TOOLS with MOST_BYTES; what is above is left out."""
        found = {}
        size = 0
        for server in sorted(self.servers, key=lambda one: one.config.label):
            for tool in sorted(server.tools.values(), key=lambda one: one.name):
                if server.state is not State.READY:
                    continue
                name = model_name(server.config.label, tool.name)
                offered = OfferedTool(name, server, tool, asks(server.config, tool))
                size += len(as_json(offered.function))
                if len(found) < MOST_TOOLS and size <= MOST_BYTES:
                    found[offered.name] = offered
        return dict(sorted(found.items()))

    async def call(self, offered: OfferedTool, arguments: Mapping[str, Any], client: str,
                   report: Report | None = None) -> ToolResult:
        """Call a tool for a client, with a text that is cut to --tool-result. What goes wrong is a result
        too: the model reads it."""
        async with self.limits.turn(client):
            began_s = time.monotonic()
            outcome = "cancelled"
            result = ToolResult("", is_error=True)
            try:
                result = await offered.server.call(offered.tool, arguments, self.timeout_s, report)
                outcome = "error" if result.is_error else "ok"
            except ToolError as error:
                text = f"{error}."
                if error.unknown_outcome:
                    text += " The call may have been carried out: the outcome is unknown."
                result = ToolResult(text, is_error=True)
                outcome = "failed"
            finally:
                seconds = time.monotonic() - began_s
                self.outcomes[offered.label, outcome] += 1
                self.seconds[offered.label] = self.seconds.get(offered.label, 0.0) + seconds
                log.info("tool %s.%s for %s: %s, %.0f ms, %d bytes", offered.label, offered.tool.name,
                         client or "-", outcome, 1000 * seconds, len(result.text.encode("utf-8", "replace")))
        return replace(result.at_most(self.result_characters), ms=round(1000 * seconds))

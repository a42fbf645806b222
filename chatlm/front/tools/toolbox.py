"""All tools of all servers: their names for a model, who may use them, and calling them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence as Seq
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import ChatServerError, printable
from chatlm.common.lanes import Lanes
from chatlm.common.log import log
from chatlm.front.tools.client import Report
from chatlm.front.tools.config import ServerConfig, read_mcp_config
from chatlm.front.tools.offers import OfferedTool, chosen, notices_of, sorted_by_name
from chatlm.front.tools.reading import MessageReader
from chatlm.front.tools.results import ToolResult
from chatlm.front.tools.server import ServerState, ToolServer
from chatlm.front.tools.transport import CallArguments, ToolError

if TYPE_CHECKING:
    from chatlm.common.config import Settings

CALLS_OF_A_CLIENT = 8
CALLS = 32


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
        self.reader = MessageReader(result_characters)
        self.servers = [ToolServer(config, self.reader) for config in configs]
        self.timeout_s = timeout_s
        self.result_characters = result_characters
        self.limits = CallLimits()
        self.current: object = None                   # the lists that the next two were made of
        self.by_name: dict[str, OfferedTool] = {}     # what is offered
        self.told: dict[str, list[str]] = {}          # notices about each server, by label
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
        await asyncio.gather(*(server.close() for server in self.servers), self.reader.close())

    async def refresh(self, labels: Iterable[str] | None = None):
        """Wait a while for servers that are starting, and renew lists that are no longer valid.

        labels: of the servers that somebody wants; None: all."""
        wanted = [server for server in self.servers if labels is None or server.config.label in labels]
        await asyncio.gather(*(server.settled() for server in wanted))
        await asyncio.gather(*(server.refresh() for server in wanted))

    def offered(self) -> dict[str, OfferedTool]:
        """The tools of running servers by their names for a model, sorted. Each server has its share of
        MOST_TOOLS and OFFERED_BYTES; what is above is left out, as `notices` say."""
        current = [(server.state, server.lists) for server in self.servers]
        if current != self.current:
            self.current = current
            self._choose()
        return {**self.by_name}

    def _choose(self):
        ready = [server for server in self.servers if server.state is ServerState.READY]
        ready.sort(key=lambda one: one.config.label)
        offered, no_room = chosen([server.offers for server in ready])
        self.by_name = sorted_by_name(offered)
        for server, names in zip(ready, no_room):
            label = server.config.label
            notices = [printable(notice) for notice in notices_of(
                [*names, *server.no_room], server.left_out, server.note)]
            if notices != self.told.get(label, []):
                self.told[label] = notices
                if notices:  # a line of its own: the log counts lines of one wording together
                    log.warning("tool server " + label.replace("%", "%%") + ": %s", "; ".join(notices))

    def notices(self, server: ToolServer) -> Seq[str]:
        """What is missing of a server's tools, and what is odd about its list."""
        self.offered()
        return self.told.get(server.config.label, []) if server.state is ServerState.READY else []

    async def call(self, offered: OfferedTool, arguments: Mapping[str, Any] | CallArguments, client: str,
                   report: Report | None = None) -> ToolResult:
        """Call a tool for a client, with a text that is cut to --tool-result. What goes wrong is a result
        too: the model reads it."""
        if not isinstance(arguments, CallArguments):
            arguments = CallArguments.of(arguments)
        found = arguments
        # what goes wrong may name the URL or the header that a server did not like
        return await self._count(
            offered.label, offered.tool.name, client,
            lambda: offered.server.call(offered.tool, found, self.timeout_s, report),
            offered.server.config.without_secrets)

    async def call_own(self, label: str, name: str, client: str,
                       begin: Callable[[], Awaitable[ToolResult]]) -> ToolResult:
        """Call a tool that the server itself runs, with all limits that calls of tool servers have. `begin`
        may raise a ChatServerError."""
        async def call() -> ToolResult:
            try:
                result = await asyncio.wait_for(begin(), self.timeout_s)
            except asyncio.TimeoutError:
                raise ToolError(f"It took longer than {self.timeout_s:g} s") from None
            except ChatServerError as error:
                raise ToolError(str(error)) from None
            return result.at_most(self.result_characters)
        return await self._count(label, name, client, call)

    async def _count(self, label: str, name: str, client: str,
                     begin: Callable[[], Awaitable[ToolResult]],
                     clean: Callable[[str], str] = str) -> ToolResult:
        """Run a call when it is its client's turn, count and log it. clean: makes an error's text one that
        the model may read."""
        async with self.limits.turn(client):
            began_s = time.monotonic()
            outcome = "cancelled"
            result = ToolResult("", is_error=True)
            try:
                result = await begin()
                outcome = "error" if result.is_error else "ok"
                if result.is_error:
                    result = replace(result, text=clean(result.text))
            except ToolError as error:
                text = clean(f"{error}.")[:self.result_characters]
                if error.unknown_outcome:
                    text += " The call may have been carried out: the outcome is unknown."
                result = ToolResult(text, is_error=True)
                outcome = "failed"
            finally:
                seconds = time.monotonic() - began_s
                self.outcomes[label, outcome] += 1
                self.seconds[label] = self.seconds.get(label, 0.0) + seconds
                log.info("tool %s.%s for %s: %s, %.0f ms, %d bytes", label, name, client or "-", outcome,
                         1000 * seconds, len(result.text.encode("utf-8", "replace")))
        return replace(result, ms=round(1000 * seconds))

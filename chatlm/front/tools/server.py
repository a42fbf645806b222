"""One tool server that is kept running: opened, its tools listed, and after its end opened again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from typing import Any

from chatlm.common.errors import printable
from chatlm.common.log import log
from chatlm.front.aio import FIRST_PAUSE_S, LONGEST_PAUSE_S, first_of, supervised
from chatlm.front.tools.client import Report, Tool, ToolClient
from chatlm.front.tools.config import ServerConfig
from chatlm.front.tools.http import HttpTransport, SessionLost
from chatlm.front.tools.results import ToolResult
from chatlm.front.tools.stdio import StdioTransport
from chatlm.front.tools.transport import ServerGone, ToolError

OPEN_S = 30.0       # to start, to agree on a revision, and to list the tools
REOPEN_S = 5.0      # a call whose connection was lost waits so long for another
LIST_PAUSE_S = 1.0  # a server that says all the time that its tools have changed is asked so often
LEAST_LIST_S = 60.0  # a list is not asked for more often, although many servers say that it is valid for 0 s


class State(Enum):
    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


class ToolServer:
    """Keeps one server of the config open.

    What fails is tried again after 1 to 60 s; meanwhile `state` is FAILED and `reason` says why."""

    def __init__(self, config: ServerConfig):
        self.config = config
        self.state = State.STARTING
        self.reason = ""
        self.restarts = 0
        self.tools: dict[str, Tool] = {}
        self.listed_s = 0.0         # when, on the monotonic clock
        self.list_valid_s = 0.0     # for how long
        self.listing = asyncio.Lock()
        self.knows_legacy_only = False
        self.client: ToolClient | None = None
        self.changed = asyncio.Event()  # set at each change of `state`
        self.task: asyncio.Task | None = None

    @property
    def why_unready(self) -> str:
        """Why no tool of it can be called now; "" if they can."""
        if self.state is State.READY:
            return ""
        return self.reason or f"it is {self.state.value}"

    def start(self):
        self.task = asyncio.ensure_future(supervised("keeping a tool server open", self._run))

    async def close(self):
        if self.task:
            self.task.cancel()
            with suppress(asyncio.CancelledError):
                await self.task
        self._become(State.STOPPED, "the server is shutting down")

    def _become(self, state: State, reason: str = ""):
        self.state = state
        self.reason = printable(reason)
        self.changed.set()
        self.changed = asyncio.Event()

    async def settled(self, wait_s: float) -> State:
        """The state once the server has started or failed, or after `wait_s`."""
        end_s = time.monotonic() + wait_s
        while self.state is State.STARTING and (left_s := end_s - time.monotonic()) > 0:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.changed.wait(), left_s)
        return self.state

    async def _run(self):
        """Open the server, and again whenever it has ended."""
        pause_s = FIRST_PAUSE_S
        while True:
            began_s = time.monotonic()
            try:
                await self._serve()
            except ToolError as error:
                reason = str(error)
            except asyncio.TimeoutError:
                reason = f"it did not answer within {OPEN_S:g} s"
            except OSError as error:
                reason = f"it can't be started: {error.strerror or error}"
            log.warning("tool server %s failed: %s", self.config.label, printable(reason))
            self._become(State.FAILED, reason)
            if time.monotonic() - began_s > LONGEST_PAUSE_S:
                pause_s = FIRST_PAUSE_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            self.restarts += 1

    async def _serve(self):
        """Open the server and return never: raises ToolError once it has ended."""
        client = ToolClient()
        transport = None
        try:
            if self.config.command:
                transport = await StdioTransport.start(self.config, client.hear)
            else:
                transport = HttpTransport(self.config, client.hear)
            await self._open(client, transport)
            await self._list(client)
            self.client = client
            self._become(State.READY)
            log.info("tool server %s is ready: %d tools", self.config.label, len(self.tools))
            while await first_of(transport.ended(), client.listed_again.wait()):
                await asyncio.sleep(LIST_PAUSE_S)
                await self._list(client)
            raise ServerGone(await transport.ended())
        finally:
            self.client = None
            if transport:
                await transport.close()

    async def _open(self, client: ToolClient, transport: StdioTransport | HttpTransport):
        try:
            await client.open(transport, OPEN_S, not self.knows_legacy_only)
        except ServerGone:
            self.knows_legacy_only = not self.knows_legacy_only  # perhaps the question has ended it
            raise
        self.knows_legacy_only = not client.is_modern

    async def _list(self, client: ToolClient):
        tools, valid_s = await client.list_tools(OPEN_S)
        self.tools = {tool.name: tool for tool in tools if tool.name not in self.config.hidden}
        self.listed_s = time.monotonic()
        self.list_valid_s = max(valid_s, LEAST_LIST_S)

    async def refresh(self):
        """List the tools again if the list is no longer valid. A server that can't keeps the list it has."""
        async with self.listing:
            client = self.client
            age_s = time.monotonic() - self.listed_s
            if client and client.is_modern and age_s > self.list_valid_s:
                try:
                    await self._list(client)
                except (ToolError, asyncio.TimeoutError) as error:
                    log.warning("tool server %s did not list its tools: %s", self.config.label, error)
                    self.listed_s = time.monotonic()

    async def call(self, tool: Tool, arguments: Mapping[str, Any], timeout_s: float,
                   report: Report | None = None) -> ToolResult:
        """Call a tool. Raises ToolError if the server isn't running, has no result, or describes the tool
        differently by now: a call may have waited.

        A call whose outcome is unknown is repeated once if the tool says that this does no harm."""
        timeout_s = self.config.timeout_s or timeout_s
        client = self._client_for(tool)
        try:
            return await client.call(tool, arguments, timeout_s, report)
        except (SessionLost, ServerGone) as error:
            if error.unknown_outcome and not tool.may_repeat:
                raise
            await self._reopened(client)
        return await self._client_for(tool).call(tool, arguments, timeout_s, report)

    def _client_for(self, tool: Tool) -> ToolClient:
        if self.client is None:
            raise ToolError(f"the tool server {self.config.label} is not running: "
                            f"{self.reason or 'it is starting'}")
        if self.tools.get(tool.name) != tool:
            raise ToolError(f"not run: the tool server {self.config.label} describes {tool.name} "
                            "differently now")
        return self.client

    async def _reopened(self, old: ToolClient):
        """Return once there is another connection than `old`, or after REOPEN_S."""
        end_s = time.monotonic() + REOPEN_S
        while self.client in (None, old) and (left_s := end_s - time.monotonic()) > 0:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.changed.wait(), left_s)

"""One tool server that is kept running: opened, its tools listed, and after its end opened again."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from enum import Enum
from functools import partial

from chatlm.common.errors import printable
from chatlm.common.log import log
from chatlm.front.aio import FIRST_PAUSE_S, LONGEST_PAUSE_S, end_tasks, first_of, supervised
from chatlm.front.tools.client import Report, Tool, ToolClient, ToolList
from chatlm.front.tools.config import ServerConfig
from chatlm.front.tools.http import HttpTransport, SessionLost
from chatlm.front.tools.offers import OFFERED_BYTES, MOST_TOOLS, OfferedTool
from chatlm.front.tools.reading import LoopShare, MessageReader
from chatlm.front.tools.results import ToolResult
from chatlm.front.tools.stdio import StdioTransport
from chatlm.front.tools.transport import CallArguments, ServerGone, ToolError

OPEN_S = 30.0       # to start, to agree on a revision, and to list the tools, all together
FIRST_LIST_S = 10.0  # after its start; who wants its list waits no longer
RELIST_S = 2.0      # after another list was asked for; who wants it then gets the old one
REOPEN_S = 5.0      # a call whose connection was lost waits so long for another
# A server that says all the time that its tools have changed is asked so often; each time half as often
LIST_PAUSE_S = 1.0
LONGEST_LIST_PAUSE_S = 60.0
LEAST_LIST_S = 60.0  # a list is not asked for more often, although many servers say that it is valid for 0 s


class ServerState(Enum):
    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


class ToolServer:
    """Keeps one server of the config open.

    What fails is tried again after 1 to 60 s; meanwhile `state` is FAILED and `reason` says why."""

    def __init__(self, config: ServerConfig, reader: MessageReader):
        self.config = config
        self.reader = reader
        self.state = ServerState.STARTING
        self.reason = ""
        self.restarts = 0
        self.tools: dict[str, Tool] = {}
        self.offers: list[OfferedTool] = []  # the same, sorted by name
        self.no_room: list[str] = []         # tools above what a model can be offered at all
        self.left_out: dict[str, str] = {}   # why, by the names of tools that can't be used
        self.note = ""                       # what is odd about the list
        self.lists = 0              # counts lists that differed from the one before
        self.listed_s = 0.0         # when, on the monotonic clock
        self.list_valid_s = 0.0     # for how long
        self.listing = asyncio.Lock()
        self.relisting: asyncio.Task | None = None
        self.relist_began_s = 0.0
        self.packed: object = None  # the list as the server sent it
        self.started_s = time.monotonic()
        self.knows_legacy_only = False
        self.client: ToolClient | None = None
        self.changed = asyncio.Event()  # set at each change of `state`
        self.task: asyncio.Task | None = None
        self.closing = False

    @property
    def why_unready(self) -> str:
        """Why no tool of it can be called now; "" if they can."""
        if self.state is ServerState.READY:
            return ""
        return self.reason or f"it is {self.state.value}"

    def start(self):
        self.started_s = time.monotonic()
        self.task = asyncio.ensure_future(supervised("keeping a tool server open", self._run))

    async def close(self):
        if self.relisting:
            await end_tasks([self.relisting])
        self.closing = True
        if self.task:  # cancelled once: it then ends the program, which takes a while
            self.task.cancel()
            with suppress(asyncio.CancelledError):
                await self.task
        self._become(ServerState.STOPPED, "the server is shutting down")

    def _become(self, state: ServerState, reason: str = ""):
        self.state = state
        self.reason = printable(self.config.without_secrets(reason))
        self.changed.set()
        self.changed = asyncio.Event()

    async def settled(self) -> ServerState:
        """The state once the server has started or failed, or FIRST_LIST_S after its start."""
        end_s = self.started_s + FIRST_LIST_S
        while self.state is ServerState.STARTING and (left_s := end_s - time.monotonic()) > 0:
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
                reason = f"it can't be started: {error.strerror or type(error).__name__}"
            except Exception as error:
                log.error("tool server %s: %s", self.config.label, error, exc_info=error)
                reason = f"chat_server failed at it ({type(error).__name__}); its log says more"
            self._become(ServerState.FAILED, reason)
            log.warning("tool server %s failed: %s", self.config.label, self.reason)
            if time.monotonic() - began_s > LONGEST_PAUSE_S:
                pause_s = FIRST_PAUSE_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            self.restarts += 1

    async def _serve(self):
        """Open the server and return never: raises ToolError once it has ended."""
        client = ToolClient()
        try:
            await asyncio.wait_for(self._open(client), OPEN_S)
            self._check_not_closing()
            assert client.transport
            self.client = client
            self._become(ServerState.READY)
            log.info("tool server %s is ready: %d tools", self.config.label, len(self.tools))
            pause_s = LIST_PAUSE_S
            while await first_of(client.transport.ended(), client.listed_again.wait()):
                if time.monotonic() - self.listed_s > LONGEST_LIST_PAUSE_S:
                    pause_s = LIST_PAUSE_S
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_LIST_PAUSE_S)
                await self._list(client)
                self._check_not_closing()
            raise ServerGone(await client.transport.ended())
        finally:
            self.client = None
            await client.close()

    def _check_not_closing(self):
        """Go on closing: before Python 3.12, asyncio.wait_for loses a cancellation that arrives just as its
        own work ends."""
        if self.closing:
            raise asyncio.CancelledError

    async def _open(self, client: ToolClient):
        """Start the program or reach the URL, agree on a revision, and list the tools."""
        if self.config.command:
            transport = await StdioTransport.start(self.config, client.hear, self.reader)
        else:
            transport = HttpTransport(self.config, client.hear, self.reader)
        client.transport = transport  # it is closed with the client, whatever happens now
        try:
            await client.open(transport, OPEN_S, not self.knows_legacy_only)
        except ServerGone:
            self.knows_legacy_only = not self.knows_legacy_only  # perhaps the question has ended it
            raise
        self.knows_legacy_only = not client.is_modern
        await self._list(client)

    async def _list(self, client: ToolClient):
        """Ask for the tools. What others need of them is computed here, once for each list that differs."""
        async with self.listing:
            found = await client.list_tools(OPEN_S)
            said = [*found.packed], {**found.left_out}, found.note
            if said != self.packed:
                await self._take(found)
                self.packed = said
                self.lists += 1
            self.listed_s = time.monotonic()
            self.list_valid_s = max(found.valid_s, LEAST_LIST_S)

    async def _take(self, found: ToolList):
        """Read the tools of a list in the order of their names, as many as a model can be offered at most."""
        offers: list[OfferedTool] = []
        left_out = {**found.left_out}
        no_room = []
        size = 0
        names = set()
        loop_share = LoopShare()
        for packed in sorted(found.packed, key=lambda one: one[0]):
            if packed[0] in self.config.hidden:
                continue
            bytes_of_tool = sum(map(len, packed[:4]))
            if len(offers) == MOST_TOOLS or size + bytes_of_tool > OFFERED_BYTES:
                no_room.append(packed[0])
                continue
            await loop_share.spend(2 * bytes_of_tool)
            offered = OfferedTool.of(self, Tool.of(packed))
            if offered.name in names:
                left_out[packed[0]] = "another tool of this server has the same name for a model"
                continue
            names.add(offered.name)
            offers.append(offered)
            size += bytes_of_tool
        self.offers = offers
        self.tools = {offered.tool.name: offered.tool for offered in offers}
        self.no_room = no_room
        self.left_out = left_out
        self.note = found.note

    async def refresh(self):
        """List the tools again if the list is no longer valid, and wait for it until RELIST_S after that was
        begun. A server that can't keeps the list it has."""
        client = self.client
        is_idle = self.relisting is None or self.relisting.done()
        age_s = time.monotonic() - self.listed_s
        if is_idle and client and client.is_modern and age_s > self.list_valid_s:
            self.relist_began_s = time.monotonic()
            self.relisting = asyncio.ensure_future(supervised(
                "listing the tools of a tool server", partial(self._relist, client)))
        left_s = self.relist_began_s + RELIST_S - time.monotonic()
        if self.relisting and not self.relisting.done() and left_s > 0:
            await asyncio.wait([self.relisting], timeout=left_s)

    async def _relist(self, client: ToolClient):
        try:
            await self._list(client)
        except (ToolError, asyncio.TimeoutError) as error:
            why = str(error) or f"it did not answer within {OPEN_S:g} s"
            log.warning("tool server %s did not list its tools: %s", self.config.label,
                        printable(self.config.without_secrets(why)))
            self.listed_s = time.monotonic()

    async def call(self, tool: Tool, arguments: CallArguments, timeout_s: float,
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

"""The routes of tools that run here: what there is, and calling one."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence as Seq
from functools import partial
from typing import Any, TYPE_CHECKING

from aiohttp import web

from chatlm.common.config import LIMITS
from chatlm.common.errors import ChatServerError, Overloaded, RequestError, bad_value
from chatlm.common.jsontext import dump
from chatlm.common.log import log
from chatlm.front.aio import end_tasks, supervised
from chatlm.front.annexes.tools.limits import MOST_CALL_BYTES
from chatlm.front.api.encode import frame
from chatlm.front.api.enforcement import why_unenforced
from chatlm.front.api.tool_calls import read_call, unpacked_call
from chatlm.front.server.bodies import note_ignored
from chatlm.front.server.responses import REQUEST_LOG, json_response
from chatlm.front.server.streams import EventStream, read_bytes
from chatlm.front.tools.offers import OfferedTool
from chatlm.front.tools.toolbox import Toolbox

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.front.api.dialect import NamedServer
    from chatlm.front.front import Front
    from chatlm.front.intake.envelope import Envelope
    from chatlm.front.pool.catalogue import Catalogue
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.server.access import Access
    from chatlm.front.server.bodies import Bodies
    from chatlm.front.tools.results import ToolResult

CHECK_S = 5.0         # for checking the schemas of a list
KNOWN_SCHEMAS = 4096  # whose enforcement is remembered


class ToolRoutes:
    """The handlers. Whoever posts a call has approved of it."""

    def __init__(self, toolbox: Toolbox, settings: Settings, catalogue: Catalogue, bodies: Bodies,
                 access: Access):
        self.toolbox = toolbox
        self.settings = settings
        self.catalogue = catalogue
        self.bodies = bodies
        self.access = access
        # why a tool's parameters can't be enforced ("": they are), by digest and format of calls
        self.unenforced: OrderedDict[tuple[str, str | None], str] = OrderedDict()

    @classmethod
    def of(cls, front: Front) -> ToolRoutes:
        return cls(front.toolbox or Toolbox.of(front.settings), front.settings, front.catalogue,
                   front.bodies, front.access)

    async def start(self):
        self.toolbox.start()

    async def close(self):
        await self.toolbox.close()

    def metric_families(self, families: Any) -> Iterator[Any]:
        """What the toolbox has counted and timed. families: the module prometheus_client.metrics_core."""
        toolbox = self.toolbox
        counter = families.CounterMetricFamily
        calls = counter("chat_server_tool_calls", "calls of tools by how they ended",
                        labels=["server", "outcome"])
        for (label, outcome), number in toolbox.outcomes.items():
            calls.add_metric([label, outcome], number)
        yield calls
        seconds = counter("chat_server_tool_seconds", "seconds that calls of tools took", labels=["server"])
        for label, number in toolbox.seconds.items():
            seconds.add_metric([label], number)
        yield seconds
        restarts = counter("chat_server_tool_server_restarts", "restarts of tool servers", labels=["server"])
        for server in toolbox.servers:
            restarts.add_metric([server.config.label], server.restarts)
        yield restarts
        yield families.GaugeMetricFamily("chat_server_tool_calls_running", "calls of tools that run now",
                                         toolbox.limits.running.total())

    async def handle_list(self, http: web.Request) -> web.Response:
        """GET /v1/tools: the tools that this client may use, and the state of their servers."""
        patterns = self.access.usable_tools(http)
        pool = self._pool(http.query.get("model", ""))
        await self.toolbox.refresh()
        tools = [tool for tool in self.toolbox.offered().values() if is_usable(tool, patterns)]
        reasons = await self._why_unenforced(tools, pool)
        described = [self._described(tool, why) for tool, why in zip(tools, reasons)]
        servers = [{"label": server.config.label, "state": server.state.value, "reason": server.reason,
                    "notices": [*self.toolbox.notices(server)]}
                   for server in self.toolbox.servers if may_see(server.config.label, patterns)]
        head = dump({"object": "list", "servers": servers, "rounds": self.settings.tool_rounds})
        return web.Response(body=b'%s, "data": [%s]}' % (head[:-1], b", ".join(described)),
                            content_type="application/json")

    def _described(self, offered: OfferedTool, why_unenforced: str) -> bytes:
        return offered.with_members({
            "object": "tool", "server": offered.label, "tool": offered.tool.name,
            "title": offered.tool.title, "annotations": offered.tool.annotations,
            "enforced": why_unenforced or True, "ask": offered.ask, "digest": offered.digest})

    def _pool(self, model: str) -> WorkerPool | None:
        """The workers of the model whose calls will be enforced; None if it is not loaded."""
        served = self.catalogue.find(model, REQUEST_LOG.get().bound)
        return served.model.pool

    async def _why_unenforced(self, tools: Seq[OfferedTool], pool: WorkerPool | None) -> list[str]:
        """Why a model's calls of each tool can't be held to its parameters; "" if they can.

        Schemas are checked once, those of all servers side by side. What takes longer than CHECK_S is not
        waited for: a tool server could else delay every list."""
        tokenizer = pool.tokenizer if pool else None
        if pool is None or tokenizer is None:
            return ["the model is not loaded"] * len(tools)
        own: dict[str, list[OfferedTool]] = {}
        for tool in tools:
            if (tool.digest, tokenizer.tool_format) not in self.unenforced:
                own.setdefault(tool.label, []).append(tool)
        if own:
            checks = [asyncio.ensure_future(supervised("checking the schemas of tools", partial(
                self._check, label, unknown, pool, tokenizer.tool_format))) for label, unknown in own.items()]
            try:
                await asyncio.wait(checks, timeout=CHECK_S)
            finally:
                await end_tasks(checks)
        return [self.unenforced.get((tool.digest, tokenizer.tool_format), "it has not been checked yet")
                for tool in tools]

    async def _check(self, label: str, tools: Seq[OfferedTool], pool: WorkerPool, tool_format: str | None):
        """Check tools of one server, one after the other. What is wrong with one is said of that one."""
        for tool in tools:
            try:
                why = await why_unenforced(tool.function, tool_format, pool.admission, label)
            except ChatServerError as error:
                why = str(error)
            except Exception as error:
                log.error("the schema of the tool %s: %s", tool.name, error, exc_info=error)
                why = "its schema can't be read"
            self.unenforced[tool.digest, tool_format] = why
            if len(self.unenforced) > KNOWN_SCHEMAS:
                self.unenforced.popitem(last=False)

    async def offered_to(self, http: web.Request, envelope: Envelope) -> list[bytes]:
        """The tools of the servers that a body names, as far as its client may use them, each as JSON for the
        body's reader. Raises RequestError for a server that there is not, or of which it may use nothing."""
        patterns = self.access.usable_tools(http)
        for named in envelope.servers:
            self._check_named(named, patterns)
        pool = self._pool(envelope.model)
        await self.toolbox.refresh({named.label for named in envelope.servers})
        for named in envelope.servers:
            server = self.toolbox.server(named.label)
            if named.must_run and server and server.why_unready:
                raise Overloaded(f"the tool server {named.label} does not run: {server.why_unready}",
                                 retry_after_s=5)
        labels = {named.label for named in envelope.servers}
        tools = [tool for tool in self.toolbox.offered().values()
                 if tool.label in labels and is_usable(tool, patterns)]
        reasons = await self._why_unenforced(tools, pool)
        return [tool.with_members({
            "label": tool.label, "tool": tool.tool.name, "strict": not why,
            "read_only": tool.tool.only_reads, "ask": tool.ask, "digest": tool.digest})
            for tool, why in zip(tools, reasons)]

    def _check_named(self, named: NamedServer, patterns: Seq[str]):
        """Raise RequestError for a server that there is not, or that a client may not use."""
        server = self.toolbox.server(named.label)
        if server is None:
            known = [one.config.label for one in self.toolbox.servers]
            raise bad_value(named.param, named.label, "a tool server of --mcp-config: " + ", ".join(
                label for label in known if may_see(label, patterns)))
        if not may_see(named.label, patterns):
            raise RequestError(f"this API key may not use the tool server {named.label} (tools= in "
                               "--api-key-file)", status=403, code="tool_not_allowed", param=named.param)
        if named.url not in ("", server.config.url):
            raise bad_value(f"{named.param}.url", named.url, "left out, empty, or the URL that "
                            f"--mcp-config has for {named.label}: no request opens another one")

    async def handle_call(self, http: web.Request) -> web.StreamResponse:
        """POST /v1/tools/call: call a tool. If the client leaves, the call is cancelled."""
        patterns = self.access.usable_tools(http)
        may_call = patterns and self.toolbox.servers
        with self.bodies.holding() as holding:
            most = MOST_CALL_BYTES if may_call else LIMITS.inline_bytes
            values, ignored = await self._read_call(await read_bytes(http, holding, most))
            note_ignored(ignored)
            return await self._call(http, values, patterns)

    async def _read_call(self, raw: bytes | bytearray) -> tuple[dict[str, Any], str]:
        """As `read_call` does; a large body is read in a sandbox."""
        if len(raw) <= LIMITS.inline_bytes:
            return read_call(raw)
        packed: Any = await self.toolbox.reader.perform(
            f"key {REQUEST_LOG.get().client}", "read_call", bodies=[raw])
        return unpacked_call(packed)

    async def _call(self, http: web.Request, values: Mapping[str, Any],
                    patterns: Seq[str]) -> web.StreamResponse:
        offered = self._find(values["name"], patterns)
        if values.get("digest", offered.digest) != offered.digest:
            raise RequestError(f"the tool {offered.name} is not what it was when it was approved: its server "
                               "describes it differently now", status=409, code="tool_changed",
                               param="digest")
        client = REQUEST_LOG.get().client
        if values.get("stream"):
            return await self._stream(http, offered, values["arguments"], client)
        result = await self.toolbox.call(offered, values["arguments"], client)
        REQUEST_LOG.get().note = offered.name
        return json_response(await self._body(result, client))

    async def _body(self, result: ToolResult, client: str) -> dict[str, Any]:
        """A result as it is sent. If models see here, its pictures can be shown to them."""
        pool = self.bodies.intake.pool_that_sees()
        if result.pictures and pool:
            result = await result.with_readable_pictures(
                lambda data: pool.admission.decode_picture(data, client))
        return {"text": result.text, "is_error": result.is_error, "cut": result.cut, "ms": result.ms,
                "images": [picture.body for picture in result.pictures]}

    def _find(self, name: str, patterns: Seq[str]) -> OfferedTool:
        if not self.toolbox.servers:
            raise RequestError("the server was started without --mcp-config, so it has no tools", status=403,
                               code="not_available")
        offered = self.toolbox.offered()
        usable = [tool for tool in offered.values() if is_usable(tool, patterns)]
        if name in offered and offered[name] in usable:
            return offered[name]
        if name in offered:
            raise RequestError(f"this API key may not use the tool {name} (tools= in --api-key-file)",
                               status=403, code="tool_not_allowed", param="name")
        raise bad_value("name", name, ", ".join(tool.name for tool in usable) or "nothing: no tool is ready")

    async def _stream(self, http: web.Request, offered: OfferedTool, arguments: Mapping[str, Any],
                      client: str) -> web.StreamResponse:
        async with EventStream(http, REQUEST_LOG.get().id) as stream:
            async for event in self._events(offered, arguments, client):
                await stream.send(frame(event))
        return stream.response

    async def _events(self, offered: OfferedTool, arguments: Mapping[str, Any],
                      client: str) -> AsyncIterator[dict[str, Any]]:
        """The progress that the tool reports, the newest only, and at last its result."""
        news = asyncio.Event()  # there is progress, or the call has ended
        latest: dict[str, Any] = {}

        def report(progress: float, total: float | None, text: str):
            latest.update(type="progress", progress=progress, total=total, message=text)
            news.set()

        call = asyncio.ensure_future(self.toolbox.call(offered, arguments, client, report))
        call.add_done_callback(lambda ended: news.set())
        try:
            while not call.done():
                await news.wait()
                news.clear()
                if latest:
                    event = dict(latest)
                    latest.clear()
                    yield event
            yield {"type": "result", **await self._body(call.result(), client)}
        finally:
            await end_tasks([call])


def is_usable(offered: OfferedTool, patterns: Seq[str]) -> bool:
    return bool({"*", offered.label, f"{offered.label}.{offered.tool.name}"} & {*patterns})


def may_see(label: str, patterns: Seq[str]) -> bool:
    """Whether a client may use any tool of a server."""
    return "*" in patterns or any(pattern == label or pattern.startswith(f"{label}.") for pattern in patterns)

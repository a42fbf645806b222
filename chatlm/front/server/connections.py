"""Limits on connections, and serving an application on a socket."""

from __future__ import annotations

import asyncio
import functools
import re
import resource
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TYPE_CHECKING

from aiohttp import web

from chatlm.common.client_words import overloaded
from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError
from chatlm.common.log import log
from chatlm.front.api.errors import public_error
from chatlm.front.pool.prefixes import segments_in_memory
from chatlm.front.server.access import BACKLOG, network_of
from chatlm.front.server.responses import early_response

if TYPE_CHECKING:
    from chatlm.common.config import Settings


HEADER_S = 15.0        # seconds a request's header may take to arrive
WRITE_S = 30.0         # seconds a client may read nothing of what it is sent
KEEP_ALIVE_S = 75.0    # seconds an idle connection is kept between requests

ACCEPTED_AT_ONCE = 32  # connections accepted before the event loop runs other work; each takes 0.1 ms


class ConnectionTable:
    """The connections of clients. Their number is limited, and each network but this machine may have a
    quarter.

    At a limit, a new connection replaces the one that has been idle longest. If all are busy, the new one is
    surplus: it may ask for health and metrics, and gets a 503 for anything else. When there are SURPLUS of
    these, the oldest makes room for the next."""

    SURPLUS = 32

    def __init__(self, limit: int):
        self.limit = limit
        self.limit_of_network = max(1, limit // 4)
        self.all: dict[Any, None] = {}  # a set ordered by last request, like the next two
        self.networks: dict[str, dict[Any, None]] = {}
        self.surplus: dict[Any, None] = {}

    def add(self, connection):
        mine = self.networks.get(connection.network, {})
        crowded = bool(connection.network) and len(mine) >= self.limit_of_network
        if not crowded and len(self.all) < self.limit:
            return self._append(connection)
        candidates = mine if crowded else self.all
        idle = next((candidate for candidate in candidates if candidate.idle), None)
        if idle:
            log.warning("too many connections: closing idle ones for new ones")
            self._close(idle)
            return self._append(connection)
        log.warning("too many connections, none idle: answering new ones with 503")
        if len(self.surplus) >= self.SURPLUS:
            self._close(next(iter(self.surplus)))
        self.surplus[connection] = None

    def _append(self, connection):
        self.all[connection] = None
        self.networks.setdefault(connection.network, {})[connection] = None

    def _close(self, connection):
        self.remove(connection)
        connection.line.abort()

    def renew(self, connection):
        """Note that a connection has sent a request: it is the last that may be replaced."""
        if connection in self.all:
            self.remove(connection)
            self._append(connection)

    def remove(self, connection):
        """Forget a connection that has ended. Does nothing if it was removed before."""
        self.surplus.pop(connection, None)
        if self.all.pop(connection, connection) is None:
            mine = self.networks[connection.network]
            del mine[connection]
            if not mine:
                del self.networks[connection.network]


async def refuse_early(application: Callable, table: ConnectionTable, is_polled: Callable[[str], bool],
                       http: web.Request) -> web.StreamResponse:
    """Handle a request before the application does. Refuses unknown Expect headers, because aiohttp fails on
    one that is not ASCII, and on surplus connections every path that is not polled."""
    if http.protocol in table.surplus and not is_polled(http.path):
        return early_response(overloaded("it has as many connections as it can serve"))
    if http.headers.get("Expect", "").lower() not in ("", "100-continue"):
        failure = RequestError("Expect must be 100-continue", status=417, code="expectation_failed")
        return early_response(failure)
    response = await application(http)
    if http.protocol in table.surplus:
        response.force_close()
    return response


def with_single_slashes(make_request: Callable[..., web.BaseRequest]) -> Callable[..., web.BaseRequest]:
    """Replace several slashes in paths by one; clients send several if their base URL ends in a slash.

    This happens before anything else, so that routes, keys and the log see the same path. Dots and percent
    signs stay as they are, so that no part of a path becomes another."""
    def make(message: Any, *more: Any) -> web.BaseRequest:
        path = message.url.raw_path
        if "//" in path:
            url = message.url.with_path(re.sub("//+", "/", path), encoded=True, keep_query=True)
            message = message._replace(url=url)
        return make_request(message, *more)

    return make


@functools.cache
def connection_class() -> Callable[..., web.RequestHandler]:
    class Connection(web.RequestHandler):
        """A client's connection, closed if a request's header is not complete within HEADER_S.

        The time runs from the connection's start, or from the first byte of a later request. aiohttp itself
        only times out connections that are silent between requests."""

        header_timer: asyncio.TimerHandle | None = None

        def __init__(self, table: ConnectionTable, *more, **options):
            super().__init__(*more, **options)
            self.table = table

        def connection_made(self, transport: asyncio.BaseTransport):
            super().connection_made(transport)
            self.line = transport
            address, *_ = transport.get_extra_info("peername")
            self.network = network_of(address)
            limit_unread(transport.get_extra_info("socket"))
            self.table.add(self)
            self.await_header()

        def connection_lost(self, error: Exception | None):
            self.table.remove(self)
            self.end_header()  # the timer would keep this connection alive
            super().connection_lost(error)

        @property
        def idle(self) -> bool:
            """Whether no request is being answered. The client may not have read all of the last response
            yet."""
            return self.awaits_header or not self._request_count or self.line.is_closing()

        @property
        def awaits_header(self) -> bool:
            return self._waiter is not None and not self._waiter.done()

        def data_received(self, data: bytes):
            asked = self._request_count
            super().data_received(data)
            if self._request_count != asked:
                self.table.renew(self)
            if self.awaits_header:
                self.await_header()
            else:
                self.end_header()

        def await_header(self):
            if not self.header_timer:
                self.header_timer = asyncio.get_running_loop().call_later(HEADER_S, self.force_close)

        def end_header(self):
            if self.header_timer:
                self.header_timer.cancel()
                self.header_timer = None

        def handle_error(self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None,
                         message: str | None = None) -> web.Response:
            """Answer bytes that aiohttp could not parse. They are not logged, because they may be a
            secret."""
            if request.writer.output_size > 0:
                raise ConnectionResetError("the response has begun, so it cannot become an error")
            if status >= 500:
                return early_response(public_error(exc if isinstance(exc, Exception) else RuntimeError()))
            log.warning("a request from %s is not HTTP", request.remote)
            return early_response(RequestError("this is not an HTTP request, or it has a line above 8 KB",
                                               code="bad_request"))

    return Connection


def limit_unread(connection: socket.socket):
    """Let the system end a connection whose client accepts no data for WRITE_S, whatever we are sending.

    Only Linux can do this. Elsewhere LIMITS.outbox_bytes limits streams."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * WRITE_S))


def room_for_connections(settings: Settings) -> int:
    """Raise this process's limit of file descriptors as far as needed and allowed. Returns how many
    connections fit.

    A connection takes one descriptor. Some are reserved for pipes, surplus connections, connections that are
    being accepted or closed, and whatever else the process opens."""
    reserved = (128 + 2 * settings.num_workers + ConnectionTable.SURPLUS + 2 * ACCEPTED_AT_ONCE
                + segments_in_memory())
    wanted = reserved + LIMITS.connections
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (wanted if limit == resource.RLIM_INFINITY else min(limit, wanted) for limit in limits)
    with suppress(OSError, ValueError):
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, limits[1]))
            soft = hard
    return max(16, soft - reserved)


@asynccontextmanager
async def serving(app: web.Application, listener: socket.socket, connections: int = LIMITS.connections,
                  is_polled: Callable[[str], bool] = lambda path: False) -> AsyncIterator[web.AppRunner]:
    """Serve `app` on a socket. When a client leaves, its handler and its work are cancelled at once.

    is_polled: whether a path is served on surplus connections too."""
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=2.0)
    loop = asyncio.get_running_loop()
    await runner.setup()
    table = ConnectionTable(connections)
    server = runner.server
    assert server
    server.request_factory = with_single_slashes(server.request_factory)
    early = partial(refuse_early, server.request_handler, table, is_polled)
    server.request_handler = early  # pyright: ignore[reportAttributeAccessIssue]  called with one argument
    connect = partial(connection_class(), table, server, loop=loop, logger=log, access_log=None,
                      auto_decompress=False, keepalive_timeout=KEEP_ALIVE_S)
    listening = await loop.create_server(connect, sock=listener, backlog=ACCEPTED_AT_ONCE)
    listener.listen(BACKLOG)  # asyncio uses one number for both
    try:
        yield runner
    finally:
        listening.close()
        await runner.cleanup()

"""What sends long lists of the store, and a client that does not read them."""

import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from chatlm.front.server import stored_lists
from patching import patch


async def test_a_client_that_stops_reading_a_list_holds_nothing(monkeypatch):
    """Its connection is gone at once, with all that waits to be sent."""
    patch(monkeypatch, stored_lists, "BODY_S", 0.05)
    left = asyncio.get_running_loop().create_future()

    async def handle(http):
        response = web.StreamResponse()
        await response.prepare(http)
        transport = http.transport
        with pytest.raises(ConnectionAbortedError, match="the client has stopped reading"):
            await stored_lists.send_part(http, response, bytes(64 << 20))
        left.set_result((transport.is_closing(), transport.get_write_buffer_size()))
        return response

    app = web.Application()
    app.router.add_get("/", handle)
    async with TestServer(app) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await asyncio.wait_for(left, 60) == (True, 0)
        writer.close()

"""A running server of the tests with annexes of theirs."""

import json

import aiohttp

from chatlm.common.config import Settings
from chatlm.front.annexes import ANNEXES
from chatlm.front.front import create_app
from chatlm.front.server import access, connections
from fake_pool import FakePool, catalogue_of


class Place:
    """A server with a pool of the tests and these annexes, besides all others."""

    def __init__(self, *annexes, pool=None, settings=None, store=None):
        self.settings = settings or Settings()
        self.pool = pool or FakePool()
        self.catalogue = catalogue_of(self.pool, self.settings)
        self.app = create_app(self.catalogue, self.settings, store, annexes=(*ANNEXES, *annexes))
        self.front = self.app.on_startup[-1].__self__

    async def __aenter__(self):
        self.listener = access.listen_on("127.0.0.1", 0).__enter__()
        self.serving = connections.serving(self.app, self.listener)
        await self.serving.__aenter__()
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.client = await aiohttp.ClientSession().__aenter__()
        return self

    async def __aexit__(self, *failure):
        await self.client.close()
        await self.serving.__aexit__(*failure)
        self.listener.close()

    async def get(self, path):
        async with self.client.get(self.url + path) as response:
            return response.status, await response.text()

    async def post(self, path, body):
        """(status, headers, body) of a response; a stream's body is text."""
        async with self.client.post(self.url + path, json=body) as response:
            text = await response.text()
            is_json = response.content_type == "application/json"
            return response.status, response.headers, json.loads(text) if is_json else text

    @property
    def sent(self):
        """(role, content) of the messages of each request that the pool got."""
        return [[(message.role, message.content) for message in request.messages]
                for request in self.pool.requests]

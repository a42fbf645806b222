"""Servers over a database, and what clients leave in it: something of each kind."""

import json
from contextlib import asynccontextmanager

import aiohttp

from annex_place import Place
from chatlm.common.config import Settings
from chatlm.front.serve import database_of

CHAT = "/v1/chat/completions"
LINES = json.dumps({"custom_id": "1", "method": "POST", "url": CHAT, "body": {
    "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}}) + "\n"


class Asking:
    """Asks a server as a client, whom a header names."""

    def __init__(self, place, headers_of):
        """headers_of: the headers with which a client is known, from its name."""
        self.place = place
        self.headers_of = headers_of

    async def __call__(self, client, path, body=None, method=None, **headers):
        """(status, body) of a response."""
        method = method or ("GET" if body is None else "POST")
        async with self.place.client.request(method, self.place.url + path, json=body,
                                             headers=self.headers_of(client) | headers) as response:
            return response.status, await response.json()

    async def upload(self, client, text):
        form = aiohttp.FormData({"purpose": "batch"})
        form.add_field("file", text, filename="lines.jsonl")
        async with self.place.client.post(f"{self.place.url}/v1/files", data=form,
                                          headers=self.headers_of(client)) as response:
            return response.status, await response.json()

    async def begin_batch(self, client):
        """(status, body) of a new batch of one line."""
        _, file = await self.upload(client, LINES)
        return await self(client, "/v1/batches", {
            "input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"})

    async def leave(self, client):
        """Leave something of each kind; the paths where it is found."""
        _, response = await self(client, "/v1/responses", {"input": "Hi"})
        _, conversation = await self(client, "/v1/conversations", {"metadata": {"a": "b"}, "items": [
            {"type": "message", "role": "user", "content": "Hi"}]})
        _, batch = await self.begin_batch(client)
        return [f"/v1/responses/{response['id']}", f"/v1/conversations/{conversation['id']}",
                f"/v1/files/{batch['input_file_id']}", f"/v1/batches/{batch['id']}"]

    async def seen(self, client, paths):
        """The statuses with which a client gets these paths."""
        return {(await self(client, path))[0] for path in paths}


@asynccontextmanager
async def asked_over(path, headers_of, *keys, pool=None, annexes=()):
    """Asking of a server with these keys, over the database at a path. annexes: whose tables it has."""
    settings = Settings(keys=keys, database=str(path))
    store = await database_of(settings, annexes)
    async with Place(pool=pool, settings=settings, store=store) as place:
        yield Asking(place, headers_of)

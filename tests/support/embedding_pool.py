"""For tests of vector stores: a pool that embeds texts without a model, and servers that have it."""

import asyncio
import base64
import struct
import zlib
from contextlib import asynccontextmanager
from dataclasses import replace

import aiohttp

from annex_place import Place
from chatlm.common.config import Settings
from chatlm.common.errors import Overloaded
from chatlm.common.messages.requests import Accepted, Embedder, Embedding, ModelFacts
from chatlm.front.annexes import ANNEXES
from chatlm.front.documents.extract import extract_text
from chatlm.front.serve import database_of
from fake_pool import FakePool, finished
from left_texts import Asking

SIZE = 8


def vector_of(text):
    """Of length 1; texts with the same words are near to each other."""
    numbers = [1e-3] * SIZE
    for word in text.lower().split():
        numbers[zlib.crc32(word.encode()) % SIZE] += 1
    length = sum(number * number for number in numbers) ** 0.5
    return [number / length for number in numbers]


class EmbeddingPool(FakePool):
    """Its tokens are bytes. `failures` are raised by the next requests, one each; `texts` are those it got. If
    `gate` is an asyncio.Event, each request waits for it."""

    def __init__(self, longest=64, **more):
        super().__init__(**more)
        self.tokenizer.spec = replace(self.tokenizer.spec, embedder=Embedder("mean", SIZE, longest))
        facts = ModelFacts("bert", "safetensors", 1000, "float32", 4000, SIZE, 1, digest="digest of the toy")
        self.supervisor = type(self.supervisor)(
            **{**vars(self.supervisor), "card": type(self.supervisor.card)(facts=facts, longest=longest)}
        )
        self.failures, self.texts, self.extracted = [], [], []

    async def extract(self, client, name, boundary, body):
        self.extracted.append((client, name))
        return [*await asyncio.to_thread(extract_text, bytes(body), name, 10.0)]

    async def answer(self, request):
        if self.draining or not self.ready:
            raise Overloaded("the model is still loading", retry_after_s=2)
        self.requests.append(request)
        if self.failures:
            raise self.failures.pop(0)
        self.cancelled[request.id] = asyncio.Event()
        await self._count(+1)
        try:
            yield Accepted(7 * len(request.prompts), (7,) * len(request.prompts))
            for choice, text in enumerate(request.prompts):
                if self.gate:
                    await self._gate_or_cancel(request)
                self.texts.append(text)
                packed = base64.b64encode(struct.pack(f"<{SIZE}f", *vector_of(text))).decode()
                yield Embedding(packed, choice)
                yield finished((), choice=choice)
        finally:
            del self.cancelled[request.id]
            await asyncio.shield(self._count(-1))


class Stores(Asking):
    """Asks a server about vector stores, as a client whom a header names."""

    async def file(self, client, text, name="note.txt", purpose="assistants"):
        """The id of an uploaded file."""
        form = aiohttp.FormData({"purpose": purpose})
        form.add_field("file", text, filename=name)
        async with self.place.client.post(
            f"{self.place.url}/v1/files", data=form, headers=self.headers_of(client)
        ) as response:
            body = await response.json()
            assert response.status == 200, body
            return body["id"]

    async def store(self, client, *texts, **fields):
        """(id, ids of the files) of a new store that has these texts, once it has ended."""
        files = [await self.file(client, text) for text in texts]
        status, body = await self(client, "/v1/vector_stores", {"file_ids": files, **fields})
        assert status == 200, body
        await self.ended(client, f"/v1/vector_stores/{body['id']}")
        return body["id"], files

    async def ended(self, client, path):
        """The body of what is polled, once nothing of it is in progress."""
        while (found := await self(client, path))[1].get("status") == "in_progress":
            await asyncio.sleep(0.01)  # between two questions to the server
        return found[1]

    @property
    def ingest(self):
        return self.place.front.rooms["knowledge"].ingest

    async def rows(self, query, *values):
        return await self.place.front.store.run(
            lambda connection: connection.execute(query, values).fetchall()
        )

    async def swept(self):
        """Until all that was deleted is removed."""
        self.ingest.wake_up()
        while await self.place.front.store.run(is_left):
            await asyncio.sleep(0.01)  # between two looks


def is_left(connection):
    from chatlm.front.annexes.knowledge import stores

    return stores.purge_next(connection, ()) is not None


def by_space(space):
    return {"X-Chat-Space": space} if space else {}


@asynccontextmanager
async def knowing(path, *keys, pool=None, headers_of=by_space, settings=None):
    """A server over the database at a path, to be asked."""
    settings = settings or Settings(keys=keys, database=str(path))
    store = await database_of(settings, ANNEXES)
    async with Place(pool=pool or EmbeddingPool(), settings=settings, store=store) as place:
        yield Stores(place, headers_of)

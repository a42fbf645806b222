"""Vectors of another embedder: made beside those that a store has, which are removed once all are there.

Until then the store is searched by its words alone, if the earlier embedder is no longer served."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import ChatServerError
from chatlm.common.log import log
from chatlm.front.annexes.knowledge import stores
from chatlm.front.annexes.knowledge.embedding import Chosen, Embedders, packed
from chatlm.front.annexes.knowledge.passages import windows_of_passage
from chatlm.front.annexes.knowledge.stores import Bare, Foreign

if TYPE_CHECKING:
    from chatlm.front.server.access import Owners


TEXTS = 64       # windows that the embedder gets at once
LOOKED_AT = 100  # stores, in a step
WINDOW_BYTES = 512  # that a window takes in the database, about


class Rebuilding:
    """Looks at all stores in turns, and makes the windows of some passages in a step."""

    def __init__(self, stored: Callable[..., Awaitable[Any]], owners: Owners, embedders: Embedders):
        """stored: runs a function in the store, and again while that cannot be used."""
        self.stored = stored
        self.owners = owners
        self.embedders = embedders
        self.seen = 0                 # the number of the store that was looked at last
        self.store: Foreign | None = None  # the one whose windows are made
        self.file = 0                 # that of its file
        self.place = -1               # that of the passage of this file which was done last

    async def step(self) -> bool:
        """Do a piece of work. False if there was none."""
        if self.store is None:
            self.store = await self._next()
            self.file = 0
            self.place = -1
        if self.store is None:
            return False
        store = self.store
        client = self.owners.client_of(store.owner, store.client) or ""
        try:
            chosen = self._other(store)
            if chosen is None or not await self._passages(store, chosen, client):
                self.store = None
        except ChatServerError as error:  # the next round tries again
            log.debug("the vectors of store %d wait: %s", store.store, error)
            self.store = None
            return False
        return True

    async def _next(self) -> Foreign | None:
        """The next store whose embedder is another one now. None if these are none, or not all were seen."""
        found = await self.stored(partial(stores.embedded_stores, after=self.seen, most=LOOKED_AT))
        for store in found:
            self.seen = store.store
            if self._other(store):
                return store
        if len(found) < LOOKED_AT:
            self.seen = 0
        return None

    def _other(self, store: Foreign) -> Chosen | None:
        """The embedder of a store, if it is another than that of its windows, and has been loaded."""
        client = self.owners.client_of(store.owner, store.client)
        if client is None:
            return None
        try:
            chosen = self.embedders.choose(store.model, self.embedders.bound_of(client))
        except ChatServerError:
            return None
        return chosen if chosen.digest not in ("", store.digest) else None

    async def _passages(self, store: Foreign, chosen: Chosen, client: str) -> bool:
        """Make the windows of the next passages; after the last ones, have the store be searched with all of
        them. False then."""
        embedder = await self.stored(partial(
            stores.embedder_number, digest=chosen.digest, name=chosen.served.name,
            dimensions=chosen.dimensions), client=client)
        file, passages = await self.stored(partial(
            stores.bare_passages, store=store.store, embedder=embedder, file=self.file, place=self.place),
            client=client)
        if not passages:
            await self.stored(partial(stores.search_with, store=store.store, embedder=embedder),
                              client=client)
            log.info("vector store %d is searched with the vectors of %s", store.store, chosen.served.name)
            return False
        windows = await asyncio.to_thread(windows_of_all, passages, chosen)
        vectors = list[stores.Embedded]()
        owner = self.owners.of_pages(client)
        for begin in range(0, len(windows), TEXTS):
            texts = [text for _, text in windows[begin:begin + TEXTS]]
            vectors += map(packed, await self.embedders.vectors(chosen, texts, client, owner))
        made = [(passage, vector) for (passage, _), vector in zip(windows, vectors)]
        await self.stored(partial(stores.add_windows, store=store.store, file=file, embedder=embedder,
                                  windows=made), adds_bytes=WINDOW_BYTES * len(made), client=client)
        self.file = file
        self.place = passages[-1].place
        return True


def windows_of_all(passages: list[Bare], chosen: Chosen) -> list[tuple[int, str]]:
    """The windows of passages, with the numbers of these."""
    return [(passage.number, text) for passage in passages for text in windows_of_passage(
        passage.text, passage.heading, chosen.count, chosen.longest, chosen.special)]

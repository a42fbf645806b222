"""What one client's work makes others wait for, in causes and not in seconds: the parts of work that the store does."""

import asyncio
from contextlib import asynccontextmanager
from typing import NamedTuple

from chatlm.front.store import store as stores
from chatlm.front.store.store import Store, Submitted

STEPS = 1000    # of SQLite's machine, counted as one


class Part(NamedTuple):
    """What the store's thread did at once."""

    client: str
    work: str
    steps: int      # thousands of SQLite's machine
    waited: int     # parts of other clients that were done since it was submitted, or since its part before this one


class StoreParts:
    """Notes the parts of all work of stores. Each is a transaction of its own, so that what is noted does not depend on how fast this machine is."""

    def __init__(self, monkeypatch):
        self.parts = []
        monkeypatch.setattr(stores, "SLICE_S", 0.0)
        advance, submit = Store._advance, Submitted.__init__

        def noting_advance(store, submitted, until_s):
            waited = sum(part.client != submitted.client for part in self.parts[submitted.begun:])
            steps = []
            store.connection.set_progress_handler(lambda: steps.append(1) and None, STEPS)
            try:
                return advance(store, submitted, until_s)
            finally:
                store.connection.set_progress_handler(None, 0)
                work = getattr(submitted.work, "func", submitted.work)
                self.parts.append(Part(submitted.client, work.__qualname__, len(steps), waited))
                submitted.begun = len(self.parts)

        def noting_submit(submitted, *arguments):
            submit(submitted, *arguments)
            submitted.begun = len(self.parts)

        monkeypatch.setattr(Store, "_advance", noting_advance)
        monkeypatch.setattr(Submitted, "__init__", noting_submit)

    def of(self, client):
        return [part for part in self.parts if part.client == client]

    def most_steps(self, client):
        return max(part.steps for part in self.of(client))

    def most_waited(self, client):
        return max(part.waited for part in self.of(client))

    @asynccontextmanager
    async def beside(self, small):
        """Asks for something small again and again, at least once, while the block has another client do something large."""
        self.parts.clear()
        over = asyncio.Event()

        async def ask_on():
            while not over.is_set():
                await small()

        task = asyncio.ensure_future(ask_on())
        try:
            yield
        finally:
            over.set()
            await task

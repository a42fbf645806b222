"""Removes from the database what has expired and what was deleted: in small pieces, beside all other work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TYPE_CHECKING

from chatlm.front.aio import end_tasks, supervised
from chatlm.front.server.stored_lists import now_s
from chatlm.front.store import approvals, file_rows, responses

if TYPE_CHECKING:
    import sqlite3
    from chatlm.front.pool.catalogue import Catalogue
    from chatlm.front.store.store import Store


SWEEP_S = 30.0         # between looks for what has expired
KEPT_PAGES = 1000      # free ones that stay in the file
VACUUMED_PAGES = 1000  # that are given back at once


class Sweeper:
    """A task that looks now and then, and when it is woken."""

    def __init__(self, store: Store, catalogue: Catalogue):
        self.store = store
        self.catalogue = catalogue
        # of annexes: they mark what has expired as deleted
        self.marks: list[Callable[[sqlite3.Connection], Any]] = []
        self.wake = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def start(self):
        self.task = asyncio.create_task(supervised(
            "removing what was deleted", self.run, failed=lambda error: True))

    async def close(self):
        if self.task:
            await end_tasks([self.task])

    async def run(self):
        await self.catalogue.wait_ready()
        while True:
            self.wake.clear()
            await self.sweep()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.wake.wait(), SWEEP_S)

    async def sweep(self):
        """Remove all that can go, and give its bytes back."""
        for mark in self.marks:
            await self.store.run_patiently(mark)
        removed = False
        for piece in (partial(responses.forget, now=now_s()), file_rows.purge, responses.purge,
                      partial(approvals.purge, now=now_s())):
            while await self.store.run_patiently(piece):
                removed = True
        while await self.store.run_patiently(vacuum):
            pass
        if removed:
            await self.store.clear_log()  # the -wal may still have texts


def vacuum(connection: sqlite3.Connection) -> bool:
    """Give some of the file's free pages back to the disk. Returns whether there may be more."""
    free = connection.execute("PRAGMA freelist_count").fetchone()[0]
    for _ in range(min(free - KEPT_PAGES, VACUUMED_PAGES)):
        # Python's sqlite3 frees one page in a call, whatever number is given
        connection.execute("PRAGMA incremental_vacuum(1)")
    return free > KEPT_PAGES + VACUUMED_PAGES

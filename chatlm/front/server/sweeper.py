"""Removes from the database what has expired and what was deleted: in small pieces, beside all other work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import Overloaded
from chatlm.front.aio import end_tasks, supervised
from chatlm.front.server.stored_lists import now_s
from chatlm.front.store import approvals, file_rows, responses

if TYPE_CHECKING:
    import sqlite3
    from chatlm.front.store.store import Store


SWEEP_S = 30.0         # between looks for what has expired
KEPT_PAGES = 1000      # free ones that stay in the file
VACUUMED_PAGES = 1000  # that are given back at once


class Sweeper:
    """A task that looks now and then, and when it is woken."""

    def __init__(self, store: Store):
        self.store = store
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
        while True:
            self.wake.clear()
            await self.sweep()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.wake.wait(), SWEEP_S)

    async def sweep(self):
        """Remove all that can go, and give its bytes back."""
        for mark in self.marks:
            await self._stored(mark)
        removed = False
        for piece in (partial(responses.forget, now=now_s()), file_rows.purge, responses.purge,
                      partial(approvals.purge, now=now_s())):
            while await self._stored(piece):
                removed = True
        while await self._stored(vacuum):
            pass
        if removed:
            await self.store.clear_log()  # the -wal may still have texts

    async def _stored(self, function: Callable[[sqlite3.Connection], Any]) -> Any:
        """Run it in the store, again and again while the store cannot be used, as on a full disk."""
        while True:
            try:
                return await self.store.run(function)
            except Overloaded as error:
                await asyncio.sleep(error.retry_after_s)


def vacuum(connection: sqlite3.Connection) -> bool:
    """Give some of the file's free pages back to the disk. Returns whether there may be more."""
    free = connection.execute("PRAGMA freelist_count").fetchone()[0]
    for _ in range(min(free - KEPT_PAGES, VACUUMED_PAGES)):
        # Python's sqlite3 frees one page in a call, whatever number is given
        connection.execute("PRAGMA incremental_vacuum(1)")
    return free > KEPT_PAGES + VACUUMED_PAGES

"""Writes what was used to the database of --database."""

from __future__ import annotations

import asyncio
from dataclasses import astuple
from datetime import date, timedelta
from functools import partial
from typing import TYPE_CHECKING

from chatlm.common.log import log
from chatlm.front.aio import supervised
from chatlm.front.server.ledger import today
from chatlm.front.store import usage

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable

    from chatlm.front.server.ledger import Amount, Ledger, UsageRow
    from chatlm.front.store.store import Store


RETRY_S = 5.0  # until a row that the database has refused is written again


def write(connection: sqlite3.Connection, rows: Iterable[tuple[UsageRow, Amount]]):
    """Add to the database."""
    usage.add(connection, [(*row, *astuple(amount)) for row, amount in rows])


class UsageWriter:
    """Writes the entries of a ledger, in the order in which requests end. A front that is killed loses what
    its running answers have used, and the last moments that were not committed yet."""

    def __init__(self, store: Store):
        self.store = store
        self.news = asyncio.Event()
        self.task: asyncio.Task | None = None
        self.closing = False

    async def start(self, ledger: Ledger):
        """Read what keys with budgets have used today, and start to write."""
        if ledger.budgets:
            since = (date.fromisoformat(today()) - timedelta(1)).isoformat()
            found = await self.store.run(partial(usage.tokens_since, day=since))
            ledger.budgets.used.update(found)
        self.task = asyncio.create_task(supervised("writing the ledger", partial(self._write, ledger)))

    def wake_up(self):
        """There are new entries."""
        self.news.set()

    async def close(self):
        """Write what is left."""
        self.closing = True
        self.news.set()
        if self.task:
            await self.task

    async def _write(self, ledger: Ledger):
        """Write new entries until it is closed. What cannot be written is tried again."""
        while not self.closing or ledger.rows:
            await self.news.wait()
            self.news.clear()
            rows = ledger.take_rows()
            try:
                if rows:
                    await self.store.run(partial(write, rows=rows.items()))
            except Exception as error:
                log.error("what was used could not be written yet: %s", error)
                for row, amount in rows.items():
                    ledger.enter(row, amount)
                if self.closing:
                    return
                asyncio.get_running_loop().call_later(RETRY_S, self.news.set)

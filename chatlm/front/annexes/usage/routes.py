"""GET /v1/usage: what was used by day, key and model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from datetime import date, timedelta
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from chatlm.common.errors import RequestError, bad_value
from chatlm.common.jsontext import dump
from chatlm.front.server.ledger import MOST_ROWS, Amount, UsageRow, today
from chatlm.front.server.responses import REQUEST_LOG
from chatlm.front.store import usage

if TYPE_CHECKING:
    import sqlite3
    from chatlm.front.front import Front

    from chatlm.front.server.ledger import Ledger
    from chatlm.front.store.store import Store


DAYS = 31  # that are shown unless others are asked for


class UsageRoutes:
    """The handler of /v1/usage."""

    def __init__(self, ledger: Ledger, store: Store | None):
        self.ledger = ledger
        self.store = store

    @classmethod
    def of(cls, front: Front) -> UsageRoutes:
        return cls(front.ledger, front.store)

    async def handle_usage(self, http: web.Request) -> web.Response:
        """GET /v1/usage: what the request's key has used. A key with role=admin sees all keys; without keys
        everybody sees everything."""
        first, last = days_of(http.query.get("from"), http.query.get("to"))
        client = REQUEST_LOG.get().client
        keys = self.ledger.settings.keys
        own = client if keys else ""
        if any(key.admin for key in keys if key.name == client):
            own = None
        found = await self.between(first, last, own, client)
        total, rows = await asyncio.to_thread(shown_rows, found)  # there may be many
        head = {"object": "usage", "from": first, "to": last, "key": own}
        if self.store:
            head |= {"kept": "in the database", "since": None}
        else:
            head |= {"kept": "in memory, since the server started (--database keeps it)",
                     "since": self.ledger.since}
        head["cut"] = len(found) == MOST_ROWS
        budget = self.ledger.budgets and self.ledger.budgets.body(client)
        if budget:
            head["budget"] = budget
        head["total"] = body_of(total)
        return web.Response(body=b'%s, "data": [%s]}' % (dump(head)[:-1], rows),
                            content_type="application/json")

    async def between(self, first: str, last: str, own: str | None,
                      client: str) -> list[tuple[UsageRow, Amount]]:
        """The rows of these days, the newest first. own: of this key only; client: who asks."""
        if self.store:
            return await self.store.run(partial(read, first=first, last=last, own=own),
                                        client=client)
        found: dict[UsageRow, Amount] = {}
        for row, amount in self.ledger.rows.items():
            if first <= row.day <= last and own in (None, row.key):
                found[row] = amount
        order = sorted(found.items(), key=lambda item: item[0][1:])
        return sorted(order, key=lambda item: item[0].day, reverse=True)[:MOST_ROWS]


def read(connection: sqlite3.Connection, first: str, last: str,
         own: str | None) -> list[tuple[UsageRow, Amount]]:
    """The newest MOST_ROWS rows of these days. own: of this key only."""
    return [(UsageRow(day, name, model, bool(background)), Amount(*amounts))
            for day, name, model, background, *amounts in usage.newest(
                connection, first, last, own, MOST_ROWS)]


def shown_rows(found: Iterable[tuple[UsageRow, Amount]]) -> tuple[Amount, bytes]:
    """The sum of all rows, and the members of a JSON list of them. The rows are made one by one, because
    other threads get no turn within a single call of C."""
    total = Amount()
    rows = list[bytes]()
    for row, amount in found:
        total.add(amount)
        rows.append(dump(row._asdict() | body_of(amount)))
    return total, b", ".join(rows)


def body_of(amount: Amount) -> dict[str, float]:
    return {name: round(value, 3) for name, value in vars(amount).items()}


def days_of(first: str | None, last: str | None) -> tuple[str, str]:
    """The first and the last day that are asked for; by default the last DAYS. Raises RequestError for text
    that is no day."""
    found = []
    for name, text in (("from", first), ("to", last)):
        day = None
        with suppress(ValueError):
            day = text and date.fromisoformat(text)
        if text is not None and not (day and day.isoformat() == text):
            raise bad_value(name, text, "a day such as 2026-11-24")
        found.append(day)
    end = found[1] or max(date.fromisoformat(today()), found[0] or date.min)
    begin = found[0] or end - timedelta(min(DAYS - 1, (end - date.min).days))
    if begin > end:
        raise RequestError(f"from ({begin}) is after to ({end})", param="from")
    return begin.isoformat(), end.isoformat()

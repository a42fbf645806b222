"""The ledger: what each API key used of each model on each day, and the budgets of keys."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from datetime import date, datetime, timedelta, timezone
from functools import partial
from typing import NamedTuple, TYPE_CHECKING
from weakref import WeakSet

from chatlm.common.errors import Overloaded, RequestError, bad_value
from chatlm.common.jsontext import dump
from chatlm.common.log import log
from chatlm.common.messages.requests import Accepted, Embedding, Finished, Piece, PromptScores, Usage
from chatlm.front.aio import supervised
from chatlm.front.lazy import web
from chatlm.front.server.responses import REQUEST_LOG

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable

    from chatlm.common.config import ApiKey, Settings
    from chatlm.common.messages.requests import Event, Request
    from chatlm.front.store.store import Store


DAYS = 31          # that /v1/usage shows unless it is asked for others
MOST_ROWS = 10_000  # that it shows, the newest, and that are kept in memory without a database
RETRY_S = 5.0      # until a row that the database has refused is written again
ASSUMED = 256      # tokens that an answer without max_tokens takes of its key's budget until it has more


class Row(NamedTuple):
    """Whose, of what, and when."""

    day: str   # of UTC: 2026-11-24
    key: str   # its name; "": everybody, on a server without keys
    model: str
    background: bool  # batches, and requests with low priority


@dataclass
class Amount:
    """How much."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0      # of these
    completion_tokens: int = 0
    compute_s: float = 0.0

    def add(self, other: Amount):
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    @property
    def tokens(self) -> int:
        """What counts for a budget."""
        return self.prompt_tokens + self.completion_tokens


AMOUNTS = tuple(each.name for each in fields(Amount))
UPSERT = (f"INSERT INTO usage (day, key, model, background, {', '.join(AMOUNTS)}) "
          "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) "
          f"ON CONFLICT DO UPDATE SET {', '.join(f'{name} = {name} + excluded.{name}' for name in AMOUNTS)}")


def write(connection: sqlite3.Connection, rows: Iterable[tuple[Row, Amount]]):
    """Add to the database."""
    connection.executemany(UPSERT, [(*row, *astuple(amount)) for row, amount in rows])


def today() -> str:
    return datetime.fromtimestamp(time.time(), timezone.utc).date().isoformat()


def seconds_to_midnight() -> int:
    """Until the next day of UTC begins."""
    return 86_400 - int(time.time()) % 86_400


class Charge:
    """What one request uses, as its client gets it. A piece counts once its reader asks for the next one, as
    it has then been sent, and its tokens once they have text; what a client gets whole counts once it was
    sent (`answering`)."""

    def __init__(self, request: Request, row: Row):
        self.row, self.n, self.prompts = row, request.n, max(len(request.prompts), 1)
        self.ended: dict[int, Usage] = {}        # of answers that have, by choice
        self.drawn: Counter[int] = Counter()     # tokens of the others that were sent
        self.held: Counter[int] = Counter()      # those that have no text yet, such as half a character
        self.spent_s: dict[int, float] = {}      # of these
        self.begun, self.prompt_tokens, self.void = False, 0, False
        self.most = 0 if request.params.pooling else ASSUMED if request.max_tokens is None else (
            request.max_tokens)

    async def watch(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """Pass the events on, and count them."""
        try:
            async for event in events:
                yield event
                if isinstance(event, Accepted):
                    self.prompt_tokens = event.prompt_tokens
                self.begun = True  # it was accepted
                if isinstance(event, Finished):
                    self.ended[event.choice] = event.usage
                    self.drawn.pop(event.choice, None)
                    self.spent_s.pop(event.choice, None)
                elif isinstance(event, Piece):
                    self.held[event.choice] += len(event.tokens)
                    if event.deltas:  # else nothing of it was sent
                        self.drawn[event.choice] += self.held.pop(event.choice)
                        self.spent_s[event.choice] = event.spent_s
                elif isinstance(event, (Embedding, PromptScores)):
                    self.drawn[event.choice] += 0
        finally:
            await events.aclose()

    @property
    def amount(self) -> Amount:
        """As the field `usage` of the answer counts: each prompt once, each answer to it separately."""
        found = Amount(int(self.begun), compute_s=sum(self.spent_s.values()) + sum(
            usage.compute_s for usage in self.ended.values()))
        if self.void:
            return found
        found.completion_tokens += self._completed + self.drawn.total()
        for prompt in range(self.prompts):
            first = self.ended.get(prompt * self.n)
            if first:
                found.prompt_tokens += first.prompt_tokens
                found.cached_tokens += first.cached_tokens
            elif known := [usage for choice, usage in self.ended.items() if choice // self.n == prompt]:
                found.prompt_tokens += known[0].prompt_tokens
            elif self.prompts == 1 and self.drawn:
                found.prompt_tokens += self.prompt_tokens
        return found

    @property
    def _completed(self) -> int:
        return sum(usage.completion_tokens for usage in self.ended.values())

    @property
    def reserved(self) -> int:
        """How many tokens of its key's budget it takes while it runs: its prompts, and of each answer as many
        as it may have, or ASSUMED."""
        others = self.prompts * self.n - len(self.ended) - len(self.drawn)
        return (self.prompt_tokens + self._completed + self.most * others
                + sum(max(self.most, drawn) for drawn in self.drawn.values()))


class Ledger:
    """Counts what requests use, once they have ended, and writes it to the database of --database, in the
    order in which they end; without one it has what was used since the server started.

    What is written was sent before. A front that is killed loses what its running answers had used, and what
    ended within the last moments and was not committed yet. What lines of batches use is committed with
    their results."""

    def __init__(self, settings: Settings, store: Store | None):
        self.settings, self.store, self.since = settings, store, int(time.time())
        self.rows: dict[Row, Amount] = {}        # all of them without a database, else those not written yet
        self.totals: dict[bool, Amount] = defaultdict(Amount)  # of this run, in the background and before it
        self.used: Counter[tuple[str, str]] = Counter()        # (day, key) -> tokens, for budgets
        self.running: dict[str, WeakSet[Charge]] = defaultdict(WeakSet)  # of keys that have one
        self.news, self.writer = asyncio.Event(), None
        self.closing = False

    async def open(self, app: web.Application | None = None):
        """Read what budgets have left today, and begin to write."""
        if self.store:
            since = (date.fromisoformat(today()) - timedelta(1)).isoformat()
            found = await self.store.run(lambda db: db.execute(
                "SELECT day, key, SUM(prompt_tokens + completion_tokens) FROM usage WHERE day >= ? "
                "GROUP BY day, key", (since,)).fetchall())
            self.used.update({(day, key): tokens for day, key, tokens in found})
            self.writer = asyncio.create_task(supervised("writing the ledger", self._write))

    async def close(self):
        """Write what is left."""
        self.closing = True
        self.news.set()
        if self.writer:
            await self.writer

    # what was used

    def charge(self, request: Request, model: str) -> Charge:
        key = request.client if self.settings.keys else ""
        # a file's name may have bytes that are no text
        model = model.encode("utf-8", "replace").decode()
        charge = Charge(request, Row("", key, model, request.low_priority))
        if (known := self.key_of(key)) and known.tokens_per_day is not None:
            self.running[key].add(charge)
        return charge

    def settle(self, charge: Charge):
        """Enter what a request has used, on the day on which it ends."""
        row, amount = self.used_by(charge)
        self.count(charge, row, amount)
        if amount != Amount():
            self.rows.setdefault(row, Amount()).add(amount)
            while not self.store and len(self.rows) > MOST_ROWS:
                del self.rows[min(self.rows)]
            self.news.set()

    def used_by(self, charge: Charge) -> tuple[Row, Amount]:
        """What a request has used that ends now."""
        return charge.row._replace(day=today()), charge.amount

    def count(self, charge: Charge, row: Row, amount: Amount):
        """Count what a request has used for the budget of its key, and for /metrics."""
        self.running[row.key].discard(charge)
        if not self.running[row.key]:
            del self.running[row.key]
        if amount == Amount():
            return
        self.totals[row.background].add(amount)
        self.used[row.day, row.key] += amount.tokens
        while len(self.used) > MOST_ROWS:
            del self.used[min(self.used)]

    async def _write(self):
        """Add to the database what is new; what it refuses is tried again."""
        assert self.store
        while not self.closing or self.rows:
            await self.news.wait()
            self.news.clear()
            rows, self.rows = self.rows, {}
            try:
                if rows:
                    await self.store.run(partial(write, rows=rows.items()))
            except Exception as error:
                log.error("what was used could not be written yet: %s", error)
                for row, amount in rows.items():
                    self.rows.setdefault(row, Amount()).add(amount)
                if self.closing:
                    return
                asyncio.get_running_loop().call_later(RETRY_S, self.news.set)

    # budgets

    def key_of(self, client: str) -> ApiKey | None:
        return next((key for key in self.settings.keys if key.name == client), None)

    def checked(self, request: Request) -> bool:
        """over_budget; a header of the response then says so."""
        if over := self.over_budget(request):
            REQUEST_LOG.get().headers["X-Over-Budget"] = f"background; renewed in {seconds_to_midnight()} s"
        return over

    def over_budget(self, request: Request) -> bool:
        """Must this request wait in the background, since its key has used its tokens of today? Overloaded
        if the key is to be refused then."""
        key = self.key_of(request.client)
        if not key or key.tokens_per_day is None or (
                self.used[today(), key.name] + self.reserved(key) < key.tokens_per_day):
            return False
        if not key.refused:
            return True
        until = seconds_to_midnight()
        if self.used[today(), key.name] < key.tokens_per_day:
            raise Overloaded("the requests of this API key that run may use all that is left of its "
                             f"{key.tokens_per_day:,} tokens of today (UTC): wait until some have ended",
                             retry_after_s=min(until, 5), status=429)
        raise Overloaded(f"this API key has used its {key.tokens_per_day:,} tokens of today (UTC); it has "
                         f"new ones at midnight UTC, in {until:,} seconds", retry_after_s=until, status=429)

    def reserved(self, key: ApiKey) -> int:
        """How many tokens the running requests of a key take of its budget: else many that begin at once
        would all find some left."""
        return sum(charge.reserved for charge in self.running.get(key.name, ()))

    # what is shown

    async def handle_usage(self, http: web.Request) -> web.Response:
        """GET /v1/usage: of the request's own key; of all for one with role=admin, or without keys."""
        first, last = days_of(http.query.get("from"), http.query.get("to"))
        key = self.key_of(REQUEST_LOG.get().client)
        own = None if key and key.admin else REQUEST_LOG.get().client if self.settings.keys else ""
        found = await self.between(first, last, own)
        total, rows = await asyncio.to_thread(shown_rows, found)  # they may be many
        kept = ("in the database" if self.store else
                "in memory, since the server started (--database keeps it)")
        head = dump({
            "object": "usage", "from": first, "to": last, "key": own, "kept": kept,
            "since": None if self.store else self.since, "cut": len(found) == MOST_ROWS,
            **({"budget": self.budget(key)} if key and key.tokens_per_day is not None else {}),
            "total": body_of(total)})
        return web.Response(body=b'%s, "data": [%s]}' % (head[:-1], rows), content_type="application/json")

    def budget(self, key: ApiKey) -> dict:
        return {"tokens_per_day": key.tokens_per_day, "used_today": self.used[today(), key.name],
                "reserved": self.reserved(key),
                "over_budget": "refuse" if key.refused else "background",
                "renewed_in_s": seconds_to_midnight()}

    async def between(self, first: str, last: str, own: str | None) -> list[tuple[Row, Amount]]:
        """The rows of these days, newest first; own: of this key alone."""
        if self.store:
            return await self.store.run(partial(read, first=first, last=last, own=own))
        found: dict[Row, Amount] = {}
        for row, amount in self.rows.items():
            if first <= row.day <= last and own in (None, row.key):
                found[row] = amount
        order = sorted(found.items(), key=lambda item: item[0][1:])
        return sorted(order, key=lambda item: item[0].day, reverse=True)[:MOST_ROWS]


def read(connection: sqlite3.Connection, first: str, last: str,
         own: str | None) -> list[tuple[Row, Amount]]:
    """The newest MOST_ROWS of these days; own: of this key alone."""
    return [(Row(day, name, model, bool(background)), Amount(*amounts))
            for day, name, model, background, *amounts in connection.execute(
                f"SELECT day, key, model, background, {', '.join(AMOUNTS)} FROM usage "
                "WHERE day BETWEEN ? AND ? AND key = IFNULL(?, key) "
                "ORDER BY day DESC, key, model, background LIMIT ?", (first, last, own, MOST_ROWS))]


def shown_rows(found: Iterable[tuple[Row, Amount]]) -> tuple[Amount, bytes]:
    """The sum of all rows, and the members of a JSON list of them, made one by one: other threads get no turn
    within one call of C."""
    total, rows = Amount(), list[bytes]()
    for row, amount in found:
        total.add(amount)
        rows.append(dump(row._asdict() | body_of(amount)))
    return total, b", ".join(rows)


def body_of(amount: Amount) -> dict[str, float]:
    return {name: round(getattr(amount, name), 3) for name in AMOUNTS}


def days_of(first: str | None, last: str | None) -> tuple[str, str]:
    """The days asked for; by default the last ones. RequestError for what is no day."""
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

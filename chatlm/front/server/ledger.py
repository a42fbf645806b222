"""The ledger: what each API key used of each model on each day, and the budgets of keys."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence as Seq
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, fields
from datetime import date, datetime, timedelta, timezone
from functools import partial
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.client_words import quota_used, rate_limited
from chatlm.common.errors import Overloaded, RequestError, bad_value
from chatlm.common.jsontext import dump
from chatlm.common.log import log
from chatlm.common.messages.requests import Accepted, Embedding, Finished, Piece, PromptScores, Usage
from chatlm.front.aio import supervised
from chatlm.front.api.field_types import TEXT
from chatlm.front.api.fields import Field
from chatlm.front.lazy import web
from chatlm.front.server.responses import REQUEST_LOG
from chatlm.front.server.routes import Api, Route

if TYPE_CHECKING:
    import sqlite3

    from chatlm.common.config import ApiKey, Settings
    from chatlm.common.messages.requests import Event, Request
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.store.store import Store


DAYS = 31          # that /v1/usage shows unless it is asked for others
MOST_ROWS = 10_000  # that it shows, the newest, and that are kept in memory without a database
RETRY_S = 5.0      # until a row that the database has refused is written again
ASSUMED = 256      # tokens of its key's budget that an answer without max_tokens takes at a time
PICTURED = 4096    # that a picture is thought to have, until its prompt is laid out


class UsageRow(NamedTuple):
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


def write(connection: sqlite3.Connection, rows: Iterable[tuple[UsageRow, Amount]]):
    """Add to the database."""
    connection.executemany(UPSERT, [(*row, *astuple(amount)) for row, amount in rows])


def today() -> str:
    return datetime.fromtimestamp(time.time(), timezone.utc).date().isoformat()


def seconds_to_midnight() -> int:
    """Seconds until the next day begins in UTC."""
    return 86_400 - int(time.time()) % 86_400


class Claim(NamedTuple):
    """The tokens that a request may take from its key's budget."""

    prompt_tokens: int  # an estimate from above until they are counted
    answers: int        # to all of its prompts
    most: int           # tokens of an answer; without max_tokens, the first ASSUMED
    grows: bool         # it has no max_tokens, so an answer may get more

    @property
    def beyond_one(self) -> int:
        """The tokens of all answers but one. One answer may always exceed the budget."""
        return self.most * (self.answers - 1)


def claim_of(request: Request, context_length: int) -> Claim:
    """The claim of a request to a model with this context (0: not known)."""
    answers = max(len(request.prompts), 1) * request.n
    prompt = prompt_estimate(request)
    if request.params.pooling:
        return Claim(prompt, answers, 0, False)
    if request.max_tokens is None:
        return Claim(prompt, answers, ASSUMED, True)
    return Claim(prompt, answers, min(request.max_tokens, context_length or request.max_tokens), False)


def prompt_estimate(request: Request) -> int:
    """The tokens of the prompts. A text that is not tokenized yet counts a token for each byte."""
    if request.prompt_ids is not None:
        return sum(map(len, request.prompt_ids))
    texts = [message.content for message in request.messages or ()]
    texts += [prompt for prompt in request.prompts if isinstance(prompt, str)]
    ids = sum(len(prompt) for prompt in request.prompts if not isinstance(prompt, str))
    pictures = sum(len(message.pictures) for message in request.messages or ())
    return ids + sum(len(text.encode("utf-8", "replace")) for text in texts) + PICTURED * pictures


def beyond_one(claims: Iterable[Claim]) -> int:
    """The tokens of all answers to several requests but the longest. One answer may always exceed the
    budget."""
    claims = [*claims]
    longest = max((claim.most for claim in claims), default=0)
    return sum(claim.most * claim.answers for claim in claims) - longest


class Charge:
    """Counts what one request uses, as far as its client gets it.

    A piece of an answer counts once its reader asks for the next one, because it has been sent by then. Its
    tokens count once they have text. An answer that is sent whole counts once it was sent (`answering`)."""

    def __init__(self, request: Request, row: UsageRow, context_length: int = 0):
        self.row = row
        self.n = request.n
        self.prompts = max(len(request.prompts), 1)
        self.claim = claim_of(request, context_length)
        # by choice:
        self.ended: dict[int, Usage] = {}     # the usage of answers that have ended
        self.drawn: Counter[int] = Counter()  # tokens of running answers that were sent
        self.held: Counter[int] = Counter()   # their tokens without text yet, such as half a character
        self.granted: dict[int, int] = {}     # tokens that answers without max_tokens may have
        self.spent_s: dict[int, float] = {}   # computing time of running answers
        self.begun = False  # the request was accepted
        self.void = False   # its tokens do not count
        self.prompt_tokens: tuple[int, ...] = ()  # of each prompt, once they are counted
        # called when an answer without max_tokens has used its grant; the answer gets more, or is ended
        self.more: Callable[[int], None] = lambda choice: None

    async def watch(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """Pass the events on, and count them."""
        try:
            async for event in events:
                if isinstance(event, Accepted):
                    self.prompt_tokens = event.each or (event.prompt_tokens,)
                yield event
                self.begun = True
                if isinstance(event, Finished):
                    self.ended[event.choice] = event.usage
                    self.drawn.pop(event.choice, None)
                    self.held.pop(event.choice, None)
                    self.spent_s.pop(event.choice, None)
                elif isinstance(event, Piece):
                    self._note_piece(event)
                elif isinstance(event, (Embedding, PromptScores)):
                    self.drawn[event.choice] += 0
        finally:
            await events.aclose()

    def _note_piece(self, piece: Piece):
        choice = piece.choice
        held = self.held.pop(choice, 0) + len(piece.tokens)
        if piece.deltas:
            self.drawn[choice] = self.drawn.get(choice, 0) + held
            self.spent_s[choice] = piece.spent_s
        else:  # none of its tokens was sent
            self.held[choice] = held
        if self.claim.grows and self.taken(choice) >= self.grant(choice):
            self.more(choice)

    @property
    def amount(self) -> Amount:
        """What the request has used. It counts like the field `usage` of an answer: each prompt once, each
        answer to it separately."""
        compute_s = sum(self.spent_s.values()) + sum(usage.compute_s for usage in self.ended.values())
        used = Amount(int(self.begun), compute_s=compute_s)
        if self.void:
            return used
        used.completion_tokens += self._completed + self.drawn.total()
        for prompt in range(self.prompts):
            choices = range(prompt * self.n, (prompt + 1) * self.n)
            first = self.ended.get(choices[0])
            if first:
                used.prompt_tokens += first.prompt_tokens
                used.cached_tokens += first.cached_tokens
                continue
            ended = [self.ended[choice] for choice in choices if choice in self.ended]
            if ended:
                used.prompt_tokens += ended[0].prompt_tokens
            elif prompt < len(self.prompt_tokens) and any(choice in self.drawn for choice in choices):
                used.prompt_tokens += self.prompt_tokens[prompt]
        return used

    @property
    def _completed(self) -> int:
        return sum(usage.completion_tokens for usage in self.ended.values())

    def taken(self, choice: int) -> int:
        """The tokens that a running answer has so far."""
        return self.drawn[choice] + self.held[choice]

    def grant(self, choice: int) -> int:
        """The tokens that an answer may have."""
        return self.granted.get(choice, self.claim.most)

    def grow(self, choice: int):
        """Grant an answer ASSUMED tokens more."""
        while self.taken(choice) >= self.grant(choice):
            self.granted[choice] = self.grant(choice) + ASSUMED

    @property
    def reserved(self) -> int:
        """The tokens of its key's budget that it takes while it runs: its prompts, and all tokens that its
        answers may have. For an answer without max_tokens these are the next ASSUMED."""
        running = {*self.drawn, *self.held}
        not_begun = self.claim.answers - len(self.ended) - len(running)
        prompts = sum(self.prompt_tokens) if self.prompt_tokens else self.claim.prompt_tokens
        granted = sum(max(self.grant(choice), self.taken(choice)) for choice in running)
        return prompts + self._completed + self.claim.most * not_begun + granted


class Ledger:
    """Counts what requests have used when they end, and checks the budgets of keys.

    It writes to the database of --database, in the order in which requests end. Without a database it knows
    what was used since the server started. Only what was sent is written. A front that is killed loses what
    its running answers have used, and the last moments that were not committed yet. What lines of batches use
    is committed together with their results."""

    def __init__(self, settings: Settings, store: Store | None):
        self.settings = settings
        self.store = store
        self.since = int(time.time())
        self.rows: dict[UsageRow, Amount] = {}  # those not written yet; without a database, all
        self.totals: dict[bool, Amount] = defaultdict(Amount)  # since the start; True: in the background
        self.used: Counter[tuple[str, str]] = Counter()  # (day, key) -> tokens, for budgets
        self.running: dict[str, dict[Charge, None]] = defaultdict(dict)  # by key, in the order of their begin
        self.pledges: dict[str, Charge] = {}  # by the ids of requests that are about to begin
        self.news = asyncio.Event()
        self.writer = None
        self.closing = False

    async def open(self, app: web.Application | None = None):
        """Read what keys have used today, and start to write."""
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

    def charge(self, request: Request, model: str, context_length: int = 0) -> Charge:
        """Begin to charge a request. `settle`, `count` or `release` ends the charge."""
        key = request.client if self.settings.keys else ""
        pledge = self.pledges.get(request.id)
        if pledge and pledge.row.key == key:  # a request of another key may have the same id
            return self.pledges.pop(request.id)
        model = model.encode("utf-8", "replace").decode()  # a file's name may have bytes that are no text
        charge = Charge(request, UsageRow("", key, model, request.low_priority), context_length)
        known = self.key_of(key)
        if known and known.tokens_per_day is not None:
            self.running[key][charge] = None
        return charge

    @contextmanager
    def pledged(self, works: Iterable[tuple[WorkerPool, Request, str]]) -> Iterator[None]:
        """Reserve what several requests may take together, until each of them has begun."""
        pledges = {request.id: self.charge(request, model, pool.context_length)
                   for pool, request, model in works}
        self.pledges |= pledges
        try:
            yield
        finally:
            for request_id, charge in pledges.items():
                if self.pledges.get(request_id) is charge:  # the request has not begun
                    del self.pledges[request_id]
                    self.release(charge)

    def release(self, charge: Charge):
        """End the charge of a request that costs nothing."""
        self.running[charge.row.key].pop(charge, None)
        if not self.running[charge.row.key]:
            del self.running[charge.row.key]

    def settle(self, charge: Charge):
        """End a charge, and enter what the request has used under today's date."""
        row, amount = self.used_by(charge)
        self.count(charge, row, amount)
        if amount != Amount():
            self.rows.setdefault(row, Amount()).add(amount)
            while not self.store and len(self.rows) > MOST_ROWS:
                del self.rows[min(self.rows)]
            self.news.set()

    def used_by(self, charge: Charge) -> tuple[UsageRow, Amount]:
        """The entry for a request that ends now."""
        return charge.row._replace(day=today()), charge.amount

    def count(self, charge: Charge, row: UsageRow, amount: Amount):
        """End a charge, and count what the request has used for its key's budget and for /metrics."""
        self.release(charge)
        if amount == Amount():
            return
        self.totals[row.background].add(amount)
        self.used[row.day, row.key] += amount.tokens
        while len(self.used) > MOST_ROWS:
            del self.used[min(self.used)]

    async def _write(self):
        """Write new entries to the database until the ledger is closed. What cannot be written is tried
        again."""
        assert self.store
        while not self.closing or self.rows:
            await self.news.wait()
            self.news.clear()
            rows = self.rows
            self.rows = {}
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

    def checked(self, client: str, claims: Seq[Claim]) -> bool:
        """Like `over_budget`. If the key is over its budget, a header of the response says so."""
        over = self.over_budget(client, claims)
        if over:
            REQUEST_LOG.get().headers["X-Over-Budget"] = f"background; renewed in {seconds_to_midnight()} s"
        return over

    def wait_s(self, client: str) -> int:
        """Seconds until a client's line of a batch may begin; 0 if it may begin now."""
        try:
            self.check_line(client)
        except Overloaded as error:
            return max(error.retry_after_s, 1)
        return 0

    def over_budget(self, client: str, claims: Seq[Claim] = ()) -> bool:
        """Whether requests with these claims must run in the background, because the client's key has used
        its tokens of today. Raises Overloaded if such a key is to be refused."""
        key = self.key_of(client)
        if not key or key.tokens_per_day is None:
            return False
        if self._fits(key, self.reserved(key), beyond_one(claims)):
            return False
        if key.refused:
            raise self._refusal(key, beyond_one(claims))
        return True

    def check_line(self, client: str, claims: Seq[Claim] = ()):
        """Raise Overloaded if a line of a batch must wait, because its key is refused now.

        Lines may wait long in the background. So they begin only while half of what is left today is free, or
        nothing else of the key runs. Otherwise a batch would keep the key's other requests out until its
        end."""
        self.over_budget(client, claims)
        key = self.key_of(client)
        if not key or not key.refused or key.tokens_per_day is None:
            return
        reserved = self.reserved(key)
        left = key.tokens_per_day - self.used[today(), key.name]
        if reserved and reserved + beyond_one(claims) >= left // 2:
            raise self._refusal(key, beyond_one(claims))

    def check_prompt(self, charge: Charge):
        """Once a request's prompts are counted: raise Overloaded if they do not fit into what earlier
        requests have left of the key's budget, and such a key is to be refused."""
        key = self.key_of(charge.row.key)
        if not key or not key.refused or key.tokens_per_day is None:
            return
        needed = sum(charge.prompt_tokens) + charge.claim.beyond_one
        if not self._fits(key, self.reserved(key, before=charge), needed):
            raise self._refusal(key, needed)

    def grow(self, charge: Charge, choice: int, alone: bool = False) -> bool:
        """Grant an answer without max_tokens more tokens, if the budget has them. Returns whether it did.

        alone: exceed the budget if nothing else of the key runs."""
        key = self.key_of(charge.row.key)
        fits = True
        if key and key.refused and key.tokens_per_day is not None:
            fits = self._fits(key, self.reserved(key), 0)
        if fits or alone and len(self.running[charge.row.key]) == 1:
            charge.grow(choice)
            return True
        return False

    def _fits(self, key: ApiKey, reserved: int, needed: int) -> bool:
        return self.used[today(), key.name] + reserved + needed < (key.tokens_per_day or 0)

    def _refusal(self, key: ApiKey, needed: int) -> Overloaded:
        """The error for a key that is refused. needed: the least tokens that its request takes."""
        until = seconds_to_midnight()
        budget = key.tokens_per_day or 0
        left = budget - self.used[today(), key.name]
        if self._fits(key, 0, needed):
            return rate_limited("the requests of this API key that run may use all that is left of its "
                                f"{budget:,} tokens of today (UTC)", min(until, 5))
        if left > 0:
            return quota_used(f"this API key has {left:,} of its {budget:,} tokens of today (UTC) left, and "
                              f"this request may take {needed:,} besides its longest answer: ask for less, "
                              "or wait until midnight UTC", until)
        return quota_used(f"this API key has used its {budget:,} tokens of today (UTC); it has new ones at "
                          "midnight UTC", until)

    def reserved(self, key: ApiKey, before: Charge | None = None) -> int:
        """The tokens that the running requests of a key take from its budget. Without it, many requests that
        begin at once would all find tokens left. before: count only requests that began before this one."""
        tokens = 0
        for charge in self.running.get(key.name, ()):
            if charge is before:
                break
            tokens += charge.reserved
        return tokens

    # what is shown

    async def handle_usage(self, http: web.Request) -> web.Response:
        """GET /v1/usage: what the request's key has used. A key with role=admin sees all keys; without keys
        everybody sees everything."""
        first, last = days_of(http.query.get("from"), http.query.get("to"))
        client = REQUEST_LOG.get().client
        key = self.key_of(client)
        own = client if self.settings.keys else ""
        if key and key.admin:
            own = None
        found = await self.between(first, last, own)
        total, rows = await asyncio.to_thread(shown_rows, found)  # there may be many
        head = {"object": "usage", "from": first, "to": last, "key": own}
        if self.store:
            head |= {"kept": "in the database", "since": None}
        else:
            head |= {"kept": "in memory, since the server started (--database keeps it)",
                     "since": self.since}
        head["cut"] = len(found) == MOST_ROWS
        if key and key.tokens_per_day is not None:
            head["budget"] = self.budget(key)
        head["total"] = body_of(total)
        return web.Response(body=b'%s, "data": [%s]}' % (dump(head)[:-1], rows),
                            content_type="application/json")

    def budget(self, key: ApiKey) -> dict:
        return {"tokens_per_day": key.tokens_per_day, "used_today": self.used[today(), key.name],
                "reserved": self.reserved(key),
                "over_budget": "refuse" if key.refused else "background",
                "renewed_in_s": seconds_to_midnight()}

    async def between(self, first: str, last: str, own: str | None) -> list[tuple[UsageRow, Amount]]:
        """The rows of these days, the newest first. own: of this key only."""
        if self.store:
            return await self.store.run(partial(read, first=first, last=last, own=own))
        found: dict[UsageRow, Amount] = {}
        for row, amount in self.rows.items():
            if first <= row.day <= last and own in (None, row.key):
                found[row] = amount
        order = sorted(found.items(), key=lambda item: item[0][1:])
        return sorted(order, key=lambda item: item[0].day, reverse=True)[:MOST_ROWS]


def read(connection: sqlite3.Connection, first: str, last: str,
         own: str | None) -> list[tuple[UsageRow, Amount]]:
    """The newest MOST_ROWS rows of these days. own: of this key only."""
    return [(UsageRow(day, name, model, bool(background)), Amount(*amounts))
            for day, name, model, background, *amounts in connection.execute(
                f"SELECT day, key, model, background, {', '.join(AMOUNTS)} FROM usage "
                "WHERE day BETWEEN ? AND ? AND key = IFNULL(?, key) "
                "ORDER BY day DESC, key, model, background LIMIT ?", (first, last, own, MOST_ROWS))]


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
    return {name: round(getattr(amount, name), 3) for name in AMOUNTS}


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


FROM_DAY = Field("from", TEXT, "the first day (UTC), as 2026-11-24; default: 30 days before the last")
TO_DAY = Field("to", TEXT, "the last day; default: today")
LEDGER_ROUTES: tuple[Route[Ledger], ...] = (
    Route("GET", "/v1/usage", Api.OPENAI, Ledger.handle_usage,
          "what the request's API key used by day and model; a key with role=admin sees all keys",
          query=(FROM_DAY, TO_DAY)),
)

"""The ledger: what each API key used of each model on each day.

What keys may use is in `chatlm/front/server/budgets.py`, which only servers with budgets load. Entries are
written by `chatlm/front/server/usage_writer.py` and shown by `chatlm/front/annexes/usage/routes.py`."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.messages.requests import Accepted, Embedding, Finished, Piece, PromptScores, Usage
from chatlm.front.server.watching import Watcher

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import Event, Request
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.server.budgets import Budgets, Reservation
    from chatlm.front.server.usage_writer import UsageWriter


MOST_ROWS = 10_000  # kept in memory without a database, the newest, and shown by /v1/usage


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


def today() -> str:
    return datetime.fromtimestamp(time.time(), timezone.utc).date().isoformat()


def seconds_to_midnight() -> int:
    """Seconds until the next day begins in UTC."""
    return 86_400 - int(time.time()) % 86_400


class Charge(Watcher):
    """Counts what one request uses, as far as its client gets it.

    A piece of an answer counts once its reader asks for the next one, because it has been sent by then. Its
    tokens count once they have text. An answer that is sent whole counts once it was sent (`answering`)."""

    def __init__(self, request: Request, row: UsageRow):
        self.row = row
        self.n = request.n
        self.prompts = max(len(request.prompts), 1)
        # by choice:
        self.ended: dict[int, Usage] = {}     # the usage of answers that have ended
        self.drawn: Counter[int] = Counter()  # tokens of running answers that were sent
        self.held: Counter[int] = Counter()   # their tokens without text yet, such as half a character
        self.spent_s: dict[int, float] = {}   # computing time of running answers
        self.begun = False  # the request was accepted
        self.void = False   # its tokens do not count
        self.prompt_tokens: tuple[int, ...] = ()  # of each prompt, once they are counted
        self.reservation: Reservation | None = None  # what it takes of its key's budget

    def comes(self, event: Event):
        if isinstance(event, Accepted):
            self.prompt_tokens = event.each or (event.prompt_tokens,)

    def was_read(self, event: Event):
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

    def _note_piece(self, piece: Piece):
        choice = piece.choice
        held = self.held.pop(choice, 0) + len(piece.tokens)
        if piece.deltas:
            self.drawn[choice] = self.drawn.get(choice, 0) + held
            self.spent_s[choice] = piece.spent_s
        else:  # none of its tokens was sent
            self.held[choice] = held
        if self.reservation:
            self.reservation.note_tokens(choice)

    @property
    def amount(self) -> Amount:
        """What the request has used. It counts like the field `usage` of an answer: each prompt once, each
        answer to it separately."""
        compute_s = sum(self.spent_s.values()) + sum(usage.compute_s for usage in self.ended.values())
        used = Amount(int(self.begun), compute_s=compute_s)
        if self.void:
            return used
        used.completion_tokens += self.completed + self.drawn.total()
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
    def completed(self) -> int:
        """The tokens of its answers that have ended."""
        return sum(usage.completion_tokens for usage in self.ended.values())

    def taken(self, choice: int) -> int:
        """The tokens that a running answer has so far."""
        return self.drawn[choice] + self.held[choice]


class Ledger:
    """Counts what requests have used when they end.

    Without a database it knows what was used since the server started. Only what was sent counts. What lines
    of batches use is committed together with their results."""

    def __init__(self, settings: Settings, budgets: Budgets | None = None,
                 writer: UsageWriter | None = None):
        """budgets: what keys may use. writer: of a server with a database."""
        self.settings = settings
        self.budgets = budgets
        self.writer = writer
        self.since = int(time.time())
        self.rows: dict[UsageRow, Amount] = {}  # those not written yet; without a database, all
        self.totals: dict[bool, Amount] = defaultdict(Amount)  # since the start; True: in the background

    async def open(self):
        """Read what keys with budgets have used today, and start to write."""
        if self.writer:
            await self.writer.start(self)

    async def close(self):
        """Write what is left."""
        if self.writer:
            await self.writer.close()

    def charge(self, request: Request, model: str, context_length: int = 0) -> Charge:
        """Begin to charge a request. `settle`, `count` or `release` ends the charge."""
        key = request.client if self.settings.keys else ""
        pledge = self.budgets and self.budgets.take_pledge(request.id, key)
        if pledge:
            return pledge
        model = model.encode("utf-8", "replace").decode()  # a file's name may have bytes that are no text
        charge = Charge(request, UsageRow("", key, model, request.low_priority))
        if self.budgets:
            charge.reservation = self.budgets.reserve(request, charge, context_length)
        return charge

    @contextmanager
    def pledged(self, works: Iterable[tuple[WorkerPool, Request, str]]) -> Iterator[None]:
        """Reserve what several requests may take together, until each of them has begun."""
        if self.budgets is None:
            yield
            return
        charges = {request.id: self.charge(request, model, pool.context_length)
                   for pool, request, model in works}
        with self.budgets.pledged(charges):
            yield

    def release(self, charge: Charge):
        """End the charge of a request that costs nothing."""
        if charge.reservation:
            charge.reservation.release()

    def settle(self, charge: Charge):
        """End a charge, and enter what the request has used under today's date."""
        row, amount = self.used_by(charge)
        self.count(charge, row, amount)
        if amount != Amount():
            self.enter(row, amount)
            while not self.writer and len(self.rows) > MOST_ROWS:
                del self.rows[min(self.rows)]
            if self.writer:
                self.writer.wake_up()

    def enter(self, row: UsageRow, amount: Amount):
        self.rows.setdefault(row, Amount()).add(amount)

    def take_rows(self) -> dict[UsageRow, Amount]:
        """The entries that are not written yet, which are the writer's from now on."""
        rows = self.rows
        self.rows = {}
        return rows

    def used_by(self, charge: Charge) -> tuple[UsageRow, Amount]:
        """The entry for a request that ends now."""
        return charge.row._replace(day=today()), charge.amount

    def count(self, charge: Charge, row: UsageRow, amount: Amount):
        """End a charge, and count what the request has used for its key's budget and for /metrics."""
        self.release(charge)
        if amount == Amount():
            return
        self.totals[row.background].add(amount)
        if self.budgets:
            self.budgets.count(row, amount)

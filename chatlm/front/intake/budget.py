"""Limits the memory that large bodies and collected answers take in the front."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import ExitStack

from chatlm.common.client_words import overloaded
from chatlm.common.config import LIMITS


BODY_S = 30.0  # seconds a body may pause, or wait for memory


class Budget:
    """A number of bytes that requests share. They take them for large bodies while these are read, for what
    is kept of a body until it is answered, and for answers that are collected to be sent whole.

    One client may hold at most `total // share` bytes."""

    def __init__(self, total: int, share: int = 4):
        self.total = total
        self.per_client = total // share
        self.used = 0
        self.used_by: Counter[str] = Counter()  # client -> bytes
        self.freed = asyncio.Event()            # set, and then replaced, whenever bytes are given back

    def take(self, client: str, size: int) -> bool:
        """Take `size` bytes, if that many are free."""
        if self.used + size > self.total or self.used_by[client] + size > self.per_client:
            return False
        self.used += size
        self.used_by[client] += size
        return True

    def give_back(self, client: str, size: int):
        self.used -= size
        self.used_by[client] -= size
        if not self.used_by[client]:
            del self.used_by[client]
        self.freed.set()
        self.freed = asyncio.Event()


class Holding:
    """The bytes of a budget that one request holds. Leaving its `with` block gives them all back.

    The first LIMITS.inline_bytes of an answer are not counted."""

    def __init__(self, budget: Budget, client: str):
        self.budget = budget
        self.client = client
        self.size = 0
        self.uncounted = LIMITS.inline_bytes  # how much more of an answer may grow for free
        self.resources = ExitStack()          # whatever else the request holds until it ends

    def __enter__(self) -> Holding:
        return self

    def __exit__(self, *error):
        self.budget.give_back(self.client, self.size)
        self.resources.close()

    def hand_over(self) -> Holding:
        """Move everything that is held here to a new Holding, which is returned."""
        other = Holding(self.budget, self.client)
        other.size = self.size
        self.size = 0
        other.resources = self.resources.pop_all()
        return other

    def _take(self, size: int) -> bool:
        taken = self.budget.take(self.client, size)
        self.size += size * taken
        return taken

    async def wait_for(self, size: int):
        """Take `size` bytes once they are free. Raises Overloaded if that takes longer than BODY_S."""
        deadline_s = time.monotonic() + BODY_S
        while not self._take(size):
            try:
                await asyncio.wait_for(self.budget.freed.wait(), deadline_s - time.monotonic())
            except asyncio.TimeoutError:
                raise overloaded("too many large bodies are being read", 10) from None

    def give_back_beyond(self, size: int):
        """Give back what is held above `size` bytes."""
        surplus = self.size - size
        if surplus > 0:
            self.size -= surplus
            self.budget.give_back(self.client, surplus)

    def keep(self, size: int, whose: str = "requests with large bodies"):
        """Take `size` bytes for as long as the request lasts. Raises Overloaded if there is no room."""
        if not self._take(size):
            raise overloaded(f"{whose} hold too much memory until they are answered", 10)

    def grow(self, size: int):
        """Take `size` more bytes for a collected answer. Raises Overloaded if there is no room."""
        self.uncounted -= size
        if self.uncounted <= 0 and not self._take(size):
            raise overloaded("answers waiting to be sent whole have become too large: "
                             "stream them, or ask for less at a time")

"""The memory that bodies, and answers that are collected, may take in the front."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import ExitStack

from chatlm.common.client_words import overloaded
from chatlm.common.config import LIMITS


BODY_S = 30.0  # seconds a body may pause, or wait for memory


class Budget:
    """Bytes that requests hold in this process: large bodies while they are read, what is kept of them until
    they are answered, and answers that are collected to be sent whole.

    One client may hold a quarter of them, or what `total // share` is."""

    def __init__(self, total: int, share: int = 4):
        self.total = total
        self.used = 0
        self.freed = asyncio.Event()
        self.of_one = total // share
        self.of_client: Counter[str] = Counter()

    def take(self, client: str, size: int) -> bool:
        """Take `size` bytes, if that many are free."""
        if self.used + size > self.total or self.of_client[client] + size > self.of_one:
            return False
        self.used += size
        self.of_client[client] += size
        return True

    def give_back(self, client: str, size: int):
        self.used -= size
        self.of_client[client] -= size
        if not self.of_client[client]:
            del self.of_client[client]
        self.freed.set()
        self.freed = asyncio.Event()


class Holding:
    """The bytes of a budget that one request holds; leaving the block releases them all.

    The first LIMITS.inline_bytes of an answer are free."""

    def __init__(self, budget: Budget, client: str):
        self.budget = budget
        self.client = client
        self.size = 0
        self.free = LIMITS.inline_bytes
        self.others = ExitStack()  # whatever else the request holds until it ends

    def __enter__(self) -> Holding:
        return self

    def __exit__(self, *error):
        self.budget.give_back(self.client, self.size)
        self.others.close()

    def handed_over(self) -> Holding:
        """Move these bytes to another Holding, which is returned."""
        other = Holding(self.budget, self.client)
        other.size, self.size, other.others = self.size, 0, self.others.pop_all()
        return other

    def _take(self, size: int) -> bool:
        taken = self.budget.take(self.client, size)
        self.size += size * taken
        return taken

    async def room(self, size: int):
        """Take `size` bytes once they are free; raises Overloaded if that takes over BODY_S."""
        deadline_s = time.monotonic() + BODY_S
        while not self._take(size):
            try:
                await asyncio.wait_for(self.budget.freed.wait(), deadline_s - time.monotonic())
            except asyncio.TimeoutError:
                raise overloaded("too many large bodies are being read", 10) from None

    def give_back_beyond(self, size: int):
        """Release what is held above `size` bytes."""
        if (surplus := self.size - size) > 0:
            self.size -= surplus
            self.budget.give_back(self.client, surplus)

    def keep(self, size: int, whose: str = "requests with large bodies"):
        """Take `size` bytes for as long as the request lasts; raises Overloaded if there is no room."""
        if not self._take(size):
            raise overloaded(f"{whose} hold too much memory until they are answered", 10)

    def grow(self, size: int):
        """Take `size` more bytes; raises Overloaded if there is no room."""
        self.free -= size
        if self.free <= 0 and not self._take(size):
            raise overloaded("answers waiting to be sent whole have become too large: "
                             "stream them, or ask for less at a time")

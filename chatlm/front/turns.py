"""Places that clients take in turn."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import partial

from chatlm.common.lanes import Lanes


class Turns:
    """A lock that clients take in turn, or several places."""

    def __init__(self, places: int = 1, most: int | None = None):
        """most: places of one client. By default it never has all of several."""
        self.free = places
        self.most = most or max(1, places - 1)
        self.held_by: Counter[str] = Counter()
        self.lanes = Lanes()  # futures of those who wait, by client

    async def take(self, client: str) -> Callable[[], None]:
        """Wait for a place. Returns what gives it back, to be called once."""
        if self.free and self.held_by[client] < self.most:
            self._hold(client)
            return partial(self._give_back, client)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lanes.append(client, turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it got the place at the moment it was cancelled
                self._give_back(client)
            raise
        return partial(self._give_back, client)

    def _hold(self, client: str):
        self.free -= 1
        self.held_by[client] += 1

    def _give_back(self, client: str):
        self.free += 1
        self.held_by[client] -= 1
        if not self.held_by[client]:
            del self.held_by[client]
        while self.free and (turn := self._next()):
            turn.set_result(None)

    def _next(self) -> asyncio.Future[None] | None:
        """The turn of the next client that may have a place, which it then has; None if there is none."""
        for client in [*self.lanes.by_client]:
            while self.held_by[client] < self.most and client in self.lanes.by_client:
                turn = self.lanes.take(client)
                if not turn.done():
                    self._hold(client)
                    return turn
        return None

"""A queue in which clients take turns."""

from __future__ import annotations

import itertools
from collections import deque, OrderedDict
from collections.abc import Iterator
from typing import Any


class Lanes:
    """A queue with a lane per client. Clients take turns, so no client's backlog delays the others."""

    def __init__(self):
        self.by_client: OrderedDict[Any, deque] = OrderedDict()  # by name, or rank and name

    def __len__(self) -> int:
        return sum(map(len, self.by_client.values()))

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(self.by_client.values())

    def append(self, client, thing):
        self.by_client.setdefault(client, deque()).append(thing)

    def append_first(self, client, thing):
        self.by_client.setdefault(client, deque()).appendleft(thing)

    def insert(self, client, thing, index: int):
        """Add an item before a client's item with this index."""
        self.by_client.setdefault(client, deque()).insert(index, thing)

    def pop(self):
        return self.take(next(iter(self.by_client)))

    def take(self, client):
        """Remove and return a client's first item; the client goes to the end of the queue."""
        things = self.by_client[client]
        self.by_client.move_to_end(client)
        thing = things[0]
        self.remove(client, thing)
        return thing

    def remove(self, client, thing):
        things = self.by_client[client]
        things.remove(thing)
        if not things:
            del self.by_client[client]

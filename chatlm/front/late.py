"""What a request needs that no other had needed before: imported off the event loop, and only if it fits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from chatlm.common.program import imported_later

T = TypeVar("T")


class Late(Generic[T]):
    """Something that not every request needs. `load` imports it. loaded: it, once somebody needed it."""

    def __init__(self, load: Callable[[], T]):
        self.load = load
        self.loaded: T | None = None

    async def get(self) -> T:
        """It, imported in a thread by the first request that needs it. Raises Overloaded if it may be newer
        than what runs."""
        if self.loaded is None:
            self.loaded = await asyncio.to_thread(imported_later, self.load)
        return self.loaded

    def now(self) -> T:
        """The same for whoever holds up nobody: a sandbox, a command, /openapi.json."""
        if self.loaded is None:
            self.loaded = self.load()
        return self.loaded

"""What a request needs that no other had needed before: imported off the event loop, and only if it fits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from chatlm.common.errors import Overloaded
from chatlm.common.program import why_outdated

T = TypeVar("T")


def load_later(load: Callable[[], T]) -> T:
    """Import modules after the start. Raises Overloaded if the program's files are no longer those that were
    started: what is imported now may not fit what runs."""
    try:
        loaded = load()
    except Exception:  # half a file, or another bundle at the old places: not only ImportError
        check_program()
        raise
    check_program()
    return loaded


def check_program():
    """Raise Overloaded if the program's files have changed since it was started."""
    why = why_outdated()
    if why:
        raise Overloaded(why)


class Late(Generic[T]):
    """Something that few requests need. `load` imports it. loaded: it, if it is here already."""

    def __init__(self, load: Callable[[], T], loaded: T | None = None):
        self.load = load
        self.loaded = loaded

    @classmethod
    def here(cls, value: T) -> Late[T]:
        """What the core has: it is never imported late."""
        return cls(lambda: value, value)

    async def get(self) -> T:
        """It, imported in a thread by the first request that needs it. Raises Overloaded if it may be newer
        than what runs."""
        if self.loaded is None:
            self.loaded = await asyncio.to_thread(load_later, self.load)
        return self.loaded

    def now(self) -> T:
        """The same for whoever holds up nobody: a sandbox, a command, /openapi.json."""
        if self.loaded is None:
            self.loaded = self.load()
        return self.loaded

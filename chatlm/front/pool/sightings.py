"""What lies below a watched folder, from one look to the next."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

from chatlm.common.errors import ConfigError
from chatlm.common.hub.stamps import Sighting, Stamp
from chatlm.common.log import log

T = TypeVar("T", bound=Sighting)


class Sightings(Generic[T]):
    """The models, checkpoints or adapters below a folder. A stamp is a version of one's files, and a version
    that stands still is offered at each look until its caller has taken or refused it.

    What is seen without a stamp is being written, or cannot be read now: nobody knows which version it is. It
    has not gone, and neither has anything below it: the last version seen stays in `there`. So does
    everything if the look itself fails."""

    OLD_S = 5.0  # files that were changed longer ago stand still at the first look

    def __init__(self, find: Callable[[], Iterable[T]], taken: Callable[[], Collection[Stamp]],
                 watch_s: float):
        """find: runs in a thread; ConfigError or OSError if the folder cannot be read. taken: the versions
        that the caller has. watch_s: between two looks."""
        self.find, self.taken, self.watch_s = find, taken, watch_s
        self.there: dict[Path, T] = {}         # as last seen, in their order
        self.looked = False
        self.refused: dict[Stamp, bool] = {}   # versions that cannot be served; True: nor ever
        self.troubles: dict[str, Mapping] = {}  # by what they are about

    async def run(self, update: Callable[[list[T]], Awaitable], pause=asyncio.sleep):
        """Look again and again. update: takes what is offered."""
        while True:
            await pause(self.watch_s)
            try:
                await update(await self.look())
                self.note("the folder", {})
            except (ConfigError, OSError) as error:
                self.note("the folder", {"": str(error)})

    async def look(self) -> list[T]:
        return self.compare(await asyncio.to_thread(self.find))

    def compare(self, found: Iterable[T]) -> list[T]:
        """Take what a look has found. Returns what is offered: the versions that stand still, and are neither
        taken nor refused for good."""
        found, before = [*found], self.there.values()
        self.note("files", {each.path: each.trouble for each in found if each.trouble})
        seen = [each for each in found if each.stamp]
        now = [known for each in found for known in ([each] if each.stamp else [
            last for last in before if each.path in (last.path, *last.path.parents)])]
        still = {each.stamp for each in before} if self.looked else {
            each.stamp for each in seen if time.time() - each.changed_s > self.OLD_S}
        self.looked, self.there = True, {each.path: each for each in now}
        self.refused = {each.stamp: self.refused[each.stamp] for each in now if each.stamp in self.refused}
        done = {*self.taken(), *(stamp for stamp, for_good in self.refused.items() if for_good)}
        return [each for each in seen if each.stamp in still - done]

    def refuse(self, stamp: Stamp, for_good: bool = True) -> bool:
        """A version cannot be served: it is not offered again, unless that may change. Returns whether this
        is news, which the caller logs."""
        news = self.refused.get(stamp) != for_good
        self.refused[stamp] = for_good
        return news

    def note(self, about: str, troubles: Mapping):
        """All that is wrong now with what this is about. Each is logged once, and again when it changes."""
        known = self.troubles.get(about, {})
        for what, trouble in troubles.items():
            if known.get(what) != trouble:
                log.error(trouble)  # whole, as lines of one kind in a second are counted
        self.troubles[about] = troubles

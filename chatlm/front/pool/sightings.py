"""What a watched folder contains, from one scan to the next."""

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
    """The models, checkpoints or adapters below a folder. A stamp identifies a version of an entry's files. A
    version that has not changed between two scans is offered at each scan until the caller has accepted or
    refused it.

    An entry without a stamp is being written or cannot be read now, so its version is unknown. It is not
    treated as removed, and neither is anything below it: the last version seen stays in `there`. If a scan
    fails as a whole, everything stays."""

    OLD_S = 5.0  # files older than this are offered at the first scan
    WRITTEN_S = 60.0  # files that nobody changed for so long are not being written

    def __init__(self, find: Callable[[], Iterable[T]], taken: Callable[[], Collection[Stamp]],
                 watch_s: float):
        """find: runs in a thread; ConfigError or OSError if the folder cannot be read. taken: returns the
        versions that the caller serves. watch_s: seconds between two scans."""
        self.find = find
        self.taken = taken
        self.watch_s = watch_s
        self.there: dict[Path, T] = {}         # as last seen, in order
        self.looked = False
        self.refused: dict[Stamp, bool] = {}   # versions that cannot be served; True: for good
        self.whole: set[Stamp] = set()         # those of them whose files are whole: nobody writes them
        self.troubles: dict[str, Mapping] = {}  # by topic

    async def run(self, update: Callable[[list[T]], Awaitable], pause=asyncio.sleep):
        """Scan for ever. update: is called with what each scan offers."""
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
        """Compare the result of a scan with the last one. Returns what is offered: versions that have not
        changed since and are neither served nor refused for good."""
        found = [*found]
        before = self.there.values()
        self.note("files", {each.path: each.trouble for each in found if each.trouble})
        seen = [each for each in found if each.stamp]
        now = [known for each in found for known in ([each] if each.stamp else [
            last for last in before if each.path in (last.path, *last.path.parents)])]
        still = {each.stamp for each in before} if self.looked else {
            each.stamp for each in seen if time.time() - each.changed_s > self.OLD_S}
        self.looked = True
        self.there = {each.path: each for each in now}
        self.refused = {each.stamp: self.refused[each.stamp] for each in now if each.stamp in self.refused}
        self.whole &= self.refused.keys()
        done = {*self.taken(), *(stamp for stamp, for_good in self.refused.items() if for_good)}
        return [each for each in seen if each.stamp in still - done]

    def is_final(self, seen: T) -> bool:
        """Has a version been refused, and does nobody write its files any more? Who writes may pause."""
        return seen.stamp in self.refused and (
            seen.stamp in self.whole or time.time() - seen.changed_s > self.WRITTEN_S)

    def refuse(self, stamp: Stamp, for_good: bool = True, is_whole: bool = False) -> bool:
        """Note that a version cannot be served. If that is for good, it is not offered again. is_whole: its
        files are not the reason. Returns whether this is news, for the caller to log."""
        if is_whole:
            self.whole.add(stamp)
        news = self.refused.get(stamp) != for_good
        self.refused[stamp] = for_good
        return news

    def note(self, about: str, troubles: Mapping):
        """Set all current troubles of a topic. Each is logged once, and again when it changes."""
        known = self.troubles.get(about, {})
        for what, trouble in troubles.items():
            if known.get(what) != trouble:
                log.error(trouble)  # no format string: the log merges lines with equal ones
        self.troubles[about] = troubles

"""Follows what a watched folder contains, from one scan to the next."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

from chatlm.common.errors import ConfigError, error_text, line_of
from chatlm.common.hub.stamps import FoundFiles, Stamp
from chatlm.common.log import log

T = TypeVar("T", bound=FoundFiles)


class FolderScanner(Generic[T]):
    """The models, checkpoints or adapters below a folder. A stamp identifies a revision of an entry's files.
    One that has not changed between two scans is offered to the caller, at each scan until the caller serves
    or refuses it.

    An entry without a stamp is being written, or cannot be read now, so its revision is unknown. Neither the
    entry nor anything below it counts as removed: the revision that was seen last stays in `there`. If a scan
    fails as a whole, everything stays."""

    OLD_S = 5.0       # the first scan offers files that are older than this
    WRITTEN_S = 60.0  # files that nobody has changed for this long are not being written

    def __init__(self, find: Callable[[], Iterable[T]], taken: Callable[[], Collection[Stamp]],
                 watch_s: float):
        """find: scans the folder, in a thread; raises ConfigError or OSError if it cannot be read. taken:
        returns the revisions that the caller serves. watch_s: seconds between two scans."""
        self.find = find
        self.taken = taken
        self.watch_s = watch_s
        self.there: dict[Path, T] = {}         # as last seen, in order
        self.looked = False
        self.refused: dict[Stamp, bool] = {}   # revisions that cannot be served; True: for good
        self.whole: set[Stamp] = set()         # refused revisions that are complete: nobody writes them
        self.troubles: dict[str, Mapping] = {}  # topic -> what -> trouble

    async def run(self, update: Callable[[list[T]], Awaitable], pause=asyncio.sleep):
        """Scan for ever. update: called with what each scan offers."""
        while True:
            await pause(self.watch_s)
            try:
                await update(await self.look())
                self.note("the folder", {})
            except (ConfigError, OSError) as error:
                self.note("the folder", {"": str(error)})
            except Exception as error:  # our own fault: it is told once, and the next scan tries again
                self.note("the folder", {"": f"a scan failed and is tried again: {error_text(error)} "
                                            f"({line_of(error)})"})

    async def look(self) -> list[T]:
        return self.compare(await asyncio.to_thread(self.find))

    def compare(self, found: Iterable[T]) -> list[T]:
        """Compare the result of a scan with that of the last one. Returns what is offered: revisions that
        have not changed since, and that are neither served nor refused for good."""
        found = [*found]
        before = [*self.there.values()]
        self.note("files", {each.path: each.trouble for each in found if each.trouble})
        readable = [each for each in found if each.stamp]
        seen = {each.path for each in readable}
        now: list[T] = []
        for each in found:
            if each.stamp:
                now.append(each)
            else:  # keep what was seen last of it, and of what is below it and was not seen now
                now += [last for last in before if last.path not in seen
                        and each.path in (last.path, *last.path.parents)]
        if self.looked:
            unchanged = {each.stamp for each in before}
        else:
            unchanged = {each.stamp for each in readable if time.time() - each.changed_s > self.OLD_S}
        self.looked = True
        self.there = {each.path: each for each in now}
        self.refused = {each.stamp: self.refused[each.stamp] for each in now if each.stamp in self.refused}
        self.whole &= self.refused.keys()
        done = {*self.taken(), *(stamp for stamp, for_good in self.refused.items() if for_good)}
        return [each for each in readable if each.stamp in unchanged - done]

    def is_final(self, seen: T) -> bool:
        """Has a revision been refused, and is nobody writing its files any more? A writer may pause."""
        return seen.stamp in self.refused and (
            seen.stamp in self.whole or time.time() - seen.changed_s > self.WRITTEN_S)

    def refuse(self, stamp: Stamp, for_good: bool = True, is_whole: bool = False) -> bool:
        """Note that a revision cannot be served. Returns whether this is news, for the caller to log.

        for_good: do not offer it again. is_whole: its files are complete, and not the reason."""
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

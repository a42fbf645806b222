"""Which of several models are in memory: by bytes, in turns, and never cutting an answer."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from chatlm.common.log import log
from chatlm.front.pool.worker import State

if TYPE_CHECKING:
    from chatlm.front.pool.pool import WorkerPool


class Place:
    """A model's place in memory: whether it has one, and whether it waits for one.

    It takes its place when it begins to load. It leaves when others need the bytes: then its jobs are held,
    those on workers end, its workers are ended, and the place is free once their processes are gone."""

    def __init__(self, name: str, pool: WorkerPool, size: int, *, pinned: bool = False, idle_s: float = 0.0):
        """size: bytes; pinned: nothing but the operator makes it leave; idle_s: it leaves after so many
        seconds without a request, 0 = never."""
        self.name, self.pool, self.size, self.pinned, self.idle_s = name, pool, size, pinned, idle_s
        self.taken = self.leaving = False
        self.asked = pinned  # to be loaded, by somebody other than a job
        self.taken_s = 0.0
        self.waits_since_s: float | None = None

    @property
    def waits(self) -> bool:
        return not self.taken and bool(self.asked or len(self.pool.dispatcher.pending))

    @property
    def loaded(self) -> bool:
        return any(worker.state is State.READY for worker in self.pool.workers)

    def take(self):
        log.info("loading %s (%s)", self.name, shown_bytes(self.size))
        self.taken, self.asked, self.taken_s = True, False, time.monotonic()
        self.pool.dispatcher.wanted.set()

    def leave(self):
        if self.taken and not self.leaving:
            log.info("%s leaves memory (%s)", self.name, shown_bytes(self.size))
            self.leaving = self.pool.dispatcher.held = True
            self.go_on_leaving()

    def go_on_leaving(self):
        dispatcher, supervisor = self.pool.dispatcher, self.pool.supervisor
        if self.leaving and not dispatcher.running:
            supervisor.unload()
            if supervisor.gone:
                self.taken = self.leaving = dispatcher.held = False

    def may_leave(self, now: float) -> bool:
        """May others have its bytes? Not while it loads, nor in the time that every model has for itself."""
        if not self.taken or self.leaving or self.pinned:
            return False
        workers, supervisor = self.pool.workers, self.pool.supervisor
        begin_s = min((worker.ready_s for worker in workers if worker.state is State.READY), default=(
            self.taken_s if any(worker.crashes_in_row for worker in workers) else math.inf))
        return now - begin_s >= max(Residency.PLACE_S, supervisor.load_s)


class Residency:
    """Gives the bytes of memory to models that wait for them: first who waits longest. The least recently
    used idle model leaves first; then, of those with answers under way, who has been there longest."""

    PLACE_S = 10.0  # a model keeps its place so long, or as long as it took to load
    TICK_S = 0.1

    def __init__(self, budget: int):
        self.budget, self.places = budget, list[Place]()
        self.changed = asyncio.Event()

    async def run(self):
        while True:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.changed.wait(), self.TICK_S if self._unsettled else 1.0)
            self.changed.clear()
            self.settle(time.monotonic())

    @property
    def _unsettled(self) -> bool:
        return any(place.leaving or place.waits for place in self.places)

    @property
    def used(self) -> int:
        return sum(place.size for place in self.places if place.taken)

    def settle(self, now: float):
        """Do what can be done now."""
        for place in self.places:
            place.go_on_leaving()
            idle = place.taken and place.loaded and not place.pool.dispatcher.jobs
            if place.idle_s and idle and now - place.pool.dispatcher.used_s > place.idle_s:
                place.leave()
            place.waits_since_s = (place.waits_since_s or now) if place.waits else None
        spare = None  # bytes beside those that the first in line without room will get; None: it has room
        for place in sorted(self.places, key=lambda place: place.waits_since_s or math.inf):
            if not place.waits:
                continue
            free = self.budget - self.used
            if place.size <= min(free, math.inf if spare is None else spare):
                place.take()
                spare = spare and spare - place.size
            elif spare is None:
                spare = self._make_room(place, free, now)
                if place.size <= self.budget - self.used:  # who left had no process any more
                    place.take()

    def _make_room(self, place: Place, free: int, now: float) -> float:
        """Have others leave, if they may and that is enough. Returns the bytes that others may take now:
        those that will be left over, or any number where it is not enough."""
        coming = free + sum(other.size for other in self.places if other.leaving)
        leave: list[Place] = []
        for other in sorted((other for other in self.places if other.may_leave(now)), key=self._rank):
            if coming < place.size:
                leave.append(other)
                coming += other.size
        if coming < place.size:
            return math.inf
        for other in leave:
            other.leave()
        return coming - place.size

    @staticmethod
    def _rank(place: Place) -> tuple[bool, float]:
        dispatcher = place.pool.dispatcher
        return bool(dispatcher.jobs), place.taken_s if dispatcher.jobs else dispatcher.used_s


def shown_bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"

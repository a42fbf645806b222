"""Which of several models are in memory: by bytes, in turns, and never cutting an answer."""

from __future__ import annotations

import asyncio
import enum
import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.common.log import log
from chatlm.front.pool.worker import CacheState, State

if TYPE_CHECKING:
    from chatlm.front.pool.pool import WorkerPool


class Stay(enum.Enum):
    """What a model has of the memory, and what it is about to give back."""

    OUT = enum.auto()             # nothing: its workers' processes are gone, or were never there
    IN = enum.auto()              # all that it needs: it loads or serves
    EMPTYING = enum.auto()        # all; its workers were asked for the bytes of their KV pages
    EMPTIED = enum.auto()         # all but its KV pages
    LEAVING = enum.auto()         # all, until the answers on its workers, and then these, have ended
    LEAVING_EMPTIED = enum.auto()  # the same without its KV pages


# What may follow, and who has it follow.
NEXT_STAYS = {
    Stay.OUT: {Stay.IN: "the residency, for a request or the operator"},
    Stay.IN: {Stay.EMPTYING: "the residency, for another model",
              Stay.LEAVING: "the residency, for another model or after idle_s; the operator"},
    Stay.EMPTYING: {Stay.EMPTIED: "its workers, all of which have given them back",
                    Stay.LEAVING: "its workers, one of which cannot; the operator"},
    Stay.EMPTIED: {Stay.IN: "the residency, for a request or the operator",
                   Stay.LEAVING_EMPTIED: "the residency, for another model or after idle_s; the operator"},
    Stay.LEAVING: {Stay.OUT: "its workers, whose processes are gone"},
    Stay.LEAVING_EMPTIED: {Stay.OUT: "its workers, whose processes are gone"}}


class Place:
    """A model's place in memory: what it has of it, and whether it waits for it.

    It takes its place when it begins to load. It leaves when others need the bytes: then its jobs are held,
    those on workers end, its workers are ended, and the place is free once their processes are gone. Where
    the bytes of its KV pages are enough for the others, an idle model gives up these alone: its workers
    forget the prefixes that they cached, and stay. Before it serves it waits for these bytes again."""

    def __init__(self, name: str, pool: WorkerPool, own_size: int, *, cache: int = 0, pinned: bool = False,
                 idle_s: float = 0.0):
        """own_size: bytes without adapters, `cache` of them KV pages; pinned: only the operator unloads it;
        idle_s: it is unloaded after that many seconds without a request, 0 = never."""
        self.name, self.pool, self.own_size, self.cache = name, pool, own_size, cache
        self.pinned, self.idle_s = pinned, idle_s
        self.stay = Stay.OUT
        self.empties = True  # can its workers give back the memory of KV pages alone?
        self.asked = pinned  # to be loaded, by somebody other than a job
        self.taken_s = 0.0
        self.waits_since_s: float | None = None

    def become(self, stay: Stay):
        """All changes of its stay. Jobs wait while it has less than it needs, or is about to."""
        assert stay in NEXT_STAYS[self.stay], f"{self.name}: {self.stay.name} -> {stay.name}"
        self.stay = stay
        self.pool.dispatcher.held = stay not in (Stay.OUT, Stay.IN)

    @property
    def taken(self) -> bool:
        return self.stay is not Stay.OUT

    @property
    def leaving(self) -> bool:
        return self.stay in (Stay.LEAVING, Stay.LEAVING_EMPTIED)

    @property
    def emptying(self) -> bool:
        return self.stay is Stay.EMPTYING

    @property
    def emptied(self) -> bool:
        return self.stay in (Stay.EMPTIED, Stay.LEAVING_EMPTIED)

    @property
    def size(self) -> int:
        """Bytes with the adapters beside it, which come and go."""
        return self.own_size + self.pool.adapters.nbytes

    @property
    def bytes(self) -> int:
        """Those it has now."""
        return self.size - (self.cache if self.emptied else 0) if self.taken else 0

    @property
    def missing(self) -> int:
        """Those it needs to serve, beside what it has."""
        return self.size - self.bytes

    @property
    def coming(self) -> int:
        """Those that it is about to give up."""
        return self.bytes if self.leaving else self.cache if self.emptying else 0

    @property
    def spare(self) -> int:
        """Those it could give up and stay: while it is idle, those of its KV pages."""
        idle = self.loaded and not self.pool.dispatcher.jobs
        return self.cache if idle and self.empties and self.serves else 0

    @property
    def serves(self) -> bool:
        return self.stay is Stay.IN

    @property
    def waits(self) -> bool:
        may_take = Stay.IN in NEXT_STAYS[self.stay]
        return may_take and bool(self.asked or len(self.pool.dispatcher.pending))

    @property
    def loaded(self) -> bool:
        return any(worker.state is State.READY for worker in self.pool.workers)

    def take(self):
        """It gets the bytes that it misses."""
        before, dispatcher = self.stay, self.pool.dispatcher
        log.info("loading %s (%s)" if before is Stay.OUT else "%s takes its KV pages again (%s)", self.name,
                 shown_bytes(self.missing))
        self.become(Stay.IN)
        self.asked, self.taken_s = False, time.monotonic()
        if before is Stay.OUT:
            dispatcher.wanted.set()
            return
        for worker in self.pool.workers:
            worker.cache = CacheState.HELD
        dispatcher.dispatch()

    def empty_cache(self):
        """Give up the bytes of its KV pages."""
        log.info("%s gives up its KV pages (%s)", self.name, shown_bytes(self.cache))
        self.become(Stay.EMPTYING)
        self.go_on()

    def leave(self):
        """Give up all bytes, once the answers under way have ended."""
        if self.taken and not self.leaving:
            log.info("%s leaves memory (%s)", self.name, shown_bytes(self.bytes))
            self.become(Stay.LEAVING_EMPTIED if self.emptied else Stay.LEAVING)
            self.go_on()

    def go_on(self):
        """Do what can be done now of what has begun."""
        if self.stay in (Stay.EMPTYING, Stay.EMPTIED):
            self._go_on_emptying()
        if self.leaving and not self.pool.dispatcher.running:
            self.pool.supervisor.unload()
            if self.pool.supervisor.gone:
                self.become(Stay.OUT)

    def _go_on_emptying(self):
        for worker in self.pool.workers:  # also one that has died and come back
            worker.empty_cache()
        states = {worker.cache for worker in self.pool.workers if worker.state is State.READY}
        if CacheState.UNABLE in states:
            log.info("the workers of %s cannot give up KV pages alone", self.name)
            self.empties = False
            self.leave()
        elif self.emptying and states <= {CacheState.EMPTY}:
            self.become(Stay.EMPTIED)

    def may_leave(self, now: float) -> bool:
        """May others have its bytes? Not while it loads, nor in the time that every model has for itself."""
        if self.stay not in (Stay.IN, Stay.EMPTIED) or self.pinned:
            return False
        workers, supervisor = self.pool.workers, self.pool.supervisor
        begin_s = min((worker.ready_s for worker in workers if worker.state is State.READY), default=(
            self.taken_s if any(worker.crashes_in_row for worker in workers) else math.inf))
        return now - max(begin_s, self.taken_s) >= max(Residency.PLACE_S, supervisor.load_s)


class NoRoom(ConfigError):
    """A model that could never be loaded: requests would wait for it for ever."""


class Residency:
    """Gives the bytes of memory to models that wait for them: first who waits longest. A model that computes
    for low priority alone leaves first; then the least recently used idle one, or it gives up its KV pages
    where those of the idle ones suffice; then, of those with answers under way, who has been there longest.

    So every model that was admitted is loaded in the end, because each fits beside the pinned ones, which
    never leave."""

    PLACE_S = 10.0  # a model keeps its place so long, or as long as it took to load
    TICK_S = 0.1

    def __init__(self, budget: int):
        """budget: 0 until it is known."""
        self.budget, self.places = budget, list[Place]()
        self.changed = asyncio.Event()

    def room_beside_pinned(self, *places: Place) -> int:
        """How many bytes the pinned models leave to these."""
        return self.budget - sum(other.size for other in self.places if other.pinned and other not in places)

    def admit(self, place: Place, more: int = 0):
        """A new model's place is one of ours from now on; one of ours may grow by `more` bytes. NoRoom if the
        model, or another one beside it, could never be loaded then."""
        size, room = place.size + more, self.room_beside_pinned(place)
        others = [other for other in self.places if other is not place]
        largest = max((other for other in others if not other.pinned), key=lambda other: other.size,
                      default=None)
        together = f"all models together may take {shown_bytes(self.budget)} (--models-memory)"
        adapters = size - place.own_size
        takes = f"it takes {shown_bytes(size)}" + (
            f" with its adapters ({shown_bytes(adapters)})" if adapters else "")
        if size > room == self.budget:
            raise NoRoom(f"{takes}, and {together}")
        if size > room and place.pinned:
            names = ", ".join(other.name for other in (*others, place) if other.pinned)
            raise NoRoom(f"the pinned models ({names}) take {shown_bytes(self.budget - room + size)}, and "
                         f"{together}")
        if size > room:
            raise NoRoom(f"{takes}, and the pinned models leave {shown_bytes(room)} of --models-memory")
        if place.pinned and largest and largest.size > room - size:
            raise NoRoom(f"{takes} and is pinned, which leaves {shown_bytes(room - size)} of "
                         f"--models-memory, and {largest.name} takes {shown_bytes(largest.size)}")
        if place not in self.places:
            self.places.append(place)
            self.changed.set()

    async def run(self):
        while True:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.changed.wait(), self.TICK_S if self._unsettled else 1.0)
            self.changed.clear()
            self.settle(time.monotonic())

    @property
    def _unsettled(self) -> bool:
        return self.used > self.budget or any(
            place.leaving or place.emptying or place.waits for place in self.places)

    @property
    def used(self) -> int:
        return sum(place.bytes for place in self.places)

    def settle(self, now: float):
        """Do what can be done now."""
        for place in self.places:
            place.go_on()
            idle = place.taken and place.loaded and not place.pool.dispatcher.jobs
            if place.idle_s and idle and now - place.pool.dispatcher.used_s > place.idle_s:
                place.leave()
            place.waits_since_s = (place.waits_since_s or now) if place.waits else None
        if self.used > self.budget:  # adapters have come to a model that is loaded
            self._make_room(0, now)
        spare = None  # bytes beside those that the first in line without room will get; None: it has room
        for place in sorted(self.places, key=lambda place: place.waits_since_s or math.inf):
            if not place.waits:
                continue
            free = self.budget - self.used
            if (missing := place.missing) <= min(free, math.inf if spare is None else spare):
                place.take()
                spare = spare and spare - missing
            elif spare is None:
                spare = self._make_room(missing, now, place)
                if missing <= self.budget - self.used:  # who left had no process any more
                    place.take()

    def _make_room(self, missing: int, now: float, place: Place | None = None) -> float:
        """Unload models other than that of `place` if that frees enough bytes. Returns the bytes that
        others may take now: those that will be left over, or any number where it is not enough."""
        coming = self.budget - self.used + sum(other.coming for other in self.places)
        others = sorted((other for other in self.places if other is not place and other.may_leave(now)),
                        key=self._rank)
        spare, leave = sum(other.spare for other in others), list[Place]()
        for other in others:
            if coming + spare < missing:
                leave.append(other)
                coming, spare = coming + other.bytes, spare - other.spare
        if coming + spare < missing:
            return math.inf
        for other in others:
            if other in leave:
                other.leave()
            elif coming < missing and other.spare:
                coming += other.spare
                other.empty_cache()
        return coming - missing

    @staticmethod
    def _rank(place: Place) -> tuple[bool, bool, float]:
        dispatcher = place.pool.dispatcher
        busy = dispatcher.busy
        return busy, not dispatcher.jobs, place.taken_s if dispatcher.jobs else dispatcher.used_s


def shown_bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"

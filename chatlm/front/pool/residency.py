"""Which of several models are in memory. No answer is ever cut short to free memory."""

from __future__ import annotations

import asyncio
import enum
import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.common.log import log
from chatlm.front.pool.worker import CacheState

if TYPE_CHECKING:
    from chatlm.front.pool.pool import WorkerPool


class Stay(enum.Enum):
    """How much memory a model holds, and whether it is about to release some."""

    OUT = enum.auto()             # none: its workers have not started, or their processes have ended
    IN = enum.auto()              # everything: it is loading or serving
    EMPTYING = enum.auto()        # everything; its workers were asked to release their KV pages
    EMPTIED = enum.auto()         # everything but its KV pages
    LEAVING = enum.auto()         # everything, until its running answers, then its workers, have ended
    LEAVING_EMPTIED = enum.auto()  # likewise, without its KV pages


# Which transitions are allowed, and who requests them.
NEXT_STAYS = {
    Stay.OUT: {Stay.IN: "the residency, for a request or the operator"},
    Stay.IN: {Stay.EMPTYING: "the residency, for another model",
              Stay.LEAVING: "the residency, for another model or after idle_s; the operator"},
    Stay.EMPTYING: {Stay.EMPTIED: "its workers, when all have released them",
                    Stay.LEAVING: "its workers, when one cannot; the operator"},
    Stay.EMPTIED: {Stay.IN: "the residency, for a request or the operator",
                   Stay.LEAVING_EMPTIED: "the residency, for another model or after idle_s; the operator"},
    Stay.LEAVING: {Stay.OUT: "its workers, when their processes have ended"},
    Stay.LEAVING_EMPTIED: {Stay.OUT: "its workers, when their processes have ended"}}


class Place:
    """A model's share of memory: how many bytes it holds, and whether it waits for them.

    A model holds its bytes from when it begins to load. When others need them, its queued jobs are held, the
    running ones end, its workers are ended, and the bytes are free once their processes are gone. If the
    bytes of its KV pages are enough for the others, an idle model releases only these: its workers forget
    the cached prefixes and stay alive. Before the model serves again, it waits to get those bytes back."""

    def __init__(self, name: str, pool: WorkerPool, own_size: int, *, cache: int = 0, pinned: bool = False,
                 idle_s: float = 0.0):
        """own_size: bytes without adapters; cache: how many of these are KV pages; pinned: only the operator
        unloads it; idle_s: unload it after this many seconds without a request, 0 = never."""
        self.name = name
        self.pool = pool
        self.own_size = own_size
        self.cache = cache
        self.pinned = pinned
        self.idle_s = idle_s
        self.stay = Stay.OUT
        self.empties = True  # can its workers release KV pages alone?
        self.asked = pinned  # was loading requested other than by a job?
        self.taken_s = 0.0
        self.waits_since_s: float | None = None

    def become(self, stay: Stay):
        """Every transition goes through here. Jobs are held while the model lacks memory or is about to."""
        assert stay in NEXT_STAYS[self.stay], f"{self.name}: {self.stay.name} -> {stay.name}"
        self.stay = stay
        self.pool.dispatcher.hold(stay not in (Stay.OUT, Stay.IN))

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
        """Bytes that it needs to serve, its current adapters included."""
        return self.own_size + self.pool.adapters.nbytes

    @property
    def bytes(self) -> int:
        """Bytes that it holds now."""
        return self.size - (self.cache if self.emptied else 0) if self.taken else 0

    @property
    def missing(self) -> int:
        """Bytes that it needs to serve and does not hold."""
        return self.size - self.bytes

    @property
    def serves(self) -> bool:
        return self.stay is Stay.IN

    @property
    def waits(self) -> bool:
        may_take = Stay.IN in NEXT_STAYS[self.stay]
        return may_take and bool(self.asked or len(self.pool.dispatcher.pending))

    def take(self):
        """Take the missing bytes: load, or get the KV pages back."""
        before = self.stay
        dispatcher = self.pool.dispatcher
        log.info("loading %s (%s)" if before is Stay.OUT else "%s gets its KV pages back (%s)", self.name,
                 shown_bytes(self.missing))
        self.become(Stay.IN)
        self.asked = False
        self.taken_s = time.monotonic()
        if before is Stay.OUT:
            self.pool.supervisor.load()
            return
        for worker in self.pool.workers:
            worker.use_cache()
        dispatcher.dispatch()

    def empty_cache(self):
        """Release the KV pages."""
        log.info("%s releases its KV pages (%s)", self.name, shown_bytes(self.cache))
        self.become(Stay.EMPTYING)
        self.go_on()

    def leave(self):
        """Release all bytes once the running answers have ended."""
        if self.taken and not self.leaving:
            log.info("%s leaves memory (%s)", self.name, shown_bytes(self.bytes))
            self.become(Stay.LEAVING_EMPTIED if self.emptied else Stay.LEAVING)
            self.go_on()

    def go_on(self):
        """Advance whatever transition is under way."""
        ready = self.pool.supervisor.ready_workers
        if self.stay in (Stay.EMPTYING, Stay.EMPTIED):
            for worker in self.pool.workers:  # including one that died and was restarted
                worker.empty_cache()
            if any(worker.cache is CacheState.UNABLE for worker in ready):
                log.info("the workers of %s cannot release KV pages alone", self.name)
                self.empties = False
                self.leave()
            elif self.emptying and all(worker.cache is CacheState.EMPTY for worker in ready):
                self.become(Stay.EMPTIED)
        if self.leaving and not self.pool.dispatcher.running:
            self.pool.supervisor.unload()
            if self.pool.supervisor.gone:
                self.become(Stay.OUT)


class NoRoom(ConfigError):
    """A model that could never be loaded, so that its requests would wait for ever."""


class Residency:
    """Gives memory to the models that wait for it, the longest waiting first. To make room it unloads first
    models that only run low-priority requests; then idle ones, least recently used first, or takes only
    their KV pages if those are enough; then, of the busy ones, whichever was loaded first.

    Every admitted model is eventually loaded, because each fits next to the pinned ones, which stay."""

    KEEP_S = 10.0  # a model stays at least this long, or as long as it took to load
    TICK_S = 0.1

    def __init__(self, budget: int):
        """budget: 0 until it is known."""
        self.budget, self.places = budget, list[Place]()
        self.changed = asyncio.Event()

    def room_beside_pinned(self, *places: Place) -> int:
        """How many bytes the pinned models leave for these places."""
        return self.budget - sum(other.size for other in self.places if other.pinned and other not in places)

    def admit(self, place: Place, more: int = 0):
        """Add a model, or allow a known one to grow by `more` bytes. NoRoom if it, or another model next to
        it, could then never be loaded."""
        size = place.size + more
        room = self.room_beside_pinned(place)
        others = [other for other in self.places if other is not place]
        largest = max((other for other in others if not other.pinned), key=lambda other: other.size,
                      default=None)
        together = f"all models together may take {shown_bytes(self.budget)} (--models-memory)"
        adapters = size - place.own_size
        takes = f"it needs {shown_bytes(size)}" + (
            f" with its adapters ({shown_bytes(adapters)})" if adapters else "")
        if size > room == self.budget:
            raise NoRoom(f"{takes}, and {together}")
        if size > room and place.pinned:
            names = ", ".join(other.name for other in (*others, place) if other.pinned)
            raise NoRoom(f"the pinned models ({names}) need {shown_bytes(self.budget - room + size)}, and "
                         f"{together}")
        if size > room:
            raise NoRoom(f"{takes}, and the pinned models leave {shown_bytes(room)} of --models-memory")
        if place.pinned and largest and largest.size > room - size:
            raise NoRoom(f"{takes} and is pinned, which leaves {shown_bytes(room - size)} of "
                         f"--models-memory, and {largest.name} needs {shown_bytes(largest.size)}")
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
        """Advance all transitions, and load what fits, in order of waiting."""
        for place in self.places:
            place.go_on()
            is_unused = place.taken and is_idle(place)
            if place.idle_s and is_unused and place.pool.dispatcher.idle_s(now) > place.idle_s:
                place.leave()
            place.waits_since_s = (place.waits_since_s or now) if place.waits else None
        if self.used > self.budget:  # a loaded model was given adapters
            self._make_room(0, now)
        spare = None  # bytes left over once the first in line that has to wait is served; None: none waits
        for place in sorted(self.places, key=lambda place: place.waits_since_s or math.inf):
            if not place.waits:
                continue
            free = self.budget - self.used
            if (missing := place.missing) <= min(free, math.inf if spare is None else spare):
                place.take()
                spare = spare and spare - missing
            elif spare is None:
                spare = self._make_room(missing, now, place)
                if missing <= self.budget - self.used:  # freed at once: the unloaded ones had no process
                    place.take()

    def _make_room(self, missing: int, now: float, place: Place | None = None) -> float:
        """Unload models other than `place`'s if that frees enough bytes. Returns how many bytes others may
        take now: what will be left over, or infinity if unloading does not free enough."""
        free = self.budget - self.used + sum(coming(other) for other in self.places)
        others = sorted((other for other in self.places if other is not place and may_leave(other, now)),
                        key=self._rank)
        spare = sum(spare_of(other) for other in others)
        leave = list[Place]()
        for other in others:
            if free + spare < missing:
                leave.append(other)
                free = free + other.bytes
                spare = spare - spare_of(other)
        if free + spare < missing:
            return math.inf
        for other in others:
            if other in leave:
                other.leave()
            elif free < missing and spare_of(other):
                free += spare_of(other)
                other.empty_cache()
        return free - missing

    @staticmethod
    def _rank(place: Place) -> tuple[bool, bool, float]:
        dispatcher = place.pool.dispatcher
        busy = dispatcher.busy
        return busy, not dispatcher.jobs, place.taken_s if dispatcher.jobs else dispatcher.use.last_s


def is_idle(place: Place) -> bool:
    return bool(place.pool.supervisor.ready_workers) and not place.pool.dispatcher.jobs


def coming(place: Place) -> int:
    """Bytes that it is about to release."""
    return place.bytes if place.leaving else place.cache if place.emptying else 0


def spare_of(place: Place) -> int:
    """Bytes that it could release without being unloaded: those of its KV pages while it is idle."""
    return place.cache if place.serves and place.empties and is_idle(place) else 0


def may_leave(place: Place, now: float) -> bool:
    """May others have its bytes? Not while it loads, nor in the first seconds after that."""
    if place.stay not in (Stay.IN, Stay.EMPTIED) or place.pinned:
        return False
    workers = place.pool.workers
    supervisor = place.pool.supervisor
    begin_s = min((worker.ready_s for worker in supervisor.ready_workers), default=(
        place.taken_s if any(worker.crashes_in_row for worker in workers) else math.inf))
    return now - max(begin_s, place.taken_s) >= max(Residency.KEEP_S, supervisor.load_s)


def shown_bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"

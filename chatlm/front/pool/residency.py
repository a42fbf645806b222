"""Decides which of several models are in memory. No answer is ever cut short to free memory."""

from __future__ import annotations

import asyncio
import enum
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.common.log import log
from chatlm.common.sizes import shown_bytes
from chatlm.front.pool.worker import CacheState

if TYPE_CHECKING:
    from chatlm.front.pool.pool import WorkerPool


class MemoryState(enum.Enum):
    """How much memory a model holds, and whether it is about to release some."""

    OUT = enum.auto()              # none: its workers have not started, or their processes have ended
    IN = enum.auto()               # all: it is loading or serving
    EMPTYING = enum.auto()         # all; its workers were asked to release their KV pages
    EMPTIED = enum.auto()          # all except its KV pages
    LEAVING = enum.auto()          # all, until its running answers, and then its workers, have ended
    LEAVING_EMPTIED = enum.auto()  # the same without its KV pages


# which transitions are allowed, and who requests them
NEXT_MEMORY_STATES = {
    MemoryState.OUT: {MemoryState.IN: "the residency, for a request or the operator"},
    MemoryState.IN: {MemoryState.EMPTYING: "the residency, for another model",
                     MemoryState.LEAVING: "the residency, for another model or after idle_s; the operator"},
    MemoryState.EMPTYING: {MemoryState.EMPTIED: "its workers, when all have released them",
                           MemoryState.LEAVING: "its workers, when one cannot; the operator"},
    MemoryState.EMPTIED: {MemoryState.IN: "the residency, for a request or the operator",
                          MemoryState.LEAVING_EMPTIED:
                              "the residency, for another model or after idle_s; the operator"},
    MemoryState.LEAVING: {MemoryState.OUT: "its workers, when their processes have ended"},
    MemoryState.LEAVING_EMPTIED: {MemoryState.OUT: "its workers, when their processes have ended"}}


class MemoryShare:
    """A model's share of memory: how many bytes it holds, and whether it waits for them.

    A model takes its bytes when it begins to load. When others need them, its queued jobs are held. Once the
    running ones have ended, its workers are ended, and the bytes are free when their processes are gone.

    An idle model may release only its KV pages, if these are enough for the others: its workers forget the
    cached prefixes and stay alive. Before the model serves again, it waits to get those bytes back."""

    def __init__(self, name: str, pool: WorkerPool, own_size: int, *, cache: int = 0, pinned: bool = False,
                 idle_s: float = 0.0, note_jobs: Callable[[], None] = lambda: None):
        """own_size: bytes without adapters. cache: how many of these are KV pages. pinned: only the operator
        unloads it. idle_s: unload it after this many seconds without a request; 0: never. note_jobs: called
        when jobs come and go, or when it is asked to load or to leave."""
        self.note_jobs = note_jobs
        self.name = name
        self.pool = pool
        self.own_size = own_size
        self.cache = cache
        self.pinned = pinned
        self.idle_s = idle_s
        self.memory_state = MemoryState.OUT
        self.empties = True         # can its workers release KV pages alone?
        self.is_requested = pinned  # was loading requested by anything other than a job?
        self.taken_s = 0.0          # when it last took its bytes
        self.waits_since_s: float | None = None

    def start(self):
        """The residency looks after it."""

    def load(self):
        self.is_requested = not self.serves
        self.note_jobs()

    def unload(self):
        self.is_requested = False
        self.leave()
        self.note_jobs()

    def rename(self, name: str):
        self.name = name

    @property
    def state(self) -> str:
        if self.pool.supervisor.ready_workers:
            return "ready"
        return "loading" if self.taken and not self.leaving else "unloaded"

    def become(self, state: MemoryState):
        """Every transition goes through here. Jobs are held while the model lacks memory, or soon will."""
        before = self.memory_state
        assert state in NEXT_MEMORY_STATES[before], f"{self.name}: {before.name} -> {state.name}"
        self.memory_state = state
        self.pool.dispatcher.hold(state not in (MemoryState.OUT, MemoryState.IN))

    @property
    def taken(self) -> bool:
        return self.memory_state is not MemoryState.OUT

    @property
    def leaving(self) -> bool:
        return self.memory_state in (MemoryState.LEAVING, MemoryState.LEAVING_EMPTIED)

    @property
    def emptying(self) -> bool:
        return self.memory_state is MemoryState.EMPTYING

    @property
    def emptied(self) -> bool:
        return self.memory_state in (MemoryState.EMPTIED, MemoryState.LEAVING_EMPTIED)

    @property
    def size(self) -> int:
        """Bytes that it needs to serve, its current adapters included."""
        return self.own_size + self.pool.adapters.nbytes

    @property
    def held_bytes(self) -> int:
        """Bytes that it holds now."""
        if not self.taken:
            return 0
        return self.size - self.cache if self.emptied else self.size

    @property
    def bytes(self) -> int:
        return self.held_bytes or self.size

    @property
    def is_listed(self) -> bool:
        return True  # its files' headers have been read

    @property
    def missing(self) -> int:
        """Bytes that it needs to serve and does not hold."""
        return self.size - self.held_bytes

    @property
    def serves(self) -> bool:
        return self.memory_state is MemoryState.IN

    @property
    def waits(self) -> bool:
        may_take = MemoryState.IN in NEXT_MEMORY_STATES[self.memory_state]
        return may_take and bool(self.is_requested or len(self.pool.dispatcher.pending))

    @property
    def waits_in_background(self) -> bool:
        """Do only low-priority requests wait for it?"""
        return not self.is_requested and not self.pool.dispatcher.busy

    def take(self):
        """Take the missing bytes: load, or get the KV pages back."""
        was_out = self.memory_state is MemoryState.OUT
        log.info("loading %s (%s)" if was_out else "%s gets its KV pages back (%s)", self.name,
                 shown_bytes(self.missing))
        self.become(MemoryState.IN)
        self.is_requested = False
        self.taken_s = time.monotonic()
        if was_out:
            self.pool.supervisor.load()
            return
        for worker in self.pool.workers:
            worker.use_cache()
        self.pool.dispatcher.dispatch()

    def empty_cache(self):
        """Release the KV pages."""
        log.info("%s releases its KV pages (%s)", self.name, shown_bytes(self.cache))
        self.become(MemoryState.EMPTYING)
        self.go_on()

    def leave(self):
        """Release all bytes once the running answers have ended."""
        if self.taken and not self.leaving:
            log.info("%s leaves memory (%s)", self.name, shown_bytes(self.held_bytes))
            self.become(MemoryState.LEAVING_EMPTIED if self.emptied else MemoryState.LEAVING)
            self.go_on()

    def go_on(self):
        """Advance the transition that is under way, if any."""
        ready = self.pool.supervisor.ready_workers
        if self.memory_state in (MemoryState.EMPTYING, MemoryState.EMPTIED):
            for worker in self.pool.workers:  # including one that died and was restarted
                worker.empty_cache()
            if any(worker.cache is CacheState.UNABLE for worker in ready):
                log.info("the workers of %s cannot release KV pages alone", self.name)
                self.empties = False
                self.leave()
            elif self.emptying and all(worker.cache is CacheState.EMPTY for worker in ready):
                self.become(MemoryState.EMPTIED)
        if self.leaving and not self.pool.dispatcher.running:
            self.pool.supervisor.unload()
            if self.pool.supervisor.has_ended:
                self.become(MemoryState.OUT)

    @property
    def is_idle(self) -> bool:
        return bool(self.pool.supervisor.ready_workers) and not self.pool.dispatcher.jobs

    @property
    def coming(self) -> int:
        """Bytes that it is about to release."""
        if self.leaving:
            return self.held_bytes
        return self.cache if self.emptying else 0

    @property
    def spare(self) -> int:
        """Bytes that it could release without being unloaded: those of its KV pages, while it is idle."""
        return self.cache if self.serves and self.empties and self.is_idle else 0

    @property
    def is_loading(self) -> bool:
        """Does it have memory, but no worker that serves or fails?"""
        if not self.taken or self.leaving or self.pool.supervisor.ready_workers:
            return False
        return not any(worker.crashes_in_row for worker in self.pool.workers)

    def may_leave(self, now: float, in_background: bool) -> bool:
        """May others have its bytes? Not while it loads. Then once it has been idle for as long as its load
        took, or, however much it is used, once it has stayed STAY_LOADS times as long.

        in_background: do they need the bytes for low-priority requests alone? These take none from a model
        in use that is not idle."""
        if self.memory_state not in (MemoryState.IN, MemoryState.EMPTIED) or self.pinned or self.is_loading:
            return False
        supervisor = self.pool.supervisor
        dispatcher = self.pool.dispatcher
        ready_s = [worker.ready_s for worker in supervisor.ready_workers]
        begin_s = max(min(ready_s), self.taken_s) if ready_s else self.taken_s
        stayed_s = now - begin_s
        if min(dispatcher.idle_s(now), stayed_s) >= supervisor.load_s:
            return True
        if in_background and dispatcher.in_use:
            return False
        return stayed_s >= Residency.STAY_LOADS * supervisor.load_s


class NoRoom(ConfigError):
    """A model that could never be loaded, so that its requests would wait for ever."""


class Residency:
    """Gives memory to the models that wait for it, the longest waiting first. Models for which only
    low-priority requests wait come last, and never take the place of a model that others are using.

    To make room, it unloads models in this order: those that only run low-priority requests; idle ones, the
    least recently used first; busy ones, the first loaded first. From an idle model it takes only the KV
    pages if those are enough.

    Models whose requests never pause take turns. A turn answers all that comes meanwhile, and is long beside
    a load, so most of the time is answers. An idle model's turn ends earlier (`MemoryShare.may_leave`).

    Every admitted model is eventually loaded, because each fits beside the pinned ones, which stay."""

    STAY_LOADS = 3.0  # a turn of a model that is never idle, in times of its load
    TICK_S = 0.1

    def __init__(self, budget: int):
        """budget: bytes for all models; 0 until it is known."""
        self.budget = budget
        self.shares: list[MemoryShare] = []
        self.changed = asyncio.Event()

    def room_beside_pinned(self, *shares: MemoryShare) -> int:
        """How many bytes the pinned models leave for these shares."""
        return self.budget - sum(other.size for other in self.shares if other.pinned and other not in shares)

    def admit(self, share: MemoryShare, more: int = 0):
        """Add a model, or allow a known one to grow by `more` bytes. Raises NoRoom if it, or another model
        beside it, could then never be loaded."""
        size = share.size + more
        room = self.room_beside_pinned(share)
        others = [other for other in self.shares if other is not share]
        largest = max((other for other in others if not other.pinned), key=lambda other: other.size,
                      default=None)
        together = f"all models together may take {shown_bytes(self.budget)} (--models-memory)"
        adapters = size - share.own_size
        takes = f"it needs {shown_bytes(size)}"
        if adapters:
            takes += f" with its adapters ({shown_bytes(adapters)})"
        if size > room == self.budget:
            raise NoRoom(f"{takes}, and {together}")
        if size > room and share.pinned:
            names = ", ".join(other.name for other in (*others, share) if other.pinned)
            raise NoRoom(f"the pinned models ({names}) need {shown_bytes(self.budget - room + size)}, and "
                         f"{together}")
        if size > room:
            raise NoRoom(f"{takes}, and the pinned models leave {shown_bytes(room)} of --models-memory")
        if share.pinned and largest and largest.size > room - size:
            raise NoRoom(f"{takes} and is pinned, which leaves {shown_bytes(room - size)} of "
                         f"--models-memory, and {largest.name} needs {shown_bytes(largest.size)}")
        if share not in self.shares:
            self.shares.append(share)
            self.changed.set()

    def share_of(self, pool: WorkerPool | None) -> MemoryShare | None:
        """The share of a pool; None if it was not admitted, or is removed."""
        return next((share for share in self.shares if share.pool is pool), None)

    def remove(self, pool: WorkerPool):
        """Its pool is closed, so its bytes are free."""
        self.shares = [share for share in self.shares if share.pool is not pool]
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
            share.leaving or share.emptying or share.waits or share.is_loading for share in self.shares)

    @property
    def used(self) -> int:
        return sum(share.held_bytes for share in self.shares)

    def settle(self, now: float):
        """Advance all transitions, and load what fits, in the order of waiting."""
        for share in self.shares:
            share.go_on()
            is_unused = share.taken and share.is_idle
            if share.idle_s and is_unused and share.pool.dispatcher.idle_s(now) > share.idle_s:
                share.leave()
            if not share.waits:
                share.waits_since_s = None
            elif share.waits_since_s is None:
                share.waits_since_s = now
        if self.used > self.budget:  # a loaded model was given adapters
            self._make_room(0, now)
        # Once the first share in line has to wait, the ones behind it only get what it will leave over.
        has_to_wait = False
        spare = math.inf
        line = [share for share in self.shares if share.waits]
        line.sort(key=lambda share: (share.waits_in_background, share.waits_since_s))
        for share in line:
            missing = share.missing
            if missing <= min(self.budget - self.used, spare):
                share.take()
                spare -= missing
            elif not has_to_wait:
                has_to_wait = True
                spare = self._make_room(missing, now, share)
                if missing <= self.budget - self.used:  # freed at once: the unloaded ones had no process
                    share.take()

    def _make_room(self, missing: int, now: float, share: MemoryShare | None = None) -> float:
        """Unload models other than `share`'s, if that frees enough bytes. Returns how many bytes others may
        take now: what will be left over, or infinity if unloading cannot free enough."""
        free = self.budget - self.used + sum(other.coming for other in self.shares)
        in_background = share is not None and share.waits_in_background
        others = [other for other in self.shares
                  if other is not share and other.may_leave(now, in_background)]
        others.sort(key=self._rank)
        spare = sum(other.spare for other in others)
        leave = list[MemoryShare]()
        for other in others:
            if free + spare < missing:
                leave.append(other)
                free += other.held_bytes
                spare -= other.spare
        if free + spare < missing:
            return math.inf
        for other in others:
            if other in leave:
                other.leave()
            elif free < missing and other.spare:
                free += other.spare
                other.empty_cache()
        return free - missing

    @staticmethod
    def _rank(share: MemoryShare) -> tuple[bool, bool, float]:
        """A sort key: who leaves first."""
        dispatcher = share.pool.dispatcher
        busy = dispatcher.busy
        return busy, not dispatcher.jobs, share.taken_s if dispatcher.jobs else dispatcher.use.last_s

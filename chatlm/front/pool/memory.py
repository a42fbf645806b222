"""When a model is in memory, where no other model wants it."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol, TYPE_CHECKING

from chatlm.common.log import log
from chatlm.front.pool.worker import WorkerState

if TYPE_CHECKING:
    from chatlm.front.pool.pool import WorkerPool


class Memory(Protocol):
    """Decides when a pool's model is in memory: `OwnMemory`, or the `MemoryShare` of one among several."""

    def start(self):
        """Its pool has started."""

    def note_jobs(self):
        """Called when jobs come and go."""

    def load(self):
        """Load the model as if a request waited for it."""

    def unload(self):
        """Unload the model once its running answers have ended; the next request loads it again."""

    def rename(self, name: str):
        """The model has another name."""

    @property
    def state(self) -> str:
        """unloaded, loading or ready."""
        ...

    @property
    def bytes(self) -> int:
        """Bytes in memory; if the model is not loaded, what it will need."""
        ...

    @property
    def is_listed(self) -> bool:
        """Can clients be told what the model is and does?"""
        ...


class OwnMemory:
    """All memory is the model's. It loads at the start, and again for the next job after it was unloaded."""

    LOOK_S = 1.0    # between two looks whether it is idle
    ENDED_S = 0.05  # between two looks whether its answers have ended

    def __init__(self, pool: WorkerPool):
        self.pool = pool

    def start(self):
        self.pool.supervisor.run("unloading the model when it is idle", self._watch)

    def note_jobs(self):
        if self.pool.dispatcher.jobs:
            self.pool.supervisor.load_for_request()

    def load(self):
        self.pool.supervisor.load_for_request()

    def unload(self):
        """Until the running answers have ended, its queue is held."""
        dispatcher = self.pool.dispatcher
        if not dispatcher.running:
            self._unload_now()
        elif not dispatcher.held:
            self.pool.supervisor.run("unloading the model", self._unload_after_answers)

    async def _unload_after_answers(self):
        self.pool.dispatcher.hold(True)
        while self.pool.dispatcher.running:
            await asyncio.sleep(self.ENDED_S)
        self._unload_now()

    def _unload_now(self):
        if self.pool.supervisor.prepared:
            self.pool.supervisor.unload()
        self.pool.dispatcher.hold(False)
        self.note_jobs()

    async def _watch(self):
        while True:
            await asyncio.sleep(self.LOOK_S)
            self.unload_when_idle()

    def unload_when_idle(self):
        """--idle-unload: end the workers after that long without a request. Polls of /health do not count."""
        supervisor = self.pool.supervisor
        idle_s = self.pool.settings.idle_unload
        usable = [worker for worker in self.pool.workers if worker.state is not WorkerState.LEFT_OUT]
        is_idle = idle_s and self.pool.dispatcher.idle_s(time.monotonic()) > idle_s
        if is_idle and usable and usable == supervisor.ready_workers:
            log.info("no request for %g s: the model is unloaded until the next one", idle_s)
            supervisor.unload()

    def rename(self, name: str):
        """Nothing here is called by it."""

    @property
    def state(self) -> str:
        if self.pool.supervisor.unloaded:
            return "unloaded"
        return "ready" if self.pool.ready else "loading"

    @property
    def bytes(self) -> int:
        return self.pool.supervisor.card.facts.weights_bytes

    @property
    def is_listed(self) -> bool:
        return self.pool.ready

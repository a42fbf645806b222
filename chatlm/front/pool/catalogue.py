"""What a server serves: models by name, and their life. Most servers have one model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence as Seq
from typing import TYPE_CHECKING

from chatlm.common.config import ModelChoice
from chatlm.front.aio import supervised
from chatlm.front.pool.models import Model, Registry

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.front.pool.models import Served
    from chatlm.front.pool.pool import WorkerPool


class Catalogue:
    """A catalogue of one model, whose pool answers for the server. `ManyModels` is the one of several."""

    def __init__(self, settings: Settings, pool: WorkerPool):
        self.settings, self.pool = settings, pool
        self.registry = Registry(Model(settings, pool, ModelChoice("", aliases=settings.served_model_name)))
        self.unloading: asyncio.Task | None = None
        self.draining = False

    def report_to(self, report: Callable[[str, float], None]):
        """How far start-up has come goes to `report` from now on: a stage and a fraction of it."""
        self.pool.on_progress = report

    @property
    def pools(self) -> list[WorkerPool]:
        return [self.pool]

    async def start(self):
        await self.pool.start()

    async def wait_ready(self):
        """Wait until a request would be served. Raises ConfigError or EngineFailure if start-up failed."""
        await self.pool.wait_ready()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the admitted ones; False if some still run after `timeout_s`."""
        self.draining = True
        return all(await asyncio.gather(*(pool.drain(timeout_s) for pool in self.pools)))

    async def close(self):
        await self.pool.close()

    # requests

    def find(self, name: str, bound: Seq[str] = ()) -> Served:
        """What a request of a key with these bounds names. RequestError 404 if there is nothing."""
        return self.registry.find(name, bound)

    def load(self, model: Model):
        """Load a model as if a request waited for it."""
        if not self.pool.dispatcher.wanted.is_set():
            self.pool.dispatcher.wake()

    def unload(self, model: Model):
        """Unload a model when the answers under way have ended; a request brings it back."""
        if self.unloading is None or self.unloading.done():
            self.unloading = asyncio.create_task(supervised("unloading the model", self._unload))

    async def _unload(self):
        dispatcher = self.pool.dispatcher
        dispatcher.held = True
        while dispatcher.running:
            await asyncio.sleep(0.05)
        if self.pool.supervisor.prepared:
            self.pool.supervisor.unload()
        dispatcher.held = False
        if len(dispatcher.pending):
            dispatcher.wake()

    def cancel(self, request_id: str) -> bool:
        return any([pool.cancel(request_id) for pool in self.pools])

    async def end_thinking(self, request_id: str) -> bool:
        return any([await pool.end_thinking(request_id) for pool in self.pools])

    # what the server shows

    def health(self) -> tuple[int, dict]:
        return self.pool.health()

    def stats(self, seen: Seq[Served]) -> dict:
        """Of the models that a client may see."""
        return self.pool.stats()

    def describe(self) -> list[str]:
        return self.pool.describe()

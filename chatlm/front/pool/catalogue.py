"""What a server serves: models by name. Most servers have one model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence as Seq
from typing import TYPE_CHECKING

from chatlm.common.config import ModelChoice
from chatlm.front.pool.models import Model, Registry

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.front.pool.models import Served
    from chatlm.front.pool.pool import WorkerPool


class Catalogue:
    """The catalogue of one model, whose pool speaks for the server. `ManyModels` is the one for several."""

    def __init__(self, settings: Settings, *pools: WorkerPool):
        self.settings, self.draining = settings, False
        self.on_progress: Callable[[str, float], None] = lambda stage, fraction: None  # stage, share
        self.registry = Registry(*(
            Model(settings, pool, ModelChoice("", aliases=settings.served_model_name)) for pool in pools))
        for self.pool in pools:
            self.pool.on_progress = lambda stage, fraction: self.on_progress(stage, fraction)

    @property
    def pools(self) -> list[WorkerPool]:
        return [model.pool for model in self.registry.models if model.pool]

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
        """The model or adapter that a request asks for, with a key limited to the models in `bound`.
        RequestError 404 if there is none."""
        return self.registry.find(name, bound)

    def cancel(self, request_id: str) -> bool:
        return any([pool.cancel(request_id) for pool in self.pools])

    async def end_thinking(self, request_id: str) -> bool:
        return any([await pool.end_thinking(request_id) for pool in self.pools])

    # what the server shows

    def health(self) -> tuple[int, dict]:
        return self.pool.health()

    def stats(self, seen: Seq[Served]) -> dict:
        """The counts of /stats, for the models that a client may see."""
        return self.pool.stats()

    def describe(self) -> list[str]:
        return self.pool.describe()

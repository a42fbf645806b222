"""The catalogue: the models that a server serves, by name. Most servers have one model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence as Seq
from pathlib import Path
from typing import Any, TYPE_CHECKING

from chatlm.common.config import ModelChoice
from chatlm.common.errors import RequestError
from chatlm.common.invocation import program_command
from chatlm.front.pool.models import Model, Registry

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.front.pool.models import Served
    from chatlm.front.pool.pool import WorkerPool


class Catalogue:
    """The catalogue of a server with one model, whose pool speaks for the server. `ManyModels` is the
    catalogue of several."""

    def __init__(self, settings: Settings, *pools: WorkerPool):
        self.settings = settings
        self.draining = False
        self.on_progress: Callable[[str, float], None] = lambda stage, fraction: None
        self.registry = Registry(*(
            Model(settings, pool, ModelChoice("", aliases=settings.served_model_name)) for pool in pools))
        for pool in pools:
            self.pool = pool
            pool.on_progress = lambda stage, fraction: self.on_progress(stage, fraction)

    @property
    def pools(self) -> list[WorkerPool]:
        return [model.pool for model in self.registry.models if model.pool]

    async def start(self):
        await self.pool.start()

    def get_ahead(self):
        """Called once the front has nothing else to do: begin what will be needed. Not earlier, because that
        would take a processor from the imports of front and worker."""
        self.pool.get_ahead()

    async def wait_ready(self):
        """Wait until a request would be served. Raises ConfigError or EngineFailure if start-up failed."""
        await self.pool.wait_ready()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the admitted ones. False if some still run after `timeout_s`."""
        self.draining = True
        return all(await asyncio.gather(*(pool.drain(timeout_s) for pool in self.pools)))

    async def close(self):
        await self.pool.close()

    # requests

    def find(self, name: str, bound: Seq[str] = ()) -> Served:
        """The model or adapter that a request asks for, with a key limited to the models in `bound`. Raises
        RequestError 404 if there is none."""
        return self.registry.find(name, bound)

    async def removed_steps(self, bound: Seq[str] = ()) -> list[dict[str, Any]]:
        """Checkpoints whose files are gone, as GET /v1/runs/ID lists them, with a key limited to `bound`."""
        return []

    def cancel(self, request_id: str) -> bool:
        return any([pool.cancel(request_id) for pool in self.pools])

    async def end_thinking(self, request_id: str) -> bool:
        return any([await pool.end_thinking(request_id) for pool in self.pools])

    # models of the hub that come and go while the server runs

    async def take_in(self, name: str, path: Path, aliases: Seq[str] = ()) -> str:
        """Serve a model that was downloaded. Returns "", or what the operator must do to have it served."""
        repository, _, file = name.partition(":")
        if self._of_hub(repository, file):
            return ""
        return f"this server has one model; to serve this one: {program_command()} {name}"

    def leave_out(self, repository: str, file: str):
        """Stop serving the models of a repository, or of one file in it, that was downloaded. Raises
        RequestError 409 for a model that the command line names, and for files that workers of another model
        read when they start."""
        models = self._of_hub(repository, file)
        if models:
            raise RequestError(f"the server was started with {models[0].name}: it can be deleted once it is "
                               "served no longer", status=409, code="model_in_use", param="model")
        self.check_unread(repository, file)

    def check_unread(self, repository: str, file: str, leaving: Seq[Model] = ()):
        """Raise RequestError 409 if a model also reads these files: to draft, to see, or as an adapter.
        Models that are `leaving` do not count."""
        from chatlm.common.hub.offers import is_of_hub  # here, because few servers need it
        for model in self.registry.models:
            if model.pool and model not in leaving and any(
                    is_of_hub(path, repository, file) for path in model.pool.other_files):
                raise RequestError(f"{model.name} is served with files of it: it can be deleted once that is "
                                   "served no longer", status=409, code="model_in_use", param="model")

    def served_of_hub(self, repository: str, file: str) -> str:
        """The name of the served model that comes from a repository, or from this file in it; "" if there is
        none."""
        return next((model.name for model in self._of_hub(repository, file) if model.pool), "")

    def _of_hub(self, repository: str, file: str) -> list[Model]:
        """The models whose files are of a repository in the hub's cache."""
        from chatlm.common.hub.offers import is_of_hub
        models = []
        for model in self.registry.models:
            source = model.source or (model.pool and model.pool.source)
            if source and is_of_hub(source.path, repository, file):
                models.append(model)
        return models

    # what the server shows

    def health(self) -> tuple[int, dict]:
        return self.pool.health()

    def stats(self, seen: Seq[Served]) -> dict:
        """The counts of /stats, for the models that a client may see."""
        return self.pool.stats()

    def describe(self) -> list[str]:
        return self.pool.describe()

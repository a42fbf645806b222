"""The catalogue: the models that a server serves, by name. Most servers have one model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence as Seq
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TYPE_CHECKING

from chatlm.common.config import ModelEntry
from chatlm.common.errors import RequestError
from chatlm.common.hub.offers import is_of_hub
from chatlm.common.invocation import program_command
from chatlm.front.pool.models import Registry, ServedModel
from chatlm.front.pool.names import default_among

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.front.pool.models import ModelOrAdapter
    from chatlm.front.pool.pool import WorkerPool


# those of /stats that count something in each model
SUMMED = "total_workers", "available_workers", "busy_workers", "queue_depth", "delayed_answers"


class OpeningProgress(NamedTuple):
    """Why a catalogue serves nothing yet: the word for it in /health, and what is done now."""

    status: str
    stage: str
    fraction: float

    @property
    def loading(self) -> dict:
        return {"stage": self.stage, "fraction": round(self.fraction, 3)}


class Source(Protocol):
    """Where a catalogue's models come from: `GivenModels`, or `ManyModels` where some come and go."""

    async def start(self):
        """Begin to make the models ready."""

    async def wait_ready(self):
        """Wait until a request would be served. Raises ConfigError or EngineFailure if start-up failed."""

    async def close(self):
        """Bring no further models. The catalogue closes the pools afterwards."""

    @property
    def opening(self) -> OpeningProgress | None:
        """Why nothing is served yet; None once requests are served, or could be."""
        ...

    @property
    def budget(self) -> int:
        """The bytes that all models together may take; 0: nobody has set a limit."""
        ...

    def explain_missing(self, name: str, bound: Seq[str]):
        """There is no model of this name for a key limited to `bound`. Raises Overloaded if there may be one
        later."""

    def note_wanted(self, model: ServedModel):
        """A request asks for this model, which may have failed."""

    async def take_in(self, name: str, path: Path, aliases: Seq[str] = ()) -> str:
        """Serve a model that was downloaded. Returns "", or what the operator must do to have it served."""
        ...

    def leave_out(self, repository: str, file: str):
        """Stop serving the models of a repository, or of one file in it, that was downloaded. Raises
        RequestError 409 for a model that the command line names, and for files that workers of another model
        read when they start."""

    async def removed_steps(self, bound: Seq[str] = ()) -> list[dict[str, Any]]:
        """Checkpoints whose files are gone, as GET /v1/runs/ID lists them, with a key limited to `bound`."""
        ...

    def stats(self, by_model: Mapping[ServedModel, dict]) -> dict:
        """What /stats has beside the counts of the models, which are by_model."""
        ...

    def describe(self) -> list[str]:
        """Lines for the start-up log."""
        ...


class GivenModels:
    """The models that a server was started with are all that it serves. They load at the start."""

    def __init__(self, catalogue: Catalogue):
        self.catalogue = catalogue

    async def start(self):
        for pool in self.catalogue.pools:
            await pool.start()

    async def wait_ready(self):
        for pool in self.catalogue.pools:
            await pool.wait_ready()

    async def close(self):
        """It brings none."""

    @property
    def opening(self) -> OpeningProgress | None:
        for pool in self.catalogue.pools:
            loading = pool.health()[1].get("loading")
            if loading:
                return OpeningProgress("loading", loading["stage"], loading["fraction"])
        return None

    @property
    def budget(self) -> int:
        return 0

    def explain_missing(self, name: str, bound: Seq[str]):
        """There will be no other models."""

    def note_wanted(self, model: ServedModel):
        """Its pool loads it for its jobs."""

    async def take_in(self, name: str, path: Path, aliases: Seq[str] = ()) -> str:
        repository, _, file = name.partition(":")
        if self.catalogue.models_of_hub(repository, file):
            return ""
        return f"this server has one model; to serve this one: {program_command()} {name}"

    def leave_out(self, repository: str, file: str):
        self.catalogue.check_unused(repository, file)
        self.catalogue.check_unread(repository, file)

    async def removed_steps(self, bound: Seq[str] = ()) -> list[dict[str, Any]]:
        return []

    def stats(self, by_model: Mapping[ServedModel, dict]) -> dict:
        return {}

    def describe(self) -> list[str]:
        return [line for pool in self.catalogue.pools for line in pool.describe()]


class Catalogue:
    """The models of a server, with what it can be asked about all of them. It has the same code for one model
    as for many: its source brings them."""

    def __init__(self, settings: Settings, *pools: WorkerPool,
                 source: Callable[[Catalogue], Source] = GivenModels):
        """pools: of the models that are known now."""
        self.settings = settings
        self.draining = False
        self.started_s = time.monotonic()
        self.on_progress: Callable[[str, float], None] = lambda stage, fraction: None
        entry = ModelEntry("", aliases=settings.served_model_name)
        self.registry = Registry(*(ServedModel(settings, pool, entry) for pool in pools))
        self.leaving: list[WorkerPool] = []  # of models that requests can no longer find
        for pool in pools:
            pool.on_progress = lambda stage, fraction: self.on_progress(stage, fraction)
        self.source = source(self)

    @property
    def pools(self) -> list[WorkerPool]:
        return [*(model.pool for model in self.registry.models if model.pool), *self.leaving]

    async def start(self):
        await self.source.start()

    def get_ahead(self):
        """Called once the front has nothing else to do: begin what will be needed. Not earlier, because that
        would take a processor from the imports of front and worker."""
        for pool in self.pools:
            pool.get_ahead()

    async def wait_ready(self):
        """Wait until a request would be served. Raises ConfigError or EngineFailure if start-up failed."""
        await self.source.wait_ready()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the admitted ones. False if some still run after `timeout_s`."""
        self.draining = True
        return all(await asyncio.gather(*(pool.drain(timeout_s) for pool in self.pools)))

    async def close(self):
        self.draining = True
        await self.source.close()
        await asyncio.gather(*(pool.close() for pool in self.pools))

    # requests

    def find(self, name: str, bound: Seq[str] = ()) -> ModelOrAdapter:
        """The model or adapter that a request asks for, with a key limited to the models in `bound`. Raises
        RequestError 404 if there is none."""
        try:
            served = self.registry.find(name, bound)
        except RequestError:
            self.source.explain_missing(name, bound)
            raise
        self.source.note_wanted(served.model)
        return served

    def cancel(self, request_id: str) -> bool:
        return any([pool.cancel(request_id) for pool in self.pools])

    async def end_thinking(self, request_id: str) -> bool:
        return any([await pool.end_thinking(request_id) for pool in self.pools])

    # models of the hub

    def check_unused(self, repository: str, file: str):
        """Raise RequestError 409 if a model of this repository, or of this file in it, is served."""
        models = self.models_of_hub(repository, file)
        if models:
            raise RequestError(f"the server was started with {models[0].name}: it can be deleted once it is "
                               "served no longer", status=409, code="model_in_use", param="model")

    def check_unread(self, repository: str, file: str, leaving: Seq[ServedModel] = ()):
        """Raise RequestError 409 if a model also reads these files: to draft, to see, or as an adapter.
        Models that are `leaving` do not count."""
        for model in self.registry.models:
            if model.pool and model not in leaving and any(
                    is_of_hub(path, repository, file) for path in model.pool.other_files):
                raise RequestError(f"{model.name} is served with files of it: it can be deleted once that is "
                                   "served no longer", status=409, code="model_in_use", param="model")

    def served_of_hub(self, repository: str, file: str) -> str:
        """The name of the served model that comes from a repository, or from this file in it; "" if there is
        none."""
        return next((model.name for model in self.models_of_hub(repository, file) if model.pool), "")

    def models_of_hub(self, repository: str, file: str) -> list[ServedModel]:
        """The models whose files are of a repository in the hub's cache."""
        models = []
        for model in self.registry.models:
            source = model.source or (model.pool and model.pool.source)
            if source and is_of_hub(source.path, repository, file):
                models.append(model)
        return models

    # what the server shows

    def health(self) -> tuple[int, dict]:
        """(HTTP status, body) of /health. It is ready if a request would be admitted, whether or not its
        model is loaded."""
        bodies = [pool.health()[1] for pool in self.pools]
        opening = self.source.opening
        ready = not opening and not self.draining and any(body["ready"] for body in bodies)
        if ready:
            status = "ok"
        elif self.draining:
            status = "draining"
        else:
            status = opening.status if opening else "unavailable"
        body: dict = {"status": status, "ready": ready,
                      **{key: sum(one[key] for one in bodies) for key in ("num_gpus", "available_workers")}}
        if opening and not self.draining:
            body["loading"] = opening.loading
        looping = [loop for one in bodies for loop in one.get("crash_loops", ())]
        if looping:
            body["crash_loops"] = looping
            body["status"] = "degraded" if ready else status
        return 200 if ready else 503, body

    def stats(self, seen: Seq[ModelOrAdapter]) -> dict:
        """The counts of /stats, for the models that a client may see: sums where there can be any, else those
        of the default model."""
        models = dict.fromkeys(one.model for one in seen)
        by_model = {model: model.pool.stats() for model in models if model.pool}
        default = default_among(seen)
        own = by_model.get(default.model, {}) if default else {}
        sums = {key: sum(stats[key] for stats in by_model.values()) for key in SUMMED}
        return {**own, **sums, "model": default.name if default else "",
                "workers": [worker for stats in by_model.values() for worker in stats["workers"]],
                "uptime_s": round(time.monotonic() - self.started_s, 1), **self.source.stats(by_model)}

    def describe(self) -> list[str]:
        return self.source.describe()

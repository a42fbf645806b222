"""Many models behind one URL."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence as Seq
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import ChatServerError, ConfigError, EngineFailure, Overloaded
from chatlm.common.hub.adapters import named_adapters
from chatlm.common.hub.stamps import Changed
from chatlm.common.log import log
from chatlm.common.processes.start import PROCESS_COMMAND
from chatlm.front.aio import supervised
from chatlm.front.pool.catalogue import Catalogue
from chatlm.front.pool.folder_watch import FolderWatch, made_for
from chatlm.front.pool.models import Registry, of_model
from chatlm.front.pool.names import default_among
from chatlm.front.pool.opening import Opener
from chatlm.front.pool.residency import NoRoom, Residency, shown_bytes
from chatlm.front.pool.watch import RunWatch

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.front.pool.models import Model, Served
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.pool.residency import Place


class ManyModels(Catalogue):
    """Many models behind one URL. The headers of their files say before the first
    request what each is and takes (`Survey`), so requests are read and queued whether or not their model is
    loaded; `Residency` has the models that are asked for take turns in memory. Each has its own pool,
    tokenizer, template and prefix cache; the queue's limits, the turns of clients and the sandboxes are
    shared."""

    RETRY_S = 30.0   # a model whose worker could not start is tried again after this, when it is asked for

    def __init__(self, settings: Settings, command: Seq[str] = PROCESS_COMMAND):
        if settings.ray_address:
            raise ConfigError("several models with --ray-address: a Ray cluster serves one model")
        if settings.served_model_name:
            raise ConfigError("--served-model-name names one model; of several, each has its own: "
                              "`aliases` in [[models]]")
        self.settings, self.registry = settings, Registry()
        self.residency = Residency(0)
        self.opener = Opener(settings, command, self.residency)
        self.report: Callable[[str, float], None] = lambda stage, fraction: None
        self.became_ready, self.failure = asyncio.Event(), None
        self.stage = ("finding the models", 0.0)
        self.draining = self.closing = False
        self.leaving: list[WorkerPool] = []  # of models that no request can find any more
        self.started_s = time.monotonic()
        self.tasks: set[asyncio.Task] = set()

    def run(self, what: str, work: Callable[[], Any]):
        """Run work in the background: again if it fails, unless that ends start-up."""
        def failed(error: Exception) -> bool:
            if not self.became_ready.is_set():
                known = isinstance(error, ChatServerError)
                self.failure = error if known else EngineFailure(f"{what} failed: {error}")
                self.became_ready.set()
                return False
            return not self.closing

        self.tasks.add(task := asyncio.create_task(supervised(what, work, failed)))
        task.add_done_callback(self.tasks.discard)

    def report_to(self, report: Callable[[str, float], None]):
        self.report = report

    async def start(self):
        self.opener.prefixes.start(lambda: any(pool.dispatcher.jobs for pool in self.pools))
        self.run("finding the models", self._open_all)

    async def wait_ready(self):
        """Wait until requests would be served. Raises ConfigError or EngineFailure if start-up failed."""
        await self.became_ready.wait()
        if self.failure:
            raise self.failure

    async def _open_all(self):
        loop = asyncio.get_running_loop()

        def report(stage: str, fraction: float):
            self.stage = (stage, fraction)
            loop.call_soon_threadsafe(self.report, stage, fraction)

        await self.opener.desk.sandboxes["templates"].start()
        for choice in self.settings.several:
            self.registry.add(await asyncio.to_thread(self.opener.resolve, choice, report))
        watch = FolderWatch(self) if self.settings.models is not None else None
        if watch:
            await watch.begin()
        if watch and not (self.registry.models or self.settings.watch):
            raise ConfigError(f"--models {self.settings.models}: there is no GGUF file, Hugging Face folder "
                              "or nanochat checkpoint below it")
        give_adapters(self.settings.adapter, self.registry.models)
        pinned_first = sorted(self.registry.models, key=lambda model: not model.choice.pin)
        for index, model in enumerate(pinned_first):
            report(f"reading what the files of {model.name} say", index / len(pinned_first))
            error = await self.opener.open(model)
            if model.choice.pin and isinstance(error, NoRoom):
                raise error
        await self.opener.survey.close()
        check_served(self.registry.models)
        if watch:
            watch.name_models()
        for model in self.registry.models:
            self.serve(model)
        self.run("giving models their turns", self.residency.run)
        if watch:
            for _ in range(2):  # files that stand still are taken at the second look
                await watch.share_adapters()
            self.run("watching --models", watch.run)
        if self.settings.watch is not None:
            runs = RunWatch(self)
            await runs.begin()
            self.run("watching --watch", runs.run)
            self.run("scoring checkpoints", runs.scores.run)
        self.became_ready.set()

    def serve(self, model: Model):
        """An opened model's requests are taken from now on."""
        if model.pool and model.place:
            pool = model.pool
            pool.adapters.taken = partial(names_beside, model, self.registry.models)
            pool.adapters.refuse_names()
            pool.dispatcher.wake = pool.dispatcher.changed = self.residency.changed.set
            pool.supervisor.gave_up = lambda: self.fail(model, pool.supervisor.failure)
            pool.draining = self.draining
            self.run(f"starting the pool of {model.name}", pool.start)

    def fail(self, model: Model, error: ChatServerError | None):
        """A worker could not start: the requests of its model fail, and others get the place."""
        pool, place = model.pool, model.place
        if pool is None or self.closing:
            return
        changed = isinstance(error, Changed) and not model.run  # the next request has its new files
        model.reason, model.pool, model.place = str(error), None, None
        model.failed_s = -math.inf if changed else time.monotonic()
        if changed:
            log.info("the files of the model %s have changed: it is read again when it is asked", model.name)
            failure = Overloaded(f"the files of the model {model.name!r} have changed", retry_after_s=1)
        else:
            log.error("the model %s cannot be served: %s", model.name, model.reason)
            failure = EngineFailure(f"the model {model.name!r} cannot be served: {model.public_reason}")
        pool.dispatcher.fail(failure, *pool.dispatcher.jobs.values())
        self.run(f"ending the workers of {model.name}", partial(self.remove, pool, place))

    async def remove(self, pool: WorkerPool, place: Place | None):
        await self.opener.close_pool(pool)
        if place in self.residency.places:
            self.residency.places.remove(place)
        self.residency.changed.set()

    async def close(self):
        self.draining = self.closing = True
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.gather(*(pool.close() for pool in self.pools), self.opener.survey.close(),
                             self.opener.desk.close())
        await self.opener.prefixes.close()

    @property
    def pools(self) -> list[WorkerPool]:
        return [*(model.pool for model in self.registry.models if model.pool), *self.leaving]

    # requests

    def find(self, name: str, bound: Seq[str] = ()) -> Served:
        if is_waiting(self.settings, self.registry):
            raise Overloaded("the watched training run has written no complete checkpoint yet",
                             retry_after_s=5)
        served = self.registry.find(name, bound)
        model = served.model
        failed = not model.pool and model.reason and model.source
        if failed and time.monotonic() - model.failed_s > self.RETRY_S:
            model.failed_s = math.inf  # until it has failed again
            self.run(f"trying {model.name} again", partial(self._try_again, model))
        return served

    async def _try_again(self, model: Model):
        before, error = model.reason, await self.opener.open(model)
        if error and str(error) != before:
            log.error("the model %s cannot be served: %s", model.name, error)
        if model in self.registry.models:
            self.serve(model)
        elif model.pool:  # its files have changed again meanwhile
            await self.remove(model.pool, model.place)
        await self.opener.survey.close()

    def load(self, model: Model):
        """Have a model loaded as if a request waited for it."""
        if model.place:
            model.place.asked = not model.place.serves
            self.residency.changed.set()

    def unload(self, model: Model):
        """Have a model leave memory when its answers have ended; a request brings it back."""
        if model.place:
            model.place.asked = False
            model.place.leave()
            self.residency.changed.set()

    # what the server shows

    def health(self) -> tuple[int, dict]:
        """Ready when a request would be admitted, whether or not its model is loaded."""
        started = self.became_ready.is_set() and not self.failure
        ready = started and not self.draining and any(pool.ready for pool in self.pools)
        status = ("ok" if ready else "draining" if self.draining else
                  "loading" if not started else "waiting" if is_waiting(self.settings, self.registry)
                  else "unavailable")
        bodies = [pool.health()[1] for pool in self.pools]
        body: dict = {"status": status, "ready": ready,
                      **{key: sum(one[key] for one in bodies) for key in ("num_gpus", "available_workers")}}
        if status == "loading":
            body["loading"] = {"stage": self.stage[0], "fraction": round(self.stage[1], 3)}
        elif status == "waiting":  # only the folder's name: /health needs no key
            body["loading"] = {"stage": "waiting for the first checkpoint in "
                                        f"{Path(self.settings.watch or '').absolute().name}", "fraction": 0.0}
        if looping := [loop for one in bodies for loop in one.get("crash_loops", ())]:
            body["crash_loops"], body["status"] = looping, "degraded" if ready else status
        return 200 if ready else 503, body

    def stats(self, seen: Seq[Served]) -> dict:
        """As for one model, with sums; what only one model has is the default one's."""
        models = [*dict.fromkeys(one.model for one in seen)]
        stats = [model.pool.stats() for model in models if model.pool]
        sums = {key: sum(one[key] for one in stats) for key in (
            "total_workers", "available_workers", "busy_workers", "queue_depth", "delayed_answers")}
        default = default_among(seen)
        own = default.model.pool.stats() if default and default.model.pool else {}
        return {**own, **sums, "model": default.name if default else "",
                "workers": [worker for one in stats for worker in one["workers"]],
                "uptime_s": round(time.monotonic() - self.started_s, 1),
                "prefixes": self.opener.prefixes.stats(),
                "models_memory": self.residency.budget, "models_bytes": self.residency.used,
                "bits_per_byte": {model.name: model.score.bits_per_byte for model in models if model.score}}

    def describe(self) -> list[str]:
        models = self.registry.models
        default, states = default_among(self.registry.listed()), Counter(model.state for model in models)
        default = default and default.model
        failed = f", {states['failed']} of them failed" if states["failed"] else ""
        beside = " beside the prefixes" if self.opener.prefixes.bytes else ""
        lines = [f"{len(models)} models{failed}; those that are loaded may take "
                 f"{shown_bytes(self.residency.budget)}{beside} (--models-memory)"]
        for model in models:
            words = [f"{shown_bytes(model.bytes)}, context {model.pool.context_length:,}" if model.pool else
                     "cannot be served, as said above", *["default"] * (model is default),
                     *["pinned"] * model.choice.pin]
            lines.append(f"  {model.name}: {', '.join(words)}")
        if prefixes := self.opener.prefixes.line:
            lines.append(prefixes)
        return lines


def is_waiting(settings: Settings, registry: Registry) -> bool:
    """Has the run below --watch written no checkpoint yet?"""
    return settings.watch is not None and not registry.models


def names_beside(model: Model, models: Seq[Model]) -> list[str]:
    """What other models, and adapters of others, are called, and the model itself."""
    others = [served for other in models if other is not model for served in of_model(other)]
    return [*model.accepted_names, *(name for served in others for name in served.names)]


def give_adapters(words: Seq[str], models: Seq[Model]):
    """Give each adapter that --adapter names to the model that it was made for. ConfigError if that is none
    of them, or one of several."""
    named, folders = named_adapters(words)
    if folders:
        raise ConfigError(f"--adapter {folders[0]}: of several models, it needs a name and a base: put "
                          "adapter = {NAME = \"FOLDER\"} into the base's table of [[models]], or serve a "
                          "folder of both with --models")
    for files in named:
        bases = made_for(files.path, models)
        if len(bases) != 1:
            which = "several" if bases else "none"
            raise ConfigError(f"--adapter {files.name}={files.path}: base_model_name_or_path in its "
                              f"adapter_config.json names {which} of the models; put adapter = {{NAME = "
                              "\"FOLDER\"}} into the table of its base in [[models]]")
        settings = bases[0].settings
        word = f"{files.name}={files.path}"
        bases[0].settings = replace(settings, adapter=(*settings.adapter, word))


def check_served(models: Seq[Model]):
    """Say which models cannot be served. ConfigError if none of them can."""
    for model in models:
        if model.reason:  # a line for each, as lines of one kind in a second are counted
            log.error(f"the model {model.name} cannot be served: {model.reason}")
    if models and not any(model.pool for model in models):
        first = models[0]
        raise ConfigError(f"none of {len(models)} models can be served; {first.name}: {first.reason}"
                          if len(models) > 1 else first.reason)

"""Brings several models into a catalogue: they are found, opened, loaded in turns, and may come and go."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence as Seq
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TYPE_CHECKING

from chatlm.common.config import ModelEntry
from chatlm.common.errors import ChatServerError, ConfigError, EngineFailure, Overloaded, shown
from chatlm.common.hub.adapter_folders import named_adapters
from chatlm.common.hub.stamps import Changed
from chatlm.common.log import log
from chatlm.common.processes.start import PROCESS_COMMAND
from chatlm.common.sizes import shown_bytes
from chatlm.front.aio import end_tasks, supervised
from chatlm.front.pool.catalogue import Catalogue, OpeningProgress
from chatlm.front.pool.folder_watch import FolderWatch, matching_bases
from chatlm.front.pool.names import DEFAULT_NAMES, default_among, is_among
from chatlm.front.pool.opener import Opener
from chatlm.front.pool.residency import NoRoom, Residency
from chatlm.front.pool.run_watch import RunWatch

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.hub.run_checkpoints import CheckpointFiles
    from chatlm.front.pool.models import ServedModel
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.pool.run_watch import CheckpointWork

    EvaluatorMaker = Callable[["ManyModels", Mapping[CheckpointFiles, ServedModel]], CheckpointWork]


LEAVING_S = 3.0  # a dismissed model's pool is kept this long for requests that have just found the model


def many_models(settings: Settings, command: Seq[str] = PROCESS_COMMAND,
                make_evaluator: EvaluatorMaker | None = None) -> Catalogue:
    """The catalogue of a server with several models. make_evaluator: see ManyModels."""
    return Catalogue(settings, source=lambda catalogue: ManyModels(catalogue, command, make_evaluator))


class ManyModels:
    """Where the models of a server with several come from.

    `Survey` reads the headers of their files before the first request. So requests are read and queued
    whether or not their model is loaded. `Residency` loads and unloads models as requests ask for them. Each
    model has its own pool, tokenizer, template and prefix cache. All share the sandboxes, the limits of the
    queue, and the order in which clients are served."""

    COMING_S = 5    # Retry-After for a model whose files are being written
    RETRY_S = 30.0  # a model that failed longer ago than this is tried again for the next request

    def __init__(self, catalogue: Catalogue, command: Seq[str] = PROCESS_COMMAND,
                 make_evaluator: EvaluatorMaker | None = None):
        """make_evaluator: makes what evaluates the checkpoints of --watch, from the served models by
        checkpoint.
        It is needed with --watch."""
        settings = catalogue.settings
        if settings.ray_address:
            raise ConfigError("several models with --ray-address: a Ray cluster serves one model")
        if settings.served_model_name:
            raise ConfigError("--served-model-name names a single model; with several, use `aliases` in "
                              "[[models]]")
        self.catalogue = catalogue
        self.settings = settings
        self.registry = catalogue.registry
        self.make_evaluator = make_evaluator
        self.residency = Residency(0)
        self.became_ready = asyncio.Event()
        self.failure = None
        self.opener = Opener(settings, command, self.residency, self.became_ready.is_set)
        self.stage = ("finding the models", 0.0)
        self.closing = False
        self.taken_in: set[ServedModel] = set()    # models that were downloaded for a client
        self.taking = asyncio.Lock()
        self.watches: list[FolderWatch | RunWatch] = []  # of --models and --watch
        self.tasks: set[asyncio.Task] = set()

    def run(self, what: str, work: Callable[[], Any]):
        """Run work in the background, again if it fails. A failure during start-up ends the server."""
        def failed(error: Exception) -> bool:
            if not self.became_ready.is_set():
                known = isinstance(error, ChatServerError)
                self.failure = error if known else EngineFailure(f"{what} failed: {error}")
                self.became_ready.set()
                return False
            return not self.closing

        task = asyncio.create_task(supervised(what, work, failed))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def start(self):
        self.opener.shared.start()
        self.run("finding the models", self._open_all)

    async def wait_ready(self):
        await self.became_ready.wait()
        if self.failure:
            raise self.failure

    async def _open_all(self):
        loop = asyncio.get_running_loop()

        def report(stage: str, fraction: float):
            self.stage = (stage, fraction)
            loop.call_soon_threadsafe(self.catalogue.on_progress, stage, fraction)

        await self.opener.shared.admission.sandboxes["templates"].start()
        for entry in self.settings.several:
            self.registry.add(await self.opener.resolve(entry, report))
        watch = FolderWatch(self) if self.settings.models is not None else None
        if watch:
            self.watches.append(watch)
            await watch.begin()
        if watch and not (self.registry.models or self.settings.watch):
            raise ConfigError(f"--models {self.settings.models} contains no GGUF file, Hugging Face folder "
                              "or nanochat checkpoint")
        give_adapters(self.settings.adapter, self.registry.models)
        pinned_first = sorted(self.registry.models, key=lambda model: not model.entry.pin)
        for index, model in enumerate(pinned_first):
            report(f"reading the headers of {model.name}", index / len(pinned_first))
            error = await self.opener.open(model)
            if model.entry.pin and isinstance(error, NoRoom):
                raise error
        await self.opener.survey.close()
        check_served(self.registry.models)
        if watch:
            watch.name_models()
            await watch.prefer()
        for model in self.registry.models:
            self.serve(model)
        self.run("scheduling models", self.residency.run)
        if watch:
            for _ in range(2):  # the second scan accepts files that have not changed since the first
                await watch.share_adapters()
            self.run("watching --models", watch.run)
        if self.settings.watch is not None:
            assert self.make_evaluator, "--watch needs make_evaluator"
            runs = RunWatch(self, self.make_evaluator)
            self.watches.append(runs)
            await runs.begin()
            self.run("watching --watch", runs.run)
            self.run("scoring checkpoints", runs.work.run)
        self.became_ready.set()

    def serve(self, model: ServedModel):
        """Accept requests for a model that has been opened."""
        if model.pool:
            pool = model.pool
            pool.join(names_in_use=partial(names_beside, model, self.registry.models),
                      gave_up=partial(self.fail, model), draining=self.catalogue.draining)
            self.run(f"starting the pool of {model.name}", pool.start)

    def fail(self, model: ServedModel, error: ChatServerError | None):
        """A worker of the model could not start: end its requests with an error, and free its memory."""
        pool = model.pool
        if pool is None or self.closing:
            return
        changed = isinstance(error, Changed)
        model.reason = str(error)
        model.pool = None
        model.failed_s = -math.inf if changed else time.monotonic()
        if changed and model.run:
            model.reason = ""  # RunWatch reads the files once they no longer change
            failure = Overloaded(f"the files of the model {model.name!r} have changed",
                                 retry_after_s=self.COMING_S)
        elif changed:
            log.info("the files of the model %s have changed; the next request reads them again", model.name)
            failure = Overloaded(f"the files of the model {model.name!r} have changed", retry_after_s=1)
        else:
            log.error("the model %s cannot be served: %s", model.name, model.reason)
            failure = EngineFailure(f"the model {model.name!r} cannot be served: {model.public_reason}")
        pool.dispatcher.end(failure)
        self.run(f"ending the workers of {model.name}", partial(self.remove, pool))

    async def remove(self, pool: WorkerPool):
        await pool.close()
        self.residency.remove(pool)

    # models that come and go while the server runs

    async def take_in(self, name: str, path: Path, aliases: Seq[str] = ()) -> str:
        await self.wait_ready()
        async with self.taking:
            if self.closing:
                return "the server is shutting down"
            for model in [*self.registry.models]:
                if model.pool and model.source and model.source.path in (path, path.resolve()):
                    more = [each for each in (name, *aliases) if not model.fits(each)]
                    model.rename(model.name, (*model.entry.aliases, *more))
                    return ""
                if model in self.taken_in and model.name == name:  # an older revision, or one that failed
                    self.taken_in.remove(model)
                    self.dismiss(model)
            entry = self.registry.renamed(ModelEntry(str(path), name, aliases=tuple(aliases)))
            if entry.name != name:
                return f"another model has the name {name}"
            model = await self.opener.resolve(entry)
            await self.opener.open(model)
            await self.opener.survey.close()
            if model.pool is None:
                return f"it cannot be served: {model.reason}"
            self.registry.add(model)
            self.taken_in.add(model)
            self.serve(model)
            return ""

    def leave_out(self, repository: str, file: str):
        models = self.catalogue.models_of_hub(repository, file)
        if not self.taken_in.issuperset(models):
            self.catalogue.check_unused(repository, file)
        self.catalogue.check_unread(repository, file, leaving=models)
        for model in models:
            self.taken_in.remove(model)
            self.dismiss(model)

    def dismiss(self, model: ServedModel, wait_s: float = LEAVING_S):
        """Stop accepting requests for a model. Those that it has may end."""
        self.registry.models.remove(model)
        if model.pool:
            self.catalogue.leaving.append(model.pool)
            self.run(f"ending {model.name}", partial(self._end, model, model.pool, wait_s))

    async def _end(self, model: ServedModel, pool: WorkerPool, wait_s: float):
        """Close the pool of a model that requests can no longer find, once its answers have ended."""
        await asyncio.sleep(wait_s)  # requests that have just found it are still being read
        while pool.dispatcher.is_needed:
            if not pool.supervisor.ready_workers:  # and no worker can start, since the files have changed
                pool.dispatcher.end(Overloaded(
                    f"the files of the model {model.name!r} have changed, and the old ones are not in memory",
                    retry_after_s=self.COMING_S))
            await asyncio.sleep(0.1)
        self.catalogue.leaving.remove(pool)
        if model.pool:
            await self.remove(pool)

    async def close(self):
        self.closing = True
        await end_tasks(self.tasks)
        await self.opener.close()

    @property
    def opening(self) -> OpeningProgress | None:
        if self.failure or not self.became_ready.is_set():
            return OpeningProgress("loading", *self.stage)
        if not self._is_waiting:
            return None
        folder = Path(self.settings.watch or "").absolute().name  # no more: /health needs no key
        return OpeningProgress("waiting", f"waiting for the first checkpoint in {folder}", 0.0)

    @property
    def budget(self) -> int:
        return self.residency.budget

    @property
    def _is_waiting(self) -> bool:
        """Is there nothing to serve until the watched run writes its first checkpoint?"""
        return self.settings.watch is not None and not self.registry.models

    # requests

    def explain_missing(self, name: str, bound: Seq[str]):
        if self._is_waiting:
            raise Overloaded("the watched training run has written no complete checkpoint yet",
                             retry_after_s=5) from None
        may_use = not bound or any(is_among(name, [one]) for one in bound)
        if not self.became_ready.is_set() and (may_use or name in DEFAULT_NAMES):
            raise Overloaded(f"the server is still finding its models ({self.stage[0]})",
                             retry_after_s=2) from None
        if may_use and any(watch.is_coming(name) for watch in self.watches):
            raise Overloaded(f"the files of the model {shown(name)} are being written or read",
                             retry_after_s=self.COMING_S) from None

    def note_wanted(self, model: ServedModel):
        failed = not model.pool and model.reason and model.source
        if failed and time.monotonic() - model.failed_s > self.RETRY_S:
            model.failed_s = math.inf  # until it fails again
            self.run(f"trying {model.name} again", partial(self._try_again, model))

    async def removed_steps(self, bound: Seq[str] = ()) -> list[dict[str, Any]]:
        runs = [watch for watch in self.watches if isinstance(watch, RunWatch)]
        steps = [step for watch in runs for step in await watch.removed_steps()]
        if not bound:
            return steps
        return await asyncio.to_thread(lambda: [
            step for step in steps if any(is_among(name, [step["model"]]) for name in bound)])

    async def _try_again(self, model: ServedModel):
        before = model.reason
        error = await self.opener.open(model)
        if error and str(error) != before:
            log.error("the model %s cannot be served: %s", model.name, error)
        if model in self.registry.models:
            self.serve(model)
        elif model.pool:  # its files changed again meanwhile
            await self.remove(model.pool)
        await self.opener.survey.close()

    # what the server shows

    def stats(self, by_model: Mapping[ServedModel, dict]) -> dict:
        return {"workers": [{**worker, "model": model.name} for model, stats in by_model.items()
                            for worker in stats["workers"]],
                "prefixes": self.opener.prefixes.stats(),
                "models_memory": self.residency.budget, "models_bytes": self.residency.used,
                "bits_per_byte": {model.name: model.bits_per_byte for model in by_model
                                  if model.bits_per_byte is not None}}

    def describe(self) -> list[str]:
        models = self.registry.models
        default = default_among(self.registry.served_models())
        states = Counter(model.state for model in models)
        default = default and default.model
        failed = f", {states['failed']} of them failed" if states["failed"] else ""
        beside = " in addition to the prefixes" if self.opener.prefixes.bytes else ""
        count = "1 model" if len(models) == 1 else f"{len(models)} models"
        lines = [f"{count}{failed}; loaded models may take "
                 f"{shown_bytes(self.residency.budget)}{beside} (--models-memory)"]
        for model in models:
            words = ["cannot be served (see above)"]
            if model.pool:
                words = [f"{shown_bytes(model.bytes)}, context {model.pool.context_length:,}"]
            if model is default:
                words.append("default")
            if model.entry.pin:
                words.append("pinned")
            lines.append(f"  {model.name}: {', '.join(words)}")
        if self.settings.verbose and (prefixes := self.opener.prefixes.line):
            lines.append(prefixes)
        return lines


def names_beside(model: ServedModel, models: Seq[ServedModel]) -> list[str]:
    """The names that an adapter of this model may not have: the model's own, and those of other models and
    their adapters."""
    names = [*model.accepted_names]
    for other in models:
        if other is not model:
            for served in other.served():
                names += served.names
    return names


def give_adapters(words: Seq[str], models: Seq[ServedModel]):
    """Give each adapter of --adapter to the model that it was made for. Raises ConfigError unless exactly one
    model fits."""
    named, folders = named_adapters(words)
    if folders:
        raise ConfigError(f"--adapter {folders[0]}: with several models, an adapter needs a name and a base: "
                          "put adapter = {NAME = \"FOLDER\"} into the base's table of [[models]], or put "
                          "models and adapters in one folder for --models")
    for files in named:
        bases = matching_bases(files.path, models)
        if len(bases) != 1:
            which = "several" if bases else "none"
            raise ConfigError(f"--adapter {files.name}={files.path}: base_model_name_or_path in its "
                              f"adapter_config.json matches {which} of the models; put adapter = {{NAME = "
                              "\"FOLDER\"}} into the table of its base in [[models]]")
        settings = bases[0].settings
        word = f"{files.name}={files.path}"
        bases[0].settings = replace(settings, adapter=(*settings.adapter, word))


def check_served(models: Seq[ServedModel]):
    """Log which models cannot be served. Raises ConfigError if none can."""
    for model in models:
        if model.reason:  # an f-string: the log merges lines with equal format strings
            log.error(f"the model {model.name} cannot be served: {model.reason}")
    if models and not any(model.pool for model in models):
        first = models[0]
        if len(models) == 1:
            raise ConfigError(first.reason)
        raise ConfigError(f"none of {len(models)} models can be served; {first.name}: {first.reason}")

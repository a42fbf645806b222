"""The models of a server, and what a request can ask for: a model alone, or with an adapter."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.config import ModelEntry
from chatlm.common.errors import ConfigError, Overloaded, RequestError, without_folders
from chatlm.front.pool.names import accepted_names, bound_among, is_among, named_among
from chatlm.front.pool.pool import known_about
from chatlm.front.pool.files_revision import NO_CARD

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.protocol import Known
    from chatlm.common.hub.val_bpb import Evaluation
    from chatlm.common.messages.requests import ModelSource, Request
    from chatlm.front.pool.pool_adapters import Adapter
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.pool.run_names import RunName


class ServedModel:
    """A model of a server: its files, its names, and the pool that computes it."""

    def __init__(self, settings: Settings, pool: WorkerPool | None, entry: ModelEntry = ModelEntry("")):
        """settings: this model's own. pool: None while it cannot be served. If `entry` has no name, the
        pool's is used."""
        self.settings = settings
        self.pool = pool
        self.entry = entry
        self.reason = ""     # why it failed, for the operator
        self.failed_s = 0.0  # when it failed
        self.source: ModelSource | None = None
        self.stamp: tuple = ()  # of its files, if --models found it
        # if --watch found it, it is a checkpoint of a training run:
        self.run: RunName | None = None
        self.step = 0
        self.saved_s = 0.0                   # when its training wrote it
        self.warning = ""                    # what to know before its metrics are believed
        self.written: dict[str, float] = {}  # metrics that its training has written beside it,
        self.logged: dict[str, float] = {}   # and into the log of its stage
        self.stale: tuple[str, ...] = ()     # those of `written` that belong to an earlier step
        self.evaluation: Evaluation | None = None  # how training computed its val_bpb, if we can do it too
        self.own_val_bpb: float | None = None      # the same, computed by us
        self.is_compared = False                   # have the two been compared?
        self.scoring = False                       # is --watch-text scored now?
        self.bits_per_byte: float | None = None    # of --watch-text
        self.judged: dict[str, float] | None = None    # metrics of --watch-suite, once that has ended
        self.verdicts: Any = None                      # of the suite's items: see evals.flips
        self.samples: tuple[dict[str, str], ...] = ()  # answers to --watch-prompts

    @property
    def name(self) -> str:
        return self.entry.name or (self.pool.model_name if self.pool else "")

    @property
    def names(self) -> list[str]:
        """The names that clients see."""
        return [self.name, *self.entry.aliases]

    @property
    def accepted_names(self) -> list[str]:
        """All names that a request may use."""
        older = self.run.older_steps(self.step) if self.run else ()
        return [*accepted_names(self.names, self.settings.model), *older]

    def fits(self, name: str) -> bool:
        """May a request use this name?"""
        return is_among(name, self.accepted_names)

    def rename(self, name: str, aliases: tuple[str, ...]):
        """Change its names. That happens to a step of a training run when the next step arrives."""
        self.entry = replace(self.entry, aliases=aliases)
        if name == self.name:
            return
        self.entry = replace(self.entry, name=name)
        if self.source:
            self.source = replace(self.source, name=name)
        if self.pool:
            self.pool.rename(name, self.source)

    def load(self):
        """Load it as if a request waited for it."""
        if self.pool:
            self.pool.memory.load()

    def unload(self):
        """Unload it once its running answers have ended; the next request loads it again."""
        if self.pool:
            self.pool.memory.unload()

    @property
    def is_unnamed(self) -> bool:
        """Is its name unknown, since no worker has said it yet?"""
        return self.pool is not None and self.pool.supervisor.card is NO_CARD

    @property
    def is_read(self) -> bool:
        """Are the headers of its files still to be read, at the start or after a change?"""
        return self.pool is None and not self.reason

    @property
    def state(self) -> str:
        """unloaded, loading, ready or failed."""
        if self.pool is None:
            return "loading" if self.is_read else "failed"
        return self.pool.memory.state

    @property
    def bytes(self) -> int:
        """Bytes in memory; if it is not loaded, what it will need."""
        return self.pool.memory.bytes if self.pool else 0

    @property
    def public_reason(self) -> str:
        """Why it failed, without the paths of this machine."""
        text = self.reason
        for path in (self.entry.path, *([str(self.source.path)] if self.source else [])):
            if "/" in path:
                text = text.replace(path, Path(path).name)
        return without_folders(text)

    @property
    def run_fields(self) -> dict:
        """The additional fields of a checkpoint in the API; {} for other models."""
        if not self.run:
            return {}
        return {"run": self.run.run, "lineage": self.run.lineage, "stage": self.run.stage, "step": self.step,
                **self.remarks,
                "bits_per_byte": self.bits_per_byte and round(self.bits_per_byte, 6), "scoring": self.scoring}

    @property
    def remarks(self) -> dict:
        """What to know of a checkpoint before its metrics are believed; {} if there is nothing."""
        remarks: dict = {}
        if self.stale:
            remarks["stale"] = [*self.stale]
        if self.warning:
            remarks["warning"] = self.warning
        return remarks

    @property
    def metrics(self) -> dict[str, float]:
        """All that is known of how good a checkpoint is. Metrics of upstream have upstream's names."""
        metrics = {**self.logged, **self.written}
        if self.own_val_bpb is not None:
            metrics["own_val_bpb"] = round(self.own_val_bpb, 6)
        if self.bits_per_byte is not None:
            metrics["bits_per_byte"] = round(self.bits_per_byte, 6)
        return metrics | (self.judged or {})

    def served(self) -> list[ModelOrAdapter]:
        """The model alone, and with each of its adapters."""
        adapters = self.pool.adapters.serving.values() if self.pool else ()
        return [ModelOrAdapter(self), *(ModelOrAdapter(self, adapter) for adapter in adapters)]


class ModelOrAdapter(NamedTuple):
    """What a request can ask for: a model alone, or with one of its adapters."""

    model: ServedModel
    adapter: Adapter | None = None
    revision: int | None = None  # of the model's files, if this is for one request

    @property
    def _one(self) -> ServedModel | Adapter:
        return self.adapter or self.model

    @property
    def name(self) -> str:
        return self._one.name

    @property
    def aliases(self) -> list[str]:
        if not self.adapter:
            return [*self.model.entry.aliases]
        return [f"{base}@{self.adapter.name}" for base in dict.fromkeys(self.model.names)]

    @property
    def names(self) -> list[str]:
        """The names that clients see."""
        return [self.name, *self.aliases]

    def fits(self, name: str) -> bool:
        """May a request use this name?"""
        if not self.adapter:
            return self.model.fits(name)
        return is_among(name, [self.name, *(
            f"{base}@{self.adapter.name}" for base in self.model.accepted_names)])

    @property
    def known(self) -> Known:
        """What readers of bodies need to know of the model."""
        return known_about(self.pool, self.model.settings)

    @property
    def state(self) -> str:
        """unloaded, loading, ready or failed."""
        return "failed" if self.failed and not self.model.is_read else self.model.state

    @property
    def failed(self) -> bool:
        return self.model.pool is None or self.adapter is not None and bool(self.adapter.problem)

    @property
    def bytes(self) -> int:
        """Bytes in memory; if it is not loaded, what it will need."""
        return self._one.bytes

    @property
    def public_reason(self) -> str:
        """Why it failed, without the paths of this machine."""
        return self._one.public_reason

    @property
    def pool(self) -> WorkerPool:
        """Raises RequestError 503 if the model has failed, Overloaded while its files are being read."""
        if self.model.is_read:
            raise Overloaded(f"the files of the model {self.name!r} are being read", retry_after_s=3)
        if self.failed or not self.model.pool:
            raise RequestError(f"the model {self.name!r} cannot be served: {self.public_reason}", status=503,
                               code="model_failed", param="model")
        return self.model.pool

    def with_revisions(self, request: Request) -> Request:
        """The request with the revisions of the model's files and of the adapter."""
        adapter = self.adapter.id if self.adapter else ""
        return replace(request, revision=self.revision, params=replace(request.params, adapter=adapter))


class Registry:
    """The models of a server by name. Most servers have one."""

    def __init__(self, *models: ServedModel):
        self.models = [*models]

    def served_models(self, bound: Seq[str] = ()) -> list[ModelOrAdapter]:
        """What an API key limited to the models in `bound` may use: each model, followed by its adapters."""
        return bound_among(bound, [served for model in self.models for served in model.served()])

    def find(self, name: str, bound: Seq[str] = ()) -> ModelOrAdapter:
        """What a request asks for, with a key limited to `bound`. Raises RequestError 404 if there is no such
        model. While the only model loads, its name may not be known yet. Then any name stands for it."""
        served = self.served_models(bound)
        if len(self.models) == 1 and self.models[0].is_unnamed and not any(one.fits(name) for one in served):
            return ModelOrAdapter(self.models[0])
        return named_among(name, served)

    def add(self, model: ServedModel):
        """Add a model. Raises ConfigError if another one has its name or one of its aliases."""
        for other in self.models:
            both = {*model.names} & {*other.names}
            if both:
                raise ConfigError(f"two models have the name {min(both)}: {other.entry.path} and "
                                  f"{model.entry.path}; give them different names in [[models]]")
        self.models.append(model)

    def renamed(self, entry: ModelEntry) -> ModelEntry:
        """The entry without the names that other models have."""
        taken = {name for model in self.models for name in model.names}
        name = entry.path if entry.name in taken else entry.name
        return replace(entry, name=name, aliases=tuple(set(entry.aliases) - taken))

"""The models of a server, and what a request can name: each of them, alone or with an adapter."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.config import ModelChoice
from chatlm.common.errors import ConfigError, Overloaded, RequestError, without_folders
from chatlm.front.pool.names import accepted_names, bound_among, is_among, named_among

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource, Request
    from chatlm.front.pool.adapters import Adapter
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.pool.residency import Place
    from chatlm.front.pool.score import Score


class Model:
    """Files with names, and the pool that computes them."""

    def __init__(self, settings: Settings, pool: WorkerPool | None, choice: ModelChoice = ModelChoice("")):
        """settings: its own; pool: None while it cannot be served. Without a name in `choice` it has its
        pool's."""
        self.settings, self.pool, self.choice = settings, pool, choice
        self.place: Place | None = None      # in memory, where it is one of many
        self.reason, self.failed_s = "", 0.0  # why and when it failed, for the operator
        self.source: ModelSource | None = None
        self.stamp: tuple = ()               # of its files, if --models found it
        self.run, self.step = "", 0          # of a checkpoint that --watch found: TAG and STEP
        self.score: Score | None = None      # of it, by --watch-text

    @property
    def name(self) -> str:
        return self.choice.name or (self.pool.model_name if self.pool else "")

    @property
    def names(self) -> list[str]:
        """Those that clients see."""
        return [self.name, *self.choice.aliases]

    @property
    def accepted_names(self) -> list[str]:
        """All that a request may use."""
        return accepted_names(self.names, self.settings.model)

    def fits(self, name: str) -> bool:
        """May a request use this name?"""
        return is_among(name, self.accepted_names)

    def rename(self, name: str, aliases: tuple[str, ...]):
        """Give it other names, as a step of a training run gets when the next one is there."""
        self.choice = replace(self.choice, aliases=aliases)
        if name == self.name:
            return
        self.choice = replace(self.choice, name=name)
        if self.source:
            self.source = replace(self.source, name=name)
        if self.place:
            self.place.name = name
        if self.pool:
            self.pool.placement.source = self.source
            self.pool.supervisor.card = replace(self.pool.supervisor.card, name=name)

    @property
    def is_unnamed(self) -> bool:
        return self.place is None and self.pool is not None and not self.pool.ready

    @property
    def is_read(self) -> bool:
        """Is it still to be read what its files say, at the start or since they have changed?"""
        return self.pool is None and not self.reason

    @property
    def state(self) -> str:
        """unloaded, loading, ready or failed."""
        if self.pool is None:
            return "loading" if self.is_read else "failed"
        if self.place:
            return "unloaded" if not self.place.taken else "ready" if self.place.loaded else "loading"
        asleep = getattr(self.pool.supervisor, "asleep", False) and not self.pool.dispatcher.wanted.is_set()
        return "unloaded" if asleep else "ready" if self.pool.ready else "loading"

    @property
    def bytes(self) -> int:
        """In memory; of one that is not loaded, what it will take."""
        return (self.place.bytes or self.place.size) if self.place else (
            self.pool.supervisor.card.facts.weights_bytes if self.pool else 0)

    @property
    def public_reason(self) -> str:
        """Why it failed, without the paths of this machine."""
        text = self.reason
        for path in (self.choice.path, *([str(self.source.path)] if self.source else [])):
            if "/" in path:
                text = text.replace(path, Path(path).name)
        return without_folders(text)

    @property
    def of_run(self) -> dict:
        """What is shown of a checkpoint beside what every model has; {} of other models."""
        if not self.run:
            return {}
        return {"run": self.run, "step": self.step,
                "bits_per_byte": self.score and round(self.score.bits_per_byte, 6)}


class Served(NamedTuple):
    """What a request can name: a model, or what one of its adapters makes of it."""

    model: Model
    adapter: Adapter | None = None
    version: int | None = None  # of the model's files, where a request holds it

    @property
    def name(self) -> str:
        return self.adapter.name if self.adapter else self.model.name

    @property
    def aliases(self) -> list[str]:
        if not self.adapter:
            return [*self.model.choice.aliases]
        return [f"{base}@{self.adapter.name}" for base in dict.fromkeys(self.model.names)]

    @property
    def names(self) -> list[str]:
        """Those that clients see."""
        return [self.name, *self.aliases]

    def fits(self, name: str) -> bool:
        """May a request use this name?"""
        if not self.adapter:
            return self.model.fits(name)
        return is_among(name, [self.name, *(
            f"{base}@{self.adapter.name}" for base in self.model.accepted_names)])

    @property
    def state(self) -> str:
        """unloaded, loading, ready or failed."""
        return "failed" if self.failed and not self.model.is_read else self.model.state

    @property
    def failed(self) -> bool:
        return self.model.pool is None or self.adapter is not None and bool(self.adapter.problem)

    @property
    def bytes(self) -> int:
        """In memory; of one that is not loaded, what it will take."""
        return self.adapter.bytes if self.adapter else self.model.bytes

    @property
    def public_reason(self) -> str:
        """Why it failed, without the paths of this machine."""
        return self.adapter.public_problem if self.adapter else self.model.public_reason

    @property
    def pool(self) -> WorkerPool:
        """RequestError 503 if it has failed, Overloaded while its files are read."""
        if self.model.is_read:
            raise Overloaded(f"the files of the model {self.name!r} are being read", retry_after_s=3)
        if self.failed or not self.model.pool:
            raise RequestError(f"the model {self.name!r} cannot be served: {self.public_reason}", status=503,
                               code="model_failed", param="model")
        return self.model.pool

    def asked(self, request: Request) -> Request:
        """The request, for the version of the files and of the adapter that it holds."""
        adapter = self.adapter.id if self.adapter else ""
        return replace(request, version=self.version, params=replace(request.params, adapter=adapter))


class Registry:
    """The models of a server by name. The one model of most servers is a registry of one."""

    def __init__(self, *models: Model):
        self.models = [*models]

    def listed(self, bound: Seq[str] = ()) -> list[Served]:
        """Each model, followed by its adapters, that a key with these bounds may use."""
        return bound_among(bound, [served for model in self.models for served in of_model(model)])

    def find(self, name: str, bound: Seq[str] = ()) -> Served:
        """What a request of a key with these bounds names. RequestError 404 if there is nothing. While the
        only model loads, its name may not be known yet: any name means it."""
        served = self.listed(bound)
        if len(self.models) == 1 and self.models[0].is_unnamed and not any(one.fits(name) for one in served):
            return Served(self.models[0])
        return named_among(name, served)

    def add(self, model: Model):
        """ConfigError if another model has its name or one of its aliases."""
        for other in self.models:
            both = {*model.names} & {*other.names}
            if both:
                raise ConfigError(f"two models are called {min(both)}: {other.choice.path} and "
                                  f"{model.choice.path}; give them names of their own in [[models]]")
        self.models.append(model)

    def renamed(self, choice: ModelChoice) -> ModelChoice:
        """A model with no names that another has."""
        taken = {name for model in self.models for name in model.names}
        name = choice.path if choice.name in taken else choice.name
        return replace(choice, name=name, aliases=tuple(set(choice.aliases) - taken))


def of_model(model: Model) -> list[Served]:
    """The model, and what each of its adapters makes of it."""
    adapters = model.pool.adapters.serving.values() if model.pool else ()
    return [Served(model), *(Served(model, adapter) for adapter in adapters)]

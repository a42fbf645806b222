"""The models of a server as clients know them, and the one model of most servers."""

from __future__ import annotations

import asyncio
import copy
import difflib
from collections.abc import Iterable, Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.config import ModelChoice
from chatlm.common.errors import ConfigError, Overloaded, RequestError, shown, without_folders
from chatlm.common.messages.protocol import accepted_names
from chatlm.front.aio import supervised

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource
    from chatlm.front.pool.adapters import Adapter
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.pool.residency import Place
    from chatlm.front.pool.score import Score


class Model:
    """A model as clients know it."""

    def __init__(self, settings: Settings, pool: WorkerPool | None, name: str = "",
                 choice: ModelChoice = ModelChoice("")):
        """settings: its own; pool: None while it cannot be served; name: "": what its pool calls it."""
        self.settings, self.pool, self.own_name, self.choice = settings, pool, name, choice
        self.place: Place | None = None      # in memory, where it is one of many
        self.reason, self.failed_s = "", 0.0  # why and when it failed, for the operator
        self.source: ModelSource | None = None
        self.stamp: tuple = ()               # of its files, if --models found it
        self.run, self.step = "", 0          # of a checkpoint that --watch found: TAG and STEP
        self.score: Score | None = None      # of it, by --watch-text
        self.adapter: Adapter | None = None  # that computes it; then all else is its base's
        self.unseen: tuple[str, ...] = ()    # of an adapter: names by its base's path, which are not shown
        self.base: Model | None = None       # of an adapter: beside which model it is served

    @property
    def adapted(self) -> list[Model]:
        """With each of its adapters."""
        adapters = self.pool.adapters.serving.values() if self.pool and not self.adapter else ()
        return [self.with_adapter(adapter) for adapter in adapters]

    def with_adapter(self, adapter: Adapter) -> Model:
        """As it is now, so nobody keeps it."""
        model = copy.copy(self)
        model.adapter, model.own_name, model.reason = adapter, adapter.name, adapter.problem
        model.base = self
        aliases = tuple(f"{base}@{adapter.name}" for base in dict.fromkeys(self.names))
        model.unseen = tuple(f"{base}@{adapter.name}" for base in accepted_names(self.name, self.settings))
        model.choice = ModelChoice(self.choice.path, adapter.name, aliases, self.choice.pin)
        return model

    @property
    def is_read(self) -> bool:
        """Is it still to be read what its files say, at the start or since they have changed?"""
        return self.pool is None and not self.reason

    @property
    def failed(self) -> bool:
        return self.pool is None or self.adapter is not None and bool(self.adapter.problem)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """What its readers accept beside the names that its pool began with."""
        return *self.names, *self.unseen

    def rename(self, name: str, aliases: tuple[str, ...]):
        """It has other names now, as a step of a training has when the next one is there."""
        if (name, aliases) == (self.name, self.choice.aliases):
            return
        self.own_name, self.choice = name, replace(self.choice, name=name, aliases=aliases)
        self.settings = replace(self.settings, served_model_name=aliases)
        if self.source:
            self.source = replace(self.source, name=name)
        if self.place:
            self.place.name = name
        if self.pool:
            self.pool.placement.source = self.source
            self.pool.supervisor.card = replace(self.pool.supervisor.card, name=name)

    @property
    def name(self) -> str:
        return self.own_name or (self.pool.model_name if self.pool else "")

    @property
    def names(self) -> list[str]:
        """Those that clients see."""
        if self.adapter:
            return [self.name, *self.choice.aliases]
        return [self.name, *self.choice.aliases, *self.settings.served_model_name]

    @property
    def of_run(self) -> dict:
        """What is shown of a checkpoint beside what every model has; {} of other models."""
        if not self.run:
            return {}
        return {"run": self.run, "step": self.step,
                "bits_per_byte": self.score and round(self.score.bits_per_byte, 6)}

    def fits(self, name: str) -> bool:
        """May a request call it so?"""
        if self.adapter:
            return bool({name, name.removesuffix(":latest")} & {*self.names, *self.unseen})
        return bool({name, name.removesuffix(":latest")} & {*accepted_names(self.name, self.settings)})

    @property
    def state(self) -> str:
        """unloaded, loading, ready or failed."""
        if self.is_read:
            return "loading"
        if self.failed or not self.pool:
            return "failed"
        if self.place:
            return "unloaded" if not self.place.taken else "ready" if self.place.loaded else "loading"
        asleep = getattr(self.pool.supervisor, "asleep", False) and not self.pool.dispatcher.wanted.is_set()
        return "unloaded" if asleep else "ready" if self.pool.ready else "loading"

    @property
    def bytes(self) -> int:
        """In memory; of one that is not loaded, what it will take."""
        if self.adapter:
            return self.adapter.bytes
        return (self.place.bytes or self.place.size) if self.place else (
            self.pool.supervisor.card.facts.weights_bytes if self.pool else 0)

    @property
    def public_reason(self) -> str:
        """Why it failed, without the paths of this machine."""
        if self.adapter:
            return self.adapter.public_problem
        text = self.reason
        for path in (self.choice.path, *([str(self.source.path)] if self.source else [])):
            if "/" in path:
                text = text.replace(path, Path(path).name)
        return without_folders(text)

    def serving(self) -> WorkerPool:
        """Its pool. RequestError 503 if it has failed, Overloaded while its files are read."""
        if self.is_read:
            raise Overloaded(f"the files of the model {self.name!r} are being read", retry_after_s=3)
        if self.failed or not self.pool:
            raise RequestError(f"the model {self.name!r} cannot be served: {self.public_reason}", status=503,
                               code="model_failed", param="model")
        return self.pool


def gone_adapter(name: str, models: Seq[Model]) -> str:
    """The adapter that a request of this name would have got while its files were there; "" if none."""
    base, _, adapter = name.removesuffix(":latest").rpartition("@")
    gone = any(model.pool and not model.adapter and adapter in model.pool.adapters.gone
               and (not base or model.fits(base)) for model in models)
    return adapter if gone else ""


def unknown_model(name: str, models: Seq[Model]) -> RequestError:
    if adapter := gone_adapter(name, models):
        names = ", ".join(shown(model.name) for model in models[:8])
        return RequestError(f"the adapter {shown(adapter)} is no longer served: its files have gone; this "
                            f"server has {names}", status=404, code="model_not_found", param="model")
    names = {other.lower(): other for model in models for other in model.names}
    near = [other for other in names if name and name.lower() in other][:3]
    near = near or difflib.get_close_matches(name.lower(), names, 3)
    shown_names = [shown(names[other]) for other in near] or [shown(model.name) for model in models[:8]]
    remedy = (f"did you mean {' or '.join(shown_names)}?" if near else
              f"this server has {', '.join(shown_names)}{', ...' * (len(models) > 8)}" if models else
              "this server has none for you")
    return RequestError(f"the model {shown(name)} does not exist; {remedy}", status=404,
                        code="model_not_found", param="model")


def named_among(name: str, models: Seq[Model], default: Model | None) -> Model:
    """The model of a request that names it so: "" and `default` are the default one. RequestError 404."""
    if name in ("", "default") and default:
        return default
    exact = [model for model in models if name in model.names]
    fitting = exact or [model for model in models if model.fits(name)]
    if not exact and len(fitting) != 1:  # the last part of several paths names none of them
        raise unknown_model(name, models)
    return fitting[0]


def with_adapted(models: Iterable[Model]) -> list[Model]:
    """Each followed by what its adapters make of it."""
    return [named for model in models for named in (model, *model.adapted)]


def bound_among(bound: Seq[str], models: Seq[Model]) -> list[Model]:
    """Those that an API key is bound to; all if it is to none."""
    return [model for model in models if not bound or any(map(model.fits, bound))]


class Registry:
    """Many models, by name."""

    def __init__(self):
        self.models: list[Model] = []

    def listed(self, bound: Seq[str] = ()) -> list[Model]:
        return bound_among(bound, with_adapted(self.models))

    def default_of(self, models: Seq[Model]) -> Model | None:
        """Which of these answers requests that name none: the marked one, else the first that can."""
        marked = [model for model in models if model.choice.default]
        return next((model for model in [*marked, *models] if model.pool), models[0] if models else None)

    def find(self, name: str, bound: Seq[str] = ()) -> Model:
        """The model that a request of a key with these bounds names. RequestError 404 if there is none."""
        models = self.listed(bound)
        return named_among(name, models, self.default_of(models))

    def add(self, model: Model):
        """ConfigError if another model has its name or one of its aliases."""
        for other in self.models:
            both = {model.name, *model.choice.aliases} & {other.name, *other.choice.aliases}
            if both:
                raise ConfigError(f"two models are called {min(both)}: {other.choice.path} and "
                                  f"{model.choice.path}; give them names of their own in [[models]]")
        self.models.append(model)

    def renamed(self, choice: ModelChoice) -> ModelChoice:
        """A model with no names that another has."""
        taken = {name for model in self.models for name in (model.name, *model.choice.aliases)}
        name = choice.path if choice.name in taken else choice.name
        return replace(choice, name=name, aliases=tuple(set(choice.aliases) - taken))


class OneModel:
    """The one model of a server, as one of many. Its pool answers for the server."""

    def __init__(self, pool: WorkerPool, settings: Settings):
        self.pool, self.only = pool, Model(settings, pool)
        self.leaving: asyncio.Task | None = None

    def listed(self, bound: Seq[str] = ()) -> list[Model]:
        return bound_among(bound, with_adapted([self.only]))

    @property
    def several(self) -> bool:
        """Has a request to be read to know which model it asks for?"""
        return bool(self.pool.adapters.serving or self.pool.adapters.gone)

    def find(self, name: str, bound: Seq[str] = ()) -> Model:
        """The model, or what an adapter makes of it; whether a request names the model right, the reader of
        its body says. RequestError 404 if the key is bound to others."""
        models = self.listed(bound)
        named = [model for model in models if model.adapter and model.fits(name)]
        if named and not self.only.fits(name):
            return named[0]
        if not self.only.fits(name) and gone_adapter(name, models):
            raise unknown_model(name, models)
        if models and models[0] is not self.only:  # the key is bound to adapters
            return named_among(name, models, models[0])
        return models[0] if models else named_among(name or "default", models, None)

    def stats(self, bound: Seq[str] = ()) -> dict:
        return self.pool.stats()

    def default_of(self, models: Seq[Model]) -> Model | None:
        return self.only

    def load(self, model: Model):
        if not self.pool.dispatcher.wanted.is_set():
            self.pool.dispatcher.wake()

    def unload(self, model: Model):
        """When the answers under way have ended; a request brings it back."""
        if self.leaving is None or self.leaving.done():
            self.leaving = asyncio.create_task(supervised("unloading the model", self._unload))

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

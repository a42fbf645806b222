"""Finds the model that a name in a request stands for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence as Seq
from typing import TYPE_CHECKING

from chatlm.common.client_words import no_such_model
from chatlm.common.errors import RequestError, shown

if TYPE_CHECKING:
    from chatlm.front.pool.models import ModelOrAdapter, ServedModel


DEFAULT_NAMES = "", "default"


def accepted_names(names: Iterable[str], path: str | None) -> list[str]:
    """The names of a model, the path given for it, and the last part of each."""
    names = [*names, path or ""]
    return [*names, *(name.rstrip("/").rsplit("/", 1)[-1] for name in names if name)]


def is_among(name: str, names: Iterable[str]) -> bool:
    return bool({name, name.removesuffix(":latest")} & {*names})  # Ollama adds that if there is no tag


def bound_among(bound: Seq[str], served: Iterable[ModelOrAdapter]) -> list[ModelOrAdapter]:
    """What an API key limited to the models in `bound` may use; everything if that is empty."""
    return [one for one in served if not bound or any(map(one.fits, bound))]


def default_among(served: Seq[ModelOrAdapter]) -> ModelOrAdapter | None:
    """The one that answers requests without a model: the one marked as default, else the first that can."""
    marked = [one for one in served if one.model.entry.default and not one.adapter]
    unmarked = sorted(served, key=lambda one: one.model.entry.spare)
    return next((one for one in [*marked, *unmarked] if one.model.pool), served[0] if served else None)


def named_among(name: str, served: Seq[ModelOrAdapter]) -> ModelOrAdapter:
    """The one with this name; "" and `default` stand for the default. Raises RequestError 404 if there is
    none."""
    default = default_among(served)
    if name in DEFAULT_NAMES and default:
        return default
    exact = [one for one in served if name in one.names]
    fitting = exact or [one for one in served if one.fits(name)]
    if not exact and len(fitting) != 1:  # the last part of a path must be unique
        raise unknown_model(name, served)
    return fitting[0]


def removed_adapter(name: str, models: Iterable[ServedModel]) -> str:
    """The adapter that had this name before its files were removed; "" if there was none."""
    base, _, adapter = name.removesuffix(":latest").rpartition("@")
    removed = any(model.pool and adapter in model.pool.adapters.removed and (not base or model.fits(base))
                  for model in models)
    return adapter if removed else ""


def unknown_model(name: str, served: Seq[ModelOrAdapter]) -> RequestError:
    names = {other.lower(): other for one in served for other in one.names}
    near = [other for other in names if name and name.lower() in other][:3]
    near = near or difflib.get_close_matches(name.lower(), names, 3)
    others = ", ".join(shown(one.name) for one in served[:8]) + ", ..." * (len(served) > 8)
    has = f"this server has {others}" if served else "this server has no model for you"
    adapter = removed_adapter(name, [one.model for one in served if not one.adapter])
    if adapter:
        why = f"is not here: the adapter {shown(adapter)} is no longer served: its files were removed"
        return no_such_model(name, why, has)
    suggestion = f"did you mean {' or '.join(shown(names[other]) for other in near)}?"
    return no_such_model(name, "does not exist", suggestion if near else has)

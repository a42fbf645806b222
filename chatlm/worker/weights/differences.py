"""In what the recipes of two models differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, TYPE_CHECKING

if TYPE_CHECKING:
    from chatlm.worker.weights.recipe import ModelSpec

IGNORED = {"vocab_size", "tied_head", "max_positions", "answer_positions", "sees", "embeds",
           # the order of rows of linear attention, which differs between formats of files
           *(ORDERS := ("alternating", "gates_by_key", "heads_by_key"))}


def differences(own: ModelSpec, original: ModelSpec) -> Iterator[tuple[str, str, str]]:
    """(field, own value, the original's) in words, of every field that the two state differently."""
    for field in dataclasses.fields(own):
        ours = getattr(own, field.name)
        theirs = getattr(original, field.name)
        if field.name not in IGNORED and not about_equal(ours, theirs):
            yield field.name, *in_words(ours, theirs)


def about_equal(ours: Any, theirs: Any) -> bool:
    """Equal up to float32."""
    if isinstance(ours, float) and isinstance(theirs, (float, int)):
        return math.isclose(ours, theirs, rel_tol=1e-4)
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(about_equal, ours, theirs))
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        return all(about_equal(getattr(ours, field.name), getattr(theirs, field.name))
                   for field in dataclasses.fields(ours) if field.name not in ORDERS)
    return ours == theirs


def in_words(ours: Any, theirs: Any) -> tuple[str, str]:
    """Two different values; of lists and objects only the first part that differs."""
    if isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        i, pair = next((i, pair) for i, pair in enumerate(zip(ours, theirs)) if not about_equal(*pair))
        a, b = in_words(*pair)
        return f"{a} (number {i})", b
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        name = next(field.name for field in dataclasses.fields(ours) if field.name not in ORDERS
                    and not about_equal(getattr(ours, field.name), getattr(theirs, field.name)))
        a, b = in_words(getattr(ours, name), getattr(theirs, name))
        return f"{name} {a}", f"{name} {b}"
    return (f"{ours:,g}", f"{theirs:,g}") if isinstance(ours, float) and isinstance(theirs, float) else (
        str(ours)[:80], str(theirs)[:80])

"""In what the blocks of two models differ."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Set
from typing import Any, TYPE_CHECKING

from chatlm.worker.model.blocks.extras import PictureRows

if TYPE_CHECKING:
    from chatlm.worker.model.blocks.model import Model

IGNORED = {"vocab_size", "tied", "max_positions", "answer_positions", "waits",
           "sees", "pad", "rope_axes",  # pictures, which one of two files may know
           # the order of rows of linear attention, which differs between formats of files
           "alternating", "gates_by_key", "heads_by_key"}


def differences(own: Model, original: Model,
                ignored: Set[str] = IGNORED) -> Iterator[tuple[str, str, str]]:
    """(place, own value, the original's) in words, of every setting of the blocks that differs, such as
    layers.0.mixer.rope.base, unless it is `ignored`. Of several layers, and of a list of numbers, the first
    one that does."""
    settings = set()
    for place, ours, theirs in values_apart("", own, original, ignored):
        setting = re.sub("[0-9]+", "", place)
        if setting not in settings:
            settings.add(setting)
            yield place, in_words(ours), in_words(theirs)


def values_apart(place: str, ours: Any, theirs: Any, ignored: Set[str]) -> Iterator[tuple[str, Any, Any]]:
    """(place, ours, theirs) of the smallest parts that differ."""
    dot = place and f"{place}."
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        ours, theirs = (tuple(each for each in both if not isinstance(each, PictureRows))
                        for both in (ours, theirs))
        if len(ours) == len(theirs):
            for number, pair in enumerate(zip(ours, theirs)):
                yield from values_apart(f"{dot}{number}", *pair, ignored)
            return
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        for field in dataclasses.fields(ours):
            if field.name not in ignored:
                yield from values_apart(
                    f"{dot}{field.name}", getattr(ours, field.name), getattr(theirs, field.name), ignored)
    elif not about_equal(ours, theirs):
        yield place, ours, theirs


def about_equal(ours: Any, theirs: Any) -> bool:
    """Equal up to float32."""
    if isinstance(ours, float) and isinstance(theirs, (float, int)):
        return math.isclose(ours, theirs, rel_tol=1e-4)
    return ours == theirs


def in_words(value: Any) -> str:
    return f"{value:,g}" if isinstance(value, float) else str(value)[:80]

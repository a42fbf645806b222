"""`HubModel`: a model as a Hugging Face folder would have it, before anything of it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TYPE_CHECKING


if TYPE_CHECKING:
    import numpy

    from chatlm.common.messages.requests import TextSpec


class Weights(NamedTuple):
    """Tensors that are read together, such as queries, keys and values of a layer.

    `read` yields the arrays in the order of `shapes`. It reads them again each time, so that nothing of a
    model has to stay in memory."""

    shapes: dict[str, tuple[int, ...]]  # by the names in the folder
    kind: str                           # of all of them: "float32", "bfloat16"
    read: Callable[[], Iterator[numpy.ndarray]]


@dataclass(frozen=True)
class HubModel:
    """What goes into the folder, but its model card."""

    config: dict[str, Any]
    weights: list[Weights]
    text: TextSpec
    sampling: dict[str, Any] = field(default_factory=dict)  # what the source says of sampling, in
                                                            # generation_config.json's words
    code: tuple[str, ...] = ()          # files of hub_code
    copied: tuple[Path, ...] = ()       # files of the source: its tokenizer, template and sampling
    notes: tuple[str, ...] = ()         # sentences for the card: what differs from the source

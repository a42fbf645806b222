"""How much memory a model's weights will take, before they are read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from chatlm.worker.arrays.gguf_types import block_of

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq
    from chatlm.worker.model.tensors import MappedRows, Unread
    from chatlm.worker.weights.loaded.model import LoadedModel


def weight_bytes(model: LoadedModel, quantize: str | None, without: Seq[str] = ()) -> int:
    """About how many bytes a model's weights will take. --quantize applies to matrices of floats."""
    shapes = model.architecture.shapes()
    total = 0
    for name, tensor in model.tensors.items():
        if name in without:
            continue
        count = math.prod(shapes[name])
        if quantize and len(shapes[name]) > 1 and is_float(tensor, shapes[name]):
            per_block, block_bytes = block_of(quantize.upper())
            total += count * block_bytes // per_block
        else:
            total += tensor.nbytes
    return total


def is_float(tensor: Unread | MappedRows, shape: tuple[int, ...]) -> bool:
    return tensor.nbytes >= 2 * math.prod(shape)

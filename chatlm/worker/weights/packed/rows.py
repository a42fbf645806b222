"""Rows of packed blocks, as gguf.header.GgufTensor has them: joined, and cut for a rank."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from types import SimpleNamespace
from typing import Any

import numpy

from chatlm.common.errors import require_library
from chatlm.worker.arrays.gguf_types import TYPES, block_of
from chatlm.worker.arrays.kinds import contiguous
from chatlm.worker.arrays.packed import RopePairs, dequantized, i8_as_q8_0
from chatlm.worker.model.tensors import Cut

Part = tuple[Any, RopePairs | None]  # rows, and the pairs among them that are still to be unpermuted


def as_rows(tensor, shape: tuple[int, ...]):
    """A gguf.header.GgufTensor as rows of a tensor of this shape; the experts' matrices become one."""
    data = tensor.data.reshape(-1, *tensor.data.shape[-1:] * (len(shape) - 1))
    return SimpleNamespace(tensor_type=tensor.tensor_type, data=data)


def cut_stored(parts: Seq[Part], cut: Cut) -> list[Part]:
    """The rows or columns that a rank has. Blocks that the cut divides become Q8_0 or floats."""
    if cut == Cut.whole(cut.full):
        return list(parts)
    if cut.axis and divides_blocks(cut, [tensor for tensor, _ in parts]):
        return cut_values(parts, cut)
    cut_parts: list[Part] = []
    for index, data in cut.apply(tensor.data for tensor, _ in parts):
        tensor, pairs = parts[index]
        rows = SimpleNamespace(tensor_type=tensor.tensor_type, data=numpy.ascontiguousarray(data))
        cut_parts.append((rows, pairs))
    return cut_parts


def cut_values(parts: Seq[Part], cut: Cut) -> list[Part]:
    """Columns of the parts' values, packed anew."""
    gguf = require_library("gguf", "packed weights")
    gguf_type = TYPES["F32" if cut.shape[1] % 32 else "Q8_0"]
    values = (dequantized((len(part[0].data), cut.full[1]), [part], "float32") for part in parts)
    cut_parts: list[Part] = []
    for _, rows in cut.apply(values):
        packed = gguf.quantize(contiguous(rows), gguf_type)
        cut_parts.append((SimpleNamespace(tensor_type=gguf_type, data=packed), None))
    return cut_parts


def in_narrow_blocks(tensor):
    """Rows with the same numbers in blocks of 32 columns, where a type has both."""
    narrow = i8_as_q8_0(tensor.data) if tensor.tensor_type.name == "I8_ROW" else None
    if narrow is None:
        return tensor
    return SimpleNamespace(tensor_type=TYPES["Q8_0"], data=narrow)


def divides_blocks(cut: Cut, tensors: Seq[Any]) -> bool:
    """Does a cut of columns begin or end within a block?"""
    edges = {edge for span in cut.ranges for edge in (span.start, span.stop)}
    return any(edge % packed_together(tensor) for tensor in tensors for edge in edges)


def packed_together(tensor) -> int:
    """How many columns a block has."""
    return block_of(tensor.tensor_type.name)[0]

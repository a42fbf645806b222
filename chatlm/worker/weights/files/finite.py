"""Weights with NaN or infinity are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError
from chatlm.worker.arrays.kinds import FLOATS, as_kind, bits_of, contiguous, floats, kind_of
from chatlm.worker.arrays.packed import BLOCKS
from chatlm.worker.model.tensors import Cut

if TYPE_CHECKING:
    from chatlm.common.config import Settings


MOST_QUANTIZED = 65_520.0  # a block's scale or minimum, a float16, becomes infinite there


CHECKED_BYTES = 1 << 17  # at a time, so that a second look finds them in the cache


def all_below(values: numpy.ndarray, most: float = math.inf) -> bool:
    """Are all values numbers of a magnitude below `most`?

    It compares the bits as integers: 10 GB/s on one core, where isfinite takes 0.4."""
    if kind_of(values) not in FLOATS:
        values = floats(values)
    signed = f"i{values.itemsize}"
    unsigned = f"u{values.itemsize}"
    limit = int(as_kind(numpy.array([most], numpy.float32), kind_of(values)).view(numpy.ndarray).view(
        unsigned)[0])
    sign = 1 << (8 * values.itemsize - 1)
    bits = contiguous(bits_of(values)).reshape(-1).view(signed)
    step = CHECKED_BYTES // values.itemsize
    for begin in range(0, len(bits), step):
        chunk = bits[begin:begin + step]
        if chunk.max() >= limit or chunk.view(unsigned).max() >= sign + limit:
            return False
    return True


def scales_are_finite(packing: str, rows) -> bool:
    """Are all scales of packed rows finite? Rows are (n, bytes of a row) uint8, in an array or a tensor."""
    block = BLOCKS[packing]
    if not block.scale_bytes:
        return True
    blocks = rows.reshape(-1, block.bytes)
    if packing == "mxfp4":  # exponents: 255 is NaN, and with 253 or 254 the largest code overflows
        return bool(blocks[:, 0].max() < 253)
    if packing == "iq1_m":  # the upper half of a float16 lies in the upper nibbles of these bytes
        return not ((blocks[:, 55] & 0x70 == 0x70) & (blocks[:, 53] & 0xC0 == 0xC0)).any()
    if block.wide:
        return bool(numpy.isfinite(numpy.ascontiguousarray(blocks[:, :4]).view(numpy.float32)).all())
    exponents = blocks[:, block.scale + 1:block.scale + block.scale_bytes:2] & 0x7C  # of float16
    return bool(exponents.max() < 0x7C)


def fault_of(made, most: float = math.inf) -> str:
    """What is wrong with the result of an `Unread`, in words, or "". Floats of matrices must be below
    `most`."""
    for packing, rows in getattr(made, "parts", ()):
        if not scales_are_finite(packing, rows):
            return f"a {packing.upper()} scale that is NaN or infinite"
    if hasattr(made, "parts"):
        return ""
    for tensor in made if isinstance(made, tuple) else (made,):
        if not all_below(tensor):
            return f"a value that is NaN or infinite in {kind_of(tensor)}"
        if tensor.ndim > 1 and not all_below(tensor, most):
            return f"a value of {most:,.0f} or more, which --quantize cannot pack"
    return ""


def refuse_faults(path: Path, settings: Settings, theirs: Mapping[str, tuple[int, ...]],
                  read: Callable[[Iterable[str], Cut], Any], cut: Cut, made, packed: bool):
    """ConfigError if a tensor has NaN or infinity, or will have it once it is `packed`. The error names the
    first of the files' tensors that is at fault.

    `made` is what `read` made of the files' tensors `theirs` (name -> shape). Only the rank's part is
    checked, without the rows that pad a file's vocabulary."""
    most = MOST_QUANTIZED if packed and settings.quantize else math.inf
    fault = fault_of(made, most)
    if not fault and packed:
        fault = "a value that becomes infinite when packed"
    if not fault:
        return
    names = list(theirs)
    if len(names) > 1:
        for name in names:
            alone = fault_of_one(name, theirs[name], read, cut, most)
            if alone:
                raise ConfigError(f"{path}: {name} has {alone}")
    raise ConfigError(f"{path}: {names[0]} has {fault}")


def fault_of_one(name: str, shape: tuple[int, ...], read: Callable[[Iterable[str], Cut], Any], cut: Cut,
                 most: float) -> str:
    """`fault_of` of one of the files' tensors, as rows like those of the cut."""
    row_shape = shape[len(shape) - len(cut.shape) + 1:]
    rows = math.prod(shape[:len(shape) - len(row_shape)])  # of all experts
    with numpy.errstate(all="ignore"):
        return fault_of(read([name], Cut.whole((rows, *row_shape))), most)

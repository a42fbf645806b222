"""NaN and infinity in weights are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TYPE_CHECKING

import numpy
import torch

from chatlm.common.errors import ConfigError
from chatlm.worker.model.tensors import Cut
from chatlm.worker.ops.basic import BLOCKS

if TYPE_CHECKING:
    from chatlm.common.config import Settings


MOST_QUANTIZED = 65_520.0  # a block's scale or minimum, a float16, becomes infinite there


def all_below(values: torch.Tensor, most: float = math.inf) -> bool:
    """Whether no value is NaN, or `most` or more in magnitude.

    On a CPU it compares the bits as integers, some rows at a time, so that the second pass finds them in the
    cache: 10 GB/s on one core, where isfinite takes 0.4."""
    plain = values.dtype in (torch.float32, torch.bfloat16, torch.float16)
    values, on_cpu = values.detach() if plain else values.float(), values.device.type == "cpu"
    step = max(1, (1 << (16 if on_cpu else 24)) // math.prod(values.shape[1:]))
    if not on_cpu:
        return all(bool((rows.abs() < most).all()) for rows in values.split(step))
    signed, unsigned, sign = {2: (torch.int16, "u2", 1 << 15), 4: (torch.int32, "u4", 1 << 31)}[
        values.itemsize]
    limit = torch.tensor(most, dtype=values.dtype).view(signed).item()
    chunks = (rows.view(signed).numpy() for rows in values.split(step))
    return all(bits.max() < limit and bits.view(unsigned).max() < sign + limit for bits in chunks)


def scales_are_finite(packing: str, rows) -> bool:
    """Whether all scales of packed rows (n, bytes of a row) uint8, torch or numpy, are finite."""
    if packing == "mxfp4":  # exponents: 255 is NaN, and with 253 or 254 the largest code overflows
        return bool(torch.as_tensor(rows).reshape(-1, BLOCKS[packing].bytes)[:, 0].max() < 253)
    block = BLOCKS[packing]
    whole, exponents = (torch.int16, 0x7C00) if block.scale_bytes == 2 else (torch.int32, 0x7C007C00)
    blocks = torch.as_tensor(rows).reshape(-1, block.bytes)
    scales = blocks[:, block.scale:block.scale + block.scale_bytes].view(whole) & exponents
    return bool(scales.view(torch.int16).max() < 0x7C00)


def fault_of(made, most: float = math.inf) -> str:
    """What is wrong with what an `Unread` made, in words, or "". Floats of matrices must be below `most`."""
    for packing, rows in getattr(made, "parts", ()):
        if not scales_are_finite(packing, rows):
            return f"a {packing.upper()} scale that is NaN or infinite"
    if hasattr(made, "parts"):
        return ""
    for tensor in made if isinstance(made, tuple) else (made,):
        if not all_below(tensor):
            return f"a value that is NaN or infinite in {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.ndim > 1 and not all_below(tensor, most):
            return f"a value of {most:,.0f} or more, which --quantize cannot pack"
    return ""


def refuse_faults(path: Path, settings: Settings, theirs: Mapping[str, tuple[int, ...]],
                  read: Callable[[Iterable[str], Cut], Any], cut: Cut, made, packed: bool):
    """ConfigError if what `read` made of `theirs`, the file's tensors and their shapes, has NaN or infinity,
    or will when `packed`. It names the first such tensor.

    Only the rank's part is checked, without the rows that pad a file's vocabulary."""
    most = MOST_QUANTIZED if packed and settings.quantize else math.inf
    fault, names = fault_of(made, most), list(theirs)
    if not fault and packed:
        fault = "a value that becomes infinite when packed"
    for name in names if fault and len(names) > 1 else ():
        shape, axes = theirs[name], len(cut.shape)
        rows = math.prod(shape[:len(shape) - axes + 1])  # of all experts
        with numpy.errstate(all="ignore"):
            alone = fault_of(read([name], Cut.whole((rows, *shape[len(shape) - axes + 1:]))), most)
        if alone:
            names, fault = [name], alone
            break
    if fault:
        raise ConfigError(f"{path}: {names[0]} has {fault}")

"""Tells the two layouts of GGUF's type 42 apart.

Both are called Q2_0. llama.cpp's has a scale for 64 weights. Files that PrismML's fork wrote until June 2026
have one for 128, and the same number. No header says which, but the distances between tensors do."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError, shown
from chatlm.common.files import truncated
from chatlm.worker.arrays.gguf_types import NUMBERED, TYPES, GgufType, block_of

if TYPE_CHECKING:
    from chatlm.worker.weights.formats.gguf.header import TensorInfo

NUMBER = 42
LAYOUTS = "Q2_0", "Q2_0_G128"  # by name, because as numbers they are equal
SCALES = "a scale for 64 weights (llama.cpp) or for 128 (older files of PrismML's fork)"


def kinds_of(path: Path, infos: Sequence[TensorInfo], room: int, alignment: int) -> list[GgufType]:
    """The type of each tensor. ConfigError if those of number 42 fit neither layout, or both.

    room: the bytes from the beginning of the first tensor to the file's end."""
    offsets = sorted({info.offset for info in infos})
    possible = list(LAYOUTS)
    twofold = [info for info in infos if info.number == NUMBER]
    for info in twofold:
        after = bisect_right(offsets, info.offset)
        is_last = after == len(offsets)
        distance = (room if is_last else offsets[after]) - info.offset
        fitting = layouts_of(info, distance, alignment, is_last)
        if is_last and distance < min(info.bytes_as(TYPES[name]) for name in fitting):
            raise truncated(path, distance, f"and the tensor {shown(info.name)} has more bytes")
        possible = [name for name in possible if name in fitting]
        if not possible:
            raise ConfigError(f"{path}: the tensor {shown(info.name)} is of type 42, Q2_0, with {SCALES}; "
                              f"its {distance:,} bytes fit neither, or other tensors have the other")
    if twofold and len(possible) > 1:
        raise ConfigError(f"{path}: the tensor {shown(twofold[0].name)} is of type 42, Q2_0, with {SCALES}; "
                          "the file does not tell which, for its tensors of this type are too small")
    return [TYPES[possible[0]] if info.number == NUMBER else NUMBERED[info.number] for info in infos]


def layouts_of(info: TensorInfo, distance: int, alignment: int, is_last: bool) -> list[str]:
    """The names of the layouts whose bytes fill the distance to the next tensor, or to the end of the file.

    What follows the last tensor may be anything: if none fills it, each may be right."""
    whole = [name for name in LAYOUTS if info.sizes[0] % block_of(name)[0] == 0] or [LAYOUTS[0]]
    fitting = []
    for name in whole:
        size = info.bytes_as(TYPES[name])
        padded = -(-size // alignment) * alignment
        if distance == padded or is_last and distance == size:
            fitting.append(name)
    return fitting or (whole if is_last else [])

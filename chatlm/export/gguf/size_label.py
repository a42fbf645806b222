"""`size_label`: a model's size in a word, such as 135M, as llama.cpp's converter writes it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatlm.export.gguf.mixes import TensorInfo

UNITS = (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")


def size_label(matrices: Iterable[TensorInfo]) -> str:
    """The number of weights, with at least two digits."""
    count = sum(math.prod(matrix.sizes) for matrix in matrices)
    unit, letter = next((row for row in UNITS if count > row[0]), UNITS[-1])
    scaled = count / unit
    digits = len(str(round(scaled)).lstrip("0"))
    return f"{scaled:.{max(2 - digits, 0)}f}{letter}"

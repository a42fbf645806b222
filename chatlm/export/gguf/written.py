"""`Written`: a model that is to be written as one file, its metadata and its tensors, yet to be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy

from chatlm.export.gguf.encoding import Value
from chatlm.export.gguf.mixes import Matrix, Shape


class WrittenTensor(NamedTuple):
    """A tensor of the model. Its rows are those of all its matrices, one after the other."""

    matrix: Matrix
    rows: Callable[[int, int], numpy.ndarray]             # (begin, end) -> float32 (end - begin, K)
    raw: Callable[[int, int], numpy.ndarray] | None       # the same as bytes of its type, if it has them

    @property
    def columns(self) -> int:
        return self.matrix.sizes[0]

    @property
    def count(self) -> int:
        """How many rows it has."""
        count = 1
        for size in self.matrix.sizes[1:]:
            count *= size
        return count

    @property
    def rows_of_matrix(self) -> int:
        return self.matrix.sizes[1] if len(self.matrix.sizes) > 1 else 1


@dataclass(frozen=True)
class Written:
    """A model, ready to be written as one file."""

    metadata: dict[str, Value]
    tensors: tuple[WrittenTensor, ...]
    shape: Shape
    files: tuple[Path, ...]   # that it is read from
    is_quantized: bool        # is any of its tensors of a quantized type?

    def stamps(self) -> list[tuple]:
        """What tells these files from others of the same names."""
        found = []
        for path in self.files:
            stat = path.stat()
            found.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino))
        return found

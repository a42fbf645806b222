"""`ExportModel`: a model that is to be written as one file, its metadata and its tensors, yet to be read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy

from chatlm.export.gguf.encoding import Value
from chatlm.export.gguf.mixes import ModelShape, TensorInfo


class ExportTensor(NamedTuple):
    """A tensor of the model. Its rows are those of all its matrices, one after the other."""

    matrix: TensorInfo
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
class ExportModel:
    """A model, ready to be written as one file."""

    metadata: dict[str, Value]
    tensors: tuple[ExportTensor, ...]
    shape: ModelShape
    files: tuple[Path, ...]   # that it is read from
    is_quantized: bool        # is any of its tensors of a quantized type?

    def stamps(self) -> dict[str, tuple[int, int, int]]:
        """Inode, size and time of each file that is still there: what tells it from others of its name."""
        found = {}
        for path in self.files:
            with suppress(FileNotFoundError):
                stat = path.stat()
                found[str(path.resolve())] = stat.st_ino, stat.st_size, stat.st_mtime_ns
        return found

    def has_changed(self, before: dict[str, tuple[int, int, int]]) -> bool:
        """Was a file written to since then? One that was replaced or removed is still mapped as it was."""
        now = self.stamps()
        return any(name in now and now[name][0] == stamp[0] and now[name] != stamp
                   for name, stamp in before.items())

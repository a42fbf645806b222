"""What adapters change in the tensors of a model's files, and where a file has the matrices that they
name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy

from chatlm.worker.arrays.kinds import floats


class FileSlice(NamedTuple):
    """The rows and columns of a Hugging Face matrix that a file stores in its matrix `name`, in the file's
    order."""

    name: str
    rows: Any = slice(None)     # or indices
    columns: Any = slice(None)
    plus: float = 0.0           # what the file has added to each value: 1 to a norm that multiplies by 1 + w
    made_by: Callable[[numpy.ndarray], numpy.ndarray] | None = None  # a function of the matrix, if no slice,
    whole: tuple[int, ...] = ()  # and the shape of the matrix


class Change(NamedTuple):
    """What an adapter adds to a weight (N, K): scaling * b @ a, with rows in Hugging Face's order."""

    a: Any           # (rank, K)
    b: Any           # (N, rank)
    scaling: float
    embedding: bool  # its matrices are (rank, N) and (K, rank)
    made_by: Callable[[numpy.ndarray], numpy.ndarray] | None = None  # of scaling * b @ a, what is added

    def delta(self) -> numpy.ndarray:
        product = floats(self.b) @ floats(self.a) * numpy.float32(self.scaling)
        if self.made_by:
            return self.made_by(product)
        return product.T if self.embedding else product

    def at(self, part: FileSlice) -> Change:
        """The part that changes one of the file's matrices. An embedding is never split."""
        if part.made_by:
            return self._replace(made_by=part.made_by)
        return self if self.embedding else self._replace(a=self.a[:, part.columns], b=self.b[part.rows])

    def on(self, weight: numpy.ndarray, turned: Callable = lambda rows: rows) -> numpy.ndarray:
        """The weight plus the change, whose rows `turned` reorders first."""
        return floats(weight) + turned(self.delta())


class Copy(NamedTuple):
    """A whole matrix (N, K) or vector (N,) that replaces the model's. peft saves what modules_to_save names,
    and the embedding and the head if it cannot tell whether they are still the base's."""

    weight: Any

    def at(self, part: FileSlice) -> Copy:
        if part.made_by:
            return Copy(part.made_by(self.weight))
        rows = self.weight[part.rows]
        if rows.ndim == 1:
            return Copy(floats(rows) + numpy.float32(part.plus)) if part.plus else Copy(rows)
        return Copy(rows[:, part.columns])

    def on(self, weight: numpy.ndarray, turned: Callable = lambda rows: rows) -> numpy.ndarray:
        return turned(floats(self.weight))


def fused_slices(slices: Mapping[str, list[FileSlice]], shapes: Mapping[str, tuple],
                 fused: Iterable[tuple[str, tuple[str, ...]]], layers: int) -> dict[str, list[FileSlice]]:
    """`slices` (by Hugging Face's names) and more for each matrix that the folder stores `fused`, made of the
    slices of its parts. `shapes` are by the file's names."""
    more = {}
    for theirs, parts in ((name.format(layer), [part.format(layer) for part in parts])
                          for name, parts in fused for layer in range(layers)):
        if all(part in slices for part in parts):
            at = [file_slice.name for part in parts for file_slice in slices[part]]
            ends = list(itertools.accumulate((shapes[name][0] for name in at), initial=0))
            more[theirs] = [FileSlice(name, slice(*rows)) for name, rows in zip(at, itertools.pairwise(ends))]
    return {**slices, **more}

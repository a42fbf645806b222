"""`ArrayTensors`: our tensors, to be made of arrays, packed weights and MXFP4 when they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence as Seq
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError
from chatlm.worker.arrays.gguf_types import block_of
from chatlm.worker.arrays.kinds import as_kind, contiguous, item_bytes, joined
from chatlm.worker.arrays.packed import dequantized
from chatlm.worker.model.tensors import TILE_ROWS, Cut, MappedRows, Unread
from chatlm.worker.weights.files.finite import refuse_faults
from chatlm.worker.weights.formats.sources import of_rows
from chatlm.worker.weights.packed.layouts import NotExact, PackedWeight
from chatlm.worker.weights.packed.mxfp4 import Mxfp4
from chatlm.worker.weights.packed.rows import cut_stored, divides_blocks, in_narrow_blocks

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.worker.weights.formats.sources import Made, Sources


def unchanged(name: str, tensor: Any) -> Any:
    return tensor


@dataclass(frozen=True)
class ArrayTensors:
    """How our tensors are made of the rows of a file's when they are read: matrices as `dtype`, vectors as
    float32.

    Packed matrices stay packed where `as_stored` is given and they fit its blocks."""

    path: Path
    settings: Settings
    state: Mapping[str, Any]  # arrays, PackedWeight and Mxfp4 by the file's names
    dtype: str
    changed: Callable[[str, Any], Any] = unchanged  # a tensor -> its values in our order
    as_stored: Callable | None = None               # makes a matrix of packed blocks
    # the rows of a PackedWeight's blocks -> the same in our order; NotExact if it has to become floats
    kept: Callable[[str, numpy.ndarray], numpy.ndarray] = unchanged
    # one of ours -> what makes it of the file's tensor, of which it is not just some rows
    made_by: Callable[[str], Made | None] = of_rows

    def of(self, sources: Sources) -> dict[str, Unread | MappedRows]:
        tensors: dict[str, Unread | MappedRows] = {}
        for ours, (shape, theirs) in sources.items():
            if ours == "layer_embed":
                tensors[ours] = self.mapped_table(next(iter(theirs)))
            else:
                tensors[ours] = self.unread(shape, theirs, self.made_by(ours))
        return tensors

    def mapped_table(self, name: str) -> MappedRows:
        table = self.state[name]
        if isinstance(table, PackedWeight):
            raise ConfigError(f"{self.path}: {name} is packed; it must be float32, float16 or bfloat16, "
                              "because its rows are read from the file")
        return MappedRows.of_floats(table)

    def unread(self, shape: tuple[int, ...], theirs: Mapping[str, tuple[int, ...]],
               made_by: Made | None) -> Unread:
        """One of our tensors, made of the rows of `theirs`, or by a function of these."""
        parts = [self.state[name] for name in theirs]
        target = "float32" if len(shape) == 1 else self.dtype
        size = math.prod(shape) * item_bytes(target)
        make = as_in_file = partial(self.read, target)
        if made_by:
            make = partial(self.read, target, made_by=made_by)
        elif isinstance(parts[0], Mxfp4):
            make = self.read_mxfp4
            if self.as_stored:
                size = math.prod(shape) * 17 // 32
        elif self.as_stored and any(isinstance(part, PackedWeight) for part in parts):
            if in_tiles := tile_bytes(parts):
                make = partial(self.read_tiles, self.as_stored)
                size = in_tiles
        check = partial(refuse_faults, self.path, self.settings, theirs, make)
        alone = as_in_file if made_by else make
        return Unread(Cut.whole(shape), partial(make, theirs), size, mapped_by(parts), check, (alone, theirs))

    def read(self, target: str, theirs: Iterable[str], cut: Cut, made_by: Made | None = None):
        """The rows of `theirs` as floats of type `target`, as far as the cut has them. A vocabulary's padding
        is dropped."""
        stacked = (self.changed(name, self.state[name]) for name in theirs)
        if made_by:
            stacked = map(made_by, stacked)
        stacked = (tensor.reshape(-1, *tensor.shape[tensor.ndim - len(cut.shape) + 1:]) for tensor in stacked)
        rows = tuple(as_kind(contiguous(part), target) for _, part in cut.apply(stacked))
        return rows if len(cut.shape) > 1 and cut == Cut.whole(cut.full) else joined(rows)

    def read_mxfp4(self, theirs: Iterable[str], cut: Cut):
        make = self.as_stored or partial(dequantized, kind=self.dtype)
        return make(cut.shape, cut_stored([(self.state[name], None) for name in theirs], cut))

    def read_tiles(self, make: Callable, theirs: Iterable[str], cut: Cut):
        """Packed matrices as tiles hold them, or as floats where one does not fit or the cut divides one's
        blocks."""
        try:
            stored = [self.state[name].as_blocks(partial(self.kept, name)) for name in theirs]
            if cut.axis and divides_blocks(cut, stored):
                stored = [in_narrow_blocks(tensor) for tensor in stored]
            if cut.axis and divides_blocks(cut, stored):
                raise NotExact
        except NotExact:
            return self.read(self.dtype, theirs, cut)
        return make(cut.shape, cut_stored([(tensor, None) for tensor in stored], cut))


def mapped_by(parts: Iterable[Any]) -> tuple[numpy.ndarray, ...]:
    """The file's tensors that a matrix is made of."""
    mapped = []
    for part in parts:
        if isinstance(part, Mxfp4):
            mapped += [part.blocks, part.scales]
        elif isinstance(part, PackedWeight):
            mapped += part.layout.mapped
        else:
            mapped.append(part)
    return tuple(mapped)


def tile_bytes(parts: Seq[Any]) -> int:
    """The bytes of packed matrices that form one, as tiles; 0 if no tiles hold them together."""
    kinds = {getattr(getattr(part, "layout", None), "kind", "") for part in parts}
    if "" in kinds:
        return 0
    if len(kinds) > 1:
        row = 0
        for part in parts[:-1]:
            row += len(part)
            if row % TILE_ROWS:  # the next one begins within a tile, which has one type
                return 0
    total = 0
    for part in parts:
        columns, size = block_of(part.layout.kind)
        total += part.shape[0] * part.shape[1] // columns * size
    return total

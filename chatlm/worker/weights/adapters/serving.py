"""LoRA adapters that are served beside their base model, in the form that the base's products need."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn, TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError, printable
from chatlm.worker.arrays import kinds
from chatlm.worker.arrays.kinds import FLOATS, AdapterMatrix, as_kind, bits_of, contiguous, kind_of, zeros
from chatlm.worker.model.tensors import Cut, Unread
from chatlm.worker.weights.adapters.lora import read_adapter, whole_shapes
from chatlm.worker.weights.changes import Change
from chatlm.worker.weights.formats.sources import file_shapes

if TYPE_CHECKING:
    from chatlm.worker.weights.formats.stored_model import Adaptable
    from chatlm.worker.weights.loaded.model import LoadedModel

MERGE = "--lora merges it into the weights at load"


class RowChange(NamedTuple):
    """What an adapter changes in some rows of one of our matrices."""

    first_row: int
    change: Change


class AdapterReader:
    """Reads adapter folders that peft wrote, as far as one rank of a model needs them."""

    def __init__(self, model: LoadedModel, adaptable: Adaptable):
        """Keeps no tensor of the model, so that they can be read and dropped afterwards."""
        self.adaptable = adaptable
        self.slices = adaptable.slices()
        first = adaptable.first_layer
        self.adapted = {*adaptable.adapted}
        self.cuts: dict[str, tuple[str, Cut]] = {}  # ours -> the whole model's name, the rank's part
        for own, tensor in model.tensors.items():
            layer, dot, part = own.partition(".")
            if isinstance(tensor, Unread) and len(tensor.cut.shape) == 2:
                self.cuts[own] = f"{int(layer) + first}.{part}" if dot else own, tensor.cut

    def read(self, folder: Path) -> dict[str, AdapterMatrix]:
        """Our matrices' names -> what the adapter adds to their products. ConfigError for an adapter that can
        only be merged."""
        slices = self.slices
        unread = self.adaptable.ignored
        shapes = file_shapes(self.adaptable.sources) | unread
        whole = whole_shapes(shapes, slices)
        if self.adaptable.tied:
            embed, head = self.adaptable.tied
            whole[head] = whole[embed]
        parts: dict[str, list[RowChange]] = {}  # by the whole model's names
        rows = {theirs: (ours, before) for ours, (_, all_of) in self.adaptable.sources.items()
                for theirs, before in zip(all_of, rows_before(all_of.values()))}
        added = read_adapter(folder, whole | unread, self.adaptable.names)
        for theirs, changes in added.items():
            for change in changes if theirs not in unread else ():
                if not isinstance(change, Change):
                    raise ConfigError(f"{folder} contains a whole matrix {theirs.removesuffix('.weight')} "
                                      f"(modules_to_save), which cannot be served without merging; {MERGE}")
                if theirs in self.adaptable.tied:
                    self._refuse(folder, theirs)
                for file_slice in slices[theirs]:
                    ours, before = rows[file_slice.name]
                    self._refuse_part(folder, theirs, ours, change)
                    moved = change.at(file_slice)
                    moved = moved._replace(b=self.adaptable.turned(file_slice.name, moved.b))
                    parts.setdefault(ours, []).append(RowChange(before, moved))
        return {own: joined(parts[ours], cut) for own, (ours, cut) in self.cuts.items() if ours in parts}

    def _refuse_part(self, folder: Path, theirs: str, ours: str, change: Change):
        if change.embedding or ours not in self.adapted:
            self._refuse(folder, theirs)

    def _refuse(self, folder: Path, theirs: str) -> NoReturn:
        module = printable(theirs.removesuffix(".weight"))
        raise ConfigError(f"{folder} changes {module}, which cannot be done without merging; {MERGE}")


def rows_before(shapes: Iterable[tuple[int, ...]]) -> list[int]:
    """How many rows precede each of the parts that make up a matrix."""
    rows = 0
    before = []
    for shape in shapes:
        before.append(rows)
        rows += shape[0]
    return before


def joined(parts: list[RowChange], cut: Cut) -> AdapterMatrix:
    """The parts of one matrix as one, limited to a rank's share."""
    types = {kind_of(array) for part in parts for array in (part.change.a, part.change.b)}
    kind = types.pop() if len(types) == 1 else "float32"
    kind = kind if kind in FLOATS else "float32"
    a = kinds.joined([as_kind(part.change.a, kind) for part in parts])
    b = zeros((cut.full[0], len(a)), kind)
    scales = numpy.empty(len(a), numpy.float32)
    rank = 0
    for first, (own_a, own_b, scaling, *_) in parts:
        ranks = slice(rank, rank := rank + len(own_a))
        bits_of(b)[first:first + len(own_b), ranks] = bits_of(as_kind(own_b, kind))
        scales[ranks] = scaling
    pieces = [piece for _, piece in cut.apply([a if cut.axis else b])]
    a, b = (kinds.joined(pieces), b) if cut.axis else (a, kinds.joined(pieces))
    return AdapterMatrix(contiguous(a), contiguous(b), scales)


def adapter_reader(model: LoadedModel) -> Callable[[Path], dict[str, AdapterMatrix]] | None:
    """What reads adapters for a rank's share of a model; None if the model accepts none. Call it before the
    weights are read."""
    return AdapterReader(model, model.adaptable).read if model.adaptable else None


def reading_thread() -> ThreadPoolExecutor:
    """A thread that reads adapters' files at low priority, so that steps come first (on Linux)."""
    def yield_to_steps():
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)

    return ThreadPoolExecutor(1, "adapters", yield_to_steps)

"""`GgufTensors`: our tensors, to be made of a GGUF file's when they are read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence as Seq
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TYPE_CHECKING

import numpy

from chatlm.common.errors import require_library
from chatlm.common.sizes import shown_bytes
from chatlm.worker.arrays.gguf_types import TYPES, GgufType, block_of
from chatlm.worker.arrays.kinds import as_kind, contiguous, floats, item_bytes, joined
from chatlm.worker.arrays.packed import RopePairs, dequantize, dequantized, unpermute_rope
from chatlm.worker.model.tensors import Cut, MappedRows, Unread
from chatlm.worker.weights.files.finite import refuse_faults
from chatlm.worker.weights.formats.sources import of_rows
from chatlm.worker.weights.packed.rows import as_rows, cut_stored

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.worker.weights.changes import Change, Copy
    from chatlm.worker.weights.formats.sources import Made, Sources
    from chatlm.worker.weights.formats.stored_model import Storage

FLOAT_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class GgufTensors:
    """How our tensors are made of a file's (gguf.header.GgufTensor) when they are read.

    Where matrices stay packed, the backend makes them in the file's type or one close to it."""

    path: Path
    settings: Settings
    stored: Mapping[str, Any]
    storage: Storage
    pairs: RopePairs | None = None          # of q and k, if the file has them adjacent, not half-split
    adapter_pairs: RopePairs | None = None  # likewise of what adapters change
    added: Mapping[str, list[Change | Copy]] = field(default_factory=dict)  # by adapters, to a file's tensor
    # one of ours -> what makes it of the file's tensor, of which it is not just some rows
    made_by: Callable[[str], Made | None] = of_rows

    @property
    def packed(self) -> bool:
        return self.storage.dtype is None

    def of(self, sources: Sources) -> dict[str, Unread | MappedRows]:
        tensors: dict[str, Unread | MappedRows] = {}
        for ours, (shape, theirs) in sources.items():
            if ours == "layer_embed":
                tensors[ours] = mapped_table(self.stored[next(iter(theirs))])
            else:
                tensors[ours] = self.unread(shape, theirs, self.made_by(ours))
        return tensors

    def unread(self, shape: tuple[int, ...], theirs: Mapping[str, tuple[int, ...]],
               made_by: Made | None) -> Unread:
        """One of our tensors, made of the rows of `theirs`, or by a function of their values."""
        read = partial(self.read_made, made_by) if made_by else self.read
        check = partial(refuse_faults, self.path, self.settings, theirs, read)
        mapped = tuple(self.stored[name].data for name in theirs)
        return Unread(Cut.whole(shape), partial(read, theirs), self.held_bytes(shape, theirs), mapped,
                      check, (self.read, theirs))

    def held_bytes(self, shape: tuple[int, ...], theirs: Iterable[str]) -> int:
        """What one of our tensors takes in memory."""
        is_matrix = len(shape) > 1
        if not (self.packed and len(shape) == 2):
            dtype = self.storage.dtype if is_matrix else None
            return math.prod(shape) * item_bytes(dtype or "float32")
        # older builds of decode_core lack held_bytes
        bytes_of = getattr(self.storage.backend, "held_bytes", file_bytes)
        return bytes_of([SimpleNamespace(tensor_type=self.type_of(name), shape=self.stored[name].shape)
                         for name in theirs])

    def type_of(self, name: str) -> GgufType:
        """The type of a file's tensor, once adapters are merged into it."""
        tensor = self.stored[name]
        return merged_type(tensor, self.packed) if name in self.added else tensor.tensor_type

    def read(self, theirs: Iterable[str], cut: Cut):
        """The rows of `theirs` as far as the cut has them."""
        parts = cut_stored([self.part(name, cut.shape) for name in theirs], cut)
        is_matrix = len(cut.shape) == 2
        if self.storage.as_stored and is_matrix:
            return self.storage.as_stored(cut.shape, parts)
        dtype = self.storage.dtype if is_matrix else None
        return dequantized(cut.shape, parts, dtype or "float32")

    def read_made(self, made_by: Made, theirs: Iterable[str], cut: Cut):
        """What a function makes of the values of a file's matrix, as far as the cut has it.

        Packed values are packed anew, since their columns may be others."""
        [name] = theirs
        tensor = self.stored[name]
        values = dequantized(file_shape(name, tensor), [(tensor, None)], "float32")
        for change in self.added.get(name, ()):
            values = change.on(values)
        rows = contiguous(joined([part for _, part in cut.apply([made_by(values)])]))
        if not self.storage.as_stored:
            return as_kind(rows, self.storage.dtype or "float32")
        is_packed = tensor.tensor_type.name not in FLOAT_TYPES and rows.shape[1] % 32 == 0
        gguf_type = TYPES["Q8_0" if is_packed else "F32"]
        data = require_library("gguf", "packed weights").quantize(rows, gguf_type)
        part = SimpleNamespace(tensor_type=gguf_type, data=data, shape=numpy.array(rows.shape[::-1]))
        return self.storage.as_stored(cut.shape, [(part, None)])

    def part(self, name: str, shape: tuple[int, ...]) -> tuple[Any, RopePairs | None]:
        """A file's tensor for `cut_stored`, with the pairs that are still to be brought into our order."""
        turns = re.search(r"attn_[qk](_norm)?\.", name)
        pairs = self.pairs if turns else None
        if name not in self.added:
            return as_rows(self.stored[name], shape), pairs
        adapter_pairs = self.adapter_pairs if turns else None
        return merged(self.stored[name], pairs, self.added[name], adapter_pairs, self.packed), None


def mapped_table(tensor) -> MappedRows:
    table = numpy.asarray(tensor.data)
    gguf_type = tensor.tensor_type
    if gguf_type.name in FLOAT_TYPES:
        return MappedRows.of_floats(dequantize(gguf_type, table))
    return MappedRows(table, gguf_type.name.lower(),
                      lambda rows: floats(dequantize(gguf_type, rows)).reshape(len(rows), -1))


def merged(tensor, pairs: RopePairs | None, changes: Iterable[Change | Copy],
           adapter_pairs: RopePairs | None, packed: bool) -> Any:
    """A matrix in our order with its adapters' changes, whose rows have `adapter_pairs`; a `packed` one
    becomes Q8_0. A vector stays one of floats."""
    shape = tuple(reversed(tensor.shape.tolist()))
    if len(shape) > 2:  # a matrix for each head
        shape = math.prod(shape[:-1]), shape[-1]
    values = dequantized(shape, [(as_rows(tensor, shape), pairs)], "float32")
    for change in changes:
        values = change.on(values, partial(unpermute_rope, pairs=adapter_pairs))
    gguf_type = merged_type(tensor, packed)
    data = require_library("gguf", "an adapter").quantize(values, gguf_type)
    return SimpleNamespace(tensor_type=gguf_type, data=data, shape=tensor.shape)


def merged_type(tensor, packed: bool) -> GgufType:
    return TYPES["Q8_0" if packed and tensor.tensor_type.name not in FLOAT_TYPES else "F32"]


def file_shape(name: str, tensor) -> tuple[int, ...]:
    """The shape of a gguf.header.GgufTensor, rows first; vectors of Mamba layers may be (H, 1), (groups, ..).

    llama.cpp's converter writes a shared expert's gate as (1, width), llama-quantize as (width,). Latents
    have a matrix for each head, which here is one of all heads."""
    if name.endswith(".ffn_gate_inp_shexp.weight"):
        return 1, int(tensor.n_elements)
    if name.endswith((".ssm_a", ".ssm_d", ".ssm_norm.weight")):
        return (int(tensor.n_elements),)
    if name.endswith((".attn_k_b.weight", ".attn_v_b.weight")):
        return int(tensor.n_elements) // int(tensor.shape[0]), int(tensor.shape[0])
    return tuple(reversed(tensor.shape.tolist()))


def file_bytes(tensors: Seq) -> int:
    """The tensors' size in a GGUF file."""
    total = 0
    for tensor in tensors:
        block, size = block_of(tensor.tensor_type.name)
        total += math.prod(tensor.shape.tolist()) // block * size
    return total


MIXED_BYTES = 0.6  # per weight in a typical Q4_K_M file


def details_of(types: Counter[str], sources: Sources, stored: Mapping, storage: Storage) -> str:
    """How many tensors of each type a file has, and which of `stored` the kernels convert, for the log."""
    counts = ", " + ", ".join(f"{count} {name}" for name, count in types.most_common())
    return counts + (storage.backend.converted(sources, stored) if storage.dtype is None else "")


def growth(tensors: Mapping[str, Unread | MappedRows], stored: Mapping, packed: bool) -> str:
    """A note if the weights take much more memory than `stored`, the file's tensors to be read; "" if not."""
    held = sum(tensor.nbytes for tensor in tensors.values())
    on_disk = sum(tensor.n_bytes for tensor in stored.values())
    if held < 1.1 * on_disk:
        return ""
    small = MIXED_BYTES * sum(tensor.n_elements for tensor in stored.values())
    reason = "torch dequantizes its matrices, which decode_core would keep packed"
    smaller = ""
    if packed:
        reason = "types that have no kernels here become Q8_0, and TQ1_0 takes 2 bits a weight"
        if small < 0.9 * held:
            smaller = f"; a file of type Q4_K_M would take about {shown_bytes(small)}"
    return (f"The file's {shown_bytes(on_disk)} of weights take {shown_bytes(held)} in memory: "
            f"{reason}{smaller}")

"""Pads a model with zeros where decode_core needs multiples of 16.

Heads: a head of D numbers becomes one of D', the next multiple of 16. The added rows of q, k and v are zeros,
and so are the columns of the output matrix that read them. So all scores and sums stay what they were. Only
what divides by D changes: the scores (`q_scale`), and the norms of q and k (their eps and weights).

Feed-forward blocks: the first matrix gets rows of zeros, the second columns of zeros.

The residual stream: C numbers are followed by zeros, because all that is added to them ends with zeros. Its
RMS norms change as those of heads do, and LayerNorms count only the first C numbers.

The blocks of a model state how they grow (`Model.padded`). Here their tensors grow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple, TYPE_CHECKING

import numpy

from chatlm.common.errors import require_library
from chatlm.worker.arrays.kinds import AdapterMatrix, as_kind, bits_of, joined, kind_of, zeros
from chatlm.worker.arrays.gguf_types import TYPES
from chatlm.worker.arrays.packed import dequantized
from chatlm.worker.model.tensors import Cut, Unread

if TYPE_CHECKING:
    from chatlm.worker.model.blocks.model import Model


class Padding(NamedTuple):
    """Where the numbers of a tensor go in the padded tensor, along each axis. None: they do not move."""

    shape: tuple[int, ...]   # of the padded tensor
    places: tuple[numpy.ndarray | None, ...]
    factor: float = 1.0      # of a norm's weights

    def spread(self, array: numpy.ndarray, axis: int) -> numpy.ndarray:
        """An array with zeros between its numbers along one axis."""
        places = self.places[axis]
        if places is None:
            return array
        made = zeros((*array.shape[:axis], self.shape[axis], *array.shape[axis + 1:]), kind_of(array))
        bits_of(made)[(slice(None),) * axis + (places,)] = bits_of(array)
        return made

    def apply(self, read: Any) -> Any:
        """Pad what the `read` of a tensor returned: an array, several with its rows, or packed blocks."""
        if hasattr(read, "parts"):
            return self.of_blocks(read)
        array = joined(read) if isinstance(read, tuple) else read
        for axis in range(array.ndim):
            array = self.spread(array, axis)
        return array if self.factor == 1 else array * numpy.float32(self.factor)

    def of_blocks(self, matrix: Any) -> Any:
        """Pad a QuantizedMatrix of decode_core. If columns move it becomes Q8_0, or floats if none fits."""
        parts = matrix.parts
        rows = self.places[0]
        columns = self.places[1]
        if columns is not None:
            gguf = require_library("gguf", "packed weights")
            blocks = [(SimpleNamespace(tensor_type=TYPES[kind.upper()], data=data), None)
                      for kind, data in parts]
            values = self.spread(dequantized(matrix.shape, blocks, "float32"), 1)
            if self.shape[1] % 32:
                return self.spread(as_kind(values, "bfloat16"), 0)
            parts = (("q8_0", gguf.quantize(values, TYPES["Q8_0"])),)
        if rows is not None:
            wide = self.rows_of_blocks([data for _, data in parts], rows)
            parts = tuple((kind, data) for (kind, _), data in zip(parts, wide))
        return type(matrix)(parts, self.shape[1])

    def rows_of_blocks(self, parts: list[numpy.ndarray], rows: numpy.ndarray) -> list[numpy.ndarray]:
        """Each part with rows of zeros between and after its own. In every type, zero bytes are zeros."""
        done = 0
        made = []
        for data in parts:
            first = int(rows[done]) if done else 0
            end = int(rows[done + len(data)]) if done + len(data) < len(rows) else self.shape[0]
            wide = numpy.zeros((end - first, data.shape[1]), data.dtype)
            wide[rows[done:done + len(data)] - first] = data
            made.append(wide)
            done += len(data)
        return made


def padded_tensors(model: Model, tensors: dict) -> dict:
    """The tensors of the padded model. Unread ones are padded when they are read. Empties `tensors`."""
    found = {}
    for name, padding in model.paddings().items():
        if name not in tensors:
            continue
        tensor = tensors.pop(name)
        if isinstance(tensor, Unread):
            found[name] = padded_unread(tensor, padding)
        else:
            found[name] = padding.apply(tensor)
    found |= tensors
    tensors.clear()
    return found


def padded_unread(tensor: Unread, padding: Padding) -> Unread:
    size = tensor.nbytes * math.prod(padding.shape) // math.prod(tensor.cut.shape)
    return Unread(Cut.whole(padding.shape), lambda cut: padding.apply(tensor.read()), size, (),
                  lambda cut, read, packed: tensor.refuse_faults(tensor.read(), packed))


def padded_adapter(model: Model, matrices: Mapping[str, AdapterMatrix]) -> dict[str, AdapterMatrix]:
    """An adapter's matrices for the padded model, named after what they change."""
    found = model.paddings()
    return {name: matrix if name not in found else padded_matrix(matrix, found[name])
            for name, matrix in matrices.items()}


def padded_matrix(matrix: AdapterMatrix, padding: Padding) -> AdapterMatrix:
    a, b, scales = matrix
    rows, columns = padding.shape
    return AdapterMatrix(padding._replace(shape=(len(a), columns)).spread(a, 1),
                         padding._replace(shape=(rows, b.shape[1])).spread(b, 0), scales)

"""A model's weights on their way into tiles. Matrices of a GGUF file keep their types, or get close ones."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TYPE_CHECKING

import numpy

from chatlm.worker.arrays.kinds import as_kind
from chatlm.worker.arrays.packed import dequantize, dequantized, i8_as_q8_0, unpermute_rope
from chatlm.worker.kernels import cuda
from chatlm.worker.kernels.arrays import kind_of
from chatlm.worker.kernels.library import _core
from chatlm.worker.kernels.tiles import COLUMNS, FROM_FILES, KINDS as KIND_CODES, TILE_ROWS, Arena, Matrix

if TYPE_CHECKING:
    from chatlm.worker.arrays.packed import RopePairs

# GGUF's type -> the type in which it is held
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "bfloat16"}
# GGUF's types that tiles hold as they are
KEPT_TYPES = tuple(kind.upper() for kind in COLUMNS if kind not in ("f32", "f16", "bf16"))
KEPT_ON_CUDA = tuple(kind for kind in KEPT_TYPES if kind.lower() not in FROM_FILES)
CONVERTED = "Q8_0"          # all other types become this one, whose error is small compared with theirs
# name of an array's type -> kind of tiles.py
KINDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
# type -> the type that replaces it where a width is no multiple of 256
NARROW = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl", "q3_k": "q4_0", "q2_k": "q4_0"}


@dataclass(frozen=True)
class QuantizedMatrix:
    """Weights (N, K) as in GGUF files, in rows of blocks. Its parts lie one below the other, and may differ
    in type."""

    parts: tuple[tuple[str, Any], ...]      # (kind, rows (n, bytes of a row) uint8, numpy)
    columns: int                            # K

    @property
    def kind(self) -> str:
        return " with ".join(sorted({kind for kind, _ in self.parts}))

    @property
    def shape(self) -> tuple[int, int]:
        return sum(len(rows) for _, rows in self.parts), self.columns


def file_values(kind: str, rows: numpy.ndarray) -> numpy.ndarray:
    """The values (n, columns) float32 of blocks (n, bytes of a row), by the reference.

    Most types need the gguf package: ImportError without it."""
    name: Any = SimpleNamespace(name=kind.upper())
    if kind not in ("q8_0", "q4_0", "q4_1", "q1_0", "q2_0", "q2_0_g128", "i8_row", *cuda.OWN):
        import gguf
        name = gguf.GGMLQuantizationType[name.name]
    return dequantize(name, rows).reshape(len(rows), -1)


def becomes(tensors: Sequence[Any], rows: Sequence[int], kept_types: Sequence[str] = KEPT_TYPES) -> list[str]:
    """The type that each of the GGUF tensors that form one matrix becomes. Floats stay floats only if all are
    of one type.

    rows            how many each tensor has
    kept_types      types that stay as they are"""
    kinds = [tensor.tensor_type.name for tensor in tensors]
    if len(set(kinds)) == 1 and kinds[0] in FLOATS:
        return ["BF16" if kind == "F32" else kind for kind in kinds]
    kept = [kind if kind in kept_types else CONVERTED for kind in kinds]
    if len(set(kept)) == 1:
        return kept
    row = 0
    for i, count in enumerate(rows[:-1]):
        row += count
        # the next tensor begins within a tile, and a tile has one type
        if row % TILE_ROWS:
            return kept[:i] + [CONVERTED] * len(kept[i:])
    return kept


def kinds_of(parts: Sequence[tuple[Any, RopePairs | None]],
             kept_types: Sequence[str] = KEPT_TYPES) -> list[str]:
    """The type that each (tensor, head size) becomes of those that form a matrix."""
    return becomes([tensor for tensor, _ in parts], [len(tensor.data) for tensor, _ in parts], kept_types)


def rows_in_file(tensor: Any) -> int:
    """How many rows a GGUF tensor has. Its shape has the columns first, and the matrices of experts lie one
    below the other."""
    return math.prod(tensor.shape[1:].tolist())


def converted(sources: Mapping[str, tuple], stored: Mapping[str, Any],
              kept_types: Sequence[str] = KEPT_TYPES) -> str:
    """In words, which matrices `as_stored` cannot keep in the file's type; "" when it keeps all."""
    changed = collections.defaultdict(list)
    for shape, theirs in sources.values():
        if len(shape) == 2:
            tensors = [stored[name] for name in theirs]
            for name, kind in zip(theirs,
                                  becomes(tensors, [rows_in_file(tensor) for tensor in tensors], kept_types)):
                if (was := stored[name].tensor_type.name) != kind:
                    changed[was, kind].append(name)
    return "".join(f"; re-quantized from {was} to {kind}: {len(names)} tensors "
                   f"({', '.join(names[:4])}{', ..' if len(names) > 4 else ''})"
                   for (was, kind), names in changed.items())


def held_bytes(tensors: Sequence[Any], row_bytes: Callable[[str, int], int],
               kept_types: Sequence[str] = KEPT_TYPES) -> int:
    """The bytes that the GGUF tensors forming one matrix will take; `row_bytes`: of a row of a kind with this
    many columns."""
    rows = [rows_in_file(tensor) for tensor in tensors]
    return sum(count * row_bytes(kind.lower(), int(tensor.shape[0]))
               for tensor, kind, count in zip(tensors, becomes(tensors, rows, kept_types), rows))


@functools.cache
def tile_row_bytes(kind: str, columns: int) -> int:
    """The bytes of a row's share of a tile."""
    return Matrix(Arena(1 << 20), kind, TILE_ROWS, columns).nbytes // TILE_ROWS


def file_row_bytes(kind: str, columns: int) -> int:
    return _core.row_bytes(KIND_CODES[kind], columns)


def as_stored(shape: tuple[int, int], parts: Sequence[tuple[Any, RopePairs | None]],
              kept_types: Sequence[str] = KEPT_TYPES) -> tuple[numpy.ndarray, ...] | QuantizedMatrix:
    """A matrix of (tensor, the pairs of its heads to reorder, or None), each in the file's type or one close
    to it.

    Rows that need no change stay in the file's mapped memory.
    """
    columns = shape[1]
    kinds = kinds_of(parts, kept_types)
    if kinds[0] not in FLOATS:
        rows = [(kind.lower(), rows_of(tensor, head_size, kind, columns))
                for (tensor, head_size), kind in zip(parts, kinds)]
        return QuantizedMatrix(tuple(rows), columns)
    floats = []
    for tensor, head_size in parts:
        values = dequantize(tensor.tensor_type, numpy.asarray(tensor.data))
        values = unpermute_rope(values, head_size).reshape(-1, columns)
        floats.append(as_kind(values, FLOATS[tensor.tensor_type.name]))
    return tuple(floats)


def rows_of(tensor: Any, head_size: RopePairs | None, kind: str, columns: int) -> Any:
    """The rows of a GGUF tensor as blocks of `kind`, (n, bytes of a row) uint8."""
    if tensor.tensor_type.name == kind:
        return unpermute_rope(numpy.asarray(tensor.data), head_size)
    if tensor.tensor_type.name == "I8_ROW" and kind == "Q8_0":
        narrow = i8_as_q8_0(numpy.asarray(tensor.data))
        if narrow is not None:
            return unpermute_rope(narrow, head_size)
    import gguf
    values = dequantized((len(tensor.data), columns), [(tensor, head_size)], "float32")
    return gguf.quantize(values, gguf.GGMLQuantizationType[kind])


def pack(arena: Arena, name: str, parts: Sequence[Any], quantize: str | None,
         tied_head: bool) -> Any:
    """The matrix `name` (N, K) in tiles, or the bias of gate_up (N,) in the order of its tiles.

    parts       one QuantizedMatrix, or arrays of one type: their rows are those of the matrix
    quantize    None, or the type that float matrices become, except small ones
    """
    weight = parts[0]
    quantized = isinstance(weight, QuantizedMatrix)
    if not quantized and name.endswith("_bias"):        # gates and ups alternate as their tiles do
        return weight.reshape(2, -1, TILE_ROWS).swapaxes(0, 1).reshape(-1)
    K = weight.shape[1]
    N = sum(part.shape[0] for part in parts)
    if name == "embed" and not (quantized or tied_head):
        return weight           # its rows are only looked up
    if quantized:
        pieces = weight.parts
    else:
        pieces = [(KINDS[kind_of("weights", part)], part) for part in parts]
    placed = place(in_whole_tiles(pieces), N // 2 if name.endswith("gate_up") else N)
    if quantized:
        kinds = [""] * -(-N // TILE_ROWS)
        for kind, rows, first, step in placed:
            tiles = -(-len(rows) // TILE_ROWS)
            kinds[first:first + tiles * step:step] = [kind] * tiles
        matrix = Matrix(arena, kinds if len(set(kinds)) > 1 else kinds[0], N, K)
    else:
        kind = pieces[0][0]
        if not name.endswith(("ve_gate", "router", "shared_gate")):         # these are small and stay floats
            kind = quantized_kind(quantize, kind, K)
        matrix = Matrix(arena, kind, N, K)
    for kind, rows, first, step in placed:
        matrix.fill(rows, kind, first_tile=first, tile_step=step)
    return matrix


def quantized_kind(quantize: str | None, kind: str, columns: int) -> str:
    """The type that float weights of `kind` become: `quantize`, else its narrow relative, else `kind`.

    The first whose blocks divide the columns is taken."""
    for name in (quantize, NARROW.get(quantize or "")):
        if name and columns % COLUMNS[name] == 0:
            return name
    return kind


def in_whole_tiles(pieces: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The pieces, where one that would begin within a tile is joined to the one before it. Both then have one
    type."""
    joined: list[tuple[str, Any]] = []
    for kind, rows in pieces:
        if joined and len(joined[-1][1]) % TILE_ROWS:
            before: Any = joined[-1][1]
            both = numpy.concatenate([part.view(numpy.ndarray) for part in (before, rows)])
            joined[-1] = kind, both.view(type(rows))
        else:
            joined.append((kind, rows))
    return joined


def place(pieces: Sequence[tuple[str, Any]], rows_together: int) -> list[tuple[str, Any, int, int]]:
    """Where each piece goes: (kind, rows, first tile, step from tile to tile).

    The rows of the pieces follow each other in a matrix of `rows_together` rows. If they are twice as many,
    the first half are gates and the others ups, and the tiles of the two alternate."""
    placed = []
    row = 0
    step = 2 if sum(len(rows) for _, rows in pieces) > rows_together else 1
    for kind, rows in pieces:
        begin = 0
        while begin < len(rows):
            half, within = divmod(row, rows_together)
            count = min(len(rows) - begin, rows_together - within)
            placed.append((kind, rows[begin:begin + count], half + within // TILE_ROWS * step, step))
            begin = begin + count
            row = row + count
    return placed

"""A model's weights on their way into tiles: a GGUF file's matrices in their own types or close ones."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy

from . import _core, cuda
from .arrays import kind_of
from .tiles import COLUMNS, FROM_FILES, KINDS as KIND_CODES, TILE_ROWS, Arena, Matrix

FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "bfloat16"}       # of GGUF, and as what they stay
KEPT_TYPES = tuple(kind.upper() for kind in COLUMNS if kind not in ("f32", "f16", "bf16"))     # of a GGUF file, in tiles
KEPT_ON_CUDA = tuple(kind for kind in KEPT_TYPES if kind.lower() not in FROM_FILES)
CONVERTED = "Q8_0"          # what all other types become: its error is small compared with theirs
KINDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}       # of tiles.py
# What takes the place of a type where a width is no multiple of 256
NARROW = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl", "q3_k": "q4_0", "q2_k": "q4_0"}


@dataclass(frozen=True)
class QuantizedMatrix:
    """Weights (N, K) as in GGUF files, in rows of blocks; its parts, one upon the other, may differ in type."""

    parts: tuple[tuple[str, Any], ...]      # (kind, rows (n, bytes of a row) uint8, numpy)
    columns: int                            # K

    @property
    def kind(self) -> str:
        return " with ".join(sorted({kind for kind, _ in self.parts}))

    @property
    def shape(self) -> tuple[int, int]:
        return sum(len(rows) for _, rows in self.parts), self.columns


def file_values(kind: str, rows: numpy.ndarray, script: SimpleNamespace) -> numpy.ndarray:
    """What chat_server's reference makes of blocks (n, bytes of a row), (n, columns) float32.

    ImportError without the gguf package, for most types."""
    name: Any = SimpleNamespace(name=kind.upper())
    if kind not in ("q8_0", "q4_0", "q4_1", *cuda.OWN):
        import gguf
        name = gguf.GGMLQuantizationType[name.name]
    return script.dequantize(name, rows).reshape(len(rows), -1)


def becomes(tensors: Sequence[Any], rows: Sequence[int], kept_types: Sequence[str] = KEPT_TYPES) -> list[str]:
    """What the GGUF tensors that form one matrix become, each: floats stay floats where all of them are alike.

    rows: of each tensor; kept_types: those that stay as they are."""
    kinds = [tensor.tensor_type.name for tensor in tensors]
    if len(set(kinds)) == 1 and kinds[0] in FLOATS:
        return ["BF16" if kind == "F32" else kind for kind in kinds]
    kept = [kind if kind in kept_types else CONVERTED for kind in kinds]
    row = 0
    for i, count in enumerate(rows[:-1] if len(set(kept)) > 1 else ()):
        row += count
        if row % TILE_ROWS:                         # the next one begins within a tile, which has one type
            return kept[:i] + [CONVERTED] * len(kept[i:])
    return kept


def kinds_of(parts: Sequence[tuple[Any, int]], kept_types: Sequence[str] = KEPT_TYPES) -> list[str]:
    """What the (tensor, head size) that form a matrix become, each."""
    return becomes([tensor for tensor, _ in parts], [len(tensor.data) for tensor, _ in parts], kept_types)


def rows_in_file(tensor: Any) -> int:
    """Of a GGUF tensor, whose shape has the columns first; the matrices of experts lie one upon the other."""
    return math.prod(tensor.shape[1:].tolist())


def converted(sources: Mapping[str, tuple], stored: Mapping[str, Any], kept_types: Sequence[str] = KEPT_TYPES) -> str:
    """In words, which matrices `as_stored` cannot keep in the file's type; "" when it keeps all."""
    changed = collections.defaultdict(list)
    for shape, theirs in sources.values():
        if len(shape) == 2:
            tensors = [stored[name] for name in theirs]
            for name, kind in zip(theirs, becomes(tensors, [rows_in_file(tensor) for tensor in tensors], kept_types)):
                if (was := stored[name].tensor_type.name) != kind:
                    changed[was, kind].append(name)
    return "".join(f"; re-quantized from {was} to {kind}: {len(names)} tensors "
                   f"({', '.join(names[:4])}{', ..' if len(names) > 4 else ''})"
                   for (was, kind), names in changed.items())


def held_bytes(tensors: Sequence[Any], row_bytes: Callable[[str, int], int], kept_types: Sequence[str] = KEPT_TYPES) -> int:
    """The bytes that the GGUF tensors forming one matrix will take; `row_bytes`: of a row of a kind with this many columns."""
    rows = [rows_in_file(tensor) for tensor in tensors]
    return sum(count * row_bytes(kind.lower(), int(tensor.shape[0]))
               for tensor, kind, count in zip(tensors, becomes(tensors, rows, kept_types), rows))


@functools.cache
def tile_row_bytes(kind: str, columns: int) -> int:
    """A row's share of a tile."""
    return Matrix(Arena(1 << 20), kind, TILE_ROWS, columns).nbytes // TILE_ROWS


def file_row_bytes(kind: str, columns: int) -> int:
    return _core.row_bytes(KIND_CODES[kind], columns)


def as_stored(shape: tuple[int, int], parts: Sequence[tuple[Any, int]],
              script: SimpleNamespace, kept_types: Sequence[str] = KEPT_TYPES) -> tuple[numpy.ndarray, ...] | QuantizedMatrix:
    """The (tensor, head size to turn or 0) that form a matrix, each in the file's type or one close to it.

    Rows that need no change lie in the file's mapped memory.
    """
    kinds = kinds_of(parts, kept_types)
    if kinds[0] in FLOATS:
        return tuple(script.as_kind(script.unpermute_rope(script.dequantize(tensor.tensor_type, numpy.asarray(tensor.data)), head_size)
                                          .reshape(-1, shape[1]), FLOATS[tensor.tensor_type.name]) for tensor, head_size in parts)
    return QuantizedMatrix(tuple((kind.lower(), rows_of(tensor, head_size, kind, shape[1], script))
                                 for (tensor, head_size), kind in zip(parts, kinds)), shape[1])


def rows_of(tensor: Any, head_size: int, kind: str, columns: int, script: SimpleNamespace) -> Any:
    """A GGUF tensor's rows as blocks of `kind`, (n, bytes) uint8."""
    if tensor.tensor_type.name == kind:
        return script.unpermute_rope(numpy.asarray(tensor.data), head_size)
    import gguf
    values = script.dequantized((len(tensor.data), columns), [(tensor, head_size)], "float32")
    return gguf.quantize(values, gguf.GGMLQuantizationType[kind])


def pack(arena: Arena, name: str, parts: Sequence[Any], quantize: str | None,
         tied_head: bool) -> Any:
    """The matrix `name` (N, K) in tiles, or gate_up's bias (N,) in their order; `quantize` names the type that large float matrices become.

    parts: one QuantizedMatrix, or arrays of one type, whose rows together are its rows.
    """
    weight = parts[0]
    quantized = isinstance(weight, QuantizedMatrix)
    if not quantized and name.endswith("_bias"):        # gates and ups alternate as their tiles do
        return weight.reshape(2, -1, TILE_ROWS).swapaxes(0, 1).reshape(-1)
    (_, K), N = weight.shape, sum(part.shape[0] for part in parts)
    if name == "embed" and not (quantized or tied_head):
        return weight           # rows are only looked up
    pieces = weight.parts if quantized else [
        (KINDS[kind_of("weights", part)], part) for part in parts]
    placed = place(in_whole_tiles(pieces), N // 2 if name.endswith("gate_up") else N)
    if quantized:
        kinds = [""] * -(-N // TILE_ROWS)
        for kind, rows, first, step in placed:
            tiles = -(-len(rows) // TILE_ROWS)
            kinds[first:first + tiles * step:step] = [kind] * tiles
        matrix = Matrix(arena, kinds if len(set(kinds)) > 1 else kinds[0], N, K)
    else:
        matrix = Matrix(arena, pieces[0][0] if name.endswith(("ve_gate", "router", "shared_gate")) else quantized_kind(quantize, pieces[0][0], K), N, K)
    for kind, rows, first, step in placed:
        matrix.fill(rows, kind, first_tile=first, tile_step=step)
    return matrix


def quantized_kind(quantize: str | None, kind: str, columns: int) -> str:
    """What float weights of `kind` become: `quantize`, or a type near it whose blocks divide the columns, or nothing else."""
    fitting = (name for name in (quantize, NARROW.get(quantize or "")) if name and columns % COLUMNS[name] == 0)
    return next(fitting, kind)


def in_whole_tiles(pieces: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The pieces, of which one that would begin within a tile is joined to the one before it, whose type it has."""
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
    """(kind, rows, first tile, step) of pieces whose rows follow each other in a matrix of `rows_together` rows, or in one of
    twice as many: gates and then ups, whose tiles alternate."""
    placed = []
    row = 0
    step = 1 + (sum(len(rows) for _, rows in pieces) > rows_together)
    for kind, rows in pieces:
        begin = 0
        while begin < len(rows):
            half, within = divmod(row, rows_together)
            count = min(len(rows) - begin, rows_together - within)
            placed.append((kind, rows[begin:begin + count], half + within // TILE_ROWS * step, step))
            begin = begin + count
            row = row + count
    return placed

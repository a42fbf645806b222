"""A model's weights on their way into tiles: a GGUF file's matrices in their own types or close ones."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy
import torch

from .tiles import Arena, Matrix

KEPT_TYPES = {kind: kind for kind in ("F16", "BF16", "Q4_0", "Q4_1", "Q8_0")} | {"F32": "BF16"}   # else Q8_0
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16}
KINDS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}       # of tiles.py


@dataclass(frozen=True)
class QuantizedMatrix:
    """Weights (N, K) as GGUF files have them: rows of blocks of 32 weights that share a scale."""

    kind: str               # "q4_0", "q4_1", "q8_0"
    rows: Any               # (N, bytes of a row) uint8, numpy
    columns: int            # K

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.columns


def common_type(tensors: Iterable[Any]) -> str:
    """The GGUF type of tensors that become one matrix, or the types they mix."""
    return " with ".join(sorted({tensor.tensor_type.name for tensor in tensors}))


def converted(sources: Mapping[str, tuple], stored: Mapping[str, Any]) -> str:
    """In words, which matrices `as_stored` cannot keep in the file's type; "" when it keeps all."""
    changed = collections.defaultdict(list)
    for shape, theirs in sources.values():
        kind = common_type(stored[name] for name in theirs)
        if len(shape) == 2 and KEPT_TYPES.get(kind) != kind:
            changed[kind] += theirs
    return "".join(f"; re-quantized from {kind} to {KEPT_TYPES.get(kind, 'Q8_0')}: {len(names)} tensors "
                   f"({', '.join(names[:4])}{', ..' * (len(names) > 4)})" for kind, names in changed.items())


def as_stored(shape: tuple[int, int], parts: Sequence[tuple[Any, int]],
              script: SimpleNamespace) -> torch.Tensor | QuantizedMatrix:
    """The (tensor, head size to turn or 0) below each other in a matrix, in the file's type if they share one."""
    was = common_type(tensor for tensor, _ in parts)
    kind = KEPT_TYPES.get(was, "Q8_0")
    if kind in FLOATS:
        return script.dequantized(shape, parts, FLOATS[kind])
    if kind == was:
        rows = numpy.concatenate([script.unpermute_rope(numpy.asarray(tensor.data), head_size)
                                  for tensor, head_size in parts])
    else:
        import gguf
        values = script.dequantized(shape, parts, torch.float32).numpy()
        rows = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    return QuantizedMatrix(kind.lower(), rows, shape[1])


def pack(arena: Arena, name: str, weight: torch.Tensor | QuantizedMatrix, quantize: str | None,
         tied_head: bool) -> Any:
    """The matrix `name` (N, K) in tiles; `quantize` names the type that large float matrices become."""
    (N, K), given = weight.shape, isinstance(weight, QuantizedMatrix)
    if name == "embed" and not (given or tied_head):
        return weight           # rows are only looked up
    rows, kind = (weight.rows, weight.kind) if given else (weight, KINDS[weight.dtype])
    small = given or K % 32 or name.endswith("ve_gate")
    matrix = Matrix(arena, kind if small or not quantize else quantize, N, K)
    parts = 2 if name.endswith("gate_up") else 1        # tiles of gates and ups alternate, for swiglu
    for part in range(parts):
        matrix.fill(rows[N // parts * part:N // parts * (part + 1)], kind, first_tile=part, tile_step=parts)
    return matrix

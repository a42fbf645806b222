"""Adapters as a Program reads them: what rows of a step may add to the products of its matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy

from . import _core
from .tiles import TILE_ROWS, Matrix

if TYPE_CHECKING:
    import torch

TYPES = {"torch.float32": 0, "torch.float16": 1, "torch.bfloat16": 2}       # Weight's float types


class AdaptedMatrices:
    """The matrices of a Program that adapters may change, by name: in the place of a step's adapters when recording."""

    def __init__(self) -> None:
        self.numbers: dict[str, tuple[int, Matrix, bool]] = {}      # name -> its number, the matrix, is it a gate's?

    def of_matrix(self, name: str) -> str:
        return name

    def record(self, name: str, matrix: Matrix, gated: bool) -> int:
        """The number of a matrix."""
        if name in self.numbers:
            raise ValueError(f"adapted: {name} was recorded already")
        self.numbers[name] = len(self.numbers), matrix, gated
        return len(self.numbers) - 1

    def pack(self, matrices: Mapping[str, Any]) -> _core.Adapter:
        """An adapter of matrices with `a` (R, K) and `b` (N, R), of one float type, and `scales` (R) float32. ValueError for a
        name or a shape that the program has not."""
        adapter = _core.Adapter(len(self.numbers))
        for name, its in matrices.items():
            if name not in self.numbers:
                raise ValueError(f"{name}: the program has no such matrix")
            number, matrix, gated = self.numbers[name]
            (R, K), N = its.a.shape, matrix.rows
            if K != matrix.columns or tuple(its.b.shape) != (N, R) or its.scales.shape != (R,):
                raise ValueError(f"{name}: a is {tuple(its.a.shape)} and b {tuple(its.b.shape)}; the matrix is {(N, matrix.columns)}")
            a, b, scales = its.a.contiguous(), its.b, its.scales.float().contiguous()
            if a.dtype != b.dtype or str(a.dtype) not in TYPES:
                a, b = a.float(), b.float()
            tiles, packed = packed_tiles(b, gated)
            adapter.add(number, TYPES[str(a.dtype)], R, K, a.data_ptr(), scales.data_ptr(), packed.data_ptr(), packed.nbytes, tiles)
        return adapter


def packed_tiles(b: torch.Tensor, gated: bool) -> tuple[Sequence[tuple[int, int, int]], torch.Tensor]:
    """(offset, first rank, ranks) of each tile of B (N, R), and their numbers, [ranks][16] of each. The tiles of gates and
    ups alternate, of which b has all gates first."""
    import torch        # the package does without
    halves = b.chunk(2) if gated else (b,)
    padded = [torch.nn.functional.pad(half, (0, 0, 0, -len(half) % TILE_ROWS)) for half in halves]
    tiles = torch.stack([half.view(-1, TILE_ROWS, half.shape[1]) for half in padded], 1).flatten(0, 1)     # (tiles, 16, R)
    places: list[tuple[int, int, int]] = []
    pieces: list[torch.Tensor] = []
    offset = 0
    for tile, used in zip(tiles, (tiles != 0).any(1).numpy()):
        ranks = numpy.flatnonzero(used)
        first, count = (int(ranks[0]), int(ranks[-1] - ranks[0] + 1)) if len(ranks) else (0, 0)
        places.append((offset, first, count))
        pieces.append(tile[:, first:first + count].T.reshape(-1))
        offset += count * TILE_ROWS
    return places, torch.cat([*pieces, b.new_zeros(TILE_ROWS)])

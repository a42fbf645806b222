"""Adapters as a Program reads them: what rows of a step may add to the products of its matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import _core
from .tiles import TILE_ROWS, Matrix

if TYPE_CHECKING:
    import torch

SHRUNK_RANKS = 4        # the kernel takes this many at once
TYPES = {"torch.float32": 0, "torch.float16": 1, "torch.bfloat16": 2}       # Weight's float types


class PackedAdapter(_core.Adapter):
    """An adapter, and the bytes that it holds: its parts lie in huge pages, so a small one has one of these."""

    HUGE_PAGE = 2 << 20         # as in tiles.cpp

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.nbytes = self.free = 0

    def hold(self, *sizes: int) -> None:
        """Parts of these sizes, one after the other: each goes to the last segment, or to a new one."""
        for size in sizes:
            size += -size % 64
            if size > self.free:
                self.free = size + -size % self.HUGE_PAGE
                self.nbytes += self.free
            self.free -= size


class AdaptedMatrices:
    """The matrices of a Program that adapters may change, by name; it stands for a step's adapters when recording."""

    def __init__(self) -> None:
        self.numbers: dict[str, tuple[int, Matrix, bool]] = {}      # name -> its number, the matrix, whether it has gates

    def of_matrix(self, name: str) -> str:
        return name

    def record(self, name: str, matrix: Matrix, gated: bool) -> int:
        """The number of a matrix."""
        if name in self.numbers:
            raise ValueError(f"adapted: {name} was recorded already")
        self.numbers[name] = len(self.numbers), matrix, gated
        return len(self.numbers) - 1

    def pack(self, matrices: Mapping[str, Any]) -> PackedAdapter:
        """An adapter of matrices with `a` (R, K) and `b` (N, R), of one float type, and `scales` (R) float32. ValueError for a
        name or a shape that the program has not."""
        adapter = PackedAdapter(len(self.numbers))
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
            a, b, scales = (pad(tensor, axis, SHRUNK_RANKS) for tensor, axis in ((a, 0), (b, 1), (scales, 0)))
            tiles, packed = packed_tiles(b, gated)
            a = pairs(a.view(-1, 2, 2, K // 16, 16).movedim(3, 1)).contiguous()     # (R / 4, K / 16, 2, 32)
            adapter.add(number, TYPES[str(a.dtype)], len(scales), K, a.data_ptr(), scales.data_ptr(), packed.data_ptr(), packed.nbytes, tiles)
            adapter.hold(a.nbytes, packed.nbytes, scales.nbytes, 16 * len(tiles))
        return adapter


def pad(tensor: torch.Tensor, axis: int, multiple: int) -> torch.Tensor:
    """With zeros at the end of an axis, up to a multiple of a length."""
    shape = [*tensor.shape]
    shape[axis] += -shape[axis] % multiple
    padded = tensor.new_zeros(shape)
    padded.narrow(axis, 0, tensor.shape[axis]).copy_(tensor)
    return padded


def pairs(tensor: torch.Tensor) -> torch.Tensor:
    """(..., 2, 16) -> (..., 32) as load_pair of csrc/cpu/lanes.h reads them: bfloat16's alternate."""
    return (tensor.mT if str(tensor.dtype) == "torch.bfloat16" else tensor).flatten(-2)


def packed_tiles(b: torch.Tensor, gated: bool) -> tuple[list[tuple[int, int, int]], torch.Tensor]:
    """(offset, first rank, ranks) of each tile of B (N, R), and their numbers, (ranks / 2, 32) of each. The tiles of gates
    and ups alternate, of which b has all gates first."""
    import torch        # the package does without
    halves = [pad(half, 0, TILE_ROWS) for half in (b.chunk(2) if gated else (b,))]
    tiles = torch.stack([half.view(-1, TILE_ROWS, half.shape[1]) for half in halves], 1).flatten(0, 1)     # (tiles, 16, R)
    by_pair = tiles.mT.unflatten(1, (-1, 2))        # (tiles, R / 2, 2, 16)
    used = (by_pair != 0).any(-1).any(-1).int()
    needed = used.cummax(1).values & used.flip(1).cummax(1).values.flip(1)      # from the first that is used to the last
    counts = 2 * needed.sum(1)
    offsets, firsts = (counts.cumsum(0) - counts) * TILE_ROWS, 2 * needed.argmax(1)
    return [*zip(offsets.tolist(), firsts.tolist(), counts.tolist())], pairs(by_pair)[needed.bool()]

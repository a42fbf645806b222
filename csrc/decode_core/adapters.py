"""Adapters as a Program reads them: what rows of a step may add to the products of its matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy

from . import _core
from .arrays import CODES, FLOAT32, bits_of, look_at
from .tiles import TILE_ROWS, Matrix

SHRUNK_RANKS = 4        # the kernel takes this many at once


class PackedAdapter(_core.Adapter):
    """An adapter, and the bytes that it holds: its parts lie in huge pages, so a small one has one of these."""

    HUGE_PAGE = 2 << 20         # as in tiles.cpp

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.nbytes = 0
        self.free = 0

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
            (kind, a), (other, b), (_, scales) = (bits_of(f"{name}: {part}", getattr(its, part), types, *shape) for part, types, shape in (
                ("a", tuple(CODES), (R, K)), ("b", tuple(CODES), (N, R)), ("scales", FLOAT32, (R,))))
            if kind != other:
                raise ValueError(f"{name}: a is {kind} and b {other}; both must have one type")
            a, b, scales = (pad(array, axis, SHRUNK_RANKS) for array, axis in ((a, 0), (b, 1), (scales, 0)))
            tiles, packed = packed_tiles(b, gated, kind)
            a = pairs(numpy.moveaxis(a.reshape(-1, 2, 2, K // 16, 16), 3, 1), kind)      # (R / 4, K / 16, 2, 32)
            a, packed, scales = map(numpy.ascontiguousarray, (a, packed, scales))
            a_at, scales_at, packed_at = (look_at("adapter", array, (array.dtype.name,), *array.shape)[0] for array in (a, scales, packed))
            adapter.add(number, CODES[kind], len(scales), K, a_at, scales_at, packed_at, packed.nbytes, tiles)
            adapter.hold(a.nbytes, packed.nbytes, scales.nbytes, 16 * len(tiles))
        return adapter


def pad(array: numpy.ndarray, axis: int, multiple: int) -> numpy.ndarray:
    """Its numbers or their bits, with zeros at the end of an axis, up to a multiple of a length."""
    more = [(0, 0)] * array.ndim
    more[axis] = 0, -array.shape[axis] % multiple
    return numpy.pad(array, more)


def pairs(array: numpy.ndarray, kind: str) -> numpy.ndarray:
    """(..., 2, 16) -> (..., 32) as load_pair of csrc/cpu/lanes.h reads them: bfloat16's alternate."""
    return (array.swapaxes(-1, -2) if kind == "bfloat16" else array).reshape(*array.shape[:-2], -1)


def packed_tiles(b: numpy.ndarray, gated: bool, kind: str) -> tuple[list[tuple[int, int, int]], numpy.ndarray]:
    """(offset, first rank, ranks) of each tile of B (N, R), and their numbers, (ranks / 2, 32) of each. The tiles of gates
    and ups alternate, of which b has all gates first."""
    halves = [pad(half, 0, TILE_ROWS) for half in (numpy.split(b, 2) if gated else (b,))]
    tiles = numpy.stack([half.reshape(-1, TILE_ROWS, half.shape[1]) for half in halves], 1)
    tiles = tiles.reshape(-1, *tiles.shape[2:]).swapaxes(1, 2)          # (tiles, R, 16)
    by_pair = tiles.reshape(len(tiles), -1, 2, TILE_ROWS)
    used = ((by_pair & 0x7FFF if kind == "bfloat16" else by_pair) != 0).any((2, 3))
    until = numpy.maximum.accumulate
    needed = until(used, 1) & until(used[:, ::-1], 1)[:, ::-1]          # from the first that is used to the last
    counts = 2 * needed.sum(1)
    offsets = (counts.cumsum() - counts) * TILE_ROWS
    firsts = 2 * needed.argmax(1)
    return [*zip(offsets.tolist(), firsts.tolist(), counts.tolist())], pairs(by_pair, kind)[needed]

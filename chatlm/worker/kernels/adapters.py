"""Adapters as a Program reads them. A row of a step may have one, which adds to the products of the
matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy

from chatlm.worker.kernels.arrays import CODES, FLOAT32, bits_of, look_at
from chatlm.worker.kernels.library import _core
from chatlm.worker.kernels.tiles import TILE_ROWS, Matrix

if TYPE_CHECKING:
    from chatlm.worker.arrays.kinds import AdapterMatrix

SHRUNK_RANKS = 4        # the kernel takes this many at once


class PackedAdapter(_core.Adapter):
    """An adapter, and the bytes that it takes. Its parts lie in huge pages, so that a small adapter takes one
    such page."""

    HUGE_PAGE = 2 << 20         # as in tiles.cpp

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.nbytes = 0
        self.free = 0

    def count_parts(self, *sizes: int) -> None:
        """Count parts of these sizes in bytes. Each lies in the last segment if it fits there, else in a new
        one."""
        for size in sizes:
            size += -size % 64
            if size > self.free:
                self.free = size + -size % self.HUGE_PAGE
                self.nbytes += self.free
            self.free -= size


class AdaptedMatrices:
    """The matrices of a Program that adapters may change, by name. It stands for a step's adapters while ops
    are recorded."""

    def __init__(self) -> None:
        # name -> (number, the matrix, does it have gates?)
        self.numbers: dict[str, tuple[int, Matrix, bool]] = {}

    def of_matrix(self, name: str) -> str:
        return name

    def record(self, name: str, matrix: Matrix, gated: bool) -> int:
        """Note a matrix and return its number."""
        if name in self.numbers:
            raise ValueError(f"adapted: {name} was recorded already")
        self.numbers[name] = len(self.numbers), matrix, gated
        return len(self.numbers) - 1

    def pack(self, matrices: Mapping[str, AdapterMatrix]) -> PackedAdapter:
        """Pack an adapter's matrices. ValueError for a name or a shape that the program does not have.

        Each has `a` (R, K) and `b` (N, R), both of one float type, and `scales` (R) float32."""
        adapter = PackedAdapter(len(self.numbers))
        for name, added in matrices.items():
            if name not in self.numbers:
                raise ValueError(f"{name}: the program has no such matrix")
            number, matrix, gated = self.numbers[name]
            R, K = added.a.shape
            N = matrix.rows
            if K != matrix.columns or tuple(added.b.shape) != (N, R) or added.scales.shape != (R,):
                raise ValueError(f"{name}: a is {tuple(added.a.shape)} and b {tuple(added.b.shape)}; the "
                                 f"matrix is {(N, matrix.columns)}")
            kind, a = bits_of(f"{name}: a", added.a, tuple(CODES), R, K)
            b_kind, b = bits_of(f"{name}: b", added.b, tuple(CODES), N, R)
            _, scales = bits_of(f"{name}: scales", added.scales, FLOAT32, R)
            if kind != b_kind:
                raise ValueError(f"{name}: a is {kind} and b {b_kind}; both must have one type")
            a = pad(a, 0, SHRUNK_RANKS)
            b = pad(b, 1, SHRUNK_RANKS)
            scales = numpy.ascontiguousarray(pad(scales, 0, SHRUNK_RANKS))
            # (R / 4, K / 16, 2, 32)
            a = pairs(numpy.moveaxis(a.reshape(-1, 2, 2, K // 16, 16), 3, 1), kind)
            a = numpy.ascontiguousarray(a)
            tiles, packed = packed_tiles(b, gated, kind)
            packed = numpy.ascontiguousarray(packed)
            adapter.add(number, CODES[kind], len(scales), K, address_of(a), address_of(scales),
                        address_of(packed), packed.nbytes, tiles)
            adapter.count_parts(a.nbytes, packed.nbytes, scales.nbytes, 16 * len(tiles))
        return adapter


def address_of(array: numpy.ndarray) -> int:
    return look_at("adapter", array, (array.dtype.name,), *array.shape)[0]


def pad(array: numpy.ndarray, axis: int, multiple: int) -> numpy.ndarray:
    """The array with zeros at the end of an axis, whose length becomes a multiple of `multiple`."""
    more = [(0, 0)] * array.ndim
    more[axis] = 0, -array.shape[axis] % multiple
    return numpy.pad(array, more)


def pairs(array: numpy.ndarray, kind: str) -> numpy.ndarray:
    """(..., 2, 16) -> (..., 32), as load_pair of csrc/cpu/lanes.h reads them: bfloat16 numbers of the two
    alternate."""
    return (array.swapaxes(-1, -2) if kind == "bfloat16" else array).reshape(*array.shape[:-2], -1)


def packed_tiles(b: numpy.ndarray, gated: bool,
                 kind: str) -> tuple[list[tuple[int, int, int]], numpy.ndarray]:
    """B (N, R) in tiles -> (offset, first rank, ranks) of each tile, and the numbers, (ranks / 2, 32) for
    each tile.

    A tile leaves out ranks at its ends that are all zeros. With gates, b has all gates first; their tiles and
    those of the ups alternate."""
    parts = numpy.split(b, 2) if gated else [b]
    halves = [pad(part, 0, TILE_ROWS) for part in parts]
    tiles = numpy.stack([half.reshape(-1, TILE_ROWS, half.shape[1]) for half in halves], 1)
    tiles = tiles.reshape(-1, *tiles.shape[2:]).swapaxes(1, 2)          # (tiles, R, 16)
    by_pair = tiles.reshape(len(tiles), -1, 2, TILE_ROWS)
    magnitudes = by_pair & 0x7FFF if kind == "bfloat16" else by_pair    # -0 is 0 too
    used = (magnitudes != 0).any((2, 3))
    until = numpy.maximum.accumulate
    # from the first that is used to the last
    needed = until(used, 1) & until(used[:, ::-1], 1)[:, ::-1]
    counts = 2 * needed.sum(1)
    offsets = (counts.cumsum() - counts) * TILE_ROWS
    firsts = 2 * needed.argmax(1)
    return [*zip(offsets.tolist(), firsts.tolist(), counts.tolist())], pairs(by_pair, kind)[needed]

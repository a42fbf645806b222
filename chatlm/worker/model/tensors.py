"""Weights that are not read yet: cutting them, reading them ahead, releasing them."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy

from chatlm.worker.arrays.kinds import address_of, floats, joined, kind_of, zeros

TILE_ROWS = 16  # of decode_core's matrices: a rank has whole tiles


def rounded_up(size: int, multiple: int = TILE_ROWS) -> int:
    return -(-size // multiple) * multiple


class Cut(NamedTuple):
    """The part of a tensor that a rank has: ranges of its rows, or of its columns.

    The part's `shape` may have more rows than the ranges: the rest are zeros."""

    full: tuple[int, ...]  # shape of the whole tensor
    shape: tuple[int, ...]
    axis: int              # 0: rows, 1: columns
    ranges: Seq[range]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Cut:
        return cls(shape, shape, 0, (range(shape[0]),))

    def apply(self, stacked: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Cut a tensor given as several with its rows: (index of one, the part of it), .."""
        begin = 0
        rows = 0
        for index, tensor in enumerate(stacked):
            if self.axis:  # packed columns take less than one byte each
                parts = [tensor[:, slice(*(edge * tensor.shape[1] // self.full[1] for edge in (
                    columns.start, columns.stop)))] for columns in self.ranges]
                yield index, joined(parts, 1)
                continue
            for wanted in self.ranges:
                part = tensor[max(wanted.start - begin, 0):max(wanted.stop - begin, 0)]
                if len(part):
                    yield index, part
                rows += len(part)
            begin += len(tensor)
        if not self.axis and rows < self.shape[0]:
            shape = self.shape[0] - rows, *tensor.shape[1:]
            yield index, zeros(shape, kind_of(tensor))


class Unread(NamedTuple):
    """A tensor that is read from its file when it is packed."""

    cut: Cut                     # what is read of it
    made: Callable[[Cut], Any]   # -> the tensor, or a tuple of the tensors that form it, in order
    nbytes: int                  # of what `read` returns
    mapped: tuple = ()           # the file's tensors that it may share memory with
    check: Callable[[Cut, Any, bool], None] = lambda *_: None  # see `refuse_faults`
    of: tuple = ()               # a function of the file's tensors and a cut, and their names and shapes

    def read(self):
        with numpy.errstate(all="ignore"):  # `refuse_faults` reports overflows
            return self.made(self.cut)

    def refuse_faults(self, tensor, packed: bool):
        """ConfigError if what was read has NaN or infinity, or will when it is `packed`."""
        self.check(self.cut, tensor, packed)

    def alone(self, name: str, cut: Cut):
        """Like `read`, of one of the file's tensors that form it, of the shape cut.full."""
        with numpy.errstate(all="ignore"):
            return self.of[0]([name], cut)

    def less(self, cut: Cut) -> Unread:
        """The part of it that the cut selects."""
        mapped = self.mapped
        if not cut.axis and all(tensor.shape[1:] == cut.full[1:] for tensor in mapped):
            mapped = tuple(part for _, part in cut.apply(mapped))
        size = self.nbytes * math.prod(cut.shape) // math.prod(cut.full)
        return self._replace(cut=cut, nbytes=size, mapped=mapped)


class MappedRows:
    """A table (N, K) that stays in its file, because few of its rows are ever needed: each is read when it is
    looked up. The system drops unused rows when it needs the memory.

    `table` has N rows as stored in the file, of type `kind` ("q8_0", "bf16"), `values` makes float rows
    (.., K) of some of them."""

    nbytes = 0  # of memory

    def __init__(self, table: numpy.ndarray, kind: str,
                 values: Callable[[numpy.ndarray], numpy.ndarray] = floats):
        self.table = table
        self.kind = kind
        self.values = values
        advise((table,), "MADV_RANDOM")  # or a row would bring 128 KiB of its neighbours

    @property
    def file_bytes(self) -> int:
        return self.table.nbytes

    def less(self, cut: Cut) -> MappedRows:
        """Itself: every rank may read the whole table."""
        return self

    def look_up(self, ids: numpy.ndarray) -> numpy.ndarray:
        """The rows `ids` (T,), float32 (T, K). A negative id gives row 0."""
        return self.values(self.table[numpy.maximum(ids, 0)])

    def will_need(self, ids: Iterable[int]):
        """Ask the system to read these rows ahead while others are computed."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        start = address_of(self.table)
        size = self.table[0].nbytes
        page = mmap.PAGESIZE
        last = 0
        for row in sorted(row for row in {*ids} if row < len(self.table)):  # neighbours in one call
            begin = max((start + row * size) // page * page, last)
            end = -(-(start + (row + 1) * size) // page) * page
            if begin < end:
                madvise(begin, end - begin, mmap.MADV_WILLNEED)
            last = end


READ_AHEAD = 1 << 28  # bytes that are read from the disk while others are packed


def read_ahead(tensors: dict, names: Iterable[str]) -> Iterator[tuple[str, Any, Any]]:
    """Pop each tensor, read or Unread -> (name, it, what its `read` returns).

    A thread reads the next ones meanwhile."""
    def read(tensor):
        advise(getattr(tensor, "mapped", ()), "MADV_WILLNEED")
        return tensor.read() if isinstance(tensor, Unread) else tensor

    coming = deque()
    with ThreadPoolExecutor(1) as pool:
        for name in (*names, None):
            if name:
                tensor = tensors.pop(name)
                coming.append((name, tensor, pool.submit(read, tensor)))
            while len(coming) > bool(name) and (
                    not name or sum(tensor.nbytes for _, tensor, _ in coming) > READ_AHEAD):
                first, tensor, future = coming.popleft()
                yield first, tensor, future.result()
                advise(getattr(tensor, "mapped", ()), "MADV_DONTNEED")


def advise(mapped: Iterable[Any], advice: str):
    """Advise the system about the file pages of these tensors: MADV_WILLNEED reads them ahead, MADV_DONTNEED
    releases their memory (later accesses read the file again)."""
    if hasattr(mmap, advice):
        for tensor in filter(is_mapped, mapped):
            # or every other row
            begin = address_of(tensor)
            steps = zip(tensor.shape, tensor.strides)
            end = begin + tensor.itemsize + sum((count - 1) * step for count, step in steps)
            first = -(-begin // mmap.PAGESIZE)
            last = end // mmap.PAGESIZE
            if first < last:
                madvise(first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE, getattr(mmap, advice))


def is_mapped(tensor) -> bool:
    """Is it in a mapped file? A copy of what lay there between the addresses of numbers is not: the system
    would make its memory zeros."""
    while isinstance(tensor, (numpy.ndarray, memoryview)):
        tensor = tensor.base if isinstance(tensor, numpy.ndarray) else tensor.obj
    return isinstance(tensor, mmap.mmap)


@functools.cache
def c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def madvise(begin: int, size: int, advice: int):
    c_library().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), advice)

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

MAPPED_KINDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
TILE_ROWS = 16  # of decode_core's matrices: a rank has whole tiles


def rounded_up(size: int, multiple: int = TILE_ROWS) -> int:
    return -(-size // multiple) * multiple


class Cut(NamedTuple):
    """The part of a tensor that a rank has: ranges of its rows, or of its columns.

    The part may have more rows (`shape`) than the ranges. The others are zeros."""

    full: tuple[int, ...]  # shape of the whole tensor
    shape: tuple[int, ...]
    axis: int              # 0: rows, 1: columns
    ranges: Seq[range]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Cut:
        return cls(shape, shape, 0, (range(shape[0]),))

    def apply(self, stacked: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Cut a tensor that is given as several with its rows -> (index of one of these, a part of it), .."""
        begin = 0
        rows = 0
        for index, tensor in enumerate(stacked):
            if self.axis:  # a packed column takes less than a byte
                edges = [[edge * tensor.shape[1] // self.full[1] for edge in (columns.start, columns.stop)]
                         for columns in self.ranges]
                yield index, joined([tensor[:, first:last] for first, last in edges], 1)
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
    """A tensor that is read from its file only when it is packed."""

    cut: Cut                     # the part that is read
    made: Callable[[Cut], Any]   # cut -> the tensor, or a tuple of the tensors that form it, in order
    nbytes: int                  # of what `read` returns
    mapped: tuple = ()           # the file's tensors with which it may share memory
    check: Callable[[Cut, Any, bool], None] = lambda *_: None  # see `refuse_faults`
    of: tuple = ()               # a function of the file's tensors and a cut, and their names and shapes

    def read(self):
        with numpy.errstate(all="ignore"):  # `refuse_faults` reports overflows
            return self.made(self.cut)

    def refuse_faults(self, tensor, packed: bool):
        """ConfigError if what was read has NaN or infinity, or would have them once it is `packed`."""
        self.check(self.cut, tensor, packed)

    def alone(self, name: str, cut: Cut):
        """Read only one of the file's tensors that form it, whose shape is cut.full."""
        with numpy.errstate(all="ignore"):
            return self.of[0]([name], cut)

    def less(self, cut: Cut) -> Unread:
        """The part that the cut selects."""
        mapped = self.mapped
        if not cut.axis and all(tensor.shape[1:] == cut.full[1:] for tensor in mapped):
            mapped = tuple(part for _, part in cut.apply(mapped))
        size = self.nbytes * math.prod(cut.shape) // math.prod(cut.full)
        return self._replace(cut=cut, nbytes=size, mapped=mapped)


class MappedRows:
    """A table (N, K) that stays in its file, because few of its rows are ever needed.

    A row is read when it is looked up, and the system drops unused rows when it needs the memory. `table` has
    the N rows as the file stores them, of type `kind` ("q8_0", "bf16"). `values` turns some of them into
    floats (.., K)."""

    nbytes = 0  # that it takes of memory

    def __init__(self, table: numpy.ndarray, kind: str,
                 values: Callable[[numpy.ndarray], numpy.ndarray] = floats):
        self.table = table
        self.kind = kind
        self.values = values
        advise((table,), "MADV_RANDOM")  # else the system reads 128 KiB around each row

    @classmethod
    def of_floats(cls, table: numpy.ndarray) -> MappedRows:
        return cls(table, MAPPED_KINDS[kind_of(table)])

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
        """Ask the system to read these rows ahead, while other things are computed."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        start = address_of(self.table)
        size = self.table[0].nbytes
        page = mmap.PAGESIZE
        last = 0
        # sorted, so that the system is asked only once for a page
        for row in sorted(row for row in {*ids} if row < len(self.table)):
            begin = max((start + row * size) // page * page, last)
            end = -(-(start + (row + 1) * size) // page) * page
            if begin < end:
                madvise(begin, end - begin, mmap.MADV_WILLNEED)
            last = end


READ_AHEAD = 1 << 28  # bytes that may be read from the disk while other tensors are packed


def read_ahead(tensors: dict, names: Iterable[str]) -> Iterator[tuple[str, Any, Any]]:
    """Pop each tensor, read or Unread -> (name, the tensor, what its `read` returns).

    Meanwhile a thread reads the next ones."""
    def read(tensor):
        advise(getattr(tensor, "mapped", ()), "MADV_WILLNEED")
        return tensor.read() if isinstance(tensor, Unread) else tensor

    coming = deque()  # (name, tensor, the future of its read), oldest first

    def oldest() -> Iterator[tuple[str, Any, Any]]:
        name, tensor, future = coming.popleft()
        yield name, tensor, future.result()
        advise(getattr(tensor, "mapped", ()), "MADV_DONTNEED")

    with ThreadPoolExecutor(1) as pool:
        for name in names:
            tensor = tensors.pop(name)
            coming.append((name, tensor, pool.submit(read, tensor)))
            while len(coming) > 1 and sum(tensor.nbytes for _, tensor, _ in coming) > READ_AHEAD:
                yield from oldest()
        while coming:
            yield from oldest()


def advise(mapped: Iterable[Any], advice: str):
    """Advise the system about the file pages of these tensors.

    MADV_WILLNEED reads them ahead. MADV_DONTNEED releases their memory, and later accesses read the file."""
    if not hasattr(mmap, advice):
        return
    for tensor in filter(is_mapped, mapped):
        begin = address_of(tensor)
        # the last number's end, also where rows are apart
        steps = zip(tensor.shape, tensor.strides)
        end = begin + tensor.itemsize + sum((count - 1) * step for count, step in steps)
        first = -(-begin // mmap.PAGESIZE)
        last = end // mmap.PAGESIZE
        if first < last:
            madvise(first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE, getattr(mmap, advice))


def is_mapped(tensor) -> bool:
    """Does it lie in a mapped file? If it were a copy, MADV_DONTNEED would turn its memory into zeros."""
    while isinstance(tensor, (numpy.ndarray, memoryview)):
        tensor = tensor.base if isinstance(tensor, numpy.ndarray) else tensor.obj
    return isinstance(tensor, mmap.mmap)


@functools.cache
def c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def madvise(begin: int, size: int, advice: int):
    c_library().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), advice)

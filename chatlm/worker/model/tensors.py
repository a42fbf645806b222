"""Weights that are not read yet: cut, read ahead and given back."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy
import torch


TILE_ROWS = 16  # of decode_core's matrices: a rank has whole tiles


class Cut(NamedTuple):
    """What a rank has of a tensor `of` a shape: ranges of one axis. Its `shape` may have more: zeros."""

    of: tuple[int, ...]
    shape: tuple[int, ...]
    axis: int
    ranges: Seq[range]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Cut:
        return cls(shape, shape, 0, (range(shape[0]),))

    def parts(self, parts: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """The index of each of the `parts` below each other, torch or numpy, and what is cut from it."""
        begin = rows = 0
        for index, part in enumerate(parts):
            if self.axis:  # packed columns take less than one byte each
                first, last = (each * part.shape[1] // self.of[1] for each in (
                    self.ranges[0].start, self.ranges[0].stop))
                yield index, part[:, first:last]
            for each in () if self.axis else self.ranges:
                found = part[max(each.start - begin, 0):max(each.stop - begin, 0)]
                if len(found):
                    yield index, found
                rows += len(found)
            begin += len(part)
        if not self.axis and rows < self.shape[0]:
            zeros = torch.zeros if isinstance(part, torch.Tensor) else numpy.zeros
            yield index, zeros((self.shape[0] - rows, *part.shape[1:]), dtype=part.dtype)


class Unread(NamedTuple):
    """A tensor that is read from its file when it is packed."""

    cut: Cut                     # what is read of it
    made: Callable[[Cut], Any]   # -> the tensor, or a tuple of the tensors that form it, in order
    nbytes: int                  # of what `read` returns
    mapped: tuple = ()           # the file's tensors that it may share memory with
    check: Callable[[Cut, Any, bool], None] = lambda *_: None  # see `refuse_faults`

    def read(self):
        with numpy.errstate(all="ignore"):  # of what overflows `refuse_faults` tells
            return self.made(self.cut)

    def refuse_faults(self, found, packed: bool):
        """A ConfigError if what was read has NaN or infinity, or will when it is `packed`."""
        self.check(self.cut, found, packed)

    def less(self, cut: Cut) -> Unread:
        """As much of it as the cut says."""
        mapped = self.mapped
        if not cut.axis and all(each.shape[1:] == cut.of[1:] for each in mapped):
            mapped = tuple(each for _, each in cut.parts(mapped))
        size = self.nbytes * math.prod(cut.shape) // math.prod(cut.of)
        return self._replace(cut=cut, nbytes=size, mapped=mapped)


READ_AHEAD = 1 << 28  # bytes that are read from the disk while others are packed


def read_ahead(tensors: dict, names: Iterable[str]) -> Iterator[tuple[str, Any, Any]]:
    """Pop each tensor, or Unread one -> (name, it, what its `read` returns).

    A thread reads the next ones meanwhile, on one core: torch's own threads cost more than they gain here."""
    def read(given):
        advise(getattr(given, "mapped", ()), "MADV_WILLNEED")
        return given.read() if isinstance(given, Unread) else given

    threads, coming = torch.get_num_threads(), deque()
    try:
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for name in (*names, None):
                if name:
                    given = tensors.pop(name)
                    coming.append((name, given, pool.submit(read, given)))
                while len(coming) > bool(name) and (
                        not name or sum(given.nbytes for _, given, _ in coming) > READ_AHEAD):
                    before, given, future = coming.popleft()
                    yield before, given, future.result()
                    advise(getattr(given, "mapped", ()), "MADV_DONTNEED")
    finally:
        torch.set_num_threads(threads)


def advise(mapped: Iterable[Any], advice: str):
    """Tell the system about the pages of files in which these tensors lie: MADV_WILLNEED reads them ahead,
    MADV_DONTNEED gives their memory back (whoever reads them again gets them from the file)."""
    if hasattr(mmap, advice):
        for tensor in mapped:
            begin, steps = tensor.data_ptr(), zip(tensor.shape, tensor.stride())  # or every other row
            end = begin + tensor.itemsize * (1 + sum((count - 1) * step for count, step in steps))
            first, last = -(-begin // mmap.PAGESIZE), end // mmap.PAGESIZE
            if first < last:
                ctypes.CDLL(None).madvise(ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(
                    (last - first) * mmap.PAGESIZE), getattr(mmap, advice))

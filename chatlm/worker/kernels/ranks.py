"""Ranks: processes that compute one model together on one host, each with a shard of its weights.

    memory = RankMemory(count=2, part_bytes=max_tokens * C * 4)         # the parent's; starts the ranks with
    memory.path
    ranks = Ranks(memory.path, rank)                                    # in each rank's process
    program.all_reduce(partial, ranks, x, residual=x)                   # recorded; ranks.all_reduce(...) does
    it at once
    memory.poison()                                                     # all ranks stop waiting, with a
    RuntimeError

A sum is added in the order of the ranks, so its bits depend on their number alone. No wait is endless: a
waiting rank sees within a moment that the process of another has ended or that the memory is poisoned, and it
gives up after `patience_s`. From then on every exchange fails at once. To continue, start new processes with
a new memory.
"""

import os
import tempfile

from chatlm.worker.kernels.arrays import FLOAT32, look_at
from chatlm.worker.kernels.library import _core

PATIENCE_S = 60.0           # longer than any rank computes between two exchanges


class RankMemory:
    """The parent's end: a file in memory that vanishes with the last process that has it open."""

    def __init__(self, count: int, part_bytes: int):
        if hasattr(os, "memfd_create"):
            self._fd = os.memfd_create("decode_core-ranks")
            self._file = None
            self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        else:
            self._file = tempfile.NamedTemporaryFile(prefix="decode_core-ranks-")
            self._fd = self._file.fileno()
            self.path = self._file.name
        try:
            _core.prepare_ranks(self._fd, count, part_bytes)
            self._ranks = _core.Ranks(self._fd, -1, PATIENCE_S)
        except BaseException:
            self._close()
            raise

    def poison(self) -> None:
        """Make every rank stop waiting, and fail from now on."""
        self._ranks.poison()

    def why(self) -> str:
        """Why the ranks can no longer exchange anything; "" while they can."""
        return self._ranks.why()

    def _close(self) -> None:
        if self._file:
            self._file.close()
        else:
            os.close(self._fd)

    def __del__(self):
        if hasattr(self, "_ranks"):
            self._close()


class Ranks:
    """A rank's end. All ranks make the same calls in the same order with the same shapes, each from one
    thread at a time."""

    def __init__(self, path: str, rank: int, patience_s: float = PATIENCE_S):
        if not isinstance(rank, int) or rank < 0:
            raise ValueError(f"rank: must be an integer from 0, not {rank!r}")
        fd = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        try:
            self.handle = _core.Ranks(fd, rank, patience_s)         # maps the file
        finally:
            os.close(fd)
        self.rank = self.handle.rank
        self.count = self.handle.count
        self.part_bytes = self.handle.part_bytes

    def all_reduce(self, x, out, residual=None) -> None:
        """residual + the sum of all ranks' x (rows, C) -> out. x and residual may be out; rows * C is a
        multiple of 16."""
        rows, columns = self._shape(x)
        if rows * columns % 16:
            raise ValueError(f"x: must be a multiple of 16 numbers, not {(rows, columns)}")
        out_at = (look_at("out", out, FLOAT32, rows, columns, writable=True)[0], columns)
        residual_at = (0, 0)
        if residual is not None:
            residual_at = (look_at("residual", residual, FLOAT32, rows, columns)[0], columns)
        x_at = (look_at("x", x, FLOAT32, rows, columns)[0], columns)
        self.handle.exchange(True, rows, x_at, out_at, residual_at)

    def all_gather(self, x, out) -> None:
        """All ranks' x (rows, C) side by side -> out (rows, up to count * C): the last columns may be left
        out."""
        rows, columns = self._shape(x)
        out_at, _, (_, width), _ = look_at("out", out, FLOAT32, rows, None, writable=True)
        check_gathered(width, columns, self.count)
        self.handle.exchange(False, rows, (look_at("x", x, FLOAT32, rows, columns)[0], columns),
                             (out_at, width), (0, 0))

    def poison(self) -> None:
        """Tell the other ranks that this one cannot go on."""
        self.handle.poison()

    def why(self) -> str:
        return self.handle.why()

    def _shape(self, x) -> tuple[int, int]:
        rows, columns = look_at("x", x, FLOAT32, None, None)[2]
        if not rows * columns or rows * columns * 4 > self.part_bytes:
            raise ValueError(f"x: must have 4 to {self.part_bytes} bytes, as the ranks' memory was made for, "
                             f"not {4 * rows * columns}")
        return rows, columns


def check_gathered(width: int, columns: int, count: int) -> None:
    if not 0 < width <= count * columns:
        raise ValueError(f"out: must have 1 to {count * columns} columns, not {width}")


def all_reduce_reference(parts: list, residual=None):
    """What all_reduce gives to every rank. parts: each rank's x, numpy arrays of float32."""
    total = parts[0].copy()
    for part in parts[1:]:
        total = total + part
    return total if residual is None else residual + total

"""Reads each tensor once, some rows at a time, and keeps statistics of it for the checks of weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy

from chatlm.worker.arrays.kinds import floats
from chatlm.worker.model.tensors import Cut, MappedRows, Unread, advise

if TYPE_CHECKING:
    from chatlm.worker.weights.loaded.model import LoadedModel

CHUNK = 1 << 21           # values at a time, 8 MB: so much memory a thread takes several times
MOST_VALUES = 2_000_000_000  # of a model: of a larger one, only each n-th chunk is read
BLOCK = 32                # adjacent columns that are compared with others'; the smallest block of any type
GROUP = 256               # adjacent columns whose blocks share a scale in GGUF's K types
ROUNDED_AWAY = 24.0       # beside a weight so many times as large as theirs, K types round blocks to zeros
LARGE = 5.0               # a block so many times as large as expected stands out
PEAKS_TRIED = 64          # blocks of a chunk that are looked at weight by weight


@dataclass
class TensorStatistics:
    """A file's tensor as statistics. `name`: the file's; `part`: our tensor that it is part of, without its
    layer; `index`: which of those that form it."""

    name: str
    part: str
    layer: int | None
    index: int
    shape: tuple[int, ...]
    values: numpy.ndarray | None = None   # of a vector: itself
    rows: numpy.ndarray = field(default_factory=lambda: numpy.zeros(0))     # (N,): each row's mean square
    columns: numpy.ndarray = field(default_factory=lambda: numpy.zeros(0))  # (K,): each column's
    leaning: float = 0.0                  # the largest mean of a row's values, over their root mean square
    leaning_row: int = 0
    usual_leaning: float = 1.0            # of the median row, in the chunk where it is the least
    read: int = 0                         # rows that were read
    bad: int = 0                          # values that are NaN or infinite
    first_bad: int = 0                    # the row of the first
    constant: list[int] = field(default_factory=list)  # rows whose values are all the same, but not 0
    holes: int = 0                        # blocks of zeros where neighbours are none
    hole: int = 0                         # the row of the first
    peaks: list[tuple[float, int, int]] = field(default_factory=list)  # (log of how much larger than its row
    # and its columns a block is, its row, its first column), the largest of each chunk
    usual: float = 0.0                    # that log of one block of a thousand

    @property
    def matrix(self) -> bool:
        return self.values is None

    @property
    def kind(self) -> str:
        """Its name without numbers, which it shares with the other layers' tensors of its kind."""
        return re.sub(r"\d+", "{}", self.name)

    @property
    def level(self) -> float:
        """The log of the root of its mean square; -inf if it is zero, or has NaN."""
        square = float((self.rows if self.values is None else numpy.square(self.values)).mean())
        return math.log(square) / 2 if 0 < square < math.inf else -math.inf


def all_statistics(model: LoadedModel, threads: int = 1) -> list[TensorStatistics]:
    """The statistics of all tensors of a model whose matrices are float32 when they are read."""
    tasks = [*tasks_of(model)]
    total = sum(math.prod(statistics.shape) for statistics, _ in tasks)
    every = -(-total // MOST_VALUES)
    with ThreadPoolExecutor(threads) as pool:
        return [*pool.map(partial(measure_tensor, heads=head_rows(model), every=every), *zip(*tasks))]


def head_rows(model: LoadedModel) -> int:
    """How many rows a head of q and k has. They are read together, because a file may have them in another
    order."""
    attentions = model.architecture.attentions
    return attentions[0].head_size if attentions else 1


def tasks_of(model: LoadedModel) -> Iterator[tuple[TensorStatistics, Unread | MappedRows]]:
    for ours, tensor in model.tensors.items():
        layer, _, part = ours.rpartition(".")
        of = tensor.of[1] if isinstance(tensor, Unread) else {ours: tensor.table.shape}
        for index, (name, shape) in enumerate(of.items()):
            yield TensorStatistics(name, part, int(layer) if layer else None, index, tuple(shape)), tensor


def measure_tensor(statistics: TensorStatistics, tensor: Unread | MappedRows, heads: int,
                   every: int) -> TensorStatistics:
    """Statistics of a tensor. Only each `every`-th chunk of it is read."""
    shape = statistics.shape
    with numpy.errstate(all="ignore"):
        if isinstance(tensor, Unread) and len(tensor.cut.full) == 1:
            values = tensor.alone(statistics.name, Cut.whole((math.prod(shape),)))  # may be one of q, k and v
            measure_vector(statistics, floats(numpy.asarray(joined_parts(values))).reshape(-1))
            return statistics
        rows = math.prod(shape[:-1])
        columns = shape[-1]
        step = max(CHUNK // columns // heads, 1) * heads
        statistics.rows = numpy.full(rows, numpy.nan)
        statistics.columns = numpy.zeros(columns)
        usual = list[float]()
        for number, begin in enumerate(range(0, rows, step)):
            if number % every:
                continue
            span = range(begin, min(begin + step, rows))
            if isinstance(tensor, MappedRows):
                values = tensor.look_up(numpy.arange(span.start, span.stop))
            else:
                values = tensor.alone(statistics.name, Cut((rows, columns), (len(span), columns), 0, [span]))
            measure_chunk(statistics, floats(joined_parts(values)), begin, usual)
        statistics.rows = statistics.rows[~numpy.isnan(statistics.rows)] if every > 1 else statistics.rows
        statistics.columns /= max(statistics.read, 1)
        statistics.usual = max(usual, default=0.0)
        advise(getattr(tensor, "mapped", ()), "MADV_DONTNEED")
    return statistics


def rows_of(model: LoadedModel, ours: str, span: range) -> numpy.ndarray:
    """Some rows of a matrix that is a single tensor of the file, (n, K) float32."""
    tensor = model.tensors[ours]
    if isinstance(tensor, MappedRows):
        return tensor.look_up(numpy.arange(span.start, span.stop))
    (name, shape), = tensor.of[1].items()
    rows = math.prod(shape[:-1])
    columns = shape[-1]
    return floats(joined_parts(tensor.alone(name, Cut((rows, columns), (len(span), columns), 0, [span]))))


def joined_parts(values) -> numpy.ndarray:
    return numpy.concatenate(values) if isinstance(values, tuple) else values


def measure_vector(statistics: TensorStatistics, values: numpy.ndarray):
    statistics.values = values
    statistics.read = len(values)
    statistics.bad = int((~numpy.isfinite(values)).sum())


def measure_chunk(statistics: TensorStatistics, values: numpy.ndarray, begin: int, usual: list[float]):
    """Add rows (n, K), which begin at row `begin`."""
    n, K = values.shape
    squares = numpy.square(values)
    width = next((size for size in (BLOCK, 16, 8) if K % size == 0), K)
    sums = numpy.add.reduceat(squares, range(0, K, width), 1)
    total = sums.sum(1, dtype=numpy.float64)
    if not math.isfinite(float(total.sum())):
        finite = numpy.isfinite(values)
        if count := int((~finite).sum()):
            if not statistics.bad:
                statistics.first_bad = begin + int((~finite).any(1).argmax())
            statistics.bad += count
    statistics.rows[begin:begin + n] = total / K
    statistics.columns += squares.sum(0, dtype=numpy.float32)
    statistics.read += n
    lean = numpy.abs(values.sum(1)) / numpy.sqrt(numpy.maximum(total, 1e-30) * K)
    if (row := int(numpy.nan_to_num(lean).argmax())) + 1 and lean[row] > statistics.leaning:
        statistics.leaning = float(lean[row])
        statistics.leaning_row = begin + row
    statistics.usual_leaning = min(statistics.usual_leaning, float(numpy.median(lean)))
    largest = numpy.maximum.reduceat(squares, range(0, K, width), 1)
    even = (sums > 0) & (numpy.abs(sums - width * largest) <= 1e-5 * sums)  # all of one magnitude
    for row in numpy.flatnonzero(even.all(1) & (K >= BLOCK)):
        if (values[row] == values[row, 0]).all():
            statistics.constant.append(begin + int(row))
    if width != K and K // width >= 4 and n >= 16:
        compare_blocks(statistics, values, sums, largest, begin, usual)


def compare_blocks(statistics: TensorStatistics, values: numpy.ndarray, sums: numpy.ndarray,
                   largest: numpy.ndarray, begin: int, usual: list[float]):
    """Compare blocks of values (n, K), whose sums of squares and largest squares are given (n, B), with what
    their row and their column of blocks let expect.

    The largest square is left out: one weight that stands out is natural, a whole block is not."""
    width = values.shape[1] // sums.shape[1]
    empty = largest == 0
    rest = numpy.log(numpy.maximum(sums - largest, 0) / (width - 1) + 1e-30) / 2
    rest[empty] = numpy.nan
    known = ~empty.all(1)
    if not known.any():
        return
    if empty.any():
        rows = numpy.where(known, numpy.nanmedian(numpy.where(known[:, None], rest, 0.0), 1), numpy.nan)
        without = rest - rows[:, None]
        seen = ~numpy.isnan(without).all(0)
        columns = numpy.nanmedian(numpy.where(seen, without, 0.0), 0)
    else:
        rows = numpy.median(rest, 1)
        without = rest - rows[:, None]
        seen = numpy.ones(rest.shape[1], bool)
        columns = numpy.median(without, 0)
    # a column of blocks that is mostly empty is a dead one, and a row likewise; where little is expected, a
    # type of few bits rounds it to nothing
    plain = (empty.mean(0) < 0.5) & (columns > -2)
    found = empty & plain & (known & (empty.mean(1) < 0.5))[:, None]
    for row, block in zip(*numpy.nonzero(found)):
        group = largest[row, block - block % (GROUP // width):][:GROUP // width]
        expected = math.exp(columns[block] + rows[row])
        found[row, block] = math.sqrt(float(group.max())) < ROUNDED_AWAY * expected
    if count := int(found.sum()):
        if not statistics.holes:
            statistics.hole = begin + int(found.any(1).argmax())
        statistics.holes += count
    over = numpy.nan_to_num(without - numpy.maximum(columns, -3), nan=-9.0, posinf=99.0, neginf=-9.0)
    statistics.peaks.append(whole_peak(over, values, begin))
    usual.append(float(numpy.partition(over, -1 - over.size // 1000, None)[-1 - over.size // 1000]))


def whole_peak(over: numpy.ndarray, values: numpy.ndarray, begin: int) -> tuple[float, int, int]:
    """The block that is most too large as a whole: (the log of how much, its row, its first column).

    over: that log (n, B), from the blocks' mean squares. Trained models have massive weights, often several
    in a block, beside which the rest is small. A wrong scale makes all weights of a block large. So what
    counts of a block is the eighth largest of its 32 weights, of which a normal one has 1.15 sigma. Nor is a
    block strange if others of its columns, in other rows, are as large: a head writes to few channels."""
    width = values.shape[1] // over.shape[1]
    likeliest = numpy.argpartition(over, -min(PEAKS_TRIED, over.size), None)[-PEAKS_TRIED:]
    rows, blocks = numpy.divmod(likeliest, over.shape[1])
    weights = numpy.abs(values.reshape(len(values), -1, width)[rows, blocks])
    eighth = numpy.sort(weights, 1)[:, -max(width // 4, 1)]
    squares = numpy.square(weights)
    rest = numpy.sqrt((squares.sum(1) - squares.max(1)) / (width - 1))
    whole = over[rows, blocks] + numpy.log(numpy.minimum(1.0, (eighth / 1.15 + 1e-30) / (rest + 1e-30)))
    for place in numpy.flatnonzero(whole > math.log(LARGE)):
        group = blocks // (GROUP // width) == blocks[place] // (GROUP // width)
        if (whole[group & (rows != rows[place])] > math.log(LARGE)).any():
            whole[place] = 0.0
    best = int(whole.argmax())
    return float(whole[best]), begin + int(rows[best]), int(blocks[best]) * width


def of_kinds(measured: Iterable[TensorStatistics]) -> dict[str, list[TensorStatistics]]:
    """The statistics by kind, in the order of the layers."""
    found: dict[str, list[TensorStatistics]] = {}
    for statistics in measured:
        found.setdefault(statistics.kind, []).append(statistics)
    return {kind: sorted(of_kind, key=lambda one: -1 if one.layer is None else one.layer)
            for kind, of_kind in found.items()}

"""What the rows and columns of a tensor consist of.

A block states this once for each of its tensors. From it follow the tensor's shape, where padding puts its
numbers, what each rank has of it, whether it is packed, and whether adapters may change it."""

from __future__ import annotations

from typing import NamedTuple

import numpy


class Run(NamedTuple):
    """Rows or columns that follow each other: `count` units of `parts` * `size` each.

    For example, a head of q with its gate is one unit of two parts of D rows."""

    count: int
    size: int = 1
    of: str = ""    # ranks divide these units: "heads", "columns", ..; "": every rank has all
    parts: int = 1  # of a unit; padding follows each part

    @property
    def unit(self) -> int:
        return self.parts * self.size

    @property
    def length(self) -> int:
        return self.count * self.unit


Axis = tuple[Run, ...]


class TensorAxes(NamedTuple):
    """A matrix (rows, columns), or a vector."""

    rows: Axis
    columns: Axis | None = None  # None: a vector
    packed: bool = False         # is it laid out for products?
    exact: bool = False          # is a matrix always float32? vectors always are
    adapted: bool = False        # may adapters change its product?
    once: bool = False           # a bias that only the first rank adds
    factor: float = 1.0          # of the weights of a norm that reads padded rows

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (self.rows,) if self.columns is None else (self.rows, self.columns)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(length, self.axes))

    @property
    def bias(self) -> TensorAxes:
        """The bias of this matrix, a number for each row.

        Where ranks divide the columns, they sum their products, and only one of them may add the bias."""
        return TensorAxes(self.rows, once=any(run.of for run in self.columns or ()))


Tensors = dict[str, TensorAxes]


def length(axis: Axis) -> int:
    return sum(run.length for run in axis)


def axis_of(size: int | Axis) -> Axis:
    return (Run(size),) if isinstance(size, int) else size


def vector(size: int | Axis, **more) -> TensorAxes:
    return TensorAxes(axis_of(size), **more)


def matrix(rows: int | Axis, columns: int | Axis, packed: bool = True, **more) -> TensorAxes:
    return TensorAxes(axis_of(rows), axis_of(columns), packed, **more)


# ---- padding


def padded_places(axis: Axis, padded: Axis) -> numpy.ndarray:
    """Where the numbers along an axis go in the padded axis, whose runs are the same in larger sizes."""
    places = []
    begin = 0
    for run, wide in zip(axis, padded):
        units = numpy.arange(run.count * run.parts)
        places.append((begin + units[:, None] * wide.size + numpy.arange(run.size)).ravel())
        begin += wide.length
    return numpy.concatenate(places)


# ---- ranks

Divided = dict[str, range]  # what ranks divide -> the units that a rank has


class RankPart(NamedTuple):
    """What a rank has of a tensor: ranges along one axis. Without ranges it has the whole tensor."""

    axis: int = 0
    ranges: tuple[range, ...] = ()


def rank_part(tensor: TensorAxes, divided: Divided) -> RankPart:
    for number, axis in enumerate(tensor.axes):
        if any(run.of in divided for run in axis):
            return RankPart(number, rank_ranges(axis, divided))
    return RankPart()


def rank_ranges(axis: Axis, divided: Divided) -> tuple[range, ...]:
    """The numbers along an axis that a rank has: a range for each run."""
    ranges = []
    begin = 0
    for run in axis:
        own = divided.get(run.of, range(run.count))
        ranges.append(range(begin + own.start * run.unit, begin + own.stop * run.unit))
        begin += run.length
    return tuple(ranges)

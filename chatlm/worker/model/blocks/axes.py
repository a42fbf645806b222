"""How the rows and columns of a tensor are made up.

A block states this once for each of its tensors. The tensor's shape, where padding puts its numbers, what
each rank has of it, whether it is packed and whether adapters may change it all follow from that."""

from __future__ import annotations

from typing import NamedTuple

import numpy


class Run(NamedTuple):
    """Rows or columns one after another: `count` units of `parts` * `size` each.

    A head of q with its gate, for example, is one unit of two parts of D rows."""

    count: int
    size: int = 1
    of: str = ""    # what ranks divide, in units: "heads", "columns", ..; "": every rank has all
    parts: int = 1  # of a unit; padding spreads them apart

    @property
    def unit(self) -> int:
        return self.parts * self.size

    @property
    def length(self) -> int:
        return self.count * self.unit


Axis = tuple[Run, ...]


class Tensor(NamedTuple):
    """A matrix (rows, columns), or a vector."""

    rows: Axis
    columns: Axis | None = None  # None: a vector
    packed: bool = False         # is it laid out for products?
    exact: bool = False          # is a matrix float32, whatever the type of others? vectors are
    adapted: bool = False        # may adapters change its product?
    once: bool = False           # a bias that the first rank alone adds
    factor: float = 1.0          # of a norm's weights, if what it reads was padded

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (self.rows,) if self.columns is None else (self.rows, self.columns)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(length, self.axes))

    @property
    def bias(self) -> Tensor:
        """The bias of this matrix, a number for each row. If ranks divide the columns, they sum products."""
        return Tensor(self.rows, once=any(run.of for run in self.columns or ()))


Tensors = dict[str, Tensor]


def length(axis: Axis) -> int:
    return sum(run.length for run in axis)


def axis_of(size: int | Axis) -> Axis:
    return (Run(size),) if isinstance(size, int) else size


def vector(size: int | Axis, **more) -> Tensor:
    return Tensor(axis_of(size), **more)


def matrix(rows: int | Axis, columns: int | Axis, packed: bool = True, **more) -> Tensor:
    return Tensor(axis_of(rows), axis_of(columns), packed, **more)


# ---- padding


def padded_places(axis: Axis, padded: Axis) -> numpy.ndarray:
    """Where the numbers along an axis go in the padded one, which has the same runs in larger sizes."""
    places = []
    begin = 0
    for run, wide in zip(axis, padded):
        units = numpy.arange(run.count * run.parts)
        places.append((begin + units[:, None] * wide.size + numpy.arange(run.size)).ravel())
        begin += wide.length
    return numpy.concatenate(places)


# ---- ranks

Divided = dict[str, range]  # what ranks divide -> the units that one rank has


class RankPart(NamedTuple):
    """What a rank has of a tensor: ranges along one axis; no ranges: the whole tensor."""

    axis: int = 0
    ranges: tuple[range, ...] = ()


def rank_part(tensor: Tensor, divided: Divided) -> RankPart:
    for number, axis in enumerate(tensor.axes):
        if any(run.of in divided for run in axis):
            return RankPart(number, rank_ranges(axis, divided))
    return RankPart()


def rank_ranges(axis: Axis, divided: Divided) -> tuple[range, ...]:
    """A rank's numbers along an axis, a range for each run."""
    ranges = []
    begin = 0
    for run in axis:
        own = divided.get(run.of, range(run.count))
        ranges.append(range(begin + own.start * run.unit, begin + own.stop * run.unit))
        begin += run.length
    return tuple(ranges)

"""What differs between families' towers: what is added to patches, how layers rotate, what makes rows the
model's.

These are rows of tables, which `Eyes` names. Patches of a square that becomes one row are neighbours in every
array here, row by row in the square; the squares are in raster order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    from chatlm.worker.model.spec import ModelSpec

Arrays = Mapping[str, numpy.ndarray]
Products = Mapping[str, Callable[[numpy.ndarray], numpy.ndarray]]


def by_squares(values: numpy.ndarray, rows: int, columns: int, side: int) -> numpy.ndarray:
    """(rows * columns, ...) in raster order -> in the order of patches, for squares of side * side."""
    grid = values.reshape(rows // side, side, columns // side, side, *values.shape[1:])
    return grid.swapaxes(1, 2).reshape(values.shape)


def fixed_places(places: numpy.ndarray, rows: int, columns: int) -> numpy.ndarray:
    """Every tile has the grid of the table."""
    return places


# name -> (table, rows, columns of the patches) -> what is added to these (rows * columns, C), in raster order
PLACES: dict[str, Callable[[numpy.ndarray, int, int], numpy.ndarray]] = {"fixed": fixed_places}

# name -> (spec of the layers, rows, columns) -> the angle of each pair of a head, (rows * columns, D / 2), in
# raster order; pairs are (i, i + D / 2)
ANGLES: dict[str, Callable[[ModelSpec, int, int], numpy.ndarray]] = {}


class Projector(NamedTuple):
    """`compute`: the rows (n, C) of the tower's last layer, after its last norm, in the order of patches, the
    size n / N of a square, and what the fields name -> the model's rows (N, width)."""

    products: Mapping[str, str | None]   # matrices -> the activation of their products
    values: tuple[str, ...]              # vectors
    compute: Callable[[numpy.ndarray, int, Products, Arrays], numpy.ndarray]


def joined(x: numpy.ndarray, square: int) -> numpy.ndarray:
    """Those of a square one after another: (n, C) -> (n / square, square * C)."""
    return x.reshape(len(x) // square, -1)


PROJECTORS: dict[str, Projector] = {
    "idefics3": Projector({"project": None}, (), lambda x, square, products, values:
                          products["project"](joined(x, square)))}

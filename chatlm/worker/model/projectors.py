"""What differs between the towers of families: what is added to patches, how layers rotate, and how rows
become the model's.

Each is a row of a table, which `StoredTower` names. In every array here the patches of a square that becomes
one row
are neighbours, row by row within the square. The squares are in raster order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    from chatlm.worker.arrays.rotary import Rope

Arrays = Mapping[str, numpy.ndarray]
Products = Mapping[str, Callable[[numpy.ndarray], numpy.ndarray]]


def by_squares(values: numpy.ndarray, rows: int, columns: int, side: int) -> numpy.ndarray:
    """(rows * columns, ...) from raster order to the order of patches, for squares of side * side."""
    grid = values.reshape(rows // side, side, columns // side, side, *values.shape[1:])
    return grid.swapaxes(1, 2).reshape(values.shape)


def fixed_places(places: numpy.ndarray, rows: int, columns: int) -> numpy.ndarray:
    """The table as it is: every tile has its grid."""
    return places


def spread(size: int, wanted: int) -> numpy.ndarray:
    """Weights (wanted, size) of torch's bilinear interpolation with antialias, for numbers on a line."""
    scale = size / wanted
    wide = max(scale, 1.0)
    centre = (numpy.arange(wanted)[:, None] + 0.5) * scale
    taps = numpy.arange(size)
    first = (centre - wide + 0.5).astype(int)
    last = (centre + wide + 0.5).astype(int)
    weights = numpy.maximum(1 - numpy.abs((taps + 0.5 - centre) / wide), 0) * (taps >= first) * (taps < last)
    return (weights / weights.sum(1, keepdims=True)).astype(numpy.float32)


def spread_places(places: numpy.ndarray, rows: int, columns: int) -> numpy.ndarray:
    """The table has a square grid, and is resized for other grids (SigLIP 2, naflex)."""
    side = math.isqrt(len(places))
    return places if (rows, columns) == (side, side) else of_square(spread, places, rows, columns)


def of_square(weights: Callable[[int, int], numpy.ndarray], places: numpy.ndarray, rows: int,
              columns: int) -> numpy.ndarray:
    """The places of a grid, made from those of a square grid. weights: (size, wanted) -> (wanted, size)."""
    side = math.isqrt(len(places))
    by_row = weights(side, rows) @ places.reshape(side, -1)  # (rows, side * C)
    return numpy.matmul(weights(side, columns), by_row.reshape(rows, side, -1)).reshape(rows * columns, -1)


def between(size: int, wanted: int) -> numpy.ndarray:
    """Weights (wanted, size) of linear interpolation for numbers on a line. The ends keep their values."""
    places = numpy.linspace(0, size - 1, wanted)
    first = numpy.minimum(places.astype(int), size - 1)
    weights = numpy.zeros((wanted, size), numpy.float64)
    numpy.add.at(weights, (numpy.arange(wanted), first), 1 - (places - first))
    numpy.add.at(weights, (numpy.arange(wanted), numpy.minimum(first + 1, size - 1)), places - first)
    return weights.astype(numpy.float32)


def bilinear_places(places: numpy.ndarray, rows: int, columns: int) -> numpy.ndarray:
    """The table has a square grid, and the places of other grids are interpolated from it (Qwen3-VL)."""
    return of_square(between, places, rows, columns)


def by_two(rope: Rope, *places: numpy.ndarray) -> numpy.ndarray:
    """Angles of pairs: the first half turns by the first places (n), the other half by the second."""
    quarter = rope.size // 4
    frequencies = rope.base ** -(numpy.arange(quarter) / quarter)
    return numpy.concatenate([numpy.outer(each, frequencies) for each in places], axis=1)


def by_row_and_column(rope: Rope, rows: int, columns: int) -> numpy.ndarray:
    """The angles of Qwen3-VL."""
    return by_two(rope, *numpy.divmod(numpy.arange(rows * columns), columns))


def by_turns(rope: Rope, rows: int, columns: int) -> numpy.ndarray:
    """The angles of Pixtral: frequencies go by turns to rows and to columns."""
    quarter = rope.size // 4
    frequencies = rope.base ** -(numpy.arange(2 * quarter) / (2 * quarter))
    row, column = numpy.divmod(numpy.arange(rows * columns), columns)
    of_row = numpy.outer(row, frequencies[::2])
    of_column = numpy.outer(column, frequencies[1::2])
    return numpy.concatenate([of_row, of_column], axis=1)


def places_of_axes(places: numpy.ndarray, rows: int, columns: int) -> numpy.ndarray:
    """Two tables (2, n, C): one has a row for each column of patches, one for each row of them (Gemma 4)."""
    return (places[0, None, :columns] + places[1, :rows, None]).reshape(rows * columns, -1)


def angles_of_axes(rope: Rope, rows: int, columns: int) -> numpy.ndarray:
    """The angles of Gemma 4: by the column first, then by the row."""
    return by_two(rope, *numpy.divmod(numpy.arange(rows * columns), columns)[::-1])


# name -> a function: (table, rows and columns of patches) -> what is added to them (rows * columns, C), in
# raster order
PLACES: dict[str, Callable[[numpy.ndarray, int, int], numpy.ndarray]] = {
    "fixed": fixed_places, "spread": spread_places, "axes": places_of_axes, "bilinear": bilinear_places}

# name -> a function: (how the layers turn, rows and columns of patches) -> the angle of each pair of a head,
# (rows * columns, D / 2) in raster order. Pairs are (i, i + D / 2)
ANGLES: dict[str, Callable[[Rope, int, int], numpy.ndarray]] = {
    "axes": angles_of_axes, "by_row_and_column": by_row_and_column, "by_turns": by_turns}


class Projector(NamedTuple):
    """Makes rows of the model from the output of a tower's last layer.

    compute     (rows (n, C) in the order of patches, size n / N of a square, products, values) -> rows (N,
                width)
    start       None, or it replaces the layers: (patches, what is added to them, products, values) -> rows
                (n, C)"""

    products: Mapping[str, str | None]   # name of a matrix -> the activation of its product
    values: tuple[str, ...]              # names of vectors
    compute: Callable[[numpy.ndarray, int, Products, Arrays], numpy.ndarray]
    normed: bool = True                  # does the tower end with a norm?
    start: Callable[[numpy.ndarray, numpy.ndarray, Products, Arrays], numpy.ndarray] | None = None


def joined(x: numpy.ndarray, square: int) -> numpy.ndarray:
    """The rows of a square side by side: (n, C) -> (n / square, square * C)."""
    return x.reshape(len(x) // square, -1)


def averaged(x: numpy.ndarray, square: int) -> numpy.ndarray:
    """The mean of the rows of a square: (n, C) -> (n / square, C)."""
    return x.reshape(len(x) // square, square, -1).mean(axis=1)


def rms_norm(x: numpy.ndarray, weight: numpy.ndarray | float, eps: float) -> numpy.ndarray:
    return x / numpy.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * weight


def layer_norm(x: numpy.ndarray, weight: numpy.ndarray, bias: numpy.ndarray, eps: float) -> numpy.ndarray:
    x = x - x.mean(axis=1, keepdims=True)
    return x / numpy.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * weight + bias


def normed_join(x: numpy.ndarray, square: int, products: Products, values: Arrays) -> numpy.ndarray:
    x = layer_norm(joined(x, square), values["join_norm"], values["join_norm_bias"], 1e-5)
    return products["project"](products["widen"](x))


def widened_join(x: numpy.ndarray, square: int, products: Products, values: Arrays) -> numpy.ndarray:
    return products["project"](products["widen"](joined(x, square)))


def merged(x: numpy.ndarray, square: int, products: Products, values: Arrays) -> numpy.ndarray:
    """Pixtral: the numbers of a square by channel, then by patch."""
    by_channel = x.reshape(len(x) // square, square, -1).swapaxes(1, 2)
    seen = products["merge"](by_channel.reshape(len(by_channel), -1))
    return products["project"](products["widen"](seen))


def normed_mean(x: numpy.ndarray, square: int, products: Products, values: Arrays) -> numpy.ndarray:
    return products["project"](rms_norm(averaged(x, square), values["mean_norm"], 1e-6))


def scaled_mean(x: numpy.ndarray, square: int, products: Products, values: Arrays) -> numpy.ndarray:
    x = averaged(x, square) * numpy.float32(math.sqrt(x.shape[1]))
    if "mean_bias" in values:
        x = (x - values["mean_bias"]) * values["mean_scale"]
    return products["project"](rms_norm(x, 1.0, 1e-6))


def bare_patches(patches: numpy.ndarray, places: numpy.ndarray, products: Products,
                 values: Arrays) -> numpy.ndarray:
    """Gemma 4 12B: norms around one product."""
    def norm(x: numpy.ndarray, name: str) -> numpy.ndarray:
        return layer_norm(x, values[name], values[f"{name}_bias"], 1e-5)

    x = norm(products["patch"](norm(patches, "patch_norm")), "patch_out_norm")
    return norm(x + places, "place_norm")


PIXTRAL = Projector({"merge": None, "widen": "gelu_erf", "project": None}, (), merged)
PROJECTORS: dict[str, Projector] = {
    "pixtral": PIXTRAL,
    "pixtral_biased": PIXTRAL,
    "merger": Projector({"widen": "gelu_erf", "project": None}, (), widened_join),
    "gemma4": Projector({"project": None}, (), scaled_mean, normed=False),
    "gemma4_standard": Projector({"project": None}, ("mean_bias", "mean_scale"), scaled_mean, normed=False),
    "gemma4_bare": Projector(
        {"patch": None, "project": None},
        tuple(f"{name}{ending}" for name in ("patch_norm", "patch_out_norm", "place_norm")
              for ending in ("", "_bias")),
        lambda x, square, products, values: products["project"](rms_norm(x, 1.0, 1e-6)),
        normed=False, start=bare_patches),
    "gemma3": Projector({"project": None}, ("mean_norm",), normed_mean),
    "idefics3": Projector({"project": None}, (), lambda x, square, products, values:
                          products["project"](joined(x, square))),
    "lfm2": Projector({"widen": "gelu_erf", "project": None}, ("join_norm", "join_norm_bias"), normed_join),
    "lfm2_bare": Projector({"widen": "gelu_erf", "project": None}, (), widened_join)}

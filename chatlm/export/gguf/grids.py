"""Packs rows as IQ2 and IQ3, whose codes are points of a grid, with the bytes of `ggml_quantize_chunk`.

The signs of weights are stored apart. A point is the sizes of 8 weights (IQ2) or of 4 (IQ3), each of which
has one of 3 or 8 levels. Of all points only a few hundred are in a type's grid. A group of 16 or 32 weights
shares a scale. Several scales are tried: for each, every weight is rounded to its nearest level, and where
that point is not in the grid, the best of its neighbours there is taken. In ggml-quants.c it is
quantize_row_TYPE_impl.

Arrays are (n, G) as in searches.py. Points of all groups are (8 or 4, P)."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy

from chatlm.common.errors import require_library
from chatlm.export.gguf.searches import Array, F, nearest, positive_scale, ratio, summed


class GridType(NamedTuple):
    """How a type packs its groups."""

    group: int            # weights that share a scale
    shells: int           # distances from a point at which neighbours are looked for
    even_signs: bool      # is the number of minus signs of 8 weights even, so that one need not be stored?
    steps: tuple[int, float]  # scales that are tried to each side of the first, and their distance
    least: float          # a group whose largest size is below it becomes zeros
    factor: float         # of the stored scale
    again: str            # which points are looked for again once the scale is found; see AGAIN


# "all"; "off": those that were not in the grid; "some": all of a group in which one was not
AGAIN = "all", "off", "some"


TYPES = {
    "IQ2_XXS": GridType(32, 2, True, (6, 0.1), 1e-15, 1.0, "all"),
    "IQ2_XS": GridType(16, 2, True, (9, 0.1), 1e-15, 1.0, "off"),
    "IQ2_S": GridType(16, 1, False, (9, 0.1), 1e-8, 0.9875, "off"),
    "IQ3_XXS": GridType(32, 2, True, (15, 0.2), 1e-8, 1.0125, "off"),
    "IQ3_S": GridType(32, 3, False, (9, 0.2), 1e-45, 1.033, "some")}


class Grid(NamedTuple):
    """The points of a type. A point's number has a few bits for the level of each coordinate."""

    levels: int
    bits: int
    codes: Array       # (8 or 4, size) float32: the levels of each point of the grid
    place: Array       # of a number in the grid, or -1
    begins: Array      # where the neighbours of a number begin in `neighbours`
    counts: Array
    neighbours: Array  # places in the grid, the nearest first

    def numbers(self, codes: Array) -> Array:
        """(P,) of codes (8 or 4, P)."""
        shifts = self.bits * numpy.arange(len(codes))
        return (codes.astype(numpy.int64) << shifts[:, None]).sum(0)


@functools.cache
def grid_of(kind: str, most_shells: int) -> Grid:
    """most_shells: at so many distances from a point neighbours are looked for."""
    package = getattr(require_library("gguf", "packing").quants, kind)
    package.init_grid()
    values = numpy.asarray(package.grid).reshape(-1, package.grid_shape[1])
    codes = numpy.searchsorted(numpy.unique(values), values)  # (size, 8 or 4)
    levels = int(codes.max()) + 1
    bits = 2 if levels == 3 else 3
    coordinates = codes.shape[1]
    points = numpy.array([*itertools.product(range(levels), repeat=coordinates)])
    shifts = bits * numpy.arange(coordinates)
    numbers = (points << shifts).sum(1)
    place = numpy.full(1 << bits * coordinates, -1, numpy.int32)
    place[(codes << shifts).sum(1)] = numpy.arange(len(codes))
    begins = numpy.zeros(len(place), numpy.int64)
    counts = numpy.zeros(len(place), numpy.int64)
    found = []
    total = 0
    for number, point in zip(numbers, points):
        if place[number] >= 0:
            continue
        distances = numpy.square(codes - point).sum(1)
        order = numpy.argsort(distances, kind="stable")
        shells = numpy.unique(distances)
        near = order[:numpy.count_nonzero(distances <= shells[:most_shells][-1])]
        begins[number] = total
        counts[number] = len(near)
        total += len(near)
        found.append(near)
    return Grid(levels, bits, codes.T.astype(numpy.float32), place, begins, counts, numpy.concatenate(found))


class LevelValues(NamedTuple):
    """The values of levels before they are scaled."""

    step: int
    first: Array  # (P,): of level 0, for each point


def places_of(grid: Grid, codes: Array, x: Array, weights: Array, scale: Array,
              line: LevelValues) -> tuple[Array, Array]:
    """For points (8 or 4, P) with a scale each: (places in the grid (P,), were the codes in it?). Others go
    to the neighbour where the error is the least. line: what a level stands for."""
    numbers = grid.numbers(codes)
    places = grid.place[numbers]
    is_on = places >= 0
    off = numpy.flatnonzero(~is_on)
    if not len(off):
        return places, is_on
    counts = grid.counts[numbers[off]]
    starts = numpy.cumsum(counts) - counts
    of_point = numpy.repeat(off, counts)
    within = numpy.arange(len(of_point)) - numpy.repeat(starts, counts)
    candidates = grid.neighbours[grid.begins[numbers[of_point]] + within]
    error = numpy.zeros(len(of_point), numpy.float32)
    scales = scale[of_point]
    first_levels = line.first[of_point]
    for level, value, weight in zip(grid.codes, x, weights):
        apart = scales * (F(line.step) * level[candidates] + first_levels) - value[of_point]
        error += weight[of_point] * apart * apart
    least = numpy.repeat(numpy.minimum.reduceat(error, starts), counts)
    best = numpy.flatnonzero(error == least)
    first = numpy.searchsorted(best, starts)
    places[off] = candidates[best[first]]
    return places, is_on


class Magnitudes(NamedTuple):
    """The weights of groups without their signs, and the signs."""

    x: Array      # (n, G); negative where its sign is stored wrongly
    signs: Array  # (n / 8, G): a bit for each of 8 weights


def sizes_of(x: Array, weights: Array, even: bool) -> Magnitudes:
    """even: of 8 weights with an odd number of minus signs, that whose sign costs least gets the wrong
    one."""
    eights = x.reshape(-1, 8, x.shape[1])
    negative = eights < 0
    sizes = numpy.abs(eights)
    if even:
        is_odd = negative.sum(1) % 2 > 0                               # (n / 8, G)
        cost = weights.reshape(eights.shape) * eights * eights
        cheapest = cost.argmin(1)[:, None] == numpy.arange(8)[:, None]  # (n / 8, 8, G)
        turned = cheapest & is_odd[:, None]
        sizes = numpy.where(turned, -sizes, sizes)
        negative = negative ^ turned
    bits = (negative << numpy.arange(8)[:, None]).sum(1)
    return Magnitudes(sizes.reshape(x.shape), bits & 127 if even else bits)


class PackedGroups(NamedTuple):
    """Packed groups."""

    scale: Array   # (G,)
    places: Array  # (points of a group, G)
    signs: Array   # (n / 8, G)


def pack_groups(kind: str, x: Array, weights: Array) -> PackedGroups:
    """The groups (n, G) of a type."""
    type_ = TYPES[kind]
    grid = grid_of(kind, type_.shells)
    size, signs = sizes_of(x, weights, type_.even_signs)
    search = PointSearch(grid, size, weights)
    largest = size.max(0)
    is_zero = largest < F(type_.least)
    top = F(2 * grid.levels - 1)
    if kind == "IQ2_XXS":
        largest = positive_scale(size, grid.levels + 1, weights).scale * F(grid.levels)
        is_zero |= largest <= 0
    divisor = numpy.where(is_zero, F(1), largest)
    scale = divisor / top
    best = numpy.zeros_like(scale)
    places = numpy.zeros((search.points, len(scale)), numpy.int64)
    is_on = numpy.full(places.shape, type_.again != "some")
    count, step = type_.steps
    for number in range(-count, count + 1):
        inverse = (top + F(number) * F(step)) / divisor
        others, others_on = search.nearest(inverse, F(1) / inverse)
        products, squares = search.sums(others)
        is_better = (squares > 0) & (products * products > best * squares)
        scale = numpy.where(is_better, ratio(products, squares), scale)
        best = numpy.where(is_better, scale * products, best)
        numpy.copyto(places, others, where=is_better)
        numpy.copyto(is_on, others_on, where=is_better)
    others, _ = search.nearest(F(1) / numpy.where(scale > 0, scale, F(1)), scale)
    chosen = ~is_on if type_.again == "off" else numpy.full(is_on.shape, True)
    changes = (scale > 0) & ((~is_on).any(0) | (type_.again == "all"))
    numpy.copyto(places, others, where=chosen & changes)
    products, squares = search.sums(places)
    scale = numpy.where(changes & (squares > 0), products / squares, scale)
    flipped = scale < 0
    signs = numpy.where(flipped, ~signs & (127 if type_.even_signs else 255), signs)
    return PackedGroups(numpy.where(is_zero, F(0), numpy.abs(scale)), numpy.where(is_zero, 0, places),
                  numpy.where(is_zero, 0, signs))


def as_points(values: Array, coordinates: int) -> Array:
    """(coordinates, P) of groups (n, G)."""
    apart = values.reshape(-1, coordinates, values.shape[1]).swapaxes(0, 1)
    return numpy.ascontiguousarray(apart).reshape(coordinates, -1)


class PointSearch:
    """Looks for the points of groups (n, G)."""

    def __init__(self, grid: Grid, x: Array, weights: Array):
        self.grid = grid
        self.x = x
        self.weights = weights
        self.weighted = weights * x
        self.coordinates = len(grid.codes)
        self.points = len(x) // self.coordinates
        self.point_x = self.as_points(x)
        self.point_weights = self.as_points(numpy.sqrt(weights))

    def as_points(self, values: Array) -> Array:
        return as_points(values, self.coordinates)

    def nearest(self, inverse: Array, scale: Array) -> tuple[Array, Array]:
        """(points, G) each: the places of the nearest points, and whether rounding alone finds them."""
        codes = nearest(F(0.5) * (inverse * self.x - F(1)), 0, self.grid.levels - 1)
        of_points = numpy.tile(scale, self.points)
        places, is_on = places_of(self.grid, self.as_points(codes), self.point_x, self.point_weights,
                                  of_points, LevelValues(2, numpy.ones_like(of_points)))
        return places.reshape(self.points, -1), is_on.reshape(self.points, -1)

    def sums(self, places: Array) -> tuple[Array, Array]:
        """(G,) each: weight * x * q and weight * q * q, summed over each group."""
        codes = self.grid.codes[:, places].swapaxes(0, 1).reshape(self.x.shape)
        levels = F(2) * codes + F(1)
        return summed(self.weighted * levels), summed(self.weights * levels * levels)

"""Packs rows as IQ1_S and IQ1_M with the bytes of `ggml_quantize_chunk`.

A weight has one of three levels: -1, 0 and 1, all of them moved up or down by 1/8. The weights of a group
are sorted; then two cuts divide them among the levels, and all pairs of cuts are tried. Points of 8 weights
that are not in the grid become their best neighbours. In ggml-quants.c it is quantize_row_iq1_s_impl and
_iq1_m_impl.

Arrays are (n, G) as in searches.py. A half of a group of IQ1_M moves its levels on its own."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy

from chatlm.export.gguf.grids import LevelValues, as_points, grid_of, places_of
from chatlm.export.gguf.searches import Array, F, nearest, summed

DELTA = F(0.125)
SHELLS = 3  # at so many distances neighbours are looked for
LEAST = {"IQ1_S": 1e-12, "IQ1_M": 1e-7}


class TernaryGroups(NamedTuple):
    """Packed groups."""

    scale: Array   # (G,)
    places: Array  # (points, G)
    shifts: Array  # (points, G): 1 or -1, which way the levels of a point are moved
    values: Array  # (n, G): of the levels before they are scaled


class Cuts(NamedTuple):
    """The best cuts: before the sorted weights `first` and `second`."""

    scale: Array   # (G,), which may be negative
    first: Array
    second: Array
    shifts: Array  # (halves, G)
    found: Array


def pack_ternary(kind: str, x: Array, weights: Array) -> TernaryGroups:
    """The groups (n, G) of a type."""
    grid = grid_of("IQ1_S", SHELLS)
    halves = 2 if kind == "IQ1_M" else 1
    order = numpy.argsort(x, axis=0, kind="stable")
    cuts = best_cuts(x, weights, order, halves)
    is_empty = (numpy.abs(x).max(0) < F(LEAST[kind])) | ~cuts.found
    places_in_order = numpy.arange(len(x))[:, None]
    codes = numpy.zeros(x.shape, numpy.int64)
    sorted_codes = (places_in_order >= cuts.first).astype(numpy.int64) + (places_in_order >= cuts.second)
    numpy.put_along_axis(codes, order, sorted_codes, 0)
    turned = cuts.scale < 0
    codes = numpy.where(turned, 2 - codes, codes)
    scale = numpy.where(is_empty, F(0), numpy.abs(cuts.scale))
    points = len(x) // 8
    shifts = numpy.repeat(numpy.where(turned, -cuts.shifts, cuts.shifts), points // halves, axis=0)
    first_levels = shifts.astype(numpy.float32) * DELTA - F(1)            # (points, G)
    places, is_on = places_of(grid, as_points(codes, 8), as_points(x, 8), as_points(weights, 8),
                              numpy.tile(scale, points), LevelValues(1, first_levels.reshape(-1)))
    places = places.reshape(points, -1)
    levels = grid.codes[:, places].swapaxes(0, 1).reshape(x.shape)
    values = levels + numpy.repeat(first_levels, 8, axis=0)
    weighted = weights * values
    products = summed(weighted * x)
    squares = summed(weighted * values)
    is_moved = ~is_on.reshape(points, -1).all(0)
    scale = numpy.where(is_moved & (products > 0) & (squares > 0) & ~is_empty, products / squares, scale)
    return TernaryGroups(scale, numpy.where(is_empty, 0, places), numpy.where(is_empty, 1, shifts), values)


def best_cuts(x: Array, weights: Array, order: Array, halves: int) -> Cuts:
    """Try all pairs of cuts with all ways to move the levels, in the order of ggml."""
    count, groups = x.shape
    half = order * halves // count                                        # of each sorted weight
    sums = []
    for number in range(halves):
        is_in = half == number
        sums.append((running(weights * x, order, is_in), running(weights, order, is_in)))
    best = numpy.full(groups, numpy.finfo(numpy.float32).min, numpy.float32)
    scale = numpy.abs(x).max(0)
    first = numpy.zeros(groups, numpy.int64)
    second = numpy.zeros(groups, numpy.int64)
    shifts = numpy.ones((halves, groups), numpy.int64)
    found = numpy.zeros(groups, bool)
    choices = [*itertools.product((1, -1), repeat=halves)]
    score = whole_scores if halves == 1 else half_scores
    for low in range(count + 1):
        for high in range(low, count + 1):
            of_halves = []
            for of_x, of_weights in sums:
                of_halves.append({shift: score(of_x, of_weights, low, high, shift) for shift in (1, -1)})
            for choice in choices:
                scores = [of_half[shift] for of_half, shift in zip(of_halves, choice)]
                products, squares = scores[0]
                for more_products, more_squares in scores[1:]:
                    products = products + more_products
                    squares = squares + more_squares
                is_better = (squares > 0) & (products * products > best * squares)
                if not is_better.any():
                    continue
                scale = numpy.where(is_better, products / squares, scale)
                best = numpy.where(is_better, scale * products, best)
                first[is_better] = low
                second[is_better] = high
                shifts[:, is_better] = numpy.array(choice)[:, None]
                found |= is_better
    return Cuts(scale, first, second, shifts, found)


def running(terms: Array, order: Array, is_in: Array) -> Array:
    """(n + 1, G): sums of the first terms in this order, of those that are in a half."""
    of_half = numpy.where(is_in, numpy.take_along_axis(terms, order, 0), F(0))
    sums = numpy.zeros((len(terms) + 1, terms.shape[1]), numpy.float32)
    numpy.add.accumulate(of_half, axis=0, out=sums[1:])
    return sums


def levels_of(shift: int) -> list[numpy.float32]:
    return [F(level) + F(shift) * DELTA for level in (-1, 0, 1)]


def whole_scores(of_x: Array, of_weights: Array, low: int, high: int, shift: int) -> tuple[Array, Array]:
    """Sums of weight * x * level and of weight * level * level, as IQ1_S adds them."""
    lowest, middle, top = levels_of(shift)
    products = (of_x[low] * lowest + (of_x[high] - of_x[low]) * middle + (of_x[-1] - of_x[high]) * top)
    squares = (of_weights[low] * lowest * lowest + (of_weights[high] - of_weights[low]) * middle * middle
               + (of_weights[-1] - of_weights[high]) * top * top)
    return products, squares


def half_scores(of_x: Array, of_weights: Array, low: int, high: int, shift: int) -> tuple[Array, Array]:
    """The same as IQ1_M adds them."""
    lowest, middle, top = levels_of(shift)
    products = of_x[-1] * top - (of_x[low] + of_x[high])
    squares = (of_weights[-1] * top * top + of_weights[low] * (lowest * lowest - middle * middle)
               + of_weights[high] * (middle * middle - top * top))
    return products, squares


def whole_scales(scale: Array, groups: int) -> tuple[Array, Array]:
    """(what 15 units of the largest scale are worth (blocks,), scales of 3 bits (groups, blocks))."""
    of_blocks = numpy.ascontiguousarray(scale.reshape(-1, groups).T)
    unit = of_blocks.max(0) / F(15)
    inverse = numpy.divide(F(1), unit, out=numpy.zeros_like(unit), where=unit != 0)
    return unit, nearest(F(0.5) * (inverse * of_blocks - F(1)), 0, 7)

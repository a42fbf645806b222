"""Finds the scale of a group of weights as ggml's quantizers do (ggml-quants.c), so that blocks equal theirs.

Arrays are (n, G): the n values of each of G groups, a group in a column. Then each step works on all groups
at once, and a sum over a group adds in the order of ggml's loops, because numpy adds whole rows one after the
other. All arithmetic is float32, operation for operation, so the results have the same bits."""

from __future__ import annotations

from typing import NamedTuple

import numpy

F = numpy.float32
Array = numpy.ndarray
LEAST = F(1e-15)  # of the largest value of a group: below it, all are zero


def summed(terms: Array) -> Array:
    """(G,): the sum of each group's n terms, from the first to the last."""
    if terms.shape[1] == 1:  # numpy would add these in pairs
        return numpy.add.accumulate(terms, axis=0)[-1]
    return numpy.add.reduce(terms, axis=0)


def nearest(values: Array, low: float, high: float) -> Array:
    """Whole numbers as floats, halves to even."""
    return numpy.clip(numpy.rint(values), F(low), F(high))


def inverse(values: Array) -> Array:
    """1 / x, and 0 of 0."""
    return numpy.divide(F(1), values, out=numpy.zeros_like(values), where=values != 0)


def ratio(above: Array, below: Array) -> Array:
    """above / below, and 0 where `below` is not positive."""
    return numpy.divide(above, below, out=numpy.zeros_like(above), where=below > 0)


def largest_of(x: Array) -> tuple[Array, Array]:
    """(G,) each: the value of the largest size, the first of several, and its size."""
    sizes = numpy.abs(x)
    first = sizes.argmax(0)
    columns = numpy.arange(x.shape[1])
    return x[first, columns], sizes[first, columns]


class Scales(NamedTuple):
    """The scale of each group, and its codes from 0 (n, G)."""

    scale: Array
    codes: Array


class ScalesAndMinimums(NamedTuple):
    """The scale and the minimum, not negative, of each group: x = scale * code - minimum."""

    scale: Array
    minimum: Array
    codes: Array


def scale_around_zero(x: Array, most: int, weights: Array) -> Scales:
    """ggml's make_qx_quants: x = scale * (code - most) with codes below 2 * most. 19 scales are tried."""
    largest, size = largest_of(x)
    is_zero = size < LEAST
    divisor = numpy.where(is_zero, F(1), largest)
    weighted = weights * x

    def tried(inverse_scale: Array) -> tuple[Array, Array, Array]:
        codes = nearest(inverse_scale * x, -most, most - 1)
        return codes, summed(weighted * codes), summed(weights * codes * codes)

    codes, products, squares = tried(F(-most) / divisor)
    scale = numpy.divide(products, squares, out=numpy.zeros_like(products), where=squares != 0)
    best = scale * products
    for step in (*range(-9, 0), *range(1, 10)):
        others, products, squares = tried(-(F(most) + F(0.1) * F(step)) / divisor)
        is_better = (squares > 0) & (products * products > best * squares)
        if is_better.any():
            numpy.copyto(codes, others, where=is_better)
            scale = numpy.where(is_better, ratio(products, squares), scale)
            best = numpy.where(is_better, scale * products, best)
    codes = numpy.where(is_zero, F(0), codes + F(most))
    return Scales(numpy.where(is_zero, F(0), scale), codes)


def scale_by_descent(x: Array, most: int) -> Scales:
    """ggml's make_q3_quants: as `scale_around_zero`, but each code is improved in turn, five times over."""
    largest, size = largest_of(x)
    is_zero = size < LEAST
    divisor = numpy.where(is_zero, F(1), largest)
    weights = x * x
    codes = nearest(F(-most) / divisor * x, -most, most - 1)
    products = summed(weights * x * codes)
    squares = summed(weights * codes * codes)
    for _ in range(5):
        for row, weight, code in zip(x, weights, codes):  # `code` is a view: it changes `codes`
            without = products - weight * row * code
            others = squares - weight * code * code
            is_possible = without > 0
            quotient = numpy.divide(row * others, without, out=numpy.zeros_like(row), where=is_possible)
            new = nearest(quotient, -most, most - 1)
            with_new = without + weight * row * new
            square = others + weight * new * new
            is_better = (is_possible & (new != code) & (square > 0)
                         & (with_new * with_new * squares > products * products * square))
            numpy.copyto(code, new, where=is_better)
            products = numpy.where(is_better, with_new, products)
            squares = numpy.where(is_better, square, squares)
    codes = numpy.where(is_zero, F(0), codes + F(most))
    return Scales(numpy.where(is_zero, F(0), ratio(products, squares)), codes)


class ScaleCandidates(NamedTuple):
    """The scales that `scales_and_minimums` tries: of most + first + step * 0, 1, .. count codes."""

    first: float
    step: float
    count: int


def scales_and_minimums(x: Array, most: int, weights: Array, steps: ScaleCandidates,
                        by_size: bool = False) -> ScalesAndMinimums:
    """ggml's make_qkx2_quants and make_qkx3_quants, which agree: for each scale that is tried, a line is
    fitted to the codes by least squares, and the one with the least weighted error is taken. by_size: the
    error of a value counts by its size, not its square."""
    low = numpy.minimum(x.min(0), F(0))
    high = x.max(0)
    is_flat = high <= low
    weight = summed(weights)
    weighted = weights * x
    total = summed(weighted)

    def codes_for(inverse_scale: Array) -> Array:
        return nearest(inverse_scale * (x - minimum), 0, most)

    def error_of(scale: Array, low: Array, codes: Array) -> Array:
        off = scale * codes + low - x
        off = numpy.abs(off) if by_size else off * off
        return summed(weights * off)

    def span() -> Array:
        return numpy.where(is_flat, F(1), high - minimum)

    minimum = low
    scale = F(1) / (F(most) / span())
    codes = codes_for(F(most) / span())
    least = error_of(scale, minimum, codes)
    for step in range(steps.count + 1):
        others = codes_for((F(steps.first) + F(steps.step) * F(step) + F(most)) / span())
        with_codes = weights * others
        sum_codes = summed(with_codes)
        sum_squares = summed(with_codes * others)
        sum_products = summed(with_codes * x)
        determinant = weight * sum_squares - sum_codes * sum_codes
        is_solvable = determinant > 0
        divisor = numpy.where(is_solvable, determinant, F(1))
        new_scale = (weight * sum_products - total * sum_codes) / divisor
        new_minimum = (sum_squares * total - sum_codes * sum_products) / divisor
        is_above = new_minimum > 0
        new_scale = numpy.where(is_above, ratio(sum_products, sum_squares), new_scale)
        new_minimum = numpy.where(is_above, F(0), new_minimum)
        error = error_of(new_scale, new_minimum, others)
        is_better = is_solvable & (error < least)
        numpy.copyto(codes, others, where=is_better)
        least = numpy.where(is_better, error, least)
        scale = numpy.where(is_better, new_scale, scale)
        minimum = numpy.where(is_better, new_minimum, minimum)
    codes = numpy.where(is_flat, F(0), codes)
    return ScalesAndMinimums(numpy.where(is_flat, F(0), scale), -numpy.where(is_flat, low, minimum), codes)


def positive_scale(x: Array, most: int, weights: Array) -> Scales:
    """ggml's make_qp_quants: x = scale * code, for scales and minimums of groups, which are not negative."""
    largest = numpy.maximum(x.max(0), F(0))
    is_zero = largest < LEAST
    divisor = numpy.where(is_zero, F(1), largest)

    def error_of(scale: Array, codes: Array) -> Array:
        off = x - scale * codes
        return summed(weights * off * off)

    inverse_scale = F(most) / divisor
    least = error_of(F(1) / inverse_scale, as_bytes(numpy.rint(inverse_scale * x)))
    for step in (*range(-4, 0), *range(1, 5)):
        other = (F(0.1) * F(step) + F(most)) / divisor
        error = error_of(F(1) / other, numpy.minimum(numpy.rint(other * x), F(most)))
        is_better = error < least
        least = numpy.where(is_better, error, least)
        inverse_scale = numpy.where(is_better, other, inverse_scale)
    codes = numpy.minimum(numpy.rint(inverse_scale * x), F(most))
    products = summed(weights * x * codes)
    squares = summed(weights * codes * codes)
    codes = as_bytes(codes)
    for _ in range(5):
        for row, weight, code in zip(x, weights, codes):
            without = products - weight * row * code
            others = squares - weight * code * code
            is_possible = (without > 0) & (others > 0)
            quotient = numpy.divide(row * others, without, out=numpy.zeros_like(row), where=is_possible)
            new = numpy.minimum(numpy.rint(quotient), F(most))
            with_new = without + weight * row * new
            square = others + weight * new * new
            is_better = (is_possible & (new != code)
                         & (with_new * with_new * squares > products * products * square))
            numpy.copyto(code, as_bytes(new), where=is_better)
            products = numpy.where(is_better, with_new, products)
            squares = numpy.where(is_better, square, squares)
    codes = numpy.where(is_zero, F(0), codes)
    return Scales(numpy.where(is_zero, F(0), ratio(products, squares)), codes)


def as_bytes(codes: Array) -> Array:
    """Whole numbers as floats, wrapped as ggml's uint8 wraps them."""
    return numpy.mod(codes, F(256))

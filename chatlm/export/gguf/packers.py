"""Packs rows of floats as blocks of GGUF's types, with the bytes of ggml's `ggml_quantize_chunk`.

A packer gets rows (R, K) of finite float32 and the importance of the K columns, or None, and returns uint8
(R, bytes of a row). In ggml-quants.c it is quantize_row_TYPE_ref without importance, and _impl with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy

from chatlm.common.errors import require_library
from chatlm.export.gguf.grids import TYPES as GRID_TYPES, pack_groups
from chatlm.export.gguf.searches import (
    LEAST, Array, F, ScaleCandidates, inverse, largest_of, nearest, positive_scale, ratio, scale_around_zero,
    scale_by_descent, scales_and_minimums, summed)
from chatlm.export.gguf.ternary import pack_ternary, whole_scales as ternary_scales
from chatlm.worker.arrays.gguf_types import TYPES

SUPER = 256  # weights in a block of a K type
IQ4_LEVELS = numpy.array(
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), numpy.float32)

Packer = Callable[[Array, Array | None], Array]


def columns_of(rows: Array, size: int) -> Array:
    """(size, G): each group of `size` weights in a column."""
    return numpy.ascontiguousarray(rows.reshape(-1, size).T)


def importance_of(importance: Array, rows: int, size: int) -> Array:
    """(size, G): the importance of the weights of `columns_of`."""
    return numpy.ascontiguousarray(numpy.tile(importance.reshape(-1, size).T, (1, rows)))


def halves(values: Array) -> Array:
    """(G, 2) bytes of float16."""
    return values.astype(numpy.float16)[:, None].view(numpy.uint8)


def stored(values: Array) -> Array:
    """What a float16 keeps of the values."""
    return values.astype(numpy.float16).astype(numpy.float32)


def joined(rows: int, *parts: Array) -> Array:
    """The parts of blocks (blocks, bytes), side by side, as whole rows."""
    return numpy.hstack(parts).reshape(rows, -1)


# ---- blocks of 32 weights


def weights_in_rows(x: Array, importance: Array, size: int) -> Array:
    """(size, G) what an error counts for: importance * sqrt(mean square of the row + the value's square)."""
    rows, columns = x.shape
    mean_square = summed(numpy.ascontiguousarray((x * x).T)) / F(columns)
    of_groups = numpy.repeat(mean_square, columns // size)
    values = columns_of(x, size)
    return importance_of(importance, rows, size) * numpy.sqrt(of_groups + values * values)


def nibbles(codes: Array) -> Array:
    """(G, 16) bytes of codes (32, G): the first 16 in the low halves."""
    whole = codes.astype(numpy.uint8)
    return numpy.ascontiguousarray((whole[:16] & 15 | (whole[16:] & 15) << 4).T)


def fifth_bits(codes: Array) -> Array:
    """(G, 4) bytes: bit 4 of each of 32 codes (32, G)."""
    return numpy.packbits((codes.astype(numpy.uint8) >> 4 & 1).T, axis=1, bitorder="little")


def pack_q8_0(rows: Array, importance: Array | None) -> Array:
    x = columns_of(rows, 32)
    scale = numpy.abs(x).max(0) / F(127)
    scaled = x * inverse(scale)
    size = numpy.abs(scaled)
    whole = numpy.trunc(size)
    rounded = whole + (size - whole >= F(0.5))  # halves away from zero
    codes = numpy.copysign(rounded, scaled).astype(numpy.int8)
    return joined(len(rows), halves(scale), numpy.ascontiguousarray(codes.T).view(numpy.uint8))


def pack_around_zero(most: int, rows: Array, importance: Array | None) -> Array:
    """Q4_0 (most = 8) and Q5_0 (16)."""
    x = columns_of(rows, 32)
    if importance is None:
        scale = largest_of(x)[0] / F(-most)
        codes = numpy.minimum(numpy.trunc(x * inverse(scale) + (F(most) + F(0.5))), F(2 * most - 1))
    else:
        scale, codes = scale_around_zero(x, most, weights_in_rows(rows, importance, 32))
    fifth = (fifth_bits(codes),) if most > 8 else ()
    return joined(len(rows), halves(scale), *fifth, nibbles(codes))


def pack_from_minimum(most: int, rows: Array, importance: Array | None) -> Array:
    """Q4_1 (most = 15) and Q5_1 (31)."""
    x = columns_of(rows, 32)
    if importance is None:
        low = x.min(0)
        scale = (x.max(0) - low) / F(most)
        codes = numpy.minimum(numpy.trunc((x - low) * inverse(scale) + F(0.5)), F(most))
    else:
        weights = weights_in_rows(rows, importance, 32)
        scale, minimum, codes = scales_and_minimums(x, most, weights, WITH_IMPORTANCE)
        low = -minimum
    fifth = (fifth_bits(codes),) if most > 15 else ()
    return joined(len(rows), halves(scale), halves(low), *fifth, nibbles(codes))


# ---- K types: blocks of 256 weights in groups, whose scales are packed too


WITH_IMPORTANCE = ScaleCandidates(-0.9, 0.05, 36)


def by_block(values: Array, groups: int) -> Array:
    """(groups, blocks) of values of each group (G,), a block's groups in a column."""
    return numpy.ascontiguousarray(values.reshape(-1, groups).T)


def by_group(values: Array) -> Array:
    """(G,): the way back from `by_block`."""
    return numpy.ascontiguousarray(values.T).reshape(-1)


def weights_in_blocks(rows: Array, importance: Array, size: int, factor: int) -> Array:
    """(size, G): as `weights_in_rows`, with `factor` times the mean square of a block of 256."""
    x = columns_of(rows, size)
    squares = summed(columns_of(rows * rows, SUPER))
    if factor != 1:
        squares = F(factor) * squares
    of_groups = numpy.repeat(squares / F(SUPER), SUPER // size)
    return importance_of(importance, len(rows), size) * numpy.sqrt(of_groups + x * x)


def stepped(x: Array, step: Array, low: int, high: int, codes: Array) -> Array:
    """Codes (n, G) for the step that is stored; of a step of 0 those that the search has found."""
    quotient = numpy.divide(x, step, out=numpy.zeros_like(x), where=step != 0)
    return numpy.where(step != 0, nearest(quotient, low, high) - F(low), codes)


def packed_pairs(codes: Array) -> Array:
    """(blocks, 64) bytes of codes of 2 bits (blocks, 256): four runs of 32 of each 128."""
    runs = codes.reshape(-1, 2, 4, 32)
    return (runs[:, :, 0] | runs[:, :, 1] << 2 | runs[:, :, 2] << 4 | runs[:, :, 3] << 6).reshape(-1, 64)


def whole_blocks(codes: Array) -> Array:
    """(blocks, 256) uint8 of codes (n, G)."""
    return numpy.ascontiguousarray(codes.T).astype(numpy.uint8).reshape(-1, SUPER)


def packed_scales(scales: Array, minimums: Array) -> Array:
    """(blocks, 12) bytes of 8 scales and 8 minimums of 6 bits (8, blocks)."""
    scales = scales.astype(numpy.uint8)
    minimums = minimums.astype(numpy.uint8)
    first = scales[:4] | scales[4:] >> 4 << 6
    second = minimums[:4] | minimums[4:] >> 4 << 6
    third = scales[4:] & 15 | (minimums[4:] & 15) << 4
    return numpy.ascontiguousarray(numpy.vstack((first, second, third)).T)


def pack_q4_k(most: int, steps: ScaleCandidates, rows: Array, importance: Array | None) -> Array:
    """Q4_K (most = 15) and Q5_K (31): 8 groups of 32, each with a scale and a minimum of 6 bits."""
    x = columns_of(rows, 32)
    if importance is None:
        weights = numpy.sqrt(summed(x * x) / F(32)) + numpy.abs(x)
        fitted = scales_and_minimums(x, most, weights, steps)
        scales = by_block(fitted.scale, 8)
        minimums = by_block(fitted.minimum, 8)
        of_scales, scales = whole_scales(scales, 63)
        of_minimums, minimums = whole_scales(minimums, 63)
    else:
        weights = weights_in_blocks(rows, importance, 32, 2)
        fitted = scales_and_minimums(x, most, weights, WITH_IMPORTANCE)
        counting = by_block(summed(weights), 8)
        of_scales, scales = positive_scale(by_block(fitted.scale, 8), 63, counting)
        of_minimums, minimums = positive_scale(by_block(fitted.minimum, 8), 63, counting)
        if most > 15:
            scales = numpy.minimum(scales, F(63))
            minimums = numpy.minimum(minimums, F(63))
    step = by_group(stored(of_scales) * scales)
    low = by_group(stored(of_minimums) * minimums)
    codes = whole_blocks(stepped(x + low, step, 0, most, fitted.codes))
    fifth = ()
    if most > 15:
        bits = codes.reshape(-1, 8, 32) >> 4 & 1
        fifth = (numpy.packbits(bits, axis=1, bitorder="little").reshape(-1, 32),)
    runs = codes.reshape(-1, 4, 2, 32)
    low_bits = (runs[:, :, 0] & 15 | (runs[:, :, 1] & 15) << 4).reshape(-1, 128)
    return joined(len(rows), halves(of_scales), halves(of_minimums), packed_scales(scales, minimums), *fifth,
                  low_bits)


def whole_scales(values: Array, most: int) -> tuple[Array, Array]:
    """(what a unit is worth (blocks,), whole scales (groups, blocks)) of values, none negative."""
    largest = numpy.maximum(values.max(0), F(0))
    factor = ratio(numpy.full_like(largest, most), largest)
    return largest / F(most), numpy.minimum(numpy.mod(numpy.rint(factor * values), F(256)), F(most))


def pack_q2_k(rows: Array, importance: Array | None) -> Array:
    """16 groups of 16, each with a scale and a minimum of 4 bits."""
    x = columns_of(rows, 16)
    if importance is None:
        fitted = scales_and_minimums(x, 3, numpy.abs(x), ScaleCandidates(-0.5, 0.1, 15), by_size=True)
        of_scales, scales = whole_scales(by_block(fitted.scale, 16), 15)
        of_minimums, minimums = whole_scales(by_block(fitted.minimum, 16), 15)
    else:
        weights = weights_in_blocks(rows, importance, 16, 1)
        fitted = scales_and_minimums(x, 3, weights, WITH_IMPORTANCE)
        counting = by_block(summed(weights), 16)
        of_scales, scales = positive_scale(by_block(fitted.scale, 16), 15, counting)
        of_minimums, minimums = positive_scale(by_block(fitted.minimum, 16), 15, counting)
    both = numpy.ascontiguousarray((scales.astype(numpy.uint8) | minimums.astype(numpy.uint8) << 4).T)
    step = by_group(stored(of_scales) * scales)
    low = by_group(stored(of_minimums) * minimums)
    codes = whole_blocks(stepped(x + low, step, 0, 3, fitted.codes))
    return joined(len(rows), both, packed_pairs(codes), halves(of_scales), halves(of_minimums))


def signed_scales(values: Array, most: int) -> tuple[Array, Array]:
    """(what a unit is worth (blocks,), whole scales (groups, blocks) from -most) of values of both signs. The
    largest becomes -most."""
    largest, size = largest_of(values)
    is_zero = size == 0
    factor = F(-most) / numpy.where(is_zero, F(1), largest)
    unit = numpy.where(is_zero, F(0), F(1) / factor)
    return unit, numpy.where(is_zero, F(0), nearest(factor * values, -most, most - 1))


def pack_q3_k(rows: Array, importance: Array | None) -> Array:
    """16 groups of 16, each with a scale of 6 bits; the third bit of each code lies apart."""
    x = columns_of(rows, 16)
    if importance is None:
        fitted = scale_by_descent(x, 4)
        unit, scales = signed_scales(by_block(fitted.scale, 16), 32)
        kept = scales + F(32)
        kept = numpy.where(unit == 0, F(0), kept)  # as ggml stores them in a block of zeros
    else:
        weights = weights_in_blocks(rows, importance, 16, 2)
        fitted = scale_around_zero(x, 4, weights)
        unit, kept = scale_around_zero(by_block(fitted.scale, 16), 32, by_block(summed(weights), 16))
    step = by_group(stored(unit) * (kept - F(32)))
    codes = whole_blocks(stepped(x, step, -4, 3, fitted.codes))
    third = numpy.packbits((codes > 3).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
    kept = kept.astype(numpy.uint8)
    low = kept[:8] & 15 | (kept[8:] & 15) << 4
    high = kept[0:4] >> 4 | kept[4:8] >> 4 << 2 | kept[8:12] >> 4 << 4 | kept[12:16] >> 4 << 6
    both = numpy.ascontiguousarray(numpy.vstack((low, high)).T)
    return joined(len(rows), third, packed_pairs(codes & 3), both, halves(unit))


def pack_q6_k(rows: Array, importance: Array | None) -> Array:
    """16 groups of 16, each with a scale of 8 bits."""
    x = columns_of(rows, 16)
    weights = x * x if importance is None else importance_of(importance, len(rows), 16)
    fitted = scale_around_zero(x, 32, weights)
    scales = by_block(fitted.scale, 16)
    is_zero = numpy.abs(scales).max(0) < LEAST
    unit, whole = signed_scales(numpy.where(is_zero, F(0), scales), 128)
    step = by_group(stored(unit) * whole)
    codes = stepped(x, step, -32, 31, fitted.codes)
    codes = numpy.where(numpy.repeat(is_zero, 16), F(0), codes)
    runs = whole_blocks(codes).reshape(-1, 2, 4, 32)
    low = numpy.concatenate((runs[:, :, 0] & 15 | (runs[:, :, 2] & 15) << 4,
                             runs[:, :, 1] & 15 | (runs[:, :, 3] & 15) << 4), axis=2)
    high = runs >> 4
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    signed = numpy.ascontiguousarray(whole.T).astype(numpy.int8).view(numpy.uint8)
    return joined(len(rows), low.reshape(-1, 128), high.reshape(-1, 64), signed, halves(unit))


# ---- IQ4: codes that stand for uneven levels


MIDDLES = (IQ4_LEVELS[1:] + IQ4_LEVELS[:-1]) / F(2)
HALF_STEPS = 256  # the middle between two levels is a multiple of 1 / 2, so a table of these steps is exact
LEVEL_TABLE = numpy.searchsorted(MIDDLES, numpy.arange(-HALF_STEPS, HALF_STEPS) / F(2), side="right").astype(
    numpy.uint8)


def nearest_level(values: Array) -> Array:
    """The codes of the nearest levels; of two that are as near, the larger."""
    steps = numpy.clip(numpy.floor(values * F(2)), -HALF_STEPS, HALF_STEPS - 1)
    return LEVEL_TABLE[steps.astype(numpy.int32) + HALF_STEPS]


def scale_of_levels(x: Array, weights: Array) -> Array:
    """(G,): the scale of 16 that fits best."""
    largest, size = largest_of(x)
    is_zero = size < LEAST
    divisor = numpy.where(is_zero, F(1), largest)

    def tried(inverse_scale: Array) -> tuple[Array, Array]:
        levels = IQ4_LEVELS[nearest_level(inverse_scale * x)]
        weighted = weights * levels
        return summed(weighted * x), summed(weighted * levels)

    products, squares = tried(F(1) / (-divisor / IQ4_LEVELS[0]))
    scale = ratio(products, squares)
    best = scale * products
    for step in range(-7, 8):
        products, squares = tried((F(step) + IQ4_LEVELS[0]) / divisor)
        is_better = (squares > 0) & (products * products > best * squares)
        scale = numpy.where(is_better, ratio(products, squares), scale)
        best = numpy.where(is_better, scale * products, best)
    return numpy.where(is_zero, F(0), scale)


def pack_iq4_nl(rows: Array, importance: Array | None) -> Array:
    x = columns_of(rows, 32)
    weights = x * x
    if importance is not None:
        mean_square = summed(x * x) * (F(2) / F(32))
        weights = importance_of(importance, len(rows), 32) * numpy.sqrt(mean_square + x * x)
    scale = scale_of_levels(x, weights)
    return joined(len(rows), halves(scale), nibbles(nearest_level(inverse(scale) * x)))


def pack_iq4_xs(rows: Array, importance: Array | None) -> Array:
    """8 groups of 32, each with a scale of 6 bits."""
    x = columns_of(rows, 32)
    weights = x * x
    if importance is not None:
        mean_square = summed(columns_of(rows * rows, SUPER)) * (F(2) / F(SUPER))
        weights = importance_of(importance, len(rows), 32) * numpy.sqrt(numpy.repeat(mean_square, 8) + x * x)
    scales = by_block(scale_of_levels(x, weights), 8)
    unit = -largest_of(scales)[0] / F(32)
    whole = nearest(inverse(unit) * scales, -32, 31)
    codes = nearest_level(inverse(by_group(unit * whole)) * x)
    kept = (whole + F(32)).astype(numpy.uint8)
    low = kept[0::2] & 15 | (kept[1::2] & 15) << 4
    high = kept >> 4
    high = numpy.vstack([high[i] | high[i + 1] << 2 | high[i + 2] << 4 | high[i + 3] << 6 for i in (0, 4)])
    packed = nibbles(codes).reshape(-1, 128)
    return joined(len(rows), halves(unit), numpy.ascontiguousarray(high.T), numpy.ascontiguousarray(low.T),
                  packed)


# ---- IQ2 and IQ3: codes that stand for points of a grid


def pack_on_grid(kind: str, rows: Array, importance: Array | None) -> Array:
    """Without importance only IQ2_S and IQ3 can be packed."""
    group, factor = GRID_TYPES[kind].group, GRID_TYPES[kind].factor
    x = columns_of(rows, group)
    if importance is not None:
        weights = weights_in_blocks(rows, importance, group, 1 if kind in ("IQ2_XXS", "IQ2_XS") else 2)
    else:
        weights = x * x
        if kind == "IQ2_S":
            mean_square = F(2) * summed(columns_of(rows * rows, SUPER)) / F(SUPER)
            weights = F(0.25) * numpy.repeat(mean_square, SUPER // group) + weights
    packed = pack_groups(kind, x, weights)
    scales = by_block(packed.scale, SUPER // group)     # (groups, blocks)
    unit = scales.max(0) / F(31)
    whole = nearest(F(0.5) * (inverse(unit) * scales - F(1)), 0, 15).astype(numpy.uint32)
    places = numpy.ascontiguousarray(packed.places.T).reshape(len(unit), -1).astype(numpy.uint32)
    signs = numpy.ascontiguousarray(packed.signs.T).astype(numpy.uint32)
    parts = GRID_BYTES[kind](places, signs, whole.T)
    return joined(len(rows), halves(unit * F(factor)), *map(numpy.ascontiguousarray, parts))


def signs_with_scale(signs: Array, scales: Array) -> Array:
    """(blocks, 32) bytes: of each group 4 times 7 signs (G, 4), and a scale (blocks, groups) of 4 bits."""
    of_group = (signs << numpy.arange(0, 28, 7, dtype=numpy.uint32)).sum(1, dtype=numpy.uint32)
    return (of_group.reshape(scales.shape) | scales << 28).astype("<u4").view(numpy.uint8)


def pairs_of(scales: Array) -> Array:
    """(blocks, groups / 2) bytes of scales of 4 bits."""
    return (scales[:, 0::2] | scales[:, 1::2] << 4).astype(numpy.uint8)


def high_bits(places: Array, bits: int) -> Array:
    """(blocks, ..) bytes of what does not fit in the 8 low bits of places (blocks, points)."""
    count = 8 // bits
    apart = (places >> 8).reshape(len(places), -1, count)
    return (apart << numpy.arange(0, 8, bits, dtype=numpy.uint32)).sum(2).astype(numpy.uint8)


def iq2_xxs_bytes(places: Array, signs: Array, scales: Array) -> tuple[Array, ...]:
    groups = places.astype(numpy.uint8).reshape(len(places), -1, 4)
    words = signs_with_scale(signs, scales).reshape(groups.shape)
    return (numpy.concatenate((groups, words), axis=2).reshape(len(places), -1),)


def iq2_xs_bytes(places: Array, signs: Array, scales: Array) -> tuple[Array, ...]:
    both = places | signs.reshape(places.shape) << 9
    return both.astype("<u2").view(numpy.uint8), pairs_of(scales)


def iq2_s_bytes(places: Array, signs: Array, scales: Array) -> tuple[Array, ...]:
    return (places.astype(numpy.uint8), signs.reshape(places.shape).astype(numpy.uint8), high_bits(places, 2),
            pairs_of(scales))


def iq3_xxs_bytes(places: Array, signs: Array, scales: Array) -> tuple[Array, ...]:
    return places.astype(numpy.uint8), signs_with_scale(signs, scales)


def iq3_s_bytes(places: Array, signs: Array, scales: Array) -> tuple[Array, ...]:
    return (places.astype(numpy.uint8), high_bits(places, 1),
            signs.reshape(len(places), -1).astype(numpy.uint8), pairs_of(scales))


GRID_BYTES = {"IQ2_XXS": iq2_xxs_bytes, "IQ2_XS": iq2_xs_bytes, "IQ2_S": iq2_s_bytes,
              "IQ3_XXS": iq3_xxs_bytes, "IQ3_S": iq3_s_bytes}


# ---- IQ1: three levels, and points of a grid


def pack_iq1_s(rows: Array, importance: Array | None) -> Array:
    """8 groups of 32, each with a scale of 3 bits."""
    x = columns_of(rows, 32)
    weights = x * x if importance is None else weights_in_blocks(rows, importance, 32, 2)
    packed = pack_ternary("IQ1_S", x, weights)
    unit, scales = ternary_scales(packed.scale, 8)
    places = numpy.ascontiguousarray(packed.places.T)                       # (G, 4)
    high = ((places >> 8) << numpy.arange(0, 12, 3)).sum(1)
    is_down = (packed.shifts[0] < 0) & (by_group(unit + numpy.zeros_like(scales)) > 0)
    words = high | (by_group(scales).astype(numpy.int64) | is_down * 8) << 12
    return joined(len(rows), halves(unit * F(1.125)), places.astype(numpy.uint8).reshape(len(unit), -1),
                  words.astype("<u2").reshape(len(unit), -1).view(numpy.uint8))


def pack_iq1_m(rows: Array, importance: Array | None) -> Array:
    """16 groups of 16, each with a scale of 3 bits. The block's scale is in what these leave of 8 bytes."""
    x = columns_of(rows, 16)
    weights = x * x if importance is None else weights_in_blocks(rows, importance, 16, 2)
    packed = pack_ternary("IQ1_M", x, weights)
    unit, scales = ternary_scales(packed.scale, 16)
    is_used = by_group(unit + numpy.zeros_like(scales)) > 0
    values = packed.values * (F(2) * by_group(scales) + F(1))
    weighted = weights * values
    products = summed(in_blocks(weighted * x))
    squares = summed(in_blocks(weighted * values))
    exact = numpy.where(unit > 0, numpy.where(squares > 0, products / squares, unit), F(0))
    bits = (exact * F(1.1125)).astype(numpy.float16).view(numpy.uint16).astype(numpy.int64)
    whole = scales.T.astype(numpy.int64).reshape(-1, 4, 4)                  # (blocks, words, scales)
    words = (whole << numpy.arange(0, 12, 3)).sum(2) | (bits[:, None] >> numpy.arange(0, 16, 4) & 15) << 12
    places = packed.places
    down = (packed.shifts < 0) & is_used
    high = places[0] >> 8 | places[1] >> 8 << 4 | down[0] * 8 | down[1] * 128
    low = numpy.ascontiguousarray(places.T).astype(numpy.uint8).reshape(len(unit), -1)
    return joined(len(rows), low, high.astype(numpy.uint8).reshape(len(unit), -1),
                  words.astype("<u2").view(numpy.uint8))


def in_blocks(values: Array) -> Array:
    """(256, blocks) of groups (n, G)."""
    return numpy.ascontiguousarray(numpy.ascontiguousarray(values.T).reshape(-1, SUPER).T)


# ---- types without a search, which the gguf package packs


def pack_by_package(kind: str, rows: Array, importance: Array | None) -> Array:
    packed = require_library("gguf", "packing").quantize(rows, TYPES[kind])
    return packed.view(numpy.uint8).reshape(len(rows), -1)


def pack_f32(rows: Array, importance: Array | None) -> Array:
    return numpy.ascontiguousarray(rows, "<f4").view(numpy.uint8)


def pack_f16(rows: Array, importance: Array | None) -> Array:
    return rows.astype("<f2").view(numpy.uint8)


PACKERS: dict[str, Packer] = {
    "F32": pack_f32, "F16": pack_f16,
    "Q8_0": pack_q8_0,
    "Q4_0": partial(pack_around_zero, 8), "Q5_0": partial(pack_around_zero, 16),
    "Q4_1": partial(pack_from_minimum, 15), "Q5_1": partial(pack_from_minimum, 31),
    "Q2_K": pack_q2_k, "Q3_K": pack_q3_k, "Q6_K": pack_q6_k,
    "Q4_K": partial(pack_q4_k, 15, ScaleCandidates(-1.0, 0.1, 20)),
    "Q5_K": partial(pack_q4_k, 31, ScaleCandidates(-0.5, 0.1, 15)),
    "IQ4_NL": pack_iq4_nl, "IQ4_XS": pack_iq4_xs,
    **{kind: partial(pack_on_grid, kind) for kind in GRID_BYTES},
    "IQ1_S": pack_iq1_s, "IQ1_M": pack_iq1_m,
    **{kind: partial(pack_by_package, kind) for kind in ("BF16", "MXFP4", "TQ1_0", "TQ2_0")}}


def pack(kind: str, rows: Array, importance: Array | None = None) -> Array:
    """uint8 (R, bytes): rows (R, K) of finite float32 as blocks of the type `kind`."""
    with numpy.errstate(all="ignore"):  # what ggml computes for blocks of zeros is not used
        return PACKERS[kind](rows, importance)

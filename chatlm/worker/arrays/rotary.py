"""The tables of positions: rotary angles, and queries that grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy

from chatlm.worker.arrays.kinds import as_kind, floats

if TYPE_CHECKING:
    from chatlm.worker.model.spec import Attention, ModelSpec


def rope_frequencies(attention: Attention) -> tuple[tuple[float, ...], float]:
    """The angle by which each position turns each pair of a layer's heads; what multiplies cos and sin."""
    size = attention.head_size if attention.rope_size is None else attention.rope_size
    if not size:
        return (0.0,), 1.0
    frequencies = 1.0 / attention.rope_base ** (numpy.arange(0, size, 2, dtype=numpy.float64) / size)
    if attention.rope_factors:
        frequencies = frequencies / numpy.asarray(attention.rope_factors, dtype=numpy.float64)
    return tuple(frequencies.tolist()), attention.rope_scale


def rope_tables(spec: ModelSpec, layer: int = 0) -> tuple[numpy.ndarray, numpy.ndarray]:
    """cos and direction * sin of a layer at every position, (max_positions, rope_size / 2) float32 each."""
    frequencies, scale = rope_frequencies(spec.attention(layer))
    angles = numpy.outer(numpy.arange(spec.max_positions), frequencies)
    cos, sin = (part.astype(numpy.float32)
                for part in (scale * numpy.cos(angles), spec.rope_direction * scale * numpy.sin(angles)))
    return (rounded(cos), rounded(sin)) if spec.rope_bfloat16 else (cos, sin)


def rope_rows(spec: ModelSpec, layer: int, places: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """As rope_tables, of places (n, 3): time, row and column. Pair i turns by the row if i % 3 is 1, and by
    the column if it is 2, as long as rope_axes has such pairs; all others turn by the time (M-RoPE)."""
    frequencies, scale = rope_frequencies(spec.attention(layer))
    pair = numpy.arange(len(frequencies))
    axis = sum((number * ((pair % 3 == number) & (pair < 3 * spec.rope_axes[number])) for number in (1, 2)),
               numpy.zeros(len(pair), int))
    angles = places[:, axis] * numpy.array(frequencies)
    return ((scale * numpy.cos(angles)).astype(numpy.float32),
            (spec.rope_direction * scale * numpy.sin(angles)).astype(numpy.float32))


def rounded(table: numpy.ndarray) -> numpy.ndarray:
    """float32 values that bfloat16 has."""
    return floats(as_kind(table, "bfloat16"))


def query_scales(spec: ModelSpec) -> numpy.ndarray:
    """What multiplies q at every position, (max_positions,) float32."""
    beta, positions = spec.q_growth
    grown = 1 + beta * numpy.log1p(numpy.arange(spec.max_positions) // positions)
    return grown.astype(numpy.float32)

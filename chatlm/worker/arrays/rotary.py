"""The tables of positions: rotary angles, and queries that grow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from chatlm.worker.arrays.kinds import as_kind, floats


@dataclass(frozen=True)
class Rope:
    """How the heads of a layer turn by their position (Su et al., "RoFormer", 2021).

    Numbers i and i + size / 2 of a head turn together, by position / base^(2 i / size)."""

    size: int                # numbers of each head that turn, the first ones; 0: none
    base: float = 10000.0
    factors: tuple[float, ...] | None = None  # divides each of the size / 2 frequencies; inf stops it
    scale: float = 1.0       # multiplies cos and sin (yarn, longrope)
    direction: int = 1       # +1 textbook, -1 nanochat
    bfloat16: bool = False   # cos and sin rounded to bfloat16 (nanochat until 2026-03-04)

    @property
    def frequencies(self) -> tuple[float, ...]:
        """The angle by which a position turns each pair."""
        if not self.size:
            return (0.0,)
        exponents = numpy.arange(0, self.size, 2, dtype=numpy.float64) / self.size
        frequencies = 1.0 / self.base ** exponents
        if self.factors:
            frequencies = frequencies / numpy.asarray(self.factors, dtype=numpy.float64)
        return tuple(frequencies.tolist())

    def tables(self, positions: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """cos and direction * sin at every position, (positions, size / 2) float32 each."""
        cos, sin = self.turned(numpy.outer(numpy.arange(positions), self.frequencies))
        return (rounded(cos), rounded(sin)) if self.bfloat16 else (cos, sin)

    def rows(self, axes: tuple[int, ...], places: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """As `tables`, of places (n, 3): time, row and column. Pair i turns by the row if i % 3 is 1, and
        by the column if it is 2, as long as `axes` has such pairs; all others turn by the time (M-RoPE)."""
        pair = numpy.arange(len(self.frequencies))
        axis = numpy.zeros(len(pair), int)
        for number in (1, 2):
            axis += number * ((pair % 3 == number) & (pair < 3 * axes[number]))
        return self.turned(places[:, axis] * numpy.array(self.frequencies))

    def turned(self, angles: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        scale = self.scale if self.size else 1.0
        return ((scale * numpy.cos(angles)).astype(numpy.float32),
                (self.direction * scale * numpy.sin(angles)).astype(numpy.float32))


def rounded(table: numpy.ndarray) -> numpy.ndarray:
    """float32 values that bfloat16 has."""
    return floats(as_kind(table, "bfloat16"))


def query_scales(growth: tuple[float, ...], positions: int) -> numpy.ndarray:
    """What multiplies q at every position, (positions,) float32; growth: (beta, n)."""
    beta, every = growth
    grown = 1 + beta * numpy.log1p(numpy.arange(positions) // every)
    return grown.astype(numpy.float32)

"""Tables by position: rotary angles, and factors of queries."""

from __future__ import annotations


from dataclasses import dataclass

import numpy

from chatlm.worker.arrays.kinds import as_kind, floats


@dataclass(frozen=True)
class Rope:
    """How the heads of a layer turn by their position (Su et al., "RoFormer", 2021).

    Numbers i and i + size / 2 of a head turn together, by position / base^(2 i / size)."""

    size: int                # so many first numbers of each head turn; 0: none
    base: float = 10000.0
    factors: tuple[float, ...] | None = None  # divisors of the size / 2 frequencies; inf: a pair never turns
    scale: float = 1.0       # multiplies cos and sin (yarn, longrope)
    direction: int = 1       # +1 textbook, -1 nanochat
    bfloat16: bool = False   # cos and sin are rounded to bfloat16 (nanochat until 2026-03-04)

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
        """cos and direction * sin at each position, (positions, size / 2) float32 each."""
        cos, sin = self.turned(numpy.outer(numpy.arange(positions), self.frequencies))
        return (rounded(cos), rounded(sin)) if self.bfloat16 else (cos, sin)

    def rows(self, axes: tuple[int, ...], places: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """The same for places (n, 3): time, row and column of each (M-RoPE).

        Pair i turns by the row if i % 3 is 1, and by the column if it is 2, for as many pairs as `axes` says.
        All other pairs turn by the time."""
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
    """float32 values, rounded to values that bfloat16 has."""
    return floats(as_kind(table, "bfloat16"))


def query_scales(growth: tuple[float, ...], positions: int) -> numpy.ndarray:
    """The factor of q at each position, (positions,) float32: 1 + beta * ln(1 + position // n)."""
    beta, every = growth
    grown = 1 + beta * numpy.log1p(numpy.arange(positions) // every)
    return grown.astype(numpy.float32)

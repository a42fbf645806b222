"""The activations of feed-forward blocks in numpy, by the names of `chatlm/worker/ops/basic.py`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy

Array = numpy.ndarray


def sigmoid(x: Array) -> Array:
    with numpy.errstate(over="ignore"):  # of a large negative x it is 0
        return 1 / (1 + numpy.exp(-x))


def erf(x: Array) -> Array:
    """Off by at most 2e-7 (Abramowitz and Stegun, "Handbook of mathematical functions", 7.1.26)."""
    size = numpy.abs(x)
    t = 1 / (1 + 0.3275911 * size)
    sum_of_powers = numpy.zeros_like(t)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        sum_of_powers = t * (factor + sum_of_powers)
    return numpy.copysign(1 - sum_of_powers * numpy.exp(-size * size), x)


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + erf(x * math.sqrt(0.5)))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + numpy.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def gelu_quick(x: Array) -> Array:
    return x * sigmoid(1.702 * x)


def relu2(x: Array) -> Array:
    return numpy.square(numpy.maximum(x, 0))


def clamped_swiglu(gate: Array, up: Array) -> Array:
    """The gate of gpt-oss."""
    gate = numpy.minimum(gate, 7)
    return gelu_quick(gate) * (numpy.clip(up, -7, 7) + 1)


GATES: dict[str, Callable[[Array, Array], Array]] = {
    "swiglu": lambda gate, up: gate * sigmoid(gate) * up,
    "gelu": lambda gate, up: gelu(gate) * up,
    "reglu2": lambda gate, up: relu2(gate) * up,
    "quick_geglu": lambda gate, up: gelu_quick(gate) * up,
    "geglu": lambda gate, up: gelu_tanh(gate) * up,
    "clamped_swiglu": clamped_swiglu}
UNGATED: dict[str, Callable[[Array], Array]] = {
    "relu2": relu2, "gelu_erf": gelu, "gelu_quick": gelu_quick, "gelu_tanh": gelu_tanh}

"""Layers after the pooled hidden states of a text: an embedder's dense layers, a reranker's classifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy


def gelu(x: numpy.ndarray) -> numpy.ndarray:
    return x / 2 * (1 + numpy.array([math.erf(value) for value in x / math.sqrt(2)]))


ACTIVATIONS: dict[str, Callable[[numpy.ndarray], numpy.ndarray]] = {
    "identity": lambda x: x, "tanh": numpy.tanh, "gelu": gelu, "relu": lambda x: numpy.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + numpy.exp(-x)), "silu": lambda x: x / (1 + numpy.exp(-x))}


class Dense(NamedTuple):
    """norm(activation(weight x + bias)), with a LayerNorm."""

    weight: Any              # (out, in) float32
    bias: Any = None         # (out,) float32
    activation: str = "identity"
    norm: Any = None         # (out,) float32: its weight
    norm_bias: Any = None
    eps: float = 1e-5

    def __call__(self, x: numpy.ndarray) -> numpy.ndarray:
        y = (self.weight @ x.astype(numpy.float32)).astype(numpy.float64)
        y = ACTIVATIONS[self.activation](y if self.bias is None else y + self.bias)
        if self.norm is None:
            return y
        y = y - y.mean()
        y = y / math.sqrt((y * y).mean() + self.eps) * self.norm
        return y if self.norm_bias is None else y + self.norm_bias


class Head(NamedTuple):
    """Layers that the pooled hidden states (C,) of a text go through.

    Texts go one at a time, so the bits of a vector depend on no other text."""

    layers: tuple[Dense, ...] = ()
    pools: str = "last"      # which hidden states of a pair it takes: of the first token (cls), or all (mean)

    @property
    def size(self) -> int:
        """How many numbers the output has; 0: as many as the input."""
        return len(self.layers[-1].weight) if self.layers else 0

    def __call__(self, pooled: numpy.ndarray) -> numpy.ndarray:
        for layer in self.layers:
            pooled = layer(pooled)
        return pooled

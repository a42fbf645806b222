"""Bounds of what goes into a layer's products and comes out of them (Gemma 4's clipped linears)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy

from chatlm.worker.model.blocks.axes import Tensors, length

PRODUCTS = ("q", "k", "v", "output", "gate", "up", "down")
MOST = float(numpy.finfo(numpy.float32).max)
CLAMP_NUMBERS = 4 * len(PRODUCTS)  # how many numbers a file has for a layer

Bounds = dict[str, tuple[Any, Any]]


def bounds_of(tensors: Tensors, values: numpy.ndarray, of: Callable[[numpy.ndarray], Any]) -> Bounds:
    """The bounds of a layer: name of a matrix -> (low, high) of what its product gives, and "<name>_in" ->
    (low, high) of what it reads.

    values (CLAMP_NUMBERS,): for each of PRODUCTS, low and high of its input, then of its output. q, k and v
    are one matrix and read the same. gate and up read the same too."""
    bounds = values.reshape(len(PRODUCTS), 2, 2)

    def pair(side: int, runs: list[tuple[str, int]]) -> tuple[Any, Any]:
        ends = []
        for end in (0, 1):
            parts = [numpy.full(size, bounds[PRODUCTS.index(name), side, end], numpy.float32)
                     for name, size in runs]
            ends.append(of(numpy.concatenate(parts)))
        low, high = ends
        return low, high

    found = {}
    matrices = {"qkv": ("q", "k", "v")} | {name: (name,) for name in ("output", "gate", "up", "down")}
    for matrix, parts in matrices.items():
        tensor = tensors[matrix]
        found[f"{matrix}_in"] = pair(0, [(parts[0], length(tensor.columns or ()))])
        rows = [(name, run.length) for name, run in zip(parts, tensor.rows)]
        found[matrix] = pair(1, rows)
    return found

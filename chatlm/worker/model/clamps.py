"""Bounds of what goes into a layer's products and comes out of them (Gemma 4's clipped linears)."""

from __future__ import annotations

from typing import Any, TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    from collections.abc import Callable
    from chatlm.worker.model.spec import ModelSpec

PRODUCTS = ("q", "k", "v", "output", "gate", "up", "down")
MOST = float(numpy.finfo(numpy.float32).max)


class Clamps:
    """Of one layer: name of a product -> (low, high) of its columns, and "<name>_in" -> those of what it
    reads."""

    def __init__(self, spec: ModelSpec, values: numpy.ndarray, of: Callable[[numpy.ndarray], Any]):
        """values (28,): for each of PRODUCTS low and high of its input, then of its output. q, k and v, and
        gate and up, read the same."""
        bounds = values.reshape(len(PRODUCTS), 2, 2)
        C, F, attn = spec.width, spec.ffn_size, spec.attention(0)

        def columns(*runs: tuple[int, str, int]) -> tuple[Any, Any]:
            low, high = (numpy.concatenate([
                numpy.full(size, bounds[PRODUCTS.index(name), side, end], numpy.float32)
                for size, name, side in runs]) for end in (0, 1))
            return of(low), of(high)

        q, k, v = attn.parts
        self.bounds = {
            "qkv_in": columns((C, "q", 0)), "qkv": columns((q, "q", 1), (k, "k", 1), (v, "v", 1)),
            "output_in": columns((attn.heads * attn.value_size, "output", 0)),
            "output": columns((C, "output", 1)), "gate_in": columns((C, "gate", 0)),
            "up_in": columns((C, "up", 0)), "gate": columns((F, "gate", 1)), "up": columns((F, "up", 1)),
            "down_in": columns((F, "down", 0)), "down": columns((C, "down", 1))}

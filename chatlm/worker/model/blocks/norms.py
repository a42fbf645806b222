"""Norms of rows of x: RMSNorm and LayerNorm."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from chatlm.worker.arrays.kinds import Norm
from chatlm.worker.model.blocks.axes import Tensors, vector
from chatlm.worker.model.blocks.step import BlockStep, Buffer, Read, Scratch


@dataclass(frozen=True)
class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019).

    The product that reads its result also computes it, unless the norm is `apart`."""

    eps: float
    weights: bool = True
    apart: bool = False
    count: int = 0        # numbers of a padded row without its zeros; 0: it is not padded

    def tensors(self, name: str, C: int) -> Tensors:
        factor = math.sqrt(self.count / C) if self.count else 1.0
        return {name: vector(C, factor=factor)} if self.weights else {}

    def scratch(self, C: int) -> Scratch:
        return {"normed": Buffer(C)} if self.apart else {}

    def read(self, s: BlockStep, x, name: str) -> Read:
        if not self.apart:
            return Read(x, Norm(s.w.get(name), self.eps))
        self.apply(s, x, name, out=s.b.normed)
        return Read(s.b.normed)

    def apply(self, s: BlockStep, x, name: str, out):
        s.k.rms_norm(x, s.w.get(name), self.eps, out=out)

    def padded(self, C: int, wide: int) -> RmsNorm:
        """The norm for rows of C numbers and zeros up to `wide`. Their mean is smaller, so eps is too."""
        return replace(self, eps=self.eps * (C / wide), count=C)


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias (Ba et al., "Layer Normalization", 2016)."""

    eps: float
    bias: bool = False
    count: int = 0        # as in RmsNorm
    weights: bool = True

    def tensors(self, name: str, C: int) -> Tensors:
        found = {name: vector(C)} if self.weights else {}
        if self.bias:
            found[f"{name}_bias"] = vector(C)
        return found

    def scratch(self, C: int) -> Scratch:
        return {"normed": Buffer(C)}

    def read(self, s: BlockStep, x, name: str) -> Read:
        self.apply(s, x, name, out=s.b.normed)
        return Read(s.b.normed)

    def apply(self, s: BlockStep, x, name: str, out):
        more = {"count": self.count} if self.count else {}
        s.k.layer_norm(x, s.w.get(name), s.w.get(f"{name}_bias"), self.eps, out=out, **more)

    def padded(self, C: int, wide: int) -> LayerNorm:
        return replace(self, count=C)


AnyNorm = RmsNorm | LayerNorm

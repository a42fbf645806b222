"""What layers of some families do with x before or after their blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chatlm.worker.model.blocks.axes import Tensors, matrix, vector
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.model.blocks.step import BlockStep, Buffer, Scratch

if TYPE_CHECKING:
    from typing_extensions import Self


class Extra:
    """One change of x."""

    def tensors(self, C: int) -> Tensors:
        return {}

    def scratch(self, C: int) -> Scratch:
        return {}

    def compute(self, s: BlockStep):
        raise NotImplementedError

    def widened(self, C: int, wide: int) -> Self:
        """As Block.widened."""
        return self


@dataclass(frozen=True)
class Lambdas(Extra):
    """x = resid_lambdas[l] * x + x0_lambdas[l] * x0, before layer l (nanochat).

    The model has two vectors with the lambdas of all layers."""

    def scratch(self, C: int) -> Scratch:
        return {"x0": Buffer(C)}

    def compute(self, s: BlockStep):
        s.k.mix(s.b.x, s.b.x0, s.resid_lambdas[s.layer], s.x0_lambdas[s.layer], out=s.b.x)


@dataclass(frozen=True)
class LayerInput(Extra):
    """x = x + norm(input_out(gelu(input_gate x) * the layer's part of layer_inputs)) (Gemma 4).

    input_gate is (P, C), input_out (C, P). The model's LayerInputs makes layer_inputs. Every rank computes
    all of it."""

    size: int       # P
    number: int     # of the layer in the whole model
    layers: int     # of the whole model
    norm: RmsNorm

    def tensors(self, C: int) -> Tensors:
        own = {"input_gate": matrix(self.size, C), "input_out": matrix(C, self.size)}
        return own | self.norm.tensors("input_norm", C)

    def scratch(self, C: int) -> Scratch:
        return {"input": Buffer(self.size), "layer_inputs": Buffer(self.layers * self.size)}

    def compute(self, s: BlockStep):
        k = s.k
        b = s.b
        w = s.w
        k.linear(b.x, w["input_gate"], out=b.input)                    # (T, P)
        k.gate_input(b.input, b.layer_inputs, self.number * self.size, out=b.input)
        k.linear(b.input, w["input_out"], out=b.added)                 # (T, C)
        self.norm.apply(s, b.added, "input_norm", out=b.added)
        k.mix(b.x, b.added, 1.0, 1.0, out=b.x)

    def widened(self, C: int, wide: int) -> LayerInput:
        return replace(self, norm=self.norm.padded(C, wide))


@dataclass(frozen=True)
class Scalar(Extra):
    """x = scalar * x (Gemma 4)."""

    def tensors(self, C: int) -> Tensors:
        return {"scalar": vector(1)}

    def compute(self, s: BlockStep):
        s.k.mix(s.b.x, s.b.x, s.w["scalar"], 0.0, out=s.b.x)


@dataclass(frozen=True)
class PictureRows(Extra):
    """x = x + rows of pictures (Meng et al., "DeepStack", 2024)."""

    number: int

    @property
    def buffer(self) -> str:
        return f"pictures_{self.number}"

    def scratch(self, C: int) -> Scratch:
        return {self.buffer: Buffer(C)}

    def compute(self, s: BlockStep):
        s.k.mix(s.b.x, getattr(s.b, self.buffer), 1.0, 1.0, out=s.b.x)


@dataclass(frozen=True)
class Keep(Extra):
    """Keep x for the head's backout (nanochat)."""

    def scratch(self, C: int) -> Scratch:
        return {"middle": Buffer(C)}

    def compute(self, s: BlockStep):
        s.k.copy(s.b.x, out=s.b.middle)

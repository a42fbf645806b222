"""The dense feed-forward block."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from chatlm.worker.model.blocks.axes import Divided, Run, Tensors, matrix
from chatlm.worker.model.blocks.step import Block, BlockStep, Buffer, Read, Scratch, Sum
from chatlm.worker.model.tensors import TILE_ROWS, rounded_up

UNGATED = ("relu2", "gelu_erf", "gelu_tanh", "gelu_quick")  # activations without gates; all others have them


def halves(activation: str) -> int:
    """How many rows of the first matrix make one hidden number: 2 if there are gates, else 1."""
    return 1 if activation in UNGATED else 2


def biases_of(matrices: Tensors) -> Tensors:
    """The biases of these matrices. That of gate_up is packed in the order of its tiles."""
    return {f"{name}_bias": tensor.bias._replace(packed=name.endswith("gate_up"))
            for name, tensor in matrices.items()}


def columns_of(size: int, rank: int, tp: int, block: int) -> range:
    """A rank's columns: whole blocks, or smaller ones if there are too few for all ranks.

    The first ranks may have a block more than the others."""
    fitting = [each for each in (block, 32, TILE_ROWS) if size >= each * tp]
    block = fitting[0] if fitting else 1
    blocks = -(-size // block)
    each_has, more = divmod(blocks, tp)
    begin, end = (block * (number * each_has + min(number, more)) for number in (rank, rank + 1))
    return range(size)[begin:end]


@dataclass(frozen=True)
class FeedForward(Block):
    """down(act(up x)), or down(act(gate x) * up x) (Shazeer, "GLU variants improve transformer", 2020).

    gate_up is (2 F, C), with the rows of gates first. Without gates it is up (F, C). down is (C, F)."""

    width: int               # F
    activation: str = "swiglu"
    biased: bool = False
    apart: bool = False      # gate and up are two matrices, because their products have bounds of their own
    prefix: str = ""         # of its tensors' names

    @functools.cached_property
    def up(self) -> str:
        return self.prefix + ("up" if self.activation in UNGATED else "gate_up")

    @functools.cached_property
    def down(self) -> str:
        return f"{self.prefix}down"

    @functools.cached_property
    def buffer(self) -> str:
        return f"{self.prefix}hidden"

    @property
    def word(self) -> str:
        """Its name among what ranks divide."""
        return f"{self.prefix}columns"

    def tensors(self, C: int) -> Tensors:
        columns = Run(self.width, of=self.word)
        if self.apart:
            found = {"gate": matrix((columns,), C), "up": matrix((columns,), C)}
        else:
            found = {self.up: matrix((columns,) * halves(self.activation), C, adapted=True)}
        found[self.down] = matrix(C, (columns,), adapted=not self.apart)
        if self.biased:
            found |= biases_of(found)
        return found

    def scratch(self, C: int) -> Scratch:
        found = {self.buffer: Buffer(self.width, short=True)}
        if self.apart:
            found["up"] = Buffer(self.width)
        return found

    def compute(self, s: BlockStep, read: Read, to: Sum):
        to.product(s, self.hidden(s, read), self.down)

    def hidden(self, s: BlockStep, read: Read):
        """What `down` reads, (T, F)."""
        hidden = s.b.of(self.buffer, self.width)
        if self.apart:
            s.product(read, "gate", hidden)
            s.product(read, "up", s.b.up)
            s.k.gate_input(hidden, s.b.up, 0, out=hidden)
        else:
            s.product(read, self.up, hidden, bias=s.w.get(f"{self.up}_bias"), activation=self.activation)
        return hidden

    # ---- other sizes

    def padded(self) -> FeedForward:
        return replace(self, width=rounded_up(self.width))

    def divided(self, rank: int, tp: int, block: int) -> Divided:
        return {self.word: columns_of(self.width, rank, tp, block)}

    def of_rank(self, divided: Divided) -> FeedForward:
        return replace(self, width=len(divided[self.word]))

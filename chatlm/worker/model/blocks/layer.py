"""A layer: two blocks, and how they are wired to the residual stream."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any

from chatlm.worker.model.blocks.axes import Divided, Tensors, vector
from chatlm.worker.model.blocks.extras import Extra
from chatlm.worker.model.blocks.norms import AnyNorm
from chatlm.worker.model.blocks.step import Block, BlockStep, Buffer, Read, Scratch, Sum, widest
from chatlm.worker.model.blocks.clamps import CLAMP_NUMBERS, bounds_of


@dataclass(frozen=True)
class Layer:
    """x = x + mixer(norm x);  x = x + feed(norm x).

    Any of the norms may be missing. A norm after a block applies to what the block adds, or to the sum. The
    fields of norms are named after their tensors."""

    mixer: Block | None = None             # Attention, or a block of mixers.py; None: there is none
    feed: Block | None = None              # FeedForward, Experts, ..; None: there is none
    attention_norm: AnyNorm | None = None  # of what the mixer reads
    ffn_norm: AnyNorm | None = None        # of what feed reads
    output_norm: AnyNorm | None = None     # of what the mixer adds
    down_norm: AnyNorm | None = None       # of what feed adds
    norms_of_sums: bool = False            # the last two apply to the sums (BERT)
    feed_reads: str = "sum"                # "input": x, as the mixer does; "mixer's": the mixer's normed x
    before: tuple[Extra, ...] = ()
    after: tuple[Extra, ...] = ()
    clamped: bool = False                  # products have bounds of input and output (Gemma 4)

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(block for block in (self.mixer, self.feed) if block)

    @property
    def norms(self) -> dict[str, AnyNorm]:
        """Name of a tensor -> the norm, of all norms that the layer has."""
        names = [field.name for field in fields(self) if field.name.endswith("_norm")]
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def tensors(self, C: int) -> Tensors:
        found: Tensors = {}
        for part in (*self.blocks, *self.before, *self.after):
            found |= part.tensors(C)
        for name, norm in self.norms.items():
            found |= norm.tensors(name, C)
        if self.clamped:
            found["clamps"] = vector(CLAMP_NUMBERS)
        return found

    def scratch(self, C: int) -> Scratch:
        own: Scratch = dict.fromkeys(("x", "residual", "added", "previous"), Buffer(C))
        parts = (*self.blocks, *self.before, *self.after, *self.norms.values())
        return widest([own, *(part.scratch(C) for part in parts)])

    def arranged(self, w: dict[str, Any], arrays: Any, C: int) -> dict[str, Any]:
        """The tensors that blocks read in another form than files have, in that form."""
        found = {}
        for block in self.blocks:
            found |= block.arranged(w, arrays)
        if self.clamped:
            found["clamps"] = bounds_of(self.tensors(C), arrays.numpy(w["clamps"]), arrays.of)
        return found

    @functools.cached_property
    def after_mixer(self) -> Sum:
        return Sum("x", "residual", self.output_norm, "output_norm", self.norms_of_sums)

    @functools.cached_property
    def after_feed(self) -> Sum:
        return Sum("residual", "x", self.down_norm, "down_norm", self.norms_of_sums)

    def compute(self, s: BlockStep):
        b = s.b
        for extra in self.before:
            extra.compute(s)

        read = Read(b.x)
        if self.mixer:
            read = self.read(s, self.attention_norm, b.x, "attention_norm")
            self.mixer.compute(s, read, self.after_mixer)
        else:
            s.k.copy(b.x, out=b.residual)

        if self.feed:
            if self.feed_reads != "mixer's":
                x = b.x if self.feed_reads == "input" else b.residual
                read = self.read(s, self.ffn_norm, x, "ffn_norm")
            self.feed.compute(s, read, self.after_feed)
        else:
            s.k.copy(b.residual, out=b.x)

        for extra in self.after:
            extra.compute(s)

    @staticmethod
    def read(s: BlockStep, norm: AnyNorm | None, x, name: str) -> Read:
        return norm.read(s, x, name) if norm else Read(x)

    # ---- other sizes

    def padded(self, heads: bool) -> Layer:
        """The layer with padded blocks. heads: may the heads of attention be padded?"""
        mixer = self.mixer
        if mixer and heads:
            mixer = mixer.padded()
        return replace(self, mixer=mixer, feed=self.feed and self.feed.padded())

    def widened(self, C: int, wide: int) -> Layer:
        norms = {name: norm.padded(C, wide) for name, norm in self.norms.items()}
        return replace(
            self, mixer=self.mixer and self.mixer.widened(C, wide),
            feed=self.feed and self.feed.widened(C, wide),
            before=tuple(extra.widened(C, wide) for extra in self.before),
            after=tuple(extra.widened(C, wide) for extra in self.after), **norms)

    def moved(self, layers: int) -> Layer:
        return replace(self, mixer=self.mixer and self.mixer.moved(layers))

    def divided(self, rank: int, tp: int, block: int) -> Divided:
        found = {}
        for each in self.blocks:
            found |= each.divided(rank, tp, block)
        return found

    def of_rank(self, divided: Divided) -> Layer:
        return replace(self, mixer=self.mixer and self.mixer.of_rank(divided),
                       feed=self.feed and self.feed.of_rank(divided))

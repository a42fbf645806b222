"""The head: it turns the x of the last layer into logits."""

from __future__ import annotations


from dataclasses import dataclass

from chatlm.worker.model.blocks.axes import Tensors, matrix, vector
from chatlm.worker.model.blocks.input import Rows
from chatlm.worker.model.blocks.norms import AnyNorm, LayerNorm
from chatlm.worker.model.blocks.step import BlockStep, Buffer, Read, Scratch


@dataclass(frozen=True)
class LmHead:
    """logits = softcap(scale * (head norm(x) + bias)), where head is (V, C)."""

    tied: bool = False       # it shares the weights of the embedding
    biased: bool = False
    scale: float = 1.0       # of the logits; it is multiplied into the weights of the final norm
    softcap: float = 0.0     # c > 0: c * tanh(logits / c)
    backout: bool = False    # backout_lambda * the kept x is subtracted before the norm
    rows: Rows | None = None  # what this rank has of the vocabulary; None without ranks

    def tensors(self, vocab_size: int, C: int) -> Tensors:
        head = matrix((self.rows or Rows(vocab_size)).axis, C, adapted=True)
        found = {"head": head}
        if self.biased:
            found["head_bias"] = head.bias
        if self.backout:
            found["backout_lambda"] = vector(1)
        return found

    def scratch(self, C: int) -> Scratch:
        found = {"last": Buffer(C, of_logits=True)}
        if self.backout:
            found["middle"] = Buffer(C)
        if self.rows:
            found["own_logits"] = Buffer(self.rows.count, of_logits=True)
        return found

    def compute(self, s: BlockStep, norm: AnyNorm):
        k = s.k
        b = s.b
        w = s.w
        if self.backout:
            k.backout(b.x, b.middle, w["backout_lambda"], out=b.x)
        k.gather_rows(b.x, s.inputs.logit_rows, out=b.last)            # (R, C)
        if isinstance(norm, LayerNorm):
            norm.apply(s, b.last, "logit_norm", out=b.last)
            read = Read(b.last)
        else:
            read = norm.read(s, b.last, "logit_norm")

        logits = b.own_logits if self.rows else b.logits
        s.product(read, "head", logits, bias=w.get("head_bias"))       # (R, V)
        if self.rows:  # they are joined with those of other ranks
            k.all_gather(logits, out=b.logits)
        if self.softcap:
            k.softcap(b.logits, self.softcap, out=b.logits)

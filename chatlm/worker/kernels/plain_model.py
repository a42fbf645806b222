"""A model like Llama, or with experts, in whose sizes decode_core proves and times its kernels."""

from __future__ import annotations

from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.model.blocks.attention import Attention, Scores
from chatlm.worker.model.blocks.experts import Experts, Router
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.lm_head import LmHead
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import RmsNorm


def plain_model(vocab_size: int, layers: int, width: int, heads: int, kv_heads: int, head_size: int,
                ffn_size: int, max_positions: int, experts: int = 0, experts_per_token: int = 0,
                sinks: bool = False) -> Model:
    norm = RmsNorm(1e-5)
    attention = Attention(heads, kv_heads, head_size, head_size, Rope(head_size), Scores(sinks=sinks))
    feed = Experts(experts, ffn_size, Router(experts_per_token)) if experts else FeedForward(ffn_size)
    layer = Layer(attention, feed, norm, norm)
    return Model(vocab_size, width, max_positions, Input(), (layer,) * layers, norm, LmHead())

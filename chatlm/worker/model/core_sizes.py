"""A model by the flat names that decode_core reads."""

from __future__ import annotations

from typing import Any

from chatlm.common.records import record
from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.model.blocks.attention import Attention, HeadNorms
from chatlm.worker.model.blocks.experts import Experts, Router
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.lm_head import LmHead
from chatlm.worker.model.blocks.mla import Mla
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import RmsNorm


@record
class CoreSizes:
    """What decode_core reads of a model, to compute it and to prove its kernels in the model's sizes.

    It assumes that all layers attend alike: heads, norms and scores are those of the first layer that
    attends."""

    vocab_size: int
    width: int
    max_positions: int
    context_length: int
    opens: bool
    closes: bool
    of_texts: bool
    tied_head: bool
    heads: int
    kv_heads: int
    head_size: int
    qk_norm: str
    qk_norm_weights: bool
    norm_eps: float               # of the norms of heads, for proofs
    qk_scale: float
    q_scale: float
    attention_softcap: float
    sinks: bool
    ffn_size: int
    experts: int
    experts_per_token: int
    embedding_norm: bool
    post_norms: bool
    smear_channels: int
    value_embed_layers: tuple[int, ...]
    ve_gate_scale: float
    windows: tuple[int, ...]
    mixers: tuple[Any, ...]       # (): all layers attend
    by_layer: tuple[Attention | Mla | None, ...]

    def attention(self, layer: int) -> Attention | Mla:
        """How a layer attends; if it does not, how the first attends that does."""
        return self.by_layer[layer] or next(attn for attn in self.by_layer if attn)

    def rope(self, layer: int) -> Rope:
        return self.attention(layer).rope


def plain_sizes(vocab_size: int, layers: int, width: int, heads: int, kv_heads: int, head_size: int,
                ffn_size: int, max_positions: int, experts: int = 0, experts_per_token: int = 0) -> CoreSizes:
    """Sizes of a model like Llama, or with experts: decode_core proves and times its kernels with them."""
    norm = RmsNorm(1e-5)
    attention = Attention(heads, kv_heads, head_size, head_size, Rope(head_size))
    feed = Experts(experts, ffn_size, Router(experts_per_token)) if experts else FeedForward(ffn_size)
    layer = Layer(attention, feed, norm, norm)
    return core_sizes(Model(vocab_size, width, max_positions, Input(), (layer,) * layers, norm, LmHead()))


NO_ATTENTION = Attention(0, 0, 0, 0, Rope(0))


def core_sizes(model: Model) -> CoreSizes:
    attn = model.attentions[0] if model.attentions else NO_ATTENTION
    norms = attn.norms or HeadNorms("none", 0.0, weights=False)
    scores = attn.scores
    embeds = {layer: each.embed for layer, each in enumerate(model.by_layer) if each and each.embed}
    first = model.input if isinstance(model.input, Input) else Input()
    feed = model.feed
    experts = model.experts
    return CoreSizes(
        model.vocab_size, model.width, model.max_positions, model.context_length, model.opens, model.closes,
        model.of_texts, model.tied, attn.heads, attn.kv_heads, attn.head_size,
        "none" if norms.whole or norms.centred else norms.when, norms.weights, norms.eps, scores.qk_scale,
        scores.scale, scores.softcap, scores.sinks,
        ffn_size=feed.width if feed else 0, experts=experts.count if experts else 0,
        experts_per_token=experts.router.chosen if experts else 0,
        embedding_norm=isinstance(first.norm, RmsNorm),
        post_norms=any(layer.output_norm or layer.down_norm for layer in model.layers),
        smear_channels=first.smear.channels if first.smear else 0,
        value_embed_layers=tuple(embeds),
        ve_gate_scale=max((each.scale for each in embeds.values()), default=2.0),
        windows=model.windows, mixers=model.mixers if model.keeps_states else (), by_layer=model.by_layer)

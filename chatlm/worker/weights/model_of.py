"""`model_of`: a recipe becomes the blocks of a model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from chatlm.worker.model.blocks.attention import Attention, HeadNorms, Scores
from chatlm.worker.model.blocks.experts import Experts, Router
from chatlm.worker.model.blocks.extras import Keep
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.input import Input, Join
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.lm_head import LmHead
from chatlm.worker.model.blocks.mixers import Mixer, ShortConv
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import AnyNorm, LayerNorm, RmsNorm

if TYPE_CHECKING:
    from chatlm.worker.weights.recipe import ModelSpec


def model_of(recipe: ModelSpec | Model) -> Model:
    if isinstance(recipe, Model):
        return recipe
    layers = recipe.own_layers or tuple(layer_of(recipe, layer) for layer in range(recipe.layers))
    head = None
    if not recipe.of_texts:
        keeps = any(isinstance(extra, Keep) for layer in layers for extra in layer.after)
        head = LmHead(recipe.tied_head, recipe.head_bias, recipe.logit_scale, recipe.softcap, backout=keeps)
    norm = None if recipe.sum_norms else norm_of(recipe, stream_eps(recipe))
    return Model(
        recipe.vocab_size, recipe.width, recipe.max_positions, recipe.own_input or input_of(recipe), layers,
        norm, head, of_texts=recipe.of_texts, distances=recipe.heads if recipe.distance_buckets else 0,
        residual_scale=recipe.residual_scale)


def stream_eps(recipe: ModelSpec) -> float:
    """The eps of norms that read x. x is kept divided by residual_scale, and with this eps norms give what
    they would give of x itself."""
    return recipe.norm_eps / recipe.residual_scale**2


def norm_of(recipe: ModelSpec, eps: float) -> AnyNorm:
    if recipe.layer_norms:
        return LayerNorm(eps, recipe.norm_biases, weights=recipe.norm_weights)
    return RmsNorm(eps, recipe.norm_weights)


def input_of(recipe: ModelSpec) -> Input | Join | None:
    if recipe.joins:
        return Join(RmsNorm(stream_eps(recipe)))
    if not recipe.vocab_size:
        return None
    norm = None
    if recipe.input_norm:
        norm = norm_of(recipe, recipe.norm_eps)
    if recipe.embedding_norm:
        norm = RmsNorm(recipe.norm_eps, weights=False)
    return Input(recipe.embedding_scale, recipe.residual_scale, positions=recipe.positions,
                 types=recipe.token_types, norm=norm)


def layer_of(recipe: ModelSpec, layer: int) -> Layer:
    mixer = mixer_of(recipe, layer)
    feed = feed_of(recipe, layer)
    before = norm_of(recipe, stream_eps(recipe)) if recipe.pre_norms else None
    after = RmsNorm(recipe.norm_eps if recipe.post_eps is None else recipe.post_eps)
    if not recipe.post_norms:
        after = None
    if recipe.sum_norms:
        after = norm_of(recipe, stream_eps(recipe))
    reads = "input" if recipe.parallel else "sum"
    if recipe.one_norm:
        reads = "mixer's"
    return Layer(
        mixer, feed,
        attention_norm=before if layer > 0 or recipe.first_norm else None,
        ffn_norm=None if recipe.one_norm else before,
        output_norm=after, down_norm=after, norms_of_sums=recipe.sum_norms, feed_reads=reads)


def mixer_of(recipe: ModelSpec, layer: int) -> Attention | Mixer:
    mixer = recipe.mixers[layer] if recipe.mixers else None
    if mixer is None:
        return attention_of(recipe, layer)
    if isinstance(mixer, ShortConv):
        return replace(mixer, channels=mixer.channels or recipe.width)
    return replace(mixer, eps=recipe.norm_eps)


def attention_of(recipe: ModelSpec, layer: int) -> Attention:
    attn = recipe.attention(layer)
    when = "whole" if recipe.qk_norm_sizes else recipe.qk_norm
    norms = HeadNorms(when, recipe.norm_eps, recipe.qk_norm_weights, recipe.qk_norm_sizes)
    sees = "text" if recipe.of_texts else "before"
    scores = Scores(attn.q_scale, recipe.q_growth, window=attn.window, softcap=recipe.attention_softcap,
                    sinks=recipe.sinks, sees=sees, distances=recipe.distance_buckets)
    biases = {"qkv": recipe.qkv_bias, "output": recipe.output_bias}
    return Attention(
        attn.heads, attn.kv_heads, attn.head_size, attn.head_size, recipe.rope(layer), scores,
        None if when == "none" else norms, gated=recipe.output_gate,
        gates=recipe.head_gates, clip=recipe.clip,
        biases=tuple(name for name, has_bias in biases.items() if has_bias))


def feed_of(recipe: ModelSpec, layer: int) -> FeedForward | Experts:
    if not recipe.experts or layer in recipe.dense_layers:
        width = recipe.dense_size if recipe.experts else recipe.ffn_size
        return FeedForward(width, recipe.activation, recipe.ffn_bias)
    shared = FeedForward(recipe.shared_size, recipe.activation, prefix="shared_")
    return Experts(
        recipe.experts, recipe.ffn_size, router_of(recipe), recipe.activation,
        recipe.ffn_bias and not recipe.sum_norms, shared=shared if recipe.shared_size else None,
        shared_gate=recipe.shared_gate, sum_bias=recipe.experts_bias)


def router_of(recipe: ModelSpec) -> Router:
    kind = "sigmoid" if recipe.sigmoid_router else "softmax"
    if recipe.router_jitter is not None:
        kind = "jitter"
    return Router(recipe.experts_per_token, kind, recipe.shares_sum_to_one, recipe.router_bias,
                  recipe.choice_bias, recipe.router_groups, recipe.share_scale,
                  recipe.router_jitter or 0.0, recipe.group_best)

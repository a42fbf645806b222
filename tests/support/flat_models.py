"""`ModelSpec`: a small model by flat sizes, which tests vary with `replace`; `model_of` makes its blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.model.blocks.attention import Attention, HeadNorms, Scores
from chatlm.worker.model.blocks.experts import Experts, Router
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.lm_head import LmHead
from chatlm.worker.model.blocks.mixers import Mixer, ShortConv
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import RmsNorm

EPS = 1e-5


@dataclass(frozen=True)
class ModelSpec:
    vocab_size: int                   # V
    layers: int                       # L
    width: int                        # C
    heads: int                        # H
    kv_heads: int                     # Hkv
    head_size: int                    # D
    ffn_size: int                     # F
    max_positions: int
    norm_weights: bool = True
    post_norms: bool = False          # of what each block adds
    embedding_norm: bool = False      # without weights
    tied_head: bool = False
    softcap: float = 0.0              # of logits
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    rope_base: float = 10000.0
    rope_size: int | None = None      # None: D
    rope_direction: int = 1
    rope_factors: tuple[float, ...] | None = None
    windows: tuple[int, ...] = ()     # of each layer; (): none
    qk_norm: str = "none"             # else HeadNorms.when
    qk_norm_weights: bool = False
    qk_norm_sizes: tuple[int, ...] = ()  # of norms of all heads together
    q_growth: tuple[float, ...] = ()
    attention_softcap: float = 0.0
    sinks: bool = False
    output_gate: bool = False
    activation: str = "swiglu"
    experts: int = 0                  # 0: all layers are dense
    experts_per_token: int = 0
    dense_layers: tuple[int, ...] = ()
    dense_size: int = 0
    shared_size: int = 0
    shared_gate: bool = False
    router_bias: bool = False
    sigmoid_router: bool = False
    correction_bias: bool = False
    mixers: tuple[Mixer | None, ...] = ()  # of each layer; None, (): attention
    own_layers: tuple[Layer, ...] = ()  # instead of all that is said of layers


def model_of(spec: ModelSpec | Model) -> Model:
    """The blocks of a spec; blocks are their own."""
    if isinstance(spec, Model):
        return spec
    norm = RmsNorm(EPS, spec.norm_weights)
    layers = spec.own_layers or tuple(layer_of(spec, number, norm) for number in range(spec.layers))
    first = Input(norm=RmsNorm(EPS, weights=False) if spec.embedding_norm else None)
    head = LmHead(spec.tied_head, softcap=spec.softcap)
    return Model(spec.vocab_size, spec.width, spec.max_positions, first, layers, norm, head)


def layer_of(spec: ModelSpec, number: int, norm: RmsNorm) -> Layer:
    after = RmsNorm(EPS) if spec.post_norms else None
    return Layer(mixer_of(spec, number), feed_of(spec, number), norm, norm, after, after)


def mixer_of(spec: ModelSpec, number: int) -> Attention | Mixer:
    mixer = spec.mixers[number] if spec.mixers else None
    if isinstance(mixer, ShortConv):
        return replace(mixer, channels=mixer.channels or spec.width)
    if mixer is not None:
        return replace(mixer, eps=EPS)
    when = "whole" if spec.qk_norm_sizes else spec.qk_norm
    norms = None if when == "none" else HeadNorms(when, EPS, spec.qk_norm_weights, spec.qk_norm_sizes)
    turned = spec.head_size if spec.rope_size is None else spec.rope_size
    rope = Rope(turned, spec.rope_base, spec.rope_factors, direction=spec.rope_direction)
    window = spec.windows[number] if spec.windows else 0
    scores = Scores(growth=spec.q_growth, window=window, softcap=spec.attention_softcap, sinks=spec.sinks)
    biases = {"qkv": spec.qkv_bias, "output": spec.output_bias}
    return Attention(spec.heads, spec.kv_heads, spec.head_size, spec.head_size, rope, scores, norms,
                     gated=spec.output_gate, biases=tuple(name for name in biases if biases[name]))


def feed_of(spec: ModelSpec, number: int) -> FeedForward | Experts:
    if not spec.experts or number in spec.dense_layers:
        return FeedForward(spec.dense_size if spec.experts else spec.ffn_size, spec.activation, spec.ffn_bias)
    kind = "sigmoid" if spec.sigmoid_router else "softmax"
    router = Router(spec.experts_per_token, kind, bias=spec.router_bias, correction_bias=spec.correction_bias)
    shared = None
    if spec.shared_size:
        shared = FeedForward(spec.shared_size, spec.activation, prefix="shared_")
    return Experts(spec.experts, spec.ffn_size, router, spec.activation, spec.ffn_bias, shared=shared,
                   shared_gate=spec.shared_gate)

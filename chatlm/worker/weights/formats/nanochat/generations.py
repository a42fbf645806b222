"""The generations of nanochat: what each version of upstream's gpt.py computes, and its tensors' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence as Seq
from typing import NamedTuple

from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.model.blocks.attention import Attention, HeadNorms, Scores, ValueEmbed
from chatlm.worker.model.blocks.extras import Keep, Lambdas
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.input import Input, Smear
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.lm_head import LmHead
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.weights.rules import (
    MOST_CHANNELS, MOST_HEADS, MOST_LAYERS, MOST_POSITIONS, MOST_TOKENS, Rule)


class Generation(NamedTuple):
    """What sets one version of upstream's gpt.py apart (git log -p nanochat/gpt.py)."""

    since: str
    short_window: Callable[[int], int] = lambda length: length // 2  # where model_config does not state it
    has_windows: bool = True
    rope_base: float = 10_000.0
    rope_bfloat16: bool = False
    mixes_x0: bool = True           # into x, before each layer
    value_gate: tuple[int, float] | None = None  # of value embeddings: the channels it reads, and its scale
    qk_scale: float = 1.0
    smear_channels: int = 0         # > 0: of the gate of the previous token's embedding
    backs_out: bool = False         # x of the middle is subtracted at the end


GENERATIONS = {
    1: Generation("2025-10", has_windows=False, rope_bfloat16=True, mixes_x0=False),
    2: Generation("2026-01-11", rope_bfloat16=True),
    3: Generation("2026-01-17", rope_bfloat16=True, value_gate=(32, 2.0)),
    4: Generation("2026-03-09", lambda length: -(-length // 3 // 128) * 128, rope_base=100_000.0,
                  value_gate=(12, 3.0), qk_scale=1.15),
    5: Generation("2026-03-14", lambda length: -(-length // 4 // 128) * 128, rope_base=100_000.0,
                  value_gate=(12, 3.0), qk_scale=1.2, smear_channels=24, backs_out=True),
    # upstream's branch experiment_refactor (pull request 800); its model_config states the short window
    6: Generation("2026-09", rope_base=100_000.0, value_gate=(12, 3.0), qk_scale=1.2, backs_out=True),
}
NANOCHAT_KEYS = {  # of model_config
    "sequence_len": Rule(int, 16, MOST_POSITIONS), "vocab_size": Rule(int, 1, MOST_TOKENS),
    "n_layer": Rule(int, 1, MOST_LAYERS), "n_head": Rule(int, 1, MOST_HEADS),
    "n_kv_head": Rule(int, 1, MOST_HEADS), "n_embd": Rule(int, 2, MOST_CHANNELS),
    "window_pattern": Rule(str, optional=True), "short_seq_len": Rule(int, 1, MOST_POSITIONS, optional=True)}

SCORED_LENGTHS = 10  # upstream's rotary tables have so many times sequence_len
EPS = 1.1920929e-07  # torch's default for rms_norm in float32


def nanochat_model(config: Mapping, number: int, softcap: float) -> Model:
    """The blocks of a generation with a checked `model_config`. Norms have no weights.

    Every second layer, counted from the last one, adds an embedding of the token to its values. x of the
    middle layer is kept for the end."""
    generation = GENERATIONS[number]
    V = config["vocab_size"]
    L = config["n_layer"]
    H = config["n_head"]
    Hkv = config["n_kv_head"]
    C = config["n_embd"]
    D = C // H
    norm = RmsNorm(EPS, weights=False)
    rope = Rope(D, generation.rope_base, direction=-1, bfloat16=generation.rope_bfloat16)
    head_norms = HeadNorms("after_rope", EPS, weights=False)
    feed = FeedForward(4 * C, "relu2")
    layers = []
    for number, window in enumerate(windows_of(config, generation)):
        embed = None
        if generation.value_gate and number % 2 == (L - 1) % 2:
            embed = ValueEmbed(V, *generation.value_gate)
        scores = Scores(qk_scale=generation.qk_scale, window=window)
        attention = Attention(H, Hkv, D, D, rope, scores, head_norms, embed=embed)
        is_kept = generation.backs_out and number == L // 2
        layers.append(Layer(
            attention, feed, attention_norm=norm, ffn_norm=norm,
            before=(Lambdas(),) if generation.mixes_x0 else (), after=(Keep(),) if is_kept else ()))
    length = config["sequence_len"]
    return Model(
        V, C, SCORED_LENGTHS * length, input_of(generation, norm), tuple(layers), norm,
        LmHead(softcap=softcap, backout=generation.backs_out), answer_positions=length)


def input_of(generation: Generation, norm: RmsNorm) -> Input:
    """x0: the norm of the embedding. Smeared, it has a part of the previous token's too."""
    smear = None
    if generation.smear_channels:
        smear = Smear(generation.smear_channels, norm)
    return Input(norm=norm, smear=smear, keeps=generation.mixes_x0)


def windows_of(config: Mapping, generation: Generation) -> list[int]:
    """The window of each layer. Upstream's window of W covers the token itself and W tokens before it. The
    last layer has the long one."""
    L = config["n_layer"]
    length = config["sequence_len"]
    pattern = config["window_pattern"]
    if not generation.has_windows:
        return [0] * L
    short = config["short_seq_len"] or generation.short_window(length)
    is_short = [pattern[layer % len(pattern)] == "S" and layer < L - 1 for layer in range(L)]
    return [short + 1 if each else length + 1 for each in is_short]


NANOCHAT_TENSORS = {  # our tensor (of layer {}) -> upstream's tensors whose rows it is made of
    "qkv": ("transformer.h.{}.attn.c_q.weight", "transformer.h.{}.attn.c_k.weight",
            "transformer.h.{}.attn.c_v.weight"),
    "output": ("transformer.h.{}.attn.c_proj.weight",), "up": ("transformer.h.{}.mlp.c_fc.weight",),
    "down": ("transformer.h.{}.mlp.c_proj.weight",), "ve_gate": ("transformer.h.{}.attn.ve_gate.weight",),
    "value_embed": ("value_embeds.{}.weight",), "embed": ("transformer.wte.weight",),
    "head": ("lm_head.weight",), "smear_gate": ("smear_gate.weight",)}
IN_TRANSFORMERS = {  # upstream's modules -> their names in transformers' NanoChat; adapters use either
    "transformer.wte": "model.embed_tokens", "transformer.h": "model.layers", "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def names_in_adapters(name: str, shape: tuple[int, ...]) -> Seq[str]:
    """How adapters may call a tensor. They cannot change vectors."""
    if len(shape) != 2:
        return ()
    return name, name_in_transformers(name)


def name_in_transformers(name: str) -> str:
    for upstream, theirs in IN_TRANSFORMERS.items():
        name = name.replace(upstream, theirs)
    return name

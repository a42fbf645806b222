"""LFM2: short convolutions between layers of attention, and experts behind a router of sigmoids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.mixers import ShortConv
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.weights.facts import Facts
from chatlm.worker.weights.families.family import (
    EXPERTS, Family, Gguf, Header, layers_of_kinds, of_mixer)
from chatlm.worker.weights.rules import LAYER_TYPES, MOST_CHANNELS, MOST_LAYERS, SHARE_SCALE, Rule

CONFIG = {
    "num_key_value_heads": 8, "norm_eps": 1e-5, "tie_embedding": True, "rope_theta": 1e6, "conv_L_cache": 3,
    "conv_bias": False, "layer_types": None, "full_attn_idxs": None, "block_ff_dim": 12_288,
    "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256
} | dict.fromkeys("""block_dim block_mlp_init_scale block_norm_eps block_out_init_scale block_use_swiglu
    block_use_xavier_init conv_dim conv_dim_out conv_use_xavier_init num_heads theta use_pos_enc""".split())
CONFIG_EXPERTS = EXPERTS | {
    "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 1792, "num_dense_layers": 2,
    "use_expert_bias": True, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "num_key_value_heads": 8,
    "norm_eps": 1e-5, "tie_word_embeddings": True, "tie_embedding": True, "rope_theta": 1e6,
    "conv_L_cache": 3, "conv_bias": False, "layer_types": None}
KEYS = {"norm_eps": Rule(float, 0, 1), "tie_embedding": Rule(bool), "conv_L_cache": Rule(int, 2, 64)}
DENSE_KEYS = KEYS | {
    "full_attn_idxs": Rule(int, 0, MOST_LAYERS, many=True, optional=True),
    "block_ff_dim": Rule(int, 1, MOST_CHANNELS), "block_multiple_of": Rule(int, 1, MOST_CHANNELS),
    "block_ffn_dim_multiplier": Rule(float, 0.01, 100)}
EXPERT_KEYS = KEYS | {"num_dense_layers": Rule(int, 0, MOST_LAYERS), "routed_scaling_factor": SHARE_SCALE}
TENSORS = {
    "final_norm": ("model.embedding_norm.weight",),
    "attention_norm": ("model.layers.{}.operator_norm.weight",),
    "ffn_norm": ("model.layers.{}.ffn_norm.weight",),
    "output": ("model.layers.{}.self_attn.out_proj.weight",),
    **{f"{part}_norm": (f"model.layers.{{}}.self_attn.{part}_layernorm.weight",) for part in "qk"},
    **{ours + ending: (f"model.layers.{{}}.conv.{theirs}.{part}",)
       for ending, part in (("", "weight"), ("_bias", "bias"))
       for ours, theirs in (("mix_in", "in_proj"), ("taps", "conv"), ("mix_out", "out_proj"))},
    "gate_up": ("model.layers.{}.feed_forward.w1.weight", "model.layers.{}.feed_forward.w3.weight"),
    "down": ("model.layers.{}.feed_forward.w2.weight",)}
EXPERT_TENSORS = {
    "router": ("model.layers.{}.feed_forward.gate.weight",),
    "correction_bias": ("model.layers.{}.feed_forward.expert_bias",),
    "expert_gate_up": tuple(f"model.layers.{{}}.feed_forward.experts.{{}}.{part}.weight"
                            for part in ("w1", "w3")),
    "expert_down": ("model.layers.{}.feed_forward.experts.{}.w2.weight",)}
NAMES = {"final_norm": ("token_embd_norm.weight",)} | {
    f"{ours}{ending}": (f"blk.{{}}.shortconv.{theirs}.{part}",)
    for ending, part in (("", "weight"), ("_bias", "bias"))
    for ours, theirs in (("mix_in", "in_proj"), ("taps", "conv"), ("mix_out", "out_proj"))}
EXPERT_NAMES = NAMES | {
    "correction_bias": ("blk.{}.exp_probs_b.bias",), "expert_down": ("blk.{}.ffn_down_exps.weight",),
    "expert_gate_up": ("blk.{}.ffn_gate_exps.weight", "blk.{}.ffn_up_exps.weight")}


def lfm2(facts: Facts) -> Model:
    """Layers with a short convolution, and some with attention whose heads have norms."""
    config = facts.config
    norm = RmsNorm(facts.eps)
    conv = ShortConv(config["conv_L_cache"], config["conv_bias"], facts.width)
    routing = {}
    if facts.experts:
        routing = {"kind": "sigmoid", "correction_bias": config["use_expert_bias"],
                   "scale": config["routed_scaling_factor"]}
    layers = []
    for number, kind in enumerate(facts.kinds):
        mixer = facts.attention(number, facts.head_norms()) if kind in LAYER_TYPES else conv
        layers.append(Layer(mixer, facts.feed(number, **routing), norm, norm))
    return facts.decoder(layers, norm)


def complete(path: Path, config: Mapping) -> dict:
    """The width of the feed-forward parts and the layers' types. Older files state both differently."""
    layers = range(config["num_hidden_layers"])
    width = config["intermediate_size"]
    attention = layers if config["full_attn_idxs"] is None else config["full_attn_idxs"]
    types = config["layer_types"] or [LAYER_TYPES[0] if layer in attention else "conv" for layer in layers]
    multiple = config["block_multiple_of"]
    if config["block_auto_adjust_ff_dim"]:
        width = -(-int(config["block_ffn_dim_multiplier"] * int(2 * width / 3)) // multiple) * multiple
    return {"layer_types": types, "intermediate_size": width}


def repack(state: Mapping) -> dict:
    return {name: of_mixer(name, tensor) for name, tensor in state.items()}


def gguf_layers(header: Header) -> tuple[dict, dict]:
    changes, more = layers_of_kinds(header, "conv")
    return changes, more | {"block_auto_adjust_ff_dim": False}  # a file has the width itself


def gguf_layers_of_experts(header: Header) -> tuple[dict, dict]:
    header.value("expert_gating_func", 2)  # sigmoids
    changes, more = layers_of_kinds(header, "conv")
    return changes, more | {"use_expert_bias": header.has("exp_probs_b.bias")}


ALIASES = {"norm_eps": "rms_norm_eps", "tie_embedding": "tie_word_embeddings"}
FAMILIES = {
    "lfm2": Family(
        "LFM2", CONFIG, lfm2, TENSORS, lambda config, layer: False,
        Gguf("lfm2", names=NAMES, layers=gguf_layers), DENSE_KEYS, repack=repack,
        kinds=("conv",), aliases=ALIASES | {"block_ff_dim": "intermediate_size"},
        complete=complete),
    "lfm2_moe": Family(
        "LFM2-MoE", CONFIG_EXPERTS, lfm2, TENSORS | EXPERT_TENSORS,
        lambda config, layer: False,
        Gguf("lfm2moe", names=EXPERT_NAMES, layers=gguf_layers_of_experts,
             keys={"expert_gating_func": Rule(int, 2, 2), "expert_weights_norm": Rule(bool)}),
        EXPERT_KEYS, repack=repack, kinds=("conv",), needed=("layer_types",), aliases=ALIASES)}

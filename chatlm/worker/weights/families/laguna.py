"""Laguna: gates of what heads give, other numbers of query heads in layers with a window, and experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from chatlm.common.errors import ConfigError, shown
from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.model.blocks.attention import HeadGates
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.weights.facts import Facts
from chatlm.worker.weights.families.family import EXPERTS, Family, Gguf, Header, expert_tensors
from chatlm.worker.weights.families.mixtures import CORRECTION_BIAS, GGUF_KEYS
from chatlm.worker.weights.rules import (
    LAYER_TYPES, MOST_CHANNELS, MOST_HEADS, MOST_LAYERS, ROPE_BASE, SHARE_SCALE, Rule, check_divides, checked)

HEADS = Rule(int, 1, MOST_HEADS, many=True)
KINDS = Rule(str, choices=("dense", "sparse"), many=True)
LOCAL = "sliding_attention"
PER_HEAD = True, "per-head", "per_head"
PER_NUMBER = "per-element", "per_element"


def of_layer_kinds(path: Path, raw: Mapping) -> Mapping:
    """A config.json whose mlp_layer_types became mlp_only_layers."""
    layers = checked(path, "num_hidden_layers", raw.get("num_hidden_layers"), Rule(int, 1, MOST_LAYERS))
    kinds = raw.get("mlp_layer_types") or ["dense"] + ["sparse"] * (layers - 1)
    checked(path, "mlp_layer_types", kinds, KINDS, layers)
    others = {key: value for key, value in raw.items() if key != "mlp_layer_types"}
    return others | {"mlp_only_layers": [layer for layer, kind in enumerate(kinds) if kind == "dense"]}


def gates_of(path: Path, config: Mapping) -> HeadGates:
    """A gate for each head or for each of its numbers, the same in all layers."""
    gating = True if config["gating"] is None else config["gating"]
    if gating not in (*PER_HEAD, *PER_NUMBER):
        raise ConfigError(f"{path}: gating is {shown(gating)}; it must be true, \"per-head\" or "
                          "\"per-element\"")
    allowed = PER_NUMBER if gating in PER_NUMBER else PER_HEAD
    for kind in config["gating_types"] or ():
        if kind not in allowed:
            raise ConfigError(f"{path}: gating_types has {shown(kind)}, but gating is {shown(gating)}; they "
                              "must say the same")
    return HeadGates("softplus", of_numbers=gating in PER_NUMBER)


def laguna(facts: Facts) -> Model:
    """What heads give has gates. Layers with a window have other numbers of heads, which turn otherwise."""
    path = facts.path
    config = facts.config
    cap = config["moe_router_logit_softcapping"]
    if cap:
        raise ConfigError(f"{path}: moe_router_logit_softcapping is {shown(cap)}; it must be 0, because this "
                          "server cannot bound a router's logits yet")
    if config["moe_apply_router_weight_on_input"]:
        raise ConfigError(f"{path}: moe_apply_router_weight_on_input is true; it must be false")
    gates = gates_of(path, config)
    size = turned_in_windows(path, config)
    norm = RmsNorm(facts.eps)
    layers = []
    for number, heads in enumerate(heads_of(path, config)):
        attention = replace(facts.attention(number, facts.head_norms()), heads=heads, gates=gates)
        if attention.window:
            attention = replace(attention, rope=Rope(size, attention.rope.base))
        feed = facts.feed(number, kind="sigmoid", correction_bias=True, scale=config["routed_scaling_factor"])
        layers.append(Layer(attention, feed, norm, norm))
    return facts.decoder(layers, norm)


def heads_of(path: Path, config: Mapping) -> list[int]:
    """How many query heads each layer has."""
    layers = config["num_hidden_layers"]
    key = "num_attention_heads_per_layer"
    heads = checked(path, key, config[key] or [config["num_attention_heads"]] * layers, HEADS, layers)
    for layer, count in enumerate(heads):
        check_divides(path, f"{key}[{layer}]", count, config["num_key_value_heads"], "num_key_value_heads")
    return heads


def turned_in_windows(path: Path, config: Mapping) -> int:
    """How many numbers of a head turn in layers with a window."""
    rope = config["rope_parameters"] or {}
    local = rope.get(LOCAL) if isinstance(rope, dict) else None
    key = "partial_rotary_factor"
    part = checked(path, f"rope_parameters.{LOCAL}.{key}", (local or {}).get(key, 1.0), Rule(float, 0.01, 1))
    size = int(config["head_dim"] * part)
    check_divides(path, f"the number of rotated dimensions of {LOCAL}", size, 2)
    return size


def gguf_layers(header: Header) -> tuple[dict, dict]:
    """The metadata of a model whose layers have equally many query heads, and what differs from it."""
    layers: int = header.value("block_count")
    heads = header.raw("attention.head_count")
    if not isinstance(heads, list):
        heads = [header.value("attention.head_count")] * layers
    checked(header.path, f"{header.own}attention.head_count", heads, HEADS, layers)
    header.value("expert_gating_func", 2)
    head_size = header.value("attention.key_length", optional=False)
    turned = header.value("rope.dimension_count_swa", head_size, low=2, high=head_size)
    gate = header.stored.get("blk.0.attn_gate.weight")
    is_per_number = gate is not None and len(gate.shape) == 2 and int(gate.shape[1]) != heads[0]
    more = {}
    if header.raw("attention.sliding_window_pattern") is None and header.value("attention.sliding_window", 0):
        # llama.cpp's converter does not write the pattern, and llama.cpp assumes this one
        more["layer_types"] = [LAYER_TYPES[layer % 4 > 0] for layer in range(layers)]
    return {"attention.head_count": heads[0]}, more | {
        "num_attention_heads_per_layer": heads, "gating": "per-element" if is_per_number else "per-head",
        "rope_parameters": {LOCAL: {"partial_rotary_factor": turned / head_size}},
        "mlp_only_layers": [*range(header.value("leading_dense_block_count", 0))]}


FAMILIES = {"laguna": Family(
    "Laguna", EXPERTS | {
        "intermediate_size": 8192, "head_dim": 128, "num_key_value_heads": 8, "attention_bias": False,
        "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "mlp_only_layers": None, "decoder_sparse_step": 1,
        "norm_topk_prob": True, "moe_routed_scaling_factor": 1.0, "routed_scaling_factor": 1.0,
        "moe_apply_router_weight_on_input": False, "moe_router_logit_softcapping": 0.0, "gating": None,
        "gating_types": None, "num_attention_heads_per_layer": None, "sliding_window": 512,
        "layer_types": None, "partial_rotary_factor": None, "rope_theta": 500_000.0,
        "rope_local_base_freq": 10_000.0},
    laguna,
    expert_tensors("experts.{}", "gate") | {
        "head_gates": ("model.layers.{}.self_attn.g_proj.weight",),
        "correction_bias": ("model.layers.{}.mlp.experts.e_score_correction_bias",)},
    has_window=lambda config, layer: False,
    keys={"moe_routed_scaling_factor": SHARE_SCALE, "routed_scaling_factor": SHARE_SCALE,
          "moe_router_logit_softcapping": Rule(float, 0, 10**6)},
    aliases={"moe_routed_scaling_factor": "routed_scaling_factor"},
    restated=of_layer_kinds,
    gguf=Gguf("laguna", names=CORRECTION_BIAS | {"head_gates": ("blk.{}.attn_gate.weight",)},
              layers=gguf_layers,
              keys={**GGUF_KEYS, "rope.dimension_count_swa": Rule(int, 2, MOST_CHANNELS),
                    "leading_dense_block_count": Rule(int, 0, MOST_LAYERS),
                    "rope.freq_base_swa": ROPE_BASE}))}

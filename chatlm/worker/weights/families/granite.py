"""Granite 3 and 4: multipliers, fused matrices, experts, and Mamba layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from chatlm.common.errors import ConfigError, shown
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.mixers import Mamba2
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.weights.facts import Facts
from chatlm.worker.weights.families.family import (
    EXPERTS, Family, Gguf, Header, expert_tensors, in_two, layers_of_kinds, of_mixer)
from chatlm.worker.weights.rules import LAYER_TYPES, MOST_HEADS, Rule, check_divides

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
CONFIG = {"attention_bias": False} | dict.fromkeys(MULTIPLIERS, 1.0)
CONFIG_EXPERTS = CONFIG | EXPERTS | {"num_local_experts": 8, "num_experts_per_tok": 2}
MAMBA = {"mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_head": None,
         "mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True, "mamba_proj_bias": False,
         "time_step_limit": None} | dict.fromkeys(  # and keys without effect on the arithmetic
             ("mamba_chunk_size", "time_step_min", "time_step_max", "time_step_floor"))
KEYS = {
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"),
                    Rule(float, 1e-4, 10**6)),
    "attention_multiplier": Rule(float, 1e-6, 10**6, optional=True)}
MAMBA_KEYS = KEYS | {
    "position_embedding_type": Rule(str, choices=("rope", "nope"), optional=True),
    "normalization_function": Rule(str, choices=("rmsnorm",)),
    **dict.fromkeys(("mamba_d_state", "mamba_expand"), Rule(int, 1, 4096)),
    "mamba_d_head": Rule(int, 1, 4096, optional=True), "mamba_d_conv": Rule(int, 2, 64),
    **dict.fromkeys(("mamba_n_heads", "mamba_n_groups"), Rule(int, 1, MOST_HEADS))}
NO_LIMITS = None, [0, math.inf], [0, {"__float__": "Infinity"}]  # the last as transformers saves it
TENSORS = expert_tensors("experts", "") | {
    "router": ("model.layers.{}.block_sparse_moe.router.layer.weight",)}
MAMBA_TENSORS = {ours: (f"model.layers.{{}}.mamba.{theirs}",) for ours, theirs in (
    ("mix_in", "in_proj.weight"), ("mix_in_bias", "in_proj.bias"), ("taps", "conv1d.weight"),
    ("taps_bias", "conv1d.bias"), ("decay", "A_log"), ("dt_bias", "dt_bias"), ("skip", "D"),
    ("mix_norm", "norm.weight"), ("mix_out", "out_proj.weight"), ("mix_out_bias", "out_proj.bias"))}
FUSED = [  # with experts, and without
    (f"model.layers.{{}}.shared_mlp.{theirs}_linear.weight",
     tuple(f"model.layers.{{}}.mlp.{stem}{part}_proj.weight" for part in parts))
    for stem in ("shared_expert.", "")
    for theirs, parts in (("input", ("gate", "up")), ("output", ("down",)))]


def mamba2_of(facts: Facts) -> Mamba2:
    config = facts.config
    if config["time_step_limit"] not in NO_LIMITS:
        raise ConfigError(f"{facts.path}: time_step_limit is {shown(config['time_step_limit'])}; it must be "
                          "[0.0, Infinity]")
    heads = config["mamba_n_heads"]
    groups = config["mamba_n_groups"]
    check_divides(facts.path, "mamba_n_heads", heads, groups, "mamba_n_groups")
    head_size = config["mamba_d_head"] or config["mamba_expand"] * config["hidden_size"] // heads
    return Mamba2(config["mamba_d_conv"], heads, head_size, config["mamba_d_state"], groups,
                  config["mamba_conv_bias"], config["mamba_proj_bias"], eps=facts.eps)


def granite(facts: Facts) -> Model:
    """Llama's layers, some with Mamba-2 instead of attention, and with multipliers of embeddings, of what
    blocks add, of scores and of logits. Heads may not turn."""
    config = facts.config
    if config.get("position_embedding_type", "rope") != "rope":
        facts = replace(facts, rope=replace(facts.rope, size=0))
    factor = config["attention_multiplier"]
    q_scale = factor * facts.head_size**0.5 if factor else 1.0
    residual = config["residual_multiplier"]
    norm = RmsNorm(facts.eps / residual**2)  # it reads x divided by the multiplier
    layers = []
    for number, kind in enumerate(facts.kinds):
        attends = kind in LAYER_TYPES
        mixer = facts.attention(number, scale=q_scale) if attends else mamba2_of(facts)
        layers.append(Layer(mixer, facts.feed(number), norm, norm))
    first = Input(config["embedding_multiplier"], residual)
    return facts.decoder(layers, norm, first, 1 / config["logits_scaling"], residual)


def repack(state: Mapping) -> dict:
    """Granite's folders fuse gate and up. The dense feed-forward part becomes a shared expert where there are
    other experts."""
    shared = "mlp.shared_expert." if any(".block_sparse_moe." in name for name in state) else "mlp."
    repacked = {}
    for name, tensor in state.items():
        if not name.endswith("put_linear.weight") or tensor.ndim < 2:
            repacked[name] = of_mixer(name, tensor)
            continue
        name = name.replace("block_sparse_moe.", "mlp.experts.").replace("shared_mlp.", shared)
        parts = {"input_linear": tensor} | dict(zip(("gate_proj", "up_proj"), in_two(tensor, -2)))
        ours = ("gate_proj", "up_proj") if name.endswith("input_linear.weight") else ("down_proj",)
        repacked |= {re.sub("(in|out)put_linear", part, name): parts.get(part, tensor) for part in ours}
    return repacked


# what llama.cpp's converter writes about Mamba layers, even in granite files without any
IGNORED = frozenset({f"ssm.{part}" for part in ("conv_kernel", "state_size", "group_count", "inner_size",
                                                "time_step_rank")} | {"expert_shared_feed_forward_length"})


def gguf_multipliers(header: Header) -> tuple[dict, dict]:
    return {}, {"attention_multiplier": header.value("attention.scale", None)}


def gguf_dense(header: Header) -> tuple[dict, dict]:
    _, config = gguf_multipliers(header)
    if header.raw("rope.scaling.finetuned") is False:
        config["position_embedding_type"] = "nope"
    return {}, config


def gguf_hybrid(header: Header) -> tuple[dict, dict]:
    changes, more = layers_of_kinds(header, "mamba")
    return changes, more | gguf_dense(header)[1] | {
        "mamba_d_head": header.value("ssm.inner_size") // header.value("ssm.time_step_rank"),
        "num_local_experts": header.value("expert_count", 0, low=0),
        "shared_intermediate_size": header.value("expert_shared_feed_forward_length", 0),
        "mamba_conv_bias": header.has("ssm_conv1d.bias"), "mamba_proj_bias": header.has("ssm_in.bias")}


FAMILIES = {
    "granite": Family("Granite 3", CONFIG | {"mlp_bias": False}, granite, keys=KEYS,
                      gguf=Gguf("granite", permuted=True, ignored=IGNORED, layers=gguf_dense), fused=FUSED),
    "granitemoe": Family(
        "Granite 3 MoE", CONFIG_EXPERTS, granite, TENSORS, keys=KEYS, repack=repack),
    "granitemoeshared": Family(
        "", CONFIG_EXPERTS | {"shared_intermediate_size": 0}, granite, TENSORS, keys=KEYS,
        repack=repack, fused=FUSED,
        gguf=Gguf("granitemoe", permuted=True, ignored=IGNORED, layers=gguf_multipliers)),
    "granitemoehybrid": Family(
        "Granite 4", CONFIG_EXPERTS | MAMBA | {
            "shared_intermediate_size": 1024, "layer_types": None, "position_embedding_type": None,
            "normalization_function": "rmsnorm"},
        granite, TENSORS | MAMBA_TENSORS, lambda config, layer: False, keys=MAMBA_KEYS,
        repack=repack, fused=FUSED, needed=("layer_types",),
        kinds=("mamba", "linear_attention"),  # as transformers calls it now
        gguf=Gguf("granitehybrid", permuted=True, ignored=IGNORED, layers=gguf_hybrid,
                  names={"dt_bias": ("blk.{}.ssm_dt.bias",)}))}

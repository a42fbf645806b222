"""Qwen3.5 and Qwen3-Next: linear attention with the delta rule, gated attention, and experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.mixers import DeltaRule
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.weights.facts import Facts
from chatlm.worker.weights.families.family import (
    AFTER_ATTENTION, EXPERTS, QWEN_EXPERTS, SHARED_GATE, Family, Gguf, Header, expert_tensors,
    layers_of_kinds, of_mixer, separate_experts)
from chatlm.worker.weights.rules import LAYER_TYPES, MOST_HEADS, MOST_LAYERS, Rule, check_divides

CONFIG = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "head_dim": 256, "attention_bias": False,
    "layer_types": None, "full_attention_interval": 4, "partial_rotary_factor": 0.25,
    "rope_parameters": None}
KEYS = {
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), Rule(int, 1, 4096)),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), Rule(int, 1, MOST_HEADS)),
    "linear_conv_kernel_dim": Rule(int, 2, 64), "full_attention_interval": Rule(int, 1, MOST_LAYERS)}
TENSORS = {"mix_in": tuple(f"model.layers.{{}}.linear_attn.in_proj_{part}.weight"
                           for part in ("qkv", "z", "b", "a")),
           **{ours: (f"model.layers.{{}}.linear_attn.{theirs}",) for ours, theirs in (
               ("taps", "conv1d.weight"), ("decay", "A_log"), ("dt_bias", "dt_bias"),
               ("mix_norm", "norm.weight"), ("mix_out", "out_proj.weight"))}}
NEXT_TENSORS = {"mix_in": tuple(
    f"model.layers.{{}}.linear_attn.in_proj_{part}.weight" for part in ("qkvz", "ba"))}
NAMES = AFTER_ATTENTION | {"dt_bias": ("blk.{}.ssm_dt.bias",), "mix_in": tuple(
    f"blk.{{}}.{part}.weight" for part in ("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha"))}
NEXT_NAMES = NAMES | {"mix_in": tuple(
    f"blk.{{}}.{part}.weight" for part in ("attn_qkv", "attn_gate", "ssm_ba"))}
EXPERT_TENSORS = expert_tensors("experts.{}", "gate") | SHARED_GATE


def qwen35(facts: Facts) -> Model:
    """Layers with the delta rule, and some with attention whose heads have norms and gates."""
    norm = RmsNorm(facts.eps)
    layers = []
    for number, kind in enumerate(facts.kinds):
        if kind in LAYER_TYPES:
            mixer = replace(facts.attention(number, facts.head_norms()), gated=True)
        else:
            mixer = delta_rule(facts)
        layers.append(Layer(mixer, facts.feed(number, shared_gate=True), norm, norm))
    return facts.decoder(layers, norm)


def delta_rule(facts: Facts) -> DeltaRule:
    config = facts.config
    keys = config["linear_num_key_heads"]
    values = config["linear_num_value_heads"]
    check_divides(facts.path, "linear_num_value_heads", values, keys, "linear_num_key_heads")
    return DeltaRule(config["linear_conv_kernel_dim"], keys, values, config["linear_key_head_dim"],
                     config["linear_value_head_dim"], config.get("alternating", False),
                     config.get("gates_by_key", False), config.get("heads_by_key", False), eps=facts.eps)


def complete(path: Path, config: Mapping) -> dict:
    """The layers' types, and the rotary parameters of texts, in which image positions turn nothing."""
    rope = {key: value for key, value in (config["rope_parameters"] or {}).items() if "mrope" not in key}
    every = config["full_attention_interval"]
    types = config["layer_types"] or [LAYER_TYPES[0] if (layer + 1) % every == 0 else "linear_attention"
                                      for layer in range(config["num_hidden_layers"])]
    return {"rope_parameters": {"partial_rotary_factor": 0.25} | rope, "layer_types": types}


def complete_next(path: Path, config: Mapping) -> dict:
    """Its mix_in has the rows of each key head together; in a GGUF file only those of b and a."""
    return complete(path, config) | {"gates_by_key": True, "heads_by_key": config.get("heads_by_key", True)}


def repack(state: Mapping) -> dict:
    """A folder's tensors with a matrix for each expert and the decay in GGUF's form, without the draft
    head."""
    repacked = {}
    for name, tensor in state.items():
        if not name.startswith("mtp."):
            repacked |= separate_experts(name, of_mixer(name, tensor))
    return repacked


def gguf_layers_of_next(header: Header) -> tuple[dict, dict]:
    changes, more = layers_of_kinds(header, "linear_attention")
    width = header.raw("expert_feed_forward_length")  # a file may have experts alone
    values = header.value("ssm.inner_size") // header.value("ssm.time_step_rank")
    return ({"feed_forward_length": header.raw("feed_forward_length", width)} | changes,
            more | {"heads_by_key": False, "linear_value_head_dim": values})


def gguf_layers(header: Header) -> tuple[dict, dict]:
    changes, more = gguf_layers_of_next(header)
    return changes, more | {"alternating": True}  # value heads, if they are more than key heads


FAMILIES = {
    "qwen3_5_text": Family(
        "Qwen3.5", CONFIG, qwen35, TENSORS, lambda config, layer: False,
        Gguf("qwen35", names=NAMES, layers=gguf_layers), KEYS, one_more=True, repack=repack,
        has_draft_head=True, kinds=("linear_attention",), complete=complete),
    "qwen3_5_moe_text": Family(
        "Qwen3.5-MoE", CONFIG | EXPERTS | {
            "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512, "num_key_value_heads": 2, "intermediate_size": 512,
            "output_router_logits": False},
        qwen35, TENSORS | EXPERT_TENSORS, lambda config, layer: False,
        Gguf("qwen35moe", names=NAMES, layers=gguf_layers), KEYS, one_more=True, repack=repack,
        has_draft_head=True, kinds=("linear_attention",), complete=complete),
    "qwen3_next": Family(
        "Qwen3-Next", CONFIG | QWEN_EXPERTS | {
            "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512,
            "norm_topk_prob": True, "shared_expert_intermediate_size": 512, "num_key_value_heads": 2,
            "intermediate_size": 5632},
        qwen35, TENSORS | NEXT_TENSORS | EXPERT_TENSORS, lambda config, layer: False,
        Gguf("qwen3next", names=NEXT_NAMES, layers=gguf_layers_of_next), KEYS, one_more=True,
        repack=repack, has_draft_head=True, kinds=("linear_attention",),
        complete=complete_next)}

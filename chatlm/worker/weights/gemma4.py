"""Gemma 4: how each of its layers attends, and its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from chatlm.common.errors import ConfigError, shown
from chatlm.worker.model.spec import Attention
from chatlm.worker.weights.rules import (
    LAYER_TYPES, MOST_CHANNELS, MOST_HEADS, MOST_LAYERS, Rule, check_divides, checked)

FULL, LOCAL = LAYER_TYPES
ROPE = {LOCAL: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}}
CONFIG = {
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "global_head_dim": 512,
    "num_global_key_value_heads": None, "per_layer_config": None, "attention_k_eq_v": False,
    "num_kv_shared_layers": 0, "use_double_wide_mlp": False, "sliding_window": 512, "layer_types": None,
    "rope_parameters": None, "vocab_size": 262_144, "max_position_embeddings": 131_072,
    "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262_144,
    "final_logit_softcapping": None, "use_bidirectional_attention": None,  # "vision": among an image's tokens
    "enable_moe_block": False, "num_experts": None, "num_local_experts": None, "top_k_experts": None,
    "num_experts_per_tok": 0, "moe_intermediate_size": None}
KEYS = {
    "global_head_dim": Rule(int, 2, MOST_CHANNELS), "num_kv_shared_layers": Rule(int, 0, MOST_LAYERS),
    "num_global_key_value_heads": Rule(int, 1, MOST_HEADS, optional=True),
    "hidden_size_per_layer_input": Rule(int, 0, MOST_CHANNELS),
    "use_bidirectional_attention": Rule(str, choices=("vision",), optional=True)}
TENSORS: dict[str, tuple[str, ...]] = {
    "layer_embed": ("model.embed_tokens_per_layer.weight",),
    "layer_project": ("model.per_layer_model_projection.weight",),
    "layer_project_norm": ("model.per_layer_projection_norm.weight",),
    **{ours: (f"model.layers.{{}}.{theirs}",) for ours, theirs in (
        ("output_norm", "post_attention_layernorm.weight"), ("ffn_norm", "pre_feedforward_layernorm.weight"),
        ("down_norm", "post_feedforward_layernorm.weight"), ("scalar", "layer_scalar"),
        ("input_gate", "per_layer_input_gate.weight"), ("input_out", "per_layer_projection.weight"),
        ("input_norm", "post_per_layer_input_norm.weight"), ("router", "router.proj.weight"),
        ("router_norm", "router.scale"), ("experts_scale", "router.per_expert_scale"),
        ("experts_norm", "pre_feedforward_layernorm_2.weight"),
        ("experts_down_norm", "post_feedforward_layernorm_2.weight"),
        ("shared_down_norm", "post_feedforward_layernorm_1.weight"), ("shared_down", "mlp.down_proj.weight"),
        ("expert_down", "experts.{}.down_proj.weight"))},
    **{f"{ours}gate_up": tuple(f"model.layers.{{}}.{theirs}.{part}_proj.weight" for part in ("gate", "up"))
       for ours, theirs in (("shared_", "mlp"), ("expert_", "experts.{}"))}}
GGUF_TENSORS: dict[str, tuple[str, ...]] = {
    "scalar": ("blk.{}.layer_output_scale.weight",), "router_norm": ("blk.{}.ffn_gate_inp.scale",),
    "experts_scale": ("blk.{}.ffn_down_exps.scale",), "expert_down": ("blk.{}.ffn_down_exps.weight",),
    "expert_gate_up": ("blk.{}.ffn_gate_exps.{}.weight", "blk.{}.ffn_up_exps.{}.weight")}


def complete(config: Mapping) -> dict:
    """A checked config, expressed in other families' keys."""
    layers, experts = config["num_hidden_layers"], config["enable_moe_block"]
    types = config["layer_types"] or [LAYER_TYPES[(layer + 1) % 6 > 0] for layer in range(layers)]
    return {"layer_types": [*types[:-1], FULL],  # whatever the file says about the last one
            "rope_parameters": config["rope_parameters"] or ROPE,
            "num_experts": (config["num_experts"] or 0) if experts else 0,
            "shared_intermediate_size": config["intermediate_size"] if experts else 0}


def sizes_of_full_layers(path: Path, config: Mapping, types: Seq[str]) -> tuple[int, int]:
    """Head size and number of KV heads of layers with full attention. transformers writes them for each
    layer since 5.23, before that once."""
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    rules = {"head_dim": KEYS["global_head_dim"], "num_key_value_heads": KEYS["num_global_key_value_heads"]}
    listed, key = config["per_layer_config"], "per_layer_config"
    if listed is None:
        own = {name: config[theirs] for name, theirs in names.items()}
        if not config["attention_k_eq_v"]:
            del own["num_key_value_heads"]
    elif listed == {}:
        own = {}
    else:
        full = [str(layer) for layer, type_ in enumerate(types) if type_ == FULL]
        if isinstance(listed, dict):  # whose layer numbers are padded with zeros
            listed = {re.sub("^0+(?=[0-9])", "", layer): sizes for layer, sizes in listed.items()}
        if not isinstance(listed, dict) or sorted(listed) != sorted(full) or any(
                sizes != listed[full[0]] or not isinstance(sizes, dict) for sizes in listed.values()):
            raise ConfigError(f"{path}: {key} is {shown(listed)}; it must give the same sizes for each layer "
                              f"with {FULL} ({', '.join(full)}) and for no other")
        own = listed[full[0]]
        if unknown := sorted(own.keys() - names.keys()):
            raise ConfigError(f"{path}: {key} has the key {shown(unknown[0])}; known are {', '.join(names)}")
        own = {name: checked(path, f"{key}.{full[0]}.{name}", size, rules[name])
               for name, size in own.items()}
    size, kv_heads = own.get("head_dim"), own.get("num_key_value_heads")
    return size or config["head_dim"], kv_heads or config["num_key_value_heads"]


def rope_of(path: Path, name: str, rope: Any, size: int) -> dict:
    """The fields of Attention that begin with rope_, from one type's entry in rope_parameters."""
    if not isinstance(rope, dict):
        raise ConfigError(f"{path}: {name} is {shown(rope)}; it must be an object")
    type_ = checked(path, f"{name}.rope_type", rope.get("rope_type", "default"),
                    Rule(str, choices=("default", "proportional")))
    known = ("rope_type", "rope_theta", "partial_rotary_factor")
    if unknown := [key for key in rope if key not in known and rope[key] is not None]:
        raise ConfigError(f"{path}: {name} has the key {shown(unknown[0])}; known are {', '.join(known)}")
    base = rope.get("rope_theta", 10_000.0)
    base = float(checked(path, f"{name}.rope_theta", base, Rule(float, 2, 10**15)))
    part = 1.0 if rope.get("partial_rotary_factor") is None else rope["partial_rotary_factor"]
    checked(path, f"{name}.partial_rotary_factor", part, Rule(float, 0, 1))
    turned = int(part * size // 2)
    if type_ == "default" or turned == size // 2:
        return {"rope_base": base}
    return {"rope_base": base, "rope_factors": (1.0,) * turned + (math.inf,) * (size // 2 - turned)}


def fields_of(path: Path, config: Mapping) -> dict:
    """The fields of ModelSpec that no other family has: how each layer attends, and what else it adds.

    `config` is complete; its `rope_of_types`, if there, has rope_of's result for each type of layer."""
    layers, types = config["num_hidden_layers"], config["layer_types"]
    for key in ("rope_scaling", "partial_rotary_factor"):
        if config[key] is not None:
            raise ConfigError(f"{path}: {key} is {shown(config[key])}; in a gemma4_text model "
                              "rope_parameters gives this for each type of layer")
    if not isinstance(ropes := config["rope_parameters"], dict):
        raise ConfigError(f"{path}: rope_parameters is {shown(ropes)}; it must be an object")
    key = "num_kv_shared_layers"
    shared: int = checked(path, key, config[key], Rule(int, 0, layers - 1))
    size, kv_heads = sizes_of_full_layers(path, config, types)
    heads, own = config["num_attention_heads"], types[:layers - shared]
    sizes = {FULL: (size, kv_heads), LOCAL: (config["head_dim"], config["num_key_value_heads"])}
    kinds, attentions = {}, []
    for type_ in sorted({*types}):
        size, kv_heads = sizes[type_]
        check_divides(path, "num_attention_heads", heads, kv_heads, f"the number of kv heads of {type_}")
        check_divides(path, f"the head size of {type_}", size, 2)
        rope = config["rope_of_types"][type_] if "rope_of_types" in config else rope_of(
            path, f"rope_parameters.{type_}", ropes.get(type_), size)
        window = config["sliding_window"] if type_ == LOCAL else 0
        if type_ == LOCAL:
            checked(path, "sliding_window", window, Rule(int, 1))
        kinds[type_] = Attention(  # the scale of scores is 1
            heads, kv_heads, size, window=window, q_scale=size**0.5, value_norm=True,
            values_from_keys=type_ == FULL and config["attention_k_eq_v"], **rope)
    for layer, type_ in enumerate(types):
        if layer < len(own):
            attentions.append(kinds[type_])
        elif type_ in own:
            source = len(own) - 1 - own[::-1].index(type_)
            attentions.append(replace(kinds[type_], values_from_keys=False, source=source))
        else:
            raise ConfigError(f"{path}: layer_types[{layer}] is {shown(type_)}, but none of the first "
                              f"{len(own)} layers is, and the others have no keys ({key} is {shared})")
    P, vocabulary = config["hidden_size_per_layer_input"], config["vocab_size_per_layer_input"]
    if P and vocabulary != config["vocab_size"]:
        raise ConfigError(f"{path}: vocab_size_per_layer_input is {shown(vocabulary)}; it must be "
                          f"{config['vocab_size']}, like vocab_size")
    return {"attentions": tuple(attentions), "layer_input_size": P,
            "double_layers": tuple(range(len(own), layers)) if config["use_double_wide_mlp"] else (),
            "embedding_scale": config["hidden_size"]**0.5,
            "expert_norms": bool(config["num_experts"])}


def repack(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A folder's tensors with separate experts."""
    repacked = {}
    for name, tensor in state.items():
        stem, _, part = name.rpartition(".")
        if not stem.endswith(".experts") or tensor.ndim != 3:
            repacked[name] = tensor
            continue
        halves = zip(("gate", "up"), tensor.chunk(2, 1)) if part == "gate_up_proj" else [("down", tensor)]
        repacked |= {f"{stem}.{e}.{which}_proj.weight": one
                     for which, all_of in halves for e, one in enumerate(all_of)}
    return repacked

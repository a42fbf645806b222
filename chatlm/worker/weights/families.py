"""One row for each family of models, and rotary frequencies for longer contexts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence as Seq
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from chatlm.common.errors import ConfigError, shown
from chatlm.worker.model.spec import ModelSpec
from chatlm.worker.weights.assemble import Mxfp4, fp8_block
from chatlm.worker.weights.rules import (
    MOST_CHANNELS, MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, MOST_POSITIONS, MOST_TOKENS, Rule, check_divides,
    checked)


class Family(NamedTuple):
    """How a family differs from llama, as transformers' modeling_<name>.py has it: a row of FAMILIES."""

    config: dict       # its own keys of config.json, and what a missing one means
    fields: dict = {}  # of ModelSpec
    tensors: dict[str, tuple[str, ...]] = {}  # where its files differ from HF_TENSORS
    has_window: Callable[[Mapping, int], Any] = lambda config, layer: config.get("sliding_window")
    one_more: bool = False  # its norms multiply by 1 + w
    repack: Callable[[dict], dict] = lambda state: state  # a folder's tensors as `tensors` expects them


HF_TENSORS = {  # our tensor (of layer {}) -> the folder's tensors whose rows it is made of
    "embed": ("model.embed_tokens.weight",), "head": ("lm_head.weight",),
    "final_norm": ("model.norm.weight",),
    "attention_norm": ("model.layers.{}.input_layernorm.weight",),
    "ffn_norm": ("model.layers.{}.post_attention_layernorm.weight",),
    **{name: (f"model.layers.{{}}.self_attn.{name}.weight",) for name in ("q_norm", "k_norm")},
    "sinks": ("model.layers.{}.self_attn.sinks",),
    **{ours + ending: tuple(f"model.layers.{{}}.{module}_proj.{part}" for module in theirs.split())
       for ending, part in (("", "weight"), ("_bias", "bias"))
       for ours, theirs in (("qkv", "self_attn.q self_attn.k self_attn.v"), ("output", "self_attn.o"),
                            ("gate_up", "mlp.gate mlp.up"), ("down", "mlp.down"))}}
HF_ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "relu2": "relu2"}
HF_DEFAULTS = {  # of every family; None: must be given, or follows from others
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
                     "rope_scaling", "rope_parameters", "partial_rotary_factor")),
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10_000.0}
QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
GEMMA = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256,
         "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 4096, "layer_types": None,
         "tie_word_embeddings": True, "attention_bias": False, "query_pre_attn_scalar": 256,
         "final_logit_softcapping": None}
GEMMA_TENSORS = {ours: (f"model.layers.{{}}.{theirs}_layernorm.weight",) for ours, theirs in (
    ("output_norm", "post_attention"), ("ffn_norm", "pre_feedforward"), ("down_norm", "post_feedforward"))}
HEAD_NORMS = {"qk_norm": "before_rope", "qk_norm_weights": True}
EXPERTS = dict.fromkeys(("num_experts", "num_local_experts", "moe_intermediate_size"))
GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                "original_max_position_embeddings": 4096}


def expert_tensors(experts: str, router: str, parts: Seq[str] = ("weight",)) -> dict[str, tuple[str, ...]]:
    """Rows of HF_TENSORS for a family's router and experts; `experts` has {} if each has its own tensors."""
    names = {"router": router, "expert_gate_up": f"{experts}.gate_proj {experts}.up_proj",
             "expert_down": f"{experts}.down_proj"}
    return {f"{ours}_bias" if part == "bias" else ours: tuple(
        f"model.layers.{{}}.mlp.{module}.{part}" for module in theirs.split())
        for ours, theirs in names.items() for part in parts}


def repack_gpt_oss(state: Mapping) -> dict:
    """Its folders alternate the rows of gate and up, and have matrices as (experts, in, out) or in MXFP4."""
    repacked = dict(state)
    for name, tensor in state.items():
        stem, _, ending = name.rpartition("_proj")
        scales = state.get(f"{stem}_proj_scales")
        if ".mlp.experts." not in name:
            continue
        if (ending == "_blocks" and scales is not None and tensor.shape == (*scales.shape, 16)
                and tensor.dtype == scales.dtype == torch.uint8):
            tensor = Mxfp4(tensor, repacked.pop(f"{stem}_proj_scales"))
        elif tensor.ndim != {"": 3, "_bias": 2}.get(ending):
            continue  # check_names_and_shapes names it
        elif not ending:
            tensor = tensor.mT
        del repacked[name]
        part = "bias" if ending == "_bias" else "weight"
        halves = {"down": tensor}
        if stem.endswith("gate_up"):
            halves = {"gate": tensor[:, ::2], "up": tensor[:, 1::2]}
        repacked |= {f"{stem.rpartition('.')[0]}.{which}_proj.{part}": half for which, half in halves.items()}
    return repacked


def qwen_window(config: Mapping, layer: int) -> bool:
    return config["use_sliding_window"] and layer >= config["max_window_layers"]


FAMILIES = {  # by config.json's model_type
    "llama": Family({"attention_bias": False, "mlp_bias": False}),
    "mistral": Family({"sliding_window": 4096, "num_key_value_heads": 8}),
    "qwen2": Family(QWEN, {"qkv_bias": True}, has_window=qwen_window),
    "qwen3": Family(QWEN | {"head_dim": 128, "attention_bias": False}, HEAD_NORMS, has_window=qwen_window),
    "qwen3_moe": Family(
        QWEN | EXPERTS | {"num_experts_per_tok": 8, "norm_topk_prob": False, "attention_bias": False},
        HEAD_NORMS, expert_tensors("experts.{}", "gate"),
        lambda config, layer: config["use_sliding_window"]),
    "gpt_oss": Family(
        EXPERTS | {"num_experts_per_tok": 4, "sliding_window": 128, "layer_types": None, "head_dim": 64,
                   "attention_bias": True, "rope_theta": 150_000.0, "rope_parameters": GPT_OSS_ROPE,
                   "rms_norm_eps": 1e-5, "quantization_config": None, "experts_per_token": None,
                   "initial_context_length": None},
        {"sinks": True, "router_bias": True, "ffn_bias": True, "activation": "clamped_swiglu"},
        expert_tensors("experts", "router", ("weight", "bias")), lambda config, layer: layer % 2 == 0,
        repack=repack_gpt_oss),
    "smollm3": Family(
        QWEN | {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "rope_theta": 2e6,
                "sliding_window": None, "no_rope_layers": None, "no_rope_layer_interval": 4},
        has_window=lambda config, layer: (
            config["use_sliding_window"] and not config["no_rope_layers"][layer])),
    "gemma2": Family(
        GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, {"post_norms": True},
        GEMMA_TENSORS, lambda config, layer: layer % 2 == 0, one_more=True),
    "gemma3_text": Family(
        GEMMA | {"vocab_size": 262_208, "max_position_embeddings": 131_072, "sliding_window_pattern": 6,
                 "rope_theta": 1e6, "rope_local_base_freq": 10_000.0}, {"post_norms": True} | HEAD_NORMS,
        GEMMA_TENSORS, lambda config, layer: (layer + 1) % config["sliding_window_pattern"], one_more=True),
    "phi3": Family(
        {"sliding_window": None, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        tensors={"qkv": ("model.layers.{}.self_attn.qkv_proj.weight",),
                 "gate_up": ("model.layers.{}.mlp.gate_up_proj.weight",)}),
    "nanochat": Family(
        {"hidden_act": "relu2", "attention_bias": False, "final_logit_softcapping": 15.0},
        {"norm_weights": False, "embedding_norm": True, "rope_direction": -1, "qk_norm": "after_rope"},
        {"up": ("model.layers.{}.mlp.fc1.weight",), "down": ("model.layers.{}.mlp.fc2.weight",)})}
LAYER_TYPES = ("full_attention", "sliding_attention")
HF_KEYS = {  # all others are bool
    **dict.fromkeys(("hidden_size", "intermediate_size"), Rule(int, 1, MOST_CHANNELS)),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), Rule(float, 2, 10**15)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"),
                    Rule(float, 0.01, 10**6, optional=True)),
    "vocab_size": Rule(int, 1, MOST_TOKENS), "num_hidden_layers": Rule(int, 1, MOST_LAYERS),
    "num_attention_heads": Rule(int, 1, MOST_HEADS), "rms_norm_eps": Rule(float, 0, 1),
    "num_key_value_heads": Rule(int, 1, MOST_HEADS, optional=True),
    "head_dim": Rule(int, 2, MOST_CHANNELS, optional=True), "query_pre_attn_scalar": Rule(float, 0.01, 10**6),
    "max_position_embeddings": Rule(int, 16, MOST_POSITIONS), "sliding_window_pattern": Rule(int, 1),
    "original_max_position_embeddings": Rule(int, 2, MOST_POSITIONS),
    "sliding_window": Rule(int, 1, MOST_POSITIONS, optional=True), "max_window_layers": Rule(int, 0),
    "layer_types": Rule(str, choices=LAYER_TYPES, many=True, optional=True),
    **dict.fromkeys(("num_experts", "num_local_experts"), Rule(int, 1, MOST_EXPERTS, optional=True)),
    "num_experts_per_tok": Rule(int, 1, MOST_EXPERTS),
    "moe_intermediate_size": Rule(int, 1, MOST_CHANNELS, optional=True),
    "no_rope_layers": Rule(int, 0, 1, many=True, optional=True), "no_rope_layer_interval": Rule(int, 1)}
HF_INERT = set("""architectures attention_dropout auto_map bos_token_id cache_implementation dtype embd_pdrop
    do_sample eos_token_id initializer_range is_llama_config max_length model_type neftune_noise_alpha
    output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp
    quantization_config resid_pdrop return_dict router_aux_loss_coef temperature tokenizer_class top_p
    torch_dtype transformers.js_config transformers_version unsloth_fixed unsloth_version use_cache
    _attn_implementation _attn_implementation_autoset _name_or_path _sliding_window_pattern""".split())
HF_ONLY = {  # the only value these may have, unless the family has them
    **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias", "rope_interleaved", "use_mrope",
                     "use_bidirectional_attention"), False), "full_attn_mod": 1, "interpolate_factor": 1,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "swiglu_alpha": 1.702, "swiglu_limit": 7.0}


def family_config(path: Path, raw: Mapping) -> tuple[str, dict]:
    """The family of a config.json, and all that its row and HF_DEFAULTS list, checked."""
    family = checked(path, "model_type", raw.get("model_type"), Rule(str, choices=(*FAMILIES, "gemma3")))
    if "quantization_config" not in FAMILIES.get(family, FAMILIES["llama"]).config:
        fp8_block(path, raw)
    if family == "gemma3":  # with an image encoder, which is not loaded
        text = raw.get("text_config")
        if not isinstance(text, dict):
            raise ConfigError(f"{path}: text_config is {shown(text)}; it must be an object")
        family, raw = "gemma3_text", text
    defaults = HF_DEFAULTS | FAMILIES[family].config
    for key, value in raw.items():
        if key not in defaults and key not in HF_INERT and value not in (None, HF_ONLY.get(key)):
            raise ConfigError(f"{path}: {key} is {shown(value)}; " + (
                f"in a {family} model it must be {json.dumps(HF_ONLY[key])}" if key in HF_ONLY else
                f"this key is not supported in a {family} model. "
                f"Supported are {', '.join(sorted(defaults))}"))
    config = {key: raw.get(key, default) for key, default in defaults.items()}
    for key, default in defaults.items():
        rule = HF_KEYS.get(key, Rule(bool) if isinstance(default, bool) else None)
        if key.startswith("hidden_act"):
            rule = Rule(str, choices=(str(default),))
        if rule and config[key] is None and not rule.optional:
            config[key] = default
        if rule:
            checked(path, key, config[key], rule)
    if packed := config.get("quantization_config"):
        method = packed.get("quant_method") if isinstance(packed, dict) else None
        checked(path, "quantization_config.quant_method", method, Rule(str, choices=("mxfp4",)))
    return family, config


def complete_heads(path: Path, config: dict, names: Mapping[str, str] = {}):
    """Fill in how many key-value heads and how large a head, checked; `names` are the file's for the keys."""
    heads = config["num_attention_heads"]
    own = {key: names.get(key, key) for key in HF_DEFAULTS}
    config["num_key_value_heads"] = config["num_key_value_heads"] or heads
    check_divides(path, own["num_attention_heads"], heads, config["num_key_value_heads"],
                  own["num_key_value_heads"])
    if not config["head_dim"]:
        check_divides(path, own["hidden_size"], config["hidden_size"], 2 * heads,
                      f"2 * {own['num_attention_heads']}")
        config["head_dim"] = config["hidden_size"] // heads
    check_divides(path, own["head_dim"], config["head_dim"], 2)


def family_spec(path: Path, family: str, config: dict, rope: Mapping) -> ModelSpec:
    """The spec of a checked config; `rope` has max_positions and the fields that begin with rope_."""
    row, layers = FAMILIES[family], config["num_hidden_layers"]
    width, heads, head_size = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    fields = {"ffn_bias": config.get("mlp_bias", False),
              "activation": HF_ACTIVATIONS[config["hidden_act"]], **row.fields, **rope}
    if "no_rope_layers" in config:
        every = config["no_rope_layer_interval"]
        config["no_rope_layers"] = rotated = config["no_rope_layers"] or [
            int((layer + 1) % every > 0) for layer in range(layers)]
        checked(path, "no_rope_layers", rotated, HF_KEYS["no_rope_layers"], layers)
        fields["unrotated_layers"] = tuple(layer for layer in range(layers) if not rotated[layer])
    window = None if config.get("use_sliding_window") is False else config.get("sliding_window")
    types = config.get("layer_types") or [
        LAYER_TYPES[bool(row.has_window(config, layer))] for layer in range(layers)]
    checked(path, "layer_types", types, HF_KEYS["layer_types"], layers)
    if "sliding_attention" in types:
        checked(path, "sliding_window in use", window, HF_KEYS["sliding_window"]._replace(optional=False))
        fields["windows"] = tuple(window if type_ == "sliding_attention" else 0 for type_ in types)
    if config.get("attention_bias"):
        fields |= {"qkv_bias": True, "output_bias": True}
    if "query_pre_attn_scalar" in config:
        fields["q_scale"] = (head_size / config["query_pre_attn_scalar"])**0.5
        fields["embedding_scale"] = width**0.5
    if "num_experts" in config:  # 128: what transformers takes a missing number to mean
        experts, chosen = config["num_experts"] or config["num_local_experts"] or 128, "num_experts_per_tok"
        fields |= {"experts": experts, "experts_per_token": checked(
            path, chosen, config[chosen], HF_KEYS[chosen]._replace(high=experts))}
        fields["shares_sum_to_one"] = config.get("norm_topk_prob", True)
    return ModelSpec(
        vocab_size=config["vocab_size"], layers=layers, width=width, heads=heads,
        kv_heads=config["num_key_value_heads"], head_size=head_size,
        ffn_size=config.get("moe_intermediate_size") or config["intermediate_size"],
        norm_eps=config["rms_norm_eps"], tied_head=config["tie_word_embeddings"],
        softcap=config.get("final_logit_softcapping") or 0.0,
        attention_softcap=config.get("attn_logit_softcapping") or 0.0, **fields)


ROPE_TYPES = {  # rope_type -> its parameters
    "default": "", "linear": "factor",
    "llama3": "factor low_freq_factor high_freq_factor original_max_position_embeddings",
    "yarn": "factor original_max_position_embeddings beta_fast beta_slow attention_factor mscale "
            "mscale_all_dim truncate",
    "longrope": "short_factor long_factor original_max_position_embeddings factor attention_factor"}
ROPE_KEYS = {  # all others are positive numbers
    "original_max_position_embeddings": HF_KEYS["original_max_position_embeddings"], "truncate": Rule(bool),
    **dict.fromkeys(("short_factor", "long_factor"), Rule(float, 0.01, 10**6, many=True)),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), Rule(float, 0, 10**3, optional=True))}


def scaled_rope(path: Path, name: str, rope: Mapping, base: float, size: int, positions: int,
                context: int | None) -> dict:
    """max_positions and the fields that begin with rope_, as transformers' modeling_rope_utils.py has them.

    `rope` is a rope_scaling or rope_parameters object. longrope takes its long factors for all positions if
    the server's `context` (None: the model's) is longer than the original one."""
    rope_type = checked(path, f"{name}.rope_type", rope.get("rope_type", rope.get("type", "default")),
                   Rule(str, choices=tuple(ROPE_TYPES)))
    known = [*ROPE_TYPES[rope_type].split(), "rope_type", "type", "rope_theta", "partial_rotary_factor"]
    if unknown := [key for key in rope if key not in known and rope[key] is not None]:
        raise ConfigError(f"{path}: {name} has the key {shown(unknown[0])}; known for the type {rope_type} "
                          f"are {', '.join(known)}")

    def value(key: str, default=None, length: int | None = None) -> Any:
        setting = default if rope.get(key) is None else rope[key]
        return checked(path, f"{name}.{key}", setting, ROPE_KEYS.get(key, Rule(float, 0.01, 10**6)), length)

    fields = {"max_positions": positions, "rope_base": base, "rope_size": size}
    if rope_type == "default":
        return fields
    original, half = value("original_max_position_embeddings", positions), size // 2
    factor = value("factor", positions / original if rope_type in ("yarn", "longrope") else None)
    growth = math.log(max(factor, 1))
    frequencies = base ** -(numpy.arange(0, size, 2) / size)
    if rope_type == "linear":
        factors = numpy.full(half, factor)
    elif rope_type == "longrope":
        factors = [numpy.asarray(value(key, None, half)) for key in ("short_factor", "long_factor")][
            (context or positions) > original]
        fields["rope_scale"] = value("attention_factor") or math.sqrt(1 + growth / math.log(original))
    else:  # 1 keeps a frequency, 0 divides it by the factor
        if rope_type == "llama3":
            low, high = value("low_freq_factor"), value("high_freq_factor")
            kept = (original * frequencies / (2 * math.pi) - low) / (high - low or 1e-3)
        else:
            low, high = (size * math.log(original / (2 * math.pi * value(key, turns))) / (2 * math.log(base))
                         for key, turns in (("beta_fast", 32.0), ("beta_slow", 1.0)))
            if value("truncate", True):
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, size - 1)
            kept = 1 - (numpy.arange(half) - low) / (high - low or 1e-3)
            over, under = value("mscale"), value("mscale_all_dim")
            over, under = (over, under) if over and under else (1, 0)
            fields["rope_scale"] = value("attention_factor") or (
                (0.1 * over * growth + 1) / (0.1 * under * growth + 1))
            fields["max_positions"] = max(positions, int(factor * original))
        kept = numpy.clip(kept, 0, 1)
        factors = 1 / (kept + (1 - kept) / factor)
    return fields | {"rope_factors": tuple(factors.tolist())}

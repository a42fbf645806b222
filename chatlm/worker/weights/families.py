"""One row for each family of models, and rotary frequencies for longer contexts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from chatlm.common.errors import ConfigError, printable, shown
from chatlm.common.log import log
from chatlm.worker.model.spec import Attention, DeltaRule, Mamba2, Mixer, ModelSpec, ShortConv
from chatlm.worker.weights import gemma4
from chatlm.worker.weights.assemble import Mxfp4, fp8_block
from chatlm.worker.weights.rules import (
    LAYER_TYPES, MOST_CHANNELS, MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, MOST_POSITIONS, MOST_TOKENS, Rule,
    check_divides, checked)


class Family(NamedTuple):
    """How a family differs from llama(see transformers' modeling_<name>.py): a row of FAMILIES."""

    title: str         # the common names of its models
    config: dict       # its own config.json keys and their defaults
    fields: dict = {}  # of ModelSpec
    tensors: dict[str, tuple[str, ...]] = {}  # where its files differ from HF_TENSORS
    has_window: Callable[[Mapping, int], Any] = lambda config, layer: config.get("sliding_window")
    one_more: bool = False  # its norms multiply by 1 + w
    repack: Callable[[dict], dict] = lambda state: state  # a folder's tensors as `tensors` expects them
    interleaved: bool = False  # rotary pairs are adjacent, in a folder too
    needed: tuple[str, ...] = ()  # keys without which transformers would run another model
    windows_rotate: bool = False  # layers without a window are not rotated if others have one
    mixers: Mapping[str, Callable[[Mapping], Mixer]] = {}  # layer types besides attention
    aliases: dict[str, str] = {}  # its own keys -> the keys they replace
    complete: Callable[[dict], dict] = lambda config: {}    # keys derived from a folder's checked config
    fields_of: Callable[[Path, Mapping], dict] | None = None  # of ModelSpec, from such a config
    gguf: dict[str, tuple[str, ...]] = {}  # names in a GGUF file that do not follow from the folder's
    unsaid: Callable[[Mapping], dict] = lambda config: {}  # what its GGUF files imply but do not state
    fused: Seq[tuple[str, tuple[str, ...]]] = ()  # (a matrix that `repack` splits, what its rows become)


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
                            ("gate_up", "mlp.gate mlp.up"), ("down", "mlp.down"),
                            ("shared_gate_up", "mlp.shared_expert.gate mlp.shared_expert.up"),
                            ("shared_down", "mlp.shared_expert.down"))}}
HF_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu",
                  "gelu": "gelu", "relu2": "reglu2"}
HF_DEFAULTS = {  # of every family; None: required, or derived from other keys
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
QWEN_EXPERTS = EXPERTS | {"norm_topk_prob": False, "mlp_only_layers": None, "decoder_sparse_step": 1}
NORMS_AFTER = {"pre_norms": False, "post_norms": True}
AFTER_TENSORS = {ours: (f"model.layers.{{}}.{theirs}_layernorm.weight",) for ours, theirs in (
    ("output_norm", "post_attention"), ("down_norm", "post_feedforward"))}
GRANITE = {"attention_bias": False} | dict.fromkeys(
    ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"), 1.0)
GRANITE_EXPERTS = GRANITE | EXPERTS | {"num_local_experts": 8, "num_experts_per_tok": 2}
MAMBA = {"mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_head": None,
         "mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True, "mamba_proj_bias": False,
         "time_step_limit": None} | dict.fromkeys(  # and keys without effect on the arithmetic
             ("mamba_chunk_size", "time_step_min", "time_step_max", "time_step_floor"))
NO_LIMITS = None, [0, math.inf], [0, {"__float__": "Infinity"}]  # the last as transformers saves it
HUNYUAN_OTHER = dict.fromkeys("""attention_head_dim cla_share_factor class_num dense_list eod_token_id
    im_end_id im_newline_id im_start_id mask_init_id org_vocab_size pad_id pool_type text_end_id
    text_start_id""".split())  # features of related models: experts, classes, images
MINISTRAL_ROPE = {"rope_type": "yarn", "factor": 16.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                  "rope_theta": 1e6, "original_max_position_embeddings": 16_384, "llama_4_scaling_beta": 0.1}
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
    """Its folders interleave the rows of gate and up, and store matrices (experts, in, out) or in MXFP4."""
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
            continue  # check_names_and_shapes reports it
        elif not ending:
            tensor = tensor.mT
        del repacked[name]
        part = "bias" if ending == "_bias" else "weight"
        halves = {"down": tensor}
        if stem.endswith("gate_up"):
            halves = {"gate": tensor[:, ::2], "up": tensor[:, 1::2]}
        repacked |= {f"{stem.rpartition('.')[0]}.{which}_proj.{part}": half for which, half in halves.items()}
    return repacked


GRANITE_TENSORS = expert_tensors("experts", "") | {
    "router": ("model.layers.{}.block_sparse_moe.router.layer.weight",)}
GRANITE4_TENSORS = GRANITE_TENSORS | {ours: (f"model.layers.{{}}.mamba.{theirs}",) for ours, theirs in (
    ("mix_in", "in_proj.weight"), ("mix_in_bias", "in_proj.bias"), ("taps", "conv1d.weight"),
    ("taps_bias", "conv1d.bias"), ("decay", "A_log"), ("dt_bias", "dt_bias"), ("skip", "D"),
    ("mix_norm", "norm.weight"), ("mix_out", "out_proj.weight"), ("mix_out_bias", "out_proj.bias"))}


def mamba2_of(config: Mapping) -> Mamba2:
    head_size = config["mamba_d_head"] or config["mamba_expand"] * config["hidden_size"] // config[
        "mamba_n_heads"]
    return Mamba2(config["mamba_d_conv"], config["mamba_n_heads"], head_size, config["mamba_d_state"],
                  config["mamba_n_groups"], config["mamba_conv_bias"], config["mamba_proj_bias"])


def of_mixer(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A folder's tensor in GGUF's form: convolutions (C, 1, taps) as (C, taps), and the decay."""
    if re.search(r"\.(conv|conv1d)\.weight$", name) and tensor.ndim == 3:
        return tensor.squeeze(1)
    return -tensor.float().exp() if name.endswith(".A_log") else tensor


def repack_granite(state: Mapping) -> dict:
    """Its folders fuse gate and up. A feed-forward part becomes a shared expert if there are others."""
    shared = "mlp.shared_expert." if any(".block_sparse_moe." in name for name in state) else "mlp."
    repacked = {}
    for name, tensor in state.items():
        if not name.endswith("put_linear.weight") or tensor.ndim < 2:
            repacked[name] = of_mixer(name, tensor)
            continue
        name = name.replace("block_sparse_moe.", "mlp.experts.").replace("shared_mlp.", shared)
        parts = {"input_linear": tensor} | dict(zip(("gate_proj", "up_proj"), tensor.chunk(2, -2)))
        ours = ("gate_proj", "up_proj") if name.endswith("input_linear.weight") else ("down_proj",)
        repacked |= {re.sub("(in|out)put_linear", part, name): parts.get(part, tensor) for part in ours}
    return repacked


GRANITE_FUSED = [  # with experts, and without
    (f"model.layers.{{}}.shared_mlp.{theirs}_linear.weight",
     tuple(f"model.layers.{{}}.mlp.{stem}{part}_proj.weight" for part in parts))
    for stem in ("shared_expert.", "")
    for theirs, parts in (("input", ("gate", "up")), ("output", ("down",)))]


LFM2_TENSORS = {
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
LFM2 = {"num_key_value_heads": 8, "norm_eps": 1e-5, "tie_embedding": True, "rope_theta": 1e6,
        "conv_L_cache": 3, "conv_bias": False, "layer_types": None, "full_attn_idxs": None,
        "block_ff_dim": 12_288, "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256}
LFM2_MIXERS = {"conv": lambda config: ShortConv(config["conv_L_cache"], config["conv_bias"])}


LFM2_MOE_TENSORS = LFM2_TENSORS | {
    "router": ("model.layers.{}.feed_forward.gate.weight",),
    "choice_bias": ("model.layers.{}.feed_forward.expert_bias",),
    "expert_gate_up": tuple(f"model.layers.{{}}.feed_forward.experts.{{}}.{part}.weight"
                            for part in ("w1", "w3")),
    "expert_down": ("model.layers.{}.feed_forward.experts.{}.w2.weight",)}
LFM2_MOE_GGUF = {
    "choice_bias": ("blk.{}.exp_probs_b.bias",), "expert_down": ("blk.{}.ffn_down_exps.weight",),
    "expert_gate_up": ("blk.{}.ffn_gate_exps.weight", "blk.{}.ffn_up_exps.weight")}


def complete_lfm2(config: Mapping) -> dict:
    """The width of its feed-forward part and its layers' types, which older files state differently."""
    layers, width = range(config["num_hidden_layers"]), config["intermediate_size"]
    attention = layers if config["full_attn_idxs"] is None else config["full_attn_idxs"]
    types = config["layer_types"] or [LAYER_TYPES[0] if layer in attention else "conv" for layer in layers]
    multiple = config["block_multiple_of"]
    if config["block_auto_adjust_ff_dim"]:
        width = -(-int(config["block_ffn_dim_multiplier"] * int(2 * width / 3)) // multiple) * multiple
    return {"layer_types": types, "intermediate_size": width}


def repack_lfm2(state: Mapping) -> dict:
    return {name: of_mixer(name, tensor) for name, tensor in state.items()}


LINEAR = {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
          "linear_num_key_heads": 16, "linear_num_value_heads": 32}
QWEN35 = LINEAR | {"head_dim": 256, "attention_bias": False, "layer_types": None,
                   "full_attention_interval": 4, "partial_rotary_factor": 0.25, "rope_parameters": None}
QWEN35_TENSORS = {
    "mix_in": tuple(f"model.layers.{{}}.linear_attn.in_proj_{part}.weight"
                    for part in ("qkv", "z", "b", "a")),
    "taps": ("model.layers.{}.linear_attn.conv1d.weight",), "decay": ("model.layers.{}.linear_attn.A_log",),
    "dt_bias": ("model.layers.{}.linear_attn.dt_bias",),
    "mix_norm": ("model.layers.{}.linear_attn.norm.weight",),
    "mix_out": ("model.layers.{}.linear_attn.out_proj.weight",)}
QWEN35_FIELDS = HEAD_NORMS | {"output_gate": True}
QWEN35_MIXERS = {"linear_attention": lambda config: DeltaRule(
    config["linear_conv_kernel_dim"], config["linear_num_key_heads"], config["linear_num_value_heads"],
    config["linear_key_head_dim"], config["linear_value_head_dim"], config.get("alternating", False))}
QWEN3_NEXT_TENSORS = QWEN35_TENSORS | {
    "mix_in": tuple(f"model.layers.{{}}.linear_attn.in_proj_{part}.weight" for part in ("qkvz", "ba"))}
QWEN3_NEXT_GGUF = {"dt_bias": ("blk.{}.ssm_dt.bias",), "mix_in": tuple(
    f"blk.{{}}.{part}.weight" for part in ("attn_qkv", "attn_gate", "ssm_ba"))}


def rule_of_qwen3_next(config: Mapping) -> DeltaRule:
    rule = QWEN35_MIXERS["linear_attention"](config)
    return replace(rule, gates_by_key=True, heads_by_key=config.get("heads_by_key", True))


def complete_qwen35(config: Mapping) -> dict:
    """Its layers' types, and the rotary parameters of text: image positions do not rotate its pairs."""
    rope = {key: value for key, value in (config["rope_parameters"] or {}).items() if "mrope" not in key}
    every = config["full_attention_interval"]
    types = config["layer_types"] or [LAYER_TYPES[0] if (layer + 1) % every == 0 else "linear_attention"
                                      for layer in range(config["num_hidden_layers"])]
    return {"rope_parameters": {"partial_rotary_factor": 0.25} | rope, "layer_types": types}


def repack_qwen35(state: Mapping) -> dict:
    """A folder's tensors without the draft head, the decay in GGUF's form, with separate experts."""
    repacked = {}
    for name, tensor in state.items():
        if name.startswith("mtp."):
            continue
        stem, _, part = name.rpartition(".")
        if stem.endswith(".mlp.experts") and tensor.ndim == 3:  # one tensor for all experts
            halves = {"gate": tensor.chunk(2, 1)[0], "up": tensor.chunk(2, 1)[1]}
            for which, all_of in (halves if part == "gate_up_proj" else {"down": tensor}).items():
                repacked |= {f"{stem}.{e}.{which}_proj.weight": one for e, one in enumerate(all_of)}
        else:
            repacked[name] = of_mixer(name, tensor)
    return repacked


def gemma_scale(largest: int) -> Callable[[Mapping], dict]:
    """What llama.cpp divides scores by, which its files do not state; the largest model differs."""
    def unsaid(config: Mapping) -> dict:
        width = config["hidden_size"] // config["num_attention_heads"]
        is_largest = config["num_hidden_layers"] == largest
        return {"query_pre_attn_scalar": width if is_largest else config["head_dim"]}
    return unsaid


def qwen_window(config: Mapping, layer: int) -> bool:
    return config["use_sliding_window"] and layer >= config["max_window_layers"]


FAMILIES = {  # by config.json's model_type
    "llama": Family("Llama 2 and 3, SmolLM2", {
        "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": None}),
    "mistral": Family("Mistral 7B, Nemo and Small", {"sliding_window": 4096, "num_key_value_heads": 8}),
    "ministral3": Family("Ministral 3", {
        "sliding_window": None, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
        "rope_parameters": MINISTRAL_ROPE}),
    "mixtral": Family(
        "Mixtral", EXPERTS | {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None,
                              "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
                              "router_jitter_noise": None},
        tensors={"router": ("model.layers.{}.block_sparse_moe.gate.weight",),
                 "expert_gate_up": tuple(f"model.layers.{{}}.block_sparse_moe.experts.{{}}.{part}.weight"
                                         for part in ("w1", "w3")),
                 "expert_down": ("model.layers.{}.block_sparse_moe.experts.{}.w2.weight",)}),
    "qwen2": Family("Qwen2 and 2.5", QWEN, {"qkv_bias": True}, has_window=qwen_window),
    "qwen3": Family("Qwen3", QWEN | {"head_dim": 128, "attention_bias": False}, HEAD_NORMS,
                    has_window=qwen_window),
    "qwen3_moe": Family(
        "Qwen3-MoE", QWEN | QWEN_EXPERTS | {"num_experts_per_tok": 8, "attention_bias": False},
        HEAD_NORMS, expert_tensors("experts.{}", "gate"),
        lambda config, layer: config["use_sliding_window"],
        unsaid=lambda config: {"norm_topk_prob": True}),
    "qwen2_moe": Family(
        "Qwen1.5- and Qwen2-MoE", QWEN | QWEN_EXPERTS | {
            "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632, "qkv_bias": True},
        {"shared_gate": True}, expert_tensors("experts.{}", "gate") | {
            "shared_gate": ("model.layers.{}.mlp.shared_expert_gate.weight",)},
        lambda config, layer: config["use_sliding_window"] and layer % 2 == 0 and (
            layer < config["max_window_layers"])),
    "gpt_oss": Family(
        "gpt-oss", EXPERTS | {
            "num_experts_per_tok": 4, "sliding_window": 128, "layer_types": None, "head_dim": 64,
            "attention_bias": True, "rope_theta": 150_000.0, "rope_parameters": GPT_OSS_ROPE,
            "rms_norm_eps": 1e-5, "quantization_config": None, "experts_per_token": None,
            "initial_context_length": None},
        {"sinks": True, "router_bias": True, "ffn_bias": True, "activation": "clamped_swiglu"},
        expert_tensors("experts", "router", ("weight", "bias")), lambda config, layer: layer % 2 == 0,
        repack=repack_gpt_oss),
    "smollm3": Family(
        "SmolLM3", QWEN | {
            "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "rope_theta": 2e6,
            "sliding_window": None, "no_rope_layers": None, "no_rope_layer_interval": 4},
        has_window=lambda config, layer: (
            config["use_sliding_window"] and not config["no_rope_layers"][layer])),
    "gemma2": Family(
        "Gemma 2", GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        {"post_norms": True}, GEMMA_TENSORS, lambda config, layer: layer % 2 == 0, one_more=True,
        unsaid=gemma_scale(46)),
    "gemma3_text": Family(
        "Gemma 3", GEMMA | {
            "vocab_size": 262_208, "max_position_embeddings": 131_072, "sliding_window_pattern": 6,
            "rope_theta": 1e6, "rope_local_base_freq": 10_000.0}, {"post_norms": True} | HEAD_NORMS,
        GEMMA_TENSORS, lambda config, layer: (layer + 1) % config["sliding_window_pattern"], one_more=True,
        unsaid=gemma_scale(62)),
    "gemma4_text": Family(
        "Gemma 4", gemma4.CONFIG, {"post_norms": True, "layer_scalars": True} | HEAD_NORMS, gemma4.TENSORS,
        repack=gemma4.repack, aliases={"top_k_experts": "num_experts_per_tok"}, complete=gemma4.complete,
        fields_of=gemma4.fields_of, gguf=gemma4.GGUF_TENSORS),
    "phi3": Family(
        "Phi-3, 3.5 and 4-mini",
        {"sliding_window": None, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
         "partial_rotary_factor": None},
        tensors={"qkv": ("model.layers.{}.self_attn.qkv_proj.weight",),
                 "gate_up": ("model.layers.{}.mlp.gate_up_proj.weight",)}),
    "nanochat": Family(
        "nanochat", {"hidden_act": "relu2", "attention_bias": False, "final_logit_softcapping": 15.0},
        {"norm_weights": False, "embedding_norm": True, "rope_direction": -1, "qk_norm": "after_rope",
         "activation": "relu2"},
        {"up": ("model.layers.{}.mlp.fc1.weight",), "down": ("model.layers.{}.mlp.fc2.weight",)}),
    "granite": Family("Granite 3", GRANITE | {"mlp_bias": False}),
    "granitemoe": Family("Granite 3 MoE", GRANITE_EXPERTS, {}, GRANITE_TENSORS, repack=repack_granite),
    "granitemoeshared": Family("", GRANITE_EXPERTS | {"shared_intermediate_size": 0}, {}, GRANITE_TENSORS,
                               repack=repack_granite, fused=GRANITE_FUSED),
    "granitemoehybrid": Family(
        "Granite 4", GRANITE_EXPERTS | MAMBA | {
            "shared_intermediate_size": 1024, "layer_types": None, "position_embedding_type": None,
            "normalization_function": "rmsnorm"},
        {}, GRANITE4_TENSORS, lambda config, layer: False, repack=repack_granite, fused=GRANITE_FUSED,
        needed=("layer_types",),
        mixers={"mamba": mamba2_of, "linear_attention": mamba2_of},  # as transformers calls it now
        gguf={"dt_bias": ("blk.{}.ssm_dt.bias",)}),
    "olmo2": Family("OLMo 2", {"attention_bias": False, "rms_norm_eps": 1e-5},
                    NORMS_AFTER | {"qk_norm": "whole", "qk_norm_weights": True}, AFTER_TENSORS),
    "olmo3": Family(
        "OLMo 3", {"attention_bias": False, "rms_norm_eps": 1e-5, "sliding_window": 4096, "layer_types": None,
                   "rope_theta": 500_000.0, "rope_local_base_freq": 500_000.0},
        NORMS_AFTER | {"qk_norm": "whole", "qk_norm_weights": True}, AFTER_TENSORS,
        lambda config, layer: (layer + 1) % 4),
    "olmoe": Family(
        "OLMoE", QWEN_EXPERTS | {"num_experts": 64, "num_experts_per_tok": 8, "attention_bias": False,
                                 "rms_norm_eps": 1e-5},
        {"qk_norm": "whole", "qk_norm_weights": True}, expert_tensors("experts.{}", "gate")),
    "glm4": Family(
        "GLM-4-0414", {"attention_bias": True, "head_dim": 128, "partial_rotary_factor": 0.5,
                       "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-7},
        {"post_norms": True, "output_bias": False}, {
            "gate_up": ("model.layers.{}.mlp.gate_up_proj.weight",),
            "output_norm": ("model.layers.{}.post_self_attn_layernorm.weight",),
            "down_norm": ("model.layers.{}.post_mlp_layernorm.weight",)}, interleaved=True),
    "exaone4": Family(
        "EXAONE 4.0", {"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4,
                       "layer_types": None},
        NORMS_AFTER | HEAD_NORMS, AFTER_TENSORS,
        lambda config, layer: config["sliding_window"] and (layer + 1) % config["sliding_window_pattern"],
        windows_rotate=True),
    "ernie4_5": Family("ERNIE 4.5", {"head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
                                     "tie_word_embeddings": True}, interleaved=True),
    "seed_oss": Family("Seed-OSS", {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False,
                                    "head_dim": 128, "residual_dropout": None}),
    "hunyuan_v1_dense": Family(
        "Hunyuan 0.5B to 7B", HUNYUAN_OTHER | {
            "attention_bias": False, "rms_norm_eps": 1e-5, "norm_type": "rms", "use_qk_norm": True,
            "use_rotary_pos_emb": True},
        {"qk_norm": "after_rope", "qk_norm_weights": True}, {
            f"{part[0]}_norm": (f"model.layers.{{}}.self_attn.{part}_layernorm.weight",)
            for part in ("query", "key")}),
    "qwen3_5_text": Family(
        "Qwen3.5", QWEN35, QWEN35_FIELDS, QWEN35_TENSORS, lambda config, layer: False, one_more=True,
        repack=repack_qwen35, mixers=QWEN35_MIXERS, complete=complete_qwen35,
        gguf={"dt_bias": ("blk.{}.ssm_dt.bias",)}),
    "qwen3_5_moe_text": Family(
        "Qwen3.5-MoE", QWEN35 | EXPERTS | {
            "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512, "num_key_value_heads": 2, "intermediate_size": 512,
            "output_router_logits": False},
        QWEN35_FIELDS | {"shared_gate": True}, QWEN35_TENSORS | expert_tensors("experts.{}", "gate") | {
            "shared_gate": ("model.layers.{}.mlp.shared_expert_gate.weight",)},
        lambda config, layer: False, one_more=True, repack=repack_qwen35, mixers=QWEN35_MIXERS,
        complete=complete_qwen35, gguf={"dt_bias": ("blk.{}.ssm_dt.bias",)}),
    "qwen3_next": Family(
        "Qwen3-Next", QWEN35 | QWEN_EXPERTS | {
            "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512,
            "norm_topk_prob": True, "shared_expert_intermediate_size": 512, "num_key_value_heads": 2,
            "intermediate_size": 5632},
        QWEN35_FIELDS | {"shared_gate": True}, QWEN3_NEXT_TENSORS | expert_tensors("experts.{}", "gate") | {
            "shared_gate": ("model.layers.{}.mlp.shared_expert_gate.weight",)},
        lambda config, layer: False, one_more=True, repack=repack_qwen35,
        mixers={"linear_attention": rule_of_qwen3_next}, complete=complete_qwen35, gguf=QWEN3_NEXT_GGUF),
    "lfm2": Family(
        "LFM2", LFM2 | {f"block_{key}": None for key in (
            "dim", "mlp_init_scale", "norm_eps", "out_init_scale", "use_swiglu", "use_xavier_init")}
        | dict.fromkeys(("conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads", "theta",
                         "use_pos_enc")),
        HEAD_NORMS, LFM2_TENSORS, lambda config, layer: False, repack=repack_lfm2, mixers=LFM2_MIXERS,
        aliases={"norm_eps": "rms_norm_eps", "tie_embedding": "tie_word_embeddings",
                 "block_ff_dim": "intermediate_size"}, complete=complete_lfm2),
    "lfm2_moe": Family(
        "LFM2-MoE", EXPERTS | {
            "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 1792, "num_dense_layers": 2,
            "use_expert_bias": True, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
            "num_key_value_heads": 8, "norm_eps": 1e-5, "tie_word_embeddings": True, "tie_embedding": True,
            "rope_theta": 1e6, "conv_L_cache": 3, "conv_bias": False, "layer_types": None},
        HEAD_NORMS | {"sigmoid_router": True}, LFM2_MOE_TENSORS, lambda config, layer: False,
        repack=repack_lfm2, mixers=LFM2_MIXERS, needed=("layer_types",), gguf=LFM2_MOE_GGUF,
        aliases={"norm_eps": "rms_norm_eps", "tie_embedding": "tie_word_embeddings"})}
VISION = {  # model_type of an image model, read as text only -> its text model's default
    "gemma3": "gemma3_text", "gemma4": "gemma4_text", "mistral3": "mistral", "llava": "llama",
    "smolvlm": "llama", "idefics3": "llama",
    "qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3", "lfm2_vl": "lfm2",
    "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
TEXT_TYPES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
HF_KEYS = gemma4.KEYS | {  # all others are bool
    **dict.fromkeys(("hidden_size", "intermediate_size"), Rule(int, 1, MOST_CHANNELS)),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), Rule(float, 2, 10**15)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"),
                    Rule(float, 0.01, 10**6, optional=True)),
    "vocab_size": Rule(int, 1, MOST_TOKENS), "num_hidden_layers": Rule(int, 1, MOST_LAYERS),
    "num_attention_heads": Rule(int, 1, MOST_HEADS), "rms_norm_eps": Rule(float, 0, 1),
    "num_key_value_heads": Rule(int, 1, MOST_HEADS, optional=True),
    "head_dim": Rule(int, 2, MOST_CHANNELS, optional=True), "query_pre_attn_scalar": Rule(float, 0.01, 10**6),
    "max_position_embeddings": Rule(int, 16, MOST_POSITIONS),
    "sliding_window_pattern": Rule(int, 1, optional=True),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"),
                    Rule(float, 1e-4, 10**6)),
    "attention_multiplier": Rule(float, 1e-6, 10**6, optional=True),
    "position_embedding_type": Rule(str, choices=("rope", "nope"), optional=True),
    "normalization_function": Rule(str, choices=("rmsnorm",)), "norm_type": Rule(str, choices=("rms",)),
    "original_max_position_embeddings": Rule(int, 2, MOST_POSITIONS),
    "sliding_window": Rule(int, 1, MOST_POSITIONS, optional=True), "max_window_layers": Rule(int, 0),
    "layer_types": Rule(str, choices=LAYER_TYPES, many=True, optional=True),
    "num_experts": Rule(int, 1, MOST_EXPERTS, optional=True),
    "num_experts_per_tok": Rule(int, 0, MOST_EXPERTS),
    "top_k_experts": Rule(int, 1, MOST_EXPERTS, optional=True),
    "num_local_experts": Rule(int, 0, MOST_EXPERTS, optional=True),
    "moe_intermediate_size": Rule(int, 1, MOST_CHANNELS, optional=True),
    **dict.fromkeys(("shared_intermediate_size", "shared_expert_intermediate_size"),
                    Rule(int, 0, MOST_CHANNELS)), "decoder_sparse_step": Rule(int, 1),
    "mlp_only_layers": Rule(int, 0, MOST_LAYERS, many=True, optional=True),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), Rule(int, 1, 4096)),
    **dict.fromkeys(("mamba_d_state", "mamba_expand"), Rule(int, 1, 4096)),
    "mamba_d_head": Rule(int, 1, 4096, optional=True), "mamba_d_conv": Rule(int, 2, 64),
    **dict.fromkeys(("mamba_n_heads", "mamba_n_groups"), Rule(int, 1, MOST_HEADS)),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), Rule(int, 1, MOST_HEADS)),
    "linear_conv_kernel_dim": Rule(int, 2, 64), "full_attention_interval": Rule(int, 1, MOST_LAYERS),
    "full_attn_idxs": Rule(int, 0, MOST_LAYERS, many=True, optional=True),
    "num_dense_layers": Rule(int, 0, MOST_LAYERS), "routed_scaling_factor": Rule(float, 1, 1),
    "norm_eps": Rule(float, 0, 1), "tie_embedding": Rule(bool), "conv_L_cache": Rule(int, 2, 64),
    "block_ff_dim": Rule(int, 1, MOST_CHANNELS), "block_multiple_of": Rule(int, 1, MOST_CHANNELS),
    "block_ffn_dim_multiplier": Rule(float, 0.01, 100),
    "no_rope_layers": Rule(int, 0, 1, many=True, optional=True), "no_rope_layer_interval": Rule(int, 1)}
LLAMA_SIZES = {  # what a text_config may leave out
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048}
BESIDE_TEXT = set("""image_token_id video_token_id vision_config vision_end_token_id vision_start_token_id
    vision_token_id perceiver_config pixel_shuffle_factor""".split())
HF_INERT = set("""architectures attention_dropout auto_map bos_token_id cache_implementation dtype embd_pdrop
    do_sample eos_token_id init_method initializer_range is_llama_config mamba_ssm_dtype max_length
    model_type mtp_num_hidden_layers mtp_use_dedicated_embeddings neftune_noise_alpha output_attentions
    output_hidden_states output_router_logits pad_token_id pretraining_tp quantization_config
    resid_pdrop return_dict router_aux_loss_coef sep_token_id temperature tokenizer_class top_p torch_dtype
    transformers.js_config transformers_version model_name unsloth_fixed unsloth_version use_cache
    _attn_implementation _attn_implementation_autoset _name_or_path
    _sliding_window_pattern""".split())
GENERATION = set("""bad_words_ids begin_suppress_tokens chunk_size_feed_forward decoder_start_token_id
    diversity_penalty early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff
    eta_cutoff finetuning_task forced_bos_token_id forced_eos_token_id id2label label2id length_penalty
    max_new_tokens min_length min_new_tokens min_p no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences penalty_alpha prefix problem_type renormalize_logits repetition_penalty
    suppress_tokens task_specific_params top_k typical_p""".split())  # and the like: no arithmetic
# other programs' implementations, training and names: no effect on the arithmetic
OTHERS_AFFAIR = set("""attention_probs_dropout_prob attention_softmax_in_fp32 attn_impl attn_implementation
    attn_implementation_autoset base_model_name_or_path classifier_dropout cls_token_id dropout
    embedding_dropout experts_implementation exponential_decay_length_penalty ffn_dropout flash_attn
    fuse_cross_entropy fused_cross_entropy gradient_checkpointing hidden_dropout hidden_dropout_prob
    ignore_index init_std initializer_factor is_decoder keys_to_ignore_at_inference label_smoothing language
    layerdrop license loss_type mask_token_id max_seq_len max_sequence_length mlp_dropout model_max_length
    n_ctx name_or_path num_labels num_logits_to_keep output_past output_scores padding_side pad_token
    pruned_heads remove_invalid_values return_dict_in_generate router_z_loss_coef seq_length
    tf_legacy_loss tokenizer_name torchscript training trust_remote_code unk_token_id use_bfloat16
    use_cache_kernel use_cache_quantization use_flash_attention use_flash_attention_2 use_flash_attn
    use_fused_mlp use_fused_rms_norm use_fused_rope use_fused_swiglu use_memory_efficient_attention
    z_loss_coef""".split())
HF_ONLY = {  # the only value these may have, unless the family has them
    **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias", "rope_interleaved", "use_bias",
                     "use_mrope", "use_bidirectional_attention", "use_cla",
                     "add_classification_head"), False),
    "full_attn_mod": 1, "interpolate_factor": 1, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "num_experts": 1, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "output_gate_type": "swish",
    **dict.fromkeys(("is_causal", "use_rope", "use_rotary", "attn_output_gate"), True)}


def unsupported(name: str) -> str:
    """The error text for a family that has no row in FAMILIES."""
    return (f"this server cannot run {printable(name)[:60]} yet; it runs: "
            f"{', '.join(row.title for row in FAMILIES.values() if row.title)}")


def changes_nothing(key: str, raw: Mapping) -> bool:
    """Whether a key in no row only concerns generation, training or other programs, or disables something."""
    windows = key in ("sliding_window", "max_window_layers") and not (
        raw.get("sliding_window") and raw.get("use_sliding_window", True))
    return key not in HF_ONLY and (
        key.startswith("_") or key in GENERATION | OTHERS_AFFAIR or not raw[key] or windows)


def refuse_unknown(path: Path, family: str, raw: Mapping, known: Mapping):
    """ConfigError for a key that would change the arithmetic; unknown ones that would not are logged."""
    ignored = []
    for key, value in raw.items():
        if key in known or key in HF_INERT or value in (None, HF_ONLY.get(key)):
            continue
        if not changes_nothing(key, raw):
            raise ConfigError(f"{path}: {key} is {shown(value)}; " + (
                f"in a {family} model it must be {json.dumps(HF_ONLY[key])}" if key in HF_ONLY else
                f"this key is not supported in a {family} model. Supported: {', '.join(sorted(known))}"))
        ignored.append(printable(key))
    if ignored:
        log.info("%s: %s: ignored, since they have no effect here", path, ", ".join(ignored))


def family_config(path: Path, raw: Mapping) -> tuple[str, dict]:
    """The family of a config.json, and the checked values of the keys in its row and HF_DEFAULTS."""
    family = checked(path, "model_type", raw.get("model_type"), Rule(str))
    if "quantization_config" not in FAMILIES.get(family, FAMILIES["llama"]).config:
        fp8_block(path, raw)
    if family in VISION:
        family, raw = text_part(path, family, raw)
    if family not in FAMILIES:
        raise ConfigError(f"{path}: {unsupported(family)}")
    row, raw = FAMILIES[family], with_layers_of_now(raw)
    defaults = HF_DEFAULTS | row.config
    for own, theirs in row.aliases.items():  # its own key wins, as in transformers
        raw = {**raw, own: raw[own] if raw.get(own) is not None else raw.get(theirs)}
    refuse_unknown(path, family, raw, defaults)
    config = {key: raw.get(key, default) for key, default in defaults.items()}
    for key, default in defaults.items():
        rule = HF_KEYS.get(key, Rule(bool) if isinstance(default, bool) else None)
        if key in row.aliases.values():
            continue  # checked under its own name
        if key == "layer_types" and row.mixers:
            rule = HF_KEYS[key]._replace(choices=(LAYER_TYPES[0], *row.mixers))
        if key.startswith("hidden_act"):
            any_gate = default == "silu" and "activation" not in row.fields
            rule = Rule(str, choices=tuple(HF_ACTIVATIONS) if any_gate else (str(default),))
        if rule and config[key] is None and not rule.optional:
            config[key] = default
        if rule:
            checked(path, key, config[key], rule._replace(optional=rule.optional and key not in row.needed))
    if packed := config.get("quantization_config"):
        method = packed.get("quant_method") if isinstance(packed, dict) else None
        checked(path, "quantization_config.quant_method", method, Rule(str, choices=("mxfp4",)))
    config |= {theirs: config[own] for own, theirs in row.aliases.items()}
    return family, config | row.complete(config)


def with_layers_of_now(raw: Mapping) -> Mapping:
    """A config whose keys describe its layers in transformers' current form."""
    types, pattern = raw.get("layer_types"), raw.get("sliding_window_pattern")
    if raw.get("sliding_window", False) is not False and not raw["sliding_window"]:
        raw = {**raw, "sliding_window": None}  # 0
    if raw.get("mamba_d_head") == "auto":
        raw = {**raw, "mamba_d_head": None}
    if isinstance(types, list):
        raw = {**raw, "layer_types": [LAYER_TYPES[0] if kind == "attention" else kind for kind in types]}
    if isinstance(pattern, str) and re.fullmatch("L+G", pattern):  # EXAONE: LLLG
        raw = {**raw, "sliding_window_pattern": len(pattern)}
    return raw


def text_part(path: Path, family: str, raw: Mapping) -> tuple[str, Mapping]:
    """The family and the config of an image model's text model; the image encoder is not loaded.

    Some keys lie outside text_config, in the oldest files all of them."""
    text = raw.get("text_config", raw if family.startswith("qwen2") else None)
    if not isinstance(text, dict):
        raise ConfigError(f"{path}: text_config is {shown(text)}; it must be an object")
    kind: str = checked(path, "text_config.model_type", text.get("model_type", VISION[family]), Rule(str))
    kind = VISION[family] if kind == family else TEXT_TYPES.get(kind, kind)
    outer = {key: raw[key] for key in ("tie_word_embeddings", "vocab_size") if key in raw}
    if family == "llava" and kind == "llama":
        outer = LLAMA_SIZES | outer
    inner = {key: value for key, value in text.items() if key not in BESIDE_TEXT}
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := inner.get(name), dict):  # image positions have three axes, text positions one
            rope = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
            inner[name] = rope | {key: "default" for key in ("type", "rope_type") if rope.get(key) == "mrope"}
    return kind, outer | inner


def complete_heads(path: Path, config: dict, names: Mapping[str, str] = {}):
    """Fill in the number of key-value heads and the head size, checked; `names`: key -> the file's name."""
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
    """The spec of a checked config; `rope` has max_positions, the fields that begin with rope_, and perhaps
    local_rope_base, the base of layers with a window, which then have no factors."""
    row, layers = FAMILIES[family], config["num_hidden_layers"]
    width, heads, head_size = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    fields = {"ffn_bias": config.get("mlp_bias", False),
              "activation": HF_ACTIVATIONS[config["hidden_act"]], **row.fields, **rope}
    local_base, unrotated, windows = fields.pop("local_rope_base", None), set(), (0,) * layers
    if "no_rope_layers" in config:
        every = config["no_rope_layer_interval"]
        config["no_rope_layers"] = rotated = config["no_rope_layers"] or [
            int((layer + 1) % every > 0) for layer in range(layers)]
        checked(path, "no_rope_layers", rotated, HF_KEYS["no_rope_layers"], layers)
        unrotated = {layer for layer in range(layers) if not rotated[layer]}
    window = None if config.get("use_sliding_window") is False else config.get("sliding_window")
    types = config.get("layer_types") or [
        LAYER_TYPES[bool(row.has_window(config, layer))] for layer in range(layers)]
    rule = HF_KEYS["layer_types"]._replace(choices=(*LAYER_TYPES, *row.mixers))
    checked(path, "layer_types", types, rule, layers)
    if row.mixers:
        fields["mixers"] = mixers_of(path, row, config, types)
    if row.fields_of:
        fields |= row.fields_of(path, config)
    elif "sliding_attention" in types:
        checked(path, "sliding_window in use", window, HF_KEYS["sliding_window"]._replace(optional=False))
        windows = tuple(window or 0 if type_ == "sliding_attention" else 0 for type_ in types)
        if row.windows_rotate:
            unrotated = {l for l, window in enumerate(windows) if not window}
    if config.get("position_embedding_type", "rope") != "rope":
        fields["rope_size"] = 0
    if config.get("attention_bias"):
        fields |= {"qkv_bias": True, "output_bias": config.get("attention_out_bias",
                                                               row.fields.get("output_bias", True))}
    if "qkv_bias" in config:
        fields["qkv_bias"] = config["qkv_bias"]
    if fields.get("qk_norm") == "whole":
        sizes = heads * head_size, config["num_key_value_heads"] * head_size
        fields |= {"qk_norm": "none", "qk_norm_sizes": sizes}
    if "residual_multiplier" in config:
        fields |= {"embedding_scale": config["embedding_multiplier"],
                   "residual_scale": config["residual_multiplier"],
                   "logit_scale": 1 / config["logits_scaling"]}
        if config["attention_multiplier"]:
            fields["q_scale"] = config["attention_multiplier"] * head_size**0.5
    if "query_pre_attn_scalar" in config:
        fields["q_scale"] = (head_size / config["query_pre_attn_scalar"])**0.5
        fields["embedding_scale"] = width**0.5
    ffn_size = config["intermediate_size"]
    if "num_experts" in config:
        ffn_size, experts = expert_fields(path, config)
        fields |= experts
    checked(path, "the width of its feed-forward parts", ffn_size, HF_KEYS["intermediate_size"])
    spec = ModelSpec(
        vocab_size=config["vocab_size"], layers=layers, width=width, heads=heads,
        kv_heads=config["num_key_value_heads"], head_size=head_size, ffn_size=ffn_size,
        norm_eps=config["rms_norm_eps"], tied_head=config["tie_word_embeddings"],
        softcap=config.get("final_logit_softcapping") or 0.0,
        attention_softcap=config.get("attn_logit_softcapping") or 0.0, **fields)
    return with_kinds(spec, windows, unrotated, local_base) if any(windows) or unrotated else spec


def with_kinds(spec: ModelSpec, windows: Seq[int], unrotated: set[int],
               local_base: float | None) -> ModelSpec:
    """The spec with these windows, a rotary base for layers with a window, and some layers unrotated."""
    def attention(layer: int) -> Attention:
        own = replace(spec.attention(layer), window=windows[layer])
        if windows[layer] and local_base:
            own = replace(own, rope_base=local_base, rope_factors=None, rope_scale=1.0)
        return replace(own, rope_size=0) if layer in unrotated else own

    return replace(spec, attentions=tuple(map(attention, range(spec.layers))))


def mixers_of(path: Path, row: Family, config: Mapping, types: Seq[str]) -> tuple[Mixer | None, ...]:
    """The mixer of each layer of these types; () where all are attention."""
    mixers = tuple(row.mixers[type_](config) if type_ in row.mixers else None for type_ in types)
    if not any(mixers):
        return ()
    if all(mixers):
        raise ConfigError(f"{path}: none of its layers is {LAYER_TYPES[0]}; this server needs one")
    if config.get("time_step_limit") not in NO_LIMITS:
        raise ConfigError(f"{path}: time_step_limit is {shown(config['time_step_limit'])}; it must be "
                          "[0.0, Infinity]")
    if "mamba_n_heads" in config:
        heads, groups = config["mamba_n_heads"], config["mamba_n_groups"]
        check_divides(path, "mamba_n_heads", heads, groups, "mamba_n_groups")
    if "linear_num_value_heads" in config:
        heads, groups = config["linear_num_value_heads"], config["linear_num_key_heads"]
        check_divides(path, "linear_num_value_heads", heads, groups, "linear_num_key_heads")
    return mixers


def expert_fields(path: Path, config: Mapping) -> tuple[int, dict]:
    """F and the spec's expert fields, also for a model that could have experts but has none."""
    layers, chosen = config["num_hidden_layers"], "num_experts_per_tok"
    numbers = config["num_experts"], config["num_local_experts"]
    experts = next((number for number in numbers if number is not None), 128)  # as in transformers
    shared = config.get("shared_intermediate_size") or config.get("shared_expert_intermediate_size") or 0
    if not experts:
        return shared or config["intermediate_size"], {}
    if "use_expert_bias" in config and not config["norm_topk_prob"]:
        raise ConfigError(f"{path}: norm_topk_prob is false; with a sigmoid router it must be true")
    dense = config.get("mlp_only_layers") or range(config.get("num_dense_layers") or 0)
    dense = tuple(layer for layer in range(layers)
                  if layer in dense or (layer + 1) % config.get("decoder_sparse_step", 1))
    return config["moe_intermediate_size"] or config["intermediate_size"], {
        "experts": experts, "shared_size": shared, "dense_layers": dense,
        "experts_per_token": checked(path, chosen, config[chosen], Rule(int, 1, experts)),
        "dense_size": config["intermediate_size"] if dense else 0,
        "shares_sum_to_one": config.get("norm_topk_prob", True),
        "choice_bias": config.get("use_expert_bias", False)}


def growing_queries(fields: Mapping, beta: float | None, original: int, context: int | None) -> dict:
    """max_positions, and q_growth if the server's `context` makes Ministral 3's queries grow."""
    if beta and (context or 0) > original:
        return {"q_growth": (beta, original)}
    return {"max_positions": min(fields["max_positions"], original if beta else MOST_POSITIONS)}


ROPE_TYPES = {  # rope_type -> its parameters
    "default": "", "linear": "factor", "dynamic": "factor",
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
    """max_positions and the fields that begin with rope_, as in transformers' modeling_rope_utils.py.

    `rope` is a rope_scaling or rope_parameters object. longrope uses its long factors for all positions if
    the server's `context` (None: the model's) is longer than the original one; dynamic scaling uses the
    factor for the `context`."""
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
    if rope_type == "dynamic":
        factor = value("factor")
        length = min(max(context or 0, positions), int(max(factor, 1) * positions))
        stretched = base * (factor * length / positions - (factor - 1))**(size / max(size - 2, 1))
        return fields | {"max_positions": length, "rope_base": stretched}
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

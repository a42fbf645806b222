"""Families with latent attention (MLA): DeepSeek-V2 and V3, and those that are built like them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy

from chatlm.worker.model.blocks.attention import Scores
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.mla import Mla
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.weights.facts import Facts
from chatlm.worker.weights.families import minicpm, mixtures
from chatlm.worker.weights.families.family import (
    EXPERTS, Family, Gguf, Header, expert_tensors, separate_experts, without_draft_heads)
from chatlm.worker.weights.families.mixtures import (
    CORRECTION_BIAS, DENSE_FIRST, DRAFTS, GROUPS, KEYS, SHARED, shared_tensors, shared_width)
from chatlm.worker.weights.rules import MOST_CHANNELS, Rule, check_divides, checked, router_groups

# Of the norms of latents and of what makes queries, whatever rms_norm_eps says: as in transformers and in
# DeepSeek's own code. llama.cpp and vLLM use rms_norm_eps
INNER_EPS = 1e-6
ATTENTION = {
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "qk_head_dim": None, "v_head_dim": 128, "rope_interleave": True, "attention_bias": False}
SIZE = Rule(int, 1, MOST_CHANNELS)
ATTENTION_KEYS = {
    **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), SIZE),
    "qk_rope_head_dim": Rule(int, 2, MOST_CHANNELS), "q_lora_rank": SIZE._replace(optional=True)}
MIXTURE = EXPERTS | GROUPS | DENSE_FIRST | SHARED | DRAFTS | {
    "n_routed_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 1407, "moe_layer_freq": 1,
    "mlp_only_layers": None, "scoring_func": "sigmoid", "topk_method": None,
    **dict.fromkeys(("aux_loss_alpha", "ep_size", "seq_aux"))}  # these three are of training
MIXTURE_KEYS = KEYS | {"moe_layer_freq": Rule(int, 1, 1)}
LAYER = "model.layers.{}"
TENSORS = {
    ours: (f"{LAYER}.self_attn.{theirs}",) for ours, theirs in {
        "queries": "q_proj.weight", "queries_in": "q_a_proj.weight", "queries_in_bias": "q_a_proj.bias",
        "queries_norm": "q_a_layernorm.weight", "queries_up": "q_b_proj.weight",
        "kv_in": "kv_a_proj_with_mqa.weight", "kv_in_bias": "kv_a_proj_with_mqa.bias",
        "kv_norm": "kv_a_layernorm.weight", "k_up": "kv_b_proj.weight", "v_up": "kv_b_proj.weight"}.items()}
MIXTURE_TENSORS = TENSORS | expert_tensors("experts.{}", "gate") | shared_tensors("shared_experts") | {
    "correction_bias": (f"{LAYER}.mlp.gate.e_score_correction_bias",)}


# ---- what a config says


def completed(path: Path, config: Mapping) -> dict:
    """The usual keys of attention: a head is what of it turns, since all else that they tell is Mla's."""
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"] or heads
    checked(path, "num_key_value_heads", kv_heads, Rule(int, heads, heads))
    found = {"num_key_value_heads": heads, "head_dim": config["qk_rope_head_dim"]}
    if config["v_head_dim"] is None:
        check_divides(path, "hidden_size", config["hidden_size"], heads, "num_attention_heads")
        found["v_head_dim"] = config["hidden_size"] // heads
    if "n_shared_experts" in config:
        found |= shared_width(config, "n_shared_experts")
    return found


def stretched(config: Mapping) -> float:
    """m of yarn: scores are multiplied by its square, if the file states mscale_all_dim."""
    rope = config["rope_scaling"] or config["rope_parameters"] or {}
    scale = rope.get("mscale_all_dim")
    if not scale or rope.get("rope_type", rope.get("type", "default")) == "default":
        return 1.0
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    factor = rope.get("factor") or config["max_position_embeddings"] / original
    return 0.1 * scale * math.log(max(factor, 1)) + 1


def deepseek(facts: Facts, **more: Any) -> Model:
    """Latent attention, and experts in most layers. `more`: other settings of their router."""
    routing = routing_of(facts) | more if facts.experts else {}
    norm = RmsNorm(facts.eps)
    attention = attention_of(facts)
    layers = [Layer(attention, facts.feed(number, **routing), norm, norm) for number in facts.layers]
    return facts.decoder(layers, norm)


def mistral4(facts: Facts) -> Model:
    """Its softmaxes are divided by their sum, and a group counts by its two best experts."""
    return deepseek(facts, sum_to_one=facts.config["norm_topk_prob"], group_best=2)


def minicpm3(facts: Facts) -> Model:
    """Latent attention with MiniCPM's factors."""
    _, residual, _ = factors = minicpm.factors_of(facts)
    norm = RmsNorm(facts.eps / residual**2)  # it reads x divided by the factor
    attention = replace(attention_of(facts), adjacent=False)
    layers = [Layer(attention, facts.feed(number), norm, norm) for number in facts.layers]
    return minicpm.with_factors(facts, factors, layers, norm)


def attention_of(facts: Facts) -> Mla:
    config = facts.config
    return Mla(
        facts.heads, config["kv_lora_rank"], config["qk_nope_head_dim"], config["qk_rope_head_dim"],
        config["v_head_dim"], RmsNorm(INNER_EPS), facts.rope, config["q_lora_rank"] or 0,
        Scores(stretched(config)**2, facts.growth), adjacent=config.get("rope_interleave", True),
        biased=config["attention_bias"])


def routing_of(facts: Facts) -> dict[str, Any]:
    """A router of softmaxes is V2's. It never divides shares by their sum, as in transformers, whatever
    norm_topk_prob says, and a group counts by its best expert."""
    config = facts.config
    found: dict[str, Any] = {"scale": config["routed_scaling_factor"]}
    if config["scoring_func"] == "sigmoid":
        found |= {"kind": "sigmoid", "correction_bias": True}
    else:
        found |= {"sum_to_one": False, "group_best": 1}
    if config["topk_method"] != "greedy":
        found["groups"] = router_groups(facts.path, config)
    return found


def rope_of_mistral4(path: Path, name: str, config: Mapping, rope: dict) -> dict:
    """Its files state which part of a head turns, which the sizes say too."""
    turned = config["qk_rope_head_dim"] / (config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    part = rope.get("partial_rotary_factor", turned)
    checked(path, f"{name}.partial_rotary_factor", part, Rule(float, turned - 1e-6, turned + 1e-6))
    return {key: value for key, value in rope.items() if key != "partial_rotary_factor"}


def of_layer_types(path: Path, raw: Mapping) -> Mapping:
    """A config.json whose mlp_layer_types became mlp_only_layers."""
    kinds = raw.get("mlp_layer_types")
    if kinds is None:
        return raw
    count = raw.get("num_hidden_layers")
    checked(path, "mlp_layer_types", kinds, Rule(str, choices=("dense", "sparse"), many=True),
            count if isinstance(count, int) else None)
    dense = [layer for layer, kind in enumerate(kinds) if kind == "dense"]
    others = {key: value for key, value in raw.items() if key != "mlp_layer_types"}
    return others | {"mlp_only_layers": dense, "first_k_dense_replace": 0}


def repack(state: Mapping[str, Any]) -> dict[str, Any]:
    """A folder's tensors without those of draft heads, and with a matrix for each expert."""
    return {name: part for stored, tensor in without_draft_heads(state).items()
            for name, part in separate_experts(stored, tensor).items()}


# ---- GGUF files


GGUF_TENSORS = {ours: (f"blk.{{}}.{theirs}",) for ours, theirs in {
    "queries": "attn_q.weight", "queries_in": "attn_q_a.weight", "queries_in_bias": "attn_q_a.bias",
    "queries_norm": "attn_q_a_norm.weight", "queries_up": "attn_q_b.weight",
    "kv_in": "attn_kv_a_mqa.weight", "kv_in_bias": "attn_kv_a_mqa.bias", "kv_norm": "attn_kv_a_norm.weight",
    "k_up": "attn_k_b.weight", "v_up": "attn_v_b.weight"}.items()} | CORRECTION_BIAS
BOTH = ("blk.{}.attn_kv_b.weight",)  # of older files, and of MiniCPM3
GGUF_KEYS = mixtures.GGUF_KEYS | {
    "attention.q_lora_rank": SIZE._replace(optional=True), "attention.kv_lora_rank": SIZE,
    "attention.key_length_mla": SIZE._replace(optional=True),
    "attention.value_length_mla": SIZE._replace(optional=True),
    "attention.temperature_scale": Rule(float, 0, 10, optional=True)}
GATING = {1: "softmax", 2: "sigmoid"}
LOG_UNIT = 10  # these files have mscale_all_dim times 0.1


def gguf_latent(header: Header) -> tuple[dict, dict]:
    """The metadata of plain heads as wide as what of one turns, and a config.json's keys of attention."""
    heads = header.value("attention.head_count")
    turned = header.value("rope.dimension_count")
    whole = header.value("attention.key_length_mla", header.value("attention.key_length"))
    layer = header.stored.get("blk.0.attn_output.weight")
    values = header.value("attention.value_length_mla", None)
    if values is None:
        values = int(layer.shape[0]) // heads if layer is not None else 1
    checked(header.path, f"{header.own}attention.key_length_mla", whole, Rule(int, turned + 1, MOST_CHANNELS))
    changes = {
        "attention.key_length": turned, "attention.value_length": turned, "attention.head_count_kv": heads,
        "block_count": header.value("block_count") - header.value("nextn_predict_layers", 0),
        "nextn_predict_layers": 0}
    rank = header.value("attention.q_lora_rank", None)
    return changes, {
        "q_lora_rank": None if header.has("attn_q.weight") else rank,
        "kv_lora_rank": header.value("attention.kv_lora_rank"), "qk_nope_head_dim": whole - turned,
        "qk_rope_head_dim": turned, "v_head_dim": values, "attention_bias": header.has("attn_kv_a_mqa.bias"),
        "rope_parameters": gguf_yarn(header)}


def gguf_yarn(header: Header) -> dict | None:
    """What the metadata say of yarn's effect on scores."""
    if header.value("rope.scaling.type", "none") != "yarn":
        return None
    return {"rope_type": "yarn", "factor": header.value("rope.scaling.factor", 1.0),
            "mscale_all_dim": LOG_UNIT * (header.value("rope.scaling.yarn_log_multiplier") or 0.0)}


def gguf_mixture(header: Header) -> tuple[dict, dict]:
    """The same, and the router. Files of GLM-4.7-Flash from before 21 January 2026 do not state its scores,
    but only a router of sigmoids has a bias for the choice."""
    changes, config = gguf_latent(header)
    usual = 2 if header.has("exp_probs_b.bias") else 1
    scores = GATING[header.value("expert_gating_func", usual, low=1, high=2)]
    return changes, config | {
        "scoring_func": scores, "topk_method": "noaux_tc" if scores == "sigmoid" else "group_limited_greedy",
        "num_experts": header.value("expert_count", 0, low=0),
        "n_group": header.value("expert_group_count", 1),
        "topk_group": header.value("expert_group_used_count", 1),
        "n_shared_experts": header.value("expert_shared_count", 0), "norm_topk_prob": False,
        "num_dense_layers": header.value("leading_dense_block_count", 0),
        "routed_scaling_factor": header.value("expert_weights_scale", 1.0)}


def gguf_mistral4(header: Header) -> tuple[dict, dict]:
    """The same; llama.cpp's converter leaves out by what queries grow, of which there is one model."""
    changes, config = gguf_mixture(header)
    growth = header.value("attention.temperature_scale") or MISTRAL4_ROPE["llama_4_scaling_beta"]
    return changes | {"attention.temperature_scale": growth}, config


def gguf_names(stored: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The names of a file that keeps keys and values in one matrix."""
    if "blk.0.attn_kv_b.weight" in stored:
        return {"k_up": BOTH, "v_up": BOTH}
    return {}


def repack_gguf(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A file's tensors without those of draft heads, and with gates and ups of experts apart."""
    found = {}
    for name, tensor in without_draft_heads(stored).items():
        if not name.endswith(".ffn_gate_up_exps.weight"):
            found[name] = tensor
            continue
        columns, rows, experts = map(int, tensor.shape)
        shape = numpy.array([columns, rows // 2, experts], tensor.shape.dtype)
        for half, part in enumerate(("gate", "up")):
            data = tensor.data.reshape(experts, 2, rows // 2, -1)[:, half]
            found[name.replace("gate_up", part)] = tensor._replace(
                shape=shape, n_elements=tensor.n_elements // 2, n_bytes=tensor.n_bytes // 2, data=data)
    return found


# ---- families


V3_KEYS = ATTENTION_KEYS | MIXTURE_KEYS | {
    "scoring_func": Rule(str, choices=("sigmoid",)),
    "topk_method": Rule(str, choices=("noaux_tc",), optional=True)}
V3 = Family(
    "DeepSeek-V3 and R1", ATTENTION | MIXTURE | {
        "vocab_size": 129_280, "n_routed_experts": 256, "moe_intermediate_size": 2048, "n_group": 8,
        "topk_group": 4, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "num_dense_layers": 3},
    deepseek, MIXTURE_TENSORS, has_window=lambda config, layer: False,
    keys=V3_KEYS, aliases={"n_routed_experts": "num_experts", "first_k_dense_replace": "num_dense_layers"},
    complete=completed, repack=repack,
    gguf=Gguf("deepseek2", names=GGUF_TENSORS, names_in=gguf_names, layers=gguf_mixture, repack=repack_gguf,
              keys=GGUF_KEYS, log_unit=LOG_UNIT))
V2 = V3._replace(
    title="DeepSeek-V2", config={key: V3.config[key] for key in V3.config if key != "rope_interleave"} | {
        "n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1407,
        "n_shared_experts": 2,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "first_k_dense_replace": 0,
        "num_dense_layers": 0, "norm_topk_prob": False, "scoring_func": "softmax", "topk_method": "greedy"},
    keys=V3_KEYS | {"scoring_func": Rule(str, choices=("softmax",)),
                    "topk_method": Rule(str, choices=("greedy", "group_limited_greedy"))},
    gguf=Gguf())
GLM_FLASH = V3._replace(
    title="GLM-4.7-Flash", config=V3.config | {
        "q_lora_rank": 768, "qk_nope_head_dim": 192, "v_head_dim": 256, "n_routed_experts": 64,
        "num_experts_per_tok": 4, "moe_intermediate_size": 1536, "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 1.8, "first_k_dense_replace": 1, "num_dense_layers": 1,
        "rms_norm_eps": 1e-5},
    restated=of_layer_types, gguf=Gguf())
MISTRAL4_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 128.0, "original_max_position_embeddings": 8192,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1}
MISTRAL4 = V3._replace(
    title="Mistral Small 4", config=V3.config | {
        "q_lora_rank": 1024, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "n_routed_experts": 128,
        "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0, "num_dense_layers": 0, "scoring_func": "softmax",
        "rope_parameters": MISTRAL4_ROPE},
    keys=V3_KEYS | {"scoring_func": Rule(str, choices=("softmax",))}, model=mistral4,
    rope_of=rope_of_mistral4, queries_grow=True,
    gguf=V3.gguf._replace(architectures="mistral4", layers=gguf_mistral4))
MINICPM3 = Family(
    "MiniCPM 3", {key: ATTENTION[key] for key in ATTENTION if key != "rope_interleave"} | {
        "q_lora_rank": 768, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
        "v_head_dim": None, **minicpm.UNSAID, "mlp_bias": False, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5},
    minicpm3, TENSORS, has_window=lambda config, layer: False,
    keys=ATTENTION_KEYS | {
        "v_head_dim": SIZE._replace(optional=True), **minicpm.KEYS},
    complete=completed,
    gguf=Gguf("minicpm3", names=GGUF_TENSORS, names_in=gguf_names, layers=gguf_latent, keys=GGUF_KEYS))
YOUTU = Family(
    "Youtu-LLM", ATTENTION | {"tie_word_embeddings": True, "embedding_initializer_range": None}, deepseek,
    TENSORS, has_window=lambda config, layer: False, keys=ATTENTION_KEYS, complete=completed)
FAMILIES = {
    "deepseek_v3": V3,
    "deepseek_v2": V2,
    "kimi_k2": V3._replace(title="Kimi-K2", config=V3.config | {"n_group": 1, "topk_group": 1}, gguf=Gguf()),
    "glm4_moe_lite": GLM_FLASH,
    "youtu": YOUTU,
    "mistral4": MISTRAL4,
    "minicpm3": MINICPM3}

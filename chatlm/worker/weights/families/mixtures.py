"""Mixtures of experts: GLM-4.5, Ling 2, MiniMax-M2, Hunyuan A13B, ERNIE 4.5 and Qwen3-VL-MoE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from pathlib import Path
from typing import Any

from chatlm.common.errors import ConfigError, shown
from chatlm.worker.model.blocks.attention import HeadNorms
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.weights.facts import Facts
from chatlm.worker.weights.families.family import (
    AFTER_ATTENTION, EXPERTS, Family, Gguf, Header, as_vectors, expert_tensors, separate_experts,
    without_draft_heads)
from chatlm.worker.weights.families.plain import biases_of_glm4
from chatlm.worker.weights.rules import (
    JITTER, MOST_CHANNELS, MOST_EXPERTS, MOST_LAYERS, SHARE_SCALE, Rule, checked, router_groups)

GROUPS = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0}
DENSE_FIRST = {"first_k_dense_replace": 1, "num_dense_layers": 1}
SHARED = {"n_shared_experts": 1, "num_shared_experts": 1, "shared_expert_intermediate_size": 0,
          "moe_shared_expert_intermediate_size": None}
KEYS = {
    **dict.fromkeys(("n_group", "topk_group"), Rule(int, 1, MOST_EXPERTS)),
    "n_routed_experts": Rule(int, 0, MOST_EXPERTS),
    # optional, since other families have these keys without effect
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "num_shared_expert"),
                    Rule(int, 0, MOST_EXPERTS, optional=True)),
    "moe_shared_expert_intermediate_size": Rule(int, 0, MOST_CHANNELS, optional=True),
    "first_k_dense_replace": Rule(int, 0, MOST_LAYERS), "num_dense_layers": Rule(int, 0, MOST_LAYERS),
    "routed_scaling_factor": SHARE_SCALE, "moe_topk": Rule(int, 1, MOST_EXPERTS),
    "num_nextn_predict_layers": Rule(int, 0, 100, optional=True)}
DRAFTS = {"num_nextn_predict_layers": 0, "num_mtp_layers": None, "mtp_loss_scaling_factor": None}
GGUF_KEYS = {"expert_gating_func": Rule(int, 2, 2), "expert_weights_norm": Rule(bool),
             "expert_shared_count": Rule(int, 0, MOST_EXPERTS)}
CORRECTION_BIAS = {"correction_bias": ("blk.{}.exp_probs_b.bias",)}


def shared_tensors(module: str) -> dict[str, tuple[str, ...]]:
    """Rows like those of HF_TENSORS for the expert that all tokens take."""
    name = f"model.layers.{{}}.mlp.{module}"
    return {"shared_gate_up": (f"{name}.gate_proj.weight", f"{name}.up_proj.weight"),
            "shared_down": (f"{name}.down_proj.weight",)}


def mixture(facts: Facts, norms: HeadNorms | None, **routing: Any) -> Model:
    """Llama's layers, most of them with experts. `norms`: of heads; `routing`: of the Router."""
    norm = RmsNorm(facts.eps)
    layers = [Layer(facts.attention(number, norms), facts.feed(number, **routing), norm, norm)
              for number in facts.layers]
    return facts.decoder(layers, norm)


def sigmoids(facts: Facts) -> dict[str, Any]:
    """A router of sigmoids, which chooses among some groups of experts, and with a bias."""
    return {"kind": "sigmoid", "correction_bias": True, "groups": router_groups(facts.path, facts.config),
            "scale": facts.config["routed_scaling_factor"]}


def shared_width(config: Mapping, count: str) -> dict:
    """How wide the experts are together that all tokens take."""
    width = config.get("moe_shared_expert_intermediate_size") or config["moe_intermediate_size"]
    return {"shared_expert_intermediate_size": (config[count] or 0) * (width or 0)}


def repack_qwen3_vl(state: Mapping[str, Any]) -> dict[str, Any]:
    """A folder's tensors with a matrix for each expert.

    Published folders have the experts' matrices as (E, in, out), and transformers writes (E, out, in)."""
    repacked = {}
    for name, tensor in state.items():
        layer, experts, _ = name.rpartition(".mlp.experts.")
        both = state.get(f"{layer}.mlp.experts.gate_up_proj")
        down = state.get(f"{layer}.mlp.experts.down_proj")
        if experts and both is not None and down is not None and is_in_first(both.shape, down.shape):
            tensor = tensor.swapaxes(-1, -2)
        repacked |= separate_experts(name, tensor)
    return repacked


def is_in_first(both: Seq[int], down: Seq[int]) -> bool:
    """Are gates and ups of these shapes (E, C, 2F), and is what follows (E, F, C)? The sizes of the two can
    never be read in both ways."""
    return len(both) == len(down) == 3 and both[1] == down[2] and both[2] == 2 * down[1]


def gguf_layers(header: Header) -> tuple[dict, dict]:
    """The metadata of the layers without draft heads, and what the tensors and the usual keys tell."""
    header.value("expert_gating_func", 2)
    drafting = header.value("nextn_predict_layers", 0)
    count = header.value("expert_shared_count", 1)
    return {"block_count": header.value("block_count") - drafting, "nextn_predict_layers": 0}, {
        "n_shared_experts": count, "num_shared_experts": count,
        "use_qk_norm": header.has("attn_q_norm.weight")}


def glm4_moe(facts: Facts) -> Model:
    norms = facts.head_norms() if facts.config["use_qk_norm"] else None
    return mixture(facts, norms, **sigmoids(facts))


GLM4_MOE = Family(
    "GLM-4.5 to 4.7", EXPERTS | GROUPS | DENSE_FIRST | SHARED | DRAFTS | {
        "n_routed_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408,
        "attention_bias": False, "use_qk_norm": False, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8},
    glm4_moe,
    expert_tensors("experts.{}", "gate") | shared_tensors("shared_experts") | {
        "correction_bias": ("model.layers.{}.mlp.gate.e_score_correction_bias",)},
    keys=KEYS, repack=without_draft_heads, biases=biases_of_glm4,
    aliases={"n_routed_experts": "num_experts", "first_k_dense_replace": "num_dense_layers"},
    complete=lambda path, config: shared_width(config, "n_shared_experts"),
    gguf=Gguf("glm4moe", names=AFTER_ATTENTION | CORRECTION_BIAS, layers=gguf_layers,
              repack=without_draft_heads, keys=GGUF_KEYS))


def ling2(facts: Facts) -> Model:
    if not facts.config["use_qk_norm"]:
        raise ConfigError(f"{facts.path}: use_qk_norm is false; it must be true")
    routing = sigmoids(facts) | {"correction_bias": facts.config["moe_router_enable_expert_bias"]}
    return mixture(facts, facts.head_norms(), **routing)


def biases_of_ling(config: Mapping) -> list[str]:
    return ["qkv"] * config["use_qkv_bias"] + ["output"] * config["use_bias"]


LING2 = Family(
    "Ling 2", EXPERTS | GROUPS | DENSE_FIRST | SHARED | DRAFTS | {
        "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512, "n_group": 8,
        "topk_group": 4, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "rope_theta": 600_000.0,
        "partial_rotary_factor": 0.5, "use_bias": False, "use_qkv_bias": False, "use_qk_norm": True,
        "use_rmsnorm": True, "score_function": "sigmoid", "moe_router_enable_expert_bias": True,
        "router_dtype": None, "output_dropout": 0.0},
    ling2,
    expert_tensors("experts.{}", "gate") | shared_tensors("shared_experts") | {
        "embed": ("model.word_embeddings.weight",),
        "qkv": ("model.layers.{}.attention.query_key_value.weight",),
        "qkv_bias": ("model.layers.{}.attention.query_key_value.bias",),
        "output": ("model.layers.{}.attention.dense.weight",),
        "output_bias": ("model.layers.{}.attention.dense.bias",),
        "q_norm": ("model.layers.{}.attention.query_layernorm.weight",),
        "k_norm": ("model.layers.{}.attention.key_layernorm.weight",),
        "correction_bias": ("model.layers.{}.mlp.gate.expert_bias",)},
    keys=KEYS | {"score_function": Rule(str, choices=("sigmoid",)),
                 "router_dtype": Rule(str, optional=True), "output_dropout": Rule(float, 0, 1)},
    repack=without_draft_heads, biases=biases_of_ling,
    aliases={"first_k_dense_replace": "num_dense_layers"},
    complete=lambda path, config: shared_width(config, "num_shared_experts"),
    gguf=Gguf("bailingmoe2", names=CORRECTION_BIAS, layers=gguf_layers, repack=without_draft_heads,
              keys=GGUF_KEYS))


def rope_of_minimax(path: Path, name: str, config: Mapping, rope: dict) -> dict:
    """Published files state how many numbers of a head turn, newer ones their share."""
    if "partial_rotary_factor" in rope or not config["rotary_dim"]:
        return rope
    return rope | {"partial_rotary_factor": config["rotary_dim"] / config["head_dim"]}


def minimax(facts: Facts) -> Model:
    """Its norms of q and of k are over all heads."""
    return mixture(facts, facts.whole_norms(), kind="sigmoid", correction_bias=True)


MINIMAX_OTHER = dict.fromkeys("""attn_type_list layernorm_full_attention_beta layernorm_linear_attention_beta
    layernorm_mlp_beta max_model_len mtp_transformer_layers num_mtp_modules output_router_logits
    qk_norm_type router_jitter_noise shared_moe_mode""".split())  # of related models, or of drafts
MINIMAX = Family(
    "MiniMax-M2", EXPERTS | MINIMAX_OTHER | {
        "num_local_experts": 256, "num_experts_per_tok": 8, "num_key_value_heads": 8, "head_dim": 128,
        "rope_theta": 5e6, "rotary_dim": None, "scoring_func": "sigmoid", "use_routing_bias": True,
        "use_qk_norm": True, "use_mtp": False, "shared_intermediate_size": 0, "partial_rotary_factor": None},
    minimax, {
        "router": ("model.layers.{}.block_sparse_moe.gate.weight",),
        "correction_bias": ("model.layers.{}.block_sparse_moe.e_score_correction_bias",),
        "expert_gate_up": tuple(f"model.layers.{{}}.block_sparse_moe.experts.{{}}.{part}.weight"
                                for part in ("w1", "w3")),
        "expert_down": ("model.layers.{}.block_sparse_moe.experts.{}.w2.weight",)},
    keys={"rotary_dim": Rule(int, 2, MOST_CHANNELS, optional=True),
          "scoring_func": Rule(str, choices=("sigmoid",)), "router_jitter_noise": JITTER},
    rope_of=rope_of_minimax,
    gguf=Gguf("minimax-m2", names=CORRECTION_BIAS, keys=GGUF_KEYS, layers=gguf_layers))


def same_in_all_layers(path: Path, raw: Mapping) -> dict:
    """A config.json whose lists with a number for each layer are that number. ConfigError if they differ."""
    found = dict(raw)
    for key in ("moe_topk", "moe_intermediate_size", "num_shared_expert"):
        numbers = raw.get(key)
        if not isinstance(numbers, list):
            continue
        if not numbers or numbers.count(numbers[0]) < len(numbers):
            raise ConfigError(f"{path}: {key} is {shown(numbers)}; it must be the same in all layers")
        found[key] = numbers[0]
    return found


def hunyuan_shared(path: Path, config: Mapping) -> dict:
    """Its shared experts are as wide as the config's feed-forward parts."""
    count = config["num_shared_expert"] or 0
    return {"shared_expert_intermediate_size": config["intermediate_size"] * count}


HUNYUAN_EXPERTS = EXPERTS | {
    "num_experts": 1, "moe_topk": 1, "num_experts_per_tok": 1, "num_shared_expert": 1,
    "shared_expert_intermediate_size": 0, "norm_topk_prob": True, "use_mixed_mlp_moe": True,
    "moe_layer_num_skipped": 0, "moe_drop_tokens": None, "moe_random_routing_dropped_token": None,
    "capacity_factor": None, "position_embedding_xdrope": False, "group_limited_greedy": False}
HUNYUAN_KEYS = {key: KEYS[key] for key in ("moe_topk", "num_shared_expert")} | {
    "moe_layer_num_skipped": Rule(int, 0, 0)}
HUNYUAN_TENSORS = expert_tensors("experts.{}", "gate.wg") | shared_tensors("shared_mlp")


def ernie_moe(facts: Facts) -> Model:
    """A bias counts in the choice of experts, but not in their shares."""
    return mixture(facts, None, correction_bias=True)


def biases_of_ernie(config: Mapping) -> list[str]:
    return ["qkv", "output"] if config["use_bias"] else []


def ernie_layers(path: Path, config: Mapping) -> dict:
    """Which layers are dense, and how wide the experts are together that all tokens take."""
    if "of_tensors" in config:
        return config["of_tensors"]
    layers = config["num_hidden_layers"]
    first = config["moe_layer_start_index"]
    end = config["moe_layer_end_index"]
    last = layers - 1 if end < 0 else end
    step = config["moe_layer_interval"]
    dense = [layer for layer in range(layers) if not first <= layer <= last or (layer + 1) % step]
    count = config["moe_num_shared_experts"] or 0
    key = "moe_intermediate_size"
    width = checked(path, key, config[key], Rule(int, 1, MOST_CHANNELS))
    return {"mlp_only_layers": dense, "shared_expert_intermediate_size": width * count}


def ernie_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """A file's tensors without those of draft heads, and with biases of the choice as vectors."""
    own = {name: tensor for name, tensor in state.items() if not name.startswith("model.mtp_")}
    return as_vectors(own, (".moe_statics.e_score_correction_bias", ".exp_probs_b.bias"))


def gguf_ernie(header: Header) -> tuple[dict, dict]:
    """The widths of a file's shared experts are wrong, and it does not say where its experts end, so the
    tensors tell."""
    layers = header.value("block_count")
    dense = [layer for layer in range(layers) if f"blk.{layer}.ffn_gate_inp.weight" not in header.stored]
    header.value("expert_shared_count", 0)
    gates = [tensor for name, tensor in header.stored.items() if name.endswith(".ffn_gate_shexp.weight")]
    shared = gates[0] if gates else None
    width = 0 if shared is None or len(shared.shape) < 2 else int(shared.shape[1])
    return {}, {"of_tensors": {"mlp_only_layers": dense, "shared_expert_intermediate_size": width}}


ERNIE_MOE = Family(
    "ERNIE 4.5 with experts", EXPERTS | {
        "moe_num_experts": 64, "num_experts": 64, "moe_k": 6, "num_experts_per_tok": 6,
        "moe_intermediate_size": 1536, "moe_num_shared_experts": 2, "shared_expert_intermediate_size": 0,
        "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1, "moe_norm_min": 1e-12,
        "mlp_only_layers": None, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
        "tie_word_embeddings": True, "use_bias": False, "moe_gate": "topk", "moe_use_aux_free": True,
        "num_nextn_predict_layers": 0, "moe_capacity": None},  # the last of training
    ernie_moe,
    expert_tensors("experts.{}", "gate") | shared_tensors("shared_experts") | {
        "correction_bias": ("model.layers.{}.mlp.moe_statics.e_score_correction_bias",)},
    keys={
        "moe_num_experts": Rule(int, 1, MOST_EXPERTS), "moe_k": Rule(int, 1, MOST_EXPERTS),
        "moe_num_shared_experts": Rule(int, 0, MOST_EXPERTS, optional=True),
        "moe_layer_start_index": Rule(int, 0, MOST_LAYERS),
        "moe_layer_end_index": Rule(int, -1, MOST_LAYERS), "moe_layer_interval": Rule(int, 1, MOST_LAYERS),
        "moe_norm_min": Rule(float, 0, 1e-9), "moe_gate": Rule(str, choices=("topk",), optional=True),
        "num_nextn_predict_layers": Rule(int, 0, 100, optional=True)},
    aliases={"moe_num_experts": "num_experts", "moe_k": "num_experts_per_tok"}, interleaved=True,
    complete=ernie_layers, repack=ernie_tensors, biases=biases_of_ernie,
    gguf=Gguf("ernie4_5-moe", names=CORRECTION_BIAS, layers=gguf_ernie, repack=ernie_tensors, keys={
        "interleave_moe_layer_step": Rule(int, 0, MOST_LAYERS),
        "leading_dense_block_count": Rule(int, 0, MOST_LAYERS),
        "expert_shared_count": Rule(int, 0, MOST_EXPERTS)}))
FAMILIES = {"glm4_moe": GLM4_MOE, "bailing_moe_v2": LING2, "minimax_m2": MINIMAX, "ernie4_5_moe": ERNIE_MOE}

"""Families that embed whole texts and rotate queries and keys: ModernBERT, Nomic's BERT, GTE."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy

from chatlm.common.errors import ConfigError, shown
from chatlm.worker.model.blocks.experts import Experts
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import LayerNorm
from chatlm.worker.weights.facts import Facts
from chatlm.worker.weights.families.encoders import HEADS, NAMES_AFTER_SUMS, after_sums, gguf, gguf_bert
from chatlm.worker.weights.families.family import Family, Gguf, Header
from chatlm.worker.weights.families.family import ACTIVATIONS, both
from chatlm.worker.weights.families.layernorms import ALL_BIASES, EPSILON, gguf_epsilon
from chatlm.worker.weights.rules import MOST_POSITIONS, ROPE_BASE, Rule, checked


def modern_bert(facts: Facts) -> Model:
    """Llama's layers over whole texts, with LayerNorms. The first x is a norm already."""
    norm = LayerNorm(facts.eps, "norm" in facts.biases)
    layers = [Layer(facts.attention(number, sees="text"), facts.feed(number), norm if number else None, norm)
              for number in facts.layers]
    return facts.encoder(layers, norm, Input(norm=norm))


def rotary_bert(facts: Facts) -> Model:
    """BERT's layers, whose heads turn."""
    return after_sums(facts, [facts.feed(number) for number in facts.layers])


def nomic_bert_moe(facts: Facts) -> Model:
    """Every nth layer, counted from the second, has experts instead of a feed-forward part. They have no
    biases of their own; their sum may have one."""
    if facts.experts is None:
        return rotary_bert(facts)
    config = facts.config
    every = config["moe_every_n_layers"]
    dense = tuple(number for number in facts.layers if number % every != 1 % every)
    facts = replace(facts, experts=replace(
        facts.experts, sum_to_one=False, dense_layers=dense, dense_size=config["intermediate_size"]))
    feeds = []
    for number in facts.layers:
        feed = facts.feed(number)
        if isinstance(feed, Experts):
            feed = replace(feed, biased=False, sum_bias=config["experts_bias"])
        feeds.append(feed)
    return after_sums(facts, feeds)


def without_heads(state: Mapping[str, numpy.ndarray], prefix: str) -> dict[str, numpy.ndarray]:
    names = {name: name.removeprefix(prefix) for name in state}
    return {ours: state[name] for name, ours in names.items() if not re.match(HEADS, ours)}


MODERN = {  # its own keys, the keys that they replace, and what has no effect here
    "hidden_activation": "gelu", "hidden_act": "gelu", "norm_eps": 1e-5, "attention_bias": False,
    "mlp_bias": False, "global_attn_every_n_layers": 3, "local_attention": 128, "sliding_window": 128,
    "global_rope_theta": 160_000.0, "rope_theta": 160_000.0, "local_rope_theta": 10_000.0,
    "rope_local_base_freq": 10_000.0, "layer_types": None} | dict.fromkeys(
        """classifier_activation classifier_bias classifier_pooling decoder_bias deterministic_flash_attn
        initializer_cutoff_factor position_embedding_type reference_compile repad_logits_with_grad
        sparse_pred_ignore_index sparse_prediction""".split())
MODERN_TENSORS = both({
    "embed": "embeddings.tok_embeddings", "embed_norm": "embeddings.norm", "final_norm": "final_norm",
    **{ours: f"layers.{{}}.{theirs}" for ours, theirs in (
        ("attention_norm", "attn_norm"), ("qkv", "attn.Wqkv"), ("output", "attn.Wo"),
        ("ffn_norm", "mlp_norm"), ("gate_up", "mlp.Wi"), ("down", "mlp.Wo"))}})


def gguf_modern(header: Header) -> tuple[dict, dict]:
    """Which layers see all of a text: the first of every three. llama.cpp counts from the other end."""
    changes, _ = gguf_epsilon(header)
    period = header.raw("attention.sliding_window_pattern", 3)
    layers = header.value("block_count")
    if type(period) is int and period > 0:
        changes["attention.sliding_window_pattern"] = [layer % period > 0 for layer in range(layers)]
    return changes, {}


NOMIC = {"hidden_act": "silu", "layer_norm_eps": 1e-12, "type_vocab_size": 2, "rope_theta": 1000.0}
NOMIC_KEYS = {"layer_norm_eps": EPSILON, "type_vocab_size": Rule(int, 0, 1 << 10)}
NOMIC_TENSORS = both({
    "embed": "embeddings.word_embeddings", "embed_norm": "emb_ln",
    "types": "embeddings.token_type_embeddings",
    **{ours: f"encoder.layers.{{}}.{theirs}" for ours, theirs in (
        ("qkv", "attn.Wqkv"), ("output", "attn.out_proj"), ("output_norm", "norm1"), ("down", "mlp.fc2"),
        ("down_norm", "norm2"))}}) | {
    "gate_up": ("encoder.layers.{}.mlp.fc12.weight", "encoder.layers.{}.mlp.fc11.weight")}
OLDER_NOMIC = {  # the keys of its first files, which are GPT-2's
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_inner": "intermediate_size", "n_positions": "max_position_embeddings", "rotary_emb_base": "rope_theta",
    "layer_norm_epsilon": "layer_norm_eps"}
FIXED_NOMIC = {  # other values of these would change what it computes
    "activation_function": "swiglu", "causal": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False,
    "prenorm": False, "qkv_proj_bias": False, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None, "rotary_scaling_factor": None, "scale_attn_by_inverse_layer_idx": False,
    "use_rms_norm": False, "parallel_block": False, "num_experts": 0, "moe_every_n_layers": 0}
FIXED_NOMIC_MOE = FIXED_NOMIC | {  # the same of the models with experts
    "activation_function": "gelu", "mlp_fc1_bias": True, "mlp_fc2_bias": True, "qkv_proj_bias": True,
    "expert_choice_router": False, "moe_normalize_expert_weights": False, "num_shared_experts": 0,
    "ffn_div": 1}
UNREAD_NOMIC = set("""attn_pdrop dense_seq_output fused_bias_fc fused_dropout_add_ln max_trained_positions
    pad_vocab_size_multiple parallel_block_tied_norm reorder_and_upcast_attn resid_pdrop summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj use_xentropy
    ffn_div expert_choice_router moe_impl moe_normalize_expert_weights moe_resid_pdrop moe_top_k
    num_shared_experts router_aux_loss_coef""".split())
OF_EXPERTS = "moe_top_k", "moe_impl", "moe_resid_pdrop", "router_aux_loss_coef"
NOMIC_MOE = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "type_vocab_size": 1, "rope_theta": 10_000.0,
             "num_experts": 8, "num_experts_per_tok": 2, "moe_every_n_layers": 2, "experts_bias": True,
             "num_local_experts": None, "moe_intermediate_size": None}
NOMIC_MOE_TENSORS = NOMIC_TENSORS | both({
    ours: f"encoder.layers.{{}}.mlp.{theirs}" for ours, theirs in (("up", "fc1"), ("down", "fc2"))}) | {
    "router": ("encoder.layers.{}.mlp.router.layer.weight",),
    "expert_up": ("encoder.layers.{}.mlp.experts.mlp.w1.weight",),
    "expert_down": ("encoder.layers.{}.mlp.experts.mlp.w2.weight",),
    "experts_bias": ("encoder.layers.{}.mlp.experts.bias",)}


def restated_nomic(path: Path, raw: Mapping) -> Mapping:
    """A config.json of either form in today's terms."""
    return restated(path, raw, FIXED_NOMIC) if "n_embd" in raw else raw


def restated_nomic_moe(path: Path, raw: Mapping) -> Mapping:
    own = {"num_experts": raw.get("num_experts"), "moe_every_n_layers": raw.get("moe_every_n_layers", 2),
           "num_experts_per_tok": raw.get("moe_top_k", 2), "hidden_act": "gelu"}
    fixed = {key: only for key, only in FIXED_NOMIC_MOE.items() if key not in own}
    return {key: value for key, value in restated(path, raw, fixed).items() if key not in OF_EXPERTS} | own


def restated(path: Path, raw: Mapping, fixed: Mapping[str, Any]) -> Mapping:
    for key, only in fixed.items():
        value = raw.get(key)
        if value is not None and value != only and (value or only):
            raise ConfigError(f"{path}: {key} is {shown(value)}; in a nomic_bert model it must be "
                              f"{json.dumps(only)}")
    known = {OLDER_NOMIC.get(key, key): value for key, value in raw.items()
             if key not in fixed and key not in UNREAD_NOMIC}
    base = checked(path, "rope_theta", known.get("rope_theta", 1000.0), ROPE_BASE)
    return known | {"rope_theta": float(base)}


def repack_nomic_moe(state: Mapping[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """The matrices of all experts as (experts, rows, columns). In the file, the rows of w2 are its inputs."""
    kept = without_heads(state, "bert.")
    for name in [name for name in kept if name.endswith("mlp.router.layer.weight")]:
        first, second = (name.replace("router.layer.weight", f"experts.mlp.{part}") for part in ("w1", "w2"))
        if first in kept and second in kept and kept[first].ndim == kept[second].ndim == 2:
            experts = len(kept[name])
            width = kept[first].shape[1]
            kept[f"{first}.weight"] = kept.pop(first).reshape(experts, -1, width)
            down = kept.pop(second).reshape(experts, -1, width).swapaxes(1, 2)
            kept[f"{second}.weight"] = numpy.ascontiguousarray(down)
    return kept


def gguf_nomic_moe(header: Header) -> tuple[dict, dict]:
    """Its files have no bias of the experts' sum: llama.cpp's converter drops it."""
    changes, more = gguf_bert(header)
    every = header.value("moe_every_n_layers", 2, low=1)
    return changes, more | {"moe_every_n_layers": every, "experts_bias": False}


GTE = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 1, "rope_theta": 160_000.0,
       "position_embedding_type": "rope", "layer_norm_type": "layer_norm", "pack_qkv": True,
       "logn_attention_scale": False, "logn_attention_clip1": False, "unpad_inputs": False,
       "use_memory_efficient_attention": False, "token_classification_dropout": None}
GTE_KEYS = {**NOMIC_KEYS, "position_embedding_type": Rule(str, choices=("rope",)),
            "layer_norm_type": Rule(str, choices=("layer_norm",))}
GTE_TENSORS = both({
    "embed": "embeddings.word_embeddings", "embed_norm": "embeddings.LayerNorm",
    "types": "embeddings.token_type_embeddings",
    **{ours: f"encoder.layer.{{}}.{theirs}" for ours, theirs in (
        ("qkv", "attention.qkv_proj"), ("output", "attention.o_proj"), ("output_norm", "attn_ln"),
        ("gate_up", "mlp.up_gate_proj"), ("down", "mlp.down_proj"), ("down_norm", "mlp_ln"))}})


def repack_gte(state: Mapping[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """The product of gates and ups alone has no bias, so it gets one of zeros."""
    kept = without_heads(state, "new.")
    return kept | {name.replace(".weight", ".bias"): numpy.zeros(len(tensor), numpy.float32)
                   for name, tensor in kept.items() if name.endswith("mlp.up_gate_proj.weight")}


def gates_first(model: Model, name: str, rows: numpy.ndarray) -> numpy.ndarray:
    """GTE stores the rows of ups before those of gates."""
    if "up_gate_proj" not in name:
        return rows
    return numpy.concatenate((rows[len(rows) // 2:], rows[:len(rows) // 2]))


def rope_of_gte(path: Path, name: str, config: Mapping, rope: dict) -> dict:
    """GTE's ntk is a larger base, with all frequencies divided alike, at every length."""
    if (rope.get("rope_type") or rope.get("type")) != "ntk":
        return rope
    scale = checked(path, f"{name}.factor", rope.get("factor"), Rule(float, 1, 10**3))
    base = checked(path, "rope_theta", rope.get("rope_theta") or config["rope_theta"], ROPE_BASE)
    return {"rope_type": "linear", "factor": scale**(2 / config["head_dim"]), "rope_theta": base * scale}


GTE_FAMILY = Family(
    "GTE", GTE, rotary_bert, GTE_TENSORS, keys=GTE_KEYS, repack=repack_gte, ordered=gates_first,
    aliases={"layer_norm_eps": "rms_norm_eps"}, biases=lambda config: ALL_BIASES, rope_of=rope_of_gte)
FAMILIES = {
    "modernbert": Family(
        "ModernBERT", MODERN,
        modern_bert, MODERN_TENSORS,
        lambda config, layer: layer % config["global_attn_every_n_layers"], keys={
            "position_embedding_type": Rule(str, optional=True),  # of BERT's configs, unread
            "norm_eps": EPSILON, "global_attn_every_n_layers": Rule(int, 1), "global_rope_theta": ROPE_BASE,
            "local_rope_theta": ROPE_BASE, "local_attention": Rule(int, 2, MOST_POSITIONS)},
        aliases={"hidden_activation": "hidden_act", "norm_eps": "rms_norm_eps", "local_attention":
                 "sliding_window", "global_rope_theta": "rope_theta", "local_rope_theta":
                 "rope_local_base_freq"},
        repack=lambda state: without_heads(state, "model."),
        gguf=Gguf("modern-bert", keys={"attention.layer_norm_epsilon": EPSILON}, layers=gguf_modern)),
    "nomic_bert": Family(
        "Nomic-BERT", NOMIC, rotary_bert, NOMIC_TENSORS, keys=NOMIC_KEYS,
        repack=lambda state: without_heads(state, "bert."), restated=restated_nomic,
        aliases={"layer_norm_eps": "rms_norm_eps"}, biases=lambda config: ("norm",),
        gguf=gguf("nomic-bert")),
    "nomic_bert_moe": Family(
        "Nomic-BERT with experts", NOMIC_MOE, nomic_bert_moe, NOMIC_MOE_TENSORS, activations=ACTIVATIONS,
        keys=NOMIC_KEYS | {"type_vocab_size": Rule(int, 1, 1), "moe_every_n_layers": Rule(int, 1)},
        repack=repack_nomic_moe, restated=restated_nomic_moe, aliases={"layer_norm_eps": "rms_norm_eps"},
        biases=lambda config: ALL_BIASES, gguf=Gguf("nomic-bert-moe", names=NAMES_AFTER_SUMS, keys={
            "attention.layer_norm_epsilon": EPSILON, "moe_every_n_layers": Rule(int, 1)},
            layers=gguf_nomic_moe)),
    "gte": GTE_FAMILY,
    "new": GTE_FAMILY._replace(title="")}

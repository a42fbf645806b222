"""Families with LayerNorms: GPT-2, GPT-NeoX and Pythia, StarCoder2, Cohere 1 and 2, North, OLMo 1."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import ConfigError, shown
from chatlm.worker.arrays.kinds import contiguous, kind_of
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import LayerNorm, RmsNorm
from chatlm.worker.weights.facts import Facts
from chatlm.worker.weights.families.family import (
    ACTIVATIONS, EXPERTS, Family, Gguf, Header, as_vectors, both, expert_tensors, usual_biases,
    without_draft_heads)
from chatlm.worker.weights.rules import (
    LAYER_TYPES, MOST_CHANNELS, MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, MOST_POSITIONS, ROPE_BASE, Rule,
    checked)

if TYPE_CHECKING:
    import numpy

ALL_BIASES = ("qkv", "output", "ffn", "norm")
EPSILON = Rule(float, 0, 1)


def gguf_epsilon(header: Header) -> tuple[dict, dict]:
    return {"attention.layer_norm_rms_epsilon": header.value("attention.layer_norm_epsilon", 1e-5)}, {}


def gguf_neox(header: Header) -> tuple[dict, dict]:
    changes, _ = gguf_epsilon(header)
    return changes, {"use_parallel_residual": header.value("use_parallel_residual", True)}


def gguf(architecture: str, layers: Callable = gguf_epsilon, **more: Any) -> Gguf:
    keys = {"attention.layer_norm_epsilon": EPSILON, "use_parallel_residual": Rule(bool)}
    return Gguf(architecture, keys=keys, layers=layers, **more)


GPT2_SIZES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
              "n_positions": "max_position_embeddings", "n_inner": "intermediate_size",
              "layer_norm_epsilon": "rms_norm_eps", "activation_function": "hidden_act"}
GPT2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "n_inner": None,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "hidden_act": "gelu_new",
        "tie_word_embeddings": True, "vocab_size": 50_257} | dict.fromkeys(
            """attn_pdrop reorder_and_upcast_attn summary_activation summary_first_dropout
            summary_proj_to_labels summary_type summary_use_proj""".split())  # without effect here
GPT2_KEYS = {
    "n_embd": Rule(int, 1, MOST_CHANNELS), "n_layer": Rule(int, 1, MOST_LAYERS),
    "n_head": Rule(int, 1, MOST_HEADS), "n_positions": Rule(int, 16, MOST_POSITIONS),
    "n_inner": Rule(int, 1, MOST_CHANNELS, optional=True), "layer_norm_epsilon": EPSILON,
    "activation_function": Rule(str, choices=tuple(ACTIVATIONS))}
GPT2_TENSORS = both({
    "embed": "transformer.wte", "positions": "transformer.wpe", "final_norm": "transformer.ln_f",
    **{ours: f"transformer.h.{{}}.{theirs}" for ours, theirs in (
        ("attention_norm", "ln_1"), ("qkv", "attn.c_attn"), ("output", "attn.c_proj"), ("ffn_norm", "ln_2"),
        ("up", "mlp.c_fc"), ("down", "mlp.c_proj"))}})


def repack_gpt2(state: Mapping[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """GPT-2's folders store matrices as (in, out), unless they are packed. Folders of the base model have no
    prefix."""
    def turned(name: str, tensor: numpy.ndarray) -> numpy.ndarray:
        as_inputs = tensor.ndim > 1 and kind_of(tensor) != "packed"
        return tensor.swapaxes(-1, -2) if as_inputs and re.search(
            r"\.c_(attn|proj|fc)\.weight$", name) else tensor

    return {name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}":
            turned(name, tensor) for name, tensor in state.items()}


def contiguous_rows(model: Model, name: str, rows: numpy.ndarray) -> numpy.ndarray:
    """Kernels read whole rows, so a matrix that is stored as (in, out) is copied."""
    return contiguous(rows)


def complete_gpt2(path: Path, config: Mapping) -> dict:
    return {"intermediate_size": config["intermediate_size"] or 4 * config["hidden_size"]}


def gpt2(facts: Facts) -> Model:
    """Heads do not turn: a table of positions is added to embeddings."""
    facts = replace(facts, rope=replace(facts.rope, size=0))
    norm = norm_of(facts)
    layers = [Layer(facts.attention(number), facts.feed(number), norm, norm) for number in facts.layers]
    return facts.decoder(layers, norm, Input(positions=facts.config["max_position_embeddings"]))


def norm_of(facts: Facts) -> LayerNorm:
    return LayerNorm(facts.eps, "norm" in facts.biases)


NEOX_TENSORS = both({
    "embed": "gpt_neox.embed_in", "head": "embed_out", "final_norm": "gpt_neox.final_layer_norm",
    **{ours: f"gpt_neox.layers.{{}}.{theirs}" for ours, theirs in (
        ("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"),
        ("qkv", "attention.query_key_value"), ("output", "attention.dense"), ("up", "mlp.dense_h_to_4h"),
        ("down", "mlp.dense_4h_to_h"))}})


def neox_rows(model: Model, name: str, rows: numpy.ndarray) -> numpy.ndarray:
    """GPT-NeoX' folders group the rows of q, k and v by head."""
    if ".query_key_value." not in name:
        return rows
    attn = model.attentions[0]
    by_head = rows.reshape(attn.heads, 3, attn.head_size, *rows.shape[1:])
    return by_head.swapaxes(0, 1).reshape(rows.shape)


def gpt_neox(facts: Facts) -> Model:
    """x = x + attention(norm x) + feed-forward(norm x), or one after the other."""
    norm = norm_of(facts)
    reads = "input" if facts.config["use_parallel_residual"] else "sum"
    layers = [Layer(facts.attention(number), facts.feed(number), norm, norm, feed_reads=reads)
              for number in facts.layers]
    return facts.decoder(layers, norm)


def biases_of_neox(config: Mapping) -> set[str]:
    return {"norm", "ffn", *usual_biases(config)}


def starcoder2(facts: Facts) -> Model:
    norm = norm_of(facts)
    layers = [Layer(facts.attention(number), facts.feed(number), norm, norm) for number in facts.layers]
    return facts.decoder(layers, norm)


def biases_of_starcoder2(config: Mapping) -> Seq[str]:
    return ALL_BIASES if config["use_bias"] else ("norm",)


STARCODER2_TENSORS = both({
    "final_norm": "model.norm", **{ours: f"model.layers.{{}}.{theirs}" for ours, theirs in (
        ("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"), ("up", "mlp.c_fc"),
        ("down", "mlp.c_proj"))}})
HEAD_WEIGHTS = ("q_norm.weight", "k_norm.weight")  # which files have in a row for each head


def cohere(facts: Facts) -> Model:
    """h = norm x;  x = x + attention h + feed-forward h.

    The larger models have LayerNorms of heads, each with its own weights."""
    norm = norm_of(facts)
    norms = facts.head_norms("centred") if facts.config.get("use_qk_norm") else None
    layers = [Layer(facts.attention(number, norms), facts.feed(number), norm, feed_reads="mixer's")
              for number in facts.layers]
    return facts.decoder(layers, norm, logit_scale=facts.config["logit_scale"])


def gguf_cohere(header: Header) -> tuple[dict, dict]:
    changes, _ = gguf_epsilon(header)
    return changes, {"use_qk_norm": header.has("attn_q_norm.weight")}


def with_head_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    return as_vectors(state, HEAD_WEIGHTS)


COHERE = Family(
    "Cohere", {"layer_norm_eps": 1e-5, "logit_scale": 0.0625, "attention_bias": False,
               "tie_word_embeddings": True, "use_qk_norm": False},
    cohere, keys={
        "layer_norm_eps": EPSILON, "logit_scale": Rule(float, 1e-4, 10**6)},
    aliases={"layer_norm_eps": "rms_norm_eps"}, interleaved=True,
    repack=with_head_weights,
    gguf=gguf("command-r", gguf_cohere, repack=with_head_weights))
COHERE2 = COHERE._replace(
    title="Cohere 2", repack=dict, config={
        key: value for key, value in COHERE.config.items() if key != "use_qk_norm"} | {
        "rotary_pct": 1.0, "layer_switch": None, "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj", "sliding_window": 4096, "layer_types": None,
        "sliding_window_pattern": 4}, keys={
            **COHERE.keys, "rotary_pct": Rule(float, 1, 1),
            "order_of_interleaved_layers": Rule(str, choices=("local_attn_first",)),
            "position_embedding_type": Rule(str, choices=("rope_gptj",))},
    has_window=lambda config, layer: (layer + 1) % config["sliding_window_pattern"], gguf=gguf("cohere2"),
    unrotated=lambda config, windows: {layer for layer, window in enumerate(windows) if not window})
MOE_TYPES = Rule(str, choices=("dense", "sparse"), many=True)


def north_layers(path: Path, raw: Mapping) -> dict:
    """A config.json in the terms of other families with experts. The first layers may be dense ones."""
    layers = checked(path, "num_hidden_layers", raw.get("num_hidden_layers"), Rule(int, 1, MOST_LAYERS))
    first = checked(path, "first_k_dense_replace", raw.get("first_k_dense_replace") or 0,
                    Rule(int, 0, layers))
    kinds = raw.get("mlp_layer_types") or ["dense"] * first + ["sparse"] * (layers - first)
    checked(path, "mlp_layer_types", kinds, MOE_TYPES, layers)
    dense = [layer for layer, kind in enumerate(kinds) if kind == "dense"]
    pattern = Rule(int, 1, MOST_LAYERS)
    before = checked(path, "prefix_dense_sliding_window_pattern",
                     raw.get("prefix_dense_sliding_window_pattern", 1), pattern)
    after = checked(path, "sliding_window_pattern", raw.get("sliding_window_pattern", 4), pattern)
    if raw.get("num_shared_experts"):
        raise ConfigError(f"{path}: num_shared_experts is {shown(raw['num_shared_experts'])}; it must be 0, "
                          "because this server cannot average them with the other experts yet")
    own = ("first_k_dense_replace", "mlp_layer_types", "prefix_dense_intermediate_size", "num_shared_experts",
           "shared_expert_combination_strategy")
    width = raw.get("intermediate_size")
    dense_width = raw.get("prefix_dense_intermediate_size")
    if dense_width:
        checked(path, "prefix_dense_intermediate_size", dense_width, Rule(int, 1, MOST_CHANNELS))
    rms = raw.get("rms_norm_eps")
    if rms is not None:
        checked(path, "rms_norm_eps", rms, Rule(float, 0, 1))
    return {key: value for key, value in raw.items() if key not in own} | {
        "mlp_only_layers": dense, "moe_intermediate_size": width,
        "intermediate_size": dense_width or width,
        "layer_types": raw.get("layer_types") or [
            LAYER_TYPES[(layer + 1 if layer < first else layer + 1 - first)
                        % (before if layer < first else after) > 0] for layer in range(layers)],
        "rms_norms": rms is not None,
        "layer_norm_eps": raw.get("layer_norm_eps", 1e-5) if rms is None else rms}


def north_unrotated(config: Mapping, windows: Seq[int]) -> set[int]:
    """Layers without a window, except dense ones that all lack one."""
    turned = config["mlp_only_layers"] if config["prefix_dense_sliding_window_pattern"] == 1 else ()
    return {layer for layer, window in enumerate(windows) if not window and layer not in turned}


def north(facts: Facts) -> Model:
    """Cohere's layers, most of them with experts. Shares of softmaxes always sum to one."""
    config = facts.config
    norm = RmsNorm(facts.eps) if config["rms_norms"] else norm_of(facts)
    kind = config["expert_selection_fn"]
    sum_to_one = config["norm_topk_prob"] or kind == "softmax"
    layers = []
    for number in facts.layers:
        feed = facts.feed(number, kind=kind, sum_to_one=sum_to_one)
        layers.append(Layer(facts.attention(number), feed, norm, feed_reads="mixer's"))
    return facts.decoder(layers, norm, logit_scale=config["logit_scale"])


def olmo(facts: Facts) -> Model:
    """LayerNorms without weights, and bounds of q, k and v."""
    norm = LayerNorm(facts.eps, weights=False)
    clip = facts.config["clip_qkv"] or 0.0
    layers = [Layer(replace(facts.attention(number), clip=clip), facts.feed(number), norm, norm)
              for number in facts.layers]
    return facts.decoder(layers, norm)


def gguf_north(header: Header) -> tuple[dict, dict]:
    """Files without a gating function have sigmoids, as in llama.cpp."""
    drafting = header.value("nextn_predict_layers", 0)
    rms = header.raw("attention.layer_norm_rms_epsilon")
    if header.value("expert_shared_count", 0):
        raise ConfigError(f"{header.path}: {header.own}expert_shared_count must be 0, because this server "
                          "cannot average such experts with the others yet")
    eps = header.value("attention.layer_norm_epsilon", 1e-5) if rms is None else rms
    kind = "softmax" if header.value("expert_gating_func", 2) == 1 else "sigmoid"
    dense = header.value("leading_dense_block_count", 0, low=0)
    changes = {"attention.layer_norm_rms_epsilon": eps, "nextn_predict_layers": 0,
               "block_count": header.value("block_count") - drafting}
    return changes, {"rms_norms": rms is not None, "expert_selection_fn": kind,
                     "mlp_only_layers": [*range(dense)]}


NORTH = COHERE2._replace(
    title="North", config=COHERE2.config | EXPERTS | {
        "num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": None, "norm_topk_prob": True,
        "expert_selection_fn": "softmax", "rms_norms": False, "num_dense_layers": 0, "head_dim": 128,
        "prefix_dense_sliding_window_pattern": 1, "num_nextn_predict_layers": 0},
    keys={
        **COHERE2.keys, "expert_selection_fn": Rule(str, choices=("softmax", "sigmoid")),
        "prefix_dense_sliding_window_pattern": Rule(int, 1, MOST_LAYERS),
        "num_dense_layers": Rule(int, 0, MOST_LAYERS),
        "num_nextn_predict_layers": Rule(int, 0, 100, optional=True)},
    model=north, tensors=expert_tensors("experts.{}", "gate"), restated=north_layers,
    unrotated=north_unrotated, repack=without_draft_heads, gguf=Gguf(
        "cohere2moe", layers=gguf_north, repack=without_draft_heads, keys={
            "attention.layer_norm_epsilon": EPSILON, "expert_gating_func": Rule(int, 1, 2),
            "expert_weights_norm": Rule(bool), "expert_shared_count": Rule(int, 0, MOST_EXPERTS)}))
FAMILIES = {
    "gpt2": Family(
        "GPT-2", GPT2, gpt2, GPT2_TENSORS, keys=GPT2_KEYS, repack=repack_gpt2, aliases=GPT2_SIZES,
        complete=complete_gpt2, biases=lambda config: ALL_BIASES, ordered=contiguous_rows,
        activations=ACTIVATIONS, gguf=gguf("gpt2")),
    "gpt_neox": Family(
        "GPT-NeoX and Pythia", {
            "hidden_act": "gelu", "rotary_pct": 0.25, "partial_rotary_factor": 0.25,
            "rotary_emb_base": 10_000.0, "layer_norm_eps": 1e-5, "use_parallel_residual": True,
            "attention_bias": True},
        gpt_neox, NEOX_TENSORS, keys={
            "rotary_pct": Rule(float, 0.01, 1), "rotary_emb_base": ROPE_BASE, "layer_norm_eps": EPSILON},
        aliases={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta",
                 "layer_norm_eps": "rms_norm_eps"},
        biases=biases_of_neox, ordered=neox_rows, activations=ACTIVATIONS,
        gguf=gguf("gptneox", gguf_neox)),
    "starcoder2": Family(
        "StarCoder2", {
            "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "sliding_window": None,
            "use_bias": True,
            "tie_word_embeddings": True, "num_key_value_heads": 2, "mlp_type": "default",
            "norm_type": "layer_norm"} | dict.fromkeys("""activation_function layer_norm_epsilon
                residual_dropout scale_attention_softmax_in_fp32""".split()),
        starcoder2, STARCODER2_TENSORS, keys={
            "norm_epsilon": EPSILON, "norm_type": Rule(str, choices=("layer_norm",)),
            "mlp_type": Rule(str, choices=("default",)),  # and what it has twice, but does not read
            "activation_function": Rule(str, optional=True),
            "layer_norm_epsilon": EPSILON._replace(optional=True)},
        aliases={"norm_epsilon": "rms_norm_eps"}, biases=biases_of_starcoder2, activations=ACTIVATIONS,
        gguf=gguf("starcoder2", unsaid=lambda config: {"sliding_window": config["sliding_window"] or 4096})),
    "cohere": COHERE,
    "cohere2": COHERE2,
    "cohere2_moe": NORTH,
    "olmo": Family(
        "OLMo", {"attention_bias": False, "clip_qkv": None, "rms_norm_eps": 1e-5},  # configs do not state it
        olmo, keys={
            "clip_qkv": Rule(float, 1e-4, 10**6, optional=True), "rms_norm_eps": Rule(float, 1e-5, 1e-5)},
        gguf=gguf("olmo", permuted=True))}

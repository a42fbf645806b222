"""Families that need little more than a row: Llama, Mistral, Qwen, Gemma 2 and 3, Phi, OLMo, and others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from chatlm.worker.arrays.kinds import kind_of
from chatlm.worker.model.blocks.attention import HeadNorms
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.weights.facts import Facts
from chatlm.worker.weights.families.family import (
    AFTER_ATTENTION, EXPERTS, QWEN_EXPERTS, SHARED_GATE, Family, Gguf, Header, expert_tensors,
    usual_biases)
from chatlm.worker.weights.packed.mxfp4 import Mxfp4
from chatlm.worker.weights.rules import JITTER, ROPE_BASE, Rule, checked

# ---- blocks


def llama(facts: Facts, norms: HeadNorms | None = None) -> Model:
    """x = x + attention(norm x);  x = x + feed-forward(norm x). The second may be experts.

    norms: of the heads of q and k"""
    norm = RmsNorm(facts.eps)
    layers = [Layer(facts.attention(number, norms), facts.feed(number), norm, norm)
              for number in facts.layers]
    return facts.decoder(layers, norm)


def qwen3(facts: Facts) -> Model:
    """Heads of q and k have norms before they turn."""
    return llama(facts, facts.head_norms())


def qwen2_moe(facts: Facts) -> Model:
    """The expert that all tokens take has a gate."""
    norm = RmsNorm(facts.eps)
    layers = [Layer(facts.attention(number), facts.feed(number, shared_gate=True), norm, norm)
              for number in facts.layers]
    return facts.decoder(layers, norm)


def gpt_oss(facts: Facts) -> Model:
    """Each head has a logit that attends to no value, and the router has a bias."""
    norm = RmsNorm(facts.eps)
    layers = [Layer(facts.attention(number, sinks=True), facts.feed(number, bias=True), norm, norm)
              for number in facts.layers]
    return facts.decoder(layers, norm)


def gemma2(facts: Facts) -> Model:
    """Norms before and after each block, scores with a bound, and embeddings times sqrt(C)."""
    norm = RmsNorm(facts.eps)
    softcap = facts.config["attn_logit_softcapping"] or 0.0
    layers = [Layer(facts.attention(number, scale=gemma_scale(facts), softcap=softcap), facts.feed(number),
                    norm, norm, norm, norm) for number in facts.layers]
    return facts.decoder(layers, norm, Input(scale=facts.width**0.5))


def gemma3(facts: Facts) -> Model:
    """Gemma 2 with norms of heads instead of the bound. Its embedders see whole texts."""
    norm = RmsNorm(facts.eps)
    of_texts = facts.config["use_bidirectional_attention"]
    scale = gemma_scale(facts)
    sees = "text" if of_texts else "before"
    layers = [Layer(facts.attention(number, facts.head_norms(), scale, sees), facts.feed(number),
                    norm, norm, norm, norm) for number in facts.layers]
    model = facts.encoder if of_texts else facts.decoder
    return model(layers, norm, Input(scale=facts.width**0.5))


def gemma_scale(facts: Facts) -> float:
    """What queries are multiplied by, besides 1 / sqrt(D)."""
    return (facts.head_size / facts.config["query_pre_attn_scalar"])**0.5


def nanochat(facts: Facts) -> Model:
    """Norms have no weights, one follows the embedding, and heads turn the other way, before their norms."""
    norm = RmsNorm(facts.eps, weights=False)
    facts = replace(facts, rope=replace(facts.rope, direction=-1))
    norms = facts.head_norms("after_rope", weights=False)
    layers = [Layer(facts.attention(number, norms), facts.feed(number), norm, norm)
              for number in facts.layers]
    return facts.decoder(layers, norm, Input(norm=norm))


def norms_after(facts: Facts, norms: HeadNorms) -> Model:
    """x = x + norm(attention x);  x = x + norm(feed-forward x)."""
    norm = RmsNorm(facts.eps)
    layers = [Layer(facts.attention(number, norms), facts.feed(number), output_norm=norm, down_norm=norm)
              for number in facts.layers]
    return facts.decoder(layers, norm)


def olmo2(facts: Facts) -> Model:
    return norms_after(facts, facts.whole_norms())


def olmoe(facts: Facts) -> Model:
    return llama(facts, facts.whole_norms())


def exaone4(facts: Facts) -> Model:
    return norms_after(facts, facts.head_norms())


def glm4(facts: Facts) -> Model:
    """Norms before and after each block."""
    norm = RmsNorm(facts.eps)
    layers = [Layer(facts.attention(number), facts.feed(number), norm, norm, norm, norm)
              for number in facts.layers]
    return facts.decoder(layers, norm)


def hunyuan(facts: Facts) -> Model:
    """Heads of q and k have norms after they turned."""
    return llama(facts, facts.head_norms("after_rope"))


# ---- what files say

QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
GEMMA = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256,
         "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 4096, "layer_types": None,
         "tie_word_embeddings": True, "attention_bias": False, "query_pre_attn_scalar": 256,
         "final_logit_softcapping": None}
GEMMA_KEYS = {"query_pre_attn_scalar": Rule(float, 0.01, 10**6)}
GEMMA_TENSORS = {ours: (f"model.layers.{{}}.{theirs}_layernorm.weight",) for ours, theirs in (
    ("output_norm", "post_attention"), ("ffn_norm", "pre_feedforward"), ("down_norm", "post_feedforward"))}
NO_ROPE = {"no_rope_layers": Rule(int, 0, 1, many=True, optional=True),
           "no_rope_layer_interval": Rule(int, 1)}
AFTER_TENSORS = {ours: (f"model.layers.{{}}.{theirs}_layernorm.weight",) for ours, theirs in (
    ("output_norm", "post_attention"), ("down_norm", "post_feedforward"))}
HUNYUAN_OTHER = dict.fromkeys("""attention_head_dim cla_share_factor class_num dense_list eod_token_id
    im_end_id im_newline_id im_start_id mask_init_id org_vocab_size pad_id pool_type text_end_id
    text_start_id""".split())  # features of related models: experts, classes, images
MIXTRAL_TENSORS = {
    "router": ("model.layers.{}.block_sparse_moe.gate.weight",),
    "expert_gate_up": tuple(f"model.layers.{{}}.block_sparse_moe.experts.{{}}.{part}.weight"
                            for part in ("w1", "w3")),
    "expert_down": ("model.layers.{}.block_sparse_moe.experts.{}.w2.weight",)}
MINISTRAL_ROPE = {"rope_type": "yarn", "factor": 16.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                  "rope_theta": 1e6, "original_max_position_embeddings": 16_384, "llama_4_scaling_beta": 0.1}
GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                "original_max_position_embeddings": 4096}


def repack_gpt_oss(state: Mapping) -> dict:
    """Folders of gpt-oss interleave the rows of gate and up, and store the experts' matrices as (experts, in,
    out) or in MXFP4."""
    repacked = dict(state)
    for name, tensor in state.items():
        stem, _, ending = name.rpartition("_proj")
        scales = state.get(f"{stem}_proj_scales")
        if ".mlp.experts." not in name:
            continue
        if (ending == "_blocks" and scales is not None and tensor.shape == (*scales.shape, 16)
                and kind_of(tensor) == kind_of(scales) == "uint8"):
            tensor = Mxfp4(tensor, repacked.pop(f"{stem}_proj_scales"))
        elif tensor.ndim != {"": 3, "_bias": 2}.get(ending):
            continue  # check_names_and_shapes reports it
        elif not ending:
            tensor = tensor.swapaxes(-1, -2)
        del repacked[name]
        part = "bias" if ending == "_bias" else "weight"
        halves = {"down": tensor}
        if stem.endswith("gate_up"):
            halves = {"gate": tensor[:, ::2], "up": tensor[:, 1::2]}
        repacked |= {f"{stem.rpartition('.')[0]}.{which}_proj.{part}": half for which, half in halves.items()}
    return repacked


def gguf_gemma3(header: Header) -> tuple[dict, dict]:
    return {}, {"use_bidirectional_attention": header.own == "gemma-embedding."}


def gemma_scalar(largest: int) -> Callable[[Mapping], dict]:
    """The number by which llama.cpp divides scores. Its files do not state it; the largest model has
    another."""
    def unsaid(config: Mapping) -> dict:
        width = config["hidden_size"] // config["num_attention_heads"]
        is_largest = config["num_hidden_layers"] == largest
        return {"query_pre_attn_scalar": width if is_largest else config["head_dim"]}
    return unsaid


def biases_of_glm4(config: Mapping) -> list[str]:
    """The output of attention has none."""
    return ["qkv"] * config["attention_bias"]


def qwen_window(config: Mapping, layer: int) -> bool:
    return config["use_sliding_window"] and layer >= config["max_window_layers"]


def rotated_smollm3(path: Path, config: Mapping) -> dict:
    """Which layers rotate: all but every fourth, unless the config says otherwise."""
    layers = config["num_hidden_layers"]
    every = config["no_rope_layer_interval"]
    rotated = config["no_rope_layers"] or [int((layer + 1) % every > 0) for layer in range(layers)]
    return {"no_rope_layers": checked(path, "no_rope_layers", rotated, NO_ROPE["no_rope_layers"], layers)}


def rope_of_phi3(path: Path, name: str, config: Mapping, rope: dict) -> dict:
    """Older files call longrope su or yarn."""
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type == "default":
        return rope
    return rope | {"original_max_position_embeddings": config["original_max_position_embeddings"],
                   "rope_type": "longrope" if rope_type in ("su", "yarn") else rope_type}


def rope_of_hunyuan(path: Path, name: str, config: Mapping, rope: dict) -> dict:
    """Hunyuan's dynamic scaling is a larger base, the same at every length."""
    if not rope.get("alpha") or (rope.get("rope_type") or rope.get("type")) != "dynamic":
        return rope
    size = config["head_dim"]
    alpha = checked(path, f"{name}.alpha", rope["alpha"], Rule(float, 1, 10**6))
    theta = rope.get("rope_theta", config["rope_theta"])
    checked(path, "rope_theta", theta, ROPE_BASE)
    return {"rope_theta": theta * alpha**(size / max(size - 2, 1))}


QWEN3_MOE = Family(
    "Qwen3-MoE", QWEN | QWEN_EXPERTS | {"num_experts_per_tok": 8, "attention_bias": False},
    qwen3, expert_tensors("experts.{}", "gate"),
    lambda config, layer: config["use_sliding_window"],
    Gguf("qwen3moe", unsaid=lambda config: {"norm_topk_prob": True}))
HUNYUAN = Family(
    "Hunyuan 0.5B to 7B", HUNYUAN_OTHER | {
        "attention_bias": False, "rms_norm_eps": 1e-5, "norm_type": "rms", "use_qk_norm": True,
        "use_rotary_pos_emb": True},
    hunyuan, {
        f"{part[0]}_norm": (f"model.layers.{{}}.self_attn.{part}_layernorm.weight",)
        for part in ("query", "key")},
    gguf=Gguf("hunyuan-dense"), keys={"norm_type": Rule(str, choices=("rms",))},
    rope_of=rope_of_hunyuan)
FAMILIES = {  # by config.json's model_type
    "llama": Family("Llama 2 and 3, SmolLM2", {
        "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": None}, llama,
        gguf=Gguf("llama", permuted=True, mscale_unknown=True, variants={
            "expert_count": "mixtral", "attention.sliding_window": "mistral"})),
    "mistral": Family("Mistral 7B, Nemo and Small", {"sliding_window": 4096, "num_key_value_heads": 8},
                      llama, gguf=Gguf(permuted=True)),
    "ministral3": Family("Ministral 3", {
        "sliding_window": None, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
        "rope_parameters": MINISTRAL_ROPE}, llama, queries_grow=True, gguf=Gguf(
            "mistral3", permuted=True,
            keys={"attention.temperature_scale": Rule(float, 0, 10, optional=True)})),
    "mixtral": Family(
        "Mixtral", EXPERTS | {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None,
                              "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
                              "router_jitter_noise": None},
        llama, MIXTRAL_TENSORS, keys={"router_jitter_noise": JITTER}, gguf=Gguf(permuted=True)),
    "qwen2": Family("Qwen2 and 2.5", QWEN, llama, has_window=qwen_window, biases=lambda config: ("qkv",),
                    gguf=Gguf("qwen2 qwen2vl")),
    "qwen3": Family("Qwen3", QWEN | {"head_dim": 128, "attention_bias": False}, qwen3,
                    has_window=qwen_window, gguf=Gguf("qwen3 qwen3vl"), has_rerankers=True),
    "qwen3_moe": QWEN3_MOE,
    "qwen2_moe": Family(
        "Qwen1.5- and Qwen2-MoE", QWEN | QWEN_EXPERTS | {
            "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632, "qkv_bias": True},
        qwen2_moe, expert_tensors("experts.{}", "gate") | SHARED_GATE,
        lambda config, layer: config["use_sliding_window"] and layer % 2 == 0 and (
            layer < config["max_window_layers"]),
        Gguf("qwen2moe"), biases=lambda config: ["qkv"] * config["qkv_bias"]),
    "gpt_oss": Family(
        "gpt-oss", EXPERTS | {
            "num_experts_per_tok": 4, "sliding_window": 128, "layer_types": None, "head_dim": 64,
            "attention_bias": True, "rope_theta": 150_000.0, "rope_parameters": GPT_OSS_ROPE,
            "rms_norm_eps": 1e-5, "quantization_config": None, "experts_per_token": None,
            "initial_context_length": None},
        gpt_oss,
        expert_tensors("experts", "router", ("weight", "bias")), lambda config, layer: layer % 2 == 0,
        Gguf("gpt-oss", names=AFTER_ATTENTION), repack=repack_gpt_oss, activations={"silu": "clamped_swiglu"},
        biases=lambda config: {"ffn", *usual_biases(config)}),
    "smollm3": Family(
        "SmolLM3", QWEN | {
            "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "rope_theta": 2e6,
            "sliding_window": None, "no_rope_layers": None, "no_rope_layer_interval": 4},
        llama, has_window=lambda config, layer: (
            config["use_sliding_window"] and not config["no_rope_layers"][layer]),
        gguf=Gguf("smollm3", permuted=True), keys=NO_ROPE, complete=rotated_smollm3,
        unrotated=lambda config, windows: {
            layer for layer, rotated in enumerate(config["no_rope_layers"]) if not rotated}),
    "gemma2": Family(
        "Gemma 2", GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        gemma2, GEMMA_TENSORS, lambda config, layer: layer % 2 == 0,
        Gguf("gemma2", unsaid=gemma_scalar(46)), GEMMA_KEYS, one_more=True),
    "gemma3_text": Family(
        "Gemma 3", GEMMA | {
            "vocab_size": 262_208, "max_position_embeddings": 131_072, "sliding_window_pattern": 6,
            "rope_theta": 1e6, "rope_local_base_freq": 10_000.0, "use_bidirectional_attention": False},
        gemma3, GEMMA_TENSORS, lambda config, layer: (layer + 1) % config["sliding_window_pattern"],
        Gguf("gemma3 gemma-embedding", unsaid=gemma_scalar(62), layers=gguf_gemma3,
             ignored=frozenset(f"dense_{i}_feat_{end}" for i in (2, 3) for end in ("in", "out"))),
        GEMMA_KEYS | {"use_bidirectional_attention": Rule(bool)}, one_more=True),
    "phi3": Family(
        "Phi-3, 3.5 and 4-mini",
        {"sliding_window": None, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
         "partial_rotary_factor": None},
        llama, {"qkv": ("model.layers.{}.self_attn.qkv_proj.weight",),
                "gate_up": ("model.layers.{}.mlp.gate_up_proj.weight",)},
        gguf=Gguf("phi3", strips_specials=True), rope_of=rope_of_phi3),
    "nanochat": Family(
        "nanochat", {"hidden_act": "relu2", "attention_bias": False, "final_logit_softcapping": 15.0},
        nanochat, {"up": ("model.layers.{}.mlp.fc1.weight",), "down": ("model.layers.{}.mlp.fc2.weight",)},
        activations={"relu2": "relu2"}),
    "olmo2": Family("OLMo 2", {"attention_bias": False, "rms_norm_eps": 1e-5},
                    olmo2, AFTER_TENSORS,
                    gguf=Gguf("olmo2", variants={"attention.sliding_window": "olmo3"})),
    "olmo3": Family(
        "OLMo 3", {"attention_bias": False, "rms_norm_eps": 1e-5, "sliding_window": 4096, "layer_types": None,
                   "rope_theta": 500_000.0, "rope_local_base_freq": 500_000.0},
        olmo2, AFTER_TENSORS, lambda config, layer: (layer + 1) % 4,
        gguf=Gguf(unsaid=lambda config: {"rope_local_base_freq": None})),  # the other layers' base
    "olmoe": Family(
        "OLMoE", QWEN_EXPERTS | {"num_experts": 64, "num_experts_per_tok": 8, "attention_bias": False,
                                 "rms_norm_eps": 1e-5},
        olmoe, expert_tensors("experts.{}", "gate"), gguf=Gguf("olmoe")),
    "glm4": Family(
        "GLM-4-0414", {"attention_bias": True, "head_dim": 128, "partial_rotary_factor": 0.5,
                       "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-7},
        glm4, {
            "gate_up": ("model.layers.{}.mlp.gate_up_proj.weight",),
            "output_norm": ("model.layers.{}.post_self_attn_layernorm.weight",),
            "down_norm": ("model.layers.{}.post_mlp_layernorm.weight",)},
        interleaved=True, biases=biases_of_glm4, gguf=Gguf("glm4")),
    "exaone4": Family(
        "EXAONE 4.0", {"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4,
                       "layer_types": None},
        exaone4, AFTER_TENSORS,
        lambda config, layer: config["sliding_window"] and (layer + 1) % config["sliding_window_pattern"],
        Gguf("exaone4"), unrotated=lambda config, windows: {
            layer for layer, window in enumerate(windows) if any(windows) and not window}),
    "ernie4_5": Family("ERNIE 4.5", {"head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
                                     "tie_word_embeddings": True}, llama, interleaved=True,
                       gguf=Gguf("ernie4_5")),
    "seed_oss": Family("Seed-OSS", {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False,
                                    "head_dim": 128, "residual_dropout": None}, llama,
                       gguf=Gguf("seed_oss", names=AFTER_ATTENTION)),
    "hunyuan_v1_dense": HUNYUAN}

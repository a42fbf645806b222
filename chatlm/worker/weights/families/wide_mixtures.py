"""Mixtures of experts of families that have models without: Qwen3-VL-MoE, Phi-3.5-MoE and Hunyuan A13B."""

from __future__ import annotations

from chatlm.worker.weights.families import layernorms, mixtures
from chatlm.worker.weights.families.family import EXPERTS, Family, Gguf
from chatlm.worker.weights.families.plain import HUNYUAN, MIXTRAL_TENSORS, QWEN3_MOE, rope_of_phi3
from chatlm.worker.weights.rules import JITTER, Rule

FAMILIES = {
    "qwen3_vl_moe_text": QWEN3_MOE._replace(
        title="Qwen3-VL-MoE", config=QWEN3_MOE.config | {
            "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "norm_topk_prob": True,
            "tie_word_embeddings": True, "rope_theta": 500_000.0},
        restated=lambda path, raw: {"num_experts": raw.get("num_local_experts", 60)} | {**raw},
        gguf=QWEN3_MOE.gguf._replace(architectures="qwen3vlmoe"), repack=mixtures.repack_qwen3_vl,
        fields_of=lambda path, config: {"shares_sum_to_one": True}),  # whatever norm_topk_prob says
    "phimoe": Family(
        "Phi-3.5-MoE", EXPERTS | {
            "num_local_experts": 16, "num_experts_per_tok": 2, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "rope_theta": 1e6, "sliding_window": None, "original_max_position_embeddings": 4096,
            "router_jitter_noise": 0.01, "input_jitter_noise": None, "attention_bias": False,
            "lm_head_bias": False},
        layernorms.NORMS, MIXTRAL_TENSORS | {
            "final_norm_bias": ("model.norm.bias",), "head_bias": ("lm_head.bias",),
            "attention_norm_bias": ("model.layers.{}.input_layernorm.bias",),
            "ffn_norm_bias": ("model.layers.{}.post_attention_layernorm.bias",)},
        keys={"num_experts_per_tok": Rule(int, 2, 2), "router_jitter_noise": JITTER},
        in_adapters=lambda model, name: (name, name.replace("block_sparse_moe.gate.", "mlp.router.")),
        gguf=Gguf("phimoe", strips_specials=True), rope_of=rope_of_phi3, fields_of=lambda path, config: {
            "router_jitter": config["router_jitter_noise"] or 0.0, "head_bias": config["lm_head_bias"]}),
    "hunyuan_v1_moe": HUNYUAN._replace(
        title="Hunyuan A13B", config=HUNYUAN.config | mixtures.HUNYUAN_EXPERTS,
        tensors=HUNYUAN.tensors | mixtures.HUNYUAN_TENSORS, keys={**HUNYUAN.keys, **mixtures.HUNYUAN_KEYS},
        restated=mixtures.same_in_all_layers, complete=mixtures.hunyuan_shared,
        aliases={"moe_topk": "num_experts_per_tok"}, gguf=Gguf(
            "hunyuan-moe", ignored=frozenset({"expert_shared_count"})))}

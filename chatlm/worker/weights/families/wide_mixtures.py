"""Mixtures of experts of families that have models without: Qwen3-VL-MoE, Phi-3.5-MoE and Hunyuan A13B."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import LayerNorm, RmsNorm
from chatlm.worker.weights.facts import Facts
from chatlm.worker.weights.families import mixtures
from chatlm.worker.weights.families.family import EXPERTS, Family, Gguf, usual_biases
from chatlm.worker.weights.families.plain import HUNYUAN, MIXTRAL_TENSORS, QWEN3_MOE, rope_of_phi3
from chatlm.worker.weights.rules import JITTER, Rule



def qwen3_vl_moe(facts: Facts) -> Model:
    """Qwen3-MoE whose shares sum to one, whatever norm_topk_prob says."""
    norm = RmsNorm(facts.eps)
    norms = facts.head_norms()
    layers = [Layer(facts.attention(number, norms), facts.feed(number, sum_to_one=True), norm, norm)
              for number in facts.layers]
    return facts.decoder(layers, norm)


def phimoe(facts: Facts) -> Model:
    """LayerNorms, and a router that leaves out logits far below the largest."""
    norm = LayerNorm(facts.eps, "norm" in facts.biases)
    jitter = facts.config["router_jitter_noise"] or 0.0
    layers = [Layer(facts.attention(number), facts.feed(number, kind="jitter", jitter=jitter), norm, norm)
              for number in facts.layers]
    return facts.decoder(layers, norm)


def biases_of_phimoe(config: Mapping) -> Iterator[str]:
    yield "norm"
    yield from usual_biases(config)
    if config["lm_head_bias"]:
        yield "head"


FAMILIES = {
    "qwen3_vl_moe_text": QWEN3_MOE._replace(
        title="Qwen3-VL-MoE", config=QWEN3_MOE.config | {
            "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "norm_topk_prob": True,
            "tie_word_embeddings": True, "rope_theta": 500_000.0},
        restated=lambda path, raw: {"num_experts": raw.get("num_local_experts", 60)} | {**raw},
        gguf=QWEN3_MOE.gguf._replace(architectures="qwen3vlmoe"), repack=mixtures.repack_qwen3_vl,
        model=qwen3_vl_moe),
    "phimoe": Family(
        "Phi-3.5-MoE", EXPERTS | {
            "num_local_experts": 16, "num_experts_per_tok": 2, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "rope_theta": 1e6, "sliding_window": None, "original_max_position_embeddings": 4096,
            "router_jitter_noise": 0.01, "input_jitter_noise": None, "attention_bias": False,
            "lm_head_bias": False},
        phimoe, MIXTRAL_TENSORS | {
            "final_norm_bias": ("model.norm.bias",), "head_bias": ("lm_head.bias",),
            "attention_norm_bias": ("model.layers.{}.input_layernorm.bias",),
            "ffn_norm_bias": ("model.layers.{}.post_attention_layernorm.bias",)},
        keys={"num_experts_per_tok": Rule(int, 2, 2), "router_jitter_noise": JITTER},
        in_adapters=lambda model, name: (name, name.replace("block_sparse_moe.gate.", "mlp.router.")),
        gguf=Gguf("phimoe", strips_specials=True), rope_of=rope_of_phi3, biases=biases_of_phimoe),
    "hunyuan_v1_moe": HUNYUAN._replace(
        title="Hunyuan A13B", config=HUNYUAN.config | mixtures.HUNYUAN_EXPERTS,
        tensors=HUNYUAN.tensors | mixtures.HUNYUAN_TENSORS, keys={**HUNYUAN.keys, **mixtures.HUNYUAN_KEYS},
        restated=mixtures.same_in_all_layers, complete=mixtures.hunyuan_shared,
        aliases={"moe_topk": "num_experts_per_tok"}, gguf=Gguf(
            "hunyuan-moe", ignored=frozenset({"expert_shared_count"})))}

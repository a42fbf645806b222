"""Folders of families that transformers lacks, made of ones that it has and that compute the same."""

import json
import re

import torch
from safetensors.torch import load_file, save_file

from families import make_model, save


def as_ling(folder):
    """The folder of a GLM-4.5 as one of Ling 2, which transformers lacks: other names, and q, k and v in one matrix."""
    config = json.loads((folder / "config.json").read_text())
    renamed = {"num_experts": config.pop("n_routed_experts"), "num_shared_experts": config.pop("n_shared_experts"), "model_type": "bailing_moe_v2",
               "architectures": ["BailingMoeV2ForCausalLM"]}
    heads, gqa = config["num_attention_heads"], config["num_key_value_heads"]
    published = {"score_function": "sigmoid", "moe_router_enable_expert_bias": True, "use_qkv_bias": config.pop("attention_bias"), "use_bias": False,
                 "use_rmsnorm": True, "router_dtype": "fp32", "output_dropout": 0.0, "num_nextn_predict_layers": 0}
    (folder / "config.json").write_text(json.dumps(config | renamed | published))
    stored, found = load_file(folder / "model.safetensors"), {}
    assert stored["model.layers.0.self_attn.q_proj.weight"].shape[0] * gqa == stored["model.layers.0.self_attn.k_proj.weight"].shape[0] * heads
    names = {"self_attn.q_norm": "attention.query_layernorm", "self_attn.k_norm": "attention.key_layernorm", "self_attn.o_proj": "attention.dense",
             "embed_tokens": "word_embeddings", "gate.e_score_correction_bias": "gate.expert_bias"}
    for name, tensor in stored.items():
        for theirs, lings in names.items():
            name = name.replace(theirs, lings)
        if ".q_proj." in name:
            tensor = torch.cat([stored[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace("self_attn.q_proj", "attention.query_key_value")
        if not re.search(r"self_attn\.[kv]_proj", name):
            found[name] = tensor.contiguous()
    save_file(found, folder / "model.safetensors")
    return folder


FACTORS = dict(scale_emb=6.0, scale_depth=0.6, dim_model_base=48)          # of 4 layers and 64 channels: those of the tests' Granite


def granite_like_minicpm(**changes):
    """A Granite by transformers, whose factors are FACTORS'. MiniCPM's code is no part of transformers."""
    return make_model("granite", attention_bias=False, mlp_bias=False, embedding_multiplier=6.0, residual_multiplier=0.3, logits_scaling=64 / 48,
                      attention_multiplier=0.25, **changes)


def as_minicpm(folder):
    config = json.loads((folder / "config.json").read_text())
    for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config | FACTORS | {
        "architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", "mup_denominator": 32}))
    return folder


OTHER_NAMES = {"ling 2": "bailing_moe_v2", "minicpm": "minicpm"}       # name -> model_type


def save_named_otherwise(name, folder):
    if name == "ling 2":
        return as_ling(save(make_model("glm4moe"), folder))
    return as_minicpm(save(granite_like_minicpm(), folder))

"""A tiny random DeepSeek-V3 by transformers: latent attention, a layer with a dense feed-forward part, others with grouped experts."""

import torch

from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.model.blocks.experts import Experts, Router
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.lm_head import LmHead
from chatlm.worker.model.blocks.mla import Mla
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import RmsNorm


LAYERS, WIDTH, HEADS, VOCABULARY = 3, 64, 4, 96
KEPT, PLAIN, TURNED, VALUE, QUERIES = 16, 8, 8, 12, 24
EXPERTS = dict(n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, moe_intermediate_size=48, n_shared_experts=1, routed_scaling_factor=2.5,
               first_k_dense_replace=1)


def tiny_deepseek(seed=0, **changes):
    import transformers
    sizes = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=80, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
                 q_lora_rank=QUERIES, kv_lora_rank=KEPT, qk_nope_head_dim=PLAIN, qk_rope_head_dim=TURNED, v_head_dim=VALUE, max_position_embeddings=256,
                 rms_norm_eps=1e-5, pad_token_id=None)
    torch.manual_seed(seed)
    config = transformers.DeepseekV3Config(**{**sizes, **EXPERTS, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.45 if "embed" in name or "lm_head" in name else 0.15)
            else:
                weight.mul_(0.5).add_(torch.randn_like(weight), alpha=0.3).add_(0.6)
        for name, weight in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                weight.normal_(0, 0.2)
    return model


def deepseek_blocks(config):
    """Its Model."""
    rms = RmsNorm(config.rms_norm_eps)
    attention = Mla(config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, rms,
                    Rope(config.qk_rope_head_dim, config.rope_parameters["rope_theta"]), config.q_lora_rank or 0)
    router = Router(config.num_experts_per_tok, "sigmoid", config.norm_topk_prob, correction_bias=True, groups=(config.n_group, config.topk_group),
                    scale=config.routed_scaling_factor)
    shared = FeedForward(config.moe_intermediate_size * config.n_shared_experts, "swiglu", prefix="shared_")
    experts = Experts(config.n_routed_experts, config.moe_intermediate_size, router, shared=shared)
    layers = [Layer(attention, FeedForward(config.intermediate_size, "swiglu") if number < config.first_k_dense_replace else experts, rms, rms)
              for number in range(config.num_hidden_layers)]
    return Model(config.vocab_size, config.hidden_size, config.max_position_embeddings, Input(), tuple(layers), rms, LmHead())


def half_split(rows, heads, before, config):
    """Rows (heads * (before + turned), K) whose rotary pairs are adjacent -> those with halves."""
    if not config.rope_interleave:
        return rows
    parts = rows.unflatten(0, (heads, -1)).clone()
    turned = parts[:, before:]
    parts[:, before:] = torch.cat((turned[:, 0::2], turned[:, 1::2]), 1)
    return parts.flatten(0, 1)


def deepseek_tensors(model):
    """Its tensors by our names, as float32 arrays."""
    config, state = model.config, model.state_dict()
    found = {"embed": state["model.embed_tokens.weight"], "head": state["lm_head.weight"], "final_norm": state["model.norm.weight"]}
    for layer in range(config.num_hidden_layers):
        def own(name, layer=layer):
            return state[f"model.layers.{layer}.{name}"]
        queries = ("q_a_proj", "q_b_proj") if config.q_lora_rank else (None, "q_proj")
        up = own("self_attn.kv_b_proj.weight").unflatten(0, (config.num_attention_heads, -1))       # (H, plain + Dv, kept)
        plain = config.qk_nope_head_dim
        tensors = {
            "attention_norm": own("input_layernorm.weight"), "ffn_norm": own("post_attention_layernorm.weight"),
            "kv_in": half_split(own("self_attn.kv_a_proj_with_mqa.weight"), 1, config.kv_lora_rank, config),
            "kv_norm": own("self_attn.kv_a_layernorm.weight"), "k_up": up[:, :plain].transpose(1, 2).flatten(0, 1), "v_up": up[:, plain:].flatten(0, 1),
            "queries_up" if config.q_lora_rank else "queries": half_split(own(f"self_attn.{queries[1]}.weight"), config.num_attention_heads, plain, config), "output": own("self_attn.o_proj.weight")}
        if config.q_lora_rank:
            tensors |= {"queries_in": own("self_attn.q_a_proj.weight"), "queries_norm": own("self_attn.q_a_layernorm.weight")}
        if layer < config.first_k_dense_replace:
            tensors |= {"gate_up": torch.cat([own(f"mlp.{part}_proj.weight") for part in ("gate", "up")]), "down": own("mlp.down_proj.weight")}
        else:
            tensors |= {
                "router": own("mlp.gate.weight"), "correction_bias": own("mlp.gate.e_score_correction_bias"),
                "expert_gate_up": torch.cat([part.flatten(0, 1) for part in own("mlp.experts.gate_up_proj").chunk(2, 1)]), "expert_down": own("mlp.experts.down_proj").flatten(0, 1),
                "shared_gate_up": torch.cat([own(f"mlp.shared_experts.{part}_proj.weight") for part in ("gate", "up")]),
                "shared_down": own("mlp.shared_experts.down_proj.weight")}
        found |= {f"{layer}.{name}": tensor for name, tensor in tensors.items()}
    return {name: tensor.detach().float().numpy().copy() for name, tensor in found.items()}

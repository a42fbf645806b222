"""Tiny random models of each family, made and saved by transformers: what a Hugging Face folder and a GGUF must compute."""

import hashlib
import json
import os
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from chatlm.common.config import Settings
from chatlm.common.hub.find import resolve_model
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.kernels.limits import not_compiled
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.weights.adapters.serving import adapter_reader
from chatlm.worker.weights.formats.gguf.description import gguf_blocks
from chatlm.worker.weights.formats.gguf.file import read_gguf
from chatlm.worker.weights.load import open_model
from attention_kinds import blocks_of
from engines import forward_logits, make_batch
from nightly import WHOLE

TINY = dict(vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, bos_token_id=256, eos_token_id=257, pad_token_id=None,
            rms_norm_eps=1e-3)
LONG = {"rope_type": "longrope", "short_factor": [1.0 + i / 8 for i in range(6)], "long_factor": [2.0 + i for i in range(6)],
        "rope_theta": 10_000.0, "partial_rotary_factor": 0.75}
GRANITE = dict(embedding_multiplier=6.0, residual_multiplier=0.3, attention_multiplier=0.2, logits_scaling=1.5)
GROWING = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
               original_max_position_embeddings=128, max_position_embeddings=512, llama_4_scaling_beta=0.4)
NEMOTRON3 = dict(num_hidden_layers=..., intermediate_size=96, num_key_value_heads=2, head_dim=16, layer_norm_epsilon=1e-3, ssm_state_size=16,
                 mamba_num_heads=4, mamba_head_dim=32, n_groups=2, chunk_size=16, time_step_min=1e-9, num_experts_per_tok=3, moe_intermediate_size=48,
                 moe_shared_expert_intermediate_size=80)
NO_LLAMA = dict.fromkeys(("intermediate_size", "num_key_value_heads", "rms_norm_eps"), ...)     # keys of TINY that a family does not have
FULL, LOCAL = "full_attention", "sliding_attention"
LATENT = dict(num_hidden_layers=3, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=48, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=16,
              first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2, moe_intermediate_size=32, n_group=4, topk_group=2)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=64, rope_theta=1e4, mscale=0.707, mscale_all_dim=0.707)
DENSE_LATENT = {key: value for key, value in LATENT.items() if key in (
    "num_hidden_layers", "num_key_value_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
MODELS = {                  # name -> (model_type, what differs from TINY)
    "llama2": ("llama", dict(num_key_value_heads=4)),
    "llama3.1": ("llama", dict(attention_bias=True, mlp_bias=True, num_key_value_heads=1, rope_parameters=dict(
        rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64))),
    "llama3.2": ("llama", dict(tie_word_embeddings=True, head_dim=32)),
    "mistral": ("mistral", dict(head_dim=32, sliding_window=24)),
    "qwen2": ("qwen2", dict(use_sliding_window=True, sliding_window=20, max_window_layers=2)),
    "qwen2.5": ("qwen2", dict(tie_word_embeddings=True, sliding_window=16)),
    "qwen3": ("qwen3", dict(head_dim=32, attention_bias=True, rope_parameters=dict(
        rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=128))),
    "smollm3": ("smollm3", dict(num_hidden_layers=5, mlp_bias=True)),
    "gemma2": ("gemma2", dict(head_dim=32, query_pre_attn_scalar=20, sliding_window=24, attn_logit_softcapping=5.0,
                              final_logit_softcapping=20.0)),
    "gemma3": ("gemma3_text", dict(head_dim=32, num_hidden_layers=6, query_pre_attn_scalar=24, sliding_window=24, rope_parameters={
        "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
        "sliding_attention": dict(rope_type="default", rope_theta=1e4)})),
    "gemma4": ("gemma4_text", dict(
        head_dim=16, global_head_dim=32, num_hidden_layers=8, layer_types=[LOCAL, FULL, LOCAL, FULL, LOCAL, LOCAL, LOCAL, FULL],
        num_kv_shared_layers=3,
        use_double_wide_mlp=True, hidden_size_per_layer_input=32, vocab_size_per_layer_input=288, sliding_window=24, final_logit_softcapping=20.0)),
    "gemma4moe": ("gemma4_text", dict(
        head_dim=16, global_head_dim=32, layer_types=[LOCAL, LOCAL, FULL, FULL], attention_k_eq_v=True, num_global_key_value_heads=1, sliding_window=24,
        hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=6, top_k_experts=3, moe_intermediate_size=48, final_logit_softcapping=20.0,
        use_bidirectional_attention="vision")),
    "gemma4-unified": ("gemma4_unified_text", dict(
        head_dim=16, global_head_dim=32, num_hidden_layers=5, layer_types=[LOCAL, LOCAL, FULL, LOCAL, FULL], attention_k_eq_v=True,
        num_global_key_value_heads=1, sliding_window=24, final_logit_softcapping=20.0)),
    "gemma4-even": ("gemma4_text", dict(        # what differs by layer elsewhere is the same here
        head_dim=32, global_head_dim=32, num_hidden_layers=3, layer_types=[LOCAL, FULL, FULL], hidden_size_per_layer_input=0, sliding_window=24,
        attention_k_eq_v=True, rope_parameters={
            LOCAL: dict(rope_type="default", rope_theta=1e4), FULL: dict(rope_type="proportional", partial_rotary_factor=0.5, rope_theta=1e5)})),
    "phi3": ("phi3", dict(sliding_window=47)),
    "phi3-long": ("phi3", dict(rope_parameters=LONG, original_max_position_embeddings=128)),
    "nanochat": ("nanochat", dict(attention_bias=True)),
    "qwen3moe": ("qwen3_moe", dict(head_dim=32, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=64)),
    "qwen3moe-normed": ("qwen3_moe", dict(num_experts=9, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True,
                                          num_key_value_heads=1, attention_bias=True)),
    "gpt-oss": ("gpt_oss", dict(head_dim=32, num_local_experts=7, num_experts_per_tok=3, sliding_window=24, rope_parameters=dict(
        rope_type="yarn", rope_theta=150_000.0, factor=8.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
        original_max_position_embeddings=64))),
    "granite": ("granite", GRANITE | dict(attention_bias=True, mlp_bias=True)),
    "granite-moe": ("granitemoe", GRANITE | dict(num_local_experts=6, num_experts_per_tok=3, intermediate_size=64)),
    "granite-moe-shared": ("granitemoeshared", GRANITE | dict(num_local_experts=5, num_experts_per_tok=2, intermediate_size=64, shared_intermediate_size=48)),
    "granite4": ("granitemoehybrid", GRANITE | dict(layer_types=["full_attention"] * 4, num_local_experts=5, num_experts_per_tok=2,
                                                    shared_intermediate_size=48, position_embedding_type="rope")),
    "granite4-dense": ("granitemoehybrid", GRANITE | dict(layer_types=["full_attention"] * 4, num_local_experts=0, num_experts_per_tok=0,
                                                          shared_intermediate_size=96)),      # without rotary embedding
    "granite4h": ("granitemoehybrid", GRANITE | dict(
        layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"], num_local_experts=5, num_experts_per_tok=2,
        shared_intermediate_size=48, mamba_n_heads=4, mamba_d_state=16, mamba_n_groups=2, mamba_chunk_size=16)),
    "granite4h-dense": ("granitemoehybrid", GRANITE | dict(
        layer_types=["linear_attention", "full_attention", "linear_attention"], num_hidden_layers=3, num_local_experts=0, num_experts_per_tok=0,
        shared_intermediate_size=96, mamba_n_heads=8, mamba_d_state=8, mamba_chunk_size=16, mamba_conv_bias=False, mamba_proj_bias=True,
        mamba_d_conv=3, position_embedding_type="rope")),
    "mixtral": ("mixtral", dict(num_local_experts=6, num_experts_per_tok=2, sliding_window=24)),
    "qwen2moe": ("qwen2_moe", dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=48, shared_expert_intermediate_size=80,
                                   mlp_only_layers=[1], use_sliding_window=True, sliding_window=24, max_window_layers=3)),
    "qwen3vlmoe": ("qwen3_vl_moe_text", dict(num_hidden_layers=3, head_dim=32, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=48, tie_word_embeddings=False,
                                             rope_parameters=dict(rope_type="default", rope_theta=5e6))),
    "qwen3moe-dense": ("qwen3_moe", dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48, mlp_only_layers=[0], decoder_sparse_step=2)),
    "olmo2": ("olmo2", dict(attention_bias=True, num_key_value_heads=4)),
    "olmo3": ("olmo3", dict(sliding_window=24, num_key_value_heads=4, rope_parameters={
        "full_attention": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128, rope_theta=500_000.0),
        "sliding_attention": dict(rope_type="default", rope_theta=500_000.0)})),
    "olmoe": ("olmoe", dict(intermediate_size=48, num_experts=6, num_experts_per_tok=3)),
    "olmoe-normed": ("olmoe", dict(intermediate_size=32, num_experts=5, num_experts_per_tok=2, norm_topk_prob=True, attention_bias=True, num_key_value_heads=4)),
    "glm4": ("glm4", dict(head_dim=32)),
    "exaone4": ("exaone4", dict(sliding_window=24)),
    "ernie4.5": ("ernie4_5", dict(head_dim=32)),
    "seed-oss": ("seed_oss", dict(head_dim=32, attention_out_bias=True)),
    "ministral3": ("ministral3", dict(head_dim=32, rope_parameters=GROWING | {"original_max_position_embeddings": 512})),
    "hunyuan": ("hunyuan_v1_dense", dict(head_dim=32, tie_word_embeddings=True, rope_parameters=dict(
        rope_type="dynamic", rope_theta=10_000.0, alpha=50.0, factor=1.0, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0))),
    "llama-gelu": ("llama", dict(hidden_act="gelu")),
    "llama-relu2": ("llama", dict(hidden_act="relu2")),
    "llama-quick-gelu": ("llama", dict(hidden_act="quick_gelu")),
    "qwen3.5": ("qwen3_5_text", dict(head_dim=32, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
                                     rope_parameters=dict(rope_type="default", rope_theta=1e6, partial_rotary_factor=0.25))),
    "qwen3.5moe": ("qwen3_5_moe_text", dict(head_dim=32, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2,
                                            linear_num_value_heads=4, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=32,
                                            shared_expert_intermediate_size=16, num_key_value_heads=1,
                                            num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"],
                                            rope_parameters=dict(rope_type="default", rope_theta=1e6, partial_rotary_factor=0.25))),
    "qwen3next": ("qwen3_next", dict(head_dim=32, linear_key_head_dim=16, linear_value_head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4,
                                     num_experts=5, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=16,
                                     rope_parameters=dict(rope_type="default", rope_theta=1e6, partial_rotary_factor=0.25))),
    "qwen3next-dense": ("qwen3_next", dict(head_dim=32, linear_key_head_dim=16, linear_value_head_dim=8, linear_num_key_heads=2,
                                           linear_num_value_heads=6, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=32,
                                           shared_expert_intermediate_size=16, mlp_only_layers=[1], norm_topk_prob=False, num_hidden_layers=2,
                                           layer_types=["linear_attention", "full_attention"],
                                           rope_parameters=dict(rope_type="default", rope_theta=1e6, partial_rotary_factor=0.25))),
    "lfm2": ("lfm2", dict(norm_eps=1e-3, num_hidden_layers=6, block_multiple_of=16, block_ffn_dim_multiplier=1.2, intermediate_size=160,
                          full_attn_idxs=[2, 4], rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "lfm2moe": ("lfm2_moe", dict(norm_eps=1e-3, num_dense_layers=1, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=48,
                                 layer_types=["conv", "full_attention", "conv", "full_attention"],
                                 rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "lfm2moe-plain": ("lfm2_moe", dict(norm_eps=1e-3, num_dense_layers=0, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=32,
                                       use_expert_bias=False, conv_bias=True, norm_topk_prob=False, routed_scaling_factor=1.5, tie_word_embeddings=False,
                                       layer_types=["full_attention", "conv", "conv", "full_attention"])),
    "gpt2": ("gpt2", NO_LLAMA | dict(n_inner=96, layer_norm_epsilon=1e-3)),
    "gpt2-untied": ("gpt2", NO_LLAMA | dict(tie_word_embeddings=False, activation_function="gelu")),
    "gpt2-quick-gelu": ("gpt2", NO_LLAMA | dict(activation_function="quick_gelu")),
    "pythia": ("gpt_neox", NO_LLAMA | dict(intermediate_size=96, layer_norm_eps=1e-3)),
    "gptneox-serial": ("gpt_neox", NO_LLAMA | dict(
        intermediate_size=96, use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new", tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1e5, partial_rotary_factor=1.0))),
    "starcoder2": ("starcoder2", dict(rms_norm_eps=..., norm_epsilon=1e-3, sliding_window=24)),
    "starcoder2-plain": ("starcoder2", dict(rms_norm_eps=..., use_bias=False, tie_word_embeddings=False, hidden_act="gelu", head_dim=...)),
    "cohere": ("cohere", dict(rms_norm_eps=..., layer_norm_eps=1e-3, logit_scale=0.5, attention_bias=True)),
    "cohere2": ("cohere2", dict(rms_norm_eps=..., layer_norm_eps=1e-3, num_hidden_layers=5, sliding_window=24, logit_scale=0.5, head_dim=32)),
    "phimoe": ("phimoe", dict(num_local_experts=6, attention_bias=True, lm_head_bias=True, router_jitter_noise=0.2, rope_parameters=LONG | {
        "short_factor": LONG["long_factor"], "partial_rotary_factor": 1.0, "rope_type": "longrope", "original_max_position_embeddings": 128,
        "short_mscale": 1.1, "long_mscale": 1.1} | dict.fromkeys(("short_factor", "long_factor"), [1.0 + i / 4 for i in range(8)]))),
    "phimoe-plain": ("phimoe", dict(num_local_experts=4, num_key_value_heads=4, router_jitter_noise=0.01)),
    # transformers makes steps of time at least time_step_min, which training did not
    "nemotron-h": ("nemotron_h", NO_LLAMA | dict(
        num_hidden_layers=..., intermediate_size=96, num_key_value_heads=2, head_dim=16, layer_norm_epsilon=1e-3, ssm_state_size=16, mamba_num_heads=4,
        mamba_head_dim=32, n_groups=2, chunk_size=16, time_step_min=1e-9, mlp_bias=True,
        layers_block_type=["linear_attention", "mlp", "linear_attention", "full_attention", "mlp", "full_attention", "linear_attention"])),
    "nemotron3": ("nemotron_h", NO_LLAMA | NEMOTRON3 | dict(
        n_routed_experts=6, routed_scaling_factor=2.5, layers_block_type=["linear_attention", "moe", "linear_attention", "full_attention", "moe"])),
    "nemotron3-latent": ("nemotron_h", NO_LLAMA | NEMOTRON3 | dict(         # with layers of one part, of all kinds
        n_routed_experts=12, n_group=4, topk_group=2, num_experts_per_tok=4, moe_latent_size=32, norm_topk_prob=False, routed_scaling_factor=1.5,
        use_conv_bias=False,
        layers_block_type=["moe", "linear_attention", "mlp", "moe", "full_attention", "moe", "mlp", "linear_attention"])),
    "lfm2-bias": ("lfm2", dict(norm_eps=1e-3, conv_bias=True, conv_L_cache=5, block_auto_adjust_ff_dim=False,
                               layer_types=["conv", "full_attention", "conv", "full_attention"])),
    "glm4moe": ("glm4_moe", dict(num_hidden_layers=3, head_dim=32, attention_bias=True, use_qk_norm=True, n_routed_experts=6, num_experts_per_tok=3,
                                 moe_intermediate_size=48, n_shared_experts=2, routed_scaling_factor=2.5)),
    "glm4moe-grouped": ("glm4_moe", dict(num_hidden_layers=3, n_routed_experts=12, num_experts_per_tok=4, n_group=4, topk_group=2, norm_topk_prob=False,
                                         moe_intermediate_size=32, first_k_dense_replace=2)),
    "minimax-m2": ("minimax_m2", dict(num_hidden_layers=3, head_dim=32, num_local_experts=6, num_experts_per_tok=3, intermediate_size=48,
                                      rope_parameters=dict(rope_type="default", rope_theta=5e6, partial_rotary_factor=0.5))),
    "cohere2moe": ("cohere2_moe", dict(rms_norm_eps=..., layer_norm_eps=1e-3, num_hidden_layers=6, sliding_window=24, logit_scale=0.5, head_dim=32, num_experts=6,
                                       num_experts_per_tok=3, intermediate_size=48, expert_selection_fn="sigmoid", prefix_dense_intermediate_size=96,
                                       first_k_dense_replace=1)),
    "cohere2moe-rms": ("cohere2_moe", dict(num_hidden_layers=4, sliding_window=24, num_experts=5, num_experts_per_tok=2, intermediate_size=48, head_dim=16, logit_scale=0.5,
                                           prefix_dense_sliding_window_pattern=2, prefix_dense_intermediate_size=80, first_k_dense_replace=2,
                                           sliding_window_pattern=2)),
    "deepseek3": ("deepseek_v3", LATENT | dict(rope_parameters=YARN, routed_scaling_factor=2.5)),
    "deepseek3-plain": ("deepseek_v3", LATENT | dict(q_lora_rank=None, rope_interleave=False, attention_bias=True, qk_nope_head_dim=20, v_head_dim=12, kv_lora_rank=24,
                                                     qk_rope_head_dim=8, n_group=1, topk_group=1, norm_topk_prob=False)),
    "deepseek2-grouped": ("deepseek_v2", LATENT | dict(topk_method="group_limited_greedy", routed_scaling_factor=4.0)),
    "mistral4": ("mistral4", LATENT | dict(first_k_dense_replace=..., n_shared_experts=1, qk_nope_head_dim=16, rope_parameters=dict(
        rope_type="yarn", rope_theta=1e4, factor=8.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=512,
        max_position_embeddings=4096, llama_4_scaling_beta=0.1, partial_rotary_factor=0.5))),
    "minicpm3": ("minicpm3", DENSE_LATENT | dict(scale_emb=3.0, scale_depth=1.2, dim_model_base=48, tie_word_embeddings=True, v_head_dim=None, rope_parameters=dict(
        rope_type="longrope", short_factor=[1.0 + i / 8 for i in range(8)], long_factor=[2.0 + i for i in range(8)], rope_theta=1e4, original_max_position_embeddings=512))),
    "deepseek2-lite": ("deepseek_v2", LATENT | dict(q_lora_rank=None, n_group=1, topk_group=1, rope_parameters=YARN)),
    "glm-flash": ("glm4_moe_lite", LATENT | dict(first_k_dense_replace=..., n_group=1, topk_group=1, routed_scaling_factor=1.8, v_head_dim=32,
                                                 rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "youtu": ("youtu", DENSE_LATENT | dict(tie_word_embeddings=True)),
    "ernie-moe": ("ernie4_5_moe", dict(num_hidden_layers=4, moe_num_experts=6, moe_k=3, moe_intermediate_size=48, moe_num_shared_experts=2, tie_word_embeddings=True)),
    "ernie-moe-some": ("ernie4_5_moe", dict(num_hidden_layers=5, moe_num_experts=5, moe_k=2, moe_intermediate_size=32, moe_num_shared_experts=0, tie_word_embeddings=False,
                                            moe_layer_start_index=1, moe_layer_end_index=3, moe_layer_interval=2)),
    "cohere-normed": ("cohere", dict(rms_norm_eps=..., layer_norm_eps=1e-3, logit_scale=0.5, use_qk_norm=True)),
    "cohere-normed-odd": ("cohere", dict(rms_norm_eps=..., layer_norm_eps=1e-3, logit_scale=0.5, use_qk_norm=True, hidden_size=96, num_attention_heads=4, num_key_value_heads=1)),
    "olmo": ("olmo", dict(rms_norm_eps=..., clip_qkv=0.6)),
    "olmo-plain": ("olmo", dict(rms_norm_eps=..., hidden_size=72, num_attention_heads=3, num_key_value_heads=3, tie_word_embeddings=True)),
    "laguna": ("laguna", dict(num_hidden_layers=5, head_dim=32, num_key_value_heads=2, num_attention_heads_per_layer=[4, 8, 6, 8, 4], sliding_window=24,
                              layer_types=[FULL, LOCAL, LOCAL, LOCAL, FULL], num_experts=6, num_experts_per_tok=3, moe_intermediate_size=48,
                              shared_expert_intermediate_size=32, moe_routed_scaling_factor=2.5, rope_parameters={
                                  FULL: dict(rope_type="yarn", rope_theta=5e5, factor=4.0, original_max_position_embeddings=128, beta_fast=32.0, beta_slow=1.0,
                                             partial_rotary_factor=0.5),
                                  LOCAL: dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=1.0)})),
    "laguna-elements": ("laguna", dict(num_hidden_layers=3, head_dim=24, gating="per-element", num_experts=5, num_experts_per_tok=2, moe_intermediate_size=32,
                                       shared_expert_intermediate_size=48, mlp_layer_types=["dense", "dense", "sparse"], rope_parameters={
                                           FULL: dict(rope_type="default", rope_theta=5e5, partial_rotary_factor=1.0)})),
    "muse-glimmer": ("muse_glimmer_text", dict(num_hidden_layers=6, head_dim=32, sliding_window=24, qk_scale_factor=1.5, output_multiplier=0.4, tie_word_embeddings=False,
                                               rope_parameters=dict(rope_type="default", rope_theta=1e4))),
    # latents whose two parts are powers of two, as all published ones have them: pages of them may be of q8_0
    "kimi2": ("kimi_k2", LATENT | dict(n_group=1, topk_group=1, n_shared_experts=1, routed_scaling_factor=2.8, kv_lora_rank=64, qk_rope_head_dim=32,
                                       rope_parameters=YARN | dict(factor=4.0, original_max_position_embeddings=128, mscale=1.0, mscale_all_dim=1.0))),
    "hunyuan-moe": ("hunyuan_v1_moe", dict(num_hidden_layers=3, head_dim=32, num_experts=6, moe_topk=3, intermediate_size=48, tie_word_embeddings=True)),
}

GGUF_MODELS = {             # what of MODELS a file of each architecture can say; the window of qwen2 and biases of others it cannot
    **dict.fromkeys((
        "llama2", "llama3.1", "llama3.2", "mistral", "qwen2.5", "phi3", "phi3-long", "gpt-oss", "granite", "granite-moe", "granite-moe-shared", "granite4",
        "olmo2", "olmo3", "olmoe", "glm4", "exaone4", "ernie4.5", "seed-oss", "ministral3", "hunyuan", "gemma4", "gemma4moe", "gemma4-even", "gemma4-unified", "gpt2",
        "pythia", "cohere", "cohere2", "phimoe-plain", "lfm2", "lfm2moe", "granite4h", "qwen3next", "qwen3.5", "qwen3.5moe", "nemotron-h", "nemotron3",
        "glm4moe", "glm4moe-grouped", "minimax-m2", "hunyuan-moe", "cohere2moe", "deepseek3", "deepseek2-lite", "deepseek2-grouped", "glm-flash", "youtu",
        "mistral4", "ernie-moe", "ernie-moe-some", "cohere-normed", "cohere-normed-odd", "olmo", "olmo-plain", "laguna", "muse-glimmer"), {}),
    "laguna-elements": {"sliding_window": 0},       # a file that has one without a pattern has llama.cpp's
    "deepseek3-plain": {"rope_interleave": True},
    "minicpm3": {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
    "nemotron3-latent": {"layers_block_type": ["moe", "linear_attention", "full_attention", "moe", "moe", "linear_attention"]},
    "qwen3": {"attention_bias": False}, "smollm3": {"mlp_bias": False}, **dict.fromkeys(("gemma2", "gemma3"), {"query_pre_attn_scalar": 32}),
    "qwen3moe": {"norm_topk_prob": True}, "phimoe": {"router_jitter_noise": 0.01}, "gpt2-untied": {"activation_function": "gelu_new"}, "gptneox-serial": {"hidden_act": "gelu"},
    "starcoder2": {"sliding_window": None}, "starcoder2-plain": {"hidden_act": "gelu_pytorch_tanh"}, "granite4h-dense": {"position_embedding_type": None},
    "lfm2moe-plain": {"conv_bias": False, "tie_word_embeddings": True, "norm_topk_prob": True, "routed_scaling_factor": 1.0}, "mixtral": {"sliding_window": None},
    "granite4-dense": {"position_embedding_type": "rope"}, "qwen2moe": {"use_sliding_window": False, "mlp_only_layers": None}}
CONVERTED = {               # and what one by llama.cpp's converter can say, which of Gemma 2 and 3 wants a vocabulary of its own
    **dict.fromkeys((
        "llama2", "llama3.1", "llama3.2", "qwen2.5", "qwen3", "smollm3", "phi3", "phi3-long", "qwen3moe-normed", "gpt-oss", "granite", "granite-moe",
        "granite4", "olmo2", "olmo3", "glm4", "exaone4", "ernie4.5", "seed-oss", "ministral3", "gemma4", "gemma4moe", "lfm2", "lfm2moe", "granite4h",
        "qwen3.5", "qwen3.5moe", "qwen3next", "nemotron3", "glm4moe", "glm4moe-grouped", "minimax-m2", "hunyuan-moe",
        "cohere2moe", "deepseek3", "deepseek2-lite", "deepseek2-grouped", "glm-flash", "youtu", "mistral4", "ernie-moe", "laguna",
        "muse-glimmer"), {}),
    "minicpm3": {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
    "deepseek3-plain": {"rope_interleave": True},
    "nemotron3-latent": GGUF_MODELS["nemotron3-latent"] | {"n_group": 1, "topk_group": 1},
    "gpt2": {"n_inner": None}, **dict.fromkeys(("cohere", "cohere-normed"), {"vocab_size": 320, "model_max_length": 512}), "olmo": {"vocab_size": 320}, "laguna-elements": {"sliding_window": 0}, "cohere2": {"vocab_size": 320, "head_dim": 16},
    "starcoder2": {"sliding_window": 4096}, "starcoder2-plain": {"hidden_act": "gelu_pytorch_tanh", "sliding_window": 4096},
    **dict.fromkeys(("mistral", "mixtral"), {"sliding_window": None}), "qwen2moe": {"use_sliding_window": False, "mlp_only_layers": None},
    "phimoe": {"router_jitter_noise": 0.01, "rope_parameters": MODELS["phimoe"][1]["rope_parameters"] | dict.fromkeys(
        ("short_mscale", "long_mscale"), (1 + np.log(512 / 128) / np.log(128))**0.5)},      # which the converter assumes
    "granite4-dense": {"position_embedding_type": "rope"}, "hunyuan": {"max_position_embeddings": 32_768}}


def tiny_config(name, **changes):
    import transformers
    kind, own = MODELS[name]
    given = {key: value for key, value in {**TINY, **own, **changes}.items() if value is not ...}
    if kind == "kimi_k2":       # its files name DeepSeek-V3's class, and transformers has no other
        return type("KimiK2Config", (transformers.DeepseekV3Config,), {"model_type": kind})(**given)
    return transformers.AutoConfig.for_model(kind, **given)


def make_model(name, seed=0, **changes):
    """A transformers model whose every norm and bias is off its default."""
    import transformers
    kind, config = MODELS[name][0], tiny_config(name, **changes)
    torch.manual_seed(seed)
    own = {"mistral4": "Mistral4ForCausalLM", "kimi_k2": "DeepseekV3ForCausalLM"}      # which Auto does not find
    of_kind = getattr(transformers, own[kind])._from_config if kind in own else transformers.AutoModelForCausalLM.from_config
    if kind == "muse_glimmer_text":         # transformers has its head only in the model with images
        small = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, pos_emb_height=2, pos_emb_width=2)
        config = transformers.AutoConfig.for_model("muse_glimmer", text_config=config.to_dict(), vision_config=small, out_hidden_size=64, projector_hidden_size=16,
                                                   tie_word_embeddings=config.tie_word_embeddings)
        of_kind = transformers.MuseGlimmerForConditionalGeneration._from_config
    if kind == "qwen3_vl_moe_text":         # nor this one's
        small = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=64, num_position_embeddings=4, deepstack_visual_indexes=[])
        config = transformers.Qwen3VLMoeConfig(text_config=config.to_dict(), vision_config=small, tie_word_embeddings=False)
        of_kind = transformers.Qwen3VLMoeForConditionalGeneration._from_config
    model = of_kind(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim > 1 and not key.endswith(("bias", "q_norm.weight", "k_norm.weight")):
                weight.normal_(0, 0.45 if "embed" in key or "lm_head" in key or "wte" in key else 0.12)
            elif key.endswith("correction_bias"):
                weight.normal_(0, 0.2)
            elif key.endswith(("bias", "sinks")):
                weight.normal_(0, 1.0 if key.endswith("sinks") else 0.3)
            else:
                weight.mul_(0.5).add_(torch.randn_like(weight), alpha=0.3).add_(0.4 if kind.startswith(("gemma", "muse")) and not kind.startswith("gemma4") else 0.6)
        for key, weight in model.named_buffers():
            if key.endswith(("expert_bias", "e_score_correction_bias")):
                weight.normal_(0, 0.2)
            elif key.endswith("layer_scalar"):
                weight.uniform_(0.7, 1.3)
    return model


def with_exact_angles(model):
    """A Gemma 4 by transformers whose rotary angles are rounded once, as ours are. Its own, multiplied in float32, are 2e-5 off after 300 tokens, and
    as scores are not divided by sqrt(D), logits 9e-5; with the same angles ours and theirs differ by 2e-5."""
    rotary, ropes = model.model.rotary_emb, model.config.rope_parameters

    def forward(x, position_ids, layer_type):
        theirs = getattr(rotary, f"{layer_type}_inv_freq")
        frequencies = ropes[layer_type]["rope_theta"] ** -(torch.arange(len(theirs)).double() / len(theirs)) * (theirs != 0)
        angles = (position_ids[..., None].double() * frequencies).repeat(1, 1, 2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    rotary.forward = forward
    return model


# of an answer that is compared, by day and by night: three pages, or five
TOKENS = 64 if WHOLE else 32


@torch.no_grad()
def greedy(model, prompts, count):
    """(tokens (B, count), logits (B, count, V)) of prompts of one length, by transformers with its own cache."""
    tokens, logits = [], []
    out = model(torch.tensor(prompts), use_cache=True)
    for _ in range(count):
        logits.append(out.logits[:, -1].clone())
        tokens.append(logits[-1].argmax(-1))
        out = model(tokens[-1][:, None], past_key_values=out.past_key_values, use_cache=True)
    return torch.stack(tokens, 1), torch.stack(logits, 1)


@torch.no_grad()
def logits_of(model, prompt, tokens):
    """The logits (count, V) from which transformers draws each of these tokens after the prompt, in one forward."""
    return model(torch.tensor([prompt + tokens[:-1]]), use_cache=False).logits[0, len(prompt) - 1:]


def gaps_of(logits):
    """How far apart the two likeliest tokens are where they are closest."""
    best = logits.topk(2, -1).values
    return (best[..., 0] - best[..., 1]).amin(-1)


# Of some models' greedy answers, by what the model and the question are: which of the prompts tried, and its tokens. By day one forward then
# shows that these are the greedy ones; where it does not, for example since another torch has made other random weights, and at night, they
# are searched. RECORD_ANSWERS=1 pytest tests/worker writes what is missing.
GREEDY = Path(__file__).with_name("greedy_answers.json")


@cache
def greedy_answers():
    return {} if WHOLE else json.loads(GREEDY.read_text())


def question_of(model, *more):
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    digest = hashlib.blake2b(repr((sorted(config.items(), key=str), more)).encode(), digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def record_answers(question, found):
    known = json.loads(GREEDY.read_text()) | {question: found}
    lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in sorted(known.items())]
    GREEDY.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def clear_cases(model, lengths=(9, 40, 300), count=TOKENS, tried=8, seed=1, margin=0.01):
    """One case for each prompt length in which the two likeliest tokens are never closer than `margin`."""
    random, cases, searched = np.random.default_rng(seed), [], []
    question = question_of(model, lengths, count, tried, seed)
    known = greedy_answers().get(question, [(None, [])] * len(lengths))
    for length, (i, expected) in zip(lengths, known, strict=True):
        prompts = random.integers(0, 256, (tried, length)).tolist()
        logits = logits_of(model, prompts[i], expected) if expected else None
        if logits is None or logits.argmax(-1).tolist() != expected or gaps_of(logits) <= margin:
            tokens, found = greedy(model, prompts, count)
            i = int(gaps_of(found).argmax())
            expected, logits = tokens[i].tolist(), found[i]
            searched.append(length)
        assert gaps_of(logits) > margin and logits.std(-1).min() > 1, (length, gaps_of(logits), logits.std())
        cases.append(SimpleNamespace(prompt=prompts[i], chosen=i, tokens=expected, logits=logits))
    if searched and os.environ.get("RECORD_ANSWERS") == "1":
        record_answers(question, [(case.chosen, case.tokens) for case in cases])
    return cases


TOLERANCE = 1e-4        # of logits
# Transformers' own float32 is as far from its float64 as ours: 1.3e-4 and 2.6e-4 for these two, on a CPU with AVX-512
ROUNDED_MORE = {"qwen3next-dense": 4, "qwen3.5moe": 6}


def tolerance_of(name):
    return TOLERANCE * ROUNDED_MORE.get(name, 1)


def load(folder, dtype="float32", **settings):
    settings = Settings(model=str(folder), dtype=dtype, **settings)
    return open_model(resolve_model(settings), settings)


def transformer(model, kernels, max_tokens=128, device="cpu"):
    return Transformer(model.architecture, dict(model.tensors), kernels, num_pages=80, num_slots=80, max_tokens=max_tokens, max_rows=8,
                       dtype="float32", device=device, read_adapter=adapter_reader(model))


def answers(model, cases, chunk=100, count=TOKENS):
    """Prompts in chunks and side by side, then all sequences decoded together -> (tokens, logits) of each."""
    pages = [list(range(first, 80, len(cases))) for first in range(len(cases))]         # interleaved
    texts, found = [list(case.prompt) for case in cases], [[] for _ in cases]
    for text, table in zip(texts, pages):
        for start in range(0, len(text) - 1, chunk):
            forward_logits(model, make_batch((text, start, min(chunk, len(text) - 1 - start), table)))
    for _ in range(count):
        logits = forward_logits(model, make_batch(*((text, len(text) - 1, 1, table) for text, table in zip(texts, pages))))
        for text, row, rows in zip(texts, logits, found):
            rows.append(row.clone())
            text.append(int(row.argmax()))
    return [(text[-count:], torch.stack(rows)) for text, rows in zip(texts, found)]


def check(found, cases, count=TOKENS, tolerance=TOLERANCE):
    for (tokens, logits), case in zip(found, cases):
        assert (logits - case.logits[:count]).abs().max() < tolerance
        assert tokens == case.tokens[:count]


def kernels_of(backend, spec):
    kernels = load_kernels("cpu", blocks_of(spec) if backend == "decode_core" else None, max_tokens=128, max_rows=8)
    assert kernels.row_invariant == (backend == "decode_core" and not not_compiled(blocks_of(spec)))
    return kernels


CHAT = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"


def write_tokenizer(folder, template=CHAT):
    """A byte-level tokenizer.json: 256 bytes, then <s>, <|end|>, <|user|> and <|assistant|>."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<s>", "<|end|>", "<|user|>", "<|assistant|>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<|end|>"}))
    if template:
        (folder / "chat_template.jinja").write_text(template)


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    write_tokenizer(folder)
    return folder


def save_packed(folder, **changes):
    """gpt-oss as OpenAI publishes it: the experts' matrices as blocks and scales of MXFP4. -> transformers' model of them"""
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    model, random = make_model("gpt-oss", **changes), torch.Generator().manual_seed(4)
    save(model, folder)
    tensors, E = load_file(folder / "model.safetensors"), model.config.num_local_experts
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                continue
            rows, columns = weight.shape[2], weight.shape[1]
            blocks = torch.randint(0, 256, (E, rows, columns // 32, 16), dtype=torch.uint8, generator=random)
            scales = torch.randint(121, 125, (E, rows, columns // 32), dtype=torch.uint8, generator=random)
            weight.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
            tensors.pop(name)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def apart(state, interleaved):
    """A state dict whose experts' gates and ups are apart, and as (experts, out, in): llama.cpp's names and shapes."""
    found = {}
    for name, tensor in state.items():
        if ".mlp.experts." not in name or name.endswith("weight"):      # named already
            found[name] = tensor
            continue
        stem, _, part = name.rpartition(".")
        bias = part.endswith("_bias")
        if interleaved and not bias:
            tensor = tensor.transpose(1, 2)
        halves = (tensor[:, ::2], tensor[:, 1::2]) if interleaved else tensor.chunk(2, 1)
        parts = zip(("gate", "up"), halves) if "gate_up" in part else (("down", tensor),)
        found |= {f"{stem}.{which}_proj.{'bias' if bias else 'weight'}": each.contiguous() for which, each in parts}
    return found


GGUF_ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss",
                      "qwen2_moe": "qwen2moe", "olmo3": "olmo2", "ministral3": "mistral3", "hunyuan_v1_dense": "hunyuan-dense",
                      "lfm2_moe": "lfm2moe", "qwen3_next": "qwen3next", "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe", "gemma4_text": "gemma4", "gemma4_unified_text": "gemma4", "gpt_neox": "gptneox", "cohere": "command-r",
                      **dict.fromkeys(("deepseek_v3", "deepseek_v2", "glm4_moe_lite", "youtu"), "deepseek2"), "glm4_moe": "glm4moe", "minimax_m2": "minimax-m2", "hunyuan_v1_moe": "hunyuan-moe", "cohere2_moe": "cohere2moe",
                      "ernie4_5_moe": "ernie4_5-moe", "muse_glimmer": "muse-glimmer"}
LAYER_NORMED = "gpt2", "gptneox", "starcoder2", "cohere2", "command-r", "olmo"


def granite_apart(state, mixed):
    """A state dict of a granite with experts, or of one that could have some, by names of other families."""
    found = {}
    for name, tensor in state.items():
        name = name.replace("block_sparse_moe.experts", "mlp.experts").replace("moe.router.weight", "moe.router.layer.weight")
        name = name.replace("shared_mlp", "mlp.shared_expert" if mixed else "mlp").replace("output_linear", "down_proj")
        parts = zip(("gate_proj", "up_proj"), tensor.chunk(2, 0)) if "input_linear" in name else [("", tensor)]
        found |= {name.replace("input_linear", part): half.contiguous() for part, half in parts}
    return found


def granite_mamba(state, config):
    """A state dict of Granite 4 whose Mamba layers are as llama.cpp has them."""
    found = {}
    for name, tensor in state.items():
        part = name.rpartition("mamba.")[2]
        shapes = {"A_log": (-1, 1), "D": (-1, 1), "norm.weight": (config.mamba_n_groups, -1)} if part != name else {}
        tensor = -tensor.exp() if part == "A_log" else tensor.squeeze(1) if part == "conv1d.weight" else tensor
        found[name.replace("dt_bias", "dt_proj.bias")] = tensor.reshape(shapes.get(part, tensor.shape))
    return found


def qwen35_reordered(state, config):
    """A state dict of Qwen3.5 by llama.cpp's names, whose value head j belongs to the key head j % Hk."""
    Hk, Hv, D = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim
    order = [j % Hk * (Hv // Hk) + j // Hk for j in range(Hv)]
    reordered = lambda rows, size: rows.unflatten(0, (Hv, size))[order].flatten(0, 1)      # noqa: E731
    found = {}
    for name, tensor in state.items():
        part = name.rpartition("linear_attn.")[2]
        if part.startswith(("in_proj_qkv", "conv1d")):
            keys = 2 * Hk * config.linear_key_head_dim
            tensor = torch.cat((tensor[:keys], reordered(tensor[keys:], D)))
            tensor = tensor.squeeze(1)
        elif part.startswith(("in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_bias")):
            tensor = reordered(tensor, D if part.startswith("in_proj_z") else 1)
        elif part.startswith("out_proj"):
            tensor = reordered(tensor.T, D).T.contiguous()
        elif name.endswith("norm.weight") and part != "norm.weight":
            tensor = tensor + 1
        found[name.replace("dt_bias", "dt_proj.bias")] = -tensor.exp() if part == "A_log" else tensor
    return found


def qwen3next_apart(state, config):
    """A state dict of Qwen3-Next by llama.cpp's names: z beside q, k and v, each of all heads; b and a stay together."""
    Hk, D, values = config.linear_num_key_heads, config.linear_key_head_dim, config.linear_num_value_heads * config.linear_value_head_dim
    found = {}
    for name, tensor in state.items():
        part = name.rpartition("linear_attn.")[2]
        if part == "in_proj_qkvz.weight":
            *qkv, z = (rows.flatten(0, 1) for rows in tensor.unflatten(0, (Hk, -1)).split((D, D, values // Hk, values // Hk), 1))
            found |= {name.replace("qkvz", "qkv"): torch.cat(qkv), name.replace("qkvz", "z"): z.contiguous()}
            continue
        if name.endswith("norm.weight") and part != "norm.weight":
            tensor = tensor + 1
        tensor = -tensor.exp() if part == "A_log" else tensor.squeeze(1) if part == "conv1d.weight" else tensor
        found[name.replace("dt_bias", "dt_proj.bias")] = tensor
    return found


def gemma4_named(state):
    """A state dict of Gemma 4 by names that llama.cpp's table has, and the rest as its converter names them."""
    endings = {"layer_scalar": "layer_scalar.weight", "gate_up_proj": "gate_up_proj.weight", "experts.down_proj": "experts.down_proj.weight"}
    named, rest = {}, {}
    for name, tensor in state.items():
        ending = next((ending for ending in endings if name.endswith(ending)), "")
        layer = "".join(name.split(".")[2:3])
        if name.endswith("router.scale"):
            rest[f"blk.{layer}.ffn_gate_inp.scale"] = tensor.numpy()
        elif name.endswith("per_expert_scale"):
            rest[f"blk.{layer}.ffn_down_exps.scale"] = tensor.numpy()
        else:
            named[name.removesuffix(ending) + endings.get(ending, "")] = tensor
    return named, rest


def gemma4_numbers(config):
    full, local = (config.per_layer_config[config.layer_types.index(kind)] for kind in (FULL, LOCAL))
    own = config.num_hidden_layers - config.num_kv_shared_layers
    return {
        "attention.key_length": full.head_dim, "attention.value_length": full.head_dim, "rope.dimension_count": full.head_dim,
        "attention.key_length_swa": local.head_dim, "attention.value_length_swa": local.head_dim, "rope.dimension_count_swa": local.head_dim,
        "attention.head_count_kv": [(local if kind == LOCAL else full).num_key_value_heads for kind in config.layer_types],
        "attention.sliding_window_pattern": [kind == LOCAL for kind in config.layer_types], "attention.shared_kv_layers": config.num_kv_shared_layers,
        "embedding_length_per_layer_input": getattr(config, "hidden_size_per_layer_input", 0),
        "rope.freq_base": config.rope_parameters[FULL]["rope_theta"], "rope.freq_base_swa": config.rope_parameters[LOCAL]["rope_theta"],
        "feed_forward_length": [config.intermediate_size * (1 + (l >= own and config.use_double_wide_mlp)) for l in range(config.num_hidden_layers)]} | (
            {"expert_used_count": config.top_k_experts} if getattr(config, "enable_moe_block", False) else {})


def nemotron_named(state, config):
    """A state dict of Nemotron-H by names that llama.cpp's table has, and its config by other families' names."""
    found = {}
    for name, tensor in state.items():
        part = name.rpartition("mixer.")[2]
        shapes = {"A_log": (-1, 1), "D": (-1, 1), "norm.weight": (config.n_groups, -1)} if part != name else {}
        tensor = -tensor.exp() if part == "A_log" else tensor.squeeze(1) if part == "conv1d.weight" else tensor
        tensor = tensor.reshape(shapes.get(part, tensor.shape))
        name = re.sub(r"^model\.", "backbone.", name).replace("dt_bias", "dt.bias").replace("correction_bias", "correction.bias")
        if ".mixer.experts." in name:
            name = name.replace("backbone.", "model.").replace("mixer", "mlp") + ".weight"
        found[name] = tensor
    kinds = config.layers_block_type
    numbers = {"ssm.conv_kernel": config.conv_kernel, "ssm.state_size": config.ssm_state_size, "ssm.group_count": config.n_groups,
               "ssm.inner_size": config.mamba_num_heads * config.mamba_head_dim, "ssm.time_step_rank": config.mamba_num_heads}
    size = config.intermediate_size
    if "moe" in kinds:
        size = config.moe_intermediate_size
        numbers |= {"expert_count": config.n_routed_experts, "expert_used_count": config.num_experts_per_tok, "expert_feed_forward_length": size,
                    "expert_shared_feed_forward_length": config.moe_shared_expert_intermediate_size, "expert_shared_count": config.n_shared_experts,
                    "expert_weights_norm": config.norm_topk_prob, "expert_weights_scale": float(config.routed_scaling_factor),
                    "expert_group_count": config.n_group, "expert_group_used_count": config.topk_group} | (
                        {"moe_latent_size": config.moe_latent_size} if config.moe_latent_size else {})
    own = {key: getattr(config, key) for key in "model_type max_position_embeddings hidden_size vocab_size num_attention_heads head_dim".split()}
    return found, SimpleNamespace(
        **own, num_hidden_layers=len(kinds), tie_word_embeddings=False, rms_norm_eps=config.layer_norm_epsilon,
        num_key_value_heads=[config.num_key_value_heads * (kind == FULL) for kind in kinds], rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        intermediate_size=[size * (kind in ("mlp", "moe")) for kind in kinds]), numbers


SIGMOID_ROUTED = "glm4moe", "minimax-m2"


def sigmoid_numbers(config):
    """The metadata of a model whose router has sigmoids, and of what is dense in it."""
    found = {"expert_gating_func": 2}
    for key, theirs in (("n_group", "expert_group_count"), ("topk_group", "expert_group_used_count"), ("n_shared_experts", "expert_shared_count"),
                        ("first_k_dense_replace", "leading_dense_block_count"), ("routed_scaling_factor", "expert_weights_scale"),
                        ("norm_topk_prob", "expert_weights_norm")):
        if hasattr(config, key):
            found[theirs] = getattr(config, key)
    return found


def latent_apart(state, config, whole):
    """A state dict with latent attention whose heads have their keys transposed, apart from their values; `whole`: as files had them before."""
    if whole:
        return state
    H, plain = config.num_attention_heads, config.qk_nope_head_dim
    found = {}
    for name, tensor in state.items():
        if not name.endswith("kv_b_proj.weight"):
            found[name] = tensor
            continue
        both = tensor.unflatten(0, (H, -1))
        found[name.replace("kv_b", "k_b")] = both[:, :plain].transpose(1, 2).contiguous()
        found[name.replace("kv_b", "v_b")] = both[:, plain:].contiguous()
    return found


def latent_numbers(config, rope, whole):
    """The metadata of latent attention, and of a router."""
    D, c, d = config.qk_nope_head_dim + config.qk_rope_head_dim, config.kv_lora_rank, config.qk_rope_head_dim
    found = {"attention.kv_lora_rank": c, "rope.dimension_count": d, "attention.head_count_kv": 1, "attention.key_length": c + d, "attention.value_length": c,
             "attention.key_length_mla": D, "attention.value_length_mla": config.v_head_dim}
    if whole:
        del found["attention.key_length_mla"], found["attention.value_length_mla"]
        found |= {"attention.head_count_kv": config.num_attention_heads, "attention.key_length": D, "attention.value_length": config.v_head_dim}
    if config.q_lora_rank:
        found["attention.q_lora_rank"] = config.q_lora_rank
    if rope.get("mscale_all_dim"):
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    if config.model_type == "minicpm3":
        del found["attention.value_length"]
        return found
    layers = config.num_hidden_layers
    kinds = getattr(config, "mlp_layer_types", None)
    found["leading_dense_block_count"] = kinds.count("dense") if kinds else getattr(config, "first_k_dense_replace", layers)
    if hasattr(config, "n_routed_experts"):
        found |= {"expert_count": config.n_routed_experts, "expert_used_count": config.num_experts_per_tok, "expert_feed_forward_length": config.moe_intermediate_size,
                  "expert_shared_count": config.n_shared_experts, "expert_weights_scale": float(config.routed_scaling_factor),
                  "expert_group_count": config.n_group, "expert_group_used_count": config.topk_group, "expert_weights_norm": config.norm_topk_prob,
                  "expert_gating_func": 1 if config.model_type in ("deepseek_v2", "mistral4") else 2}
    return found


def north_numbers(config):
    """The metadata of a North, whose first layers may be dense."""
    return {"attention.layer_norm_epsilon": config.layer_norm_eps, "logit_scale": config.logit_scale, "expert_gating_func": 2,
            "feed_forward_length": config.prefix_dense_intermediate_size, "expert_feed_forward_length": config.intermediate_size,
            "leading_dense_block_count": config.mlp_layer_types.count("dense"), "expert_weights_norm": config.norm_topk_prob,
            "attention.sliding_window_pattern": [kind == LOCAL for kind in config.layer_types]}


def ernie_numbers(config):
    """The metadata of an ERNIE with experts, of which the width of the shared ones is as wrong as the converter's."""
    return {"expert_count": config.moe_num_experts, "expert_used_count": config.moe_k, "interleave_moe_layer_step": config.moe_layer_interval,
            "leading_dense_block_count": config.moe_layer_start_index, "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_count": config.moe_num_shared_experts, "expert_shared_feed_forward_length": config.intermediate_size // config.num_key_value_heads}


def laguna_numbers(config):
    """The metadata of a Laguna, whose layers have different numbers of query heads."""
    found = {"attention.head_count": config.num_attention_heads_per_layer, "expert_weights_norm": True, "expert_gating_func": 2,
             "expert_feed_forward_length": config.moe_intermediate_size, "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
             "expert_weights_scale": float(config.moe_routed_scaling_factor), "leading_dense_block_count": config.mlp_layer_types.count("dense")}
    if local := config.rope_parameters.get(LOCAL):
        found |= {"rope.freq_base_swa": local["rope_theta"], "rope.dimension_count_swa": int(config.head_dim * local["partial_rotary_factor"]),
                  "attention.sliding_window_pattern": [kind == LOCAL for kind in config.layer_types]}
    return found


def muse_parts(model):
    """The text model of a Muse Glimmer as llama.cpp has it: with norms of heads, and 1 added to those of blocks. Its config and metadata."""
    config, found = model.config.text_config, {}
    for name, tensor in model.state_dict().items():
        if "vision" in name:
            continue
        name = name.replace("language_model.", "")
        found[name] = tensor + 1 if name.endswith("layernorm.weight") else tensor
        if name.endswith("q_proj.weight"):
            found[name.replace("q_proj", "q_norm")] = torch.full((config.head_dim,), config.qk_scale_factor)
            found[name.replace("q_proj", "k_norm")] = torch.ones(config.head_dim)
    return found, config, {"logit_scale": config.output_multiplier, "attention.sliding_window_pattern": [kind == LOCAL for kind in config.layer_types]}


def layer_normed(state, config):
    """A state dict of a family with LayerNorms in llama.cpp's form, and its config by llama's names."""
    kind, H = config.model_type, config.num_attention_heads
    if kind == "gpt2":
        state = {name: tensor.T.contiguous() if re.search(r"\.c_(attn|proj|fc)\.weight", name) else tensor for name, tensor in state.items()}
    if kind == "gpt_neox":
        state = {name: tensor.unflatten(0, (H, 3, -1)).transpose(0, 1).reshape(tensor.shape) if "query_key_value" in name else tensor
                 for name, tensor in state.items()}
    eps = next((value for key, value in config.to_dict().items() if key in ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")), 1e-5)     # of OLMo
    rope = getattr(config, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10_000.0}
    names = "model_type num_hidden_layers max_position_embeddings hidden_size vocab_size tie_word_embeddings".split()
    own = {name: getattr(config, name) for name in names} | {
        "num_attention_heads": H, "num_key_value_heads": getattr(config, "num_key_value_heads", H), 
        "head_dim": getattr(config, "head_dim", None), "rms_norm_eps": eps, "rope_parameters": rope,
        "intermediate_size": getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size}
    return state, SimpleNamespace(**own, **{key: getattr(config, key) for key in ("logit_scale", "sliding_window", "use_parallel_residual", "clip_qkv")
                                            if hasattr(config, key) and kind != "starcoder2"})


def as_gguf(path, model, quantized=False, metadata=None, beside=None, whole=False):
    """What llama.cpp's converter writes of a model: conversion/llama.py, gemma.py, phi.py and so on."""
    import gguf
    from tiny_gguf import small_gguf_metadata, write_gguf
    config = model.config
    arch, state = GGUF_ARCHITECTURES.get(config.model_type, config.model_type), model.state_dict()
    if arch == "gemma4":
        config.allow_global_per_layer_attribute_access = True
    if arch.startswith("qwen35"):
        state = qwen35_reordered(state, config)
    if arch == "qwen3next":
        state = qwen3next_apart(state, config)
    if arch.startswith("granitemoe"):
        hybrid, arch = "linear_attention" in getattr(config, "layer_types", ()), "granitemoe" if config.num_local_experts else "granite"
        state = granite_apart(state, config.num_local_experts)
        if hybrid:
            arch, state = "granitehybrid", granite_mamba(state, config)
    if arch in LAYER_NORMED:
        state, config = layer_normed(state, config)
    more = {}
    if arch == "nemotron_h":
        arch += "_moe" * ("moe" in config.layers_block_type)
        state, config, more = nemotron_named(state, config)
    if arch == "muse-glimmer":
        state, config, more = muse_parts(model)
    if arch == "ernie4_5-moe":
        state = {name.replace("gate.moe_statics.e_score_correction_bias", "moe_statics.e_score_correction.bias"): tensor for name, tensor in state.items()}
        more = ernie_numbers(config)
    if arch == "laguna":
        state = {name.replace("gate.e_score_correction_bias", "gate.e_score_correction.bias"): tensor for name, tensor in state.items()}
        more = laguna_numbers(config)
    named = {"cohere2moe": "llama", "laguna": "dots1", "muse-glimmer": "afmoe"}.get(arch, arch)     # which the package lacks: its tensors are called alike
    names = gguf.get_tensor_name_map({name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[named], config.num_hidden_layers)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, eps, width = config.num_key_value_heads, next(getattr(config, key) for key in ("rms_norm_eps", "norm_eps", "layer_norm_eps") if getattr(config, key, None)), config.intermediate_size
    if arch == "lfm2moe":
        state = {name.replace("feed_forward.experts", "mlp.experts").replace("expert_bias", "expert_bias.bias"): tensor for name, tensor in state.items()}
    if arch == "cohere2moe":
        more = north_numbers(config)
    if arch in SIGMOID_ROUTED:
        state = {name.replace("e_score_correction_bias", "e_score_correction.bias"): tensor for name, tensor in state.items()}
        more = sigmoid_numbers(config)
    latent = hasattr(config, "kv_lora_rank")
    whole = whole or arch == "minicpm3"
    if latent:
        state = latent_apart({name.replace("e_score_correction_bias", "e_score_correction.bias"): tensor for name, tensor in state.items()}, config, whole)
        more = latent_numbers(config, config.rope_parameters, whole)
    if arch == "granitehybrid":
        heads = [heads * (kind == "full_attention") for kind in config.layer_types]
    if arch.startswith("lfm2"):
        heads = [heads * (kind != "conv") for kind in config.layer_types]
    if arch == "lfm2":
        width = len(model.model.layers[0].feed_forward.w1.weight)
    tensors = dict(beside or {})
    if arch == "laguna":
        tensors |= {f"blk.{name.split('.')[2]}.attn_gate.weight": tensor.numpy() for name, tensor in state.items() if ".g_proj." in name}
        state = {name: tensor for name, tensor in state.items() if ".g_proj." not in name}
    if arch == "gemma4":
        state, tensors = gemma4_named(state)
        turned = config.rope_parameters[FULL]["partial_rotary_factor"] * model.model.rotary_emb.full_attention_inv_freq.numel()
        tensors["rope_freqs.weight"] = np.where(np.arange(model.model.rotary_emb.full_attention_inv_freq.numel()) < turned, 1, 1e30).astype(np.float32)
    for name, tensor in apart(state, interleaved=arch == "gpt-oss").items():
        if name in ("lm_head.weight", "embed_out.weight") and config.tie_word_embeddings:
            continue
        if arch in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if arch in ("llama", "smollm3", "granite", "granitemoe", "granitehybrid", "mistral3", "nemotron_h", "nemotron_h_moe", "olmo", "muse-glimmer") and re.search("[qk]_proj", name):
            tensor = tensor.view(-1, 2, head_size // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        if "conv.conv.weight" in name:
            tensor = tensor.squeeze(1)
        tensors[names.get_name(name, (".weight", ".bias")) + ".weight" * name.endswith("sinks")] = tensor.numpy()
    if quantized:
        kinds = {name: gguf.GGMLQuantizationType["MXFP4" if "_exps.weight" in name and arch == "gpt-oss" else "Q8_0"] for name in tensors}
        tensors = {name: (gguf.quantize(tensor, kinds[name]), kinds[name])
                   if tensor.ndim > 1 and tensor.shape[-1] % 32 == 0 and not name.endswith((".bias", "position_embd.weight", "gate_inp.weight", "shortconv.conv.weight", "ssm_conv1d.weight", "ssm_a", "ssm_d",
                                                             "ssm_norm.weight")) else tensor
                   for name, tensor in tensors.items()}
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    if "alpha" in rope:
        rope = {"rope_type": "default", "rope_theta": rope["rope_theta"] * rope["alpha"]**(head_size / (head_size - 2))}
    numbers = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "feed_forward_length": width, "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": heads, "attention.layer_norm_rms_epsilon": eps,
        "attention.key_length": head_size, "attention.value_length": head_size, "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_size * rope.get("partial_rotary_factor", 1)), "vocab_size": config.vocab_size}
    if experts := getattr(config, "num_local_experts", getattr(config, "num_experts", None)):
        width = getattr(config, "moe_intermediate_size", config.intermediate_size)
        numbers |= {"expert_count": experts, "expert_used_count": getattr(config, "num_experts_per_tok", 0), "expert_feed_forward_length": width}
    if shared := getattr(config, "shared_expert_intermediate_size", getattr(config, "shared_intermediate_size", None)):
        numbers["expert_shared_feed_forward_length"] = shared
    if arch.startswith("granite"):
        numbers |= {"attention.scale": config.attention_multiplier, "embedding_scale": config.embedding_multiplier,
                    "residual_scale": config.residual_multiplier, "logit_scale": config.logits_scaling,
                    "rope.scaling.finetuned": arch != "granitehybrid"}
    numbers |= more
    if arch == "cohere2moe":
        del numbers["attention.layer_norm_rms_epsilon"]
    if arch == "granitehybrid":
        numbers |= {"ssm.conv_kernel": config.mamba_d_conv, "ssm.state_size": config.mamba_d_state, "ssm.group_count": config.mamba_n_groups,
                    "ssm.inner_size": config.mamba_n_heads * config.mamba_d_head, "ssm.time_step_rank": config.mamba_n_heads}
    if arch in ("olmo2", "exaone4") and getattr(config, "sliding_window", None):
        numbers["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
    if arch.startswith(("qwen35", "qwen3next")):
        sizes = {"conv_kernel": config.linear_conv_kernel_dim, "state_size": config.linear_key_head_dim, "group_count": config.linear_num_key_heads,
                 "time_step_rank": config.linear_num_value_heads, "inner_size": config.linear_num_value_heads * config.linear_value_head_dim}
        numbers |= {f"ssm.{key}": size for key, size in sizes.items()} | {
            "attention.recurrent_layers": [kind == "linear_attention" for kind in config.layer_types], "rope.dimension_sections": [1, 1, 2, 0]}
    if arch == "qwen3next":
        numbers = {key: value for key, value in numbers.items() if key not in ("attention.recurrent_layers", "rope.dimension_sections")}
        numbers["full_attention_interval"] = 4
    if arch.startswith("lfm2"):
        numbers["shortconv.l_cache"] = config.conv_L_cache
    if arch == "lfm2moe":
        numbers |= {"leading_dense_block_count": config.num_dense_layers, "expert_gating_func": 2}
    if arch == "mistral3":
        numbers |= {"rope.scaling.yarn_log_multiplier": rope["mscale_all_dim"], "attention.temperature_scale": rope["llama_4_scaling_beta"]}
    if not arch.startswith("qwen2") and getattr(config, "sliding_window", None):
        numbers["attention.sliding_window"] = config.sliding_window
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, key, None):
            numbers[key] = getattr(config, key)
    if getattr(config, "clip_qkv", None):
        numbers["attention.clamp_kqv"] = config.clip_qkv
    if arch == "gemma4":
        numbers |= gemma4_numbers(config)
    if arch in LAYER_NORMED:
        numbers["attention.layer_norm_epsilon"] = numbers.pop("attention.layer_norm_rms_epsilon")
    for key in ("logit_scale", "use_parallel_residual"):
        if hasattr(config, key) and arch in LAYER_NORMED:
            numbers[key] = getattr(config, key)
    if rope["rope_type"] in ("linear", "yarn"):
        numbers |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    for key in ("attn_factor", "attention_factor"):         # the latter of both
        if rope["rope_type"] == "yarn" and rope.get(key) is not None:
            numbers["rope.scaling.yarn_attn_factor"] = rope[key]
    if rope["rope_type"] in ("yarn", "longrope"):
        numbers["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** -(np.arange(0, head_size, 2) / head_size)
        tensors["rope_freqs.weight"] = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    if rope["rope_type"] == "longrope":
        numbers["rope.scaling.attn_factor"] = rope.get("long_mscale") or model.model.rotary_emb.attention_scaling
        tensors |= {f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32) for kind in ("long", "short")}
    metadata = (metadata or small_gguf_metadata("gpt-2")) | {"general.architecture": arch}
    return write_gguf(path, tensors, {f"{arch}.{key}": value for key, value in numbers.items()}, metadata)


def spec_of_changed_gguf(folder, name, changes):
    """gguf_blocks's answer to the file of a tiny model some of whose metadata are others."""
    metadata, stored = read_gguf(as_gguf(folder / "tiny.gguf", make_model(name)))
    return gguf_blocks(folder / "tiny.gguf", metadata | changes, stored, None)

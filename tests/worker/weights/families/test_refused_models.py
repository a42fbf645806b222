"""What a config.json and a GGUF file's metadata cannot say of a model: a table for each."""

import json

import pytest

from chatlm.common.errors import ConfigError
from chatlm.worker.weights.formats.folder.description import hf_blocks
from families import MODELS, make_model, spec_of_changed_gguf, tiny_config
from hub_configs import (
    GEMMA4_CONFIGS, GRANITE_H_TINY, HUB_CONFIGS, LFM2_CONFIGS, LFM2_MOE, NEMOTRON_NANO_9B, QWEN35_4B)

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "rope_theta": 1e6}
PUBLISHED = HUB_CONFIGS | LFM2_CONFIGS | GEMMA4_CONFIGS | {
    "LFM2-8B-A1B": LFM2_MOE, "Nemotron-Nano-9B": NEMOTRON_NANO_9B, "granite-4.0-h-tiny": GRANITE_H_TINY,
    "Qwen3.5-4B": QWEN35_4B}

# name of a published model, or of a tiny one -> what its config.json says instead, words of the message
REFUSED_CONFIGS = {
    "Llama-3.2-1B": [
        ({"model_type": "mamba2"},
         "this server cannot run mamba2 yet; it runs: Llama 2 and 3, SmolLM2, Mistral 7B"),
        ({"model_type": None}, "model_type is missing"),
        ({"residual_multiplier": 0.22},
         "residual_multiplier is 0.22; this key is not supported in a llama model. Supported: "),
        ({"is_causal": False}, "is_causal is false; in a llama model it must be true"),
        ({"quantization_config": {"quant_method": "quanto", "bits": 4}},
         'quantization_config.quant_method is "quanto"; these packed weights are read: AWQ'),
        ({"sliding_window": 4096}, "sliding_window is 4096; this key is not supported in a llama"),
        ({"rope_interleaved": True}, "rope_interleaved is true; in a llama model it must be false"),
        ({"hidden_act": "tanh"}, 'hidden_act is "tanh"; it must be one of silu, swish, gelu'),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
        ({"hidden_size": "2048"}, 'hidden_size is "2048"; it must be an integer from 1'),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing; it must be an integer from 1"),
        ({"num_key_value_heads": 5},
         "num_attention_heads is 32; it must be a multiple of 5 (num_key_value_heads)"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN; it must be"),
        ({"rope_scaling": [1]}, "rope_scaling is a list of 1; it must be an object"),
        ({"rope_scaling": {"rope_type": "proportional"}},
         'rope_scaling.rope_type is "proportional"; it must be one of default, linear'),
        ({"rope_scaling": {"type": "linear"}},
         "rope_scaling.factor is missing; it must be a finite number from 0.01"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 3}},
         'has the key "beta_fast"; known for the type linear are factor'),
        ({"rope_theta": 0}, "rope_theta is 0; it must be a finite number from 2"),
        ({"use_sliding_window": True, "sliding_window": 4096},
         "use_sliding_window is true; this key is not supported"),
        ({"sliding_window": 4096, "max_window_layers": 3},
         "sliding_window is 4096; this key is not supported"),
        ({"use_rope": False}, "use_rope is false; in a llama model it must be true"),
        ({"residual_multiplier": 0.5}, "residual_multiplier is 0.5; this key is not supported"),
        ({"clip_qkv": 8.0}, "clip_qkv is 8.0; this key is not supported"),
    ],
    "gemma-3-4b, with images": [
        ({"text_config": {"model_type": "gemma3n_text"}},
         "this server cannot run gemma3n_text: it has AltUp"),
        ({"text_config": {"model_type": "gemma9_text"}},
         "this server cannot run gemma9_text yet; it runs: Llama"),
        ({"text_config": None}, "text_config is null; it must be an object"),
    ],
    "Qwen3-0.6B": [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; it must be 1"),
        ({"rope_scaling": YARN | {"attn_factor": "a"}},
         'rope_scaling.attn_factor is "a"; it must be a finite number'),
        ({"rope_scaling": YARN | {"extrapolation_factor": 0.5}},
         "rope_scaling.extrapolation_factor is 0.5; it must be 1"),
        ({"rope_scaling": YARN | {"finetuned": "yes"}},
         'rope_scaling.finetuned is "yes"; it must be true or false'),
        ({"layer_types": ["linear_attention"] * 28},
         'layer_types[0] is "linear_attention"; it must be one of full_attention, sliding'),
        ({"layer_types": ["full_attention"] * 27},
         "layer_types is a list of 27; it must be a list of 28 entries, each one of full_attention"),
        ({"layer_types": ["sliding_attention"] * 28},
         "sliding_window in use is missing; it must be an integer from 1"),
    ],
    "Mistral-Nemo": [
        ({"attention_bias": True}, "attention_bias is true; in a mistral model it must be false"),
        ({"layer_types": ["full_attention"] * 40},
         "layer_types is a list of 40; this key is not supported in a mistral"),
    ],
    "SmolLM3-3B": [
        ({"no_rope_layers": [1, 2] * 18}, "no_rope_layers[1] is 2; it must be an integer from 0 to 1"),
    ],
    "gemma-2-2b": [
        ({"hidden_activation": "gelu"}, 'hidden_activation is "gelu"; it must be one of gelu_pytorch_tanh'),
        ({"use_bidirectional_attention": True},
         "use_bidirectional_attention is true; in a gemma2 model it must be false"),
    ],
    "gemma-3-1b": [
        ({"attn_logit_softcapping": 50.0},
         "attn_logit_softcapping is 50.0; this key is not supported in a gemma3_text"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
         "rope_type default for sliding_attention"),
    ],
    "Phi-3-mini-128k": [
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 47}},
         "must be a list of 48"),
    ],
    "Qwen3-30B-A3B": [
        ({"mlp_only_layers": ["0"]}, 'mlp_only_layers[0] is "0"; it must be an integer from 0'),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0; it must be an integer from 1"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok is 129; it must be an integer from 1 to 128"),
        ({"num_experts": 0}, "num_experts is 0; it must be an integer from 1 to 4,096"),
        ({"shared_expert_intermediate_size": 512},
         "shared_expert_intermediate_size is 512; this key is not supported"),
    ],
    "gpt-oss-20b": [
        ({"swiglu_limit": 10.0}, "swiglu_limit is 10.0; in a gpt_oss model it must be 7.0"),
        ({"swiglu_alpha": 1.5}, "swiglu_alpha is 1.5; in a gpt_oss model it must be 1.702"),
        ({"quantization_config": {"quant_method": "fp8"}},
         'quantization_config.quant_method is "fp8"; it must be one of mxfp4'),
        ({"quantization_config": [1]},
         "quantization_config.quant_method is missing; it must be one of mxfp4"),
    ],
    "Phi-4-mini": [
        ({"full_attn_mod": 2}, "full_attn_mod is 2; in a phi3 model it must be 1"),
        ({"partial_rotary_factor": 0.01},
         "the number of rotated dimensions is 1; it must be a multiple of 2"),
    ],
    "LFM2-1.2B": [
        ({"layer_types": ["conv", "sliding_attention"] * 8},
         'layer_types[1] is "sliding_attention"; it must be one of full_attention, conv'),
        ({"layer_types": ["conv"] * 16}, "none of its layers is full_attention"),
        ({"layer_types": ["conv"] * 15}, "is a list of 15; it must be a list of 16"),
        ({"full_attn_idxs": [2, "5"]}, 'full_attn_idxs[1] is "5"; it must be an integer from 0'),
        ({"conv_L_cache": 1}, "conv_L_cache is 1; it must be an integer from 2"),
        ({"norm_eps": "small"}, 'norm_eps is "small"; it must be'),
        ({"block_ff_dim": 0}, "block_ff_dim is 0; it must be an integer from 1"),
        ({"tie_embedding": 1}, "tie_embedding is 1; it must be true or false"),
    ],
    "LFM2-350M": [
        ({"block_ff_dim": 1, "intermediate_size": 1, "block_auto_adjust_ff_dim": True},
         "the width of its feed-forward parts is 0; it must be an integer from 1"),
    ],
    "LFM2-8B-A1B": [
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; it must be true or false"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0; it must be a finite number from 0.0001"),
        ({"num_dense_layers": -1}, "num_dense_layers is -1; it must be an integer from 0"),
        ({"layer_types": None}, "layer_types is missing"),
        ({"num_experts_per_tok": 33}, "num_experts_per_tok is 33; it must be an integer from 1 to 32"),
    ],
    "Nemotron-Nano-9B": [
        ({"hybrid_override_pattern": "M-MX"},
         'hybrid_override_pattern[3] is "X"; it must be one of linear_attention'),
        ({"hybrid_override_pattern": "-E-"}, "none of its layers is full_attention"),
        ({"layers_block_type": "mamba"}, 'layers_block_type[0] is "m"; it must be one of'),
        ({"layers_block_type": {"0": "mamba"}}, "layers_block_type is an object"),
        ({"hybrid_override_pattern": None}, "layers_block_type is missing, and so is"),
        ({"hybrid_override_pattern": "M*E", "mlp_bias": True},
         "mlp_bias is true; in a model with experts it must be false"),
        ({"layers_block_type": ["mamba", 3]}, "layers_block_type[1] is 3"),
        ({"mlp_hidden_act": "silu"}, 'mlp_hidden_act is "silu"; it must be one of relu2'),
        ({"hybrid_override_pattern": "M-M-"}, "none of its layers is full_attention"),
        ({"n_groups": 3}, "mamba_num_heads is 128; it must be a multiple of 3"),
        ({"time_step_limit": [0.01, 1.0]}, "time_step_limit is a list of 2"),
        ({"hybrid_override_pattern": "M*E", "n_group": 3},
         "the number of experts is 8; it must be a multiple of 3"),
        ({"hybrid_override_pattern": "M*E", "n_group": 8},
         "the number of experts is 8; it must be a multiple of 16"),
        ({"hybrid_override_pattern": "M*E", "n_group": 2, "topk_group": 1, "num_experts_per_tok": 5},
         "topk_group is 1; it must be 2"),
        ({"hybrid_override_pattern": "M*E", "n_group": 2, "topk_group": 3},
         "topk_group is 3; it must be an integer from 1 to 2"),
        ({"hybrid_override_pattern": "M*E", "num_experts_per_tok": 9},
         "num_experts_per_tok is 9; it must be an integer from 1 to 8"),
        ({"hybrid_override_pattern": "M*E", "moe_latent_size": 0},
         "moe_latent_size is 0; it must be an integer from 1"),
        ({"hybrid_override_pattern": "M*E", "routed_scaling_factor": -1},
         "routed_scaling_factor is -1; it must be a finite number from 0.0001"),
    ],
    "granite-4.0-h-tiny": [
        ({"layer_types": ["mamba2", *["attention"] * 39]},
         'layer_types[0] is "mamba2"; it must be one of full_attention, mamba'),
        ({"layer_types": None}, "layer_types is missing; it must be a list"),
        ({"layer_types": ["mamba"] * 40}, "none of its layers is full_attention"),
        ({"mamba_d_head": "wide"}, 'mamba_d_head is "wide"; it must be an integer from 1'),
        ({"mamba_n_groups": 5}, "mamba_n_heads is 48; it must be a multiple of 5"),
        ({"time_step_limit": [0.0, 0.1]}, "time_step_limit is a list of 2; it must be [0.0, Infinity]"),
        ({"mamba_d_conv": 1}, "mamba_d_conv is 1; it must be"),
    ],
    "Qwen3.5-4B": [
        ({"text_config.attn_output_gate": False},
         "attn_output_gate is false; in a qwen3_5_text model it must be true"),
        ({"text_config.linear_num_key_heads": 16, "text_config.linear_num_value_heads": 33},
         "linear_num_value_heads is 33; it must be a multiple of 16 (linear_num_key_heads)"),
    ],
    "gemma-4-E2B": [
        ({"text_config.use_bidirectional_attention": "all"},
         'use_bidirectional_attention is "all"; it must be one of vision'),
        ({"text_config.num_kv_shared_layers": 35},
         "num_kv_shared_layers is 35; it must be an integer from 0 to 34"),
        ({"text_config.num_kv_shared_layers": 32},
         'layer_types[4] is "full_attention", but none of the first 3 layers is'),
        ({"text_config.vocab_size_per_layer_input": 1000},
         "vocab_size_per_layer_input is 1000; it must be 262144"),
        ({"text_config.num_attention_heads": 3, "text_config.num_key_value_heads": 2},
         "num_attention_heads is 3; it must be a multiple of 2"),
        ({"text_config.global_head_dim": "512"}, 'global_head_dim is "512"; it must be an integer'),
        ({"text_config.per_layer_config": {"4": {"head_dim": 512}}},
         "must give the same sizes for each layer with full_attention (4, 9, 14"),
        ({"text_config.per_layer_config": {str(layer): {"head_dim": 512, "sliding_window": 3}
                                           for layer in range(4, 35, 5)}},
         'has the key "sliding_window"; known are head_dim'),
        ({"text_config.rope_parameters": [1]}, "rope_parameters is a list of 1; it must be an object"),
        ({"text_config.rope_parameters": {"full_attention": {"rope_type": "default"}}},
         "rope_parameters.sliding_attention is null; it must be an object"),
        ({"text_config.rope_parameters": {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {}}},
         'rope_type is "yarn"; it must be one of default, proportional'),
        ({"text_config.rope_parameters": {"full_attention": {"factor": 2.0}, "sliding_attention": {}}},
         'has the key "factor"; known are rope_type'),
        ({"text_config.rope_scaling": {"rope_type": "linear", "factor": 2}},
         "in a gemma4_text model rope_parameters gives this"),
        ({"text_config.enable_moe_block": True, "text_config.num_experts": 4},
         "num_experts_per_tok is missing; it must be an integer from 1 to 4"),
        ({"text_config.query_pre_attn_scalar": 256},
         "query_pre_attn_scalar is 256; this key is not supported in a gemma4_text"),
    ],
    "tiny phimoe": [
        ({"num_experts_per_tok": 3}, "num_experts_per_tok is 3; it must be 2"),
        ({"router_jitter_noise": 2.0}, "router_jitter_noise is 2.0; it must be"),
    ],
    "tiny gpt2": [
        ({"scale_attn_by_inverse_layer_idx": True},
         "scale_attn_by_inverse_layer_idx is true; this key is not supported in a gpt2 model. "
         "Supported: activation_function"),
        ({"scale_attn_weights": False}, "scale_attn_weights is false; in a gpt2 model it must be true"),
        ({"activation_function": "relu"}, 'activation_function is "relu"; it must be one of gelu, gelu_new'),
    ],
    "tiny pythia": [
        ({"hidden_act": "silu"}, 'hidden_act is "silu"; it must be one of gelu, gelu_new'),
        ({"rotary_pct": 1.5}, "rotary_pct is 1.5; it must be a finite number from 0.01 to 1"),
    ],
    "tiny starcoder2": [
        ({"norm_type": "rms_norm"}, 'norm_type is "rms_norm"; it must be one of layer_norm'),
        ({"mlp_type": "gated"}, 'mlp_type is "gated"; it must be one of default'),
    ],
    "tiny cohere2": [
        ({"use_parallel_block": False}, "use_parallel_block is false; in a cohere2 model it must be true"),
        ({"rotary_pct": 0.5}, "rotary_pct is 0.5; it must be 1"),
        ({"position_embedding_type": "alibi"},
         'position_embedding_type is "alibi"; it must be one of rope_gptj'),
    ],
}

# name of a tiny model -> what its file's metadata say instead, words of the message
REFUSED_METADATA = {
    "llama2": [
        ({"llama.attention.scale": 0.5},
         "llama.attention.scale is 0.5; this key is not supported in a llama model"),
        ({"llama.attn_logit_softcapping": 50.0},
         "llama.attn_logit_softcapping is 50.0; this key is not supported in a llama"),
        ({"llama.rope.dimension_count": 7}, "llama.rope.dimension_count is 7; it must be a multiple of 2"),
        ({"llama.attention.temperature_scale": 0.1}, "llama.attention.temperature_scale is 0.1"),
        ({"llama.residual_scale": 0.5}, "llama.residual_scale is 0.5"),
    ],
    "qwen3": [
        ({"qwen3.expert_count": 8}, "qwen3.expert_count is 8; this key is not supported"),
        ({"qwen3.rope.dimension_count": 8}, "qwen3.rope.dimension_count is 8; it must be 32"),
        ({"qwen3.rope.scaling.attn_factor": 2.0}, "qwen3.rope.scaling.attn_factor is 2.0; it must be 1"),
        ({"qwen3.rope.scaling.yarn_ext_factor": 0.5},
         "qwen3.rope.scaling.yarn_ext_factor is 0.5; it must be 1"),
        ({"qwen3.rope.scaling.yarn_attn_factor": -1.0},
         "qwen3.rope.scaling.yarn_attn_factor is -1.0; it must be a finite number"),
        ({"qwen3.rope.scaling.factor": "4"}, 'qwen3.rope.scaling.factor is "4"; it must be a finite number'),
        # vectors that are made otherwise than here
        ({"qwen3.pooling_type": 2},
         "qwen3.pooling_type is 2 (cls); in a qwen3 model it must be 0 (none), 1 (mean), 3 (last) or 4"),
        ({"qwen3.pooling_type": 9}, "qwen3.pooling_type is 9 (unknown)"),
        ({"qwen3.pooling_type": True}, "qwen3.pooling_type is true (unknown)"),
        ({"qwen3.pooling_type": -1}, "qwen3.pooling_type is -1 (unknown)"),
        ({"qwen3.attention.causal": False}, "qwen3.attention.causal is false: such"),
    ],
    "gemma2": [
        ({"gemma2.attention.sliding_window_pattern": [True, False]},
         "gemma2.attention.sliding_window_pattern is a list of 2; "
         "it must be a list of 4 entries, each true or false"),
        ({"gemma2.attention.sliding_window_pattern": 0},
         "gemma2.attention.sliding_window_pattern is 0; it must be"),
        ({"gemma2.final_logit_softcapping": -1.0},
         "gemma2.final_logit_softcapping is -1.0; it must be a finite number"),
    ],
    "phi3-long": [
        ({"phi3.rope.dimension_count": 11}, "phi3.rope.dimension_count is 11; it must be a multiple of 2"),
    ],
    "granite": [
        ({"granite.ssm.dt_b_c_rms": True}, "granite.ssm.dt_b_c_rms is true; this key is not supported"),
        ({"granite.residual_scale": 0.0},
         "granite.residual_scale is 0.0; it must be a finite number from 0.0001"),
    ],
    "lfm2moe": [
        ({"lfm2moe.expert_gating_func": 1}, "lfm2moe.expert_gating_func is 1; it must be 2"),
        ({"lfm2moe.expert_weights_scale": 0.0},
         "lfm2moe.expert_weights_scale is 0.0; it must be a finite number from"),
    ],
    "gemma4": [
        ({"gemma4.attention.key_length_swa": 15}, "attention.value_length_swa is 16; it must be 15"),
        ({"gemma4.attention.head_count_kv": [*[2] * 3, 1, *[2] * 4]},
         "attention.head_count_kv is a list of 8; it must be the same in layers 1, 3, 7"),
        ({"gemma4.feed_forward_length": [*[96] * 5, *[288] * 3]},
         "feed_forward_length is 288 in the last layers; it must be 96 or 192"),
        ({"gemma4.attention.sliding_window_pattern": None}, "attention.sliding_window_pattern is missing"),
        ({"gemma4.rope.scaling.type": "yarn"}, 'is "yarn"; it must be one of none'),
        ({"gemma4.rope.dimension_count": 16}, "rope.dimension_count is 16; it must be 32"),
        ({"gemma4.attention.shared_kv_layers": 8}, "is 8; it must be an integer from 0 to 7"),
        ({"gemma4.query_scale": 2.0}, "gemma4.query_scale is 2.0; this key is not supported"),
    ],
    "nemotron3": [
        ({"nemotron_h_moe.block_count": 0}, "block_count is 0; it must be an integer from 1"),
        ({"nemotron_h_moe.nextn_predict_layers": 5}, "block_count leaves no layers beside the draft head"),
        ({"nemotron_h_moe.expert_group_used_count": 9, "nemotron_h_moe.expert_group_count": 4},
         "the number of experts"),
        ({"nemotron_h_moe.attention.head_count_kv": ["2"] * 5},
         'head_count_kv is "2"; it must be an integer'),
        ({"nemotron_h_moe.expert_weights_norm": 1}, "expert_weights_norm is 1; it must be true or false"),
        ({"nemotron_h_moe.expert_weights_scale": float("inf")},
         "expert_weights_scale is Infinity; it must be a finite number"),
    ],
}


def rows_of(table):
    return [(name, *row) for name, rows in table.items() for row in rows]


def config_of(name):
    if name.startswith("tiny "):
        name = name.removeprefix("tiny ")
        return tiny_config(name).to_dict() | {"model_type": MODELS[name][0]}
    return PUBLISHED[name]


def changed(config, changes):
    """A key such as text_config.layer_types is one of the text model."""
    config = dict(config)
    for key, value in changes.items():
        outer, _, inner = key.rpartition(".")
        if outer:
            config[outer] = config[outer] | {inner: value}
        else:
            config[key] = value
    return config


@pytest.mark.parametrize("name, changes, words", rows_of(REFUSED_CONFIGS))
def test_what_a_config_cannot_say_is_named(name, changes, words, tmp_path):
    """In a line with the file and with what is known."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(changed(config_of(name), changes)))
    with pytest.raises(ConfigError) as caught:
        hf_blocks(path, None)
    message = str(caught.value)
    assert words in message and str(path) in message and message.isprintable()


@pytest.mark.parametrize("name, changes, words", rows_of(REFUSED_METADATA))
def test_what_metadata_cannot_say_is_named(name, changes, words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        spec_of_changed_gguf(tmp_path, name, changes)
    assert words in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("name, changes", [
    ("llama2", {"llama.expert_count": 0}),
    ("llama2", {"llama.rope.scaling.type": "longrope"}),
    ("qwen2.5", {"qwen2.attention.sliding_window": 16}),  # said of no layer: none, as in llama.cpp
    ("qwen3", {"qwen3.rope.scaling.yarn_attn_factor": 0.878}),
    ("qwen3", {"qwen3.rope.scaling.yarn_ext_factor": 1.0}),
    ("gemma2", {"gemma2.attention.sliding_window_pattern": 2}),
    ("granite", {"granite.ssm.state_size": 16}),
    ("exaone4", {"exaone4.attention.sliding_window_pattern": 4}),
])
def test_metadata_without_effect_change_nothing(name, changes, tmp_path):
    assert spec_of_changed_gguf(tmp_path, name, changes) == spec_of_changed_gguf(tmp_path, name, {})
